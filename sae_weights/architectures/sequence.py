"""What dictionaries that read a whole sequence have in common: they are refused."""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor

from .base import Architecture, Gate


class SequenceWide(Architecture):
    """f of one token depends on other tokens, so no function of one activation computes it. ``why_not`` says more.

    Registered so that a checkpoint of this kind is refused by name, with the reason. ``SAE`` raises SAEFormatError.
    """

    execution = "sequence"

    def shift_input(self, gate: Gate, projection: Tensor) -> NoReturn:
        self._refuse()

    def scale_rows(self, gate: Gate, scale: Tensor) -> NoReturn:
        self._refuse()

    def row_form(self, gate: Gate) -> NoReturn:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise NotImplementedError(f"{self.title}: {self.why_not}")
