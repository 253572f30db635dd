from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from checkpoint_engine.device.host_memory import map_host_memory
from checkpoint_engine.device.memory import HostMemory
from checkpoint_engine.device.pages import COLLAPSE, HUGE, HUGE_PAGE, advise
from checkpoint_engine.errors import CheckpointFormatError, HostMemoryError
from checkpoint_engine.host.memory import FreeMemory, free_host_memory, require_host_memory
from checkpoint_engine.source.segment import LARGEST_SEGMENT, Segment

pytestmark = pytest.mark.pure

MIB = 1 << 20


def mapped_bytes(what: str) -> int:
    """Bytes of this process's mappings of files whose name holds `what`."""
    total = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if what in line:
            start, end = line.split()[0].split("-")
            total += int(end, 16) - int(start, 16)
    return total


def test_it_is_zeroed_shared_memory_of_the_size_asked_for() -> None:
    segment = Segment.create(MIB + 3)
    assert (segment.nbytes, segment.tensor.numel(), segment.tensor.dtype) == (MIB + 3, MIB + 3, torch.uint8)
    assert not segment.tensor.any()
    assert segment.address == segment.tensor.data_ptr()
    segment.tensor[-1] = 7
    assert os.pread(segment.fd, 1, MIB + 2) == b"\x07"
    segment.close()


def test_no_bytes_are_a_segment_too() -> None:
    segment = Segment.create(0)
    assert (segment.nbytes, segment.tensor.numel(), segment.address) == (0, 0, 0)
    assert len(segment.buffer(0, 0)) == 0
    segment.touch(0, 0)
    segment.close()


def test_views_outlive_closing_and_then_the_memory_goes() -> None:
    gc.collect()
    before = mapped_bytes("checkpoint-engine-segment")
    segment = Segment.create(MIB)
    view = segment.tensor[:10]
    view.fill_(5)
    segment.close()
    segment.close()
    assert view.tolist() == [5] * 10
    assert mapped_bytes("checkpoint-engine-segment") == before + MIB
    del view
    gc.collect()
    assert mapped_bytes("checkpoint-engine-segment") == before


def test_discarding_gives_the_memory_back_under_a_view() -> None:
    segment = Segment.create(MIB)
    view = segment.tensor.fill_(1)[:]
    descriptor = os.dup(segment.fd)
    assert os.fstat(descriptor).st_blocks > 0
    segment.discard()
    assert os.fstat(descriptor).st_blocks == 0
    os.close(descriptor)
    assert not view.any()


def test_discarding_a_mapped_file_leaves_the_file(tmp_path: Path) -> None:
    path = Path("/dev/shm") / f"checkpoint-engine-test-{os.getpid()}"
    for file in (tmp_path / "file", path):
        file.write_bytes(b"precious" * 1024)
        Segment.map_file(file).discard()
        assert file.read_bytes() == b"precious" * 1024
        file.unlink()


@pytest.mark.thorough
def test_another_process_sees_the_same_memory() -> None:
    segment = Segment.create(4096)
    write = f"import os; os.pwrite({segment.fd}, b'hello', 100)"
    subprocess.run([sys.executable, "-c", write], pass_fds=[segment.fd], check=True, timeout=30)
    assert bytes(segment.tensor[100:105].tolist()) == b"hello"
    segment.close()


def test_nobody_can_shrink_it() -> None:
    segment = Segment.create(4096)
    with pytest.raises(PermissionError):
        os.ftruncate(segment.fd, 0)
    segment.close()


def test_it_can_be_made_in_inference_mode_and_written_outside() -> None:
    with torch.inference_mode():
        segment = Segment.create(4096)
    segment.tensor.add_(1)
    assert int(segment.tensor.sum()) == 4096
    segment.close()


