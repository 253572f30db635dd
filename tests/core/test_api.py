"""The HTTP API: a real `serve` with two ranks on Unix sockets, and a real engine that it updates."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file

from checkpoint_engine.api.access import EngineAccess, FileAccess
from checkpoint_engine.api.serving import listen_unix, read_token
from checkpoint_engine.client.rpc_client import ReferenceClient
from checkpoint_engine.data_types import metas_from_json, metas_to_catalog
from checkpoint_engine.deadline import Deadline
from checkpoint_engine.errors import (
    AccessRefusedError,
    AddressInUseError,
    CheckpointFormatError,
    SettingError,
)
from checkpoint_engine.reference.engine import ModelSpec, make_checkpoint
from checkpoint_engine.reference.process import ReferenceProcess
from tests.core.engines import assert_holds
from tests.core.http_ranks import HttpRanks

SPEC = ModelSpec(experts=2)
SMALL_BUCKETS = {"PS_MAX_BUCKET_SIZE_GB": str(64 / (1 << 20))}
TOKEN = "a-token-for-tests-of-tcp"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints")
    for seed, name in enumerate("ab"):
        make_checkpoint(directory / name, SPEC, seed, shards=2)
    return directory


@pytest.fixture(scope="module")
def engine() -> Iterator[ReferenceProcess]:
    with ReferenceProcess(SPEC.to_json(), 2) as process:
        yield process


@pytest.fixture(scope="module")
def ranks(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpRanks]:
    sockets = tmp_path_factory.mktemp("s") / "private" / "ps-{rank}.sock"
    with HttpRanks(["--allow-root", str(checkpoints), "--uds", str(sockets)], 2, SMALL_BUCKETS) as started:
        yield started


def share(directory: Path, rank: int) -> dict[str, list[str]]:
    return {"files": [str(directory / f"model-{rank + 1:05}-of-00002.safetensors")]}


def register(ranks: HttpRanks, directory: Path, name: str) -> None:
    answers = ranks.on_all(lambda rank, c: c.post(f"/v1/checkpoints/{name}/files", json=share(directory, rank)))
    assert [answer.status_code for answer in answers] == [200, 200], [answer.text for answer in answers]
    gathered = ranks.on_all(lambda _, c: c.post(f"/v1/checkpoints/{name}/gather-metas"))
    assert [answer.status_code for answer in gathered] == [200, 200], [answer.text for answer in gathered]


def unregister(ranks: HttpRanks, name: str) -> None:
    answers = ranks.on_all(lambda _, c: c.delete(f"/v1/checkpoints/{name}"))
    assert [answer.status_code for answer in answers] == [200, 200], [answer.text for answer in answers]


def update(ranks: HttpRanks, name: str, url: str | None, **more: object) -> list[httpx.Response]:
    return ranks.on_all(
        lambda rank, c: c.post(
            f"/v1/checkpoints/{name}/update", json={"update_url": url if rank == 0 else None, "timeout": 30, **more}
        )
    )


def rpc(engine: ReferenceProcess) -> str:
    return f"{engine.endpoint}/collective_rpc"


def set_fault(engine: ReferenceProcess, name: str) -> None:
    ReferenceClient(engine.endpoint).endpoint.call("POST", "/fault", Deadline(10), query={"name": name})


def error_of(answer: httpx.Response) -> str:
    body = answer.json()
    assert body["message"]
    return body["error"]


def test_a_checkpoint_reaches_an_engine_over_http(
    ranks: HttpRanks, engine: ReferenceProcess, checkpoints: Path
) -> None:
    for name in ("a", "b"):
        register(ranks, checkpoints / name, name)
    for name in ("a", "b", "a"):
        for answer in update(ranks, name, rpc(engine), inference_group_ranks=[0, 1], version=f"v-{name}"):
            assert answer.status_code == 200, answer.text
            report = answer.json()
            assert report["version"] == f"v-{name}"
            assert report["method"] == "broadcast"
            assert report["buckets"] > 2
            assert report["seconds"]["total"] > 0
        assert_holds(engine, checkpoints / name)
    how = {"inference_group_ranks": [0, 1], "version": "v-part"}
    for answer in update(ranks, "b", rpc(engine), only=["*.norm.weight"], **how):
        assert answer.status_code == 200, answer.text
        assert (answer.json()["tensors"], answer.json()["engine"]["partial"]) == (1, 1)
    nothing = update(ranks, "b", rpc(engine), only=["nosuch"], **how)
    assert [error_of(answer) for answer in nothing] == ["SettingError"] * 2
    assert all(each.status_code == 200 for each in update(ranks, "a", rpc(engine), **{**how, "version": "v-a"}))
    assert_holds(engine, checkpoints / "a")
    current = ranks.clients[1].get("/v1/updates/current").json()
    assert current["running"] is None
    assert current["last"]["version"] == "v-a"
    assert current["last_error"] is None
    assert current["last"]["trace"] is None
    told = ranks.clients[1].get("/metrics").text
    assert 'checkpoint_engine_update_seconds_count{phase="total"} 5.0' in told
    assert 'checkpoint_engine_weights_version_info{version="v-a"} 1.0' in told
    for rank, answer in enumerate(update(ranks, "b", rpc(engine), inference_group_ranks=[0, 1], trace=True)):
        trace = answer.json()["trace"]
        assert trace["rank"] == rank
        assert {"copy", "broadcast", "load", "phases"} <= {span["lane"] for span in trace["spans"]}
    assert [client.delete("/v1/staging").json() for client in ranks.clients.values()] == [{"nbytes": 0}] * 2

    listed = ranks.clients[0].get("/v1/checkpoints").json()["checkpoints"]
    tensors = {k: v for f in (checkpoints / "a").glob("*.safetensors") for k, v in load_file(f).items()}
    assert [entry["name"] for entry in listed] == ["a", "b"]
    assert listed[0]["gathered"]["tensors"] == len(tensors)
    assert listed[0]["gathered"]["nbytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert listed[0]["gathered"]["fingerprint"] == listed[1]["gathered"]["fingerprint"]

    for name in ("a", "b"):
        unregister(ranks, name)
    assert ranks.clients[0].get("/v1/checkpoints").json() == {"checkpoints": []}


def test_a_step_is_one_request(ranks: HttpRanks, engine: ReferenceProcess, checkpoints: Path) -> None:
    """The same name again takes the next step's files; an error leaves a state in which the next step works."""

    def publish(directory: Path, **more: object) -> list[httpx.Response]:
        def body(rank: int) -> dict[str, object]:
            url = rpc(engine) if rank == 0 else None
            return {**share(directory, rank), "update_url": url, "timeout": 30, **more}

        return ranks.on_all(lambda rank, c: c.post("/v1/checkpoints/loop/publish", json=body(rank)))

    for name in ("a", "b", "a"):
        for answer in publish(checkpoints / name, version=f"step-{name}", inference_group_ranks=[0, 1]):
            assert answer.status_code == 200, answer.text
            assert answer.json()["version"] == f"step-{name}"
        assert_holds(engine, checkpoints / name)
    missing = publish(checkpoints / "none")
    assert [answer.status_code for answer in missing] == [422, 422], [answer.text for answer in missing]
    torn = checkpoints / "torn"
    torn.mkdir()
    for rank in range(2):
        Path(share(torn, rank)["files"][0]).write_bytes(b"no header")
    assert [answer.status_code for answer in publish(torn)] == [422, 422]
    for client in ranks.clients.values():
        told = client.get("/v1/updates/current").json()
        assert told["running"] is None
        assert str(torn) in told["last_error"]["message"]
    assert [answer.status_code for answer in publish(checkpoints / "b")] == [200, 200]
    assert all(client.get("/v1/updates/current").json()["last_error"] is None for client in ranks.clients.values())
    unregister(ranks, "loop")


