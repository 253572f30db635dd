"""Who is killed or stopped, when, and by which method the update goes: one cell each, and what must hold in it."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from checkpoint_engine import owned_directory
from checkpoint_engine.client.rpc_client import ReferenceClient
from checkpoint_engine.deadline import Deadline
from checkpoint_engine.errors import CheckpointEngineError
from checkpoint_engine.reference.engine import ModelSpec, make_checkpoint
from checkpoint_engine.reference.process import ReferenceProcess
from tests.commands import command_line
from tests.core.p2p_processes import ENVIRONMENT
from tests.processes import children_of
from tests.waiting import within

ROLES = ("rank 0", "rank 1", "worker 0", "worker 1", "front", "seed", "launcher")
PHASES = ("read", "gather", "introduce", "connect", "load", "finish", "between")
SIGNALS = ("KILL", "STOP")
METHODS = ("broadcast", "direct", "p2p")

BOUND = 20.0
"""Seconds from the cause to the end of the command."""
START_SECONDS = 90.0
TP = 2
SPEC = ModelSpec(layers=4)
REPOSITORY = Path(__file__).parents[2]
_CAUSES = {
    "rank 0": r"rank 0",
    "rank 1": r"rank 1",
    "worker 0": r"worker",
    "worker 1": r"worker",
    "front": r"http://127\.0\.0\.1:\d+",
    "seed": r"seed|peer|parameter server|holds",
}
_MEETINGS = "checkpoint-engine-ranks-"
"""Directory in which ranks of this user meet; empty between runs."""
_KEPT = ("checkpoint-engine-engines-", "checkpoint-engine-adapters-", "checkpoint-engine-test-", "torch", "pymp-")
"""What stays on purpose (whose turn an engine's update is), or is of other tests."""


@dataclass(frozen=True)
class Cell:
    """One of the matrix."""

    role: str
    phase: str
    signal: str
    method: str

    def __str__(self) -> str:
        return f"{self.role}, {self.phase}, {self.signal}, {self.method}"

    @property
    def exists(self) -> bool:
        """Whether there is such a process in that phase."""
        if self.method == "p2p":
            if self.phase in ("read", "gather"):  # it reads no files
                return False
        elif self.role == "seed":
            return False
        return self.phase != "between" or self.role in ("worker 0", "worker 1", "front", "seed")


def cells() -> list[Cell]:
    """All that there are, in an order in which neighbours differ."""
    found = [Cell(*each) for each in itertools.product(ROLES, PHASES, SIGNALS, METHODS)]
    return sorted((cell for cell in found if cell.exists), key=lambda cell: hash_of(str(cell)))


def hash_of(text: str) -> int:
    """The same everywhere."""
    return int.from_bytes(text.encode(), "little") * 2654435761 % (1 << 32)


@dataclass
class Outcome:
    """What came of a cell."""

    cell: Cell
    seconds: float = 0.0
    exit_code: int | None = None
    said: str = ""
    problems: list[str] = field(default_factory=list[str])

    @property
    def bounded(self) -> bool:
        """Whether the command ended in time."""
        return not any(problem.startswith("took") for problem in self.problems)

    @property
    def healed(self) -> bool:
        """Whether the engine holds one whole version in the end."""
        return not any(problem.startswith("not healed") for problem in self.problems)


class Matrix:
    """Runs cells one after the other; an engine that dies is started anew."""

    def __init__(self, directory: Path, patched: pytest.MonkeyPatch) -> None:
        self._directory = directory
        for seed, name in enumerate("ab", start=1):
            make_checkpoint(directory / name, SPEC, seed, shards=TP)
        self.environment = {
            **os.environ,
            **ENVIRONMENT,
            "COLUMNS": "400",
            "TMPDIR": str(directory / "t"),
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
        }
        (directory / "t").mkdir()
        patched.setattr(tempfile, "tempdir", str(directory / "t"))  # where it is seen whose turn an update is
        self._engine: ReferenceProcess | None = None
        self._seed: subprocess.Popen[str] | None = None
        self._number = 0
        self._holds = ""
        """Which checkpoint the engine holds, as was verified."""

    @property
    def engine(self) -> ReferenceProcess:
        """One that serves."""
        if self._engine is None:
            self._engine = ReferenceProcess(SPEC.to_json(), TP)
            ReferenceClient(self._engine.endpoint).wait_ready(Deadline(START_SECONDS))
        return self._engine

    def close(self) -> None:
        self._drop_engine()
        self._drop_seed()

    def run(self, cell: Cell) -> Outcome:
        """Brings one checkpoint with the fault, while the other is held, and then that one without."""
        outcome = Outcome(cell)
        before = self._litter()
        metas = self._metas() if cell.method == "p2p" else None
        target = "b" if cell.method == "p2p" or self._holds == "a" else "a"
        if self._holds in ("", target):
            first = self._push("a" if target == "b" else "b", "broadcast")
            assert first.returncode == 0, first.stderr
        self._number += 1
        marks = self._directory / f"marks-{self._number}"
        marks.mkdir()
        command = self._command(target, cell.method, metas)
        pids = self._pids(cell)
        cause = time.monotonic()
        if cell.phase == "between":
            os.kill(pids[cell.role], self._signal(cell))
        environment = {
            **self.environment,
            "HELD_PHASE": cell.phase if cell.phase in PHASES[:-1] else "start",
            "HELD_DIRECTORY": str(marks),
            "HELD_RANKS": cell.role[-1] if cell.role.startswith("rank") else "0",
        }
        with subprocess.Popen(
            [sys.executable, "-m", "tests.core.held_command", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
            cwd=REPOSITORY,
        ) as launched:
            if cell.phase != "between":
                self._wait_for_phase(cell, launched, marks)
                pids |= ranks_of(launched.pid) | {"launcher": launched.pid}
                cause = time.monotonic()
                if cell.role in pids:  # else it has ended by now
                    _signal(pids[cell.role], self._signal(cell))
                (marks / "go").touch()
            self._wait_for_end(cell, launched, cause, outcome, pids)
        self._judge(cell, outcome, pids)
        self._heal(cell, target, outcome, pids)
        if (cell.role, cell.signal, cell.method) == ("launcher", "KILL", "p2p"):  # nobody is left who could
            owned_directory._sweep(self._directory / "t", "checkpoint-engine-join-")  # as the next `join` does
        outcome.problems += [f"left behind: {name}" for name in sorted(self._litter() - before)]
        return outcome

    def _wait_for_phase(self, cell: Cell, launched: subprocess.Popen[str], marks: Path) -> None:
        there = within(START_SECONDS, lambda: any(marks.glob("held-*")) or launched.poll() is not None)
        assert there, "nobody came to the phase"
        assert launched.poll() is None, launched.communicate()

    def _wait_for_end(
        self, cell: Cell, launched: subprocess.Popen[str], cause: float, outcome: Outcome, pids: dict[str, int]
    ) -> None:
        """Of the command; of one that is killed or stopped itself, of its ranks."""
        started = Deadline(BOUND + (START_SECONDS if cell.phase == "between" else 0))
        if cell.role == "launcher":
            ranks = [pid for name, pid in pids.items() if name.startswith("rank")]
            if cell.signal == "KILL":
                ended = within(BOUND, lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks))
            else:  # the ranks bring the update to its end without it
                ended = within(BOUND, self._is_at_rest)
            outcome.seconds = time.monotonic() - cause
            if not ended:
                outcome.problems.append(f"took more than {BOUND:g} s")
            _signal(launched.pid, signal.SIGCONT)
            started = Deadline(BOUND)
        try:
            _, outcome.said = launched.communicate(timeout=started.remaining)
        except subprocess.TimeoutExpired:
            outcome.problems.append(f"took more than {BOUND:g} s")
            _signal(pids.get(cell.role, 0), signal.SIGCONT)
            launched.send_signal(signal.SIGINT)
            try:
                _, outcome.said = launched.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                os.killpg(launched.pid, signal.SIGKILL)
                _, outcome.said = launched.communicate()
        outcome.exit_code = launched.returncode
        outcome.seconds = outcome.seconds or time.monotonic() - cause

    def _judge(self, cell: Cell, outcome: Outcome, pids: dict[str, int]) -> None:
        words = " ".join(outcome.said.split())
        words = words[max(0, words.find("Error: ")) :]  # what was said on the way does not count
        if cell.role != "launcher" and outcome.exit_code != 0 and not re.search(_CAUSES[cell.role], words):
            outcome.problems.append("does not name the cause")
        if cell.role.startswith("rank") and outcome.exit_code != 0 and not re.search(r"in phase '|phase", words):
            outcome.problems.append("does not name the phase")
        alive = not (cell.role == "front" or cell.role.startswith("worker"))
        if (
            alive
            and outcome.exit_code != 0
            and cell.role != "launcher"
            and not re.search("whole|old weights|what it held|mixture|already|unknown|rolled back", words)
        ):
            outcome.problems.append("does not say what the engine holds")
        ours = {name: pid for name, pid in pids.items() if name.startswith("rank") or name == "launcher"}
        if not within(5, lambda: not any(map(lives, ours.values()))):
            outcome.problems.append(f"processes left: {[name for name, pid in ours.items() if lives(pid)]}")
        if alive and cell.role != "launcher":
            self._look_at_engine(outcome)

    def _look_at_engine(self, outcome: Outcome) -> None:
        """Whatever serves is whole."""
        client = ReferenceClient(self.engine.endpoint)
        try:
            if client.is_paused(Deadline(10)):
                return
            if any(worker.dirty for worker in client.status(Deadline(10))):
                outcome.problems.append("serves a mixture")
        except CheckpointEngineError as error:
            outcome.problems.append(f"cannot be asked: {error}")

    def _heal(self, cell: Cell, target: str, outcome: Outcome, pids: dict[str, int]) -> None:
        if cell.role in pids:
            _signal(pids[cell.role], signal.SIGCONT)
        if cell.role == "seed":
            self._drop_seed()
        if cell.signal == "KILL" and (cell.role == "front" or cell.role.startswith("worker")):
            self._drop_engine()
        self._holds = ""
        pushed = self._push(target, "broadcast")
        if pushed.returncode != 0:
            outcome.problems.append(f"not healed: {pushed.stderr[-600:]}")
            self._drop_engine()
            return
        self._holds = target
        for name, good in self._verified(target):
            if not good:
                outcome.problems.append(f"not healed: {name} holds something else")
        if ReferenceClient(self.engine.endpoint).is_paused(Deadline(10)):
            outcome.problems.append("not healed: it stays paused")

    def _verified(self, name: str) -> Iterator[tuple[str, bool]]:
        results = ReferenceClient(self.engine.endpoint).collective_rpc(
            "verify", Deadline(30), [str(self._directory / name)]
        )
        yield from ((f"worker {number}", result["ok"]) for number, result in enumerate(results))

    def _is_at_rest(self) -> bool:
        client = ReferenceClient(self.engine.endpoint)
        try:
            workers = client.status(Deadline(5))
            return not any(worker.updating or worker.dirty for worker in workers) and not client.is_paused(Deadline(5))
        except CheckpointEngineError:
            return False

    def _push(self, name: str, method: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command_line(*self._command(name, method, None)),
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
            env=self.environment,
        )

    def _command(self, name: str, method: str, metas: Path | None) -> list[str]:
        common = ["--engine", "reference", "--endpoint", self.engine.endpoint, "-tp", str(TP), "--device", "cpu"]
        common += ["--timeout", "120"]
        if metas is not None:  # it tries its seeds again for as long as it may wait
            return ["join", "--metas", str(metas), *common, "--wait", "5"]
        common += ["--wait", "15"]  # so long, too, for an engine whose front dies before it was seen once
        ranks = ["--ranks", str(TP)] if method == "direct" else []
        return ["update", str(self._directory / name), "--method", method, *ranks, *common]

    def _pids(self, cell: Cell) -> dict[str, int]:
        workers = ReferenceClient(self.engine.endpoint).endpoint.call("GET", "/pids", Deadline(10))["pids"]
        found = {f"worker {number}": pid for number, pid in enumerate(workers)} | {"front": self.engine.pid}
        if cell.method == "p2p" and self._seed is not None:
            found["seed"] = next(iter(ranks_of(self._seed.pid).values()))
        return found

    def _metas(self) -> Path:
        """Of a seed that holds `b`; its engine is another."""
        file = self._directory / "metas.json"
        if self._seed is None or self._seed.poll() is not None:
            self._drop_seed()
            self._other = ReferenceProcess(SPEC.to_json(), 1)
            ReferenceClient(self._other.endpoint).wait_ready(Deadline(START_SECONDS))
            self._seed = subprocess.Popen(
                command_line(
                    *("update", self._directory / "b", "--engine", "reference", "--endpoint", self._other.endpoint),
                    *("--device", "cpu", "--share", "--save-metas", file, "--keep-serving", "100000", "--json"),
                ),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=self.environment,
                start_new_session=True,
            )
            assert self._seed.stdout is not None
            assert json.loads(self._seed.stdout.readline())["ok"]
        return file

    def _drop_seed(self) -> None:
        if self._seed is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._seed.pid, signal.SIGCONT)
            self._seed.send_signal(signal.SIGINT)
            try:
                self._seed.communicate(timeout=30)
            except subprocess.TimeoutExpired:
                os.killpg(self._seed.pid, signal.SIGKILL)
                self._seed.communicate()
            self._other.close()
            self._seed = None

    def _drop_engine(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def _litter(self) -> set[str]:
        top = [path for path in (self._directory / "t").iterdir() if not path.name.startswith(_KEPT)]
        inside = [path for each in top if each.name.startswith(_MEETINGS) for path in each.iterdir()]
        links = [path for path in top if not path.name.startswith(_MEETINGS)]
        shared = [path for path in Path("/dev/shm").glob("checkpoint-engine*") if not path.name.startswith(_KEPT)]
        return {str(path) for path in (*links, *inside, *shared)}

    @staticmethod
    def _signal(cell: Cell) -> signal.Signals:
        return signal.SIGKILL if cell.signal == "KILL" else signal.SIGSTOP


def ranks_of(launcher: int) -> dict[str, int]:
    """Its ranks, by their environment."""
    found: dict[str, int] = {}
    for child in children_of(launcher):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            rank = next((each[5:].decode() for each in variables if each.startswith(b"RANK=")), None)
            if rank is not None:
                found[f"rank {rank}"] = child
    return found


def lives(pid: int) -> bool:
    with contextlib.suppress(OSError):
        after_name = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
        return after_name.split()[0] != "Z"
    return False


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        if pid:
            os.kill(pid, number)
