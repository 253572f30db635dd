"""What the commands that move weights are told: one object for each concern, made by typer's layer, read by ranks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from checkpoint_engine import limits
from checkpoint_engine.cli.common import DeviceKind, Pause
from checkpoint_engine.client.auto import load_client
from checkpoint_engine.client.engine_client import EngineClient, TellingClient
from checkpoint_engine.contract.modes import Operation, WireMode, operation_of
from checkpoint_engine.deadline import Deadline
from checkpoint_engine.errors import DeadlineError, EngineRequestError, MissingDependencyError, SettingError
from checkpoint_engine.transfer.methods import Method

__all__ = ["Afterwards", "Engines", "Patience", "Requests", "TensorChoice", "Transfer", "path_text", "share_memory"]


@dataclass(frozen=True)
class Engines:
    """The engine instances that are meant, all of one kind and size."""

    kind: str
    """Name of a plugin's client, or `auto`."""
    endpoints: tuple[str, ...]
    workers: int = 1
    """Workers of each; they are fed in order, those of the first instance first."""

    @property
    def all_workers(self) -> int:
        """Workers of all of them."""
        return self.workers * len(self.endpoints)

    def led_by(self, rank: int, ranks: int) -> list[int]:
        """Numbers of the instances that a rank asks on behalf of all: those whose first worker it feeds."""
        each = max(1, self.all_workers // ranks)
        return [number for number in range(len(self.endpoints)) if number * self.workers // each == rank]

    def endpoint_of(self, worker: int) -> str:
        """Where the instance answers that a worker belongs to."""
        return self.endpoints[worker // self.workers]

    def check(self) -> None:
        """Tells what is wrong with an address, or that a plugin is missing, before any process starts.

        Raises:
            MissingDependencyError: no plugin offers such an engine.
            SettingError: an address is none.
        """
        client = load_client(self.kind)
        for endpoint in self.endpoints:
            client(endpoint)

    def knock(self, say: Callable[[str], object]) -> None:
        """Asks each engine once, so that what is wrong with one that answers is known at once; else says so.

        Raises:
            EngineRequestError: what answers is no such engine.
            SettingError: it has another number of workers.
        """
        for endpoint in self.endpoints:
            client = load_client(self.kind)(endpoint, timeout=limits.QUICK_ANSWER)
            try:
                client.wait_ready(Deadline(limits.QUICK_ANSWER))
                self.check_workers(endpoint, client.world_size())
                self._check_all_are_meant(client, Deadline(limits.QUICK_ANSWER))
            except DeadlineError as error:
                say(f"{error}; it is waited for (--wait)")

    def _check_all_are_meant(self, client: EngineClient, deadline: Deadline) -> None:
        """Replicas of experts take each step together, so that one which is paused waits for all others to be.

        Raises:
            SettingError: some answer at endpoints that are not named.
        """
        if not isinstance(client, TellingClient):
            return
        with contextlib.suppress(EngineRequestError, MissingDependencyError):  # that it does not tell is said elsewhere
            needed = max((-(-worker.in_step // worker.replicas) for worker in client.status(deadline)), default=1)
            if needed > len(self.endpoints):
                raise SettingError(
                    f"the engines take each step together with replicas behind {needed} endpoints, and are paused only "
                    f"together: repeat --endpoint for each of them ({len(self.endpoints)} given)"
                )

    def check_workers(self, endpoint: str, found: int | None) -> None:
        """Tells whether an engine has as many workers as it should; None if it cannot tell.

        Raises:
            SettingError: it has not.
        """
        if found is not None and found != self.workers:
            raise SettingError(
                f"the engine at {endpoint} has {found} workers, not {self.workers}: pass --tensor-parallel-size {found}"
            )


@dataclass(frozen=True)
class TensorChoice:
    """Which of a directory's tensors are sent, under which names."""

    ignore: tuple[str, ...] = ()
    strip: tuple[str, ...] = ()
    reject_nan: bool = False
    only: tuple[str, ...] = ()
    """No others; then what is sent counts as a part, and the rest of the engines' weights keeps its bits."""


@dataclass(frozen=True)
class Transfer:
    """How bytes travel, and how they get into the engines."""

    method: Method = Method.BROADCAST
    ranks: int = 0
    """Ranks that feed all workers, each of them as many; 0 for one rank a worker."""
    device: DeviceKind = DeviceKind.AUTO
    """Where the engines' workers run."""
    reload: WireMode = "auto"

    @property
    def compares(self) -> bool:
        """Whether weights are compared with what comes, and nothing changes."""
        return operation_of(self.reload) is Operation.COMPARE

    @property
    def rank_device(self) -> str:
        """What the ranks need of it: in a direct update nothing, so that they take no memory of a GPU."""
        return DeviceKind.CPU.value if self.method is Method.DIRECT else self.device.value

    def check(self, engines: Engines) -> None:
        """Tells whether so many ranks can feed these engines.

        Raises:
            SettingError: they cannot.
        """
        if self.method is Method.P2P:
            raise SettingError(
                "P2P brings a checkpoint that other ranks hold: use the command join; update reads files"
            )
        needed = engines.all_workers
        if self.method is Method.DIRECT and self.ranks and needed % self.ranks:
            raise SettingError(
                f"--ranks is {self.ranks}, but {needed} workers cannot be shared out evenly among so many"
            )
        if self.ranks not in (0, needed) and self.method is not Method.DIRECT:
            raise SettingError(
                f"--ranks is {self.ranks}, but {len(engines.endpoints)} endpoint(s) with --tensor-parallel-size "
                f"{engines.workers} need {needed}: each rank feeds the worker on its own device (--method direct does "
                "with fewer)"
            )


@dataclass(frozen=True)
class Requests:
    """What becomes of an engine's requests, and of what it has computed."""

    pause: Pause = Pause.KEEP
    reset_caches: bool = True


@dataclass(frozen=True)
class Patience:
    """Seconds: for the update itself, and for an engine that is still starting."""

    timeout: float = limits.UPDATE
    wait: float = 600.0


@dataclass(frozen=True)
class Afterwards:
    """What is left behind."""

    save_metas: str | None = None
    """File to which the first rank writes who holds what."""
    trace: str | None = None
    """File to which the first rank writes what all ranks did when."""
    keep_serving: float = 0.0
    """Seconds for which the ranks keep their memory."""
    share: bool = False
    """Whether others can read it."""
    rollback_to: str | None = None
    """Directory of the checkpoint that engines get if the update leaves them with anything but one whole version."""


def path_text(path: Path | None) -> str | None:
    """A path as it is handed on."""
    return None if path is None else str(path)


def share_memory() -> None:
    """Lets others read the host memory of this process, if it is a rank, and of the ranks that it starts."""
    os.environ["CHECKPOINT_ENGINE_P2P"] = "1"
