"""Direct where that is possible, else by broadcast: known once all ranks have introduced themselves."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from checkpoint_engine.transfer.broadcast import Broadcast
from checkpoint_engine.transfer.direct import Direct
from checkpoint_engine.transfer.introduction import Introduction
from checkpoint_engine.transfer.transport import Transport, UpdateContext

__all__ = ["Automatic"]

logger = logging.getLogger(__name__)


class Automatic(Broadcast):
    """A broadcast that makes way for a direct update."""

    def __init__(self, update: UpdateContext) -> None:
        super().__init__(update)
        self._direct = Direct(update)

    def introduce(self, mine: Introduction) -> Introduction:
        """What either needs."""
        return super().introduce(self._direct.introduce(mine))

    def settle(self, ranks: Sequence[Introduction]) -> Transport:
        """The better one that is possible."""
        obstacle = self._direct.find_obstacle(ranks)
        if not obstacle:
            return self._direct
        logger.info("by broadcast, since a direct update is not possible: %s", obstacle)
        return self

    def close(self) -> None:
        """Both."""
        self._direct.close()
        super().close()
