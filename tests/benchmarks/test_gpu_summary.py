"""Pass or fail against the numbers that the GPU kernels have to show, on made-up measurements."""

import gpu_summary
import pytest
from harness import write_csv

STRONG = {"grouped_mm_fused": 1.4, "quack": 1.25}
FWD = {"dense_k": 1.0, "loop_unbind": 1.6, "loop_sorted": 1.2, "clipup": 0.95} | STRONG
FWD_BWD = {"dense_k": 1.0, "loop_unbind": 1.9, "loop_sorted": 1.3, "clipup": 1.02} | STRONG
Z_MB = 614.4  # 100,000 rows of 3072 in two bytes
ROUTING_MB = (4 * 50_000 * 8 + 4 * 4 * 100_000 + 4 * 9 + 4 * 8 * 768) / 1e6


def row(impl, ratio, pass_="fwd", **changes):
    common = gpu_summary.MAIN_CASE | {"device": "H100", "torch": "2.11", "triton": "3.6", "commit": "c"}
    tflops = 650 / ratio
    measured = {"median_ms": "1", "tflops": f"{tflops:.1f}", "ratio_to_dense_k": f"{ratio:.3f}", "peak_mb": "1"}
    measured |= {"off_by": ""}
    saved = {"saved_mb": f"{Z_MB + ROUTING_MB:.1f}" if pass_ == "fwd_bwd" else "0.0"}
    return common | {"pass": pass_, "impl": impl} | measured | saved | changes


def measured(folder, forward=FWD, training=FWD_BWD, more=(), steps=(("build", "ok"), ("memcheck", "skipped"))):
    write_csv(folder / "forward.csv", [row(impl, ratio) for impl, ratio in forward.items()])
    rows = [row(impl, ratio, "fwd_bwd") for impl, ratio in training.items()]
    write_csv(folder / "training.csv", [*rows, *more])
    steps = [dict(step=name, status=status, seconds="3", words="w") for name, status in steps]
    write_csv(folder / "steps.csv", steps)
    return folder


def verdicts(folder):
    findings = gpu_summary.demands(gpu_summary.rows_with(folder, "ratio_to_dense_k"))
    return {finding.what: (finding.measured, finding.verdict) for finding in findings}


def test_the_suite_passes_if_every_demand_is_met(tmp_path, capsys):
    assert gpu_summary.main([str(measured(tmp_path))]) == 0
    page = (tmp_path / "summary.md").read_text()
    assert page == capsys.readouterr().out and page.endswith("all is well\n") and "not all" not in page
    assert "H100, torch 2.11, triton 3.6, commit c" in page and "FAIL" not in page
    assert "| build | ok | 3 | w |" in page


def test_speeds_are_quotients_of_ratios_against_the_fastest_loop(tmp_path):
    results = verdicts(measured(tmp_path))
    assert results["fwd: times as fast as cuBLAS loop"] == (f"{1.2 / 0.95:.3g}", "pass")
    assert results["fwd_bwd: times as fast as grouped_mm_fused"] == (f"{1.4 / 1.02:.3g}", "pass")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (dict(forward=FWD | {"clipup": 1.001}), "fwd: ratio_to_dense_k"),
        (dict(training=FWD_BWD | {"clipup": 1.051}), "fwd_bwd: ratio_to_dense_k"),
        (dict(forward=FWD | {"loop_sorted": 1.08}), "fwd: times as fast as cuBLAS loop"),
        (dict(training=FWD_BWD | {"grouped_mm_fused": 1.04}), "fwd_bwd: times as fast as grouped_mm_fused"),
        (dict(more=[row("clipup", 0.9, dtype="fp16", off_by="9.1e-02")]), "results that are off"),
        (
            dict(more=[row("clipup", 1.0, "fwd_bwd", tokens="4096", saved_mb=f"{50.34 * 1.02 + 0.4:.2f}")]),
            "saved over x + z + routing",
        ),
    ],
)
def test_a_number_that_is_missed_fails_the_suite(tmp_path, change, what):
    folder = measured(tmp_path, **change)
    assert verdicts(folder)[what][1] == "FAIL"
    assert gpu_summary.main([str(folder)]) == 1
    assert (tmp_path / "summary.md").read_text().endswith("not all is well\n")


@pytest.mark.parametrize(
    "change",
    [{"forward": {"dense_k": 1.0, "clipup": 0.9}}]
    + [{"steps": [("cuda_tests", status)]} for status in ("failed", "timed out", "no time left")],
)
def test_the_suite_fails_if_a_number_is_missing_or_a_step_did_not_end_well(tmp_path, change):
    assert gpu_summary.main([str(measured(tmp_path, **change))]) == 1


def test_a_run_that_measured_nothing_passes_nothing(tmp_path):
    assert {verdict for _, verdict in verdicts(tmp_path).values()} == {"not measured"}


@pytest.mark.parametrize("peer", gpu_summary.STRONG_PEERS)
@pytest.mark.parametrize("rows", ["forward", "training"])
def test_without_a_strong_peer_there_is_no_verdict(tmp_path, peer, rows):
    everything = {"forward": FWD, "training": FWD_BWD}[rows]
    others = {impl: ratio for impl, ratio in everything.items() if impl != peer}
    weak = [row("hf_grouped_mm", 2.0, pass_) for pass_ in ("fwd", "fwd_bwd")]
    folder = measured(tmp_path, **{rows: others}, more=weak)
    words, verdict = verdicts(folder)["peers that are faster"]
    assert peer in words and verdict == "not measured" and gpu_summary.main([str(folder)]) == 1


def test_peers_that_are_faster_are_named_with_case_and_factor(tmp_path):
    folder = measured(tmp_path, more=[row("new_peer", 0.85, "fwd_bwd"), row("scattermoe", 1.2, "fwd_bwd")])
    words = "new_peer 1.20 times as fast (bf16 50000 768 3072 8 2 balanced fwd_bwd)"
    assert verdicts(folder)["peers that are faster"] == (words, "told")
    assert gpu_summary.main([str(folder)]) == 0


@pytest.mark.parametrize(
    ("grouped", "quack_ms", "wanted"),
    [
        (1.4, 1.0, ["no backend", "our own products stay", "one Gluon kernel for the two products, nothing else"]),
        (1.4, 0.8, ["an optional backend for sm_90 and sm_100; tuning for Hopper ends", "our own products stay"]),
        (1.05, 1.0, ["no backend", "the default for training; the products of our own go"]),
        (1.4, None, ["not measured: undecided", "our own products stay"]),
    ],
)
def test_the_page_says_what_follows_from_the_measured_ratios(tmp_path, grouped, quack_ms, wanted):
    folder = measured(tmp_path, training=FWD_BWD | {"grouped_mm_fused": grouped})
    ours = {"project_in, z kept": 0.9, "project_back": 1.1}
    theirs = {} if quack_ms is None else {f"quack, {name}": quack_ms for name in ours}
    launches = [{"launch": name, "ms": str(ms), "gflop": "1"} for name, ms in (ours | theirs).items()]
    write_csv(folder / "kernels.csv", launches)
    gpu_summary.main([str(folder)])
    page = (folder / "summary.md").read_text()
    told = page[page.index("| decided beforehand") :].splitlines()[2:]
    assert [line.split(" | ")[-1].removesuffix(" |") for line in told if line.startswith("|")] == wanted
