"""The self-check: every op of this installation against plain torch in float64, on the device that is going to run it.

Kernels are compiled on the user's machine, by the user's version of Triton, for the user's card. So what the tests of
this package have shown elsewhere is shown again there, once: every op, forward and backward, with and without gates,
biases, masks and a capacity, on odd shapes and, on CUDA devices, on shapes that get the tiles of usual layers.

    from clipup_kernels.self_check import check_once
    check_once("cuda")

``python -m clipup_kernels.self_check cuda`` prints every error, as ``clipup doctor --device cuda`` does.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .backend_info import package_version
from .backends import meta, registry, torch_eager
from .machine import processor_name
from .self_check_cases import SIZES, cases_of_ops, map_tensors, wide
from .types import type_name
from .user_cache import one_process, user_cache, write_json

TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Largest error allowed, relative to the largest entry of the result in float64. That of float32 is for products whose
factors torch's ``fp32_precision`` lets round to TF32, which has 10 bits; otherwise it is ``_EXACT``."""
_EXACT = 2e-5
_LINE = "{:28}  {:8}  {:14}  {:12}  {:7}  {:7}  {}"
_lock = threading.Lock()


@dataclass(frozen=True)
class Finding:
    """The check of one op in one type."""

    op: str
    dtype: str
    """Type of the tokens, for example "bfloat16"."""
    chosen_by: str
    """The type by which the registry chooses: that of the op's first argument."""
    backend: str
    """The backend that was checked."""
    error: float | None
    """Largest error, relative to the largest entry of the result in float64; None if the op gave no result."""
    allowed: float
    reason: str | None
    """Why it failed; None if it passed."""


Each = Callable[[Finding], object]


def self_check(
    device: str | torch.device = "cuda", dtypes: Iterable[torch.dtype] = tuple(TOLERANCE), each: Each | None = None
) -> list[Finding]:
    """Runs every op, forward and backward, and compares it with plain torch in float64.

    An op that fails in a type is no longer given to that backend on this device, in this process: the next one of the
    table is checked and computes it, in the end plain torch. One that failed before and passes now is. Ops that plain
    torch computes anyway are left out.

    Args:
        device: where to run, a CPU or a CUDA device. dtypes: types of the tokens to check.
        each: called with every finding as soon as it is known, from several threads on CUDA devices.

    Returns:
        A finding for each op, type and backend that was checked, failed ones included.

    Raises:
        ValueError: another device or type.
        torch.OutOfMemoryError: not enough memory for the check, which says nothing about the ops.
    """
    device = _checked_device(device)
    findings = []
    # Whatever the caller has set: tensors are made on the CPU, and the oracle is not cast.
    with torch.device("cpu"), torch.autocast("cpu", enabled=False), _filled_memory():
        for dtype in _checked_types(dtypes):
            cases = cases_of_ops(dtype, SIZES[device.type])
            with ThreadPoolExecutor(min(8, os.cpu_count() or 1) if device.type == "cuda" else 1) as pool:
                for of_op in pool.map(lambda key: _check_op(key[0], cases[key], dtype, device, each), cases):  # noqa: B023
                    findings += of_op
    for finding in findings:
        chosen_by = getattr(torch, finding.chosen_by)
        registry.distrust(finding.backend, finding.op, chosen_by, finding.reason, device.index)
    return findings


@contextlib.contextmanager
def _filled_memory() -> Iterator[None]:
    """Inside, new tensors hold NaN or the largest integer, so that what an op does not write shows."""
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)


def _check_op(
    op: str, cases: list[tuple], dtype: torch.dtype, device: torch.device, each: Each | None
) -> list[Finding]:
    """Findings about the backends of an op, best first, up to one that passes or to plain torch."""
    findings: list[Finding] = []
    for choice in registry.choices(op, cases[0][0].dtype, device.type, device.index):
        if choice.backend.name == "torch_eager":
            break
        findings.append(_check(op, choice.backend, cases, dtype, device))
        if each:
            each(findings[-1])
        if findings[-1].reason is None:
            break
    return findings


