"""The model card of a saved model."""

import re
import subprocess
import sys
from email.message import Message
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
from huggingface_hub import ModelCard
from sparse_clip import sparse_clip, sparse_config
from tiny_clip import tiny_clip, tiny_config

import clipup
from clipup import MoEConfig, moe_layers, save_pretrained, upcycle
from clipup.clip import flops
from clipup.models import model_card
from clipup.models.model_card import add_results, base_model_in
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
    assert f"| GFLOPs per image | {counts.image_gflops:.3g} |" in card
    assert f"| GFLOPs per text of full length | {counts.text_gflops:.3g} |" in card
    for name in moe_layers(sparse):
        assert f"| `{name}` | 3 | 2 | 32 | 128 | " in card
    assert "open_clip alone cannot load these weights" in card and "Not evaluated yet" in card
    assert (ModelCard(card).data.license, ModelCard(card).data.library_name) == ("other", "clipup")


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
    ("urls", "needed"),
    [
        ([], f"needs the package `clipup`, version {clipup.__version__}."),
        (["Repository, https://example.org/clipup"], 'pip install "clipup @ git+https://example.org/clipup"\n'),
    ],
)
def test_card_says_what_to_install(sparse, tmp_path, monkeypatch, urls, needed):
    metadata = Message()
    for url in urls:
        metadata["Project-URL"] = url
    monkeypatch.setattr(model_card, "distributions", lambda name: [SimpleNamespace(metadata=metadata)])
    save_pretrained(sparse, tmp_path, tiny_config())
    assert needed in text(tmp_path) and "pip install clipup" not in text(tmp_path)


def test_card_names_the_extra_for_a_hugging_face_tokenizer(tmp_path):
    config = tiny_config()
    config["text_cfg"]["hf_tokenizer_name"] = "org/words"
    save_pretrained(tiny_clip(), tmp_path, config)

    assert "needs the package `clipup[hf]`" in text(tmp_path)


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


def test_base_model_is_in_the_card_and_read_from_a_directory(sparse, tmp_path):
    save_pretrained(sparse, tmp_path, tiny_config(), base_model="org/dense")

    assert ModelCard(text(tmp_path)).data.base_model == "org/dense"
    assert base_model(str(tmp_path), None) == base_model(None, str(tmp_path)) == "org/dense"


def test_card_without_a_base_model_names_none(directory, tmp_path):
    assert base_model_in(directory) is None and "base_model" not in text(directory)
    assert base_model_in(tmp_path / "nothing") is None


def test_custom_data_are_named_by_the_end_of_their_path_and_listed_once(directory):
    for _ in range(2):
        add_results(directory, {"val_data": "/data/pets/test-*.tar", "retrieval": RETRIEVAL})
    add_results(directory, {"val_data": "/data/birds/test-*.tar", "retrieval": RETRIEVAL})

    assert text(directory).count("| pets/test-*.tar: 5,000 images, 25,010 captions |") == 6
    assert text(directory).count("| birds/test-*.tar: 5,000 images, 25,010 captions |") == 6


def test_card_of_a_dense_model_mentions_no_experts(tmp_path):
    save_pretrained(tiny_clip(), tmp_path, tiny_config())

    card = text(tmp_path)

    assert "# Dense CLIP" in card and "experts" not in card and "cannot load" not in card
    assert ModelCard(card).data.tags == ["clip"]


def test_results_are_added_and_replace_those_of_the_same_data(directory):
    before = text(directory)
    add_results(directory, {"dataset": "coco", "split": "test", "precision": "fp32", "retrieval": RETRIEVAL})
    zero_shot = {"top1": 0.7692, "top5": 0.9, "chance": 0.001, "images": 50000, "classes": 1000}
    add_results(directory, {"dataset": "imagenet", "split": "test", "precision": "bf16", "zero_shot": zero_shot})
    better = {**RETRIEVAL, "text_to_image_R@1": 0.521}
    add_results(directory, {"dataset": "coco", "split": "test", "precision": "fp32", "retrieval": better})

    card = text(directory)

    assert card.count("| coco test: 5,000 images, 25,010 captions |") == 6
    assert "captions | text_to_image_R@1 | 52.10 |" in card and "captions | image_to_text_R@1 | 25.00 |" in card
    assert "| imagenet test in bf16: 50,000 images, 1,000 classes | zero-shot top-1 | 76.92 |" in card
    assert "Not evaluated" not in card
    assert card.partition("## Evaluation")[0] == before.partition("## Evaluation")[0]


