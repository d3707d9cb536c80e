"""A mark for tests of what only open_clip 4 has."""

import inspect

import pytest
from open_clip.transformer import Attention

only_open_clip_4 = pytest.mark.skipif(
    "k_x" not in inspect.signature(Attention.forward).parameters,
    reason="open_clip 3 has nn.MultiheadAttention in its blocks",
)
