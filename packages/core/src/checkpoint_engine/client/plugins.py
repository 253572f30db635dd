"""What installed plugins offer: clients of engines, and what tells engines apart."""

from __future__ import annotations

import logging
from importlib.metadata import EntryPoint, entry_points
from typing import cast

from checkpoint_engine.client.announced import EngineSign
from checkpoint_engine.client.engine_client import (
    AdapterClient,
    EngineClient,
    SettlingClient,
    TellingClient,
    VerifyingClient,
)
from checkpoint_engine.errors import MissingDependencyError
from checkpoint_engine.version import DISTRIBUTION

__all__ = [
    "CHECKS",
    "CLIENTS",
    "adapter_client",
    "announced",
    "engine_signs",
    "plugin_client",
    "settling_client",
    "telling_client",
    "verifying_client",
]

CLIENTS = "checkpoint_engine.clients"
"""Entry-point group: name of an engine -> class of its client."""
CHECKS = "checkpoint_engine.checks"
"""Entry-point group: name of an engine -> `InstalledEngine`, or a function as its `inspect`."""
_SIGNS = "checkpoint_engine.identify"
"""Entry-point group: name of an engine -> `EngineSign`."""

logger = logging.getLogger(__name__)


def announced(group: str) -> dict[str, EntryPoint]:
    """What plugins announce in a group, by name; what this distribution brings itself comes last."""
    points = entry_points(group=group)
    return {point.name: point for point in sorted(points, key=lambda point: (_is_ours(point), point.name))}


def engine_signs() -> dict[str, EngineSign]:
    """By what the engines are known that have a plugin here; a plugin that is broken is passed over with a warning."""
    signs: dict[str, EngineSign] = {}
    for engine, point in announced(_SIGNS).items():
        try:
            found: object = point.load()
        except Exception as error:  # noqa: BLE001 - whatever one plugin does, the others' engines can be told apart
            logger.warning("the plugin for the engine %r (%s) cannot be loaded: %r", engine, point.value, error)
            continue
        if isinstance(found, EngineSign):
            signs[engine] = found
        else:
            logger.warning("%s, which is to tell the engine %r apart, is no EngineSign", point.value, engine)
    return signs


def plugin_client(engine: str) -> type[EngineClient]:
    """The client class of an engine, by its name in the entry-point group `checkpoint_engine.clients`.

    Raises:
        MissingDependencyError: no installed plugin offers that engine, or the plugin cannot be imported.
    """
    found = announced(CLIENTS)
    if engine not in found:
        raise MissingDependencyError(
            f"no plugin for the engine {engine!r} is installed (found: {', '.join(sorted(found)) or 'none'}); "
            f"try `pip install checkpoint-engine-{engine}`"
        )
    try:
        return cast("type[EngineClient]", found[engine].load())
    except (ImportError, AttributeError) as error:
        raise MissingDependencyError(
            f"the plugin for the engine {engine!r} ({found[engine].value}) cannot be loaded: {error}"
        ) from error


def adapter_client(client: EngineClient) -> AdapterClient:
    """The same client, if its engine takes LoRA adapters while it serves.

    Raises:
        MissingDependencyError: it does not.
    """
    if not isinstance(client, AdapterClient):
        raise MissingDependencyError(
            f"{type(client).__module__} has no way to give its engine a LoRA adapter; vLLM's and SGLang's have"
        )
    return client


def telling_client(client: EngineClient) -> TellingClient:
    """The same client, if its engine tells what it holds.

    Raises:
        MissingDependencyError: it does not.
    """
    if not isinstance(client, TellingClient):
        raise MissingDependencyError(
            f"the plugin {type(client).__module__} cannot tell what an engine holds; upgrade it"
        )
    return client


def settling_client(client: EngineClient) -> SettlingClient:
    """The same client, if it can tidy up after a sender that died.

    Raises:
        MissingDependencyError: it cannot.
    """
    if not isinstance(client, SettlingClient):
        raise MissingDependencyError(
            f"the plugin {type(client).__module__} cannot settle what a dead sender left; upgrade it"
        )
    return client


def verifying_client(client: EngineClient) -> VerifyingClient:
    """The same client, if it can have weights compared.

    Raises:
        MissingDependencyError: it cannot.
    """
    if not isinstance(client, VerifyingClient):
        raise MissingDependencyError(
            f"the plugin {type(client).__module__} cannot compare an engine's weights with a checkpoint; upgrade it"
        )
    return client


def _is_ours(point: EntryPoint) -> bool:
    return point.dist is not None and point.dist.name == DISTRIBUTION
