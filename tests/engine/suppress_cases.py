"""The suppressions of the oracle test: every method on every kind of dictionary, and beside other edits of a latent."""

from __future__ import annotations

from typing import Any

from tests.engine.oracle_cases import CLASSES, DICTIONARIES, Case, Json, Lab, each, edit, steer

MANY = 40
"""Latents of a concept, so that taking it away is felt."""


def suppress(concept: Any, **fields: Any) -> Json:
    return {"type": "suppress", "concept": concept, **fields}


def inline(lab: Lab, sae: str, n: int = MANY, **fields: Any) -> Json:
    return {"sae": sae, "features": lab.often(sae, n), **fields}


def spread(lab: Lab, sae: str, n: int = MANY) -> Json:
    """The same latents with μ and σ of their own positive activations."""
    mu, sigma = lab.moments(sae, lab.often(sae, n))
    return inline(lab, sae, n, mu=mu, sigma=sigma)


def _methods() -> list[Case]:
    cases = []
    for i, d in enumerate(DICTIONARIES):
        sae = f"{d}/l15"
        makers = {
            "mask": lambda lab, sae=sae: [suppress(inline(lab, sae))],
            "attenuate": lambda lab, sae=sae: [suppress(inline(lab, sae), method="attenuate", strength=0.7)],
            "reverse": lambda lab, sae=sae: [suppress(lab.concept(sae, MANY), method="attenuate", strength=2.5)],
            "range": lambda lab, sae=sae: [suppress(lab.concept(sae, MANY), method="range")],
            "range_inline": lambda lab, sae=sae: [suppress(spread(lab, sae), method="range", tau=1.5)],
            "app": lambda lab, sae=sae: [suppress(lab.concept(sae, MANY))],
            "app_strong": lambda lab, sae=sae: [suppress(lab.concept(sae, MANY), strength=2.0, tokens={"from": 3})],
        }
        cases += [Case(f"suppress/{d}/{name}/l15", make, prompt=i % 3) for name, make in makers.items()]
    for layer in (0, 29):
        for d in ("jumprelu", "topk"):
            cases.append(
                Case(
                    f"suppress/{d}/app/l{layer}",
                    lambda lab, sae=f"{d}/l{layer}": [suppress(lab.concept(sae, MANY), strength=1.5)],
                    prompt=1,
                )
            )
    return cases


def _classes() -> list[Case]:
    """Every method in one request, on one kind of dictionary: they meet on the same latents."""
    cases = []
    for i, d in enumerate(CLASSES):

        def methods(lab: Lab, sae: str = f"{d}/l15") -> list[Json]:
            often = lab.often(sae, 12)
            return [
                suppress(spread(lab, sae, 6), method="range", tau=1.0, tokens="prompt"),
                suppress(lab.concept(sae, 12), strength=1.5),
                suppress({"sae": sae, "features": often[:8]}, method="attenuate", strength=2.5),
                suppress({"sae": sae, "features": often}, tokens=["last_prompt_token", "generated"]),
                edit(sae, each(often[:2], op="add", value=4.0)),
            ]

        def app(lab: Lab, sae: str = f"{d}/l15") -> list[Json]:
            return [suppress(lab.concept(sae, 12), strength=4.0)]

        cases.append(Case(f"suppress/class/{d}/every_method", methods, prompt=i % 3))
        cases.append(Case(f"suppress/class/{d}/app", app, prompt=(i + 1) % 3))
    return cases


def _composed() -> list[Case]:
    sae = "jumprelu/l15"

    def raised_first(lab: Lab) -> list[Json]:
        """The table is looked up at what the edit left, not at the activation."""
        return [edit(sae, each(lab.often(sae, 8), op="add", value=9.0)), suppress(lab.concept(sae, 8), strength=1.5)]

    def raised_last(lab: Lab) -> list[Json]:
        return raised_first(lab)[::-1]

    def set_into_the_range(lab: Lab) -> list[Json]:
        often = lab.often(sae, 8)
        return [
            edit(sae, each(often, op="set", value=12.0), tokens={"from": 4}),
            suppress({"sae": sae, "features": often, "mu": 12.0, "sigma": 1.0}, method="range", tokens="prompt"),
        ]

    def beside_steering(lab: Lab) -> list[Json]:
        return [
            suppress(lab.concept(sae, MANY), strength=1.5),
            steer(values=lab.mean(15), layer=15, mode="project_out", strength=0.5),
            steer(sae=sae, feature=lab.often(sae)[0], strength=8, tokens="generated"),
            suppress(inline(lab, "topk/l29", 10)),
            suppress(lab.concept("gated/l0", 20), method="range", tau=1.0),
        ]

    def two_concepts(lab: Lab) -> list[Json]:
        return [suppress(lab.concept(sae, 20), strength=2.0), suppress(lab.concept(sae, 30, seed=1), strength=0.8)]

    def outside(lab: Lab) -> list[Json]:
        """Far above the table's range, where a table that failed open would do nothing."""
        often = lab.often(sae, 6)
        return [edit(sae, each(often, op="add", value=200.0)), suppress(lab.concept(sae, 6), strength=0.9)]

    def never(lab: Lab) -> list[Json]:
        off = {"sae": "gated/l15", "features": [lab.never("gated/l15")]}
        return [suppress(off), suppress(off, method="attenuate", strength=3.0)]

    def nothing(lab: Lab) -> list[Json]:
        """A range that no activation lies in."""
        return [suppress(inline(lab, sae, mu=1e4, sigma=1.0), method="range")]

    return [
        Case("suppress/composed/after_an_edit", raised_first),
        Case("suppress/composed/before_an_edit", raised_last),
        Case("suppress/composed/set_into_the_range", set_into_the_range, prompt=1),
        Case("suppress/composed/beside_steering", beside_steering, prompt=2),
        Case("suppress/composed/two_concepts", two_concepts, prompt=2),
        Case("suppress/composed/outside_the_table", outside, prompt=1),
        Case("suppress/composed/a_latent_that_never_fires", never, changes=False, inert=(0, 1)),
        Case("suppress/composed/an_empty_range", nothing, changes=False, inert=(0,)),
    ]


CASES = [*_methods(), *_classes(), *_composed()]
