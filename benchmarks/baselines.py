"""What the layer is compared with: dense MLPs and the usual ways to write a Mixture of Experts in plain torch.

Every function takes (x [T, D], weights) and returns y [T, D]; the sparse ones route with the same router: softmax over
E experts, the best K, gates renormalised, nothing dropped.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from moe_layer import Case, DenseWeights, Weights, check_loads, first_expert, make_weights, make_x, route
from peers import PEERS, missing_packages
from torch import Tensor, nn

import clipup_kernels as ck
from clipup_kernels.machine import package_version


def dense(x: Tensor, w: DenseWeights) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w.in_weight, w.in_bias)), w.out_weight, w.out_bias)


def dense_engine(x: Tensor, w: DenseWeights) -> Tensor:
    """The same on this project's kernels, without a derivative."""
    return ck.dense_mlp(x, *w.parameters, "gelu")


def loop(x: Tensor, w: Weights) -> Tensor:
    """A loop over the experts with index_add, as most model code has it."""
    gates, experts = route(x, w)
    y = torch.zeros_like(x)
    for expert in range(w.router.shape[0]):
        token, choice = (experts == expert).nonzero(as_tuple=True)
        out = dense(x[token], DenseWeights(*(t[expert] for t in w[1:5])))
        y.index_add_(0, token, out * gates[token, choice, None].to(x.dtype))
    return y


def loop_unbind(x: Tensor, w: Weights) -> Tensor:
    """The same loop with the stacked weights unbound once, which spares its backward a stack of zero gradients."""
    gates, experts = route(x, w)
    y = torch.zeros_like(x)
    for expert, unbound in enumerate(zip(*(t.unbind() for t in w[1:5]), strict=True)):
        token, choice = (experts == expert).nonzero(as_tuple=True)
        out = dense(x[token], DenseWeights(*unbound))
        y = y.index_add(0, token, out * gates[token, choice, None].to(x.dtype))
    return y


