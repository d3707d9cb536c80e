"""Runs of a study on tiny data with a tiny model: logs that come out the same however often a run was stopped."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image

from clipup.data import shard_writer
from clipup.train import TrainingInterrupted
from clipup_kernels import backend_info
from studies.runner import config, log, measure, results, runner
from studies.scene_data.stream import SceneStream

MODEL_CFG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
COMMON = "model: tiny\nlr: 0.001\nwarmup: 2\nbatch_size: 8\n"
DENSE = COMMON + "arm: dense\nsteps: 6\n"
SPARSE = COMMON + "arm: clip_up\nsteps: 12\nstart: dense\nmoe: {num_experts: 4}\n"


WIDE_CFG = MODEL_CFG | {"vision_cfg": MODEL_CFG["vision_cfg"] | {"image_size": 32}}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A data set of coloured squares with the splits of a study; captions repeat."""
    directory = tmp_path_factory.mktemp("data")
    draw = random.Random(0)
    written = {}
    for split, count in (("train", 40), ("validation", 12), ("test_styles", 16), ("test_names", 12)):
        samples = []
        for number in range(count):
            file = io.BytesIO()
            Image.new("RGB", (16, 16), tuple(draw.randrange(256) for _ in range(3))).save(file, "PNG")
            caption = f"colour {number % 9}"
            about = json.dumps({"captions": [caption], "group": "a"}).encode()
            samples.append((f"{split}-{number}", {"png": file.getvalue(), "txt": caption.encode(), "json": about}))
        written[split] = {"images": count, "shards": shard_writer.write_shards(directory, split, samples, 100)}
    shard_writer.write_sizes(directory, [shard for split in written.values() for shard in split["shards"]])
    shard_writer.write_json(directory / "dataset.json", {"name": "squares", "fingerprint": "f", "splits": written})
    return directory


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Writes configs into a directory of a study, and runs them."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", MODEL_CFG)
    monkeypatch.setattr(runner, "_SAVE_EVERY", 3)
    monkeypatch.setattr(runner, "_LOG_EVERY", 1)

    class Study:
        def __init__(self, name: str, data: Path) -> None:
            self.directory, self.data = tmp_path / name, data
            self.directory.mkdir()

        def write(self, **configs: str) -> None:
            for name, text in configs.items():
                (self.directory / f"{name}.yaml").write_text(text)

        def run(self, name: str) -> list[log.Record]:
            return log.read(runner.run(self.directory / f"{name}.yaml", self.data, self.directory / "runs"))

    return Study


def kinds(records, kind):
    return [record for record in records if record["kind"] == kind]


def test_a_log_holds_config_training_validation_test_layers_and_cost(study, data):
    it = study("whole", data)
    it.write(dense=DENSE, sparse=SPARSE)

    records = it.run("sparse")

    assert [record["kind"] for record in records][0] == "run" and records[-1]["kind"] == "cost"
    head = records[0]
    assert head["start"] == "dense" and head["moe_cfg"]["num_experts"] == 4 and head["data"]["images"]["train"] == 40
    assert head["step0_difference"] < 1e-5
    assert [line["step"] for line in kinds(records, "train")] == list(range(1, 13))
    assert all(line["load"] >= 1 and line["balance"] > 0 for line in kinds(records, "train"))
    assert kinds(records, "validation")[-1]["step"] == 12
    similarities = [line["similarity"] for line in kinds(records, "validation")]
    assert similarities == sorted(similarities, reverse=True) and similarities[0] < 1
    (test,) = kinds(records, "test")
    assert test["test_styles"]["gallery"] == 16 and test["test_styles"]["captions"] == 9
    assert (it.directory / "logs" / "dense.jsonl").is_file()  # the run that it starts from came first
    assert kinds(log.read(it.directory / "logs" / "dense.jsonl"), "layers") == []


