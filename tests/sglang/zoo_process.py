"""Runs in SGLang's environment: what cold starts hold, and what updates make of a model that had no weights.

zoo_process.py make DIRECTORY NAME...                  NAME: a family of tests/zoo/sglang_families.py
zoo_process.py cold DIRECTORY NAME...                  NAME: a directory there, with checkpoints A and B
zoo_process.py update DIRECTORY COLD NAME... [--all]   COLD: a file of what `cold` printed; --all: spoil each
zoo_process.py experts DIRECTORY NAME                  experts are moved about between updates, as by --enable-eplb

Prints a line of JSON for each name.
"""

from __future__ import annotations

import json
import logging
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from quantised_process import DEVICE, load, read, start

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.oracle.walk import contents, differences

STEPS = (("a", "auto"), ("b", "auto"), ("a", "auto"), ("b", "loader"))
"""By the loader, which proves the plan; by plan, checked; by plan; and by the loader."""
SPOILT = 4
"""Tensors of which one element is changed before a comparison, if not all are."""
LEFT_OUT = ("quant_config", "alt_stream", "pp_group", "tp_group", "moe_runner_config")
Weights = dict[str, torch.Tensor]


def make(parent: Path, name: str) -> dict[str, Any]:
    """Writes both checkpoints."""
    from tests.zoo import checkpoints
    from tests.zoo.sglang_families import FAMILIES

    checkpoints.make(parent / name, FAMILIES[name])
    return {}


def cold(parent: Path, name: str) -> dict[str, Any]:
    """What a start with each of the two checkpoints holds, and what is another thing in every start with the same."""
    found = {key: contents(load(parent / part, "")[0], left_out=LEFT_OUT) for key, part in both(name).items()}
    torch.use_deterministic_algorithms(mode=True, warn_only=True)  # memory that nobody writes to is filled with NaN
    again = contents(load(parent / name / "A", "")[0], left_out=LEFT_OUT)
    torch.use_deterministic_algorithms(mode=False)
    chance = [path for path, value in again.items() if found["a"].get(path) != value]
    return {**found, "chance": chance}


def both(name: str) -> dict[str, str]:
    return {"a": f"{name}/A", "b": f"{name}/B"}


