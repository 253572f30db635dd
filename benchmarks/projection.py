"""A PROJECTION, not a measurement: how long updates would take on more GPUs and for larger models.

    python benchmarks/projection.py

Every line is bytes over the slowest wire, or tensors times what each costs the engine's loader. The rates were measured
on one host with two H100 (see docs/direct.md); nothing here was run at these sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

HOST_TO_DEVICE = 55e9
"""Bytes a second into each GPU, all at once, from pinned memory."""
BROADCAST = 367e9
"""Bytes a second of one NCCL broadcast within a host."""
LOADER = 140e-6
"""Seconds a tensor that vLLM's own loader takes; 127 to 152 µs were measured."""
REPLAY = 3.2e-6
"""Seconds a tensor that a reload plan takes, as measured on a CPU."""


@dataclass(frozen=True)
class Model:
    """A checkpoint; `tensors` are those that the engine's loader is called for."""

    name: str
    nbytes: float
    tensors: int


MODELS = (
    Model("Qwen3-32B, bf16", 65.5e9, 707),
    Model("Qwen3-30B-A3B, bf16", 61.1e9, 18_867),
    Model("Qwen3-235B-A22B, bf16", 470e9, 37_000),
    Model("DeepSeek-V3.1, FP8", 689e9, 92_000),
    Model("Kimi-K2, FP8", 1_029e9, 139_600),
)
PUBLISHED = {
    ("Qwen3-235B-A22B, bf16", 8): "6.22 (H800)",
    ("DeepSeek-V3.1, FP8", 16): "10.19 (H20)",
    ("Kimi-K2, FP8", 16): "14.36 (H20)",
}
"""Seconds that upstream's README states for its broadcast, on other GPUs than those of our rates."""


def broadcast(model: Model, gpus: int, each: float) -> float:
    """All bytes reach every GPU of a host; stages overlap, so the slowest counts."""
    return max(model.nbytes / gpus / HOST_TO_DEVICE, model.nbytes / BROADCAST, model.tensors * each)


def direct(model: Model, gpus: int) -> float:
    """Every GPU takes its share. What all GPUs keep in full, such as norms, is left out: a few MB.

    A copy is counted at what it took one by one; batches of copies were not measured.
    """
    return max(model.nbytes / gpus / HOST_TO_DEVICE, model.tensors * REPLAY)


def main() -> None:
    """Prints the table."""
    print("PROJECTION, nothing of it measured: seconds of an update from host memory")
    print("(16 GPUs: two hosts, each with all of it)\n")
    print(f"{'':24}{'GPUs':>6}{'GB':>7}{'by loader':>12}{'by plan':>10}{'direct':>9}{'limit':>8}{'upstream says':>15}")
    for model in MODELS:
        for gpus in (8, 16):
            limit = model.nbytes / gpus / HOST_TO_DEVICE
            print(
                f"{model.name:24}{gpus:6}{model.nbytes / 1e9:7.0f}{broadcast(model, gpus, LOADER):12.2f}"
                f"{broadcast(model, gpus, REPLAY):10.2f}{direct(model, gpus):9.2f}{limit:8.2f}"
                f"{PUBLISHED.get((model.name, gpus), ''):>15}"
            )
    print("\nThe last column is what upstream's README states, on other GPUs than those whose rates are used here.")
    print("by loader: broadcast, then the engine's own loader. by plan: broadcast, then a reload plan.")


if __name__ == "__main__":
    main()
