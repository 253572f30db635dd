"""`checkpoint-engine doctor`, in places that are sound and in places that are not."""

from __future__ import annotations

import json
import resource
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from checkpoint_engine.cli import checks_machine, checks_software
from checkpoint_engine.cli.checks_software import check_software
from checkpoint_engine.cli.finding import Finding
from checkpoint_engine.cli.main import app
from checkpoint_engine.client.announced import InstalledEngine
from checkpoint_engine.contract.sink import TensorSpec
from checkpoint_engine.reload.kept_proofs import KeptProofs
from tests.commands import run_command


def doctor(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["doctor", *arguments], env={"COLUMNS": "200"})


def found(done: Result, name: str) -> Finding:
    findings = [Finding(**finding) for finding in json.loads(done.stdout)["findings"]]
    (finding,) = [finding for finding in findings if finding.name == name]
    return finding


def install(directory: Path, name: str, version: str, entry_points: str = "") -> Path:
    """What a package manager leaves behind for a distribution, without its files."""
    info = directory / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(entry_points)
    return directory


def test_a_sound_place_is_ready() -> None:
    done = doctor("--json")
    report = json.loads(done.stdout)
    problems = [finding for finding in report["findings"] if finding["status"] == "problem"]
    assert report["ok"] is (not problems)
    assert done.exit_code == (1 if problems else 0)
    # Whether this host's devices and limits will do is not for a test to say.
    assert not [finding for finding in problems if finding["area"] in ("software", "network", "plugins")]
    assert {finding["area"] for finding in report["findings"]} == {
        *("software", "devices", "host", "network", "plugins", "P2P")
    }
    for finding in report["findings"]:
        assert finding["value"], finding
        assert bool(finding["advice"]) or finding["status"] == "ok", finding
    assert "gloo" in found(done, "collectives").value
    assert found(done, "client reference").status == "ok"


def test_what_is_kept_of_plans_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHECKPOINT_ENGINE_PROOFS", "off")
    assert found(doctor("--json"), "proofs of plans").value == "not kept from one engine process to the next"
    monkeypatch.setenv("CHECKPOINT_ENGINE_PROOFS", str(tmp_path / "proofs"))
    assert found(doctor("--json"), "proofs of plans").value == f"0 in {tmp_path / 'proofs'}, 0.0 MB"
    KeptProofs({"engine": "reference"}).keep("plan", {f"t{n}": TensorSpec(torch.uint8, (n,)) for n in range(5000)})
    assert found(doctor("--json"), "proofs of plans").value == f"1 in {tmp_path / 'proofs'}, 0.1 MB"


