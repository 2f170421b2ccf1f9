"""The row bank's ledger against a model that keeps nothing but what each request asked for; and its rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from editserver.engine.bank import BankLedger
from editserver.engine.config import EngineConfig
from editserver.engine.rows import Dictionaries, RowBank
from interventions.program import feature_key, vector_key
from sae_weights.architectures import ARCHITECTURES
from sae_weights.errors import SAEFormatError
from sae_weights.formats import load_sae, save_native
from sae_weights.sae import SAE
from tests.engine.dictionaries import N_FEATURES, WHOLE, random_sae, write_sae

CAPACITY = 4
KEYS = [f"row{i}" for i in range(7)]


class LedgerMachine(RuleBasedStateMachine):
    """Requests take and return rows in any order; slots are remembered from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = BankLedger(CAPACITY)
        self.held: dict[str, dict[str, int]] = {}
        self.idle: list[str] = []
        """Keys that nobody holds and whose slot was not given away: least recently released first."""
        self.slots: dict[str, int] = {}
        self.serial = 0

    def counted(self) -> dict[str, int]:
        """Key → number of holders."""
        return {key: sum(key in rows for rows in self.held.values()) for rows in self.held.values() for key in rows}

    @rule(keys=st.lists(st.sampled_from(KEYS), unique=True, max_size=6))
    def acquire(self, keys: list[str]) -> None:
        in_use = self.counted()
        holder, self.serial = f"request{self.serial}", self.serial + 1
        new = [key for key in keys if key not in in_use]
        slots = self.ledger.acquire(holder, keys)
        assert (slots is not None) == (len(in_use) + len(new) <= CAPACITY), "all or none, and only for want of room"
        if slots is None:
            return
        assert len(slots) == len(keys)
        granted = dict(zip(keys, slots, strict=True))
        self.idle = [key for key in self.idle if key not in keys]
        for key, slot in granted.items():
            if key in self.slots:
                assert slot == self.slots[key], "a row that is still there was put somewhere else"
                continue
            owner = next((k for k, s in self.slots.items() if s == slot), None)
            if owner is not None:
                assert self.idle, f"the slot of {owner}, which is held, was given away"
                assert owner == self.idle.pop(0), "not the least recently used row made room"
                assert len(self.slots) == CAPACITY, "a row was thrown out although slots were unused"
                del self.slots[owner]
            self.slots[key] = slot
        self.held[holder] = granted

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(sorted(self.held)))
        keys = self.held.pop(holder)
        assert self.ledger.release(holder)
        assert not self.ledger.release(holder), "released twice"
        in_use = self.counted()
        self.idle += [key for key in keys if key not in in_use]

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def acquire_again(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(sorted(self.held)))
        with pytest.raises(ValueError, match="already holds"):
            self.ledger.acquire(holder, KEYS[:1])

    @invariant()
    def never_two_keys_in_one_slot(self) -> None:
        assert len(set(self.slots.values())) == len(self.slots) <= CAPACITY
        assert set(self.slots.values()) <= set(range(CAPACITY))

    @invariant()
    def held_rows_stay_where_they_are(self) -> None:
        for rows in self.held.values():
            assert all(self.slots[key] == slot for key, slot in rows.items())

    @invariant()
    def counts_are_right(self) -> None:
        assert self.ledger.in_use == len(self.counted())
        assert self.ledger.holders == len(self.held)


class TestLedger(LedgerMachine.TestCase):  # type: ignore[name-defined,misc]
    settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


def test_a_row_that_comes_back_keeps_its_slot() -> None:
    ledger = BankLedger(2)
    first = ledger.acquire("a", ["x"])
    ledger.release("a")
    assert ledger.acquire("b", ["x"]) == first


def test_a_request_that_does_not_fit_takes_nothing() -> None:
    ledger = BankLedger(2)
    ledger.acquire("a", ["x"])
    assert ledger.acquire("b", ["y", "z"]) is None
    assert (ledger.in_use, ledger.holders) == (1, 1)
    assert not ledger.release("b")


def test_rows_that_others_hold_cost_nothing() -> None:
    ledger = BankLedger(2)
    assert ledger.acquire("a", ["x", "y"]) == ledger.acquire("b", ["x", "y"])


