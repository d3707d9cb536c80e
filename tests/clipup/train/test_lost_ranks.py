"""A rank that is lost ends the run with one message and exit code 3; a slow rank does not."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
from faulty_run import main as faulty
from rank_processes import freeze, ranks, torchrun, wait_for_lines, wake

import clipup
from clipup.cli import main
from clipup.data.loaders import eval_samples
from clipup.evaluate import evaluate_retrieval
from clipup.train.checkpoints.open_clip_format import load


@pytest.fixture
def command(model_directory, csv_data, tmp_path):
    """A run of the command line that has no end of its own."""
    usual = ["--model", model_directory, "--train-data", csv_data, "--logs", tmp_path / "logs", "--name", "run"]
    usual += ["--device", "cpu", "--workers", 0, "--cache-data", "--batch-size", 4, "--steps", 100000]
    usual += ["--save-every-n-steps", 1, "--save-frequency", 0]
    return ["train", *map(str, usual)]


def messages(error: str) -> list[str]:
    return [line for line in error.splitlines() if line.startswith("clipup train: ")]


def assert_whole(run: Path, at_least: int) -> None:
    assert load(run / "checkpoints" / "epoch_latest.pt")["step"] >= at_least


@pytest.mark.slow
@pytest.mark.parametrize("lost", [1, 0])
def test_a_frozen_rank_is_named_after_the_timeout(command, tmp_path, lost):
    run = tmp_path / "logs" / "run"
    with ranks(tmp_path, main, [*command, "--dist-timeout", "5"]) as processes:
        wait_for_lines(run / "metrics.jsonl", 3, processes)
        freeze(processes[lost])
        code, error = processes[1 - lost].ended()

    assert code == 3, error
    if lost == 0:  # it held the store, too
        assert "clipup train: the store of rank 0 or torchrun has not answered for 5 s (frozen or cut off)" in error
    else:
        assert re.search(r"rank 1 of 2 has given no sign of life for 5 s \(frozen or cut off\), at step \d+ \(", error)
        assert " | ERROR | rank 1 of 2 has given no sign of life" in (run / "out.log").read_text()
    assert f"The last checkpoint, {run}/checkpoints/epoch_latest.pt, is whole; to continue, run" in error
    assert len(messages(error)) == 1 and "Traceback" not in error and "gloo" not in error
    assert_whole(run, 2)


@pytest.mark.slow
def test_a_killed_rank_is_named_under_torchrun(command, tmp_path):
    run = tmp_path / "logs" / "run"
    with torchrun(tmp_path, "-m", "clipup", "--", *command, "--dist-timeout", 20) as process:
        wait_for_lines(run / "metrics.jsonl", 3, [process])
        os.kill(process.child_with("RANK=1"), signal.SIGKILL)
        code, error = process.ended()

    assert code != 0
    assert re.search(r"clipup train: rank 1 of 2 ended without an error message \(killed, .*\), at step \d+ \(", error)
    assert len(messages(error)) == 1 and "gloo" not in error
    assert_whole(run, 2)


@pytest.mark.slow
def test_a_rank_that_fails_is_quoted_by_the_others(tmp_path):
    with ranks(tmp_path, faulty, tmp_path, "unreadable", 20) as processes:
        (_, first), (_, second) = (process.ended() for process in processes)

    reason = "rank 1 of 2 failed: OSError: the file system is gone, at step 4 (reading data)"
    assert f"clipup.train.ranks.rank_watch.RankLost: {reason}. The last checkpoint" in first
    assert "OSError: the file system is gone" in second and "RankLost" not in second
    assert f" | ERROR | RankLost: {reason}" in (tmp_path / "run" / "out.log").read_text()
    assert_whole(tmp_path / "run", 3)


@pytest.mark.slow
def test_a_rank_that_keeps_the_others_waiting_is_named_with_its_activity(tmp_path):
    with ranks(tmp_path, faulty, tmp_path, "slow_data", 3) as processes:
        code, error = processes[0].ended()

    assert code == 3
    assert "rank 1 of 2 has kept the others waiting for 3 s, at step 4 (reading data). The last" in error


@pytest.mark.slow
def test_ranks_stop_at_a_sigterm_while_the_data_of_one_of_them_stall(tmp_path):
    with ranks(tmp_path, faulty, tmp_path, "slow_data", 60) as processes:
        wait_for_lines(tmp_path / "run" / "metrics.jsonl", 3, processes)
        time.sleep(1)
        for process in processes:
            process.send(signal.SIGTERM)
        ended = [process.ended(30) for process in processes]

    for _, error in ended:
        assert "TrainingInterrupted: stopped after step 3 of 8" in error
    assert_whole(tmp_path / "run", 3)


@pytest.mark.slow
def test_neither_a_long_evaluation_nor_a_pause_of_the_whole_run_ends_it(tmp_path):
    with ranks(tmp_path, faulty, tmp_path, "slow_evaluation", 4) as processes:
        wait_for_lines(tmp_path / "run" / "metrics.jsonl", 3, processes)
        freeze(*processes)
        time.sleep(6)
        wake(*processes)
        codes = [process.ended() for process in processes]

    assert [code for code, _ in codes] == [0, 0], codes
    evaluations = [json.loads(line) for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()]
    assert [(one["step"], one["score"]) for one in evaluations] == [(4, 1.0), (8, 1.0)]


@pytest.mark.slow
def test_a_rank_that_never_starts_is_waited_for_as_long_as_the_timeout(command, tmp_path):
    with ranks(tmp_path, main, [*command, "--dist-timeout", "2"], count=1) as (process,):
        code, error = process.ended()

    assert code == 3
    assert "rank 0 of 2 has not met the others within 2 s (" in error and "Traceback" not in error


def test_what_rank_0_refuses_ends_all_ranks_with_one_message(command, tmp_path):
    (tmp_path / "logs" / "run").mkdir(parents=True)
    (tmp_path / "logs" / "run" / "metrics.jsonl").touch()

    with ranks(tmp_path, main, command) as processes:
        ended = [process.ended() for process in processes]

    assert [code for code, _ in ended] == [2, 2], ended
    [message] = [line for _, error in ended for line in messages(error)]
    assert "already holds a run" in message


def test_two_ranks_evaluate_to_the_numbers_of_one_process(command, csv_data, tmp_path):
    with ranks(tmp_path, main, [*command, "--steps", "2", "--val-data", csv_data]) as processes:
        ended = [process.ended() for process in processes]

    run = tmp_path / "logs" / "run"
    assert [code for code, _ in ended] == [0, 0], ended
    [shared] = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    model, _, preprocess = clipup.create_model_and_transforms(str(run / "model"))
    samples = eval_samples(csv_data, preprocess)
    alone = evaluate_retrieval(model, samples, clipup.get_tokenizer(str(run / "model")), batch_size=4)
    assert {name: shared[name] for name in alone} == alone and alone["gallery"] == 24


def test_the_share_of_unreadable_samples_is_judged_over_all_ranks(command, csv_data, tmp_path):
    """Three of 24 are more than a tenth; half of them are not more than chance allows a single rank."""
    for number in (3, 8, 15):
        (tmp_path / f"{number}.png").write_bytes(b"no picture")
    with ranks(tmp_path, main, [*command, "--no-cache-data", "--steps", "9"]) as processes:
        ended = [process.ended() for process in processes]

    assert [code for code, _ in ended] == [2, 2], ended
    for message in [line for _, error in ended for line in messages(error)]:
        assert "--max-skipped: 3 of 24 samples cannot be read" in message and "no picture" not in message
    assert_whole(tmp_path / "logs" / "run", 3)


def test_bad_options_are_reported_once_for_all_ranks_of_a_machine(command, tmp_path):
    with ranks(tmp_path, main, [*command, "--dist-timeout", "0"]) as processes:
        ended = [process.ended() for process in processes]

    assert [code for code, _ in ended] == [2, 2]
    both = "".join(error for _, error in ended)
    assert both.count("--dist-timeout must be a positive number") == 1
