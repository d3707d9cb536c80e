"""The programs that measure whole models and experts, on tiny ones: rows, columns, and no time for a wrong result."""

import csv
from itertools import product
from pathlib import Path

import clip_throughput
import engines
import gemm_peak
import harness
import int8_accuracy
import int8_load
import int8_share
import latency
import padding_aware
import pytest
import study_captions
import torch
import trainer_overhead
import training_step
import transformers
import transformers_experts
from picture_samples import png
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from clipup.data import shard_writer

TINY = "clipup-tiny-32"
SHORT = ["--threads", "1", "--seconds", "0.05", "--rounds", "2"]
RESULTS = Path(latency.__file__).parent / "results"
FORMS = (TINY, f"{TINY} CLIP-UP", f"{TINY} CLIP-UP accelerated")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    for module in (clip_throughput, latency):
        monkeypatch.setattr(module, "BASELINE", TINY)
    monkeypatch.setattr(clip_throughput, "LARGE", TINY)
    monkeypatch.setattr(clip_throughput, "MODELS", FORMS)
    monkeypatch.setattr(latency, "MODELS", (*FORMS, f"{TINY} int8", f"{TINY} onnxruntime"))
    config = transformers.MixtralConfig(hidden_size=32, intermediate_size=48, num_local_experts=4)
    monkeypatch.setitem(transformers_experts.MODELS, "mixtral", lambda: (MixtralExperts(config), 2))


@pytest.fixture
def rows_of(tmp_path):
    def run(module, *arguments, like=None):
        """The rows that a program writes, with the columns of the committed results."""
        path = tmp_path / "rows.csv"
        assert module.main([*arguments, "--csv", str(path)]) == 0
        with path.open() as file:
            reader = csv.DictReader(file)
            rows = list(reader)
        if like is not None:
            assert reader.fieldnames == (RESULTS / like).read_text().splitlines()[0].split(",")
        return rows

    return run


@pytest.fixture
def pairs(tmp_path):
    """Eight pictures with captions, as a shard."""
    samples = [(f"{number}", {"png": png(number), "txt": b"square"}) for number in range(8)]
    shard_writer.write_shards(tmp_path, "pairs", samples, 100)
    return str(tmp_path / "pairs-000000.tar")


def of(rows, *columns):
    return [tuple(row[column] for column in columns) for row in rows]


def test_throughput_has_a_row_for_every_model_whose_rates_come_from_times_and_flops(rows_of):
    arguments = ["--batch-size", "4", "--words", "3", "--pass", "fwd", "fwd_bwd", "--dtype", "fp32", *SHORT]
    rows = rows_of(clip_throughput, "--models", *FORMS, *arguments, like="clip_throughput_cpu.csv")
    cannot_train = [("fwd_bwd", FORMS[2])]
    expected = [(what, name) for what in ("fwd", "fwd_bwd") for name in FORMS if (what, name) not in cannot_train]
    assert of(rows, "pass", "model") == expected
    for row in rows:
        assert float(row["pairs_per_s"]) == pytest.approx(4e3 / float(row["median_ms"]), rel=0.05)
        assert float(row["speed_to_l14"]) == pytest.approx(float(row["speed_to_b16"]), abs=2e-3)
        assert bool(row["images_per_s"]) == (row["pass"] == "fwd")
    forward, sparse, _, step, _ = (float(row["gflops_per_pair"]) for row in rows)
    assert step == pytest.approx(3 * forward, rel=1e-3) and sparse >= forward


def test_latency_has_a_row_for_an_image_a_caption_and_a_token_of_every_model(rows_of, capsys, monkeypatch):
    monkeypatch.setattr(engines, "missing", lambda packages: packages)
    arguments = ["--models", *latency.MODELS, "--dtype", "fp32", "--threads", "1", "--rounds", "10"]
    rows = rows_of(latency, *arguments, like="latency_cpu.csv")
    assert f"left out {TINY} onnxruntime" in capsys.readouterr().err
    whole = [(what, name) for what in ("image", "caption") for name in latency.MODELS[:4]]
    assert of(rows[:8], "input", "model") == whole
    assert {row["model"] for row in rows if row["input"] == "token"} >= {"dense MLP", "SparseMoE int8"}
    assert all(0 < float(row["p50_ms"]) <= float(row["p99_ms"]) for row in rows)
    assert rows[0]["ratio_to_first"] == "1.000"


