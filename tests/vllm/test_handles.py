"""Pickled handles of tensors are read, and nothing else that a pickle can do is done."""

from __future__ import annotations

import base64
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_engine_vllm.transfer.handles import read_handle, read_pickled

GPU = "GPU-1"


def handle(**change: Any) -> tuple[Any, ...]:
    """As torch's `reduce_tensor` makes one of a tensor on a GPU."""
    tensor = torch.empty((4, 6), dtype=torch.bfloat16)
    fields: dict[str, Any] = {
        "kind": torch.nn.Parameter,
        "shape": tensor.size(),
        "stride": tensor.stride(),
        "offset": 0,
        "storage_kind": torch.storage.TypedStorage,
        "dtype": tensor.dtype,
        "device": 0,
        "storage": b"a handle of the driver",
        "storage_bytes": 48,
        "storage_offset": 512,
        "gradient": False,
        "counter": b"/torch_123",
        "counter_offset": 2,
        "event": b"event",
        "awaited": True,
    }
    return tuple((fields | change).values())


def pickled(content: Any, protocol: int | None = None) -> str:
    return base64.b64encode(pickle.dumps(content, protocol=protocol)).decode()


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_handles_come_through_as_they_are(protocol: int) -> None:
    found: Any = read_pickled(pickled([{GPU: handle()}, {GPU: handle(offset=3)}], protocol))
    assert [read_handle(each, GPU).offset for each in found] == [0, 3]
    read = read_handle(found[0], GPU)
    assert (read.shape, read.stride, read.dtype) == ((4, 6), (6, 1), "bfloat16")
    assert (read.storage, read.storage_bytes, read.storage_offset) == (b"a handle of the driver", 48, 512)
    assert (read.counter, read.counter_offset, read.event, read.event_must_be_awaited) == (
        *(b"/torch_123", 2),
        *(b"event", True),
    )
    assert read_handle({GPU: handle()}, GPU) == read, "as they come where nothing is pickled"


class Runs:
    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


@pytest.mark.parametrize(
    "evil",
    [
        Runs(os.system, "touch {}"),
        Runs(eval, "open({!r}, 'w')"),
        Runs(open, "{}", "w"),
        Runs(torch.load, "{}"),
        Runs(torch.hub.load, "{}"),
        {GPU: Runs(torch.Tensor, 4)},
        Runs(getattr, Runs(__import__, "os"), "getcwd"),
    ],
    ids=["system", "eval", "open", "torch.load", "torch.hub.load", "a tensor", "import"],
)
def test_a_pickle_that_would_run_something_is_refused(evil: Any, tmp_path: Path) -> None:
    made = tmp_path / "made"
    if isinstance(evil, Runs):
        evil.call = tuple(part.format(str(made)) if isinstance(part, str) else part for part in evil.call)
    with pytest.raises(ValueError, match="no pickle of handles"):
        read_pickled(pickled(evil))
    assert not made.exists()


@pytest.mark.parametrize("text", ["", "no base64!", base64.b64encode(b"no pickle").decode(), pickled([1])[:-4]])
def test_what_is_no_pickle_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no pickle of handles"):
        read_pickled(text)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"GPU-2": handle()}, "no handle for GPU GPU-1, the trainer sends those of GPU-2"),
        ("nonsense", "no handle for GPU GPU-1"),
        ({GPU: handle()[:-1]}, "15 fields"),
        ({GPU: handle(shape="many")}, "for a shape"),
        ({GPU: handle(offset=-1)}, "for a number"),
        ({GPU: handle(storage="text")}, "for bytes"),
        ({GPU: handle(counter=b"/psm_of_somebody_else")}, "none of torch's"),
    ],
)
def test_what_is_no_handle_is_refused(found: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_handle(found, GPU)
