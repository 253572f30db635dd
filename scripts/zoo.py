#!/usr/bin/env python3
"""Runs the zoo of tests/zoo: what updates make of each architecture, compared with cold starts in another process.

    uv run scripts/zoo.py                               # both engines on the CPU, into docs/families*.md
    uv run scripts/zoo.py --no-table GptOssForCausalLM Mamba2ForCausalLM
    scripts/zoo.py --device cuda --vllm-python VLLM/bin/python --sglang-python SGLANG/bin/python

The last writes docs/families*-cuda.md. It needs nothing but the engines' environments, with this project in them. More
about each family stands in WORK/FAMILY/update.json (vLLM) and WORK/sglang.json.
"""

from __future__ import annotations

import argparse
import collections
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.zoo import sglang  # noqa: E402 - found by the line above
from tests.zoo.sglang_families import FAMILIES as SGLANG_FAMILIES  # noqa: E402
from tests.zoo.verdicts import OUTCOMES, Verdict, judge  # noqa: E402
from tests.zoo.vllm_families import FAMILIES  # noqa: E402

DEADLINE = 3600
"""Seconds for one process."""
WRONG = {"silently wrong", "wrongly compared", "verify is wrong"}
MARK = "<!-- made by scripts/zoo.py -->"


def run(options: argparse.Namespace, do: str, names: list[str]) -> None:
    """Does one thing with families, in a process of the engine's; goes on with the next where one ends the process."""
    left = names
    while left:
        command = [options.vllm_python, "-m", "tests.zoo.vllm_process", do, options.work, options.device, *left]
        with (options.work / f"{do}.log").open("a") as log:
            subprocess.run(list(map(str, command)), cwd=ROOT, stdout=log, stderr=log, timeout=DEADLINE, check=False)
        left = [name for name in left if not (options.work / name / f"{do}.json").exists()]
        if left:
            (options.work / left[0]).mkdir(exist_ok=True)
            (options.work / left[0] / f"{do}.json").write_text(json.dumps({"failed": "the process ended"}))
            left = left[1:]


def everything(options: argparse.Namespace, names: list[str]) -> None:
    """Checkpoints, cold loads, updates."""
    done = ("make", "cold", "update")
    for name in names:
        for do in done:
            (options.work / name / f"{do}.json").unlink(missing_ok=True)
    for do in done:
        run(options, do, [name for name in names if not _failed(options.work / name)])


def _failed(directory: Path) -> bool:
    return any("failed" in _read(directory / f"{do}.json") for do in ("make", "cold"))


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.exists() else {}


def verdict(directory: Path) -> Verdict:
    """What was found of one family."""
    make, cold = _read(directory / "make.json"), _read(directory / "cold.json")
    return judge(make if "failed" in make else cold, _read(directory / "update.json"))


def table(options: argparse.Namespace, verdicts: dict[str, Verdict]) -> str:
    """As Markdown."""
    counts = collections.Counter(found.outcome for found in verdicts.values())
    rows = [
        f"| `{name}` | {found.outcome} | {found.why} |" for name, found in sorted(verdicts.items()) if _counts(found)
    ]
    rest = [f"| `{name}` | {found.why} |" for name, found in sorted(verdicts.items()) if not _counts(found)]
    said = ", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES if counts[outcome])
    version = {_read(options.work / name / "update.json").get("vllm") for name in verdicts} - {None}
    head = f"vLLM {', '.join(sorted(version))} on {options.device}: {said}."
    found = ["| family | updates | why |", "|---|---|---|", *rows]
    lost = ["Not built, so nothing was learned of them:", "", "| family | why |", "|---|---|", *rest]
    return "\n".join([MARK, "", head, "", *found, "", *lost, ""])


def _counts(found: Verdict) -> bool:
    return found.outcome != "not built"


def table_of(options: argparse.Namespace, name: str) -> Path:
    """Where a table goes: those of the CPU are a part of the documentation."""
    suffix = "" if options.device == "cpu" else f"-{options.device}"
    return options.tables / f"{name}{suffix}.md"


def run_vllm(options: argparse.Namespace, names: Sequence[str]) -> set[str]:
    """Runs vLLM's families; returns what became of any."""
    if not options.only_table:
        shares = [names[number :: options.processes] for number in range(options.processes)]
        with ThreadPoolExecutor(options.processes) as pool:
            list(pool.map(lambda share: everything(options, share), shares))
    verdicts = {name: verdict(options.work / name) for name in names}
    for name, found in verdicts.items():
        print(f"vLLM    {found.outcome:17} {name:50} {found.why}")
    if not options.no_table:
        file = table_of(options, "families")
        before = file.read_text().partition(MARK)[0] if file.exists() else "# Families of models\n\n"
        file.write_text(before + table(options, verdicts))
    return {found.outcome for found in verdicts.values()}


def run_sglang(options: argparse.Namespace, names: Sequence[str]) -> set[str]:
    """Runs SGLang's families; returns what became of any."""
    place, notes = sglang.Place(options.sglang_python, options.device), options.work / "sglang.json"
    if not options.only_table:
        notes.write_text(json.dumps(_shared_out(options, place, names), indent=1))
    found = {name: each for name, each in _read(notes).items() if name in names}
    for name, each in found.items():
        print(f"SGLang  {sglang.outcome(each):17} {name:50} {each.get('error', '')[:200]}")
    if not options.no_table:
        table_of(options, "families-sglang").write_text(sglang.table(place, found))
    return {sglang.outcome(each) for each in found.values()}


def _shared_out(options: argparse.Namespace, place: sglang.Place, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What became of SGLang's families, several processes at a time."""

    def run_share(number: int) -> dict[str, dict[str, Any]]:
        directory = options.work / "sglang" / str(number)
        directory.mkdir(parents=True, exist_ok=True)
        return sglang.run(place, directory, names[number :: options.processes], spoil_all=options.spoil_all)

    with ThreadPoolExecutor(options.processes) as pool:
        return {name: each for found in pool.map(run_share, range(options.processes)) for name, each in found.items()}


def main() -> int:
    """Returns 1 if a family is silently wrong, or wrongly compared."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="all by default")
    parser.add_argument("--engine", choices=("vllm", "sglang", "both"), default="both")
    for engine in ("vllm", "sglang"):
        parser.add_argument(f"--{engine}-python", type=Path, default=ROOT / ".venvs" / engine / "bin" / "python")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--processes", type=int, default=2, help="of an engine at a time")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "checkpoint-engine-zoo")
    parser.add_argument("--tables", type=Path, default=ROOT / "docs", help="the directory that tables are written to")
    parser.add_argument("--no-table", action="store_true", help="print only")
    parser.add_argument("--only-table", action="store_true", help="of what --work has from before")
    parser.add_argument("--spoil-all", action="store_true", help="SGLang: compare with each tensor changed, not four")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    outcomes = set[str]()
    for engine, families, run_engine in (
        ("vllm", FAMILIES, run_vllm),
        ("sglang", SGLANG_FAMILIES, run_sglang),
    ):
        names = [name for name in options.families or families if name in families]
        if options.engine in (engine, "both") and names:
            outcomes |= run_engine(options, names)
    return int(bool(outcomes & WRONG))


if __name__ == "__main__":
    sys.exit(main())
