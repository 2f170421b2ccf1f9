"""Gated SAE: one path decides whether, another how much. Rajamanoharan et al. 2024, arXiv:2404.16014, section 3."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Architecture, Gate, RowForm


class Gated(Architecture):
    """f = 1[W_enc · x̃ + b_gate > 0] · relu(exp(r_mag) · (W_enc · x̃) + b_mag)."""

    name = "gated"
    kind = "gated"
    title = "Gated"
    reference = "Rajamanoharan et al. 2024, arXiv:2404.16014"
    gate_tensors = ("b_gate", "b_mag", "r_mag")

    def shift_input(self, gate: Gate, projection: Tensor) -> dict[str, Tensor]:
        return {
            **gate,
            "b_gate": gate["b_gate"] - projection,
            "b_mag": gate["b_mag"] - projection * gate["r_mag"].exp(),
        }

    def scale_rows(self, gate: Gate, scale: Tensor) -> dict[str, Tensor]:
        # r_mag is relative to the gate path, which the scaled encoder row already carries.
        return {**gate, "b_gate": gate["b_gate"] * scale, "b_mag": gate["b_mag"] * scale}

    def row_form(self, gate: Gate) -> RowForm:
        b_gate = gate["b_gate"]
        return RowForm(b_gate, torch.zeros_like(b_gate), gate["r_mag"].exp(), gate["b_mag"])
