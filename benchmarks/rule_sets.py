"""Rule sets of the benchmarks' requests: propositions on latents of their own, and a flag on every conclusion."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from interventions.program import Channel, Gate, GateKind, LayerProgram, Op, ReadKind
from interventions.rules.assemble import Assembled, Dictionary, Part, Trigger, assemble
from interventions.rules.reading import parse_ruleset

STRIDE = 2237
"""A prime: latents i · STRIDE mod width are spread over the file, as features that people pick are, and all different."""


def flagged(
    rules: str, conclusions: int, terms: Sequence[Sequence[int]], sae: str, digest: str, layer: int
) -> Assembled:
    """Propositions ``p0`` … on the latents ``terms`` (the first minus the others is positive), ``rules`` that conclude ``c01`` …
    from them, and an action on each conclusion, in order."""
    lines = [
        f"proposition p{p} = {' - '.join(f'feature({sae}, {latent})' for latent in latents)} > 0"
        for p, latents in enumerate(terms)
    ]
    heads = [f"c{number:02}" for number in range(1, conclusions + 1)]
    text = "\n".join(lines) + rules + "".join(f"on {head}: flag\n" for head in heads)
    triggers = [Trigger(0, head) for head in heads]
    return assemble([Part(parse_ruleset(text))], triggers, lambda _: Dictionary(digest, layer, False), effects=[layer])


def behind(action: int, latent: str, op: Op, layer: int) -> LayerProgram:
    """An edit of the latent of that key, where the action is active."""
    gate = Gate(GateKind.RULE, ReadKind.LATENT, (), action=action)
    return LayerProgram(layer, (Channel(ReadKind.LATENT, latent, (replace(op, gates=(0,)),)),), (gate,))
