"""The rules of the splits, on the whole data set (nothing is drawn here)."""

from __future__ import annotations

import re
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from clipup.demo.pictograms import splits
from clipup.demo.pictograms.captions import same_words
from clipup.demo.pictograms.splits import base

FARMER = "1f9d1-200d-1f33e"
TONES = ("1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff")


def plain_captions(concept):
    return {caption for caption in concept.captions if ", " not in caption}


def test_variants_of_skin_gender_hair_and_direction_share_a_base():
    assert base("1f468-1f3fd-200d-1f33e") == base("1f469-200d-1f33e") == base(FARMER) == FARMER
    assert base("1f3c3-1f3fb-200d-2640-fe0f-200d-27a1-fe0f") == base("1f3c3") == "1f3c3"
    assert len({base(s) for s in ("1f468", "1f469-200d-1f9b0", "1f471-1f3fb-200d-2642", "1f9d4", "1f9d1-1f3ff")}) == 1
    assert base("1f385-1f3fb") == base("1f936") == base("1f9d1-1f3fe-200d-1f384")
    assert base("1f468-200d-1f469-200d-1f467") == base("1f46a") == base("1f9d1-200d-1f9d2")
    assert base("1f469-200d-2764-fe0f-200d-1f468") == base("1f491-1f3fd")
    assert base("1f469-1f3fb-200d-2764-fe0f-200d-1f48b-200d-1f468-1f3fc") == base("1f48f")
    assert base("1f46d-1f3fb") == base("1f9d1-1f3fb-200d-1f91d-200d-1f9d1-1f3ff")
    assert base("1faf1-1f3fb-200d-1faf2-1f3ff") == base("1f91d-1f3fb")


def test_other_emoji_keep_bases_of_their_own():
    bases = [base(s) for s in ("1f408", "1f408-200d-2b1b", "2640", "2642", "27a1", "1f466", "1f468", "1f474", FARMER)]
    assert len(set(bases)) == len(bases)


@given(
    who=st.sampled_from(("1f468", "1f469", "1f9d1")),
    tone=st.sampled_from(("", *TONES)),
    what=st.sampled_from(("1f33e", "1f373", "2695", "1f680", "1f9af")),
    variation=st.booleans(),
    direction=st.booleans(),
)
def test_base_does_not_depend_on_who_does_it(who, tone, what, variation, direction):
    parts = [who, tone, "200d", what, "fe0f" if variation else ""]
    parts += ["200d", "27a1", "fe0f"] if direction else []
    sequence = "-".join(part for part in parts if part)
    assert base(sequence) == base(f"1f9d1-200d-{what}")
    assert base(base(sequence)) == base(sequence)


@given(st.lists(st.sampled_from(("1f408", "1f468", "1f469", "200d", "fe0f", "2640", "1f3fd", "2764")), min_size=1))
def test_base_is_final_and_holds_no_skin_tone(points):
    once = base("-".join(points))
    assert base(once) == once
    assert not set(once.split("-")) & {*TONES, "fe0f"}


def test_about_a_thousand_renderings_and_a_few_hundred_concepts_are_held_out(all_splits):
    assert 950 <= len(all_splits.test) <= 1050
    assert 250 <= len(all_splits.concepts) <= 450
    groups = Counter(concept.group for concept, _ in all_splits.test)
    assert 0.8 < groups["emoji"] / groups["icons"] < 1.25


def test_a_test_rendering_is_not_trained_on_but_another_one_of_its_concept_is(all_splits):
    trained = {rendering.key for _, rendering in all_splits.train}
    concepts = {concept.key for concept, _ in all_splits.train}
    for concept, rendering in all_splits.test:
        assert rendering.key not in trained
        assert concept.key in concepts


def test_a_test_image_in_another_skin_tone_by_the_same_hand_is_not_trained_on(all_splits):
    trained = {(concept.toneless, rendering.source) for concept, rendering in all_splits.train if concept.sequence}
    emoji = [(concept, rendering) for concept, rendering in all_splits.test if concept.sequence]
    assert emoji and not any((concept.toneless, rendering.source) in trained for concept, rendering in emoji)


def test_no_variant_of_a_held_out_concept_is_trained_on(all_splits):
    held_out = {base(concept.sequence) for concept, _ in all_splits.concepts if concept.sequence}
    trained = {base(concept.sequence) for concept, _ in all_splits.train if concept.sequence}
    assert len(held_out) > 100
    assert not held_out & trained


def test_no_name_of_a_held_out_concept_is_trained_on_in_any_order_of_words(all_splits):
    held_out = {same_words(c) for concept, _ in all_splits.concepts for c in plain_captions(concept)}
    trained = {same_words(c) for concept, _ in all_splits.train for c in plain_captions(concept)}
    assert not held_out & trained
    captions = {caption for concept, _ in all_splits.concepts for caption in concept.captions}
    assert not captions & {caption for concept, _ in all_splits.train for caption in concept.captions}


def test_held_out_concepts_are_in_neither_of_the_other_splits(all_splits):
    held_out = {concept.key for concept, _ in all_splits.concepts}
    assert not held_out & {concept.key for concept, _ in all_splits.test}
    assert not held_out & {concept.key for concept, _ in all_splits.train}


def test_a_gallery_has_one_image_a_concept_and_a_caption_finds_one_image(all_splits):
    for gallery in (all_splits.test, all_splits.concepts):
        captions = Counter(caption for concept, _ in gallery for caption in concept.captions)
        assert max(captions.values()) == 1
        assert len({concept.key for concept, _ in gallery}) == len(gallery)
        assert not any(concept.toned for concept, _ in gallery)


def test_there_are_no_country_flags_but_other_flags_and_keycaps(all_concepts):
    assert not any(re.search(r"1f1[ef]|e00[67]", concept.sequence) for concept in all_concepts)
    names = {concept.names[0] for concept in all_concepts}
    assert {"chequered flag", "rainbow flag", "pirate flag", "keycap 1", "keycap number sign"} <= names
    assert not {"france", "united states", "scotland"} & names


def test_captions_are_several_start_with_the_name_and_do_not_tell_the_source(all_concepts):
    plain = [concept for concept in all_concepts if not concept.toned]
    assert sum(len(concept.captions) for concept in plain) / len(plain) > 3
    for concept in all_concepts:
        assert concept.captions[0] == concept.names[0]
        assert len(set(concept.captions)) == len(concept.captions)
        assert all(caption == caption.lower() and caption.strip(" ,") for caption in concept.captions)
    text = " ".join(caption for concept in all_concepts for caption in concept.captions)
    assert not re.search(r"\b(twemoji|openmoji|duotone)\b", text)
    by_name = {concept.names[0]: concept.captions for concept in all_concepts}
    assert "joy" in by_name["face with tears of joy"]
    assert "acorn, nut" in by_name["acorn"]
    assert "farmer, dark skin tone" in by_name


def test_splits_do_not_depend_on_the_order_of_concepts(all_concepts, all_splits):
    again = splits.assign(sorted(all_concepts, key=lambda concept: concept.key[::-1]))
    for split in ("train", "test", "concepts"):
        keys = [rendering.key for _, rendering in getattr(all_splits, split)]
        assert [rendering.key for _, rendering in getattr(again, split)] == keys


def test_splits_are_those_of_every_other_machine():
    assert splits._hash("test", "emoji-1f602") == 0.5640327534241397
