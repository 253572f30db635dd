"""`vllm serve --load-format checkpoint_engine`: a new replica takes its weights from running ones when it starts.

    vllm serve MODEL --load-format checkpoint_engine --model-loader-extra-config '{"metas": "http://seed:9000"}'

`metas` is a file or URL, or a list of them, as for `checkpoint-engine join`; `CHECKPOINT_ENGINE_METAS` (separated by
commas) says the same. MODEL needs its configuration and tokenizer only, no weights.
"""

from __future__ import annotations

import importlib
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch

from checkpoint_engine.sdk import SettingError, WeightsRejectedError, limits
from checkpoint_engine.sdk.replicas import Catalog, Pull, check_same, read_metas

__all__ = ["METAS_VARIABLE", "announce", "register", "sources"]

_LOAD_FORMAT = "checkpoint_engine"
METAS_VARIABLE = "CHECKPOINT_ENGINE_METAS"
_TOKEN_VARIABLE = "CHECKPOINT_ENGINE_TOKEN"  # noqa: S105 - its name, not its value

logger = logging.getLogger(f"vllm.{__name__}")  # below vLLM's own, which decides on what its users see


def announce(load_config: object) -> None:
    """Called where vLLM's configuration is made: lets this process and those that it starts know of the loader.

    Raises:
        CheckpointEngineError: nobody is there who holds the weights; said now, before any process starts.
    """
    if getattr(load_config, "load_format", None) != _LOAD_FORMAT:
        return
    found = sources(load_config)
    check_same(_catalogs(found))
    os.environ[METAS_VARIABLE] = ",".join(found)
    register()


def register() -> None:
    """Makes the load format known to vLLM."""
    loaders: Any = importlib.import_module("vllm.model_executor.model_loader")
    base: Any = importlib.import_module("vllm.model_executor.model_loader.base_loader")
    known = cast("Mapping[str, object]", getattr(loaders, "_LOAD_FORMAT_TO_MODEL_LOADER", {}))
    if _LOAD_FORMAT not in known:
        loaders.register_model_loader(_LOAD_FORMAT)(
            type("CheckpointEngineLoader", (_Loading, base.BaseModelLoader), {})
        )


def sources(load_config: object) -> list[str]:
    """Files and URLs with the metas.

    Raises:
        SettingError: none is given, or the loader's configuration holds something else.
    """
    given: object = getattr(load_config, "model_loader_extra_config", None) or {}
    extra = cast("dict[str, object]", given) if isinstance(given, dict) else {}
    unknown = sorted(set(extra) - {"metas"})
    if unknown:
        raise SettingError(
            f"--model-loader-extra-config has {unknown}; --load-format {_LOAD_FORMAT} knows 'metas' only"
        )
    metas = extra.get("metas", os.environ.get(METAS_VARIABLE, ""))
    listed = metas.split(",") if isinstance(metas, str) else cast("Sequence[object]", metas or ())
    found = [str(source).strip() for source in listed if str(source).strip()]
    if not found:
        raise SettingError(
            f"--load-format {_LOAD_FORMAT} needs to know who holds the weights: --model-loader-extra-config "
            f'\'{{"metas": "http://HOST:PORT"}}\', or {METAS_VARIABLE}'
        )
    return found


class _Loading:
    """What vLLM's `BaseModelLoader` leaves to us."""

    load_config: Any

    def __init__(self, load_config: object) -> None:
        super().__init__(load_config)  # pyright: ignore[reportCallIssue] - vLLM's class, which stands behind this one
        self._sources = sources(load_config)

    def download_model(self, model_config: object) -> None:
        """Nothing comes from disk."""

    def load_weights(self, model: torch.nn.Module, model_config: object) -> None:
        """Fills the model.

        Raises:
            PeerError: the weights cannot be read from those that hold them.
            WeightsRejectedError: they do not fill the model.
        """
        started = time.perf_counter()
        group = _WorkerGroup()
        replicas = group.agree(self._sources)
        local = int(os.environ.get("LOCAL_RANK", "0"))
        pull = Pull(replicas, rank=local, ranks=torch.cuda.device_count(), timeout=limits.UPDATE, group=group)
        loaded = _load(model, pull.tensors())
        if loaded is not None and getattr(model_config, "quantization", None) is None:
            missing = sorted({name for name, _ in model.named_parameters()} - loaded)
            if missing:
                raise WeightsRejectedError(
                    f"{replicas[0].name!r} does not fill these parameters: {', '.join(missing[:5])}"
                    + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")  # noqa: PLR2004
                )
        logger.info(
            "took %.6g GB of %r from %s in %.2f s; this worker read %.6g GB of them",
            replicas[0].nbytes / 1e9,
            replicas[0].name,
            ", ".join(self._sources),
            time.perf_counter() - started,
            pull.nbytes / 1e9,
        )


class _WorkerGroup:
    """The tensor-parallel workers: they load at the same time, and all need every tensor, of which they keep parts."""

    def __init__(self) -> None:
        self._group: Any = importlib.import_module("vllm.distributed.parallel_state").get_tp_group()
        self.rank: int = self._group.rank_in_group
        self.size: int = self._group.world_size
        self.device: torch.device = self._group.device if self.size > 1 else torch.device("cpu")

    def hand_on(self, memory: torch.Tensor, source: int) -> None:
        """A broadcast, over NCCL between GPUs; a worker that fails ends them all, so that nobody waits for it."""
        self._group.broadcast(memory, source)

    def agree(self, found: Sequence[str]) -> list[Catalog]:
        """The catalogs that the first worker reads: seeds may move on while the workers start."""
        read = b"\0".join(catalog.to_json() for catalog in _catalogs(found)) if self.rank == 0 else b""
        length = torch.tensor([len(read)], dtype=torch.int64, device=self.device)
        self.hand_on(length, 0)
        text = torch.empty(int(length.item()), dtype=torch.uint8, device=self.device)
        if self.rank == 0:
            text.copy_(torch.frombuffer(bytearray(read), dtype=torch.uint8))
        self.hand_on(text, 0)
        return [Catalog.from_json(line) for line in text.cpu().numpy().tobytes().split(b"\0")]


def _catalogs(found: Sequence[str]) -> list[Catalog]:
    token = os.environ.get(_TOKEN_VARIABLE)
    return [read_metas(source, token=token) for source in found]


def _load(model: torch.nn.Module, weights: Iterator[tuple[str, torch.Tensor]]) -> set[str] | None:
    """VLLM's models load themselves; they return the names of the parameters that they filled, if they keep track."""
    return cast("set[str] | None", cast("Any", model).load_weights(weights))
