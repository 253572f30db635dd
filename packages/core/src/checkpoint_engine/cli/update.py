"""`checkpoint-engine update`: a checkpoint on disk reaches serving engines."""

from pathlib import Path
from typing import Annotated

import typer

from checkpoint_engine.cli.common import (
    DeviceKind,
    Json,
    Pause,
    ReloadChoice,
    Verbose,
    check_can_write,
)
from checkpoint_engine.cli.messages import Job
from checkpoint_engine.cli.options import Afterwards, Engines, Patience, Requests, TensorChoice, Transfer, path_text
from checkpoint_engine.cli.running import run_job
from checkpoint_engine.errors import CheckpointFormatError
from checkpoint_engine.transfer.methods import Method

__all__ = ["update"]

_WORK = "What to update"
_HOW = "How"
_AFTER = "Afterwards"


def update(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Holds the checkpoint's *.safetensors.", show_default=False)
    ],
    engine: Annotated[
        str,
        typer.Option(
            help="vllm, sglang or any other engine with a plugin; auto asks the endpoint.",
            rich_help_panel=_WORK,
            show_default=False,
        ),
    ],
    endpoint: Annotated[
        list[str],
        typer.Option(
            help="http://HOST:PORT or unix:/path/to.sock. Repeat it to update several instances at once.",
            rich_help_panel=_WORK,
            show_default=False,
        ),
    ],
    tensor_parallel_size: Annotated[
        int, typer.Option("--tensor-parallel-size", "-tp", min=1, help="Workers of each engine.", rich_help_panel=_WORK)
    ] = 1,
    version: Annotated[
        str | None,
        typer.Option(
            help="What the engines shall call the weights; the directory's name if left out.", rich_help_panel=_WORK
        ),
    ] = None,
    draft: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Holds the draft model's own *.safetensors (speculative decoding), to bring along.",
            rich_help_panel=_WORK,
            show_default=False,
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Bring only tensors of such names, as 'model.layers.*', and leave all other weights as they are, bit "
            "for bit. Repeatable.",
            rich_help_panel=_WORK,
            show_default=False,
        ),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Leave out tensors of such names, as '*.rotary_emb.inv_freq'. Repeatable.",
            rich_help_panel=_WORK,
            show_default=False,
        ),
    ] = None,
    strip_prefix: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PREFIX",
            help="Cut this off the tensors' names, as module. or _orig_mod. Repeatable.",
            rich_help_panel=_WORK,
            show_default=False,
        ),
    ] = None,
    reject_nan: Annotated[
        bool,
        typer.Option("--reject-nan", help="Send nothing if a tensor holds NaN.", rich_help_panel=_WORK),
    ] = False,
    method: Annotated[
        Method,
        typer.Option(
            help="How the bytes travel: every rank sends its share to all GPUs (broadcast), each worker copies its own "
            "slices out of the ranks' host memory (direct, on one host), or direct where possible (auto).",
            rich_help_panel=_HOW,
        ),
    ] = Method.BROADCAST,
    ranks: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Ranks that hold and send the checkpoint: one for each worker; with --method direct, 1 is enough.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    pause: Annotated[
        Pause,
        typer.Option(
            help="Running requests are kept and go on with the new weights, aborted, or waited for; "
            "none does not pause the engine.",
            rich_help_panel=_HOW,
        ),
    ] = Pause.KEEP,
    reset_caches: Annotated[
        bool,
        typer.Option(
            "--reset-caches/--keep-caches",
            help="Drop what the engine has cached from the old weights.",
            rich_help_panel=_HOW,
        ),
    ] = True,
    device: Annotated[
        DeviceKind, typer.Option(help="Where the engines' workers run.", rich_help_panel=_HOW)
    ] = DeviceKind.AUTO,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for the update.", rich_help_panel=_HOW)] = 600.0,
    reload: Annotated[
        ReloadChoice,
        typer.Option(
            help="How tensors get into the engine: by its recorded reload plan and, where that does not reach, by its "
            "own loader (auto); by nothing but the plan; or by its loader alone.",
            rich_help_panel=_HOW,
        ),
    ] = ReloadChoice.AUTO,
    wait: Annotated[
        float, typer.Option(min=1, help="Seconds for an engine that is still starting.", rich_help_panel=_HOW)
    ] = 600.0,
    save_metas: Annotated[
        Path | None,
        typer.Option(
            help="Write the catalog (who holds what) to this JSON file.", rich_help_panel=_AFTER, show_default=False
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Write what each rank did when to this JSON file, for Perfetto or the command timeline.",
            rich_help_panel=_AFTER,
            show_default=False,
        ),
    ] = None,
    rollback_to: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Should the update fail half-way, bring the engines this checkpoint, so that they serve again. The "
            "exit code is 1 all the same.",
            rich_help_panel=_AFTER,
            show_default=False,
        ),
    ] = None,
    keep_serving: Annotated[
        float,
        typer.Option(min=0, help="Keep the ranks and their host memory for so many seconds.", rich_help_panel=_AFTER),
    ] = 0.0,
    share: Annotated[
        bool,
        typer.Option(
            "--share",
            help="Let replicas that join later read the checkpoint from the ranks' host memory (see join). The ranks "
            "listen on the network, and whoever reaches them can read it and write to it: trusted networks only.",
            rich_help_panel=_AFTER,
        ),
    ] = False,
    json: Json = False,
    verbose_: Verbose = False,
) -> None:
    """Bring a checkpoint into serving engines, in place.

    Starts one rank for each worker of the engines, on the same host and the same GPUs; each rank reads its share of
    the files into host memory. An engine that is still starting is waited for. When the command returns, every worker
    holds exactly the new weights, or an error says which rank failed, where and why.

    Under torchrun its ranks are used instead, for engines on several hosts.

    \b
    [dim]# one vLLM on one GPU (or on the CPU, with --device cpu)[/]
    checkpoint-engine update ./step-100 --engine vllm --endpoint http://localhost:8000

    \b
    [dim]# two instances of 4 GPUs each, on this host[/]
    checkpoint-engine update ./step-100 --engine vllm -tp 4 \\
        --endpoint http://localhost:8000 --endpoint http://localhost:8001

    \b
    [dim]# one instance of 16 GPUs on two hosts; run on each of them, with the same secret[/]
    export CHECKPOINT_ENGINE_RANKS_SECRET=$(cat /shared/secret)
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d \\
        --rdzv-endpoint HOST:29500 --no-python checkpoint-engine \\
        update ./step-100 --engine vllm -tp 16 --endpoint http://HOST:8000
    """
    del verbose_
    engines = Engines(engine, tuple(endpoint), tensor_parallel_size)
    job = Job(
        directory=str(directory),
        version=version or directory.resolve().name + (" (in part)" if only else ""),
        engines=engines,
        tensors=TensorChoice(tuple(ignore or ()), tuple(strip_prefix or ()), reject_nan, tuple(only or ())),
        transfer=Transfer(method, ranks or 0, device, reload.value),
        requests=Requests(pause, reset_caches),
        patience=Patience(timeout, wait),
        draft=path_text(draft),
        afterwards=Afterwards(path_text(save_metas), path_text(trace), keep_serving, share, path_text(rollback_to)),
    )
    job.transfer.check(engines)
    for each in (directory, draft, rollback_to):
        if each is not None and not each.is_dir():
            raise CheckpointFormatError(f"{each} is not a directory")
    if trace is not None:
        check_can_write(trace)
    engines.check()
    run_job(job, as_json=json)
