"""Zero-shot classification on small data sets with known results."""

import pickle

import pytest
import torch
from picture_samples import png, write_tar
from PIL import Image
from strangers import MakesFile
from torchvision.transforms.functional import to_tensor

from clipup.evaluate import image_folder, zero_shot
from clipup.evaluate.datasets import ClassificationSet
from clipup.evaluate.labelled_images import image_shards, labelled_images
from clipup.evaluate.zero_shot import zero_shot_classifier


def names(count):
    return [f"number {n}" for n in range(count)]


def test_accuracy_is_the_share_of_right_answers(oracle, number_tokenizer, number_image):
    perfect, half = (
        zero_shot(oracle, [(number_image(n), label) for n, label in enumerate(labels)], names(8), number_tokenizer)
        for labels in (range(8), (0, 1, 3, 2))
    )

    assert perfect == {"top1": 1.0, "top5": 1.0, "chance": 1 / 8, "images": 8, "classes": 8}
    assert half["top1"] == 0.5 and half["images"] == 4


def test_the_right_class_counts_among_the_first_five(oracle, number_tokenizer, number_image):
    scores = torch.zeros(8, 8)
    for image, rank in enumerate((1, 2, 5, 6)):
        order = [label for label in range(8) if label != image]
        order.insert(rank - 1, image)
        scores[image, order] = torch.linspace(1, 0, 8)
    samples = [(number_image(n), n) for n in range(4)]
    found = zero_shot(oracle, samples, names(8), number_tokenizer, classifier=scores)
    assert (found["top1"], found["top5"]) == (1 / 4, 3 / 4)


def test_a_class_is_the_mean_feature_of_all_its_prompts(model, tokenizer):
    templates, classes = ["a {}", "the blue {} of a friend"], ["cat", "dog"]
    with torch.no_grad():
        prompts = [tokenizer([each.format(name) for name in classes]) for each in templates]
        features = [model.eval().encode_text(tokens, normalize=True) for tokens in prompts]
    expected = torch.nn.functional.normalize(sum(features), dim=-1)
    torch.testing.assert_close(zero_shot_classifier(model, classes, tokenizer, templates).T, expected)


@pytest.fixture
def folders(tmp_path):
    for name in ("dog", "cat"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "1.png")
        (tmp_path / name / "notes.txt").write_text("no image")
    return tmp_path


def test_labelled_images_are_read_in_batches_and_by_workers_and_an_unreadable_one_is_named(folders):
    files = image_folder(folders, ["dog", "cat"])
    for workers in (0, 2):
        images, labels = zip(*labelled_images(files, to_tensor, batch_size=1, workers=workers), strict=True)
        assert labels == (1, 0) and all(image.shape == (3, 4, 4) for image in images)
    (folders / "cat" / "1.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="cannot read the image .*cat/1.png"):
        list(labelled_images(files, to_tensor))


def test_mistakes_of_a_classification_are_refused(oracle, number_tokenizer, number_image):
    third = [(number_image(0), 2)]
    for samples, classes, templates in (
        (third, names(2), ["a {}"]),
        (third, names(3), ["a photo"]),
        ([], names(3), ["a {}"]),
    ):
        with pytest.raises(ValueError):
            zero_shot(oracle, samples, classes, number_tokenizer, templates=templates)


@pytest.mark.parametrize(
    ("folders", "classes", "labels"),
    [
        (["Cat", "Dog"], ["dog", "bird", "cat"], [2, 0]),
        (["Fire-Truck", "ice cream"], ["ice_cream", "fire truck"], [1, 0]),
        (["a", "b"], ["tabby", "hound"], [0, 1]),  # in sorted order
        ([str(n) for n in range(11)], names(11), [int(n) for n in sorted(map(str, range(11)))]),
        (["cat", "dog", "fish"], ["dog", "bird", "cat"], None),
        (["crane"], ["crane", "Crane"], None),
        (["0", "00"], ["cat", "dog"], None),
        (["0", "1", "2"], ["cat", "dog"], None),
        (["a", "b", "c"], ["cat", "dog"], None),
        ([], ["cat"], None),
    ],
)
def test_subdirectories_are_classes_by_name_by_number_or_in_order(tmp_path, folders, classes, labels):
    (tmp_path / ".ipynb_checkpoints").mkdir()
    for name in folders:
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "1.png")
        (tmp_path / name / "._1.png").touch()  # what macOS writes on a foreign disk
    if labels is None:
        with pytest.raises(ValueError, match=str(tmp_path)):
            image_folder(tmp_path, classes)
    else:
        assert [label for _, label in image_folder(tmp_path, classes)] == labels


def test_shards_give_images_and_classes_and_execute_nothing(tmp_path):
    code = pickle.dumps(MakesFile(tmp_path / "executed"))
    members = [("0.png", png(255)), ("0.cls", b"3"), ("0.pyd", code), ("1.png", png(255))]
    samples = image_shards(str(write_tar(tmp_path / "test.tar", members)))
    image, label = next(samples)
    assert image.getpixel((0, 0)) == (255, 0, 0) and label == 3
    assert not (tmp_path / "executed").exists()
    with pytest.raises(ValueError, match="sample 1 of "):  # which has no class
        next(samples)
    shard = str(write_tar(tmp_path / "test.tar", [("7.png", b"no picture"), ("7.cls", b"0")]))
    with pytest.raises(ValueError, match="sample 7 of .*test.tar"):
        next(ClassificationSet([shard], ["cat"], ["a {}"]).samples(to_tensor))
