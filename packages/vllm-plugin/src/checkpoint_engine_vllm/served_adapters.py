"""LoRA adapters that vLLM is given while it serves: each keeps its name, and has new weights from now on.

vLLM reads adapters from directories, also again when others have displaced one in memory. So it gets directories of
this process, in shared memory. Whatever path a request has that has begun already leads to the newest weights.
"""

from __future__ import annotations

import asyncio
import atexit
import importlib
import logging
import shutil
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint_engine.sdk import limits
from checkpoint_engine.sdk.access import RefusedError
from checkpoint_engine.sdk.adapters import copy_adapter, directory_of_adapters
from checkpoint_engine.sdk.directories import OwnedDirectory
from checkpoint_engine_vllm.adapters import adapter_request
from checkpoint_engine_vllm.data_parallel import ask_all_workers

__all__ = ["ServedAdapters"]

_BAD, _MISSING = 400, 404

logger = logging.getLogger(f"vllm.{__name__}")  # below vLLM's own, which decides on what its users see


@dataclass
class _Kept:
    """An adapter that came so."""

    number: int
    """By which vLLM's workers know it."""
    home: Path
    times: int = 0
    version: str = ""

    @property
    def newest(self) -> Path:
        """A link to its newest weights."""
        return self.home / "newest"


class ServedAdapters:
    """Those of one API server of vLLM."""

    def __init__(self, state: Any, args: Namespace) -> None:  # noqa: ANN401 - vLLM's own
        self._state = state
        self._servers = int(getattr(args, "api_server_count", None) or 1)
        self._kept: dict[str, _Kept] = {}
        self._directory: OwnedDirectory | None = None

    @property
    def versions(self) -> dict[str, str]:
        """Of those that came so, by name."""
        return {name: kept.version for name, kept in self._kept.items() if kept.times}

    async def take(self, engine: Any, name: str, directory: str, version: str) -> None:  # noqa: ANN401 - vLLM's own
        """Loads an adapter from a directory of PEFT's, in place of what has this name.

        Until all workers have it, requests get the old one; if one does not take it, all keep the old one.

        Raises:
            RefusedError: it is not taken; the message says why.
        """
        models = self._models(engine, name)
        async with models.lora_resolver_lock[name]:
            kept = self._kept.get(name) or self._new(models)
            files = await asyncio.to_thread(copy_adapter, Path(directory), kept.home / f"files-{kept.times}")
            if errors := await _load(engine, name, kept.number, str(files)):
                await self._put_back(engine, models, name, kept)
                await asyncio.to_thread(shutil.rmtree, files, ignore_errors=True)
                raise RefusedError(_BAD, f"vLLM does not take the adapter {name!r}: {'; '.join(errors)}")
            await asyncio.to_thread(_point, kept, files)
            # Of vLLM's caches, this path is part of the key.
            path = kept.home / str(kept.times)
            path.symlink_to(kept.newest.name)
            kept.times, kept.version = kept.times + 1, version
            self._kept[name] = kept
            models.lora_requests[name] = adapter_request(name, kept.number, str(path), anew=False)
        logger.info("the LoRA adapter %r has new weights: %s", name, version)

    def _models(self, engine: Any, name: str) -> Any:  # noqa: ANN401 - vLLM's own
        """What knows adapters by name.

        Raises:
            RefusedError: this server takes none.
        """
        models: Any = getattr(self._state, "openai_serving_models", None)
        if models is None or getattr(engine.vllm_config, "lora_config", None) is None:
            raise RefusedError(_BAD, "this server has no LoRA adapters: start it with --enable-lora")
        if not _replaces():
            raise RefusedError(_MISSING, "this vLLM cannot replace an adapter in place; upgrade it")
        if self._servers > 1:
            raise RefusedError(
                _BAD, f"{self._servers} API servers would each know another adapter: start with --api-server-count 1"
            )
        if not name or models.is_base_model(name):
            raise RefusedError(_BAD, f"{name!r} is no name for an adapter" + " (the served model's)" * bool(name))
        return models

    def _new(self, models: Any) -> _Kept:  # noqa: ANN401 - vLLM's own
        """With a number of its own, also where a name was loaded otherwise: what runs with that one goes on with it."""
        if self._directory is None:
            self._directory = directory_of_adapters()
            atexit.register(self._directory.close)
        number = int(models.lora_id_counter.inc(1))
        home = self._directory.path / str(number)
        home.mkdir()
        return _Kept(number, home)

    async def _put_back(self, engine: Any, models: Any, name: str, kept: _Kept) -> None:  # noqa: ANN401 - vLLM's own
        """Some workers may have it: all get the old one again, or none is asked for it."""
        if kept.times:
            if not await _load(engine, name, kept.number, str(kept.newest)):
                return
            del self._kept[name], models.lora_requests[name]
            logger.error("the LoRA adapter %r is lost: its old weights do not load either", name)
        await _load(engine, name, kept.number, "")


def _point(kept: _Kept, files: Path) -> None:
    """From now on every path of the adapter leads to these files; the ones before go."""
    old = kept.newest.resolve() if kept.times else None
    link = kept.home / "next"
    link.symlink_to(files.name)
    link.replace(kept.newest)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


async def _load(engine: Any, name: str, number: int, directory: str) -> list[str]:  # noqa: ANN401 - vLLM's own
    """Has all workers of all replicas load it, or forget it if there is no directory; what went wrong, if anything."""
    arguments = (name, number, directory)
    errors = await ask_all_workers(engine, "checkpoint_engine_adapter", limits.UPDATE, arguments)
    return sorted({str(error) for error in errors if error})


def _replaces() -> bool:
    kind: Any = importlib.import_module("vllm.lora.request").LoRARequest
    return "load_inplace" in kind.__struct_fields__
