"""Runs in vLLM's environment: a real vLLM engine in this process, driven by lines of JSON.

Reads {"do": ..., ...} from stdin and answers each with a line on the descriptor given as the only argument. It feeds
`VllmSink` directly: buckets in one block of memory that is overwritten after every `load`, which is what a sender
is allowed to do, and faults at will.
"""

from __future__ import annotations

import faulthandler
import gc
import hashlib
import importlib
import json
import os
import sys
import traceback
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import msgspec
import torch
import transfer_doors
from safetensors import safe_open
from safetensors.torch import save_file
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers import rotary_embedding
from vllm.model_executor.layers.fused_moe.config import fp8_w8a8_moe_quant_config
from vllm.model_executor.layers.linear import LinearBase
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from checkpoint_engine.catalog import ShardPlace
from checkpoint_engine.contract.sink import TensorSpec, Update
from checkpoint_engine.dtypes import dtype_name
from checkpoint_engine.link.messages import Load, TensorSlice
from checkpoint_engine.receiver.layouts import ReceivedBucket, UpdateLayout
from checkpoint_engine.receiver.scattered import ScatteredDelivery, ShardAssembly
from checkpoint_engine.reload import parting
from checkpoint_engine.sdk.testing import EngineUnderTest, run_checks
from checkpoint_engine_vllm import compat, formats, loadplan, shadow
from checkpoint_engine_vllm.adapters import without_adapters
from checkpoint_engine_vllm.extension import state_of
from checkpoint_engine_vllm.planned import PlannedReload
from checkpoint_engine_vllm.sink import LENIENT, VllmSink

if TYPE_CHECKING:
    from collections.abc import Iterator

PROMPTS = ["Hello, my name is", "The capital of France is", "The quick brown fox"]
SCRATCH = torch.empty(8 << 20, dtype=torch.uint8)
"""Where every bucket lies in turn."""

FREEZE = gc.freeze
gc.freeze = gc.unfreeze = lambda: None
"""vLLM thaws everything that was ever imported to look through it a dozen times between two engines: half the tests'
time."""


