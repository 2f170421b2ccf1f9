"""The tables of resident requests: whatever came and went, they are those of the requests that are there."""

from __future__ import annotations

from functools import cache
from itertools import accumulate

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from editserver.engine.layer_table import LayerTable, Listener, Use
from editserver.engine.resident import Resident, ResidentSet, _located
from editserver.engine.rows import Dictionaries
from interventions.program import STREAM, Gate, GateKind, LayerProgram, Payload, Program, Read, ReadKind, feature_key
from interventions.selectors import ALL, GENERATED
from tests.engine.kernel_steps import LAYER, dictionaries, random_program

OTHER = LAYER + 1


def made_of(random: np.random.Generator) -> Payload:
    """A program at one or both of two layers, with gates and inspections now and then; or inspections alone."""
    program: Program | None = None
    if random.random() < 0.8:
        first, second = random_program(random, 5), random_program(random, 5)
        evidence = (feature_key(dictionaries()[1]["standard"].digest, int(random.integers(8))),)
        gate = Gate(GateKind.TRIGGER, ReadKind.LATENT, evidence)
        layers = [LayerProgram(LAYER, first.layers[0].channels, (gate,) * int(random.integers(3)))]
        if random.integers(2):
            layers.append(LayerProgram(OTHER, second.layers[0].channels))
        layers = layers[int(random.integers(len(layers))) :]
        selectors = (*first.selectors, *second.selectors)
        program = Program(tuple(layers), selectors, first.vectors | second.vectors, first.max_dose)
    reads = [
        Read(dictionaries()[1]["standard"].digest, LAYER, (3, 4), 0, ALL),
        Read(dictionaries()[1]["gated"].digest, OTHER, (5,), 0, GENERATED, True),
        Read(STREAM, LAYER, (1, 2, 3), 0, GENERATED),
        Read(dictionaries()[1]["topk"].digest, LAYER, (5,), 2, ALL),
    ]
    chosen = tuple(read for read in reads if random.random() < (0.2 if program else 0.6))
    return Payload(program, chosen, program.digest() if program else None)


@cache
def shared(seed: int) -> Payload:
    """One object for all requests that edit alike, as the engine has it."""
    return made_of(np.random.default_rng(seed))


