"""What registering another process's memory with a GPU costs: threads, pieces, pages touched before, huge pages.

    python benchmarks/registering.py                     # an NVIDIA GPU, 20 GB of free host memory; under 40 s
    python benchmarks/registering.py --small             # small pages, as where the kernel makes no huge ones
    python benchmarks/registering.py --device cpu --gb 1 --each 0.5     # shows that it runs; registers nothing

A child process fills anonymous shared memory, as a rank of the parameter server does. This process maps it, as an
engine's worker does, anew for each row, and registers `--each` of it; the last rows take all of it, with the fastest
setting found. Columns:

- threads, MiB: pieces of so many MiB are registered by so many threads, in order
- touch: before that, each piece is touched for reading or writing by the same thread (MADV_POPULATE_READ, …_WRITE)
- extra: `read-only` registers for reading only
- touch s: of all threads together; seconds: until all is registered; free s: until nothing is registered any more
- device MB, left: memory of the GPU that is in use once it is registered, and again afterwards, above the beginning

Rows that would begin after `--seconds` are left out, and named.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import mmap
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from checkpoint_engine.device.pages import COLLAPSE, HUGE_PAGE, TOUCH_TO_READ, TOUCH_TO_WRITE, advise, map_shared

MIB, GIB = 1 << 20, 1 << 30
FILE = 8 * GIB
"""Bytes of a file in memory, as large as a segment is at most."""
TOUCH = {"read": TOUCH_TO_READ, "write": TOUCH_TO_WRITE}
PORTABLE, READ_ONLY = 1, 8
THP = Path("/sys/kernel/mm/transparent_hugepage")


@dataclass(frozen=True)
class Setting:
    """How memory is registered."""

    threads: int
    mib: int
    touch: str = ""
    extra: str = ""


SETTINGS = (
    Setting(1, 1024),
    Setting(1, 1024, "read"),
    Setting(4, 1024, "read"),
    Setting(8, 512, "read"),
    Setting(16, 256, "read"),
    Setting(4, 1024),
    Setting(16, 256),
    Setting(4, 1024, "write"),
    Setting(4, 1024, "read", "read-only"),
    Setting(1, 8192, "read"),
)

AS_WORKERS_DO = Setting(4, 4096, "read")


class Block(NamedTuple):
    """An address and bytes."""

    address: int
    nbytes: int


class Gpu:
    """The CUDA runtime that torch has loaded."""

    def __init__(self) -> None:
        torch.cuda.init()
        major = str(torch.version.cuda).partition(".")[0]
        self._library = ctypes.CDLL(f"libcudart.so.{major}")
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        self._library.cudaHostRegister.argtypes = (pointer, size, ctypes.c_uint)
        self._library.cudaHostUnregister.argtypes = (pointer,)
        self._library.cudaMemcpyAsync.argtypes = (pointer, pointer, size, ctypes.c_int, pointer)
        self._library.cudaGetErrorString.restype = ctypes.c_char_p
        self._stream = torch.cuda.Stream()
        self._target = torch.zeros(256 * MIB, dtype=torch.uint8, device="cuda")
        self._memory = torch.cuda.mem_get_info
        self._free = self._memory()[0]

    def register(self, block: Block, extra: str) -> None:
        """Registers host memory."""
        flags = PORTABLE | (READ_ONLY if extra == "read-only" else 0)
        self._check(self._library.cudaHostRegister(block.address, block.nbytes, flags))

    def unregister(self, block: Block) -> None:
        """Takes that back."""
        self._check(self._library.cudaHostUnregister(block.address))

    def copy(self, block: Block) -> None:
        """Queues copies of a block, all to one place."""
        step = self._target.nbytes
        for start in range(0, block.nbytes, step):
            nbytes = min(step, block.nbytes - start)
            source, stream = block.address + start, self._stream.cuda_stream
            self._check(self._library.cudaMemcpyAsync(self._target.data_ptr(), source, nbytes, 1, stream))

    def wait(self) -> None:
        """Until everything is copied."""
        self._stream.synchronize()

    def used(self) -> int:
        """Bytes of its memory, above the beginning."""
        return self._free - self._memory()[0]

    def _check(self, error: int) -> None:
        if error:
            self._library.cudaGetLastError()
            raise OSError(self._library.cudaGetErrorString(error).decode())


class NoGpu:
    """Stands in for one: registers nothing."""

    def register(self, block: Block, extra: str) -> None:
        """Does nothing."""

    def unregister(self, block: Block) -> None:
        """Does nothing."""

    def copy(self, block: Block) -> None:
        """Does nothing."""

    def wait(self) -> None:
        """Does nothing."""

    def used(self) -> int:
        """Nothing."""
        return 0


class Mapping:
    """Files of another process, mapped anew."""

    def __init__(self, paths: list[str], nbytes: int) -> None:
        self._mappings: list[Any] = []
        self._blocks: list[Block] = []
        for path in paths:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            size = min(nbytes, os.fstat(descriptor).st_size)
            mapping = map_shared(descriptor, size)
            os.close(descriptor)
            self._mappings.append(mapping)
            self._blocks.append(Block(ctypes.addressof(mapping), size))
            nbytes -= size
            if not nbytes:
                break

    def pieces(self, mib: int) -> list[Block]:
        """All of it, in blocks of so many MiB."""
        step = mib * MIB
        return [
            Block(address + start, min(step, nbytes - start))
            for address, nbytes in self._blocks
            for start in range(0, nbytes, step)
        ]

    def close(self) -> None:
        """Unmaps them."""
        self._mappings.clear()


class Registration:
    """Registers pieces in background threads, in order."""

    def __init__(self, device: Gpu | NoGpu, pieces: list[Block], setting: Setting) -> None:
        self._device, self._pieces, self._setting = device, pieces, setting
        self.touching = 0.0
        self._pool = ThreadPoolExecutor(setting.threads)
        self._futures = [self._pool.submit(self._register, piece) for piece in pieces]

    def wait(self, number: int) -> None:
        """Until a piece is registered."""
        self._futures[number].result()

    def wait_all(self) -> None:
        """Until all are."""
        for future in self._futures:
            future.result()

    @property
    def running(self) -> bool:
        """Whether a piece is not registered yet."""
        return not all(future.done() for future in self._futures)

    def undo(self) -> None:
        """Registers no more, and unregisters what was."""
        for future in self._futures:
            future.cancel()
        self._pool.shutdown()
        done = [
            piece
            for piece, future in zip(self._pieces, self._futures, strict=True)
            if not future.cancelled() and future.exception() is None
        ]
        with ThreadPoolExecutor(self._setting.threads) as pool:
            list(pool.map(self._device.unregister, done))

    def _register(self, piece: Block) -> None:
        began = time.perf_counter()
        if self._setting.touch and (code := advise(*piece, TOUCH[self._setting.touch])):
            raise OSError(code, os.strerror(code))
        self.touching += time.perf_counter() - began
        self._device.register(piece, self._setting.extra)


def fill(total: int, small: bool, parent: Connection, other_end: Connection) -> None:  # noqa: FBT001 - what a process is started with
    """The child: makes memory, says where it is, and keeps it until it is told that it may go, or the parent dies."""
    other_end.close()
    began = time.perf_counter()
    descriptors: list[int] = []
    mappings: list[Any] = []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for start in range(0, total, FILE):
            size = min(FILE, total - start)
            descriptors.append(os.memfd_create("registering"))
            os.ftruncate(descriptors[-1], size)
            mappings.append(map_shared(descriptors[-1], size))
            address = ctypes.addressof(mappings[-1])
            chunks = [Block(address + at, min(64 * MIB, size - at)) for at in range(0, size, 64 * MIB)]
            if any(pool.map(touch if small else make_huge, chunks)):
                raise SystemExit("the kernel hands over no more memory")
    seconds = time.perf_counter() - began
    parent.send((seconds, [f"/proc/{os.getpid()}/fd/{descriptor}" for descriptor in descriptors], huge_bytes()))
    with contextlib.suppress(EOFError):
        parent.recv()


def touch(block: Block) -> int:
    """Has the kernel hand pages over; 0 unless it refuses."""
    return advise(*block, TOUCH_TO_WRITE)


def make_huge(block: Block) -> int:
    """The same, in huge pages where it has them."""
    for place in range(block.address, block.address + block.nbytes, HUGE_PAGE):
        advise(place, mmap.PAGESIZE, TOUCH_TO_WRITE)
    advise(*block, COLLAPSE)
    return touch(block)


def huge_bytes() -> int:
    """Shared memory that this process has mapped in huge pages."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("ShmemPmdMapped"))


