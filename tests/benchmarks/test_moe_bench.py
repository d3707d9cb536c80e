"""The benchmark programs on tiny layers: what they promise about routing, ratios, files and charts."""

import csv
import runpy
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import baselines
import gemm_peak
import harness
import moe_bench
import peers
import plot
import pytest
import torch
from moe_layer import Case, check_loads, expert_loads, make_weights, make_x, without_close_calls

BENCHMARKS = Path(moe_bench.__file__).parent
TINY = ["--shapes", "48x16x32", "--threads", "1", "--seconds", "0.05", "--rounds", "2"]
SVG = "{http://www.w3.org/2000/svg}"
COLUMNS = (
    "device,dtype,threads,tokens,d_model,d_hidden,experts,top_k,routing,pass,impl,median_ms,p20_ms,p80_ms,tflops,"
    "ratio_to_dense_k,peak_share,saved_mb,peak_mb,commit,torch,triton"
)


@pytest.fixture(autouse=True)
def small_and_restored(monkeypatch):
    """Small products for the peak; torch's threads as they were."""
    monkeypatch.setattr(gemm_peak, "SHAPES", ((64, 32, 64),))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def without_transformers(monkeypatch):
    """Spares the seconds that its import takes."""
    monkeypatch.setattr(baselines, "package_version", lambda name: None)


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def parsed(*argv, training=False):
    return moe_bench.parse("", training, list(argv))


@pytest.mark.parametrize("training", [False, True])
def test_a_run_writes_every_column_and_finite_numbers(tmp_path, capsys, training, without_transformers):
    path = tmp_path / "out" / "rows.csv"
    assert moe_bench.main("", training, [*TINY, "--routing", "balanced", "skewed", "--csv", str(path)]) == 0
    assert path.read_text().splitlines()[0] == COLUMNS
    rows = rows_of(path)
    impls = {"dense_1", "dense_k", "loop", "loop_unbind", "grouped_mm", "clipup"}
    assert {row["impl"] for row in rows} == impls | (set() if training else {"dense_k_engine", *baselines.PREPARED})
    assert {(row["dtype"], row["routing"]) for row in rows} == {
        (dtype, routing) for dtype in ("fp32", "bf16") for routing in ("balanced", "skewed")
    }
    for row in rows:
        assert row["pass"] == ("fwd_bwd" if training else "fwd")
        assert all(float(row[name]) > 0 for name in ("median_ms", "tflops", "ratio_to_dense_k"))
        assert float(row["peak_share"]) >= 0  # of three decimals: a slow candidate's may round to 0 on a busy machine
        assert float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert row["ratio_to_dense_k"] == "1.000" or row["impl"] != "dense_k"
    assert "ratio_to_dense_k" in capsys.readouterr().out


def test_ratios_are_taken_pair_by_pair_after_two_untimed_rounds():
    calls = []

    def sleeper(name, seconds):
        return lambda: (calls.append(name), time.sleep(seconds))

    runs = {"base": sleeper("base", 0.004), "slow": sleeper("slow", 0.012)}
    timings = harness.alternate(runs, "base", seconds=0, min_rounds=3)
    assert calls == ["base", "slow"] * 2 + ["base", "base", "base", "slow"] * 3
    assert timings["base"].ratio == 1
    assert 1.5 < timings["slow"].ratio < 6
    assert timings["slow"].p20_ms <= timings["slow"].median_ms <= timings["slow"].p80_ms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [Case(1576, 64, 32, 8), Case(1576, 64, 32, 64), Case(1, 16, 16, 3)])
def test_skewed_routing_gives_one_expert_exactly_half_of_the_rows(case, dtype):
    case = case._replace(routing="skewed")
    x, weights = make_x(case.tokens, case.d_model, dtype), make_weights(case, 2, dtype)
    loads = expert_loads(x, weights)
    assert loads[0] == case.tokens and sum(loads) == 2 * case.tokens
    if case.tokens > 1000:
        assert 0 < min(loads) and max(loads[1:]) < 2.5 * case.tokens / (case.experts - 1)
    check_loads(case, x, weights)


def test_balanced_routing_gives_no_expert_much_more_than_its_share():
    case = Case(1576, 64, 32)
    loads = expert_loads(make_x(case.tokens, case.d_model, torch.float32), make_weights(case, 2, torch.float32))
    assert sum(loads) == 2 * case.tokens and max(loads) < 1.5 * sum(loads) / case.experts


def test_a_router_that_does_not_skew_is_refused():
    case = Case(64, 16, 16, 4, "skewed")
    weights = make_weights(case._replace(routing="balanced"), 2, torch.float32)
    with pytest.raises(AssertionError, match="not 64"):
        check_loads(case, make_x(64, 16, torch.float32), weights)


