"""Which layers captured graphs would read stale: pure, with classes that hold what vLLM's hold."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from checkpoint_engine_vllm.formats import HELD, unreloadable


class Linear(torch.nn.Linear):
    def __init__(self, method: object) -> None:
        super().__init__(2, 2)
        self.quant_method = method


def model(method: object) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Identity(), Linear(method))


def test_what_a_kernel_makes_anew_is_named_with_the_version_and_the_option_that_avoid_it() -> None:
    marlin = SimpleNamespace(scheme=SimpleNamespace(kernel=SimpleNamespace(workspace=torch.zeros(4))))
    (said,) = unreloadable(model(marlin), graphs=True)
    assert "layer '1': the work space of Marlin kernels (vllm#48438; use vLLM 0.32 or newer" in said
    cutlass = SimpleNamespace(c_strides1=torch.zeros(4), scratch=SimpleNamespace(token_expert_indices=torch.zeros(4)))
    either = SimpleNamespace(experts=cutlass, fallback_experts=SimpleNamespace())
    experts = SimpleNamespace(moe_kernel=SimpleNamespace(impl=SimpleNamespace(fused_experts=either)))
    strides, scratch = unreloadable(model(experts), graphs=True)
    assert "the strides of CUTLASS experts" in strides
    assert "--moe-backend triton" in scratch


def test_a_method_that_is_a_module_is_looked_at_as_well() -> None:
    method = torch.nn.Module()
    method.kernel = SimpleNamespace(c_strides1=torch.zeros(4))
    assert len(unreloadable(model(method), graphs=True)) == 1


def test_weights_that_a_method_keeps_in_wrappers_of_its_own_are_named() -> None:
    """As OpenAI's kernels for gpt-oss have them: no tensors, and not the layer's."""
    held = SimpleNamespace(b_mx_scale=SimpleNamespace(storage=SimpleNamespace(data=torch.zeros(4))))
    (said,) = unreloadable(model(SimpleNamespace(w13_precision_config=held)), graphs=True)
    assert "the weights of OpenAI's Triton experts (MXFP4)" in said
    assert "--moe-backend marlin" in said
    assert unreloadable(model(SimpleNamespace(w13_precision_config=None)), graphs=True) == []


def test_a_number_of_a_configuration_is_not_a_tensor_that_a_kernel_made_of_it() -> None:
    """As every mixture of experts on a GPU has one, whatever its kernel."""
    config = SimpleNamespace(gemm1_alpha=1.702, gemm1_clamp_limit=None)
    assert unreloadable(model(SimpleNamespace(moe_quant_config=config)), graphs=True) == []
    config.gemm1_alpha = torch.full((4,), 1.702)
    assert len(unreloadable(model(SimpleNamespace(moe_quant_config=config)), graphs=True)) == 1


def test_without_graphs_nothing_is_in_the_way() -> None:
    assert unreloadable(model(SimpleNamespace(workspace=torch.zeros(4))), graphs=False) == []


def test_what_vllm_packed_from_a_parameter_that_it_threw_away_is_in_the_way_without_graphs_as_well() -> None:
    layer = torch.nn.Identity()
    layer.is_amx_bmm_enabled = True
    (said,) = unreloadable(torch.nn.Sequential(layer), graphs=False)
    assert said.startswith("layer '0'")
    assert "--attention-backend CPU_MLA" in said
    layer.is_amx_bmm_enabled = False
    assert unreloadable(torch.nn.Sequential(layer), graphs=False) == []


def test_what_is_a_parameter_or_shares_its_memory_is_kept_by_a_reload() -> None:
    made = model(SimpleNamespace())
    layer = made[1]
    layer.W_UV = torch.nn.Parameter(torch.zeros(2, 2))
    layer.quant_method.workspace = layer.W_UV.data
    assert unreloadable(made, graphs=True) == []
    del layer.W_UV
    layer.W_UV = torch.zeros(2, 2)
    assert len(unreloadable(made, graphs=True)) == 2


def test_what_no_reload_touches_is_left_alone() -> None:
    norm = torch.nn.LayerNorm(2)
    norm.workspace = torch.zeros(4)
    assert unreloadable(torch.nn.Sequential(norm), graphs=True) == []


def test_endless_references_end_and_each_tensor_is_named_with_the_layer_that_holds_it() -> None:
    method = SimpleNamespace()
    method.itself = method
    made = torch.nn.Sequential(Linear(method), Linear(SimpleNamespace(workspace=torch.zeros(4))))
    method.other = made[1]
    (said,) = unreloadable(made, graphs=True)
    assert said.startswith("layer '1'")


@pytest.mark.parametrize("held", HELD.values(), ids=list(HELD))
def test_each_entry_says_where_it_comes_from(held: object) -> None:
    assert held.source.startswith("vllm#")
    assert held.instead.startswith("--")
