from __future__ import annotations

import sys
from importlib import metadata

import pytest
from p2p_help import needs_mooncake

from checkpoint_engine.cli.checks import Finding, look_everywhere
from checkpoint_engine.cli.checks_p2p import check_p2p


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