def test_a_wrong_implementation_is_not_timed(monkeypatch):
    monkeypatch.setitem(baselines.SPARSE, "loop", lambda x, w: baselines.loop(x, w) * 1.01)
    with pytest.raises(SystemExit, match="loop in fp32 is off by"):
        moe_bench.main("", False, [*TINY, "--impl", "loop", "--dtype", "fp32"])


@pytest.mark.parametrize("training", [False, True])
def test_transformers_experts_follow_the_oracle(training):
    if why := baselines.refusal("hf_grouped_mm", training, "cpu"):
        pytest.skip(why)
    assert wrong("hf_grouped_mm", training) == [{}, {}]


def wrong(impl, training):
    """What is wrong with an implementation, by type."""
    found = []
    for dtype in ("fp32", "bf16"):
        timed = baselines.candidates([impl], Case(48, 16, 32), 2, moe_bench.DTYPES[dtype], "cpu")
        found.append(moe_bench.check(timed, dtype, "cpu", training))
    return found


@pytest.mark.parametrize("training", [False, True])
def test_the_loop_over_sorted_rows_follows_the_oracle(training):
    assert wrong("loop_sorted", training) == [{}, {}]


def test_tokens_with_close_calls_are_left_out_of_the_comparison():
    weights = make_weights(Case(1, 16, 16, 4), 2, torch.float32)
    x = make_x(500, 16, torch.float32)
    kept = without_close_calls(x, weights, gap=0.05)
    assert 250 < len(kept) < 500
    logits = (kept @ weights.router.T).sort(descending=True).values
    assert (logits[:, 1] - logits[:, 2]).min() > 0.0499
    everyone = make_weights(Case(1, 16, 16, 2), 2, torch.float32)
    assert len(without_close_calls(x, everyone, gap=0.05)) == 500


def test_what_fails_can_be_left_out_but_never_this_project(monkeypatch, tmp_path, capsys):
    def broken(x, w):
        raise RuntimeError("no kernel image")

    arguments = [*TINY, "--impl", "loop", "clipup", "--dtype", "fp32", "--csv", str(tmp_path / "rows.csv")]
    monkeypatch.setitem(baselines.SPARSE, "loop", broken)
    with pytest.raises(SystemExit, match="loop in fp32 fails: RuntimeError: no kernel image; nothing was timed"):
        moe_bench.main("", False, arguments)
    assert moe_bench.main("", False, [*arguments, "--skip-failing"]) == 0
    assert "left out: loop in fp32 fails" in capsys.readouterr().err
    assert [row["impl"] for row in rows_of(tmp_path / "rows.csv")] == ["clipup"]
    monkeypatch.setitem(baselines.SPARSE, "clipup", broken)
    with pytest.raises(SystemExit, match="clipup in fp32 fails"):
        moe_bench.main("", False, [*arguments, "--skip-failing"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_cuda_is_refused_by_name_where_there_is_none():
    with pytest.raises(SystemExit, match="--device cuda: torch finds no CUDA GPU"):
        moe_bench.main("", False, [*TINY, "--device", "cuda"])


def test_a_gpu_is_compared_with_its_own_loop_and_the_peers_that_are_there(monkeypatch, without_transformers):
    monkeypatch.setattr(baselines, "missing_packages", lambda peer: [] if peer == "scattermoe" else ["it"])
    common = ["dense_1", "dense_k", "loop_unbind", "loop_sorted", "grouped_mm", "clipup"]
    assert parsed("--device", "cuda").impl == [*common, "scattermoe"]
    assert set(parsed().impl) == {*common, "loop", "dense_k_engine", *baselines.PREPARED} - {"loop_sorted"}


def test_every_peer_says_what_it_needs():
    assert set(peers.PACKAGES) == set(peers.PEERS)
    for peer in peers.PEERS:
        if missing := peers.missing_packages(peer):
            assert baselines.refusal(peer, False, "cuda") == f"needs {' and '.join(missing)}"


def test_the_dense_baseline_writes_the_gradients_of_one_expert_only():
    candidate = baselines.candidates(["dense_k"], Case(8, 16, 32), 2, torch.float32, "cpu")["dense_k"]
    gradients = candidate.runner(training=True)()
    assert [list(gradient.shape) for gradient in gradients] == [[16, 16], [32, 16], [32], [16, 32], [16]]


def test_the_peak_is_the_best_rate_so_far_of_a_type_and_threads():
    peak = gemm_peak.GemmPeak("cpu")
    peak.measure("fp32", torch.float32, 1)
    assert peak.best["fp32", 1] > 0
    peak.best["fp32", 1] = 1e6
    peak.measure("fp32", torch.float32, 1)
    assert peak.best == {("fp32", 1): 1e6}
    assert peak.share({"tflops": "5e5", "dtype": "fp32", "threads": 1}) == 0.5


def test_suites():
    forward = {(case.tokens, case.d_model, case.d_hidden) for case in parsed().cases}
    both = {(1576, 768, 3072), (616, 512, 2048)}
    assert forward == both | {(197, 768, 3072)}
    training = parsed(training=True)
    assert {case[:3] for case in training.cases} == both
    assert training.threads == [torch.get_num_threads()]
    assert (training.rounds, training.seconds) == (3, 2)
    full = parsed("--suite", "full")
    assert (full.rounds, full.seconds, parsed("--suite", "full", "--rounds", "9").rounds) == (5, 5, 9)
    assert len(full.cases) == len(set(full.cases)) == 8
    assert set(moe_bench.FULL) <= set(full.cases)
    assert full.threads == sorted({1, torch.get_num_threads()})


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--shapes", "12x"], "TOKENSxD_MODELxD_HIDDEN"),
        (["--top-k", "9"], "between 1 and"),
        (["--routing", "skewed", "--top-k", "1"], "half of the rows"),
        (["--rounds", "1"], "2 or more"),
        (["--impl", "hf_grouped_mm"], "needs transformers 5.4"),
        (["--impl", "sonicmoe"], "sonicmoe runs on CUDA devices only"),
        (["--device", "gpu"], "invalid choice: 'gpu'"),
    ],
)
def test_wrong_options_are_named(argv, message, capsys, without_transformers):
    with pytest.raises(SystemExit):
        parsed(*argv)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("impl", ["dense_k_engine", "clipup_prepared", "dense_k_prepared"])
