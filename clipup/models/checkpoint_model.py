"""Makes a model directory of a training checkpoint: the model as its run built it, by the checkpoint's own configs."""

from __future__ import annotations

from pathlib import Path

from . import architecture, factory, hub, model_directory, model_names, saving, tokenizers
from .state_dicts import not_finite, read_weights


def save_checkpoint_model(path: Path, directory: Path, name: str | None = None) -> None:
    """
    Args:
        path: of the checkpoint.
        directory: that is written, as by ``save_pretrained``.
        name: of the model, for a checkpoint without its config, or without its tokenizer.

    Raises:
        ValueError: the checkpoint has no config and no name is given, or both are there and differ; or the weights do
            not fit, or are NaN or infinite.
        FileNotFoundError: the tokenizer was in the directory of a model that is not there.
    """
    weights = read_weights(path)
    if broken := not_finite(weights.state_dict):
        raise ValueError(f"{path} holds values that are not finite, in {broken}; take an earlier checkpoint")
    files = tokenizers.saved_in(weights.configs, path)
    model_cfg = weights.configs.get("model_cfg")
    if name is not None:
        named = model_names.get_model_config(name)
        if model_cfg is not None and files is not None and architecture.differing(model_cfg, named):
            raise ValueError(
                f"model: {path} holds the config of its model, which is not that of {name!r}; drop --model"
            )
        model_cfg = model_cfg or named
    if model_cfg is None:
        raise ValueError(
            f"{path} does not say which model it is of; pass --model with the name or directory that the run was given"
        )
    model_directory.check_model_cfg(model_cfg, str(path))
    model_cfg = architecture.with_logit_bias(model_cfg, weights.state_dict.get("logit_bias"))
    if files is None and model_cfg["text_cfg"].get("hf_tokenizer_name") and name is None:
        raise ValueError(
            f"{path} does not hold its tokenizer; pass the model that the run began with as --model to clipup convert"
        )
    if files is None:
        files = tokenizers.files_of(model_cfg["text_cfg"], None if name is None else tokenizers.source_directory(name))
    config = {key: value for key, value in weights.configs.items() if key != "tokenizer_files" and value is not None}
    with model_directory.temporary({**config, "model_cfg": model_cfg}) as place, hub.expecting_random_weights():
        model, *_ = factory.create_model_and_transforms(
            place, load_weights=False, pretrained_image=False, pretrained_text=False
        )
    architecture.resize_tower(model, model_cfg, weights.state_dict)
    factory.load_state_dict(model, weights.state_dict, str(path))
    saving.save_with_tokenizer(model, directory, model_cfg, files)
