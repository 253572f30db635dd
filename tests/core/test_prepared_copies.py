"""Byte runs carried out: in the host's memory, by a driver made of memmove, and (where there is one) on a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from checkpoint_engine.device import prepare_copies
from checkpoint_engine.device.copy_calls import MOST_COPIES, CopyCalls
from checkpoint_engine.device.cuda_copies import FEW_COPIES
from checkpoint_engine.device.kernel_copies import KernelCopies
from checkpoint_engine.errors import CheckpointEngineError
from checkpoint_engine.planning.byte_runs import ByteRuns, CopyLayout, PlannedCopy, plan_byte_runs

pytestmark = pytest.mark.pure

CPU = torch.device("cpu")
SIZE = ctypes.c_size_t
POINTER = ctypes.c_void_p
WORDS = ctypes.create_string_buffer(b"out of luck")


def some_runs() -> ByteRuns:
    """A whole tensor, one half of the columns of another, and one element: 16-bit, from a block of 4096 bytes."""
    return plan_byte_runs(
        [
            PlannedCopy(0, 256, 0, 64, CopyLayout((4, 16), (16, 1), (16, 1), 2)),
            PlannedCopy(0, 1024 + 16, 1, 0, CopyLayout((32, 8), (16, 1), (8, 1), 2)),
            PlannedCopy(0, 4094, 0, 0, CopyLayout((), (), (), 2)),
        ]
    )


def expected(source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    flat, columns = torch.zeros(512, dtype=torch.int16), torch.zeros(32, 8, dtype=torch.int16)
    words = source.view(torch.int16)
    flat[32:96] = words[128:192]
    flat[0] = words[2047]
    columns.copy_(words[512:1024].view(32, 16)[:, 8:])
    return flat, columns


def noise(seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (4096,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("stay", [True, False])
def test_copies_in_host_memory_can_be_done_again(*, stay: bool) -> None:
    source = noise(1)
    copies = prepare_copies(some_runs(), CPU, source_stays=stay, targets_stay=stay)
    targets = [torch.zeros(512, dtype=torch.int16), torch.zeros(32, 8, dtype=torch.int16)]
    for seed in (2, 3):
        source.copy_(noise(seed))
        copies.start([source], targets)
        assert all(torch.equal(*pair) for pair in zip(targets, expected(source), strict=True))


def test_another_block_is_another_source() -> None:
    copies = prepare_copies(some_runs(), CPU, source_stays=False, targets_stay=True)
    targets = [torch.zeros(512, dtype=torch.int16), torch.zeros(32, 8, dtype=torch.int16)]
    for seed in (2, 3):
        source = torch.cat([torch.zeros(256 * seed, dtype=torch.uint8), noise(seed)])[256 * seed :]
        copies.start([source], targets)
        assert all(torch.equal(*pair) for pair in zip(targets, expected(noise(seed)), strict=True))


def test_targets_that_have_moved_are_found() -> None:
    source = noise(1)
    copies = prepare_copies(some_runs(), CPU, source_stays=True, targets_stay=True)
    for _ in range(2):
        # Parts of larger tensors: places count from the part's own first element.
        whole = torch.zeros(600, dtype=torch.int16), torch.zeros(40, 8, dtype=torch.int16)
        targets = [whole[0][60:572], whole[1][3:35]]
        copies.start([source], targets)
        assert all(torch.equal(*pair) for pair in zip(targets, expected(source), strict=True))
        assert not whole[0][:60].any()
        assert not whole[1][35:].any()


# -- the calls of the CUDA runtime, answered by memmove --------------------------------------------------------------


@dataclass
class MemmoveDriver:
    """Stands for the runtime where there is none; `library` has its functions, in C's calling convention."""

    major: int
    batch_error: int = 0
    copy_error: int = 0
    with_batches: bool = True
    calls: list[str] = field(default_factory=list)

    @property
    def library(self) -> Any:
        def plain(target: int, source: int, nbytes: int, kind: int, stream: int) -> int:
            assert (kind, stream) == (4, 77)
            self.calls.append("plain")
            ctypes.memmove(target, source, nbytes)
            return self.copy_error

        def rows(target: int, to: int, source: int, of: int, width: int, height: int, kind: int, stream: int) -> int:
            assert (kind, stream) == (4, 77)
            self.calls.append("rows")
            for row in range(height):
                ctypes.memmove(target + row * to, source + row * of, width)
            return self.copy_error

        def batch(
            targets: int, sources: int, sizes: int, count: int, how: int, first: int, hows: int, *rest: int
        ) -> int:
            assert hows == 1
            assert SIZE.from_address(first).value == 0
            assert list((ctypes.c_int * 6).from_address(how)) == [1, 0, 0, 0, 0, 0]
            assert rest[-1] == 77
            self.calls.append(f"batch of {count}")
            if not self.batch_error:
                arrays = ((SIZE * count).from_address(at) for at in (targets, sources, sizes))
                for target, source, nbytes in zip(*arrays, strict=True):
                    ctypes.memmove(target, source, nbytes)
            return self.batch_error

        fail_index = () if self.major >= 13 else (POINTER,)
        batched = (POINTER, POINTER, POINTER, SIZE, POINTER, POINTER, SIZE, *fail_index, POINTER)
        functions = {
            "cudaMemcpyAsync": c_function(plain, POINTER, POINTER, SIZE, ctypes.c_int, POINTER),
            "cudaMemcpy2DAsync": c_function(rows, POINTER, SIZE, POINTER, SIZE, SIZE, SIZE, ctypes.c_int, POINTER),
            "cudaGetLastError": c_function(lambda: self.calls.append("cleared") or 0),
            "cudaGetErrorString": ctypes.CFUNCTYPE(POINTER, ctypes.c_int)(lambda _: ctypes.addressof(WORDS)),
        }
        if self.with_batches:
            functions["cudaMemcpyBatchAsync"] = c_function(batch, *batched)
        return SimpleNamespace(**functions)


