"""The registry of peers: implementations of the layer, those of this project and of others.

Layers: every function takes (x [T, D], weights) and returns y [T, D]; the sparse ones route with the same router:
softmax over E experts, the best K, gates renormalised, nothing dropped. Other projects' kernels run on CUDA where they
are installed; an adapter uses what the project has, and adds in plain torch what it lacks. All are compared with the
oracle before they are timed, so a release that changed its interface is left out by name instead of being measured
wrongly. Liger-Kernel has no entry: its fused experts are SwiGLU without biases, which is another layer.

Whole models on other engines: ``engines.py``.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from moe_layer import Case, DenseWeights, Weights, check_loads, first_expert, make_weights, make_x, route
from torch import Tensor, nn

import clipup_kernels as ck


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


def on_a_gpu(name: str) -> Callable[[Tensor, Weights], Tensor]:
    """A function of ``grouped_peers.py``, which needs Triton."""
    return lambda x, w: getattr(importlib.import_module("grouped_peers"), name)(x, w)


def hf_grouped_mm(x: Tensor, w: Weights) -> Tensor:
    """The experts of Hugging Face transformers, ``experts_implementation="grouped_mm"``: no gate, biases, erf GELU.

    Called as a model's expert module calls it; gates come in x's type, as from the routers of Qwen3-MoE.
    """
    from transformers.integrations.moe import grouped_mm_experts_forward

    gates, experts = route(x, w)
    module = SimpleNamespace(
        up_proj=w.in_weight, up_proj_bias=w.in_bias, down_proj=w.out_weight, down_proj_bias=w.out_bias, act_fn=F.gelu,
        num_experts=w.router.shape[0], has_gate=False, has_bias=True, is_transposed=False, has_post_expert_norm=False,
        _is_expert_parallel=False,
    )  # fmt: skip
    return grouped_mm_experts_forward(module, x, experts, gates.to(x.dtype))


def scattermoe(x: Tensor, w: Weights) -> Tensor:
    """Gather in the first product's loads, biases in both; the activation apart (arXiv 2403.08245)."""
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    gates, experts = route(x, w)
    order = flatten_sort_count(experts, w.router.shape[0])
    hidden = parallel_linear(x, w.in_weight.mT, w.top_k, *order, expert_biases=w.in_bias, grouped_out=True)
    return parallel_linear(
        F.gelu(hidden), w.out_weight.mT, 1, *order, expert_biases=w.out_bias, gates=gates.to(x.dtype), grouped_in=True
    )


def megablocks(x: Tensor, w: Weights) -> Tensor:
    """Its permutation and CUTLASS's grouped products; biases and activation apart (arXiv 2211.15841)."""
    from grouped_gemm.ops import gmm
    from megablocks import ops

    num_experts = w.router.shape[0]
    gates, experts = route(x, w)
    chosen = experts.flatten().int()
    owner, order = ops.sort(chosen, max((num_experts - 1).bit_length(), 1))
    rows_of_expert = ops.histogram(chosen, num_experts)
    ends = ops.inclusive_cumsum(rows_of_expert, 0)
    on_host = rows_of_expert.cpu().long()
    rows = ops.gather(x, order, owner, ends, w.top_k)
    hidden = gmm(rows, w.in_weight, on_host, trans_b=True) + w.in_bias[owner.long()]
    out = gmm(F.gelu(hidden), w.out_weight, on_host, trans_b=True) + w.out_bias[owner.long()]
    return ops.scatter(out, order, owner, gates.flatten().to(x.dtype), ends, w.top_k).view_as(x)


def sonicmoe(x: Tensor, w: Weights) -> Tensor:
    """The whole layer with its own router, GELU in the tanh form, its only one (arXiv 2512.14080)."""
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import moe_TC_softmax_topk_layer

    y, _, _ = moe_TC_softmax_topk_layer(
        x, w.router, w.in_weight.permute(1, 2, 0), w.in_bias, w.out_weight.permute(1, 2, 0), w.out_bias, w.top_k,
        torch.cuda.current_stream().cuda_stream, ActivationType.GELU, not torch.is_grad_enabled(),
    )  # fmt: skip
    return y


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


