"""`checkpoint-engine status`: what engines hold, of several at once."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import socket
import subprocess
import termios
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from checkpoint_engine.cli.main import app
from checkpoint_engine.client.endpoint import Endpoint
from checkpoint_engine.client.rpc_client import ReferenceClient
from checkpoint_engine.deadline import Deadline
from checkpoint_engine.errors import EngineRequestError
from checkpoint_engine.reference.engine import ModelSpec, make_checkpoint
from checkpoint_engine.reference.process import ReferenceProcess
from tests.commands import command_line
from tests.ports import free_port
from tests.rolling import Sender


def test_engines_tell_what_they_hold_and_one_that_is_not_there_is_said_at_once() -> None:
    with ReferenceProcess(ModelSpec().to_json(), 2) as engine:
        where = engine.endpoint.removeprefix("http://")
        there = CliRunner().invoke(app, ["status", "--endpoint", where, "--json"])
        (found,) = json.loads(there.stdout)["endpoints"]
        assert (there.exit_code, found["endpoint"], len(found["workers"])) == (0, where, 2)
        assert [worker["dirty"] for worker in found["workers"]] == [False, False]
        assert found["paused"] is False
        nowhere = f"localhost:{free_port()}"
        begun = time.monotonic()
        both = CliRunner().invoke(app, ["status", "--endpoint", where, "--endpoint", nowhere, "--timeout", "60"])
        assert time.monotonic() - begun < 5
        assert both.exit_code == 1
        assert "whole" in both.stdout
        assert "unknown" in both.stdout
        assert "refused" in both.stdout
        assert "paused" not in both.stdout
        ReferenceClient(engine.endpoint).pause(
            "keep", reset_caches=False, deadline=Deadline(5)
        )  # and nobody resumes it
        left = CliRunner().invoke(app, ["status", "--endpoint", where])
        assert (left.exit_code, left.stdout.count("paused")) == (0, 1)


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


@contextmanager
def watching(*arguments: object, **streams: int) -> Iterator[subprocess.Popen[str]]:
    """`checkpoint-engine status --watch`."""
    command = command_line("status", "--engine", "reference", "--watch", *arguments)
    with subprocess.Popen(command, text=True, **streams) as process:
        try:
            yield process
        finally:
            process.kill()


def see(watch: subprocess.Popen[str], versions: list[str], error: str = "") -> None:
    """Waits for a look that finds workers with these versions, or this error; each is one line of JSON."""
    deadline = Deadline(60)
    while True:
        assert watch.stdout is not None
        look = json.loads(watch.stdout.readline())
        (found,) = look["endpoints"]
        assert look["ok"] is bool(found["workers"]) is not bool(found["error"])
        if [worker["version"] for worker in found["workers"]] == versions and error in found["error"]:
            return
        deadline.check(f"a look that finds {versions or error}")


@pytest.mark.long
def test_watching_follows_updates_and_an_engine_that_goes_away_and_comes_back(tmp_path: Path, short_path: Path) -> None:
    uds = str(short_path / "engine.sock")
    gone = f"cannot ask unix:{uds}"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with watching("--endpoint", f"unix:{uds}", "--json", **pipes) as watch:
        see(watch, [], gone)
        with ReferenceProcess(ModelSpec().to_json(), 1, uds=uds) as engine:
            see(watch, [""])
            with Sender(ReferenceClient(engine.endpoint)) as sender:
                for seed, version in enumerate(("step-1", "step-2")):
                    sender.hold(make_checkpoint(tmp_path / version, ModelSpec(), seed))
                    sender.update(version, "broadcast")
                    see(watch, [version])
        see(watch, [], gone)
        with ReferenceProcess(ModelSpec().to_json(), 1, uds=uds):
            see(watch, [""])
        watch.send_signal(signal.SIGINT)
        rest, said = watch.communicate(timeout=30)
    assert (watch.returncode, said) == (130, "")
    assert all(json.loads(line)["endpoints"] for line in rest.splitlines())


def test_ctrl_c_ends_watching_though_an_engine_hangs_and_leaves_the_terminal_as_it_was() -> None:
    ours, theirs = pty.openpty()
    with (
        os.fdopen(ours, "rb", buffering=0) as screen,
        os.fdopen(theirs, "wb", buffering=0) as terminal,
        ReferenceProcess(ModelSpec().to_json(), 1) as engine,
    ):
        before, shown = termios.tcgetattr(terminal), b""
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), terminal.fileno())
        with watching("--endpoint", engine.endpoint, "--timeout", 60, **streams) as watch:
            while b"whole" not in shown:
                shown += screen.read(4096)
            os.kill(engine.pid, signal.SIGSTOP)
            try:
                time.sleep(3)  # it has asked again, and waits
                watch.send_signal(signal.SIGINT)
                assert watch.wait(10) == 130
            finally:
                os.kill(engine.pid, signal.SIGCONT)
        assert termios.tcgetattr(terminal) == before
        terminal.write(b"$ ")
        while not shown.endswith(b"$ "):
            shown += screen.read(4096)
    colours = re.findall(rb"\x1b\[[\d;]*m", shown)
    assert len(colours) == shown.count(b"\x1b")  # no other order to the terminal, such as to hide the cursor
    assert colours[-1] == b"\x1b[0m"
    assert shown.endswith(b"\r\n$ ")  # where a line begins
