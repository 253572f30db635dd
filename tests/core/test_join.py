"""`checkpoint-engine join` as people run it, and the metas that it reads."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest

from checkpoint_engine.catalog import Catalog, Holding, SegmentEntry, TensorEntry
from checkpoint_engine.cli.seeds import Seeds
from checkpoint_engine.errors import AccessRefusedError, CheckpointFormatError, PeerError, SettingError, UpdateError
from checkpoint_engine.reference.engine import ModelSpec, make_checkpoint
from checkpoint_engine.reference.process import ReferenceProcess
from checkpoint_engine.server.metas import read_metas
from tests.commands import command_line, run
from tests.core.engines import assert_holds
from tests.core.http_ranks import HttpRanks
from tests.core.p2p_help import needs_mooncake

SPEC = ModelSpec(experts=2)
TOKEN = "a-token-of-sixteen-or-more"
ENVIRONMENT = {
    "PS_MAX_BUCKET_SIZE_GB": str(64 / (1 << 20)),
    "CHECKPOINT_ENGINE_P2P_HOST": "127.0.0.1",
    "CHECKPOINT_ENGINE_P2P_TRANSPORT": "tcp",
    "CHECKPOINT_ENGINE_TOKEN": TOKEN,
}
HOLDING = Holding(0, "h", "cpu:0", (SegmentEntry(4096, (TensorEntry("a", "int8", (9,), 0),), 1 << 40),))
CATALOG = Catalog("step-1", (HOLDING,))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "step-1", SPEC, 1, shards=2)


@pytest.fixture(scope="module")
def joining() -> Iterator[ReferenceProcess]:
    with ReferenceProcess(SPEC.to_json(), 1) as process:
        yield process


def join_command(*arguments: str) -> list[str]:
    return command_line("join", "--engine", "reference", "--device", "cpu", "--json", *arguments)


def run_join(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run(join_command(*arguments), environment=ENVIRONMENT)


@contextlib.contextmanager
def running(*arguments: str) -> Iterator[dict[str, Any]]:
    """A command that keeps its ranks; gives its report."""
    options = ("--engine", "reference", "--device", "cpu", "--json", "--keep-serving", "300")
    process = subprocess.Popen(
        command_line(*arguments, *options),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | ENVIRONMENT,
    )
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)


@pytest.mark.long
@needs_mooncake
def test_a_joiner_is_the_seed_of_the_next(joining: ReferenceProcess, checkpoint: Path, tmp_path: Path) -> None:
    """Files reach an engine; one of another size takes them from its ranks, and the next from that one's ranks."""
    with ReferenceProcess(SPEC.to_json(), 2) as second, contextlib.ExitStack() as seeds:
        one, two = tmp_path / "1.json", tmp_path / "2.json"
        sharing = ["--endpoint", joining.endpoint, "--share", "--save-metas", str(one)]
        report = seeds.enter_context(running("update", str(checkpoint), *sharing))
        assert report["method"] == "broadcast"
        joined = ["-tp", "2", "--endpoint", second.endpoint, "--save-metas", str(two)]
        with running("join", "--metas", str(one), *joined) as report:
            assert report["method"] == "p2p"
            assert report["version"] == "step-1"
            seeds.close()
            assert_holds(second, checkpoint)
            finished = run_join("--metas", str(one), "--metas", str(two), "--endpoint", joining.endpoint)
            assert finished.returncode == 0, finished.stderr
            assert_holds(joining, checkpoint)


