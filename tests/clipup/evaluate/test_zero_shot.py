"""Zero-shot classification on small data sets with known results."""

from __future__ import annotations

import io
import pickle
import tarfile

import pytest
import torch
from PIL import Image
from strangers import MakesFile
from torchvision.transforms.functional import to_tensor

from clipup.evaluate import image_folder, read_lines, zero_shot, zero_shot_classifier
from clipup.evaluate.datasets import ClassificationSet
from clipup.evaluate.labelled_images import image_shards, labelled_images


def names(count):
    return [f"number {n}" for n in range(count)]


def test_accuracy_of_a_perfect_model(oracle, number_tokenizer, number_image):
    samples = [(number_image(n), n) for n in range(8)]

    result = zero_shot(oracle, samples, names(8), number_tokenizer, batch_size=3)

    assert result == {"top1": 1.0, "top5": 1.0, "chance": 1 / 8, "images": 8, "classes": 8}


def test_accuracy_counts_wrong_answers(oracle, number_tokenizer, number_image):
    samples = [(number_image(n), label) for n, label in [(0, 0), (1, 1), (2, 3), (3, 2)]]

    assert zero_shot(oracle, samples, names(4), number_tokenizer)["top1"] == 0.5


def test_top5_is_over_all_classes_where_there_are_fewer(oracle, number_tokenizer, number_image):
    result = zero_shot(oracle, [(number_image(0), 1)], names(2), number_tokenizer)

    assert (result["top1"], result["top5"]) == (0.0, 1.0)


def test_templates_may_be_strings_or_functions(model, tokenizer):
    torch.manual_seed(0)
    samples = [(torch.randn(3, 16, 16), index % 6) for index in range(12)]
    classes = ["cat", "dog", "tree", "house", "sun", "sea"]

    strings = zero_shot(model, samples, classes, tokenizer, templates=["a {}.", "the {} alone."])
    functions = zero_shot(
        model, samples, classes, tokenizer, templates=[lambda c: f"a {c}.", lambda c: f"the {c} alone."]
    )

    assert strings == functions
    assert model.training


def test_classification_without_images_classes_or_templates_is_refused(oracle, number_tokenizer, number_image):
    with pytest.raises(ValueError, match="classes is empty"):
        zero_shot(oracle, [(number_image(0), 0)], [], number_tokenizer)
    with pytest.raises(ValueError, match="templates is empty"):
        zero_shot(oracle, [(number_image(0), 0)], names(1), number_tokenizer, templates=[])
    with pytest.raises(ValueError, match="the data set is empty"):
        zero_shot(oracle, [], names(1), number_tokenizer)
    with pytest.raises(ValueError, match="image 0 has class 2, but there are 2 class names"):
        zero_shot(oracle, [(number_image(0), 2)], names(2), number_tokenizer)


@pytest.fixture
def folders(tmp_path):
    for name in ("dog", "cat"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "1.png")
        (tmp_path / name / "notes.txt").write_text("no image")
    return tmp_path


def test_subdirectories_are_found_by_the_names_of_their_classes(folders):
    found = image_folder(folders, ["dog", "bird", "cat"])

    assert [(path.parent.name, label) for path, label in found] == [("cat", 2), ("dog", 0)]


def test_subdirectories_with_other_names_are_the_classes_in_sorted_order(folders):
    found = image_folder(folders, ["tabby", "hound"])

    assert [(path.parent.name, label) for path, label in found] == [("cat", 0), ("dog", 1)]


def test_image_folders_of_which_one_is_no_class_are_refused(folders):
    (folders / "Fish").mkdir()

    with pytest.raises(ValueError, match="2 of the 3 subdirectories of .* are named by classes, but not Fish; rename"):
        image_folder(folders, ["dog", "bird", "cat"])


def make_folders(root, names):
    for name in names:
        (root / name).mkdir()
        Image.new("RGB", (4, 4)).save(root / name / "1.png")
    return root


@pytest.mark.parametrize(
    ("folders", "classes"),
    [
        (["Cat", "Dog"], ["dog", "cat"]),
        (["fire_truck", "ice_cream"], ["ice cream", "fire truck"]),
        (["Fire-Truck", "ice cream", "zebra"], ["zebra", "ice_cream", "fire truck", "ant"]),
    ],
)
def test_subdirectories_are_named_by_classes_in_other_letters_too(tmp_path, folders, classes):
    found = image_folder(make_folders(tmp_path, folders), classes)

    labels = {path.parent.name: label for path, label in found}
    assert all(
        classes[labels[name]].replace("_", " ") == name.lower().replace("-", " ").replace("_", " ") for name in folders
    )
    assert len(labels) == len(folders)


def test_a_name_that_may_be_two_classes_is_refused(tmp_path):
    make_folders(tmp_path, ["Crane"])
    for classes in (["crane", "crane"], ["crane", "CRANE"]):
        with pytest.raises(ValueError, match="subdirectory Crane may be class 0 or 1, which are named 'crane' and"):
            image_folder(tmp_path, classes)
    assert [label for _, label in image_folder(tmp_path, ["crane", "Crane"])] == [1]


