"""MLPs of two modules, as BERT's: prepared in dense and upcycled models, with the plain model's outputs and names."""

import copy
import pickle

import pytest
import torch
from tiny_hugging_face import tiny_hugging_face
from torch import nn

import clipup
import clipup_kernels
from clipup.clip.hugging_face import random_batch
from clipup.inference.prepared import PreparedMLP
from clipup.inference.prepared_linear import PreparedLinear
from clipup.inference.prepared_pair import PreparedIntermediate, PreparedOutputProjection

needs_kernels = pytest.mark.skipif(not clipup_kernels.backend_info()["compiled"], reason="only C++ packs weights")
with_weights = pytest.mark.parametrize("weights", [None, pytest.param("int8", marks=needs_kernels)])


def bert(name="BertModel", sparse=False):
    """Its weights are large enough for all layers to count."""
    model = tiny_hugging_face(name)
    with torch.no_grad():
        for block in model.base_model.encoder.layer:
            for linear in (block.intermediate.dense, block.output.dense, block.attention.output.dense):
                linear.weight.mul_(8)
    return clipup.upcycle(model, clipup.MoEConfig()).eval() if sparse else model


@torch.inference_mode()
def hidden_states(model):
    return model.base_model(**random_batch(model, 3))[0]


def error(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


@with_weights
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("name", ["BertModel", "RobertaForSequenceClassification", "XLMRobertaModel"])
def test_dense_blocks_of_bert_are_prepared_with_the_plain_outputs(name, sparse, weights):
    model = bert(name, sparse=sparse)
    fast = clipup.accelerate(model, weights=weights)
    rows = [row for row in clipup.accelerate_report(fast) if ".layer." in row.name and ".attention." not in row.name]
    assert {row.reason for row in rows} == {None}
    kinds = [type(layer.intermediate) for layer in fast.base_model.encoder.layer]
    assert kinds.count(PreparedIntermediate) == (2 if sparse else 4)
    assert error(hidden_states(fast), hidden_states(model)) < (1e-6 if weights is None else 0.03)
    if weights is None:
        plain, ours = model.state_dict(), fast.state_dict()
        assert list(ours) == list(plain) and all(torch.equal(ours[name], plain[name]) for name in plain)


@needs_kernels
def test_bert_is_prepared_in_bfloat16():
    model = bert().bfloat16()
    fast = clipup.accelerate(model)
    block = fast.encoder.layer[0]
    assert block.intermediate.dtype == block.output.dense.dtype == torch.bfloat16
    assert isinstance(block.attention.self.query, PreparedLinear)  # as beside every MLP that is prepared
    assert error(hidden_states(fast).float(), hidden_states(model).float()) < 0.01


@with_weights
def test_copies_and_pickles_of_bert_compute_with_their_own_weights(weights):
    fast = clipup.accelerate(bert(), weights=weights)
    expected = hidden_states(fast)
    copies = copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))
    for buffer in fast.buffers():
        buffer.zero_()
    assert all(torch.equal(hidden_states(same), expected) for same in copies)


@with_weights
def test_bert_is_compiled_and_exported(weights):
    fast = clipup.accelerate(bert(), weights=weights)
    few, more = (random_batch(fast, size)["input_ids"] for size in (3, 5))
    sizes = {"input_ids": {0: torch.export.Dim("batch", min=2, max=64)}}
    exported = torch.export.export(fast, (), {"input_ids": few}, dynamic_shapes=sizes)
    compiled = torch.compile(fast, backend="eager", fullgraph=True)
    with torch.inference_mode():
        expected = fast(input_ids=more)[0]
        torch.testing.assert_close(exported.module()(input_ids=more)[0], expected)
        torch.testing.assert_close(compiled(input_ids=more)[0], expected)
    held = sum(value.nbytes for value in (*exported.state_dict.values(), *exported.constants.values()))
    assert held <= 1.1 * sum(tensor.nbytes for tensor in (*fast.parameters(), *fast.buffers()))


SHARED = {
    "both modules": ("intermediate", "output"),
    "the first one": ("intermediate",),
    "the second one": ("output",),
    "the second projection": ("output.dense",),
    "the first projection": ("intermediate.dense",),
}


@with_weights
@pytest.mark.parametrize("shared", SHARED)
def test_blocks_that_share_their_mlp_are_prepared_and_those_that_share_half_of_it_are_left(shared, weights):
    model = bert()
    first, second = model.encoder.layer[:2]
    for path in SHARED[shared]:
        second.set_submodule(path, first.get_submodule(path))
    fast = clipup.accelerate(model, weights=weights)
    assert error(hidden_states(fast), hidden_states(model)) < (1e-6 if weights is None else 0.03)
    prepared = [isinstance(block.intermediate, PreparedMLP) for block in fast.encoder.layer]
    assert prepared == [shared in ("both modules", "the first projection")] * 2 + [True] * 2


@with_weights
@pytest.mark.parametrize("path", ["intermediate", "intermediate.dense", "output", "output.dense"])
def test_an_mlp_with_a_hook_is_left_whole(path, weights):
    model = bert()
    model.encoder.layer[0].get_submodule(path).register_forward_hook(lambda module, args, output: 3 * output)
    fast = clipup.accelerate(model, weights=weights)
    changed, other = fast.encoder.layer[:2]
    assert type(changed.intermediate.dense) is type(changed.output.dense) is nn.Linear
    assert type(other.output.dense) is PreparedOutputProjection
    assert error(hidden_states(fast), hidden_states(model)) < (1e-6 if weights is None else 0.03)


@pytest.mark.parametrize("path", ["intermediate.dense", "output.dense"])
def test_an_mlp_with_adapters_is_left_whole(path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=[f"layer.0.{path}"], init_lora_weights=False)
    model = peft.get_peft_model(bert(), config).base_model.model
    fast = clipup.accelerate(model)
    changed, other = fast.encoder.layer[:2]
    assert not any(isinstance(part, PreparedMLP | PreparedOutputProjection) for part in changed.modules())
    assert isinstance(other.intermediate, PreparedMLP)
    rows = {row.name: row.reason for row in clipup.accelerate_report(fast)}
    assert "PEFT's adapters" in rows[f"encoder.layer.0.{path.split('.')[0]}"]
    assert error(hidden_states(fast), hidden_states(model)) < 1e-6