def test_metas_have_the_known_shape_and_come_back(ranks: HttpRanks, checkpoints: Path) -> None:
    register(ranks, checkpoints / "a", "metas")
    answer = ranks.clients[0].get("/v1/metas")
    assert answer.status_code == 200
    assert set(answer.json()) == {"0", "1"}
    held = answer.json()["1"]
    assert held["p2p_store_addr"] is None
    assert held["rdma_device"] == ""
    assert held["device_uuid"] == "cpu:1"
    buffer = held["memory_buffer_metas_list"][0]
    assert buffer["ptr"] > 0
    assert buffer["size"] == sum(meta["aligned_size"] for meta in buffer["metas"])
    on_disk = load_file(checkpoints / "a" / "model-00002-of-00002.safetensors")
    for meta in buffer["metas"]:
        assert meta["dtype"] == str(on_disk[meta["name"]].dtype)
        assert meta["shape"] == list(on_disk[meta["name"]].shape)
    # What we parse ourselves is what the other server would get.
    catalog = metas_to_catalog(metas_from_json(answer.content), "metas")
    assert catalog.nbytes == sum(
        t.nbytes for f in (checkpoints / "a").glob("*.safetensors") for t in load_file(f).values()
    )
    loaded = ranks.clients[0].post("/v1/metas", json=answer.json())
    assert (loaded.status_code, loaded.json()) == (200, {"ranks": 2})
    broken = answer.json()
    broken["0"]["memory_buffer_metas_list"][0]["metas"][0]["dtype"] = "torch.float7"
    refused = ranks.clients[0].post("/v1/metas", json=broken)
    assert refused.status_code == 422
    assert "float7" in refused.json()["message"]
    unregister(ranks, "metas")


