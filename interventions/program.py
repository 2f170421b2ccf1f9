"""The instruction set: what every intervention compiles into, and what the engine executes.

At one layer, with ``h`` the residual stream after it (fp32), a program is a set of *channels*. Each channel reads one
scalar ``a`` from ``h``, maps it through its *ops* in order, and writes the difference along one row::

    a      = read(h)                       # by ReadKind
    x_0    = a
    x_i    = op_i(x_{i-1})                  for the ops whose selector holds for this token (and a != 0 where the op is
                                            only_if_active), by OpKind: clip(alpha*x + beta, lo, hi), or for concepts a
                                            range mask or a gain table
    delta += c * (x_n - a) * w             # c = 1, ||h|| (NORM) or the SAE's own per-token scale (LATENT, MEMBER)
    delta += c * (decode(z') - decode(z))  # once per SAE with JOINT channels: z' is z with their results x_n in it

    h' = h + delta          (delta scaled down to max_dose * ||h|| where the program clamps its dose)

``set v`` is (0, v), ``scale v`` is (v, 0), ``add v`` is (1, v), ``clamp`` is (1, 0) with bounds, ``ablate`` is (0, 0);
``project_out s`` is (1 - s, 0) on the coordinate along a unit vector and ``cap`` a clip of it. Steering adds are the
channel that reads nothing (a = 0). All arithmetic is fp32, all channels read the same pre-edit ``h``.

A gain table says how much of a latent's activation is a concept's (:mod:`interventions.concepts.gain`). It is a row like
any other, content-addressed and ``d_model`` wide: ``[low, 1/width, nb, P_0 … P_{nb−1}, 0 …]``.

An op acts on a token where its selector holds, its ``scope`` (a second selector) holds too, and all its *gates* are open.
A gate belongs to a layer and listens to latents there: a token is a *hit* where any of its evidence is active (a ≠ 0).
Evidence, sources of a remap and ``only_if_active`` look at original activations, so the order of channels means nothing.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from enum import IntEnum
from functools import cached_property
from typing import Literal

import msgspec

from interventions.maps import gates
from interventions.rules.code import RuleProgram
from interventions.selectors import Selector

TABLE_HEADER = 3
"""Numbers of a gain table's row before its posteriors."""

SEMANTICS_VERSION = 1
"""Part of every digest. Raise it when the same program would produce different numbers."""


class ReadKind(IntEnum):
    """How a channel obtains its scalar ``a`` from the residual stream ``h``."""

    NONE = 0
    """a = 0, c = 1: a constant vector is added."""
    NORM = 1
    """a = 0, c = ||h||: the row is a unit vector, coefficients are in units of the token's own norm."""
    DOT = 2
    """a = r·h with r = w a unit vector."""
    LATENT = 3
    """a = the SAE's activation of one latent, from its own encoder row."""
    MEMBER = 4
    """As LATENT, but the activation depends on every latent of the dictionary (TopK): needs the full-encode path."""
    JOINT = 5
    """As MEMBER, and the decoder is not additive (PolySAE): the channel writes no row of its own. All JOINT channels of
    one SAE at one layer together write decode(z') − decode(z), z' being z with every channel's result in its place."""


class OpKind(IntEnum):
    """How an op maps the current value x of a channel."""

    AFFINE = 0
    """x ← clip(alpha·x + beta, lo, hi)."""
    RANGE = 1
    """x ← 0 where x > 0 and lo ≤ x ≤ hi."""
    GAIN = 2
    """x ← x·(1 − strength·P_b), b = clamp(⌊(x − low)·(1/width)⌋, 0, nb − 1): values outside the table's range belong to
    its first or last bin, so that none escapes."""
    REMAP = 3
    """x ← clip(alpha·x + beta·s + gamma·b, lo, hi): s is the token's unit, b the original activation of the latent
    ``source`` (:mod:`interventions.maps.transfer`)."""


