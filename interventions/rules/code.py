"""Rule sets as the engine runs them: bit programs over propositions, numbered and without names.

A request's rule sets and ``when`` expressions together are one :class:`RuleProgram`. At every token, layer by layer:

1. the propositions of the layer are decided from its pre-edit residual stream (position 0: none holds);
2. the memories of the layer take the token in: counts, windows, orders;
3. the rules of the layer are run, group after group, each group until nothing more is concluded;
4. the actions on conclusions of the layer are active where these hold, and for their duration after.

A layer's memories, rules, conclusions and actions look at that layer and at earlier ones, so what they say is known when the
layer's own edits are made. Bodies are postfix codes over two-bit values (:class:`OpCode`); an undecided value is neither true
nor false. State lives in integers, one cell or a few per memory, latch and action, and depends on earlier tokens only.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum

import msgspec


class OpCode(IntEnum):
    """One step of a postfix code. A value is (true, false); every step pushes one, after taking its operands."""

    PROPOSITION = 0
    """Proposition number ``argument`` at this token: decided."""
    MEMORY = 1
    """Memory number ``argument``: decided, one over the prompt from the last prompt token on."""
    CONCLUSION = 2
    """Conclusion number ``argument``: decided, a closed one from the last prompt token on."""
    ENDED = 3
    """Whether this is the last prompt token or a later one."""
    NOT = 4
    """Of one operand: true and false change places."""
    AND = 5
    """Of two operands: true where both are, false where either is."""
    OR = 6
    """Of two operands: true where either is, false where both are."""
    XOR = 7
    """Of two operands: true where one is true and one is false, false where both are true or both false."""


class MemoryKind(IntEnum):
    """What is remembered of where ``parts`` held. Position 0 is nowhere in it."""

    COUNT = 0
    """Tokens so far (or of the prompt) where part 0 held: at least ``least``, or ``share`` ppm of them."""
    WINDOW = 1
    """Of the last ``window`` tokens, this one included, at least ``least`` where part 0 held."""
    ORDER = 2
    """All parts held, in this order, at strictly increasing positions: each token can be the next part, once."""


Code = tuple[tuple[int, int], ...]
"""``(OpCode, argument)``; the argument of ENDED, NOT, AND, OR and XOR is 0."""


class Branch(msgspec.Struct, frozen=True, array_like=True):
    """A node of a decision tree: a leaf where ``feature`` is −1, else a split."""

    feature: int
    """Place of the feature in :attr:`PropositionCode.features`."""
    strict: bool = False
    """``activation > threshold``, else ``>=``."""
    threshold: float = 0.0
    then: int = 0
    """Number of the node that follows where the comparison is true; always larger than this node's."""
    other: int = 0
    value: float = 0.0
    """Score of a leaf."""


class PropositionCode(msgspec.Struct, frozen=True, array_like=True):
    """``score >= threshold`` (or ``>``) in float32; a NaN is never true.

    The score is the sum ``((w_0·a_0) + w_1·a_1) + …`` with every product and every sum rounded, or that of a tree.
    """

    layer: int
    """Decoder layer of the SAE."""
    whole: bool
    """Whether the activations need the whole dictionary (TopK and its like)."""
    features: tuple[str, ...]
    """Feature keys (``f:<SAE digest>:<index>``) of one SAE, ascending by index."""
    weights: tuple[float, ...]
    """One per feature; empty for a tree."""
    tree: tuple[Branch, ...]
    """Node 0 is the root; empty for a sum."""
    strict: bool
    threshold: float


class MemoryCode(msgspec.Struct, frozen=True, array_like=True):
    """Evidence over several tokens."""

    layer: int
    """The last layer of its propositions."""
    kind: MemoryKind
    parts: tuple[Code, ...]
    """Of propositions, NOT, AND, OR, XOR only; one but for an order."""
    over_prompt: bool = False
    """Looks at prompt tokens only, and is decided at the last of them."""
    least: int = 0
    share: int = 0
    """In parts per million of the tokens in scope (position 0 is none of them); 0 where ``least`` counts."""
    window: int = 0


class RuleCode(msgspec.Struct, frozen=True, array_like=True):
    """Where ``body`` is true, ``head`` is concluded."""

    group: int
    """Rules are sorted by group. A group is of one layer and one stratum, and is run until nothing more is concluded."""
    body: Code
    head: int


class ConclusionCode(msgspec.Struct, frozen=True, array_like=True):
    """What rules conclude at a token; where none does, it does not hold, unless it latches and held before."""

    layer: int
    """The layer at which it is known."""
    latch: bool = False
    closed: bool = False
    """Undecided until the last prompt token."""


class ActionCode(msgspec.Struct, frozen=True, array_like=True):
    """Active where its conclusion holds and, counted from there, for ``tokens`` tokens in all."""

    conclusion: int
    tokens: int = 1
    """0: from now on."""
    refuses: bool = False
    """Ends the request at the first token where it is active."""


class RuleProgram(msgspec.Struct, frozen=True, array_like=True):
    """All rules of one request."""

    propositions: tuple[PropositionCode, ...]
    memories: tuple[MemoryCode, ...]
    rules: tuple[RuleCode, ...]
    conclusions: tuple[ConclusionCode, ...]
    actions: tuple[ActionCode, ...]

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers at which something is read or decided, ascending."""
        found = {one.layer for part in (self.propositions, self.memories, self.conclusions) for one in part}
        return tuple(sorted(found))

    @property
    def row_keys(self) -> tuple[str, ...]:
        """The distinct features that propositions read."""
        return tuple(dict.fromkeys(key for one in self.propositions for key in one.features))

    @property
    def needs_prompt_len(self) -> bool:
        """Whether anything depends on where the prompt ends."""
        codes: Iterator[tuple[int, int]] = (step for rule in self.rules for step in rule.body)
        return (
            any(one.over_prompt for one in self.memories)
            or any(one.closed for one in self.conclusions)
            or any(op == OpCode.ENDED for op, _ in codes)
        )