def resident(name: str, seed: int) -> Resident:
    """Of two seeds that differ by 20 or 40, with the same payload; its rows may lie elsewhere."""
    payload, random = shared(seed % 20), np.random.default_rng(seed // 20 % 2)
    slots = {key: int(random.integers(500)) for key in payload.row_keys}
    return Resident(name, payload, 1 + seed % 9, slots)


def copied(one: Resident) -> Resident:
    """The same request, which shares nothing."""
    return Resident(one.request_id, Payload.from_bytes(one.payload.to_bytes()), one.prompt_len, one.slots)


def told(table: LayerTable | None) -> list[object]:
    """All that a table says."""
    if table is None:
        return []

    def plain(one: Use | Listener) -> list[object]:
        return [value.tolist() if isinstance(value, np.ndarray) else value for value in vars(one).values()]

    arrays = [table.programs, table.channels, table.channel_ops, table.op_ints, table.op_values, table.op_masks]
    views = [table.read, table.slot, table.norm, table.member, *table.ops]
    rest = [{i: [plain(one) for one in found] for i, found in of.items()} for of in (table.uses, table.listeners)]
    return [*(a.tolist() for a in (*arrays, *views)), rest, table.width, table.n_members, table.has_joint]


def state(of: ResidentSet) -> list[object]:
    selectors = of.selectors
    flat = [
        selectors.requests,
        selectors.interval_ptr,
        selectors.intervals,
        selectors.id_ptr,
        selectors.ids,
        selectors.bos,
    ]
    listed = {
        place: (t.pointers.tolist(), t.rows.tolist(), t.bits.tolist(), t.width)
        for place, t in sorted(of.listed.items())
    }
    layers = {layer: told(table) for layer, table in of.layers.items()}
    return [of.index, layers, *(a.tolist() for a in (*flat, of.dose, of.refuses)), listed, of.reads, of.due]


changes = st.lists(
    st.tuples(st.sampled_from(["come", "come", "go", "refresh", "many go"]), st.integers(0, 9), st.integers(0, 59)),
    max_size=30,
)


@settings(max_examples=60, deadline=None)
@given(changes)
def test_tables_are_those_of_the_requests_that_are_there(history: list[tuple[str, int, int]]) -> None:
    opened = Dictionaries(dictionaries()[0])
    residents, here = ResidentSet(opened, (LAYER, OTHER)), dict[str, Resident]()
    for what, number, seed in history:
        name = f"r{number}"
        if what == "come":  # or comes again
            here.pop(name, None)
            here[name] = resident(name, seed)
            residents.add(here[name])
        elif what == "go":
            here.pop(name, None)
            residents.remove(name)
        elif what == "many go":
            for gone in list(here)[number % 2 :: 2]:
                del here[gone]
                residents.remove(gone)
        else:
            residents.refresh()
    residents.refresh()
    anew = ResidentSet(opened, (LAYER, OTHER))
    for one in here.values():  # one by one
        anew.add(copied(one))
        anew.refresh()
    if here:
        assert state(residents) == state(anew)
    # and that is what the programs say
    assert list(residents.requests) == list(here) == sorted(residents.index, key=residents.index.__getitem__)
    for layer in (LAYER, OTHER):
        programs = [one.layer(layer) for one in here.values()]
        channels = [
            (one, channel) for one, lp in zip(here.values(), programs, strict=True) if lp for channel in lp.channels
        ]
        table = residents.layers.get(layer)
        assert (table is not None) == bool(channels)
        if table is None:
            continue
        assert table.programs.tolist() == [0, *accumulate(len(lp.channels) if lp else 0 for lp in programs)]
        assert table.slot.tolist() == [one.slots[channel.row] for one, channel in channels]
        assert table.channel_ops.tolist() == [0, *accumulate(len(channel.ops) for _, channel in channels)]
        wanted = [[op.kind, op.intervention, np.float32(op.beta)] for _, channel in channels for op in channel.ops]
        assert [[*row] for row in zip(table.ops[0], table.ops[7], table.ops[1][:, 1], strict=True)] == wanted
        joint = [(i, c) for i, lp in enumerate(programs) if lp for c in lp.channels if c.read is ReadKind.JOINT]
        targets = [
            t for _, uses in sorted(table.uses.items()) for use in uses if use.joint for t in use.targets.tolist()
        ]
        assert sorted(targets) == np.flatnonzero(table.read == ReadKind.JOINT).tolist()
        assert len(targets) == len(joint)


def test_a_request_that_leaves_changes_nothing_before_the_next_step() -> None:
    """Somebody may still be looking at what the latest step was planned with."""
    residents = ResidentSet(Dictionaries(dictionaries()[0]), (LAYER, OTHER))
    for number in range(3):
        residents.add(resident(f"r{number}", number))
    residents.refresh()
    before, version = state(residents), residents.version
    residents.remove("r1")
    residents.add(resident("r3", 3))
    assert state(residents) == before
    residents.refresh()
    assert state(residents) != before
    assert residents.version > version


def test_requests_that_edit_alike_share_their_tables_as_far_as_their_rows_lie_alike() -> None:
    opened = Dictionaries(dictionaries()[0])
    residents = ResidentSet(opened, (LAYER, OTHER))
    seed = next(seed for seed in range(20) if shared(seed).row_keys)
    first, elsewhere, again = (resident(f"r{seed}", seed) for seed in (seed, seed + 20, seed + 40))
    assert first.slots == again.slots != elsewhere.slots
    for one in (first, elsewhere, again):
        residents.add(one)
    residents.refresh()
    alone = []
    for one in (first, elsewhere):
        fresh = ResidentSet(opened, (LAYER, OTHER))
        fresh.add(copied(one))
        fresh.refresh()
        alone.append(fresh)
    for layer, table in residents.layers.items():
        if table is not None:
            parts = [alone[i].layers[layer] for i in (0, 1, 0)]
            assert table.slot.tolist() == [slot for part in parts if part is not None for slot in part.slot.tolist()]
    for place, listed in residents.listed.items():
        rows = [alone[i].listed[place].rows for i in (0, 1, 0)]
        assert listed.rows.tolist() == np.concatenate(rows).tolist()
    made = [_located(one, opened)[0] for one in (first, again, elsewhere)]
    assert made[0] is made[1] is not made[2]
    assert _located(elsewhere, Dictionaries(dictionaries()[0]))[0] is not made[2]