class Peer(NamedTuple):
    """An implementation of the layer."""

    function: Callable[[Tensor, Weights | DenseWeights], Tensor]
    dense: bool = False
    """One dense MLP: ``dense_1`` on T rows, what the dense model pays; all others on K*T rows, the sparse layer's."""
    packages: tuple[str, ...] = ()
    """What has to be installed: modules."""
    only_on: str | None = None
    """The device type that it runs on."""
    weights: str = "plain"
    """Read at every call; or "packed", "int8" and "torch int8": prepared before the first call."""
    derivative: bool = True
    usual_on: tuple[str, ...] = ("cpu", "cuda")
    """The devices on which it is measured when nothing is chosen."""
    usual_forward: bool = True
    """Whether it is then measured without a backward pass too."""


PEERS = {
    "dense_1": Peer(dense, dense=True),
    "dense_k": Peer(dense, dense=True),
    "dense_k_engine": Peer(dense_engine, dense=True, derivative=False, usual_on=("cpu",)),
    "dense_k_prepared": Peer(dense_engine, dense=True, only_on="cpu", weights="packed", derivative=False),
    "dense_k_int8": Peer(dense_engine, dense=True, only_on="cpu", weights="int8", derivative=False),
    "dense_k_torch_int8": Peer(
        dense, True, ("torch.ao.quantization",), only_on="cpu", weights="torch int8", derivative=False
    ),
    "loop": Peer(loop, usual_on=("cpu",), usual_forward=False),  # loop_unbind differs in the backward pass
    "loop_unbind": Peer(loop_unbind),
    "loop_sorted": Peer(loop_sorted, usual_on=("cuda",)),
    "grouped_mm": Peer(grouped_mm),
    "grouped_mm_fused": Peer(on_a_gpu("grouped_mm_fused"), packages=("triton",), only_on="cuda"),
    "quack": Peer(on_a_gpu("quack"), packages=("triton", "quack"), only_on="cuda"),
    "hf_grouped_mm": Peer(hf_grouped_mm, packages=("transformers.integrations.moe",)),
    "clipup": Peer(clipup),
    "clipup_prepared": Peer(clipup, only_on="cpu", weights="packed", derivative=False),
    "clipup_int8": Peer(clipup, only_on="cpu", weights="int8", derivative=False),
    "scattermoe": Peer(scattermoe, packages=("scattermoe",), only_on="cuda"),
    "megablocks": Peer(megablocks, packages=("megablocks", "grouped_gemm"), only_on="cuda"),
    "sonicmoe": Peer(sonicmoe, packages=("sonicmoe",), only_on="cuda"),
}


def missing(packages: Iterable[str]) -> list[str]:
    """The packages or modules that are not installed."""
    return [name for name in packages if not _is_there(name)]


def _is_there(name: str) -> bool:
    """Without an import of the packages around a module, which takes seconds of transformers."""
    package, *inner = name.split(".")
    spec = importlib.util.find_spec(package)
    files = [Path(root, *inner) for root in (spec and spec.submodule_search_locations) or ()]
    return spec is not None and (not inner or any(path.is_dir() or path.with_suffix(".py").exists() for path in files))


def refusal(impl: str, training: bool, device: str) -> str | None:
    """Why a peer cannot run here; None where it can."""
    peer = PEERS[impl]
    if training and not peer.derivative:
        return "has no derivative"
    if peer.only_on not in (None, device):
        return f"runs on {peer.only_on} devices only"
    if lacking := missing(peer.packages):
        return f"needs {' and '.join(lacking)}"
    if peer.weights == "int8" and not ck.backend_info()["compiled"]:
        return "needs the compiled extension"
    return None


def usual(training: bool, device: str) -> list[str]:
    """What is measured when nothing is chosen: all that can run, but for what belongs to the other kind of device."""
    peers = {name: peer for name, peer in PEERS.items() if device in peer.usual_on and (training or peer.usual_forward)}
    return [name for name in peers if refusal(name, training, device) is None]


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
    """The peers on one case; the sparse ones share their weights."""
    weights = make_weights(case, top_k, dtype, device)
    x, x_k = (make_x(rows, case.d_model, dtype, device) for rows in (case.tokens, top_k * case.tokens))
    check_loads(case, x, weights)
    expert = first_expert(weights)
    made = {}
    for impl in impls:
        peer = PEERS[impl]
        function, mine = peer.function, expert if peer.dense else weights
        if peer.weights == "torch int8":
            function = torch_int8(mine)
        elif peer.weights != "plain":
            function = prepared(function, mine, None if peer.weights == "packed" else peer.weights)
        made[impl] = Candidate(function, x_k if peer.dense and impl != "dense_1" else x, mine)
    return made