@pytest.mark.long
@needs_mooncake
def test_joins_over_http_and_tries_again_until_a_killed_seed_is_back(
    joining: ReferenceProcess, checkpoint: Path, tmp_path: Path
) -> None:
    file = tmp_path / "metas.json"
    with serving(checkpoint, file) as seed:
        with pytest.raises(AccessRefusedError, match="token"):
            read_metas(seed.addresses[0], token="not-the-token-of-it")
        finished = run_join("--metas", seed.addresses[0], "--endpoint", joining.endpoint)
        assert finished.returncode == 0, finished.stderr
        assert_holds(joining, checkpoint)
        os.kill(seed.pid, signal.SIGKILL)
    with subprocess.Popen(
        join_command("--metas", str(file), "--endpoint", joining.endpoint, "--wait", "60"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | ENVIRONMENT,
    ) as trying:
        assert trying.stderr is not None
        said = list(itertools.takewhile(lambda line: "trying again" not in line, trying.stderr))
        assert "nobody listens there" in "".join(said)
        with serving(checkpoint, file):
            shown, told = trying.communicate(timeout=60)
    assert trying.returncode == 0, told
    assert json.loads(shown)["method"] == "p2p"
    assert_holds(joining, checkpoint)


@contextlib.contextmanager
def serving(checkpoint: Path, metas: Path) -> Iterator[HttpRanks]:
    """A seed behind HTTP, which has written its metas to a file."""
    arguments = ["--allow-root", str(checkpoint), "--port", "0", "--share"]
    with HttpRanks(arguments, 1, ENVIRONMENT) as seed:
        client = seed.clients[0]
        client.headers["Authorization"] = f"Bearer {TOKEN}"
        files = [str(file) for file in sorted(checkpoint.glob("*.safetensors"))]
        assert client.get("/v1/metas/catalog").status_code == 409
        assert client.post("/v1/checkpoints/step-1/files", json={"files": files}).status_code == 200
        assert client.post("/v1/checkpoints/step-1/gather-metas").status_code == 200
        metas.write_bytes(client.get("/v1/metas").content)
        yield seed


def test_waits_for_seeds_only_where_that_helps(tmp_path: Path) -> None:
    file, gone = tmp_path / "metas.json", tmp_path / "gone.json"
    CATALOG.save(file)
    CATALOG.save(gone)
    seeds = Seeds([str(file), str(gone)], None, wait=2.0)
    assert seeds.catalogs == [CATALOG] * 2
    gone.unlink()
    seeds.wait_after(UpdateError("cannot be read", rank=0, phase="load", kind="PeerError"))
    assert seeds.catalogs == [CATALOG]
    with pytest.raises(UpdateError, match="not the seeds' fault"):
        seeds.wait_after(UpdateError("not the seeds' fault", rank=0, phase="load", kind="WorkerError"))
    moved = UpdateError("it no longer holds that", rank=0, phase="load", kind="PeerMovedError")
    started = time.monotonic()
    with pytest.raises(UpdateError, match=r"no longer holds that; no other seed came, .* within 3 s.* as they were"):
        Seeds([str(file)], None, wait=3.0).wait_after(moved)
    assert time.monotonic() - started < 3
    seeds = Seeds([str(file)], None, wait=3.0)
    newer = Catalog("step-2", CATALOG.holdings)
    newer.save(file)
    seeds.wait_after(moved)
    assert seeds.catalogs == [newer]


def test_metas_are_read_from_files_and_urls(tmp_path: Path) -> None:
    CATALOG.save(tmp_path / "metas.json")
    assert read_metas(str(tmp_path / "metas.json")) == CATALOG
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200 if "metas" in self.path else 409)
            self.end_headers()
            self.wfile.write(CATALOG.to_json())

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        assert read_metas(address) == CATALOG
        assert read_metas(f"{address}/my/metas.json") == CATALOG
        with pytest.raises(PeerError, match="answered 409"):
            read_metas(f"{address}/other")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert asked == ["/v1/metas/catalog", "/my/metas.json", "/other"]
    with pytest.raises(PeerError, match="cannot be reached"):
        read_metas(address)
    with pytest.raises(SettingError, match="ftp://"):
        read_metas("ftp://x/y")
    with pytest.raises(CheckpointFormatError, match=r"nothing\.json"):
        read_metas(str(tmp_path / "nothing.json"))


def test_metas_that_were_tampered_with_are_refused(tmp_path: Path) -> None:
    saved = json.loads(CATALOG.to_json())
    assert saved["fingerprint"] == CATALOG.fingerprint()
    saved["holdings"][0]["segments"][0]["tensors"][0][2] = [8]
    (tmp_path / "metas.json").write_text(json.dumps(saved))
    with pytest.raises(CheckpointFormatError, match="fingerprint"):
        read_metas(str(tmp_path / "metas.json"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--metas", "{}/none.json"], "cannot read the metas"),
        (["--metas", "{}/metas.json", "--save-metas", "x.json"], "--keep-serving"),
        (["--metas", "{}/metas.json", "--metas", "{}/other.json"], "other tensors"),
        (["--metas", "{}/empty.json"], "nobody holds anything"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    run_main: Callable[..., tuple[int, str, str]],
) -> None:
    CATALOG.save(tmp_path / "metas.json")
    other = msgspec.structs.replace(HOLDING, segments=(SegmentEntry(8, (TensorEntry("b", "int8", (8,), 0),)),))
    Catalog("step-1", (other,)).save(tmp_path / "other.json")
    Catalog("step-1", ()).save(tmp_path / "empty.json")
    given = [argument.replace("{}", str(tmp_path)) for argument in arguments]
    command = ["join", "--engine", "reference", "--endpoint", "http://127.0.0.1:9", *given]
    code, _, error = run_main(*command)
    assert code == 1
    assert words in error
