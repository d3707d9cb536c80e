"""Runs of a study on tiny data with a tiny model: logs that come out the same however often a run was stopped."""

import json
import os
import random
import shutil
import signal
from pathlib import Path

import open_clip
import pytest
import torch
from picture_samples import png
from safetensors.torch import load_file, save_file

from clipup.data import shard_writer
from clipup.moe.layer import moe_layers
from clipup.train import TrainingInterrupted
from clipup_kernels import backend_info
from studies import fixed_texts
from studies.icon_data import views as icon_views
from studies.runner import config, log, measure, runner

VISION = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
MODEL_CFG = {
    "embed_dim": 16,
    "vision_cfg": VISION,
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
COMMON = {"model": "tiny", "lr": 0.001, "warmup": 2, "batch_size": 8}
DENSE = COMMON | {"arm": "dense", "steps": 6}
SPARSE = COMMON | {"arm": "clip_up", "steps": 12, "start": "dense", "moe": {"num_experts": 4}}
SPLITS = {"train": 40, "validation": 12, "test_styles": 16, "test_names": 12, "test_drawings": 12}


class Study:
    """Runs by name, and the directory of their logs and models."""

    def __init__(self, directory: Path, data: Path, **fields: dict) -> None:
        self.directory, self.data = directory, data
        self.configs = {name: config.StudyRun(name, **of_run) for name, of_run in fields.items()}

    def run(self, name: str) -> list[log.Record]:
        directories = self.data, self.directory / "runs", self.directory / "logs"
        return log.read(runner.run(self.configs, name, *directories, "cpu"))

    def model(self, name: str) -> torch.nn.Module:
        """Before its first step."""
        return runner._Run(self.configs[name], self.data, self.directory / "runs").model


def kinds(records, kind):
    return [record for record in records if record["kind"] == kind]


@pytest.fixture(scope="module", autouse=True)
def tiny_runs():
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", MODEL_CFG)
        wide = MODEL_CFG | {"vision_cfg": VISION | {"image_size": 32}}
        patch.setitem(open_clip.factory._MODEL_CONFIGS, "wide", wide)
        patch.setattr(runner, "_SAVE_EVERY", 3)
        patch.setattr(runner, "_LOG_EVERY", 1)
        patch.setattr(runner, "_CLUSTERED", 2)
        patch.setattr(runner, "_EVALUATIONS", 3)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A data set of coloured squares with the splits of a study; captions repeat."""
    directory, draw, written = tmp_path_factory.mktemp("data"), random.Random(0), {}
    for split, count in SPLITS.items():
        samples = []
        for number in range(count):
            files = {"png": png(draw.randrange(256)), "txt": f"colour {number % 9}".encode()}
            samples.append((f"{split}-{number}", files))
        written[split] = {"images": count, "shards": shard_writer.write_shards(directory, split, samples, 100)}
    shard_writer.write_sizes(directory, [shard for split in written.values() for shard in split["shards"]])
    shard_writer.write_json(directory / "dataset.json", {"name": "squares", "fingerprint": "f", "splits": written})
    return directory


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    """A sparse run and the dense one that it starts from, uninterrupted."""
    study = Study(tmp_path_factory.mktemp("whole"), data, dense=DENSE, sparse=SPARSE)
    study.run("sparse")
    return study


def test_a_log_holds_config_training_validation_test_layers_and_cost(whole):
    records = whole.run("sparse")
    head, cost = records[0], records[-1]
    assert head["start"] == "dense" and head["moe_cfg"]["num_experts"] == 4 and head["data"]["images"]["train"] == 40
    assert head["step0_difference"] < 1e-5 and not {"clusters", "views"} & set(head)
    assert [line["step"] for line in kinds(records, "train")] == list(range(1, 13))
    assert all(line["load"] >= 1 and line["balance"] > 0 for line in kinds(records, "train"))
    similarities = [line["similarity"] for line in kinds(records, "validation")]
    assert similarities == sorted(similarities, reverse=True) and similarities[0] < 1
    (test,) = kinds(records, "test")
    assert list(test)[1:] == ["test_styles", "test_names", "test_drawings", "validation"]
    assert (test["test_styles"]["captions"], test["test_styles"]["gallery"]) == (9, 16)
    assert kinds(records, "layers") and kinds(whole.run("dense"), "layers") == []
    assert cost["pairs"] == 12 * 8 and cost["train_gflops"] == pytest.approx(3 * cost["gflops_per_pair"] * 96)
    expected = {name: backend_info()[name] for name in ("instructions", "matmul_dtypes")}  # what a run's bits depend on
    assert (expected | {"threads": 1}).items() <= cost["machine"].items()


def test_a_run_that_chooses_measures_no_test_split(data, tmp_path):
    records = Study(tmp_path, data, chooses={**DENSE, "validation_only": True}).run("chooses")
    (test,) = kinds(records, "test")
    assert list(test)[1:] == ["validation"] and records[0]["validation_only"] is True


@pytest.mark.slow
def test_a_run_with_a_log_is_done_and_a_lost_model_is_made_again_to_the_bit(data, tmp_path):
    study = Study(tmp_path, data, dense=DENSE, other=DENSE | {"seed": 1}, sparse=SPARSE)
    study.run("other")  # a run does not depend on those of its process before
    study.run("dense")
    before = (study.directory / "logs" / "dense.jsonl").read_bytes()
    (study.directory / "runs" / "dense").rename(study.directory / "runs" / "lost")
    runner._training_data.cache_clear()
    study.run("dense")
    assert not (study.directory / "runs" / "dense").exists()
    study.run("sparse")
    assert (study.directory / "runs" / "dense" / "model").is_dir()
    assert (study.directory / "logs" / "dense.jsonl").read_bytes() == before


def test_seeds_differ_in_the_order_of_their_samples_whichever_ran_before(data, tmp_path):
    study = Study(tmp_path, data, zero=DENSE, one=DENSE | {"seed": 1})

    def samples(name):
        run = runner._Run(study.configs[name], data, tmp_path)
        loader = run._loader()
        loader.set_epoch(0)
        return torch.cat([images for images, _ in loader.dataloader])

    zero, one = samples("zero"), samples("one")
    assert not torch.equal(zero, one) and torch.equal(zero, samples("zero"))


def test_a_sparse_model_from_scratch_has_experts_of_their_own_at_the_dense_scale(data, tmp_path):
    model = Study(tmp_path, data, scratch=SPARSE | {"start": None}).model("scratch")

    cosines = measure.expert_cosines(model)
    assert len(cosines) == 2 and all(abs(cosine) < 0.1 for cosine in cosines.values())
    for name, layer in moe_layers(model).items():
        for weights in (layer.in_weight, layer.out_weight):
            spread = weights.flatten(1).std(1)
            torch.testing.assert_close(spread, spread[:1].expand(4), rtol=0.2, atol=0, msg=name)


def test_experts_from_clusters_differ_before_the_first_step(whole):
    study = Study(whole.directory, whole.data, clusters=SPARSE | {"clusters": True})
    assert all(cosine < 0.99 for cosine in measure.expert_cosines(study.model("clusters")).values())


def test_with_fixed_texts_only_the_image_tower_learns_and_a_run_starts_from_the_weights_of_another(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    vectors, texts = torch.randn(9, 24), [f"colour {number}" for number in range(9)]
    save_file({"vectors": vectors}, tmp_path / "data" / fixed_texts.FILE, {"texts": json.dumps(texts)})
    study = Study(tmp_path, tmp_path / "data", dense=DENSE, sparse=SPARSE | {"moe": {"towers": ["image"]}})

    records = study.run("sparse")

    assert records[0]["step0_difference"] < 1e-5
    assert records[-1]["params"] < sum(parameter.numel() for parameter in study.model("sparse").visual.parameters()) + 9
    assert torch.equal(study.model("sparse").text.vectors, vectors)
    trained = load_file(tmp_path / "runs" / "dense" / "model" / "weights.safetensors")
    assert torch.equal(study.model("sparse").visual.conv1.weight, trained["visual.conv1.weight"])
    assert not torch.equal(study.model("dense").visual.conv1.weight, trained["visual.conv1.weight"])


def test_a_control_chooses_experts_by_chance_or_by_place_and_starts_at_the_dense_models_outputs(data, tmp_path):
    arm = SPARSE | {"moe": {"towers": ["image"], "num_experts": 4, "capacity_factor": None}, "steps": 2}
    study = Study(tmp_path, data, dense=DENSE, random=arm | {"choice": "random"}, position=arm | {"choice": "position"})
    tokens = torch.randn(3, 5, 32)  # of three images
    for name in ("random", "position"):
        assert study.run(name)[0]["step0_difference"] < 1e-5
        for layer in moe_layers(study.model(name).eval()).values():
            first, second = (layer(tokens, return_routing=True)[1] for _ in range(2))
            assert torch.equal(first.experts, second.experts) == (name == "position")
            assert torch.equal(first.experts[0], first.experts[1]) == (name == "position")
            assert (first.experts[..., 0] != first.experts[..., 1]).all() and len(first.experts.unique()) == 4
            torch.testing.assert_close(first.gates, torch.full((3, 5, 2), 0.5))


@pytest.mark.parametrize("steps", [2500, 3287, 7])
def test_a_log_has_as_many_windows_whatever_the_number_of_steps(steps):
    every = 1 if steps < 100 else 10
    history = [{"step": step, "lr": 0.1, "loss": 1.0 * step} for step in range(every, steps + 1, every)]
    lines = list(log.training(history, steps))
    ends = [line["step"] for line in lines]
    assert len(lines) == min(len(history), log.WINDOWS) and ends[-1] == history[-1]["step"]
    means = [(a + every + b) / 2 for a, b in zip([0, *ends], ends, strict=False)]
    assert [line["loss"] for line in lines] == pytest.approx(means)


def test_a_run_on_fresh_views_sees_others_in_every_epoch_and_is_resumed_to_the_bit(data, tmp_path, monkeypatch):
    whole, stopped = (Study(tmp_path / name, data, dense=DENSE | {"views": True}) for name in ("whole", "stopped"))
    seen, views = [], icon_views.fresh

    def stops_once(images, draw):
        seen.append((images.sum().item(), draw.initial_seed()))
        if len(seen) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return views(images, draw)

    monkeypatch.setattr(icon_views, "fresh", stops_once)
    with pytest.raises(TrainingInterrupted):
        stopped.run("dense")
    records = stopped.run("dense")

    assert log.reproducible(records) == log.reproducible(whole.run("dense"))
    assert len({number for _, number in seen}) == 6, "six steps, more than an epoch"
    assert records[0]["views"] and "text_to_image_best_nll" in kinds(records, "test")[0]["test_drawings"]


def test_a_run_that_was_begun_with_another_config_is_not_continued(data, tmp_path):
    study = Study(tmp_path, data, dense=DENSE)
    runner._keep_config(study.configs["dense"], tmp_path / "runs")
    (tmp_path / "runs" / "dense").mkdir()
    with pytest.raises(ValueError, match="dense was begun with another config"):
        Study(tmp_path, data, dense=DENSE | {"lr": 0.01}).run("dense")