def test_progress_is_told_while_an_update_runs_and_it_can_be_aborted(
    ranks: HttpRanks, engine: ReferenceProcess, checkpoints: Path
) -> None:
    register(ranks, checkpoints / "a", "slow")
    set_fault(engine, "hang")
    with ThreadPoolExecutor(1) as pool:
        started = pool.submit(update, ranks, "slow", rpc(engine))
        running = wait_until_running(ranks.clients[0])
        assert running["name"] == "slow"
        assert running["nbytes"] > 0
        assert running["seconds"] < 30

        busy = ranks.clients[0].delete("/v1/checkpoints/slow")
        assert (busy.status_code, error_of(busy)) == (409, "CheckpointStateError")
        second = ranks.clients[0].post("/v1/checkpoints/slow/update", json={})
        assert (second.status_code, error_of(second)) == (409, "CheckpointStateError")

        aborted = ranks.clients[0].post("/v1/updates/current/abort", json={"reason": "a newer one is there"})
        assert aborted.status_code == 202
        first, other = started.result(20)
    assert (first.status_code, error_of(first)) == (409, "UpdateAbortedError")
    assert "a newer one is there" in first.json()["message"]
    assert other.status_code >= 400
    assert "a newer one is there" in other.json()["message"]
    assert ranks.clients[0].get("/v1/updates/current").json()["last_error"]["error"] == "UpdateError"

    for answer in update(ranks, "slow", rpc(engine)):
        assert answer.status_code == 200, answer.text
    assert_holds(engine, checkpoints / "a")
    unregister(ranks, "slow")


def wait_until_running(client: httpx.Client) -> dict[str, Any]:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        running = client.get("/v1/updates/current").json()["running"]
        if running is not None and running["phase"] == "connect":
            return running
        time.sleep(0.02)
    raise AssertionError("the update did not start")


def test_engine_failures_are_502_and_deadlines_504(
    ranks: HttpRanks, engine: ReferenceProcess, checkpoints: Path
) -> None:
    register(ranks, checkpoints / "b", "fails")
    set_fault(engine, "error500")
    answers = update(ranks, "fails", rpc(engine))
    assert answers[0].status_code == 502, answers[0].text
    assert answers[0].json()["error"] == "UpdateError"
    assert answers[0].json()["rank"] == 0
    assert "500" in answers[0].json()["message"]
    assert answers[1].status_code == 502
    unreachable = update(ranks, "fails", "http://127.0.0.1:9/collective_rpc")
    assert unreachable[0].status_code == 502
    started = time.monotonic()
    late = update(ranks, "fails", None, timeout=1)
    assert [answer.status_code for answer in late] == [504, 504] or 504 in {answer.status_code for answer in late}
    assert time.monotonic() - started < 20
    for answer in update(ranks, "fails", rpc(engine)):
        assert answer.status_code == 200, answer.text
    assert_holds(engine, checkpoints / "b")
    unregister(ranks, "fails")


