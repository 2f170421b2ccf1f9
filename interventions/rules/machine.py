"""A rule program run in plain Python, token by token: what every fast kernel of it is tested against.

Within a chunk the layers come one after the other, as in a forward pass: at each of its layers the machine takes where the
layer's propositions hold, and says what is concluded there and which actions are active. What it keeps between chunks
depends on the tokens before only. :mod:`interventions.rules.code` has the definitions in words.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from interventions.rules.code import Code, MemoryCode, MemoryKind, OpCode, PropositionCode, RuleProgram
from interventions.rules.formula import PPM

Bits = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]
Value = tuple[bool, bool]


@dataclass(frozen=True)
class RuleTrace:
    """What a program's rules did at the tokens 0 … n − 1; the columns are numbered by the program.

    Attributes:
        held: bool ``[n, propositions]``, where each holds (nowhere at position 0).
        concluded: bool ``[n, conclusions]``.
        active: bool ``[n, actions]``.
        scores: float32 ``[n, propositions]``, NaN where a proposition does not hold.
    """

    held: Bits
    concluded: Bits
    active: Bits
    scores: Floats

    @property
    def n(self) -> int:
        """Number of tokens."""
        return len(self.held)

    def refusal(self, program: RuleProgram) -> tuple[int, int] | None:
        """``(action, position)`` of the first token at which a refusing action is active, its lowest number."""
        refusing = [i for i, action in enumerate(program.actions) if action.refuses]
        where = np.argwhere(self.active[:, refusing])
        return (refusing[int(where[0][1])], int(where[0][0])) if len(where) else None


def scores(code: PropositionCode, activations: Floats) -> Floats:
    """The score at each token, float32 ``[n]``, of the activations ``[n, features]`` of the proposition's features."""
    a = np.asarray(activations, np.float32)
    if code.tree:
        found = np.zeros(len(a), np.float32)
        for token in range(len(a)):
            node = code.tree[0]
            while node.feature >= 0:
                value, limit = a[token, node.feature], np.float32(node.threshold)
                node = code.tree[node.then if (value > limit if node.strict else value >= limit) else node.other]
            found[token] = np.float32(node.value)
        return found
    total = np.float32(code.weights[0]) * a[:, 0]
    for j, weight in enumerate(code.weights[1:], 1):
        total = total + np.float32(weight) * a[:, j]
    return total


def holds(code: PropositionCode, score: Floats) -> Bits:
    """Where a score is at (or, where the code is strict, above) the threshold: bool ``[n]``; never where it is NaN."""
    limit = np.float32(code.threshold)
    return score > limit if code.strict else score >= limit


def decided(program: RuleProgram, score: Floats) -> Bits:
    """Where each proposition's score ``[n, propositions]`` says that it holds: bool ``[n, propositions]``."""
    found = np.zeros(score.shape, bool)
    for i, code in enumerate(program.propositions):
        found[:, i] = holds(code, score[:, i])
    return found


@dataclass
class _Memory:
    """What one memory keeps."""

    count: int = 0
    """COUNT, WINDOW: tokens that count. ORDER: parts that were met."""
    last: deque[bool] = field(default_factory=deque)
    """WINDOW: whether each of the last tokens counted, oldest first."""


