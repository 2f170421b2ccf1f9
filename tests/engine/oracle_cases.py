"""The edits of the oracle test: every mode, op, selector, dictionary and layer, as a client would write them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from interventions.maps.gates import Gate
from interventions.maps.map import Scope, SequenceGate
from interventions.maps.transfer import Transfer

Json = dict[str, Any]


class Lab(Protocol):
    """What a case may ask for: facts about the unedited model, measured by the reference on the test's own prompts."""

    def often(self, sae: str, n: int = 1) -> list[int]:
        """The ``n`` latents of the dictionary with the largest mean |activation| past position 0."""

    def sometimes(self, sae: str) -> int:
        """A latent that is on for some ordinary tokens of every prompt and off for others."""

    def never(self, sae: str) -> int:
        """A latent that is off for every token, position 0 included."""

    def mean(self, layer: int) -> list[float]:
        """Mean residual stream over the ordinary tokens: a direction along which h·v̂ is large."""

    def along(self, layer: int) -> float:
        """Mean of h·v̂ for v = ``mean(layer)``."""

    def random(self, seed: int) -> list[float]:
        """A random vector of norm 1."""

    def moments(self, sae: str, latents: Sequence[int]) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of the latents' positive activations past position 0."""

    def concept(self, sae: str, n: int, seed: int = 0) -> str:
        """Name of a library concept of the ``n`` most active latents, its tables over their own range."""

    def map(self, sae: str, transfers: Sequence[Transfer], scope: Scope, gate: SequenceGate | None) -> str:
        """Name of a library map of these parts."""

    def tokens(self, text: str) -> list[int]:
        """Its token ids."""

    def statistic(self, sae: str, evidence: Sequence[int], gate: Gate, prompt: int) -> float:
        """The gate's largest statistic over prompt number ``prompt``."""


@dataclass(frozen=True)
class Case:
    """One request. ``changes`` is False where the answer must be the plain one (within the same tolerance)."""

    name: str
    interventions: Callable[[Lab], list[Json]]
    prompt: int = 0
    inspect: Callable[[Lab], Any] = field(default=lambda lab: None)
    changes: bool = True
    max_dose: float | None = None
    refuses: bool = False
    clamps: bool = False
    inert: tuple[int, ...] = ()
    """Indices of interventions that must be reported as never having fired."""


def steer(**fields: Any) -> Json:
    return {"type": "steer", **fields}


def edit(sae: str, features: Sequence[Json], **fields: Any) -> Json:
    return {"type": "edit_features", "sae": sae, "features": list(features), **fields}


def each(indices: Sequence[int], **op: Any) -> list[Json]:
    return [{"index": i, **op} for i in indices]


# What a delta must be to be felt at a layer: the median ‖h‖ there is about 40, 170 and 750.
FELT = {0: 20.0, 15: 80.0, 29: 400.0}

DICTIONARIES = ("standard", "jumprelu", "gated", "topk", "constant_norm_rescale", "layer_norm")


def _steering() -> list[Case]:
    cases = []
    for layer, size in FELT.items():

        def case(name: str, layer: int = layer, **fields: Any) -> Case:
            bound = {k: fields.pop(k) for k in ("min", "max") if k in fields}

            def make(lab: Lab) -> list[Json]:
                scaled = {k: v * lab.along(layer) for k, v in bound.items()}
                return [steer(values=lab.mean(layer), layer=layer, **fields, **scaled)]

            return Case(f"steer/{name}/l{layer}", make)

        cases += [
            case("normalized", mode="normalized", strength=-0.5),
            case("project_out", mode="project_out"),
            case("project_out_partly", mode="project_out", strength=0.4),
            case("project_out_reflects", mode="project_out", strength=2),
            case("cap_above", mode="cap", max=0.4),
            case("cap_below", mode="cap", min=1.8),
            case("cap_both", mode="cap", min=-0.2, max=0.1),
            Case(
                f"steer/add/l{layer}",
                lambda lab, layer=layer, size=size: [steer(values=lab.random(layer), layer=layer, strength=size)],
            ),
            Case(
                f"steer/feature/l{layer}",
                lambda lab, layer=layer, size=size: [steer(sae=f"gated/l{layer}", feature=7, strength=size / 3)],
                prompt=1,
            ),
        ]
    return cases


