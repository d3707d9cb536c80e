"""Pass or fail against the numbers that the GPU kernels have to show, on made-up measurements."""

import gpu_summary
import pytest
from harness import write_csv

FWD = {"dense_k": 1.0, "loop_unbind": 1.6, "loop_sorted": 1.2, "grouped_mm": 1.4, "clipup": 0.95}
FWD_BWD = {"dense_k": 1.0, "loop_unbind": 1.9, "loop_sorted": 1.3, "grouped_mm": 1.5, "clipup": 1.02}
Z_MB = 614.4  # 100,000 rows of 3072 in two bytes
ROUTING_MB = (4 * 50_000 * 8 + 4 * 4 * 100_000 + 4 * 9 + 4 * 8 * 768) / 1e6


def row(impl, ratio, pass_="fwd", **changes):
    common = gpu_summary.MAIN_CASE | {
        "device": "NVIDIA H100 80GB HBM3",
        "torch": "2.11",
        "triton": "3.6",
        "commit": "c",
    }
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
    assert "NVIDIA H100 80GB HBM3, torch 2.11, triton 3.6, commit c" in page and "FAIL" not in page
    assert "| build | ok | 3 | w |" in page


def test_every_launch_is_on_the_page_beside_its_prediction(tmp_path):
    folder = measured(tmp_path)
    launch = dict(launch="project_in", ms="1.1", p20_ms="1.0", p80_ms="1.2", gflop="472", tflops="429", mbyte="800")
    launch |= dict(gbytes_per_s="727", predicted_ms="1.0", measured_to_predicted="1.10")
    write_csv(folder / "kernels.csv", [launch])
    page, well = gpu_summary.summary(folder)
    assert well and "| project_in | 1.1 | 429 | 727 | 1.0 | 1.10 |" in page


def test_choices_are_on_the_page_without_being_demands(tmp_path, capsys):
    write_csv(tmp_path / "steps.csv", [dict(step="choices", status="ok", seconds="3", words="w")])
    row = dict(layer="50000x768x3072", launch="project_in", choice="usual", ms="1.1", p20_ms="1.0", p80_ms="1.2")
    write_csv(tmp_path / "choices.csv", [row | dict(ratio="1.0000")])
    assert gpu_summary.main([str(tmp_path), "--windows", "choices"]) == 0
    assert "| 50000x768x3072 | project_in | usual | 1.1 | 1.0 | 1.2 | 1.0000 |" in capsys.readouterr().out


def test_whole_models_and_stages_of_routing_are_on_the_page(tmp_path, capsys):
    write_csv(tmp_path / "steps.csv", [dict(step="clip_training", status="ok", seconds="3", words="w")])
    row = dict(model="ViT-B-16 CLIP-UP", dtype="bf16", batch_size="256", pairs_per_s="900.00", gflop_per_s="1.5e+05")
    row |= {"pass": "fwd_bwd", "speed_to_b16": "0.800", "speed_to_l14": "3.100"}
    write_csv(tmp_path / "clip_training.csv", [row])
    stage = dict(stage="dispatch", tokens="4096", experts="8", top_k="2", how="graph", triton_us="9.1", cuda_us="7.0")
    write_csv(tmp_path / "routing_stages.csv", [stage | dict(ratio="0.769")])
    assert gpu_summary.main([str(tmp_path), "--windows", "sizes", "models"]) == 0
    page = capsys.readouterr().out
    assert "| ViT-B-16 CLIP-UP | bf16 | fwd_bwd | 256 | 900.00 | 1.5e+05 | 0.800 | 3.100 |" in page
    assert "| dispatch | 4096 | 8 | 2 | graph | 9.1 | 7.0 | 0.769 |" in page


def test_speeds_are_quotients_of_ratios_against_the_fastest_loop(tmp_path):
    found = verdicts(measured(tmp_path))
    assert found["fwd: ratio_to_dense_k"] == ("0.95", "pass")
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


def test_what_was_not_measured_is_no_pass(tmp_path):
    folder = measured(tmp_path, forward={"dense_k": 1.0, "clipup": 0.9})
    assert verdicts(folder)["fwd: times as fast as grouped_mm"] == ("", "not measured")
    assert gpu_summary.main([str(folder)]) == 1


@pytest.mark.parametrize("status", ["failed", "timed out", "no time left"])
def test_a_step_that_did_not_end_well_fails_the_suite(tmp_path, status):
    assert gpu_summary.main([str(measured(tmp_path, steps=[("cuda_tests", status)]))]) == 1


def test_an_aim_that_is_missed_is_told_and_does_not_fail(tmp_path):
    folder = measured(tmp_path)
    slow = [row(impl, ratio, tflops="420") for impl, ratio in FWD.items()]
    write_csv(folder / "forward.csv", slow)
    assert verdicts(folder)["fwd: TFLOP/s (aim)"] == ("420", "missed")
    assert gpu_summary.main([str(folder)]) == 0


def test_peers_that_are_faster_are_named_with_case_and_factor(tmp_path):
    assert verdicts(measured(tmp_path))["peers that are faster"] == ("", "no peer is installed")
    folder = measured(tmp_path, more=[row("scattermoe", 1.2, "fwd_bwd")])
    assert verdicts(folder)["peers that are faster"] == ("none", "pass")
    folder = measured(tmp_path, more=[row("sonicmoe", 0.85, "fwd_bwd"), row("scattermoe", 1.2, "fwd_bwd")])
    told, verdict = verdicts(folder)["peers that are faster"]
    assert verdict == "told" and told == "sonicmoe 1.20 times as fast (bf16 50000 768 3072 8 2 balanced fwd_bwd)"
    assert gpu_summary.main([str(folder)]) == 0


def test_what_was_left_out_is_told_once_with_its_reason(tmp_path):
    folder = measured(tmp_path)
    for log in ("forward", "training"):
        (folder / f"{log}.log").write_text("dtype  impl\nleft out: grouped_mm in fp16 fails: RuntimeError: no\n")
    assert gpu_summary.main([str(folder)]) == 0
    assert (folder / "summary.md").read_text().count("left out: grouped_mm in fp16 fails: RuntimeError: no\n") == 1


def test_a_suite_that_measured_nothing_says_so(tmp_path):
    write_csv(tmp_path / "steps.csv", [dict(step="device", status="failed", seconds="1", words="no GPU")])
    assert gpu_summary.main([str(tmp_path)]) == 1
    assert "no layer was measured" in (tmp_path / "summary.md").read_text()


def test_a_folder_without_steps_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu_summary.main([str(tmp_path)])
    assert "no steps.csv; benchmarks/gpu_suite.sh writes it" in capsys.readouterr().err
