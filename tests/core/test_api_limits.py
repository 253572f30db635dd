"""What strangers can do to a served API: crowds, silence, half requests, endless bodies, files that move."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import save_file

from checkpoint_engine import limits
from checkpoint_engine.api import create_app, request_bodies
from checkpoint_engine.api.access import FileAccess
from checkpoint_engine.api.connections import MOST_CONNECTIONS
from checkpoint_engine.api.serving import listen_tcp, server_for
from checkpoint_engine.errors import AccessRefusedError, CheckpointFormatError
from checkpoint_engine.server import metas
from checkpoint_engine.server.metas import read_metas
from checkpoint_engine.server.parameter_server import ParameterServer

TOKEN = "a-token-for-tests-of-limits"
SECONDS = 1.0
"""What is 10 s and 60 s otherwise."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("root")


@pytest.fixture(scope="module")
def address(root: Path) -> Iterator[tuple[str, int]]:
    """A rank behind a port, in this process."""
    with pytest.MonkeyPatch.context() as patch, ParameterServer(rank=0, world_size=1, device="cpu") as ps:
        patch.setattr(limits, "HTTP_HEADERS", SECONDS)
        patch.setattr(limits, "HTTP_BODY", SECONDS)
        with contextlib.closing(listen_tcp("127.0.0.1", 0)) as listener:
            server = server_for(create_app(ps, allowed_roots=[root], token=TOKEN), lambda: None)
            thread = threading.Thread(target=server.run, args=([listener],))
            thread.start()
            yield listener.getsockname()
            server.should_exit = True
            thread.join(10)
            assert not thread.is_alive()


@pytest.fixture
def client(address: tuple[str, int]) -> Iterator[httpx.Client]:
    url = f"http://127.0.0.1:{address[1]}"
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=20) as made:
        yield made


def head(method: str, path: str, *lines: str, token: bool = True) -> bytes:
    shown = [f"Authorization: Bearer {TOKEN}"] if token else []
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: rank", *shown, *lines, "", ""]).encode()


def read_to_the_end(connection: socket.socket) -> tuple[bytes, float]:
    """All that comes until the server hangs up, and how long that took."""
    start, said = time.monotonic(), b""
    connection.settimeout(10 * SECONDS)
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(1 << 16):
            said += part
    return said, time.monotonic() - start


def test_an_idle_crowd_keeps_nobody_out(address: tuple[str, int], client: httpx.Client) -> None:
    assert client.get("/v1/version").status_code == 200
    crowd = [socket.create_connection(address) for _ in range(5 * MOST_CONNECTIONS)]
    try:
        for number, connection in enumerate(crowd):
            with contextlib.suppress(OSError):  # some are gone already
                connection.send(b"GET /v1/version HT" if number % 2 else b"")
        start = time.monotonic()
        for _ in range(3):
            assert httpx.get(f"{client.base_url}/v1/healthz", timeout=5).status_code == 200
        assert time.monotonic() - start < 5
        assert read_to_the_end(crowd[0]) == (b"", pytest.approx(0, abs=SECONDS))  # it made room
    finally:
        for connection in crowd:
            connection.close()


@pytest.mark.parametrize(
    "begun",
    [b"", b"GET /v1/ver", head("GET", "/v1/healthz")[:-2]],
    ids=["nothing", "half a line", "no end of headers"],
)
def test_who_says_nothing_more_is_hung_up_on(address: tuple[str, int], begun: bytes) -> None:
    with socket.create_connection(address) as connection:
        connection.sendall(begun)
        _, seconds = read_to_the_end(connection)
    assert seconds < 3 * SECONDS


