"""The benchmark of int8 on a trained transformer, on a stand-in: rows and what they say."""

import bz2
import csv
from itertools import product
from pathlib import Path

import int8_text
import pytest
import torch
from small_sentence_encoder import write_wheel

RESULTS = Path(int8_text.__file__).parent / "results"
OURS = [
    *("torch, fp32", "torch, bf16", "torch int8, fp32", "clipup, fp32", "clipup, bf16", "clipup int8 unbalanced, fp32"),
    *(f"clipup {form}, {dtype}" for form in ("int8", "int8 calibrated") for dtype in ("fp32", "bf16")),
]
LINES = [
    *("# Unihan", "U+3400\tkCantonese\tjau1", "U+3400\tkDefinition\tred bird", "U+3401\tkDefinition\tstone"),
    *(f"U+340{number}\tkDefinition\t{'small ' * number}tree of stone" for number in range(2, 9)),
    "U+3410\tkDefinition\tred bird",
]


class OneEngine:
    """OpenVINO's place, taken by torch."""

    def __init__(self, model, batches, threads):
        self.call = int8_text.in_type(model, torch.float32)

    def forms(self, example=None):
        return {f"{int8_text.PEER}, fp32": self.call}


@pytest.fixture
def rows(tmp_path, monkeypatch):
    for name, value in (("TESTED", 6), ("BATCH", 4), ("TOKENS", 64), ("Engines", OneEngine)):
        monkeypatch.setattr(int8_text, name, value)
    monkeypatch.setattr(torch, "compile", lambda call, dynamic: call)
    glosses, table = tmp_path / "glosses.bz2", tmp_path / "rows.csv"
    glosses.write_bytes(bz2.compress("\n".join(LINES).encode()))
    wheel = write_wheel(tmp_path / "small.whl", monkeypatch)
    short = ["--seconds", "0.05", "--rounds", "1", "--threads", "1", "--csv", str(table)]
    assert int8_text.main([str(wheel), "--glosses", str(glosses), *short]) == 0
    with table.open() as file:
        return list(csv.DictReader(file))


def test_every_form_has_its_accuracy_and_the_encoders_also_their_time_beside_openvinos(rows):
    assert list(rows[0]) == (RESULTS / "int8_text_cpu.csv").read_text().splitlines()[0].split(",")
    timed = [row for row in rows if row["median_ms"]]
    peer = f"{int8_text.PEER}, fp32"
    compiled = [f"clipup int8 calibrated compiled, {dtype}" for dtype in ("fp32", "bf16")]
    assert [(row["batch_size"], row["form"]) for row in timed] == list(product("14", [*OURS, *compiled, peer]))
    assert {row["ratio_to"] for row in timed} == {peer}
    assert all(float(row["median_ms"]) > 0 and float(row["spearman"] or 1) > 0.8 for row in timed)
    units = [row for row in rows if not row["median_ms"]]
    assert [row["form"] for row in units] == OURS * 5 and len({row["model"] for row in units}) == 5
    for row in (row for row in rows if row["form"] not in compiled):
        exact = row["form"] in ("torch, fp32", "clipup, fp32", peer)
        assert (float(row["error"]) < 1e-4) == exact, row
        assert float(row["error"]) < 0.3 or row["form"] == "torch int8, fp32", row


def test_texts_are_distinct_definitions_and_none_is_tested_that_was_calibrated_on(monkeypatch, tmp_path):
    path = tmp_path / "glosses.bz2"
    path.write_bytes(bz2.compress("\n".join(LINES).encode()))
    texts = int8_text.glosses(path)
    assert sorted(texts) == sorted({line.split("\t")[2] for line in LINES if "kDefinition" in line})
    assert texts == int8_text.glosses(path) != sorted(texts)


def test_accuracy_is_1_for_the_same_and_falls_with_the_order_of_pairs():
    exact = torch.nn.functional.normalize(torch.randn(50, 8), dim=-1)
    assert list(int8_text.accuracy(exact, exact).values()) == ["1.00000"] * 3 + ["0.00000"]
    other = torch.nn.functional.normalize(torch.randn(50, 8), dim=-1)
    assert abs(float(int8_text.accuracy(other, exact)["spearman"])) < 0.2
    assert int8_text.spearman(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([0.1, 0.2, 0.3])) == pytest.approx(1)


def test_error_is_a_share_of_what_varies_between_rows():
    exact = torch.tensor([[1.0, 5.0], [-1.0, 5.0]])
    assert int8_text.error(exact + torch.tensor([0.1, 0.0]), exact) == pytest.approx(0.1)
