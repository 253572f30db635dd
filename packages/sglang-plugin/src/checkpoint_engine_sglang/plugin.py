"""What SGLang calls in each of its processes when this package is installed (entry point `sglang.srt.plugins`)."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import Any

from checkpoint_engine.sdk import SettingError
from checkpoint_engine_sglang import compat, front, installation, layouts, scheduler

__all__ = ["add_alias", "check_settings", "register", "remember_layouts"]

logger = logging.getLogger(__name__)

_WAIT_FLAG = "--wait-for-initial-weights"
_OWN_WAIT_FLAG = "--checkpoint-engine-wait-weights-before-ready"


def register() -> None:
    """Hangs the plugin into SGLang. Hooks that do not find their place are noted; the status route tells of them.

    `SGLANG_PLUGINS`, SGLang's own list of plugins to load, switches it off.
    """
    registry = importlib.import_module("sglang.srt.plugins.hook_registry")
    lost: dict[str, str] = {}
    for found in installation.find_hooks():
        if found.problem:
            lost[found.hook.name] = f"{found.hook.without_it} ({found.problem})"
            logger.error("hook %r does not find its place: %s", found.hook.name, lost[found.hook.name])
            continue
        registry.HookRegistry.register(found.target, _HOOKS[found.hook.name], registry.HookType.AROUND)
    front.lost_hooks.update(lost)
    scheduler.lost_hooks.update(lost)


def add_alias(original: Callable[..., Any], parser: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
    """Lets the flag be called by the name that SGLang's documentation gives it."""
    done = original(parser, *args, **kwargs)
    actions: dict[str, Any] = parser._option_string_actions  # noqa: SLF001 - argparse has no other way to add a name
    action = actions.get(_OWN_WAIT_FLAG)
    if action is not None and _WAIT_FLAG not in actions:
        action.option_strings.append(_WAIT_FLAG)
        actions[_WAIT_FLAG] = action
    return done


def check_settings(original: Callable[..., Any], arguments: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
    """Refuses to start where the server could not be kept closed until its weights are there.

    Raises:
        SettingError: the message names the setting.
    """
    done = original(arguments, *args, **kwargs)
    waits = bool(getattr(arguments, "checkpoint_engine_wait_weights_before_ready", False))
    if waits and int(getattr(arguments, "tokenizer_worker_num", 1) or 1) > 1:
        raise SettingError(
            f"{_WAIT_FLAG} with --tokenizer-worker-num {arguments.tokenizer_worker_num}: SGLang loads no plugins in "
            "its several tokenizer workers, so nothing would keep them from answering before the weights are there. "
            f"Start with --tokenizer-worker-num 1, or without {_WAIT_FLAG}"
        )
    option = compat.grpc_option(arguments)
    if waits and option:
        raise SettingError(
            f"{_WAIT_FLAG} with {option}: the plugin stands before SGLang's HTTP server only, so nothing would keep "
            f"its gRPC server from answering before the weights are there. Start without {option}, or "
            f"without {_WAIT_FLAG}"
        )
    if waits and front.lost_hooks.keys() & {"front", "workers", "runner"}:
        raise SettingError(
            f"{_WAIT_FLAG}: this SGLang ({installation.version()}) has not what the plugin needs to keep it closed: "
            f"{'; '.join(front.lost_hooks.values())}"
        )
    return done


def remember_layouts(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
    """Around the making of a model: what its loader fills is known only now."""
    model = original(*args, **kwargs)
    layouts.remember(model)
    return model


_HOOKS: dict[str, Callable[..., Any]] = {
    "alias": add_alias,
    "settings": check_settings,
    "model": remember_layouts,
    "front": front.make_front,
    "request": front.update_weights_from_ipc,
    "workers": scheduler.update_workers,
    "runner": scheduler.update_runner,
    **dict.fromkeys(installation.OTHER_UPDATES, scheduler.update_otherwise),
    "stages": scheduler.send_to_next_stage,
    "resume": scheduler.resume,
}