class Engine:
    """The engine that was started last, and its adapter. Methods are what `do` may ask for."""

    def __init__(self) -> None:
        self.llm: Any = None
        self.adapter: Any = None

    @property
    def worker(self) -> Any:
        return self.llm.llm_engine.model_executor.driver_worker.worker

    def start(self, model: str, load_format: str = "auto", **options: Any) -> dict[str, Any]:
        self.stop()
        self.llm = LLM(
            model=model,
            load_format=load_format,
            enforce_eager=True,
            max_model_len=128,
            max_num_seqs=4,
            dtype="bfloat16",
            kv_cache_memory_bytes=64 << 20,
            distributed_executor_backend=UniProcExecutor,  # by its name, 0.20 to 0.22 take another one on the CPU
            disable_log_stats=False,
            **options,
        )
        self.adapter = VllmSink(self.worker, state_of(self.worker).sink._planner)  # what the start has recorded
        return {}

    def keep_proofs(self, where: str) -> dict[str, Any]:
        """Where engines started from now on keep proofs of their plans, or `off`."""
        os.environ["CHECKPOINT_ENGINE_PROOFS"] = where
        return {}

    def forget(self) -> dict[str, Any]:
        """Has the worker forget what it knows of its plan, as after an update that broke off."""
        self.adapter._ladder.failed()
        return {}

    def stop(self) -> dict[str, Any]:
        if self.llm is not None:
            self.adapter = None
            self.llm.llm_engine.engine_core.shutdown()
            self.llm = None
            cleanup_dist_env_and_memory()
            # vLLM keeps them for engines of the same process, of which there is only one elsewhere.
            rotary_embedding._ROPE_DICT.clear()
            gc.collect()
        FREEZE()  # what is left will stay: the collections of the next start and stop need not go through it
        return {}

    def tokens(self, length: int = 16, adapter: str | None = None) -> dict[str, Any]:
        """Greedy tokens, and how many of the draft model's were offered and accepted for them."""
        self.llm.reset_prefix_cache()
        lora = None if adapter is None else LoRARequest("of the test", 1, adapter)
        before = self._spec_decode()
        how = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
        outputs = self.llm.generate(PROMPTS, how, use_tqdm=False, lora_request=lora)
        after = self._spec_decode()
        return {
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
            **{name: after[name] - before.get(name, 0) for name in after},
        }

    def update(
        self,
        checkpoint: str,
        bucket_bytes: int = 100_000,
        fail_after: int | None = None,
        break_after: int | None = None,
        alter: str | None = None,
        without: tuple[str, ...] = (),
        draft: str | None = None,
        reload: Any = "auto",
        shards: int = 0,
        at_once: int | None = None,
        only: tuple[str, ...] = (),
        spill: str | None = None,
        *,
        lenient: bool = False,
        **change: Any,
    ) -> dict[str, Any]:
        tensors = changed(read(checkpoint), **change)
        if draft is not None:
            tensors.update({f"draft_model.{name}": tensor for name, tensor in read(draft).items()})
        if only:
            tensors = {name: each for name, each in tensors.items() if any(fnmatchcase(name, one) for one in only)}
        specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        with ExitStack() as faults:
            faults.enter_context(mock.patch.dict(os.environ, {LENIENT: str(int(lenient))}))
            opened = faults.enter_context(watched_layers(at_once))
            recording = faults.enter_context(mock.patch.object(loadplan, "_plan_anew", wraps=loadplan._plan_anew))
            for thing in without:
                faults.enter_context(lacking(thing))
            if alter is not None:
                faults.enter_context(altered_plan(alter))
            if spill is not None:
                faults.enter_context(spilling_loader(compat.target_model(self.worker), spill))
            if fail_after is not None:
                faults.enter_context(broken_loader(compat.target_model(self.worker), fail_after))
            adapter = self.adapter.verifier() if reload == "verify" else self.adapter
            try:
                adapter.begin(Update("id", "test", Path(checkpoint).name, specs, reload, partial=bool(only)))
                for bucket in cut_off(buckets(tensors, bucket_bytes), break_after):
                    adapter.load(in_shards(bucket, shards) if shards else placed(bucket))
                    SCRATCH.fill_(0x41)
                details = adapter.finish().details()
            except Exception as error:  # noqa: BLE001 - reported to the test
                traceback.print_exc()
                intact = adapter.abort()
                return {
                    "error": type(error).__name__,
                    "message": str(error),
                    "intact": intact,
                    "dirty": self.adapter.dirty,
                }
        held = {"dirty": self.adapter.dirty, "version": self.adapter.version, "opened": max(opened, default=0)}
        held["recorded"] = recording.call_count
        return {"error": None, **held, **self.adapter.life.parts(), "details": details}

    def native(
        self, checkpoint: str, steps: str = "isuf", break_after: int | None = None, **change: Any
    ) -> dict[str, Any]:
        """An update by the parameter server through vLLM's own calls; see `transfer_doors.native`."""
        tensors = changed(read(checkpoint), **change)
        with ExitStack() as faults:
            if break_after is not None:
                faults.enter_context(broken_loader(compat.target_model(self.worker), break_after))
            return transfer_doors.native(
                self, tensors, checkpoint, steps, reload="auto" if break_after is None else "loader"
            )

    def offline(
        self, checkpoint: str, what: str = "publish", break_after: int | None = None, **change: Any
    ) -> dict[str, Any]:
        """By the client of an offline `LLM`; see `transfer_doors.offline`."""
        tensors = changed(read(checkpoint), **change)
        with ExitStack() as faults:
            if break_after is not None:
                faults.enter_context(broken_loader(compat.target_model(self.worker), break_after))
            how = {} if break_after is None else {"reload": "loader"}
            return transfer_doors.offline(self, tensors, checkpoint, what, **how)

    def ipc(
        self,
        checkpoint: str,
        buffer: int | None = None,
        stop_after: int | None = None,
        break_after: int | None = None,
        **change: Any,
    ) -> dict[str, Any]:
        """An update by vLLM's own `ipc` trainer; see `transfer_doors.ipc`."""
        tensors = changed(read(checkpoint), **change)
        with ExitStack() as faults:
            if break_after is not None:
                faults.enter_context(broken_loader(compat.target_model(self.worker), break_after))
            return transfer_doors.ipc(self, tensors, buffer=buffer, stop_after=stop_after)

    def nccl(
        self,
        checkpoint: str,
        buffer: int | None = None,
        port: int | None = None,
        leave_after: int | None = None,
        **change: Any,
    ) -> dict[str, Any]:
        """An update by vLLM's own `nccl` trainer; see `transfer_doors.nccl`."""
        tensors = changed(read(checkpoint), **change)
        return transfer_doors.nccl(self, tensors, buffer=buffer, port=port, leave_after=leave_after)

    def call(self, method: str, arguments: tuple[Any, ...] = ()) -> dict[str, Any]:
        """One of vLLM's own calls."""
        with transfer_doors.told() as outcome:
            getattr(self.llm, method)(*arguments)
        return outcome

    def contract(self, checkpoints: list[str], spoilt: str) -> dict[str, str]:
        """Which checks of the sdk fail, and why; checkpoints 0 and 1, and a parameter to flip a bit of."""
        cold = []
        for checkpoint in checkpoints:
            self.start(checkpoint)
            cold.append(fingerprint(compat.target_model(self.worker)))
        self.start(checkpoints[0], load_format="dummy")
        verdicts = run_checks(UnderTest(self, checkpoints, cold, spoilt))
        return {name: words for name, words in verdicts.items() if words}

    def make_adapter(self, checkpoint: str, directory: str, seed: int = 5) -> dict[str, Any]:
        return make_adapter(checkpoint, directory, seed=seed)

    def spoil(self, parameter: str) -> dict[str, Any]:
        """Flips one bit of a live parameter."""
        found = dict(compat.target_model(self.worker).named_parameters())[parameter]
        found.data.view(-1).view(torch.uint8)[-1] ^= 1
        return {}

    def move_experts(self, *, moves: bool) -> dict[str, Any]:
        """Says that experts are moved as load demands, which takes several GPUs."""
        self.worker.vllm_config.parallel_config.enable_eplb = moves
        return {}

    def wrap_experts(self) -> dict[str, Any]:
        """Says that experts are wrapped for LoRA, which vLLM's kernels on a CPU cannot be."""
        compat.target_model(self.worker).lora_manager.modules["model.layers.0.mlp.experts"] = type(
            "FusedMoE3DWithLoRA", (type("FusedMoEWithLoRA", (), {}),), {}
        )()
        return {}

    def hold_cutlass_experts(self) -> dict[str, Any]:
        """Puts vLLM's own experts for GPUs into the kernel of a layer: they can be made on a CPU, though not run."""
        layer = next(module for module in compat.target_model(self.worker).modules() if hasattr(module, "w13_weight"))
        package = "vllm.model_executor.layers.fused_moe"
        try:
            experts = importlib.import_module(f"{package}.experts.triton_cutlass_moe")
        except ImportError:  # before 0.22
            experts = importlib.import_module(f"{package}.triton_cutlass_moe")
        config = fp8_w8a8_moe_quant_config(w1_scale=torch.ones(4), w2_scale=torch.ones(4))
        method = layer.quant_method
        kernel = getattr(method, "moe_kernel", None) or method.moe_mk  # before 0.18
        getattr(kernel, "impl", kernel).fused_experts = experts.TritonOrCutlassExperts(method.moe, config)
        return {}

    def unreloadable(self, *, graphs: bool = True) -> dict[str, Any]:
        """What an update would not reach; with captured graphs, also what they would go on reading."""
        return {"found": formats.unreloadable(compat.target_model(self.worker), graphs=graphs)}

    def mock_kernels(self) -> dict[str, Any]:
        """Engines started from now on have FP8 kernels, in plain torch; says what vLLM itself lacks on this CPU."""
        importlib.import_module("mock_kernels")
        there = {
            "int4 weights": hasattr(torch.ops._C, "cpu_gemm_wna16"),
            "FP8 caches": torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported(),
        }
        return {"missing": [kernel for kernel, has in there.items() if not has]}

    def load_plainly(self, checkpoint: str) -> dict[str, Any]:
        """What reloading was before vLLM had a way for it: the loader once more, over what the kernels made."""
        try:
            compat.target_model(self.worker).load_weights(read(checkpoint).items())
        except (AttributeError, IndexError, ValueError, RuntimeError, AssertionError) as error:
            return {"error": type(error).__name__}
        return {"error": None}

    def state(self) -> dict[str, Any]:
        """What every layer computes, hashed; addresses of parameters; and parameters left without data."""
        served, draft = compat.target_model(self.worker), compat.draft_model(self.worker)
        with without_adapters(served):
            return {
                "served": fingerprint(served),
                "draft": {} if draft is None else fingerprint(draft),
                "addresses": {name: parameter.data_ptr() for name, parameter in served.named_parameters()},
                "without_data": [name for name, parameter in served.named_parameters() if parameter.is_meta],
            }

    def _spec_decode(self) -> dict[str, int]:
        counters = {"num_draft_tokens", "num_accepted_tokens"}
        found = {metric.name.rpartition("spec_decode_")[2]: metric for metric in self.llm.get_metrics()}
        return {name: int(found[name].value) for name in counters & found.keys()}


