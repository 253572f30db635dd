"""Temporary directories end with their owners, at the latest when the next one starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from checkpoint_engine import owned_directory
from checkpoint_engine.deadline import Deadline
from checkpoint_engine.errors import SettingError
from checkpoint_engine.owned_directory import OwnedDirectory, temporary_root
from tests.commands import command_line

pytestmark = pytest.mark.pure

OWNER = """
import sys
from pathlib import Path
from checkpoint_engine.owned_directory import OwnedDirectory
owned = OwnedDirectory("test", Path(sys.argv[1]))
(owned.path / "big").write_bytes(bytes(1000))
print(owned.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _as_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owned_directory, "_swept", set())


def test_it_is_private_and_goes_with_all_that_is_in_it(tmp_path: Path) -> None:
    with OwnedDirectory("test", tmp_path) as owned:
        assert owned.path.stat().st_mode & 0o777 == 0o700
        (owned.path / "deep").mkdir()
        (owned.path / "deep" / "file").write_text("x")
    owned.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.thorough
def test_the_next_start_takes_away_what_a_killed_owner_left_and_nothing_else(tmp_path: Path) -> None:
    killed, living = (
        subprocess.Popen(
            [sys.executable, "-c", OWNER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    )
    assert killed.stdout
    assert living.stdout
    left, held = (Path(process.stdout.readline().strip()) for process in (killed, living) if process.stdout)
    other_kind, file, link = (tmp_path / f"checkpoint-engine-{name}" for name in ("demo-x", "test-file", "test-link"))
    other_kind.mkdir()
    file.write_text("of somebody")
    link.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    killed.send_signal(signal.SIGKILL)
    killed.wait(10)
    with OwnedDirectory("test", tmp_path):
        assert not left.exists()
        assert (held / "big").exists()
        assert all(path.exists() for path in (other_kind, file, link, tmp_path / "elsewhere"))
    living.communicate("", timeout=10)
    killed.communicate()


@pytest.mark.thorough
def test_links_of_killed_ranks_go_with_the_next_link(short_path: Path) -> None:
    code = (
        "import os, signal; from checkpoint_engine.link.channel import Listener;"
        "open_one = Listener(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    left: list[set[str]] = []
    for _ in range(2):
        environment = {**os.environ, "TMPDIR": str(short_path)}
        subprocess.run([sys.executable, "-c", code], check=False, timeout=60, env=environment)
        left.append({path.name for path in short_path.iterdir()})
    assert [len(names) for names in left] == [1, 1]
    assert not left[0] & left[1]


def test_another_users_directory_is_left_alone(tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can give a directory away")
    theirs = tmp_path / "checkpoint-engine-test-theirs"
    theirs.mkdir()
    os.chown(theirs, 12345, 12345)
    with OwnedDirectory("test", tmp_path):
        assert theirs.exists()


def test_where_nothing_can_be_written_the_way_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingError, match="set TMPDIR"):
        OwnedDirectory("test", tmp_path / "not there")

    def nowhere() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)  # as on a root file system that is read-only
    with pytest.raises(SettingError, match="set TMPDIR"):
        temporary_root()


@pytest.mark.long
@pytest.mark.thorough
def test_a_demo_that_is_hung_up_on_leaves_nothing(short_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(short_path)}
    with subprocess.Popen(command_line("demo"), stderr=subprocess.PIPE, env=environment, text=True) as demo:
        patience = Deadline(60)
        while not list(short_path.glob("checkpoint-engine-demo-*/checkpoint-*")):
            assert demo.poll() is None
            patience.check("the demo's checkpoint")
            time.sleep(0.05)
        demo.send_signal(signal.SIGHUP)
        _, said = demo.communicate(timeout=60)
    assert demo.returncode == 130  # as Ctrl-C
    assert said.strip()
    assert list(short_path.glob("checkpoint-engine-demo-*")) == []
