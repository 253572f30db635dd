"""What a rank knows of checkpoints: who holds which tensors of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import msgspec

from checkpoint_engine.catalog import Catalog
from checkpoint_engine.errors import CheckpointStateError, SettingError

__all__ = ["CheckpointHolders", "GatheredCatalogs"]


@dataclass(frozen=True)
class CheckpointHolders:
    """Who holds a checkpoint: these ranks together, or one or several parameter servers elsewhere."""

    replicas: tuple[Catalog, ...]
    digest: str
    """Stands for all that is known, and is the same on ranks that know the same."""
    remote: bool = False

    def only(self, patterns: Sequence[str]) -> CheckpointHolders:
        """A part of it: the tensors whose names fit one of these patterns, as of a shell.

        Raises:
            SettingError: a pattern fits none.
        """
        names = {tensor.name for tensor in self.replicas[0].tensors()}
        fitting = {pattern: {name for name in names if fnmatchcase(name, pattern)} for pattern in patterns}
        unused = [pattern for pattern, found in fitting.items() if not found]
        if unused:
            raise SettingError(f"only={unused[0]!r} fits no tensor of {self.replicas[0].name!r}")
        chosen = frozenset[str]().union(*fitting.values())
        digest = hashlib.sha256("\n".join((self.digest, *sorted(chosen))).encode()).hexdigest()
        return replace(self, replicas=tuple(each.only(chosen.__contains__) for each in self.replicas), digest=digest)


class GatheredCatalogs:
    """The checkpoints that updates can bring, by name."""

    def __init__(self) -> None:
        self._cached: dict[str, CheckpointHolders] = {}
        self._latest = ""
        self._for_any_name = ""
        """What stands for names that nobody knows."""
        self._part: tuple[CheckpointHolders, tuple[str, ...], CheckpointHolders] | None = None
        """The last part that was asked for, and of what."""

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

    def get(self, name: str | None = None, only: Sequence[str] = ()) -> CheckpointHolders:
        """Who holds a checkpoint, or the part of it that is asked for; the one noted last if no name is given.

        Raises:
            CheckpointStateError: it was not gathered.
            SettingError: a pattern of `only` fits no tensor.
        """
        if isinstance(only, str):
            raise SettingError(f"only={only!r} is text; give a list of patterns")
        known = self._find(name)
        if not only:
            return known
        if self._part is None or self._part[0] is not known or self._part[1] != tuple(only):
            self._part = known, tuple(only), known.only(only)
        return self._part[2]

    def _find(self, name: str | None) -> CheckpointHolders:
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
