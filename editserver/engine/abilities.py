"""What an engine of kernels can do for one request, and for all of them at a time: refused, or held back, before it is reached."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from msgspec.structs import replace

from editserver.engine.triton.capacity import Capacity, EncodeCapacity, RuleCapacity
from interventions.errors import Code, InterventionError
from interventions.program import STREAM, GateKind, LayerProgram, Payload, Program, ReadKind, parse_feature_key
from interventions.rules.code import MemoryKind, RuleProgram

Place = tuple[str, int]
"""A table: its name in :class:`Capacity` (``rules.rows`` for those of rules), and the layer, -1 for one of all layers."""

ON_GPU = "on a GPU"
NOT_ENCODED = "dictionaries of this kind are not encoded yet"

ENCODED = frozenset(("topk", "gradient", "abstopk", "plain_topk", "vsae"))
"""Architectures whose activations need the whole dictionary, and which the kernels compute."""


@dataclass(frozen=True)
class Fields:
    """What a request calls the parts of its payload, for refusals.

    Attributes:
        reads: the place of each inspection, in the payload's order.
        rules: of each intervention that has rules, or a condition of them.
    """

    reads: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()


@dataclass(frozen=True)
class Abilities:
    """Of the device's engine, as it was started.

    Attributes:
        capacity, rules, encode: what is reserved; ``rules`` None where they are not run, ``encode`` where no whole dictionary
            is encoded.
        whole: digest → id of the dictionaries whose activations need all of it, and are computed.
        not_encoded: likewise, of those that the operator wants encoded and the kernels do not know.
        remembers: bits are kept with the KV, so gates and rules may look back.
    """

    capacity: Capacity
    rules: RuleCapacity | None
    encode: EncodeCapacity | None = None
    whole: Mapping[str, str] = field(default_factory=dict)
    not_encoded: Mapping[str, str] = field(default_factory=dict)
    remembers: bool = True

    def as_dict(self) -> dict[str, Any]:
        """For the handshake's answer."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Abilities:
        """Inverse of :meth:`as_dict`."""
        rules = None if raw["rules"] is None else RuleCapacity(**raw["rules"])
        encode = None if raw["encode"] is None else EncodeCapacity(**raw["encode"])
        return cls(Capacity(**raw["capacity"]), rules, encode, raw["whole"], raw["not_encoded"], raw["remembers"])

    def check(self, payload: Payload, fields: Fields = Fields()) -> None:
        """Refuse what the engine would not do, or has no room for even where it is alone.

        Raises:
            InterventionError: ``unsupported_with_interventions``, ``limit_exceeded``. It names the one inspection or
                intervention that would not be done by itself; ``inspect`` or ``interventions`` where all of them together
                would not.
        """
        refusal = self._refusal(payload)
        if refusal is None:
            return
        if edits := self._refusal(replace(payload, reads=())):
            raise InterventionError(*self._fault_of_edits(payload, edits, fields.rules))
        for name, read in zip(fields.reads, payload.reads, strict=False):
            if one := self._refusal(replace(payload, program=None, reads=(read,))):
                raise InterventionError(*one, name)
        raise InterventionError(*refusal, "inspect")

    def _fault_of_edits(
        self, payload: Payload, refusal: tuple[Code, str], rules: tuple[str, ...]
    ) -> tuple[Code, str, str]:
        """Code, message and field, where the interventions are refused with ``refusal``."""
        for i, alone in _interventions(payload):
            if one := self._refusal(alone):
                return (*one, f"interventions[{i}]")
        program = payload.program
        if program is not None and program.rules is not None and rules:
            without = replace(payload, program=replace(program, rules=None), reads=())
            # Rule sets share their rooms: of several none is to blame. What is not done at all, the first asked for.
            told = len(rules) == 1 or refusal[0] == "unsupported_with_interventions"
            if told and self._refusal(without) is None:
                return (*refusal, rules[0])
        return (*refusal, "interventions")

    def limits(self) -> dict[str, int]:
        """What one request may need, whatever the published limits allow; ``layer_…``: at one layer."""
        room, rules = self.capacity, self.rules
        found = {
            "layer_channels": room.request_channels,
            "layer_reads": room.request_reads,
            "layer_inspected_features": room.listed,
            "layer_whole_dictionary_features": room.members if self.encode is not None else 0,
            "layer_top_k": self.room("encode.top"),
            "layer_sequence_gates": room.request_gates,
        }
        if rules is not None:
            found |= {
                "layer_rule_features": rules.features,
                "rule_propositions": rules.propositions,
                "rule_conclusions": rules.conclusions,
                "rule_actions": rules.actions,
                "rule_memories": rules.memories,
                "rule_numbers": rules.cells,
            }
        return found

    def _refusal(self, payload: Payload) -> tuple[Code, str] | None:
        """Code and message."""
        if missing := self._missing(payload):
            return "unsupported_with_interventions", f"{ON_GPU}, {missing}"
        for what, needed, room in (*self._own(payload), *self._shared(payload)):
            if needed > room:
                return "limit_exceeded", f"the request needs {needed} {what}, and a GPU's engine has room for {room}"
        return None

    def _missing(self, payload: Payload) -> str | None:
        """What is not done, as a phrase."""
        program = payload.program
        gates = [gate for layer in program.layers for gate in layer.gates] if program else []
        asked = {digest for keys in _whole(payload).values() for digest, _ in keys} | {r.sae for r in payload.reads}
        if names := sorted(self.not_encoded[digest] for digest in asked & self.not_encoded.keys()):
            return f"{NOT_ENCODED}: {', '.join(names)}"
        if any(read.sae == STREAM for read in payload.reads):
            return "the residual stream itself is not read out yet"
        if any(gate.kind is GateKind.CUSUM and gate.reset for gate in gates):
            return "cumulative sums that start again after an alarm (reset) are not taken yet"
        if program is not None and program.rules is not None and self.rules is None:
            return "rules are not run"
        if program is not None and program.listens and not self.remembers:
            return (
                "rules and gates over a sequence need a KV cache that keeps every token, and this model's does not "
                "(sliding windows or recurrent states alone)"
            )
        return None

    def _own(self, payload: Payload) -> list[tuple[str, int, int]]:
        """(What, how many of them the request has at its busiest layer, how many it may)."""
        program, room = payload.program, self.capacity
        layers = program.layers if program else ()
        listed: Counter[tuple[int, bool]] = Counter()
        largest: Counter[tuple[int, bool]] = Counter()
        for read in payload.reads:
            listed[read.layer, read.after] += len(read.features)
            largest[read.layer, read.after] += read.top_k
        # An inspection of the edited stream has columns of its own beside those of the unedited one.
        members = {layer: {(*key, False) for key in keys} for layer, keys in _whole(payload).items()}
        for read in payload.reads:
            if read.sae in self.whole:
                own = {(read.sae, feature, read.after) for feature in read.features}
                members.setdefault(read.layer, set()).update(own)
        most = max(map(len, members.values()), default=0)
        found = [
            ("channels at a layer", max((len(one.channels) for one in layers), default=0), room.request_channels),
            ("reads at a layer", max(map(_reads, layers), default=0), room.request_reads),
            ("inspected latents at a layer", max(listed.values(), default=0), room.listed),
            ("latents of dictionaries that are encoded as wholes, at a layer", most, room.members),
            ("largest activations (top_k) at a layer", max(largest.values(), default=0), self.room("encode.top")),
            ("gates over sequences at a layer", max(map(_sequence_gates, layers), default=0), room.request_gates),
        ]
        if program is not None and program.rules is not None and self.rules is not None:
            found += _rules(program.rules, self.rules)
        return found

    def _shared(self, payload: Payload) -> list[tuple[str, int, int]]:
        wanted = self.wanted_by(payload).items()
        return [(f"{name} in all", needed, self.room(name)) for (name, _), needed in wanted]

    def wanted_by(self, payload: Payload) -> dict[Place, int]:
        """:func:`needs`, of the tables that there are."""
        return {
            place: n for place, n in needs(payload).items() if self.encode is not None or place[0] != "encode.takes"
        }

    def room(self, name: str) -> int:
        """Entries of a table of this name."""
        part, _, field_name = name.rpartition(".")
        if part:
            reserved = self.rules if part == "rules" else self.encode
            return int(getattr(reserved, field_name)) if reserved is not None else 0
        return int(getattr(self.capacity, name))


