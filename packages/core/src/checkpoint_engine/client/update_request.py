"""The request by which update scripts in the wild ask an engine."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

import httpx

from checkpoint_engine.client.endpoint import Endpoint
from checkpoint_engine.deadline import Deadline
from checkpoint_engine.errors import DeadlineError, EngineRequestError

__all__ = ["InferenceRequestError", "InferenceTimeoutError", "request_inference_to_update"]


class InferenceRequestError(EngineRequestError, httpx.HTTPError):
    """Of `request_inference_to_update`, whose callers in the wild catch what httpx raises."""

    def __init__(self, message: str) -> None:
        httpx.HTTPError.__init__(self, message)


class InferenceTimeoutError(DeadlineError, httpx.TimeoutException):
    """Of `request_inference_to_update`, if no answer comes in time."""

    def __init__(self, message: str) -> None:
        httpx.TimeoutException.__init__(self, message)


def request_inference_to_update(
    url: str, socket_paths: Mapping[str, str], timeout: float = 300.0, uds: str | None = None
) -> None:
    """Asks an engine to call `update_weights_from_ipc` on its workers; returns when they have.

    Args:
        url: The engine's `/collective_rpc`, such as `http://localhost:8000/collective_rpc`.
        socket_paths: Identity of each device -> handle of the parameter-server rank that feeds it.
        timeout: Seconds for the whole request.
        uds: Path of the engine's Unix socket, if it listens on one; the host of `url` is then ignored.

    Raises:
        EngineRequestError: nobody listens, or the engine answers with an error; a `httpx.HTTPError` as well.
        DeadlineError: it does not answer in time; a `httpx.TimeoutException` as well.
    """
    parts = urlsplit(url)
    endpoint = Endpoint(f"unix:{uds}" if uds else f"{parts.scheme}://{parts.netloc}")
    body = {"method": "update_weights_from_ipc", "args": [dict(socket_paths)], "timeout": timeout}
    try:
        endpoint.call("POST", parts.path or "/collective_rpc", Deadline(timeout), body=body)
    except EngineRequestError as error:
        raise InferenceRequestError(str(error)) from error
    except DeadlineError as error:
        raise InferenceTimeoutError(str(error)) from error