@pytest.mark.long
def test_ranks_meet_again_after_calls_that_not_all_of_them_got(
    ranks: HttpRanks, engine: ReferenceProcess, checkpoints: Path
) -> None:
    register(ranks, checkpoints / "a", "again")
    alone = ranks.clients[0].post("/v1/checkpoints/again/gather-metas", params={"timeout": 0.5})
    assert (alone.status_code, error_of(alone)) == (504, "DeadlineError")
    assert "rank 1 did not come" in alone.json()["message"]
    alone = ranks.clients[1].post("/v1/checkpoints/again/update", json={"timeout": 0.5})
    assert (alone.status_code, error_of(alone)) == (504, "UpdateError")
    assert "rank 0 did not come" in alone.json()["message"]
    gathered = ranks.on_all(lambda _, c: c.post("/v1/checkpoints/again/gather-metas"))
    assert [answer.status_code for answer in gathered] == [200, 200]
    for answer in update(ranks, "again", rpc(engine)):
        assert answer.status_code == 200, answer.text
    assert_holds(engine, checkpoints / "a")
    unregister(ranks, "again")


def test_every_wrong_call_has_a_named_error(ranks: HttpRanks, checkpoints: Path, tmp_path: Path) -> None:
    client = ranks.clients[0]
    truncated = checkpoints / "truncated.safetensors"
    truncated.write_bytes((checkpoints / "a" / "model-00001-of-00002.safetensors").read_bytes()[:-1])
    link = checkpoints / "link.safetensors"
    link.symlink_to("/etc/hostname")
    cases: list[tuple[str, str, object, int, str]] = [
        ("POST", "/v1/checkpoints/x/files", {"files": ["/etc/hostname"]}, 403, "AccessRefusedError"),
        ("POST", "/v1/checkpoints/x/files", {"files": ["/etc/nothing-there"]}, 403, "AccessRefusedError"),
        ("POST", "/v1/checkpoints/x/files", {"files": [f"{checkpoints}/../../x"]}, 403, "AccessRefusedError"),
        ("POST", "/v1/checkpoints/x/files", {"files": [str(link)]}, 403, "AccessRefusedError"),
        ("POST", "/v1/checkpoints/x/files", {"files": ["a/model.safetensors"]}, 422, "SettingError"),
        ("POST", "/v1/checkpoints/x/files", {"files": [f"{checkpoints}/no.safetensors"]}, 422, "CheckpointFormatError"),
        ("POST", "/v1/checkpoints/x/files", {"files": [str(checkpoints)]}, 422, "CheckpointFormatError"),
        ("POST", "/v1/checkpoints/x/files", {"files": [str(truncated)]}, 422, "CheckpointFormatError"),
        ("POST", "/v1/checkpoints/x/files", {"fils": []}, 422, "SettingError"),
        ("POST", "/v1/checkpoints/x/files", {"files": 3}, 422, "SettingError"),
        ("POST", "/v1/checkpoints/x/update", {}, 404, "UnknownCheckpointError"),
        ("POST", "/v1/checkpoints/x/update", {"update_url": "http://example.org/"}, 403, "AccessRefusedError"),
        ("POST", "/v1/checkpoints/x/update", {"update_url": "file:///etc/passwd"}, 422, "SettingError"),
        ("POST", "/v1/checkpoints/x/update", {"update_url": "http://x/", "uds": "/dev/null"}, 422, "SettingError"),
        ("POST", "/v1/checkpoints/x/update", {"timeout": 0}, 422, "SettingError"),
        ("POST", "/v1/checkpoints/x/update", {"inference_group_ranks": [2]}, 422, "SettingError"),
        ("POST", "/v1/checkpoints/x/update", {"inference_group_ranks": [0, 0]}, 422, "SettingError"),
        ("POST", "/v1/checkpoints/x/update", {"ranks": [-1]}, 422, "SettingError"),
        ("POST", "/v1/updates/current/abort", None, 409, "CheckpointStateError"),
        ("GET", "/v1/nothing", None, 404, "HTTPException"),
        ("PUT", "/v1/metas", None, 405, "HTTPException"),
    ]
    for method, path, body, status, error in cases:
        answer = client.request(method, path, json=body)
        assert (answer.status_code, error_of(answer)) == (status, error), (method, path, body, answer.text)
    assert client.get("/v1/checkpoints").json() == {"checkpoints": []}


def test_registering_a_name_twice_is_409_and_the_first_stays(ranks: HttpRanks, checkpoints: Path) -> None:
    register(ranks, checkpoints / "a", "twice")
    again = ranks.clients[0].post("/v1/checkpoints/twice/files", json=share(checkpoints / "b", 0))
    assert (again.status_code, error_of(again)) == (409, "CheckpointStateError")
    assert [entry["name"] for entry in ranks.clients[0].get("/v1/checkpoints").json()["checkpoints"]] == ["twice"]
    unregister(ranks, "twice")
    unregister(ranks, "twice")  # which is gone: scripts clean up whatever came of registering


