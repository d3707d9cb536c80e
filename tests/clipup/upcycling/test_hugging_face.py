"""Models of transformers: upcycled, saved, loaded and trained with transformers' own means."""

import copy
import json
import pickle
import re

import pytest
import safetensors.torch
import torch
import transformers
from tiny_hugging_face import CONFIGS, tiny_hugging_face

import clipup
from clipup import MoEConfig, aux_loss, moe_layers, step0_difference, upcycle
from clipup.clip.hugging_face import random_batch

QUICK = ("CLIPModel", "SiglipTextModel", "Siglip2Model", "ViTForImageClassification", "BertModel")


def quick(names):
    """Other names are slow tests."""
    return [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in names]


FAMILIES = pytest.mark.parametrize("name", quick(CONFIGS))
DROPLESS = {"num_experts": 4, "capacity_factor": None}


def sparse_config(model, **options):
    towers = tuple(tower for tower in ("image", "text") if tower in clipup.clip.towers.towers(model))
    return MoEConfig.clip_up(towers=towers, **{**DROPLESS, **options})


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_computes_the_same_function_at_step_zero(name):
    dense = tiny_hugging_face(name)
    sparse = upcycle(dense)
    assert type(sparse).__name__ == f"Sparse{type(dense).__name__}" and isinstance(sparse, type(dense))
    assert len(moe_layers(sparse)) == (4 if name in ("CLIPModel", "SiglipModel", "Siglip2Model") else 2)
    assert sparse.moe_config == MoEConfig.clip_up(towers=sparse_config(dense).towers)
    assert step0_difference(dense, sparse) <= 1e-5
    assert not moe_layers(dense) and dense.config.to_dict()["model_type"] == dense.config.model_type


def tensors(output, place=""):
    """All values of an output, nested ones too, by their places."""
    if not isinstance(output, dict | list | tuple):
        return {place: output}
    pairs = output.items() if isinstance(output, dict) else enumerate(output)
    return {key: value for name, part in pairs for key, value in tensors(part, f"{place}.{name}").items()}


@pytest.mark.parametrize("flags", [{}, {"return_dict": False}], ids=["dict", "tuple"])
@FAMILIES
def test_every_output_is_that_of_the_dense_model_at_step_zero(name, flags):
    dense = tiny_hugging_face(name)
    dense.set_attn_implementation("eager")  # which returns attentions
    sparse = upcycle(dense, sparse_config(dense))
    for flag in ("output_hidden_states", "output_attentions"):
        expected, found = (
            tensors(model(**random_batch(dense, 2), **{flag: True}, **flags)) for model in (dense, sparse)
        )
        plain = tensors(dense(**random_batch(dense, 2), **flags))
        assert expected.keys() > plain.keys() and found.keys() == expected.keys()
        for place, value in expected.items():
            torch.testing.assert_close(found[place], value, rtol=1e-4, atol=1e-5, msg=f"{flag}: {place}")


@FAMILIES
def test_saved_and_loaded_by_transformers_and_refused_by_its_dense_class(name, tmp_path):
    dense = tiny_hugging_face(name)
    sparse = upcycle(dense, sparse_config(dense))
    batch = random_batch(dense, 4)
    expected = sparse(**batch)

    sparse.save_pretrained(tmp_path)

    loaded = type(sparse).from_pretrained(tmp_path)
    assert not loaded.training and loaded.moe_config == sparse.moe_config
    torch.testing.assert_close(tensors(loaded(**batch)), tensors(expected), rtol=0, atol=0)
    with pytest.raises(Exception, match="import clipup and use AutoModel, this model is sparse: 32"):
        type(dense).from_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["moe_cfg"] == sparse.moe_config.to_dict() and saved["model_type"].startswith("clipup_")
    task = name.partition("For")[2]
    auto = getattr(transformers, f"AutoModelFor{task}" if task.endswith("Classification") else "AutoModel")
    if type(dense.config) in auto._model_mapping:
        automatic = auto.from_pretrained(tmp_path)
        assert moe_layers(automatic) and type(automatic).__name__.startswith("Sparse")


