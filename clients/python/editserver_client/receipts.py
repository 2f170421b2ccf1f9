"""What was really applied, as the server counted it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, Discriminator, Tag

from .inspection import ANSWER
from .rules import ActionFacts, Firing, PropositionFacts, WhenFacts


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
    fired: int | None = None
    computed_from: int | None = None
    dose_mean: float | None = None
    dose_max: float | None = None
    clamped: int | None = None


class ReceiptEntry(Application):
    """One intervention of the request: numbers at `layer`, or per layer in `layers`.

    `gate` comes with a remap behind a sequence gate, `when` with an intervention that has one.
    """

    id: str
    type: str
    layer: int | None = None
    layers: dict[int, Application] | None = None
    noop: bool | None = None
    gate: GateFacts | None = None
    when: WhenFacts | None = None


class RuleReceipt(BaseModel):
    """One rule set of the request: what it concluded, from what, and what was done about it.

    `fired` has the beginnings of every conclusion, the first 64 of `fired_count`, each with its proof. `propositions`
    are those that held anywhere, `actions` those that acted. `edited` counts, by layer, what the actions wrote. `digest`
    names the rule set in its normal form.
    """

    model_config = ANSWER
    id: str
    type: str
    digest: str | None = None
    fired: list[Firing] = []
    fired_count: int | None = None
    propositions: list[PropositionFacts] = []
    actions: list[ActionFacts] = []
    edited: dict[int, Application] | None = None
    computed_from: int | None = None
    noop: bool | None = None

    @property
    def conclusions(self) -> dict[str, int]:
        """Each conclusion that was drawn → the first token at which it held."""
        found: dict[str, int] = {}
        for firing in self.fired:
            found.setdefault(firing.conclusion, firing.position)
        return found

    @property
    def refused(self) -> bool:
        """Whether it replaced the answer by a message."""
        return any(action.do == "refuse" for action in self.actions)


def _kind(entry: Any) -> str:
    kind = entry.get("type") if isinstance(entry, dict) else getattr(entry, "type", None)
    return "rules" if kind == "rules" else "other"


Entry = Annotated[Annotated[RuleReceipt, Tag("rules")] | Annotated[ReceiptEntry, Tag("other")], Discriminator(_kind)]


class Receipt(BaseModel):
    """`digest` names the program that ran (None when all were no-ops); `receipt` has an entry per intervention."""

    model_config = ANSWER
    digest: str | None
    receipt: list[Entry]

    @property
    def rules(self) -> list[RuleReceipt]:
        """The entries of rule sets."""
        return [entry for entry in self.receipt if isinstance(entry, RuleReceipt)]

    def entry(self, id: str) -> Any:
        """The entry of the intervention labelled `id` (by default its place in the list, ``"0"``, ``"1"`` …).

        Raises:
            KeyError: no such label, with the labels that are there.
        """
        for entry in self.receipt:
            if entry.id == id:
                return entry
        raise KeyError(f"{id!r}; the receipt has {[entry.id for entry in self.receipt]}")
