"""Serves a rank at a port, lets strangers loose on it, and judges whether it still answers those who have the token."""

from __future__ import annotations

import contextlib
import resource
import sys
import threading
import time
from collections.abc import Callable

import httpx

from checkpoint_engine.api import create_app
from checkpoint_engine.api.serving import listen_tcp, server_for
from checkpoint_engine.server.parameter_server import ParameterServer

TOKEN = "the-token-of-whoever-may-call"
MOST_SECONDS = 5.0
MOST_MEMORY = 512 << 20


def attack(assail: Callable[[tuple[str, int]], str]) -> None:
    """Lets `assail(address)` do its worst, which says what came of it; exits unless the rank then answers at once."""
    with (
        ParameterServer(rank=0, world_size=1, device="cpu") as ps,
        contextlib.closing(listen_tcp("127.0.0.1", 0)) as listener,
    ):
        server = server_for(create_app(ps, allowed_roots=[], token=TOKEN), lambda: None)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            before, start = _peak_memory(), time.monotonic()
            outcome = assail(listener.getsockname())
            asked = time.monotonic()
            answer = _ask(listener.getsockname()[1])
            seconds, taken = time.monotonic() - asked, _peak_memory() - before
        finally:
            server.should_exit = True
            thread.join(MOST_SECONDS)
    if answer != {"checkpoints": []} or seconds > MOST_SECONDS or taken > MOST_MEMORY:
        sys.exit(f"NOT REFUSED: {answer} after {seconds:.1f} s, with {taken} bytes more: {outcome}")
    print(f"turned away within {time.monotonic() - start:.2f} s: {outcome}")


def _ask(port: int) -> object:
    """Again and again: strangers may have left this very process, which asks as well, no descriptor."""
    end = time.monotonic() + MOST_SECONDS
    while isinstance(answer := _answer(port), str) and time.monotonic() < end:
        time.sleep(0.1)
    return answer


def _answer(port: int) -> object:
    try:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        return httpx.get(f"http://127.0.0.1:{port}/v1/checkpoints", headers=headers, timeout=MOST_SECONDS).json()
    except (httpx.HTTPError, OSError) as error:
        return repr(error)


def _peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
