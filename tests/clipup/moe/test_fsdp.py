"""FSDP2 (``fully_shard``) around a layer, plain and prepared."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import clipup

pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return clipup.SparseMoE(16, 32, num_experts=4, top_k=2, balance_weight=0.01)


def test_a_sharded_layer_trains_as_the_layer_does(mesh, layer):
    x = torch.randn(40, 16)
    sharded = fully_shard(copy.deepcopy(layer), mesh=mesh)
    outputs = []
    for each in (layer, sharded):
        outputs.append(each(x))
        (outputs[-1].square().sum() + clipup.aux_loss(each)).backward()
    assert torch.equal(*outputs)
    for ours, theirs in zip(sharded.parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad)


def test_a_sharded_prepared_layer_computes_what_the_layer_does(mesh, layer):
    x = torch.randn(40, 16)
    prepared = clipup.accelerate(layer)
    sharded = fully_shard(copy.deepcopy(prepared), mesh=mesh)
    with torch.no_grad():
        assert torch.equal(sharded(x), prepared(x))
        assert torch.equal(sharded(x), layer.eval()(x))