def test_files_can_be_cut_by_tensor_names(ranks: HttpRanks, checkpoints: Path) -> None:
    file = checkpoints / "a" / "model-00001-of-00002.safetensors"
    names = sorted(load_file(file))
    body = {"files": {str(file): names[:2]}}
    assert ranks.clients[0].post("/v1/checkpoints/cut/files", json=body).status_code == 200
    gathered = ranks.on_all(lambda _, c: c.post("/v1/checkpoints/cut/gather-metas"))
    assert [answer.json()["tensors"] for answer in gathered] == [2, 2]
    assert ranks.clients[0].delete("/v1/checkpoints/cut").status_code == 200


def test_a_drafts_files_are_for_the_draft_model_alone(ranks: HttpRanks, checkpoints: Path) -> None:
    """Its tensors mostly have the names of the served model's."""
    served, draft = share(checkpoints / "a", 0)["files"], share(checkpoints / "b", 0)["files"]
    path = "/v1/checkpoints/both/files"
    assert ranks.clients[0].post(path, json={"files": served, "draft": served}).status_code == 422
    assert ranks.clients[0].post(path, json={"files": served, "draft": draft}).status_code == 200
    ranks.on_all(lambda _, c: c.post("/v1/checkpoints/both/gather-metas"))
    metas = ranks.clients[0].get("/v1/metas").text
    names = list(load_file(served[0]))
    assert all(f'"{name}"' in metas and f'"draft_model.{name}"' in metas for name in names)
    assert ranks.clients[0].delete("/v1/checkpoints/both").status_code == 200


@pytest.mark.long
def test_sockets_are_private_and_go_with_the_server(checkpoints: Path, tmp_path: Path) -> None:
    path = tmp_path / "made" / "ps.sock"
    arguments = ["--allow-root", str(checkpoints), "--uds", str(path)]
    with HttpRanks(arguments, 1) as server:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        version = server.clients[0].get("/v1/version").json()
        assert (version["rank"], version["world_size"], version["device"]) == (0, 1, "cpu:0")
        with pytest.raises(RuntimeError, match="AddressInUseError: another process listens on"):
            HttpRanks(arguments, 1)
        assert server.clients[0].get("/v1/healthz").json() == {"status": "ok"}
        assert server.stop() == 0
        assert not path.exists()


def test_a_dead_servers_socket_is_replaced_but_nothing_else_is(tmp_path: Path) -> None:
    path = tmp_path / "ps.sock"
    listen_unix(path).close()
    assert path.is_socket()
    listen_unix(path).close()
    file = tmp_path / "file"
    file.write_text("precious")
    with pytest.raises(AddressInUseError, match="is not a socket"):
        listen_unix(file)
    assert file.read_text() == "precious"
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(AccessRefusedError, match="other users"):
        listen_unix(shared / "ps.sock")
    with pytest.raises(SettingError, match="longer than"):
        listen_unix(tmp_path / ("x" * 120))


def test_tcp_needs_the_token(checkpoints: Path, engine: ReferenceProcess) -> None:
    arguments = ["--allow-root", str(checkpoints), "--port", "0"]
    with HttpRanks(arguments, 1, {"CHECKPOINT_ENGINE_TOKEN": TOKEN}) as server:
        client = server.clients[0]
        assert client.get("/v1/healthz").status_code == 200
        for headers in (
            {},
            {"Authorization": TOKEN},
            {"Authorization": f"Bearer {TOKEN}x"},
            {"Authorization": "Bearer"},
        ):
            for path in ("/v1/version", "/v1/metas", "/openapi.json", "/v1/healthz/", "/v1/checkpoints"):
                answer = client.get(path, headers=headers)
                assert (answer.status_code, error_of(answer)) == (401, "AccessRefusedError"), (headers, path)
                assert answer.headers["www-authenticate"] == "Bearer"
        client.headers["Authorization"] = f"Bearer {TOKEN}"
        assert client.get("/v1/version").status_code == 200
        described = client.get("/openapi.json").json()
        assert described["paths"]["/v1/metas"]["get"]["security"]
        socket = client.post("/v1/checkpoints/x/update", json={"update_url": "http://x/", "uds": "/run/any.sock"})
        assert (socket.status_code, error_of(socket)) == (403, "AccessRefusedError")
        body = {"files": [str(file) for file in sorted((checkpoints / "a").glob("*.safetensors"))]}
        assert client.post("/v1/checkpoints/a/files", json=body).status_code == 200
        assert client.post("/v1/checkpoints/a/gather-metas").status_code == 200
        # One rank cannot feed an engine of two workers.
        wrong = client.post("/v1/checkpoints/a/update", json={"update_url": rpc(engine), "timeout": 10})
        assert wrong.status_code == 502, wrong.text
        assert "2" in wrong.json()["message"]


