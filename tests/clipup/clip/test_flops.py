"""FLOPs and parameters of models, compared with published numbers, derived numbers and hand-computed sums."""

import pytest
import torch
from padded_clip import set_padding_aware
from tiny_clip import CONFIGS, tiny_clip
from torch.utils.flop_counter import FlopCounterMode

from clipup import MoEConfig, accelerate, create_model_and_transforms, upcycle
from clipup.clip.flops import count, countable_attention
from clipup.clip.inputs import random_inputs

# model: image GFLOP, text GFLOP, both with every other block sparse (8 experts, top 2)
TABLE = {"ViT-B-32": (8.82, 5.96, 19.6), "ViT-B-16": (35.13, 5.96, 54.2), "ViT-L-14": (162.03, 13.30, 231.5)}


@pytest.mark.parametrize("name", TABLE)
def test_flops_of_models_match_published_numbers(name):
    with torch.device("meta"):
        model, *_ = create_model_and_transforms(name, device="meta")
    dense, sparse = count(model), count(upcycle(model, MoEConfig.clip_up()))
    image, text, sparse_both = TABLE[name]
    assert dense.image_gflops == pytest.approx(image, rel=0.01)
    assert dense.text_gflops == pytest.approx(text, rel=0.01)
    assert sparse.image_gflops + sparse.text_gflops == pytest.approx(sparse_both, rel=0.01)


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({"top_k": 1}, 1),
        ({"top_k": 3}, 3),
        ({"top_k": 2, "shared_expert": True}, 3),
        ({"top_k": 2, "routing": "expert_choice"}, 2),
        ({"top_k": 2, "routing": "expert_choice", "capacity_factor": 1.25}, 3),
    ],
)
def test_upcycling_adds_the_flops_of_active_experts_and_the_router(options, passes):
    model = tiny_clip()
    dense, sparse = count(model), count(upcycle(model, MoEConfig(num_experts=3, towers=("text",), **options)))
    tokens, width, hidden, layers = 10, 32, 128, 2
    one_pass, router = 2 * tokens * 2 * width * hidden, 2 * tokens * 3 * width
    added = layers * ((passes - 1) * one_pass + router)
    assert (sparse.text_gflops - dense.text_gflops) * 1e9 == pytest.approx(added)
    assert sparse.image_gflops == dense.image_gflops > 0
    expert = 2 * width * hidden + width + hidden
    assert sparse.params - dense.params == layers * ((2 + ("shared_expert" in options)) * expert + 3 * width)
    assert sparse.active_params - dense.params == layers * ((passes - 1) * expert + 3 * width)


@pytest.mark.parametrize("kind", CONFIGS)
def test_flops_on_the_meta_device_equal_those_of_a_run(kind):
    model = upcycle(tiny_clip(kind), MoEConfig(num_experts=3)).eval().requires_grad_(False)
    found = count(model)
    set_padding_aware(model, False)  # texts of full length are counted
    images, texts = random_inputs(model, 1)
    counted = []
    for encode, inputs in ((model.encode_image, images), (model.encode_text, texts)):
        with torch.no_grad(), countable_attention(), FlopCounterMode(display=False) as counter:
            encode(inputs)
        counted.append(counter.get_total_flops() / 1e9)
    assert found == count(model) and found[:2] == tuple(counted)


def test_counting_does_not_change_the_model():
    model = upcycle(tiny_clip(), MoEConfig(num_experts=2, capacity_factor=0.5))
    torch.backends.mha.set_fastpath_enabled(True)
    first = count(model)
    assert model.training and not any(parameter.is_meta for parameter in model.parameters())
    assert torch.backends.mha.get_fastpath_enabled()
    assert count(model) == first == count(model.eval().bfloat16())


def test_prepared_model_is_refused():
    with pytest.raises(ValueError, match="prepared by clipup.accelerate"):
        count(accelerate(tiny_clip()))
