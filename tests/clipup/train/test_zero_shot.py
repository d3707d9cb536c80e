"""Zero-shot accuracy on ImageNet in the course of a run."""

from __future__ import annotations

import json

import open_clip
import pytest
import torch
from PIL import Image

import clipup
from clipup.evaluate import zero_shot
from clipup.evaluate.datasets import imagenet
from clipup.train import Every, train

COLOURS = ["red", "green", "blue", "white"]


@pytest.fixture(autouse=True)
def four_classes(monkeypatch):
    """ImageNet with four classes and two prompts."""
    monkeypatch.setattr(open_clip, "IMAGENET_CLASSNAMES", COLOURS)
    monkeypatch.setattr(open_clip, "OPENAI_IMAGENET_TEMPLATES", [lambda c: f"colour {c}", lambda c: f"number {c}"])


@pytest.fixture
def images(tmp_path):
    """A validation set in the layout of ImageNet, and one in that of ImageNet-V2."""
    for number, colour in enumerate(COLOURS):
        for index in range(1 + number):
            for folder in (tmp_path / "val" / f"n{number:08d}", tmp_path / "v2" / str(number)):
                folder.mkdir(parents=True, exist_ok=True)
                if index < 2 or folder.parent.name == "val":
                    Image.new("RGB", (20, 20), colour).save(folder / f"{index}.png")
    return {"imagenet_val": str(tmp_path / "val"), "imagenet_v2": str(tmp_path / "v2")}


@pytest.fixture
def run(make_model, pairs, options):
    """Nine steps, three an epoch."""

    def run(callbacks=(), **changes):
        return train(
            options(**{"steps": None, "epochs": 3, "workers": 0, "batch_size": 4, **changes}),
            model=make_model(clipup.MoEConfig(num_experts=2)),
            preprocess=open_clip.image_transform(16, is_train=False),
            tokenizer=open_clip.SimpleTokenizer(context_length=8),
            loader=pairs(),
            callbacks=callbacks,
        )

    return run


def test_accuracy_is_measured_every_n_epochs_and_at_the_end_as_clipup_eval_measures_it(run, images):
    result = run(**images, zeroshot_frequency=2)

    lines = (result.directory / "evaluations.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == [6, 9]
    assert [records[1][name]["images"] for name in ("imagenet_val", "imagenet_v2")] == [10, 7]
    found = imagenet(images["imagenet_val"])
    samples = found.samples(open_clip.image_transform(16, is_train=False))
    tokenizer = open_clip.SimpleTokenizer(context_length=8)
    alone = zero_shot(result.model, samples, found.classes, tokenizer, templates=found.templates, batch_size=4)
    assert records[1]["imagenet_val"] == alone


def test_measuring_changes_nothing_in_the_run(run, images):
    without = run(name="without")
    measured = run(name="measured", **images, zeroshot_frequency=1)

    assert [record["loss"] for record in measured.history] == [record["loss"] for record in without.history]
    for name, value in without.model.state_dict().items():
        assert torch.equal(value, measured.model.state_dict()[name]), name


def test_the_accuracy_at_the_end_is_in_the_model_card(named_model, options, csv_data, images):
    settings = {"model": named_model, "train_data": csv_data, "workers": 0, "batch_size": 8, "steps": 1}
    result = train(options(**settings, **images))

    card = (result.directory / "model" / "README.md").read_text()
    top1 = result.evaluations[-1]["imagenet_v2"]["top1"]
    assert "val: 10 images, 4 classes | zero-shot top-1" in card
    assert f"v2: 7 images, 4 classes | zero-shot top-1 | {100 * top1:.2f} |" in card


def test_a_directory_that_is_not_imagenet_is_refused_before_training(run, tmp_path):
    seen = []
    with pytest.raises(FileNotFoundError, match="there is no directory .*nowhere"):
        run(callbacks=[Every(1, seen.append)], imagenet_val=str(tmp_path / "nowhere"))
    assert seen == []