def test_a_third_test_split_is_measured_beside_those_of_the_verdict(study, data, tmp_path):
    wider = tmp_path / "wider"
    shutil.copytree(data, wider)
    dataset = json.loads((wider / "dataset.json").read_text())
    dataset["splits"]["test_drawings"] = dataset["splits"]["test_names"]
    for shard in dataset["splits"]["test_drawings"]["shards"]:
        shutil.copy(wider / shard["file"], wider / shard["file"].replace("test_names", "test_drawings"))
    (wider / "dataset.json").write_text(json.dumps(dataset))
    it = study("third", wider)
    it.write(dense=DENSE)

    (test,) = kinds(it.run("dense"), "test")
    (result,) = results.read(it.directory / "logs").values()

    assert list(test)[1:] == ["test_styles", "test_names", "test_drawings", "validation"]
    assert test["test_drawings"] == test["test_names"]
    cells = [
        test[split][f"{way}_R@1"]
        for split in ("test_styles", "test_names")
        for way in ("text_to_image", "image_to_text")
    ]
    assert result.mean("R@1") == pytest.approx(sum(cells) / 4)  # the verdict's four


def test_the_cost_counts_forward_and_backward_of_every_pair(study, data):
    it = study("cost", data)
    it.write(dense=DENSE)

    cost = it.run("dense")[-1]

    assert cost["pairs"] == 6 * 8
    assert cost["train_gflops"] == pytest.approx(3 * cost["gflops_per_pair"] * 48)
    assert cost["machine"]["threads"] == 1 and cost["seconds"] > 0
    expected = {name: backend_info()[name] for name in ("instructions", "matmul_dtypes")}  # what a run's bits depend on
    assert expected.items() <= cost["machine"].items()


def test_a_device_that_is_not_there_is_refused_before_anything_is_read_or_written(study, data, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    it = study("device", data)
    it.write(dense=DENSE)

    with pytest.raises(ValueError, match="device is 'cuda', but torch finds no CUDA GPU"):
        runner.run(it.directory / "dense.yaml", "no-data", it.directory / "runs", device="cuda")
    assert not (it.directory / "runs").exists() and not (it.directory / "logs").exists()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_run_on_a_gpu_names_it(study, data):
    it = study("gpu", data)
    it.write(dense=DENSE, sparse=SPARSE)

    path = runner.run(it.directory / "sparse.yaml", it.data, it.directory / "runs", device="cuda")

    assert log.read(path)[-1]["machine"]["processor"] == torch.cuda.get_device_name()


@pytest.mark.slow
def test_a_run_that_was_stopped_twice_has_the_log_of_one_that_was_not(study, data, monkeypatch):
    whole = study("whole", data)
    whole.write(dense=DENSE, sparse=SPARSE)
    expected = whole.run("sparse")
    it = study("stopped", data)
    it.write(dense=DENSE, sparse=SPARSE)
    it.run("dense")
    forward, calls = open_clip.CLIP.forward, []

    def interrupting(self, *args, **kwargs):
        calls.append(None)
        if len(calls) in (5, 9):
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, *args, **kwargs)

    sparse_class = type(runner._Run(config.read(it.directory / "sparse.yaml"), data, it.directory / "runs").model)
    monkeypatch.setattr(sparse_class, "forward", interrupting)
    for _ in range(2):
        with pytest.raises(TrainingInterrupted):
            it.run("sparse")

    assert log.reproducible(it.run("sparse")) == log.reproducible(expected)
    assert len(calls) == 12  # every step once: nothing was trained twice


@pytest.mark.slow
def test_a_run_does_not_depend_on_the_runs_of_its_process_before(study, data):
    alone, after = study("alone", data), study("after", data)
    other = DENSE + "seed: 1\n"
    for it in (alone, after):
        it.write(first=DENSE, second=other)
    runner._training_data.cache_clear()
    expected = alone.run("second")
    runner._training_data.cache_clear()

    first, second = after.run("first"), after.run("second")

    assert runner._training_data.cache_info().hits == 1  # the data were read once
    assert log.reproducible(second) == log.reproducible(expected)
    assert kinds(first, "train")[0]["loss"] != kinds(second, "train")[0]["loss"]


