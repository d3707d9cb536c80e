"""The table of docs/plan.md is what clipup.plan computes."""

import pytest
from documents import ROOT, tables

from clipup.moe.config import MoEConfig
from clipup.plan import Cluster, Subject, card, plan, propose
from clipup.train import TrainOptions

PAGE = ROOT / "docs" / "plan.md"
SETTINGS = {
    "DDP": {},
    "DDP, checkpointing": {"grad_checkpointing": True},
    "fsdp": {"fsdp": True},
    "fsdp, ep 8, checkpointing": {"fsdp": True, "ep": 8, "grad_checkpointing": True},
}
BATCH, SAMPLES = 32768, 10**9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("short", "model", "proposed"), [("B/16", "ViT-B-16", {}), ("L/14", "ViT-L-14", {"grad_checkpointing": True})]
)
def test_the_table_and_the_proposal_are_what_the_plan_computes(short, model, proposed):
    cluster, subject = Cluster(64, card("h100")), Subject.create(model, MoEConfig.clip_up())
    (shown,) = (table for table in tables(PAGE) if table[0][0] == "model")
    expected = []
    for setting, options in SETTINGS.items():
        made = plan(subject, TrainOptions.flat(**options), cluster, BATCH)
        hours = SAMPLES / BATCH * made.time.total / 3600 * cluster.gpus
        numbers = [f"{made.memory.bytes / 1e9:.1f}", "yes" if made.fits else "no", f"{made.wire / 1e9:.1f}"]
        expected.append([short, setting, *numbers, f"{1e3 * made.time.total:.0f}", f"{hours:.0f}"])
    assert [cells for cells in shown[1:] if cells[0] == short] == expected

    gathered_once = TrainOptions.flat(fsdp=True, fsdp_no_reshard_after_forward=True, **proposed)
    best = propose(subject, TrainOptions(), cluster, BATCH)
    assert best.setting() == plan(subject, gathered_once, cluster, BATCH).setting()
