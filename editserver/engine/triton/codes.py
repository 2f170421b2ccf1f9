"""Numbers that tables and kernels share. Those of instructions are :mod:`interventions.program`'s (a test compares them): kernels
want them as compile-time constants, and the GPU benchmark runs where nothing but PyTorch and Triton is installed."""

from __future__ import annotations

import triton.language as tl

NONE = tl.constexpr(0)
NORM = tl.constexpr(1)
DOT = tl.constexpr(2)
LATENT = tl.constexpr(3)
MEMBER = tl.constexpr(4)
JOINT = tl.constexpr(5)
"""How a channel obtains its scalar (``ReadKind``)."""

AFFINE = tl.constexpr(0)
RANGE = tl.constexpr(1)
GAIN = tl.constexpr(2)
REMAP = tl.constexpr(3)
"""How an op maps it (``OpKind``)."""

ABSOLUTE = tl.constexpr(0)
RESIDUAL_NORM = tl.constexpr(1)
PREACT_MEAN = tl.constexpr(2)
"""What a remap's beta is counted in (``UnitKind``)."""

POSTERIORS = tl.constexpr(3)
"""Numbers of a gain table before its posteriors (``TABLE_HEADER``)."""

PLAIN_INPUT = tl.constexpr(0)
NORM_RESCALE = tl.constexpr(1)
LAYER_NORM = tl.constexpr(2)
UNIT_NORM = tl.constexpr(3)
CENTRE = tl.constexpr(4)
"""How an SAE normalises its input per token (``kernel_cpu.INPUT_NORMS``)."""

LAYER_NORM_EPS = tl.constexpr(1e-5)

READ_DOT = tl.constexpr(0)
READ_LATENT = tl.constexpr(1)
READ_MEAN = tl.constexpr(2)
READ_MEMBER = tl.constexpr(3)
"""What is made of one row's product u with a token: u, the latent's activation, |u + bias|; or nothing is multiplied and
the value is a column of the members' buffer."""

CLAMPED = tl.constexpr(1)
OVER = tl.constexpr(2)
"""Token flags: the dose was scaled down; the dose exceeds a bound that refuses."""

CHANNEL_COLUMNS = tl.constexpr(4)
"""Of ``channels``: read kind, bank slot, input norm, which of the program's reads gives its scalar (-1: none)."""

READ_COLUMNS = tl.constexpr(3)
"""Of ``reads``: bank slot (READ_MEMBER: column), input norm, what is made of it."""

OP_COLUMNS = tl.constexpr(6)
"""Of ``op_ints``: kind, bank slot of a gain table, source and mean among the program's reads, unit, only_if_active."""

OP_VALUES = tl.constexpr(6)
"""Of ``op_values``: alpha, beta, lo, hi, strength, gamma."""

OP_MASKS = tl.constexpr(3)
"""Of ``op_masks``: selectors that must hold, gates that must be open, bit of the intervention."""

ACTIVE = tl.constexpr(0)
N_TOKENS = tl.constexpr(1)
N_TILES = tl.constexpr(2)
"""Places of a plan's state: 0 where nothing is planned, tokens of the batch, tiles."""

N_ROWS = tl.constexpr(3)
"""Another place of it: rows of the batch."""

STEP = tl.constexpr(4)
"""And another: the plan's own number, which every layer that runs by the plan leaves behind."""

SHARE_PROMPT = tl.constexpr(1)
SHARE_SEEN = tl.constexpr(2)
WINDOW = tl.constexpr(3)
CUSUM = tl.constexpr(4)
"""Gates over sequences (``GateKind``)."""

GATE_COLUMNS = tl.constexpr(6)
"""Of ``gates``: kind, bit, window, least, k in steps of 2⁻²⁰, flags."""

LATCHES = tl.constexpr(1)
WITH_BOS = tl.constexpr(2)
"""A gate's flags: it stays open; position 0 is evidence."""

PROPOSITION = tl.constexpr(0)
MEMORY = tl.constexpr(1)
CONCLUSION = tl.constexpr(2)
ENDED = tl.constexpr(3)
NOT = tl.constexpr(4)
AND = tl.constexpr(5)
OR = tl.constexpr(6)
XOR = tl.constexpr(7)
PROMPT_MEMORY = tl.constexpr(8)
CLOSED_CONCLUSION = tl.constexpr(9)
"""Steps of a rule's postfix code (``OpCode``; the last two are ``kernel_rules``')."""

COUNT = tl.constexpr(0)
RULE_WINDOW = tl.constexpr(1)
ORDER = tl.constexpr(2)
"""What a memory of rules keeps (``MemoryKind``)."""

PPM = tl.constexpr(1_000_000)

POINTER_COLUMNS = tl.constexpr(5)
"""Of a rule table's ``pointers``: propositions, memories, conclusions, actions, gates."""

PROPOSITION_COLUMNS = tl.constexpr(5)
BRANCH_COLUMNS = tl.constexpr(4)
MEMORY_COLUMNS = tl.constexpr(9)
RULE_COLUMNS = tl.constexpr(3)
"""Of what they point into."""

SINGLE_ROWS = tl.constexpr(0)
MEMBERS = tl.constexpr(1)
SIGNED_MEMBERS = tl.constexpr(2)
"""How a whole dictionary's activations follow from its products: each from its own row; the largest survive, as relu(p) or p."""
