"""What vLLM calls in each of its processes when this package is installed (entry point `vllm.general_plugins`)."""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Any

logger = logging.getLogger(__name__)

WORKER_EXTENSION = "checkpoint_engine_vllm.WorkerExtension"
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
    if getattr(create, _MARK, False):
        return

    @functools.wraps(create)
    def create_engine_config(*args: object, **kwargs: object) -> object:
        config = create(*args, **kwargs)
        _use_our_extension(config)
        return config

    setattr(create_engine_config, _MARK, True)
    arguments.create_engine_config = create_engine_config


def _use_our_extension(config: object) -> None:
    parallel: Any = getattr(config, "parallel_config", None)
    worker = getattr(parallel, "worker_cls", None)
    own_worker = isinstance(worker, str) and worker.startswith("vllm.")
    if own_worker and getattr(parallel, "worker_extension_cls", None) == "":
        parallel.worker_extension_cls = WORKER_EXTENSION
