"""Models of classes derived from transformers' own are refused: an upcycled one would lose their overrides."""

import pytest
import transformers
from tiny_hugging_face import tiny_hugging_face

from clipup import MoEConfig, moe_layers, upcycle


class OwnForward(transformers.ViTModel):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs).last_hidden_state


class OwnHead(transformers.PreTrainedModel):
    config_class = transformers.ViTConfig

    def __init__(self, config):
        super().__init__(config)
        self.vit = transformers.ViTModel(config)


class OwnConfig(transformers.ViTConfig):
    pass


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda values: OwnForward(transformers.ViTConfig(**values)), "the model is a OwnForward .* ViTModel and may"),
        (lambda values: OwnHead(transformers.ViTConfig(**values)), "the model is a OwnHead .* PreTrainedModel and may"),
        (
            lambda values: transformers.ViTModel(OwnConfig(**values)),
            "config of the model is a OwnConfig .* ViTConfig and",
        ),
    ],
    ids=["forward", "head", "config"],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_classes_of_ones_own_are_refused_and_the_model_stays_as_it_was(make, message, inplace):
    model = make(tiny_hugging_face("ViTModel").config.to_dict())
    kinds = type(model), type(model.config)
    with pytest.raises(TypeError, match=message):
        upcycle(model, MoEConfig.clip_up(towers=("image",)), inplace=inplace)
    assert not moe_layers(model) and (type(model), type(model.config)) == kinds
