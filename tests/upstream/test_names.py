"""Names of upstream that are not methods: there, or told in one sentence what does the same."""

from __future__ import annotations

import importlib
import os
import runpy
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import torch

import checkpoint_engine.distributed as dist
from checkpoint_engine.data_types import (
    BucketRange,
    DataToGather,
    H2DBucket,
    MemoryBuffer,
    MemoryBufferMetaList,
    MemoryBufferMetas,
    ParameterMeta,
)
from checkpoint_engine.device_utils import DeviceManager
from checkpoint_engine.errors import CheckpointFormatError, CheckpointStateError, PeerError, SettingError
from checkpoint_engine.p2p_store import P2PStore
from checkpoint_engine.ps import ParameterServer, _get_physical_gpu_id, _to_named_tensor
from checkpoint_engine.source.loader import select
from tests.core.p2p_help import needs_mooncake
from tests.waiting import within

WITHOUT_LOGURU = """
import sys
sys.modules["loguru"] = None  # as if it were not installed
"""
TAKES_IT_FOR_OURS = """
try:
    from checkpoint_engine.ps import ParameterServer
    from loguru import logger
except ImportError:
    print("it is not there")
"""


@needs_mooncake
@pytest.mark.usefixtures("p2p_environment")
def test_a_p2p_store_reads_what_another_has_registered() -> None:
    source, target = torch.arange(1000.0), torch.zeros(1000)
    store = P2PStore(device_manager=DeviceManager())
    store.register_named_tensors(named_tensors={"source": source, "target": target})
    with pytest.raises(CheckpointStateError, match="'source' is registered"):
        store.register_named_tensors({"source": source})
    store.batch_transfer_sync_read(
        target_hostname=store.addr, buf_ptrs=[target.data_ptr()], remote_ptrs=[source.data_ptr()], lens=[4000]
    )
    assert torch.equal(source, target)
    assert store.unregister_named_tensors(names=["source", "target", "nothing"]) == 2
    with pytest.raises(PeerError, match="4000 bytes"):
        store.batch_transfer_sync_read(store.addr, [target.data_ptr()], [source.data_ptr()], [4000])


def test_backends_of_upstream_are_known() -> None:
    dist.use_backend("vllm_nccl")
    dist.use_backend(None)
    with pytest.raises(SettingError, match="'vllm_hccl'"):
        dist.use_backend("vllm_hccl")


def test_metas_are_models() -> None:
    meta = ParameterMeta(name="w", dtype="torch.bfloat16", shape=[2, 3], aligned_size=256)  # type: ignore[arg-type]
    assert (meta.dtype, meta.shape) == (torch.bfloat16, torch.Size([2, 3]))
    held = MemoryBufferMetaList(
        p2p_store_addr=None, memory_buffer_metas_list=[MemoryBufferMetas(metas=[meta], ptr=0, size=256)], rdma_device=""
    )
    assert held.model_dump()["memory_buffer_metas_list"][0]["metas"][0]["dtype"] == "torch.bfloat16"
    assert MemoryBufferMetaList.model_validate(held.model_dump()) == held
    assert MemoryBufferMetaList.model_validate_json(held.model_dump_json()) == held
    for broken in ("x", {"p2p_store_addr": 3}):
        with pytest.raises(CheckpointFormatError, match="no MemoryBufferMetaList"):
            MemoryBufferMetaList.model_validate(broken)
    bucket = H2DBucket(size=256, ranges=[BucketRange(idx=0, offset=0, size=256)], items=[meta])
    assert H2DBucket.model_validate(bucket.model_dump()) == bucket
    gathered = DataToGather(
        p2p_store_addr="host:1", memory_buffer_metas_list=[], rdma_device="", host_ip="127.0.0.1", device_uuid="GPU-1"
    )
    assert DataToGather.model_validate_json(gathered.model_dump_json()) == gathered
    buffer = MemoryBuffer(buffer=torch.zeros(256, dtype=torch.uint8), size=256, metas=[meta], manually_pinned=True)
    assert (buffer.size, buffer.manually_pinned) == (256, True)
    assert [each["offset"] for each in _to_named_tensor(metas=[meta, meta], offset=512)] == [512, 768]


def test_attributes_of_a_server() -> None:
    with ParameterServer(rank=0, world_size=1, device="cpu") as server:
        assert server.device_manager.device_type in ("cpu", "cuda")
        server.unregister_checkpoint(server.shared_memory_pool_name, force=True)
        server.init_process_group(device_index=0, master_port=None)
        if server.device_manager.device_type == "cpu":
            assert _get_physical_gpu_id(server.device_manager, 0) == server.device.identity


@pytest.mark.parametrize(
    ("module", "name", "instead"),
    [
        ("ps", "_gen_h2d_buckets", "ParameterServer.update plans by itself"),
        ("ps", "_assign_receiver_ranks", "docs/elastic.md"),
        ("pin_memory", "_normal_pin_memory", "use_inplace_pin_memory=False"),
        ("pin_memory", "_concat_tp_weights", r"torch\.cat"),
        ("api", "_init_api", "create_app"),
    ],
)
def test_what_is_not_here_says_what_does_the_same(module: str, name: str, instead: str) -> None:
    found = importlib.import_module(f"checkpoint_engine.{module}")
    with pytest.raises(ImportError, match=instead):
        getattr(found, name)
    with pytest.raises(AttributeError):
        _ = found.nothing_of_the_kind


def test_a_script_that_lacks_what_came_along_with_upstream_is_told(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(WITHOUT_LOGURU + TAKES_IT_FOR_OURS)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "it is not there\n"), done.stderr
    assert f"{script} imports loguru, which came with upstream's distribution and is not installed" in done.stderr
    assert "pip install 'checkpoint-engine-core[compat]'" in done.stderr


@pytest.mark.parametrize(
    ("script", "needs"),
    [
        ("def later():\n    import os, pydantic.fields, loguru", "loguru and pydantic"),
        ("import os", ""),
    ],
)
def test_who_needs_nothing_of_it_hears_nothing(
    script: str, needs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("loguru", "pydantic"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "checkpoint_engine.ps")
    path = tmp_path / "script.py"
    path.write_text(f"from checkpoint_engine.ps import ParameterServer\n{script}\n")
    runpy.run_path(str(path))
    assert (f"imports {needs}," in caplog.text) if needs else not caplog.text


def test_sizes_are_aligned_as_segments_are() -> None:
    from checkpoint_engine.pin_memory import _align_size

    assert _align_size(torch.bfloat16, torch.Size([3, 5])) == 256


def test_numpy_files_are_called_so(tmp_path: Path) -> None:
    (tmp_path / "model.0.0.npy").write_bytes(b"\x93NUMPY\x01\x00v\x00")
    with pytest.raises(CheckpointFormatError, match="pass them as named_tensors"):
        select([tmp_path / "model.0.0.npy"])


@pytest.mark.parametrize("module", ["checkpoint_engine", "checkpoint_engine.ps"])
def test_modules_that_are_started_serve(module: str, tmp_path: Path) -> None:
    path = tmp_path / "ps.sock"
    environment = {**os.environ, "CHECKPOINT_ENGINE_DEVICE": "cpu"}
    with subprocess.Popen([sys.executable, "-m", module, "--uds", str(path)], env=environment) as serving:
        try:
            assert within(60, lambda: path.exists() or serving.poll() is not None)
            with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://localhost") as client:
                assert client.get("/v1/healthz").status_code == 200
        finally:
            serving.terminate()
