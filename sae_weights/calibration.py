"""The threshold that stands in for TopK membership, measured on a model's own activations, as BatchTopK does.

::

    θ: the value above which, over all tokens together, as many r = p · rank_scale lie as the membership rule keeps
    f' = relu(p) where r > θ

A token then has the same number of latents on average, not exactly; membership of one latent no longer depends on the
others, so its own row is all that an edit needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .sae import SAE

# Positive floats sort like their bit patterns: the upper 20 of 31 bits are bins of a relative width of 2^-12.
_SHIFT = 11
_BINS = 1 << (31 - _SHIFT)
_CHUNK_VALUES = 1 << 23

Report = Callable[[int, int], None]
"""(tokens done, tokens in all)"""


@dataclass(frozen=True)
class Calibration:
    """A threshold, and how the dictionary read with it compares with the dictionary itself, on held-out tokens.

    Attributes:
        threshold: θ, in the units that membership is decided in.
        tokens, held_out_tokens: what it was measured on and judged on.
        l0, l0_approximate: latents per token.
        agreement: mean over tokens of |members of both| / |members of either|.
        kept, added: of the exact members, the share that still is one; of the approximate ones, the share that was none.
        fvu, fvu_approximate: Σ‖x − x̂‖² / Σ‖x − mean‖².
    """

    threshold: float
    tokens: int
    held_out_tokens: int
    l0: float
    l0_approximate: float
    agreement: float
    kept: float
    added: float
    fvu: float
    fvu_approximate: float

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


@torch.inference_mode()
def calibrate(sae: SAE, values: Tensor, held_out: Tensor, report: Report = lambda done, total: None) -> Calibration:
    """Measure θ on ``values`` [m, d] and judge it on ``held_out`` [m', d], raw activations of ordinary tokens.

    Raises SAEFormatError for architectures that no threshold stands in for.
    """
    sae.thresholded(0.0)
    total = len(values) + len(held_out)
    theta = find_threshold(sae, values, lambda done: report(done, total))
    scale = sae.gate.get("rank_scale")
    mean = held_out.float().mean(0)
    exact_count = near_count = both = agreement = error = near_error = variance = 0.0
    done = len(values)
    for x, pre in _pre_activations(sae, held_out):
        exact = sae.activate(pre)
        near = torch.relu(pre) * ((pre if scale is None else pre * scale) > theta)
        members, near_members = exact != 0, near != 0
        common = (members & near_members).sum(1).float()
        either = (members | near_members).sum(1).float()
        agreement += float((common / either.clamp_min(1)).sum() + (either == 0).sum())
        exact_count += float(members.sum())
        near_count += float(near_members.sum())
        both += float(common.sum())
        error += float((x - sae.decode_for(x, exact)).pow(2).sum())
        near_error += float((x - sae.decode_for(x, near)).pow(2).sum())
        variance += float((x - mean).pow(2).sum())
        done += len(x)
        report(done, total)
    m = len(held_out)
    return Calibration(
        threshold=theta,
        tokens=len(values),
        held_out_tokens=m,
        l0=exact_count / m,
        l0_approximate=near_count / m,
        agreement=agreement / m,
        kept=both / max(exact_count, 1),
        added=1 - both / max(near_count, 1),
        fvu=error / variance,
        fvu_approximate=near_error / variance,
    )


@torch.inference_mode()
def find_threshold(sae: SAE, values: Tensor, report: Callable[[int], None] = lambda done: None) -> float:
    """θ for which Σ 1[r > θ] over tokens and latents is the number of memberships, to about 0.02 %; at least 0."""
    scale = sae.gate.get("rank_scale")
    counts = torch.zeros(_BINS, dtype=torch.int64)
    members, done = 0, 0
    for x, pre in _pre_activations(sae, values):
        members += int((sae.activate(pre) != 0).sum())
        ranked = pre if scale is None else pre * scale
        positive = ranked[ranked > 0]
        counts += torch.bincount(positive.view(torch.int32).long() >> _SHIFT, minlength=_BINS)
        done += len(x)
        report(done)
    # above[b]: how many values lie in bin b or a higher one.
    above = counts.flip(0).cumsum(0).flip(0)
    if int(above[0]) <= members:
        return 0.0
    # The edge whose count is nearest: r > (edge of b) are the values of bin b and above, up to equality with the edge.
    edge = int((above - members).abs().argmin())
    pattern = torch.tensor((edge << _SHIFT) - 1 if edge else 0, dtype=torch.int32)
    return float(pattern.view(torch.float32))


def _pre_activations(sae: SAE, values: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for chunk in values.split(max(1, _CHUNK_VALUES // sae.n_features)):
        x = chunk.float()
        yield x, sae.pre_activations(x)
