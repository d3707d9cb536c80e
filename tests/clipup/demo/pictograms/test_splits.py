"""The rules of the splits, on the whole data set (nothing is drawn here)."""

import re
from collections import Counter

from clipup.demo.pictograms import splits
from clipup.demo.pictograms.captions import same_words
from clipup.demo.pictograms.splits import base

FARMER = "1f9d1-200d-1f33e"


def test_variants_of_skin_gender_hair_and_direction_share_a_base_and_others_have_their_own():
    assert base("1f468-1f3fd-200d-1f33e") == base("1f469-200d-1f33e") == base(FARMER) == FARMER
    assert base("1f3c3-1f3fb-200d-2640-fe0f-200d-27a1-fe0f") == base("1f3c3") == "1f3c3"
    assert len({base(s) for s in ("1f468", "1f469-200d-1f9b0", "1f471-1f3fb-200d-2642", "1f9d4", "1f9d1-1f3ff")}) == 1
    assert base("1f385-1f3fb") == base("1f936") == base("1f9d1-1f3fe-200d-1f384")
    assert base("1f468-200d-1f469-200d-1f467") == base("1f46a") == base("1f9d1-200d-1f9d2")
    assert base("1f469-200d-2764-fe0f-200d-1f468") == base("1f491-1f3fd")
    others = [base(s) for s in ("1f408", "1f408-200d-2b1b", "2640", "2642", "27a1", "1f466", "1f468", "1f474", FARMER)]
    assert len(set(others)) == len(others)


def test_no_drawing_and_no_concept_of_a_gallery_is_trained_on(all_splits):
    assert 950 <= len(all_splits.test) <= 1050 and 250 <= len(all_splits.concepts) <= 450
    groups = Counter(concept.group for concept, _ in all_splits.test)
    assert 0.8 < groups["emoji"] / groups["icons"] < 1.25
    train, test, held_out = (
        {concept.key for concept, _ in members} for members in (all_splits.train, all_splits.test, all_splits.concepts)
    )
    assert test <= train and not held_out & (train | test)
    by_hand = {(concept.toneless or concept.key, rendering.source) for concept, rendering in all_splits.train}
    assert not by_hand & {(concept.toneless or concept.key, rendering.source) for concept, rendering in all_splits.test}


def test_no_variant_and_no_name_of_a_held_out_concept_is_trained_on_in_any_order_of_words(all_splits):
    def marks(members):
        bases = {base(concept.sequence) for concept, _ in members if concept.sequence}
        captions = {caption for concept, _ in members for caption in concept.captions}
        return bases | captions | {same_words(caption) for caption in captions if ", " not in caption}

    assert len(marks(all_splits.concepts)) > 500
    assert not marks(all_splits.concepts) & marks(all_splits.train)


def test_a_gallery_has_one_image_a_concept_and_a_caption_finds_one_image(all_splits):
    for gallery in (all_splits.test, all_splits.concepts):
        captions = [caption for concept, _ in gallery for caption in concept.captions]
        assert len(captions) == len(set(captions)) and not any(concept.toned for concept, _ in gallery)


def test_captions_start_with_the_name_and_name_no_country_and_no_source(all_concepts):
    assert not any(re.search(r"1f1[ef]|e00[67]", concept.sequence) for concept in all_concepts)
    by_name = {concept.names[0]: concept.captions for concept in all_concepts}
    assert {"chequered flag", "pirate flag", "keycap 1", "farmer, dark skin tone"} <= set(by_name)
    assert "joy" in by_name["face with tears of joy"] and "acorn, nut" in by_name["acorn"]
    plain = [concept for concept in all_concepts if not concept.toned]
    assert sum(len(concept.captions) for concept in plain) / len(plain) > 3
    for concept in all_concepts:
        assert concept.captions[0] == concept.names[0] and len(set(concept.captions)) == len(concept.captions)
        assert all(caption == caption.lower() and caption.strip(" ,") for caption in concept.captions)
        assert not re.search(r"\b(twemoji|openmoji|duotone)\b", " ".join(concept.captions))


def test_splits_are_the_same_in_any_order_and_on_every_machine(all_concepts, all_splits):
    again = splits.assign(sorted(all_concepts, key=lambda concept: concept.key[::-1]))
    for split in ("train", "test", "concepts"):
        keys = [rendering.key for _, rendering in getattr(all_splits, split)]
        assert [rendering.key for _, rendering in getattr(again, split)] == keys
    drawn = {f"emoji-{point}" for point in ("1f525", "2615", "1f697", "1f602", "1f680", "1f332")}
    in_test = {concept.key for concept, _ in all_splits.test}
    assert drawn & in_test == {"emoji-1f525", "emoji-2615", "emoji-1f697"}
