"""A plan's bytes are those that real ranks hold, send and save in a step."""

import functools
import json
from collections import defaultdict

import pytest
import tiny_parallel
from measured_steps import measure
from rank_processes import on_ranks
from tiny_parallel import DROPLESS

from clipup.plan import Subject
from clipup.plan.activations import ForwardPass
from clipup.plan.memory import expert_parallel_bytes, optimizer_bytes
from clipup.plan.traffic import traffic
from clipup.train import TrainOptions
from clipup.train.optimizer.locks import lock_parts

SPREAD = {
    "replicated": {},
    "fsdp": {"fsdp": True},
    "kept gathered": {"fsdp": True, "fsdp_no_reshard_after_forward": True},
    "ep": {"ep": 2},
    "fsdp and ep": {"fsdp": True, "ep": 2},
}
OF_TWO = {
    **{f"sparse, {name}": (DROPLESS, how) for name, how in SPREAD.items()},
    "dense, fsdp": (None, {"fsdp": True}),
    "sigmoid loss": (None, {"siglip": True}),
    "accumulated": (DROPLESS, {"fsdp": True, "ep": 2, "accum_freq": 2}),
    "accumulated, kept gathered": (None, {"fsdp": True, "accum_freq": 2, "fsdp_no_reshard_after_forward": True}),
    "checkpointed": (DROPLESS, {"fsdp": True, "ep": 2, "grad_checkpointing": True}),
    "fsdp in bfloat16": (DROPLESS, {"fsdp": True, "precision": "amp_bf16"}),
    "shared expert, fsdp and ep in bfloat16": (
        {**DROPLESS, "shared_expert": True},
        {"fsdp": True, "ep": 2, "precision": "amp_bf16"},
    ),
    "image tower locked": (DROPLESS, {"lock_image": True}),
    "text tower locked": (DROPLESS, {"lock_text": True}),
    "selection bias": (
        {**DROPLESS, "selection_bias": "sign", "load_weight": 0.0, "importance_weight": 0.0},
        {"fsdp": True},
    ),
    "checkpointed in bfloat16": (DROPLESS, {"fsdp": True, "grad_checkpointing": True, "precision": "amp_bf16"}),
}
OF_FOUR = {
    "hybrid": (None, {"fsdp": True, "fsdp_replicas": 2}),
    "hybrid and ep": (DROPLESS, {"fsdp": True, "fsdp_replicas": 2, "ep": 2}),
    "in bfloat16, more ranks than experts": (
        {**DROPLESS, "num_experts": 2},
        {"fsdp": True, "precision": "amp_bf16"},
    ),
}
CASES = {2: OF_TWO, 4: OF_FOUR}
QUICK = ("shared expert, fsdp and ep in bfloat16",)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A function of a number of ranks and a case: what each rank measured. The quick cases share a run, and so do all
    others of as many ranks."""

    @functools.cache
    def of_all(count, quick):
        out = tmp_path_factory.mktemp(f"ranks-{count}")
        cases = {name: case for name, case in CASES[count].items() if (name in QUICK) == quick}
        on_ranks(out, count, measure, out, cases)
        return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(count)]

    return lambda count, name: [results[name] for results in of_all(count, name in QUICK)]


def subject_and_options(count, name):
    moe, given = CASES[count][name]
    options = TrainOptions.flat(device="cpu", **given)
    pairs = tiny_parallel.GLOBAL_BATCH // count // options.step.accum_freq
    planned = TrainOptions.flat(device="cpu", batch_size=pairs, **given)
    model = tiny_parallel.model(moe, options.loss.siglip)
    lock_parts(model, options.trained_parts)
    return Subject(model, options.precision_on("cpu")), planned


every_case = pytest.mark.parametrize(
    ("count", "name"),
    [
        pytest.param(count, name, marks=[] if name in QUICK else pytest.mark.slow)
        for count, cases in CASES.items()
        for name in cases
    ],
)


@every_case
def test_ranks_hold_and_send_the_planned_bytes(measured, count, name):
    subject, options = subject_and_options(count, name)
    parts, ranks = subject.units(options, count), measured(count, name)
    assert ranks[0]["parameters"] == sum(unit.shard_bytes for unit in parts)
    assert ranks[0]["gradients"] == sum(unit.trained_bytes for unit in parts)
    assert ranks[0]["optimizer"] == optimizer_bytes(parts)
    planned = defaultdict(float)
    for transfer in traffic(subject, options, count):
        planned[transfer.collective] += transfer.payload
    kinds = ranks[0]["sent"]  # ranks get different numbers of rows
    assert {kind: sum(each["sent"][kind] for each in ranks) / count for kind in kinds} == dict(planned)


@pytest.mark.slow
def test_ranks_save_no_copies_of_weights_that_are_gathered_in_bfloat16(measured):
    subject, options = subject_and_options(2, "fsdp in bfloat16")
    (saved,) = {result["saved"] for result in measured(2, "fsdp in bfloat16")}
    counted = [
        ForwardPass(subject.model, "amp_bf16", "cuda", options.step.batch_size, False, blocks_in_half=in_half).saved
        for in_half in (True, False)
    ]
    assert saved == pytest.approx(counted[0], rel=0.02)
    assert saved < 0.95 * counted[1]


@pytest.mark.slow
def test_expert_parallel_layers_save_the_planned_rows(measured):
    subject, options = subject_and_options(2, "sparse, ep")
    travelling = expert_parallel_bytes(subject, options.changed(grad_checkpointing=True)) / 2
    planned = expert_parallel_bytes(subject, options) - travelling
    saved = [sum(result["saved"] for result in measured(2, f"sparse, {name}")) / 2 for name in ("ep", "replicated")]
    assert saved[0] - saved[1] == pytest.approx(planned, rel=0.1)
