"""Names that existing users import from this distribution and that a plugin brings."""

from __future__ import annotations

from importlib.metadata import entry_points

from checkpoint_engine.errors import MissingDependencyError

__all__ = ["PLUGIN_OF", "load_plugin_name"]

PLUGIN_OF = {"VllmColocateWorkerExtension": "checkpoint-engine-vllm"}
"""Name -> the distribution that brings it."""

_GROUP = "checkpoint_engine.names"


def load_plugin_name(name: str) -> object:
    """What the entry-point group `checkpoint_engine.names` has under a name of `PLUGIN_OF`.

    Raises:
        MissingDependencyError: the plugin is not installed.
    """
    plugin = PLUGIN_OF[name]
    missing = MissingDependencyError(
        f"{name} comes with the plugin {plugin}; install it where its engine is: pip install {plugin}"
    )
    found = [*entry_points(group=_GROUP, name=name)]
    if not found:
        raise missing
    try:
        return found[0].load()
    except ModuleNotFoundError as error:
        if error.name != found[0].module.partition(".")[0]:
            raise
        raise missing from None
