"""Random rule programs, and what one means by definition: token by token, looking back over the whole text each time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

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

PPM = 1_000_000
Acts = Mapping[str, np.ndarray]
"""Feature key → activations, float32 ``[n]``."""


@dataclass(frozen=True)
class Meaning:
    """bool ``[n, …]`` of every token; ``scores`` float32, of what holds (NaN elsewhere)."""

    held: np.ndarray
    concluded: np.ndarray
    active: np.ndarray
    scores: np.ndarray


def _score(one: PropositionCode, acts: Sequence[np.float32]) -> np.float32:
    if one.tree:
        at = 0
        while one.tree[at].feature >= 0:
            node = one.tree[at]
            a, limit = acts[node.feature], np.float32(node.threshold)
            at = node.then if (a > limit if node.strict else a >= limit) else node.other
        return np.float32(one.tree[at].value)
    products = [np.float32(np.float32(w) * a) for w, a in zip(one.weights, acts, strict=True)]
    total = products[0]
    for product in products[1:]:
        total = np.float32(total + product)
    return total


def _value(code: Code, look: Callable[[int, int], tuple[bool, bool]]) -> tuple[bool, bool]:
    stack: list[tuple[bool, bool]] = []
    for op, argument in code:
        if op == OpCode.NOT:
            stack.append(stack.pop()[::-1])
        elif op in (OpCode.AND, OpCode.OR, OpCode.XOR):
            (d, e), (a, b) = stack.pop(), stack.pop()
            if op == OpCode.AND:
                stack.append((a and d, b or e))
            elif op == OpCode.OR:
                stack.append((a or d, b and e))
            else:
                stack.append(((a and e) or (b and d), (a and d) or (b and e)))
        else:
            stack.append(look(op, argument))
    (value,) = stack
    return value


def meaning(program: RuleProgram, acts: Acts, prompt_len: int, n: int) -> Meaning:
    """Evaluate ``program`` on n tokens."""
    held = np.zeros((n, len(program.propositions)), bool)
    scores = np.full(held.shape, np.nan, np.float32)
    for number, one in enumerate(program.propositions):
        for t in range(1, n):
            score = _score(one, [acts[key][t] for key in one.features])
            limit = np.float32(one.threshold)
            held[t, number] = score > limit if one.strict else score >= limit
            if held[t, number]:
                scores[t, number] = score

    def where(part: Code, scope: range) -> list[int]:
        return [p for p in scope if _value(part, lambda op, i: (bool(held[p, i]), not held[p, i]))[0]]

    def remembers(memory: MemoryCode, t: int) -> bool:
        scope = range(1, min(prompt_len, t + 1) if memory.over_prompt else t + 1)
        if memory.kind is MemoryKind.ORDER:
            after = 0
            for part in memory.parts:
                places = where(part, range(after + 1, scope.stop))
                if not places:
                    return False
                after = places[0]
            return True
        if memory.kind is MemoryKind.WINDOW:
            scope = range(max(1, t - memory.window + 1), t + 1)
        count = len(where(memory.parts[0], scope))
        return count * PPM >= memory.share * len(scope) > 0 if memory.share else count >= memory.least

    concluded = np.zeros((n, len(program.conclusions)), bool)
    active = np.zeros((n, len(program.actions)), bool)
    for t in range(1, n):
        ended = t >= prompt_len - 1
        memories = [remembers(memory, t) for memory in program.memories]
        known = {i for i, one in enumerate(program.conclusions) if one.latch and concluded[t - 1, i]}

        def look(op: int, i: int) -> tuple[bool, bool]:
            if op == OpCode.ENDED:
                return ended, not ended
            if op == OpCode.PROPOSITION:
                return bool(held[t, i]), not held[t, i]
            if op == OpCode.MEMORY:
                holds, decided = memories[i], ended or not program.memories[i].over_prompt
            else:
                holds, decided = i in known, ended or not program.conclusions[i].closed
            return holds and decided, not holds and decided

        for group in sorted({rule.group for rule in program.rules}):
            before = -1
            while before < len(known):
                before = len(known)
                known |= {r.head for r in program.rules if r.group == group and _value(r.body, look)[0]}
        concluded[t, sorted(known)] = True
        for a, action in enumerate(program.actions):
            first = 1 if not action.tokens else max(1, t - action.tokens + 1)
            active[t, a] = concluded[first : t + 1, action.conclusion].any()
    return Meaning(held, concluded, active, scores)


def random_program(rng: np.random.Generator, keys: Mapping[int, Sequence[Sequence[str]]], whole: set[str]) -> RuleProgram:
    """A program over features of the SAEs that ``keys`` lists by layer; those in ``whole`` need the whole dictionary."""
    layers = sorted(keys)

    def pick(most: int) -> int:
        return int(rng.integers(1, most + 1))

    propositions = []
    for _ in range(pick(70) if rng.random() < 0.2 else pick(6)):
        layer = int(rng.choice(layers))
        sae = keys[layer][int(rng.integers(len(keys[layer])))]
        chosen = sorted(rng.choice(len(sae), min(pick(4), len(sae)), replace=False).tolist())
        features = tuple(sae[i] for i in chosen)
        limit = float(np.float32(rng.choice([0.0, 0.3, 1.0])))
        tree: tuple[Branch, ...] = ()
        weights: tuple[float, ...] = ()
        if rng.random() < 0.3:
            split = [Branch(int(rng.integers(len(chosen))), bool(rng.random() < 0.5), limit, t, o) for t, o in ((1, 2), (3, 4))]
            leaves = [Branch(-1, value=float(np.float32(rng.normal()))) for _ in range(3)]
            tree = (split[0], leaves[0], split[1], *leaves[1:])
        else:
            weights = tuple(float(np.float32(w)) for w in rng.normal(1.0, 1.0, len(features)))
        strict = bool(rng.random() < 0.5)
        propositions.append(PropositionCode(layer, features[0] in whole, features, weights, tree, strict, limit))

    def code(atoms: Sequence[Callable[[], Code]], monotone: Sequence[Callable[[], Code]] = ()) -> Code:
        made: list[Code] = []
        for _ in range(pick(4)):
            part = atoms[int(rng.integers(len(atoms)))]()
            made.append((*part, (int(OpCode.NOT), 0)) if rng.random() < 0.3 else part)
        body = made[0]
        for part in made[1:]:
            body = (*body, *part, (int(rng.choice([OpCode.AND, OpCode.OR, OpCode.XOR])), 0))
        for part in monotone:
            body = (*body, *part(), (int(rng.choice([OpCode.AND, OpCode.OR])), 0))
        return body

    def one_of(op: OpCode, numbers: Sequence[int]) -> Callable[[], Code]:
        return lambda: ((int(op), int(numbers[int(rng.integers(len(numbers)))])),)

    memories = []
    for _ in range(int(rng.integers(0, 6))):
        layer = int(rng.choice([one.layer for one in propositions]))
        below = [i for i, one in enumerate(propositions) if one.layer <= layer]
        kind = MemoryKind(int(rng.integers(3)))
        parts = tuple(code([one_of(OpCode.PROPOSITION, below)]) for _ in range(pick(3) if kind is MemoryKind.ORDER else 1))
        share = int(rng.choice([0, 200_000, 500_000])) if kind is MemoryKind.COUNT else 0
        over = kind is not MemoryKind.WINDOW and bool(rng.random() < 0.4)
        window = int(rng.choice([1, 3, 64, 70])) if kind is MemoryKind.WINDOW else 0
        memories.append(MemoryCode(layer, kind, parts, over, 0 if share else pick(3), share, window))
    count = pick(70) if rng.random() < 0.1 else pick(6)
    at = sorted((int(rng.choice(layers)), int(rng.integers(2))) for _ in range(count))
    conclusions = [ConclusionCode(layer, bool(rng.random() < 0.3), bool(rng.random() < 0.2)) for layer, _ in at]
    groups = sorted(set(at))
    rules = []
    for head, place in enumerate(at):
        for _ in range(int(rng.integers(0, 4))):
            atoms = [lambda: ((int(OpCode.ENDED), 0),)]
            for op, numbers in (
                (OpCode.PROPOSITION, [i for i, one in enumerate(propositions) if one.layer <= place[0]]),
                (OpCode.MEMORY, [i for i, one in enumerate(memories) if one.layer <= place[0]]),
                (OpCode.CONCLUSION, [i for i, other in enumerate(at) if other < place]),
            ):
                atoms += [one_of(op, numbers)] * 2 if numbers else []
            same = [i for i, other in enumerate(at) if other == place]
            chained = [one_of(OpCode.CONCLUSION, same)] if rng.random() < 0.5 else []
            rules.append(RuleCode(groups.index(place), code(atoms, chained), head))
    rules.sort(key=lambda rule: rule.group)
    actions = [
        ActionCode(int(rng.integers(count)), int(rng.choice([0, 1, 2, 5])), bool(rng.random() < 0.1)) for _ in range(pick(4))
    ]
    return RuleProgram(tuple(propositions), tuple(memories), tuple(rules), tuple(conclusions), tuple(actions))
