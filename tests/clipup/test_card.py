"""The model card that lies beside saved weights."""

import pytest
from huggingface_hub import ModelCard
from tiny_clip import tiny_clip, tiny_config

from clipup import MoEConfig, flops, moe_layers, save_pretrained, upcycle
from clipup.card import add_results

CONFIG = MoEConfig.clip_up(num_experts=3)
RECALL = {"r1": 0.25, "r5": 0.5, "r10": 1.0}
RETRIEVAL = {"t2i": RECALL, "i2t": RECALL, "chance_r1": 0.001, "gallery": 5000, "captions": 25010}


@pytest.fixture
def sparse():
    return upcycle(tiny_clip(), CONFIG)


@pytest.fixture
def directory(sparse, tmp_path):
    save_pretrained(sparse, tmp_path, tiny_config())
    return tmp_path


def text(directory):
    return (directory / "README.md").read_text()


def test_card_says_what_the_experts_are_and_what_they_cost(directory, sparse):
    counts, card = flops.count(sparse), text(directory)

    assert "# Sparse CLIP: 3 experts, top 2" in card
    assert f"| parameters | {counts.params / 1e6:.1f} M |" in card
    assert f"| parameters active for a token | {counts.active_params / 1e6:.1f} M |" in card
    assert f"| GFLOPs for an image | {counts.image_gflops:.3g} |" in card
    assert f"| GFLOPs for a text of full length | {counts.text_gflops:.3g} |" in card
    for name in moe_layers(sparse):
        assert f"| `{name}` | 3 | 2 | 32 | 128 | " in card
    assert "Plain open_clip builds the dense model" in card and "Nothing was measured yet" in card
    assert ModelCard(card).data.license == "other"


def test_card_of_a_dense_model_claims_no_experts(tmp_path):
    save_pretrained(tiny_clip(), tmp_path, tiny_config())

    card = text(tmp_path)

    assert "# Dense CLIP" in card and "xpert" not in card and "refuses" not in card
    assert ModelCard(card).data.tags == ["clip"]


def test_results_are_added_and_those_of_the_same_data_replaced(directory):
    before = text(directory)
    add_results(directory, {"dataset": "coco", "split": "test", "precision": "fp32", "retrieval": RETRIEVAL})
    zero_shot = {"top1": 0.7692, "top5": 0.9, "chance": 0.001, "images": 50000, "classes": 1000}
    add_results(directory, {"dataset": "imagenet", "split": "test", "precision": "bf16", "zero_shot": zero_shot})
    better = {**RETRIEVAL, "t2i": {**RECALL, "r1": 0.521}}
    add_results(directory, {"dataset": "coco", "split": "test", "precision": "fp32", "retrieval": better})

    card = text(directory)

    assert card.count("| coco test: 5,000 images, 25,010 captions |") == 6
    assert "captions | text to image R@1 | 52.10 |" in card and "captions | image to text R@1 | 25.00 |" in card
    assert "| imagenet test in bf16: 50,000 images, 1,000 classes | zero-shot top-1 | 76.92 |" in card
    assert "Nothing was measured" not in card
    assert card.partition("## Evaluation")[0] == before.partition("## Evaluation")[0]


def test_recall_over_distinct_captions_stands_beside_the_usual_one(directory):
    add_results(directory, {"dataset": "icons", "retrieval": RETRIEVAL, "multi_positive": False})
    add_results(directory, {"dataset": "icons", "retrieval": RETRIEVAL, "multi_positive": True})

    card = text(directory)

    assert card.count("| icons: 5,000 images, 25,010 captions |") == 6
    assert card.count("| icons: 5,000 images, 25,010 distinct captions |") == 6


def test_words_that_somebody_wrote_into_the_card_stay(directory):
    path = directory / "README.md"
    path.write_text(path.read_text().replace("## Use", "Trained on cats.\n\n## Use") + "\n## Thanks\n\nTo all.\n")

    add_results(directory, {"retrieval": RETRIEVAL})
    add_results(directory, {"retrieval": RETRIEVAL})

    card = text(directory)
    assert "Trained on cats." in card and card.endswith("\n## Thanks\n\nTo all.\n")
    assert card.count("| own data: 5,000 images, 25,010 captions | text to image R@5 | 50.00 |") == 1


def test_without_a_card_there_is_nothing_to_write_into(tmp_path):
    with pytest.raises(FileNotFoundError, match="card: there is no README.md"):
        add_results(tmp_path, {"retrieval": RETRIEVAL})
