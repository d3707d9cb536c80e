"""A router of one's own computes the logits; everything else follows from them."""

import pytest
import torch
from tiny_clip import tiny_clip, tiny_config
from torch import nn

from clipup import MoEConfig, SparseMoE, accelerate, moe_layers, save_pretrained, upcycle
from clipup.moe.router import Router


class Fixed(Router):
    """Prefers expert 2, then expert 0, whatever the token."""

    def logits(self, x, mask=None):
        return (x @ self.weight.T) * 0 + torch.tensor([1.0, 0.0, 2.0, -1.0])


def test_logits_of_a_subclass_decide_where_tokens_go():
    layer = SparseMoE(16, 24, num_experts=4, top_k=2, balance_weight=1.0)
    layer.router = Fixed(16, layer.config)
    y, routing = layer(torch.randn(3, 5, 16), return_routing=True)
    assert (routing.experts == torch.tensor([2, 0])).all()
    torch.testing.assert_close(routing.gates, torch.tensor([2.0, 1.0]).softmax(0).expand(3, 5, 2))
    assert y.shape == (3, 5, 16)


def test_saving_a_model_names_a_class_that_is_not_saved(tmp_path):
    model = upcycle(tiny_clip(), MoEConfig.clip_up(num_experts=4))
    layer = next(iter(moe_layers(model).values()))
    layer.router = Fixed(layer.router.weight.shape[1], layer.config)
    with pytest.warns(UserWarning, match="Fixed of a router is not saved"):
        save_pretrained(model, tmp_path, tiny_config())


def test_peft_trains_the_experts(tmp_path):
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(16, 16), SparseMoE(16, 24, num_experts=4, top_k=2))
    x = torch.randn(9, 16)
    before = model(x)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["0"], target_parameters=["1.in_weight", "1.out_weight"])
    )
    torch.testing.assert_close(adapted(x), before)
    adapted(x).square().mean().backward()
    trained = {name: p.grad.abs().sum() for name, p in adapted.named_parameters() if p.requires_grad and ".1." in name}
    assert trained and any(value > 0 for value in trained.values())

    adapted.eval()
    with pytest.raises(TypeError, match="merge_and_unload"):
        accelerate(adapted)
    with torch.no_grad():
        wanted = adapted(x)
        torch.testing.assert_close(accelerate(adapted.merge_and_unload())(x), wanted)
