"""Random processes are killed or stopped at random times while two engines are updated again and again.

Of which kind the engines are says a `Fleet`.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from checkpoint_engine.client.rpc_client import ReferenceClient
from checkpoint_engine.client.workers_client import WorkersClient
from checkpoint_engine.deadline import Deadline
from checkpoint_engine.reference.engine import ModelSpec, make_checkpoint
from checkpoint_engine.reference.process import ReferenceProcess
from tests.commands import command_line
from tests.core.fault_matrix import BOUND, START_SECONDS, lives, ranks_of
from tests.core.p2p_processes import ENVIRONMENT

ENGINES = 2
VERSIONS = "abc"
SPEC = ModelSpec(layers=4)
LONGEST_STOP = 12.0
WAIT = 15.0
"""Seconds for which a command looks for its engines: so long it goes on, too, if one dies before it was found."""
PLAIN_SECONDS = 90.0
SECONDS = float(os.environ.get("CHAOS_SECONDS", "600"))
SEED = int(os.environ.get("CHAOS_SEED", str(time.time_ns() % 100_000)))


@dataclass
class Round:
    """What was done, for whoever looks for the cause."""

    number: int
    method: str
    version: str
    did: list[str] = field(default_factory=list[str])
    exit_code: int | None = None
    said: str = ""

    def __str__(self) -> str:
        return f"round {self.number}: {self.version} by {self.method}; {', '.join(self.did) or 'nothing'}: {self.said}"


class Engine(ABC):
    """One that serves, or will soon, with what is known of its processes."""

    endpoint: str
    client: WorkersClient
    pids: dict[str, int]
    started_with = ""
    """The version that it holds before it is updated for the first time, if that can be compared."""

    @abstractmethod
    def wait(self) -> None:
        """Until it serves; `client` and `pids` are there from then on."""

    @abstractmethod
    def holds(self, version: str) -> bool:
        """Whether each worker holds, bit for bit, what a cold start of it holds."""

    @abstractmethod
    def close(self) -> None:
        """Ends all of its processes, some of which may be dead."""

    @property
    def lives(self) -> bool:
        return all(map(lives, self.pids.values()))


@dataclass(frozen=True)
class Fleet:
    """Engines of one kind, and what they are updated to."""

    kind: str
    versions: Mapping[str, Path]
    start: Callable[[], Engine]
    longest_round: float
    """Seconds, about: an update without a fault is over by then, with the start of its processes."""


def reference_fleet(directory: Path) -> Fleet:
    versions = {name: directory / name for name in VERSIONS}
    for seed, path in enumerate(versions.values(), start=1):
        make_checkpoint(path, SPEC, seed, shards=ENGINES)
    return Fleet("reference", versions, lambda: _ReferenceEngine(versions), longest_round=4.5)


class _ReferenceEngine(Engine):
    def __init__(self, versions: Mapping[str, Path]) -> None:
        self._versions = versions
        self._process = ReferenceProcess(SPEC.to_json(), 1)
        self.endpoint = self._process.endpoint

    def wait(self) -> None:
        self.client = self._client = ReferenceClient(self.endpoint)
        self.client.wait_ready(Deadline(START_SECONDS))
        workers = self.client.endpoint.call("GET", "/pids", Deadline(10))["pids"]
        self.pids = {"front": self._process.pid, "worker": int(workers[0])}

    def holds(self, version: str) -> bool:
        results = self._client.collective_rpc("verify", Deadline(30), [str(self._versions[version])])
        return all(result["ok"] for result in results)

    def close(self) -> None:
        self._process.close()


def run_chaos(fleet: Fleet, directory: Path, patched: pytest.MonkeyPatch) -> None:
    """For `CHAOS_SECONDS`, with the choices of `CHAOS_SEED`; whatever serves is whole, and all are alike in the end."""
    chaos = Chaos(fleet, directory, patched, SEED)
    until = time.monotonic() + SECONDS
    try:
        while time.monotonic() < until:
            chaos.one_round()
        chaos.settle()
        assert chaos.left_behind() == []
    finally:
        print(
            f"CHAOS_SEED={SEED}: {chaos.rounds} rounds in {SECONDS:g} s, {chaos.failed} of them failed; "
            f"{chaos.started} engines started"
        )
        chaos.close()


class Chaos:
    """The engines, and what is done to them and to who updates them; the same seed makes the same choices."""

    def __init__(self, fleet: Fleet, directory: Path, patched: pytest.MonkeyPatch, seed: int) -> None:
        self._fleet = fleet
        self._random = random.Random(seed)
        self._temporary = directory / "t"
        self._temporary.mkdir()
        patched.setattr(tempfile, "tempdir", str(self._temporary))  # where it is seen whose turn an update is
        self._environment = {**os.environ, **ENVIRONMENT, "TMPDIR": str(self._temporary), "OMP_NUM_THREADS": "1"}
        self._engines: list[Engine] = []
        self.rounds = self.failed = self.started = 0

    def close(self) -> None:
        for engine in self._engines:
            engine.close()

    def one_round(self) -> None:
        """An update that something may happen to; whatever came of it, what serves is whole."""
        self._start_missing()
        self.rounds += 1
        now = Round(self.rounds, self._random.choice(["broadcast", "direct"]), self._any_version())
        with subprocess.Popen(
            self._command(now.version, now.method),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self._environment,
            start_new_session=True,
        ) as launched:
            resumed = self._strike(launched, now)
            try:
                _, now.said = launched.communicate(timeout=LONGEST_STOP + WAIT + BOUND if now.did else PLAIN_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(launched.pid, signal.SIGKILL)
                pytest.fail(f"{now}: it never ended: {launched.communicate()}")
        now.exit_code = launched.returncode
        self.failed += now.exit_code != 0
        for timer in resumed:
            timer.join()
        assert now.exit_code == 0 or now.did, str(now)
        self._look(now)

    def settle(self) -> None:
        """Without any fault: one push, and every engine holds exactly that, and serves."""
        self._start_missing()
        version = self._any_version()
        pushed = subprocess.run(
            self._command(version, "broadcast"),
            capture_output=True,
            text=True,
            timeout=PLAIN_SECONDS,
            check=False,
            env=self._environment,
        )
        assert pushed.returncode == 0, pushed.stderr
        for engine in self._engines:
            assert not engine.client.is_paused(Deadline(10))
            assert engine.holds(version)

    def left_behind(self) -> list[str]:
        """In the directory for temporary files."""
        kept = ("checkpoint-engine-engines-", "checkpoint-engine-ranks-")
        return [path.name for path in self._temporary.iterdir() if not path.name.startswith(kept)]

    def _strike(self, launched: subprocess.Popen[str], now: Round) -> list[threading.Timer]:
        """Kills or stops one or two, at some time, or nobody; those that were stopped go on a while later."""
        resumed: list[threading.Timer] = []
        for _ in range(self._random.choice([0, 1, 1, 1, 2])):
            time.sleep(self._random.uniform(0, self._fleet.longest_round))
            victims = self._victims(launched)
            name = self._random.choice(sorted(victims))
            number = self._random.choice([signal.SIGKILL, signal.SIGSTOP])
            pause = self._random.uniform(0, LONGEST_STOP)
            if launched.poll() is not None or not _send(victims[name], number):
                break
            now.did.append(f"{number.name} {name}" + (f" for {pause:.1f} s" if number == signal.SIGSTOP else ""))
            if number == signal.SIGSTOP:
                resumed.append(threading.Timer(pause, _send, (victims[name], signal.SIGCONT)))
                resumed[-1].start()
        return resumed

    def _victims(self, launched: subprocess.Popen[str]) -> dict[str, int]:
        found = {"launcher": launched.pid} | ranks_of(launched.pid)
        for number, engine in enumerate(self._engines):
            found |= {f"{name} of engine {number}": pid for name, pid in engine.pids.items()}
        return found

    def _look(self, now: Round) -> None:
        """What lives answers, and what serves holds exactly one version."""
        for engine in self._engines:
            if engine.lives and not engine.client.is_paused(Deadline(BOUND)):
                (state,) = engine.client.status(Deadline(BOUND))
                assert not state.dirty, f"{now}: serves a mixture"
                version = state.version or engine.started_with
                assert not version or engine.holds(version), f"{now}: does not hold {version}"

    def _start_missing(self) -> None:
        """As whoever runs engines does."""
        for engine in [engine for engine in self._engines if not engine.lives]:
            engine.close()
            self._engines.remove(engine)
        missing = [self._fleet.start() for _ in range(ENGINES - len(self._engines))]
        self._engines += missing
        self.started += len(missing)
        for engine in missing:
            engine.wait()

    def _any_version(self) -> str:
        return self._random.choice(sorted(self._fleet.versions))

    def _command(self, version: str, method: str) -> list[str]:
        endpoints = [word for engine in self._engines for word in ("--endpoint", engine.endpoint)]
        options = ("--engine", self._fleet.kind, *endpoints, "--device", "cpu", "--timeout", "60")
        source = self._fleet.versions[version]
        return command_line("update", source, "--method", method, *options, "--wait", WAIT)


def _send(pid: int, number: int) -> bool:
    """Whether there was somebody to send it to."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
        return True
    return False
