"""A sample of the zoo: one family of each kind that has been wrong once; scripts/zoo.py runs all of them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from tests.environments import ROOT
from tests.zoo.verdicts import Verdict, judge

SECONDS = 420
BY_PLAN, PARTLY, BY_LOADER, REFUSED = "by plan", "partly by plan", "by loader", "refused"
SAMPLE = {
    "LlamaForCausalLM": BY_PLAN,
    "MixtralForCausalLM": BY_PLAN,
    "Qwen3ForCausalLM tied": BY_PLAN,
    "Qwen3ForCausalLM own head": REFUSED,  # in an engine that started with a tied one
    "Qwen3-Reranker": BY_LOADER,  # computes its score from an output layer, at the end of each call
    "BertForMaskedLM": BY_PLAN,  # ties its head at the end of each call of its loader
    "BertModel": BY_PLAN,  # pads an embedding after it has taken all other tensors
    "Ernie4_5_MoeForCausalLM": BY_PLAN,  # routes in float32
    "GraniteMoeHybridForCausalLM": PARTLY,  # keeps a view of a weight that is packed; computes A from A_log
    "GptOssForCausalLM": BY_PLAN,  # its loader writes experts into parameters by itself
    "OpenAIPrivacyFilterForTokenClassification": BY_PLAN,  # likewise, of tensors that it puts side by side and turns
    "Qwen3NextForCausalLM": BY_PLAN,  # makes a parameter on a device that it names
    "VaultGemmaForCausalLM": BY_PLAN,  # transformers' own model; a layer that is packed keeps a constant in a buffer
    "Gemma4ForCausalLM": BY_PLAN,  # has weights that are buffers
}
"""Family -> how its updates go. Each takes two seconds to load cold, and four for its updates and comparisons."""


ONLY_ON_GPUS = {
    "FalconMambaForCausalLM": PARTLY,  # a cold start computes A from A_log on the host
    "LlamaForCausalLM fp8_per_block": BY_PLAN,  # processing that is compiled
}
"""What a CPU cannot show."""


def run_zoo(python: Path, directory: Path, device: str, families: Collection[str]) -> Path:
    with (directory / "log").open("w") as log:
        for do in ("make", "cold", "update"):
            command = [python, "-m", "tests.zoo.vllm_process", do, directory, device, *families]
            subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, timeout=SECONDS, check=True)
    return directory


@pytest.fixture(scope="module")
def zoo(vllm_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes found: one has loaded each checkpoint cold, the other has taken updates."""
    return run_zoo(vllm_bin / "python", tmp_path_factory.mktemp("zoo"), "cpu", SAMPLE)


def _found(directory: Path, do: str) -> dict[str, Any]:
    return json.loads((directory / f"{do}.json").read_text())


@pytest.mark.timeout(3 * SECONDS)
@pytest.mark.parametrize("family", SAMPLE)
def test_every_update_leaves_what_a_cold_start_would(zoo: Path, family: str) -> None:
    verdict = judge(_found(zoo / family, "cold"), _found(zoo / family, "update"))
    assert verdict.outcome == SAMPLE[family], verdict


@pytest.mark.gpu
@pytest.mark.timeout(3 * SECONDS)
def test_the_same_on_a_gpu(vllm_bin: Path, tmp_path: Path) -> None:
    found = run_zoo(vllm_bin / "python", tmp_path, "cuda", ONLY_ON_GPUS)
    verdicts = {name: judge(_found(found / name, "cold"), _found(found / name, "update")) for name in ONLY_ON_GPUS}
    assert {name: verdict.outcome for name, verdict in verdicts.items()} == ONLY_ON_GPUS, verdicts


def test_a_sample_without_differences_proves_nothing(zoo: Path) -> None:
    """Two seeds differ in all that layers compute, and an update that leaves something else is called so."""
    cold, update = _found(zoo / "LlamaForCausalLM", "cold"), _found(zoo / "LlamaForCausalLM", "update")
    weights = [path for path in cold["A"] if path.endswith(("norm.weight", "apply(eye)"))]
    assert len(weights) > 10
    assert all(cold["A"][path] != cold["B"][path] for path in weights)
    update["steps"][1]["differing"] = ["a"]
    assert judge(cold, update) == Verdict("silently wrong", "to B (plan): a")


