"""The names of models, found without importing open_clip, which takes seconds."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

HUB_PREFIX = "hf-hub:"
LOCAL_PREFIX = "local-dir:"
CONFIGS = Path(__file__).parent / "model_configs"
"""Of clipup's models, in open_clip's format."""


def packaged() -> set[str]:
    """The models of the installed open_clip and of clipup."""
    spec = find_spec("open_clip")
    places = [CONFIGS, *(Path(place) / "model_configs" for place in (spec and spec.submodule_search_locations) or ())]
    return {file.stem for place in places for file in place.glob("*.json")}


def has_weights(name: str, pretrained: str | None) -> bool:
    """Whether a model is created with weights that are not random."""
    elsewhere = name.startswith((HUB_PREFIX, LOCAL_PREFIX)) or (Path(name).is_dir() and name not in packaged())
    return bool(pretrained) or elsewhere
