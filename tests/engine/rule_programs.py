"""Random rule programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

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


def random_program(
    rng: np.random.Generator, keys: Mapping[int, Sequence[Sequence[str]]], whole: set[str]
) -> RuleProgram:
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
            split = [
                Branch(int(rng.integers(len(chosen))), bool(rng.random() < 0.5), limit, t, o)
                for t, o in ((1, 2), (3, 4))
            ]
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
        parts = tuple(
            code([one_of(OpCode.PROPOSITION, below)]) for _ in range(pick(3) if kind is MemoryKind.ORDER else 1)
        )
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
        ActionCode(int(rng.integers(count)), int(rng.choice([0, 1, 2, 5])), bool(rng.random() < 0.1))
        for _ in range(pick(4))
    ]
    return RuleProgram(tuple(propositions), tuple(memories), tuple(rules), tuple(conclusions), tuple(actions))