@pytest.mark.slow
@pytest.mark.parametrize("engine", engines.ENGINES)
def test_another_engine_computes_the_models_features(engine):
    for name in engines.ENGINES[engine][1]:
        pytest.importorskip(name)
    texts = latency.get_tokenizer(TINY)(["red bird"])
    model, _, image = clip_throughput.build(f"{TINY} {engine}", torch.float32, texts)
    assert model.encode_image(image).shape == model.encode_text(texts).shape


def test_a_towers_share_is_its_rate_over_that_of_packed_int8_products(rows_of, monkeypatch):
    monkeypatch.setattr(gemm_peak, "INT8_SHAPES", ((64, 32, 64),))
    monkeypatch.setattr(int8_share, "BASELINE", TINY)
    monkeypatch.setattr(int8_share, "MODELS", (f"{TINY} int8", f"{TINY} CLIP-UP int8"))
    monkeypatch.setattr(int8_share, "alternate", lambda runs, *others, **rest: {
        name: harness.Timing(ms, ms, ms, ms) for ms, (name, run) in enumerate(runs.items(), 1) if run() is not None
    })  # fmt: skip
    rows = rows_of(int8_share, "--batch-size", "2", "--threads", "1", like="int8_share_cpu.csv")
    assert of(rows, "model") == [(f"{TINY} int8",), (f"{TINY} CLIP-UP int8",)]
    for row in rows:
        rates = float(row["tflops"]) / float(row["product_tflops"])
        assert float(row["share"]) == pytest.approx(rates, rel=0.01)


def test_a_saved_int8_model_is_loaded_beside_the_float32_one(rows_of, monkeypatch):
    monkeypatch.setattr(int8_load, "MODELS", (TINY, f"{TINY} CLIP-UP"))
    monkeypatch.setattr(int8_load, "in_own_process", lambda call: call())
    rows = rows_of(int8_load, "--rounds", "1", "--threads", "1", like="int8_load_cpu.csv")
    assert of(rows, "model", "form") == list(product(int8_load.MODELS, int8_load.FORMS))
    assert all(
        float(saved["file_mib"]) < float(exact["file_mib"]) for exact, saved in zip(rows[::2], rows[1::2], strict=True)
    )


PASSES, EXPERTS = ("fwd", "fwd_bwd"), ("grouped_mm", "eager", "batched_mm", "clipup", "clipup_int8")
WAYS, FORMS_OF_WEIGHTS = ("dense", "all_tokens", "padding_aware"), ("fp32", "bf16", "int8, fp32", "int8, bf16")
PROGRAMS = {
    padding_aware: (["--models", TINY, "--batch-size", "4", *SHORT], "dtype", "impl", ("fp32", "bf16"), WAYS),
    transformers_experts: (
        ["--models", "mixtral", "--dtypes", "fp32", "--tokens", "5", *SHORT], "pass", "impl", PASSES, EXPERTS,
    ),
    int8_accuracy: ([TINY, "--count", "4"], "outliers", "form", "01", FORMS_OF_WEIGHTS),
}  # fmt: skip


@pytest.mark.parametrize("module", PROGRAMS, ids=lambda module: module.__name__)
def test_a_program_has_a_row_for_everything_that_it_compares(rows_of, module):
    arguments, outer, inner, cases, variants = PROGRAMS[module]
    rows = rows_of(module, *arguments, like=f"{module.__name__}_cpu.csv")
    assert of(rows, outer, inner) == [case for case in product(cases, variants) if case != ("fwd_bwd", "clipup_int8")]
    for row in rows:
        assert float(row.get("median_ms", "1")) > 0 and float(row.get("image_cosine_min", "1")) > 0.9
        assert (float(row.get("tokens", "1")) < 1) == (row.get("impl") == "padding_aware")


