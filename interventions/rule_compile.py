"""From the rule sets and ``when`` expressions of a request to its rule program, and the gates that follow it.

Actions are noted as they are compiled, under provisional numbers; the program is assembled when it is known which of them
are left (what gates a no-op is dropped with it), and then the gates get the numbers of the program.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import cast

from interventions.compiled import RuleAction, RuleNames, RuleSetPart
from interventions.errors import Code, InterventionError
from interventions.program import Gate, GateKind, ReadKind
from interventions.resolve import Resolver, check_limit
from interventions.rule_sources import Source, Sources
from interventions.rules.assemble import Assembled, Dictionary, Part, Trigger, assemble
from interventions.rules.code import RuleProgram
from interventions.rules.errors import Place, RuleError
from interventions.rules.formula import to_text
from interventions.rules.reading import WHEN
from interventions.rules.ruleset import Action
from interventions.spec import Intervention, parse_interventions


@dataclass
class Use:
    """Something that is done on a conclusion.

    Attributes:
        gate: open where it is active; its number is provisional.
        action: all that names say, but its number, its layers and its selector.
        place: of the action or ``when``.
    """

    gate: Gate
    action: RuleAction
    tokens: int | None
    place: Place
    noop: bool = False


@dataclass(frozen=True)
class RuleParts:
    """The rules of a request, compiled.

    Attributes:
        program: ``None`` when no rules are left.
        names: what its numbers are called.
        numbers: provisional number of an action → its number in the program.
    """

    program: RuleProgram | None = None
    names: RuleNames | None = None
    numbers: Mapping[int, int] = field(default_factory=dict)


class RuleCompiler:
    """Notes what is done on conclusions, and assembles it."""

    def __init__(self, sources: Sources, resolver: Resolver) -> None:
        self.sources = sources
        self.resolver = resolver
        self.uses: list[Use] = []
        for source in (*sources.sets.values(), *sources.whens.values()):
            self._check_evidence(source)

    # what is done ----------------------------------------------------------------------------------------------------

    def when(self, i: int) -> Use | None:
        """The gate of an intervention that is no rule set: open where its ``when`` holds."""
        source = self.sources.whens.get(i)
        if source is None:
            return None
        (rule,) = source.ruleset.rules
        words = f"when {to_text(rule.body)}"
        action = RuleAction(-1, i, WHEN, "when", text=words, param=source.param)
        return self._use(action, 1, replace(rule.place, path=source.param))

    def action(self, i: int, action: Action) -> Use:
        """One action of the rule set of intervention ``i``."""
        param = f"{action.place.path}.do" if action.place.path and not action.place.line else self.sources.sets[i].param
        message = json.loads(action.payload) if action.kind == "refuse" else ""
        kind = action.kind
        found = RuleAction(-1, i, action.conclusion, kind, message=message, text=action.text, param=param)
        return self._use(found, action.tokens, action.place)

    def _use(self, action: RuleAction, tokens: int | None, place: Place) -> Use:
        gate = Gate(GateKind.RULE, ReadKind.LATENT, (), action=len(self.uses))
        self.uses.append(Use(gate, action, tokens, place))
        return self.uses[-1]

    def intervention(self, action: Action) -> Intervention:
        """The intervention of a ``do``; its fields are below "intervention"."""
        (spec,) = parse_interventions([json.loads(action.payload)])
        spec._param = "intervention"
        return spec

    def inside(self, i: int, action: Action, error: InterventionError) -> RuleError:
        """An error in the intervention of a ``do``, with its place in the rule set."""
        field = (error.param or "").removeprefix("intervention")
        message, place = error.message.removeprefix(f"{error.param}: "), action.place
        if place.path and not place.line:
            place = Place(path=f"{place.path}.do{field}")
        else:
            message = f"intervention{field}: {message}"
        return RuleError(message, place, cast(Code, error.code)).under(self.sources.sets[i].param)

    # evidence --------------------------------------------------------------------------------------------------------

    def _check_evidence(self, source: Source) -> None:
        """Refuse SAEs that the engine cannot read here."""
        for name in sorted({one.sae for one in source.ruleset.propositions.values()}):
            offered = self.resolver.sae(name, source.param)
            self.resolver.check_layer(offered.layer, source.param)
            if not offered.sae.row_separable:
                self.resolver.full(offered, source.param, "invalid_intervention", f"to read latents of {name}")

    def approximate(self, i: int) -> bool:
        """Whether the evidence of intervention ``i`` is read from a stand-in."""
        source = self.sources.sets.get(i) or self.sources.whens.get(i)
        read = {one.sae for one in source.ruleset.propositions.values()} if source else ()
        return any(self.resolver.sae(name, "").sae.approximates is not None for name in read)

    def _dictionary(self, name: str) -> Dictionary:
        offered = self.resolver.sae(name, "")
        return Dictionary(offered.sae.digest, offered.layer, not offered.sae.row_separable)

    # the program -----------------------------------------------------------------------------------------------------

    def assembled(self) -> RuleParts:
        """All that is left, numbered; what gates a no-op is checked like the rest.

        Raises:
            InterventionError: ``rule_layer_order``, ``limit_exceeded``.
        """
        found = self._assembled(self.uses)
        left = [use for use in self.uses if not (use.noop and use.action.kind == "when")]
        return found if len(left) == len(self.uses) else self._assembled(left)

    def _assembled(self, left: list[Use]) -> RuleParts:
        sets = {i: source for i, source in self.sources.sets.items() if source.ruleset.rules}
        gated = [use.action.intervention for use in left if use.action.kind == "when"]
        whens = {i: self.sources.whens[i] for i in gated}
        sources = sets | whens
        if not sources:
            return RuleParts()
        limits = self.resolver.catalogue.limits
        distinct = {one.ruleset.text for one in whens.values()}
        n_rules = sum(len(one.ruleset.rules) for one in sets.values()) + len(distinct)
        check_limit("rules", n_rules, limits.rules, "interventions")
        at = {i: p for p, i in enumerate(sources)}
        parts = [
            Part(source.ruleset, {name: (at[other], name) for name, other in source.given.items()})
            for source in sources.values()
        ]
        triggers = [
            Trigger(at[use.action.intervention], use.action.conclusion, use.tokens, use.action.kind == "refuse")
            for use in left
        ]
        lowest = min(self.resolver.catalogue.armed_layers, default=0)
        effects = {layer for use in left for layer in use.action.layers}
        found = assemble(parts, triggers, self._dictionary, effects, lowest)
        self._check_limits(found.program)
        for use, number in zip(left, found.actions, strict=True):
            _check_order(use, found.program, number, self._param(use))
        numbers = {use.gate.action: number for use, number in zip(left, found.actions, strict=True)}
        return RuleParts(found.program, self._names(sets, left, at, found, numbers), numbers)

    def _param(self, use: Use) -> str:
        i = use.action.intervention
        return (self.sources.sets.get(i) or self.sources.whens[i]).param

    def _names(
        self,
        sets: Mapping[int, Source],
        left: list[Use],
        at: Mapping[int, int],
        found: Assembled,
        numbers: Mapping[int, int],
    ) -> RuleNames:
        actions = tuple(replace(use.action, number=numbers[use.gate.action], noop=use.noop) for use in left)
        made = []
        for i, source in sets.items():
            own = tuple(action.number for action in actions if action.intervention == i)
            given = {name: found.conclusions[at[other]][name] for name, other in source.given.items()}
            p = at[i]
            made.append(
                RuleSetPart(i, source.ruleset, source.digest, found.propositions[p], found.conclusions[p], own, given)
            )
        return RuleNames(
            _first(found.propositions, len(found.program.propositions)),
            _first(found.conclusions, len(found.program.conclusions)),
            actions,
            tuple(made),
        )

    def _check_limits(self, program: RuleProgram) -> None:
        limits = self.resolver.catalogue.limits
        codes = [rule.body for rule in program.rules] + [part for one in program.memories for part in one.parts]
        check_limit("propositions", len(program.propositions), limits.propositions, "interventions")
        check_limit("memories", len(program.memories), limits.memories, "interventions")
        check_limit("rule_actions", len(program.actions), limits.rule_actions, "interventions")
        check_limit("rule_steps", sum(map(len, codes)), limits.rule_steps, "interventions")


def _check_order(use: Use, program: RuleProgram, number: int, param: str) -> None:
    """Refuse an effect at an earlier layer than the last one that its conclusion waits for."""
    latest = program.conclusions[program.actions[number].conclusion].layer
    early = [layer for layer in use.action.layers if layer < latest]
    if early:
        what = "the intervention" if use.action.kind == "when" else f"the action on {use.action.conclusion!r}"
        message = (
            f"{what} writes after layer {early[0]}, its evidence is read after layer {latest}; "
            "an effect comes at the layer of its evidence or later"
        )
        raise RuleError(message, use.place, "rule_layer_order").under(param)


def _first(named: tuple[Mapping[str, int], ...], n: int) -> tuple[str, ...]:
    """The first name of each number."""
    found: dict[int, str] = {}
    for names in named:
        for name, number in names.items():
            found.setdefault(number, name)
    return tuple(found[number] for number in range(n))
