"""Programs of a model's encoders, by ``torch.export``, or compiled by AOTInductor: for use without this package's code.

The custom ops remain: a process that loads a program of a sparse model imports ``clipup_kernels`` first.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import atomic_files, checks
from ..clip.inputs import encoders, random_inputs
from ..moe.evaluation import evaluating

SUFFIX = ".pt2"
MAX_BATCH = 1 << 16


class _Encoder(nn.Module):
    """One encoder of a model, as the forward of a module."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, inputs: Tensor) -> Tensor:
        """images [B, 3, H, W] or token ids [B, L] -> features [B, D], not normalized."""
        return encoders(self.model)[self.name](inputs)


def export_encoders(model: nn.Module) -> dict[str, Any]:
    """The encoders ("image", and "text" if there is one) of a model of open_clip or timm, in evaluation mode.

    Batches of 1 to 65,536 are accepted, of whatever size the program was made with.

    Args:
        model: dense or sparse, not prepared. It is not changed.

    Returns:
        ``torch.export.ExportedProgram`` by encoder.

    Raises:
        TypeError: no such model.
        ValueError: it is prepared; the packed weights are those of this CPU.
    """
    checks.plain_weights("model", model)
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    inputs = dict(zip(("image", "text"), random_inputs(model, 2), strict=True))
    device = next(model.parameters()).device
    with evaluating(model), torch.no_grad():
        return {
            name: torch.export.export(
                _Encoder(model, name), (inputs[name].to(device),), dynamic_shapes=({0: batch},), strict=False
            )
            for name in encoders(model)
        }


def save_encoders(model: nn.Module, directory: Path, aot: bool = False) -> dict[str, Path]:
    """Writes ``image.pt2`` and ``text.pt2``, whole or not at all.

    Args:
        directory: is created if it is missing.
        aot: compile for this machine's CPU or GPU: ``torch._inductor.aoti_load_package`` loads the file. Otherwise
            ``torch.export.load`` does.

    Returns:
        The files by encoder.
    """
    programs = export_encoders(model)
    files = {name: directory / f"{name}{SUFFIX}" for name in programs}
    directory.mkdir(parents=True, exist_ok=True)

    def write(name: str, path: Path) -> None:
        if aot:
            torch._inductor.aoti_compile_and_package(programs[name], package_path=str(path))
        else:
            torch.export.save(programs[name], path)

    atomic_files.replace_files({path: partial(write, name) for name, path in files.items()})
    for other in {directory / f"{name}{SUFFIX}" for name in ("image", "text")} - set(files.values()):
        other.unlink(missing_ok=True)  # the text encoder of an earlier model; this model has none
    return files
