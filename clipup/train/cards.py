"""GPUs that plans and records know by name, with constants from data sheets; the pairs per second at a GPU's peak.

A data sheet is an upper bound: what a run reaches of it is ``mfu`` for products, and is not known for links.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import nn

from ..clip.flops import count
from ..precision import Precision


@dataclass(frozen=True)
class Card:
    """One GPU and its links. Bytes and rates are decimal; links are per direction."""

    memory_gb: float
    """10^9 bytes."""
    tflops: float
    """Dense bfloat16 products with float32 sums, 10^12 FLOPs per second."""
    tflops_fp32: float
    """The same of float32, without tensor cores: TF32 is off in torch."""
    memory_gb_s: float
    """Bandwidth of its memory."""
    link_gb_s: float
    """To the other GPUs of its node."""
    network_gb_s: float
    """To other nodes: its share of the node's network."""
    host_gb_s: float
    """To the host's memory."""
    source: str
    device_name: str = ""
    """Its name in CUDA."""

    def peak(self, precision: Precision) -> float:
        """10^12 FLOPs per second of products in a precision."""
        return self.tflops_fp32 if precision == "fp32" else self.tflops


_400G = "400 Gb/s of network per GPU, as in NVIDIA's DGX and HGX systems"
_PCIE4, _PCIE5 = 32.0, 64.0

_B200 = f"NVIDIA HGX B200 data sheet, an eighth of eight GPUs (NVLink 1.8 TB/s); {_400G}"
_A100 = "NVIDIA A100 data sheet (SXM4: NVLink 600 GB/s in total); 200 Gb/s per GPU, DGX A100"
_H100 = f"NVIDIA H100 data sheet (SXM5: NVLink 900 GB/s in total); {_400G}"
_H200 = f"NVIDIA H200 data sheet (SXM: NVLink 900 GB/s in total); {_400G}"
_L40S = "NVIDIA L40S data sheet (PCIe 4.0 x16, no NVLink); 100 Gb/s per GPU, assumed"

CARDS = {
    "h100": Card(80, 989, 67, 3350, 450, 50, _PCIE5, _H100, "NVIDIA H100 80GB HBM3"),
    "h200": Card(141, 989, 67, 4800, 450, 50, _PCIE5, _H200, "NVIDIA H200"),
    "b200": Card(180, 2250, 75, 7700, 900, 50, _PCIE5, _B200, "NVIDIA B200"),
    "a100-80gb": Card(80, 312, 19.5, 2039, 300, 25, _PCIE4, _A100, "NVIDIA A100-SXM4-80GB"),
    "a100-40gb": Card(40, 312, 19.5, 1555, 300, 25, _PCIE4, _A100, "NVIDIA A100-SXM4-40GB"),
    "l40s": Card(48, 362, 91.6, 864, 32, 12.5, _PCIE4, _L40S, "NVIDIA L40S"),
}
"""By name."""


def card(name: str) -> Card:
    """
    Raises:
        ValueError: no card has this name.
    """
    if name not in CARDS:
        raise ValueError(
            f"gpu must be one of {', '.join(CARDS)}, got {name!r}; for another card override its constants"
        )
    return CARDS[name]


def pairs_per_second_at_peak(model: nn.Module, device: torch.device, world_size: int) -> float | None:
    """Pairs per second of all ranks with which training would reach the GPUs' peak, the denominator of MFU (PaLM,
    arXiv 2204.02311, appendix B); None if it is not known.

    FLOPs are those of both towers, as if no token or patch were dropped and every text as long as the context, three
    times: a backward pass has the products of two forward passes. A locked tower has a forward pass alone. What is
    computed again is not counted, nor is a CoCa's decoder.

    Args:
        model: before it is sharded.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    card = next((card for card in CARDS.values() if card.device_name == name), None)
    if card is None:
        return None
    try:
        counts = count(model)
    except Exception as error:  # a model that can be trained and not be counted is trained
        logging.getLogger("clipup.train").warning("mfu is not logged, the FLOPs cannot be counted: %r", error)
        return None
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    trained = {name.startswith("visual.") for name in names if not name.startswith("logit_")}
    image, text = (3 if is_image in trained else 1 for is_image in (True, False))
    return world_size * card.tflops * 1e3 / (image * counts.image_gflops + text * counts.text_gflops)