def test_threads_touch_it_together_and_content_stays() -> None:
    segment = Segment.create(8 * MIB)
    segment.tensor.fill_(9)
    threads = [
        threading.Thread(target=segment.touch, args=(start + 1, start + MIB)) for start in range(0, 8 * MIB, MIB)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert segment.tensor.eq(9).all()
    segment.close()


def huge_bytes() -> int:
    """Shared memory that this process has mapped in huge pages."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("ShmemPmdMapped"))


def test_touching_makes_huge_pages_which_others_map_as_such() -> None:
    before = huge_bytes()
    segment = Segment.create(9 * MIB + 5)
    segment.touch(3 * MIB, 9 * MIB + 5)
    if huge_bytes() == before:
        pytest.skip("this kernel makes no huge pages of shared memory, or has none left")
    assert huge_bytes() == before + 6 * MIB, "those in which the range lies; what is left in the end is small"
    segment.tensor[5 * MIB :].fill_(7)
    memory = map_host_memory(HostMemory(segment.nbytes), (os.dup(segment.fd),))
    assert memory.tensor.data_ptr() % HUGE_PAGE == 0
    assert memory.tensor[5 * MIB :].eq(7).all()
    assert not memory.tensor[: 5 * MIB].any()
    assert huge_bytes() > before + 6 * MIB
    memory.close()
    segment.close()
    gc.collect()
    assert huge_bytes() == before


def test_small_pages_do_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    before, asked = huge_bytes(), []

    def without(address: int, nbytes: int, advice: int) -> int:
        asked.append(advice)
        return errno.EINVAL if advice in (COLLAPSE, HUGE) else advise(address, nbytes, advice)

    monkeypatch.setattr("checkpoint_engine.source.segment.advise", without)
    segment = Segment.create(8 * MIB)
    segment.touch(0, 4 * MIB)
    segment.touch(4 * MIB, 8 * MIB)
    assert asked.count(COLLAPSE) == 1, "a kernel that cannot is asked once"
    assert os.fstat(segment.fd).st_blocks * 512 == 8 * MIB
    assert huge_bytes() in (before, before + 8 * MIB), "small, unless the administrator wants them huge"
    segment.close()


def test_threads_that_fill_neighbouring_places_at_once_lose_nothing() -> None:
    segment = Segment.create(40 * MIB)
    step = 1_300_001
    starts = range(0, segment.nbytes, step)

    def fill(start: int) -> None:
        end = min(start + step, segment.nbytes)
        segment.touch(start, end)
        segment.buffer(start, end)[:] = bytes([start // step + 1]) * (end - start)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(fill, starts))
    for start in starts:
        assert segment.tensor[start : start + step].eq(start // step + 1).all()
    segment.close()


def test_touching_takes_the_pages() -> None:
    segment = Segment.create(8 * MIB)
    assert os.fstat(segment.fd).st_blocks == 0
    segment.touch(0, 4 * MIB)
    taken = os.fstat(segment.fd).st_blocks * 512
    segment.close()
    if taken == 0:
        pytest.skip("this kernel has no MADV_POPULATE_WRITE")
    assert 4 * MIB <= taken <= 8 * MIB


def test_more_than_the_largest_segment_is_refused() -> None:
    with pytest.raises(HostMemoryError, match=f"{LARGEST_SEGMENT + 1} bytes was asked for, the largest is"):
        Segment.create(LARGEST_SEGMENT + 1)


def test_a_file_is_mapped_as_it_is_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 40)
    segment = Segment.map_file(path)
    assert (segment.nbytes, segment.file, segment.file_start) == (10240, path, 0)
    assert segment.tensor[256:512].tolist() == list(range(256))
    segment.close()
    assert path.read_bytes() == bytes(range(256)) * 40


def test_a_part_of_a_file_begins_at_its_page(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(5000) + b"tensor" + bytes(5000))
    segment = Segment.map_file(path, 5000, 5006)
    assert segment.file_start == 4096
    assert bytes(segment.tensor[5000 - 4096 :].tolist()) == b"tensor"
    segment.close()


def test_an_empty_file_can_be_mapped(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    segment = Segment.map_file(tmp_path / "file")
    assert segment.nbytes == 0
    segment.close()


@pytest.mark.parametrize(("start", "end"), [(0, 11), (5, 4), (-1, 4), (11, 12)])
def test_a_range_outside_the_file_is_refused_and_nothing_stays_open(tmp_path: Path, start: int, end: int) -> None:
    (tmp_path / "file").write_bytes(bytes(10))
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(CheckpointFormatError, match=f"has 10 bytes, but {start} to {end}"):
        Segment.map_file(tmp_path / "file", start, end)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointFormatError, match="No such file"):
        Segment.map_file(tmp_path / "none")


def test_a_file_too_large_for_one_segment_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        file.truncate(LARGEST_SEGMENT + 1)  # sparse: takes no space
    with pytest.raises(HostMemoryError, match=str(LARGEST_SEGMENT + 1)):
        Segment.map_file(tmp_path / "file")


def test_a_mapped_file_that_shrinks_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(10000))
    segment = Segment.map_file(path)
    segment.check()
    os.truncate(path, 100)
    with pytest.raises(CheckpointFormatError, match=r"truncated to 100 bytes .* 10000"):
        segment.check()
    segment.close()


def make_meminfo(root: Path, available_kib: int) -> None:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(
        f"MemTotal:       99999999 kB\nMemFree: 1 kB\nMemAvailable:   {available_kib} kB\nHugePages_Total:       0\n"
    )
    (root / "proc/self/cgroup").write_text("")


def version_2(root: Path) -> None:
    """A limit on the parent of the process's own group, which has none."""
    (root / "proc/self/cgroup").write_text("0::/pod/server\n")
    for group, limit in (("pod", str(5000 * MIB)), ("pod/server", "max")):
        (root / "cgroups" / group).mkdir(parents=True)
        (root / "cgroups" / group / "memory.max").write_text(limit + "\n")
        (root / "cgroups" / group / "memory.current").write_text(f"{3000 * MIB}\n")
        (root / "cgroups" / group / "memory.stat").write_text(
            f"anon 5\nfile {900 * MIB}\ninactive_file {600 * MIB}\nactive_file {400 * MIB}\nshmem 3\n"
        )


def version_1(root: Path) -> None:
    """The host's path is not visible in the container; the root of the mount is its group."""
    (root / "proc/self/cgroup").write_text("5:devices:/\n4:memory:/docker/0a1b2c\n0::/\n")
    group = root / "cgroups/memory"
    group.mkdir(parents=True)
    (group / "memory.limit_in_bytes").write_text(f"{5000 * MIB}\n")
    (group / "memory.usage_in_bytes").write_text(f"{3000 * MIB}\n")
    (group / "memory.stat").write_text(
        f"inactive_file 7\nactive_file 8\ntotal_inactive_file {600 * MIB}\ntotal_active_file {400 * MIB}\n"
    )


@pytest.mark.parametrize("lay_out", [version_1, version_2])
def test_the_limit_of_the_control_group_counts(tmp_path: Path, lay_out: Callable[[Path], None]) -> None:
    make_meminfo(tmp_path, 8000 * 1024)
    assert free_host_memory(tmp_path / "proc", tmp_path / "cgroups").nbytes == 8000 * MIB
    lay_out(tmp_path)
    free = free_host_memory(tmp_path / "proc", tmp_path / "cgroups")
    assert free.nbytes == 3000 * MIB  # limit 5000, 3000 used, of which 1000 are cached files
    assert "control group limit 4.88 GiB" in free.bound


def test_without_any_known_limit_everything_is_free(tmp_path: Path) -> None:
    assert free_host_memory(tmp_path, tmp_path).nbytes > 1 << 60


def test_this_host_tells_what_it_has() -> None:
    assert 0 < free_host_memory().nbytes < 1 << 50


def test_too_little_memory_is_refused_with_the_numbers() -> None:
    free = FreeMemory(1 << 30, "MemAvailable of the host")
    require_host_memory(512 * MIB, "a checkpoint", free)
    require_host_memory(0, "an empty checkpoint", FreeMemory(0, "nothing"))
    with pytest.raises(HostMemoryError, match=r"a checkpoint needs 1\.00 GiB .* 1\.00 GiB are free \(MemAvailable"):
        require_host_memory(1 << 30, "a checkpoint", free)
