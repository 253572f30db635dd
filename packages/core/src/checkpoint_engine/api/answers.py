"""Which status an error becomes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from checkpoint_engine import errors

__all__ = ["UnknownCheckpointError", "UpdateAbortedError", "install"]

_STATUS: tuple[tuple[type[Exception], int], ...] = (
    (errors.AccessRefusedError, 403),
    (errors.CheckpointStateError, 409),
    (errors.DeadlineError, 504),
    (errors.EngineRequestError, 502),
    (errors.WorkerError, 502),
    (errors.LinkError, 502),
    (errors.RankError, 502),
    (errors.PeerError, 502),
    (errors.WeightsRejectedError, 502),
    (errors.HostMemoryError, 507),
    (errors.DeviceMemoryError, 507),
    (errors.MissingDependencyError, 501),
    (errors.SettingError, 422),
    (errors.CheckpointFormatError, 422),
    (errors.UnsupportedTensorError, 422),
    (errors.DuplicateTensorError, 422),
    (errors.TensorTooLargeError, 422),
)


class UnknownCheckpointError(errors.CheckpointStateError):
    """No checkpoint of that name is known on this rank."""


class UpdateAbortedError(errors.CheckpointStateError):
    """Somebody asked for the update to be given up."""


def _status_of(error: BaseException) -> int:
    """The HTTP status of an error; that of an update is the status of its cause."""
    if isinstance(error, UnknownCheckpointError):
        return 404
    for cause in _causes(error):
        for kind, status in _STATUS:
            if isinstance(cause, kind):
                return status
    return 500


def install(app: FastAPI) -> None:
    """Makes every answer that is an error a JSON object with `error` and `message`."""
    app.add_exception_handler(errors.CheckpointEngineError, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(UnicodeEncodeError, _answer_no_text)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(Exception, _answer_error)


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _answer_error(_request: Request, error: Exception) -> JSONResponse:
    return JSONResponse(errors.error_fields(error), status_code=_status_of(error))


def _answer_invalid(_request: Request, error: Exception) -> JSONResponse:
    problems = cast("RequestValidationError", error).errors()
    said = "; ".join(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in problems[:5])
    more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""  # noqa: PLR2004
    return JSONResponse({"error": "SettingError", "message": said + more}, status_code=422)


def _answer_no_text(_request: Request, error: Exception) -> JSONResponse:
    """JSON can say what is no text: halves of characters."""
    message = f"{cast('UnicodeEncodeError', error).object!r} is no text"
    return JSONResponse({"error": "SettingError", "message": message}, status_code=422)


def _answer_http(request: Request, error: Exception) -> JSONResponse:
    refusal = cast("HTTPException", error)
    message = f"{request.method} {request.url.path}: {refusal.detail}; /openapi.json lists what there is"
    return JSONResponse({"error": "HTTPException", "message": message}, status_code=refusal.status_code)
