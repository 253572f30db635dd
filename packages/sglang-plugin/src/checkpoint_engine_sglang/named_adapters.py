"""LoRA adapters that SGLang is given while it serves: each name leads to new weights from one request to the next.

Workers load an adapter beside the one of that name, under an identity of its own. Once all have it, the name leads to
it. Requests that run go on with the old one, which is unloaded when the last of them has ended.
"""

from __future__ import annotations

import asyncio
import atexit
import importlib
import logging
import shutil
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from checkpoint_engine.sdk.access import RefusedError
from checkpoint_engine.sdk.adapters import copy_adapter, directory_of_adapters
from checkpoint_engine.sdk.directories import OwnedDirectory
from checkpoint_engine_sglang import compat
from checkpoint_engine_sglang.adapters import adapter_reference
from checkpoint_engine_sglang.messages import Order, pack

__all__ = ["NamedAdapters"]

_BAD, _MISSING = 400, 404
_NEEDED = ("lora_registry", "lora_ref_cache", "lora_update_lock", "update_lora_adapter_communicator")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _NamedAdapter:
    """An adapter that came so."""

    identity: str
    version: str
    files: Path


class NamedAdapters:
    """Those of one server of SGLang."""

    def __init__(self, manager: Any, ask: Callable[[Any], Awaitable[str]]) -> None:  # noqa: ANN401 - SGLang's own
        """Remembers SGLang's tokenizer manager, and how all workers are asked; what that returns went wrong."""
        self._manager = manager
        self._ask = ask
        self._kept: dict[str, _NamedAdapter] = {}
        self._directory: OwnedDirectory | None = None
        self._unloading: set[asyncio.Task[None]] = set()

    @property
    def versions(self) -> dict[str, str]:
        """Of those that came so and still have their name."""
        known: dict[str, Any] = self._manager.lora_registry.get_all_adapters() if self._kept else {}
        return {
            name: kept.version
            for name, kept in self._kept.items()
            if getattr(known.get(name), "lora_id", "") == kept.identity
        }

    async def take(self, name: str, directory: str, version: str) -> None:
        """Loads an adapter from a directory of PEFT's, in place of what has this name.

        Raises:
            RefusedError: it is not taken; the message says why, and requests get what they got before.
        """
        self._check(name)
        identity = uuid4().hex
        if self._directory is None:
            self._directory = directory_of_adapters()
            atexit.register(self._directory.close)
        files = await asyncio.to_thread(copy_adapter, Path(directory), self._directory.path / identity)
        manager = self._manager
        async with manager.lora_update_lock:
            old = manager.lora_registry.get_all_adapters().get(name)
            pinned = bool(getattr(old, "pinned", False))
            # SGLang's workers take no name twice; only the registry of the front is asked by name.
            order = Order(do="adapter", version=version, adapter=(identity, f"{name}#{identity}", str(files), pinned))
            request = compat.request_type()(zmq_handles=pack({}, order), flush_cache=False)
            if problem := await self._ask(request):
                await asyncio.to_thread(shutil.rmtree, files, ignore_errors=True)
                raise RefusedError(_BAD, f"SGLang does not take the adapter {name!r}: {problem}")
            await self._lead(name, adapter_reference(identity, name, str(files), pinned))
        before = self._kept.get(name)
        self._kept[name] = _NamedAdapter(identity, version, files)
        if old is not None:
            self._unload_later(old, before)
        logger.info("the LoRA adapter %r has new weights: %s", name, version)

    async def _lead(self, name: str, reference: Any) -> None:  # noqa: ANN401 - SGLang's own
        """From now on requests for this name get that adapter."""
        registry = self._manager.lora_registry
        async with registry._registry_lock.writer_lock:  # noqa: SLF001 - in one step, which SGLang has no method for
            registry._registry.pop(name, None)  # noqa: SLF001
            registry._register_adapter(reference)  # noqa: SLF001
        self._manager.lora_ref_cache[name] = reference

    def _unload_later(self, old: Any, kept: _NamedAdapter | None) -> None:  # noqa: ANN401
        task = asyncio.ensure_future(self._unload(old, kept))
        self._unloading.add(task)
        task.add_done_callback(self._unloading.discard)

    async def _unload(self, old: Any, kept: _NamedAdapter | None) -> None:  # noqa: ANN401
        """Once nobody uses it, however long that takes: nobody waits for it."""
        try:
            await self._manager.lora_registry.wait_for_unload(old.lora_id)
            kind: Any = importlib.import_module("sglang.srt.managers.io_struct").UnloadLoRAAdapterReqInput
            async with self._manager.lora_update_lock:
                request = kind(lora_name=old.lora_name, lora_id=old.lora_id)
                await self._manager.update_lora_adapter_communicator(request)
        except Exception:
            logger.exception(
                "the old weights of the LoRA adapter %r are not unloaded: they keep their slot", old.lora_name
            )
            return
        if kept is not None:
            await asyncio.to_thread(shutil.rmtree, kept.files, ignore_errors=True)

    def _check(self, name: str) -> None:
        """Tells why this server takes no such adapter.

        Raises:
            RefusedError: the message says it.
        """
        manager, arguments = self._manager, self._manager.server_args
        if not getattr(arguments, "enable_lora", False):
            raise RefusedError(_BAD, "this server has no LoRA adapters: start it with --enable-lora")
        if not all(hasattr(manager, needed) for needed in _NEEDED):
            raise RefusedError(_MISSING, "this SGLang keeps its adapters otherwise than the plugin knows; upgrade it")
        for option, most in (("dp_size", 1), ("tokenizer_worker_num", 1), ("pp_size", 1)):
            if int(getattr(arguments, option, 1) or 1) > most:
                raise RefusedError(_BAD, f"with --{option.replace('_', '-')} above 1 adapters cannot be replaced here")
        if not name or name == getattr(arguments, "served_model_name", ""):
            raise RefusedError(_BAD, f"{name!r} is no name for an adapter" + " (the served model's)" * bool(name))
        registry, most = manager.lora_registry, getattr(arguments, "max_loaded_loras", None)
        if most is not None and name not in registry.get_all_adapters() and registry.num_registered_loras >= most:
            raise RefusedError(_BAD, f"{most} adapters are loaded, as many as --max-loaded-loras allows: unload one")
