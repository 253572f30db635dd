"""`checkpoint-engine demo`: the whole way, with real processes, on any machine."""

import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from checkpoint_engine.cli.common import Json, Verbose, check_can_write, notes, output, print_json, verbose
from checkpoint_engine.cli.messages import Done, Job
from checkpoint_engine.cli.options import Afterwards, Engines, Patience, Transfer, path_text
from checkpoint_engine.cli.ranks import Ranks
from checkpoint_engine.cli.summary import UpdateView, print_stages, size, slowest
from checkpoint_engine.client.rpc_client import ReferenceClient
from checkpoint_engine.deadline import Deadline
from checkpoint_engine.errors import SettingError, WorkerError
from checkpoint_engine.owned_directory import OwnedDirectory
from checkpoint_engine.reference.process import ReferenceProcess
from checkpoint_engine.transfer.methods import Method

__all__ = ["demo"]

_SECONDS = 60.0
_BUCKET_GB = str(4 / 1024)
"""Small buckets, so that even the demo's checkpoint travels in many."""


@dataclass(frozen=True)
class _Outcome:
    """One update of the demo."""

    version: str
    reports: Sequence[Done]
    verified: int
    """Parameters of all workers that were compared with a cold start, byte by byte."""


def demo(
    ranks: Annotated[int, typer.Option(min=1, help="Ranks of the parameter server.")] = 2,
    tensor_parallel_size: Annotated[
        int, typer.Option("--tensor-parallel-size", "-tp", min=1, help="Workers of each engine.")
    ] = 2,
    method: Annotated[Method, typer.Option(help="How the bytes travel.")] = Method.BROADCAST,
    updates: Annotated[int, typer.Option(min=1, help="Updates in a row.")] = 2,
    trace: Annotated[
        Path | None,
        typer.Option(help="Write what each rank did when in the last update to this JSON file.", show_default=False),
    ] = None,
    json: Json = False,
    verbose_: Verbose = False,
) -> None:
    """See the whole way once, on the CPU: no GPU, no vLLM.

    Writes real checkpoints of a small mixture-of-experts model, starts ranks and a tensor-parallel engine as
    processes, updates the engine in place, and compares every parameter of every worker, byte by byte, with an engine
    that starts anew from the files.

    With more ranks than workers, several engine instances are updated at once: --ranks 4 -tp 2 feeds two.

    With --method direct, the engine's workers copy their own slices out of the ranks' host memory; nothing is staged
    and nothing broadcast.

    With --method p2p, an engine of another size joins after each update, and takes the version out of the ranks' host
    memory by way of Mooncake.
    """
    del verbose_
    if ranks % tensor_parallel_size:
        raise SettingError(
            f"{ranks} ranks cannot feed engines of {tensor_parallel_size} workers: make --ranks a multiple of "
            "--tensor-parallel-size"
        )
    if trace is not None:
        check_can_write(trace)
    start = time.perf_counter()
    with OwnedDirectory("demo") as directory:
        joiner = _other_size(tensor_parallel_size) if method is Method.P2P else 0
        outcomes = _Demo(directory.path, ranks, tensor_parallel_size, joiner, method).run(updates, trace)
    seconds = time.perf_counter() - start
    if json:
        print_json(_as_json(outcomes, method, seconds))
    else:
        _show(outcomes, ranks, tensor_parallel_size, seconds)


def _other_size(workers: int) -> int:
    """Tensor-parallel size of the engine that joins, which need not be that of the seeds."""
    return workers // 2 if workers > 1 and workers % 2 == 0 else 2 * workers


