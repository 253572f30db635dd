"""What a plugin announces of its engine, beside the client."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import msgspec

__all__ = ["EngineSign", "Inspect", "InstalledEngine"]

Inspect = Callable[[], Sequence[Mapping[str, str]]]
"""Looks into an engine, which this imports: `status` (ok, note, problem), `value` and `advice` of each thing."""


class EngineSign(msgspec.Struct, frozen=True):
    """By what an engine is known: `GET path` answers with a JSON object that has `key`, as no other engine's does.

    The entry-point group `checkpoint_engine.identify` names one by engine, for `--engine auto`.
    """

    path: str
    key: str


class InstalledEngine(msgspec.Struct, frozen=True):
    """How an engine finds its plugin, for `checkpoint-engine doctor`.

    The entry-point group `checkpoint_engine.checks` names one by engine.
    """

    module: str
    """What is imported of the engine."""
    plugin: str
    """The distribution that this is of."""
    entry_points: str
    """The engine's own group of entry points, where it looks for plugins; empty if it looks for none."""
    filter_variable: str = ""
    """Environment variable that, when set, names the only plugins that the engine loads."""
    inspect: Inspect | None = None