def test_a_second_request_has_to_be_whole_in_time_too(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as connection:
        connection.sendall(head("GET", "/v1/healthz"))
        connection.settimeout(10)
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET /v1/")
        said, seconds = read_to_the_end(connection)
    assert (said.partition(b"}")[2], seconds < 3 * SECONDS) == (b"", True)


def test_dripping_headers_do_not_prolong_it(address: tuple[str, int]) -> None:
    start = time.monotonic()
    with socket.create_connection(address) as connection, contextlib.suppress(OSError):
        connection.sendall(head("GET", "/v1/healthz")[:-2])
        while time.monotonic() - start < 10 * SECONDS:
            connection.sendall(b"X-More: 1\r\n")
            time.sleep(SECONDS / 10)
    assert time.monotonic() - start < 3 * SECONDS


def test_half_a_body_is_answered_in_time(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as connection:
        connection.sendall(head("POST", "/v1/metas", "Content-Length: 1000") + b'{"0": ')
        said, seconds = read_to_the_end(connection)
    assert said.startswith(b"HTTP/1.1 408")
    assert b"DeadlineError" in said
    assert seconds < 3 * SECONDS


def test_a_body_that_announces_too_much_is_not_read(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as connection:
        connection.sendall(head("POST", "/v1/metas", f"Content-Length: {600 << 20}"))
        said, seconds = read_to_the_end(connection)
    assert said.startswith(b"HTTP/1.1 413")
    assert b"SettingError" in said
    assert seconds < SECONDS


def test_an_endless_body_is_not_kept(address: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with socket.create_connection(address) as connection, contextlib.suppress(OSError):
        connection.sendall(head("POST", "/v1/metas", "Transfer-Encoding: chunked"))
        piece = b"100000\r\n" + bytes(1 << 20) + b"\r\n"
        for _ in range(600):
            connection.sendall(piece)
        pytest.fail("600 MiB were taken")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * 1024 < 4 * request_bodies.MOST_BYTES


def test_a_body_without_the_token_is_not_read(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as connection:
        connection.sendall(head("POST", "/v1/metas", "Content-Length: 1000000", token=False))
        said, seconds = read_to_the_end(connection)
    assert said.startswith(b"HTTP/1.1 401")
    assert seconds < SECONDS


def test_posted_metas_lead_to_no_other_host(client: httpx.Client) -> None:
    holder = {
        "p2p_store_addr": "10.0.0.1:1234",
        "rdma_device": "",
        "memory_buffer_metas_list": [
            {"metas": [{"name": "x", "dtype": "torch.uint8", "shape": [4], "aligned_size": 4}], "ptr": 8, "size": 4}
        ],
    }
    for elsewhere in ("10.0.0.1:1234", "evil.example:1", "169.254.169.254", "[2001:db8::1]:99"):
        answer = client.post("/v1/metas", json={"0": {**holder, "p2p_store_addr": elsewhere}})
        assert (answer.status_code, answer.json()["error"]) == (403, "AccessRefusedError")
        assert "--allow-peer-host" in answer.json()["message"]
    for here in (None, "127.0.0.1:1234", "[::1]:1234", "localhost:9"):
        answer = client.post("/v1/metas", json={"0": {**holder, "p2p_store_addr": here}})
        assert answer.status_code == 200, answer.text


def test_what_was_opened_is_what_is_checked(root: Path, tmp_path: Path) -> None:
    save_file({"secret": torch.ones(4)}, tmp_path / "x.safetensors")
    inside = root / "changes"
    inside.mkdir()
    save_file({"own": torch.ones(4)}, inside / "x.safetensors")
    access = FileAccess([root])
    checked = access.check(f"{inside}/x.safetensors")
    # What a race would do between the check and the opening, every time:
    inside.rename(root / "aside")
    inside.symlink_to(tmp_path)
    with ParameterServer(rank=0, world_size=1, device="cpu") as ps:
        with pytest.raises(AccessRefusedError, match="outside of the allowed directories"):
            ps.register_checkpoint("a", files=[checked], opener=access.open)
        assert ps.checkpoints == []
        inside.unlink()
        (root / "aside").rename(inside)
        ps.register_checkpoint("a", files=[checked], opener=access.open)


@pytest.mark.parametrize("route", ["checkpoints/a/files", "checkpoints/a/publish"])
def test_files_that_are_asked_for_over_http_are_checked_as_they_are_opened(
    route: str, client: httpx.Client, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"secret": torch.ones(4)}, tmp_path / "x.safetensors")
    monkeypatch.setattr(FileAccess, "check", lambda *_: tmp_path / "x.safetensors")  # as one that was deceived
    answer = client.post(f"/v1/{route}", json={"files": [f"{root}/x.safetensors"]})
    assert (answer.status_code, answer.json()["error"]) == (403, "AccessRefusedError"), answer.text


def test_descriptors_are_not_lost_by_refusals(root: Path, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("x")
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir()))
    with pytest.raises(AccessRefusedError):
        FileAccess([root]).open(tmp_path / "x", os.O_RDONLY)
    assert len(list(descriptors.iterdir())) == before


def test_endless_metas_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metas, "_MOST_BYTES", 1 << 20)
    with pytest.raises(CheckpointFormatError, match="more than 1048576 bytes"):
        read_metas("/dev/zero")
    with contextlib.closing(listen_tcp("127.0.0.1", 0)) as listener:
        threading.Thread(target=send_without_end, args=(listener,), daemon=True).start()
        with pytest.raises(CheckpointFormatError, match="more than 1048576 bytes"):
            read_metas(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=10)


def send_without_end(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    with connection, contextlib.suppress(OSError):
        connection.recv(1 << 16)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
        while True:
            connection.sendall(json.dumps("x" * 65536).encode())
