"""`checkpoint-engine join`: new engines take their weights from ranks that hold them already."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from checkpoint_engine.catalog import Catalog
from checkpoint_engine.cli.common import DeviceKind, Json, Pause, ReloadChoice, Verbose
from checkpoint_engine.cli.messages import Job
from checkpoint_engine.cli.options import Afterwards, Engines, Patience, Requests, Transfer, path_text
from checkpoint_engine.cli.running import run_job
from checkpoint_engine.cli.seeds import Seeds
from checkpoint_engine.errors import AccessRefusedError, SettingError, UpdateError
from checkpoint_engine.owned_directory import OwnedDirectory

__all__ = ["join"]

_TOKEN_VARIABLE = "CHECKPOINT_ENGINE_TOKEN"  # noqa: S105 - its name, not its value
_WORK = "What to update"
_HOW = "How"
_AFTER = "Afterwards"


def join(
    metas: Annotated[
        list[str],
        typer.Option(
            metavar="FILE|URL",
            help="Who holds the checkpoint: a file that --save-metas wrote, or http://HOST:PORT of a running parameter "
            "server. Repeat it for several that hold the same version: they are read side by side, and one takes over "
            "where another fails.",
            rich_help_panel=_WORK,
            show_default=False,
        ),
    ],
    engine: Annotated[
        str, typer.Option(help="vllm, or any other engine with a plugin.", rich_help_panel=_WORK, show_default=False)
    ],
    endpoint: Annotated[
        list[str],
        typer.Option(
            help="http://HOST:PORT or unix:/path/to.sock. Repeat it for several instances that join at once.",
            rich_help_panel=_WORK,
            show_default=False,
        ),
    ],
    tensor_parallel_size: Annotated[
        int,
        typer.Option(
            "--tensor-parallel-size",
            "-tp",
            min=1,
            help="Workers of each engine; the seeds' may have had others.",
            rich_help_panel=_WORK,
        ),
    ] = 1,
    version: Annotated[
        str | None,
        typer.Option(
            help="What the engines shall call the weights; the checkpoint's name if left out.", rich_help_panel=_WORK
        ),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            help="Holds the token of the parameter servers. Without it, CHECKPOINT_ENGINE_TOKEN counts.",
            rich_help_panel=_HOW,
            show_default=False,
        ),
    ] = None,
    pause: Annotated[
        Pause, typer.Option(help="What becomes of requests that run in the engine; see update.", rich_help_panel=_HOW)
    ] = Pause.KEEP,
    reset_caches: Annotated[
        bool,
        typer.Option(
            "--reset-caches/--keep-caches",
            help="Drop what the engine has cached from other weights.",
            rich_help_panel=_HOW,
        ),
    ] = True,
    device: Annotated[
        DeviceKind, typer.Option(help="Where the engines' workers run.", rich_help_panel=_HOW)
    ] = DeviceKind.AUTO,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for the update.", rich_help_panel=_HOW)] = 600.0,
    reload: Annotated[
        ReloadChoice, typer.Option(help="How tensors get into the engine; see update.", rich_help_panel=_HOW)
    ] = ReloadChoice.AUTO,
    wait: Annotated[
        float,
        typer.Option(
            min=1,
            help="Seconds for an engine that is still starting, and for seeds to come back.",
            rich_help_panel=_HOW,
        ),
    ] = 600.0,
    keep_serving: Annotated[
        float,
        typer.Option(
            min=0,
            help="Keep what was read in host memory for so many seconds, so that others can join from here.",
            rich_help_panel=_AFTER,
        ),
    ] = 0.0,
    save_metas: Annotated[
        Path | None,
        typer.Option(
            help="With --keep-serving: write who holds what here to this JSON file.",
            rich_help_panel=_AFTER,
            show_default=False,
        ),
    ] = None,
    json: Json = False,
    verbose_: Verbose = False,
) -> None:
    """Bring new engines to the version that others serve, out of the host memory of those that hold it.

    Nothing is read from disk, and neither the GPUs nor the engines of the seeds notice: their host memory is read over
    RDMA, EFA or TCP. Seeds are ranks that were started with --share (commands update, serve) or CHECKPOINT_ENGINE_P2P=1
    and still hold the checkpoint. A seed that has moved on to another version is refused. When no seed is left, the
    metas are read again and the engines join whoever holds the weights then, until --wait is over.

    \b
    [dim]# a seed, which keeps its host memory for a day[/]
    checkpoint-engine update ./step-100 --engine vllm --endpoint http://localhost:8000 \\
        --share --save-metas /shared/metas.json --keep-serving 86400

    \b
    [dim]# on another host: a vLLM started with --load-format dummy[/]
    checkpoint-engine join --metas /shared/metas.json --engine vllm --endpoint http://localhost:8000
    """
    del verbose_
    if save_metas is not None and not keep_serving:
        raise SettingError("--save-metas tells others where to read: it needs --keep-serving SECONDS")
    engines = Engines(engine, tuple(endpoint), tensor_parallel_size)
    engines.check()
    seeds = Seeds(metas, _token(token_file), wait)
    while True:
        job = Job(
            directory="",
            version=version or seeds.catalogs[0].name or "joined",
            engines=engines,
            transfer=Transfer(device=device, reload=reload.value),
            requests=Requests(pause, reset_caches),
            patience=Patience(timeout, wait),
            afterwards=Afterwards(path_text(save_metas), None, keep_serving, share=keep_serving > 0),
        )
        try:
            return _try(job, seeds.catalogs, as_json=json)
        except UpdateError as error:
            seeds.wait_after(error)


def _try(job: Job, catalogs: Sequence[Catalog], *, as_json: bool) -> None:
    with OwnedDirectory("join") as directory:
        files = [Path(directory.path, f"metas-{index}.json") for index in range(len(catalogs))]
        for file, catalog in zip(files, catalogs, strict=True):
            msgspec.structs.replace(catalog, name=catalogs[0].name or job.version).save(file)
        run_job(msgspec.structs.replace(job, metas=tuple(map(str, files))), as_json=as_json)


def _token(file: Path | None) -> str | None:
    if file is None:
        return os.environ.get(_TOKEN_VARIABLE)
    try:
        if file.stat().st_mode & 0o077:
            raise AccessRefusedError(f"others can read the token in {file}; run: chmod 600 {file}")
        return file.read_text().strip()
    except OSError as error:
        raise SettingError(f"cannot read the token file {file}: {error.strerror}") from error
