"""``inspect_experts`` and its page: the numbers are those of the model, and the page stands alone."""

import dataclasses
import re

import numpy as np
import pytest
import timm
import torch
from html_page import Page, assert_stands_alone
from sparse_clip import CAPTIONS, EXPERTS, dense_clip, pictures, sparse_clip, sparse_config, tokenizer, transform
from tiny_families import build, coca_cfg, timm_model

from clipup import MoEConfig, moe_layers, moe_metrics, upcycle
from clipup.inspection import inspect_experts
from clipup.inspection.figures.palette import expert_color

IMAGE_LAYER, TEXT_LAYER = "visual.transformer.resblocks.1.mlp", "transformer.resblocks.3.mlp"
EVIL = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def models():
    return sparse_clip(), dense_clip()


@pytest.fixture(scope="module")
def seen(models):
    model, dense = models
    return inspect_experts(
        model, pictures(9), CAPTIONS, preprocess=transform(), tokenizer=tokenizer(), dense=dense, name="tiny"
    )


def cells(report):
    """{row: {(group, column): cell}} of the table of layers."""
    table = report.overview()
    return {
        row: {(one.group, one.label): one.cells[place] for one in table.columns} for place, row in enumerate(table.rows)
    }


def test_the_table_shows_the_numbers_of_the_model(models, seen):
    model, dense = models
    with torch.no_grad():
        model.encode_image(torch.stack([transform()(picture) for picture in pictures(9)]))
        model.encode_text(tokenizer()(list(CAPTIONS)))
    titles = ["Image tower, block 1", "Image tower, block 3", "Text tower, block 1", "Text tower, block 3"]
    assert list(cells(seen)) == titles
    for title, (name, metrics) in zip(titles, moe_metrics(model).items(), strict=True):
        row, layer, mlp = cells(seen)[title], moe_layers(model)[name], dense.get_submodule(name)
        assert row["load", "tokens"] == str(int((metrics["expert_indices"][:, 0] >= 0).sum()))
        assert row["load", "largest"] == f"{metrics['load'].max().item() * EXPERTS:.2f}"
        assert row["load", "unused"] == str(int((metrics["load"] == 0).sum()))
        share = metrics["router_entropy"].item() / np.log(EXPERTS)
        assert row["entropy, share of ln E", "per token"] == f"{share:.2f}"
        for label, ours, theirs in (("first", layer.in_weight, mlp.c_fc), ("second", layer.out_weight, mlp.c_proj)):
            flat = torch.nn.functional.normalize(ours.detach().double().flatten(1), dim=1)
            gram = flat @ flat.T
            assert (
                row["experts' cosine", label] == f"{(gram.sum() - gram.trace()).item() / EXPERTS / (EXPERTS - 1):.3f}"
            )
            own = torch.nn.functional.normalize(theirs.weight.detach().double().flatten(), dim=0)
            assert row["to the dense MLP", label] == f"{(flat @ own).mean().item():.3f}"


def test_the_page_holds_the_table_and_every_layer_and_stands_alone(seen):
    html = seen.page()
    assert html.startswith("<!doctype html>") and len(html.encode()) < 3_000_000
    assert_stands_alone(html)
    page = Page(html)
    for row, values in cells(seen).items():
        assert row in page.text and all(cell in page.words for cell in values.values())
    assert page.text.count("mean of all pairs") == 8 and page.text.count("largest share over uniform") == 4
    assert "The experts of tiny" in page.text
    assert html.count(">input<") == 6
    without = Page(seen.page(shown=0)).text
    assert without.count("None are shown.") == 2 and "tower is dense" not in without


def test_the_page_begins_with_the_entropy_of_the_routers_and_charts_of_all_layers_share_a_scale(seen):
    shares = [float(row["entropy, share of ln E", "per token"]) for row in cells(seen).values()]
    first = Page(seen.page()).text.split(" of its maximum")[0]
    assert first.endswith(
        f"per token: {' to '.join(dict.fromkeys(f'{end:.2f}' for end in (min(shares), max(shares))))}"
    )
    assert "similar" not in first
    per_percent = []
    for name, layer in seen.layers.items():
        bars = re.findall(r"display:block;width:([\d.]+)%", seen.load(name))
        per_percent += [float(bar) / (100 * share) for bar, share in zip(bars, layer.load, strict=True) if share]
    assert max(per_percent) == pytest.approx(min(per_percent), rel=0.02)
    shades = [re.findall(r"shades from ([\d.]+)", seen.similarity(name)) for name in seen.similarities]
    least = min(float(cosines.min()) for layer in seen.similarities.values() for cosines in layer[:2])
    assert {float(shade) for of_layer in shades for shade in of_layer} == {np.floor(100 * least) / 100}


