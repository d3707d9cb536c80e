"""The charts of the demonstration's report."""

import re

from clipup.demo.page import _charts
from clipup.inspection.figures.palette import ARMS


def test_the_losses_are_also_drawn_as_clip_up_minus_dense(make_report):
    losses = {"dense_continued": [5.0, 3.0, 2.0, 1.5], "clip_up": [5.5, 3.5, 2.5, 2.0]}
    curves = {arm: [{"step": n, "contrastive": loss} for n, loss in enumerate(of)] for arm, of in losses.items()}
    recall = {"step": 3, "text_to_image_R@1": 0.2, "image_to_text_R@1": 0.2}
    drawn = _charts(make_report(), curves, {arm: [recall] for arm in curves}, window=1)
    assert len(drawn) % 2 == 0, "two in a row, and no hole"
    assert "CLIP-UP − dense continued" in drawn[1] and "0.50" in drawn[1]
    (line,) = re.findall(rf'd="([^"]*)"[^>]*stroke: {ARMS["clip_up"]}', drawn[1])
    assert len(set(re.findall(r"[ML] \S+ (\S+)", line))) == 1, "0.5 at every step"
