"""Sharded checkpoints of one process: when they are written, which are kept and used, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import threading

import numpy as np
import pytest
import torch
from strangers import MakesFile

import clipup
from clipup.cli import main
from clipup.moe.config import MoEConfig
from clipup.pretrained import shard_files
from clipup.train import Every, NonFiniteWeights, TrainingInterrupted, checkpoints, dcp_storage, train
from clipup.train.checkpoints import load


@pytest.fixture
def run(make_model, pairs, options):
    """Three steps an epoch."""

    def run(callbacks=(), moe=None, **changes):
        chosen = options(**{"fsdp_checkpoint": "sharded", "lr_scheduler": "const", **changes})
        return train(chosen, model=make_model(moe), loader=pairs(), callbacks=callbacks)

    return run


def names(result):
    return sorted(path.name for path in (result.directory / "checkpoints").iterdir())


def newest(result):
    return checkpoints.newest(result.directory / "checkpoints").path


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_sharded_checkpoint_holds_what_a_full_one_holds(run):
    sharded = load(newest(run(name="sharded")))
    full = load(run(name="full", fsdp_checkpoint="full").directory / "checkpoints" / "epoch_latest.pt")

    assert set(sharded) == set(full)
    assert list(sharded["state_dict"]) and set(sharded["state_dict"]) == set(full["state_dict"])
    assert all(torch.equal(value, sharded["state_dict"][name]) for name, value in full["state_dict"].items())
    assert len(sharded["optimizer"]["by_name"]) == len(full["optimizer"]["state"])
    assert sharded["step"] == 6 and sharded["finished"]


@pytest.mark.parametrize("first,then", [("sharded", "full"), ("full", "sharded"), ("sharded", "sharded")])
def test_a_resumed_run_equals_the_uninterrupted_one_with_either_kind_of_checkpoint(run, first, then):
    whole = run(name="whole")

    run(steps=4, fsdp_checkpoint=first)
    resumed = run(resume="latest", fsdp_checkpoint=then)

    assert [record["loss"] for record in resumed.history] == [record["loss"] for record in whole.history]
    assert same_weights(resumed.model, whole.model)


@pytest.mark.parametrize(
    "opt",
    [  # what they hold besides tensors: a count of steps in their groups, or numbers by parameter
        "timm/lamb",
        "timm/madgrad",
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("timm/adan", "timm/muon", "timm/laprop")),
    ],
)
@pytest.mark.parametrize("first,then", [("sharded", "full"), ("full", "sharded"), ("sharded", "sharded")])
def test_other_optimizers_are_continued_too(run, opt, first, then):
    whole = run(name="whole", opt=opt)

    run(steps=2, opt=opt, fsdp_checkpoint=first)
    run(steps=4, opt=opt, fsdp_checkpoint=then, resume="latest")
    resumed = run(opt=opt, fsdp_checkpoint=first, resume="latest")

    assert [record["loss"] for record in resumed.history] == [record["loss"] for record in whole.history]
    assert same_weights(resumed.model, whole.model)


@pytest.mark.parametrize("kind", ["sharded", "full"])
def test_numbers_of_numpy_can_be_saved_and_read(run, kind):
    of_numpy = {"lr": np.float32(1e-3), "wd": np.float64(0.1), "opt_kwargs": {"eps": np.array(1e-5)}}
    of_numpy |= {"beta1": np.longdouble(0.9), "beta2": 0.98, "wd_exclude": np.array(["logit_scale"])}
    run(steps=np.int64(2), fsdp_checkpoint=kind, **of_numpy)
    moe = MoEConfig.clip_up(capacity_factor=np.float64(1.5))
    assert run(steps=4, resume="latest", fsdp_checkpoint=kind, **of_numpy).steps == 4
    run(name="sparse", moe=moe, steps=2, fsdp_checkpoint=kind)
    assert run(name="sparse", moe=moe, steps=4, resume="latest", fsdp_checkpoint=kind).steps == 4


OF_OPTIMIZER = {"param_groups": [], "values": {}}


@pytest.mark.parametrize(
    "optimizer",
    [
        *(None, [1], {}, {"param_groups": []}, {"param_groups": None, "values": {}}, {**OF_OPTIMIZER, "values": [1]}),
        *({**OF_OPTIMIZER, "param_groups": groups} for groups in ([{}], ["a"], [{"param_names": 5}])),
        {**OF_OPTIMIZER, "param_groups": [{"param_names": [], "step": float("nan")}]},
        *({**OF_OPTIMIZER, "values": {"logit_scale": of}} for of in (None, [1], {"k": [1]}, {"k": float("inf")})),
        {**OF_OPTIMIZER, "values": {"logit_scale": {"exp_avg": 1.0}}},  # which is a tensor
    ],
    ids=str,
)
def test_an_optimizer_of_another_form_is_named_and_the_checkpoint_before_is_used(run, optimizer):
    first = run()
    folder = first.directory / "checkpoints"
    path = folder / "epoch_2" / "state.pt"
    torch.save({**torch.load(path, weights_only=True), "optimizer": optimizer}, path)

    for read in (lambda: load(folder / "epoch_2"), lambda: run(resume=str(folder / "epoch_2"))):
        with pytest.raises(ValueError, match=r"epoch_2/state\.pt is damaged: its optimizer is not groups"):
            read()
    assert run(resume="latest").steps == 6
    assert "epoch_1, because a checkpoint cannot be used" in (first.directory / "out.log").read_text()


@pytest.mark.parametrize("kind", ["sharded", "full"])
def test_a_run_that_does_no_step_with_a_locked_tower_leaves_the_optimizer_whole(run, kind):
    of_both = {"opt": "timm/madgrad", "fsdp_checkpoint": kind}
    whole = run(name="whole", **of_both)
    with pytest.raises(TrainingInterrupted):
        run([Every(4, lambda model: os.kill(os.getpid(), signal.SIGINT))], **of_both)
    run(steps=4, resume="latest", resume_with_changes=True, lock_image=True, **of_both)

    resumed = run(resume="latest", resume_with_changes=True, **of_both)

    assert same_weights(resumed.model, whole.model)


@pytest.mark.parametrize("changes", [{}, {"lock_image": True}], ids=["all", "locked"])
@pytest.mark.parametrize("kind", ["sharded", "full"])
def test_a_checkpoint_that_says_where_parameters_lay_on_other_ranks_is_resumed(run, kind, changes):
    """Versions before this one saved the parts of the groups of a run with fsdp or ep."""
    first = run(steps=2)
    path = newest(first) / "state.pt"
    state = torch.load(path, weights_only=True)
    for index, group in enumerate(state["optimizer"]["param_groups"]):
        group |= {"group": index, "positions": list(range(7))}
    torch.save(state, path)

    run(steps=4, resume="latest", resume_with_changes=True, fsdp_checkpoint=kind, **changes)
    if kind == "sharded":
        groups = torch.load(newest(first) / "state.pt", weights_only=True)["optimizer"]["param_groups"]
        assert not any({"group", "positions"} & set(group) for group in groups)
    assert run(resume="latest", resume_with_changes=True, fsdp_checkpoint="full").steps == 6


@pytest.mark.parametrize("kind", ["sharded", "full"])
def test_settings_of_an_optimizer_may_be_infinite(run, kind):
    lamb = {"opt": "timm/lamb", "opt_kwargs": {"max_grad_norm": float("inf")}, "fsdp_checkpoint": kind}
    run(steps=2, **lamb)
    assert run(resume="latest", **lamb).steps == 6


@pytest.mark.parametrize("counted", [float("inf"), 10**400], ids=["infinity", "ten to 400"])
def test_a_count_that_is_not_finite_is_refused_by_name(run, counted):
    first = run(opt="timm/lamb", steps=2)
    path = newest(first) / "state.pt"
    state = torch.load(path, weights_only=True)
    for group in state["optimizer"]["param_groups"]:
        group["step"] = counted
    torch.save(state, path)
    with pytest.raises(ValueError, match="has step = .* in a group, where a finite number should be"):
        run(opt="timm/lamb", resume="latest")


@pytest.mark.slow
def test_an_optimizer_that_draws_continues_its_draws(run):
    kron = {"opt": "timm/kron", "fsdp_checkpoint": "full"}
    whole = run(name="whole", steps=90, **kron)
    run(steps=30, **kron)
    assert same_weights(run(steps=90, resume="latest", **kron).model, whole.model)


def test_an_optimizer_whose_state_cannot_be_sharded_is_refused_after_its_first_step(run):
    steps = []
    with pytest.raises(ValueError, match="keeps a list in 'Q' of .*; use fsdp_checkpoint 'full', or another opt"):
        run([Every(1, lambda model: steps.append(1))], opt="timm/kron")
    assert not steps


def test_training_goes_on_while_a_checkpoint_is_written_and_the_next_one_waits(run, monkeypatch):
    trained_on, writing, most = threading.Event(), [], []
    write = dcp_storage.write_parts

    def slow(path, *arguments):
        writing.append(path)
        most.append(len(writing))
        in_time = trained_on.wait(20)
        writing.remove(path)
        assert in_time, "training waited"
        return write(path, *arguments)

    monkeypatch.setattr(dcp_storage, "write_parts", slow)
    step = iter(range(1, 7))
    result = run([Every(1, lambda model: trained_on.set() if next(step) == 3 else None)], save_every_n_steps=2)

    assert result.steps == 6 and set(most) == {1}
    assert load(newest(result))["step"] == 6


def test_ctrl_c_waits_for_the_checkpoint_that_it_names(run, monkeypatch):
    write = dcp_storage.write_parts
    monkeypatch.setattr(dcp_storage, "write_parts", lambda *a: (threading.Event().wait(0.3), write(*a))[1])

    with pytest.raises(TrainingInterrupted) as stopped:
        run([Every(2, lambda model: os.kill(os.getpid(), signal.SIGINT))])

    assert stopped.value.checkpoint.name == "step_2"
    assert load(stopped.value.checkpoint)["step"] == 2


def test_a_checkpoint_that_could_not_be_written_ends_the_run_and_the_one_before_is_whole(run, monkeypatch):
    write = dcp_storage.write_parts

    def full_disk(path, *arguments):
        if path.parent.parent.joinpath("step_2").exists():
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return write(path, *arguments)

    monkeypatch.setattr(dcp_storage, "write_parts", full_disk)
    with pytest.raises(OSError, match="step_4: .*No space left.*step_2 is whole.*--resume latest"):
        run(save_every_n_steps=2, steps=8, save_frequency=0, save_most_recent=False)

    monkeypatch.undo()
    resumed = run(steps=8, resume="latest")
    assert resumed.steps == 8 and not any(name.startswith(".") for name in names(resumed))


def test_weights_that_are_not_finite_are_not_written(run):
    def poison(model):
        with torch.no_grad():
            model.logit_scale.fill_(torch.nan)

    with pytest.raises(NonFiniteWeights, match="step 2, so it was not saved"):
        run([Every(2, poison)], save_every_n_steps=2, name="poisoned")


@pytest.mark.parametrize(
    "changes,kept",
    [
        ({}, ["epoch_1", "epoch_2", "epoch_3"]),
        ({"save_total_limit": 2}, ["epoch_3", "step_8"]),
        ({"save_total_limit": 3}, ["epoch_2", "epoch_3", "step_8"]),
        ({"save_frequency": 0}, ["step_9"]),
        ({"delete_previous_checkpoint": True, "save_every_n_steps": 0}, ["epoch_3"]),
        ({"save_total_limit": 2, "fsdp_checkpoint": "full"}, ["epoch_2.pt", "epoch_3.pt", "epoch_latest.pt"]),
    ],
)
def test_so_many_checkpoints_are_kept(run, changes, kept):
    assert names(run(**{"steps": 9, "save_every_n_steps": 2, **changes})) == kept


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def remove(path):
    path.unlink()


@pytest.mark.parametrize("file", ["rank_0.safetensors", "index.json", "state.pt"])
@pytest.mark.parametrize("damage", [flip, *(pytest.param(each, marks=pytest.mark.slow) for each in (cut, remove))])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(run, file, damage):
    first = run()
    folder = first.directory / "checkpoints"
    damage(folder / "epoch_2" / file)

    with pytest.raises(ValueError, match=f"epoch_2.*({file}|missing|damaged)"):
        run(resume=str(folder / "epoch_2"))
    resumed = run(resume="latest")

    assert "epoch_1, because a checkpoint cannot be used" in (first.directory / "out.log").read_text()
    assert same_weights(first.model, resumed.model)
    assert load(folder / "epoch_2")["step"] == 6


def test_a_checkpoint_whose_writer_was_killed_has_no_name_and_is_removed(run):
    folder = run(steps=4).directory / "checkpoints"
    for place in (folder, folder / "step_4"):
        (place / ".writing.elsewhere.1.00000000.tmp").mkdir()

    result = run(steps=6, resume="latest", save_total_limit=5)

    assert "from step 4 to step 6 on cpu" in (result.directory / "out.log").read_text()
    assert names(result) == ["epoch_1", "epoch_2", "step_4"]
    assert not list(folder.rglob(".writing*"))


def test_a_whole_checkpoint_that_was_copied_into_the_run_is_used_and_kept(run, tmp_path):
    folder = run(steps=4).directory / "checkpoints"
    shutil.copytree(folder, tmp_path / "copy")
    run(steps=5, resume="latest", save_total_limit=5)
    shutil.move(folder / "step_5", tmp_path / "copy")
    shutil.rmtree(folder)
    shutil.move(tmp_path / "copy", folder)

    result = run(steps=6, resume="latest", save_total_limit=5)

    assert "from step 5 to step 6 on cpu" in (result.directory / "out.log").read_text()
    assert "step_5" in names(result)


@pytest.fixture
def stranger(tmp_path):
    """A pickle that creates a file when it is executed, and that file."""
    made = tmp_path / "executed"
    return pickle.dumps({"epoch": 1, "step": 99, "x": MakesFile(made)}), made


@pytest.mark.parametrize("file", ["state.pt", ".metadata", "rank_0.safetensors", "index.json"])
def test_nothing_in_a_checkpoint_is_executed(run, stranger, tmp_path, file, capsys):
    content, made = stranger
    result = run(steps=3, save_frequency=0)
    path = newest(result)
    (path / file).write_bytes(content)

    if file == ".metadata":  # torch's own index, which is not read
        assert run(steps=4, resume="latest").steps == 4
    else:
        for resume in ("latest", str(path)):
            with pytest.raises(ValueError, match=file):
                run(steps=4, resume=resume)
    main(["convert", str(path), str(tmp_path / "converted")])

    assert not made.exists()


def test_an_index_cannot_lead_out_of_its_directory_or_ask_for_more_memory_than_its_files_have(run, tmp_path):
    path = newest(run(steps=3))
    whole = json.loads((path / "index.json").read_text())["content"]
    shutil.copy(path / "rank_0.safetensors", path.parent / "rank_0.safetensors")

    for change in ("file", "size"):
        content = json.loads(json.dumps(whole))
        for entry in content["tensors"].values():
            if change == "file":
                entry["parts"][0][2] = "../rank_0.safetensors"
            elif entry["shape"]:
                entry["shape"][0] = entry["parts"][0][1][0] = 10**12
        (path / "index.json").write_text(json.dumps({"crc32": shard_files._crc_of(content), "content": content}))
        with pytest.raises(ValueError, match=r"not the name of a file|bytes cannot be in rank_0.safetensors"):
            load(path)


def some_weight(content):
    return next(name for name, entry in content["tensors"].items() if name.startswith("model.") and entry["shape"])


def overlapping(content):
    """Two halves of a weight, both the first one."""
    (offsets, shape, file) = content["tensors"][some_weight(content)]["parts"][0]
    half = [shape[0] // 2, *shape[1:]]
    content["tensors"][some_weight(content)]["parts"] = [[offsets, half, file]] * 2


def infinite(content):
    content["files"]["rank_0.safetensors"]["size"] = float("inf")


def without_a_moment(content):
    del content["tensors"][next(name for name in content["tensors"] if name.endswith("exp_avg_sq"))]


@pytest.mark.parametrize(
    ("change", "message"),
    [(overlapping, "overlap"), (infinite, "inf"), (without_a_moment, "lacks optimizer..*exp_avg_sq")],
)
def test_an_index_that_is_wrong_in_itself_is_refused_by_name(run, change, message):
    first = run()
    path = newest(first)
    content = json.loads((path / "index.json").read_text())["content"]
    change(content)
    (path / "index.json").write_text(json.dumps({"crc32": shard_files._crc_of(content), "content": content}))

    with pytest.raises(ValueError, match=message):
        run(resume=str(path), steps=9)


def test_deep_json_is_damage_and_no_traceback(run):
    first = run()
    (first.directory / "checkpoints" / "epoch_2" / "index.json").write_text("[" * 200_000)

    assert same_weights(first.model, run(resume="latest").model)


def test_convert_makes_a_model_directory_of_either_kind_of_checkpoint(run, named_model, tmp_path, capsys):
    for kind in ("sharded", "full"):
        result = run(name=kind, moe=MoEConfig.clip_up(num_experts=2), model=named_model, fsdp_checkpoint=kind)
        path = newest(result) if kind == "sharded" else result.directory / "checkpoints" / "epoch_latest.pt"

        assert main(["convert", str(path), str(tmp_path / kind)]) == 0

        made, _, _ = clipup.create_model_and_transforms(str(tmp_path / kind))
        assert same_weights(made, result.model)
    files = [sorted(file.name for file in (tmp_path / kind).iterdir()) for kind in ("sharded", "full")]
    assert files[0] == files[1] == ["README.md", "open_clip_config.json", "open_clip_model.safetensors"]


def test_convert_refuses_more_layers_than_the_weights_can_have(run, tmp_path, capsys):
    path = newest(run(steps=3))
    content = json.loads((path / "index.json").read_text())["content"]
    content["configs"]["model_cfg"] = {"embed_dim": 16, "vision_cfg": {"layers": 10**7}, "text_cfg": {}}
    (path / "index.json").write_text(json.dumps({"crc32": shard_files._crc_of(content), "content": content}))
    assert main(["convert", str(path), str(tmp_path / "out")]) == 2
    assert "vision_cfg has 10000000 layers, but there are" in capsys.readouterr().err


def test_convert_refuses_what_it_cannot_convert(run, tmp_path, capsys):
    result = run(steps=3)
    out = str(tmp_path / "out")

    for path, said in {
        newest(result): "does not say which model it is of; pass --model",
        result.directory: "not the directory of a sharded checkpoint; expected epoch_K or step_N",
        tmp_path / "nothing.pt": "there is no file",
    }.items():
        assert main(["convert", str(path), out]) == 2
        assert said in capsys.readouterr().err
