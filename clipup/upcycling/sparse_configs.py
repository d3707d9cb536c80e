"""Configs of upcycled transformers models.

Without clipup, loading must not give a dense model with random MLPs. ``model_type`` is one that transformers does not
know, and in the saved file every ``hidden_size`` is a sentence that says what to do. Programs that do not import clipup
do so through ``clipup_loader.py`` beside that file, if they are given ``trust_remote_code=True``.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..dense.transformers_models import SPARSE_PREFIX

_REFUSAL = "import clipup and use AutoModel, this model is sparse: "
_WIDTH = "hidden_size"
"""The field that every class of transformers reads from its config."""
_LOADER = """\"\"\"What trust_remote_code=True executes: it imports clipup, which has to be installed.\"\"\"

try:
    import clipup
except ImportError as error:
    raise ImportError("this model is sparse: install the package clipup, as README.md says") from error
from transformers import CONFIG_MAPPING

SparseConfig = CONFIG_MAPPING["{model_type}"]
"""
_README = """---
library_name: transformers
tags:
- mixture-of-experts
---

Some MLPs of this model are sparse mixture-of-experts layers of the package `clipup`, which has to be installed. Import
it before you load the model:

```python
import clipup
from transformers import AutoModel

model = AutoModel.from_pretrained("this directory")
```

A program that cannot be edited loads the model with `trust_remote_code=True`: `clipup_loader.py` imports `clipup`.
"""


class _SparseConfig:
    """A config of transformers with a ``moe_cfg``."""

    model_type: str

    def __post_init__(self, **kwargs: Any) -> None:
        """Turns nested dictionaries that ``to_dict`` wrote back into sparse configs."""
        for name, dense in self.sub_configs.items():  # type: ignore[attr-defined]
            part = getattr(self, name)
            if isinstance(part, dict) and str(part.get("model_type")).startswith(SPARSE_PREFIX):
                setattr(self, name, sparse_config_class(dense)(**part))
        super().__post_init__(**kwargs)  # type: ignore[misc]

    def to_json_file(self, json_file_path: str | os.PathLike[str], use_diff: bool = True) -> None:
        """Writes widths that no class of a dense model accepts, and the files that explain or do what is needed."""
        values = json.loads(self.to_json_string(use_diff))  # type: ignore[attr-defined]
        refusing = _changed(values, lambda width: f"{_REFUSAL}{width}")
        refusing["auto_map"] = {"AutoConfig": "clipup_loader.SparseConfig"}
        path = Path(json_file_path)
        path.write_text(json.dumps(refusing, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        path.with_name("clipup_loader.py").write_text(_LOADER.format(model_type=self.model_type), encoding="utf-8")
        if not (readme := path.with_name("README.md")).exists():
            readme.write_text(_README, encoding="utf-8")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Restores the widths that ``to_json_file`` replaced."""
        plain = _changed(config_dict, lambda width: int(str(width).removeprefix(_REFUSAL)))
        return super().from_dict(plain, **kwargs)  # type: ignore[misc]


def _changed(values: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """A copy with other widths, in nested configs too."""
    return {
        key: change(value) if key == _WIDTH else _changed(value, change) if isinstance(value, dict) else value
        for key, value in values.items()
    }


@functools.cache
def sparse_config_class(dense: Any) -> Any:
    """The class of the configs of upcycled models whose dense config is a ``dense``."""
    content = {"__module__": __name__, "model_type": SPARSE_PREFIX + dense.model_type}
    return type(sparse_name(dense), (_SparseConfig, dense), content)


def sparse_name(dense: Any) -> str:
    return f"Sparse{dense.__name__}"


def __getattr__(name: str) -> Any:
    """The classes by their names, which pickle looks up."""
    dense = None
    if name.startswith("Sparse") and name.endswith("Config"):
        dense = getattr(importlib.import_module("transformers"), name.removeprefix("Sparse"), None)
    if dense is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return sparse_config_class(dense)