def test_everything_wrong_is_found_at_once_and_the_exit_code_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "checkpoint-engine", "0.4.2")
    broken = "[checkpoint_engine.clients]\nbroken = checkpoint_engine.no_such_module:Client\n"
    install(tmp_path, "some-plugin", "1.0", broken)
    long = tmp_path / ("x" * 90)
    long.mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PS_MEM_FRACTION", "1.5")
    monkeypatch.setattr(tempfile, "tempdir", str(long))  # as TMPDIR would, read anew
    done = doctor("--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["ok"] is False
    clash = found(done, "checkpoint-engine")
    assert (clash.status, "0.4.2" in clash.value) == ("problem", True)
    assert "pip uninstall" in clash.advice
    assert found(done, "settings").status == "problem"
    assert "memory fraction" in found(done, "settings").advice
    assert found(done, "link").status == "problem"
    assert "TMPDIR" in found(done, "link").advice
    assert found(done, "client broken").status == "problem"


def test_people_see_marks_and_advice(tmp_path: Path) -> None:
    upstream = install(tmp_path, "checkpoint-engine", "0.4.2")
    done = run_command("doctor", environment={"PYTHONPATH": str(upstream)})
    assert done.returncode == 1
    assert "✗" in done.stdout
    assert "→ pip uninstall" in done.stdout
    assert "1 problem" in done.stdout


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment with an engine of our own invention in it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("FAKE_PLUGINS", raising=False)
    return tmp_path


FAKE = InstalledEngine("fake_engine", "checkpoint-engine-fake", "fake.plugins", "FAKE_PLUGINS")
ANNOUNCED = "[fake.plugins]\ncheckpoint_engine = checkpoint_engine_fake:register\n"


def look(status: str, words: str) -> Finding:
    finding = checks_software.check_engine("fake", FAKE)
    assert finding.status == status, finding
    assert words in f"{finding.value} {finding.advice}", finding
    return finding


def test_an_engine_that_does_not_see_its_plugin_is_found(engines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look("ok", "neither")
    plugin = install(engines / "plugin", FAKE.plugin, "0.1.0", ANNOUNCED)
    monkeypatch.syspath_prepend(str(plugin))
    look("note", "no fake in this environment")
    (engines / "fake_engine").mkdir()
    (engines / "fake_engine" / "__init__.py").touch()
    install(engines, "fake_engine", "0.30")
    look("ok", "fake 0.30 loads plugin 0.1.0")
    monkeypatch.setenv("FAKE_PLUGINS", "something, else")
    look("problem", "add checkpoint_engine to FAKE_PLUGINS")
    monkeypatch.setenv("FAKE_PLUGINS", "something, checkpoint_engine")
    look("ok", "loads plugin")
    sys.path.remove(str(plugin))
    look("problem", "pip install checkpoint-engine-fake")


def test_a_plugin_that_is_not_announced_is_found(engines: Path) -> None:
    (engines / "fake_engine").mkdir()
    (engines / "fake_engine" / "__init__.py").touch()
    install(engines, FAKE.plugin, "0.1.0")
    look("problem", "not announced in fake.plugins")


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ("return [{'status': 'ok', 'value': 'all hooks', 'advice': ''}]", "ok", "all hooks"),
        ("return [{'status': 'problem', 'value': 'one is lost', 'advice': 'x'}]", "problem", "one is lost"),
        ("raise OSError('libcuda is gone')", "problem", "libcuda is gone"),
    ],
)
def test_a_plugin_says_itself_what_it_finds_in_its_engine(
    engines: Path, body: str, status: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (engines / "fake_checks.py").write_text(f"def look():\n    {body}\n")
    monkeypatch.delitem(sys.modules, "fake_checks", raising=False)
    install(engines, FAKE.plugin, "0.1.0", f"{ANNOUNCED}\n[checkpoint_engine.checks]\nfake = fake_checks:look\n")
    (finding,) = checks_software.look_inside("fake")
    assert (finding.name, finding.status) == ("fake hooks", status)
    assert words in finding.value


def test_limits() -> None:
    assert checks_machine.check_memlock(resource.RLIM_INFINITY, rdma=True).status == "ok"
    assert checks_machine.check_memlock(1 << 26, rdma=False).status == "ok"
    limited = checks_machine.check_memlock(1 << 26, rdma=True)
    assert (limited.status, "ulimit -l unlimited" in limited.advice) == ("problem", True)
    assert checks_machine.check_shm(Path("/nowhere/at/all")).status == "problem"


def test_huge_pages_of_shared_memory(tmp_path: Path) -> None:
    setting = tmp_path / "shmem_enabled"
    setting.write_text("always within_size advise [never] deny force")
    assert checks_machine.check_huge_pages(setting, made=True).status == "ok"
    finding = checks_machine.check_huge_pages(setting, made=False)
    assert (finding.status, "(never)" in finding.value, "echo advise" in finding.advice) == ("note", True, True)
    assert "no such setting" in checks_machine.check_huge_pages(tmp_path / "nothing", made=False).value


@pytest.mark.parametrize("name", ["checkpoint_engine/__init__.py", "checkpoint_engine.py"])
def test_another_package_of_our_name_in_the_current_directory_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert not [found for found in check_software() if found.name == "checkpoint_engine"]
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    (found,) = (found for found in check_software() if found.name == "checkpoint_engine")
    assert found.status == "problem"
    assert str(tmp_path) in found.value