def measure(device: Gpu | NoGpu, paths: list[str], nbytes: int, setting: Setting) -> dict[str, Any]:
    """One row."""
    mapping = Mapping(paths, nbytes)
    began = time.perf_counter()
    registration = Registration(device, mapping.pieces(setting.mib), setting)
    row: dict[str, Any] = {**asdict(setting), "bytes": nbytes}
    try:
        registration.wait_all()
        row["seconds"] = time.perf_counter() - began
        row["touch_seconds"] = registration.touching
        row["device_bytes"] = device.used()
    except OSError as error:
        row["error"] = str(error)
    began = time.perf_counter()
    registration.undo()
    row["free_seconds"] = time.perf_counter() - began
    row["device_bytes_left"] = device.used()
    mapping.close()
    return row


def follow(device: Gpu | NoGpu, paths: list[str], nbytes: int, setting: Setting) -> str:
    """Copies each piece as soon as it is registered."""
    mapping = Mapping(paths, nbytes)
    pieces = mapping.pieces(setting.mib)
    began = time.perf_counter()
    registration = Registration(device, pieces, setting)
    first, longest = 0.0, 0.0
    for number, piece in enumerate(pieces):
        registration.wait(number)
        asked = time.perf_counter()
        first = first or asked - began
        device.copy(piece)
        longest = max(longest, time.perf_counter() - asked)
    device.wait()
    seconds = time.perf_counter() - began
    again = time.perf_counter()
    for piece in pieces:
        device.copy(piece)
    device.wait()
    again = time.perf_counter() - again
    registration.undo()
    mapping.close()
    return (
        f"copied as it is registered: {nbytes / 1e9:.1f} GB in {seconds:.2f} s, the first piece after {first:.2f} s, "
        f"the longest call {longest * 1e3:.1f} ms; copied again: {again:.2f} s"
    )


