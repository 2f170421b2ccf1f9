"""From the rule sets of a request to one numbered program without names, as the engine runs it.

Numbers follow from content alone: propositions, memories and conclusions are sorted by what they say, and those that say
the same become one, whatever rule set they are in and whatever they are called. Two conclusions say the same if their
rules do, the conclusions named in them included (the coarsest such partition, by refinement: such systems of rules have
equal least models). So names, labels and the order of declarations leave no trace in a program's digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec
import numpy as np

from interventions.program import feature_key
from interventions.rules.code import (
    ActionCode,
    Branch,
    Code,
    ConclusionCode,
    MemoryCode,
    MemoryKind,
    OpCode,
    PropositionCode,
    RuleCode,
    RuleProgram,
)
from interventions.rules.formula import (
    And,
    Atom,
    Concluded,
    Evidence,
    Formula,
    Holds,
    Not,
    Or,
    Ordered,
    PromptEnded,
    Xor,
    atoms,
    held_names,
    polarities,
)
from interventions.rules.proposition import Leaf, Proposition, Split, Tree
from interventions.rules.ruleset import Ruleset


@dataclass(frozen=True)
class Dictionary:
    """The SAE of a proposition.

    Attributes:
        digest: of its content.
        layer: the decoder layer after which it reads.
        whole: whether one latent's activation depends on all of them.
    """

    digest: str
    layer: int
    whole: bool


@dataclass(frozen=True)
class Part:
    """A rule set of the request; ``given`` says of each conclusion of another one that it names: (part, name there)."""

    ruleset: Ruleset
    given: Mapping[str, tuple[int, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Trigger:
    """An action: the conclusion of a part, how many tokens one firing lasts (``None``: all from there), and if it refuses."""

    part: int
    conclusion: str
    tokens: int | None = 1
    refuses: bool = False


@dataclass(frozen=True)
class Assembled:
    """The program, and the numbers in it of everything that was named: per part by name, and per trigger."""

    program: RuleProgram
    propositions: tuple[Mapping[str, int], ...]
    conclusions: tuple[Mapping[str, int], ...]
    actions: tuple[int, ...]


def assemble(
    parts: Sequence[Part],
    triggers: Sequence[Trigger],
    dictionary: Callable[[str], Dictionary],
    effects: Collection[int] = (),
    otherwise: int = 0,
) -> Assembled:
    """One program out of all rule sets and ``when`` expressions of a request.

    Args:
        parts: rule sets; what one takes from others is in ``given``, and they do not go round in circles.
        triggers: what is done on their conclusions.
        dictionary: the SAE of that id.
        effects: layers at which something is done.
        otherwise: layer of a conclusion that needs no evidence, where there are neither propositions nor effects.
    """
    return _Assembly(parts, dictionary).run(triggers, effects, otherwise)


Node = tuple[int, str]
"""A conclusion: part, and its name there."""

C = TypeVar("C", bound=PropositionCode | MemoryCode)


def _unique(codes: Iterable[C]) -> tuple[tuple[C, ...], dict[C, int]]:
    """Distinct codes, by layer and then by content, and the number of each."""
    found = tuple(sorted(set(codes), key=lambda code: (code.layer, msgspec.msgpack.encode(code))))
    return found, {code: i for i, code in enumerate(found)}


class _Assembly:
    def __init__(self, parts: Sequence[Part], dictionary: Callable[[str], Dictionary]) -> None:
        self.parts = parts
        coded = [
            {name: proposition_code(one, dictionary(one.sae)) for name, one in part.ruleset.propositions.items()}
            for part in parts
        ]
        self.propositions, number = _unique(code for named in coded for code in named.values())
        self.held = [{name: number[code] for name, code in named.items()} for named in coded]
        remembered: dict[tuple[int, Atom], MemoryCode] = {}
        for p, part in enumerate(parts):
            for rule in part.ruleset.rules:
                for atom in atoms(rule.body):
                    if isinstance(atom, (Evidence, Ordered)):
                        remembered[p, atom] = self._memory(p, atom)
        self.memories, place = _unique(remembered.values())
        self.memory = {atom: place[code] for atom, code in remembered.items()}
        self.bodies: dict[Node, list[tuple[int, Formula]]] = {}
        for p, part in enumerate(parts):
            for rule in part.ruleset.rules:
                self.bodies.setdefault((p, rule.head), []).append((p, rule.body))

    def run(self, triggers: Sequence[Trigger], effects: Collection[int], otherwise: int) -> Assembled:
        lowest = min((*(one.layer for one in self.propositions), *effects), default=otherwise)
        layer, level = self._layers(lowest), self._levels()
        number, first = self._numbers(layer, level)
        conclusions = []
        for p, name in first:
            ruleset = self.parts[p].ruleset
            conclusions.append(ConclusionCode(layer[p, name], name in ruleset.latching, name in ruleset.closed))
        at = {node: (layer[node], level[node]) for node in first}
        groups = {place: i for i, place in enumerate(sorted(set(at.values())))}
        rules = set()
        for head, node in enumerate(first):
            for p, body in self.bodies[node]:
                rules.add((groups[at[node]], head, self._code(p, body, number)))
        actions = [ActionCode(number[one.part, one.conclusion], one.tokens or 0, one.refuses) for one in triggers]
        distinct = sorted(set(actions), key=lambda one: (one.conclusion, one.tokens, one.refuses))
        program = RuleProgram(
            self.propositions,
            self.memories,
            tuple(RuleCode(group, body, head) for group, head, body in sorted(rules)),
            tuple(conclusions),
            tuple(distinct),
        )
        concluded: list[dict[str, int]] = [{} for _ in self.parts]
        for (p, name), i in number.items():
            concluded[p][name] = i
        place = {one: i for i, one in enumerate(distinct)}
        return Assembled(program, tuple(self.held), tuple(concluded), tuple(place[one] for one in actions))

    # conclusions

    def _node(self, p: int, name: str) -> Node:
        return self.parts[p].given.get(name, (p, name))

    def _layers(self, lowest: int) -> dict[Node, int]:
        """The layer at which each conclusion is known: the last one of its evidence."""
        found = dict.fromkeys(self.bodies, lowest)
        changed = True
        while changed:
            changed = False
            for node, bodies in self.bodies.items():
                for p, body in bodies:
                    own = [self.propositions[self.held[p][name]].layer for name in held_names(body)]
                    own += [found[self._node(p, atom.name)] for atom in atoms(body) if isinstance(atom, Concluded)]
                    latest = max(own, default=lowest)
                    if latest > found[node]:
                        found[node], changed = latest, True
        return found

    def _levels(self) -> dict[Node, int]:
        """The stratum of each conclusion: above those that it needs negated."""
        found = dict.fromkeys(self.bodies, 0)
        changed = True
        while changed:
            changed = False
            for node, bodies in self.bodies.items():
                for p, body in bodies:
                    for atom, positive in polarities(body):
                        if isinstance(atom, Concluded):
                            least = found[self._node(p, atom.name)] + (not positive)
                            if found[node] < least:
                                found[node], changed = least, True
        return found

    def _numbers(self, layer: Mapping[Node, int], level: Mapping[Node, int]) -> tuple[dict[Node, int], list[Node]]:
        """The number of each conclusion, and one node of each number."""
        colour: dict[Node, str] = {}
        for p, name in self.bodies:
            ruleset = self.parts[p].ruleset
            facts = (layer[p, name], level[p, name], name in ruleset.latching, name in ruleset.closed)
            colour[p, name] = hashlib.sha256(repr(facts).encode()).hexdigest()
        kinds = len(set(colour.values()))
        while True:
            finer = {}
            for node, bodies in self.bodies.items():
                said = sorted({self._said(p, body, colour) for p, body in bodies})
                finer[node] = hashlib.sha256("\n".join((colour[node], *said)).encode()).hexdigest()
            colour = finer
            if len(set(colour.values())) == kinds:
                break
            kinds = len(set(colour.values()))
        first: dict[str, Node] = {}
        for node in self.bodies:
            first.setdefault(colour[node], node)
        ordered = sorted(first, key=lambda mark: (layer[first[mark]], mark))
        number = {mark: i for i, mark in enumerate(ordered)}
        return {node: number[mark] for node, mark in colour.items()}, [first[mark] for mark in ordered]

    def _said(self, p: int, formula: Formula, colour: Mapping[Node, str]) -> str:
        """What a body says, conclusions by their colours."""
        if isinstance(formula, Not):
            return f"not({self._said(p, formula.part, colour)})"
        if isinstance(formula, (And, Or, Xor)):
            parts = sorted(self._said(p, part, colour) for part in formula.parts)
            return f"{type(formula).__name__}({' '.join(parts)})"
        if isinstance(formula, Concluded):
            return colour[self._node(p, formula.name)]
        return repr(self._step(p, formula, {}))

    # codes

    def _step(self, p: int, atom: Atom, number: Mapping[Node, int]) -> tuple[int, int]:
        if isinstance(atom, PromptEnded):
            return int(OpCode.ENDED), 0
        if isinstance(atom, Holds):
            return int(OpCode.PROPOSITION), self.held[p][atom.name]
        if isinstance(atom, Concluded):
            return int(OpCode.CONCLUSION), number[self._node(p, atom.name)]
        return int(OpCode.MEMORY), self.memory[p, atom]

    def _code(self, p: int, formula: Formula, number: Mapping[Node, int]) -> Code:
        return _postfix(formula, lambda atom: self._step(p, atom, number))[1]

    def _memory(self, p: int, atom: Evidence | Ordered) -> MemoryCode:
        formulas = atom.parts if isinstance(atom, Ordered) else (atom.inner,)
        parts = tuple(self._code(p, part, {}) for part in formulas)
        read = (self.propositions[self.held[p][name]].layer for part in formulas for name in held_names(part))
        layer, over_prompt = max(read), atom.scope == "prompt"
        if isinstance(atom, Ordered):
            return MemoryCode(layer, MemoryKind.ORDER, parts, over_prompt)
        kind = MemoryKind.WINDOW if atom.scope == "last" else MemoryKind.COUNT
        return MemoryCode(layer, kind, parts, over_prompt, atom.least, atom.share, atom.window)


_OPERATOR: dict[type[Formula], OpCode] = {And: OpCode.AND, Or: OpCode.OR, Xor: OpCode.XOR}


def _postfix(formula: Formula, step: Callable[[Atom], tuple[int, int]]) -> tuple[int, Code]:
    """How many values it needs on the stack, and the code; what needs most comes first, so that they stay few."""
    if isinstance(formula, Not):
        need, code = _postfix(formula.part, step)
        return need, (*code, (int(OpCode.NOT), 0))
    if not isinstance(formula, (And, Or, Xor)):
        return 1, (step(formula),)
    parts = sorted((_postfix(part, step) for part in formula.parts), key=lambda part: (-part[0], part[1]))
    operator = (int(_OPERATOR[type(formula)]), 0)
    steps, need = list(parts[0][1]), parts[0][0]
    for more, code in parts[1:]:
        steps += [*code, operator]
        need = max(need, 1 + more)
    return need, tuple(steps)


def proposition_code(proposition: Proposition, dictionary: Dictionary) -> PropositionCode:
    """A proposition without names."""
    score = proposition.score
    features = score.features()
    weights: tuple[float, ...] = ()
    tree: tuple[Branch, ...] = ()
    if isinstance(score, Tree):
        tree = tuple(_branches(score.root, {feature: i for i, feature in enumerate(features)}))
    else:
        weights = tuple(_float32(weight) for _, weight in score.terms)
    return PropositionCode(
        layer=dictionary.layer,
        whole=dictionary.whole,
        features=tuple(feature_key(dictionary.digest, feature) for feature in features),
        weights=weights,
        tree=tree,
        strict=proposition.comparison == ">",
        threshold=_float32(proposition.threshold),
    )


def _float32(value: float) -> float:
    return float(np.float32(value)) + 0.0  # + 0.0: -0.0 and 0.0 are one value


def _branches(root: Split, place: Mapping[int, int]) -> list[Branch]:
    found: list[Branch] = []

    def put(node: Leaf | Split) -> int:
        at = len(found)
        if isinstance(node, Leaf):
            found.append(Branch(-1, value=_float32(node.value)))
            return at
        found.append(Branch(-1))
        then, other = put(node.then), put(node.other)
        strict = node.comparison == ">"
        found[at] = Branch(place[node.feature], strict, _float32(node.threshold), then, other)
        return at

    put(root)
    return found
