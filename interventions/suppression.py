"""From a concept and a method to one instruction per latent, and the gain tables that APP looks up in.

::

    mask:       x ← 0                                attenuate:  x ← x·(1 − λ)
    range:      x ← 0 where x > 0 and μ − τσ ≤ x ≤ μ + τσ
    app:        x ← x·(1 − λ·P(concept | x))         one lookup per latent and token

x is the latent's current value: what earlier instructions of the request left of it. The strength λ scales ``app`` and
``attenuate``; ``mask`` and ``range`` set to zero at every λ > 0. λ = 0 changes nothing whatever the method.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from msgspec.structs import replace

from interventions.concepts.concept import Concept, Method
from interventions.concepts.gain import HEADER, GainTable, Range
from interventions.errors import InterventionError
from interventions.instruction import Instruction, rounded
from interventions.program import TABLE_HEADER, OpKind, vector_key


def max_bins(d_model: int) -> int:
    """Most bins of a gain table: it takes one row of the bank, behind a header of three numbers."""
    return d_model - TABLE_HEADER


def table_rows(table: GainTable, d_model: int) -> list[bytes]:
    """The bank row of every latent's table, little-endian float32: ``[low, 1/width, nb, P_0 … P_{nb−1}, 0 …]``.

    Raises:
        InterventionError: ``limit_exceeded``: more bins than a row of ``d_model`` numbers holds.
    """
    check_bins(table.n_bins, d_model)
    rows = np.zeros((len(table.rows), d_model), "<f4")
    given = table.rows.numpy()
    rows[:, :HEADER], rows[:, HEADER] = given[:, :HEADER], table.n_bins
    rows[:, TABLE_HEADER : TABLE_HEADER + table.n_bins] = given[:, HEADER:]
    return [(row + np.float32(0.0)).tobytes() for row in rows]


def check_bins(n_bins: int, d_model: int) -> None:
    """Refuse tables that do not fit a row; raises ``limit_exceeded``."""
    if n_bins > max_bins(d_model):
        message = (
            f"the concept has {n_bins} bins; method app takes at most d_model − {TABLE_HEADER} = {max_bins(d_model)}"
        )
        raise InterventionError("limit_exceeded", message)


@dataclass(frozen=True)
class Suppressed:
    """What becomes of one latent: its instruction, and the table that the instruction names."""

    latent: int
    instruction: Instruction
    table: bytes | None = None


def suppress_fitted(
    concept: Concept, method: Method, strength: float, tau: float, d_model: int, base: Instruction
) -> list[Suppressed]:
    """A fitted concept's latents; ``base`` has selector and intervention.

    Raises:
        InterventionError: ``limit_exceeded``: a gain table that does not fit.
    """
    latents = [int(index) for index in concept.features]
    if method == "app":
        gain = replace(base, kind=OpKind.GAIN, strength=rounded(strength))
        tables = table_rows(concept.table, d_model)
        made = zip(latents, tables, strict=True)
        return [Suppressed(j, replace(gain, table=vector_key(row)), row) for j, row in made]
    if method == "range":
        transfer = concept.transfer("range", tau)
        assert isinstance(transfer, Range)
        return _ranges(latents, transfer, strength, base)
    return _whole(latents, method, strength, base)


def suppress_inline(
    latents: Sequence[int],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    method: Method,
    strength: float,
    tau: float,
    base: Instruction,
) -> list[Suppressed]:
    """Latents that the request names itself, with μ and σ for method range."""
    if method == "range":
        assert mean is not None
        assert std is not None
        transfer = Range(torch.tensor(mean, dtype=torch.float32), torch.tensor(std, dtype=torch.float32), tau)
        return _ranges(latents, transfer, strength, base)
    return _whole(latents, method, strength, base)


def _whole(latents: Sequence[int], method: Method, strength: float, base: Instruction) -> list[Suppressed]:
    factor = 1.0 - strength
    if method == "mask":
        factor = 0.0 if strength else 1.0
    return [Suppressed(j, replace(base, alpha=rounded(factor))) for j in latents]


def _ranges(latents: Sequence[int], transfer: Range, strength: float, base: Instruction) -> list[Suppressed]:
    if not strength:
        return [Suppressed(j, base) for j in latents]
    low, high = transfer.bounds
    bounds = zip(low.tolist(), high.tolist(), strict=True)
    # A lower bound below zero says nothing: only positive values are masked.
    masks = [replace(base, kind=OpKind.RANGE, lo=max(lo, 0.0), hi=min(hi, math.inf)) for lo, hi in bounds]
    return [Suppressed(j, mask) for j, mask in zip(latents, masks, strict=True)]
