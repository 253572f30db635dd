"""Runs in vLLM's environment: `python -m tests.zoo.vllm_process DO DIRECTORY DEVICE FAMILY...`.

DO is `make` (writes checkpoints), `cold` (loads both as a server would when it starts, and digests them) or `update`
(one worker takes updates, and is compared with what `cold` found). Each writes JSON beside the checkpoints.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from checkpoint_engine_vllm.sink import VllmSink
from tests.oracle import walk
from tests.oracle.walk import differences
from tests.zoo.families import Family
from tests.zoo.senders import Order, Sender
from tests.zoo.vllm_engine import ENVIRONMENT, build, contents_of, prepare
from tests.zoo.vllm_families import FAMILIES

TAGS = ("A", "B")
Look = Callable[[], Mapping[str, str]]
STEPS = (
    ("A", "auto", Order(100_000, seed=None)),
    ("B", "auto", Order(1, seed=1)),
    ("A", "auto", Order(60_000, seed=2)),
    ("B", "auto", Order(1 << 30, seed=None)),
    ("A", "loader", Order(100_000, seed=3)),
)
"""By proof, by plan (once compared, twice not), and by vLLM's loader."""
_LONGEST = 400
_CHANGED = int(os.environ.get("ZOO_CHANGED", "6"))
"""Tensors of which one element is changed, to see whether a comparison finds it."""
_SPOILED = int(os.environ.get("ZOO_SPOILED", "4"))
"""Tensors of a model of which one byte is changed, likewise."""


def cold(family: Family, directory: Path, device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {tag: _loaded(family, directory / tag, device) for tag in TAGS}
    with _everything_filled():
        again = _loaded(family, directory / "A", device)
    unfilled = [path for path, digest in found["A"].items() if again.get(path) != digest]
    for tag in TAGS:
        found[tag] = _without(found[tag], unfilled)
    return {**found, "unfilled": unfilled}


def _without(contents: Mapping[str, str], paths: Sequence[str]) -> dict[str, str]:
    return {path: digest for path, digest in contents.items() if path not in paths}


def _loaded(family: Family, checkpoint: Path, device: torch.device) -> dict[str, str]:
    worker = build(family, checkpoint, "auto", device)
    found = contents_of(worker)
    del worker
    gc.collect()
    return found


@contextlib.contextmanager
def _everything_filled() -> Generator[None]:
    """What a cold start leaves as it finds it (a head that a classifier has no use for) is not the same twice."""
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode=False)


def update(family: Family, directory: Path, device: torch.device) -> dict[str, Any]:
    expected = json.loads((directory / "cold.json").read_text())
    worker = build(family, directory / "A", "dummy", device)
    model = worker.model_runner.get_model()
    sender = Sender(VllmSink(worker), device)

    def look() -> dict[str, str]:
        return _without(contents_of(worker), expected["unfilled"])

    tensors = {tag: read(directory / tag) for tag in TAGS}
    steps: list[dict[str, Any]] = []
    for tag, mode, order in STEPS:
        said = sender.send(tensors[tag], mode, order)
        differing = [] if "error" in said else differences(look(), expected[tag])
        steps.append({"to": tag, "mode": mode, **said, "differing": differing[:12], "count": len(differing)})
    return {
        "vllm": next((step["vllm"] for step in steps if "vllm" in step), None),
        "class": type(model).__name__,
        "tensors": len(tensors["A"]),
        "same": sum(expected["B"].get(path) == found for path, found in expected["A"].items()),
        "paths": len(expected["A"]),
        "steps": steps,
        "verify": {
            **verified(sender, tensors, look),
            "overlooked": overlooked(sender, tensors["A"], model, expected),
        },
    }