OPS: dict[str, tuple[Json, int]] = {
    "set": ({"op": "set", "value": 12.0}, 4),
    "set_negative": ({"op": "set", "value": -12.0}, 4),
    "scale": ({"op": "scale", "value": 6.0}, 6),
    "add": ({"op": "add", "value": 12.0}, 4),
    "clamp_min": ({"op": "clamp", "min": 12.0}, 4),
    "clamp_max": ({"op": "clamp", "max": 0.25}, 40),
    "clamp_both": ({"op": "clamp", "min": 9.0, "max": 12.0}, 6),
    "ablate": ({"op": "ablate"}, 40),
}
"""Name → the op, and on how many of the most active latents."""


def _ops() -> list[Case]:
    cases = []
    for dictionary in DICTIONARIES:
        for name, (op, n) in OPS.items():
            for active in (False, True):

                def make(lab: Lab, d: str = dictionary, op: Json = op, n: int = n, active: bool = active) -> list[Json]:
                    latents = [*lab.often(f"{d}/l15", n), lab.sometimes(f"{d}/l15")]
                    flags = {"only_if_active": True} if active else {}
                    return [edit(f"{d}/l15", each(dict.fromkeys(latents), **op, **flags))]

                label = f"{dictionary}/{name}{'/only_if_active' if active else ''}/l15"
                cases.append(Case(label, make, prompt=len(cases) % 3))
    for dictionary in ("standard", "jumprelu", "gated", "topk"):
        for layer in (0, 29):
            for name in ("set", "scale", "ablate"):

                def make_at(lab: Lab, d: str = dictionary, at: int = layer, name: str = name) -> list[Json]:
                    op, n = OPS[name]
                    op = op | ({"value": op["value"] * FELT[at] / FELT[15]} if name == "set" else {})
                    return [edit(f"{d}/l{at}", each(lab.often(f"{d}/l{at}", n), **op))]

                cases.append(Case(f"{dictionary}/{name}/l{layer}", make_at, prompt=len(cases) % 3))
    return cases


SELECTORS: dict[str, Any] = {
    "all": "all",
    "prompt": "prompt",
    "generated": "generated",
    "last_prompt_token": "last_prompt_token",
    "slice": {"from": 3, "to": 9},
    "slice_open": {"from": 12},
    "slice_to": {"to": 7},
    "slice_negative": {"from": -6, "to": -2},
    "slice_negative_open": {"from": -4},
    "slice_mixed": {"from": 5, "to": -3},
    "slice_past_the_prompt": {"from": 0, "to": 500},
    "token_ids": {"tokens": [7042, 260]},
    "string": {"tokens": [" Paris", ","]},
    "string_without_its_space": {"tokens": ["boils"]},
    "union": ["last_prompt_token", "generated"],
    "union_of_all_kinds": [{"from": 2, "to": 4}, {"tokens": [" Paris"]}, {"from": -2}],
}


PROMPT_OF = {"string_without_its_space": 1}
"""The selectors that are written for another prompt than the first. (" boils" is one token, "boils" is two.)"""