def test_a_bank_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        BankLedger(0)


def test_a_slot_is_never_taken_for_a_row_that_was_overwritten_on_the_way_to_an_error() -> None:
    bank = RowBank(2, 4, Dictionaries(EngineConfig((1,))))
    first, second, short = (np.full(n, value, "<f4").tobytes() for n, value in ((4, 1.0), (4, 2.0), (3, 3.0)))
    vectors = {vector_key(row): row for row in (first, second, short)}
    assert bank.upload([vector_key(first)], [0], vectors) == 1
    assert bank.upload([vector_key(first)], [0], vectors) == 0
    with pytest.raises(ValueError, match="has 3 values, expected 4"):
        bank.upload([vector_key(second), vector_key(short)], [0, 1], vectors)
    assert bank.upload([vector_key(first)], [0], vectors) == 1
    assert bank.read[0].tolist() == bank.write[0].tolist() == [1.0] * 4


D = 12
FEATURES = [5, 0, N_FEATURES - 1, 17]


class Opened(Dictionaries):
    """One dictionary that a test has opened."""

    def __init__(self, sae: SAE) -> None:
        super().__init__(EngineConfig((1,)))
        self._saes[sae.digest] = sae


def uploaded(sae: SAE, features: list[int] = FEATURES) -> RowBank:
    bank = RowBank(2 * len(features), sae.d_model, Opened(sae))
    slots = [2 * i + 1 for i in range(len(features))][::-1]
    assert bank.upload([feature_key(sae.digest, i) for i in features], slots, {}) == len(features)
    found = sae.rows(features)
    gate = torch.stack([found.gate_bias, found.threshold, found.mag_scale, found.mag_bias], dim=1)
    for got, wanted in ((bank.read, found.encoder), (bank.write, found.decoder), (bank.gate, gate)):
        assert torch.equal(got[slots], wanted)
        assert not got[::2].any()
    return bank


@pytest.mark.parametrize("architecture", ["relu", "jumprelu", "gated", "topk", *WHOLE])
def test_rows_come_from_where_they_lie_as_they_are_read(architecture: str, tmp_path: Path) -> None:
    made = random_sae(architecture, D, seed=3)
    for dtype in (torch.float32, torch.bfloat16):
        sae = load_sae(save_native(made, tmp_path / str(dtype), dtype=dtype))
        assert (sae.stored() is None) == ARCHITECTURES[architecture].tied
        uploaded(sae)
    made.encode(torch.zeros(1, D))
    assert made.stored() is not None or not made.materialised
    uploaded(made)


def test_rows_that_need_folding_or_transposing_are_read(tmp_path: Path) -> None:
    sae = load_sae(write_sae(tmp_path, 1, "standard", D))
    assert sae.stored() is None
    uploaded(sae)
    sae.encode(torch.zeros(1, D))
    assert sae.stored() is not None
    uploaded(sae)


@pytest.mark.parametrize("matrix", ["W_enc", "W_dec"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_are_not_finite_are_refused_by_name(matrix: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = save_native(random_sae("jumprelu", D), tmp_path, dtype=dtype)
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors[matrix][17, 3] = torch.inf
    save_file(tensors, path, metadata)
    sae = load_sae(folder)
    uploaded(sae, [5, 18])
    with pytest.raises(SAEFormatError, match=f"tensor {matrix} is not finite at feature 17"):
        uploaded(sae)


def test_features_that_are_not_there_are_refused(tmp_path: Path) -> None:
    sae = load_sae(save_native(random_sae("jumprelu", D), tmp_path))
    with pytest.raises(IndexError, match=f"feature {N_FEATURES}"):
        uploaded(sae, [3, N_FEATURES])


def test_rows_of_a_file_that_was_replaced_are_refused(tmp_path: Path) -> None:
    sae = load_sae(save_native(random_sae("jumprelu", D), tmp_path))
    bank = uploaded(sae)
    save_native(random_sae("jumprelu", D, seed=1), tmp_path)
    with pytest.raises(SAEFormatError, match="changed on disk since it was opened"):
        bank.upload([feature_key(sae.digest, 6)], [0], {})
