"""The colors of the experts differ for all readers."""

import numpy as np
import pytest

from clipup.inspection.figures.palette import EXPERTS

# linear RGB as it is seen: Machado, Oliveira and Fernandes 2009, severity 1
VISION = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
# Ottosson, https://bottosson.github.io/posts/oklab
CONES = [[0.4122215, 0.5363325, 0.0514460], [0.2119035, 0.6806995, 0.1073970], [0.0883025, 0.2817188, 0.6299787]]
LAB = [[0.2104543, 0.7936178, -0.0040720], [1.9779985, -2.4285922, 0.4505937], [0.0259040, 0.7827718, -0.8086758]]


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("gray", [0.2, 0.6, 1.0])  # of the picture below, from the darkest to white
def test_no_two_of_eight_experts_look_alike_as_tints_of_patches(vision, gray):
    rgb = 0.7 * np.array([list(bytes.fromhex(color[1:])) for color in EXPERTS]) / 255 + 0.3 * gray
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.transpose(VISION[vision]), 0, 1)
    lab = np.cbrt(seen @ np.transpose(CONES)) @ np.transpose(LAB)
    distances = np.linalg.norm(lab[:, None] - lab, axis=-1)[np.triu_indices(8, 1)]
    assert distances.min() > (0.13 if vision == "normal" else 0.08)