def _selectors() -> list[Case]:
    cases = []
    for name, tokens in SELECTORS.items():
        cases.append(
            Case(
                f"tokens/{name}/steer",
                lambda lab, tokens=tokens: [steer(values=lab.random(5), layer=15, strength=160, tokens=tokens)],
                prompt=PROMPT_OF.get(name, 0),
            )
        )
        cases.append(
            Case(
                f"tokens/{name}/edit_features",
                lambda lab, tokens=tokens: [
                    edit("jumprelu/l15", each(lab.often("jumprelu/l15", 6), op="set", value=20.0), tokens=tokens)
                ],
                prompt=PROMPT_OF.get(name, 0),
            )
        )
    sink = {"mode": "normalized", "strength": 0.7}
    cases += [
        Case(
            "tokens/position_0_with_include_bos",
            lambda lab: [steer(values=lab.random(6), layer=15, tokens={"from": 0, "to": 1}, include_bos=True, **sink)],
        ),
        Case(
            "tokens/id_at_position_0_with_include_bos",
            lambda lab: [steer(values=lab.random(6), layer=15, tokens={"tokens": [1]}, include_bos=True, **sink)],
        ),
        Case(
            "tokens/id_at_position_0_without",
            lambda lab: [steer(values=lab.random(6), layer=15, tokens={"tokens": [1]}, **sink)],
            changes=False,
            inert=(0,),
        ),
        Case(
            "tokens/all_with_include_bos",
            lambda lab: [edit("standard/l15", each(lab.often("standard/l15", 40), op="ablate"), include_bos=True)],
        ),
    ]
    return cases


def _composed() -> list[Case]:
    def one_latent(lab: Lab) -> list[Json]:
        f = lab.often("jumprelu/l15")[0]
        return [
            edit("jumprelu/l15", [{"index": f, "op": "add", "value": 30.0}]),
            edit("jumprelu/l15", [{"index": f, "op": "scale", "value": 1.5}], tokens="prompt"),
            edit("jumprelu/l15", [{"index": f, "op": "clamp", "min": 10.0, "max": 40.0}], tokens={"from": 4}),
            edit("jumprelu/l15", [{"index": f, "op": "scale", "value": -1.0, "only_if_active": True}]),
        ]

    def opposite(lab: Lab) -> list[Json]:
        v, size = lab.mean(15), lab.along(15)
        return [
            steer(values=v, layer=15, mode="project_out", strength=0.5, tokens="prompt"),
            steer(values=[-x for x in v], layer=15, mode="cap", max=-0.8 * size),
            steer(values=[-x for x in v], layer=15, mode="cap", min=-0.85 * size, tokens="generated"),
        ]

    def crossing(lab: Lab) -> list[Json]:
        v, w = lab.mean(15), lab.random(7)
        return [
            steer(values=v, layer=15, mode="project_out"),
            steer(values=[a + 40 * b for a, b in zip(v, w, strict=True)], layer=15, mode="cap", max=10.0),
            steer(values=w, layer=15, mode="normalized", strength=0.3),
            steer(values=w, layer=15, strength=20),
        ]

    def everywhere(lab: Lab) -> list[Json]:
        return [
            edit("topk/l0", each(lab.often("topk/l0", 3), op="scale", value=3.0)),
            edit("gated/l15", each(lab.often("gated/l15", 3), op="set", value=12.0), tokens="generated"),
            edit(
                "standard/l29", each(lab.often("standard/l29", 3), op="add", value=30.0), tokens=["last_prompt_token"]
            ),
            steer(values=lab.random(8), layers=[0, 15, 29], strength=8),
            steer(values=[lab.random(9), lab.random(10)], layers=[15, 29], strength=30, tokens="prompt"),
        ]

    def dictionaries(lab: Lab) -> list[Json]:
        names = [f"{d}/l15" for d in DICTIONARIES]
        return [edit(name, each(lab.often(name, 2), op="scale", value=2.5)) for name in names] + [
            steer(sae="jumprelu/l15", feature=lab.often("jumprelu/l15")[0], strength=5)
        ]

    def topk_members(lab: Lab) -> list[Json]:
        often = lab.often("topk/l15", 4)
        return [
            edit("topk/l15", each(often[:2], op="ablate")),
            edit("topk/l15", each(often[2:], op="set", value=25.0)),
            edit("topk/l15", [{"index": lab.never("topk/l15"), "op": "add", "value": 12.0}]),
            edit("topk/l15", [{"index": often[0], "op": "add", "value": 5.0, "only_if_active": True}]),
        ]

    def dead(lab: Lab) -> list[Json]:
        f = lab.never("gated/l15")
        return [
            edit("gated/l15", [{"index": f, "op": "scale", "value": 9.0}]),
            edit("gated/l15", [{"index": f, "op": "set", "value": 50.0, "only_if_active": True}]),
        ]

    def undone(lab: Lab) -> list[Json]:
        f = lab.often("standard/l15")[0]
        return [
            edit("standard/l15", [{"index": f, "op": "add", "value": 64.0}]),
            edit("standard/l15", [{"index": f, "op": "ablate"}]),
            edit("standard/l15", each(lab.often("standard/l15", 20)[1:], op="set", value=6.0)),
        ]

    return [
        Case("composed/four_ops_on_one_latent", one_latent, prompt=1),
        Case("composed/one_direction_and_its_opposite", opposite),
        Case("composed/different_directions", crossing, prompt=2),
        Case("composed/three_layers", everywhere, inspect=lambda lab: [{"sae": "jumprelu/l29", "top_k": 3}]),
        Case("composed/six_dictionaries_at_one_layer", dictionaries, prompt=1),
        Case("composed/topk_membership_is_decided_before_the_edit", topk_members),
        Case("composed/a_latent_that_never_fires", dead, prompt=2, changes=False, inert=(0, 1)),
        Case("composed/an_op_undone_by_the_next", undone, prompt=2),
    ]