class UnitKind(IntEnum):
    """What ``beta`` of a remap is counted in: the factor s of a token."""

    ABSOLUTE = 0
    """s = 1."""
    RESIDUAL_NORM = 1
    """s = ||h|| / c, c the SAE's own per-token scale of what it writes; 0 where c is."""
    PREACT_MEAN = 2
    """s = |mean over all latents of their pre-activations|: one row's dot product with the SAE's input, plus its bias."""


class GateKind(IntEnum):
    """When a gate is open; :mod:`interventions.maps.gates` defines the statistics of sequences."""

    TRIGGER = 0
    """At hit tokens (position 0 included, if something selects it)."""
    SHARE_PROMPT = 1
    """From the last prompt token on, if the share of hits in the prompt is above the threshold."""
    SHARE_SEEN = 2
    """Where the share of hits so far is above the threshold."""
    WINDOW = 3
    """Where the share of hits among the last ``window`` tokens is above the threshold."""
    CUSUM = 4
    """Where Page's cumulative sum is above the threshold."""
    RULE = 5
    """Where action number ``action`` of the program's rules is active."""


class Gate(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Lets the ops that name it act. The fields after ``kind`` are those of the kind's class in ``interventions.maps``."""

    kind: GateKind
    read: ReadKind
    """How the evidence is read: LATENT, or MEMBER where membership needs the whole dictionary (JOINT SAEs too)."""
    evidence: tuple[str, ...]
    """Feature keys, sorted; all of one SAE."""
    threshold: float = 0.0
    least: int = 1
    window: int = 0
    k: float = 0.0
    reset: bool = False
    latch: bool = False
    include_bos: bool = False
    action: int = -1
    """RULE: which of ``Program.rules.actions``; it has no evidence of its own."""

    @property
    def over_sequence(self) -> bool:
        """Whether it has a statistic over earlier tokens: then hit bits are remembered by position."""
        return self.kind not in (GateKind.TRIGGER, GateKind.RULE)

    @property
    def rule(self) -> gates.Gate:
        """The statistic and its threshold; ValueError for triggers and rules, which have none."""
        if not self.over_sequence:
            raise ValueError(f"a gate of kind {self.kind.name} has no statistic")
        if self.kind is GateKind.WINDOW:
            return gates.WindowGate(self.threshold, self.window, self.least, self.latch, self.include_bos)
        if self.kind is GateKind.CUSUM:
            return gates.CusumGate(self.threshold, self.k, self.reset, self.latch, self.include_bos)
        over: Literal["prompt", "seen"] = "prompt" if self.kind is GateKind.SHARE_PROMPT else "seen"
        return gates.ShareGate(self.threshold, over, self.least, self.latch, self.include_bos)


class Op(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Maps the current value of its channel, by ``kind``, on the tokens of ``selectors[selector]``."""

    alpha: float
    beta: float
    lo: float
    hi: float
    only_if_active: bool
    selector: int
    intervention: int
    """Index into the request's list of interventions: for receipts only, not part of the digest."""
    kind: OpKind = OpKind.AFFINE
    strength: float = 0.0
    """GAIN: λ."""
    table: str = ""
    """GAIN: key of the table, ``v:<sha256>`` of ``Program.vectors``."""
    gamma: float = 0.0
    """REMAP: share of the source's activation."""
    source: str = ""
    """REMAP: feature key of the source, empty where gamma is 0."""
    unit: UnitKind = UnitKind.ABSOLUTE
    """REMAP: of ``beta``."""
    mean: str = ""
    """REMAP with PREACT_MEAN: key of the row that gives it, ``m:<SAE digest>``."""
    scope: int = -1
    """A selector that must hold as well; -1 for none."""
    gates: tuple[int, ...] = ()
    """Gates of the layer that must all be open."""


class Channel(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One row and the ops on its scalar. ``row`` is a key: ``v:<sha256>`` of ``Program.vectors``, or a feature key."""

    read: ReadKind
    row: str
    ops: tuple[Op, ...]


class LayerProgram(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The channels after decoder layer ``layer`` (0-based), sorted by (read, row), and the gates of their ops."""

    layer: int
    channels: tuple[Channel, ...]
    gates: tuple[Gate, ...] = ()


class Program(msgspec.Struct, frozen=True, array_like=True, dict=True):
    """The canonical, content-addressed form of all edits of one request."""

    layers: tuple[LayerProgram, ...]
    selectors: tuple[Selector, ...]
    vectors: dict[str, bytes]
    """Row key → little-endian float32 values, for the rows that do not come from an SAE."""
    max_dose: float = math.inf
    """Upper bound of ||delta|| / ||h|| per token and layer."""
    refuse_over_dose: bool = False
    """What happens above ``max_dose``: False scales the delta down, True ends the request."""
    rules: RuleProgram | None = None
    """What the gates of kind RULE follow, and what is reported or refused on."""

    @property
    def needs_prompt_len(self) -> bool:
        """Whether two requests with equal prefixes but different prompt lengths can differ under this program."""
        over_prompt = any(gate.kind is GateKind.SHARE_PROMPT for layer in self.layers for gate in layer.gates)
        over_prompt |= self.rules is not None and self.rules.needs_prompt_len
        return over_prompt or any(s.needs_prompt_len for s in self.selectors)

    @property
    def listens(self) -> bool:
        """Whether what happens at a token depends on what was read at earlier ones: rules, and gates over the sequence."""
        return self.rules is not None or any(gate.over_sequence for layer in self.layers for gate in layer.gates)

    def resolved(self, prompt: Sequence[int]) -> Program:
        """The program for one prompt (token ids): mentions that are looked up in it become positions."""
        if not any(s.inside for s in self.selectors):
            return self
        return msgspec.structs.replace(self, selectors=tuple(s.resolved(prompt) for s in self.selectors))

    @cached_property
    def row_keys(self) -> tuple[str, ...]:
        """The distinct rows that the program reads, writes or looks up in, in canonical order."""
        keys: dict[str, None] = {}
        for layer in self.layers:
            for channel in layer.channels:
                keys[channel.row] = None
                for op in channel.ops:
                    if op.table or op.source or op.mean:
                        keys.update(dict.fromkeys(key for key in (op.table, op.source, op.mean) if key))
            for gate in layer.gates:
                keys.update(dict.fromkeys(gate.evidence))
        keys.update(dict.fromkeys(self.rules.row_keys if self.rules else ()))
        return tuple(keys)

    @property
    def n_instructions(self) -> int:
        """Number of ops over all layers and channels."""
        return sum(len(c.ops) for layer in self.layers for c in layer.channels)

    def digest(self) -> str:
        """sha256 over the meaning: row contents, ops as IEEE bits, selectors, dose policy; never names or labels.

        -0.0 and 0.0 are one value: whatever is a number has 0.0 added.
        """
        return self._digest

    @cached_property
    def _digest(self) -> str:
        parts = [b"editserver-program", _text(SEMANTICS_VERSION), _text(self.refuse_over_dose), _float(self.max_dose)]
        selectors = [selector.to_bytes() for selector in self.selectors]
        for layer in self.layers:
            parts += _text("layer"), _text(layer.layer)
            for one in layer.gates:  # their numbers are those of the hit bits that are kept with the KV cache
                parts += _text("listens"), msgspec.msgpack.encode(one)
            for channel in layer.channels:
                parts += _CHANNEL[channel.read], _text(channel.row)
                for op in channel.ops:
                    values = _FOUR(op.alpha + 0.0, op.beta + 0.0, op.lo + 0.0, op.hi + 0.0)
                    parts += _OP[op.only_if_active], values, selectors[op.selector]
                    if op.kind or op.scope >= 0 or op.gates:
                        parts += _beyond_affine(op, selectors)
        if self.rules is not None:  # all of it: the bits that are kept with the KV cache are numbered by it
            parts += _text("rules"), msgspec.msgpack.encode(self.rules)
        return hashlib.sha256(b"".join(parts)).hexdigest()


def _text(value: object) -> bytes:
    encoded = str(value).encode()
    return len(encoded).to_bytes(4, "little") + encoded


def _float(value: float) -> bytes:
    return struct.pack("<f", value + 0.0)


_FOUR = struct.Struct("<4f").pack
_CHANNEL = {kind: _text("channel") + _text(int(kind)) for kind in ReadKind}
_OP = {only_if_active: _text("op") + _text(only_if_active) for only_if_active in (False, True)}


def _beyond_affine(op: Op, selectors: Sequence[bytes]) -> list[bytes]:
    """What a digest takes in of what came after affine ops, whose digests stay what they were."""
    parts = []
    if op.kind is not OpKind.AFFINE:
        parts += [_text("kind"), _text(int(op.kind)), _text(op.table), _float(op.strength)]
    if op.kind is OpKind.REMAP:
        parts += [_text(op.source), _text(int(op.unit)), _text(op.mean), _float(op.gamma)]
    if op.scope >= 0:
        parts += [_text("scope"), _text(hashlib.sha256(selectors[op.scope]).hexdigest())]
    for gate in op.gates:
        parts += [_text("gate"), _text(gate)]
    return parts


def feature_key(sae_digest: str, index: int) -> str:
    """Content address of one latent's rows and gate: ``f:<SAE digest>:<index>``."""
    return f"f:{sae_digest}:{index}"


def parse_feature_key(key: str) -> tuple[str, int]:
    """Inverse of :func:`feature_key`."""
    kind, digest, index = key.split(":")
    if kind != "f":
        raise ValueError(f"{key!r} is not a feature row")
    return digest, int(index)


def mean_key(sae_digest: str) -> str:
    """Row whose product with the SAE's input, plus its bias, is the mean pre-activation: ``m:<SAE digest>``."""
    return f"m:{sae_digest}"


def parse_mean_key(key: str) -> str:
    """Inverse of :func:`mean_key`."""
    kind, _, digest = key.partition(":")
    if kind != "m":
        raise ValueError(f"{key!r} is not a mean pre-activation")
    return digest


def vector_key(values: bytes) -> str:
    """Content address of a vector given as little-endian float32 bytes: ``v:<sha256>``."""
    return "v:" + hashlib.sha256(values).hexdigest()


STREAM = "stream"
"""As :attr:`Read.sae`: what is listed are coordinates of the residual stream itself. No request can ask for it."""


class Read(msgspec.Struct, frozen=True, array_like=True):
    """One inspection: which latents of one SAE are reported, for which tokens. Never part of a digest."""

    sae: str
    """Content digest of the SAE, or ``STREAM``."""
    layer: int
    features: tuple[int, ...]
    top_k: int
    selector: Selector
    after: bool = False
    """Report the re-encoded, edited h instead of the pre-edit activations."""


class Payload(msgspec.Struct, frozen=True, array_like=True, dict=True):
    """What travels with a request to the engine: the program (or None), the readings, and the digest for the salt."""

    program: Program | None
    reads: tuple[Read, ...]
    digest: str | None

    @cached_property
    def selectors(self) -> tuple[Selector, ...]:
        """The program's selectors, then one per reading."""
        return (self.program.selectors if self.program else ()) + tuple(read.selector for read in self.reads)

    @cached_property
    def row_keys(self) -> tuple[str, ...]:
        """The distinct rows that the request needs: its program's, then the listed features of its readings."""
        latents = (read for read in self.reads if read.sae != STREAM)
        listed = (feature_key(read.sae, index) for read in latents for index in read.features)
        return tuple(dict.fromkeys((*(self.program.row_keys if self.program else ()), *listed)))

    def to_bytes(self) -> bytes:
        """Serialise (msgpack)."""
        return msgspec.msgpack.encode(self)

    @staticmethod
    def from_bytes(data: bytes) -> Payload:
        """Inverse of :meth:`to_bytes`; raises ``msgspec.DecodeError`` / ``ValidationError`` on anything else."""
        return msgspec.msgpack.decode(data, type=Payload)