def disturb(device: Gpu | NoGpu, paths: list[str], nbytes: int, setting: Setting) -> str:
    """How long a small copy, and Python itself, have to wait while registering goes on."""
    mapping = Mapping(paths, nbytes)
    pieces = mapping.pieces(setting.mib)
    own = Block(pieces[0].address, MIB)
    device.register(own, "")
    rest = pieces[1:]
    pauses: list[float] = []
    python = [0.0]
    registration = Registration(device, rest, setting)

    def tick() -> None:
        while registration.running:
            began = time.perf_counter()
            time.sleep(0)
            python[0] = max(python[0], time.perf_counter() - began)

    ticking = threading.Thread(target=tick)
    ticking.start()
    while registration.running:
        began = time.perf_counter()
        device.copy(own)
        device.wait()
        pauses.append(time.perf_counter() - began)
    ticking.join()
    registration.undo()
    device.unregister(own)
    mapping.close()
    pauses = sorted(pauses) or [0.0]
    return (
        f"a copy of 1 MiB meanwhile: median {pauses[len(pauses) // 2] * 1e3:.2f} ms, "
        f"longest {pauses[-1] * 1e3:.1f} ms; Python paused for {python[0] * 1e3:.1f} ms at most"
    )


def unregistered(device: Gpu | NoGpu, paths: list[str], nbytes: int) -> str:
    """Copies what is not registered."""
    mapping = Mapping(paths, nbytes)
    rates: list[str] = []
    for _ in range(2):
        began = time.perf_counter()
        for piece in mapping.pieces(256):
            device.copy(piece)
        device.wait()
        rates.append(f"{nbytes / 1e9 / (time.perf_counter() - began):.1f}")
    mapping.close()
    return f"copied without being registered: {rates[0]} GB/s, again {rates[1]} GB/s"


