"""What was damaged or made up is refused by a named error: metas, frames of a link, HTTP bodies, ranks' messages.

Headers of files are fuzzed in `test_safetensors_file.py`. What was found once is kept as an example.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import pytest
import zmq
from fastapi import FastAPI
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from checkpoint_engine import errors
from checkpoint_engine.api import create_app
from checkpoint_engine.catalog import Catalog, Holding, SegmentEntry, TensorEntry
from checkpoint_engine.collective.hub import Hub
from checkpoint_engine.collective.meeting import OnThisHost
from checkpoint_engine.collective.rank_messages import (
    RANK_PROTOCOL,
    Beat,
    Bye,
    Call,
    FromHub,
    Greet,
    RankReply,
    RankRequest,
)
from checkpoint_engine.data_types import catalog_to_metas, metas_to_json
from checkpoint_engine.deadline import Cancel, Deadline
from checkpoint_engine.errors import CheckpointEngineError, LinkError
from checkpoint_engine.link.channel import SenderChannel
from checkpoint_engine.link.messages import Accepted, Failed, Finished, FromReceiver, Hello, Loaded, Released
from checkpoint_engine.planning.buckets import plan_buckets
from checkpoint_engine.server.metas import parse_metas
from checkpoint_engine.server.parameter_server import ParameterServer

pytestmark = pytest.mark.pure

CATALOG = Catalog(
    "step-7",
    tuple(
        Holding(
            rank,
            "node",
            f"cpu:{rank}",
            (SegmentEntry(64, (TensorEntry(f"w{rank}", "bfloat16", (4, 4), 0),), 4096),),
            "10.0.0.1:99",
            control_address=77,
            generation=5,
            content="ab" * 16,
        )
        for rank in range(2)
    ),
)
METAS = (CATALOG.to_json(), metas_to_json(catalog_to_metas(CATALOG)))
SPLINTERS = [*(b'"{}[],:-.0'[i : i + 1] for i in range(10)), b"1e999", b"9" * 40, b"null", b"\xff", b"\\ud800", b"NaN"]


@st.composite
def damaged(draw: st.DrawFn, *seeds: bytes) -> bytes:
    """One of these, with bytes changed, lost, doubled or put in."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        until = min(len(data), at + draw(st.integers(0, 12)))
        data[at:until] = draw(st.sampled_from(SPLINTERS) | st.binary(max_size=4))
    return bytes(data)


def bounded(examples: int) -> settings:
    return settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@example(b"\xbc" + METAS[1])  # UnicodeDecodeError
@example(b"[" * 100_000)  # RecursionError
@example(METAS[0].replace(b"abab", b"ab}b", 1))  # a digest that is no number
@example(METAS[0].replace(b'"control_address": 77', b'"control_address": -1'))
@given(damaged(*METAS))
@bounded(200)
def test_metas(data: bytes) -> None:
    with contextlib.suppress(CheckpointEngineError):
        catalog = parse_metas(data, "metas")
        plan_buckets(catalog, 1 << 20)
        assert catalog.fingerprint()
        assert len(catalog.content) in (0, 32)
        assert catalog.to_json()


FRAMES = [
    msgspec.msgpack.encode(message)
    for message in (
        Hello(1, "token", "cpu:0", "0.1.0", "2.11", 7, ("a",)),
        Accepted((None, ((0, 4),))),
        Loaded(3, 0.5),
        Released(),
        Finished("v", 0.5, {"a": 1, "b": "c"}),
        Failed("load", "WorkerError", "because", dirty=True),
    )
]


@example(b"\x91" * 100_000)
@example(FRAMES[0].replace(b"token", b"tok\xff\xfe"))
@given(damaged(*FRAMES))
@bounded(150)
def test_frames_of_a_link(body: bytes) -> None:
    ours, theirs = socket.socketpair()
    with SenderChannel(ours, FromReceiver, Cancel()) as channel, theirs:
        theirs.sendall(struct.pack("!Q", len(body)) + body)
        try:
            message = channel.receive(Deadline(5.0), "a message")
        except LinkError:
            return
        assert isinstance(message, FromReceiver)


