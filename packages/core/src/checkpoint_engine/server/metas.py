"""Metas: who holds a checkpoint and how its memory is reached, from a file or from a running parameter server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from checkpoint_engine import limits
from checkpoint_engine.catalog import Catalog
from checkpoint_engine.deadline import Deadline
from checkpoint_engine.errors import AccessRefusedError, CheckpointFormatError, DeadlineError, PeerError, SettingError

if TYPE_CHECKING:
    import httpx

__all__ = ["parse_metas", "read_metas"]

_CATALOG_PATH = "/v1/metas/catalog"
_UNAUTHORISED = (401, 403)
_MOST_BYTES = 256 << 20
"""A catalog of 140,000 tensors is some 40 MB."""
_MOST_BYTES_OF_ERROR = 2000
_CHUNK = 1 << 20


def read_metas(source: str, *, token: str | None = None, timeout: float = 60.0) -> Catalog:
    """The catalog at a place.

    Args:
        source: A file; or `http://HOST:PORT`, for which `/v1/metas/catalog` is taken, or a whole URL.
        token: What the parameter server asks for.
        timeout: Seconds to wait for its answer.

    Raises:
        CheckpointFormatError: there is none, it contradicts itself, or it is too long to be one.
        PeerError: the parameter server cannot be reached, or knows no catalog.
        AccessRefusedError: the token is missing or wrong.
        DeadlineError: the answer does not come in time.
    """
    if source.startswith(("http://", "https://")):
        return parse_metas(_fetch(source, token, timeout), source)
    if "://" in source:
        raise SettingError(f"metas come from a file, http:// or https://, not from {source!r}")
    try:
        with Path(source).open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointFormatError(f"cannot read the metas {source}: {reason}") from error
    if len(data) > _MOST_BYTES:
        raise _too_long(source)
    return parse_metas(data, source)


def parse_metas(data: bytes, source: str) -> Catalog:
    """A catalog, or metas in the shape that `GET /v1/metas` has.

    Raises:
        CheckpointFormatError: it is neither.
    """
    try:
        return Catalog.from_json(data, source=source)
    except CheckpointFormatError as not_a_catalog:
        if b'"holdings"' in data:
            raise
        from checkpoint_engine.data_types import metas_from_json, metas_to_catalog  # noqa: PLC0415 - brings torch

        try:
            return metas_to_catalog(metas_from_json(data, source=source))
        except CheckpointFormatError as error:
            raise CheckpointFormatError(f"{source} is neither a catalog nor metas: {error}") from not_a_catalog


def _fetch(url: str, token: str | None, timeout: float) -> bytes:
    import httpx  # noqa: PLC0415 - see `Endpoint.send`

    deadline = Deadline(timeout)
    try:
        parsed = httpx.URL(url)
        if parsed.path in ("", "/"):
            parsed = parsed.copy_with(path=_CATALOG_PATH)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        # No proxy: the address is one inside of the cluster.
        with (
            httpx.Client(timeout=httpx.Timeout(timeout, connect=limits.CONNECT), trust_env=False) as client,
            client.stream("GET", parsed, headers=headers) as answer,
        ):
            if answer.status_code in _UNAUTHORISED:
                raise AccessRefusedError(f"{url} asks for its token: set CHECKPOINT_ENGINE_TOKEN, or pass --token-file")
            if not answer.is_success:
                said = _read(answer, url, _MOST_BYTES_OF_ERROR, deadline)[:_MOST_BYTES_OF_ERROR]
                raise PeerError(f"{url} answered {answer.status_code}: {said.decode(errors='replace')}")
            data = _read(answer, url, _MOST_BYTES, deadline)
    except httpx.InvalidURL as error:
        raise SettingError(f"{url!r} is no URL: {error}") from error
    except httpx.TimeoutException as error:
        raise DeadlineError(f"{url} did not answer within {timeout:g} s") from error
    except httpx.HTTPError as error:
        raise PeerError(f"{url} cannot be reached: {error}; is a parameter server running there?") from error
    if len(data) > _MOST_BYTES:
        raise _too_long(url)
    return data


def _read(answer: httpx.Response, url: str, most: int, deadline: Deadline) -> bytes:
    """The body of an answer, or the first bytes of one that has more than `most`."""
    data = bytearray()
    for chunk in answer.iter_bytes(_CHUNK):
        data += chunk
        if len(data) > most:
            break
        deadline.check(f"reading the metas of {url}")
    return bytes(data)


def _too_long(source: str) -> CheckpointFormatError:
    return CheckpointFormatError(f"{source} has more than {_MOST_BYTES} bytes, which are no metas")
