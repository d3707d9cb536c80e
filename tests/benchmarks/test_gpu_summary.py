"""Pass or fail against the numbers that the GPU kernels have to show, on made-up measurements."""

import gpu_summary
import pytest
from harness import write_csv

FWD = {"dense_k": 1.0, "loop_unbind": 1.6, "loop_sorted": 1.2, "grouped_mm": 1.4, "clipup": 0.95}
FWD_BWD = {"dense_k": 1.0, "loop_unbind": 1.9, "loop_sorted": 1.3, "grouped_mm": 1.5, "clipup": 1.02}
Z_MB = 614.4  # 100,000 rows of 3072 in two bytes
ROUTING_MB = (4 * 50_000 * 8 + 4 * 4 * 100_000 + 4 * 9 + 4 * 8 * 768) / 1e6


def row(impl, ratio, pass_="fwd", **changes):
    common = gpu_summary.MAIN_CASE | {"device": "H100", "torch": "2.11", "triton": "3.6", "commit": "c"}
    tflops = 650 / ratio
    measured = {"median_ms": "1", "tflops": f"{tflops:.1f}", "ratio_to_dense_k": f"{ratio:.3f}", "peak_mb": "1"}
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
    found = gpu_summary.demands(gpu_summary.layer_rows(folder))
    return {finding.what: (finding.measured, finding.verdict) for finding in found}


def test_everything_shown_is_a_pass(tmp_path, capsys):
    assert gpu_summary.main([str(measured(tmp_path))]) == 0
    page = (tmp_path / "summary.md").read_text()
    assert page == capsys.readouterr().out and page.endswith("all is well\n") and "not all" not in page
    assert "H100, torch 2.11, triton 3.6, commit c" in page and "FAIL" not in page
    assert "| build | ok | 3 | w |" in page


def test_speeds_are_quotients_of_ratios_against_the_fastest_loop(tmp_path):
    found = verdicts(measured(tmp_path))
    assert found["fwd: times as fast as cuBLAS loop"] == (f"{1.2 / 0.95:.3g}", "pass")
    assert found["fwd_bwd: times as fast as grouped_mm"] == (f"{1.5 / 1.02:.3g}", "pass")
    assert found["fwd: TFLOP/s (aim)"] == (f"{650 / 0.95:.3g}", "met")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (dict(forward=FWD | {"clipup": 1.001}), "fwd: ratio_to_dense_k"),
        (dict(training=FWD_BWD | {"clipup": 1.051}), "fwd_bwd: ratio_to_dense_k"),
        (dict(forward=FWD | {"loop_sorted": 1.08}), "fwd: times as fast as cuBLAS loop"),
        (dict(training=FWD_BWD | {"grouped_mm": 1.32}), "fwd_bwd: times as fast as grouped_mm"),
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
def test_what_was_not_measured_or_did_not_end_well_is_no_pass(tmp_path, change):
    assert gpu_summary.main([str(measured(tmp_path, **change))]) == 1


def test_peers_that_are_faster_are_named_with_case_and_factor(tmp_path):
    assert verdicts(measured(tmp_path))["peers that are faster"] == ("", "no peer is installed")
    folder = measured(tmp_path, more=[row("sonicmoe", 0.85, "fwd_bwd"), row("scattermoe", 1.2, "fwd_bwd")])
    words = "sonicmoe 1.20 times as fast (bf16 50000 768 3072 8 2 balanced fwd_bwd)"
    assert verdicts(folder)["peers that are faster"] == (words, "told")
    assert gpu_summary.main([str(folder)]) == 0