def _interventions(payload: Payload) -> Iterator[tuple[int, Payload]]:
    """Each intervention that edits by itself: its index, and a request of nothing else, without its rules."""
    program = payload.program
    if program is None:
        return
    for i in sorted({op.intervention for layer in program.layers for one in layer.channels for op in one.ops}):
        layers = []
        for layer in program.layers:
            own = [(one, tuple(op for op in one.ops if op.intervention == i)) for one in layer.channels]
            channels = tuple(replace(one, ops=ops) for one, ops in own if ops)
            named = sorted({gate for one in channels for op in one.ops for gate in op.gates})
            layers.append(replace(layer, channels=channels, gates=tuple(layer.gates[gate] for gate in named)))
        own_ops = [op for layer in layers for one in layer.channels for op in one.ops]
        used = {place for op in own_ops for place in (op.selector, op.scope)}
        selectors = tuple(one for place, one in enumerate(program.selectors) if place in used)
        # Indices into gates and selectors are not right any more; nothing here looks at them.
        alone = replace(program, layers=tuple(layers), selectors=selectors, rules=None)
        yield i, replace(payload, program=alone, reads=())


def _whole(payload: Payload) -> dict[int, set[tuple[str, int]]]:
    """Layer → (digest, latent) of all that an edit or a rule reads of whole dictionaries."""
    found: dict[int, set[tuple[str, int]]] = {}
    program = payload.program
    for layer in program.layers if program else ():
        keys = [g.evidence for g in layer.gates if g.kind is not GateKind.RULE and g.read is not ReadKind.LATENT]
        keys += [
            (channel.row, *(op.source for op in channel.ops if op.source))
            for channel in layer.channels
            if channel.read in (ReadKind.MEMBER, ReadKind.JOINT)
        ]
        found.setdefault(layer.layer, set()).update(parse_feature_key(key) for one in keys for key in one)
    for one in program.rules.propositions if program and program.rules else ():
        if one.whole:
            found.setdefault(one.layer, set()).update(map(parse_feature_key, one.features))
    return found


