"""The benchmark of transformers' experts."""

import csv

import pytest
import transformers
import transformers_experts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

pytestmark = pytest.mark.usefixtures("threads_restored")


def test_every_implementation_has_a_row_for_each_pass(tmp_path, monkeypatch, capsys):
    config = transformers.MixtralConfig(hidden_size=32, intermediate_size=48, num_local_experts=4)
    monkeypatch.setitem(transformers_experts.MODELS, "mixtral", lambda: (MixtralExperts(config), 2))
    path = tmp_path / "rows.csv"
    short = ["--models", "mixtral", "--dtypes", "fp32", "bf16", "--tokens", "5", "--seconds", "0.01", "--rounds", "2"]

    assert transformers_experts.main([*short, "--csv", str(path)]) == 0

    assert "ratio_to_grouped_mm" in capsys.readouterr().out
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["dtype"], row["pass"], row["impl"]) for row in rows] == [
        (dtype, kind, impl)
        for dtype in ("fp32", "bf16")
        for kind in ("fwd", "fwd_bwd")
        for impl in ("grouped_mm", "eager", "batched_mm", "clipup")
    ]


def test_a_wrong_result_is_not_timed(monkeypatch):
    config = transformers.MixtralConfig(hidden_size=32, intermediate_size=48, num_local_experts=4)
    monkeypatch.setitem(transformers_experts.MODELS, "mixtral", lambda: (MixtralExperts(config), 2))
    monkeypatch.setattr(
        transformers_experts.clipup_kernels.integrations.transformers.moe.ALL_EXPERTS_FUNCTIONS,
        "_global_mapping",
        {
            **transformers_experts.clipup_kernels.integrations.transformers.moe.ALL_EXPERTS_FUNCTIONS._global_mapping,
            "clipup": lambda module, x, index, weights: 2 * x,
        },
    )
    with pytest.raises(SystemExit, match="clipup in bf16: error .* against eager; nothing was timed"):
        transformers_experts.main(["--models", "mixtral", "--tokens", "5"])