def buckets(weights: Weights, order: random.Random) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """All tensors, shuffled, in buckets of one tensor and more, in one memory that is overwritten after each."""
    names = sorted(weights)
    order.shuffle(names)
    size = order.choice((1, 2, 5, len(names)))
    groups = [names[at : at + size] for at in range(0, len(names), size)]
    room = [sum(-(-weights[name].nbytes // 256) * 256 for name in group) for group in groups]
    scratch = torch.empty(max(room), dtype=torch.uint8, device=DEVICE)
    for group in groups:
        at, bucket = 0, list[tuple[str, torch.Tensor]]()
        for name in group:
            given = weights[name].contiguous()
            memory = scratch[at : at + given.nbytes]
            memory.copy_(given.reshape(-1).view(torch.uint8))
            bucket.append((name, memory.view(given.dtype).view(given.shape)))
            at += -(-given.nbytes // 256) * 256
        yield bucket
        scratch.fill_(0xA5)


def take(sink: Any, weights: Weights, mode: str, seed: int) -> dict[str, Any]:
    from checkpoint_engine.contract.sink import TensorSpec, Update

    specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()}
    try:
        sink.begin(Update("id", "checkpoint", "version", specs, mode))
        for bucket in buckets(weights, random.Random(seed)):
            sink.load(bucket)
        return dict(sink.finish().details())
    except BaseException:
        sink.abort()
        raise


def update(parent: Path, name: str, expected: dict[str, Any], *, spoil_all: bool) -> dict[str, Any]:
    """A, B, A, B; and comparisons."""
    from checkpoint_engine_sglang.compat import Runner
    from checkpoint_engine_sglang.sink import SGLangSink

    weights = {key: read(parent / part) for key, part in both(name).items()}
    model, config = load(parent / name / "A", "", "dummy")
    sink = SGLangSink([Runner("target", model, config, torch.device(DEVICE))], 1)
    result: dict[str, Any] = {"steps": [], "tensors": len(weights["a"])}
    for number, (key, mode) in enumerate(STEPS):
        details = take(sink, weights[key], mode, number)
        wrong = wrong_in(model, expected, key)
        result["steps"].append({"way": details["reload"], "different": len(wrong), "first": wrong[:3]})
        if mode == "auto":
            result["reason"] = details["loader_reason"]
            result["by_plan"] = details["plan_bytes"] / (details["plan_bytes"] + details["loader_bytes"])
    result["verify"] = compare(sink, weights, spoil_all=spoil_all)
    result["after"] = wrong_in(model, expected, "b")[:3]
    return result


def wrong_in(model: torch.nn.Module, expected: dict[str, Any], key: str) -> list[str]:
    """Where a model is not as a start with that checkpoint leaves it."""
    held = contents(model, left_out=LEFT_OUT)
    determined = expected[key].keys() - set(expected["chance"])
    return differences(
        {path: value for path, value in held.items() if path not in expected["chance"]},
        {path: expected[key][path] for path in determined},
    )


def compare(sink: Any, weights: dict[str, Weights], *, spoil_all: bool) -> dict[str, Any]:
    """What comparisons say of what is held (b), of a, and of b with one element of one tensor changed."""
    held, other = (take(sink.verifier(), weights[key], "verify", 7) for key in ("b", "a"))
    names = sorted(weights["b"])
    chosen = names if spoil_all else random.Random(1).sample(names, min(SPOILT, len(names)))
    missed: list[str] = []
    for name in chosen:
        spoilt = weights["b"][name].clone()
        spoilt.view(-1)[-1] += 1
        if not take(sink.verifier(), {**weights["b"], name: spoilt}, "verify", 7)["different_tensors"]:
            missed.append(name)
    return {
        "different": held["different"],
        "not_compared": held["not_compared"],
        "compared": held["compared_tensors"],
        "of_a": other["different_tensors"],
        "missed": missed,
        "spoilt": len(chosen),
    }


def experts(parent: Path, name: str) -> dict[str, Any]:
    """An update by plan, once two experts of the first layer have changed places."""
    from sglang.srt.eplb import expert_location as places

    from checkpoint_engine_sglang.compat import Runner
    from checkpoint_engine_sglang.sink import SGLangSink

    weights = {key: read(parent / part) for key, part in both(name).items()}
    model, config = load(parent / name / "A", "", "dummy")
    table = places.ExpertLocationMetadata.init_trivial(config, moe_ep_rank=0)
    places.set_global_expert_location_metadata(table, allow_overwrite=True)
    sink = SGLangSink([Runner("target", model, config, torch.device(DEVICE))], 1)
    ways = [take(sink, weights[key], "auto", 1)["reload"] for key in "aba"]
    moved = table.physical_to_logical_map.clone()
    moved[0, :2] = moved[0, :2].flip(0)
    other = places.ExpertLocationMetadata.init_by_mapping(config, moved, moe_ep_rank=0)
    table.update(other, [0])
    ways.append(take(sink, weights["b"], "auto", 1)["reload"])
    fresh = contents(load(parent / name / "B", "")[0], left_out=LEFT_OUT)
    places.set_global_expert_location_metadata(None, allow_overwrite=True)
    wrong = differences(contents(model, left_out=LEFT_OUT), fresh)
    unmoved = contents(load(parent / name / "B", "")[0], left_out=LEFT_OUT)
    return {"ways": ways, "wrong": wrong[:4], "moved": len(differences(fresh, unmoved))}


def main() -> None:
    command, parent, *rest = sys.argv[1:]
    logging.disable(logging.WARNING)
    transformers.logging.disable_progress_bar()
    names = [name for name in (rest[1:] if command == "update" else rest) if name != "--all"]
    lines = Path(rest[0]).read_text().splitlines() if command == "update" else ()
    known = {line["name"]: line for line in map(json.loads, lines)}
    if command != "make":
        start(Path(parent) / names[0] / "A")
    for name in names:
        began = time.perf_counter()
        found: dict[str, Any]
        try:
            with torch.inference_mode(mode=command != "make"):
                if command == "update":
                    found = update(Path(parent), name, known[name], spoil_all="--all" in rest)
                else:
                    found = {"make": make, "cold": cold, "experts": experts}[command](Path(parent), name)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what became of this architecture
            found = {"error": f"{type(error).__name__}: {error}"[:600]}
        print(json.dumps({"name": name, "seconds": round(time.perf_counter() - began, 2), **found}), flush=True)


if __name__ == "__main__":
    if DEVICE == "cpu":
        os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    main()
