"""The tokenizer that a run trained with stays with its checkpoints, wherever they and the model that it began with
are."""

import shutil

import pytest

import clipup
from clipup.cli import main
from clipup.cli.inspect import load
from clipup.train import Every, TrainOptions, train

NAME = "clipup-icons-w64"
TEXT = "blue arrow left"


@pytest.fixture
def own(tmp_path):
    """The directory of a model with a vocabulary of its own, of the same size as that of its name."""
    directory = tmp_path / "own"
    model, *_ = clipup.create_model_and_transforms(NAME)
    clipup.save_pretrained(clipup.upcycle(model, clipup.MoEConfig(num_experts=2)), directory, config())
    words = (directory / "vocabulary.txt").read_text().split()
    (directory / "vocabulary.txt").write_text("\n".join(reversed(words)))
    return directory


def config():
    return clipup.get_model_config(NAME)


def tokens(name):
    return clipup.get_tokenizer(str(name))([TEXT]).tolist()


@pytest.fixture
def trained(tmp_path, csv_data):
    """Runs one step with these arguments, and gives the directory of the run without the model at its end."""

    def run(*arguments):
        usual = [
            "--train-data",
            csv_data,
            "--steps",
            "1",
            "--warmup",
            "0",
            "--logs",
            tmp_path / "logs",
            "--name",
            "run",
        ]
        usual += ["--batch-size", "4", "--workers", "0", "--device", "cpu"]
        assert main(["train", *map(str, [*usual, *arguments])]) == 0
        shutil.rmtree(tmp_path / "logs" / "run" / "model")
        return tmp_path / "logs" / "run"

    return run


def newest(run):
    whole = run / "checkpoints" / "epoch_latest.pt"
    return whole if whole.is_file() else next((run / "checkpoints").iterdir())


@pytest.mark.parametrize("sharded", [False, True], ids=["file", "sharded"])
@pytest.mark.parametrize("named", ["local-dir", "directory", "pretrained"])
def test_a_checkpoint_is_converted_and_inspected_with_the_tokenizer_of_its_run(
    own, trained, tmp_path, monkeypatch, named, sharded
):
    monkeypatch.chdir(tmp_path)
    model = {
        "local-dir": ["--model", "local-dir:own"],
        "directory": ["--model", "own"],
        "pretrained": ["--model", NAME, "--pretrained", "own"],
    }[named]
    expected = tokens(own)
    run = trained(*model, *["--fsdp-checkpoint", "sharded"] * sharded)
    own.rename(tmp_path / "elsewhere")
    (tmp_path / "moved").mkdir()
    moved = (tmp_path / "moved" / newest(run).name).absolute()
    (shutil.copytree if sharded else shutil.copy)(newest(run), moved)
    monkeypatch.chdir(tmp_path / "moved")

    assert load(str(run), "cpu")[2]([TEXT]).tolist() == expected
    for number, checkpoint in enumerate((newest(run), moved)):
        assert main(["convert", str(checkpoint), str(tmp_path / f"out{number}")]) == 0
        assert tokens(tmp_path / f"out{number}") == expected


def test_a_trained_model_has_the_tokenizer_that_the_run_began_with(own, csv_data, tmp_path):
    expected = tokens(own)

    def replace(model):
        (own / "vocabulary.txt").write_text("other")

    data = {"train_data": csv_data, "batch_size": 4, "workers": 0}
    options = TrainOptions(model=str(own), steps=2, warmup=0, device="cpu", logs=str(tmp_path / "logs"), **data)
    result = train(options, callbacks=[Every(1, replace)])

    assert tokens(result.directory / "model") == expected


def run_of(csv_data, tmp_path, **options):
    usual = {"train_data": csv_data, "batch_size": 4, "workers": 0, "steps": 1, "warmup": 0, "device": "cpu"}
    return TrainOptions(**{**usual, "model": NAME, "logs": str(tmp_path / "logs"), "name": "run", **options})


def test_the_words_of_a_tokenizer_that_is_passed_in_are_saved(own, csv_data, tmp_path):
    result = train(run_of(csv_data, tmp_path), tokenizer=clipup.get_tokenizer(str(own)))

    assert main(["convert", str(newest(result.directory)), str(tmp_path / "out")]) == 0
    assert tokens(result.directory / "model") == tokens(tmp_path / "out") == tokens(own)


def test_that_another_tokenizer_is_not_saved_is_a_warning(csv_data, tmp_path, caplog):
    named = clipup.get_tokenizer(NAME)

    train(run_of(csv_data, tmp_path), tokenizer=lambda texts: named([text[::-1] for text in texts]))

    assert "passed in is not saved" in caplog.text


@pytest.mark.parametrize("sharded", [False, True], ids=["file", "sharded"])
@pytest.mark.parametrize("changed", ["vocabulary", "activation"])
def test_a_run_does_not_go_on_as_another_model_when_its_directory_changed(own, csv_data, tmp_path, changed, sharded):
    options = {"model": str(own), "fsdp_checkpoint": "sharded" if sharded else "full"}
    train(run_of(csv_data, tmp_path, **options))
    if changed == "vocabulary":
        words = (own / "vocabulary.txt").read_text().split()
        (own / "vocabulary.txt").write_text("\n".join(reversed(words)))
    else:
        content = (own / "open_clip_config.json").read_text()
        (own / "open_clip_config.json").write_text(
            content.replace('"model_cfg": {', '"model_cfg": {"quick_gelu": true,')
        )
    message = {"vocabulary": "another tokenizer than that of", "activation": "trained as another model than"}[changed]

    with pytest.raises(ValueError, match=f"{message}.* If the change is meant, add resume_with_changes"):
        train(run_of(csv_data, tmp_path, **options, steps=2, resume="latest"))
    assert train(run_of(csv_data, tmp_path, **options, steps=2, resume="latest", resume_with_changes=True)).steps == 2
