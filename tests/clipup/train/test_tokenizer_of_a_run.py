"""The tokenizer that a run trained with stays with its checkpoints, wherever they and the model that it began with
are."""

import shutil

import pytest

import clipup
from clipup.cli import main
from clipup.cli.runs import model_of
from clipup.train import TrainOptions, train
from clipup.train.checkpoints.kept import newest

NAME = "clipup-icons-w64"
TEXT = "blue arrow left"


@pytest.fixture
def own(tmp_path):
    """The directory of a model with a vocabulary of its own, of the same size as that of its name."""
    directory = tmp_path / "own"
    model, *_ = clipup.create_model_and_transforms(NAME)
    sparse = clipup.upcycle(model, clipup.MoEConfig(num_experts=2))
    clipup.save_pretrained(sparse, directory, clipup.get_model_config(NAME))
    reverse_words(directory)
    return directory


def reverse_words(directory):
    words = (directory / "vocabulary.txt").read_text().split()
    (directory / "vocabulary.txt").write_text("\n".join(reversed(words)))


def tokens(name):
    return clipup.get_tokenizer(str(name))([TEXT]).tolist()


@pytest.fixture
def run_of(csv_data, tmp_path):
    """Trains one step with these options, and gives the result."""

    def run(tokenizer=None, **options):
        usual = {"train_data": csv_data, "batch_size": 4, "workers": 0, "steps": 1, "warmup": 0, "device": "cpu"}
        usual |= {"model": NAME, "logs": str(tmp_path / "logs"), "name": "run"}
        return train(TrainOptions.flat(**{**usual, **options}), tokenizer=tokenizer)

    return run


@pytest.mark.parametrize("named, checkpoint", [("local-dir:own", "full"), ("own", "sharded"), ("pretrained", "full")])
def test_a_checkpoint_is_converted_and_inspected_with_the_tokenizer_of_its_run(
    own, run_of, tmp_path, monkeypatch, named, checkpoint
):
    monkeypatch.chdir(tmp_path)
    expected = tokens(own)
    model = {"pretrained": "own"} if named == "pretrained" else {"model": named}
    run = run_of(**model, fsdp_checkpoint=checkpoint).directory
    shutil.rmtree(run / "model")
    own.rename(tmp_path / "elsewhere")
    (tmp_path / "moved").mkdir()
    saved = newest(run / "checkpoints").path
    moved = (tmp_path / "moved" / saved.name).absolute()
    (shutil.copytree if checkpoint == "sharded" else shutil.copy)(saved, moved)
    monkeypatch.chdir(tmp_path / "moved")

    with model_of(str(run)) as name:
        assert tokens(name) == expected
    assert main(["convert", str(moved), str(tmp_path / "out")]) == 0
    assert tokens(tmp_path / "out") == expected


def test_the_words_of_a_tokenizer_that_is_passed_in_are_saved_and_of_another_one_there_is_a_warning(
    own, run_of, tmp_path, caplog
):
    result = run_of(tokenizer=clipup.get_tokenizer(str(own)))

    assert main(["convert", str(newest(result.directory / "checkpoints").path), str(tmp_path / "out")]) == 0
    assert tokens(result.directory / "model") == tokens(tmp_path / "out") == tokens(own)
    named = clipup.get_tokenizer(NAME)
    run_of(name="other", tokenizer=lambda texts: named([text[::-1] for text in texts]))
    assert "passed in is not saved" in caplog.text


@pytest.mark.parametrize("checkpoint", ["full", "sharded"])
def test_a_run_does_not_go_on_with_another_tokenizer_when_its_directory_changed(own, run_of, checkpoint):
    options = {"model": str(own), "fsdp_checkpoint": checkpoint}
    run_of(**options)
    reverse_words(own)

    with pytest.raises(ValueError, match="resume_with_changes"):
        run_of(**options, steps=2, resume="latest")
    assert run_of(**options, steps=2, resume="latest", resume_with_changes=True).steps == 2
