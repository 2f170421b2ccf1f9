"""The self-test at start: it passes, leaves nothing behind, and a kernel that is wrong stops the server, by the stage's name."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from editserver.engine.kernel_cpu import INPUT_NORMS
from editserver.engine.rows import Dictionaries
from editserver.engine.triton import self_test, self_test_checks, self_test_trial
from editserver.engine.triton.capacity import Capacity, EncodeCapacity, RuleCapacity
from editserver.engine.triton.encode import DeviceEncode, Weights, form_of
from editserver.engine.triton.rules import DeviceRules
from editserver.engine.triton.self_test import SelfTestError, prove
from editserver.engine.triton.self_test_checks import meant
from editserver.engine.triton.self_test_made import Facts, Made, stream_of
from editserver.engine.triton.self_test_programs import EDITS, GATES, MENTIONS, RULES, WHOLE, whole
from editserver.engine.triton.step import DeviceStep
from tests.engine.triton import test_device_encode as encoded
from tests.engine.triton.batches import LAYER, ON

D, LAYERS = 24, (1, 4)
EDITED, LOOKED_BACK, ENCODED = range(3)
"""Which of the plans."""


def made(rows: int = 8, tokens: int = 64, whole: tuple[str, ...] = (), d: int = D) -> DeviceStep:
    """Everything but whole dictionaries, at two layers; with ``whole``, these, at one layer and of 40 dimensions."""
    capacity = Capacity.of(tokens=tokens, rows=rows, bank_rows=256, history=32)
    rules = RuleCapacity.of(requests=4, propositions=4)
    if not whole:
        return DeviceStep(capacity, LAYERS, d, ON, rules=rules)
    config = dataclasses.replace(encoded.dictionaries()[0], full_encode=whole)
    small = EncodeCapacity(rows=16, programs=2, top=8)
    encode = DeviceEncode(small, config, Dictionaries(config), tokens, capacity.residents, encoded.D, ON)
    return DeviceStep(capacity, (LAYER,), encoded.D, ON, rules=rules, encode=encode)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Leaves one of the plans."""
    plans = self_test.plans

    def leave(which: int) -> None:
        monkeypatch.setattr(self_test, "plans", lambda *args: itertools.islice(plans(*args), which, which + 1))

    return leave


# -- it passes ------------------------------------------------------------------------------------------------------


def test_it_passes_and_leaves_the_step_idle() -> None:
    step, dtype = made(), torch.bfloat16  # in float32 it passes wherever an engine is started
    prove(step, dtype, brief=True)
    assert not step.state.any()
    assert step.cache is None
    assert step.memory_bytes == 0
    hidden = torch.randn(4, D, device=ON).to(dtype)
    before = hidden.clone()
    step.run(1, hidden, None, decode=False)
    assert torch.equal(hidden, before)


def test_whole_dictionaries_pass(alone: Callable[[int], None]) -> None:
    alone(ENCODED)
    prove(made(whole=("abstopk", "gated_unit_norm")), torch.float32, brief=True)


def test_of_dictionaries_that_the_same_kernels_encode_one_is_tested() -> None:
    names = ("topk", "gradient", "plain_topk", "abstopk", "topk_layer_norm", "jumprelu", "gated_unit_norm")
    step, saes = made(whole=names), encoded.dictionaries()[1]
    assert step.encode is not None
    digests = self_test._kinds(step.encode)[LAYER]
    assert saes["topk"].k == saes["gradient"].k
    assert digests == [saes[name].digest for name in saes if name in names and name != "gradient"]


def test_a_server_for_one_small_request_at_a_time_tests_what_fits() -> None:
    prove(made(rows=1, tokens=8), torch.float32, brief=True)


def test_what_does_not_fit_into_one_batch_is_tested_in_several() -> None:
    step = made(rows=2, tokens=12)
    for plan in self_test.plans(step, torch.float32, False):
        batches = self_test._that_fit(step, plan.requests, brief=False)
        assert [request for batch in batches for request in batch] == [*plan.requests]
        assert all(len(batch) <= 2 and sum(request.n for request in batch) <= 12 for batch in batches)