def test_a_training_step_has_seconds_beside_flops_of_all_models_on_noise_and_on_real_pairs(rows_of, pairs):
    for data in ([], ["--data", pairs]):
        unpadded, dense, sparse = rows_of(training_step, "--batch-size", "8", *SHORT, *data)
        assert (unpadded["impl"], dense["impl"], sparse["impl"]) == ("dense_unpadded", "dense", "clip_up")
        assert unpadded["seconds_ratio"] == unpadded["flops_ratio"] == dense["flops_ratio"] == "1.000"
        assert float(sparse["flops_ratio"]) > 1.2 and float(sparse["seconds_ratio"]) > 0
        assert sparse["data"] == ("pairs-000000.tar" if data else "noise")  # no directory


def test_the_trainers_overhead_has_a_row_for_each_model_and_source_of_data(rows_of, pairs):
    short = ["--data", pairs, "--batch-size", "4", "--pairs", "1", "--steps-of-pair", "2", "--workers", "0"]
    torch.set_num_threads(2)  # the program's own number is 1
    rows = rows_of(trainer_overhead, *short, like="trainer_overhead_cpu.csv")
    assert of(rows, "data", "model") == [(d, m) for d in ("in memory", "shards") for m in ("dense", "CLIP-UP")]
    for row in rows:
        assert 0 < float(row["data_share"]) < 1 and float(row["bare_step_ms"]) > 0 and row["threads"] == "1"
        assert (
            0 < 1 + float(row["overhead"]) < float(row["batch_ms"]) / float(row["bare_step_ms"])
        )  # the wait is left out


def test_rates_of_the_baseline_are_measured_beside_itself_only(rows_of, monkeypatch):
    now, stretches = [0.0], []

    def alternate(pair, *others):
        stretches.append(pair)
        for run in [*pair.values()] * 5:
            run()
        return {name: harness.timing([2.0 * len(stretches)]) for name in pair}

    def mark(device):  # everything is slower in later stretches
        now[0] += len(stretches)
        return now[0]

    monkeypatch.setattr(clip_throughput, "alternate", alternate)
    monkeypatch.setattr(clip_throughput, "mark", mark)
    rows = rows_of(clip_throughput, "--models", *FORMS[:2], "--batch-size", "2", "--dtype", "fp32")
    assert of(rows, "images_per_s", "texts_per_s", "pairs_per_s") == [
        ("2.00", "2.00", "1.00"),
        ("1.00", "1.00", "0.50"),
    ]


CAPTIONS = {
    "train": ["account arrow left", "account"],
    "test_styles": ["account", "account", "arrow left", "left arrow", "account xyzzy", "account plugh"],
    "test_names": ["arrow"],
    "validation": ["left"],
}


def test_a_split_is_described_by_shares_of_its_captions(rows_of, tmp_path):
    for split, texts in CAPTIONS.items():
        samples = [(f"{split}-{row}", {"png": b"unread", "txt": text.encode()}) for row, text in enumerate(texts)]
        shard_writer.write_shards(tmp_path, split, samples, 100)
    rows = {row["split"]: row for row in rows_of(study_captions, str(tmp_path))}
    styles = rows["test_styles"]
    assert (styles["images"], styles["captions"]) == ("6", "5")
    assert (styles["images_trained"], styles["captions_trained"]) == ("33.3", "20.0")  # "account"
    assert styles["captions_unknown_word"] == styles["captions_same_tokens"] == "40.0"  # "account ?", two of them
    assert styles["captions_same_words"] == "40.0"  # "arrow left" and "left arrow"
    assert set(rows["test_names"].values()) == {"test_names", "1", "0.0"}


@pytest.mark.parametrize("module", [clip_throughput, padding_aware, transformers_experts])
def test_a_wrong_result_is_not_timed(monkeypatch, module):
    monkeypatch.setattr(clip_throughput, "inference", lambda *which: lambda: (torch.tensor(torch.nan),))
    monkeypatch.setattr(
        padding_aware, "encoder", lambda model, texts, padding_aware: lambda: torch.ones(1) * padding_aware
    )
    run = transformers_experts.Case.run
    monkeypatch.setattr(
        transformers_experts.Case, "run", lambda self, name: [(1 + (name == "clipup")) * one for one in run(self, name)]
    )
    arguments = {transformers_experts: ["--models", "mixtral", "--tokens", "5"]}.get(module, ["--models", TINY])
    with pytest.raises(SystemExit, match="nothing was timed"):
        module.main([*arguments, *SHORT])
