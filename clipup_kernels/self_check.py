"""The self-check: every op of this installation against plain torch in float64, on the device that is going to run it.

Kernels are compiled on the user's machine, by the user's version of Triton, for the user's card. So what the tests of
this package have shown elsewhere is shown again there, once, in less than a minute.

    from clipup_kernels.self_check import check_once
    check_once("cuda")

``python -m clipup_kernels.self_check cuda`` prints every error, as ``clipup doctor --device cuda`` does.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import reference
from .backend_info import package_version
from .backends import registry, torch_eager
from .machine import processor_name
from .types import Plan

TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Largest error allowed, relative to the largest entry of the result in float64. In float32, GPUs round the factors of
products to TF32, which has 10 bits."""
_POISON_BYTES = 64 << 20
_lock = threading.Lock()


@dataclass(frozen=True)
class Finding:
    """The check of one op in one type."""

    op: str
    dtype: str
    """Of the tokens, for example "bfloat16"."""
    chosen_by: str
    """The type by which the registry chooses: that of the op's first argument."""
    backend: str
    """The backend that was checked."""
    error: float | None
    """Largest error, relative to the largest entry of the result in float64; None if the op gave no result."""
    allowed: float
    reason: str | None
    """Why it failed; None if it passed."""


def self_check(device: str | torch.device = "cuda", dtypes: Iterable[torch.dtype] = tuple(TOLERANCE)) -> list[Finding]:
    """Runs every op, forward and backward, on small odd shapes, and compares it with plain torch in float64.

    An op that fails in a type is no longer given to that backend in this process: the next one of the table computes
    it, in the end plain torch. ``backend_info()`` shows that. Ops that plain torch computes anyway are left out.

    Args:
        device: where to run. dtypes: types of the tokens to check.

    Returns:
        A finding for each op and type, failed ones included.
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    registry.trust_all()  # what failed before is checked again
    findings = []
    for dtype in dtypes:
        for op, cases in _cases(dtype).items():
            choice = registry.choose(op, cases[0][0].dtype, device.type, device.index)
            if choice.backend.name != "torch_eager":
                findings.append(_check(op, choice.backend, cases, dtype, device))
    _distrust_failed(findings)
    return findings


def check_again(device: str | torch.device = "cuda") -> list[Finding]:
    """``self_check`` in every type, whose result replaces the one that ``check_once`` keeps."""
    findings = self_check(device)
    _write(cache_file(device), findings)
    return findings


def check_once(device: str | torch.device = "cuda") -> list[Finding]:
    """``self_check``, once for each card and each version of torch, Triton and this package.

    The result is kept in the user's cache directory (``$XDG_CACHE_HOME`` or ~/.cache, in clipup/self_check). Ops that
    failed then are not trusted now either, and each is named in a ``RuntimeWarning``.
    """
    with _lock:
        path = cache_file(device)
        findings = _read(path)
        if findings is None:
            findings = check_again(device)
        _distrust_failed(findings)
    for finding in findings:
        if finding.reason is not None:
            warnings.warn(f"clipup_kernels: {sentence(finding)}", RuntimeWarning, stacklevel=2)
    return findings


def sentence(finding: Finding) -> str:
    """What a failed check means for the user."""
    return (
        f"{finding.op} in {finding.dtype} failed its self-check on {finding.backend} ({finding.reason}); another "
        "backend computes it, which is slower and right. `clipup doctor --device cuda` checks again"
    )


def report(findings: list[Finding], device: str | torch.device) -> str:
    """The findings as a table, with a last line that counts them."""
    rows = [("op", "type", "backend", "error", "allowed", "verdict")]
    for one in findings:
        error = "" if one.error is None else f"{one.error:.1e}"
        rows.append((one.op, one.dtype, one.backend, error, f"{one.allowed:.0e}", one.reason or "ok"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    note = known_faults(device)
    failed = sum(finding.reason is not None for finding in findings)
    lines = [processor_name(device), *("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)]
    lines += [f"note: {note}"] * bool(note)
    return "\n".join([*lines, f"{len(findings)} checks, {failed} failed"])


def known_faults(device: str | torch.device) -> str | None:
    """What others have seen on this kind of card, for whoever reads a report; None if nothing is known."""
    device = torch.device(device)
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 10:
        return None
    return (
        "on cards of compute capability 10, Triton 3.7 has been seen to miscompile a backward pass that uses tcgen05 "
        "(Liger-Kernel, pull request 1294)"
    )


def cache_file(device: str | torch.device) -> Path:
    """Where ``check_once`` keeps its result for a device and the installed versions."""
    versions = [package_version(name) for name in ("clipup", "triton", "numpy")]
    key: list[Any] = [processor_name(device), torch.__version__, torch.version.cuda, *versions, registry.forced()]
    if torch.device(device).type == "cuda":
        key.append(torch.cuda.get_device_capability(device))
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root, "clipup", "self_check", f"{name}.json")


def _read(path: Path) -> list[Finding] | None:
    """None if there is no result or it cannot be read: then the check runs again."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return [Finding(**finding) for finding in content] if isinstance(content, list) else None
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def _write(path: Path, findings: list[Finding]) -> None:
    """Without a cache directory that can be written to, the check runs again next time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
            json.dump([asdict(finding) for finding in findings], file, indent=1)
        os.replace(file.name, path)
    except OSError:
        return


def _distrust_failed(findings: list[Finding]) -> None:
    for finding in findings:
        if finding.reason is not None:
            registry.distrust(finding.backend, finding.op, getattr(torch, finding.chosen_by), finding.reason)


def _check(op: str, backend: registry.Backend, cases: list[tuple], dtype: torch.dtype, device: torch.device) -> Finding:
    error, reason = None, None
    try:
        error = max(_error(op, backend, arguments, device) for arguments in cases)
        if error > TOLERANCE[dtype]:
            reason = f"its error is {error:.1e} of the largest entry, allowed {TOLERANCE[dtype]:.0e}"
    except Exception as failure:  # a compiler's own, of many kinds
        reason = f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0]}"
    of_tokens, chosen_by = (str(one).removeprefix("torch.") for one in (dtype, cases[0][0].dtype))
    return Finding(op, of_tokens, chosen_by, backend.name, error, TOLERANCE[dtype], reason)


def _error(op: str, backend: registry.Backend, arguments: tuple, device: torch.device) -> float:
    """Largest error over the op's results, each relative to the largest entry of its oracle; infinite for NaN."""
    wanted = _as_tuple(getattr(torch_eager, op)(*_wide(arguments)))
    on_device = _map(lambda t: t.to(device), arguments)
    if device.type == "cuda":  # memory that the op does not write shows
        torch.full((_POISON_BYTES // 4,), torch.nan, device=device)
    results = _as_tuple(registry.implementation(backend, op)(*on_device))
    errors = [_distance(result.cpu(), oracle) for result, oracle in zip(results, wanted, strict=True)]
    return max(errors, default=0.0)


def _distance(result: Tensor, oracle: Tensor) -> float:
    if result.shape != oracle.shape:
        return torch.inf
    if oracle.numel() == 0:
        return 0.0
    if not oracle.is_floating_point():
        return 0.0 if torch.equal(result.to(oracle.dtype), oracle) else torch.inf
    if not result.isfinite().all():
        return torch.inf
    return float((result.double() - oracle).abs().max() / oracle.abs().max().clamp_min(torch.finfo(torch.float32).tiny))


def _as_tuple(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def _wide(arguments: tuple) -> list[Any]:
    return _map(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, arguments)


def _map(change: Any, arguments: tuple) -> list[Any]:
    return [change(one) if isinstance(one, Tensor) else one for one in arguments]


def _cases(dtype: torch.dtype) -> dict[str, list[tuple]]:
    """Arguments of every op, on the CPU: odd widths, and widths and rows for several full tiles; with and without
    gates, biases, masks and a capacity."""
    cases: dict[str, list[tuple]] = {}
    for seed, sizes in enumerate(((37, 19, 53, 5, 3), (330, 64, 96, 4, 2))):
        for op, arguments in _cases_of(dtype, *sizes, generator=torch.Generator().manual_seed(seed)):
            cases.setdefault(op, []).append(arguments)
    return cases


def _cases_of(
    dtype: torch.dtype, tokens: int, width: int, hidden: int, num_experts: int, k: int, generator: torch.Generator
) -> Iterator[tuple[str, tuple]]:
    def randn(*size: int, dtype: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*size, generator=generator)).to(dtype)

    full = torch.float32
    x, dy, router = randn(tokens, width), randn(tokens, width), randn(num_experts, width, dtype=full)
    mask = torch.rand(tokens, generator=generator) < 0.8
    logits, d_logits = randn(tokens, num_experts, dtype=full), randn(tokens, num_experts, dtype=full)
    for used in (None, mask):
        yield "router_logits", (x, router, used)
        yield "router_logits_backward", (d_logits, x, router, used, [True, True])
    bias = randn(num_experts, dtype=full, scale=0.1)
    gating = reference.topk_gating(logits, k, True, bias, mask)
    gradients = (randn(tokens, k, dtype=full), randn(tokens, dtype=full), randn(num_experts, dtype=full))
    yield "topk_gating", (logits, k, True, bias, mask)
    yield "topk_gating", (logits, k, False, None, None)
    yield "topk_gating_backward", (logits, gating.expert_indices, True, mask, *gradients, randn(1, dtype=full)[0])
    yield "dispatch", (gating.expert_indices, num_experts, None, None, None)
    yield "dispatch", (gating.expert_indices, num_experts, 0.8, gating.top_prob, mask)
    plan: Plan = reference.dispatch(gating.expert_indices, num_experts, 0.8, gating.top_prob, mask)
    rows = randn(tokens * k, width)
    yield "permute", (x, *plan)
    yield "gather_sum", (rows, plan.row_of_choice)
    yield "combine", (rows, gating.gates, *plan)
    yield "combine_backward", (dy, rows, gating.gates, *plan)
    scale = width**-0.5
    in_weight, gate_weight = (randn(num_experts, hidden, width, scale=scale) for _ in range(2))
    in_bias, gate_bias = (randn(num_experts, hidden) for _ in range(2))
    out_weight, out_bias = randn(num_experts, width, hidden, scale=hidden**-0.5), randn(num_experts, width)
    yield "grouped_linear", (rows, in_weight, in_bias, plan.offsets)
    d_out = randn(tokens * k, hidden)
    yield "grouped_linear_backward", (d_out, rows, in_weight, plan.offsets, [True] * 3)
    plain = (in_weight, in_bias, out_weight, out_bias, None, None)
    gated = (in_weight, None, out_weight, None, gate_weight, None)
    with_biases = (in_weight, in_bias, out_weight, out_bias, gate_weight, gate_bias)
    for parameters, activation in ((plain, "gelu"), (gated, "silu"), (with_biases, "quick_gelu")):
        routed = (x, gating.gates, *plan, *parameters)
        yield "expert_mlp_forward", (*routed, activation, True)
        _, z = torch_eager.expert_mlp_forward(*_wide((*routed, activation, True)))
        yield "expert_mlp_backward", (dy, *routed, z.to(dtype), activation, [True] * 4)
        one = [None if weight is None else weight[0].contiguous() for weight in parameters]
        yield "dense_mlp", (x, *one, activation)


def main(argv: list[str]) -> int:
    """Prints the report for the device named by the first argument; 1 if an op failed."""
    device = argv[0] if argv else "cuda"
    findings = check_again(device)
    print(report(findings, device))
    return int(any(finding.reason is not None for finding in findings))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
