"""Takes weights for a transformers model: all that is particular to this engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from checkpoint_engine.sdk import (
    ComparisonFigures,
    ComparisonSink,
    EngineSink,
    Findings,
    Tensors,
    TensorSpec,
    Update,
    UpdateFigures,
    WeightsRejectedError,
)
from checkpoint_engine.sdk.plans import Reloader

Parameters = Mapping[str, torch.Tensor]
Loader = Callable[[Iterable[tuple[str, torch.Tensor]]], None]


class TransformersSink(EngineSink):
    """The sink of the engine's one worker."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.parameters = parameters_of(model)
        self._model = model
        self._written = False
        self._reloader = Reloader(load_into(self.parameters), self.parameters, self._meta_model)

    def check(self, update: Update) -> None:
        """Refuses a checkpoint of another model."""
        check_fits(self.parameters, update.tensors)

    def open(self, update: Update) -> None:
        """Nothing is written before the first tensor."""
        self._written = False
        self._reloader.begin(update.tensors, update.reload)

    def take(self, tensors: Tensors) -> None:
        """By plan, or by the loader as long as there is none."""
        self._written = True
        self._reloader.load(tensors)

    def complete(self, update: Update) -> UpdateFigures:
        """A model that derives something from its weights would do that here."""
        del update
        return self._reloader.finish()

    def restore(self) -> bool:
        """What was written cannot be taken back."""
        self._reloader.failed(interrupted=self.interrupted)
        return not self._written

    def wanted(self, bucket: Sequence[tuple[str, int]]) -> tuple[tuple[int, int], ...] | None:
        """What the plan copies; this is all that direct updates read."""
        return self._reloader.wanted(bucket)

    def verifier(self) -> TransformersVerifier:
        """For `checkpoint-engine verify`."""
        return TransformersVerifier(self)

    def _meta_model(self) -> tuple[Loader, Parameters]:
        """The same model without memory: its loader is watched once, and its copies become the plan."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self._model.config)
        parameters = parameters_of(model)
        return load_into(parameters), parameters


class TransformersVerifier(ComparisonSink):
    """Compares the weights with what an update would make of them."""

    def __init__(self, sink: TransformersSink) -> None:
        super().__init__(sink)
        self._parameters = sink.parameters
        self._findings = Findings()

    def check(self, update: Update) -> None:
        """As an update does."""
        check_fits(self._parameters, update.tensors)

    def open(self, update: Update) -> None:
        """Nothing is to be made ready."""

    def take(self, tensors: Tensors) -> None:
        """Compares, in the dtype that the model has."""
        for name, tensor in tensors:
            held = self._parameters[name]
            self._findings.note(name, held, tensor.to(held.dtype))

    def complete(self, update: Update) -> ComparisonFigures:
        """Tells what was found."""
        del update
        return self._findings.figures()

    def restore(self) -> bool:
        """Nothing was changed."""
        return True


def parameters_of(model: PreTrainedModel) -> Parameters:
    """By their names in the checkpoint; what is tied has one."""
    return {name: parameter.data for name, parameter in model.named_parameters()}


def load_into(parameters: Parameters) -> Loader:
    """The engine's loader, which here has nothing to cut or to fuse."""

    def load(tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in tensors:
            parameters[name].copy_(tensor)

    return load


def check_fits(parameters: Parameters, tensors: Mapping[str, TensorSpec]) -> None:
    """Raises unless there is one tensor of the right shape for each parameter."""
    unknown, missing = tensors.keys() - parameters.keys(), parameters.keys() - tensors.keys()
    if unknown or missing:
        raise WeightsRejectedError(
            f"not a checkpoint of this model: unknown {sorted(unknown)[:8]}, missing {sorted(missing)[:8]}"
        )
    for name, spec in tensors.items():
        if spec.shape != tuple(parameters[name].shape):
            raise WeightsRejectedError(f"{name} has shape {spec.shape}, the model's {tuple(parameters[name].shape)}")