# -- it proves something --------------------------------------------------------------------------------------------


def test_what_is_tested_has_every_transfer_function_and_norm() -> None:
    plan = next(self_test.plans(made(), torch.float32, True))
    programs = [request.payload.program for request in plan.requests]
    channels = [c for program in programs for p in program.layers for c in p.channels]  # type: ignore[union-attr]
    ops = [op for channel in channels for op in channel.ops]
    assert {c.read for c in channels} == {0, 1, 2, 3}
    assert {op.kind for op in ops} == {0, 1, 2, 3}
    assert {op.unit for op in ops} == {0, 1, 2}
    assert {facts.input_norm for facts in plan.made.facts.values()} == set(INPUT_NORMS)
    assert any(op.gates for op in ops)
    assert any(op.scope >= 0 for op in ops)
    policies = {(program.max_dose, program.refuse_over_dose) for program in programs}  # type: ignore[union-attr]
    assert {(np.inf, False), (0.5, False), (0.5, True)} <= policies


@pytest.mark.parametrize(("d", "brief"), [(24, True), (64, True), (2048, False), (4096, False), (8192, False)])
def test_gates_rules_and_mentions_hold_at_some_tokens_and_not_at_others(d: int, brief: bool) -> None:
    step = made()
    step.d_model = d
    plan = list(self_test.plans(step, torch.bfloat16, brief))[LOOKED_BACK]
    assert [request.stage for request in plan.requests] == [GATES, RULES, MENTIONS]
    for request in plan.requests:
        want = meant(plan.made, request, stream_of(request.halves).float())
        said = [*want.opened] + [want.edits.fired >> i & 1 != 0 for i in range(2)]
        if want.rules is not None:
            of_rules = (want.rules.held, want.rules.concluded, want.rules.active)
            said += [torch.from_numpy(column) for part in of_rules for column in part.T]
        assert all(column.any() for column in said), request.stage
        assert all(not column.all() for column in said), request.stage