def loop_sorted(x: Tensor, w: Weights) -> Tensor:
    """Rows sorted by expert once, a product per expert on its slice, a gather and a sum back; the host asks once.

    The strongest loop on a GPU, where every ``nonzero`` of the others makes the host wait.
    """
    gates, experts = route(x, w)
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    row_of_choice = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
    loads = torch.bincount(flat, minlength=w.router.shape[0]).tolist()
    slices = x[order // w.top_k].split(loads)
    experts_of = zip(*(t.unbind() for t in w[1:5]), strict=True)
    out = torch.cat([dense(rows, DenseWeights(*unbound)) for rows, unbound in zip(slices, experts_of, strict=True)])
    return (out[row_of_choice].view(*gates.shape, -1) * gates[..., None].to(x.dtype)).sum(1)


def grouped_mm(x: Tensor, w: Weights) -> Tensor:
    """Rows sorted by expert, ``torch.nn.functional.grouped_mm``, biases and activation apart, index_add back."""
    gates, experts = route(x, w)
    flat = experts.flatten()
    owner, order = flat.sort(stable=True)
    offsets = torch.bincount(flat, minlength=w.router.shape[0]).cumsum(0).int()
    token = order // w.top_k
    hidden = F.grouped_mm(x[token], w.in_weight.mT, offs=offsets) + w.in_bias[owner]
    out = F.grouped_mm(F.gelu(hidden), w.out_weight.mT, offs=offsets) + w.out_bias[owner]
    return torch.zeros_like(x).index_add(0, token, out * gates.flatten()[order, None].to(x.dtype))


@functools.cache
def _hf_experts_forward() -> Callable:
    from transformers.integrations.moe import grouped_mm_experts_forward

    return grouped_mm_experts_forward


def hf_grouped_mm(x: Tensor, w: Weights) -> Tensor:
    """The experts of Hugging Face transformers, ``experts_implementation="grouped_mm"``: no gate, biases, erf GELU.

    Called as a model's expert module calls it; gates come in x's type, as from the routers of Qwen3-MoE.
    """
    gates, experts = route(x, w)
    module = SimpleNamespace(
        up_proj=w.in_weight, up_proj_bias=w.in_bias, down_proj=w.out_weight, down_proj_bias=w.out_bias, act_fn=F.gelu,
        num_experts=w.router.shape[0], has_gate=False, has_bias=True, is_transposed=False, has_post_expert_norm=False,
        _is_expert_parallel=False,
    )  # fmt: skip
    return _hf_experts_forward()(module, x, experts, gates.to(x.dtype))


def clipup(x: Tensor, w: Weights) -> Tensor:
    """This project's ops, as ``SparseMoE`` calls them."""
    logits = ck.router_logits(x, w.router.float())
    gating = ck.topk_gating(logits, w.top_k, renormalize=True)
    plan = ck.dispatch(gating.expert_indices, w.router.shape[0])
    return ck.expert_mlp(x, gating.gates, plan, w.in_weight, w.in_bias, w.out_weight, w.out_bias, "gelu")


def prepared(function: Callable, w: Weights | DenseWeights, quantize: str | None) -> Callable:
    """``clipup`` or ``dense_engine`` on packed weights, as in the layers that ``clipup.accelerate`` makes."""
    packed = w._replace(
        in_weight=ck.pack_weight(w.in_weight, quantize), out_weight=ck.pack_weight(w.out_weight, quantize)
    )
    return lambda x, _: function(x, packed)


def torch_int8(w: DenseWeights) -> Callable:
    """torch's dynamic quantization of the same MLP: int8 weights by tensor, inputs by tensor at every call."""
    from torch.ao.quantization import quantize_dynamic

    hidden, width = w.in_weight.shape
    mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
    with torch.no_grad():
        for parameter, value in zip(mlp.parameters(), w.parameters, strict=True):
            parameter.copy_(value)
    quantized = quantize_dynamic(mlp.eval(), {nn.Linear}, dtype=torch.qint8)
    return lambda x, _: quantized(x.float()).to(x.dtype)  # it takes float32 only


def oracle(x: Tensor, w: Weights | DenseWeights) -> Tensor:
    """The same layer in float64, sparse ones by the reference ops and routed on the same float32 logits."""
    if isinstance(w, DenseWeights):
        return dense(x.double(), DenseWeights(*(t.double() for t in w)))
    logits = F.linear(x.float(), w.router.float())
    gating = ck.reference.topk_gating(logits, w.top_k, renormalize=True)
    plan = ck.reference.dispatch(gating.expert_indices, w.router.shape[0])
    parameters = (t.double() for t in w[1:5])
    return ck.reference.expert_mlp(x.double(), gating.gates.double(), plan, *parameters, "gelu")


DENSE = {
    "dense_1": dense,
    "dense_k": dense,
    "dense_k_engine": dense_engine,
    "dense_k_prepared": dense_engine,
    "dense_k_int8": dense_engine,
    "dense_k_torch_int8": dense,
}
"""One dense MLP: ``dense_1`` on T rows, what the dense model pays; all others on K*T rows, the sparse layer's."""
SPARSE = {
    "loop": loop,
    "loop_unbind": loop_unbind,
    "loop_sorted": loop_sorted,
    "grouped_mm": grouped_mm,
    "hf_grouped_mm": hf_grouped_mm,
    "clipup": clipup,
    "clipup_prepared": clipup,
    "clipup_int8": clipup,
    **PEERS,
}
IMPLEMENTATIONS = DENSE | SPARSE
PREPARED = {
    "dense_k_prepared": None,
    "clipup_prepared": None,
    "dense_k_int8": "int8",
    "clipup_int8": "int8",
    "dense_k_torch_int8": "torch int8",
}
"""On weights that were prepared before the first call, and how they are quantized; the others read plain weights at
every call."""
WITHOUT_DERIVATIVE = {"dense_k_engine", *PREPARED}
TRANSFORMERS = (5, 4)
"""The first version whose grouped experts can do without a gate."""


def refusal(impl: str, training: bool, device: str) -> str | None:
    """Why an implementation cannot run here; None where it can."""
    if training and impl in WITHOUT_DERIVATIVE:
        return "has no derivative"
    if impl in PREPARED and device != "cpu":
        return "runs on CPUs only"
    if impl == "dense_k_torch_int8" and importlib.util.find_spec("torch.ao.quantization") is None:
        return "needs torch.ao.quantization"
    if PREPARED.get(impl) == "int8" and not ck.backend_info()["compiled"]:
        return "needs the compiled extension"
    if impl == "hf_grouped_mm" and version_of("transformers") < TRANSFORMERS:
        return "needs transformers " + ".".join(map(str, TRANSFORMERS)) + " or newer"
    if impl in PEERS and device == "cpu":
        return "runs on CUDA devices only"
    if impl in PEERS and (missing := missing_packages(impl)):
        return f"needs {' and '.join(missing)}"
    return None


def usual(training: bool, device: str) -> list[str]:
    """What is measured when nothing is chosen: all that can run, but for what belongs to the other kind of device."""
    others = {"loop_sorted"} if device == "cpu" else {"loop", "dense_k_engine"}
    return [name for name in IMPLEMENTATIONS if name not in others and refusal(name, training, device) is None]


def version_of(package: str) -> tuple[int, ...]:
    """Major and minor version; empty, less than any, where the package is not installed."""
    return tuple(map(int, re.findall(r"\d+", package_version(package) or "")[:2]))


class Candidate(NamedTuple):
    """An implementation with its input and weights, ready to run."""

    function: Callable[[Tensor, Weights | DenseWeights], Tensor]
    x: Tensor
    weights: Weights | DenseWeights

    def forward(self) -> Tensor:
        return self.function(self.x, self.weights)

    def gradients(self, dy: Tensor) -> tuple[Tensor, ...]:
        """Forward and backward: gradients of the input and of every parameter."""
        return torch.autograd.grad(self.forward(), [self.x, *self.weights.parameters], dy)

    def runner(self, training: bool) -> Callable[[], object]:
        """What is timed."""
        if not training:
            return self.forward
        generator = torch.Generator(self.x.device).manual_seed(2)
        dy = torch.randn(self.x.shape, generator=generator, device=self.x.device).to(self.x)
        return lambda: self.gradients(dy)


def candidates(impls: Iterable[str], case: Case, top_k: int, dtype: torch.dtype, device: str) -> dict[str, Candidate]:
    """The implementations on one case; the sparse ones share their weights."""
    weights = make_weights(case, top_k, dtype, device)
    x, x_k = (make_x(rows, case.d_model, dtype, device) for rows in (case.tokens, top_k * case.tokens))
    check_loads(case, x, weights)
    one = first_expert(weights)
    made = {}
    for impl in impls:
        function, mine = (DENSE[impl], one) if impl in DENSE else (SPARSE[impl], weights)
        if PREPARED.get(impl) == "torch int8":
            function = torch_int8(mine)
        elif impl in PREPARED:
            function = prepared(function, mine, PREPARED[impl])
        made[impl] = Candidate(function, x_k if impl in DENSE and impl != "dense_1" else x, mine)
    return made
