"""The clients of engines, as installed plugins offer them."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import cast

from checkpoint_engine.engine.client import EngineClient, VerifyingClient
from checkpoint_engine.errors import MissingDependencyError

ENTRY_POINTS = "checkpoint_engine.clients"


def plugin_client(engine: str) -> type[EngineClient]:
    """The client class of an engine, by its name in the entry-point group `checkpoint_engine.clients`.

    Raises:
        MissingDependencyError: no installed plugin offers that engine, or the plugin cannot be imported.
    """
    found = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
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
