"""Updates of a running SGLang, sent from the process of the tests."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import load_file

from checkpoint_engine.server.parameter_server import ParameterServer
from checkpoint_engine_sglang import SGLangClient
from tests.ports import free_port
from tests.sglang.sglang_server import Server

Tensors = dict[str, torch.Tensor]


def read(directory: Path) -> Tensors:
    """All tensors of a checkpoint."""
    tensors: Tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def broken(tensors: Tensors, fault: str) -> Tensors:
    """Tensors with something wrong about them."""
    changed = dict(tensors)
    if fault == "missing":
        del changed["model.layers.1.mlp.up_proj.weight"]
    elif fault == "unknown":
        changed["nonsense.weight"] = torch.ones(3)
    elif fault == "too long":
        changed["model.layers.0.mlp.down_proj.weight"] = torch.zeros(200, 256, dtype=torch.bfloat16)
    elif fault == "too short":
        changed["model.layers.0.mlp.down_proj.weight"] = torch.zeros(100, 256, dtype=torch.bfloat16)
    return changed


Ask = Callable[[dict[str, str]], None]


def push(
    server: Server,
    tensors: Mapping[str, torch.Tensor],
    version: str = "x",
    *,
    ask: Ask | None = None,
    timeout: float = 60.0,
    reload: str = "auto",
    only: Sequence[str] = (),
    method: str = "broadcast",
    **how: Any,
) -> None:
    """Updates a server from this process: ranks are threads. Raises what the first rank that fails raises.

    `ask` takes the handles by device, in place of our client. Faults of a loader need `reload="loader"`.
    """

    def ask_client(handles: dict[str, str]) -> None:
        options = {"pause": "keep", "reset_caches": True, "timeout": timeout, **how}
        SGLangClient(server.endpoint).update_weights(handles, version=version, **options)

    asking = ask or ask_client
    answered = threading.Event()
    port, names = free_port(), sorted(tensors)

    def run(rank: int) -> None:
        with ParameterServer(
            rank=rank, world_size=server.workers, master_addr="127.0.0.1", master_port=port, device="cpu"
        ) as sender:
            share = {name: tensors[name] for name in names[rank :: server.workers]}
            sender.register_checkpoint("pushed", named_tensors=share)
            sender.gather_metas("pushed")

            def request(handles: list[tuple[str, str]]) -> None:
                if rank == 0:
                    try:
                        asking(dict(handles))
                    finally:
                        answered.set()

            patience = timedelta(seconds=timeout)
            sender.update("pushed", request, version=version, timeout=patience, reload=reload, only=only, method=method)

    with ThreadPoolExecutor(server.workers) as pool:
        ranks = [pool.submit(run, rank) for rank in range(server.workers)]
    # An update that fails does not wait for the engine's answer; tests do.
    answered.wait(30)
    for rank in ranks:
        rank.result()


@dataclass
class InTreeAnswer:
    """What SGLang answered to a request of its own kind."""

    status: int = 0
    message: str = ""


def in_tree(server: Server, answer: InTreeAnswer, **body: Any) -> Ask:
    """Asks by the request that SGLang's own script sends; `body` changes it."""

    def ask(handles: dict[str, str]) -> None:
        content = {"zmq_handles": handles, "flush_cache": True, "weight_version": None, **body}
        reply = httpx.post(f"{server.endpoint}/update_weights_from_ipc", json=content, timeout=60)
        answer.status, answer.message = reply.status_code, reply.json()["message"]
        reply.raise_for_status()

    return ask
