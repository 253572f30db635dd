"""The worker extension, and a hash of everything that a worker computes with."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from checkpoint_engine_vllm import WorkerExtension


class ChecksumExtension(WorkerExtension):
    """For checks on GPUs, where parameters hold all there is (on the CPU, vLLM packs them away)."""

    def checkpoint_engine_checksum(self: Any) -> str:
        """SHA-256 over all parameters, by name."""
        digest = hashlib.sha256()
        for name, parameter in sorted(self.model_runner.get_model().named_parameters()):
            digest.update(name.encode())
            digest.update(parameter.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes())
        return digest.hexdigest()

    def checkpoint_engine_memory(self: Any) -> tuple[int, int]:
        """Free and total bytes of this worker's GPU."""
        return torch.cuda.mem_get_info()
