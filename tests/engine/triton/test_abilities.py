"""What is counted of a request before it reaches the device is never less than what it takes there; and what is refused."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest

from editserver.engine.abilities import ENCODED, Abilities, Room, needs
from editserver.engine.resident import Resident, ResidentSet
from editserver.engine.rows import Dictionaries
from editserver.engine.rule_table import RuleRun
from editserver.engine.triton.capacity import Capacity, CapacityError, EncodeCapacity, RuleCapacity
from editserver.engine.triton.encode import form_of
from editserver.engine.triton.fill import fill
from editserver.engine.triton.layout import Layout
from editserver.engine.triton.rules import DeviceRules
from editserver.engine.triton.tables import DeviceTables
from interventions.errors import InterventionError
from interventions.program import (
    STREAM,
    Channel,
    Gate,
    GateKind,
    LayerProgram,
    Op,
    Payload,
    Program,
    Read,
    ReadKind,
    feature_key,
)
from interventions.rules.code import PropositionCode, RuleProgram
from interventions.selectors import ALL, Selector
from tests.engine.dictionaries import WHOLE as WIDE
from tests.engine.dictionaries import random_sae
from tests.engine.rule_programs import random_program as random_rules
from tests.engine.test_rules_kernel import LAYERS, keys
from tests.engine.test_rules_kernel import dictionaries as ruled_dictionaries
from tests.engine.triton.batches import LAYER, ON, dictionaries, random_payload

D = 40
CAPACITY = Capacity.of(tokens=64, rows=8, bank_rows=512, history=64)
ABLE = Abilities(CAPACITY, RuleCapacity.of(requests=16, propositions=128))
WHOLE = {sae.digest: name for name, sae in dictionaries(D)[1].items() if not sae.row_separable}
ABLE_WHOLE = Abilities(CAPACITY, ABLE.rules, EncodeCapacity(), WHOLE)
NOT_ENCODED = Abilities(CAPACITY, ABLE.rules, EncodeCapacity(), {}, {"d" * 64: "polysae/l1"})
OF_ALL = {"with_zero": "selectors", "intervals": "intervals", "ids": "wanted_ids", "mention_ids": "mention_ids"}
OF_A_LAYER = {
    "channels": "channels",
    "op_ints": "ops",
    "op_masks": "ops",
    "reads": "reads",
    "before_rows": "reads",
    "after_rows": "reads",
    "heard_rows": "reads",
    "gates": "gates",
}
"""Column of the tables → name of the capacity that bounds it."""


def resident(name: str, payload: Payload) -> Resident:
    slots = {key: i for i, key in enumerate(payload.row_keys)}
    return Resident(name, payload, 3, slots, rules=RuleRun.of(payload.program))


def summed(payloads: list[Payload], name: str, layer: int) -> int:
    return sum(needs(payload).get((name, layer), 0) for payload in payloads)


@pytest.mark.parametrize("seed", range(12))
def test_no_table_is_longer_than_what_was_counted(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(seed)
    payloads = [random_payload(random, D) for _ in range(5)]
    mention = Selector(ends=((3, 5), (7,)))
    payloads.append(
        Payload(None, (Read(next(iter(dictionaries(D)[1].values())).digest, LAYER, (1,), 0, mention),), None)
    )
    residents = ResidentSet(dictionaries(D)[0], (LAYER,))
    for i, payload in enumerate(payloads):
        ABLE_WHOLE.check(payload)
        residents.add(resident(f"{i}", payload))
    residents.refresh()
    tables, written = DeviceTables(CAPACITY, (LAYER,), ON), dict[str, Any]()
    monkeypatch.setattr(tables, "write", lambda columns: written.update(columns) or 0)
    fill(tables, residents, remembers=True, members=True, prompts={"5": [1, 2, 3]})
    for column, name in OF_ALL.items():
        assert len(written[column]) <= summed(payloads, name, -1), column
    assert len(written["mention_start"]) - 1 == summed(payloads, "mentions", -1) == 2
    compared = 0
    for column, name in OF_A_LAYER.items():
        found = len(written.get(f"{LAYER}.{column}", ()))
        assert found <= summed(payloads, name, LAYER), column
        compared += found
    assert compared > 40


@pytest.mark.parametrize("seed", range(8))
def test_no_table_of_rules_is_longer_than_what_was_counted(seed: int) -> None:
    rng = np.random.default_rng(seed)
    named, whole = keys()
    single = {layer: [sae for sae in saes if sae[0] not in whole] for layer, saes in named.items() if layer != 3}
    payloads = [
        Payload(Program((), (), {}, math.inf, False, rules=random_rules(rng, single, set())), (), None)
        for _ in range(4)
    ]
    config, _ = ruled_dictionaries()
    residents = ResidentSet(Dictionaries(config), LAYERS)
    for i, payload in enumerate(payloads):
        ABLE.check(payload)
        residents.add(resident(f"{i}", payload))
    residents.refresh()
    assert ABLE.rules is not None
    made = DeviceRules(ABLE.rules, LAYERS, 16, CAPACITY.residents, ON)
    columns = made.columns(residents, {})
    bounds = {"parts": 2, "codes": 4} | dict.fromkeys(
        ("feature_rows", "propositions", "terms", "branches", "memories", "groups", "rules", "conclusions", "actions"),
        1,
    )
    for layer in LAYERS:
        for column, factor in bounds.items():
            found = columns.get(f"{layer}.{column}")
            if found is not None:
                assert len(found) <= factor * summed(payloads, "rules.rows", -1), column


@pytest.mark.parametrize("seed", range(6))
def test_what_a_request_takes_of_whole_dictionaries_is_what_was_counted(seed: int) -> None:
    random = np.random.default_rng(seed)
    sae = next(iter(WHOLE))
    reads = tuple(
        Read(sae, LAYER, tuple(random.choice(30, 9, replace=False).tolist()), top_k, ALL, after)
        for top_k, after in ((3, False), (4, True), (0, True))
    )
    payload = Payload(random_payload(random, D).program, reads, None)
    residents = ResidentSet(dictionaries(D)[0], (LAYER,))
    residents.add(resident("a", payload))
    residents.refresh()

    def passes(members: int) -> bool:
        able = dataclasses.replace(ABLE_WHOLE, capacity=dataclasses.replace(CAPACITY, members=members))
        try:
            able.check(payload)
        except InterventionError:
            return False
        return True

    least = next(filter(passes, itertools.count()))
    encoded = {LAYER: tuple(WHOLE)}
    assert Layout.of(residents, encoded, least, 7).tops[LAYER, "after"][0, sae] == (4, 0)
    with pytest.raises(CapacityError, match="members of whole dictionaries"):
        Layout.of(residents, encoded, least - 1, 7)
    with pytest.raises(CapacityError, match="largest activations"):
        Layout.of(residents, encoded, least, 3)


KEY = feature_key("d" * 64, 1)
OP = Op(1.0, 1.0, -math.inf, math.inf, False, 0, 0)


def program(read: ReadKind = ReadKind.LATENT, *gates: Gate, n: int = 1, rules: RuleProgram | None = None) -> Payload:
    channels = tuple(Channel(read, feature_key("d" * 64, i), (OP,)) for i in range(n))
    return Payload(Program((LayerProgram(1, channels, gates),), (ALL,), {}, rules=rules), (), None)


def reading(sae: str = "d" * 64, top_k: int = 0, n: int = 1) -> Payload:
    return Payload(None, (Read(sae, 1, tuple(range(n)), top_k, ALL),), None)


RULES = RuleProgram((PropositionCode(1, False, (KEY,), (1.0,), (), False, 0.5),), (), (), (), ())
CUSUM = Gate(GateKind.CUSUM, ReadKind.LATENT, (KEY,), 1.0, k=0.1, reset=True)
SHARE = Gate(GateKind.SHARE_SEEN, ReadKind.LATENT, (KEY,), 0.5)
UNKNOWN = "on a GPU, dictionaries of this kind are not encoded yet: polysae/l1"
FORGETFUL = Abilities(CAPACITY, ABLE.rules, remembers=False)


@pytest.mark.parametrize(
    ("able", "payload", "said"),
    [
        (NOT_ENCODED, program(ReadKind.JOINT), UNKNOWN),
        (NOT_ENCODED, program(ReadKind.LATENT, Gate(GateKind.TRIGGER, ReadKind.MEMBER, (KEY,))), UNKNOWN),
        (NOT_ENCODED, reading(), UNKNOWN),
        (
            ABLE_WHOLE,
            program(ReadKind.MEMBER, n=65),
            "the request needs 65 latents of dictionaries that are encoded as",
        ),
        (
            ABLE_WHOLE,
            Payload(
                None,
                tuple(Read(next(iter(WHOLE)), 1, tuple(range(33)), 0, ALL, after) for after in (False, True)),
                None,
            ),
            "the request needs 66 latents of dictionaries that are encoded as",
        ),
        (ABLE_WHOLE, reading(top_k=129), "the request needs 129 largest activations (top_k) at a layer, and a GPU's"),
        (ABLE, reading(STREAM), "on a GPU, the residual stream itself is not read out"),
        (ABLE, program(ReadKind.LATENT, CUSUM), "on a GPU, cumulative sums that start again"),
        (FORGETFUL, program(ReadKind.LATENT, SHARE), "on a GPU, rules and gates over a sequence need a KV cache"),
        (Abilities(CAPACITY, None), program(rules=RULES), "on a GPU, rules are not run"),
        (ABLE, program(n=1030), "the request needs 1030 channels at a layer, and a GPU's engine has room for 1024"),
        (
            ABLE,
            reading(n=257),
            "the request needs 257 inspected latents at a layer, and a GPU's engine has room for 256",
        ),
    ],
)
def test_what_is_not_done_is_refused_by_name(able: Abilities, payload: Payload, said: str) -> None:
    with pytest.raises(InterventionError) as refused:
        able.check(payload)
    assert str(refused.value).startswith(said)
    assert refused.value.status == 400
    assert refused.value.code == ("unsupported_with_interventions" if said.startswith("on a GPU") else "limit_exceeded")


def test_the_kinds_that_are_encoded_are_those_of_the_kernels() -> None:
    for architecture in (*WIDE, "topk"):
        assert (form_of(random_sae(architecture, D)) is not None) == (architecture in ENCODED), architecture
    assert {*WIDE, "topk"} & ENCODED == ENCODED


def test_what_is_done_is_not_refused() -> None:
    for payload in (program(), program(ReadKind.LATENT, SHARE), reading(), program(rules=RULES), reading(n=256)):
        Abilities.from_dict(ABLE.as_dict()).check(payload)
    FORGETFUL.check(program())


def test_a_request_without_room_waits_until_others_leave() -> None:
    room, wide = Room(ABLE), program(n=250)
    entered = 0
    while room.enter(f"r{entered}", wide):
        entered += 1
    assert entered == CAPACITY.channels // 250 > 3
    assert room.enter("small", program(n=CAPACITY.channels % 250))
    assert not room.enter("late", program())
    room.leave("r0")
    room.leave("r0")
    room.leave("nobody")
    assert not room.enter("late", program(n=251))
    assert room.enter("late", wide)
