"""However a model is spread over ranks, training computes what one process computes on the same global batches."""

import json

import pytest
import torch
from rank_processes import ranks
from tiny_parallel import DROPLESS, run, run_all

from clipup.train.checkpoints.format import load

CAPACITY = {"capacity_factor": 1.0}
"""A capacity of each batch, which draws whom it drops, so that one process accumulates the batches of the ranks."""

BALANCED = {**DROPLESS, "selection_bias": "z_score", "selection_bias_rate": 0.01}
CAPTIONS = {"coca_contrastive_loss_weight": 0.0}
"""A CoCa with its caption loss alone."""

SPREAD = {
    "replicated": {},
    "fsdp": {"fsdp": True},
    "ep": {"ep": 2},
    "fsdp and ep": {"fsdp": True, "ep": 2},
}
OPTIONS = {
    "": {},
    "accumulated": {"accum_freq": 2},
    "checkpointed": {"grad_checkpointing": True},
    "clipped": {"grad_clip_norm": 0.5},
    "sigmoid loss": {"siglip": True},
    "chunked loss": {"loss_chunk_size": 3},
    "chunked sigmoid loss": {"siglip": True, "loss_chunk_size": 3},
    "bfloat16": {"precision": "amp_bf16"},
    "repeated texts": {"multi_positive": True},
    "locked": {"lock_image": True, "train_only": "sparse_layers"},
    "kept gathered": {"fsdp_no_reshard_after_forward": True},
}


def _left_out(spread, option):
    """Every option is tried on the model that is divided in all ways, and on another one in turn."""
    others = [name for name in SPREAD if name != "fsdp and ep"]
    return spread != "fsdp and ep" and spread != others[list(OPTIONS).index(option) % len(others)]


def cases_of(count):
    """The runs of ``count`` ranks by name, and the names of the runs of one process that they should equal."""
    cases, same_as = {}, {}
    for spread, how in SPREAD.items():
        for option, more in OPTIONS.items():
            if "fsdp_no_reshard_after_forward" in more and not how.get("fsdp"):
                continue
            if option and (count > 2 or _left_out(spread, option)):
                continue
            cases[f"sparse, {spread}, {option}"] = (DROPLESS, {**how, **more})
            same_as[f"sparse, {spread}, {option}"] = f"sparse, {option}"
        if "ep" not in how:
            cases[f"dense, {spread}"] = (None, how)
            same_as[f"dense, {spread}"] = "dense"
        cases[f"balanced, {spread}"] = (BALANCED, how)
        same_as[f"balanced, {spread}"] = "balanced"
        cases[f"capacity, {spread}"] = (CAPACITY, how)
        same_as[f"capacity, {spread}"] = f"capacity, {count} batches"
    cases["captions"] = (None, CAPTIONS)
    same_as["captions"] = "captions"
    if count == 4:
        cases["fewer experts than shards"] = ({**DROPLESS, "num_experts": 2}, {"fsdp": True})
        same_as["fewer experts than shards"] = "two experts"
        for name, more in {"hybrid": {}, "hybrid and ep": {"ep": 2}}.items():
            cases[f"sparse, {name}"] = (DROPLESS, {"fsdp": True, "fsdp_replicas": 2, **more})
            same_as[f"sparse, {name}"] = "sparse, "
    return cases, same_as


def alone_cases(count):
    """The runs of one process."""
    cases = {f"sparse, {option}": (DROPLESS, more) for option, more in OPTIONS.items() if "fsdp" not in str(more)}
    cases["sparse, kept gathered"] = (DROPLESS, {})
    cases["two experts"] = ({**DROPLESS, "num_experts": 2}, {})
    cases |= {"dense": (None, {}), "captions": (None, CAPTIONS), "balanced": (BALANCED, {})}
    cases[f"capacity, {count} batches"] = (CAPACITY, {"accum_freq": count})
    return cases


def runs_of(count, tmp_path_factory):
    """The directory with these runs of the ranks in ``ranks`` and those of one process in ``alone``."""
    out = tmp_path_factory.mktemp(f"runs-{count}")
    cases, same_as = cases_of(count)
    with ranks(out, run_all, out / "ranks", cases, count=count) as processes:
        for name, (moe, options) in alone_cases(count).items():
            if name in same_as.values():
                run(out / "alone", name, moe, **options)
        for process in processes:
            code, error = process.ended(timeout=300)
            assert code == 0, error
    return out


def compare(out, count, name):
    """Losses, weights and moments. In bfloat16 a rounding decides which expert some tokens go to."""
    one, other = out / "alone" / cases_of(count)[1][name], out / "ranks" / name
    exact = "bfloat16" not in name
    for key in ("loss", "aux"):
        values = [
            [json.loads(line)[key] for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, other)
        ]
        assert values[1] == pytest.approx(values[0], rel=1e-4 if exact else 1e-2), key
    expected, found = (load(run / "checkpoints" / "epoch_latest.pt") for run in (one, other))
    assert list(found["state_dict"]) == list(expected["state_dict"])
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if exact else {"rtol": 0, "atol": 4e-3}
    for key, value in expected["state_dict"].items():
        torch.testing.assert_close(found["state_dict"][key], value, **tolerance, msg=lambda m, key=key: f"{key}: {m}")
    moments, others = (checkpoint["optimizer"]["state"] for checkpoint in (expected, found))
    assert list(others) == list(moments)
    if exact:
        largest = max(float(each["exp_avg"].abs().max()) for each in moments.values())
        for index, each in moments.items():
            for key, value in each.items():
                torch.testing.assert_close(others[index][key], value, rtol=1e-3, atol=1e-4 * largest)


@pytest.fixture(scope="module")
def all_runs(tmp_path_factory):
    return {count: runs_of(count, tmp_path_factory) for count in (2, 4)}


@pytest.mark.slow
@pytest.mark.parametrize(("count", "name"), [(count, name) for count in (2, 4) for name in cases_of(count)[0]])
def test_any_spread_over_two_or_four_ranks_does_what_one_process_does(all_runs, count, name):
    compare(all_runs[count], count, name)
