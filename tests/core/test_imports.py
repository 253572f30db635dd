"""What is imported when, for torch takes seconds."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

TOLD = """
import sys
from checkpoint_engine.cli.main import main
try:
    main()
finally:
    print(*(name for name in ("torch", "httpx") if name in sys.modules))
"""
"""The command, and what it has imported."""


@pytest.mark.parametrize(
    "module", ["checkpoint_engine", "checkpoint_engine.cli.main", "checkpoint_engine.reference.server"]
)
def test_it_is_imported_without_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.fixture
def two_workers() -> Iterator[str]:
    """Where a stand-in for an engine tells how many workers it has."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            told = b'{"world_size": 2}'
            self.send_response(200)
            self.send_header("content-length", str(len(told)))
            self.end_headers()
            self.wfile.write(told)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("command", ["update", "verify"])
@pytest.mark.parametrize(
    ("directory", "engine", "says", "imported"),
    [
        ("/nowhere", "reference", "/nowhere is not a directory", ""),
        ("/", "nosuch", "pip install checkpoint-engine-nosuch", ""),
        ("/", "reference", "has 2 workers, not 1", "httpx"),
    ],
    ids=["directory", "engine", "workers"],
)
def test_what_is_wrong_with_a_command_is_told_before_torch_is_imported(
    command: str, directory: str, engine: str, says: str, imported: str, two_workers: str
) -> None:
    arguments = [command, directory, "--engine", engine, "--endpoint", two_workers]
    done = subprocess.run(
        [sys.executable, "-c", TOLD, *arguments], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert says in done.stderr.replace("\n", " ")
    assert done.stdout.strip() == imported