@pytest.mark.parametrize("name", encoded.ENCODED)
def test_what_it_means_by_a_dictionary_is_what_the_dictionary_computes(name: str) -> None:
    sae = encoded.dictionaries()[1][name]
    assert form_of(sae) is not None
    own = Made(encoded.D, torch.float32, np.random.default_rng(0))
    own.facts["x"] = Facts(sae.input_norm)
    own.weights["x"] = Weights.of(sae, INPUT_NORMS[sae.input_norm], ON)
    h = 3 * torch.randn(7, encoded.D)
    torch.testing.assert_close(own.activations("x", h), sae.encode(h), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", encoded.ENCODED)
def test_some_latent_of_a_dictionary_is_active_at_every_token(name: str) -> None:
    """However high its thresholds are."""
    sae = encoded.dictionaries()[1][name]
    weights = Weights.of(sae, INPUT_NORMS[sae.input_norm], ON)
    high = 0.8 * weights.encoder.norm(dim=1) if name == "gated_unit_norm" else 100.0
    weights.gate[:, 1] += high
    own = Made(encoded.D, torch.float32, np.random.default_rng(0))
    request = whole(own, LAYER, "x", weights, 8, 6)
    active = own.activations("x", stream_of(request.halves).float()) != 0
    assert active.any(dim=1).all()
    assert not active.all()


# -- it fails where something is wrong ------------------------------------------------------------------------------

Edit = Callable[..., None]


def _stronger(edit: Edit, self: DeviceStep, layer: int, hidden: Any, residual: Any, decode: bool) -> None:
    """Deltas that are a hundredth too large."""
    before = residual.clone()
    edit(self, layer, hidden, residual, decode)
    residual += (residual - before) * 0.01 * (hidden == 0)


def _in_decode_alone(edit: Edit, self: DeviceStep, layer: int, hidden: Any, residual: Any, decode: bool) -> None:
    """One variant has other low bits."""
    edit(self, layer, hidden, residual, decode)
    if decode:
        residual[1, 0] = torch.nextafter(residual[1, 0], residual[1, 0] + 1)


def _beside(edit: Edit, self: DeviceStep, layer: int, hidden: Any, residual: Any, decode: bool) -> None:
    """A token that nobody edits changes, by less than the sum of its halves shows."""
    edit(self, layer, hidden, residual, decode)
    residual[0, 0] = torch.nextafter(residual[0, 0], residual[0, 0] + 1)


def _never(edit: Edit, self: DeviceStep, layer: int, hidden: Any, residual: Any, decode: bool) -> None:
    """Nothing is edited."""


def _without_clamps(edit: Edit, self: DeviceStep, *args: Any) -> None:
    """Doses have no bound."""
    self.tables["dose_bound"].fill_(float("inf"))
    edit(self, *args)


def _gain_tables_off_by_one(edit: Edit, self: DeviceStep, *args: Any) -> None:
    """Posteriors are taken from the bin above."""
    table = self.bank.read[:, 2] == 8
    self.bank.read[table, 3:-1] = self.bank.read[table, 4:].clone()
    edit(self, *args)


def stopped(step: DeviceStep, what: str, stage: str, dtype: torch.dtype = torch.float32) -> None:
    with pytest.raises(SelfTestError) as failed:
        prove(step, dtype, brief=True)
    said = str(failed.value)
    print(what, "→", said)
    assert said.startswith(f"the kernels fail their self-test on {ON}, so nothing is edited here: {stage}: ")
    assert step.cache is None
    assert not step.state.any()


@pytest.mark.parametrize(
    "mutant", [_stronger, _in_decode_alone, _beside, _never, _without_clamps, _gain_tables_off_by_one]
)
def test_a_kernel_that_is_wrong_stops_the_start(monkeypatch: pytest.MonkeyPatch, mutant: Any) -> None:
    edit = DeviceStep.edit
    monkeypatch.setattr(DeviceStep, "edit", lambda self, *args: mutant(edit, self, *args))
    stopped(made(), mutant.__doc__, EDITS)


def test_in_a_wide_model_in_bfloat16_a_change_is_measured_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its elements is about as small as what rounding does to the stream."""
    edit, step = DeviceStep.edit, made(d=1024)

    def stronger(self: DeviceStep, layer: int, hidden: Any, residual: Any, decode: bool) -> None:
        """Deltas that are three hundredths too large."""
        before = stream_of((hidden, residual)).float()
        edit(self, layer, hidden, residual, decode)
        change = torch.where(hidden == 0, residual.float() - before, 0.0)
        residual += (0.03 * change).to(residual.dtype)

    monkeypatch.setattr(DeviceStep, "edit", stronger)
    stopped(step, stronger.__doc__ or "", EDITS, torch.bfloat16)


def test_rows_that_are_taken_for_request_slots_stop_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = DeviceStep.plan

    def by_row(self: DeviceStep, query_start: Any, row_slot: Any, *args: Any) -> None:
        plan(self, query_start, torch.arange(len(row_slot), device=ON), *args)

    monkeypatch.setattr(DeviceStep, "plan", by_row)
    with pytest.raises(SelfTestError, match=EDITS):
        prove(made(), torch.float32, brief=True)


def test_inspections_of_which_nothing_is_sure_prove_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    steady = self_test_checks.steady

    def of_edits_alone(of: Any, h: torch.Tensor) -> torch.Tensor:
        return steady(of, h) & ("decisions" in of.__code__.co_names)

    monkeypatch.setattr(self_test_checks, "steady", of_edits_alone)
    with pytest.raises(SelfTestError, match="inspection 0 saw nothing that could be compared"):
        prove(made(), torch.float32, brief=True)


def test_readings_of_other_tokens_stop_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test_checks, "_edits", lambda *args: None)
    taken = self_test_trial.take

    def late(step: Any, *args: Any) -> Any:
        step.readings = {key: values.roll(1, 0) for key, values in step.readings.items()}
        return taken(step, *args)

    monkeypatch.setattr(self_test_trial, "take", late)
    with pytest.raises(SelfTestError, match="inspection 0"):
        prove(made(), torch.float32, brief=True)


def _gates_of_this_step_alone(original: Edit, self: DeviceStep, layer: int, cache: Any, rows: int) -> None:
    """The bits of earlier steps are lost."""
    own = cache.slot_mapping[: int(self.state[1])]
    kept = self._memory[:, own].clone()
    self._memory.zero_()
    self._memory[:, own] = kept
    original(self, layer, cache, rows)


def _gates_with_longer_windows(original: Edit, self: DeviceStep, layer: int, *args: Any) -> None:
    """Windows are one token too long."""
    self.tables.of(layer, "gates")[:, 2] += 1
    original(self, layer, *args)


def _mentions_of_this_step_alone(original: Edit, self: DeviceStep, *args: Any) -> None:
    """Tokens of earlier steps are forgotten."""
    self.tables.history.fill_(-1)
    original(self, *args)


def _mentions_by_their_last_token(original: Edit, self: DeviceStep, *args: Any) -> None:
    """The last two tokens of a name are enough."""
    starts = self.tables["mention_start"]
    long = (starts[1:] - starts[:-1] == 3).nonzero()[:, 0]
    starts[long] += 1
    original(self, *args)


def _rules_that_forget(original: Edit, self: DeviceRules, *args: Any) -> None:
    """What earlier steps counted is lost."""
    self._cells.zero_()
    original(self, *args)


def _rules_without_latches(original: Edit, self: DeviceRules, step: DeviceStep, layer: int, *args: Any) -> None:
    """No conclusion stays."""
    self._tables[layer]["conclusions"][:, 1] = -1
    original(self, step, layer, *args)


@pytest.mark.parametrize(
    ("where", "name", "stage", "mutant"),
    [
        (DeviceStep, "_look_back", GATES, _gates_of_this_step_alone),
        (DeviceStep, "_look_back", GATES, _gates_with_longer_windows),
        (DeviceStep, "plan", MENTIONS, _mentions_of_this_step_alone),
        (DeviceStep, "plan", MENTIONS, _mentions_by_their_last_token),
        (DeviceRules, "run", RULES, _rules_that_forget),
        (DeviceRules, "run", RULES, _rules_without_latches),
    ],
)
def test_what_looks_back_wrongly_stops_the_start_by_its_name(
    monkeypatch: pytest.MonkeyPatch, alone: Callable[[int], None], where: type, name: str, stage: str, mutant: Any
) -> None:
    original, step = getattr(where, name), made()
    only(monkeypatch, stage)
    monkeypatch.setattr(where, name, lambda self, *args: mutant(original, self, *args))
    alone(LOOKED_BACK)
    stopped(step, mutant.__doc__, stage)


def only(monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    """Requests of one stage: an interpreted one costs much."""
    looking_back = self_test._looking_back
    monkeypatch.setattr(
        self_test, "_looking_back", lambda *args: [one for one in looking_back(*args) if one.stage == stage]
    )


def _one_member_more(original: Edit, self: DeviceEncode, *args: Any) -> None:
    """A latent too many is a member."""
    weights = self.weights
    self.weights = {digest: dataclasses.replace(one, k=one.k + 1) for digest, one in weights.items()}
    original(self, *args)
    self.weights = weights


def _largest_but_one(original: Edit, self: DeviceEncode, step: DeviceStep, layer: int, name: str, *args: Any) -> None:
    """Indices stand beside other values."""
    original(self, step, layer, name, *args)
    self.top_index[layer, name].copy_(self.top_index[layer, name].roll(1, 1))


@pytest.mark.parametrize(
    ("sae", "mutant"),
    [("topk", _one_member_more), ("gated_unit_norm", _largest_but_one)],
)
def test_dictionaries_that_are_encoded_wrongly_stop_the_start_by_name(
    monkeypatch: pytest.MonkeyPatch, alone: Callable[[int], None], sae: str, mutant: Any
) -> None:
    original = DeviceEncode.run
    step = made(whole=(sae,))
    monkeypatch.setattr(DeviceEncode, "run", lambda self, *args: mutant(original, self, *args))
    alone(ENCODED)
    stopped(step, mutant.__doc__, WHOLE)
