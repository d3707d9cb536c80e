"""The table of docs/plan.md is what clipup.plan computes."""

from __future__ import annotations

import pytest
from documents import ROOT, tables

from clipup.moe.config import MoEConfig
from clipup.plan import Cluster, Plan, Subject, card, plan, propose
from clipup.train import TrainOptions

PAGE = ROOT / "docs" / "plan.md"
SETTINGS = {
    "DDP": {},
    "DDP, checkpointing": {"grad_checkpointing": True},
    "DDP, 4 batches accumulated": {"accum_freq": 4},
    "fsdp": {"fsdp": True},
    "fsdp, 8 replicas": {"fsdp": True, "fsdp_replicas": 8},
    "fsdp, ep 8": {"fsdp": True, "ep": 8},
    "fsdp, ep 8, checkpointing": {"fsdp": True, "ep": 8, "grad_checkpointing": True},
}
MODELS = {"B/16": "ViT-B-16", "L/14": "ViT-L-14"}
BATCH, SAMPLES = 32768, 10**9


def row(model: str, setting: str, made: Plan, cluster: Cluster) -> list[str]:
    hours = SAMPLES / BATCH * made.time.total / 3600 * cluster.gpus
    numbers = [f"{made.memory.bytes / 1e9:.1f}", "yes" if made.fits else "no", f"{made.wire / 1e9:.1f}"]
    return [model, setting, *numbers, f"{1e3 * made.time.total:.0f}", f"{hours:.0f}"]


def rows(model: str) -> list[list[str]]:
    cluster = Cluster(64, card("h100"))
    subject = Subject.create(MODELS[model], MoEConfig.clip_up())
    return [
        row(model, setting, plan(subject, TrainOptions(**options), cluster, BATCH), cluster)
        for setting, options in SETTINGS.items()
    ]


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_the_table_is_what_the_plan_computes(model):
    (shown,) = (table for table in tables(PAGE) if table[0][0] == "model")
    assert [cells for cells in shown[1:] if cells[0] == model] == rows(model)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "proposed"), [("B/16", {}), ("L/14", {"grad_checkpointing": True})])
def test_the_proposal_is_the_one_that_the_text_names(model, proposed):
    cluster = Cluster(64, card("h100"))
    subject = Subject.create(MODELS[model], MoEConfig.clip_up())
    best = propose(subject, TrainOptions(), cluster, BATCH)
    assert best is not None
    gathered_once = TrainOptions(fsdp=True, fsdp_no_reshard_after_forward=True, **proposed)
    assert best.setting() == plan(subject, gathered_once, cluster, BATCH).setting()