class _Demo:
    def __init__(self, directory: Path, ranks: int, workers: int, joiner: int, method: Method) -> None:
        self._directory = directory
        self._method = Method.BROADCAST if method is Method.P2P else method
        self._ranks, self._workers = ranks, workers
        self._joiner = joiner
        """Workers of an engine that takes every version from the ranks' memory; 0 for none."""

    def run(self, updates: int, trace: Path | None) -> list[_Outcome]:
        """Starts everything and updates so many times."""
        with ExitStack() as stack:
            log = None if verbose() else stack.enter_context(tempfile.TemporaryFile())
            spec = msgspec.json.encode(self._spec()).decode()
            sizes = [self._workers] * (self._ranks // self._workers) + [self._joiner] * (self._joiner > 0)
            engines = [
                stack.enter_context(
                    ReferenceProcess(spec, size, uds=str(self._directory / f"engine-{index}.sock"), log=log)
                )
                for index, size in enumerate(sizes)
            ]
            endpoints = tuple(engine.endpoint for engine in engines)
            view = stack.enter_context(UpdateView(notes))
            ranks = stack.enter_context(self._start_ranks(self._ranks))
            joining = stack.enter_context(self._start_ranks(self._joiner)) if self._joiner else None
            seeded = endpoints[:-1] if joining else endpoints
            directories = self._make_checkpoints(spec, min(updates, 2))
            outcomes: list[_Outcome] = []
            for number in range(updates):
                source = directories[number % len(directories)]
                traced = trace if number + 1 == updates else None
                job = self._job(source, f"step-{number + 1}", seeded, None if joining else traced)
                outcomes.append(_Outcome(job.version, ranks.run(job, view), _verify(seeded, source)))
                if joining is not None:
                    job = self._joining(job, endpoints[-1], traced)
                    outcomes.append(_Outcome(job.version, joining.run(job, view), _verify(endpoints[-1:], source)))
            return outcomes

    def _start_ranks(self, count: int) -> Ranks:
        environment = {"PS_MAX_BUCKET_SIZE_GB": _BUCKET_GB}
        if self._joiner:
            environment |= {
                "CHECKPOINT_ENGINE_P2P": "1",
                "CHECKPOINT_ENGINE_P2P_HOST": "127.0.0.1",
                "CHECKPOINT_ENGINE_P2P_TRANSPORT": "tcp",
            }
        return Ranks(count, device="cpu", verbose=verbose(), environment=environment)

    def _joining(self, job: Job, endpoint: str, trace: Path | None) -> Job:
        """What the ranks of the engine that joins do: they have the metas and nothing else."""
        return msgspec.structs.replace(
            job,
            directory="",
            engines=Engines("reference", (endpoint,), self._joiner),
            afterwards=Afterwards(trace=path_text(trace)),
            metas=(str(self._metas),),
        )

    @property
    def _metas(self) -> Path:
        return self._directory / "metas.json"

    def _spec(self) -> dict[str, Any]:
        workers = max(self._workers, self._joiner)
        heads = max(8, workers)
        sizes = {"hidden": 512, "layers": 4, "heads": heads, "kv_heads": heads, "head_dim": 64}
        return {**sizes, "intermediate": 128 * workers, "vocab": 8003, "experts": 8}

    def _make_checkpoints(self, spec: str, count: int) -> list[Path]:
        # Torch is imported here while the ranks and the engine import theirs.
        from checkpoint_engine.reference.engine import ModelSpec, make_checkpoint  # noqa: PLC0415

        model = ModelSpec.parse(spec)
        return [
            make_checkpoint(self._directory / f"checkpoint-{seed}", model, seed, shards=2)
            for seed in range(1, count + 1)
        ]

    def _job(self, source: Path, version: str, endpoints: tuple[str, ...], trace: Path | None) -> Job:
        return Job(
            directory=str(source),
            version=version,
            engines=Engines("reference", endpoints, self._workers),
            transfer=Transfer(self._method),
            patience=Patience(_SECONDS, _SECONDS),
            afterwards=Afterwards(path_text(self._metas if self._joiner else None), path_text(trace)),
        )


def _verify(endpoints: Sequence[str], directory: Path) -> int:
    """Compares all workers with a cold start; returns the number of parameters compared."""
    compared = 0
    for endpoint in endpoints:
        client = ReferenceClient(endpoint)
        results = client.collective_rpc("verify", Deadline(_SECONDS), [str(directory)])
        for worker, result in enumerate(results):
            if not result["ok"]:
                wrong = ", ".join(result["different"] + result["moved"])
                raise WorkerError(f"worker {worker} of {endpoint} differs from a cold start of {directory}: {wrong}")
            compared += result["parameters"]
    return compared


def _as_json(outcomes: Sequence[_Outcome], method: Method, seconds: float) -> dict[str, Any]:
    updates: list[dict[str, Any]] = [
        {
            "version": outcome.version,
            "method": outcome.reports[0].update.method,
            "bytes": outcome.reports[0].update.nbytes,
            "seconds": slowest(outcome.reports)["total"],
            "verified_tensors": outcome.verified,
            "stages": slowest(outcome.reports),
        }
        for outcome in outcomes
    ]
    return {
        "ok": True,
        "method": method.value,
        "bytes": sum(update["bytes"] for update in updates),
        "seconds": sum(update["seconds"] for update in updates),
        "verified_tensors": sum(update["verified_tensors"] for update in updates),
        "wall_seconds": seconds,
        "updates": updates,
    }


def _show(outcomes: Sequence[_Outcome], ranks: int, workers: int, seconds: float) -> None:
    instances = ranks // workers
    engines = "one engine" if instances == 1 else f"{instances} engines"
    rank_words, worker_words = _count(ranks, "rank"), _count(workers, "worker")
    output.print(f"\n[bold]{rank_words} updated {engines} of {worker_words} in place[/], all processes on this CPU\n")
    joined = next((o for o in outcomes if o.reports[0].update.method == Method.P2P.value), None)
    if joined:
        output.print(
            f"[bold]An engine of {_count(len(joined.reports), 'worker')} joined[/], out of the ranks' host memory: "
            "neither they nor the first engine take part\n",
            soft_wrap=True,
        )
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("version", "by", "bytes", "time", "GB/s"):
        table.add_column(column, justify="left" if column in ("version", "by") else "right")
    table.add_column("compared byte by byte with a cold start")
    for outcome in outcomes:
        nbytes, total = outcome.reports[0].update.nbytes, slowest(outcome.reports)["total"]
        rate = f"{nbytes / total / 1e9:.2f}"
        verdict = f"[green]✓[/] {_count(outcome.verified, 'parameter')} equal"
        by = outcome.reports[0].update.method
        table.add_row(outcome.version, by, size(nbytes), f"{total:.3f} s", rate, verdict)
    output.print(table)
    output.print("[bold]The last update, stage by stage[/] (stages overlap)\n")
    print_stages(output, outcomes[-1].reports)
    output.print(
        f"[bold green]✓[/] Done in {seconds:.1f} s, most of it for starting processes. "
        "Next, a real vLLM: [bold]checkpoint-engine update --help[/]",
        soft_wrap=True,
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