@pytest.mark.parametrize(
    ("name", "part"),
    [("CLIPModel", "vision_model"), ("CLIPModel", "text_model"), ("BertForSequenceClassification", "bert")],
)
def test_a_part_of_a_model_is_saved_and_loaded_as_a_sparse_model(name, part, tmp_path):
    sparse = getattr(upcycle(tiny_hugging_face(name)), part)
    sparse.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"].startswith("clipup_")

    loaded = type(sparse).from_pretrained(tmp_path)

    assert type(sparse).__name__.startswith("Sparse") and moe_layers(loaded).keys() == moe_layers(sparse).keys()
    torch.testing.assert_close(loaded.state_dict(), sparse.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["CLIPModel", "BertForSequenceClassification"])
def test_changed_configs_of_layers_are_saved(name, tmp_path):
    sparse = upcycle(tiny_hugging_face(name))
    layers = list(moe_layers(sparse).values())
    changes = {"top_k": 1, "normalize_gates": "none", "eval_capacity_factor": 0.5, "capacity_factor": 2.0}
    changes |= {"score_function": "sigmoid", "balance_weight": 0.5, "router_noise": 0.1}
    layers[0].config = layers[0].config.replace(**changes)
    with pytest.raises(ValueError, match="config differs from .*config .*one config is saved"):
        sparse.save_pretrained(tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    for layer in layers:
        layer.config = layer.config.replace(**changes)
    batch = random_batch(sparse, 4)
    expected = tensors(sparse(**batch))

    sparse.save_pretrained(tmp_path)

    loaded = type(sparse).from_pretrained(tmp_path)
    torch.testing.assert_close(tensors(loaded(**batch)), expected, rtol=0, atol=0)
    assert [layer.config for layer in moe_layers(loaded).values()] == [layer.config for layer in layers]
    if name == "CLIPModel":
        sparse.vision_model.save_pretrained(tmp_path)
        assert type(sparse.vision_model).from_pretrained(tmp_path).moe_config.top_k == 1


def assert_drawn_alike(found, expected):
    """Two random states have the same deviation in every tensor."""
    assert found.keys() == expected.keys()
    for key, values in found.items():
        assert values.isfinite().all(), key
        if values.numel() > 1:
            independent = values[0].numel() if values.dim() == 3 else values.numel()  # experts may be copies
            error = 5 * independent**-0.5
            assert values.std().item() == pytest.approx(expected[key].std().item(), rel=error, abs=1e-4), key


@FAMILIES
def test_tensors_that_a_file_lacks_are_initialized_as_in_an_upcycled_new_model(name, tmp_path):
    dense = type(tiny_hugging_face(name))(CONFIGS[name]())
    expected = upcycle(dense, sparse_config(dense, granularity=2, top_k=2, shared_expert=True))
    expected.save_pretrained(tmp_path)
    safetensors.torch.save_file({}, tmp_path / "model.safetensors", {"format": "pt"})

    for model in (type(expected).from_pretrained(tmp_path), type(expected)(expected.config)):
        assert_drawn_alike(model.state_dict(), expected.state_dict())
        for layer in moe_layers(model).values():
            assert torch.equal(layer.in_weight[:2], layer.in_weight[2:])
            assert not torch.equal(layer.in_weight[0], layer.in_weight[1])  # shards
            assert torch.equal(layer.router.weight[0], layer.router.weight[1])


@FAMILIES
def test_experts_that_a_file_has_stay_beside_those_that_it_lacks(name, tmp_path):
    sparse = upcycle(tiny_hugging_face(name))
    sparse.save_pretrained(tmp_path)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    lacking = {key: value for key, value in weights.items() if not re.search(r"(in_weight|router.weight)$", key)}
    safetensors.torch.save_file(lacking, tmp_path / "model.safetensors", {"format": "pt"})

    loaded = type(sparse).from_pretrained(tmp_path)

    for key, layer in moe_layers(loaded).items():
        assert torch.equal(layer.out_weight, sparse.get_submodule(key).out_weight)
        assert torch.equal(layer.in_weight[0], layer.in_weight[1]) and layer.in_weight.std() > 0.01
        assert layer.router.weight.std() > 0.01


HEADS = {
    "CLIPModel": "Image",
    "SiglipModel": "Image",
    "Siglip2Model": "Image",
    "ViTModel": "Image",
    "Dinov2Model": "Image",
    "BertModel": "Sequence",
    "RobertaModel": "Sequence",
    "XLMRobertaModel": "Sequence",
    "ModernBertModel": "Sequence",
}


@pytest.mark.parametrize("name", quick(HEADS))
def test_a_new_head_on_a_sparse_model_is_initialized_as_on_the_dense_model(name, tmp_path):
    dense = tiny_hugging_face(name)
    sparse, auto = upcycle(dense), getattr(transformers, f"AutoModelFor{HEADS[name]}Classification")
    for model, path in ((dense, tmp_path / "dense"), (sparse, tmp_path / "sparse")):
        model.save_pretrained(path)

    head = auto.from_pretrained(tmp_path / "dense", num_labels=40).state_dict()
    loaded = auto.from_pretrained(tmp_path / "sparse", num_labels=40)

    assert moe_layers(loaded)
    new = [key for key in head if "classifier" in key]
    assert new
    assert_drawn_alike({key: loaded.state_dict()[key] for key in new}, {key: head[key] for key in new})


def trained(model, batch, path, **options):
    arguments = transformers.TrainingArguments(path, report_to=[], use_cpu=True, logging_steps=1, **options)

    def collate(examples):
        return transformers.default_data_collator(examples) | ({} if "labels" in batch else {"return_loss": True})

    examples = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    trainer = transformers.Trainer(model, arguments, train_dataset=examples, data_collator=collate)
    trainer.train()
    return next(line["loss"] for line in trainer.state.log_history if "loss" in line)


def test_the_layers_losses_weigh_the_same_however_a_step_is_accumulated(tmp_path):
    dense = transformers.BertLMHeadModel(CONFIGS["BertModel"]())
    ids = torch.randint(3, 60, (8, 10), generator=torch.Generator().manual_seed(0))
    losses = []
    for batch, accumulated in ((8, 1), (2, 4)):
        sparse = upcycle(dense, MoEConfig(num_experts=4, towers=("text",), balance_weight=10.0, capacity_factor=None))
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated, "max_steps": 1}
        options |= {"learning_rate": 0.0, "save_strategy": "no"}
        losses.append(trained(sparse, {"input_ids": ids, "labels": ids}, tmp_path, **options))
    assert losses[0] > 20 and losses[1] == pytest.approx(losses[0], rel=0.05)


