"""The remaps of the oracle test: every transfer, scope and gate, on ReLU, JumpReLU, TopK and PolySAE dictionaries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from interventions.maps.gates import CusumGate, Gate, ShareGate, WindowGate
from interventions.maps.map import AllTokens, MentionTokens, Scope, SequenceGate, TriggerTokens
from interventions.maps.transfer import (
    Route,
    Transfer,
    Unit,
    canonical,
    clamp_active,
    clamp_hit,
    interpolate,
    moves,
)
from tests.engine.oracle_cases import SIZE, Case, Json, Lab, each, edit, steer
from tests.engine.suppress_cases import suppress

DICTIONARIES = ("standard", "jumprelu", "topk", "polysae")
MANY = 30
"""Latents of a map that takes something away, so that it is felt."""


def remap(
    lab: Lab,
    sae: str,
    transfers: Sequence[Transfer],
    scope: Scope | None = None,
    gate: SequenceGate | None = None,
    **fields: Any,
) -> Json:
    name = lab.map(sae, canonical(transfers), scope or AllTokens(), gate)
    return {"type": "remap", "map": name, **fields}


def names(lab: Lab, *texts: str, tokens: Any = "last") -> MentionTokens:
    return MentionTokens(tuple(sorted({tuple(lab.tokens(text)) for text in texts})), tokens)


def felt(lab: Lab, sae: str, n: int = 10) -> list[Transfer]:
    """Sets some latents high: always felt where it acts."""
    size = 25.0 * SIZE.get(sae.split("/")[0], 1.0)
    return [interpolate(latent, size) for latent in lab.often(sae, n)]


def gated(lab: Lab, sae: str, prompt: int, gate: Callable[[float], Gate], share: float = 0.6) -> SequenceGate:
    """Opens at ``share`` of the largest statistic that the unedited prompt reaches."""
    evidence = (lab.sometimes(sae),)
    return SequenceGate(gate(share * lab.statistic(sae, evidence, gate(0.0), prompt)), evidence)


GATES: dict[str, Callable[[float], Gate]] = {
    "share_prompt": lambda threshold: ShareGate(threshold),
    "share_seen": lambda threshold: ShareGate(threshold, "seen", least=4),
    "window": lambda threshold: WindowGate(threshold, 5, least=3),
    "cusum": lambda threshold: CusumGate(threshold, 0.125),
    "cusum_resets": lambda threshold: CusumGate(threshold, 0.125, reset=True),
    "window_latches": lambda threshold: WindowGate(threshold, 4, latch=True),
}


def _transfers() -> list[Case]:
    makers: dict[str, Callable[[Lab, str], list[Json]]] = {
        "known_to_unknown_at_mentions": lambda lab, sae: [
            remap(lab, sae, felt(lab, sae, 8), names(lab, " Paris", " river that", " mountain it", " small dragon"))
        ],
        "inside_mentions": lambda lab, sae: [
            remap(
                lab,
                sae,
                felt(lab, sae),
                names(lab, " is called the", " on a high mountain", " by the sea", tokens="all"),
            )
        ],
        "clamp_active": lambda lab, sae: [
            remap(lab, sae, [clamp_active(latent, 4.0) for latent in lab.often(sae, MANY)], strength=1.2)
        ],
        "clamp_active_in_norms": lambda lab, sae: [
            remap(lab, sae, [clamp_active(latent, 0.02, Unit.RESIDUAL_NORM) for latent in lab.often(sae, MANY)])
        ],
        "clamp_active_in_means": lambda lab, sae: [
            remap(lab, sae, [clamp_active(latent, 6.0, Unit.PREACT_MEAN) for latent in lab.often(sae, MANY)])
        ],
        "clamp_hit_behind_a_trigger": lambda lab, sae: [
            remap(lab, sae, clamp_hit(lab.often(sae, 8), 9.0), TriggerTokens((lab.sometimes(sae),)))
        ],
        "move": lambda lab, sae: [
            remap(lab, sae, moves([Route(a, b, 4.0, 0.8) for a, b in _pairs(lab.often(sae, 8))]), tokens={"from": 2})
        ],
    }
    cases = []
    for d in DICTIONARIES:
        for name, make in makers.items():
            prompt = len(cases) % 3
            cases.append(Case(f"remap/{d}/{name}", lambda lab, d=d, make=make: make(lab, f"{d}/l15"), prompt=prompt))
    for d in ("constant_norm_rescale", "layer_norm", "topk_layer_norm"):
        for name in ("clamp_active_in_norms", "clamp_active_in_means"):
            make = makers[name]
            cases.append(Case(f"remap/{d}/{name}", lambda lab, d=d, make=make: make(lab, f"{d}/l15")))
    return cases


def _pairs(latents: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(latents[::2], latents[1::2], strict=True))


def _gates() -> list[Case]:
    cases = []
    for d in DICTIONARIES:
        for name, gate in GATES.items():
            prompt = len(cases) % 3

            def make(lab: Lab, sae: str = f"{d}/l15", gate: Any = gate, prompt: int = prompt) -> list[Json]:
                return [remap(lab, sae, felt(lab, sae), gate=gated(lab, sae, prompt, gate))]

            cases.append(Case(f"remap/{d}/gate/{name}", make, prompt=prompt))
    return cases


def _composed() -> list[Case]:
    sae = "jumprelu/l15"

    def with_everything(lab: Lab) -> list[Json]:
        often = lab.often(sae, 8)
        return [
            edit(sae, each(often[:4], op="add", value=6.0)),
            remap(lab, sae, [*felt(lab, sae, 2), *moves([Route(often[2], often[3], 2.0)])], strength=0.5),
            suppress(lab.concept(sae, 8), strength=1.5),
            steer(values=lab.random(20), layer=15, strength=20),
        ]

    def three_layers(lab: Lab) -> list[Json]:
        """A gate at each layer: the later ones listen to a stream that the earlier ones edit."""
        return [
            remap(lab, f"topk/l{0}", felt(lab, "topk/l0", 3), gate=gated(lab, "topk/l0", 1, GATES["window"])),
            remap(lab, sae, felt(lab, sae, 4), gate=SequenceGate(ShareGate(0.2, "seen"), (lab.sometimes(sae),))),
            remap(
                lab,
                "gated/l29",
                felt(lab, "gated/l29"),
                gate=SequenceGate(CusumGate(1.0, 0.1), tuple(sorted(lab.often("gated/l29", 2)))),
            ),
        ]

    def one_latent(lab: Lab) -> list[Json]:
        """Two maps, a gate and a trigger meet on the same latents."""
        trigger, gate = TriggerTokens((lab.sometimes(sae),)), gated(lab, sae, 2, GATES["share_seen"], 0.5)
        return [
            remap(lab, sae, felt(lab, sae, 4), trigger, id="first"),
            remap(
                lab, sae, [clamp_active(latent, 0.05, Unit.RESIDUAL_NORM) for latent in lab.often(sae, 4)], gate=gate
            ),
            remap(lab, sae, felt(lab, sae, 3), names(lab, " dragon", " sea"), gate, strength=2.0, tokens={"from": 3}),
        ]

    def bos(lab: Lab) -> list[Json]:
        gate = SequenceGate(ShareGate(0.05, "seen", include_bos=True), (lab.sometimes(sae),))
        return [remap(lab, sae, felt(lab, sae), TriggerTokens((lab.sometimes(sae),)), gate, include_bos=True)]

    def never_open(lab: Lab) -> list[Json]:
        closed = SequenceGate(ShareGate(1.0, "seen"), (lab.sometimes(sae),))
        off = SequenceGate(CusumGate(0.5, 0.0), (lab.never(sae),))
        return [remap(lab, sae, felt(lab, sae), gate=closed), remap(lab, sae, felt(lab, sae), gate=off)]

    def no_mention(lab: Lab) -> list[Json]:
        found = [names(lab, " Berlin by night", tokens=tokens) for tokens in ("last", "all")]
        return [remap(lab, sae, felt(lab, sae), scope) for scope in found]

    def nothing(lab: Lab) -> list[Json]:
        return [remap(lab, sae, felt(lab, sae), strength=0.0)]

    return [
        Case("remap/composed/with_everything", with_everything, prompt=1),
        Case("remap/composed/gates_at_three_layers", three_layers, prompt=1),
        Case("remap/composed/three_maps_on_one_latent", one_latent, prompt=2),
        Case("remap/composed/position_0_listened_to_and_edited", bos),
        Case(
            "remap/composed/max_dose_clamps",
            lambda lab: [remap(lab, sae, felt(lab, sae, 12))],
            max_dose=0.5,
            clamps=True,
        ),
        Case("remap/never/open", never_open, changes=False, inert=(0, 1)),
        Case("remap/never/mentioned", no_mention, changes=False, inert=(0, 1)),
        Case("remap/never/with_strength_0", nothing, changes=False, inert=(0,)),
    ]


CASES = [*_transfers(), *_gates(), *_composed()]
