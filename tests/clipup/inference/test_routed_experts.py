"""accelerate packs the experts of transformers' MoE language models; their routers choose as before."""

import copy

import pytest
import torch
import transformers
from tiny_moe_models import MODELS, SIZE, tiny_moe_model

import clipup
import clipup_kernels
from clipup.inference.prepared import Prepared
from clipup.inference.prepared_experts import PreparedRoutedExperts

pytestmark = pytest.mark.skipif(not clipup_kernels.backend_info()["compiled"], reason="only C++ quantizes weights")
IDS = torch.randint(0, 64, (3, 9), generator=torch.Generator().manual_seed(1))
BATCH = {"input_ids": torch.randint(0, 64, (60, 64), generator=torch.Generator().manual_seed(2))}
FIRST = "model.layers.0.mlp.experts"


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits.double()


def error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


def experts_of(model):
    return {name: module for name, module in model.named_modules() if name.endswith(".experts")}


def routed(num_experts):
    """Tokens, the experts of each, and their weights."""
    return torch.randn(40, 32), torch.rand(40, num_experts).topk(2).indices, torch.rand(40, 2)


@pytest.mark.parametrize(("dtype", "exact", "int8"), [(torch.float32, 1e-6, 0.02), (torch.bfloat16, 0.006, 0.02)])
@pytest.mark.parametrize("name", MODELS)
def test_experts_compute_the_same_up_to_rounding_or_quantization(name, dtype, exact, int8):
    plain = tiny_moe_model(name).to(dtype)
    plain.set_experts_implementation("eager")
    for weights, bound in ((None, exact), ("int8", int8)):
        fast = clipup.accelerate(plain, weights=weights)
        assert {path for path, part in fast.named_modules() if isinstance(part, Prepared)} == experts_of(plain).keys()
        for path, experts in experts_of(plain).items():
            x, index, gates = routed(experts.num_experts)
            expected = copy.deepcopy(experts).double()(x.to(dtype).double(), index, gates.double()).detach()
            assert error(fast.get_submodule(path)(x.to(dtype), index, gates), expected) < bound


@pytest.mark.parametrize("name", MODELS)
def test_a_model_in_int8_generates_the_plain_models_tokens_under_any_experts_implementation(name):
    plain = tiny_moe_model(name).eval()
    fast = clipup.accelerate(plain, weights="int8")
    again = copy.deepcopy(fast)
    again.set_experts_implementation("batched_mm")
    assert torch.equal(logits(again), logits(fast)) and 0 < error(logits(fast), logits(plain)) < 0.01
    options = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(fast.generate(IDS, **options), plain.generate(IDS, **options))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_model_computes_the_same_bit_for_bit(name, dtype, tmp_path):
    tiny_moe_model(name).to(dtype).save_pretrained(tmp_path / "plain")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")  # .to() also rounds its frequencies
    model = clipup.accelerate(plain, weights="int8", calibrate=[BATCH], exclude=["model.layers.1.*"])
    model.save_pretrained(tmp_path / "int8")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "int8")
    assert torch.equal(logits(loaded), logits(model))
    assert clipup.accelerate_report(loaded) == clipup.accelerate_report(model)


def test_calibration_on_what_the_router_sends_to_each_expert_lowers_the_error():
    plain = tiny_moe_model("Mixtral").eval()
    fast, calibrated = (clipup.accelerate(plain, weights="int8", calibrate=some) for some in (None, [BATCH]))
    assert error(logits(calibrated), logits(plain)) < 0.95 * error(logits(fast), logits(plain))
    experts, (x, index, gates) = plain.get_submodule(FIRST), routed(5)
    for expert, rows in enumerate(PreparedRoutedExperts.seen(experts)(x, index, gates)):
        assert torch.equal(rows["in_weight"], x[[expert in choices for choices in index.tolist()]])
        hidden = PreparedRoutedExperts.hidden(experts, expert, rows["in_weight"])
        alone = experts(rows["in_weight"], torch.full((len(hidden), 1), expert), torch.ones(len(hidden), 1))
        torch.testing.assert_close(hidden @ experts.down_proj[expert].T, alone)


def test_experts_that_the_kernels_do_not_compute_are_named():
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**SIZE, num_local_experts=4))
    with pytest.raises(ValueError, match="experts: GptOssExperts, left: .* has biases"):
        clipup.accelerate(model, weights="int8")


CHANGES = {
    "derived": lambda experts: setattr(
        experts, "__class__", type("Derived", (type(experts),), {"forward": lambda *args: 0})
    ),
    "parallel": lambda experts: setattr(experts, "forward", experts.forward),  # in transformers' expert parallelism
    "more tensors": lambda experts: experts.register_buffer("own", torch.ones(1)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_experts_are_left(change):
    model = tiny_moe_model("Mixtral")
    CHANGES[change](model.get_submodule(FIRST))
    rows = {row.name: row for row in clipup.accelerate_report(clipup.accelerate(model, weights="int8"))}
    assert rows[FIRST].weights is None and "of its own" in rows[FIRST].reason
    assert rows[FIRST.replace("0", "1")].weights == "int8"


def test_experts_with_adapters_are_refused():
    peft = pytest.importorskip("peft")
    options = peft.LoraConfig(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    with pytest.raises(TypeError, match="experts has PEFT's adapters"):
        clipup.accelerate(peft.get_peft_model(tiny_moe_model("Mixtral"), options), weights="int8")
