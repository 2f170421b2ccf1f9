"""What was really applied, as the server counted it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from .inspection import ANSWER


class GateFacts(BaseModel):
    """What the sequence gate of a remap saw: it opens where its statistic exceeds `threshold`.

    `statistic` is the largest one up to here, `open_from` the first position at which the gate was open (None: nowhere).
    `over` (prompt, seen) says of a share what it is of.
    """

    model_config = ANSWER
    kind: str
    over: str | None = None
    threshold: float
    statistic: float
    open_from: int | None


class Application(BaseModel):
    """One intervention at one layer.

    `tokens_edited` and `prompt_tokens_edited` count the selected positions (of a remap, those in its mentions); `fired`
    (non-zero delta) and the doses (‖delta‖ / ‖h‖) cover the positions computed in this request, from `computed_from` on;
    `clamped` counts tokens that the operator's dose limit scaled down.
    """

    model_config = ANSWER
    tokens_edited: int | None = None
    prompt_tokens_edited: int | None = None
    fired: int | list[dict[str, Any]] | None = None
    computed_from: int | None = None
    dose_mean: float | None = None
    dose_max: float | None = None
    clamped: int | None = None


class ReceiptEntry(Application):
    """One intervention of the request: numbers at `layer`, or per layer in `layers`; rules list what `fired`.

    `gate` comes with a remap behind a sequence gate.
    """

    id: str
    type: str
    layer: int | None = None
    layers: dict[int, Application] | None = None
    noop: bool | None = None
    gate: GateFacts | None = None


class Receipt(BaseModel):
    """`digest` names the program that ran (None when all were no-ops); `receipt` has an entry per intervention."""

    model_config = ANSWER
    digest: str | None
    receipt: list[ReceiptEntry]

    def entry(self, id: str) -> ReceiptEntry:
        """The entry of the intervention labelled `id` (by default its place in the list, ``"0"``, ``"1"`` …).

        Raises:
            KeyError: no such label, with the labels that are there.
        """
        for entry in self.receipt:
            if entry.id == id:
                return entry
        raise KeyError(f"{id!r}; the receipt has {[entry.id for entry in self.receipt]}")
