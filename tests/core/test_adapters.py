"""A LoRA adapter out of memory: what its engine is given to read, and that nothing of it stays behind."""

from __future__ import annotations

import json
import os
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from checkpoint_engine import send_adapter
from checkpoint_engine.client.rpc_client import ReferenceClient
from checkpoint_engine.errors import MissingDependencyError, SettingError
from checkpoint_engine.sdk.access import RefusedError
from checkpoint_engine.sdk.adapters import CONFIG, WEIGHTS, copy_adapter

pytestmark = pytest.mark.pure


class Kind(str, Enum):
    """As PEFT's configuration has them."""

    LORA = "LORA"


class Taking(ReferenceClient):
    """A client that reads what it is given."""

    def load_adapter(self, name: str, directory: Path, **how: Any) -> None:
        self.asked = name, how
        self.directory = directory
        self.tensors = load_file(directory / "adapter_model.safetensors")
        self.config = json.loads((directory / "adapter_config.json").read_text())


def test_an_engine_reads_what_a_trainer_has() -> None:
    client = Taking("http://127.0.0.1:9")
    weight = torch.randn(4, 8, dtype=torch.bfloat16, requires_grad=True)
    tensors = {"a.lora_A.weight": weight.t(), "a.lora_B.weight": weight}
    config = {"peft_type": Kind.LORA, "r": 8, "target_modules": {"v_proj", "q_proj"}, "bias": "none"}
    send_adapter(client, "math", tensors, config, version="step 7", timeout=9)
    assert client.asked == ("math", {"version": "step 7", "pause": "keep", "reset_caches": True, "timeout": 9})
    assert all(torch.equal(client.tensors[name], tensor) for name, tensor in tensors.items())
    assert client.config == config | {"peft_type": "LORA", "target_modules": ["q_proj", "v_proj"]}
    assert not client.directory.exists()


def test_a_server_keeps_nothing_of_a_directory_that_it_does_not_take(tmp_path: Path) -> None:
    source, target = tmp_path / "given", tmp_path / "kept"
    source.mkdir()
    (source / WEIGHTS).write_text("weights")
    for why in ("No such file", "is not a file of the user"):
        with pytest.raises(RefusedError, match=why):
            copy_adapter(source, target)
        assert not target.exists()
        if why == "No such file":
            os.mkfifo(source / CONFIG)
    (source / CONFIG).unlink()
    (source / CONFIG).write_text("{}")
    assert sorted(each.name for each in copy_adapter(source, target).iterdir()) == sorted((WEIGHTS, CONFIG))


def test_what_cannot_be_sent_is_refused_by_name() -> None:
    with pytest.raises(SettingError, match="'math' has no tensors"):
        send_adapter(Taking("http://127.0.0.1:9"), "math", {}, {})
    with pytest.raises(MissingDependencyError, match="no way to give its engine a LoRA adapter"):
        send_adapter(ReferenceClient("http://127.0.0.1:9"), "math", {"a": torch.ones(1)}, {})