def test_numbers_are_the_classes_of_these_indices(tmp_path):
    found = image_folder(make_folders(tmp_path, map(str, range(11))), [f"class {index}" for index in range(11)])

    assert len(found) == 11 and all(int(path.parent.name) == label for path, label in found)


@pytest.mark.parametrize("numbers", [["1", "2"], ["0", "00"], ["0", "1", "2"], ["0"]])
def test_numbers_that_are_not_those_of_the_classes_are_refused(tmp_path, numbers):
    with pytest.raises(ValueError, match="are numbers, and the class list has 2 names; expected the numbers 0 to 1"):
        image_folder(make_folders(tmp_path, numbers), ["cat", "dog"])


@pytest.mark.parametrize("template", ["a photo of {c}", "a photo", "{} and {", "{0.x}"])
def test_a_template_without_a_place_for_the_name_is_refused(template):
    with pytest.raises(ValueError, match="templates: .* should have one {}, in place of the class name"):
        zero_shot_classifier(None, ["cat"], None, ["a photo of {}", template])


def test_image_folders_that_do_not_fit_the_class_list_are_refused(folders, tmp_path):
    with pytest.raises(ValueError, match="has 2 subdirectories, the class list has 3 names"):
        image_folder(folders, ["a", "b", "c"])
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        image_folder(tmp_path / "nowhere", ["a"])
    for name in ("cat", "dog"):
        (folders / name / "1.png").unlink()
    with pytest.raises(ValueError, match="no image"):
        image_folder(folders, ["cat", "dog"])


def test_labelled_images_are_read_in_batches_and_by_workers(folders):
    found = image_folder(folders, ["dog", "cat"])

    for workers in (0, 2):
        images, labels = zip(*labelled_images(found, to_tensor, batch_size=1, workers=workers), strict=True)
        assert labels == (1, 0) and all(image.shape == (3, 4, 4) for image in images)


def test_an_unreadable_image_is_named(folders):
    (folders / "cat" / "1.png").write_bytes(b"no picture")

    with pytest.raises(ValueError, match="cannot read the image .*cat/1.png"):
        list(labelled_images(image_folder(folders, ["cat", "dog"]), to_tensor))


def test_shards_give_images_and_classes(tmp_path):
    picture = io.BytesIO()
    Image.new("RGB", (4, 4), (255, 0, 0)).save(picture, "PNG")
    members = {"0.png": picture.getvalue(), "0.cls": b"3", "1.png": picture.getvalue()}

    samples = image_shards(write_shard(tmp_path / "test.tar", members))

    image, label = next(samples)
    assert image.getpixel((0, 0)) == (255, 0, 0) and label == 3
    with pytest.raises(ValueError, match="sample 1 of .* lacks an image or its .cls"):
        next(samples)
    with pytest.raises(FileNotFoundError, match="images: no shard .*none.tar"):
        next(image_shards(str(tmp_path / "none.tar")))


def write_shard(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def test_an_unreadable_sample_is_named(tmp_path):
    shard = write_shard(tmp_path / "test.tar", {"7.png": b"no picture", "7.cls": b"0"})

    with pytest.raises(ValueError, match="cannot read sample 7 of .*test.tar"):
        next(image_shards(shard))


def test_a_sample_that_cannot_be_preprocessed_is_named(tmp_path):
    picture = io.BytesIO()
    Image.new("RGB", (4, 4)).save(picture, "PNG")
    shard = write_shard(tmp_path / "test.tar", {"7.png": picture.getvalue(), "7.cls": b"0"})

    def preprocess(image):
        raise RuntimeError(f"no crop of {image.size}")

    with pytest.raises(ValueError, match=r"cannot read sample 7 of .*test\.tar: no crop of \(4, 4\)"):
        next(ClassificationSet([shard], ["cat"], ["a {}"]).samples(preprocess))


def test_a_pickle_beside_an_image_is_not_executed(tmp_path):
    picture = io.BytesIO()
    Image.new("RGB", (4, 4)).save(picture, "PNG")
    code = pickle.dumps(MakesFile(tmp_path / "executed"))
    shard = write_shard(tmp_path / "test.tar", {"0.png": picture.getvalue(), "0.cls": b"1", "0.pyd": code})

    ((_, label),) = image_shards(shard)

    assert label == 1 and not (tmp_path / "executed").exists()
    pickle.loads(code)
    assert (tmp_path / "executed").exists()


def test_blank_lines_of_a_file_are_dropped(tmp_path):
    (tmp_path / "classes.txt").write_text("cat\n\n dog \n")
    (tmp_path / "empty.txt").write_text("\n")

    assert read_lines(tmp_path / "classes.txt") == ["cat", "dog"]
    with pytest.raises(ValueError, match="is empty; expected one name per line"):
        read_lines(tmp_path / "empty.txt")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_lines(tmp_path / "none.txt")
