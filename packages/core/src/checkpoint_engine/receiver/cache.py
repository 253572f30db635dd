"""What an engine worker keeps from one update for the next."""

from __future__ import annotations

import functools

from checkpoint_engine.receiver.deliveries import DeliveryCache
from checkpoint_engine.receiver.layouts import LayoutCache
from checkpoint_engine.receiver.mappings import MappingCache

__all__ = ["ReceiverCache", "process_cache"]


class ReceiverCache:
    """Layouts, mappings and what was delivered out of those; no update is wrong without it."""

    def __init__(self) -> None:
        self.layouts = LayoutCache()
        self.mappings = MappingCache()
        self.deliveries = DeliveryCache()


@functools.cache
def process_cache() -> ReceiverCache:
    """The one of this process, for whoever brings none."""
    return ReceiverCache()
