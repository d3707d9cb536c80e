"""Builds models without random initialization and assigns their weights, with one copy of each weight in memory."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_RANDOM_INITS = ("normal", "uniform", "trunc_normal", "xavier", "kaiming", "orthogonal", "sparse")
_RANDOM_IN_PLACE = {
    Tensor.normal_,
    Tensor.uniform_,
    Tensor.exponential_,
    Tensor.bernoulli_,
    Tensor.random_,
    Tensor.log_normal_,
    Tensor.cauchy_,
    Tensor.geometric_,
    # the mode sees calls of these functions, but not the calls inside them
    *(getattr(nn.init, name) for name in dir(nn.init) if name.endswith("_") and name.startswith(_RANDOM_INITS)),
}
_RANDOM_LIKE = {torch.randn_like, torch.rand_like}
_RANDOM = {torch.randn, torch.rand}
_TRUNCATED = "_no_grad_trunc_normal_"
"""What nn.init.trunc_normal_ calls, which modes do not see: torch 2.13 draws until all values are within the bounds, so
without random numbers it would never end."""
_DRAWS = 8
"""Draws of one tensor that are skipped. A tensor whose parts are drawn one by one may have so many of each."""
_here = threading.local()


class _WithoutRandomNumbers(TorchFunctionMode):
    """Skips the usual functions that draw parameters from the global generator: tensors stay uninitialized. What is
    drawn from a generator of its own is drawn, since it may be the content of a buffer that no file has."""

    def __init__(self) -> None:
        super().__init__()
        self._skipped: dict[int, list[Any]] = {}
        """Storages, which stay alive so that none takes another's place, and how often they were skipped."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if not _has_generator(args, kwargs):
            if func in _RANDOM_IN_PLACE:
                tensor = args[0] if args else kwargs["tensor"]
                if self.skips(tensor):
                    return tensor
            elif func in _RANDOM_LIKE:
                return torch.empty_like(*args, **kwargs)
            elif func in _RANDOM:
                return torch.empty(*args, **{name: value for name, value in kwargs.items() if name != "generator"})
        return func(*args, **kwargs)

    def skips(self, tensor: Tensor) -> bool:
        """Whether a draw of the tensor is skipped. What is drawn again and again is drawn: a loop may be waiting for
        numbers that meet a condition, and without them it would never end."""
        storage = tensor.untyped_storage()  # views and .data are new tensors each time
        entry = self._skipped.setdefault(storage._cdata, [storage, 0])
        entry[1] += 1
        return bool(entry[1] <= _DRAWS * max(1, storage.nbytes() // max(1, tensor.nbytes)))


def _has_generator(args: tuple, kwargs: dict[str, Any]) -> bool:
    return any(isinstance(one, torch.Generator) for one in (*args, *kwargs.values()))


@contextmanager
def without_random_numbers() -> Iterator[None]:
    """In this context and thread, modules are created with uninitialized parameters. Buffers are correct that are
    computed, or drawn from a generator that is passed; others that no state dict has differ from model to model anyway.
    """
    _skip_truncated_normals()
    before = _mode_here()
    try:
        with _WithoutRandomNumbers() as _here.mode:
            yield
    finally:
        _here.mode = before


def _mode_here() -> _WithoutRandomNumbers | None:
    """This thread's, in ``without_random_numbers``."""
    return getattr(_here, "mode", None)


def _skip_truncated_normals() -> None:
    """Replaces torch's function, once and for all, by one that returns at once in ``without_random_numbers``. To put it
    back at the end of a context would take it from other threads."""
    draw = getattr(nn.init, _TRUNCATED, None)
    if draw is None or hasattr(draw, "skips"):
        return

    @functools.wraps(draw)
    def drawn_unless_skipped(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        mode = _mode_here()
        skips = mode is not None and not _has_generator(args, kwargs) and mode.skips(tensor)
        return tensor if skips else draw(tensor, *args, **kwargs)

    drawn_unless_skipped.skips = True  # type: ignore[attr-defined]
    setattr(nn.init, _TRUNCATED, drawn_unless_skipped)


def drop_parameters(model: nn.Module) -> None:
    """Replaces the parameters by meta tensors. Shared parameters stay shared; buffers are unchanged."""
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                meta = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
                vars(meta).update(vars(parameter))
                module._parameters[name] = moved.setdefault(id(parameter), meta)


def assign_weights(model: nn.Module, weights: dict[str, Tensor], device: torch.device | str = "cpu") -> None:
    """Assigns copies of ``weights``, in the model's dtypes, to a model whose parameters are meta tensors.

    Copies are needed because the tensors may be memory-mapped from a file that can change.

    Args:
        weights: must fit the model (``state_dicts.check_fit``). Emptied one by one, to hold each in memory only once.
    """
    shared: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shared.setdefault(id(parameter), []).append(name)
    copies = {}
    for name, wanted in model.state_dict().items():
        copies[name] = weights.pop(name).to(device=device, dtype=wanted.dtype, copy=True)
    marks = {name: vars(parameter) for name, parameter in model.named_parameters()}
    model.load_state_dict(copies, assign=True)
    for name, marked in marks.items():  # attributes such as no_weight_decay
        vars(model.get_parameter(name)).update(marked)
    for first, *others in shared.values():
        for other in others:
            path, _, name = other.rpartition(".")
            model.get_submodule(path)._parameters[name] = model.get_parameter(first)
