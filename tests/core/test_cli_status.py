"""`checkpoint-engine status`: what engines hold, of several at once."""

from __future__ import annotations

import json
import socket
import time
from contextlib import ExitStack

import pytest
from typer.testing import CliRunner

from checkpoint_engine.cli.main import app
from checkpoint_engine.client.endpoint import Endpoint
from checkpoint_engine.deadline import Deadline
from checkpoint_engine.errors import EngineRequestError
from checkpoint_engine.reference.engine import ModelSpec
from checkpoint_engine.reference.process import ReferenceProcess
from tests.ports import free_port


def test_engines_tell_what_they_hold_and_one_that_is_not_there_is_said_at_once() -> None:
    with ReferenceProcess(ModelSpec().to_json(), 2) as engine:
        where = engine.endpoint.removeprefix("http://")
        there = CliRunner().invoke(app, ["status", "--endpoint", where, "--json"])
        (found,) = json.loads(there.stdout)["endpoints"]
        assert (there.exit_code, found["endpoint"], len(found["workers"])) == (0, where, 2)
        assert [worker["dirty"] for worker in found["workers"]] == [False, False]
        nowhere = f"localhost:{free_port()}"
        begun = time.monotonic()
        both = CliRunner().invoke(app, ["status", "--endpoint", where, "--endpoint", nowhere, "--timeout", "60"])
        assert time.monotonic() - begun < 5
        assert both.exit_code == 1
        assert "whole" in both.stdout
        assert "unknown" in both.stdout
        assert "refused" in both.stdout


def test_a_host_that_says_nothing_is_given_up_after_seconds_however_many_are_asked() -> None:
    """As one that is off: nothing refuses the connection. A full queue drops what comes, as a firewall does."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as silent, ExitStack() as stack:
        where = silent.getsockname()
        for _ in range(2):
            queued = stack.enter_context(socket.socket())
            queued.setblocking(False)
            queued.connect_ex(where)
        begun = time.monotonic()
        options = ["--endpoint", f"127.0.0.1:{where[1]}"] * 3
        asked = CliRunner().invoke(app, ["status", "--engine", "reference", *options, "--timeout", "60"])
        assert (asked.exit_code, asked.stdout.count("takes no")) == (1, 3)
        assert time.monotonic() - begun < 10


@pytest.mark.parametrize("address", ["localhost:1", "127.0.0.1:1/", "[::1]:1"])
def test_an_address_needs_no_scheme(address: str) -> None:
    with pytest.raises(EngineRequestError, match="cannot ask"):
        Endpoint(address).send("GET", "/", Deadline(2))
