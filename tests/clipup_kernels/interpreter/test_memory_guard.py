"""The guard of this folder's tests: an access outside of a launch's tensors is an error, one inside is not."""

import pytest
import torch
import triton
import triton.language as tl
from memory_guard import OutsideOfTensors

pytestmark = pytest.mark.interpreter


@triton.jit
def _copy(source, target, read, written, first, BLOCK: tl.constexpr):
    place = first + tl.arange(0, BLOCK)
    values = tl.load(source + place, mask=place < read, other=0.0)
    tl.store(target + place, values, mask=place < written)


def copy(source, target, read, written, first=0):
    _copy[(1,)](source, target, read, written, first, BLOCK=16)


def test_accesses_inside_of_tensors_and_masked_ones_pass():
    whole = torch.randn(64)
    copy(whole[8:18], target := torch.zeros(10), 10, 10)
    assert torch.equal(target, whole[8:18])
    copy(whole[:0], target, 0, 10)
    assert torch.equal(target, torch.zeros(10))


@pytest.mark.parametrize(
    ("read", "written", "first", "what"), [(11, 10, 0, "load"), (10, 11, 0, "store"), (10, 10, -1, "load")]
)
def test_one_element_outside_of_a_tensor_is_an_error(read, written, first, what):
    whole = torch.randn(64)  # the neighbors belong to the process
    with pytest.raises(Exception, match=f"a {what} of 4 bytes, [04] bytes from") as caught:
        copy(whole[8:18], whole[32:42], read, written, first)
    assert isinstance(caught.value.__cause__ or caught.value, OutsideOfTensors)
