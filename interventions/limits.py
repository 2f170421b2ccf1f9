"""What one request may ask for. Defined here once, published by the server, checked by the compiler."""

from __future__ import annotations

from dataclasses import asdict, dataclass

MAX_INTERVENTIONS = 63
"""Receipts keep one bit per intervention in a signed 64-bit word."""

MAX_SELECTORS = MAX_GATES = 64
"""The engine keeps one bit per selector and token, and one per gate, layer and token."""


@dataclass(frozen=True)
class Limits:
    """Upper bounds per request, and the size of the server's row bank.

    Attributes:
        interventions: entries of ``interventions``.
        instructions: ops over all layers, no-ops included.
        rows: distinct directions and latents that the instructions name.
        rules: rules of all rule sets as written, and distinct ``when`` expressions.
        propositions: distinct propositions of all of them.
        memories: distinct pieces of evidence over several tokens: scopes, counts, orders.
        rule_actions: distinct actions on conclusions, with what a ``when`` gates.
        rule_steps: names and operators of all rules and memories, as the engine runs them.
        inspected_features: listed features over all inspections.
        top_k: ``top_k`` of one inspection.
        selector_parts: members of one ``tokens`` list.
        selector_tokens: token ids and strings of one ``tokens`` field.
        selectors: distinct ``tokens`` and mention scopes of the edits, and one per inspection.
        gates: distinct triggers and sequence gates at one layer.
        bank_rows: rows of all running requests together.
    """

    interventions: int = 32
    instructions: int = 1024
    rows: int = 1024
    rules: int = 64
    propositions: int = 128
    memories: int = 256
    rule_actions: int = 128
    rule_steps: int = 4096
    inspected_features: int = 256
    top_k: int = 128
    selector_parts: int = 64
    selector_tokens: int = 1024
    selectors: int = MAX_SELECTORS
    gates: int = MAX_GATES
    bank_rows: int = 8192

    def __post_init__(self) -> None:
        for name, value in self.as_dict().items():
            if value < 1:
                raise ValueError(f"limit {name} is {value}; it must be at least 1")
        for name, most in (("interventions", MAX_INTERVENTIONS), ("selectors", MAX_SELECTORS), ("gates", MAX_GATES)):
            if getattr(self, name) > most:
                raise ValueError(f"limit {name} is {getattr(self, name)}; it can be at most {most}")
        if self.rows > self.bank_rows:
            raise ValueError(f"limit rows ({self.rows}) exceeds bank_rows ({self.bank_rows}): no request could fill it")

    def as_dict(self) -> dict[str, int]:
        """Name → bound, as in ``/v1/capabilities.limits``."""
        return asdict(self)
