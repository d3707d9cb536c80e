"""The public names of ``clipup``: imported on first access, but visible to dir, help, imports and type checkers."""

import subprocess
import sys
import typing
from pathlib import Path

import pytest

import clipup
from clipup.moe.config import MoEOptions

SOURCE = Path(clipup.__file__)
ROOT = SOURCE.parents[1]


def output_of(program):
    """What a Python program prints in a new process, in which no lazy name was accessed before."""
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    ).stdout


def test_dir_lists_every_public_name_and_open_clip_is_not_imported_by_it_or_by_a_layer():
    program = "import clipup, sys; clipup.SparseMoE(8, 16); print(set(clipup.__all__) - set(dir(clipup)))"
    assert output_of(f"{program}; print({{'open_clip', 'timm'}} & set(sys.modules))") == "set()\nset()\n"


def test_a_layer_and_its_model_train_and_run_in_int8_with_torch_triton_and_tqdm_alone():
    absent = "open_clip timm torchvision transformers tyro typeguard huggingface_hub safetensors jinja2 PIL".split()
    program = f"""
import sys
sys.modules |= dict.fromkeys({absent})  # importing one of them is an ImportError
import clipup, torch
model = torch.nn.Sequential(clipup.SparseMoE(64, 128, num_experts=4, top_k=2, balance_weight=0.01))
(model(torch.randn(2, 10, 64)).sum() + clipup.aux_loss(model)).backward()
torch.optim.AdamW(clipup.parameter_groups(model, weight_decay=0.1)).step()
print(clipup.accelerate(model, weights="int8")(torch.randn(2, 10, 64)).shape, clipup.moe_metrics(model).keys())
"""
    assert output_of(program).startswith("torch.Size([2, 10, 64])")


def test_every_public_name_can_be_imported_and_is_in_the_help():
    program = f"""
import pydoc
from clipup import {", ".join(clipup.__all__)}
names = dict(globals())
from clipup import *
import clipup
print(all(names[name] is globals()[name] is getattr(clipup, name) for name in clipup.__all__))
print(pydoc.render_doc(clipup, renderer=pydoc.plaintext))
"""
    same, _, text = output_of(program).partition("\n")
    assert same == "True"
    for name in clipup.__all__:
        assert f"\n    {name}(" in text or f"class {name}(" in text, name


CALLS = """
import clipup
from torch import nn
class Net(nn.Module): ...
net: Net = clipup.upcycle(Net())
net = clipup.upcycle([net, net], clipup.MoEConfig.clip_up(num_experts=4, towers=("image",)))
net = clipup.accelerate(net)
layer: clipup.SparseMoE = clipup.accelerate(clipup.SparseMoE(8, 16, num_experts=4))
clipup.accelerate(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)))[0]  # error: [index]
clipup.SparseMoE(8, 16, n_experts=4)  # error: [call-arg]
clipup.SparseMoE(8, 16, towers=("image",))  # error: [call-arg]
clipup.SparseMoE(8, 16, num_experts="4")  # error: [arg-type]
clipup.MoEConfig.clip_up(n_experts=4)  # error: [call-arg]
clipup.MoEConfig().replace(routing="expert")  # error: [arg-type]
options: clipup.train.TrainOptions = "batch_size"  # error: [assignment]
clipup.upcycled  # error: [attr-defined]
"""


@pytest.mark.slow
def test_type_checkers_know_what_is_returned_and_refuse_options_that_there_are_not(tmp_path):
    path = tmp_path / "calls.py"
    path.write_text(CALLS)
    run = subprocess.run([sys.executable, "-m", "mypy", path], cwd=ROOT, capture_output=True, text=True)
    errors = [
        line.split(":")[1] + line[line.rindex("  [") + 2 :] for line in run.stdout.splitlines() if ": error" in line
    ]
    assert errors == [
        f"{number}{line.split('# error: ')[1]}"
        for number, line in enumerate(CALLS.splitlines(), 1)
        if "# error: " in line
    ], run.stdout + run.stderr


def test_the_typed_options_are_the_fields_of_the_config():
    fields = typing.get_type_hints(clipup.MoEConfig)
    assert typing.get_type_hints(MoEOptions) == fields
