"""Readings by absolute position, in the form of ``inspection``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from editserver.api.edit import Choice
    from editserver.api.state import EditState
    from interventions.compile import Compiled


def reading(
    state: EditState, sae: str, choice: Choice, position: int, features: Sequence[tuple[int, float]]
) -> dict[str, Any]:
    """One token: ``{"position", "token", "token_id", "phase", "features": [{"index", "activation", "label"?}]}``."""
    n_prompt = len(choice.prompt)
    token_id = int(choice.prompt[position] if position < n_prompt else choice.output[position - n_prompt])
    labels = state.knowledge(sae).labels
    return {
        "position": position,
        "token": state.catalogue.decode_token(token_id),
        "token_id": token_id,
        "phase": "prompt" if position < n_prompt else "generated",
        "features": [_feature(index, activation, labels.get(index)) for index, activation in features],
    }


def _feature(index: int, activation: float, label: str | None) -> dict[str, Any]:
    shown: dict[str, Any] = {"index": index, "activation": activation if math.isfinite(activation) else None}
    return shown if label is None else shown | {"label": label}


def inspection(compiled: Compiled, tokens: Sequence[list[dict[str, Any]]], as_list: bool) -> Any:
    """``{"sae", "tokens"}`` per inspection, of stand-ins with ``"approximate"``: a list where the request had a list."""
    shown = [
        {"sae": sae, **({"approximate": True} if approximate else {}), "tokens": found}
        for sae, approximate, found in zip(compiled.inspect_ids, compiled.inspect_approximate, tokens, strict=True)
    ]
    return shown if as_list else shown[0]