class UnderTest(EngineUnderTest):
    """A vLLM worker as the contract of sinks sees it."""

    def __init__(self, engine: Engine, checkpoints: list[str], cold: list[dict[str, str]], spoilt: str) -> None:
        self._engine, self._cold, self._spoilt = engine, cold, spoilt
        self._tensors = [read(checkpoint) for checkpoint in checkpoints]

    @property
    def sink(self) -> Any:
        return self._engine.adapter

    def checkpoint(self, number: int) -> dict[str, torch.Tensor]:
        return self._tensors[number]

    def cold(self, number: int) -> dict[str, str]:
        return self._cold[number]

    def state(self) -> dict[str, str]:
        return fingerprint(compat.target_model(self._engine.worker))

    def addresses(self) -> dict[str, int]:
        return self._engine.state()["addresses"]

    def spoil(self) -> None:
        self._engine.spoil(self._spoilt)


def fingerprint(model: torch.nn.Module) -> dict[str, str]:
    """Hashes of parameters, and of what linear layers make of a fixed input: on the CPU weights are packed away."""
    result = {}
    for name, module in model.named_modules():
        digest = hashlib.sha256()
        if isinstance(module, LinearBase):
            generator = torch.Generator().manual_seed(0)
            width = getattr(module, "input_size_per_partition", module.input_size)
            given = torch.randn((4, width), generator=generator).to(torch.bfloat16)
            digest.update(as_bytes(module.quant_method.apply(module, given)))
        for _, parameter in module.named_parameters(recurse=False):
            digest.update(as_bytes(parameter.detach()))
        if compat.is_attention(module):
            for own, value in sorted(derived(module).items()):
                digest.update(
                    own.encode() + (as_bytes(value) if isinstance(value, torch.Tensor) else str(value).encode())
                )
        result[name] = digest.hexdigest()
    return result


