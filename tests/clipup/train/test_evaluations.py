"""Evaluations along the way: retrieval, zero-shot accuracy on ImageNet, and what a killed run leaves of them."""

import json
import re
from functools import partial
from pathlib import Path

import open_clip
import pytest
from PIL import Image
from same_runs import assert_same_run, without_times

import clipup
from clipup.evaluate import zero_shot
from clipup.evaluate.datasets import imagenet
from clipup.train import Every, train
from clipup.train.checkpoints.format import load

COLOURS = ["red", "green", "blue", "white"]
PREPROCESS, TOKENIZER = open_clip.image_transform(16, is_train=False), open_clip.SimpleTokenizer(context_length=8)


@pytest.fixture
def run(run):
    """Nine steps, three an epoch."""
    return partial(run, sparse=clipup.MoEConfig(num_experts=2), workers=0, batch_size=4)


def breaking(pictures):
    """A callback after which none of them can be read."""
    return lambda model: [path.write_bytes(b"no picture") for path in pictures] and None


def test_validation_data_that_break_do_not_cost_the_epoch(run, csv_data, pictures, tmp_path):
    whole = run(name="whole", val_data=csv_data)
    contents = {path: path.read_bytes() for path in pictures}
    with pytest.raises(ValueError, match="max_skipped"):
        run(callbacks=[Every(5, breaking(pictures))], val_data=csv_data, delete_previous_checkpoint=True)
    folder = tmp_path / "logs" / "run" / "checkpoints"
    saved = load(folder / "epoch_2.pt")
    assert (saved["epoch"], saved["step"], saved["step_of_epoch"]) == (2, 6, 0)
    assert load(folder / "epoch_latest.pt")["step"] == 6
    assert (folder / "epoch_1.pt").is_file()  # until the epoch after it is validated

    for path, content in contents.items():
        path.write_bytes(content)
    resumed = run(resume="latest", val_data=csv_data, delete_previous_checkpoint=True)

    assert [record["step"] for record in resumed.evaluations] == [3, 6, 9]
    assert without_times(whole.evaluations) == without_times(resumed.evaluations)
    assert_same_run(whole, resumed)
    assert {path.name for path in folder.iterdir()} == {"epoch_3.pt", "epoch_latest.pt"}


def test_a_run_that_ends_within_an_epoch_saves_its_steps_before_the_last_evaluation(run, csv_data, pictures, tmp_path):
    with pytest.raises(ValueError, match="max_skipped"):
        run(callbacks=[Every(2, breaking(pictures))], steps=2, val_data=csv_data)
    assert load(tmp_path / "logs" / "run" / "checkpoints" / "epoch_latest.pt")["step"] == 2


def test_with_multi_positive_equal_captions_of_the_validation_data_are_one_text(run, csv_data, tmp_path):
    validation = tmp_path / "validation.csv"
    validation.write_text(re.sub(r"number \d+", "number", Path(csv_data).read_text()))
    (record,) = run(steps=1, val_data=str(validation), multi_positive=True).evaluations
    assert (record["gallery"], record["captions"]) == (24, 1)


@pytest.fixture
def images(monkeypatch, tmp_path):
    """ImageNet with four classes and two prompts: a validation set in its layout, and one in that of ImageNet-V2."""
    monkeypatch.setattr(open_clip, "IMAGENET_CLASSNAMES", COLOURS)
    monkeypatch.setattr(open_clip, "OPENAI_IMAGENET_TEMPLATES", [lambda c: f"colour {c}", lambda c: f"number {c}"])
    for number, colour in enumerate(COLOURS):
        for folder, count in ((f"val/n{number:08d}", 1 + number), (f"v2/{number}", min(2, 1 + number))):
            (tmp_path / folder).mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (20, 20), colour).save(tmp_path / folder / f"{index}.png")
    return {"imagenet_val": str(tmp_path / "val"), "imagenet_v2": str(tmp_path / "v2")}


def test_accuracy_is_measured_every_n_epochs_and_at_the_end_as_clipup_eval_measures_it(run, images):
    result = run(**images, zeroshot_frequency=2)

    records = [json.loads(line) for line in (result.directory / "evaluations.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [6, 9]
    assert [records[1][name]["images"] for name in ("imagenet_val", "imagenet_v2")] == [10, 7]
    found = imagenet(images["imagenet_val"])
    samples = found.samples(PREPROCESS)
    alone = zero_shot(result.model, samples, found.classes, TOKENIZER, templates=found.templates, batch_size=4)
    assert records[1]["imagenet_val"] == alone
    assert_same_run(run(name="without"), result)


def test_the_accuracy_at_the_end_is_in_the_model_card(named_model, options, csv_data, images):
    settings = {"model": named_model, "train_data": csv_data, "workers": 0, "batch_size": 8, "steps": 1}
    result = train(options(**settings, **images))

    card = (result.directory / "model" / "README.md").read_text()
    top1 = result.evaluations[-1]["imagenet_v2"]["top1"]
    assert "val: 10 images, 4 classes | zero-shot top-1" in card
    assert f"v2: 7 images, 4 classes | zero-shot top-1 | {100 * top1:.2f} |" in card


def test_training_data_are_augmented_and_validation_data_are_not(make_model, options, csv_data):
    used = []

    def transform(training):
        plain = open_clip.image_transform(16, is_train=training)
        return lambda image: (used.append(training), plain(image))[1]

    train(
        options(train_data=csv_data, val_data=csv_data, batch_size=4, workers=0, steps=3),
        model=make_model(),
        preprocess=(transform(True), transform(False)),
        tokenizer=TOKENIZER,
    )

    assert (used.count(True), used.count(False)) == (3 * 4, 24)
