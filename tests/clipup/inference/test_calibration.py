"""``accelerate(weights="int8", calibrate=...)``: inputs are centred and scaled by what a few batches show."""

import copy
import pickle
import warnings

import pytest
import torch
from tiny_clip import tiny_clip
from tiny_hugging_face import tiny_hugging_face
from torch import nn

import clipup
from clipup.clip.inputs import random_inputs
from clipup.inference.prepared import Prepared
from clipup_kernels.backends import extension

pytestmark = pytest.mark.skipif(extension.NATIVE is None, reason="there is no compiled extension")
WIDTH, HIDDEN = 64, 256


def int8(model, batches=None, **options):
    return clipup.accelerate(model, weights="int8", calibrate=batches, **options)


def lost(fast, plain, x):
    """The error of a model's outputs, relative to how they vary between tokens."""
    with torch.inference_mode():
        y, exact = fast(x).float(), plain(x).float()
    return ((y - exact).square().sum() / (exact - exact.mean(0)).square().sum()).sqrt().item()


def mlp(dtype=torch.float32, bias=True):
    return nn.Sequential(nn.Linear(WIDTH, HIDDEN, bias=bias), nn.GELU(), nn.Linear(HIDDEN, WIDTH, bias=bias)).to(dtype)


def experts(**options):
    return clipup.SparseMoE(WIDTH, HIDDEN, num_experts=2, top_k=2, **options).eval()


LAYERS = {
    "dense": mlp,
    "dense without biases": lambda: mlp(bias=False),
    "dense, bfloat16": lambda: mlp(torch.bfloat16),
    "experts": experts,
    "experts with a norm": lambda: experts(norm="layer"),
    "gated experts without biases": lambda: experts(gated=True, bias=False),
    "shared expert": lambda: experts(shared_expert=True),
}


@pytest.mark.parametrize("name", LAYERS)
def test_inputs_and_hidden_units_that_are_often_large_cost_little(name):
    torch.manual_seed(0)
    layer = LAYERS[name]()
    dtype = next(layer.parameters()).dtype
    weights = [layer[0].weight] if isinstance(layer, nn.Sequential) else [
        part.in_weight for part in layer.modules() if hasattr(part, "in_weight")
    ]  # fmt: skip
    with torch.no_grad():
        for weight in weights:
            weight[..., 3, :], weight[..., 7, :] = 0, 0
            weight[..., 3, 0], weight[..., 7, 1] = 1, 30  # input 0 is always 30, input 1 is 1 in half of the tokens
    x = torch.randn(2, 2000, WIDTH)
    x[..., 0], x[..., 1] = 30, (x[..., 1] > 0).float()
    seen, new = x.to(dtype)
    plain, calibrated = lost(int8(layer), layer, new), int8(layer, [seen])
    assert lost(calibrated, layer, new) < min(0.05, plain / 2)
    rows = clipup.accelerate_report(calibrated)
    assert [row.error for row in rows if row.error] == sorted((row.error for row in rows if row.error), reverse=True)
    assert all(0 < row.error < 0.05 for row in rows if row.weights)


def test_rows_of_one_kind_lose_little_beside_many_of_another():
    torch.manual_seed(0)
    layer, x = mlp(), torch.randn(2000, WIDTH)
    x[::2] += 20 * torch.randn(WIDTH)
    plain, calibrated = int8(layer), int8(layer, [x])
    assert lost(calibrated, layer, x) < lost(plain, layer, x)
    assert lost(calibrated, layer, x[1::2]) < 2 * lost(plain, layer, x[1::2])


def test_units_that_are_mostly_or_always_zero_are_calibrated():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH))
    with torch.no_grad():
        layer[0].bias -= 1.8
    x = torch.randn(4000, WIDTH)
    assert lost(int8(layer, [x]), layer, x) <= 1.1 * lost(int8(layer), layer, x)
    fast = int8(layer, [torch.zeros(1000, WIDTH)])
    assert lost(fast, layer, x) < 0.1 and fast.error == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_batch_that_gives_a_layer_values_that_are_not_finite_is_refused(value):
    model = clip().train()
    images, texts = random_inputs(model, 64)
    broken = images.clone()
    broken[5, 0, 0, 0] = value
    with pytest.raises(ValueError, match=r"calibrate\[1\] .*visual\.transformer\.resblocks\.0"):
        int8(model, [(images, texts), (broken, texts)], inplace=True)
    assert all(module.training for module in model.modules())
    assert not any(isinstance(module, Prepared) for module in model.modules())


@pytest.mark.parametrize(("rows", "calibrates"), [(1, False), (255, False), (256, True)])
def test_a_layer_that_sees_too_few_rows_is_not_calibrated_which_is_warned_and_reported(rows, calibrates):
    torch.manual_seed(0)
    layer, x = mlp(), torch.randn(rows, WIDTH) + 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fast = int8(layer, [x])
    assert torch.equal(fast(x), int8(layer)(x)) is not calibrates
    (row,) = clipup.accelerate_report(fast)
    assert (row.error is not None) is calibrates
    assert ("not calibrated" in str(row)) is not calibrates
    assert [warning.filename for warning in caught] == [__file__] * (not calibrates)
    assert all(f"model ({rows} rows)" in str(warning.message) for warning in caught)


def test_the_warning_about_layers_with_too_few_rows_is_one_short_line():
    model = clip(sparse=False)
    with pytest.warns(UserWarning, match=r"^calibrate: 16 of 16 layers") as caught:
        fast = int8(model, [random_inputs(model, 2)])
    (text,) = (str(warning.message) for warning in caught)
    assert len(text) < 400 and "\n" not in text
    assert all("not calibrated" in str(row) for row in clipup.accelerate_report(fast))


