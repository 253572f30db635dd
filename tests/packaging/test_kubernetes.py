"""The manifests and Dockerfiles: valid by Kubernetes' own schemas and a linter, and with all that a link needs."""

from __future__ import annotations

import copy
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[2]
HERE = ROOT / "examples" / "kubernetes"
VERSIONS = ("1.34", "1.37")
"""The first that has shared claims for good, and the newest whose schemas are here."""


def documents() -> list[dict[str, Any]]:
    return [document for file in sorted(HERE.glob("*.yaml")) for document in yaml.safe_load_all(file.read_text())]


def pod_templates(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Metadata and spec of the pods that it makes, by what they are called there."""
    if document["kind"] == "Pod":
        return {"pod": {"metadata": document["metadata"], "spec": document["spec"]}}
    group = document.get("spec", {}).get("leaderWorkerTemplate", {})
    return {name: group[name] for name in ("leaderTemplate", "workerTemplate") if name in group}


PODS = {
    f"{document['kind']}/{name}": template
    for document in documents()
    for name, template in pod_templates(document).items()
}


@pytest.mark.parametrize("version", VERSIONS)
def test_manifests_are_valid_by_kubernetes_schemas(version: str) -> None:
    checked = 0
    for document in documents():
        if document["kind"] == "LeaderWorkerSet":  # no part of Kubernetes: its pods are
            for template in pod_templates(document).values():
                made = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
                kubernetes_validate.validate(made, version, strict=True)
                checked += 1
        else:
            kubernetes_validate.validate(document, version, strict=True)
            checked += 1
    assert checked == 6


def test_the_validator_sees_a_slip() -> None:
    broken = copy.deepcopy(next(document for document in documents() if document["kind"] == "Pod"))
    broken["spec"]["containers"][0]["volumeMount"] = broken["spec"]["containers"][0].pop("volumeMounts")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, VERSIONS[0], strict=True)


@pytest.mark.parametrize("pod", PODS)
def test_trainer_and_engine_share_what_a_link_needs(pod: str) -> None:
    spec = PODS[pod]["spec"]
    engine, trainer = spec["containers"]
    assert spec["shareProcessNamespace"] is True
    assert spec["securityContext"]["runAsUser"] == 1000
    volumes = {volume["name"] for volume in spec["volumes"]}
    for container in (engine, trainer):
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert (mounts["/tmp"], mounts["/dev/shm"]) == ("tmp", "shm")
        assert set(mounts.values()) <= volumes
        assert container["resources"]["claims"] == [{"name": spec["resourceClaims"][0]["name"]}]
        assert "runAsUser" not in container.get("securityContext", {})
    assert trainer["securityContext"]["capabilities"]["add"] == ["IPC_LOCK"]


def test_pods_of_several_hosts_have_a_secret_and_a_place_to_meet() -> None:
    for pod, template in PODS.items():
        if "LeaderWorkerSet" in pod:
            trainer = template["spec"]["containers"][1]
            names = {variable["name"]: variable for variable in trainer["env"]}
            assert "secretKeyRef" in names["CHECKPOINT_ENGINE_RANKS_SECRET"]["valueFrom"]
            assert "--master-addr=$(LWS_LEADER_ADDRESS)" in trainer["command"]


def test_variables_are_ones_that_are_documented() -> None:
    known = (ROOT / "docs" / "configuration.md").read_text() + (ROOT / "docs" / "doors.md").read_text()
    used = set(
        re.findall(r"\b(?:CHECKPOINT_ENGINE|PS|VLLM)_[A-Z0-9_]+", "".join(f.read_text() for f in HERE.iterdir()))
    )
    assert used
    assert not [name for name in used if f"`{name}`" not in known and f"`{name}=" not in known]


@pytest.mark.parametrize("engine", ["sglang", "trainer", "vllm"])
def test_dockerfiles_are_clean(engine: str) -> None:
    linter = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if linter is None:
        pytest.skip("hadolint has no build for this machine")
    file = HERE / f"Dockerfile.{engine}"
    done = subprocess.run([linter, file], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout
    for source in re.findall(r"^COPY (\S+)", file.read_text(), re.MULTILINE):
        assert (ROOT / source).exists(), source
