"""Configs of upcycled models, in memory and in what transformers and PEFT make of them."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from tiny_hugging_face import CONFIGS, tiny_hugging_face

from clipup import MoEConfig, moe_layers, upcycle
from clipup.clip.hugging_face import random_batch
from clipup.clip.towers import towers


def tiny_sparse(name):
    dense = tiny_hugging_face(name)
    return upcycle(dense, MoEConfig.clip_up(towers=towers(dense), num_experts=4, capacity_factor=None))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_rebuilt_from_its_dict_and_the_refusal_is_in_the_file_alone(name, tmp_path):
    config = tiny_sparse(name).config
    config.save_pretrained(tmp_path)

    again = type(config)(**config.to_dict())

    assert again.to_dict() == config.to_dict() and again.to_dict()["model_type"] == config.model_type
    assert "import clipup" in (tmp_path / "config.json").read_text() and "import clipup" not in config.to_json_string()
    for other in (again, transformers.AutoConfig.from_pretrained(tmp_path)):
        for part in config.sub_configs:
            assert type(getattr(other, part)) is type(getattr(config, part)) is not type(config).sub_configs[part]


LOADED_BY_A_STRANGER = """
import os, sys, transformers
def load(trust):
    return transformers.AutoModel.from_pretrained("saved", trust_remote_code=trust)
def refusal(trust):
    try: load(trust)
    except Exception as error: return str(error)
assert "trust_remote_code=True" in refusal(False) and "clipup" not in sys.modules
sys.modules["clipup"] = None
assert "install the package clipup" in refusal(True)
del sys.modules["clipup"]
model = load(True)
assert type(model).__name__ == "SparseBertModel"
own = [name for name in sys.modules if name.startswith("transformers_modules.") and name.endswith("clipup_loader")]
assert own == [name for name in sys.modules if name.startswith("transformers_modules.") and sys.modules[name].__file__]
model.save_pretrained("again")
assert sorted(os.listdir("again")) == sorted(os.listdir("saved"))
assert "import clipup\\n" in open("again/README.md").read()
"""


def test_a_program_that_does_not_import_clipup_loads_a_model_with_trust_remote_code_and_executes_its_loader(tmp_path):
    tiny_sparse("BertModel").save_pretrained(tmp_path / "saved")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "cache"), "PYTHONPATH": os.getcwd()}
    subprocess.run([sys.executable, "-c", LOADED_BY_A_STRANGER], cwd=tmp_path, env=environment, check=True)


def test_a_readme_beside_the_model_stays(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    tiny_sparse("BertModel").save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize("vision", ["ViTModel", "CLIPVisionModel"])
def test_a_dual_encoder_of_sparse_models_is_saved_and_loaded(vision, tmp_path):
    image, text = tiny_sparse(vision), tiny_sparse("BertModel")
    weights = {**image.state_dict(prefix="vision_model."), **text.state_dict(prefix="text_model.")}
    weights = {name: weight.clone() for name, weight in weights.items()}
    both = transformers.VisionTextDualEncoderModel(vision_model=image, text_model=text)
    assert all(torch.equal(both.state_dict()[name], weight) for name, weight in weights.items())
    batch = random_batch(image, 3) | random_batch(text, 3)
    expected = both.eval()(**batch).logits_per_image

    both.save_pretrained(tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path)

    assert moe_layers(loaded).keys() == moe_layers(both).keys() and len(moe_layers(loaded)) == 4
    assert torch.equal(loaded(**batch).logits_per_image, expected)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["text_config"]["model_type"] == "clipup_bert"  # which transformers alone does not know


@pytest.mark.parametrize("method", ["PromptTuning", "PrefixTuning", "Lora"])
def test_adapters_with_their_defaults_are_those_of_the_dense_model(method):
    peft = pytest.importorskip("peft")
    options = {} if method == "Lora" else {"num_virtual_tokens": 2}
    options = getattr(peft, f"{method}Config")(task_type="CAUSAL_LM", **options)
    config = CONFIGS["BertModel"]()
    config.is_decoder = True
    dense = transformers.BertLMHeadModel(config).eval()
    sparse = upcycle(dense, MoEConfig.clip_up(towers=("text",), capacity_factor=None))
    ids, found = torch.arange(3, 9)[None], []
    for model in (dense, sparse):
        torch.manual_seed(0)
        model = peft.get_peft_model(model, options).eval()
        adapted = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        found.append({**adapted, "loss": model(input_ids=ids, labels=ids).loss})
    torch.testing.assert_close(*found)