MORE_THAN_COPIES = {
    "made_anew": "model.norm.held.twice, which is neither a parameter nor a buffer",
    "made_anew_of_values": "vLLM's loader changes model.norm.held.twice too, which no copy reaches",
    "in_place": "vLLM's loader changes model.norm.held.twice too, which no copy reaches",
    "number": "vLLM's loader changes total too, which no copy reaches",
}
"""What a loader keeps of a weight besides its parameter -> why the updates after the first are (partly) its own."""


@pytest.fixture(scope="module")
def more_than_copies(zoo: Path, vllm_bin: Path) -> dict[str, Any]:
    """What became of loaders that do more than copy."""
    command = [vllm_bin / "python", "-m", "tests.zoo.more_than_copies", zoo / "LlamaForCausalLM"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.timeout(2 * SECONDS)
@pytest.mark.parametrize("case", MORE_THAN_COPIES)
def test_what_a_loader_changes_and_no_copy_reaches_is_left_to_it(more_than_copies: dict[str, Any], case: str) -> None:
    found = more_than_copies[case]
    assert [step["differing"] for step in found["steps"]] == [[]] * 4
    assert all(MORE_THAN_COPIES[case] in step["loader_reason"] for step in found["steps"][1:]), found["steps"]
    assert (found["equal"]["different"], found["equal"]["unseen_tensors"]) == ("", 0)
    assert found["spoiled"]["different"] in ("model.norm.held.twice", "total"), found["spoiled"]
    assert found["changed by it"] == []


@pytest.mark.timeout(2 * SECONDS)
def test_a_loader_that_must_get_all_tensors_in_one_call_gets_them_so(more_than_copies: dict[str, Any]) -> None:
    found = more_than_copies["guesses"]
    assert [(step.get("error", ""), step["differing"]) for step in found["steps"]] == [("", [])] * 4
    assert found["steps"][-1]["reload"] == "plan"
    assert (found["equal"]["different"], found["spoiled"]["different"]) == ("", "model.norm.weight")


@pytest.fixture(scope="module")
def unnamed(zoo: Path, vllm_bin: Path) -> dict[str, Any]:
    """What became of updates without the buffers of a model that started with noise for weights."""
    command = [vllm_bin / "python", "-m", "tests.zoo.unnamed_buffers", zoo / "Gemma4ForCausalLM"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=True)
    return json.loads(done.stdout.splitlines()[-1])


NOISE = "a start with dummy weights has filled these buffers with noise"


@pytest.mark.timeout(2 * SECONDS)
def test_a_buffer_that_would_stay_noise_is_named(unnamed: dict[str, Any]) -> None:
    first = unnamed["first"]
    assert "model.layers.0.layer_scalar (nothing)" in first["error"]
    assert NOISE in first["error"]
    assert (first["intact"], first["version"]) == (True, "")
    assert NOISE in unnamed["first compared"]["error"]
    assert (unnamed["whole"]["version"], unnamed["whole"]["differing"]) == ("v", [])


@pytest.mark.timeout(2 * SECONDS)
def test_a_buffer_that_would_stay_noise_is_named_where_nothing_is_announced(unnamed: dict[str, Any]) -> None:
    assert NOISE in unnamed["unannounced"]["error"]
    assert (unnamed["unannounced"]["intact"], unnamed["unannounced"]["version"]) == (False, "")
    assert unnamed["unannounced and whole"] == {"error": "", "version": "v", "differing": []}


@pytest.mark.timeout(2 * SECONDS)
def test_buffers_that_came_once_stay(unnamed: dict[str, Any]) -> None:
    """They are no noise any more, and a trainer that changes them has to say so: a comparison sees it."""
    assert "error" not in unnamed["later"]
    assert unnamed["later"]["differing"]
    assert all("layer_scalar" in path for path in unnamed["later"]["differing"])
    assert (unnamed["later compared"]["different_tensors"], unnamed["later compared"]["unseen_tensors"]) == (0, 0)
    assert "model.layers.0.layer_scalar" in unnamed["later compared with all"]["different"]


@pytest.mark.timeout(2 * SECONDS)
def test_noise_that_was_accepted_is_told_by_a_comparison(unnamed: dict[str, Any]) -> None:
    assert all("layer_scalar" in path for path in unnamed["lenient"]["differing"])
    assert unnamed["lenient compared"]["unseen_tensors"] == len(unnamed["lenient"]["differing"]) // 2 > 0
    assert "model.layers.0.layer_scalar (it holds the noise of the start" in unnamed["lenient compared"]["not_compared"]
    assert "model.layers.0.layer_scalar" in unnamed["lenient compared with all"]["different"]
