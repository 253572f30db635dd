"""Prints what becomes of a parameter server's updates, as they happen and, with --history, those before.

checkpoint-engine serve --allow-root /models --events tcp://127.0.0.1:5557 &
python examples/watch_updates.py tcp://127.0.0.1:5557 --history
"""

from __future__ import annotations

import argparse
from datetime import datetime, timezone

from checkpoint_engine.deadline import Deadline
from checkpoint_engine.errors import DeadlineError
from checkpoint_engine.events import Event, EventSubscriber, UpdateEnded, UpdateFailed


def main() -> None:
    """Listens until it is told to end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address")
    parser.add_argument("--history", action="store_true", help="show past events first")
    parser.add_argument("--count", type=int, default=0, help="end after so many events")
    chosen = parser.parse_args()
    seen = 0
    with EventSubscriber(chosen.address, history=chosen.history) as subscriber:
        while not chosen.count or seen < chosen.count:
            try:
                event = subscriber.receive(Deadline(60.0))
            except DeadlineError:
                continue
            seen += 1
            at = datetime.fromtimestamp(event.time, timezone.utc).strftime("%H:%M:%S")
            print(f"{at} {event.version!r} {said_of(event)}", flush=True)


def said_of(event: Event) -> str:
    """The event in words; what is quoted may come from a stranger."""
    if isinstance(event, UpdateEnded):
        return f"is served: {event.nbytes / 1e9:.3f} GB in {event.seconds['total']:.3f} s by {event.method}"
    if isinstance(event, UpdateFailed):
        return (
            f"failed on rank {event.rank} in phase {event.phase!r}, the engine holds {event.held!r}: {event.message!r}"
        )
    return f"is on its way from {event.ranks} ranks"


if __name__ == "__main__":
    main()
