"""The same questions as whole requests: compiled as the server compiles them, run by the reference executor.

The study evaluates rules on readings and pushes in a second step, many variants per forward pass. This is the check that a request
of type ``rules`` does the same in one pass: the program's own bits at every token, and the token that follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from interventions.compile import compile_request
from interventions.errors import InterventionError
from interventions.limits import Limits
from interventions.reference import ReferenceExecutor
from interventions.rules.build import Context, Dictionary
from interventions.rules.chunked import State, advance
from interventions.rules.reading import parse_ruleset
from interventions.spec import parse_interventions
from reproduce.model import Runner
from reproduce.rules import hops, steer
from reproduce.rules.hops import Question
from reproduce.rules.measure_hops import FAILS, HOLDS, answer_tokens
from reproduce.rules.settings import EFFECT_LAYER, EVIDENCE_LAYER, MAIN
from reproduce.rules.texts import prompt, readings, residuals
from sae_weights.sae import SAE


@dataclass(frozen=True)
class Served:
    """One dictionary, as a server offers it."""

    id: str
    layer: int
    sae: SAE
    full_encode: bool = False


@dataclass(frozen=True)
class Offer:
    """What a server offers: the study's dictionaries, and its directions as library vectors."""

    saes: Sequence[Served]
    vectors: Mapping[str, Tensor]
    n_layers: int
    vocab_size: int
    limits: Limits = field(default_factory=Limits)
    max_dose: float = float("inf")
    refuse_over_dose: bool = False

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.saes[0].sae.d_model

    @property
    def armed_layers(self) -> tuple[int, ...]:
        """Layers that can be edited."""
        return tuple(sorted(one.layer for one in self.saes))

    def sae(self, name: str) -> Served:
        """The dictionary of that name."""
        return next(one for one in self.saes if one.id == name)

    def vector(self, name: str) -> Mapping[int, Tensor]:
        """The direction of that name, at the layer where answers are pushed."""
        return {EFFECT_LAYER: self.vectors[name]}

    def rule_context(self) -> Context:
        """What rules may name."""
        known = {one.id: Dictionary(one.layer, one.sae.n_features) for one in self.saes}
        return Context(dictionaries=known, library={}, limits=self.limits)

    def concept(self, name: str) -> Any:
        """There is none."""
        raise InterventionError("unknown_concept", f"there is no concept {name}")

    map = ruleset = concept

    def encode_text(self, text: str) -> list[int]:
        """No selector of the study names a token."""
        raise NotImplementedError(text)

    def decode_token(self, token_id: int) -> str:
        """Nor is one shown."""
        raise NotImplementedError(token_id)


def check(
    runner: Runner,
    tokenizer: Any,
    saes: Mapping[int, SAE],
    ids: Mapping[int, str],
    detectors: Any,
    questions: Sequence[Question],
) -> dict[str, int]:
    """On how many of ``questions`` the request concludes the same at every token, and says the same, as the study has it."""
    words = answer_tokens(tokenizer)
    spoken = {HOLDS: words[True], FAILS: words[False]}
    ways = steer.by_effect(runner, saes[EFFECT_LAYER], spoken)
    offer = Offer(
        [Served(ids[layer], layer, sae) for layer, sae in saes.items()],
        {"true": ways[HOLDS], "false": ways[FAILS]},
        runner.n_layers,
        runner.model.config.vocab_size,
    )
    executor = ReferenceExecutor(runner.model, {sae.digest: sae for sae in saes.values()})
    same = {"questions": len(questions), "same conclusions": 0, "same token": 0}
    for question in questions:
        text = hops.rules(question, detectors[MAIN], ids[EVIDENCE_LAYER])
        fed = prompt(tokenizer, question.message()).ids
        compiled = compile_request(parse_interventions([{"type": "rules", "text": text}]), [], offer)
        forward = executor.forward(fed, len(fed), compiled.payload())
        (started,) = runner.start([fed], (EVIDENCE_LAYER, EFFECT_LAYER), 1)
        ((_, h),) = residuals(started, EVIDENCE_LAYER)
        ruleset = parse_ruleset(text)
        found = readings(saes[EVIDENCE_LAYER], ids[EVIDENCE_LAYER], h, [f for _, f in ruleset.reads()])
        outcome, _ = advance(ruleset, State(), found, len(fed), len(fed))
        assert compiled.rules is not None
        assert forward.rules is not None
        numbers = compiled.rules.sets[0].conclusions
        same["same conclusions"] += all(
            bool((forward.rules.concluded[:, numbers[name]] == where).all())
            for name, where in outcome.conclusions.items()
        )
        conclusions = frozenset(name for name in spoken if outcome.conclusions[name][-1])
        says = steer.steered(runner, started, ways, spoken, {0: [conclusions]})[0][conclusions]
        same["same token"] += int(forward.logits[-1].argmax()) == says.token
    return same
