"""What a rank knows of checkpoints: who holds which tensors of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec

from checkpoint_engine.catalog import Catalog
from checkpoint_engine.errors import CheckpointStateError

__all__ = ["CheckpointHolders", "GatheredCatalogs"]


@dataclass(frozen=True)
class CheckpointHolders:
    """Who holds a checkpoint: these ranks together, or one or several parameter servers elsewhere."""

    replicas: tuple[Catalog, ...]
    digest: str
    """Stands for all that is known, and is the same on ranks that know the same."""
    remote: bool = False


class GatheredCatalogs:
    """The checkpoints that updates can bring, by name."""

    def __init__(self) -> None:
        self._cached: dict[str, CheckpointHolders] = {}
        self._latest = ""
        self._for_any_name = ""
        """What stands for names that nobody knows."""

    def note(self, name: str, replicas: Sequence[Catalog], parts: Sequence[bytes], *, remote: bool) -> None:
        """Remembers who holds a checkpoint; `parts` are what that was learned from, the same on all ranks."""
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
        self._cached[name] = CheckpointHolders(tuple(replicas), digest.hexdigest(), remote)
        self._latest = name

    def accept_any_name(self) -> None:
        """From now on the checkpoint noted last is also the one under names that are not known."""
        self._for_any_name = self._latest

    def forget(self, name: str) -> None:
        """Forgets a checkpoint, if it is known."""
        self._cached.pop(name, None)

    def has(self, name: str) -> bool:
        """Whether a checkpoint of these ranks was gathered under this very name."""
        return name in self._cached and not self._cached[name].remote

    def get(self, name: str | None = None) -> CheckpointHolders:
        """Who holds a checkpoint; the one noted last if no name is given.

        Raises:
            CheckpointStateError: it was not gathered.
        """
        if name is None:
            if self._latest not in self._cached:
                raise CheckpointStateError("nothing was gathered yet; call gather_metas on all ranks first")
            name = self._latest
        if name in self._cached:
            return self._cached[name]
        if self._for_any_name in self._cached and name:  # metas of the known form need not say what they are called
            known = self._cached[self._for_any_name]
            return replace(known, replicas=tuple(msgspec.structs.replace(c, name=name) for c in known.replicas))
        raise CheckpointStateError(f"{name!r} was not gathered; call gather_metas({name!r}) on all ranks first")
