"""Dense models in int8 on onnxruntime, where it is installed (pip install onnx onnxscript onnxruntime).

Its recipe for transformers on CPUs: export, ``quantize_dynamic`` with int8 weights per output channel. Activations are
quantized at every call, the rest is float32. A graph is exported for the shapes that it is timed with.
"""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

ONNX = "onnxruntime"
"""The last word of the names of such models."""
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def missing() -> list[str]:
    """The packages that are not installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


class OnnxInt8:
    """``encode_image`` and ``encode_text`` of a float32 model on the CPU, for inputs of the shapes of these."""

    def __init__(self, model: nn.Module, images: Tensor, texts: Tensor, threads: int) -> None:
        self.dtype = images.dtype
        self.towers = {
            name: _session(_Tower(model, name), example, threads)
            for name, example in {"encode_image": images.float(), "encode_text": texts}.items()
        }
        for name, example in {"encode_image": images.float(), "encode_text": texts}.items():
            with torch.no_grad():
                wanted = getattr(model, name)(example)
            cosine = torch.cosine_similarity(getattr(self, name)(example), wanted).min()
            if not cosine > 0.99:
                raise SystemExit(f"onnxruntime's {name} is not the model's: cosine {cosine:.3f}")

    def encode_image(self, images: Tensor) -> Tensor:
        return self._run("encode_image", images.float())

    def encode_text(self, texts: Tensor) -> Tensor:
        return self._run("encode_text", texts)

    def _run(self, tower: str, inputs: Tensor) -> Tensor:
        return torch.from_numpy(self.towers[tower].run(None, {"inputs": inputs.numpy()})[0])


class _Tower(nn.Module):
    def __init__(self, model: nn.Module, method: str) -> None:
        super().__init__()
        self.model, self.method = model, method

    def forward(self, inputs: Tensor) -> Tensor:
        return getattr(self.model, self.method)(inputs)


def _session(tower: nn.Module, example: Tensor, threads: int):
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as directory:
        exact, quantized = Path(directory) / "exact.onnx", Path(directory) / "int8.onnx"
        with torch.no_grad():
            torch.onnx.export(
                tower.eval(), (example,), exact, input_names=["inputs"], output_names=["features"], dynamo=True,
                verbose=False,
            )  # fmt: skip
        quantize_dynamic(exact, quantized, per_channel=True, weight_type=QuantType.QInt8)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        return onnxruntime.InferenceSession(quantized, options, providers=["CPUExecutionProvider"])
