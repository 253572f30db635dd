"""Where the plugin hangs into SGLang: its hooks, and the places for them in each version."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata

__all__ = [
    "OTHER_UPDATES",
    "FoundHook",
    "Hook",
    "find_hooks",
    "inspect_installation",
    "ping_waits_for_weights",
    "version",
    "version_numbers",
]

_OLDEST_WITH_PLUGINS = (0, 5, 11)
_NEWEST_KNOWN = (0, 5, 23)

_MANAGERS = "sglang.srt.managers"
_UPDATER = "sglang.srt.managers.scheduler_components.weight_updater"
_RUNNERS = "sglang.srt.model_executor"


@dataclass(frozen=True)
class Hook:
    """One of SGLang's own functions that the plugin changes, and where versions keep it, newest first."""

    name: str
    targets: tuple[str, ...]
    without_it: str
    """What does not work where none of the targets is there."""


OTHER_UPDATES = ("update_weights_from_disk", "update_weights_from_distributed", "update_weights_from_tensor")
"""SGLang's own ways to new weights."""

_HOOKS = (
    Hook(
        "alias",
        ("sglang.srt.server_args.ServerArgs.add_cli_args",),
        "the flag is only known as --checkpoint-engine-wait-weights-before-ready",
    ),
    Hook(
        "settings",
        ("sglang.srt.server_args.ServerArgs.check_server_args",),
        "settings under which the server could not be closed are not refused",
    ),
    Hook(
        "model",
        ("sglang.srt.model_loader.loader._initialize_model",),
        "quantised models cannot be updated",
    ),
    Hook(
        "front",
        (f"{_MANAGERS}.tokenizer_manager.TokenizerManager.init_weight_update",),
        "no routes of ours, and nothing closes the server while it lacks weights",
    ),
    Hook(
        "request",
        (
            f"{_MANAGERS}.tokenizer_control_mixin.TokenizerControlMixin.update_weights_from_ipc",  # from 0.5.11
            f"{_MANAGERS}.tokenizer_communicator_mixin.TokenizerCommunicatorMixin.update_weights_from_ipc",
        ),
        "updates asked for by /update_weights_from_ipc reach one data-parallel replica only",
    ),
    Hook(
        "workers",
        (
            f"{_UPDATER}.SchedulerWeightUpdaterManager.update_weights_from_ipc",  # from 0.5.14
            f"{_MANAGERS}.scheduler_update_weights_mixin.SchedulerUpdateWeightsMixin.update_weights_from_ipc",
        ),
        "workers cannot be updated",
    ),
    Hook(
        "runner",
        (
            f"{_RUNNERS}.model_runner_components.weight_updater.WeightUpdater.update_weights_from_ipc",  # from 0.5.16
            f"{_RUNNERS}.model_runner.ModelRunner.update_weights_from_ipc",
        ),
        "workers cannot be updated",
    ),
    *(
        Hook(
            name,
            (
                f"{_UPDATER}.SchedulerWeightUpdaterManager.{name}",  # from 0.5.14
                f"{_MANAGERS}.scheduler_update_weights_mixin.SchedulerUpdateWeightsMixin.{name}",
            ),
            "the status names the version that came through this plugin also after SGLang's own update",
        )
        for name in OTHER_UPDATES
    ),
    Hook(
        "stages",
        (f"{_MANAGERS}.scheduler_pp_mixin.SchedulerPPMixin._pp_send_pyobj_to_next_stage",),
        "engines with pipeline stages cannot be updated",
    ),
    Hook(
        "resume",
        (f"{_MANAGERS}.scheduler.Scheduler.continue_generation",),
        "an engine whose weights are a mixture runs again when it is told to continue",
    ),
)


@dataclass(frozen=True)
class FoundHook:
    """Where the place of a hook is in the installed SGLang; `problem` says why nowhere."""

    hook: Hook
    target: str = ""
    problem: str = ""


def find_hooks(hooks: Sequence[Hook] = _HOOKS) -> list[FoundHook]:
    """Looks for the place of each hook in the installed SGLang. Imports a good part of it."""
    return [_find(hook) for hook in hooks]


def _find(hook: Hook) -> FoundHook:
    reasons: list[str] = []
    for target in hook.targets:
        reason = _why_not(target)
        if not reason:
            return FoundHook(hook, target)
        reasons.append(f"{target}: {reason}")
    return FoundHook(hook, problem="; ".join(reasons))


def _why_not(target: str) -> str:
    try:
        return "" if callable(pkgutil.resolve_name(target)) else "not a function"
    except (ImportError, AttributeError, ValueError) as error:
        return str(error) or type(error).__name__


def version() -> str:
    """SGLang's."""
    try:
        return metadata.version("sglang")
    except metadata.PackageNotFoundError:
        return "of unknown version"


def version_numbers(text: str | None = None) -> tuple[int, ...]:
    """The first numbers of a version: (0, 5, 10) of `0.5.10.post1`; empty if it has none."""
    numbers: list[int] = []
    for part in (version() if text is None else text).split(".")[:3]:
        if not part.isdecimal():
            break
        numbers.append(int(part))
    return tuple(numbers)


def ping_waits_for_weights() -> bool:
    """Whether `/ping` may be closed: before 0.5.23, SGLang's own update script sends nothing until it answers."""
    return version_numbers() >= (0, 5, 23) or not version_numbers()


def inspect_installation() -> list[Mapping[str, str]]:
    """For `checkpoint-engine doctor`: every hook that does not find its place."""
    numbers = version_numbers()
    if numbers and numbers < _OLDEST_WITH_PLUGINS:
        return [
            {
                "status": "problem",
                "value": f"SGLang {version()} loads no plugins",
                "advice": "install SGLang 0.5.11 or newer; until then only its own path works, "
                "`python -m sglang.srt.checkpoint_engine.update`, with the defects that docs/sglang.md lists",
            }
        ]
    lost = [found for found in find_hooks() if found.problem]
    if lost:
        return [
            {
                "status": "problem",
                "value": f"SGLang {version()} lacks the place for hook {found.hook.name!r} ({found.problem})",
                "advice": f"{found.hook.without_it}; known are 0.5.11 to {'.'.join(map(str, _NEWEST_KNOWN))}",
            }
            for found in lost
        ]
    return [{"status": "ok", "value": f"all {len(_HOOKS)} hooks find their places in SGLang {version()}", "advice": ""}]
