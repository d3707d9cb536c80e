"""Building the scenes data set from a small package in Iconify's format, and training batches from it."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from small_scenes import SETS, SMALL, THINGS, TRAIN

from clipup.data.loaders import describe, eval_samples
from studies.scene_data import concepts
from studies.scene_data.build import build
from studies.scene_data.stream import SceneStream, read_drawings


def content(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def preprocess(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 100 - 1


def tokenizer(texts):
    return torch.tensor([[len(text)] for text in texts])


def test_a_data_set_has_drawings_to_train_on_and_scenes_to_test(scenes_package, tmp_path):
    dataset = build(tmp_path / "scenes", scenes_package(), **SMALL)

    assert dataset == describe(tmp_path / "scenes") and dataset["name"] == "scenes" and dataset["group_size"] == 4
    assert len(dataset["concepts"]) == 10 and set(dataset["concepts"]) <= set(THINGS)  # no colours, places, long names
    assert dataset["splits"]["train"]["images"] == 0 and dataset["splits"]["test"]["images"] == 20
    drawings, _ = read_drawings(tmp_path / "scenes")
    assert drawings.counts.tolist() == [2] * 10  # of 14 sets, 12 are for tuning
    used = {one["set"] for one in dataset["sources"]}
    assert used == {*TRAIN, "styled"} and "flags" not in (tmp_path / "scenes" / "LICENSES.md").read_text()


def test_samples_come_in_groups_with_captions_and_pictures(scenes_package, tmp_path):
    build(tmp_path / "scenes", scenes_package(), **SMALL)
    samples = list(eval_samples(str(tmp_path / "scenes" / "test-*.tar"), preprocess))

    assert [about["group"] for _, _, about in samples] == [number // 4 for number in range(20)]
    assert all(image.shape == (3, 32, 32) and len(texts) == 1 for image, texts, _ in samples)
    words = [sorted(texts[0].split()) for _, texts, _ in samples]
    assert words[0] == words[1] and samples[0][1] != samples[1][1]


def test_held_out_drawings_are_in_no_other_split(scenes_package, tmp_path):
    def copy_one(sets):
        for thing in THINGS[:2]:  # so these two lose their test drawing
            sets["styled"]["icons"][thing] = sets[TRAIN[0]]["icons"][thing]

    tuning = {one for one, split in concepts.split_of_sets(TRAIN, (), 0).items() if split == "validation"}
    assert len(tuning) == concepts.VALIDATION_SETS
    dataset = build(tmp_path / "scenes", scenes_package(copy_one), **SMALL)
    same = {split: counts["same"] for split, counts in dataset["left_out_twins"].items()}
    assert same == {"test": 2 * (TRAIN[0] not in tuning), "validation": 2 * (TRAIN[0] in tuning)}
    if TRAIN[0] not in tuning:
        assert not set(THINGS[:2]) & set(dataset["concepts"])


def test_the_same_package_and_seed_give_the_same_bytes(scenes_package, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        build(tmp_path / name, scenes_package(name=f"npm-{name}"), seed=seed, **SMALL)
    one, same, other = (content(tmp_path / name) for name in "abc")
    assert one == same and one["test-000000.tar"] != other["test-000000.tar"]


def test_too_few_concepts_and_bad_numbers_are_refused_and_write_nothing(scenes_package, tmp_path):
    root = scenes_package()
    for changes, message in (
        ({"number": 13}, "number: got 13 concepts, but there are drawings for 12 only"),
        ({"sets": SETS.without(TRAIN[:3])}, "sets: got 11 training sets in one colour, expected more than 12"),
    ):
        with pytest.raises(ValueError, match=message):
            build(tmp_path / "scenes", root, **(SMALL | changes))
        assert not (tmp_path / "scenes").exists() or not any((tmp_path / "scenes").iterdir())


@pytest.fixture
def stream(scenes_package, tmp_path):
    build(tmp_path / "scenes", scenes_package(), **SMALL)
    return lambda batch=8, seed=0, **changes: SceneStream(
        tmp_path / "scenes",
        **({"preprocess": preprocess, "tokenizer": tokenizer} | changes),
        batch_size=batch,
        seed=seed,
    )


def test_training_pictures_are_those_that_evaluation_would_read(stream):
    from studies.scene_data.scenes import captions, pictures, sample

    it = stream()
    images, tokens = it.batch(3)
    scenes = sample(np.random.default_rng([0, 0, 3, 1]), it.drawings, 2)
    drawn = [Image.open(io.BytesIO(_png(one))) for one in pictures(scenes, it.drawings.masks)]
    torch.testing.assert_close(images, torch.stack([preprocess(one) for one in drawn]))
    assert tokens.tolist() == tokenizer(captions(scenes, it.drawings.names)).tolist()


def _png(pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_steps_depend_on_seed_epoch_and_step_alone(stream):
    it, other, next_part = stream(), stream(seed=1), stream(part=1)
    batches = iter(it)
    first, second = next(batches), next(batches)
    assert not torch.equal(first[0], second[0]) and not torch.equal(first[0], other.batch(0)[0])
    assert not torch.equal(first[0], next_part.batch(0)[0])
    it.set_epoch(0, 1)
    assert torch.equal(next(iter(it))[0], second[0])
    it.set_epoch(2)
    assert torch.equal(next(iter(it))[0], stream().batch(2 * len(it))[0])


@pytest.mark.parametrize("batch", [0, 2, 6])
def test_batches_of_parts_of_groups_are_refused(stream, batch):
    with pytest.raises(ValueError, match=f"batch_size: got {batch}, expected a multiple of 4"):
        stream(batch)


def test_scenes_for_evaluation_are_not_those_of_a_training_step(scenes_package, tmp_path):
    """Of test_seen, which is the third split, since its drawings are the training's: else no picture could be equal."""
    groups = {"validation": 3, "test": 5, "test_seen": 5}
    build(tmp_path / "scenes", scenes_package(), **(SMALL | {"groups": groups}))
    shown = [image for image, _, _ in eval_samples(str(tmp_path / "scenes" / "test_seen-*.tar"), preprocess)]
    for part in range(4):
        drawn = SceneStream(tmp_path / "scenes", preprocess, tokenizer, 20, 0, part).batch(0)[0]
        assert not any(torch.allclose(a, b) for a, b in zip(shown, drawn, strict=True))


def test_a_damaged_file_of_drawings_is_built_again(scenes_package, tmp_path):
    package = scenes_package()
    build(tmp_path / "scenes", package, **SMALL)
    whole = content(tmp_path / "scenes")
    (tmp_path / "scenes" / "drawings.npz").write_bytes(whole["drawings.npz"][:-100])
    with pytest.raises(ValueError, match="drawings.npz is not the file that"):
        read_drawings(tmp_path / "scenes")
    build(tmp_path / "scenes", package, **SMALL, overwrite=True)
    assert content(tmp_path / "scenes") == whole


def test_a_second_test_has_scenes_of_training_drawings(scenes_package, tmp_path):
    dataset = build(
        tmp_path / "scenes", scenes_package(), **(SMALL | {"groups": {"validation": 3, "test": 5, "test_seen": 4}})
    )
    of = dataset["splits"]
    assert of["test_seen"]["images"] == 16 and of["test_seen"]["drawings"] == of["train"]["drawings"]
    assert of["test"]["drawings"] != of["train"]["drawings"]
