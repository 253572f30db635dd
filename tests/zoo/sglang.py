"""All of SGLang's zoo: makes checkpoints, starts from them, updates, compares, and says what became of each family.

See scripts/zoo.py.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Place", "outcome", "run", "table"]

ROOT = Path(__file__).parents[2]
PROCESS = ROOT / "tests" / "sglang" / "zoo_process.py"
_AT_ONCE = 14
"""Families in one process."""
_SECONDS = 900
_HEADER = """\
# Families of models: SGLang

Made by `scripts/zoo.py --engine sglang` on {device}, with SGLang {version}.

Of each architecture there are two tiny random checkpoints, A and B. A worker without a server around it starts with
dummy weights and takes A, B, A, B: by SGLang's loader, which proves the plan; twice by plan; by the loader alone.
Tensors come in shuffled order, in buckets of one and more, all in one memory that is overwritten after each bucket.
After each update everything that can be reached from the model object (parameters, buffers, other tensors, numbers) is
compared with a start from that checkpoint in another process. Then `verify` is asked about A, B, and B with one element
of one tensor changed.

| architecture | tensors | by plan | what the loader does, or why not |
|---|---|---|---|
"""


@dataclass(frozen=True)
class Place:
    """Where SGLang runs."""

    python: Path
    device: str = "cpu"


def run(place: Place, directory: Path, names: Sequence[str], *, spoil_all: bool = False) -> dict[str, dict[str, Any]]:
    """What became of each family; checkpoints are made in `directory`. With `spoil_all` each tensor is spoiled once."""
    found: dict[str, dict[str, Any]] = {}
    notes = directory / "cold.jsonl"
    for at in range(0, len(names), _AT_ONCE):
        some = names[at : at + _AT_ONCE]
        for command, options in (("make", []), ("cold", []), ("update", [notes, *(["--all"] if spoil_all else [])])):
            lines = list(_done(place, command, directory, options, some))
            found.update({line["name"]: line for line in lines})
            some = [line["name"] for line in lines if "error" not in line]
            if command == "cold":
                notes.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return found


def outcome(found: dict[str, Any]) -> str:
    """In a word or two: `equal`, `refused`, `not started` or `silently wrong`."""
    if "error" in found:
        return "not started" if found.get("at") in ("make", "cold") else "refused"
    wrong = any(step["different"] for step in found["steps"]) or found["after"]
    verify = found["verify"]
    unseen = verify["different"] or verify["missed"] or not verify["of_a"]
    return "silently wrong" if wrong else "verify is wrong" if unseen else "equal"


def _done(
    place: Place, command: str, directory: Path, options: Sequence[object], names: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """What a process of SGLang's says of each family; goes on in another one where a family ends it."""
    env = {**os.environ, "SGLANG_PLUGINS": "checkpoint_engine", "HF_HUB_OFFLINE": "1", "ZOO_DEVICE": place.device}
    env["CHECKPOINT_ENGINE_PROOFS"] = "off"  # the first update of each family is its proof
    if place.device == "cpu":
        env["SGLANG_USE_CPU_ENGINE"] = "1"
    left = list(names)
    output, errors = directory / f"{command}.out", directory / f"{command}.err"  # to be looked at while it runs
    while left:
        line = [place.python, "-W", "ignore", PROCESS, command, directory, *options, *left]
        with output.open("w") as out, errors.open("w") as err:
            done = subprocess.run(list(map(str, line)), stdout=out, stderr=err, timeout=_SECONDS, check=False, env=env)
        said = [{**json.loads(each), "at": command} for each in output.read_text().splitlines() if each.startswith("{")]
        yield from said
        left = left[len(said) :]
        if left:
            why = " / ".join(errors.read_text(errors="replace").strip().splitlines()[-3:])
            yield {"name": left.pop(0), "at": command, "error": f"the process ended with {done.returncode}: {why}"}


def _row(name: str, found: dict[str, Any]) -> str:
    what = outcome(found)
    if "error" in found:
        return f"| {name} | | {what} | {_cell(found['error'])} |"
    share = f"{100 * found['by_plan']:.4g}%" if what == "equal" else f"**{what}**"
    return f"| {name} | {found['tensors']} | {share} | {_cell(found['reason'])} |"


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")[:160]


def table(place: Place, found: Mapping[str, dict[str, Any]]) -> str:
    """As Markdown, with a heading."""
    header = _HEADER.format(version=_version(place.python), device="a GPU" if place.device == "cuda" else "the CPU")
    started = {name: each for name, each in found.items() if outcome(each) != "not started"}
    counts = [f"{sum(outcome(each) == word for each in started.values())} {word}" for word in ("equal", "refused")]
    wrong = sum(outcome(each) in ("silently wrong", "verify is wrong") for each in started.values())
    rows = [_row(name, each) for name, each in sorted(started.items())]
    return header + "\n".join(rows) + f"\n\n{', '.join(counts)}, {wrong} silently wrong.\n"


def _version(python: Path) -> str:
    command = [python, "-c", "from importlib.metadata import version; print(version('sglang'))"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()
