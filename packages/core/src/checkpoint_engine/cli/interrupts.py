"""SIGTERM and SIGHUP end a command as Ctrl-C does: engines are put into a known state, and a word says so."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator
from types import FrameType

__all__ = ["aborted_by_signals", "ended_by_signals"]

_ENDING = (signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def ended_by_signals() -> Generator[None]:
    """Within it they say so and raise `KeyboardInterrupt`; one that is ignored, as by nohup, stays so."""

    def interrupt(number: int, _frame: FrameType | None) -> None:
        said = f"ended by {signal.Signals(number).name}"
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(sys.stderr.fileno(), f"{said}\n".encode())
        raise KeyboardInterrupt(said)

    with _handled(_ENDING, interrupt):
        yield


@contextlib.contextmanager
def aborted_by_signals(abort: Callable[[str], bool]) -> Generator[None]:
    """Within it they, and Ctrl-C, call `abort` with the reason.

    The second time, and where that returns that there was nothing to abort, they raise `KeyboardInterrupt`.
    """
    asked = threading.Event()

    def give_up(number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if asked.is_set():
            raise KeyboardInterrupt(f"ended by {name}")
        asked.set()

        def try_to_abort() -> None:  # in a thread: what was interrupted may hold the locks that this needs
            if not abort(f"ended by {name}"):
                os.kill(os.getpid(), number)

        threading.Thread(target=try_to_abort, name="checkpoint-engine-abort", daemon=True).start()

    with _handled((*_ENDING, signal.SIGINT), give_up):
        yield


@contextlib.contextmanager
def _handled(numbers: tuple[signal.Signals, ...], handler: Callable[[int, FrameType | None], None]) -> Generator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in numbers}
    ours = [number for number, old in before.items() if old not in (signal.SIG_IGN, None)]
    for number in ours:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number])