def _dose() -> list[Case]:
    def strong(lab: Lab) -> list[Json]:
        return [
            steer(values=lab.random(11), layer=15, strength=300),
            edit("jumprelu/l29", each(lab.often("jumprelu/l29", 3), op="scale", value=2.0)),
        ]

    return [
        Case("max_dose/clamps", strong, max_dose=0.5, clamps=True),
        Case("max_dose/clamps_low", strong, prompt=1, max_dose=0.125, clamps=True),
        Case("max_dose/does_not_bind", strong, prompt=2, max_dose=50.0),
        Case("max_dose/refuses", strong, max_dose=0.5, refuses=True),
    ]


def _inspections() -> list[Case]:
    none: Callable[[Lab], list[Json]] = lambda lab: []  # noqa: E731

    def edited(lab: Lab) -> list[Json]:
        return [
            steer(values=lab.random(12), layer=0, strength=15),
            steer(values=lab.mean(15), layer=15, mode="project_out"),
        ]

    cases = [
        Case(
            f"inspect/{d}/l15",
            none,
            prompt=i % 3,
            changes=False,
            inspect=lambda lab, d=d: {
                "sae": f"{d}/l15",
                "top_k": 5,
                "features": [lab.sometimes(f"{d}/l15"), lab.never(f"{d}/l15"), *lab.often(f"{d}/l15", 2)],
            },
        )
        for i, d in enumerate(DICTIONARIES)
    ]
    cases += [
        Case(
            f"inspect/{d}/edited/after_{after}/l15".lower(),
            edited,
            prompt=i % 3,
            inspect=lambda lab, d=d, after=after: {
                "sae": f"{d}/l15",
                "top_k": 4,
                "features": lab.often(f"{d}/l15", 3),
                "after": after,
            },
        )
        for i, d in enumerate(DICTIONARIES)
        for after in (False, True)
    ]
    cases += [
        Case(
            f"inspect/tokens/{name}",
            edited,
            prompt=PROMPT_OF.get(name, 0),
            inspect=lambda lab, tokens=tokens: [
                {"sae": "standard/l0", "features": lab.often("standard/l0", 2), "tokens": tokens},
                {"sae": "topk/l29", "top_k": 3, "tokens": tokens, "after": True},
            ],
        )
        for name, tokens in SELECTORS.items()
    ]
    cases += [
        Case(
            "inspect/position_0_with_include_bos",
            none,
            changes=False,
            inspect=lambda lab: [
                {"sae": "layer_norm/l15", "top_k": 2, "include_bos": True},
                {"sae": "gated/l29", "features": [0, 1, 2], "tokens": {"to": 3}, "include_bos": True},
            ],
        )
    ]
    return cases