def test_one_rank_feeds_all_workers_of_a_host(checkpoints: Path, engine: ReferenceProcess, tmp_path: Path) -> None:
    arguments = ["--allow-root", str(checkpoints), "--ranks", "1", "--uds", str(tmp_path / "ps.sock")]
    with HttpRanks(arguments, 1, SMALL_BUCKETS) as server:
        for name in ("a", "b"):
            body = {"files": [str(file) for file in sorted((checkpoints / name).glob("*.safetensors"))]}
            assert server.clients[0].post(f"/v1/checkpoints/{name}/files", json=body).status_code == 200
            assert server.clients[0].post(f"/v1/checkpoints/{name}/gather-metas").status_code == 200
        for name, group in (("a", []), ("b", [0]), ("a", [])):
            (answer,) = update(
                server, name, rpc(engine), method="direct", workers=2, inference_group_ranks=group, version=name
            )
            assert answer.status_code == 200, answer.text
            assert answer.json()["method"] == "direct"
            assert_holds(engine, checkpoints / name)
        for method, workers, message in (
            ("direct", 0, "workers: Input should be greater"),
            ("broadcast", 2, "only in a direct update"),
            ("auto", 2, "only in a direct update"),
        ):
            (answer,) = update(server, "a", rpc(engine), method=method, workers=workers)
            assert (answer.status_code, error_of(answer)) == (422, "SettingError")
            assert message in answer.json()["message"]


def test_serve_refuses_what_cannot_work(checkpoints: Path, tmp_path: Path) -> None:
    root = ["--allow-root", str(checkpoints)]
    for arguments, ranks, message in (
        (["--allow-root", str(tmp_path / "none")], 1, "is not a directory"),
        ([*root, "--uds", "/tmp/x", "--port", "1"], 1, "exclude each other"),
        ([*root, "--uds", str(tmp_path / "same.sock")], 2, "put {rank} into it"),
    ):
        with pytest.raises(RuntimeError) as caught:
            HttpRanks(arguments, ranks)
        assert "SettingError" in str(caught.value)
        assert message in str(caught.value).replace("\n", " ")


def test_a_rank_that_cannot_start_ends_all(checkpoints: Path, tmp_path: Path) -> None:
    taken = listen_unix(tmp_path / "ps-1.sock")
    try:
        with pytest.raises(RuntimeError, match="AddressInUseError"):
            HttpRanks(["--allow-root", str(checkpoints), "--uds", str(tmp_path / "ps-{rank}.sock")], 2)
    finally:
        taken.close()
    assert not (tmp_path / "ps-0.sock").exists()


def test_openapi_teaches(ranks: HttpRanks) -> None:
    described = ranks.clients[0].get("/openapi.json").json()
    assert "gather-metas" in described["info"]["description"]
    routes = {
        (method.upper(), path): operation
        for path, operations in described["paths"].items()
        for method, operation in operations.items()
    }
    assert set(routes) == {
        ("GET", "/v1/checkpoints"),
        ("POST", "/v1/checkpoints/{name}/files"),
        ("DELETE", "/v1/checkpoints/{name}"),
        ("POST", "/v1/checkpoints/{name}/gather-metas"),
        ("POST", "/v1/checkpoints/{name}/update"),
        ("POST", "/v1/checkpoints/{name}/publish"),
        ("GET", "/v1/updates/current"),
        ("DELETE", "/v1/staging"),
        ("POST", "/v1/updates/current/abort"),
        ("GET", "/metrics"),
        ("GET", "/v1/metas"),
        ("GET", "/v1/metas/catalog"),
        ("POST", "/v1/metas"),
        ("GET", "/v1/healthz"),
        ("GET", "/v1/version"),
    }
    for route, operation in routes.items():
        assert operation["summary"], route
        assert len(operation["description"]) > 20, route
    for body in ("FilesBody", "UpdateBody", "PublishBody"):
        assert described["components"]["schemas"][body]["examples"]
        for field, schema in described["components"]["schemas"][body]["properties"].items():
            assert schema.get("description"), (body, field)


