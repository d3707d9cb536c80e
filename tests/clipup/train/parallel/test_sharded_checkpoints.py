"""Sharded checkpoints of several ranks: resumed with the same and with another layout, and killed while they are
written."""

import json
import shutil
import signal
import time

import pytest
import torch
from rank_processes import on_ranks, ranks
from sharded_runs import FOUR, LAST, SHARDED, SPREAD, THEN, continued, of_four, of_two, refused, stuck
from tiny_parallel import DROPLESS, newest, resume_all, run

from clipup.models.shard_files import read_index
from clipup.train.checkpoints.format import load

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Runs of two ranks that were stopped after two steps and continued, and what one process made of them."""
    out = tmp_path_factory.mktemp("runs")
    run(out, "alone", DROPLESS, lr_scheduler="const", **SHARDED)
    run(out, "one process", DROPLESS, lr_scheduler="const", steps=2, **SHARDED)
    on_ranks(out, 2, of_two, out)
    resume_all(out, {LAST: {}, "full": {}}, {"one process": SHARDED})
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
        for index, values in second["optimizer"]["state"].items():
            assert all(torch.equal(first["optimizer"]["state"][index][key], value) for key, value in values.items())


@pytest.mark.parametrize("name", SPREAD)
def test_a_run_resumed_with_the_same_layout_is_bitwise_the_uninterrupted_one(out, name):
    assert_same(out / f"{name}, {name}", out / f"{name}, whole", bitwise=True)


@pytest.mark.parametrize(
    ("name", "then"), [*THEN.items(), ("one process", LAST), (LAST, "one process"), ("full", "one process")]
)
def test_a_run_resumed_with_another_layout_does_what_one_process_does(out, name, then):
    assert_same(out / f"{name}, {then}", out / "alone", bitwise=False)


def test_every_rank_writes_about_half(out):
    parts, [alone] = (read_index(newest(out / name)).files.values() for name in (f"{LAST}, whole", "alone"))
    assert len(parts) == 2 and all(0.4 * alone.size < part.size < 0.7 * alone.size for part in parts)


def test_a_damaged_file_is_found_by_the_ranks_together_and_the_checkpoint_before_is_used(out):
    log = (out / "damaged" / "out.log").read_text()

    assert "epoch_1, because a checkpoint cannot be used" in log and ".safetensors is damaged" in log
    assert_same(out / "damaged", out / f"{LAST}, whole", bitwise=True)


@pytest.mark.parametrize("victims", [[1], [0, 1]])
def test_ranks_killed_while_they_write_lose_the_steps_since_the_checkpoint_before(out, tmp_path, victims):
    with ranks(tmp_path, stuck, tmp_path, {**SPREAD[LAST], "dist_timeout": 10.0}) as processes:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("half-*"))) < 2:
            assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
            time.sleep(0.02)
        for rank in victims:
            processes[rank].send(signal.SIGKILL)
        ended = [process.ended() for process in processes]
    assert list((tmp_path / "killed" / "checkpoints").glob(".writing*"))

    if victims == [1]:
        assert ended[0][0] != 0 and "another rank is lost" in ended[0][1]
        on_ranks(tmp_path, 2, continued, tmp_path, "killed", SPREAD[LAST])
    else:
        continued(tmp_path, "killed", {})

    assert_same(tmp_path / "killed", out / f"{LAST}, whole", bitwise=victims == [1])
    assert not list((tmp_path / "killed").rglob(".writing*"))


def test_data_that_end_the_ranks_leave_the_checkpoint_that_is_being_written(tmp_path):
    with ranks(tmp_path, refused, tmp_path, SPREAD["fsdp"]) as processes:
        assert all("too many" in process.ended()[1] for process in processes)
    assert load(newest(tmp_path / "refused"))["step"] == 2


def test_four_ranks_continue_what_others_began(out, tmp_path):
    first, second = FOUR
    for name in ("fsdp", LAST):
        shutil.copytree(out / name, tmp_path / name)
    on_ranks(tmp_path, 4, of_four, tmp_path)
    resume_all(tmp_path, {first: {}}, {"one process": SHARDED})

    assert_same(tmp_path / f"{first}, {first}", tmp_path / f"{first}, whole", bitwise=True)
    others = [f"{name}, {first}" for name in ("fsdp", LAST, second)]
    for name in (*others, f"{first}, {second}", f"{first}, one process"):
        assert_same(tmp_path / name, out / "alone", bitwise=False)