def test_training_refuses_what_has_no_derivative(capsys, impl):
    with pytest.raises(SystemExit):
        parsed("--impl", impl, training=True)
    assert f"{impl} has no derivative" in capsys.readouterr().err


def test_prepared_weights_are_not_for_a_gpu(capsys):
    with pytest.raises(SystemExit):
        parsed("--impl", "clipup_prepared", "--device", "cuda")
    assert "clipup_prepared runs on CPUs only" in capsys.readouterr().err


@pytest.mark.parametrize("program", ["moe_forward.py", "moe_training.py", "plot.py"])
def test_help(program, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(BENCHMARKS / program), run_name="__main__")
    assert f"python benchmarks/{program}" in capsys.readouterr().out


def plotted(tmp_path, rows):
    tmp_path.mkdir(exist_ok=True)
    source, out = tmp_path / "rows.csv", tmp_path / "chart.svg"
    harness.write_csv(source, rows)
    assert plot.main([str(source), "--out", str(out)]) == 0
    return out


def plot_row(**changes):
    row = dict.fromkeys(COLUMNS.split(","), "1") | {"dtype": "fp32", "routing": "balanced", "pass": "fwd"}
    return row | {"impl": "clipup", "ratio_to_dense_k": "0.9"} | changes


def test_the_chart_shows_every_implementation_type_and_case(tmp_path):
    rows = [
        plot_row(dtype=dtype, impl=impl, routing=routing, **{"pass": name})
        for dtype in ("fp32", "bf16")
        for impl in baselines.IMPLEMENTATIONS
        for routing in ("balanced", "skewed")
        for name in ("fwd", "fwd_bwd")
    ]
    out = plotted(tmp_path, rows)
    tree = ElementTree.parse(out)
    lines = [node for node in tree.iter(f"{SVG}g") if node.get("id", "").partition(":")[0] in plot.IMPLEMENTATIONS]
    assert sum(len(list(line.iter(f"{SVG}use"))) for line in lines) == len(rows) - 8  # dense_k is the line at 1
    words = {node.text for node in tree.iter(f"{SVG}text")}
    assert {"fp32", "bf16", "1", "T=1, 1/1, E=1, K=1, skewed"} <= words
    assert set(baselines.IMPLEMENTATIONS) - {"dense_k"} <= words
    assert out.stat().st_size < 100_000
    assert tree.getroot().get("role") == "img" and tree.find(f"{SVG}title").text == plot.TITLE


def test_the_same_rows_give_the_same_chart(tmp_path):
    first, second = (plotted(tmp_path / name, [plot_row()]).read_bytes() for name in ("a", "b"))
    assert first == second


def test_the_chart_reads_files_without_a_routing_column(tmp_path):
    row = plot_row()
    del row["routing"]
    assert "E=1, K=1<" in plotted(tmp_path, [row]).read_text()


def test_a_file_without_ratios_is_refused(tmp_path, capsys):
    harness.write_csv(tmp_path / "models.csv", [{"model": "ViT-B-16"}])
    with pytest.raises(SystemExit):
        plot.main([str(tmp_path / "models.csv"), "--out", str(tmp_path / "chart.svg")])
    assert "no rows" in capsys.readouterr().err
