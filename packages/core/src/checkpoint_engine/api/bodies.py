"""What goes over HTTP as JSON, with the texts that the OpenAPI description shows."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from checkpoint_engine.transfer.methods import Method
from checkpoint_engine.transfer.order import MOST_WORKERS
from checkpoint_engine.transfer.report import UpdateReport

__all__ = [
    "AbortBody",
    "Checkpoint",
    "Checkpoints",
    "Error",
    "FilesBody",
    "Freed",
    "Gathered",
    "Named",
    "PublishBody",
    "RunningUpdate",
    "UpdateBody",
    "Updates",
    "Version",
]

_Strict = ConfigDict(extra="forbid")
_Draft = Annotated[
    list[str],
    Field(
        description="This rank's files of a draft model's own checkpoint (speculative decoding): absolute paths, as in "
        "`files`; each whole. Engines give them to their draft model alone."
    ),
]


class FilesBody(BaseModel):
    """This rank's share of a checkpoint."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"files": ["/models/step-7/model-00001-of-00002.safetensors"]}]},
    )

    files: Annotated[
        list[str] | dict[str, list[str]],
        Field(
            description="Absolute paths of `.safetensors` files below an allowed directory; or an object that maps "
            "each path to the names of the tensors to take from it. Each tensor belongs to exactly one rank."
        ),
    ]
    draft: _Draft = []
    use_shared_memory_pool: Annotated[
        bool, Field(description="Keep the memory for the next checkpoint when this one is unregistered.")
    ] = False
    use_inplace_pin_memory: Annotated[
        bool, Field(description="Use files that lie in `/dev/shm` where they are. They are never deleted.")
    ] = True


class UpdateBody(BaseModel):
    """Who shall take the update, and who asks the engine for it."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [{"update_url": "http://127.0.0.1:8000/collective_rpc", "inference_group_ranks": [0, 1]}, {}]
        },
    )

    ranks: Annotated[list[int], Field(description="Ranks to update; empty for all of them, by broadcast.")] = []
    update_url: Annotated[
        str | None,
        Field(
            description="The engine's `/collective_rpc`. Give it to the one rank that leads the engine, and leave it "
            "out for the others. The host must be this one unless others were allowed."
        ),
    ] = None
    inference_group_ranks: Annotated[
        list[int],
        Field(description="Ranks that feed this engine, in the order of its workers; empty for all ranks."),
    ] = []
    timeout: Annotated[float, Field(gt=0, le=86400, description="Seconds for the whole update.")] = 300.0
    uds: Annotated[
        str | None, Field(description="The engine's Unix socket; the host of `update_url` then does not matter.")
    ] = None
    version: Annotated[
        str | None, Field(description="What the engines shall call it; the checkpoint's name if left out.")
    ] = None
    reload: Annotated[
        Literal["auto", "plan", "loader"],
        Field(description="How the engine takes the tensors over: its recorded plan and loader, only one of them."),
    ] = "auto"
    method: Annotated[
        Method,
        Field(description="How the bytes travel: broadcast, direct (each worker reads this host), auto (if possible)."),
    ] = Method.BROADCAST
    workers: Annotated[
        int,
        Field(
            ge=1,
            le=MOST_WORKERS,
            description="Engine workers that each rank feeds, the same for all ranks. With `direct`, one rank can feed "
            "all workers of its host; it then needs no GPU.",
        ),
    ] = 1
    only: Annotated[
        list[str],
        Field(
            description="Patterns, as of a shell, of the names of tensors: no others are brought, and all other "
            "weights stay as they are, bit for bit. Empty for all of the checkpoint."
        ),
    ] = []
    rollback: Annotated[
        bool,
        Field(
            description="Whether engines that are left with a mixture get back what the last update of these ranks "
            "brought them, if that checkpoint is still registered."
        ),
    ] = True
    trace: Annotated[
        bool, Field(description="Whether the report shall say when this rank copied, broadcast and loaded each bucket.")
    ] = False


class PublishBody(UpdateBody):
    """This rank's share of a step, and who shall take it."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "files": ["/models/step-8/model-00001-of-00002.safetensors"],
                    "update_url": "http://127.0.0.1:8000/collective_rpc",
                    "version": "step-8",
                }
            ]
        },
    )

    files: Annotated[
        list[str] | dict[str, list[str]],
        Field(description="As for `files`; they are read into the memory of what had this name before."),
    ]
    draft: _Draft = []


class AbortBody(BaseModel):
    """Why the update is given up."""

    model_config = _Strict

    reason: Annotated[str, Field(max_length=500)] = "asked for over HTTP"


class Error(BaseModel):
    """Every answer that is not a success."""

    error: Annotated[str, Field(description="Class of the error.", examples=["CheckpointStateError"])]
    message: Annotated[str, Field(description="What is wrong, and the way out.")]
    rank: Annotated[int | None, Field(description="Where an update failed.")] = None
    phase: Annotated[str | None, Field(description="What it was doing.")] = None
    kind: Annotated[str | None, Field(description="Class of the error that came first.")] = None
    rolled_back: Annotated[
        str | None, Field(description="The version that the engines were given back and serve again.")
    ] = None
    held: Annotated[
        str | None, Field(description="What the engine holds since: `old`, `new` or `mixture`; left out if unknown.")
    ] = None


class Named(BaseModel):
    """The checkpoint that was meant."""

    name: Annotated[str, Field(examples=["step-7"])]


class Gathered(BaseModel):
    """What all ranks hold together."""

    name: str
    tensors: int
    nbytes: int
    fingerprint: Annotated[
        str, Field(description="SHA-256 over names, dtypes and shapes: equal for interchangeable checkpoints.")
    ]


class Checkpoint(BaseModel):
    """One checkpoint as this rank sees it."""

    name: str
    registered: Annotated[bool, Field(description="Whether this rank holds a part of it.")]
    gathered: Annotated[Gathered | None, Field(description="What all ranks hold, once that was gathered.")]


class Checkpoints(BaseModel):
    """All checkpoints of this rank."""

    checkpoints: list[Checkpoint]


class Freed(BaseModel):
    """What was given back to the device."""

    nbytes: int


class RunningUpdate(BaseModel):
    """How far the update is."""

    name: str
    version: str
    phase: str
    buckets_done: int
    buckets: int
    bytes_done: int
    nbytes: int
    seconds: float


class Updates(BaseModel):
    """The update that runs on this rank, and how the last one ended."""

    running: RunningUpdate | None
    last: Annotated[UpdateReport | None, Field(description="The last update that succeeded.")]
    last_error: Annotated[Error | None, Field(description="How the latest update failed; null if it succeeded.")]


class Version(BaseModel):
    """Who answers."""

    version: str
    torch: str
    link_protocol: Annotated[int, Field(description="Engines must speak the same.")]
    rank: int
    world_size: int
    device: str
