"""Resuming with other options, ranks or data: what takes effect, what is converted, and what is refused."""

from __future__ import annotations

import dataclasses

import open_clip
import pytest

import clipup
from clipup.train import Every, train
from clipup.train.checkpoints.open_clip_format import load


@pytest.fixture
def run(make_model, pairs, options):
    """Epochs of three steps, and a checkpoint at the end."""

    def run(loader=None, callbacks=(), **changes):
        files = {"save_frequency": 0, "save_most_recent": False}
        data = loader or pairs()
        return train(options(**{**files, **changes}), model=make_model(), loader=data, callbacks=callbacks)

    return run


def log(result):
    return (result.directory / "out.log").read_text()


def checkpoint(result, name="epoch_latest.pt"):
    return result.directory / "checkpoints" / name


@pytest.mark.parametrize("changes", [{"batch_size": 32}, {"accum_freq": 2}, {"seed": 1}, {"cache_data": True}])
def test_within_an_epoch_options_that_decide_the_samples_of_a_step_may_not_change(run, changes):
    run(steps=4, lr_scheduler="const")
    name, value = next(iter(changes.items()))

    with pytest.raises(ValueError, match=rf"within epoch 2, after step 1 of 3; with {name} .* -> {value} .*epoch_K.pt"):
        run(steps=8, lr_scheduler="const", resume="latest", resume_with_changes=True, **changes)


def test_within_an_epoch_other_data_are_refused(run, pairs):
    run(steps=4)

    with pytest.raises(ValueError, match="other training data"):
        run(steps=8, resume="latest", loader=pairs(pairs=32))


def test_streamed_shards_within_an_epoch_need_as_many_workers_as_before(make_model, options, shards):
    def run(**changes):
        return train(
            options(train_data=f"file:{shards}", train_num_samples=24, batch_size=8, **changes),
            model=make_model(),
            preprocess=open_clip.image_transform(16, is_train=True),
            tokenizer=open_clip.SimpleTokenizer(context_length=8),
        )

    run(steps=2, workers=1)

    with pytest.raises(ValueError, match="with workers 1 -> 2 the rest of the epoch"):
        run(steps=4, workers=2, resume="latest")


@pytest.mark.parametrize("saved_at", ["the epoch's end", "its last step"])
def test_at_an_epochs_end_the_batch_size_may_change_and_the_epochs_are_those_asked_for(run, pairs, tmp_path, saved_at):
    def fail(model):
        raise ZeroDivisionError

    if saved_at == "its last step":  # step 3 of 3 is done, and the epoch not yet
        with pytest.raises(ZeroDivisionError):
            run(steps=6, lr_scheduler="const", save_every_n_steps=3, callbacks=[Every(4, fail)])
    else:
        run(steps=None, epochs=1, lr_scheduler="const")
    latest = tmp_path / "logs" / "run" / "checkpoints" / "epoch_latest.pt"
    assert load(latest)["step_of_epoch"] == (3 if saved_at == "its last step" else 0)

    changes = {"steps": None, "epochs": 3, "lr_scheduler": "const", "batch_size": 4}
    halved = run(loader=pairs(batch_size=4), resume="latest", **changes)

    assert halved.steps == 3 + 2 * 6
    assert [record["epoch"] for record in halved.history] == [0] * 3 + [1] * 6 + [2] * 6
    state = load(latest)
    assert (state["epoch"], state["samples_seen"]) == (3, 3 * 24)
    again = run(loader=pairs(batch_size=4), resume="latest", **{**changes, "epochs": 4})
    assert again.steps == 3 + 3 * 6
    assert "batch_size 64 -> 4" in log(halved)


def test_learning_rate_decay_and_betas_take_effect_and_are_named(run):
    usual = {"lr_scheduler": "const", "skip_scheduler": True}
    run(steps=3, **usual)

    resumed = run(steps=4, resume="latest", lr=1e-2, wd=0.5, beta1=0.5, eps=1e-3, **usual)

    group = load(checkpoint(resumed))["optimizer"]["param_groups"][1]
    assert (group["lr"], group["weight_decay"], group["betas"], group["eps"]) == (1e-2, 0.5, (0.5, 0.98), 1e-3)
    assert load(checkpoint(resumed))["optimizer"]["param_groups"][0]["weight_decay"] == 0
    for text in ("lr 0.001 -> 0.01", "wd 0.2 -> 0.5", "beta1 None -> 0.5", "steps 3 -> 4"):
        assert text in log(resumed)
    assert "resumed with changes, which take effect from now on: " in log(resumed)
    assert resumed.history[-1]["lr"] == 1e-2


@pytest.mark.parametrize(
    "changes, text", [({"seed": 1}, "seed 0 -> 1"), ({"siglip": True}, "siglip"), ({"model": "ViT-B-32"}, "model None")]
)
def test_options_that_identify_a_run_change_only_with_an_explicit_flag(run, changes, text):
    first = run(steps=3)
    before = checkpoint(first).read_bytes()

    with pytest.raises(ValueError, match=f"run with other options: {text}.*another --name.*--resume-with-changes"):
        run(steps=6, resume="latest", **changes)

    assert checkpoint(first).read_bytes() == before
    if "seed" in changes:
        resumed = run(steps=6, resume="latest", resume_with_changes=True, **changes)
        assert resumed.steps == 6 and "seed 0 -> 1" in log(resumed)


def test_sparse_layers_of_another_config_are_named_by_what_differs(make_model, pairs, options):
    config = clipup.MoEConfig(num_experts=4)

    def run(config, **changes):
        return train(options(moe=True, moe_cfg=config, **changes), model=make_model(), loader=pairs())

    run(config, steps=3)
    other = dataclasses.replace(config, capacity_factor=2.0)

    with pytest.raises(ValueError, match=r"other options: moe_cfg.capacity_factor \S+ -> 2.0\. "):
        run(other, resume="latest")