def show(row: dict[str, Any]) -> None:
    """Prints a row."""
    head = f"{row['threads']:>7} {row['mib']:>6} {row['touch'] or '-':>6} {row['extra'] or '-':>10}"
    if "error" in row:
        print(f"{head}   {row['error']}", flush=True)
        return
    print(
        f"{head} {row['bytes'] / 1e9:>6.1f} {row['touch_seconds']:>8.2f} {row['seconds']:>8.2f} "
        f"{row['bytes'] / 1e9 / row['seconds']:>7.1f} {row['free_seconds']:>7.2f} {row['device_bytes'] / 1e6:>10.1f} "
        f"{row['device_bytes_left'] / 1e6:>6.1f}",
        flush=True,
    )


def chosen(rows: list[dict[str, Any]]) -> Setting:
    """The fastest that works as it is everywhere."""
    fit = [row for row in rows if "error" not in row and row["extra"] != "read-only"]
    best = min(fit, key=lambda row: row["seconds"])
    return Setting(best["threads"], best["mib"], best["touch"], best["extra"])


def within(settings: tuple[Setting, ...], deadline: float) -> Iterator[Setting]:
    """Those for which there is time."""
    for number, setting in enumerate(settings):
        if time.perf_counter() > deadline:
            print(f"no time left for {', '.join(map(str, settings[number:]))}")
            return
        yield setting


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--gb", type=float, default=20, help="GiB of shared memory")
    parser.add_argument("--each", type=float, default=4, help="GiB that a row registers")
    parser.add_argument("--seconds", type=float, default=34, help="no row begins later")
    parser.add_argument("--small", action="store_true", help="fill small pages")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    deadline = time.perf_counter() + arguments.seconds
    total, each = int(arguments.gb * GIB) // MIB * MIB, int(arguments.each * GIB) // MIB * MIB
    processes = multiprocessing.get_context("fork")  # before there is a GPU in this process
    parent, theirs = processes.Pipe()
    child = processes.Process(target=fill, args=(total, arguments.small, theirs, parent), daemon=True)
    child.start()
    theirs.close()
    device: Gpu | NoGpu = Gpu() if arguments.device == "cuda" else NoGpu()
    try:
        seconds, paths, huge = parent.recv()
        print(f"{total / 1e9:.1f} GB filled by another process within {seconds:.1f} s", end="; ")
        print(f"{huge / 1e9:.1f} GB of it in huge pages", end="; ")
        print(", ".join(f"{name}: {(THP / name).read_text().strip()}" for name in ("enabled", "shmem_enabled")))
        names = ("threads", "MiB", "touch", "extra", "GB", "touch s", "seconds", "GB/s", "free s", "device MB", "left")
        print(" ".join(f"{name:>{w}}" for name, w in zip(names, (7, 6, 6, 10, 6, 8, 8, 7, 7, 10, 6), strict=True)))
        rows: list[dict[str, Any]] = []
        for setting in within(SETTINGS, deadline - 12):
            rows.append(measure(device, paths, each, setting))
            show(rows[-1])
        best = chosen(rows)
        print("all of it:")
        for setting in within((best, AS_WORKERS_DO, Setting(1, 8192)), deadline):
            rows.append(measure(device, paths, total, setting))
            show(rows[-1])
        for setting in within((AS_WORKERS_DO, replace(AS_WORKERS_DO, threads=1), Setting(1, 512, "read")), deadline):
            for act in (follow, disturb):
                print(f"{setting.threads} threads, {setting.mib} MiB: {act(device, paths, total, setting)}", flush=True)
        if time.perf_counter() < deadline:
            print(unregistered(device, paths, min(each, 2 * GIB)))
    finally:
        parent.send(None)
        child.join(30)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
