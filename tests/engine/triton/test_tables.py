"""Tables on the device: fixed addresses, counted memory, refusals by name."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from editserver.engine import kernel_cpu, kernel_rules
from editserver.engine.triton import codes
from editserver.engine.triton.capacity import Capacity, CapacityError
from editserver.engine.triton.fill import NotOnDevice, fill
from editserver.engine.triton.step import DeviceStep
from interventions.limits import Limits
from interventions.program import TABLE_HEADER, GateKind, OpKind, Payload, ReadKind, UnitKind
from interventions.rules.code import MemoryKind, OpCode
from interventions.selectors import Selector
from tests.engine.triton.batches import CAPACITY, LAYER, Batch, Device, random_batch

D = 40


def filled(seed: int = 0, n_rows: int = 4) -> tuple[Device, Batch]:
    random, device = np.random.default_rng(seed), Device(D)
    batch = random_batch(random, D, torch.float32, False, n_rows, plain=0)
    device.settle(batch, random)
    return device, batch


def test_codes_are_the_instruction_sets() -> None:
    for enum in (ReadKind, OpKind, UnitKind, OpCode):
        assert {member.name: int(getattr(codes, member.name)) for member in enum} == {m.name: int(m) for m in enum}
    for name in ("SHARE_PROMPT", "SHARE_SEEN", "WINDOW", "CUSUM"):
        assert int(getattr(codes, name)) == GateKind[name]
    assert [int(one) for one in (codes.COUNT, codes.RULE_WINDOW, codes.ORDER)] == [int(kind) for kind in MemoryKind]
    for name in ("PROMPT_MEMORY", "CLOSED_CONCLUSION", "PPM"):
        assert getattr(codes, name).value == getattr(kernel_rules, name)
    assert int(codes.POSTERIORS) == TABLE_HEADER
    for name in (
        "PLAIN_INPUT",
        "NORM_RESCALE",
        "LAYER_NORM",
        "UNIT_NORM",
        "CENTRE",
        "LAYER_NORM_EPS",
        "CLAMPED",
        "OVER",
    ):
        assert getattr(codes, name).value == getattr(kernel_cpu, name)


def test_addresses_stay_when_residents_change() -> None:
    device, _ = filled(0)
    names = ["slot_resident", "intervals", f"{LAYER}.op_masks", f"{LAYER}.reads"]
    before = [device.step.tables[name].data_ptr() for name in names]
    random = np.random.default_rng(9)
    device.settle(random_batch(random, D, torch.float32, False, 3, plain=0), random)
    assert [device.step.tables[name].data_ptr() for name in names] == before


def test_what_did_not_change_is_not_copied_again() -> None:
    device, _ = filled(0)
    assert fill(device.step.tables, device.residents, members=True) == 0


def test_bytes_are_those_of_every_tensor() -> None:
    step = DeviceStep(CAPACITY, (LAYER, 5), D, torch.device("cpu"))
    storages: dict[int, int] = {}
    seen: list[object] = [step]
    while seen:
        one = seen.pop()
        if isinstance(one, torch.Tensor):
            storages[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        elif isinstance(one, dict):
            seen += one.values()
        elif type(one).__module__.startswith("editserver"):
            seen += [value for key, value in vars(one).items() if key != "_staging"]
    assert sum(storages.values()) == step.n_bytes


@pytest.mark.parametrize("field", ["ops", "selectors", "residents", "request_channels", "request_reads"])
def test_what_does_not_fit_is_refused_by_name_and_changes_nothing(field: str) -> None:
    device, _ = filled(0)
    small = DeviceStep(dataclasses.replace(CAPACITY, **{field: 1}), (LAYER,), D, torch.device("cpu")).tables
    with pytest.raises(CapacityError, match="has room for"):
        fill(small, device.residents, members=True)
    assert not small._arena._memory.any()
    assert device.step.tables._arena._memory.any()


def test_mentions_are_refused_by_name_where_no_tokens_are_kept() -> None:
    device, _ = filled(0)
    resident = next(one for one in device.residents.requests.values() if one.payload.program)
    program = resident.payload.program
    looking = type(program)(program.layers, (Selector(ends=((1, 2),)), *program.selectors[1:]), program.vectors)
    device.residents.add(dataclasses.replace(resident, payload=Payload(looking, (), None)))
    device.residents.refresh()
    prompts = {resident.request_id: [1, 2, 3]}
    fill(device.step.tables, device.residents, members=True, prompts=prompts)
    assert device.step.tables.history[0, :3].tolist() == [1, 2, 3]
    forgetful = DeviceStep(dataclasses.replace(CAPACITY, history=0), (LAYER,), D, torch.device("cpu")).tables
    with pytest.raises(NotOnDevice, match="mentions"):
        fill(forgetful, device.residents, members=True, prompts=prompts)


def test_a_request_keeps_its_row_of_history_while_it_stays() -> None:
    tables = DeviceStep(CAPACITY, (LAYER,), D, torch.device("cpu")).tables
    assert tables.seat({"a": [1], "b": [2]}) == {"a": 0, "b": 1}
    with pytest.raises(CapacityError, match="look for mentions"):
        tables.seat({"a": [1], "b": [2], "c": [3]})
    assert tables.seat({"c": [3], "b": [9]}) == {"b": 1, "c": 0}
    assert tables.history[:, 0].tolist() == [3, 2]


def test_members_are_refused_by_name_where_nobody_brings_them() -> None:
    device, _ = filled(0)
    table = device.residents.layers[LAYER]
    assert table is not None
    assert table.n_members
    with pytest.raises(NotOnDevice, match="whole dictionaries"):
        fill(device.step.tables, device.residents)


def test_a_request_at_its_limits_fits_in_what_is_reserved() -> None:
    limits = Limits()
    capacity = Capacity.of(tokens=8192, rows=256, bank_rows=limits.bank_rows)
    assert capacity.ops >= limits.instructions
    assert capacity.selectors >= limits.selectors
    assert capacity.listed >= limits.inspected_features
    assert capacity.wanted_ids >= limits.selector_tokens
