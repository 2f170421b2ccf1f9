"""From the worker's resident set to the device's tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from editserver.engine.layer_table import Listener
from editserver.engine.resident import ResidentSet
from editserver.engine.triton import codes
from editserver.engine.triton.encode import DeviceEncode
from editserver.engine.triton.layout import Layout
from editserver.engine.triton.rule_columns import Placed
from editserver.engine.triton.rules import DeviceRules
from editserver.engine.triton.tables import Columns, DeviceTables, Listing
from interventions.maps import gates
from interventions.program import STREAM, feature_key
from interventions.rules.code import RuleProgram

Entry = tuple[int, int, int, int]
LATENT, MEMBER = int(codes.READ_LATENT), int(codes.READ_MEMBER)


class NotOnDevice(ValueError):
    """A program asks for something that is not computed on the device."""


def fill(
    tables: DeviceTables,
    residents: ResidentSet,
    *,
    remembers: bool = False,
    members: bool = False,
    rules: DeviceRules | None = None,
    encode: DeviceEncode | None = None,
    prompts: Mapping[str, Sequence[int]] = MappingProxyType({}),
) -> int:
    """Bring the tables up to date with ``residents`` (refreshed); returns the bytes copied.

    Args:
        remembers: hit bits are kept with the KV (:meth:`~editserver.engine.triton.step.DeviceStep.attach`).
        members: somebody puts activations that need whole dictionaries into the step's buffer.
        rules, encode: of the step; None where rules are not run, or whole dictionaries not encoded.
        prompts: tokens that each request which looks for mentions began with.

    Raises:
        CapacityError: they do not fit; the tables are as before.
        NotOnDevice: a program needs what these kernels do not do; the tables are as before.
    """
    n = len(residents.requests)
    columns = tables.selector_columns(residents.selectors) | tables.dose_columns(residents.dose, residents.refuses)
    for resident in residents.requests.values():
        looks_back = any(selector.ends for selector in resident.selectors)
        if looks_back and (not tables.capacity.history or resident.request_id not in prompts):
            raise NotOnDevice("mentions are not looked for: the device keeps no tokens of earlier steps")
        program = resident.payload.program
        if program is not None and program.rules is not None:
            _check_rules(program.rules, rules, remembers, encode is not None)
    looking = [name for name, one in residents.requests.items() if any(s.ends for s in one.selectors)]
    columns |= tables.mention_columns([s.ends for one in residents.requests.values() for s in one.selectors])
    columns["prompt_lengths"] = np.array([one.prompt_len for one in residents.requests.values()], np.int32)
    layout = _layout(encode, residents, tables.capacity.members)
    for layer in tables.layers:
        table = residents.layers.get(layer)  # none before the first refresh
        if table is not None and table.n_members and not members and encode is None:
            raise NotOnDevice("whole dictionaries are not encoded on the device")
        columns |= tables.layer_columns(layer, table, n)
        columns |= _listed(tables, residents, layer, False, layout) | _listed(tables, residents, layer, True, layout)
        placed = layout.placed.get((layer, "before"))
        columns |= _gates(tables, layer, table.listeners if table else {}, n, remembers, placed)
    tables.check(columns)
    ruled = {}
    if rules is not None:
        ruled = rules.columns(
            residents, {layer: one for (layer, name), one in layout.placed.items() if name == "before"}
        )
    encoded = encode.columns(layout) if encode is not None else {}
    seats = tables.seat({name: prompts[name] for name in looking})
    columns["history_row"] = np.array([seats.get(name, -1) for name in residents.requests], np.int32)
    copied = tables.write(columns)
    copied += rules.write(ruled, residents) if rules is not None else 0
    return copied + (encode.write(encoded, layout, residents) if encode is not None else 0)


def _layout(encode: DeviceEncode | None, residents: ResidentSet, members: int) -> Layout:
    """Where activations that need whole dictionaries are put."""
    if encode is None:
        return Layout()
    try:
        return encode.layout(residents, members)
    except KeyError as missing:
        sae = residents.dictionaries[missing.args[0]]
        message = f"the dictionary {sae.digest[:12]}… of architecture {sae.architecture!r} is not encoded on the device"
        raise NotOnDevice(message) from None


def _check_rules(program: RuleProgram, rules: DeviceRules | None, remembers: bool, encodes: bool) -> None:
    if rules is None:
        raise NotOnDevice("rules are not run on the device")
    if not remembers:
        raise NotOnDevice("rules need bits that are kept with the KV")
    if not encodes and any(one.whole for one in program.propositions):
        raise NotOnDevice("propositions that need a whole dictionary are not decided on the device")


def _listed(tables: DeviceTables, residents: ResidentSet, layer: int, after: bool, layout: Layout) -> Columns:
    """The listed latents of the inspections at ``layer``, those of one request one behind the other."""
    owners, name = list(residents.requests.values()), "after" if after else "before"
    wanted: list[list[Entry]] = [[] for _ in owners]
    for index, number, read in residents.reads.get(layer, ()):
        if read.after is not after:
            continue
        if read.sae == STREAM:
            raise NotOnDevice("readings of the stream itself are not taken on the device")
        whole, placed = not residents.dictionaries[read.sae].row_separable, layout.placed.get((layer, name))
        if (whole or read.top_k) and placed is None:
            raise NotOnDevice("readings that need a whole dictionary are not taken on the device")
        norm, bit = residents.dictionaries.input_norm(read.sae), _signed(owners[index].read_bit(number))
        if whole and placed is not None:
            columns = (placed[index, read.sae, feature] for feature in read.features)
            wanted[index] += [(column, norm, MEMBER, bit) for column in columns]
            continue
        slots = (owners[index].slots[feature_key(read.sae, feature)] for feature in read.features)
        wanted[index] += [(slot, norm, LATENT, bit) for slot in slots]
    return tables.listing_columns(layer, name, Listing.of(wanted))


def _gates(
    tables: DeviceTables,
    layer: int,
    listeners: Mapping[int, Sequence[Listener]],
    n_residents: int,
    remembers: bool,
    placed: Placed | None,
) -> Columns:
    """What the gates at ``layer`` listen to, and those of them that look back."""
    heard: list[list[Entry]] = [[] for _ in range(n_residents)]
    wanted: list[list[tuple[int, ...]]] = [[] for _ in range(n_residents)]
    limits: list[float] = []
    for index in sorted(listeners):
        for one in listeners[index]:
            if one.whole and placed is None:
                raise NotOnDevice("evidence that needs a whole dictionary is not looked for on the device")
            if one.whole and placed is not None:
                columns_of = (placed[index, one.digest, feature] for feature in one.features.tolist())
                heard[index] += [(column, one.norm, MEMBER, _signed(one.bit)) for column in columns_of]
            else:
                heard[index] += [(int(slot), one.norm, LATENT, _signed(one.bit)) for slot in one.slots]
            if one.rule is None:
                continue
            if not remembers:
                raise NotOnDevice("gates over sequences need hit bits that are kept with the KV")
            row, limit = _sequence_gate(one.rule)
            wanted[index].append((row[0], _signed(one.bit), *row[1:]))
            limits.append(limit)
    columns = tables.listing_columns(layer, "heard", Listing.of(heard))
    return columns | tables.gate_columns(layer, wanted, limits)


def _sequence_gate(rule: gates.Gate) -> tuple[tuple[int, ...], float]:
    """Kind, window, least, k in steps, flags; and what the statistic must exceed (CUSUM's is counted in steps)."""
    flags = int(codes.LATCHES) * rule.latch + int(codes.WITH_BOS) * rule.include_bos
    if isinstance(rule, gates.CusumGate):
        if rule.reset:
            raise NotOnDevice("sums that start again after an alarm are not taken on the device")
        return (int(codes.CUSUM), 0, 1, round(rule.k / gates.STEP), flags), rule.threshold / gates.STEP
    if isinstance(rule, gates.WindowGate):
        return (int(codes.WINDOW), rule.window, rule.least, 0, flags), rule.threshold
    kind = codes.SHARE_PROMPT if rule.over == "prompt" else codes.SHARE_SEEN
    return (int(kind), 0, rule.least, 0, flags), rule.threshold


def _signed(bit: np.uint64) -> int:
    """The same 64 bits as the kernels hold them."""
    return int(np.array([bit], np.uint64).view(np.int64)[0])
