"""Cosines between experts, against the definition in float64."""

import pytest
import torch
import torch.nn.functional as F
from sparse_clip import dense_clip, sparse_clip
from tiny_clip import tiny_clip
from tiny_families import TIMM, build, coca_cfg, timm_model

from clipup import MoEConfig, SparseMoE, moe_layers, upcycle
from clipup.inspection.expert_similarity import expert_similarity, mean_cosine, model_similarity


def cosine(a, b):
    return F.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0).item()


@pytest.mark.parametrize("gated", [False, True])
def test_cosines_are_those_of_the_matrices_as_vectors(gated):
    layer = SparseMoE(6, 10, num_experts=3, gated=gated)
    found = expert_similarity(layer)
    first = torch.cat([layer.in_weight, layer.gate_weight], 1) if gated else layer.in_weight
    for cosines, weight in ((found.first, first), (found.second, layer.out_weight)):
        expected = [[cosine(weight[e], weight[f]) for f in range(3)] for e in range(3)]
        torch.testing.assert_close(cosines, torch.tensor(expected), atol=1e-6, rtol=0)
    assert found.first_to_dense is None and found.second_to_dense is None


@pytest.mark.parametrize("name", [*list(TIMM)[::3], "CoCa"])
def test_upcycled_experts_are_equal_and_equal_the_dense_mlp(name):
    dense, towers = (
        (build(coca_cfg()), ("image", "text", "decoder")) if name == "CoCa" else (timm_model(name), ("image",))
    )
    sparse = upcycle(dense, MoEConfig(num_experts=3, towers=towers))
    found = model_similarity(sparse, dense)
    assert found.keys() == moe_layers(sparse).keys()
    for similarity in found.values():
        for cosines in similarity[:4]:
            torch.testing.assert_close(cosines, torch.ones_like(cosines))


def test_a_model_that_the_sparse_one_cannot_come_from_is_refused():
    sparse = sparse_clip()
    wider = tiny_clip(text_cfg={"width": 48, "heads": 3})
    wider.visual = type(wider.visual)(16, 8, 48, 4, 3, 4.0, output_dim=16)
    for dense in (sparse, wider, timm_model("Block/Mlp")):
        with pytest.raises(ValueError, match="dense"):
            model_similarity(sparse, dense)


def test_shards_of_an_mlp_are_compared_with_the_same_shard():
    dense = dense_clip()
    sparse = upcycle(dense, MoEConfig(num_experts=6, top_k=2, granularity=2))
    for similarity in model_similarity(sparse, dense).values():
        assert similarity.first_mean == pytest.approx(1, abs=1e-6) == similarity.second_mean
        assert mean_cosine(similarity.first) < 0.9
        torch.testing.assert_close(similarity.first_to_dense, torch.ones(6))
        torch.testing.assert_close(similarity.second_to_dense, torch.ones(6))
    cosines = torch.tensor([[1, 0.1, 0.5, 0.2], [0.1, 1, 0.3, 0.7], [0.5, 0.3, 1, 0.4], [0.2, 0.7, 0.4, 1]])
    assert mean_cosine(cosines, granularity=2) == pytest.approx(0.6)
