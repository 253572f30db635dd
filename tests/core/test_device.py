"""Devices: what each answers for itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from checkpoint_engine import ParameterServer
from checkpoint_engine.device import DEVICE_TYPES, CpuDevice, open_device, prepare_copies, type_of
from checkpoint_engine.errors import DeviceMemoryError, SettingError, UnsupportedTensorError
from checkpoint_engine.host import memory
from checkpoint_engine.planning.buckets import Bucket, BucketPlan
from checkpoint_engine.planning.byte_runs import plan_byte_runs
from checkpoint_engine.source import loader
from checkpoint_engine.transfer.staging import choose_staging

pytestmark = pytest.mark.pure

MIB = 1 << 20


def plan_with_a_bucket_of(nbytes: int) -> BucketPlan:
    return BucketPlan(MIB, (Bucket(0, 0, 0, nbytes, ()),))


def test_the_host_gives_what_its_control_group_leaves_and_what_the_page_cache_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = tmp_path / "cgroups/pod"
    for folder in (tmp_path / "proc/self", group):
        folder.mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemFree: 1 kB\nMemAvailable: {8000 << 10} kB\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    monkeypatch.setattr(memory, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path / "cgroups")
    assert CpuDevice(0).memory()[0] == 8000 * MIB  # little is free, but cached files give way

    (tmp_path / "proc/self/cgroup").write_text("0::/pod\n")
    (group / "memory.max").write_text(f"{100 * MIB}\n")
    (group / "memory.current").write_text(f"{90 * MIB}\n")
    (group / "memory.stat").write_text(f"inactive_file {20 * MIB}\nactive_file 0\n")
    assert CpuDevice(0).memory()[0] == 30 * MIB
    with pytest.raises(DeviceMemoryError, match=f"{30 * MIB} are free on the host"):
        choose_staging(plan_with_a_bucket_of(31 * MIB), 1, CpuDevice(0), available=0, rank=0)


@pytest.mark.parametrize("name", ["xpu", "mps", "hpu"])
def test_a_device_that_nobody_knows_is_refused_and_not_taken_for_the_host(name: str) -> None:
    unknown = rf"device '{name}' is unknown; known are cpu, cuda$"
    with pytest.raises(SettingError, match=unknown):
        open_device(name)
    with pytest.raises(SettingError, match=unknown):
        type_of(torch.device(name))
    with pytest.raises(SettingError, match=unknown):
        prepare_copies(plan_byte_runs([]), torch.device(name), source_stays=False, targets_stay=False)


@pytest.mark.parametrize("name", ["npu", "cuad", "CPU", ""])
def test_so_is_one_by_name(name: str) -> None:
    with pytest.raises(SettingError, match=rf"device '{name}' is unknown; known are cpu, cuda$"):
        open_device(name)


def test_a_server_and_an_engine_worker_refuse_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHECKPOINT_ENGINE_DEVICE", "npu")
    with pytest.raises(SettingError, match="device 'npu' is unknown; known are cpu, cuda"):
        ParameterServer(rank=0, world_size=1)


def test_a_tensor_on_such_a_device_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(DEVICE_TYPES, "cpu")  # none of the others can be had here
    with pytest.raises(UnsupportedTensorError, match=r"tensor 'w' lies on cpu; known devices are cuda"):
        list(loader.iterate_tensors({"w": torch.zeros(2)}))


@pytest.mark.parametrize("name", sorted(DEVICE_TYPES))
def test_every_type_is_what_torch_calls_it(name: str) -> None:
    assert torch.device(name).type == DEVICE_TYPES[name].name == name
    assert type_of(torch.device(name, 0)) is type_of(name)


def test_nobody_but_the_devices_asks_torch_for_a_gpu() -> None:
    package = Path(loader.__file__).parents[1]
    asking = [path for path in package.rglob("*.py") if "torch.cuda." in path.read_text()]
    assert {path.relative_to(package).parts[0] for path in asking} == {"device"}
