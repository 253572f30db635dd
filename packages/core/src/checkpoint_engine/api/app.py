"""The HTTP routes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Query, Response
from fastapi import Path as InPath
from fastapi.responses import PlainTextResponse
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST

from checkpoint_engine.api import answers, bodies
from checkpoint_engine.api.access import HEALTH_PATH, BearerToken, EngineAccess, FileAccess, PeerAccess
from checkpoint_engine.api.request_bodies import BoundedBodies
from checkpoint_engine.api.service import Service
from checkpoint_engine.data_types import MemoryBufferMetaList
from checkpoint_engine.server.parameter_server import ParameterServer
from checkpoint_engine.transfer.report import UpdateReport
from checkpoint_engine.version import __version__

__all__ = ["create_app"]

_DESCRIPTION = """
One rank of the parameter server. Each rank has an API of its own; call it on the host of that rank.

A checkpoint reaches the engines in three steps:

1. `POST /v1/checkpoints/{name}/files` on every rank, with that rank's share of the files;
2. `POST /v1/checkpoints/{name}/gather-metas` on **all ranks at the same time**: they tell each other what they hold;
3. `POST /v1/checkpoints/{name}/update` on **all ranks at the same time**; the rank that leads an engine also gets its
   `update_url`. The answer comes once every engine worker holds the new weights.

While step 3 runs, `GET /v1/updates/current` says how far it is and `POST /v1/updates/current/abort` gives it up.
Every error is a JSON object with `error` (its class) and `message` (what is wrong, and the way out).
"""

_TAGS = [
    {"name": "checkpoints", "description": "What this rank holds in host memory."},
    {"name": "updates", "description": "Bringing a checkpoint to the engines."},
    {"name": "metas", "description": "Who holds which tensor, for replicas that join later."},
    {"name": "server", "description": "The server itself."},
]

_Name = Annotated[
    str,
    InPath(description="What the checkpoint is called, the same on all ranks.", examples=["step-7"], max_length=200),
]
_Seconds = Annotated[float, Query(gt=0, le=86400, description="Seconds to wait for the other ranks.")]
_Metas = dict[int, MemoryBufferMetaList]
_NOT_FOUND = "No checkpoint of that name is known here."
_STATE = "The call does not fit the state: registered twice, not gathered, in use, or another update is running."
_INPUT = "A file, tensor or argument cannot work."


def create_app(
    ps: ParameterServer,
    *,
    allowed_roots: Sequence[str | Path],
    token: str | None = None,
    engine_hosts: Sequence[str] = (),
    engine_socket_roots: Sequence[str | Path] | None = None,
    peer_hosts: Sequence[str] | None = None,
) -> FastAPI:
    """The ASGI application for one rank.

    Args:
        ps: The rank's parameter server. The caller closes it.
        allowed_roots: Directories below which files may be registered.
        token: What callers must show; None if only this user can connect, as on a Unix socket of mode 0600.
        engine_hosts: Hosts, besides this one, at which engines may be asked.
        engine_socket_roots: Directories below which engines' Unix sockets lie; if None, anywhere without a token, and
            nowhere with one.
        peer_hosts: Hosts whose memory posted metas may name, besides this one; if None, all of them without a token,
            and none with one.
    """
    if engine_socket_roots is None:
        engine_socket_roots = ["/"] if token is None else []
    peers = PeerAccess([] if peer_hosts is None else peer_hosts, anywhere=peer_hosts is None and token is None)
    service = Service(ps, FileAccess(allowed_roots), EngineAccess(engine_hosts, engine_socket_roots), peers)
    app = FastAPI(
        title="checkpoint-engine",
        version=__version__,
        summary="New weights for serving language models, in place.",
        description=_DESCRIPTION,
        openapi_tags=_TAGS,
    )
    shown = [] if token is None else _declared_bearer()
    app.include_router(_checkpoint_routes(service), dependencies=shown)
    app.include_router(_update_routes(service), dependencies=shown)
    app.include_router(_meta_routes(service), dependencies=shown)
    app.include_router(_server_routes(service))
    answers.install(app)
    app.add_middleware(BoundedBodies)
    if token is not None:
        app.add_middleware(BearerToken, token=token)
    return app


# Handlers are plain functions: FastAPI runs each in a thread, so progress can be read while an update runs.


def _checkpoint_routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1/checkpoints", tags=["checkpoints"])

    @router.get("", summary="List checkpoints")
    def list_checkpoints() -> bodies.Checkpoints:  # pyright: ignore[reportUnusedFunction]
        """What is registered on this rank, and what all ranks together hold of it if that was gathered."""
        return service.checkpoints()

    @router.post(
        "/{name}/files",
        summary="Register files",
        responses=_failures(
            {403: "A file is outside of the allowed directories.", 409: _STATE, 422: _INPUT, 507: "Memory."}
        ),
    )
    def register_files(name: _Name, body: bodies.FilesBody) -> bodies.Named:  # pyright: ignore[reportUnusedFunction]
        """Reads this rank's share of a checkpoint into pinned host memory.

        If anything is wrong nothing is kept, and checkpoints registered earlier stay as they were.
        """
        return service.register(name, body)

    @router.delete("/{name}", summary="Unregister", responses=_failures({409: _STATE}))
    def unregister(name: _Name, *, force: bool = False) -> bodies.Named:  # pyright: ignore[reportUnusedFunction]
        """Frees the memory of a checkpoint on this rank; one that is not there is only logged. Files stay.

        `force` frees pooled memory too.
        """
        return service.unregister(name, force=force)

    @router.post(
        "/{name}/gather-metas",
        summary="Gather what all ranks hold",
        responses=_failures(
            {404: _NOT_FOUND, 409: _STATE, 422: "Two ranks hold the same tensor.", 504: "A rank is late."}
        ),
    )
    def gather_metas(name: _Name, timeout: _Seconds = 300.0) -> bodies.Gathered:  # pyright: ignore[reportUnusedFunction]
        """Call this on all ranks at the same time, also on ranks that hold nothing of the checkpoint."""
        return service.gather(name, timeout)

    return router


def _update_routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["updates"])

    @router.post(
        "/checkpoints/{name}/update",
        summary="Update the engines",
        responses=_failures(
            {
                403: "The engine's address is not allowed.",
                404: _NOT_FOUND,
                409: _STATE + " Also if the update was aborted.",
                422: _INPUT,
                502: "The engine, one of its workers, or another rank failed; `rank` and `phase` say where.",
                504: "It did not complete in time.",
                507: "Memory is too small.",
            }
        ),
    )
    def update(name: _Name, body: bodies.UpdateBody) -> UpdateReport:  # pyright: ignore[reportUnusedFunction]
        """Call this on all ranks at the same time; it returns once every engine worker holds the checkpoint.

        The rank that leads an engine instance gets its `update_url`, which is asked with
        `{"method": "update_weights_from_ipc", "args": [{device: handle}]}`. After a failure the next call works.
        """
        return service.update(name, body)

    @router.post(
        "/checkpoints/{name}/publish",
        summary="One step: register, gather, update",
        responses=_failures(
            {
                403: "A file or the engine's address is not allowed.",
                409: _STATE + " Also if the update was aborted.",
                422: _INPUT,
                502: "The engine, one of its workers, or another rank failed; `rank` and `phase` say where.",
                504: "It did not complete in time, or a rank is late.",
                507: "Memory is too small.",
            }
        ),
    )
    def publish(name: _Name, body: bodies.PublishBody) -> UpdateReport:  # pyright: ignore[reportUnusedFunction]
        """Call this on all ranks at the same time, each with its share of the files.

        What this rank held under the name before is replaced, and its memory used again. How far it is stands in
        `GET /v1/updates/current`: `register`, `gather`, and then the phases of the update. `timeout` is for the update,
        and for the gathering before it.
        """
        return service.publish(name, body)

    @router.get("/updates/current", summary="Progress")
    def current_update() -> bodies.Updates:  # pyright: ignore[reportUnusedFunction]
        """How far the running update of this rank is, and how the last one ended. Answers at any time."""
        return service.updates()

    @router.delete("/staging", summary="Free staging memory", responses=_failures({409: "An update is using it."}))
    def release_staging() -> bodies.Freed:  # pyright: ignore[reportUnusedFunction]
        """Frees what this rank and its engine's worker keep of the device between updates (`PS_STAGING=persistent`)."""
        return service.release_staging()

    @router.post(
        "/updates/current/abort",
        summary="Abort",
        status_code=202,
        responses=_failures({409: "No update is running."}),
    )
    def abort(body: bodies.AbortBody | None = None) -> bodies.Named:  # pyright: ignore[reportUnusedFunction]
        """Gives the running update up, on all ranks. Its own request then answers 409."""
        return service.abort((body or bodies.AbortBody()).reason)

    return router


