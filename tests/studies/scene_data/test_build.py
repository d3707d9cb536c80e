"""Building the scenes data set from a small package in Iconify's format, and training batches from it."""

import numpy as np
import pytest
import torch
from PIL import Image
from small_scenes import SMALL, THINGS, TRAIN

from clipup.data.loaders import describe, eval_samples
from studies.scene_data import concepts
from studies.scene_data.build import build
from studies.scene_data.scenes import captions, pictures, sample
from studies.scene_data.stream import SceneStream, read_drawings


def content(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def preprocess(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 100 - 1


def tokenizer(texts):
    return torch.tensor([[len(text)] for text in texts])


@pytest.fixture
def build_scenes(scenes_package, tmp_path):
    def build_scenes(name="scenes", change=lambda sets: None, **options):
        return tmp_path / name, build(tmp_path / name, scenes_package(change), **(SMALL | options))

    return build_scenes


@pytest.fixture
def stream(scenes_data):
    return lambda batch=8, **options: SceneStream(scenes_data, preprocess, tokenizer, batch, **options)


def test_a_data_set_has_drawings_to_train_on_and_scenes_to_test(scenes_data):
    dataset = describe(scenes_data)
    assert len(dataset["concepts"]) == 10 and set(dataset["concepts"]) <= set(THINGS)  # no colours, places, long names
    assert dataset["splits"]["train"]["images"] == 0 and dataset["splits"]["test"]["images"] == 20
    drawings, _ = read_drawings(scenes_data)
    assert drawings.counts.tolist() == [2] * 10  # of 14 sets, 12 are for tuning
    assert {one["set"] for one in dataset["sources"]} == {*TRAIN, "styled"}  # no flags

    samples = list(eval_samples(str(scenes_data / "test-*.tar"), preprocess))
    assert [about["group"] for _, _, about in samples] == [number // 4 for number in range(20)]
    first, second = (sorted(texts[0].split()) for _, texts, _ in samples[:2])
    assert first == second and samples[0][1] != samples[1][1]


def test_held_out_drawings_are_in_no_other_split(build_scenes):
    def copy_one(sets):
        for thing in THINGS[:2]:  # so these two lose their test drawing
            sets["styled"]["icons"][thing] = sets[TRAIN[0]]["icons"][thing]

    tuning = {one for one, split in concepts.split_of_sets(TRAIN, (), 0).items() if split == "validation"}
    assert len(tuning) == concepts.VALIDATION_SETS
    _, dataset = build_scenes(change=copy_one)
    same = {split: counts["same"] for split, counts in dataset["left_out_twins"].items()}
    assert same == {"test": 2 * (TRAIN[0] not in tuning), "validation": 2 * (TRAIN[0] in tuning)}
    assert TRAIN[0] in tuning or not set(THINGS[:2]) & set(dataset["concepts"])


def test_the_same_package_and_seed_give_the_same_bytes(build_scenes):
    one, same, other = (content(build_scenes(name, seed=seed)[0]) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert one == same and one["test-000000.tar"] != other["test-000000.tar"]


def test_training_pictures_are_those_that_evaluation_would_read(stream):
    it = stream()
    images, tokens = it.batch(3)
    scenes = sample(np.random.default_rng([0, 0, 3, 1]), it.drawings, 2)
    drawn = [Image.fromarray(one) for one in pictures(scenes, it.drawings.masks)]
    torch.testing.assert_close(images, torch.stack([preprocess(one) for one in drawn]))
    assert tokens.tolist() == tokenizer(captions(scenes, it.drawings.names)).tolist()


def test_steps_depend_on_seed_part_epoch_and_step_alone(stream):
    it = stream()
    batches = iter(it)
    first, second = next(batches), next(batches)
    others = [second[0], stream(seed=1).batch(0)[0], stream(part=1).batch(0)[0]]
    assert not any(torch.equal(first[0], other) for other in others)
    it.set_epoch(0, 1)
    assert torch.equal(next(iter(it))[0], second[0])
    it.set_epoch(2)
    assert torch.equal(next(iter(it))[0], stream().batch(2 * len(it))[0])


@pytest.mark.parametrize("batch", [0, 6])
def test_batches_of_parts_of_groups_are_refused(stream, batch):
    with pytest.raises(ValueError, match=f"batch_size: got {batch}"):
        stream(batch)


def test_a_second_test_has_scenes_of_training_drawings_that_no_step_has(build_scenes):
    out, dataset = build_scenes(groups={"test": 5, "test_seen": 5})
    assert dataset["splits"]["test_seen"]["drawings"] == dataset["splits"]["train"]["drawings"]
    shown = [image for image, _, _ in eval_samples(str(out / "test_seen-*.tar"), preprocess)]
    for part in range(4):
        drawn = SceneStream(out, preprocess, tokenizer, 20, 0, part).batch(0)[0]
        assert not any(torch.allclose(a, b) for a, b in zip(shown, drawn, strict=True))