def check_again(device: str | torch.device = "cuda", each: Each | None = None) -> list[Finding]:
    """``self_check`` in every type, whose result replaces the result that ``check_once`` keeps."""
    findings = self_check(device, each=each)
    _keep(cache_file(device), findings)
    return findings


def _keep(path: Path, findings: list[Finding]) -> None:
    """Stores findings without failures for later programs. With a failure nothing is kept: they check again, because
    the fault may be repaired, or have passed."""
    with contextlib.suppress(OSError):  # without a cache directory that can be written to, the check runs next time too
        if any(finding.reason is not None for finding in findings):
            path.unlink(missing_ok=True)
        elif findings:
            write_json(path, [asdict(finding) for finding in findings])


def check_once(device: str | torch.device = "cuda", dtypes: Iterable[torch.dtype] = tuple(TOLERANCE)) -> list[Finding]:
    """``self_check``, once for each type, each card and each version of torch, Triton and this package.

    A result without failures is kept in the user's cache directory (``$XDG_CACHE_HOME`` or ~/.cache, in
    clipup/self_check). Ops that fail are each named in a ``RuntimeWarning``, and the next program checks again. The
    ranks of a machine take turns: the first rank compiles the kernels, and the others read its result.
    """
    types = _checked_types(dtypes)
    path = cache_file(device)
    with _lock, one_process(path):
        findings = _read(path)
        checked = {finding.dtype for finding in findings}
        if missing := [dtype for dtype in types if type_name(dtype) not in checked]:
            findings += self_check(device, missing)
            _keep(path, findings)
    findings = [finding for finding in findings if finding.dtype in map(type_name, types)]
    for finding in findings:
        if finding.reason is not None:
            warnings.warn(f"clipup_kernels: {sentence(finding, device)}", RuntimeWarning, stacklevel=2)
    return findings


def sentence(finding: Finding, device: str | torch.device) -> str:
    """What a failed check means for the user."""
    effect = (
        f"calls raise an error, because {registry.FORCE_BACKEND} names this backend"
        if finding.backend == registry.forced()
        else "another backend computes it, which is slower and right"
    )
    return (
        f"{finding.op} in {finding.dtype} failed its self-check on {finding.backend} ({finding.reason}); {effect}. "
        f"`clipup doctor --device {device}` checks again"
    )


def print_check(device: str | torch.device) -> list[Finding]:
    """``check_again``, which prints every finding as soon as it is known, and counts them in the last line."""
    print(processor_name(device))
    print(_LINE.format("op", "type", "first argument", "backend", "error", "allowed", "verdict"), flush=True)
    findings = check_again(device, lambda finding: print(_line(finding), flush=True))
    if not findings:
        print("nothing to check: plain torch computes every op here (clipup_kernels.backend_info() says why)")
    print(f"{len(findings)} checks, {sum(finding.reason is not None for finding in findings)} failed")
    return findings


def _line(finding: Finding) -> str:
    error = "" if finding.error is None else f"{finding.error:.1e}"
    allowed, verdict = f"{finding.allowed:.0e}", finding.reason or "ok"
    return _LINE.format(finding.op, finding.dtype, finding.chosen_by, finding.backend, error, allowed, verdict)