def test_a_decoder_generates_with_a_cache():
    config = CONFIGS["BertModel"]()
    config.is_decoder = True
    torch.manual_seed(0)
    dense = transformers.BertLMHeadModel(config).eval()
    sparse = upcycle(dense, sparse_config(dense))
    ids, mask = torch.randint(3, 60, (2, 5)), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(sparse.generate(ids, **options), dense.generate(ids, **options))


@pytest.mark.parametrize("name", ["CLIPModel", "Dinov2Model", "BertForSequenceClassification"])
def test_copies_and_pickles_are_sparse(name):
    dense = tiny_hugging_face(name)
    sparse = upcycle(dense)
    blocks = {module: type(part).__name__ for module, part in dense.named_modules() if module.endswith(".1")}
    # by which device_map and FSDP find blocks
    assert {module: type(sparse.get_submodule(module)).__name__ for module in blocks} == blocks
    batch = random_batch(sparse, 4)
    expected = tensors(sparse(**batch))
    for other in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
        torch.testing.assert_close(tensors(other(**batch)), expected, rtol=0, atol=0)
        assert type(other) is type(sparse)
        assert other.config.to_dict() == sparse.config.to_dict()


@pytest.mark.parametrize("name", ["CLIPModel", "BertForSequenceClassification"])
def test_a_loss_in_training_includes_the_layers_losses_and_in_evaluation_it_does_not(name, recwarn):
    dense = tiny_hugging_face(name)
    sparse = upcycle(dense, sparse_config(dense, balance_weight=1.0))
    labels = {"return_loss": True} if name == "CLIPModel" else {"labels": torch.arange(4) % 3}
    batch = random_batch(dense, 4) | labels
    with torch.no_grad():
        plain = sparse(**batch).loss
    assert not recwarn.list
    torch.testing.assert_close(plain, dense(**batch).loss)
    with pytest.warns(UserWarning, match="in evaluation mode"):
        assert sparse(**batch).loss == plain

    sparse.train()
    loss = sparse(**batch).loss
    assert loss > plain + 1 and aux_loss(sparse) == 0  # taken
    assert sparse(**batch, return_dict=False)[0] == loss
    loss.backward()
    assert all(layer.router.weight.grad.abs().sum() > 0 for layer in moe_layers(sparse).values())


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [("CLIPModel", False), ("BertForSequenceClassification", True)]
    + [pytest.param(name, False, marks=pytest.mark.slow) for name in ("Siglip2Model", "Dinov2ForImageClassification")],
)
def test_trainer_trains_every_expert(name, checkpointing, tmp_path):
    dense = tiny_hugging_face(name)
    sparse = upcycle(dense, sparse_config(dense, top_k=4, balance="topk"))
    before = {name: parameter.detach().clone() for name, parameter in sparse.named_parameters()}
    batch = random_batch(dense, 8)
    batch |= {"labels": torch.arange(8) % 3} if "For" in name else {}
    options = {"max_steps": 2, "save_steps": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 4}
    trained(sparse, batch, tmp_path, gradient_checkpointing=checkpointing, **options)

    for layer_name, layer in moe_layers(sparse).items():
        changed = (layer.in_weight != before[f"{layer_name}.in_weight"]).flatten(1).any(1)
        assert changed.all(), layer_name
    saved = type(sparse).from_pretrained(tmp_path / "checkpoint-2")
    torch.testing.assert_close(saved.state_dict(), sparse.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["CLIPModel", "SiglipTextModel", "BertModel", "ModernBertModel"])