def _meta_routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1/metas", tags=["metas"])

    @router.get("", summary="Export metas", responses=_failures({409: "Nothing was gathered yet."}))
    def get_metas() -> _Metas:  # pyright: ignore[reportUnusedFunction]
        """What every rank holds of the checkpoint gathered last, by rank."""
        return service.metas()

    @router.get("/catalog", summary="Export the catalog", responses=_failures({409: "Nothing was gathered yet."}))
    def get_catalog() -> Response:  # pyright: ignore[reportUnusedFunction]
        """The same with names, versions and fingerprints, as `checkpoint-engine join --metas URL` reads it."""
        return Response(service.catalog_json(), media_type="application/json")

    @router.post("", summary="Load metas", responses=_failures({403: "An address is not allowed.", 422: _INPUT}))
    def load_metas(metas: _Metas) -> dict[str, int]:  # pyright: ignore[reportUnusedFunction]
        """Makes known what ranks of another parameter server hold, as its `GET /v1/metas` gave it."""
        service.load_metas(metas)
        return {"ranks": len(metas)}

    return router


def _server_routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["server"])

    @router.get(HEALTH_PATH, summary="Health")
    def healthz() -> dict[str, str]:  # pyright: ignore[reportUnusedFunction]
        """Succeeds while the server answers. Needs no token."""
        return {"status": "ok"}

    @router.get("/v1/version", summary="Version")
    def version() -> bodies.Version:  # pyright: ignore[reportUnusedFunction]
        """Versions, and which rank this is on which device."""
        return service.version()

    @router.get("/metrics", summary="Figures for Prometheus", response_class=PlainTextResponse)
    def metrics() -> Response:  # pyright: ignore[reportUnusedFunction]
        """Updates of this rank: seconds by phase, bytes, GB/s, version, failures by kind."""
        return Response(service.metrics(), media_type=CONTENT_TYPE_LATEST)

    return router


def _failures(texts: dict[int, str]) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": bodies.Error, "description": text} for status, text in texts.items()}


def _declared_bearer() -> list[Any]:
    """Shows in the OpenAPI description that a token is needed; `BearerToken` is what checks it."""
    from fastapi import Depends  # noqa: PLC0415

    return [Depends(HTTPBearer(auto_error=False))]
