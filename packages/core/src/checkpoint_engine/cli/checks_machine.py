"""What `doctor` looks at in this machine: devices, the limits of the host, the network."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoint_engine.cli.finding import Finding, Status

if TYPE_CHECKING:
    from checkpoint_engine.device import DeviceType

__all__ = ["check_devices", "check_host", "check_huge_pages", "check_memlock", "check_network", "check_shm"]

_GIB = 1 << 30
_SMALL_SHM = 1 << 30
_FEW_FILES = 1024
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


# -- devices --------------------------------------------------------------------------------------------------------


def check_devices() -> Iterator[Finding]:
    """torch, its backends, every GPU."""
    import torch  # noqa: PLC0415 - seconds
    import torch.distributed as dist  # noqa: PLC0415

    from checkpoint_engine.device import DEVICE_TYPES, accelerators  # noqa: PLC0415

    cuda = torch.version.cuda
    yield Finding("devices", "torch", "ok", f"{torch.__version__}, {f'CUDA {cuda}' if cuda else 'without CUDA'}")
    backends = [each for each in reversed(DEVICE_TYPES.values()) if dist.is_backend_available(each.backend)]
    connects = any(each.backend == "gloo" for each in backends)
    yield Finding(
        "devices",
        "collectives",
        "ok" if connects else "problem",
        ", ".join(f"{each.backend} {each.backend_version()}".strip() for each in backends) or "none",
        "" if connects else "this torch cannot connect ranks; install a build with gloo",
    )
    if not accelerators():
        yield _no_gpu(cuda)
    for device_type in accelerators():
        for index in range(device_type.count()):
            yield _check_device(device_type, index)


def _no_gpu(cuda: str | None) -> Finding:
    driver = Path("/proc/driver/nvidia/version").exists()
    if driver and cuda is None:
        return Finding("devices", "GPU", "problem", "this torch has no CUDA", "install a CUDA build of torch")
    if driver:
        advice = "check CUDA_VISIBLE_DEVICES, and whether the driver is new enough for this torch (nvidia-smi)"
        return Finding("devices", "GPU", "problem", "an NVIDIA driver is loaded, but torch sees no GPU", advice)
    return Finding("devices", "GPU", "note", "none; the CPU is used", "fine for the demo and for engines on the CPU")


def _check_device(device_type: DeviceType, index: int) -> Finding:
    from checkpoint_engine.errors import CheckpointEngineError  # noqa: PLC0415

    title = f"GPU {index}"
    try:
        device = device_type.open(index, 0)
        free, total = device.memory()
    except (CheckpointEngineError, RuntimeError) as error:
        return Finding("devices", title, "problem", "cannot be used", str(error).splitlines()[0])
    return Finding("devices", title, "ok", f"{device.name}, {_gib(free)} of {_gib(total)} free, {device.identity}")


# -- limits of the host ---------------------------------------------------------------------------------------------


def check_host() -> Iterator[Finding]:
    """Memory and the limits that pinning, shared memory and sockets meet."""
    from checkpoint_engine.host.memory import free_host_memory  # noqa: PLC0415

    free = free_host_memory()
    yield Finding("host", "memory", "ok", f"{_gib(free.nbytes)} can be taken ({free.bound})")
    yield check_memlock(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], rdma=bool(_rdma_devices()))
    yield check_shm(Path("/dev/shm"))  # noqa: S108 - that is the place
    yield check_huge_pages(_HUGE_PAGES, made=_makes_huge_pages())
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    few = files < _FEW_FILES
    yield Finding(
        "host", "open files", "note" if few else "ok", f"at most {files}", "raise it: ulimit -n 65536" if few else ""
    )
    yield _check_link()
    yield _check_settings()


def check_memlock(limit: int, *, rdma: bool) -> Finding:
    """RDMA registers memory under this limit; CUDA does not."""
    if limit == resource.RLIM_INFINITY:
        return Finding("host", "memlock", "ok", "unlimited")
    advice = "ulimit -l unlimited (in containers: --ulimit memlock=-1), or RDMA cannot register checkpoints"
    if rdma:
        return Finding("host", "memlock", "problem", _gib(limit), advice)
    return Finding("host", "memlock", "ok", f"{_gib(limit)}; only RDMA would need more")


def check_shm(path: Path) -> Finding:
    """Checkpoints need no room there, but NCCL and engines do."""
    try:
        status = os.statvfs(path)
    except OSError as error:
        return Finding("host", str(path), "problem", f"{error.strerror}", "mount a tmpfs there")
    total, free = status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize
    value = f"{_gib(free)} of {_gib(total)} free"
    if total < _SMALL_SHM:
        advice = "NCCL and engines need room there: docker run --shm-size=16g (or --ipc=host)"
        return Finding("host", str(path), "note", value, advice)
    return Finding("host", str(path), "ok", value)


def check_huge_pages(setting: Path, *, made: bool) -> Finding:
    """Whether the kernel makes shared memory out of huge pages when it is asked to; from 6.1 on by itself."""
    _, _, chosen = _text(setting).partition("[")
    chosen = chosen.partition("]")[0]
    if made:
        return Finding("host", "huge pages", "ok", "for shared memory too")
    # Measured on a machine with an H100: 30 GiB filled in 1.1 s instead of 10.3, registered in 0.7 instead of 5.0.
    advice = f"filling and registering memory is several times faster with them; as root: echo advise > {setting}"
    return Finding("host", "huge pages", "note", f"not for shared memory ({chosen or 'no such setting'})", advice)


def _makes_huge_pages() -> bool:
    from checkpoint_engine.device.pages import HUGE_PAGE  # noqa: PLC0415
    from checkpoint_engine.errors import HostMemoryError  # noqa: PLC0415
    from checkpoint_engine.source.segment import Segment  # noqa: PLC0415

    before = _mapped_huge()
    try:
        segment = Segment.create(HUGE_PAGE)
        segment.touch(0, HUGE_PAGE)
    except HostMemoryError:
        return False
    made = _mapped_huge() > before
    segment.close()
    return made


def _mapped_huge() -> int:
    """KiB of shared memory that this process has mapped in huge pages."""
    lines = _text(Path("/proc/self/smaps_rollup")).splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("ShmemPmdMapped"))


def _check_link() -> Finding:
    from checkpoint_engine.errors import CheckpointEngineError  # noqa: PLC0415
    from checkpoint_engine.link.channel import Listener  # noqa: PLC0415

    try:
        listener = Listener()
    except (CheckpointEngineError, OSError) as error:
        return Finding("host", "link", "problem", "no Unix socket can be opened", str(error))
    path = listener.handle.partition("://")[2].partition("#")[0]
    listener.close()
    return Finding(
        "host", "link", "ok", f"Unix sockets below {Path(path).parent.parent}; engines must see the same place"
    )


def _check_settings() -> Finding:
    from checkpoint_engine.errors import SettingError  # noqa: PLC0415
    from checkpoint_engine.settings import Settings  # noqa: PLC0415

    try:
        settings = Settings.from_environment()
    except SettingError as error:
        return Finding("host", "settings", "problem", "an environment variable cannot work", str(error))
    return Finding(
        "host",
        "settings",
        "ok",
        f"buckets of {settings.bucket_size / _GIB:.3g} GiB, {settings.mem_fraction:.0%} of free device memory, "
        f"device {settings.device}",
    )


# -- network --------------------------------------------------------------------------------------------------------


def check_network() -> Iterator[Finding]:
    """Interfaces, RDMA devices, the address that other hosts are told."""
    from checkpoint_engine.device_utils import get_ip  # noqa: PLC0415

    for interface in sorted(_entries("/sys/class/net")):
        if interface.name != "lo":
            state, speed = _text(interface / "operstate"), _text(interface / "speed")
            rate = f", {int(speed) / 1000:g} Gbit/s" if speed.isdecimal() and int(speed) else ""
            yield Finding("network", interface.name, "ok", f"{state or 'unknown'}{rate}")
    devices = _rdma_devices()
    for device in devices:
        for port in sorted(_entries(str(device / "ports"))):
            state = _text(port / "state").partition(": ")[2] or "unknown"
            status: Status = "ok" if state == "ACTIVE" else "note"
            advice = "" if status == "ok" else "the link is down: it cannot carry P2P updates"
            yield Finding("network", f"{device.name}:{port.name}", status, f"{state}, {_text(port / 'rate')}", advice)
    if not devices:
        yield Finding("network", "RDMA", "ok", "no device; P2P updates between hosts would use TCP")
    yield Finding("network", "address", "ok", get_ip())


def _rdma_devices() -> list[Path]:
    return sorted(_entries("/sys/class/infiniband"))


def _entries(directory: str) -> list[Path]:
    try:
        return list(Path(directory).iterdir())
    except OSError:
        return []


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # a file that has no value now cannot be read
        return ""


def _gib(nbytes: int) -> str:
    return f"{nbytes / _GIB:.2f} GiB"