@pytest.mark.slow
def test_a_run_with_a_log_is_done_and_a_lost_model_is_made_again_to_the_bit(study, data, monkeypatch):
    it = study("done", data)
    it.write(dense=DENSE, sparse=SPARSE)
    it.run("dense")
    before = (it.directory / "logs" / "dense.jsonl").read_bytes()
    for path in sorted((it.directory / "runs").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()

    it.run("dense")
    assert not (it.directory / "runs" / "dense").exists()
    it.run("sparse")

    assert (it.directory / "runs" / "dense" / "model").is_dir()
    assert (it.directory / "logs" / "dense.jsonl").read_bytes() == before


@pytest.mark.slow
def test_a_run_goes_on_from_runs_that_go_on_from_others(study, data):
    it = study("chain", data)
    it.write(dense=DENSE, middle=DENSE + "start: dense\n", sparse=SPARSE.replace("start: dense", "start: middle"))

    it.run("sparse")

    assert sorted(path.stem for path in (it.directory / "logs").iterdir()) == ["dense", "middle", "sparse"]


def test_runs_that_go_on_from_each_other_are_refused(study, data):
    it = study("circle", data)
    it.write(first=DENSE + "start: second\n", second=DENSE + "start: first\n")

    with pytest.raises(ValueError, match="start: the runs form a circle through first; one of them must have no start"):
        it.run("first")


def test_a_sparse_model_from_scratch_has_experts_of_their_own_at_the_dense_scale(study, data):
    it = study("scratch", data)
    it.write(scratch=SPARSE.replace("start: dense\n", "").replace("clip_up", "sparse_scratch"))

    model = runner._Run(config.read(it.directory / "scratch.yaml"), data, it.directory / "runs").model

    cosines = measure.expert_cosines(model)
    assert len(cosines) == 2 and all(abs(cosine) < 0.1 for cosine in cosines.values())
    for name, layer in runner.moe_layers(model).items():
        for weights in (layer.in_weight, layer.out_weight):
            spread = weights.flatten(1).std(1)
            torch.testing.assert_close(spread, spread[:1].expand(4), rtol=0.2, atol=0, msg=name)


def test_fine_grained_experts_are_compared_with_those_that_began_as_the_same_shard(study, data):
    it = study("fine", data)
    it.write(dense=DENSE, fine=SPARSE.replace("num_experts: 4", "num_experts: 8, top_k: 4, granularity: 4"))
    it.run("dense")

    model = runner._Run(config.read(it.directory / "fine.yaml"), data, it.directory / "runs").model

    assert list(measure.expert_cosines(model).values()) == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("steps", [2500, 3287, 32875, 7])
def test_a_log_has_as_many_windows_whatever_the_number_of_steps(steps):
    every = 1 if steps < 100 else 10
    history = [{"step": step, "lr": 0.1, "loss": 1.0 * step} for step in range(every, steps + 1, every)]

    lines = list(log.training(history, steps))

    assert len(lines) == min(len(history), log.WINDOWS)
    ends = [line["step"] for line in lines]
    assert ends[-1] == history[-1]["step"]
    assert max(b - a for a, b in zip([0, *ends], ends, strict=False)) <= steps / log.WINDOWS + every
    assert [line["loss"] for line in lines] == pytest.approx(
        [(a + every + b) / 2 for a, b in zip([0, *ends], ends, strict=False)]
    )


def test_hits_are_packed_and_come_back():
    hits = torch.rand(1003) > 0.5

    assert (measure.unpack(measure.pack(hits), 1003) == hits.numpy()).all()


def test_hits_average_to_recall_and_give_paired_differences(study, data):
    it = study("paired", data)
    it.write(dense=DENSE, other=DENSE.replace("lr: 0.001", "lr: 0.01"))
    it.run("dense"), it.run("other")

    found = results.read(it.directory / "logs")

    for split in results.TESTS:
        for way, size in (("text_to_image", "captions"), ("image_to_text", "gallery")):
            for one in found.values():
                hits = measure.unpack(one.test[split][f"{way}_hits"], one.test[split][size])
                assert hits.mean() == pytest.approx(one.test[split][f"{way}_R@1"])
            difference, _ = results.paired_difference(found["other"], found["dense"], split, way)
            r1 = [found[name].test[split][f"{way}_R@1"] for name in ("other", "dense")]
            assert difference == pytest.approx(r1[0] - r1[1])


def test_a_run_on_scenes_draws_new_ones_at_every_step_and_is_measured_within_groups(study, scenes_data, monkeypatch):
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", WIDE_CFG)
    it = study("runs on scenes", scenes_data)
    it.write(dense=DENSE, sparse=SPARSE)

    records = it.run("sparse")

    assert records[0]["data"]["name"] == "scenes" and records[0]["data"]["images"]["test"] == 20
    (test,) = kinds(records, "test")
    assert list(test)[1:] == ["test", "validation"] and test["test"]["gallery"] == 20
    assert all(0 <= test["test"][f"{way}_group"] <= 1 for way in ("text_to_image", "image_to_text"))
    assert all("image_to_text_group" in line for line in kinds(records, "validation"))
    assert len({line["contrastive"] for line in kinds(records, "train")}) == 12


def test_a_run_on_scenes_that_was_stopped_gives_the_log_of_one_that_was_not(study, scenes_data, monkeypatch):
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", WIDE_CFG)
    whole, stopped = study("whole", scenes_data), study("stopped", scenes_data)
    for it in (whole, stopped):
        it.write(dense=DENSE)
    batch, seen = SceneStream.batch, []

    def stops_once(stream, step):
        seen.append(step)
        if len(seen) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(stream, step)

    monkeypatch.setattr(SceneStream, "batch", stops_once)
    with pytest.raises(TrainingInterrupted):
        stopped.run("dense")
    monkeypatch.setattr(SceneStream, "batch", batch)

    assert log.reproducible(stopped.run("dense")) == log.reproducible(whole.run("dense"))


def test_runs_that_a_run_needs_come_first_each_once(study, data):
    it = study("needs", data)
    it.write(
        dense=DENSE, second=DENSE + "seed: 1\n", sparse=SPARSE + "others: [second]\nteacher: dense\nmoe_lr_scale: 2.0\n"
    )

    records = it.run("sparse")

    assert records[0]["others"] == ["second"]
    assert records[0]["teacher"] == "dense" and records[0]["moe_lr_scale"] == 2.0
    assert {path.stem for path in (it.directory / "logs").iterdir()} == {"dense", "second", "sparse"}
    assert records[0]["step0_difference"] > 1e-3  # experts of two models are no dense model's function
    assert all(
        line["loss"] > line["contrastive"] + line["aux"] for line in kinds(records, "train")
    )  # the teacher's part


def test_a_run_that_needs_nothing_more_logs_what_it_always_did(study, data):
    it = study("plain", data)
    it.write(dense=DENSE)
    assert not {"others", "clusters", "teacher", "moe_lr_scale"} & it.run("dense")[0].keys()


def test_experts_may_start_from_clusters(study, data, monkeypatch):
    monkeypatch.setattr(runner, "_CLUSTERED", 2)
    it = study("clusters", data)
    it.write(dense=DENSE, sparse=SPARSE, apart=SPARSE + "clusters: true\n")

    plain, apart = it.run("sparse"), it.run("apart")

    assert apart[0]["clusters"] is True and apart[0]["step0_difference"] > 1e-3 > plain[0]["step0_difference"]
    first = [kinds(records, "validation")[0]["similarity"] for records in (plain, apart)]
    assert first[1] < first[0] - 0.01  # experts that differ from the start


def test_a_circle_of_runs_is_refused(study, data):
    it = study("circle", data)
    it.write(dense=DENSE + "teacher: sparse\n", sparse=SPARSE)
    with pytest.raises(ValueError, match="start: the runs form a circle through sparse"):
        it.run("sparse")


def test_a_run_that_was_begun_with_another_config_is_not_continued(study, data, monkeypatch):
    it = study("changed", data)
    it.write(dense=DENSE)
    monkeypatch.setattr(runner, "_write_log", lambda run, logs: pytest.fail("stopped"))
    with pytest.raises(pytest.fail.Exception):
        it.run("dense")
    monkeypatch.undo()
    it.write(dense=DENSE.replace("0.001", "0.02"))
    monkeypatch.setattr(runner, "_write_log", lambda run, logs: "it had not begun")
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", MODEL_CFG)
    file = it.directory / "dense.yaml"
    assert runner.run(file, it.data, it.directory / "runs") == "it had not begun"
    (it.directory / "runs" / "dense").mkdir()
    it.write(dense=DENSE.replace("0.001", "0.01"))
    with pytest.raises(ValueError, match="dense was begun with another config"):
        it.run("dense")


def test_every_generation_of_runs_gets_scenes_of_its_own(study, scenes_data, monkeypatch):
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", WIDE_CFG)
    parts = []
    made = SceneStream.__init__

    def noted(self, data, preprocess, tokenizer, batch_size, seed, part):
        parts.append(part)
        made(self, data, preprocess, tokenizer, batch_size, seed, part)

    monkeypatch.setattr(SceneStream, "__init__", noted)
    it = study("generations", scenes_data)
    it.write(dense=DENSE, sparse=SPARSE, taught=DENSE + "teacher: sparse\n")
    it.run("taught")
    assert parts == [0, 1, 2]
