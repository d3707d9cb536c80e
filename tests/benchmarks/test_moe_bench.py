"""The benchmark of single layers on tiny ones: what it promises about routing, ratios, files and charts."""

import csv
import runpy
from pathlib import Path

import gemm_peak
import harness
import moe_bench
import peers
import plot
import pytest
import torch
from moe_layer import Case, check_loads, expert_loads, make_weights, make_x

TINY = ["--shapes", "48x16x32", "--seconds", "0.05", "--rounds", "1"]
PREPARED = {name for name, peer in peers.PEERS.items() if peer.weights != "plain"}
RESULTS = Path(moe_bench.__file__).parent / "results"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Small products for the peak, and none of the seconds that importing transformers takes."""
    monkeypatch.setattr(gemm_peak, "SHAPES", ((64, 32, 64),))
    here = peers.missing
    off = "transformers.integrations.moe"
    monkeypatch.setattr(peers, "missing", lambda names: [*here(names), *(name for name in names if name == off)])


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("training", [False, True])
def test_a_run_writes_every_column_and_finite_numbers(tmp_path, capsys, training):
    path = tmp_path / "out" / "rows.csv"
    assert moe_bench.main("", training, [*TINY, "--routing", "balanced", "skewed", "--csv", str(path)]) == 0
    committed = RESULTS / ("moe_training_cpu.csv" if training else "moe_forward_cpu.csv")
    assert path.read_text().splitlines()[0].startswith(committed.read_text().splitlines()[0])
    rows = rows_of(path)
    impls = {"dense_1", "dense_k", "loop_unbind", "grouped_mm", "clipup"}
    impls |= {"loop"} if training else {"dense_k_engine", *PREPARED}
    assert {(row["impl"], row["dtype"], row["routing"]) for row in rows} == {
        (impl, dtype, routing) for impl in impls for dtype in ("fp32", "bf16") for routing in ("balanced", "skewed")
    }
    for row in rows:
        assert row["pass"] == ("fwd_bwd" if training else "fwd")
        assert all(float(row[name]) > 0 for name in ("median_ms", "tflops", "ratio_to_dense_k"))
        assert float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert row["ratio_to_dense_k"] == "1.000" or row["impl"] != "dense_k"
    assert "ratio_to_dense_k" in capsys.readouterr().out


def test_ratios_are_taken_pair_by_pair_after_two_untimed_rounds(monkeypatch):
    calls = []
    monkeypatch.setattr(harness, "clock", lambda run, device: run())  # seconds: all get slower, at a ratio of 3
    runs = {
        "base": lambda: calls.append("base") or 1.0 * len(calls),
        "slow": lambda: calls.append("slow") or 3.0 * len(calls) - 3,
    }
    timings = harness.alternate(runs, "base", seconds=0, min_rounds=3)
    assert calls == ["base", "slow"] * 2 + ["base", "base", "base", "slow"] * 3
    assert (timings["base"].ratio, timings["slow"].ratio) == (1, 3)
    assert timings["slow"][:3] == (pytest.approx(33e3), pytest.approx(25.8e3), pytest.approx(40.2e3))


def test_what_fails_or_is_wrong_stops_the_run_or_is_left_out_and_marked(monkeypatch, tmp_path, capsys):
    def broken(x, w):
        raise RuntimeError("no kernel image")

    arguments = [*TINY, "--impl", "loop", "clipup", "--dtype", "fp32", "--csv", str(tmp_path / "rows.csv")]
    for function, words in ((lambda x, w: peers.loop(x, w) * 1.01, "is off by"), (broken, "fails: RuntimeError")):
        monkeypatch.setitem(peers.PEERS, "loop", peers.Peer(function))
        with pytest.raises(SystemExit, match=f"loop in fp32 {words}.*nothing was timed"):
            moe_bench.main("", False, arguments)
    assert moe_bench.main("", False, [*arguments, "--skip-failing"]) == 0
    assert "left out: loop in fp32 fails" in capsys.readouterr().err
    assert [row["impl"] for row in rows_of(tmp_path / "rows.csv")] == ["clipup"]
    ours = peers.PEERS["clipup"].function
    narrow = peers.Peer(lambda x, w: ours(x, w) if x.shape[-1] < 32 else broken(x, w))
    monkeypatch.setitem(peers.PEERS, "clipup", narrow)
    shapes = ["--shapes", "48x16x32", "48x32x32"]
    assert moe_bench.main("", False, [*arguments, *shapes, "--skip-failing"]) == 1  # the second only
    monkeypatch.setitem(peers.PEERS, "clipup", peers.Peer(broken))
    assert moe_bench.main("", False, [*arguments, "--skip-failing"]) == 1
    assert "left out: clipup in fp32 fails" in capsys.readouterr().err


@pytest.mark.parametrize("impl", ["clipup", "dense_k"])
def test_this_project_and_the_baseline_are_timed_and_marked_where_they_are_off(monkeypatch, tmp_path, capsys, impl):
    right = peers.PEERS[impl]
    monkeypatch.setitem(peers.PEERS, impl, right._replace(function=lambda x, w: right.function(x, w) * 1.01))
    arguments = [*TINY, "--impl", "dense_k", "loop", "clipup", "--dtype", "fp32", "--csv", str(tmp_path / "rows.csv")]
    with pytest.raises(SystemExit, match=f"{impl} in fp32 is off by.*nothing was timed"):
        moe_bench.main("", False, arguments)
    assert moe_bench.main("", False, [*arguments, "--skip-failing"]) == 1
    assert f"off: {impl} in fp32 is off by" in capsys.readouterr().err
    rows = {row["impl"]: row for row in rows_of(tmp_path / "rows.csv")}
    assert rows.keys() == {"dense_k", "loop", "clipup"} and all(float(row["median_ms"]) > 0 for row in rows.values())
    assert [name for name, row in rows.items() if row["off_by"]] == [impl]


def test_a_gradient_that_is_not_a_number_is_off(monkeypatch):
    def wrong(x, w):
        y = peers.loop(x, w)
        y.register_hook(lambda gradient: gradient * torch.nan)
        return y

    monkeypatch.setitem(peers.PEERS, "loop", peers.Peer(wrong))
    timed = peers.candidates(["loop"], Case(48, 16, 32), 2, torch.float32, "cpu")
    assert moe_bench.check(timed, "fp32", "cpu", True)["loop"].off_by == torch.inf


def test_the_dense_baseline_writes_the_gradients_of_one_expert_only():
    candidate = peers.candidates(["dense_k"], Case(8, 16, 32), 2, torch.float32, "cpu")["dense_k"]
    gradients = candidate.runner(training=True)()
    assert [list(gradient.shape) for gradient in gradients] == [[16, 16], [32, 16], [32], [16, 32], [16]]


def test_the_chart_shows_every_peer_but_the_baseline_and_a_new_one_without_other_colors(monkeypatch):
    monkeypatch.setitem(peers.PEERS, "new", peers.Peer(peers.loop))
    colors = runpy.run_path(plot.__file__)["COLORS"]
    assert colors.keys() == peers.PEERS.keys() - {"dense_k"}
    assert plot.COLORS.items() <= colors.items()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("impl", ["hf_grouped_mm", "loop_sorted"])
def test_peers_follow_the_oracle(impl, training):
    if impl == "hf_grouped_mm":
        pytest.importorskip("transformers")
    for dtype in ("fp32", "bf16"):
        timed = peers.candidates([impl], Case(48, 16, 32), 2, moe_bench.DTYPES[dtype], "cpu")
        assert moe_bench.check(timed, dtype, "cpu", training) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [Case(1576, 64, 32, 8), Case(1576, 64, 32, 64), Case(1, 16, 16, 3)])
def test_skewed_routing_gives_one_expert_exactly_half_of_the_rows_and_balanced_routing_none(case, dtype):
    x, weights = make_x(case.tokens, case.d_model, dtype), make_weights(case, 2, dtype)
    assert case.tokens == 1 or max(expert_loads(x, weights)) < 6.4 * case.tokens / case.experts
    skewed = case._replace(routing="skewed")
    loads = expert_loads(x, make_weights(skewed, 2, dtype))
    assert loads[0] == case.tokens and sum(loads) == 2 * case.tokens
    if case.tokens > 1:
        with pytest.raises(ValueError, match="--top-k"):
            check_loads(skewed, x, weights)


@pytest.mark.parametrize(
    ("argv", "training", "named"),
    [
        (["--shapes", "12x"], False, "--shapes"),
        (["--impl", "hf_grouped_mm"], False, "transformers"),
        (["--impl", "sonicmoe"], False, "sonicmoe"),
        (["--impl", "clipup_prepared", "--device", "cuda"], False, "clipup_prepared"),
        (["--impl", "dense_k_engine"], True, "dense_k_engine"),
    ],
)
def test_wrong_options_are_named(argv, training, named, capsys):
    with pytest.raises(SystemExit):
        moe_bench.parse("", training, argv)
    assert named in capsys.readouterr().err
