"""The registry of engines: other inference engines that run whole dense models on a CPU, for comparison.

An engine gets a float32 tower and an example of its inputs, by their names, and returns a function of such inputs; a
program is made for the shapes that it is timed with. Its features are compared with the tower's before it is timed.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import clock
from peers import missing
from torch import Tensor, nn
from torch._inductor import config as inductor_config

CALIBRATION_BATCHES = 4
Inputs = dict[str, Tensor]
Run = Callable[[Inputs], Tensor]


class Tower(nn.Module):
    """``encode_image`` or ``encode_text`` of a model."""

    def __init__(self, model: nn.Module, method: str) -> None:
        super().__init__()
        self.model, self.method = model, method
        self.eval()

    def forward(self, inputs: Tensor) -> Tensor:
        return getattr(self.model, self.method)(inputs)


def onnxruntime_int8(tower: nn.Module, example: Inputs, threads: int, **shapes: Any) -> Run:
    """onnxruntime's recipe for transformers on CPUs: export, ``quantize_dynamic`` with int8 weights per output channel.
    Activations are quantized at every call, the rest is float32.

    Args:
        shapes: arguments of the export, such as ``dynamic_shapes``.
    """
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as directory:
        exact, quantized = Path(directory) / "exact.onnx", Path(directory) / "int8.onnx"
        torch.onnx.export(tower, f=exact, kwargs=example, input_names=[*example], dynamo=True, verbose=False, **shapes)
        quantize_dynamic(exact, quantized, per_channel=True, weight_type=QuantType.QInt8)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(quantized, options, providers=["CPUExecutionProvider"])
    return lambda inputs: torch.from_numpy(session.run(None, arrays(inputs))[0])


def openvino(tower: nn.Module, example: Inputs, threads: int, quantize: bool) -> Run:
    """OpenVINO at its best for this: a static shape, one stream, and bfloat16 or float32, whichever is faster on this
    CPU. In int8: nncf's post-training quantization with its settings for transformers, on a few batches."""
    from openvino import convert_model

    program = convert_model(tower, example_input=example, input=[tuple(value.shape) for value in example.values()])
    if quantize:
        program = openvino_int8(program, _batches(example))
    return _fastest((compiled_by_openvino(program, precision, threads) for precision in ("bf16", "f32")), example)


def openvino_int8(program: Any, batches: Sequence[Inputs]) -> Any:
    """A program of OpenVINO in int8, by nncf's settings for transformers on all of the batches."""
    import nncf

    data = nncf.Dataset(batches, arrays)
    return nncf.quantize(program, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(batches))


def compiled_by_openvino(program: Any, precision: str, threads: int, example: Inputs | None = None) -> Run:
    """A function of a program's inputs, computed in one stream.

    Args:
        precision: "bf16" or "f32", of what is not int8.
        example: inputs of the only shape that it shall take; without, those of the program.
    """
    from openvino import Core

    if example is not None:
        program = program.clone()
        program.reshape({name: [*value.shape] for name, value in example.items()})
    settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": precision}
    compiled = Core().compile_model(program, "CPU", settings)
    return lambda inputs: torch.from_numpy(compiled(arrays(inputs))[0])


def arrays(inputs: Inputs) -> dict[str, Any]:
    return {name: value.numpy() for name, value in inputs.items()}


def torchao_int8(tower: nn.Module, example: Inputs, threads: int) -> Run:
    """torchao's int8, compiled by torch's inductor with frozen weights: whichever is fastest of the export for x86 CPUs
    (static scales from a few batches) and ``quantize_`` (scales of each row), each with bfloat16 or float32 around."""
    return _fastest((*_exported(tower, example), *_dynamic(tower, "inductor")), example)


def zentorch_int8(tower: nn.Module, example: Inputs, threads: int) -> Run:
    """AMD's zentorch on a tower that torchao's ``quantize_`` quantized, in bfloat16 or float32, whichever is faster."""
    import zentorch  # noqa: F401  registers the backend

    return _fastest(_dynamic(tower, "zentorch"), example)