def c_function(function: Callable[..., int], *types: Any) -> Any:
    return ctypes.CFUNCTYPE(ctypes.c_int, *types)(function)


def copied_by(calls: CopyCalls, count: int) -> bool:
    source, target = torch.arange(count, dtype=torch.int64), torch.zeros(count, dtype=torch.int64)
    target_regions = torch.arange(count, dtype=torch.int64) * 8
    calls.copy(
        target.data_ptr() + target_regions, source.data_ptr() + target_regions, torch.full_like(target_regions, 8), 77
    )
    return torch.equal(source, target)


@pytest.mark.parametrize("major", [12, 13])
def test_one_call_for_thousands_of_copies(major: int) -> None:
    driver = MemmoveDriver(major)
    assert copied_by(CopyCalls(driver.library, major), 2 * MOST_COPIES)
    assert driver.calls == [f"batch of {MOST_COPIES}"] * 2


def test_a_driver_that_lacks_batches_gets_one_copy_after_the_other() -> None:
    driver = MemmoveDriver(13, batch_error=801)
    calls = CopyCalls(driver.library, 13)
    assert copied_by(calls, 3)
    assert copied_by(calls, 1)
    assert driver.calls == ["batch of 3", "cleared", "plain", "plain", "plain", "plain"], "it is asked once"
    old = MemmoveDriver(12, with_batches=False)
    assert copied_by(CopyCalls(old.library, 12), 2)
    assert old.calls == ["plain", "plain"]


def test_an_error_is_told_in_words_and_cleared() -> None:
    driver = MemmoveDriver(13, batch_error=1, copy_error=1)
    with pytest.raises(CheckpointEngineError, match="copying 8 bytes: error 1: out of luck"):
        copied_by(CopyCalls(driver.library, 13), 1)
    assert driver.calls[-1] == "cleared"


