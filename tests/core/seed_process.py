"""A process that shares memory, to be killed or halted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import TracebackType

import msgspec
from typing_extensions import Self

from checkpoint_engine.host.p2p_store import Peer


class Told(msgspec.Struct):
    """What the process says of itself."""

    peer: Peer
    data: int


class SeedProcess:
    """Runs this file."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(nbytes)], stdout=subprocess.PIPE, stdin=subprocess.PIPE
        )
        assert self._process.stdout is not None
        told = msgspec.json.decode(self._process.stdout.readline(), type=Told)
        self.peer, self.data = told.peer, told.data

    def signal(self, name: str) -> None:
        os.kill(self._process.pid, signal.Signals[name])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate(timeout=10)


def main() -> None:
    from checkpoint_engine.host.p2p_open import open_p2p_store
    from checkpoint_engine.host.segment import Segment
    from checkpoint_engine.settings import P2PSettings

    store = open_p2p_store(P2PSettings(share=True, host=None, transport="tcp", patience=30), "127.0.0.1", 0, 0)
    segment = Segment.create(int(sys.argv[1]))
    segment.touch(0, segment.nbytes)
    lease = store.share("a", [segment])
    peer = Peer("rank 0 of seed", store.address, store.transport, lease.control_address, lease.generation)
    print(msgspec.json.encode(Told(peer, lease.segments[0])).decode(), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
