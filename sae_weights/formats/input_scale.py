"""The constant that scaled a dictionary's inputs in training, where its format can be told one."""

from __future__ import annotations

from pathlib import Path

from sae_weights.errors import SAEFormatError

from .base import Hints


def constant_scale(path: Path, hints: Hints, *, unscalable: str = "") -> float:
    """The hinted scale, 1 without a hint. Raises SAEFormatError where there is one and ``unscalable`` says why none fits."""
    scale = hints.norm_scaling_factor
    if scale is None:
        return 1.0
    if unscalable:
        raise SAEFormatError(f"{path}: norm_scaling_factor {scale:g} given; {unscalable}")
    if not 0 < scale < 1e300:
        raise SAEFormatError(f"{path}: norm_scaling_factor {scale:g}; expected a positive number")
    return scale


PER_TOKEN = "its inputs are normalised token by token, which leaves nothing of a constant"