CLASSES = (
    "abstopk", "glu", "gradient", "groupmax", "itda", "matching_pursuit", "plain_topk", "polysae", "top_afa", "vsae",
    "unit_norm", "centre", "native", "topk_layer_norm", "approximate", "prefix",
)  # fmt: skip
"""Every way of execution that is not among ``DICTIONARIES``; ``conftest.sae_classes`` says what they are."""

# Latents of dictionaries with unit decoder rows are worth less.
SIZE = {"itda": 3.0, "matching_pursuit": 3.0, "polysae": 0.6}


def _classes() -> list[Case]:
    """One request with every op on each kind of dictionary, and one whose edit and reading are of the same one."""
    cases = []
    for i, d in enumerate(CLASSES):
        sae, size = f"{d}/l15", SIZE.get(d, 1.0)

        def ops(lab: Lab, sae: str = sae, size: float = size) -> list[Json]:
            often, now_and_then = lab.often(sae, 8), lab.sometimes(sae)
            return [
                edit(sae, each(often[:2], op="set", value=12.0 * size)),
                edit(sae, each(often[2:4], op="scale", value=-2.0), tokens="prompt"),
                edit(sae, each([now_and_then], op="add", value=9.0 * size, only_if_active=True)),
                edit(sae, each(often[4:6], op="clamp", min=6.0 * size), tokens=["last_prompt_token", "generated"]),
                edit(sae, each(often[6:8], op="ablate")),
                edit(sae, each(often[:1], op="add", value=5.0 * size), tokens={"from": 4}),
            ]

        def active(lab: Lab, sae: str = sae, size: float = size) -> list[Json]:
            on = list(dict.fromkeys([*lab.often(sae, 5), lab.sometimes(sae)]))
            return [edit(sae, each(on, op="scale", value=3.0, only_if_active=True), tokens={"from": 3})]

        def looked_at(lab: Lab, sae: str = sae, after: bool = bool(i % 2)) -> Json:
            return {"sae": sae, "top_k": 5, "features": [*lab.often(sae, 2), lab.sometimes(sae)], "after": after}

        cases.append(Case(f"class/{d}/every_op", ops, prompt=i % 3))
        cases.append(Case(f"class/{d}/edited_and_inspected", active, prompt=(i + 1) % 3, inspect=looked_at))

    def strong(lab: Lab) -> list[Json]:
        return [
            edit("polysae/l15", each(lab.often("polysae/l15", 4), op="set", value=15.0)),
            steer(values=lab.random(13), layer=15, strength=60),
        ]

    def together(lab: Lab) -> list[Json]:
        names = [f"{d}/l15" for d in CLASSES]
        return [edit(name, each(lab.often(name, 2), op="scale", value=1.7)) for name in names]

    def undone(lab: Lab) -> list[Json]:
        latents = lab.often("polysae/l15", 3)
        return [
            edit("polysae/l15", each(latents, op="scale", value=2.0)),
            edit("polysae/l15", each(latents, op="scale", value=0.5)),
        ]

    return [
        *cases,
        Case("class/polysae/max_dose_clamps_the_sum", strong, max_dose=0.5, clamps=True),
        Case("class/polysae/an_edit_undone", undone, prompt=1, changes=False, inert=(0, 1)),
        Case("class/all_at_one_layer", together, prompt=2),
    ]


CASES = [*_steering(), *_ops(), *_selectors(), *_composed(), *_dose(), *_inspections(), *_classes()]
