"""Models of transformers: upcycled, saved, loaded and trained with transformers' own means."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from tiny_hugging_face import CONFIGS, tiny_hugging_face

import clipup
from clipup import MoEConfig, aux_loss, moe_layers, step0_difference, upcycle
from clipup.clip.hugging_face import random_batch

FAMILIES = pytest.mark.parametrize("name", CONFIGS)
DROPLESS = {"num_experts": 4, "capacity_factor": None}


def sparse_config(model, **options):
    towers = tuple(tower for tower in ("image", "text") if tower in clipup.clip.towers.towers(model))
    return MoEConfig.clip_up(towers=towers, **{**DROPLESS, **options})


def first_tensor(output):
    return next(value for value in output.values() if isinstance(value, torch.Tensor))


@FAMILIES
def test_every_family_computes_the_same_function_at_step_zero(name):
    dense = tiny_hugging_face(name)
    sparse = upcycle(dense)
    assert type(sparse).__name__ == f"Sparse{type(dense).__name__}" and isinstance(sparse, type(dense))
    assert len(moe_layers(sparse)) == (4 if name in ("CLIPModel", "SiglipModel", "Siglip2Model") else 2)
    assert step0_difference(dense, sparse) <= 1e-5
    assert not moe_layers(dense) and dense.config.to_dict()["model_type"] == dense.config.model_type


@FAMILIES
def test_saved_and_loaded_by_transformers(name, tmp_path):
    dense = tiny_hugging_face(name)
    sparse = upcycle(dense, sparse_config(dense))
    batch = random_batch(dense, 4)
    expected = sparse(**batch)

    sparse.save_pretrained(tmp_path)

    loaded = type(sparse).from_pretrained(tmp_path)
    assert not loaded.training and loaded.moe_config == sparse.moe_config
    for one, other in zip(loaded(**batch).values(), expected.values(), strict=True):
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, other)
    assert set(loaded.state_dict()) == set(sparse.state_dict())
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["moe_cfg"] == sparse.moe_config.to_dict() and saved["model_type"].startswith("clipup_")
    if type(dense.config) in transformers.AutoModel._model_mapping:
        automatic = transformers.AutoModel.from_pretrained(tmp_path)
        assert moe_layers(automatic) and type(automatic).__name__.startswith("Sparse")


@pytest.mark.parametrize("name", ["ViTForImageClassification", "BertForSequenceClassification"])
def test_classes_for_tasks_are_found_too(name, tmp_path):
    sparse = upcycle(tiny_hugging_face(name))
    sparse.save_pretrained(tmp_path)
    auto = getattr(transformers, f"AutoModelFor{name.partition('For')[2]}")
    assert type(auto.from_pretrained(tmp_path)) is type(sparse)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["clipup", "transformers"])
def test_auto_model_finds_the_class_once_clipup_is_imported(first, tmp_path):
    upcycle(tiny_hugging_face("CLIPModel")).save_pretrained(tmp_path)
    lines = ["import clipup", "from transformers import AutoModel"]
    program = [
        *(lines if first == "clipup" else lines[::-1]),
        f"print(type(AutoModel.from_pretrained({str(tmp_path)!r})))",
    ]
    run = subprocess.run([sys.executable, "-c", "\n".join(program)], capture_output=True, text=True)
    assert run.stdout.strip().endswith("SparseCLIPModel'>"), run.stderr


@pytest.mark.slow
def test_without_clipup_loading_fails_by_name(tmp_path):
    upcycle(tiny_hugging_face("CLIPModel")).save_pretrained(tmp_path)
    for loader in ("AutoModel", "CLIPModel", "CLIPVisionModel", "CLIPTextModelWithProjection"):
        program = f"from transformers import {loader}; {loader}.from_pretrained({str(tmp_path)!r})"
        run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert run.returncode == 1 and "clipup" in run.stderr.strip().splitlines()[-1] + run.stderr, run.stderr
        named = "`clipup_clip`" if loader == "AutoModel" else "import clipup first"
        assert named in run.stderr


def test_a_dense_class_refuses_a_sparse_model_by_name(tmp_path):
    upcycle(tiny_hugging_face("CLIPModel")).save_pretrained(tmp_path)
    for loader in (transformers.CLIPModel, transformers.CLIPVisionModel):
        with pytest.raises(KeyError, match="import clipup first: quick_gelu"):
            loader.from_pretrained(tmp_path)


def test_a_config_without_sparse_layers_is_refused_by_name():
    config = upcycle(tiny_hugging_face("ViTModel")).config
    config.moe_cfg = None
    with pytest.raises(ValueError, match="config has no moe_cfg, .* SparseViTModel"):
        transformers.AutoModel.from_config(config)


def test_a_model_from_a_config_alone_is_sparse_and_random():
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(upcycle(tiny_hugging_face("ViTModel")).config)
    layers = moe_layers(model)
    assert len(layers) == 2 and all(layer.router.weight.std() > 0 for layer in layers.values())


@pytest.mark.parametrize("name", ["CLIPModel", "BertForSequenceClassification"])
def test_copies_and_pickles_are_sparse(name):
    sparse = upcycle(tiny_hugging_face(name))
    batch = random_batch(sparse, 4)
    expected = first_tensor(sparse(**batch))
    for other in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
        assert type(other) is type(sparse) and torch.equal(first_tensor(other(**batch)), expected)
        assert other.config.to_dict() == sparse.config.to_dict()


def labelled(name, batch, count):
    if name in ("CLIPModel", "SiglipModel"):
        return {**batch, "return_loss": True}
    return {**batch, "labels": torch.arange(count) % 3}


@pytest.mark.parametrize(
    "name", ["CLIPModel", "SiglipModel", "ViTForImageClassification", "BertForSequenceClassification"]
)
def test_a_loss_in_training_includes_the_layers_losses_and_in_evaluation_it_does_not(name):
    dense = tiny_hugging_face(name)
    sparse = upcycle(dense, sparse_config(dense, balance_weight=1.0))
    batch = labelled(name, random_batch(dense, 4), 4)
    plain = sparse(**batch).loss
    torch.testing.assert_close(plain, dense(**batch).loss)

    sparse.train()
    loss = sparse(**batch).loss
    assert loss > plain + 1 and aux_loss(sparse) == 0  # taken
    assert sparse(**batch, return_dict=False)[0] == loss
    loss.backward()
    assert all(layer.router.weight.grad.abs().sum() > 0 for layer in moe_layers(sparse).values())


def test_outputs_without_a_loss_leave_the_layers_losses_to_the_caller():
    sparse = upcycle(tiny_hugging_face("BertModel")).train()
    sparse(**random_batch(sparse, 4))
    assert aux_loss(sparse) > 0


class Examples(torch.utils.data.Dataset):
    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return len(next(iter(self.batch.values())))

    def __getitem__(self, index):
        return {name: value[index] for name, value in self.batch.items()}


TRAINED = [
    *("CLIPModel", "SiglipModel", "Siglip2Model", "ViTForImageClassification", "Dinov2ForImageClassification"),
    *("BertForSequenceClassification", "RobertaForSequenceClassification"),
]


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_trainer_trains_every_expert(name, checkpointing, tmp_path):
    dense = tiny_hugging_face(name)
    sparse = upcycle(dense, sparse_config(dense, top_k=4, balance="topk"))
    before = {name: parameter.detach().clone() for name, parameter in sparse.named_parameters()}
    batch = random_batch(dense, 8)
    pairs = name in ("CLIPModel", "SiglipModel", "Siglip2Model")
    if not pairs:
        batch["labels"] = torch.arange(8) % 3
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], use_cpu=True,
        gradient_checkpointing=checkpointing, save_steps=2, logging_steps=1,
    )  # fmt: skip
    collate = transformers.default_data_collator

    def with_loss(examples):
        return {**collate(examples), **({"return_loss": True} if pairs else {})}

    trainer = transformers.Trainer(sparse, arguments, train_dataset=Examples(batch), data_collator=with_loss)
    trainer.train()

    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in trainer.state.log_history if "loss" in line)
    for layer_name, layer in moe_layers(sparse).items():
        changed = (layer.in_weight != before[f"{layer_name}.in_weight"]).flatten(1).any(1)
        assert changed.all(), layer_name
    saved = type(sparse).from_pretrained(tmp_path / "checkpoint-2")
    assert all(torch.equal(one, sparse.state_dict()[key]) for key, one in saved.state_dict().items())


TEXTS = [
    "CLIPTextModel",
    "CLIPModel",
    "SiglipTextModel",
    "BertModel",
    "RobertaModel",
    "XLMRobertaModel",
    "ModernBertModel",
]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", TEXTS)
def test_tokens_that_the_attention_mask_masks_are_not_routed(name, attention):
    dense = tiny_hugging_face(name)
    dense.set_attn_implementation(attention)
    sparse = upcycle(dense, sparse_config(dense))
    batch = random_batch(dense, 3)
    length = batch["input_ids"].shape[1]
    mask = torch.ones(3, length, dtype=torch.int64)
    mask[0, 5:], mask[1, 7:] = 0, 0
    batch |= {"attention_mask": mask}

    layers = moe_layers(sparse)
    text = [layer for key, layer in layers.items() if "vision" not in key]
    features = sparse(**batch)
    assert len(text) == 2 and all(torch.equal(layer.state.last_routing.mask, mask.flatten().bool()) for layer in text)
    assert all(layer.state.last_routing.mask is None for key, layer in layers.items() if "vision" in key)

    for layer in text:
        layer.config = layer.config.replace(padding_aware=False)
    every = sparse(**batch)
    assert all(layer.state.last_routing.mask is None for layer in text)
    states = [out.text_model_output if name == "CLIPModel" else out for out in (features, every)]
    kept = [out.last_hidden_state[mask.bool()] for out in states]
    torch.testing.assert_close(*kept)


def test_prepared_models_leave_the_padding_out_too():
    sparse = upcycle(tiny_hugging_face("BertModel"))
    batch = random_batch(sparse, 3)
    mask = torch.ones_like(batch["input_ids"])
    mask[0, 5:] = 0
    expected = sparse(**batch, attention_mask=mask).last_hidden_state
    prepared = clipup.accelerate(sparse)

    found = prepared(**batch, attention_mask=mask).last_hidden_state

    torch.testing.assert_close(found, expected)
    assert all(torch.equal(one.state.last_routing.mask, mask.flatten().bool()) for one in moe_layers(prepared).values())


def test_a_text_without_padding_has_no_mask():
    sparse = upcycle(tiny_hugging_face("BertModel"))
    batch = random_batch(sparse, 3)
    sparse(**batch, attention_mask=torch.ones_like(batch["input_ids"]))
    for layer in moe_layers(sparse).values():
        mask = layer.state.last_routing.mask
        assert mask is None or mask.all()


def test_other_models_are_refused_by_name():
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64)
    with pytest.raises(TypeError, match="cannot read the blocks of a GPT2Model; blocks of transformers that are read"):
        upcycle(transformers.GPT2Model(config))


def test_a_tower_that_the_model_lacks_is_refused_by_name():
    with pytest.raises(TypeError, match=r"a ViTModel has no text tower; it has towers=\('image',\)"):
        upcycle(tiny_hugging_face("ViTModel"), MoEConfig.clip_up())
