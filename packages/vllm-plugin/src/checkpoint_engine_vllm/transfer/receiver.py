"""A drop-in receiver: takes what one of vLLM's own trainers sends, and brings it to the sink."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from checkpoint_engine.sdk import CheckpointStateError, TensorSpec
from checkpoint_engine_vllm.transfer import sessions
from checkpoint_engine_vllm.transfer.draft_session import DraftSession
from checkpoint_engine_vllm.transfer.engine import TransferEngine
from checkpoint_engine_vllm.transfer.incoming import IncomingUpdate
from checkpoint_engine_vllm.transfer.layouts import Brought

__all__ = ["Receiver"]


class Receiver(TransferEngine):
    """Whatever is sent: start, update as often as the trainer likes, finish."""

    door = ""
    """The backend's name."""
    supports_draft_weight_update = True

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        self._incoming: IncomingUpdate | None = None
        self._draft: DraftSession | None = None

    def close_memory(self) -> None:
        """Lets go of what an update brought."""

    @property
    def incoming(self) -> IncomingUpdate:
        """The updates of this worker's served model."""
        if self._incoming is None:
            self._incoming = IncomingUpdate(self.state, self.door, self._abandon)
        return self._incoming

    def start_weight_update(self) -> None:
        """Begins, as far as that can be before anything has come; whatever was left open is given up.

        Raises:
            CheckpointStateError: the worker is taking an update that comes another way.
        """
        self.give_up()
        if self.model is self._default_model:
            self.together("the start of the update", self.incoming.start)
        else:
            self._draft = DraftSession(self.worker, self.model, self.model_config)
            self.together("the start of the draft model's update", self._draft.begin)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Takes over what one call brings; its memory may be used again once this returns.

        Raises:
            CheckpointEngineError: it does not fit or could not be taken over; the update is given up on all workers.
            ValueError: this is no such call.
        """
        self.together("the update", lambda: self._take(update_info))

    @abstractmethod
    def receive_weights(self, update_info: Any) -> None:  # noqa: ANN401 - the backend's own
        """As `update_weights`, of a call that was read."""

    def announce(self, specs: Mapping[str, TensorSpec]) -> None:
        """Says what one call will bring, before any of it is there; an update that cannot be taken is refused now.

        Raises:
            WeightsRejectedError: it does not fit, or is not what came last time.
        """
        if self._draft is None and not self.incoming.is_open:
            self.incoming.begin(specs)

    def take(self, brought: Brought) -> None:
        """Gives tensors to the model that this update is for."""
        if self._draft is not None:
            self._draft.load(brought.tensors)
        else:
            self.incoming.load(brought.specs, brought.tensors)

    def finish_weight_update(self) -> None:
        """Completes the update, once all workers have everything.

        Raises:
            CheckpointEngineError: something is missing, or could not be completed.
        """
        draft = self._draft
        if draft is not None:
            self.together("the draft model's update", draft.finish)
        else:
            self.together("the update", self.incoming.check_complete)
            self.together("the end of the update", self._finish)
        self._draft = None
        self.close_memory()

    def give_up(self, error: Exception | None = None) -> None:
        """Ends what was started and not finished."""
        draft, self._draft = self._draft, None
        if draft is not None:
            draft.abort()
        if self._incoming is not None:
            self._incoming.give_up(error)
        self.close_memory()

    def _abandon(self) -> None:
        self.give_up(CheckpointStateError("the weight update was given up, since somebody asked for that"))
        sessions.end(self.worker)

    def _take(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        self.synchronize()

    def _finish(self) -> None:
        self.incoming.finish()
        self.synchronize()

    def trainer_send_weights(self, *_: object) -> None:
        """Asked for before 0.28; trainers use vLLM's own engine of this wire.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("send weights with vLLM's own trainer side")
