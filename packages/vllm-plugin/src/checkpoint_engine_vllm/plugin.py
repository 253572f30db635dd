"""What vLLM calls in each of its processes when this package is installed (entry point `vllm.general_plugins`)."""

from __future__ import annotations

import functools
import importlib
import logging
import os
from typing import Any

from checkpoint_engine_vllm import ahead, beside
from checkpoint_engine_vllm.place import note_replicas
from checkpoint_engine_vllm.transfer import backends

__all__ = ["METAS_VARIABLE", "WORKER_EXTENSION", "register"]

logger = logging.getLogger(f"vllm.{__name__}")  # below vLLM's own, which decides on what its users see

WORKER_EXTENSION = "checkpoint_engine_vllm.WorkerExtension"
METAS_VARIABLE = "CHECKPOINT_ENGINE_METAS"
"""Set where a replica starts from running ones; processes that vLLM starts inherit it."""
_MARK = "_checkpoint_engine_default"
_BY_NAME = f"unless --worker-extension-cls names {WORKER_EXTENSION}"


def register() -> None:
    """Gives vLLM's workers the methods of `WorkerExtension`, so that installing the package is enough.

    They come beside those of a class that is named with `--worker-extension-cls`. A worker class from elsewhere is left
    alone, which the log says. Nothing here ever keeps vLLM from starting. `VLLM_PLUGINS`, vLLM's own list of plugins to
    load, switches it off.
    """
    try:
        arguments = importlib.import_module("vllm.engine.arg_utils").EngineArgs
        create: Any = arguments.create_engine_config
    except (ImportError, AttributeError) as error:
        logger.warning("this vLLM is unknown (%r): start it with --worker-extension-cls %s", error, WORKER_EXTENSION)
        return
    backends.register()
    ahead.register()
    if os.environ.get(METAS_VARIABLE):
        importlib.import_module("checkpoint_engine_vllm.loader").register()
    if getattr(create, _MARK, False):
        return

    @functools.wraps(create)
    def create_engine_config(*args: object, **kwargs: object) -> object:
        config = create(*args, **kwargs)
        _use_our_extension(config)
        _use_our_loader(config)
        note_replicas(config)
        ahead.register()  # for an engine of this very process, which has imported all of vLLM by now
        return config

    setattr(create_engine_config, _MARK, True)
    arguments.create_engine_config = create_engine_config


def _use_our_loader(config: object) -> None:
    """Imports what loads from running replicas only where that is asked for: it costs seconds."""
    load: Any = getattr(config, "load_config", None)
    if getattr(load, "load_format", None) == "checkpoint_engine":
        importlib.import_module("checkpoint_engine_vllm.loader").announce(load)


def _use_our_extension(config: object) -> None:
    parallel: Any = getattr(config, "parallel_config", None)
    worker = getattr(parallel, "worker_cls", None)
    own_worker = isinstance(worker, str) and worker.startswith("vllm.")
    named = getattr(parallel, "worker_extension_cls", None)
    if not isinstance(named, str) or named == WORKER_EXTENSION or named.startswith(beside.__name__):
        return
    if not own_worker:
        logger.warning("worker class %s is not vLLM's: it has no methods of checkpoint-engine, %s", worker, _BY_NAME)
    else:
        parallel.worker_extension_cls = beside.name_beside(named) if named else WORKER_EXTENSION
