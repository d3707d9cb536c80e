"""How the pictograms are split: by hashing names, so every machine and every run agrees.

`test`       one rendering of a concept, whose other renderings are in the training split.
`concepts`   whole families of concepts: none of their renderings and names are in the training split.

A family is always in one split: emoji that differ in skin tone, gender, hair or direction (`base`), and everything that
shares a name in any order of its words (the hammers of the emoji and of the icons; "waving hand" and "hand waving"). A
gallery holds one image per concept and no two concepts that share a caption, so each caption has one correct image.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .captions import place, same_words
from .sources import Concept, Rendering

SALT = "clipup pictograms 1"
TEST_SHARE = 0.36
CONCEPTS_SHARE = 0.12

_PERSON, _CHILD, _OLD_PERSON = "1f9d1", "1f9d2", "1f9d3"
_SAME_PERSON = {
    **dict.fromkeys(("1f468", "1f469", "1f471", "1f9d4"), _PERSON),  # man, woman, blond hair, beard
    **dict.fromkeys(("1f466", "1f467"), _CHILD),
    **dict.fromkeys(("1f474", "1f475"), _OLD_PERSON),
}
_SKIN_AND_HAIR = {f"1f3f{tone}" for tone in "bcdef"} | {f"1f9b{hair}" for hair in "0123"}
_GENDER_AND_DIRECTION = {"2640", "2642", "27a1"}
_JOINER, _VARIATION = "200d", "fe0f"
_FAMILY = "1f46a"
_SAME_EMOJI = {
    "1f936": "1f385",  # Mrs. Claus, Santa Claus
    "1f9d1-200d-1f384": "1f385",  # Mx Claus
    "1f934": "1fac5",  # prince, person with crown
    "1f478": "1fac5",  # princess
    "1f930": "1fac4",  # pregnant woman, pregnant person
    "1fac3": "1fac4",  # pregnant man
    "1f57a": "1f483",  # man dancing, woman dancing
    "1f9d1-200d-1f37c": "1f931",  # person feeding baby, breast-feeding
    "1f46b": "1f9d1-200d-1f91d-200d-1f9d1",  # holding hands
    "1f46c": "1f9d1-200d-1f91d-200d-1f9d1",
    "1f46d": "1f9d1-200d-1f91d-200d-1f9d1",
    "1f9d1-200d-2764-200d-1f48b-200d-1f9d1": "1f48f",  # kiss
    "1f9d1-200d-2764-200d-1f9d1": "1f491",  # couple with heart
    "1f9d1-200d-1f430-200d-1f9d1": "1f46f",  # people with bunny ears
    "1f9d1-200d-1faef-200d-1f9d1": "1f93c",  # people wrestling
    "1faf1-200d-1faf2": "1f91d",  # handshake
}


def base(sequence: str) -> str:
    """The sequence shared by all variants of an emoji in skin tone, gender, hair and direction.

    `sequence` and the result are code points in hexadecimal joined by "-": man farmer, medium skin tone
    ("1f468-1f3fd-200d-1f33e") and farmer ("1f9d1-200d-1f33e") give the latter.
    """
    parts: list[list[str]] = [[]]
    for point in sequence.lower().split("-"):
        if point == _JOINER:
            parts.append([])
        elif point not in _SKIN_AND_HAIR and point != _VARIATION:
            parts[-1].append(_SAME_PERSON.get(point, point))
    joined = ["-".join(part) for part in parts]
    kept = [joined[0], *(part for part in joined[1:] if part and part not in _GENDER_AND_DIRECTION)]
    if len(kept) > 1 and all(part in (_PERSON, _CHILD) for part in kept):
        return _FAMILY
    result = f"-{_JOINER}-".join(kept)
    return _SAME_EMOJI.get(result, result)


def families(concepts: Sequence[Concept]) -> dict[str, str]:
    """The family of each concept, `{concept.key: family}`; a family is named after its first member."""
    parent = {concept.key: concept.key for concept in concepts}

    def root(key: str) -> str:
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    holder: dict[object, str] = {}
    for concept in concepts:
        marks: list[object] = [same_words(name) for name in concept.names]
        if concept.sequence:
            marks.append(base(concept.sequence))
        for mark in marks:
            first, second = root(holder.setdefault(mark, concept.key)), root(concept.key)
            parent[max(first, second)] = min(first, second)
    return {key: root(key) for key in parent}


@dataclass(frozen=True)
class Splits:
    """`test` and `concepts` hold one rendering per concept, `train` all training renderings."""

    train: list[tuple[Concept, Rendering]]
    test: list[tuple[Concept, Rendering]]
    concepts: list[tuple[Concept, Rendering]]


def assign(concepts: Sequence[Concept]) -> Splits:
    """Splits the renderings.

    The other renderings of held-out concepts are in no split, nor are drawings from the same source that differ from a
    test image only in skin tone.
    """
    family = families(concepts)
    held_out = {name for name in set(family.values()) if _hash("concepts", name) < CONCEPTS_SHARE}
    whole = _gallery(c for c in concepts if not c.toned and family[c.key] in held_out)
    kept = [concept for concept in concepts if family[concept.key] not in held_out]
    test = _gallery(c for c in kept if not c.toned and _hash("test", c.key) < TEST_SHARE)
    test_keys = {rendering.key for _, rendering in test}
    near_test = {(concept.toneless, rendering.source) for concept, rendering in test if concept.sequence}
    train = [
        (concept, rendering)
        for concept in kept
        for rendering in concept.renderings
        if rendering.key not in test_keys and (concept.toneless, rendering.source) not in near_test
    ]
    return Splits(train=sorted(train, key=lambda pair: _hash("order", pair[1].key)), test=test, concepts=whole)


def _gallery(candidates: Iterable[Concept]) -> list[tuple[Concept, Rendering]]:
    """One rendering of each concept, ordered by hash; of concepts that share a caption, only the first."""
    chosen: list[tuple[Concept, Rendering]] = []
    captions: set[str] = set()
    for concept in sorted(candidates, key=lambda concept: _hash("gallery", concept.key)):
        if captions.isdisjoint(concept.captions):
            captions.update(concept.captions)
            chosen.append((concept, min(concept.renderings, key=lambda rendering: _hash("rendering", rendering.key))))
    return chosen


def _hash(purpose: str, key: str) -> float:
    return place(SALT, purpose, key)
