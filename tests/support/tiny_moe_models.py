"""Small MoE language models of transformers, created in milliseconds and without a network."""

from __future__ import annotations

from typing import Any

import torch
import transformers

SIZE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
SIZE |= {"num_key_value_heads": 2, "intermediate_size": 24, "num_experts_per_tok": 2}
MODELS = {
    "Mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZE, num_local_experts=5)),
    "Qwen2Moe": lambda: transformers.Qwen2MoeForCausalLM(
        transformers.Qwen2MoeConfig(
            **SIZE, num_experts=6, moe_intermediate_size=16, shared_expert_intermediate_size=16, decoder_sparse_step=1
        )
    ),
    "Qwen3Moe": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**SIZE, num_experts=6, moe_intermediate_size=16, norm_topk_prob=True)
    ),
    "Olmoe": lambda: transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**SIZE, num_experts=6)),
    "Lfm2Moe": lambda: transformers.Lfm2MoeForCausalLM(
        transformers.Lfm2MoeConfig(
            **SIZE, num_experts=6, moe_intermediate_size=16, num_dense_layers=0, layer_types=["conv", "full_attention"]
        )
    ),
}


def tiny_moe_model(name: str) -> Any:
    """A float32 model in training mode, with random parameters, also of norms."""
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model
