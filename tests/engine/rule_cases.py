"""The rules of the oracle test: evidence of one and of several tokens, chains over layers, durations, every kind of edit."""

from __future__ import annotations

import json
from typing import Any

from tests.engine.oracle_cases import SIZE, Case, Json, Lab, edit, steer


def rules(*lines: str, **fields: Any) -> Json:
    return {"type": "rules", "text": "\n".join(lines), **fields}


def on(sae: str, latent: int) -> str:
    """The proposition that a latent is on."""
    return f"feature({sae}, {latent}) > 0"


def do(intervention: Json) -> str:
    return f"do {json.dumps(intervention)}"


def felt(lab: Lab, sae: str) -> Json:
    """Sets some latents high: always felt where it acts."""
    size = 25.0 * SIZE.get(sae.split("/")[0], 1.0)
    return edit(sae, [{"index": latent, "op": "set", "value": size} for latent in lab.often(sae, 10)])


def _one_token(lab: Lab) -> list[Json]:
    early = on("jumprelu/l0", lab.sometimes("jumprelu/l0"))
    return [rules(f"rule: {early} -> here", f"on here: {do(felt(lab, 'jumprelu/l15'))}")]


def _chain(lab: Lab) -> list[Json]:
    return [
        rules(
            f"proposition a = {on('jumprelu/l0', lab.sometimes('jumprelu/l0'))}",
            f"proposition b = {on('topk/l15', lab.sometimes('topk/l15'))}",
            "rule: at least 2 of seen(a) -> latch many",
            "rule: many and b -> both",
            f"on both: {do(felt(lab, 'polysae/l15'))} for 3 tokens",
            f"on many: {do(felt(lab, 'jumprelu/l29'))} from now on",
            "on both: flag",
        )
    ]


def _prompt(lab: Lab) -> list[Json]:
    a = on("standard/l0", lab.sometimes("standard/l0"))
    return [rules(f"rule: at least 10 % of prompt({a}) -> much", f"on much: {do(felt(lab, 'gated/l29'))} from now on")]


def _order(lab: Lab) -> list[Json]:
    norm = "layer_norm/l15"
    first, second = lab.often(norm, 2)
    return [
        rules(
            f"proposition a = {on('gated/l0', lab.sometimes('gated/l0'))}",
            f"proposition b = 2 * feature({norm}, {first}) - 0.5 * feature({norm}, {second}) > 0.01",
            f"proposition c = tree(jumprelu/l15, if {lab.sometimes('jumprelu/l15')} > 0 then 1 else 0) > 0.5",
            "rule: a before b before a -> latch later",
            "rule: later and at least 2 of last(5, c or a) -> near",
            f"on near: {do(steer(values=lab.random(3), layer=29, strength=400.0))}",
        )
    ]


def _when(lab: Lab) -> list[Json]:
    a = on("jumprelu/l0", lab.sometimes("jumprelu/l0"))
    c = on("topk/l15", lab.sometimes("topk/l15"))
    return [
        rules(f"rule: {a} -> here", "on here: log", when=f"seen({c})"),
        felt(lab, "jumprelu/l15") | {"when": f"seen({a}) and not {c}"},
        steer(values=lab.random(4), layer=29, strength=400.0, when="here"),
    ]


def _never(lab: Lab) -> list[Json]:
    off = on("gated/l15", lab.never("gated/l15"))
    return [rules(f"rule: {off} -> here", f"on here: {do(felt(lab, 'jumprelu/l15'))}")]


CASES = [
    Case("rules/one_token_at_a_later_layer", _one_token),
    Case("rules/chained_over_layers", _chain, prompt=1),
    Case("rules/closed_at_the_end_of_the_prompt", _prompt, prompt=2),
    Case("rules/order_and_window", _order),
    Case("rules/when", _when, prompt=1, inert=(0,)),
    Case("rules/never", _never, changes=False, inert=(0,)),
]