def _reads(layer: LayerProgram) -> int:
    own = {(c.read, c.row) for c in layer.channels if c.read > ReadKind.NORM}
    remaps = {key for c in layer.channels for op in c.ops for key in (op.source, op.mean) if key}
    return len(own) + len(remaps)


def _sequence_gates(layer: LayerProgram) -> int:
    return sum(gate.over_sequence for gate in layer.gates)


def _rules(program: RuleProgram, room: RuleCapacity) -> list[tuple[str, int, int]]:
    latents: dict[int, set[str]] = {}
    for one in program.propositions:
        latents.setdefault(one.layer, set()).update(one.features)
    cells = len(program.conclusions) + len(program.actions)
    cells += sum(1 + (m.window + 63) // 64 if m.kind is MemoryKind.WINDOW else 1 for m in program.memories)
    return [
        ("propositions of rules", len(program.propositions), room.propositions),
        ("conclusions of rules", len(program.conclusions), room.conclusions),
        ("actions of rules", len(program.actions), room.actions),
        ("memories of rules", len(program.memories), room.memories),
        ("latents that rules look at at a layer", max(map(len, latents.values()), default=0), room.features),
        ("numbers that rules remember", cells, room.cells),
    ]


def _rule_rows(program: RuleProgram) -> int:
    """Rows of the longest of its tables, were all of it at one layer."""
    steps = sum(len(rule.body) for rule in program.rules)
    steps += sum(len(part) for memory in program.memories for part in memory.parts)
    return max(
        sum(len(one.features) for one in program.propositions),
        sum(len(one.tree) for one in program.propositions),
        -(-steps // 4),
        -(-sum(len(memory.parts) + 1 for memory in program.memories) // 2),
        *(len(part) for part in (program.rules, program.conclusions, program.actions, program.memories)),
        64,  # gates that follow them
    )


def needs(payload: Payload) -> dict[Place, int]:
    """Entries that one request takes of the tables that all residents share, at most."""
    program = payload.program
    selectors = payload.selectors
    mentions = [sequence for selector in selectors for sequence in selector.ends]
    found: Counter[Place] = Counter(
        {
            ("residents", -1): 1,
            ("selectors", -1): len(selectors),
            ("intervals", -1): sum(len(selector.ranges) for selector in selectors),
            ("wanted_ids", -1): sum(len(selector.token_ids) for selector in selectors),
            ("mentions", -1): len(mentions),
            ("mention_ids", -1): sum(map(len, mentions)),
            ("history_rows", -1): int(bool(mentions)),
        }
    )
    listed: Counter[tuple[int, bool]] = Counter()
    for read in payload.reads:
        listed[read.layer, read.after] += len(read.features)
    for (layer, _), n in listed.items():
        found["reads", layer] = max(found["reads", layer], n)
    for one in program.layers if program else ():
        heard = sum(len(gate.evidence) for gate in one.gates)
        found["channels", one.layer] = len(one.channels)
        found["ops", one.layer] = sum(len(channel.ops) for channel in one.channels)
        found["reads", one.layer] = max(found["reads", one.layer], _reads(one), heard)
        found["gates", one.layer] = _sequence_gates(one)
    for place, members in _whole(payload).items():
        found["encode.takes", place] = len(members)
    for read in payload.reads:
        found["encode.takes", read.layer] += len(read.features)  # as if all of them needed whole dictionaries
    _add_rules(found, program)
    return {place: n for place, n in found.items() if n}


def _add_rules(found: Counter[Place], program: Program | None) -> None:
    if program is not None and program.rules is not None:
        found["rules.requests", -1] = 1
        found["rules.rows", -1] = _rule_rows(program.rules)


@dataclass
class Room:
    """What of the shared tables is taken, by request: one that would not fit waits."""

    abilities: Abilities
    _held: dict[str, dict[Place, int]] = field(default_factory=dict)
    _taken: Counter[Place] = field(default_factory=Counter)

    def enter(self, request: str, payload: Payload) -> bool:
        """Whether there is room; it is taken then, until :meth:`leave`."""
        wanted = self.abilities.wanted_by(payload)
        if any(self._taken[place] + n > self.abilities.room(place[0]) for place, n in wanted.items()):
            return False
        self._held[request] = wanted
        self._taken.update(wanted)
        return True

    def leave(self, request: str) -> None:
        """The request is gone; unknown ones are ignored."""
        self._taken.subtract(self._held.pop(request, {}))
