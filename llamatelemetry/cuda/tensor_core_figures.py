"""What the tensor cores of a GPU can do at most, from its data sheet."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Figures:
    """Peak rates of one card, dense (without sparsity), at boost clock.

    Attributes:
        card: the card; also part of the name by which torch knows it.
        architecture: NVIDIA's name for the generation.
        capability: compute capability.
        fp16_tflops: float16 inputs, float32 sums, on tensor cores.
        int8_tops: int8 inputs, int32 sums; on tensor cores from 7.5 on.
        fp32_tflops: float32 without tensor cores.
        source: where the figures are printed.
    """

    card: str
    architecture: str
    capability: tuple[int, int]
    fp16_tflops: float
    int8_tops: float
    fp32_tflops: float
    source: str


_ADA = "NVIDIA Ada GPU Architecture whitepaper, appendix A"
# The first row of a compute capability stands for every card of it that has no row of its own.
FIGURES = (
    Figures(
        "V100", "Volta", (7, 0), 125.0, 62.8, 15.7, "Tesla V100 data sheet, SXM2; int8 by dp4a"
    ),
    Figures("T4", "Turing", (7, 5), 65.0, 130.0, 8.1, "NVIDIA T4 data sheet"),
    Figures("A100", "Ampere", (8, 0), 312.0, 624.0, 19.5, "NVIDIA A100 data sheet"),
    Figures("A10", "Ampere", (8, 6), 125.0, 250.0, 31.2, "NVIDIA A10 data sheet"),
    Figures("RTX 3090", "Ampere", (8, 6), 71.0, 284.0, 35.6, "NVIDIA GA102 whitepaper, table 9"),
    Figures(
        "L4", "Ada Lovelace", (8, 9), 121.0, 242.0, 30.3, "NVIDIA L4 data sheet, halved: dense"
    ),
    Figures("L40S", "Ada Lovelace", (8, 9), 362.0, 733.0, 91.6, "NVIDIA L40S data sheet"),
    Figures("RTX 4090", "Ada Lovelace", (8, 9), 165.2, 660.6, 82.6, _ADA),
    Figures(
        "H100", "Hopper", (9, 0), 989.4, 1978.9, 66.9, "NVIDIA H100 data sheet, SXM5; H200 alike"
    ),
    Figures(
        "B200", "Blackwell", (10, 0), 2250.0, 4500.0, 75.0, "NVIDIA HGX B200 data sheet, a GPU"
    ),
    Figures(
        "RTX 5090",
        "Blackwell",
        (12, 0),
        209.5,
        838.0,
        104.8,
        "NVIDIA RTX Blackwell GPU Architecture whitepaper, appendix A",
    ),
)


def figures_for(name: str, capability: tuple[int, int]) -> Figures | None:
    """The row for a GPU.

    Args:
        name: as torch.cuda.get_device_name gives it.
        capability: compute capability, (major, minor).

    Returns:
        The card's own row, else the first of its compute capability, else of its major version's
        nearest one below, else None.
    """
    rows = [row for row in FIGURES if row.capability == capability]
    for row in rows:
        if row.card in name.replace("-", " ").split() or (" " in row.card and row.card in name):
            return row
    below = [r for r in FIGURES if r.capability[0] == capability[0] and r.capability <= capability]
    nearest = max((row.capability for row in below), default=None)
    return next((row for row in below if row.capability == nearest), None)
