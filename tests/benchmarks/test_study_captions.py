"""What the program says of captions that were trained on, are unknown, or cannot be told apart."""

import csv

import pytest
import study_captions

from clipup.data import shard_writer

PIXEL = b"an image that nobody reads"
CAPTIONS = {
    "train": ["account arrow left", "account"],
    "test_styles": ["account", "account", "arrow left", "left arrow", "account xyzzy", "account plugh"],
    "test_names": ["arrow"],
    "validation": ["left"],
}


@pytest.fixture
def data(tmp_path):
    for split, texts in CAPTIONS.items():
        samples = [(f"{split}-{row}", {"png": PIXEL, "txt": text.encode()}) for row, text in enumerate(texts)]
        shard_writer.write_shards(tmp_path, split, samples, 100)
    return tmp_path


def test_a_split_is_described_by_shares_of_its_captions(data, tmp_path):
    path = tmp_path / "rows.csv"

    assert study_captions.main([str(data), "--csv", str(path)]) == 0

    with path.open() as file:
        rows = {row["split"]: row for row in csv.DictReader(file)}
    styles = rows["test_styles"]
    assert (styles["images"], styles["captions"]) == ("6", "5")
    assert (styles["images_trained"], styles["captions_trained"]) == ("33.3", "20.0")  # "account"
    assert styles["captions_unknown_word"] == styles["captions_same_tokens"] == "40.0"  # "account ?", two of them
    assert styles["captions_same_words"] == "40.0"  # "arrow left" and "left arrow"
    assert set(rows["test_names"].values()) == {"test_names", "1", "0.0"}
