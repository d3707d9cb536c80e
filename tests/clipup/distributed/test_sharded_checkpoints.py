"""Sharded checkpoints of several ranks: resumed with the same and with another layout, and killed while they are
written."""

from __future__ import annotations

import json
import shutil
import signal
import time

import pytest
import torch
from rank_processes import ranks
from sharded_runs import FOUR, SHARDED, SPREAD, continued, of_four, of_two, of_two_more, stuck
from tiny_parallel import DROPLESS, model, newest, resume_all, run

from clipup.models.factory import load_checkpoint
from clipup.models.shard_files import read_index
from clipup.train.checkpoints.open_clip_format import load

pytestmark = pytest.mark.slow


def end(processes):
    for process in processes:
        code, error = process.ended(400)
        assert code == 0, error


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Runs of two ranks that were stopped after two steps and continued, and what one process made of them."""
    out = tmp_path_factory.mktemp("runs")
    run(out, "alone", DROPLESS, lr_scheduler="const", **SHARDED)
    run(out, "one process", DROPLESS, lr_scheduler="const", steps=2, **SHARDED)
    run(out, "one process, full", DROPLESS, lr_scheduler="const", steps=2)
    with ranks(out, of_two, out) as processes:
        end(processes)
    resume_all(out, {"fsdp and ep": {}}, {"one process": SHARDED})
    return out


@pytest.fixture(scope="module")
def more(out):
    """The same for the other layouts."""
    with ranks(out, of_two_more, out) as processes:
        end(processes)
    resume_all(out, dict.fromkeys(("replicated", "fsdp", "ep", "full"), {}), {"one process": SHARDED})
    return out


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same(one, other, bitwise):
    assert losses(one) == (losses(other) if bitwise else pytest.approx(losses(other), rel=1e-4))
    first, second = load(newest(one)), load(newest(other))
    assert first["step"] == second["step"] == 4
    for key, value in second["state_dict"].items():
        tolerance = {"rtol": 0, "atol": 0} if bitwise else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(first["state_dict"][key], value, **tolerance)
    if bitwise:
        for name, values in second["optimizer"]["by_name"].items():
            assert all(torch.equal(first["optimizer"]["by_name"][name][key], value) for key, value in values.items())


def test_a_run_resumed_with_the_same_layout_is_bitwise_the_uninterrupted_one(out):
    assert_same(out / "fsdp and ep, fsdp and ep", out / "fsdp and ep, whole", bitwise=True)


@pytest.mark.parametrize(
    "name",
    [
        *("fsdp and ep, replicated", "fsdp and ep, one process"),
        *("one process, fsdp and ep", "one process, full, fsdp and ep"),
    ],
)
def test_a_run_resumed_with_another_layout_does_what_one_process_does(out, name):
    assert_same(out / name, out / "alone", bitwise=False)


@pytest.mark.parametrize("name", ["replicated", "fsdp", "ep", "lamb"])
def test_every_layout_is_resumed_bitwise(more, name):
    assert_same(more / f"{name}, {name}", more / f"{name}, whole", bitwise=True)


@pytest.mark.parametrize("then", [*SPREAD, "one process"])
@pytest.mark.parametrize("name", ["replicated", "fsdp", "ep", "full"])
def test_every_layout_continues_every_other(more, name, then):
    assert_same(more / f"{name}, {then}", more / "alone", bitwise=False)


def test_every_rank_writes_about_half_and_no_part_is_written_twice(out):
    sizes, alone = (
        [file.size for file in read_index(newest(out / name)).files.values()] for name in ("fsdp and ep", "alone")
    )
    assert len(sizes) == 2 and all(0.4 * alone[0] < size < 0.7 * alone[0] for size in sizes)


def test_a_sharded_checkpoint_is_a_file_of_weights_for_any_model(out):
    loaded = model(DROPLESS)
    load_checkpoint(loaded, newest(out / "fsdp and ep, whole"))

    expected = load(newest(out / "fsdp and ep, whole"))["state_dict"]
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


def test_a_damaged_file_is_found_by_the_ranks_together_and_the_checkpoint_before_is_used(out):
    log = (out / "damaged" / "out.log").read_text()

    assert "epoch_1, because a checkpoint cannot be used" in log and ".safetensors is damaged" in log
    assert_same(out / "damaged", out / "fsdp and ep, whole", bitwise=True)


def killed(out, victims):
    """A run whose third checkpoint was half written when these ranks were killed, and how its ranks ended."""
    options = {**SPREAD["fsdp and ep"], "dist_timeout": 10.0}
    with ranks(out, stuck, out, options) as processes:
        deadline = time.monotonic() + 120
        while len(list(out.glob("half-*"))) < 2:
            assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
            time.sleep(0.02)
        for rank in victims:
            processes[rank].send(signal.SIGKILL)
        ended = [process.ended() for process in processes]
    assert list((out / "killed" / "checkpoints").glob(".writing*"))
    return out / "killed", ended


def test_a_rank_killed_while_it_writes_ends_the_run_and_the_checkpoint_before_is_used(out, tmp_path):
    run_of_two, ended = killed(tmp_path, [1])
    code, error = ended[0]
    assert code != 0 and "rank 1 of 2 ended without an error message" in error
    assert f"{run_of_two / 'checkpoints' / 'epoch_1'}, is whole" in error

    with ranks(tmp_path, continued, tmp_path, "killed", SPREAD["fsdp and ep"]) as processes:
        end(processes)

    assert_same(run_of_two, out / "fsdp and ep, whole", bitwise=True)


def test_all_ranks_killed_while_they_write_lose_the_steps_since_the_checkpoint_before(out, tmp_path):
    run_of_two, _ = killed(tmp_path, [0, 1])

    run(tmp_path, "killed", DROPLESS, lr_scheduler="const", resume="latest", **SHARDED)

    assert_same(run_of_two, out / "alone", bitwise=False)
    assert not list(run_of_two.rglob(".writing*"))


@pytest.fixture(scope="module")
def out_of_four(tmp_path_factory, more):
    """Runs of two ranks that four continue, one that one process continues, and one of four ranks."""
    place = tmp_path_factory.mktemp("runs-4")
    for name in SPREAD:
        shutil.copytree(more / name, place / name)
    with ranks(place, of_four, place, count=4, world_size=4) as processes:
        end(processes)
    resume_all(place, dict.fromkeys(FOUR, {}), {"one process": SHARDED})
    return place


@pytest.mark.parametrize("name", [*SPREAD, *FOUR])
@pytest.mark.parametrize("other", FOUR)
def test_four_ranks_continue_what_others_began(out, out_of_four, name, other):
    assert_same(out_of_four / f"{name}, {other}", out / "alone", bitwise=False)


@pytest.mark.parametrize("name", FOUR)
def test_a_run_of_four_ranks_is_resumed_bitwise_and_by_one_process(out, out_of_four, name):
    assert_same(out_of_four / f"{name}, {name}", out_of_four / f"{name}, whole", bitwise=True)
    assert_same(out_of_four / f"{name}, one process", out / "alone", bitwise=False)
