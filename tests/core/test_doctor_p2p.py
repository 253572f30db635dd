from __future__ import annotations

import resource
import sys
from importlib import metadata
from pathlib import Path

import pytest

from checkpoint_engine.cli import checks_p2p
from checkpoint_engine.cli.checks import look_everywhere
from checkpoint_engine.cli.checks_p2p import check_p2p
from checkpoint_engine.cli.finding import Finding
from checkpoint_engine.host.network_cards import Card
from checkpoint_engine.p2p import open as p2p_open
from tests.core.p2p_help import needs_mooncake


def found() -> dict[str, Finding]:
    return {finding.name: finding for finding in check_p2p()}


def test_missing_mooncake_is_no_problem_but_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mooncake", None)
    monkeypatch.delitem(sys.modules, "mooncake.engine", raising=False)
    (finding,) = check_p2p()
    assert finding.status == "note"
    assert "checkpoint-engine-core[p2p]" in finding.advice


@needs_mooncake
@pytest.mark.parametrize(("version", "status"), [("0.3.11.post1", "note"), ("0.3.12", "ok"), ("0.4rc1", "ok")])
def test_old_versions_of_mooncake_are_told(monkeypatch: pytest.MonkeyPatch, version: str, status: str) -> None:
    known = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: version if name.startswith("mooncake") else known(name))
    finding = found()["mooncake"]
    assert finding.status == status
    assert ("any memory" in finding.advice) == (status == "note")


@needs_mooncake
def test_the_transport_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHECKPOINT_ENGINE_P2P_TRANSPORT", "tcp")
    monkeypatch.setenv("CHECKPOINT_ENGINE_P2P_HOST", "127.0.0.1")
    findings = found()
    assert findings["transport"].value == "tcp: asked for"
    assert (findings["address"].status, findings["address"].value) == ("note", "127.0.0.1")
    assert "nothing unless" in findings["sharing"].value
    assert {"transport", "address"} <= {finding.name for finding in look_everywhere() if finding.area == "P2P"}


@needs_mooncake
@pytest.mark.parametrize(
    ("variable", "value", "name", "words"),
    [
        ("PS_P2P_STORE_RDMA_DEVICES", "mlx5_77", "transport", "'mlx5_77'"),
        ("CHECKPOINT_ENGINE_P2P_TRANSPORT", "efa", "transport", "efa is asked for"),
        ("CHECKPOINT_ENGINE_P2P_HOST", "192.0.2.200", "address", "CHECKPOINT_ENGINE_P2P_HOST"),
    ],
)
def test_what_stands_in_the_way_is_named(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, name: str, words: str
) -> None:
    monkeypatch.setenv(variable, value)
    assert found()[name].status == "problem"
    assert words in found()[name].advice


@needs_mooncake
def test_rdma_with_a_low_memlock_or_without_the_way_into_gpus_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Stand-ins for a network card and a GPU, which machines that run tests lack."""
    limits = [resource.RLIM_INFINITY]
    monkeypatch.setattr(p2p_open, "find_cards", lambda: [Card("mlx5_0", 1, True, 50e9)])
    monkeypatch.setattr(p2p_open, "_MODULES", tmp_path)
    monkeypatch.setattr(p2p_open.resource, "getrlimit", lambda _: (limits[-1], limits[-1]))
    monkeypatch.setattr(checks_p2p, "_gpus_seen", lambda: 1)
    assert found()["transport"].value == "rdma: there are RDMA devices (mlx5_0)"
    assert found()["GPU memory"].status == "note"
    assert "modprobe nvidia_peermem" in found()["GPU memory"].advice
    (tmp_path / "nvidia_peermem").mkdir()
    assert "GPU memory" not in found()
    limits.append(64 << 10)
    assert found()["transport"].status == "problem"
    assert "ulimit -l unlimited" in found()["transport"].advice
