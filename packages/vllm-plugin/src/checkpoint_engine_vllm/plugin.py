"""What vLLM calls in each of its processes when this package is installed (entry point `vllm.general_plugins`)."""

from __future__ import annotations

import functools
import importlib
import logging
import os
from typing import Any

logger = logging.getLogger(__name__)

WORKER_EXTENSION = "checkpoint_engine_vllm.WorkerExtension"
METAS_VARIABLE = "CHECKPOINT_ENGINE_METAS"
"""Set where a replica starts from running ones; processes that vLLM starts inherit it."""
_MARK = "_checkpoint_engine_default"


def register() -> None:
    """Makes `WorkerExtension` the default of `--worker-extension-cls`, so that installing the package is enough.

    A class that the user names wins, and so does a worker class from elsewhere. Nothing here ever keeps vLLM from
    starting. `VLLM_PLUGINS`, vLLM's own list of plugins to load, switches it off.
    """
    try:
        arguments = importlib.import_module("vllm.engine.arg_utils").EngineArgs
        create: Any = arguments.create_engine_config
    except (ImportError, AttributeError) as error:
        logger.warning("this vLLM is unknown (%r): start it with --worker-extension-cls %s", error, WORKER_EXTENSION)
        return
    if os.environ.get(METAS_VARIABLE):
        importlib.import_module("checkpoint_engine_vllm.loader").register()
    if getattr(create, _MARK, False):
        return

    @functools.wraps(create)
    def create_engine_config(*args: object, **kwargs: object) -> object:
        config = create(*args, **kwargs)
        _use_our_extension(config)
        _use_our_loader(config)
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
    if own_worker and getattr(parallel, "worker_extension_cls", None) == "":
        parallel.worker_extension_cls = WORKER_EXTENSION