@pytest.mark.parametrize("prepared", [False, True])
def test_tokens_that_the_attention_mask_masks_are_not_routed(name, prepared):
    dense = tiny_hugging_face(name)
    if name == "BertModel":
        dense.set_attn_implementation("eager")
        for block in dense.encoder.layer:
            block.chunk_size_feed_forward = 1  # of all tokens the experts are chosen together
    sparse = upcycle(dense, sparse_config(dense))
    sparse = clipup.accelerate(sparse) if prepared else sparse
    batch = random_batch(dense, 3)
    length = batch["input_ids"].shape[1]
    mask = torch.ones(3, length, dtype=torch.int64)
    mask[0, 5:], mask[1, 7:] = 0, 0
    batch |= {"attention_mask": mask}

    layers = moe_layers(sparse)
    features = sparse(**batch)
    routed = mask.bool()
    routed[:, -1] |= "Siglip" in name  # it is pooled
    text = [layer for key, layer in layers.items() if "vision" not in key]
    assert len(text) == 2 and all(torch.equal(layer.state.last_routing.mask, routed.flatten()) for layer in text)
    assert all(layer.state.last_routing.mask is None for key, layer in layers.items() if "vision" in key)

    for layer in text:
        layer.config = layer.config.replace(padding_aware=False)
    every = sparse(**batch)
    assert all(layer.state.last_routing.mask is None for layer in text)
    states = [out.text_model_output if name == "CLIPModel" else out for out in (features, every)]
    kept = [out.last_hidden_state[mask.bool()] for out in states]
    torch.testing.assert_close(*kept)


def test_padding_of_images_of_several_sizes_is_not_routed():
    sparse = upcycle(tiny_hugging_face("Siglip2Model").vision_model)
    batch = random_batch(sparse, 2)
    batch["spatial_shapes"][0], batch["pixel_attention_mask"][0, 8:] = torch.tensor([2, 4]), 0
    arguments = [batch[name] for name in ("pixel_values", "pixel_attention_mask", "spatial_shapes")]
    sparse(*arguments)
    masks = [layer.state.last_routing.mask for layer in moe_layers(sparse).values()]
    assert len(masks) == 2 and all(torch.equal(mask, arguments[1].flatten().bool()) for mask in masks)


class OwnForward(transformers.ViTModel):
    pass


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OwnForward(tiny_hugging_face("ViTModel").config), "OwnForward"),
        (lambda: transformers.GPT2Model(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2)), "GPT2Model"),
        (
            lambda: transformers.VisionTextDualEncoderModel(
                vision_model=tiny_hugging_face("CLIPVisionModel"), text_model=tiny_hugging_face("CLIPTextModel")
            ),
            "VisionTextDualEncoderModel",
        ),
    ],
)
def test_other_classes_are_refused_and_the_model_stays_as_it_was(make, message):
    model = make()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(TypeError, match=message):
        upcycle(model, inplace=True)
    assert [type(module) for module in model.modules()] == kinds