class Machine:
    """The rules of one request at work.

    Args:
        program: the rules.
        prompt_len: how many of the request's tokens are prompt.
    """

    def __init__(self, program: RuleProgram, prompt_len: int) -> None:
        self.program = program
        self.prompt_len = prompt_len
        self.position = 0
        """Of the first token of the chunk at hand; between chunks, of the next token."""
        self._memories = [_Memory() for _ in program.memories]
        self._before = np.zeros(len(program.conclusions), bool)
        self._fired = [-1] * len(program.actions)
        self.begin(0)

    def begin(self, n: int) -> None:
        """The next ``n`` tokens come in."""
        program = self.program
        self.held = np.zeros((n, len(program.propositions)), bool)
        self.remembered = np.zeros((n, len(program.memories)), bool)
        self.concluded = np.zeros((n, len(program.conclusions)), bool)
        self.active = np.zeros((n, len(program.actions)), bool)

    def stage(self, layer: int, held: Bits) -> None:
        """One layer, for all tokens of the chunk; the program's layers come in ascending order.

        Args:
            layer: the decoder layer.
            held: bool ``[n, propositions]``, where propositions hold; only the columns of the layer are looked at.
        """
        for token in range(len(self.held)):
            self._token(layer, token, held[token])

    def end(self) -> None:
        """All layers have seen the chunk."""
        if len(self.concluded):
            self._before = self.concluded[-1].copy()
        self.position += len(self.held)
        self.begin(0)

    def run(self, held: Bits, score: Floats | None = None) -> RuleTrace:
        """The next tokens, all layers: from where the propositions hold, bool ``[n, propositions]``."""
        self.begin(len(held))
        for layer in self.program.layers:
            self.stage(layer, held)
        trace = self.trace(score)
        self.end()
        return trace

    def trace(self, score: Floats | None = None) -> RuleTrace:
        """What the layers so far made of the chunk at hand; ``score [n, propositions]`` goes in where they hold."""
        nothing = np.full(self.held.shape, np.nan, np.float32)
        shown = nothing if score is None else np.where(self.held, score, nothing)
        return RuleTrace(self.held.copy(), self.concluded.copy(), self.active.copy(), shown)

    # one token at one layer

    def _token(self, layer: int, token: int, held: Bits) -> None:
        position, program = self.position + token, self.program
        if position == 0:
            return  # it is evidence of nothing, and nothing is concluded from it
        for i, proposition in enumerate(program.propositions):
            if proposition.layer == layer:
                self.held[token, i] = held[i]
        for i, memory in enumerate(program.memories):
            if memory.layer == layer:
                self.remembered[token, i] = self._remember(memory, self._memories[i], token)
        before = self.concluded[token - 1] if token else self._before
        for i, conclusion in enumerate(program.conclusions):
            if conclusion.layer == layer and conclusion.latch:
                self.concluded[token, i] = before[i]
        for group in sorted({rule.group for rule in program.rules if program.conclusions[rule.head].layer == layer}):
            self._conclude(group, token)
        for i, action in enumerate(program.actions):
            if program.conclusions[action.conclusion].layer != layer:
                continue
            if self.concluded[token, action.conclusion]:
                self._fired[i] = position
            since = position - self._fired[i]
            self.active[token, i] = self._fired[i] >= 0 and (not action.tokens or since < action.tokens)

    def _conclude(self, group: int, token: int) -> None:
        grown = True
        while grown:
            grown = False
            for rule in self.program.rules:
                if rule.group == group and not self.concluded[token, rule.head] and self._value(rule.body, token)[0]:
                    self.concluded[token, rule.head] = grown = True

    def _remember(self, memory: MemoryCode, state: _Memory, token: int) -> bool:
        position = self.position + token
        counts = position < self.prompt_len or not memory.over_prompt
        if memory.kind is MemoryKind.ORDER:
            if counts and state.count < len(memory.parts):
                state.count += self._value(memory.parts[state.count], token)[0]
            return state.count == len(memory.parts)
        here = counts and self._value(memory.parts[0], token)[0]
        state.count += here
        if memory.kind is MemoryKind.WINDOW:
            state.last.append(here)
            if len(state.last) > memory.window:
                state.count -= state.last.popleft()
        if not memory.share:
            return state.count >= memory.least
        tokens = self.prompt_len - 1 if memory.over_prompt else position
        return state.count * PPM >= memory.share * tokens > 0

    def _value(self, code: Code, token: int) -> Value:
        ended = self.position + token >= self.prompt_len - 1
        stack: list[Value] = []
        for op, argument in code:
            if op == OpCode.NOT:
                yes, no = stack.pop()
                stack.append((no, yes))
            elif op in (OpCode.AND, OpCode.OR, OpCode.XOR):
                right, left = stack.pop(), stack.pop()
                stack.append(_joined(op, left, right))
            else:
                stack.append(self._atom(op, argument, token, ended))
        (value,) = stack
        return value

    def _atom(self, op: int, argument: int, token: int, ended: bool) -> Value:
        decided = True
        if op == OpCode.ENDED:
            value = ended
        elif op == OpCode.PROPOSITION:
            value = bool(self.held[token, argument])
        elif op == OpCode.MEMORY:
            value = bool(self.remembered[token, argument])
            decided = ended or not self.program.memories[argument].over_prompt
        else:
            value = bool(self.concluded[token, argument])
            decided = ended or not self.program.conclusions[argument].closed
        return value and decided, not value and decided


def _joined(op: int, left: Value, right: Value) -> Value:
    if op == OpCode.AND:
        return left[0] and right[0], left[1] or right[1]
    if op == OpCode.OR:
        return left[0] or right[0], left[1] and right[1]
    odd = (left[0] and right[1]) or (left[1] and right[0])
    even = (left[0] and right[0]) or (left[1] and right[1])
    return odd, even


def proposition_scores(program: RuleProgram, layer: int, activations: Sequence[Floats]) -> Floats:
    """Scores of a layer's propositions, float32 ``[n, propositions]``, NaN for those of other layers.

    Args:
        program: the rules.
        layer: the decoder layer.
        activations: per proposition of the layer, ascending by number, those of its features, ``[n, features]``.
    """
    own = [i for i, one in enumerate(program.propositions) if one.layer == layer]
    found = np.full((len(activations[0]) if own else 0, len(program.propositions)), np.nan, np.float32)
    for i, a in zip(own, activations, strict=True):
        found[:, i] = scores(program.propositions[i], a)
    return found