def test_maps_and_captions_show_the_first_choices(seen):
    colors = re.findall(r'fill="(#\w+)" fill-opacity', seen.routing(2))
    expected = [layer.maps()[2].flatten() for layer in seen.of_tower("image").values()]
    assert colors == [expert_color(expert) for expert in np.concatenate(expected)]
    strip = seen.tokens(1)
    chosen = [layer.expert_indices[1, :, 0] for layer in seen.of_tower("text").values()]
    taken = [expert for expert in np.concatenate(chosen).tolist() if expert >= 0]
    assert list(map(int, re.findall(r"<sub[^>]*>(\d+)</sub>", strip))) == taken
    assert strip.count("⟨start⟩") == strip.count("balloons") == 2


def test_cards_have_the_surest_patches_and_the_words(seen):
    layer = seen.layers[IMAGE_LAYER]
    shown = re.findall(r"picture (\d+), row (\d+), column (\d+): probability ([\d.]+)", seen.cards(IMAGE_LAYER, most=3))
    surest = [one for expert in range(EXPERTS) for one in layer.strongest(expert, 3)]
    places = [(sample, *layer.patch_of(token)) for sample, token in surest]
    assert [tuple(map(int, one[:3])) for one in shown] == places
    assert float(shown[0][3]) == pytest.approx(layer.probabilities[(*surest[0], 0)], abs=0.005)
    assert "cat" in seen.cards(TEXT_LAYER, most=30) and "⟨start⟩" in seen.cards(TEXT_LAYER, most=30)


def test_markup_and_surrogates_in_names_and_captions_are_escaped(models):
    evil = inspect_experts(
        models[0], pictures(1), [EVIL, "\ud83d \x00"], preprocess=transform(), tokenizer=tokenizer(), name=EVIL
    )
    html = dataclasses.replace(evil, skipped={EVIL: EVIL}).page()
    page = Page(html)
    assert not [tag for tag, attributes in page.elements if tag == "script" or "onerror" in attributes]
    assert page.text.count("<script>alert('x')</script>") >= 3
    html.encode("utf-8")


@pytest.mark.parametrize("towers", [("image", "text"), ("image",), ("text",)])
def test_images_alone_and_captions_alone_are_enough_and_a_tower_may_have_stayed_dense(towers):
    model = upcycle(dense_clip(), MoEConfig(num_experts=2, towers=towers))
    images = inspect_experts(model, pictures(2), preprocess=transform())
    captions = inspect_experts(model, captions=CAPTIONS, tokenizer=tokenizer())
    for tower, report, said in (("image", images, "No captions were given."), ("text", captions, "No images were")):
        text = Page(report.page()).text
        assert said in text and ("No sparse layer was run" in text) == (tower not in towers)


def test_other_models_than_clips_are_taken():
    timm = upcycle(timm_model("Block/Mlp"), MoEConfig(num_experts=2, towers=("image",)))
    report = inspect_experts(timm, pictures(2), preprocess=lambda image: torch.rand(3, 32, 32))
    assert list(cells(report)) == ["Image tower, block 1", "Image tower, block 3"] and "block 3" in report.page()
    cfg = coca_cfg()
    for text in ("text_cfg", "multimodal_cfg"):
        cfg[text] = {**cfg[text], "vocab_size": sparse_config()["text_cfg"]["vocab_size"]}
    coca = upcycle(build(cfg), MoEConfig(num_experts=2, towers=("image", "text", "decoder")))
    report = inspect_experts(coca, pictures(2), CAPTIONS, preprocess=transform(), tokenizer=tokenizer())
    assert cells(report)["Decoder, block 0"]["load", "tokens"] == "–"
    text = Page(report.page()).text
    assert "Decoder, block 0" in text and "⟨class⟩" in text and "The text tower routes padding too" in text


def test_cards_say_that_patches_without_a_known_grid_cannot_be_shown():
    sizes = {"img_size": 32, "embed_dim": 64, "depth": 2, "num_heads": 2}
    dense = timm.create_model("naflexvit_base_patch16_gap", **sizes)
    model = upcycle(dense, MoEConfig(num_experts=2, towers=("image",)))
    report = inspect_experts(model, pictures(1), preprocess=lambda image: torch.rand(3, 32, 32))
    assert all("grid of this layer’s patches is not known" in report.cards(name) for name in report.layers)


def test_tokens_that_no_expert_chose_are_counted_and_shown():
    model = upcycle(dense_clip(), MoEConfig(num_experts=4, routing="expert_choice", capacity_factor=0.5))
    report = inspect_experts(model, captions=CAPTIONS, tokenizer=tokenizer())
    tokens = int((tokenizer()(list(CAPTIONS)) != 0).sum())
    assert [layer.tokens for layer in report.layers.values()] == [tokens] * 2
    layer = report.layers[TEXT_LAYER]
    assert (layer.expert_indices[layer.mask][:, 0] < 0).any()
    strips = "".join(report.tokens(index) for index in range(len(CAPTIONS)))
    assert strips.count("title=") == 2 * tokens and 'title="no expert"' in strips and "-1" not in strips