def test_other_metrics_of_retrieval_are_not_listed_as_recalls(directory):
    add_results(directory, {"dataset": "coco", "retrieval": {**RETRIEVAL, "image_to_text_median_rank": 2.0}})

    assert re.findall(r"image_to_text_(\S+) ", text(directory)) == ["R@1", "R@5", "R@10"]


def test_recall_over_distinct_captions_is_listed_separately(directory):
    add_results(directory, {"dataset": "icons", "retrieval": RETRIEVAL, "multi_positive": False})
    add_results(directory, {"dataset": "icons", "retrieval": RETRIEVAL, "multi_positive": True})

    card = text(directory)

    assert card.count("| icons: 5,000 images, 25,010 captions |") == 6
    assert card.count("| icons: 5,000 images, 25,010 distinct captions |") == 6


def test_manual_edits_of_the_card_are_kept(directory):
    path = directory / "README.md"
    path.write_text(path.read_text().replace("## Usage", "Trained on cats.\n\n## Usage") + "\n## Thanks\n\nTo all.\n")

    add_results(directory, {"retrieval": RETRIEVAL})
    add_results(directory, {"retrieval": RETRIEVAL})

    card = text(directory)
    assert "Trained on cats." in card and card.endswith("\n## Thanks\n\nTo all.\n")
    assert card.count("| own data: 5,000 images, 25,010 captions | text_to_image_R@5 | 50.00 |") == 1


def test_what_was_written_about_the_results_is_kept(directory):
    path = directory / "README.md"
    add_results(directory, {"dataset": "coco", "retrieval": RETRIEVAL})
    path.write_text(path.read_text() + "| cifar | top-1 | 93.1 ± 0.2 |\n\nMeasured by hand.\n\nTwice.\n")

    for _ in range(2):
        add_results(directory, {"dataset": "coco", "retrieval": RETRIEVAL})

    card = text(directory)
    assert card.endswith("| cifar | top-1 | 93.1 ± 0.2 |\n\nMeasured by hand.\n\nTwice.\n")
    assert card.count("| coco: ") == 6 and card.count("| data | metric | % |") == 1


def test_results_of_the_same_kind_of_data_in_other_places_are_listed_separately(directory):
    zero_shot = {"top1": 0.5, "top5": 0.9, "chance": 0.001, "images": 10000, "classes": 1000}
    for variant in ("imagenetv2-matched-frequency-format-val", "imagenetv2-top-images-format-val"):
        add_results(directory, {"dataset": "imagenet-v2", "root": f"/data/{variant}", "zero_shot": zero_shot})

    assert text(directory).count("zero-shot top-1") == 2
    assert "| imagenet-v2 imagenetv2-top-images-format-val: 10,000 images" in text(directory)


OTHER_TABLE = "Compared with others:\n\n| model | params | note |\n| --- | --- | --- |\n| ViT-B | 86 M | dense |\n"


@pytest.mark.parametrize(
    "card",
    [
        f"# A\n\n## Evaluation\n\n| data | metric | % |\n|---|---|---|\n| a | b | 1.00 |\n\n{OTHER_TABLE}\n## End\n",
        f"# A\n\n## Evaluation\n\n{OTHER_TABLE}\n### By hand\n\nTwice.\n",
        "# A\n\n### Evaluation\n\nOf humans.\n\n## End\n",
        "# A\n\n## Evaluation of humans\n\nBetter.\n",
        "# A\n\n## Evaluation",
        "# A\n\n## Evaluation \n\n| data  | metric | %   |\n|-------|--------|-----|\n| a     | b      | 1.0 |\n",
        "# A\n\n## Evaluation\n\n| a | b | 1.00 |\n|---|---|---|\n| data | metric | % |\n",
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


def test_results_without_a_card_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="card: no README.md"):
        add_results(tmp_path, {"retrieval": RETRIEVAL})
