"""Updates by rank processes, and everything that can go wrong with engines and ranks on the way."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_engine import limits
from checkpoint_engine.catalog import Catalog
from checkpoint_engine.cli import ranks as ranks_module
from checkpoint_engine.cli.messages import Job, Logged, Progressed
from checkpoint_engine.cli.options import Engines, Patience, TensorChoice
from checkpoint_engine.cli.ranks import Ranks
from checkpoint_engine.client.rpc_client import ReferenceClient
from checkpoint_engine.deadline import Deadline
from checkpoint_engine.errors import CheckpointEngineError, RankError, UpdateError
from checkpoint_engine.reference.engine import ModelSpec, make_checkpoint
from checkpoint_engine.reference.process import ReferenceProcess
from tests.commands import command_line, run_command
from tests.core import engines
from tests.ports import free_port
from tests.processes import children_of
from tests.waiting import within

SPEC = ModelSpec(experts=2)
SMALL_BUCKETS = {"PS_MAX_BUCKET_SIZE_GB": str(64 / (1 << 20))}  # 64 KiB: about ten buckets
TP = 2


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints")
    for seed, name in enumerate(("a", "b", "unknown", "missing", "misshapen")):
        make_checkpoint(directory / name, SPEC, seed, shards=2)
    for name in ("unknown", "missing", "misshapen"):
        (directory / name / "model.safetensors.index.json").unlink()
        file = directory / name / "model-00002-of-00002.safetensors"
        tensors = load_file(file)
        if name == "unknown":
            tensors["model.surprise"] = torch.ones(3)
        else:
            norm = tensors.pop("model.norm.weight")
            if name == "misshapen":
                tensors["model.norm.weight"] = torch.cat([norm, norm])
        save_file(tensors, file)
    return directory


@pytest.fixture(scope="module")
def engine() -> Iterator[ReferenceProcess]:
    with ReferenceProcess(SPEC.to_json(), TP) as process:
        yield process


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(TP, device="cpu", environment=SMALL_BUCKETS) as started:
        yield started


def job(engine: ReferenceProcess, directory: Path, *, timeout: float = 30.0) -> Job:
    engines = Engines("reference", (engine.endpoint,), TP)
    return Job(str(directory), directory.name, engines, patience=Patience(timeout, 60.0))


def ignore(event: Progressed | Logged) -> None:
    del event


def assert_holds(engine: ReferenceProcess, directory: Path) -> None:
    """Every worker does, and the engine serves."""
    engines.assert_holds(engine, directory)
    assert not is_paused(ReferenceClient(engine.endpoint))


def is_paused(client: ReferenceClient) -> bool:
    return client.endpoint.call("GET", "/is_paused", Deadline(5))["is_paused"]


def status(engine: ReferenceProcess) -> tuple[set[bool], bool]:
    """Whether the workers are dirty, and whether the engine is paused."""
    client = ReferenceClient(engine.endpoint)
    return {worker.dirty for worker in client.status(Deadline(20))}, is_paused(client)


def test_a_to_b_and_back(engine: ReferenceProcess, ranks: Ranks, checkpoints: Path) -> None:
    seen: list[Progressed] = []

    def listen(event: Progressed | Logged) -> None:
        if isinstance(event, Progressed):
            seen.append(event)

    for name in ("a", "b", "a"):
        reports = ranks.run(job(engine, checkpoints / name), listen)
        assert [report.rank for report in reports] == [0, 1]
        assert reports[0].update.buckets > 5
        assert {report.update.engine["tensors"] for report in reports} == {reports[0].update.tensors}
        assert {"read", "gather", "copy", "broadcast", "load", "total"} <= reports[0].seconds.keys()
        assert_holds(engine, checkpoints / name)
        versions = {worker.version for worker in ReferenceClient(engine.endpoint).status(Deadline(20))}
        assert versions == {name}
    assert "read" in {event.phase for event in seen}


@pytest.mark.parametrize("name", ["unknown", "missing", "misshapen"])
def test_other_tensors_than_the_engine_has_change_nothing(
    name: str, engine: ReferenceProcess, ranks: Ranks, checkpoints: Path
) -> None:
    ranks.run(job(engine, checkpoints / "a"), ignore)
    named = "model.surprise" if name == "unknown" else "model.norm.weight"
    with pytest.raises(UpdateError, match=named) as caught:
        ranks.run(job(engine, checkpoints / name), ignore)
    assert "still holds its old weights" in str(caught.value)
    assert_holds(engine, checkpoints / "a")
    ranks.run(job(engine, checkpoints / "b"), ignore)
    assert_holds(engine, checkpoints / "b")


@pytest.mark.parametrize(
    ("fault", "words", "dirty"),
    [
        ("refuse", "this engine was told to refuse", False),
        ("error500", "with 500: .*this engine was told to answer 500", False),
        ("raise-in-load", "this loader was told to fail", True),
        ("raise-in-finish", "told to fail at the end", True),
    ],
)
def test_engine_that_fails_is_named_and_healed_by_the_next_update(
    fault: str, words: str, dirty: bool, engine: ReferenceProcess, ranks: Ranks, checkpoints: Path
) -> None:
    ranks.run(job(engine, checkpoints / "a"), ignore)
    start = time.monotonic()
    set_fault(engine, fault)
    with pytest.raises(UpdateError, match=words) as caught:
        ranks.run(job(engine, checkpoints / "b"), ignore)
    assert time.monotonic() - start < 15
    if dirty:
        assert "mixture" in str(caught.value)
        dirty_workers, paused = status(engine)
        assert True in dirty_workers
        assert paused
        ranks.run(job(engine, checkpoints / "b"), ignore)
        assert_holds(engine, checkpoints / "b")
    else:
        assert_holds(engine, checkpoints / "a")


@pytest.mark.parametrize("fault", ["hang", "stall-in-load"])
def test_engine_that_never_answers_meets_the_deadline(
    fault: str, engine: ReferenceProcess, ranks: Ranks, checkpoints: Path
) -> None:
    ReferenceClient(engine.endpoint).wait_ready(Deadline(60))
    set_fault(engine, fault)
    start = time.monotonic()
    with pytest.raises(UpdateError, match=r"2 s"):
        ranks.run(job(engine, checkpoints / "b", timeout=2.0), ignore)
    assert time.monotonic() - start < 40
    ranks.run(job(engine, checkpoints / "b"), ignore)
    assert_holds(engine, checkpoints / "b")


def test_engine_that_dies_in_the_middle_is_named(engine: ReferenceProcess, ranks: Ranks, checkpoints: Path) -> None:
    with ReferenceProcess(SPEC.to_json(), TP, fault="die-in-load") as dying:
        ReferenceClient(dying.endpoint).wait_ready(Deadline(60))
        start = time.monotonic()
        with pytest.raises(UpdateError, match=r"engine worker|worker 1") as caught:
            ranks.run(job(dying, checkpoints / "b"), ignore)
        assert time.monotonic() - start < 25
        assert "SIGKILL" in str(caught.value)
    ranks.run(job(engine, checkpoints / "b"), ignore)
    assert_holds(engine, checkpoints / "b")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_is_named_and_ends_the_others(
    victim: int,
    engine: ReferenceProcess,
    ranks: Ranks,
    checkpoints: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    client = ReferenceClient(engine.endpoint)
    client.wait_ready(Deadline(60))
    set_fault(engine, "stall-in-load")  # holds the update in the middle until the rank is dead
    # A killed process cannot remove its socket; it shall lie where pytest cleans up, and its path has to be short.
    sockets = {"TMPDIR": str(tmp_path_factory.mktemp("s"))}
    with Ranks(TP, device="cpu", environment={**SMALL_BUCKETS, **sockets}) as mine:
        pids = mine.pids

        def kill_in_load(event: Progressed | Logged) -> None:
            if isinstance(event, Progressed) and event.phase == "load" and Path(f"/proc/{pids[victim]}").exists():
                os.kill(pids[victim], signal.SIGKILL)

        start = time.monotonic()
        with pytest.raises(RankError, match=rf"rank {victim} \(pid {pids[victim]}\) was killed by SIGKILL"):
            mine.run(job(engine, checkpoints / "a"), kill_in_load)
        assert time.monotonic() - start < 30
    dirty_workers, paused = status(engine)
    assert paused or dirty_workers == {False}
    ranks.run(job(engine, checkpoints / "b"), ignore)
    assert_holds(engine, checkpoints / "b")


def test_an_engine_that_was_only_paused_serves_again_when_its_rank_is_stopped(
    checkpoints: Path, short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What a lost rank leaves shall go; and it is there that the command sees who has paused the engine.
    monkeypatch.setattr(tempfile, "tempdir", str(short_path))
    with (
        ReferenceProcess(SPEC.to_json(), TP, fault="hang") as engine,  # its front passes no update on to the workers
        Ranks(TP, device="cpu", environment={"TMPDIR": str(short_path)}) as mine,
        ThreadPoolExecutor(1) as pool,
    ):
        client = ReferenceClient(engine.endpoint)

        def stop_rank_0() -> float:
            assert within(60, lambda: is_paused(client))
            os.kill(mine.pids[0], signal.SIGSTOP)
            return time.monotonic()

        stopped = pool.submit(stop_rank_0)
        with pytest.raises(RankError) as caught:
            mine.run(job(engine, checkpoints / "b"), ignore)
        assert time.monotonic() - stopped.result() < 20
        said = str(caught.value)
        assert re.search(rf"rank 0 \(pid {mine.pids[0]}\) (was stopped|gave no sign).* in phase '\w+'", said), said
        assert f"{engine.endpoint}: its weights are whole (those of its start), and it serves them" in said
        assert not is_paused(client)


@pytest.mark.long
def test_a_rank_that_hangs_is_named_and_not_the_one_that_waits_for_it(
    engine: ReferenceProcess, checkpoints: Path, short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ReferenceClient(engine.endpoint).wait_ready(Deadline(60))
    monkeypatch.setattr(ranks_module, "_RANK_MODULE", "tests.core.held_rank")
    held = {"PHASE": "introduce", "RANKS": "1", "HANGS": "", "DIRECTORY": str(short_path)}
    environment = {f"HELD_{what}": value for what, value in held.items()}
    environment |= {"TMPDIR": str(short_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    with Ranks(TP, device="cpu", environment=environment) as mine, ThreadPoolExecutor(1) as pool:
        hanging = pool.submit(lambda: within(60, (short_path / "held-1").exists) and time.monotonic())
        with pytest.raises(RankError, match=rf"^rank 1 \(pid {mine.pids[1]}\) .* in phase '\w+'"):
            mine.run(job(engine, checkpoints / "a"), ignore)
        assert hanging.result()
        assert time.monotonic() - hanging.result() < limits.HUNG + 10


def test_of_an_engine_that_nobody_has_asked_yet_it_is_said(
    engine: ReferenceProcess, checkpoints: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    sockets = {"TMPDIR": str(tmp_path_factory.mktemp("s"))}
    with Ranks(TP, device="cpu", environment=sockets) as mine:
        victim = mine.pids[1]
        os.kill(victim, signal.SIGSTOP)  # it shall not come to where the other waits for it

        def kill_in_gather(event: Progressed | Logged) -> None:
            if isinstance(event, Progressed) and event.phase == "gather":
                os.kill(victim, signal.SIGKILL)

        with pytest.raises(RankError, match=f"{engine.endpoint} was asked for nothing yet: it holds what it held"):
            mine.run(job(engine, checkpoints / "a"), kill_in_gather)


def test_who_interrupts_a_job_does_not_wait_again_for_ranks_that_have_reported(
    engine: ReferenceProcess, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(Ranks, "_explain", interrupt)  # called when all have reported
    with Ranks(TP, device="cpu") as mine:
        start = time.monotonic()
        with pytest.raises(CheckpointEngineError, match="nowhere"):
            mine.run(job(engine, checkpoints / "nowhere"), ignore)
    assert time.monotonic() - start < 30


def set_fault(engine: ReferenceProcess, name: str) -> None:
    ReferenceClient(engine.endpoint).endpoint.call("POST", "/fault", Deadline(10), query={"name": name})


# -- the command itself


def test_command_updates_and_saves_the_catalog(engine: ReferenceProcess, checkpoints: Path, tmp_path: Path) -> None:
    metas = tmp_path / "metas.json"
    finished = run_command(
        "update",
        *(checkpoints / "a", "--engine", "reference", "--endpoint", engine.endpoint, "--device", "cpu"),
        *("-tp", TP, "--version", "step-7", "--save-metas", metas, "--json"),
    )
    assert finished.returncode == 0, finished.stderr
    report = json.loads(finished.stdout)
    assert report["ok"] is True
    assert report["version"] == "step-7"
    assert report["seconds"] == report["stages"]["total"] > 0
    assert [worker["tensors"] for worker in report["engine"]] == [report["tensors"]] * TP
    assert_holds(engine, checkpoints / "a")
    catalog = Catalog.load(metas)
    assert catalog.nbytes == report["bytes"]
    assert [holding.rank for holding in catalog.holdings] == [0, 1]


def test_command_needs_but_one_rank_for_a_direct_update(engine: ReferenceProcess, checkpoints: Path) -> None:
    finished = run_command(
        "update",
        *(checkpoints / "b", "--engine", "reference", "--endpoint", engine.endpoint),
        *("-tp", TP, "--method", "direct", "--ranks", 1, "--json"),
    )
    assert finished.returncode == 0, finished.stderr
    report = json.loads(finished.stdout)
    assert report["method"] == "direct"
    assert len(report["engine"]) == 1, "one rank reports for both workers"
    assert_holds(engine, checkpoints / "b")


@pytest.mark.long
def test_command_uses_the_ranks_of_torchrun(engine: ReferenceProcess, checkpoints: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(TP)]
    torchrun += ["--log-dir", str(tmp_path)]  # it leaves one behind
    arguments = ["--engine", "reference", "--endpoint", engine.endpoint, "-tp", str(TP), "--device", "cpu"]
    finished = subprocess.run(
        [*torchrun, "-m", "checkpoint_engine.cli.main", "update", str(checkpoints / "b"), *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("1 engine serves version b") == 1
    assert "load into parameters" in finished.stdout
    assert_holds(engine, checkpoints / "b")


def test_command_refuses_a_wrong_tensor_parallel_size_before_reading(
    engine: ReferenceProcess, checkpoints: Path
) -> None:
    finished = run_command(
        "update",
        *(checkpoints / "a", "--engine", "reference", "--endpoint", engine.endpoint, "--device", "cpu", "--json"),
    )
    assert finished.returncode == 1
    assert "has 2 workers, not 1: pass --tensor-parallel-size 2" in finished.stderr
    assert "reading the files" not in finished.stderr
    assert "starting the ranks" not in finished.stderr
    assert "Traceback" not in finished.stderr
    assert json.loads(finished.stdout)["error"] == "SettingError"


def test_command_gives_up_on_an_engine_that_never_comes(checkpoints: Path) -> None:
    finished = run_command(
        "update",
        *(
            checkpoints / "a",
            "--engine",
            "reference",
            "--endpoint",
            "http://127.0.0.1:9",
            "--device",
            "cpu",
            "--wait",
            2,
        ),
    )
    assert finished.returncode == 1
    assert "DeadlineError: http://127.0.0.1:9 was not ready within 2 s" in finished.stderr
    assert "Connection refused" in finished.stderr
    assert "it is waited for (--wait)" in finished.stderr


def test_names_are_cut_and_tensors_left_out(
    engine: ReferenceProcess, ranks: Ranks, checkpoints: Path, tmp_path: Path
) -> None:
    for file in (checkpoints / "b").glob("*.safetensors"):
        wrapped = {f"module.{name}": tensor for name, tensor in load_file(file).items()}
        if file.name.startswith("model-00001"):
            wrapped["module.rotary.inv_freq"] = torch.ones(3)
        save_file(wrapped, tmp_path / file.name)
    said: list[str] = []

    def listen(event: Progressed | Logged) -> None:
        if isinstance(event, Logged):
            said.append(event.message)

    with pytest.raises(UpdateError):
        ranks.run(job(engine, tmp_path), listen)
    assert "all tensors' names begin with 'module.'; if the engine does not know them: --strip-prefix module." in said
    tensors = TensorChoice(ignore=("rotary.*", "nosuch.*"), strip=("module.",))
    ranks.run(msgspec.structs.replace(job(engine, tmp_path), tensors=tensors), listen)
    assert_holds(engine, checkpoints / "b")
    assert "nosuch.* fits no tensor of the checkpoint" in said


def test_nan_is_found_before_anything_is_sent(
    engine: ReferenceProcess, ranks: Ranks, checkpoints: Path, tmp_path: Path
) -> None:
    ranks.run(job(engine, checkpoints / "a"), ignore)
    for file in (checkpoints / "b").glob("*.safetensors"):
        tensors = load_file(file)
        if "model.norm.weight" in tensors:
            tensors["model.norm.weight"][-1] = torch.nan
        save_file(tensors, tmp_path / file.name)
    where = ("--engine", "reference", "--endpoint", engine.endpoint, "-tp", TP, "--device", "cpu")
    finished = run_command("update", tmp_path, *where, "--reject-nan")
    assert finished.returncode == 1
    assert "WeightsRejectedError: these tensors" in finished.stderr
    assert "hold NaN: model.norm.weight" in finished.stderr
    assert_holds(engine, checkpoints / "a")


def test_command_names_a_truncated_file(engine: ReferenceProcess, checkpoints: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    make_checkpoint(broken, SPEC, seed=1)
    file = broken / "model-00002-of-00002.safetensors"
    os.truncate(file, file.stat().st_size - 100)
    finished = run_command(
        "update", broken, "--engine", "reference", "--endpoint", engine.endpoint, "-tp", TP, "--device", "cpu"
    )
    assert finished.returncode == 1
    assert "CheckpointFormatError" in finished.stderr
    assert file.name in finished.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/nowhere", "--engine", "reference", "--endpoint", "http://h:1"], "CheckpointFormatError: /nowhere"),
        ([".", "--engine", "nosuch", "--endpoint", "http://h:1"], "pip install checkpoint-engine-nosuch"),
        ([".", "--engine", "reference", "--endpoint", "h"], "SettingError: 'h' is no endpoint"),
        ([".", "--engine", "reference", "--endpoint", "http://h:1", "--ranks", "3"], "need 1: each rank feeds"),
        (
            [
                ".",
                "--engine",
                "reference",
                "--endpoint",
                "http://h:1",
                "-tp",
                "4",
                "--ranks",
                "3",
                "--method",
                "direct",
            ],
            "4 workers cannot be shared out evenly",
        ),
    ],
)
def test_command_refuses_at_once_what_cannot_work(
    arguments: list[str], words: str, run_main: Callable[..., tuple[int, str, str]]
) -> None:
    code, _, error = run_main("update", *arguments)
    assert code == 1
    assert words in error.replace("\n", " ")


@pytest.mark.parametrize(
    ("workers", "words"), [(1, "or WORLD_SIZE in the environment"), (2, "started neither RANK nor WORLD_SIZE")]
)
def test_a_command_in_a_pod_that_sets_variables_for_ranks_names_them(
    workers: int,
    words: str,
    checkpoints: Path,
    run_main: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for variable, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(variable, value)
    for variable in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(variable, raising=False)
    where = ("--engine", "reference", "--endpoint", "http://127.0.0.1:9", "--device", "cpu", "--wait", 2)
    code, _, error = run_main("update", str(checkpoints / "a"), *map(str, where), "-tp", str(workers))
    assert code == 1
    assert words in " ".join(error.split())


def test_ranks_end_with_a_command_that_is_killed(engine: ReferenceProcess, checkpoints: Path) -> None:
    arguments = ["--engine", "reference", "--endpoint", engine.endpoint, "-tp", TP, "--device", "cpu", "--json"]
    with subprocess.Popen(
        command_line("update", checkpoints / "a", *arguments, "--keep-serving", 60), stdout=subprocess.PIPE
    ) as running:
        assert running.stdout is not None
        assert json.loads(running.stdout.readline())["ok"] is True
        ranks = children_of(running.pid)
        assert len(ranks) == TP
        running.kill()
    patience = Deadline(10)
    while any(Path(f"/proc/{pid}").exists() for pid in ranks):
        patience.check("the end of the ranks")
        time.sleep(0.05)


@pytest.mark.long
def test_a_directory_to_go_back_to(engine: ReferenceProcess, ranks: Ranks, checkpoints: Path) -> None:
    ranks.run(job(engine, checkpoints / "a"), ignore)
    arguments = ["--engine", "reference", "--endpoint", engine.endpoint, "-tp", TP, "--device", "cpu", "--json"]
    back = ["--rollback-to", checkpoints / "a"]
    set_fault(engine, "raise-in-load")
    failed = run_command("update", checkpoints / "b", *arguments, *back)
    assert failed.returncode == 1
    told = json.loads(failed.stdout)
    assert (told["rolled_back"], told["held"], told["phase"]) == ("a", "old", "load")
    assert "this loader was told to fail" in told["message"]
    assert_holds(engine, checkpoints / "a")
    set_fault(engine, "refuse")  # nothing to go back from
    assert "rolled_back" not in json.loads(run_command("update", checkpoints / "b", *arguments, *back).stdout)


def test_an_engine_that_never_comes_is_named_though_all_ranks_wait_as_long(checkpoints: Path) -> None:
    """Ranks that lead no engine wait for those that do, and must not speak first."""
    nowhere = f"localhost:{free_port()}"
    for engine in ("reference", "auto"):
        arguments = ["--engine", engine, "--endpoint", nowhere, "-tp", 2, "--device", "cpu", "--wait", 2]
        failed = run_command("update", checkpoints / "a", *arguments)
        assert failed.returncode == 1
        *_, last = failed.stderr.strip().splitlines()
        assert last.startswith("DeadlineError: ")
        assert nowhere in last
        assert "refused" in last


def test_ctrl_c_while_an_engine_is_waited_for(checkpoints: Path) -> None:
    arguments = ["--engine", "reference", "--endpoint", f"localhost:{free_port()}", "-tp", TP, "--device", "cpu"]
    with subprocess.Popen(
        command_line("update", checkpoints / "b", *arguments), stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stderr is not None
        for line in running.stderr:
            if "reading" in line:
                running.send_signal(signal.SIGINT)
                break
        assert "interrupted by the user" in " ".join(running.stderr.read().split())
        assert running.wait(30) == 130


@pytest.mark.long
@pytest.mark.parametrize(
    ("number", "word"),
    [
        (signal.SIGINT, "interrupted by the user"),
        (signal.SIGTERM, "ended by SIGTERM"),
        pytest.param(signal.SIGHUP, "ended by SIGHUP", marks=pytest.mark.endurance),
    ],
)
def test_whoever_ends_the_command_gives_the_update_up_in_order(
    engine: ReferenceProcess, ranks: Ranks, checkpoints: Path, number: signal.Signals, word: str
) -> None:
    set_fault(engine, "stall-in-load")
    arguments = ["--engine", "reference", "--endpoint", engine.endpoint, "-tp", TP, "--device", "cpu"]
    with subprocess.Popen(
        command_line("update", checkpoints / "b", *arguments),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stderr is not None
        for line in running.stderr:
            if "sending" in line:
                running.send_signal(number)
                break
        assert word in " ".join(running.stderr.read().split())
        assert running.wait(30) == 130
    dirty_workers, paused = status(engine)
    assert paused == (True in dirty_workers)  # the abort may have come before the first tensor
    ranks.run(job(engine, checkpoints / "a"), ignore)
    assert_holds(engine, checkpoints / "a")
