"""The backend `checkpoint_engine`: updates offered by this project's parameter server, over vLLM's own four calls.

`init_weight_transfer_engine({})`, `start_weight_update()`, `update_weights({"handles": …, "version": …})`,
`finish_weight_update()`. The update itself happens in the third: checked, all or none, with whatever the draft model
needs of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from checkpoint_engine.sdk import CheckpointStateError, limits
from checkpoint_engine_vllm.transfer import sessions
from checkpoint_engine_vllm.transfer.backends import NATIVE
from checkpoint_engine_vllm.transfer.engine import TransferEngine

__all__ = ["NativeInitInfo", "NativeTransfer", "NativeUpdateInfo"]


@dataclass
class NativeInitInfo:
    """Of a connection: nothing; each update says where it comes from."""


@dataclass
class NativeUpdateInfo:
    """Of an update."""

    handles: dict[str, str] = field(default_factory=dict[str, str])
    """Device identity -> handle, of all ranks, as the parameter server gives them."""
    version: str = ""
    """What the weights are called; for people who read this, the parameter server says it as well."""
    timeout: float = limits.UPDATE
    """Seconds for the whole update."""

    def __post_init__(self) -> None:
        """Refuses an update from nowhere.

        Raises:
            ValueError: there are no handles.
        """
        if not self.handles:
            raise ValueError("`handles` (device -> handle, of all ranks of the parameter server) is missing or empty")


class NativeTransfer(TransferEngine):
    """The backend `checkpoint_engine`."""

    init_info_cls = NativeInitInfo
    update_info_cls = NativeUpdateInfo
    supports_draft_weight_update = False
    """The draft model gets its weights out of the same update."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        self._updated = False

    def init_transfer_engine(self, init_info: NativeInitInfo) -> None:
        """Nothing is connected before an update."""

    def start_weight_update(self) -> None:
        """Nothing is made ready before the update says what it brings."""
        self._updated = False

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Takes one update.

        Raises:
            CheckpointEngineError: it did not succeed; `checkpoint_engine_status` says what this worker holds.
        """
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: NativeUpdateInfo) -> None:
        """As `update_weights`."""
        timeout = float(update_info.timeout)
        self.together("the update", lambda: self.state.receive(update_info.handles, timeout, NATIVE))
        self._updated = True

    def finish_weight_update(self) -> None:
        """Checks that the session brought something.

        Raises:
            CheckpointStateError: it did not; the weights are those from before.
        """
        if not self._updated:
            sessions.end(self.worker)
            raise CheckpointStateError("this weight update brought nothing: update_weights was not called")
        self._updated = False

    def trainer_send_weights(self, *_: object) -> None:
        """Asked for before 0.28; our trainers' side is `checkpoint_engine.ps.ParameterServer`.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("send weights with checkpoint_engine.ps.ParameterServer")
