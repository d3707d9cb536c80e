"""The model card of a saved model."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from huggingface_hub import ModelCard
from sparse_clip import sparse_clip, sparse_config
from tiny_clip import tiny_clip, tiny_config

import clipup
from clipup import MoEConfig, moe_layers, save_pretrained, upcycle
from clipup.clip import flops
from clipup.models.model_card import add_results
from clipup.models.model_names import base_model

CONFIG = MoEConfig.clip_up(num_experts=3)
RECALL = {
    f"{way}_R@{k}": value for way in ("text_to_image", "image_to_text") for k, value in ((1, 0.25), (5, 0.5), (10, 1.0))
}
RETRIEVAL = {**RECALL, "chance_R@1": 0.001, "gallery": 5000, "captions": 25010}


@pytest.fixture
def sparse():
    return upcycle(tiny_clip(), CONFIG)


@pytest.fixture
def directory(sparse, tmp_path):
    save_pretrained(sparse, tmp_path, tiny_config())
    return tmp_path


def text(directory):
    return (directory / "README.md").read_text()


def test_card_describes_the_experts_and_their_cost(directory, sparse):
    counts, card = flops.count(sparse), text(directory)

    assert "# Sparse CLIP: 3 experts, top 2" in card
    assert f"| parameters | {counts.params / 1e6:.1f} M |" in card
    assert f"| active parameters per token | {counts.active_params / 1e6:.1f} M |" in card
    assert f"| GFLOP per image | {counts.image_gflops:.3g} |" in card
    assert f"| GFLOP per text of full length | {counts.text_gflops:.3g} |" in card
    for name in moe_layers(sparse):
        assert f"| `{name}` | 3 | 2 | 32 | 128 | " in card
    assert "open_clip alone cannot load these weights" in card and "Not evaluated yet" in card
    data = ModelCard(card).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("other", "clipup", "zero-shot-image-classification")


def test_a_model_whose_flops_cannot_be_counted_is_saved(sparse, tmp_path):
    class Checking(type(sparse.visual)):
        def forward(self, x):
            assert x.isfinite().all()  # reads a value, which tensors on the meta device have not
            return super().forward(x)

    sparse.visual.__class__ = Checking
    save_pretrained(sparse, tmp_path, tiny_config())
    assert "| parameters | " in text(tmp_path) and "GFLOPs" not in text(tmp_path)


def run_snippet(directory):
    """The output of the card's Python snippet, run in the card's directory."""
    (snippet,) = re.findall(r"```python\n(.*?)```", text(directory), re.DOTALL)
    program = [sys.executable, "-c", snippet]
    environment = {"PYTHONPATH": str(Path(clipup.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    return subprocess.run(program, cwd=directory, env=environment, capture_output=True, text=True, check=True).stdout


def test_snippet_of_a_clip_runs(tmp_path):
    save_pretrained(sparse_clip(), tmp_path, sparse_config())

    assert re.match(r"tensor\(\[\[-?\d\S+, +-?\d\S+\]\]\)", run_snippet(tmp_path))
    assert "model.eval()" in text(tmp_path)


@pytest.mark.slow
def test_snippet_of_a_timm_model_runs(tmp_path):
    model = timm.create_model("test_vit", num_classes=2)
    save_pretrained(upcycle(model, CONFIG.replace(towers=("image",))), tmp_path)

    assert run_snippet(tmp_path).startswith("tensor([[")
    assert "model.eval()" in text(tmp_path)


@pytest.mark.parametrize(
    ("name", "pretrained", "base"),
    [
        ("ViT-B-16", "laion2b_s34b_b88k", "laion/CLIP-ViT-B-16-laion2B-s34B-b88K"),
        ("ViTamin-S", "datacomp1b", "jienengchen/ViTamin-S"),
        ("hf-hub:org/dense", None, "org/dense"),
        ("ViT-B-16", "epoch_32.pt", None),
        ("ViT-B-16", None, None),
        (None, None, None),
    ],
)
def test_base_model_is_derived_from_tags_and_hub_names(name, pretrained, base):
    assert base_model(name, pretrained) == base


@pytest.mark.parametrize("metadata", ["title: CLIP: mine", "model-index:\n- results: []"])
def test_a_card_that_cannot_be_read_names_no_base_model(tmp_path, metadata):
    (tmp_path / "README.md").write_text(f"---\n{metadata}\n---\n")
    assert base_model(str(tmp_path), None) is None


def test_base_model_is_in_the_card_and_read_from_a_directory(sparse, tmp_path):
    save_pretrained(sparse, tmp_path, tiny_config(), base_model="org/dense")

    assert ModelCard(text(tmp_path)).data.base_model == "org/dense"
    assert base_model(str(tmp_path), None) == base_model(None, str(tmp_path)) == "org/dense"


@pytest.mark.parametrize(
    "card",
    [
        "# A\n\n| data | metric | % |\n|---|---|---|\n| a | b | 1.00 |\n\n| a | c |\n|---|---|\n## End\n",
        "# A\n\n## Evaluation of humans\n\nBetter.\n",
    ],
)
def test_nothing_else_in_a_card_is_changed_by_results(directory, card):
    (directory / "README.md").write_text(card)

    for _ in range(2):
        add_results(directory, {"retrieval": RETRIEVAL})

    after = text(directory)
    added = [line for line in after.splitlines() if line.startswith("| own data: 5,000 images")]
    assert len(added) == 6 and len(set(added)) == 6
    rest = iter(after.splitlines())
    assert all(line in rest for line in card.splitlines())  # in this order
    table = after[: after.index(added[0])].rstrip("\n").splitlines()[-4:]
    assert any(line.split() == "| data | metric | % |".split() for line in table)


def test_results_are_added_by_the_end_of_the_path_of_their_data_and_replace_those_of_the_same(directory):
    before = text(directory)
    zero_shot = {"top1": 0.7692, "top5": 0.9, "chance": 0.001, "images": 50000, "classes": 1000}
    for retrieval in (RETRIEVAL, {**RETRIEVAL, "text_to_image_R@1": 0.521}):
        for results in (
            {"dataset": "coco", "split": "test", "precision": "fp32", "retrieval": retrieval},
            {"dataset": "imagenet", "split": "test", "precision": "bf16", "zero_shot": zero_shot},
            {"dataset": "imagenet-v2", "root": "/data/top-images", "zero_shot": zero_shot},
            {"val_data": "/data/pets/test-*.tar", "retrieval": retrieval},
            {"val_data": "/data/birds/test-*.tar", "retrieval": retrieval},
            {"val_data": "/data/pets/test-*.tar", "retrieval": retrieval, "multi_positive": True},
        ):
            add_results(directory, results)

    card = text(directory)

    for data in ("coco test", "pets/test-*.tar", "birds/test-*.tar"):
        assert card.count(f"| {data}: 5,000 images, 25,010 captions |") == 6
    assert "captions | text_to_image_R@1 | 52.10 |" in card and "captions | image_to_text_R@1 | 25.00 |" in card
    assert "| text_to_image_R@1 | 25.00 |" not in card and card.count("distinct captions |") == 6
    assert card.count("| imagenet test in bf16: 50,000 images, 1,000 classes | zero-shot top-1 | 76.92 |") == 1
    assert card.count("| imagenet-v2 top-images: 50,000 images") == 2
    assert "Not evaluated" not in card and card.partition("## Evaluation")[0] == before.partition("## Evaluation")[0]