def verified(sender: Sender, tensors: dict[str, dict[str, torch.Tensor]], look: Look) -> dict[str, Any]:
    """What comparisons find, the worker holding A: with A, with B, and with A but for one element of one tensor."""
    before = look()
    order = Order(100_000, seed=4)
    equal, other = (sender.send(tensors[tag], "verify", order) for tag in TAGS)
    blind: list[str] = []
    failed: list[str] = []
    if "error" not in equal:
        names = list(tensors["A"])
        for name in random.Random(0).sample(names, min(_CHANGED, len(names))):
            said = sender.send({**tensors["A"], name: altered(tensors["A"][name])}, "verify", order)
            if "error" in said:
                failed.append(f"{name}: {said['error']}")
            elif not said["different_tensors"]:
                blind.append(name)
    changed_by_it = differences(look(), before)[:8]
    return {
        "equal": equal,
        "other": other,
        "blind": [name for name in blind if _counts(sender, tensors["A"], name, look, before)],
        "failed": failed,
        "changed_by_it": changed_by_it,
    }


def overlooked(
    sender: Sender, checkpoint: dict[str, torch.Tensor], model: torch.nn.Module, expected: Mapping[str, Any]
) -> list[str]:
    """What of a model, of all that its weights decide, may hold another byte without a comparison finding it."""
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for path, tensor in walk.tensors(model).items():
        decided = expected["A"].get(path) != expected["B"].get(path)
        if decided and tensor.layout == torch.strided and tensor.is_contiguous() and tensor.numel():
            found.setdefault(tensor.data_ptr(), (path, tensor))
    missed: list[str] = []
    for path, tensor in random.Random(1).sample(list(found.values()), min(_SPOILED, len(found))):
        last = tensor.data.reshape(-1).view(torch.uint8)[-1]
        last ^= 1
        said = sender.send(checkpoint, "verify", Order(100_000, seed=None))
        if not (said.get("different_tensors") or said.get("unseen_tensors")):
            missed.append(f"{path} {said.get('error', '')}")
        last ^= 1
    return missed


def _counts(sender: Sender, tensors: dict[str, torch.Tensor], name: str, look: Look, before: Mapping[str, str]) -> bool:
    """Whether the model computes with a tensor at all: an update with one element changed leaves something else."""
    order = Order(100_000, seed=None)
    sender.send({**tensors, name: altered(tensors[name])}, "auto", order)
    counts = bool(differences(look(), before))
    sender.send(tensors, "auto", order)
    return counts


def altered(tensor: torch.Tensor) -> torch.Tensor:
    """One element is another, by enough to be seen through any cast."""
    copy = tensor.clone()
    flat = copy.view(-1)
    flat[-1] = (flat[-1].float() + 1.5).to(copy.dtype) if copy.is_floating_point() else flat[-1] ^ 1
    return copy


def read(checkpoint: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118 - not a mapping
    return found


def done(do: str, family: Family, directory: Path, device: torch.device) -> dict[str, Any]:
    if do == "make":
        from tests.zoo.checkpoints import make

        make(directory, family)
        return {}
    return cold(family, directory, device) if do == "cold" else update(family, directory, device)


def main(do: str, parent: str, device: str, *names: str) -> None:
    os.environ.update(ENVIRONMENT)
    place = torch.device(device, 0) if device == "cuda" else torch.device(device)
    if do != "make":
        prepare(place, Path(tempfile.mkdtemp()) / "rendezvous")
    torch.set_num_threads(1)
    for name in names:
        directory, start = Path(parent) / name, time.monotonic()
        directory.mkdir(parents=True, exist_ok=True)
        result = directory / f"{do}.json"
        try:
            found = done(do, FAMILIES[name], directory, place)
        except Exception as error:  # noqa: BLE001 - told in the table
            traceback.print_exc()
            found = {"failed": f"{type(error).__name__}: {str(error)[:_LONGEST]}"}
        result.write_text(json.dumps({**found, "seconds": round(time.monotonic() - start, 2)}))
        print(
            do, name, found.get("failed", "")[:150].replace("\n", " "), f"{time.monotonic() - start:.1f} s", flush=True
        )
        gc.collect()


if __name__ == "__main__":
    main(*sys.argv[1:])
