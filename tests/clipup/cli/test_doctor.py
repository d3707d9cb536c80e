"""clipup doctor: the blocks of a model, their status, and a suggestion if upcycling is refused."""

import json

import pytest
from tiny_clip import tiny_clip, tiny_config
from tiny_families import HUGGING_FACE, TIMM, build, coca_cfg, hugging_face_cfg, timm_model

from clipup import MoEConfig, save_pretrained, upcycle
from clipup.cli import main
from clipup.upcycling.diagnose import diagnose
from clipup_kernels.backends import cpp, extension, registry


@pytest.fixture
def dense(tmp_path):
    save_pretrained(tiny_clip(), tmp_path / "dense", tiny_config())
    return str(tmp_path / "dense")


def findings(capsys, *arguments):
    assert main(["doctor", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_table_shows_the_status_of_the_blocks_of_every_tower(dense, capsys):
    assert main(["doctor", dense]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[2] == ["0,", "2", "ResidualAttentionBlock", "Sequential", "32,", "128", "gelu", "dense"]
    assert lines[3] == ["1,", "3", "ResidualAttentionBlock", "Sequential", "32,", "128", "gelu", "sparse"]
    assert " ".join(lines[-1]).startswith("upcycle accepts it; parameters: 0.1 M dense, 0.3 M sparse, 0.1 M active")


def test_moe_options_are_those_of_upcycle(dense, capsys):
    found = findings(capsys, dense, "--num-experts", "3", "--top-k", "1", "--towers", "text", "--blocks", "0", "-1")
    image, text = found["towers"]
    assert [block["status"] for block in image["blocks"]] == ["dense"] * 4
    assert [block["status"] for block in text["blocks"]] == ["sparse", "dense", "dense", "sparse"]
    assert found["moe"]["num_experts"] == 3 and found["upcycles"] and found["suggestion"] is None
    sparse = upcycle(tiny_clip(), MoEConfig(num_experts=3, towers=("text",), blocks=(0, -1)))
    assert found["params"] == sum(parameter.numel() for parameter in tiny_clip().parameters())
    assert found["sparse_params"] == sum(parameter.numel() for parameter in sparse.parameters())
    assert found["params"] < found["active_params"] < found["sparse_params"]


def test_refused_tower_comes_with_a_suggestion(tmp_path, capsys):
    cfg = {
        **tiny_config(),
        "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32, "head_width": 8},
        "custom_text": False,
    }
    save_pretrained(build(cfg), tmp_path, cfg)
    found = findings(capsys, str(tmp_path))
    assert not found["upcycles"] and found["suggestion"] == "--towers text"
    assert found["towers"][0]["blocks"] == [] and found["towers"][1]["refused"] is None
    fixed = findings(capsys, str(tmp_path), "--towers", "text")
    assert fixed["upcycles"] and fixed["towers"][0]["refused"] is None
    assert fixed["sparse_params"] == found["sparse_params"]


def test_sparse_model_is_reported_as_already_sparse(tmp_path, capsys):
    save_pretrained(upcycle(tiny_clip(), MoEConfig(num_experts=2)), tmp_path, tiny_config())
    found = findings(capsys, str(tmp_path))
    assert [block["status"] for block in found["towers"][0]["blocks"]] == ["dense", "already sparse"] * 2
    assert not found["upcycles"] and found["sparse_params"] == found["active_params"] == found["params"]


def test_coca_has_three_towers():
    towers = diagnose(build(coca_cfg()), MoEConfig(towers=("decoder",)))
    assert [(tower.tower, len(tower.blocks)) for tower in towers] == [("image", 2), ("text", 2), ("decoder", 4)]
    assert [block.status for tower in towers for block in tower.blocks] == ["dense"] * 4 + ["dense", "sparse"] * 2
    assert towers[2].blocks[1].name == "text_decoder.cross_attn.0"


@pytest.mark.parametrize("name", [*list(TIMM)[::4], *list(HUGGING_FACE)[::2]])
def test_diagnosis_agrees_with_upcycle(name, tmp_path):
    is_timm = name in TIMM
    model = timm_model(name) if is_timm else build(hugging_face_cfg(HUGGING_FACE[name](), tmp_path))
    config = MoEConfig(num_experts=2)
    reports = diagnose(model, config)
    chosen = [block for tower in reports for block in tower.blocks if block.status == "sparse"]
    upcycle(model, config, inplace=True)
    after = [block for tower in diagnose(model, config) for block in tower.blocks if block.status == "already sparse"]
    for before, now in zip(chosen, after, strict=True):
        parts = ("name", "d_model", "d_hidden", "activation", "gated")
        assert [getattr(before, part) for part in parts] == [getattr(now, part) for part in parts]
        assert before.norm in (now.norm, "input")


@pytest.mark.skipif(extension.NATIVE is None, reason="the extension is not built or not used")
def test_with_a_device_its_kernels_are_checked(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["doctor", "--device", "cpu"]) == 0
    *lines, waiting = capsys.readouterr().out.splitlines()
    assert waiting.startswith("waiting threads: ")
    assert len({line.rsplit(maxsplit=3)[0] for line in lines[2:-1]}) == len(lines) - 3  # each check by its own name
    assert lines[-1] == f"{len(lines) - 3} checks, 0 failed" and all(line.endswith("ok") for line in lines[2:-1])

    monkeypatch.setattr(cpp, "combine", lambda rows, gates, *plan: rows[: len(gates)] * 0)
    assert main(["doctor", "--device", "cpu", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    registry._DISTRUSTED.clear()
    registry.function_of.cache_clear()
    failed = [one for one in found["findings"] if one["reason"]]
    assert found["failed"] == len(failed) and found["machine"]["processor"]
    assert [one["op"] for one in failed if one["backend"] == "cpp"] == ["combine"] * 3
    assert {one["backend"] for one in failed} <= {"cpp", "torch_matmul"}  # which combines in C++
