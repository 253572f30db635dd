"""What registering another process's memory with a GPU costs: threads, pieces, pages touched before, huge pages.

    python benchmarks/registering.py                     # an NVIDIA GPU, 30 GB of free host memory; under 40 s
    python benchmarks/registering.py --huge              # as root, a second run: are huge pages better?
    python benchmarks/registering.py --device cpu --gb 1 --each 0.5     # shows that it runs; registers nothing

A child process fills anonymous shared memory, as a rank of the parameter server does. This process maps it, as an
engine's worker does, anew for each row, and registers `--each` of it; the last rows take all of it, with the fastest
setting found. It needs PyTorch only. Columns:

- threads, MiB: pieces of so many MiB are registered by so many threads, in order
- touch: before that, each piece is touched for reading or writing by the same thread (MADV_POPULATE_READ, …_WRITE)
- extra: `huge` asks for huge pages on the mapping (MADV_HUGEPAGE), `read-only` registers for reading only
- touch s: of all threads together; seconds: until all is registered; free s: until nothing is registered any more
- device MB, left: memory of the GPU that is in use once it is registered, and again afterwards, above the beginning

`--huge` lets the kernel give huge pages to shared memory that asks for them, and takes that back in the end. Rows that
would begin after `--seconds` are left out, and named.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

MIB, GIB = 1 << 20, 1 << 30
FILE = 8 * GIB
"""Bytes of a file in memory, as large as a segment is at most."""
TOUCH = {"read": 22, "write": 23}
PORTABLE, READ_ONLY = 1, 8
THP = Path("/sys/kernel/mm/transparent_hugepage")

libc = ctypes.CDLL(None, use_errno=True)
libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


@dataclass(frozen=True)
class Setting:
    """How memory is registered."""

    threads: int
    mib: int
    touch: str = ""
    extra: str = ""


SETTINGS = (
    Setting(1, 8192),  # what was done until now: segment by segment
    Setting(1, 1024),
    Setting(4, 1024),
    Setting(8, 512),
    Setting(16, 256),
    Setting(1, 1024, "read"),
    Setting(4, 1024, "read"),
    Setting(4, 512, "read"),
    Setting(8, 512, "read"),
    Setting(16, 256, "read"),
    Setting(1, 1024, "write"),
    Setting(8, 512, "write"),
    Setting(8, 512, "read", "huge"),
    Setting(8, 512, "", "read-only"),
)


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
        self._free = torch.cuda.mem_get_info()[0]

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
        return self._free - torch.cuda.mem_get_info()[0]

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

    def __init__(self, paths: list[str], nbytes: int, extra: str = "") -> None:
        self._mappings: list[mmap.mmap] = []
        self._blocks: list[Block] = []
        for path in paths:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            size = min(nbytes, os.fstat(descriptor).st_size)
            mapping = mmap.mmap(descriptor, size)
            os.close(descriptor)
            block = Block(address_of(mapping), size)
            if extra == "huge":
                libc.madvise(*block, mmap.MADV_HUGEPAGE)
            self._mappings.append(mapping)
            self._blocks.append(block)
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
        for mapping in self._mappings:
            mapping.close()


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
        if self._setting.touch and touch(piece, self._setting.touch):
            raise OSError(os.strerror(ctypes.get_errno()))
        self.touching += time.perf_counter() - began
        self._device.register(piece, self._setting.extra)


def address_of(mapping: mmap.mmap) -> int:
    """Where it begins."""
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


def fill(total: int) -> None:
    """The child: makes memory, says where it is, and keeps it until its input ends."""
    began = time.perf_counter()
    descriptors: list[int] = []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for start in range(0, total, FILE):
            size = min(FILE, total - start)
            descriptor = os.memfd_create("registering")
            os.ftruncate(descriptor, size)
            mapping = mmap.mmap(descriptor, size)
            address = address_of(mapping)
            libc.madvise(address, size, mmap.MADV_HUGEPAGE)
            chunks = [Block(address + at, min(64 * MIB, size - at)) for at in range(0, size, 64 * MIB)]
            if any(pool.map(touch, chunks)):
                raise SystemExit("the kernel hands over no more memory")
            descriptors.append(descriptor)
    seconds = time.perf_counter() - began
    print(json.dumps([seconds, [f"/proc/{os.getpid()}/fd/{fd}" for fd in descriptors], huge_bytes()]), flush=True)
    sys.stdin.read()


def huge_bytes() -> int:
    """Shared memory that this process has mapped in huge pages."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("ShmemPmdMapped"))


def touch(block: Block, how: str = "write") -> int:
    """Has the kernel hand pages over; 0 unless it refuses."""
    return int(libc.madvise(*block, TOUCH[how]))


def measure(device: Gpu | NoGpu, paths: list[str], nbytes: int, setting: Setting) -> dict[str, Any]:
    """One row."""
    mapping = Mapping(paths, nbytes, setting.extra)
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
    mapping = Mapping(paths, nbytes, setting.extra)
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
    mapping = Mapping(paths, nbytes, setting.extra)
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
    parser.add_argument("--gb", type=float, default=30, help="GiB of shared memory")
    parser.add_argument("--each", type=float, default=4, help="GiB that a row registers")
    parser.add_argument("--seconds", type=float, default=34, help="no row begins later")
    parser.add_argument("--huge", action="store_true", help="let shared memory have huge pages meanwhile")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--fill", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.fill:
        fill(arguments.fill)
        return
    before = (THP / "shmem_enabled").read_text().partition("[")[2].partition("]")[0]
    if arguments.huge:
        (THP / "shmem_enabled").write_text("advise")
    try:
        run(arguments)
    finally:
        if arguments.huge:
            (THP / "shmem_enabled").write_text(before)


def run(arguments: argparse.Namespace) -> None:
    """Measures all rows."""
    deadline = time.perf_counter() + arguments.seconds
    total, each = int(arguments.gb * GIB) // MIB * MIB, int(arguments.each * GIB) // MIB * MIB
    child = subprocess.Popen(
        [sys.executable, __file__, "--fill", str(total)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout
    assert child.stdin
    device: Gpu | NoGpu = Gpu() if arguments.device == "cuda" else NoGpu()
    try:
        seconds, paths, huge = json.loads(child.stdout.readline())
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
        for setting in within((best, replace(best, mib=1024), Setting(1, 8192)), deadline):
            rows.append(measure(device, paths, total, setting))
            show(rows[-1])
        for act in (follow, disturb):
            if time.perf_counter() < deadline:
                print(f"{best}: {act(device, paths, total, best)}", flush=True)
        if time.perf_counter() < deadline:
            print(unregistered(device, paths, min(each, 2 * GIB)))
    finally:
        child.stdin.close()
        child.wait(30)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
