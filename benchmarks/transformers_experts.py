"""Experts of transformers' MoE models at their true widths: our implementation against those of transformers.

    python benchmarks/transformers_experts.py          # OLMoE and Qwen3 in bf16, forward and training
    python benchmarks/transformers_experts.py --models olmoe --tokens 64 512 --csv experts.csv

Each model gives one experts module with random weights; tokens are routed at random, balanced. ``eager``,
``batched_mm`` (where its gathered weights fit into --gather-gb) and ``grouped_mm`` are transformers' own, called by
the same module. ``clipup_int8``, for inference on a CPU, is ``clipup.accelerate(experts, weights="int8")``. Outputs and
gradients are compared with those of ``eager`` before anything is timed. Ratios are to ``grouped_mm``: below 1 is
faster.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
import transformers
from harness import DTYPES, alternate, commit, number, on_device, run, timed
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import clipup_kernels.integrations.transformers  # noqa: F401  registers "clipup"
from clipup import accelerate
from clipup_kernels.machine import package_version

BASELINE, INT8 = "grouped_mm", "clipup_int8"
IMPLEMENTATIONS = (BASELINE, "eager", "batched_mm", "clipup", INT8)
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 5e-3, INT8: 3e-2}


MODELS: dict[str, Callable[[], tuple[nn.Module, int]]] = {
    "mixtral": lambda: (MixtralExperts(transformers.MixtralConfig()), 2),
    "olmoe": lambda: (
        OlmoeExperts(transformers.OlmoeConfig(hidden_size=2048, intermediate_size=1024, num_experts=64)), 8
    ),
    "qwen3": lambda: (
        Qwen3MoeExperts(
            transformers.Qwen3MoeConfig(hidden_size=2048, moe_intermediate_size=768, num_experts=128)
        ), 8
    ),
}  # fmt: skip
"""The experts of Mixtral 8x7B, OLMoE 1B-7B and Qwen3 30B-A3B, and how many of them a token takes."""


class Case:
    """An experts module, and a batch of routed tokens."""

    def __init__(self, experts: Any, int8: Any, top_k: int, tokens: int, training: bool) -> None:
        self.experts, self.int8, self.training = experts, int8, training
        weight = experts.down_proj
        generator = torch.Generator().manual_seed(tokens)
        x, dy = torch.randn(2, tokens, weight.shape[1], generator=generator).to(weight)
        self.x, self.dy = x.requires_grad_(training), dy
        top = torch.rand(tokens, weight.shape[0], generator=generator).softmax(-1).topk(top_k)
        self.index = top.indices.to(weight.device)
        self.weights = (top.values / top.values.sum(-1, keepdim=True)).to(weight)

    def run(self, implementation: str) -> list[Tensor]:
        """The output, and in training the gradients of tokens and weights."""
        self.experts.config._experts_implementation = implementation
        with torch.set_grad_enabled(self.training):
            y = (self.int8 if implementation == INT8 else self.experts)(self.x, self.index, self.weights)
        inputs = [self.x, *self.experts.parameters()]
        return [y.detach(), *(torch.autograd.grad(y, inputs, self.dy) if self.training else ())]

    def gathered_gb(self) -> float:
        """What ``batched_mm`` copies: the weights of every token and choice."""
        of_expert = sum(parameter[0].numel() for parameter in self.experts.parameters())
        return self.index.numel() * of_expert * self.x.element_size() / 1e9


def check(case: Case, implementations: list[str], precision: str) -> None:
    """Stops the program unless all give what eager gives."""
    expected = case.run("eager")
    for name in implementations:
        for actual, wanted in zip(case.run(name), expected, strict=True):
            error = (actual.float() - wanted.float()).norm() / wanted.float().norm()
            if not error <= TOLERANCE[INT8 if name == INT8 else precision]:
                raise SystemExit(f"{name} in {precision}: error {error:.2g} against eager; nothing was timed")


def measure(args: argparse.Namespace) -> Iterator[dict]:
    for name, dtype in product(args.models, args.dtypes):
        yield from measure_model(name, dtype, args)


def measure_model(name: str, precision: str, args: argparse.Namespace) -> Iterator[dict]:
    torch.manual_seed(0)
    with torch.device("meta"):
        experts, top_k = MODELS[name]()
    experts = experts.to(DTYPES[precision]).to_empty(device=args.device)
    experts.config = copy.deepcopy(experts.config)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    int8 = accelerate(experts, weights="int8") if INT8 in args.impl and args.device == "cpu" else None
    for tokens, training in product(args.tokens, (False, True)):
        case = Case(experts, int8, top_k, tokens, training)
        runs = {"batched_mm": case.gathered_gb() <= args.gather_gb, INT8: int8 is not None and not training}
        chosen = [impl for impl in IMPLEMENTATIONS if impl in {*args.impl, BASELINE} and runs.get(impl, True)]
        print(f"{name} in {precision}, {tokens} tokens, {'training' if training else 'inference'}", file=sys.stderr)
        check(case, chosen, precision)
        candidates = {impl: partial(case.run, impl) for impl in chosen}
        for impl, timing in alternate(candidates, BASELINE, args.seconds, args.device, args.rounds).items():
            yield {
                **on_device(args, precision), "model": name, "tokens": tokens,
                "pass": "fwd_bwd" if training else "fwd", "impl": impl,
                **timing.columns(), "ratio_to_grouped_mm": f"{timing.ratio:.3f}",
                "commit": commit(), "torch": torch.__version__, "transformers": package_version("transformers"),
            }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    options = timed(torch.get_num_threads(), rounds=3, seconds=5) | {
        "--models": {"nargs": "+", "choices": MODELS, "default": ["olmoe", "qwen3"], "help": "(default: olmoe qwen3)"},
        "--dtypes": {"nargs": "+", "choices": DTYPES, "default": ["bf16"], "help": "(default: bf16)"},
        "--impl": {
            "nargs": "+", "choices": IMPLEMENTATIONS, "default": list(IMPLEMENTATIONS),
            "help": "beside grouped_mm; a training step of eager takes 20 s with 64 experts (default: all)",
        },
        "--tokens": {"nargs": "+", "type": int, "default": [64, 512], "help": "tokens a batch (default: 64 512)"},
        "--gather-gb": number(4.0, "most that batched_mm may gather"),
    }  # fmt: skip
    columns = "model dtype tokens pass impl median_ms p20_ms p80_ms ratio_to_grouped_mm"
    return run(argv, __doc__, options, measure, columns, "ratios are medians of pair-by-pair ratios")


if __name__ == "__main__":
    raise SystemExit(main())
