"""Times follow from bytes, FLOPs and the constants of a card."""

import pytest
import tiny_parallel

from clipup.clip.flops import count
from clipup.plan import CARDS, Cluster, Rates, Subject, plan
from clipup.plan.cost import bandwidth
from clipup.plan.traffic import Transfer, traffic
from clipup.train import TrainOptions
from clipup.train.optimizer.locks import lock_parts
from clipup.train.optimizer.options import TrainedPartsOptions

H100, PLAIN = CARDS["h100"], Rates(link_efficiency=1.0)


@pytest.fixture(scope="module")
def subject():
    return Subject(tiny_parallel.model({}), "amp_bf16")


@pytest.mark.parametrize(
    ("collective", "group", "stride", "expected"),
    [
        ("all_reduce", 8, 1, H100.link_gb_s),
        ("all_reduce", 64, 1, 8 * H100.network_gb_s),
        ("all_reduce", 8, 8, H100.network_gb_s),
        ("all_to_all", 16, 1, H100.network_gb_s * 15 / 8),
        ("copy", 1, 1, H100.host_gb_s),
    ],
)
def test_a_group_within_a_node_has_its_links_and_others_the_network(collective, group, stride, expected):
    assert bandwidth(Transfer("", collective, 1.0, group, stride), H100, PLAIN) == pytest.approx(expected)


def test_a_ring_sends_each_byte_of_a_reduction_twice():
    assert Transfer("", "all_reduce", 100.0, 4).wire == pytest.approx(150)
    assert Transfer("", "all_gather", 100.0, 4).wire == Transfer("", "reduce_scatter", 100.0, 4).wire == 75


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({}, 3),
        ({"grad_checkpointing": True}, 4),
        ({"accum_freq": 2}, 4),
        ({"accum_freq": 2, "grad_checkpointing": True}, 5),
    ],
)
def test_each_repeated_forward_pass_adds_its_flops(subject, options, passes):
    made = plan(subject, TrainOptions.flat(**options), Cluster(8, H100), 256)
    counts = count(subject.model)
    towers = passes * 32 * (counts.image_gflops + counts.text_gflops) * 1e9
    assert towers < made.flops < 1.05 * towers


def test_without_local_loss_every_rank_compares_all_pairs(subject):
    cluster = Cluster(8, H100)
    alone, all_pairs = (
        plan(subject, TrainOptions.flat(local_loss=local), cluster, 256).flops for local in (True, False)
    )
    logits = 2 * 2 * 256 * 256 * 16 * 3  # both directions, features of 16 channels, forward and backward
    assert all_pairs - alone == pytest.approx(logits * 7 / 8)


def sizes(made):
    return {part.name: part.bytes for part in made.memory.parts}


def test_a_locked_tower_runs_forward_alone_and_has_no_gradients(subject):
    clip, options = tiny_parallel.model({}), TrainOptions.flat(grad_checkpointing=True)
    lock_parts(clip, TrainedPartsOptions(lock_text=True))
    locked, plain = (plan(one, options, Cluster(8, H100), 256) for one in (Subject(clip), subject))
    assert plain.flops - locked.flops == pytest.approx(3 * 32 * count(clip).text_gflops * 1e9)
    for name in ("gradients", "optimizer (AdamW)", "activations"):
        assert sizes(locked)[name] < 0.9 * sizes(plain)[name], name
    assert sizes(locked)["parameters"] == sizes(plain)["parameters"]


def test_offloaded_state_is_in_the_memory_of_the_host(subject):
    options = [TrainOptions.flat(fsdp=True, fsdp_offload_cpu=offload) for offload in (False, True)]
    plain, offloaded = (plan(subject, each, Cluster(8, H100), 256) for each in options)
    names = ("parameters", "gradients", "optimizer (AdamW)")
    assert offloaded.memory.host_bytes == sum(sizes(plain)[name] for name in names)
    assert not sizes(offloaded).keys() & set(names)


def test_shorter_captions_send_fewer_rows(subject):
    options = TrainOptions.flat(ep=2, batch_size=4)

    def rows(caption_tokens):
        return [one.payload for one in traffic(subject, options, 2, caption_tokens) if one.kind == "expert rows"]

    assert rows(2) == [rows(None)[0], rows(None)[1] * 2 / 8]