def derived(attention: torch.nn.Module) -> dict[str, torch.Tensor | float]:
    """Scales, and what an attention layer makes of other layers' weights."""
    held = {**vars(attention), **dict(attention.named_buffers(recurse=False))}
    # Where the cache is not quantised, a start with dummy weights leaves nonsense in scales that nothing reads.
    read = ("_scale", "_float") if getattr(attention, "kv_cache_dtype", "").startswith("fp8") else ("_float",)
    wanted = {name for name in held if name.startswith("W_") or name.endswith(read)}
    return {name: held[name] for name in wanted if isinstance(held[name], (torch.Tensor, float))}


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def read(checkpoint: str) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(Path(checkpoint).glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118 - not a mapping
    return found


def make_adapter(checkpoint: str, directory: str, rank: int = 8, seed: int = 5) -> dict[str, Any]:
    """A LoRA adapter of a checkpoint, of random numbers, that changes what it generates."""
    layers = ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, tensor in read(checkpoint).items():
        layer = name.removesuffix(".weight")
        if layer.endswith(layers):
            for part, shape in (("A", (rank, tensor.shape[1])), ("B", (tensor.shape[0], rank))):
                made = torch.randn(shape, generator=generator) / 4
                tensors[f"base_model.model.{layer}.lora_{part}.weight"] = made.to(torch.bfloat16)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": layers, "bias": "none"}
    Path(directory).mkdir()
    save_file(tensors, Path(directory, "adapter_model.safetensors"))
    Path(directory, "adapter_config.json").write_text(json.dumps(config))
    return {}


def changed(
    tensors: dict[str, torch.Tensor],
    rename: dict[str, str] | None = None,
    drop: tuple[str, ...] = (),
    only: tuple[str, ...] = (),
    shorten: tuple[str, ...] = (),
    double: tuple[str, ...] = (),
    first: str | None = None,
    as_dtype: str | None = None,
) -> dict[str, torch.Tensor]:
    tensors = {(rename or {}).get(name, name): tensor for name, tensor in tensors.items() if name not in drop}
    tensors = {name: tensor for name, tensor in tensors.items() if not only or name in only}
    for name in shorten:
        tensors[name] = tensors[name][:-1].contiguous()
    for name in double:
        tensors[name] = torch.cat([tensors[name], tensors[name]])
    if first is not None:
        tensors = {first: tensors[first], **tensors}
    if as_dtype is not None:
        tensors = {name: tensor.to(getattr(torch, as_dtype)) for name, tensor in tensors.items()}
    return tensors


def in_shards(bucket: list[tuple[str, torch.Tensor]], count: int) -> ScatteredDelivery:
    """The same tensors, each in so many boxes of its last dimension, as ranks of a trainer hold them."""
    entries: list[TensorSlice] = []
    parts: list[torch.Tensor] = []
    offset = 0
    for name, tensor in bucket:
        begin = 0
        for part in tensor.chunk(count, -1):
            at = (*(0 for _ in tensor.shape[1:]), begin)
            entries.append(
                TensorSlice(
                    name, dtype_name(part.dtype), tuple(part.shape), offset, ShardPlace(tuple(tensor.shape), at)
                )
            )
            parts.append(part)
            begin, offset = begin + part.shape[-1], offset + -(-part.nbytes // 256) * 256
    memory = torch.zeros(offset, dtype=torch.uint8)
    for entry, part in zip(entries, parts, strict=True):
        memory[entry.offset : entry.offset + part.nbytes] = part.contiguous().view(-1).view(torch.uint8)
    counts = {name: sum(entry.name == name for entry in entries) for name, _ in bucket}
    layout = UpdateLayout("shards", (ReceivedBucket(entries),), {}, offset, counts)
    found = ShardAssembly(layout, torch.device("cpu"), {}).add(layout.buckets[0], memory, Load(0, 0), stays=True)
    if found is None:
        raise ValueError("nothing is complete")
    return found


def buckets(tensors: dict[str, torch.Tensor], size: int) -> list[list[tuple[str, torch.Tensor]]]:
    result: list[list[tuple[str, torch.Tensor]]] = [[]]
    filled = 0
    for pair in tensors.items():
        if filled and filled + pair[1].nbytes > size:
            result.append([])
            filled = 0
        result[-1].append(pair)
        filled += pair[1].nbytes
    return result


def cut_off(sent: list[Any], after: int | None) -> Iterator[Any]:
    yield from sent[:after]
    if after is not None:
        raise RuntimeError("the sender is gone")


def placed(bucket: list[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
    result, offset = [], 0
    for name, tensor in bucket:
        raw = tensor.contiguous().reshape(-1).view(torch.uint8)
        place = SCRATCH[offset : offset + raw.numel()]
        place.copy_(raw)
        result.append((name, place.view(tensor.dtype).view(tensor.shape)))
        offset += -(-raw.numel() // 256) * 256
    return result


def lacking(thing: str) -> Any:
    """Takes something away that not every vLLM, or not every model, has."""
    if thing == "plan":
        return mock.patch.object(shadow, "build_without_data", side_effect=RuntimeError("taken away by the test"))
    if thing == "kept memory":
        layerwise = importlib.import_module("vllm.model_executor.model_loader.reload.layerwise")
        return mock.patch.object(layerwise, "materialize_layer", anew)
    return mock.patch.object(compat, "_mtp_switch", return_value=None)


def anew(layer: torch.nn.Module, *_: Any) -> None:
    """As before 0.24: gives memory to all tensors of a layer, those that have some included."""
    meta = importlib.import_module("vllm.model_executor.model_loader.reload.meta")
    for name, tensor in meta.get_layer_tensors(layer).items():
        if name not in meta.SKIP_TENSORS:
            setattr(layer, name, meta.materialize_meta_tensor(tensor))
            getattr(layer, name).data.zero_()


@contextmanager
def altered_plan(target: str) -> Iterator[None]:
    """Makes plans wrong: one of the copies into a parameter takes its first row again and again."""
    original = loadplan.make_plan

    def make_plan(recording: Any, targets: Any) -> Any:
        plan = original(recording, targets)
        pieces = {}
        for name, found in plan.pieces.items():
            pieces[name] = tuple(
                msgspec.structs.replace(
                    piece, region=type(piece.region)(piece.region.offset, piece.region.shape, (0, 1))
                )
                if piece.target == target and len(piece.region.shape) == 2
                else piece
                for piece in found
            )
        return replace(plan, pieces=pieces)

    with mock.patch.object(loadplan, "make_plan", make_plan):
        yield


@contextmanager
def watched_layers(at_once: int | None) -> Iterator[list[int]]:
    """Has so many bytes of layers be open at once, if that is given; yields how many were, time by time."""
    opened: list[int] = []

    def open_layers(reload: PlannedReload, tensors: Any) -> None:
        original(reload, tensors)
        opened.append(sum(memory.nbytes for memory in reload._moving.values()))

    original = PlannedReload._open_layers
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(PlannedReload, "_open_layers", open_layers))
        if at_once is not None:
            patches.enter_context(mock.patch.object(parting, "AT_ONCE", at_once))
        yield opened


@contextmanager
def spilling_loader(model: Any, parameter: str) -> Iterator[None]:
    """Makes the model's loader write into a parameter that nothing was brought for."""
    original = model.load_weights

    def load_weights(weights: Any) -> Any:
        loaded = original(weights)
        model.get_parameter(parameter).data.add_(1)
        return loaded

    model.load_weights = load_weights
    try:
        yield
    finally:
        del model.load_weights


@contextmanager
def broken_loader(model: Any, tensors: int) -> Iterator[None]:
    """Makes the model's loader raise when it has taken that many tensors."""
    original, taken = model.load_weights, [0]

    def counted(weights: Any) -> Any:
        for pair in weights:
            if taken[0] >= tensors:
                raise RuntimeError("a fault made by the test")
            taken[0] += 1
            yield pair

    model.load_weights = lambda weights: original(counted(weights))
    try:
        yield
    finally:
        del model.load_weights


def main() -> None:
    faulthandler.enable()
    engine = Engine()
    with os.fdopen(int(sys.argv[1]), "w") as answers:
        for line in sys.stdin:
            request = json.loads(line)
            answer = getattr(engine, request.pop("do"))(**request)
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
    engine.stop()


if __name__ == "__main__":
    main()
