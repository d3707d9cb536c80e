"""Several ranks: a lost one ends the run within the timeout with its last checkpoint whole, a slow one does not."""

import json
import signal
import time

import pytest
from faulty_run import evaluating, stalling
from rank_processes import ranks, wait_for_lines

import clipup
from clipup.cli import main
from clipup.data.loaders import eval_samples
from clipup.evaluate import evaluate_retrieval
from clipup.train.checkpoints import kept
from clipup.train.checkpoints.format import load


@pytest.fixture
def run(tmp_path):
    return tmp_path / "logs" / "run"


@pytest.fixture
def command(model_directory, csv_data, tmp_path):
    """A run of the command line that has no end of its own."""
    usual = ["--model", model_directory, "--train-data", csv_data, "--logs", tmp_path / "logs", "--name", "run"]
    usual += ["--device", "cpu", "--workers", 0, "--cache-data", "--batch-size", 4, "--steps", 100000]
    usual += ["--save-every-n-steps", 1, "--save-frequency", 0]
    return ["train", *map(str, usual)]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_a_frozen_or_killed_rank_ends_the_others(command, tmp_path, run, number, lost, kind):
    options = ["--dist-timeout", "6", *(("--fsdp", "--fsdp-checkpoint", kind) if kind == "sharded" else ())]
    with ranks(tmp_path, main, [*command, *options]) as processes:
        wait_for_lines(run / "metrics.jsonl", 4, processes)
        processes[lost].send(number)
        code, error = processes[1 - lost].ended(40)

    assert code == 2 and "another rank is lost" in error and "Traceback" not in error
    assert kept.newest(run / "checkpoints").state["step"] >= 2  # beside what a killed rank has half written


@pytest.mark.slow
def test_ranks_stop_at_a_sigterm_while_the_data_of_one_of_them_stall(tmp_path):
    with ranks(tmp_path, stalling, tmp_path) as processes:
        wait_for_lines(tmp_path / "run" / "metrics.jsonl", 3, processes)
        time.sleep(1)
        for process in processes:
            process.send(signal.SIGTERM)
        ended = [process.ended(30) for process in processes]

    assert all("TrainingInterrupted: stopped after step 3 of 8" in error for _, error in ended)
    assert load(tmp_path / "run" / "checkpoints" / "epoch_latest.pt")["step"] == 3


@pytest.mark.slow
def test_an_evaluation_by_rank_0_may_take_longer_than_the_timeout(tmp_path):
    with ranks(tmp_path, evaluating, tmp_path, 4) as processes:
        ended = [process.ended() for process in processes]

    assert [code for code, _ in ended] == [0, 0], ended
    evaluations = [json.loads(line) for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()]
    assert [(each["step"], each["score"]) for each in evaluations] == [(4, 1.0), (8, 1.0)]


@pytest.mark.parametrize("options", [[], ["--dist-timeout", "0"]], ids=["the directory", "an option"])
def test_what_is_refused_ends_all_ranks_with_one_message(command, tmp_path, run, options):
    run.mkdir(parents=True)
    (run / "metrics.jsonl").touch()

    with ranks(tmp_path, main, [*command, *options]) as processes:
        ended = [process.ended() for process in processes]

    assert [code for code, _ in ended] == [2, 2], ended
    assert sum(error.count("already holds a run") + error.count("--dist-timeout must") for _, error in ended) == 1


def test_two_ranks_share_an_evaluation_and_judge_unreadable_samples_together(command, csv_data, tmp_path, run):
    """Three of 24 are more than a tenth; half of them are not more than chance allows a single rank."""
    with ranks(tmp_path, main, [*command, "--steps", "2", "--val-data", csv_data]) as processes:
        assert [process.ended()[0] for process in processes] == [0, 0]
    [shared] = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    model, _, preprocess = clipup.create_model_and_transforms(str(run / "model"))
    samples = eval_samples(csv_data, preprocess)
    alone = evaluate_retrieval(model, samples, clipup.get_tokenizer(str(run / "model")), batch_size=4)
    assert {name: shared[name] for name in alone} == alone and alone["gallery"] == 24

    for number in (3, 8, 15):
        (tmp_path / f"{number}.png").write_bytes(b"no picture")
    with ranks(tmp_path, main, [*command, "--name", "bad", "--no-cache-data", "--steps", "9"]) as processes:
        ended = [process.ended() for process in processes]
    assert [code for code, _ in ended] == [2, 2]
    said = "".join(error for _, error in ended)
    assert said.count("clipup train: ") == said.count("clipup train: --max-skipped: 3 of 24 samples cannot be read") > 0
