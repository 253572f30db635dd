"""A LoRA adapter out of a trainer's memory reaches serving engines."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType] - of its paths

from checkpoint_engine import limits
from checkpoint_engine.client.engine_client import EngineClient, PauseMode
from checkpoint_engine.client.plugins import adapter_client
from checkpoint_engine.errors import SettingError
from checkpoint_engine.owned_directory import OwnedDirectory

__all__ = ["send_adapter"]

_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - a directory of mode 0700 is made in it


def send_adapter(
    client: EngineClient,
    name: str,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, object],
    *,
    version: str = "",
    pause: PauseMode = "keep",
    reset_caches: bool = True,
    timeout: float = limits.UPDATE,
) -> None:
    """Gives an engine of this host an adapter, in place of what it has under that name; it need not have had one.

    Until all of its workers have it, requests for `name` get the old one.

    Args:
        client: The engine's, as `VllmClient("localhost:8000")` or `SGLangClient("localhost:30000")`.
        name: What requests call it (`"model": name`).
        tensors: Of the adapter, by PEFT's names (`base_model.model.….lora_A.weight`), on any device; they are copied.
        config: PEFT's configuration: `r`, `lora_alpha`, `target_modules` and so on, as in `adapter_config.json`.
        version: What these weights shall be called in the engine's status.
        pause: What becomes of running requests: `keep` has them go on, with the new adapter where they use this one. An
            SGLang is not paused: they end with the old one.
        reset_caches: Whether the engine drops what it has cached; an SGLang need not.
        timeout: Seconds for all of it.

    Raises:
        MissingDependencyError: the engine's plugin takes no adapters.
        SettingError: there are no tensors.
        EngineRequestError: the engine does not take it; it serves what it had.
        DeadlineError: it does not answer in time.
    """
    taking = adapter_client(client)
    if not tensors:
        raise SettingError(f"the adapter {name!r} has no tensors")
    with OwnedDirectory("adapter", _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else None) as directory:
        held = {key: tensor.detach().to("cpu").contiguous() for key, tensor in tensors.items()}
        save_file(held, directory.path / "adapter_model.safetensors")
        (directory.path / "adapter_config.json").write_text(json.dumps(dict(config), default=_plain))
        taking.load_adapter(
            name, directory.path, version=version, pause=pause, reset_caches=reset_caches, timeout=timeout
        )


def _plain(value: object) -> object:
    """PEFT keeps sets, and members of enumerations."""
    if isinstance(value, (set, frozenset)):
        return sorted(str(each) for each in value)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    return str(getattr(value, "value", value))