def test_experts_with_enough_rows_are_calibrated_and_the_others_are_named():
    torch.manual_seed(0)
    x = torch.randn(1000, WIDTH) + 1
    layer = clipup.SparseMoE(WIDTH, HIDDEN, num_experts=2, top_k=1, normalize_gates="none").eval()
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[0, 0], x[:100, 0], x[100:, 0] = 9, -1, 1
    with pytest.warns(UserWarning, match=r"model \(100 rows\)"):
        fast = int8(layer, [x])
    plain = int8(layer)
    assert torch.equal(fast(x[:100]), plain(x[:100])) and lost(fast, layer, x[100:]) < lost(plain, layer, x[100:])
    assert fast.error > 0


def test_masked_tokens_do_not_calibrate_and_may_be_nan():
    torch.manual_seed(0)
    layer, x = experts(shared_expert=True), torch.randn(2, 600, WIDTH) + 1
    mask = torch.arange(600).expand(2, -1) < 400
    other = x.masked_fill(~mask[..., None], torch.nan)
    assert torch.equal(int8(layer, [(x, mask)])(x), int8(layer, [(other, mask)])(x))


def clip(sparse=True):
    return clipup.upcycle(tiny_clip().eval(), clipup.MoEConfig()) if sparse else tiny_clip().eval()


def bert_batch(model, samples=64, length=12):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, model.config.vocab_size, (samples, length), generator=generator)
    lengths = torch.randint(4, length + 1, (samples,), generator=generator)
    return {"input_ids": ids, "attention_mask": (torch.arange(length) < lengths[:, None]).long()}


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_every_layer_of_a_clip_is_calibrated_on_images_and_texts(sparse):
    model = clip(sparse)
    fast = int8(model, [random_inputs(model, 300), random_inputs(model, 300, seed=1)])
    rows = clipup.accelerate_report(fast)
    assert all(0 < row.error < 0.1 for row in rows if row.weights and row.layer != "PreparedPatches")
    for ours, theirs in zip(
        fast(*random_inputs(model, 4, seed=2)), model(*random_inputs(model, 4, seed=2)), strict=True
    ):
        assert (ours - theirs).norm() <= 0.05 * theirs.norm()


def test_towers_without_batches_are_quantized_as_without_calibration():
    model = clip(sparse=False)
    images, texts = random_inputs(model, 128)
    with pytest.warns(UserWarning, match=r"^calibrate: 8 of 16 layers.* transformer\.resblocks\.0\.mlp \(0 rows\)"):
        fast = int8(model, [images])
    assert torch.equal(fast.encode_text(texts), int8(model).encode_text(texts))
    assert not torch.equal(fast.encode_image(images), int8(model).encode_image(images))


def test_a_model_of_transformers_is_calibrated_by_named_arguments():
    model = tiny_hugging_face("BertModel")
    batch = bert_batch(model)
    fast = int8(model, [batch])
    assert all(0 < row.error < 0.1 for row in clipup.accelerate_report(fast) if row.weights)
    ours, theirs = fast(**batch).last_hidden_state, model(**batch).last_hidden_state
    assert (ours - theirs).norm() <= 0.05 * theirs.norm()


def test_padding_of_texts_is_left_out():
    model = tiny_hugging_face("BertModel")
    batch = bert_batch(model)
    other = batch | {"input_ids": batch["input_ids"].where(batch["attention_mask"].bool(), 5)}
    assert not torch.equal(batch["input_ids"], other["input_ids"])
    ours, theirs = (int8(model, [seen])(**batch).last_hidden_state for seen in (batch, other))
    assert torch.equal(ours, theirs)

    model = clip(sparse=False)
    _, texts = random_inputs(model, 64)
    end = texts.max()
    texts[:, 3:] = 0
    texts[::2, 2], texts[1::2, -1] = end, end  # half of them end early
    other = texts.clone()
    other[::2, 3:] = 1
    images = random_inputs(model, 64)[0]
    batches = (images, texts), (images, other), {"image": images, "text": other}, (None, other)
    features = [int8(model, [batch]).encode_text(texts) for batch in batches]
    assert all(map(torch.equal, features, features[1:]))


def test_a_copy_or_a_pickle_of_a_calibrated_layer_computes_the_same():
    torch.manual_seed(0)
    layer, x = mlp(), torch.randn(600, WIDTH) + 1
    fast = int8(layer, [x])
    for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(again(x), fast(x)) and again.error == fast.error


def test_a_batch_that_fails_leaves_the_model_as_it_was():
    model = clip().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    with pytest.raises(RuntimeError, match=r"size|shape|expand"):
        int8(model, [(torch.randn(2, 3, 5, 5), None)], inplace=True)
    assert hooks == [len(module._forward_pre_hooks) for module in model.modules()]
    assert all(module.training for module in model.modules())
    assert not any(isinstance(module, Prepared) for module in model.modules())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_calibration_without_batches_or_without_int8_is_refused():
    with pytest.raises(ValueError, match="calibrate has no batches"):
        int8(mlp(), [])
    with pytest.raises(TypeError, match="calibrate must be a list of batches"):
        int8(mlp(), torch.randn(2, WIDTH))
    with pytest.raises(ValueError, match='calibrate was given without weights="int8"'):
        clipup.accelerate(mlp(), calibrate=[torch.randn(2, WIDTH)])
