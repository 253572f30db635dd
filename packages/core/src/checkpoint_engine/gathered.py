"""What a rank knows of checkpoints: who holds which tensors of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec

from checkpoint_engine.catalog import Catalog
from checkpoint_engine.errors import CheckpointStateError


@dataclass(frozen=True)
class Known:
    """Who holds a checkpoint: these ranks together, or one or several parameter servers elsewhere."""

    replicas: tuple[Catalog, ...]
    digest: str
    """Stands for all that is known, and is the same on ranks that know the same."""
    elsewhere: bool = False


class Gathered:
    """The checkpoints that updates can bring, by name."""

    def __init__(self) -> None:
        self._known: dict[str, Known] = {}
        self._latest = ""

    def note(self, name: str, replicas: Sequence[Catalog], parts: Sequence[bytes], *, elsewhere: bool) -> None:
        """Remembers who holds a checkpoint; `parts` are what that was learned from, the same on all ranks."""
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
        self._known[name] = Known(tuple(replicas), digest.hexdigest(), elsewhere)
        self._latest = name

    def forget(self, name: str) -> None:
        """Forgets a checkpoint, if it is known."""
        self._known.pop(name, None)

    def get(self, name: str | None = None) -> Known:
        """Who holds a checkpoint; the one noted last if no name is given.

        Raises:
            CheckpointStateError: it was not gathered.
        """
        if name is None:
            if self._latest not in self._known:
                raise CheckpointStateError("nothing was gathered yet; call gather_metas on all ranks first")
            name = self._latest
        if name in self._known:
            return self._known[name]
        if "" in self._known and name:  # metas of the known form do not say what their checkpoint is called
            nameless = self._known[""]
            return replace(nameless, replicas=tuple(msgspec.structs.replace(c, name=name) for c in nameless.replicas))
        raise CheckpointStateError(f"{name!r} was not gathered; call gather_metas({name!r}) on all ranks first")
