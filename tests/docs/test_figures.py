import runpy

import torch
from documents import ROOT

from clipup_kernels import reference

PROGRAM = ROOT / "docs" / "figures" / "expert_mlp.py"


def test_figure_is_what_its_program_draws():
    assert PROGRAM.with_suffix(".svg").read_text("utf-8") == runpy.run_path(str(PROGRAM))["figure"]()


def test_rows_are_drawn_in_the_order_of_dispatch():
    program = runpy.run_path(str(PROGRAM))
    experts = torch.tensor(program["CHOICES"], dtype=torch.int32)
    plan = reference.dispatch(experts, num_experts=3)
    rows = [(pair // 2, int(experts[pair // 2, pair % 2])) for pair in plan.choice_of_row.tolist()]
    assert program["rows_in_expert_order"]() == rows
