"""`checkpoint-engine status`: what engines hold, of several at once."""

from __future__ import annotations

import json

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
        both = CliRunner().invoke(app, ["status", "--endpoint", where, "--endpoint", nowhere, "--timeout", "1"])
        assert both.exit_code == 1
        assert "whole" in both.stdout
        assert "unknown" in both.stdout


@pytest.mark.parametrize("address", ["localhost:1", "127.0.0.1:1/", "[::1]:1"])
def test_an_address_needs_no_scheme(address: str) -> None:
    with pytest.raises(EngineRequestError, match="cannot ask"):
        Endpoint(address).send("GET", "/", Deadline(2))