def cache_file(device: str | torch.device) -> Path:
    """Where ``check_once`` keeps its result for a device, this installation and its settings."""
    device = _checked_device(device)
    versions = [package_version(name) for name in ("triton", "numpy")]
    key: list[Any] = [processor_name(device), torch.__version__, torch.version.cuda, *versions, registry.forced()]
    key += [_installation(), os.environ.get(registry.FORCE_TIER)]
    if device.type == "cuda":
        key += [torch.cuda.get_device_capability(device), torch.backends.cuda.matmul.fp32_precision]
        key.append(os.environ.get("CLIPUP_TRITON_CONFIGS"))
    return user_cache("self_check", f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.json")


def _installation() -> list[tuple[str, int, int]]:
    """Name, size and time of this package's files, which change more often than its version."""
    root = Path(__file__).parent
    files = sorted(path for path in root.rglob("*") if path.suffix in (".py", ".so", ".dylib", ".pyd"))
    return [(str(path.relative_to(root)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def _read(path: Path) -> list[Finding]:
    """The stored findings; none if the file is missing or unreadable, so that the check runs again."""
    try:
        return [Finding(**finding) for finding in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        return []


def _checked_device(device: str | torch.device) -> torch.device:
    device = torch.device(device)
    if device.type not in SIZES:
        raise ValueError(f"device: got {str(device)!r}, expected cpu or cuda: no backend has kernels for other devices")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu") if device.type == "cpu" else device


def _checked_types(dtypes: Iterable[torch.dtype]) -> list[torch.dtype]:
    dtypes = [dtypes] if isinstance(dtypes, torch.dtype) else list(dtypes)
    for dtype in dtypes:
        if dtype not in TOLERANCE:
            raise ValueError(f"dtypes: got {dtype}, expected some of {', '.join(map(str, TOLERANCE))}")
    return dtypes


def _check(op: str, backend: registry.Backend, cases: list[tuple], dtype: torch.dtype, device: torch.device) -> Finding:
    error: float | None = None
    reason = None
    rounding = (torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn).matmul.fp32_precision
    allowed = _EXACT if dtype == torch.float32 and rounding in ("none", "ieee") else TOLERANCE[dtype]
    try:
        error = max(_error(op, backend, arguments, device) for arguments in cases)
        if error == torch.inf:
            error, reason = None, "its results are not finite, or not of the right type or shape"
        elif error > allowed:
            reason = f"its error is {error:.1e} of the largest entry, allowed {allowed:.0e}"
    except torch.OutOfMemoryError:
        raise
    except Exception as failure:  # a compiler's own, of many kinds
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # raises if an illegal access has ended the context: no op works any more
        reason = f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0]}"
    of_tokens, chosen_by = map(type_name, (dtype, cases[0][0].dtype))
    return Finding(op, of_tokens, chosen_by, backend.name, error, allowed, reason)


def _error(op: str, backend: registry.Backend, arguments: tuple, device: torch.device) -> float:
    """Largest error over the op's results, each relative to the largest entry of its oracle; infinite for NaN, for
    another type or shape than the op's, and for changed arguments."""
    wanted = _as_tuple(getattr(torch_eager, op)(*wide(arguments)))
    types = [output.dtype for output in _as_tuple(getattr(meta, op)(*map_tensors(lambda t: t.to("meta"), arguments)))]
    on_device = map_tensors(lambda t: t.to(device, copy=True), arguments)
    results = _as_tuple(registry.implementation(backend, op)(*on_device))
    pairs = [pair for pair in zip(arguments, on_device, strict=True) if isinstance(pair[0], Tensor)]
    changed = any(not torch.equal(argument, copy.cpu()) for argument, copy in pairs)
    if changed or [result.dtype for result in results] != types:
        return torch.inf
    errors = [_distance(result.cpu(), oracle) for result, oracle in zip(results, wanted, strict=True)]
    return max(errors, default=0.0)


def _distance(result: Tensor, oracle: Tensor) -> float:
    if result.shape != oracle.shape or not result.isfinite().all():
        return torch.inf
    if oracle.numel() == 0 or not oracle.is_floating_point():
        return 0.0 if torch.equal(result.to(oracle), oracle) else torch.inf
    return float((result.double() - oracle).abs().max() / oracle.abs().max().clamp_min(torch.finfo(torch.float32).tiny))


def _as_tuple(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def main(argv: list[str] | None = None) -> int:
    """Prints the report for a device; 1 if an op failed."""
    parser = argparse.ArgumentParser(prog="python -m clipup_kernels.self_check", description=main.__doc__)
    parser.add_argument("device", nargs="?", default="cuda", help="cpu, cuda or cuda:N (default cuda)")
    device = parser.parse_args(argv).device
    try:
        if torch.device(device).type == "cuda" and not torch.cuda.is_available():
            parser.error(f"device: got {device}, but torch finds no CUDA device; pass cpu to check its kernels")
        findings = print_check(device)
    except (RuntimeError, ValueError) as error:
        parser.error(str(error).splitlines()[0])
    return int(any(finding.reason is not None for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
