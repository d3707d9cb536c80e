"""Colours are far apart for every kind of sight, on white and on the dark page."""

from itertools import combinations

import numpy as np
import pytest

from clipup.inspection.figures.palette import ARMS, EXPERTS

# Machado, Oliveira, Fernandes 2009, severity 1, on linear RGB
SIGHT = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
DARK_PAGE = "#14171c"


def linear(color):
    encoded = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)


def oklab(rgb):
    cones = np.array([[0.41222, 0.53633, 0.05145], [0.21190, 0.68070, 0.10740], [0.08830, 0.28172, 0.62998]])
    lab = np.array([[0.21045, 0.79362, -0.00407], [1.97800, -2.42859, 0.45059], [0.02590, 0.78277, -0.80868]])
    return lab @ np.cbrt(cones @ np.clip(rgb, 0, 1))


def contrast(a, b):
    low, high = sorted(float(linear(color) @ [0.2126, 0.7152, 0.0722]) for color in (a, b))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize("colors", [EXPERTS, tuple(ARMS.values())], ids=["experts", "arms"])
def test_colours_are_told_apart(colors, sight):
    seen = [oklab(np.asarray(SIGHT[sight]) @ linear(color)) for color in colors]
    assert min(np.linalg.norm(a - b) for a, b in combinations(seen, 2)) > 0.1


@pytest.mark.parametrize("color", [*EXPERTS, *ARMS.values()])
def test_colours_stand_out_on_a_light_and_on_a_dark_page(color):
    assert contrast(color, "#ffffff") >= 1.95
    assert contrast(color, DARK_PAGE) >= 2.95
