"""The parameter server over HTTP. Needs the extra `api`: pip install 'checkpoint-engine-core[api]'."""

from __future__ import annotations

from typing import TYPE_CHECKING

from checkpoint_engine.client.update_request import request_inference_to_update
from checkpoint_engine.errors import MissingDependencyError

if TYPE_CHECKING:
    from checkpoint_engine.api.app import create_app

__all__ = ["create_app", "request_inference_to_update"]


def __getattr__(name: str) -> object:
    """Imports the application when it is first asked for.

    Raises:
        MissingDependencyError: FastAPI is not installed.
    """
    if name == "_init_api":
        raise MissingDependencyError(
            "_init_api is create_app(ps, allowed_roots=[...]) here; the command is checkpoint-engine serve"
        )
    if name != "create_app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from checkpoint_engine.api.app import create_app  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise _missing_extra(error) from error
    return create_app


def _missing_extra(error: ModuleNotFoundError) -> MissingDependencyError:
    """The error that says how the extra is installed."""
    return MissingDependencyError(
        f"the HTTP API needs FastAPI and uvicorn ({error.name} is missing): pip install 'checkpoint-engine-core[api]'"
    )
