"""The committed figures are what their programs draw from the committed numbers."""

import csv
import json
import re
import runpy
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

import plot
import plot_throughput
import pytest

import clipup
from clipup.demo.options import START

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
SVG = "{http://www.w3.org/2000/svg}"
CLIP = r"p[0-9a-f]{10}\b"  # matplotlib's name of a clip path, made of an address


@pytest.mark.parametrize(
    ("program", "figure", "files"),
    [
        (plot, "moe_cpu.svg", ("moe_forward_cpu.csv", "moe_training_cpu.csv")),
        (plot_throughput, "clip_throughput_cpu.svg", ("clip_throughput_cpu.csv",)),
    ],
)
def test_charts_of_the_benchmarks_are_those_of_the_csv_files(program, figure, files, tmp_path):
    committed = (RESULTS / figure).read_text("utf-8")
    (made_by,) = re.findall(r"Matplotlib v([\d.]+)", committed)
    if made_by != version("matplotlib"):
        pytest.skip(f"drawn by matplotlib {made_by}; others place texts elsewhere")
    assert program.main([*(str(RESULTS / file) for file in files), "--out", str(tmp_path / figure)]) == 0
    drawn = (tmp_path / figure).read_text("utf-8")
    assert re.sub(CLIP, "", drawn) == re.sub(CLIP, "", committed)


def test_the_figure_of_the_kernels_is_what_its_program_draws():
    program = ROOT / "docs" / "figures" / "expert_mlp.py"
    assert program.with_suffix(".svg").read_text("utf-8") == runpy.run_path(str(program))["figure"]()


def test_the_picture_of_the_readme_shows_each_drawing_each_layers_maps_and_the_recall(tmp_path):
    dense, _, _ = clipup.create_model_and_transforms(str(START))
    clipup.save_pretrained(clipup.upcycle(dense), tmp_path / "clip_up" / "model", clipup.get_model_config(str(START)))
    arm = {"steps": 400, "seconds": 55.0, "text_to_image_R@1": 0.5833}
    report = {"clip_up": arm, "dense_continued": arm, "chance_R@1": 0.001}
    report |= {"data": {"test_images": 1007}, "machine": {"threads": 2}}
    (tmp_path / "report.json").write_text(json.dumps(report), "utf-8")
    program = runpy.run_path(str(ROOT / "docs" / "figures" / "expert_maps.py"))
    drawn, layers = program["figure"](tmp_path), 2
    assert drawn.count("<image ") == len(program["DRAWINGS"]) * (1 + layers)
    assert [drawn.count(f"<title>expert {expert}</title>") for expert in range(9)] == [1] * 8 + [0], "the legend"
    assert "in 55 s" in drawn and "for 58 % of captions" in drawn


FIGURES = [*ROOT.glob("docs/**/*.svg"), *RESULTS.glob("*.svg")]


@pytest.mark.parametrize("path", FIGURES, ids=[path.stem for path in FIGURES])
def test_figures_are_legible_on_a_phone_and_on_dark_pages(path):
    """At a width of 400 px no text is smaller than 8 px; nothing white fills the background."""
    drawn = path.read_text("utf-8")
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', drawn).groups()
    sizes = [float(size) for size in re.findall(r'font(?:-size="|-size: ?|: )([\d.]+)(?:px|")', drawn)]
    assert sizes and min(sizes) * min(1, 400 / float(width)) >= 8
    assert "prefers-color-scheme: dark" in drawn.replace(":dark", ": dark")
    assert f'<rect width="{width}" height="{height}"' not in drawn and 'style="fill: #ffffff"' not in drawn


def test_the_chart_of_throughput_names_its_axes_and_every_model_and_no_name_lies_on_the_diagonal():
    drawn = ElementTree.fromstring((RESULTS / "clip_throughput_cpu.svg").read_text("utf-8"))
    words = ["".join(text.itertext()).strip() for text in drawn.iter(f"{SVG}text")]
    rows = csv.DictReader((RESULTS / "clip_throughput_cpu.csv").read_text("utf-8").splitlines())
    names = sorted(f"{row['model'].removeprefix('ViT-')} {1 / float(row['speed_to_b16']):.2f}" for row in rows)
    assert sorted(word for word in words if word in names) == names
    assert words.count("FLOPs over those of dense B-16") == words.count("time over that of dense B-16") == 3
    for axes in (group for group in drawn.iter(f"{SVG}g") if re.fullmatch(r"axes_\d", group.get("id", ""))):
        (diagonal,) = (path.get("d") for path in axes.iter(f"{SVG}path") if "stroke-dasharray" in path.get("style", ""))
        (x0, y0), (x1, y1) = (map(float, point) for point in re.findall(r"[ML] (\S+) (\S+)", diagonal))
        for text in (text for text in axes.iter(f"{SVG}text") if "".join(text.itertext()).strip() in names):
            x, y = float(text.get("x")), float(text.get("y"))
            reach = 7 * len("".join(text.itertext())) * (-1 if "text-anchor: end" in text.get("style") else 1)
            above = [top < y0 + (at - x0) * (y1 - y0) / (x1 - x0) for at in (x, x + reach) for top in (y, y - 8)]
            assert len(set(above)) == 1, "".join(text.itertext())