def test_files_only_from_allowed_roots(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "root-of-others"
    for directory in (root, outside):
        directory.mkdir()
        (directory / "x").write_text("x")
    (root / "out").symlink_to(outside)
    (root / "in").symlink_to("x")
    os.mkfifo(root / "fifo")
    access = FileAccess([root])
    assert access.check(f"{root}/x") == root / "x"
    assert access.check(f"{root}/in") == root / "x"
    assert access.check(f"{root}/../root/x") == root / "x"
    for path in (f"{root}/../root-of-others/x", f"{root}/out/x", f"{outside}/x", "/", f"{root}/out/none"):
        with pytest.raises(AccessRefusedError):
            access.check(path)
    for path in ("x", "", f"{root}/x\0y"):
        with pytest.raises(SettingError):
            access.check(path)
    for path in (str(root), f"{root}/fifo", f"{root}/none"):
        with pytest.raises(CheckpointFormatError):
            access.check(path)
    with pytest.raises(AccessRefusedError):
        FileAccess([]).check(f"{root}/x")


def test_engines_only_at_allowed_addresses(tmp_path: Path) -> None:
    access = EngineAccess(["gpu-7.example"], [tmp_path])
    for url, expected in (
        ("http://localhost:8000/collective_rpc", "http://localhost:8000/collective_rpc"),
        ("http://127.0.0.1:1/x?y=1#z", "http://127.0.0.1:1/x"),
        ("http://[::1]:8000/x", "http://[::1]:8000/x"),
        ("http://user:secret@127.0.0.1/x", "http://127.0.0.1/x"),
        ("http://example.org\\@127.0.0.1/", "http://127.0.0.1/"),
        ("https://GPU-7.example/x", "https://gpu-7.example/x"),
    ):
        assert access.check_url(url) == expected
    for url in (
        "http://127.0.0.1@example.org/",
        "http://127.0.0.1.example.org/",
        "http://example.org#@127.0.0.1/",
        "http://0.0.0.0/",
        "http://169.254.169.254/latest/meta-data",
        "http://[::ffff:10.0.0.1]/",
        "http://2130706433/",
        "http://gpu-7.example.org/",
    ):
        with pytest.raises((AccessRefusedError, SettingError)):
            access.check_url(url)
    for url in ("", "localhost:8000", "ftp://127.0.0.1/", "http:///x", "unix:/x"):
        with pytest.raises(SettingError):
            access.check_url(url)
    with pytest.raises(AccessRefusedError):
        access.check_socket("/run/docker.sock")
    with pytest.raises(SettingError):
        access.check_socket(str(tmp_path / "none.sock"))
    listen_unix(tmp_path / "engine.sock").close()
    assert access.check_socket(str(tmp_path / "engine.sock")) == str(tmp_path / "engine.sock")


def test_a_token_is_needed_and_its_file_must_be_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CHECKPOINT_ENGINE_TOKEN", raising=False)
    with pytest.raises(SettingError, match="a TCP port needs a token"):
        read_token(None)
    monkeypatch.setenv("CHECKPOINT_ENGINE_TOKEN", "short")
    with pytest.raises(SettingError, match="the token in CHECKPOINT_ENGINE_TOKEN needs at least"):
        read_token(None)
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    file.chmod(0o644)
    with pytest.raises(AccessRefusedError, match="chmod 600"):
        read_token(file)
    file.chmod(0o600)
    assert read_token(file) == TOKEN
    with pytest.raises(SettingError, match="cannot read"):
        read_token(tmp_path / "none")


def test_without_the_extra_the_install_command_is_told() -> None:
    script = (
        "import sys; sys.modules['fastapi'] = None\n"
        "from checkpoint_engine.api import request_inference_to_update\n"
        "from checkpoint_engine.api import create_app\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "MissingDependencyError" in done.stderr.splitlines()[-1]
    assert "pip install 'checkpoint-engine-core[api]'" in done.stderr.splitlines()[-1]
