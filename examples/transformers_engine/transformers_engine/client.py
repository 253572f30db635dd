"""What the parameter server's environment needs: how to ask this engine, and how to tell it apart."""

from __future__ import annotations

from checkpoint_engine.sdk.client import CollectiveRpcClient, Deadline, EngineSign, InstalledEngine, PauseMode

SIGN = EngineSign("/transformers", "transformers")
INSTALLED = InstalledEngine("transformers", "transformers-engine", "")


class TransformersClient(CollectiveRpcClient):
    """Asks `transformers_engine.server`, where a request and an update exclude each other."""

    def needs_pause(self, mode: PauseMode) -> bool:  # all modes are the same here
        """Nobody has to."""
        return False

    def reset_caches(self, deadline: Deadline) -> None:
        """No request leaves anything behind."""