BODIES = [
    json.dumps({"files": {"/nowhere/a.safetensors": ["x"]}, "use_shared_memory_pool": True}).encode(),
    json.dumps({"ranks": [0], "update_url": "http://127.0.0.1:9/x", "timeout": 1, "workers": 1}).encode(),
    METAS[1],
    b'{"reason": "x"}',
]
ROUTES = ["/v1/checkpoints/a/files", "/v1/checkpoints/a/update", "/v1/metas", "/v1/updates/current/abort"]


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastAPI]:
    with ParameterServer(rank=0, world_size=1, device="cpu") as ps:
        yield create_app(ps, allowed_roots=[tmp_path_factory.mktemp("root")], token="t" * 16)


async def post(app: FastAPI, route: str, body: bytes) -> httpx.Response:
    headers = {"Authorization": f"Bearer {'t' * 16}", "Content-Type": "application/json"}
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://rank", headers=headers) as client:
        return await client.post(route, content=body)


@example("/v1/checkpoints/a/files", b'{"files": ["/nowhere/\\ud800"]}')
@example("/v1/checkpoints/a/files", b'{"files": ["/nowhere/\\u0000"]}')
@example("/v1/checkpoints/a/update", b'{"version": "\\ud800", "timeout": 1}')
@example("/v1/checkpoints/a/update", b'{"timeout": 1e-300, "update_url": "http://[::1"}')
@example("/v1/metas", b"[" * 100_000)
@given(st.sampled_from(ROUTES), damaged(*BODIES))
@bounded(150)
def test_bodies_over_http(app: FastAPI, route: str, body: bytes) -> None:
    answer = asyncio.run(post(app, route, body))
    if answer.status_code >= 400:
        said = answer.json()
        assert answer.status_code < 500 or said.get("phase"), (route, body, answer.text)
        assert said["message"]
        assert said["error"] in (*errors.__all__, "UnknownCheckpointError", "HTTPException"), answer.text


MESSAGES = [
    msgspec.msgpack.encode(message)
    for message in (
        Greet(RANK_PROTOCOL, 1, 2, "session", 7, "node"),
        RankRequest(1, Call.GATHER, "a/metas", (0, 1)),
        RankRequest(2, Call.SWAP, "key"),
        RankRequest(3, Call.ADD, "key", amount=1),
        RankRequest(4, Call.POST, "key", frames=(b"x",), seen=(1, 2)),
        Beat((1,)),
        Bye(),
    )
]


@pytest.fixture
def in_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.mark.usefixtures("in_private")
@pytest.mark.thorough
@given(st.lists(st.lists(damaged(*MESSAGES) | st.sampled_from(MESSAGES), max_size=3), min_size=5, max_size=40))
@bounded(8)
def test_messages_of_a_rank_that_has_the_keys(sent: list[list[bytes]]) -> None:
    hub = Hub(OnThisHost("fuzzed", 0, "", 0, b""), 2)
    try:
        for frames in [*sent, [], [b"\x91" * 100_000], [b"\xa4\xff\xff\xff\xff"]]:
            with spoke() as stranger:
                stranger.send_multipart(frames or [b""])
        with spoke() as rank:  # after all that, a rank is served
            rank.send(msgspec.msgpack.encode(Greet(RANK_PROTOCOL, 0, 2, "mine", 8, "node")))
            rank.send(msgspec.msgpack.encode(RankRequest(5, Call.ADD, "count", amount=3)))
            decoder = msgspec.msgpack.Decoder(FromHub)
            while True:
                assert rank.poll(5000), "the hub has died"
                if decoder.decode(rank.recv_multipart()[0]) == RankReply(5, (b"3",)):
                    return
    finally:
        hub.close()


@contextlib.contextmanager
def spoke() -> Iterator[zmq.Socket[bytes]]:
    """A connection to the hub, by whoever can read the secret of this user's ranks."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as made:
        made.linger = 1000
        OnThisHost("fuzzed", 1, "", 0, b"").approach(made)
        yield made
