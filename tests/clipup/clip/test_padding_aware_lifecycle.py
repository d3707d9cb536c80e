"""A token mask belongs to one forward, also under checkpointing, compilation, threads, DDP and accumulation."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from padded_clip import routed_texts, set_padding_aware, sparse_clip, text_layers, text_tower
from tiny_clip import CONFIGS, contrastive_loss, tiny_clip
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from clipup import MoEConfig, aux_loss, upcycle
from clipup.clip.inputs import random_inputs
from clipup.clip.padding_aware import tokens_up_to_pooled
from clipup.train.objectives import ContrastiveObjective
from clipup.train.step import TrainStep

DROPPING = {"capacity_factor": 0.75, "z_weight": 0.1}


def make_texts(model, seed, batch_size=6):
    return random_inputs(model, batch_size, seed)[1]


def step(model, *batches, run=None):
    """The loss of encoding all the batches, and its gradients: one backward after all forwards."""
    model.zero_grad()
    outputs = [(run or model.encode_text)(texts) for texts in batches]
    loss = sum((output * torch.linspace(-1, 1, output.shape[1])).sum() for output in outputs) + aux_loss(model)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_steps(one, other):
    torch.testing.assert_close(one[0], other[0])
    assert one[1].keys() == other[1].keys()
    for name in one[1]:
        torch.testing.assert_close(one[1][name], other[1][name], rtol=1e-4, atol=1e-5, msg=name)


def all_masked(model):
    return all(mask is not None and not mask.all() for mask in routed_texts(model))


@pytest.mark.parametrize("kind", CONFIGS)
def test_checkpointing_gives_the_same_losses_and_gradients(kind):
    model = sparse_clip(kind, **DROPPING)
    texts = make_texts(model, 1)
    plain = step(model, texts)
    text_tower(model).transformer.grad_checkpointing = True
    forwards = []
    handle = text_layers(model)[0].register_forward_pre_hook(lambda module, args: forwards.append(args[1]))
    assert_equal_steps(step(model, texts), plain)
    handle.remove()
    assert len(forwards) == 2 and torch.equal(*forwards)  # the second is the recomputation in backward


def test_checkpointing_of_the_whole_model_gives_the_same_losses_and_gradients():
    model = sparse_clip("custom_text", **DROPPING)
    images, texts = random_inputs(model, 6)

    def run(texts):
        return torch.cat(model(images, texts)[:2], dim=1)

    plain = step(model, texts, run=run)
    model.set_grad_checkpointing()
    assert_equal_steps(step(model, texts, run=run), plain)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["gelu", "eos_pool"])
def test_two_forwards_before_one_backward_use_their_own_masks(kind, checkpointing):
    model = sparse_clip(kind, **DROPPING)
    first, second = make_texts(model, 1), make_texts(model, 2)
    alone = [step(model, texts) for texts in (first, second)]
    text_tower(model).transformer.grad_checkpointing = checkpointing
    expected = sum(loss for loss, _ in alone), {name: alone[0][1][name] + alone[1][1][name] for name in alone[0][1]}
    assert_equal_steps(step(model, first, second), expected)
    assert_equal_steps(step(model, second, first), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_forwards_between_forward_and_backward_do_not_interfere(checkpointing):
    model = sparse_clip(**DROPPING)
    texts = make_texts(model, 1)
    expected = step(model, texts)
    model.transformer.grad_checkpointing = checkpointing

    def encode(texts):
        features = model.encode_text(texts)
        with torch.no_grad():
            model.encode_text(make_texts(model, 3, batch_size=4))
            model.transformer(torch.randn(2, 10, 32), attn_mask=model.attn_mask)
        return features

    assert_equal_steps(step(model, texts, run=encode), expected)


def test_modifying_the_texts_after_the_forward_does_not_change_gradients():
    model = sparse_clip(capacity_factor=None).requires_grad_(False)
    for layer in text_layers(model):
        layer.requires_grad_(True)
    texts = make_texts(model, 1)
    expected = step(model, texts)
    model.transformer.grad_checkpointing = True
    assert_equal_steps(step(model, texts, run=lambda x: [model.encode_text(x), x.zero_()][0]), expected)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


SLOW_KINDS = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("custom_text", "eos_pool")]


@pytest.mark.parametrize("kind", ["gelu", "custom_blocks", *SLOW_KINDS])
def test_compiled_tower_is_one_graph_that_follows_the_texts(fresh_compiler, kind):
    model = sparse_clip(kind, **DROPPING, blocks=(1,))
    compiled = torch.compile(model.encode_text, fullgraph=True, backend="aot_eager")
    for seed in (1, 2):
        texts = make_texts(model, seed)
        expected = step(model, texts)
        assert_equal_steps(step(model, texts, run=compiled), expected)
        assert all_masked(model)


def test_compiled_model_is_one_graph_that_follows_the_config(fresh_compiler):
    model = sparse_clip(**DROPPING, blocks=(1,)).eval()
    inputs = random_inputs(model, 6)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for padding_aware in (True, False):
            set_padding_aware(model, padding_aware)
            torch.testing.assert_close(compiled(*inputs), model(*inputs))
            compiled(*inputs)
            assert all_masked(model) if padding_aware else routed_texts(model) == [None]


@pytest.mark.slow
def test_compiled_tower_with_checkpointing_follows_the_texts(fresh_compiler):
    model = sparse_clip(**DROPPING, blocks=(1,))
    expected = [step(model, make_texts(model, seed)) for seed in (1, 2)]
    model.transformer.grad_checkpointing = True
    compiled = torch.compile(model.encode_text, backend="aot_eager")
    for seed, plain in zip((1, 2), expected, strict=True):
        assert_equal_steps(step(model, make_texts(model, seed), run=compiled), plain)


@pytest.mark.parametrize("kind", ["gelu", "custom_text", "custom_blocks"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_padding_aware(kind, duplicate):
    model = sparse_clip(kind, **DROPPING)
    texts = make_texts(model, 1)
    features = model.encode_text(texts)
    copied = duplicate(model)
    assert torch.equal(copied.encode_text(texts), features) and all_masked(copied)
    set_padding_aware(copied, False)
    assert torch.equal(model.encode_text(texts), features)
    assert not torch.equal(copied.encode_text(texts), features)


@pytest.mark.parametrize("kind", ["gelu", "custom_text"])
def test_state_dict_equals_that_of_a_tower_without_masks(kind):
    model = sparse_clip(kind)
    texts = make_texts(model, 1)
    features = model.encode_text(texts)
    without = upcycle(tiny_clip(kind, text_cfg={"pool_type": "last"}), model.moe_config)
    assert list(model.state_dict()) == list(without.state_dict())
    other = sparse_clip(kind, router_noise=1.0)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval().encode_text(texts), model.eval().encode_text(texts))
    assert features.shape == (6, 16)


@pytest.mark.parametrize("kind", ["gelu", "custom_text"])
def test_exception_in_a_forward_leaves_no_state(kind):
    model = sparse_clip(kind, **DROPPING)
    texts, transformer = make_texts(model, 1), text_tower(model).transformer
    expected = step(model, texts)

    def fail(module, args):
        raise RuntimeError("in the middle")

    handle = transformer.resblocks[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        model.encode_text(make_texts(model, 2))
    handle.remove()
    transformer.resblocks[1](torch.randn(2, 10, 32))
    assert routed_texts(model)[0] is None
    aux_loss(model)
    assert_equal_steps(step(model, texts), expected)


@pytest.mark.parametrize("kind", ["gelu", "custom_text", "custom_blocks"])
def test_modules_called_without_texts_route_every_token(kind):
    model = sparse_clip(kind)
    texts = make_texts(model, 1)
    model.encode_text(texts)
    tower, x = text_tower(model), torch.randn(2, 10, 32)
    tower.transformer(x, attn_mask=tower.attn_mask)
    assert routed_texts(model) == [None, None]
    model.encode_text(texts)
    for index in (1, 3):
        tower.transformer.resblocks[index](x, attn_mask=tower.attn_mask)
    assert routed_texts(model) == [None, None]
    model.encode_text(texts)
    for layer in text_layers(model):
        layer(x)
    assert routed_texts(model) == [None, None]


@pytest.mark.parametrize("kind", ["gelu", "custom_text"])
def test_forward_intermediates_routes_every_token(kind):
    model = sparse_clip(kind, capacity_factor=None).eval()
    texts = make_texts(model, 1)
    features = model.encode_text(texts, normalize=True)
    output = model.forward_intermediates(text=texts, normalize=True)
    assert routed_texts(model) == [None, None]
    torch.testing.assert_close(output["text_features"], features)


def test_separate_text_tower_is_padding_aware_when_called_directly():
    model = sparse_clip("custom_text")
    texts = make_texts(model, 1)
    assert torch.equal(model.text(texts), model.encode_text(texts)) and all_masked(model)


@pytest.mark.parametrize("kind", ["gelu", "custom_text"])
def test_threads_that_share_a_model_do_not_share_masks(kind):
    model = sparse_clip(kind, eval_capacity_factor=0.75).eval()
    batches = [make_texts(model, seed, batch_size=32) for seed in range(8)]
    with torch.inference_mode():
        expected = [model.encode_text(texts) for texts in batches]

    def encode(texts):
        with torch.inference_mode():
            return model.encode_text(texts)

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(encode, batches))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_affects_only_the_capacity(training):
    model = sparse_clip(**DROPPING).train(training)
    texts = make_texts(model, 1)
    features = model.encode_text(texts)
    assert all_masked(model)
    kept = [int(layer.state.last_routing.offsets[-1]) for layer in text_layers(model)]
    tokens = int(tokens_up_to_pooled(texts, "argmax", None).sum())
    assert all(rows < 2 * tokens for rows in kept) if training else kept == [2 * tokens] * 2
    with torch.no_grad():
        torch.testing.assert_close(model.encode_text(texts), features.detach())


def test_features_are_equal_under_autocast():
    model = sparse_clip(capacity_factor=None)
    texts = make_texts(model, 1)
    with torch.autocast("cpu", torch.bfloat16):
        features = model.encode_text(texts)
        set_padding_aware(model, False)
        torch.testing.assert_close(features, model.encode_text(texts), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_features_are_equal_in_other_dtypes(dtype):
    model = sparse_clip(capacity_factor=None).to(dtype)
    texts = make_texts(model, 1)
    features = model.encode_text(texts)
    assert features.dtype == dtype
    set_padding_aware(model, False)
    torch.testing.assert_close(features, model.encode_text(texts))


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_distributed_training_gives_the_same_gradients(one_rank, checkpointing):
    model = sparse_clip(**DROPPING)
    images, texts = random_inputs(model, 6)

    def run_by(model):
        return lambda texts: torch.cat(model(images, texts)[:2], dim=1)

    expected = step(model, texts, run=run_by(model))
    model.set_grad_checkpointing(checkpointing)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    assert_equal_steps(step(model, texts, run=run_by(wrapped)), expected)
    assert all_masked(model)


def train_step(model, batches):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    losses = TrainStep(model, ContrastiveObjective(), optimizer, torch.device("cpu"))(batches)
    return losses.terms["contrastive"], {name: p.grad.clone() for name, p in model.named_parameters()}


def test_accumulation_gives_the_gradients_of_one_large_batch():
    model = sparse_clip(capacity_factor=None, balance_weight=0, z_weight=0)
    images, texts = random_inputs(model, 12)
    big = train_step(model, [(images, texts)])
    assert all_masked(model)
    parts = list(zip(images.split(4), texts.split(4), strict=True))
    assert_equal_steps(train_step(model, parts), big)
    set_padding_aware(model, False)
    assert_equal_steps(train_step(model, parts), big)


def test_masks_follow_shuffled_texts(monkeypatch):
    model = sparse_clip(**DROPPING)
    images, texts = random_inputs(model, 12)
    seen = []
    monkeypatch.setattr(torch, "randperm", lambda n: torch.arange(n).roll(5))
    layer = text_layers(model)[0]
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(args[1]))
    train_step(model, [(images, texts)])
    handle.remove()
    assert torch.equal(seen[0], tokens_up_to_pooled(texts, "argmax", None).roll(5, 0))


@pytest.mark.parametrize("priority", [False, True])
def test_training_with_dropping_learns(priority):
    torch.manual_seed(0)
    model = upcycle(tiny_clip(), MoEConfig.clip_up(num_experts=4, priority=priority), inplace=True)
    images, texts = random_inputs(model, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    trainer = TrainStep(model, ContrastiveObjective(), optimizer, torch.device("cpu"))
    losses = [trainer([(images, texts)]).terms["contrastive"].item() for _ in range(8)]
    assert losses[-1] < losses[0] and all(p.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        assert contrastive_loss(model.eval(), images, texts).isfinite()


def test_layers_replaced_after_upcycling_are_called_as_open_clip_calls_them():
    model = sparse_clip(capacity_factor=None)
    texts = make_texts(model, 1)
    features = model.encode_text(texts)
    block = model.transformer.resblocks[1]
    block.mlp = nn.Sequential(block.mlp)
    torch.testing.assert_close(model.encode_text(texts), features)
    wrapped, masked = routed_texts(model)
    assert wrapped is None and masked is not None
