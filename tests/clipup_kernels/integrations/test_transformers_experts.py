"""transformers' MoE models on our ops: the same outputs and gradients as their eager experts."""

import copy

import pytest
import torch
import transformers
from tiny_moe_models import MODELS, SIZE, tiny_moe_model

import clipup_kernels.integrations.transformers  # noqa: F401


def pair(name, dtype=torch.float32):
    eager = tiny_moe_model(name).to(dtype)
    ours = copy.deepcopy(eager)
    eager.set_experts_implementation("eager")
    ours.set_experts_implementation("clipup")
    return eager, ours


def mixtral_and_experts():
    _, ours = pair("Mixtral")
    return ours, next(module for module in ours.modules() if hasattr(module, "gate_up_proj"))


def batch():
    torch.manual_seed(1)
    ids = torch.randint(0, 64, (3, 9))
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_those_of_eager(name):
    eager, ours = pair(name)
    expected, found = eager(**batch()), ours(**batch())
    torch.testing.assert_close(found.logits, expected.logits)
    expected.loss.backward()
    found.loss.backward()
    wanted = dict(eager.named_parameters())
    assert any(name.endswith("gate_up_proj") for name in wanted)
    for name, parameter in ours.named_parameters():
        assert parameter.grad.shape == parameter.shape
        torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=1e-4, atol=1e-6, msg=name)


def test_choices_of_experts_elsewhere_give_nothing():
    ours, experts = mixtral_and_experts()
    torch.manual_seed(2)
    x, weights = torch.randn(40, 32), torch.rand(40, 2)
    index = torch.stack([torch.randperm(7)[:2] for _ in range(40)])  # 5 experts here; 5 and 6 are elsewhere
    experts._is_expert_parallel = True
    found = clipup_kernels.integrations.transformers.experts_forward(experts, x, index, weights)
    experts._is_expert_parallel = False
    here = index < 5
    expected = clipup_kernels.integrations.transformers.experts_forward(
        experts, x, torch.where(here, index, 0), torch.where(here, weights, 0.0)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"has_bias": True}, "biases"),
        ({"is_transposed": True}, "transposed weights"),
        ({"is_concatenated": False}, "interleaved weights"),
        ({"has_post_expert_norm": True}, "a norm after each expert"),
        ({"act_fn": torch.nn.Tanh()}, "the activation Tanh"),
    ],
)
def test_other_experts_are_refused_by_name(change, named):
    ours, experts = mixtral_and_experts()
    for name, value in change.items():
        setattr(experts, name, value)
    with pytest.raises(NotImplementedError, match=f"MixtralExperts.*{named}"):
        ours(**batch())


def test_gpt_oss_is_refused_by_name():
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**{**SIZE, "num_local_experts": 4}))
    model.set_experts_implementation("clipup")
    with pytest.raises(NotImplementedError, match="GptOssExperts"):
        model(**batch())


def test_another_implementation_can_be_set_and_ours_named_when_a_model_is_loaded(tmp_path):
    eager, ours = pair("Mixtral")
    expected = eager(**batch()).logits
    for implementation in ("grouped_mm", "clipup"):
        ours.set_experts_implementation(implementation)
        torch.testing.assert_close(ours(**batch()).logits, expected)
    eager.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="clipup")
    assert loaded.config._experts_implementation == "clipup"
    torch.testing.assert_close(loaded(**batch()).logits, expected)


@pytest.mark.parametrize("how", ["checkpointed", pytest.param("compiled", marks=pytest.mark.slow)])
def test_compiled_and_checkpointed_models_train_alike(how):
    eager, ours = pair("Mixtral")
    if how == "checkpointed":
        ours.train().gradient_checkpointing_enable()
        eager.train()
    step = torch.compile(ours, fullgraph=True) if how == "compiled" else ours
    loss, expected = step(**batch()).loss, eager(**batch()).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for one, other in zip(ours.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)