def _dynamic(tower: nn.Module, backend: str) -> Iterator[Run]:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    for dtype in (torch.bfloat16, torch.float32):
        quantized = copy.deepcopy(tower).to(dtype)
        quantize_(quantized, Int8DynamicActivationInt8WeightConfig())
        yield _compiled(quantized, backend, dtype)


def _exported(tower: nn.Module, example: Inputs) -> Iterator[Run]:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    observed = prepare_pt2e(torch.export.export(tower, (), example).module(), quantizer)
    for batch in _batches(example):
        observed(**batch)
    quantized = convert_pt2e(observed)
    yield _compiled(quantized, "inductor", torch.float32)
    yield _compiled(quantized, "inductor", torch.float32, autocast=True)


def _compiled(tower: nn.Module, backend: str, dtype: torch.dtype, autocast: bool = False) -> Run:
    """``dtype``: of the tower's inputs in floating point."""
    compiled = torch.compile(tower, backend=backend, dynamic=False)

    def call(inputs: Inputs) -> Tensor:
        values = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), inductor_config.patch(freezing=True):
            return compiled(**values).float()

    return call


def _fastest(runs: Iterable[Run], example: Inputs) -> Run:
    return min(runs, key=lambda run: min(clock(partial(run, example), "cpu") for _ in range(4)))


def _batches(example: Inputs) -> list[Inputs]:
    return [{name: _shuffled(value, seed) for name, value in example.items()} for seed in range(CALIBRATION_BATCHES)]


def _shuffled(example: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if example.is_floating_point():
        return torch.randn(example.shape, generator=generator)
    return example[torch.randperm(len(example), generator=generator)]


ENGINES = {
    "onnxruntime": (onnxruntime_int8, ("onnx", "onnxscript", "onnxruntime")),
    "openvino": (partial(openvino, quantize=False), ("openvino", "nncf")),
    "openvino-int8": (partial(openvino, quantize=True), ("openvino", "nncf")),
    "torchao-int8": (torchao_int8, ("torchao",)),
    "zentorch-int8": (zentorch_int8, ("torchao", "zentorch")),
}
"""How a tower is made for an engine and what has to be installed, by the last word of the names of models on it."""


def engine_of(name: str) -> str | None:
    """The engine in a model's name."""
    return next((word for word in name.split() if word in ENGINES), None)


def left_out(names: Iterable[str]) -> set[str]:
    """The models whose engine is not installed, after saying what it lacks."""
    lacking = {name: missing(ENGINES[engine][1]) for name in names if (engine := engine_of(name)) is not None}
    lacking = {name: packages for name, packages in lacking.items() if packages}
    for name, packages in lacking.items():
        print(f"left out {name}: pip install {' '.join(packages)}", file=sys.stderr)
    return set(lacking)


class OnEngine:
    """``encode_image`` and ``encode_text`` of a float32 model, for inputs of the shapes of these."""

    def __init__(self, engine: str, model: nn.Module, images: Tensor, texts: Tensor, threads: int) -> None:
        self._run = {
            method: _checked(engine, Tower(model.eval(), method), {"inputs": example}, threads)
            for method, example in {"encode_image": images.float(), "encode_text": texts}.items()
        }

    def encode_image(self, images: Tensor) -> Tensor:
        return self._run["encode_image"]({"inputs": images.float()})

    def encode_text(self, texts: Tensor) -> Tensor:
        return self._run["encode_text"]({"inputs": texts})


@torch.no_grad()
def _checked(engine: str, tower: Tower, example: Inputs, threads: int) -> Run:
    run = ENGINES[engine][0](tower, example, threads)
    cosine = torch.cosine_similarity(run(example), tower(**example)).min()
    if not cosine > 0.99:
        raise SystemExit(f"{engine}'s {tower.method} is not the model's: cosine {cosine:.3f}")
    return run
