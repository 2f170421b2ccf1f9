"""What an SAE sees in texts, token by token, as evidence: position 0 and tokens of an extraordinary norm are none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from editserver.api.passes import Passes
from editserver.api.state import EditState
from editserver.catalogue import ServedSAE

OUTLIER = 10.0
"""Tokens whose norm exceeds this multiple of the median are no evidence."""

_PROBE = 1e-6
"""Length of the edit whose dose tells a token's norm: far below what bfloat16 can add to a residual stream."""

Floats = npt.NDArray[np.float64]


def norm_probe(state: EditState, layer: int) -> dict[str, Any]:
    """An edit so short that it rounds away: its dose tells each token's norm. Readings are of the unedited stream anyway."""
    values = [1.0] + [0.0] * (state.catalogue.d_model - 1)
    return {"type": "steer", "values": values, "layer": layer, "strength": _PROBE, "tokens": "prompt"}


def read_all(state: EditState, sae: ServedSAE) -> dict[str, Any]:
    """The inspection that reports as many features of each prompt token as the server does."""
    return {"sae": sae.id, "tokens": "prompt", "top_k": reported_per_token(state, sae)}


def reported_per_token(state: EditState, sae: ServedSAE) -> int:
    """How many features of one token can be reported at most."""
    return min(state.catalogue.limits.top_k, sae.sae.n_features)


@dataclass(frozen=True)
class Seen:
    """The activations of one text: reading i is feature ``features[i]`` at token ``tokens[i]``, with ``values[i]``.

    Attributes:
        norms: ‖h‖ of each token, ``[n_tokens]``.
        reported: how many non-zero features were reported at each token.
    """

    tokens: npt.NDArray[np.int64]
    features: npt.NDArray[np.int64]
    values: Floats
    norms: Floats
    reported: npt.NDArray[np.int64]

    @classmethod
    def of(cls, passes: Passes, index: int, layer: int | None, read: int = 0) -> Seen:
        """Prompt ``index`` of a pass with :func:`read_all` as its inspection number ``read``.

        Args:
            layer: where the pass had :func:`norm_probe` as its first intervention; without one, norms are all 1.
        """
        choice = passes.choices[index]
        journal, stop = choice.journal, choice.fed
        assert journal is not None
        readings = journal.readings(read, 1, stop)
        reported = np.array([len(features) for _, features in readings], np.int64)
        pairs = [pair for _, features in readings for pair in features]
        norms = np.ones(len(readings))
        if layer is not None:
            # The receipt's totals up to each position; their differences are the doses ‖probe‖ / ‖h‖ of single tokens.
            totals = [journal.stats(0, layer, position + 1) for position in range(stop)]
            doses = np.diff([total.fired * total.dose_mean for total in totals])
            norms = _PROBE / np.maximum(doses, 1e-30)
        return cls(
            tokens=np.repeat(np.arange(len(readings)), reported),
            features=np.array([feature for feature, _ in pairs], np.int64),
            values=np.nan_to_num(np.array([value for _, value in pairs], np.float64)),
            norms=norms,
            reported=reported,
        )


def ordinary_tokens(sae: ServedSAE, texts: Sequence[Seen]) -> list[npt.NDArray[np.bool_]]:
    """Per text, which tokens have an ordinary norm; the median is the dictionary's own if it knows one."""
    median = sae.sae.metadata.get("median_norm")
    if not isinstance(median, (int, float)) or not median > 0:
        median = float(np.median(np.concatenate([text.norms for text in texts])))
    return [text.norms <= OUTLIER * median for text in texts]


def truncated_tokens(
    state: EditState, sae: ServedSAE, texts: Sequence[Seen], kept: Sequence[npt.NDArray[np.bool_]]
) -> int:
    """How many of the ``kept`` tokens may have had more active features than were reported."""
    top_k = reported_per_token(state, sae)
    # A TopK dictionary with k ≤ top_k reports k features everywhere, and these are all.
    if top_k >= sae.sae.n_features or (sae.sae.k is not None and sae.sae.k <= top_k):
        return 0
    return int(sum((text.reported[mask] >= top_k).sum() for text, mask in zip(texts, kept, strict=True)))