def test_rows() -> None:
    driver = MemmoveDriver(13)
    source, target = torch.arange(24, dtype=torch.uint8), torch.zeros(12, dtype=torch.uint8)
    targets, sources = torch.tensor([[target.data_ptr()], [3]]), torch.tensor([[source.data_ptr() + 1], [6]])
    shapes = torch.tensor([[3], [4]])
    CopyCalls(driver.library, 13).copy_rows(tuple(targets), tuple(sources), tuple(shapes), 77)
    assert target.view(4, 3).tolist() == source.view(4, 6)[:, 1:4].tolist()


ALIGNMENTS = {"words": (256, 64, 512), "odd": (3, 5, 7), "halves": (2, 4, 6), "a word and a bit": (8, 16, 25)}


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_kernels_copy_every_byte_wherever_it_lies(alignment: str) -> None:
    """Torch's kernels for many tensors; on the CPU it does the same one by one."""
    begin, offset, width = ALIGNMENTS[alignment]
    planned = [PlannedCopy(0, begin + 600 * row, row, offset, CopyLayout((width,), (1,), (1,), 1)) for row in range(3)]
    runs = plan_byte_runs(planned).runs
    copies = KernelCopies(runs)
    block, targets = noise(5)[16:], [torch.zeros(1024, dtype=torch.uint8) for _ in range(3)]
    for seed in (6, 7):
        block.copy_(noise(seed)[16:])
        copies.start([block], targets)
        for row, target in enumerate(targets):
            wanted = torch.zeros(1024, dtype=torch.uint8)
            wanted[offset : offset + width] = block[begin + 600 * row :][:width]
            assert torch.equal(target, wanted)


def test_kernels_follow_memory_that_moved_after_all() -> None:
    runs = plan_byte_runs([PlannedCopy(0, 0, 0, 0, CopyLayout((64,), (1,), (1,), 1))]).runs
    copies = KernelCopies(runs)
    for seed in (1, 2):
        source, target = noise(seed), torch.zeros(64, dtype=torch.uint8)
        copies.start([source], [target])
        assert torch.equal(target, source[:64])


PLACES = {"pinned": torch.Tensor.pin_memory, "pageable": torch.Tensor.clone, "device": torch.Tensor.cuda}


@pytest.mark.gpu
@pytest.mark.parametrize("memory", PLACES)
@pytest.mark.parametrize("count", [FEW_COPIES, FEW_COPIES + 1, 2 * MOST_COPIES])
@pytest.mark.parametrize("stays", [False, True])
def test_every_second_element_to_a_gpu(memory: str, count: int, *, stays: bool) -> None:
    """One by one, in a batch, and in several."""
    gpu = torch.device("cuda", torch.cuda.current_device())
    runs = plan_byte_runs(PlannedCopy(0, 4 * item, 0, 2 * item, CopyLayout((), (), (), 2)) for item in range(count))
    source = PLACES[memory](torch.arange(2 * count, dtype=torch.int16))
    target = torch.zeros(count, dtype=torch.int16, device=gpu)
    prepare_copies(runs, gpu, source_stays=stays, targets_stay=True).start([source.view(torch.uint8)], [target])
    assert torch.equal(target.cpu(), source.cpu()[::2])


@pytest.mark.gpu
@pytest.mark.parametrize("memory", PLACES)
@pytest.mark.parametrize("stays", [False, True])
def test_runs_and_rows_to_a_gpu(memory: str, *, stays: bool) -> None:
    gpu = torch.device("cuda", torch.cuda.current_device())
    source = PLACES[memory](noise(1))
    copies = prepare_copies(some_runs(), gpu, source_stays=stays, targets_stay=True)
    targets = [
        torch.zeros(512, dtype=torch.int16, device=gpu),
        torch.zeros(32, 8, dtype=torch.int16, device=gpu),
    ]
    for seed in (2, 3):
        source.copy_(noise(seed))
        copies.start([source], targets)
        arrived = [target.cpu() for target in targets]
        assert all(torch.equal(*pair) for pair in zip(arrived, expected(source.cpu()), strict=True))
