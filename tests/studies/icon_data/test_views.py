"""Fresh views of icons."""

import torch

from studies.icon_data.views import fresh


def draw(seed):
    return torch.Generator().manual_seed(seed)


def test_a_view_is_a_small_turn_zoom_and_shift_on_the_same_paper():
    images = torch.full((64, 3, 32, 32), 2.5)
    images[:, :, 14:18, 14:18] = -1.0
    views = fresh(images, draw(0))

    edges = views[:, :, [0, -1]]
    torch.testing.assert_close(edges, torch.full_like(edges, 2.5), msg="what comes in from outside is paper")
    ink = (2.5 - views[:, 0]) / 3.5
    rows = torch.arange(32.0)
    for axis in (1, 2):
        middle = (ink.sum(axis) * rows).sum(1) / ink.sum((1, 2))
        assert 1.0 < (middle - 15.5).abs().max() < 2.0, "a tenth of half a side is 1.6 pixels"
    sizes = ink.sum((1, 2)) / 16
    assert 0.75 < sizes.min() < 0.9 and 1.1 < sizes.max() < 1.3


def test_views_depend_on_the_draw_alone_and_differ_within_a_batch():
    images = torch.randn(1, 3, 32, 32).expand(4, -1, -1, -1)
    views = fresh(images, draw(1))
    assert torch.equal(views, fresh(images, draw(1))) and not torch.equal(views, fresh(images, draw(2)))
    assert len({view.sum().item() for view in views}) == 4
