"""Remaps in the oracle against the maps' own dense functions, gates against a plain loop, and what a digest takes in."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interventions.maps import transfer
from interventions.maps.transfer import Transfer, Unit
from interventions.oracle import edit_layer, listen, row_source, select
from interventions.program import (
    Channel,
    Gate,
    GateKind,
    LayerProgram,
    Op,
    OpKind,
    Program,
    ReadKind,
    UnitKind,
    feature_key,
    mean_key,
)
from interventions.selectors import ALL, Bound, Range, Selector, slice_selector
from sae_weights.sae import SAE
from tests.engine.dictionaries import random_sae

D, N, T = 16, 24, 20
INF = math.inf
LATE = slice_selector(3, None)
UNITS = {
    Unit.ABSOLUTE: UnitKind.ABSOLUTE,
    Unit.RESIDUAL_NORM: UnitKind.RESIDUAL_NORM,
    Unit.PREACT_MEAN: UnitKind.PREACT_MEAN,
}


def stream(seed: int = 0) -> torch.Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(seed)) * 12


def op_of(sae: SAE, t: Transfer, **fields: object) -> Op:
    return Op(
        t.alpha,
        t.beta,
        t.lo,
        t.hi,
        t.only_if_active,
        0,
        0,
        OpKind.REMAP,
        gamma=t.gamma,
        source="" if t.source is None else feature_key(sae.digest, t.source),
        unit=UNITS[t.unit],
        mean=mean_key(sae.digest) if t.unit is Unit.PREACT_MEAN else "",
        **fields,
    )


def run(sae: SAE, h: torch.Tensor, layer: LayerProgram, selectors: tuple[Selector, ...] = (ALL,), prompt_len: int = 12):
    rows = row_source({}, {sae.digest: sae})

    def members(digest: str) -> torch.Tensor:
        return sae.encode(h)

    opened, facts = listen(h, layer, rows, members, prompt_len)
    selected = select(selectors, torch.arange(T), torch.arange(T) % 5, prompt_len)
    effect = lambda digest, z, edited: sae.delta(h, z, edited)  # noqa: E731
    return edit_layer(h, layer, selected, rows, members, effect=effect, opened=opened), opened, facts


transfers = st.builds(
    lambda latent, alpha, beta, gamma, source, bounds, unit, active: Transfer(
        latent, alpha, beta, gamma, source if gamma else None, *bounds, unit, active
    ),
    st.integers(0, N - 1),
    st.sampled_from([0.0, 1.0, -0.5]),
    st.sampled_from([0.0, 2.0, -1.5]),
    st.sampled_from([0.0, 1.0, -2.0]),
    st.integers(0, N - 1),
    st.sampled_from([(-INF, INF), (-1.0, 2.5), (0.0, INF)]),
    st.sampled_from(list(Unit)),
    st.booleans(),
)


@pytest.mark.parametrize(
    ("architecture", "norm"), [("relu", "none"), ("jumprelu", "layer_norm"), ("topk", "unit_norm"), ("polysae", "none")]
)
@settings(max_examples=25, deadline=None)
@given(chosen=st.lists(transfers, min_size=1, max_size=8), seed=st.integers(0, 99))
def test_a_map_of_the_dense_activations_is_what_the_program_does(
    architecture: str, norm: str, chosen: list[Transfer], seed: int
) -> None:
    sae, h = random_sae(architecture, D, n=N, input_norm=norm, encoder=3.0 if norm != "none" else 0.2), stream(seed)
    read = ReadKind.LATENT if sae.row_separable else ReadKind.MEMBER if sae.additive else ReadKind.JOINT
    ops: dict[int, list[Op]] = {}
    for t in chosen:
        ops.setdefault(t.latent, []).append(op_of(sae, t))
    channels = [Channel(read, feature_key(sae.digest, i), tuple(found)) for i, found in ops.items()]
    result, _, _ = run(sae, h, LayerProgram(0, tuple(sorted(channels, key=lambda c: c.row))))
    a, scale = sae.encode(h), sae.token_scale(h)[1]
    units = transfer.units(h, scale, sae.pre_activations(h).mean(dim=1))
    acts = torch.arange(T) > 0
    x = transfer.apply(a, range(N), chosen, acts, units)
    want = sae.delta(h, a, x)
    torch.testing.assert_close(result.delta, want, rtol=1e-4, atol=1e-4 * (1 + float(want.abs().max())))
    assert torch.equal(result.fired != 0, result.written)


def test_a_token_without_length_has_no_unit_of_length() -> None:
    """0/0: nothing is written, and nothing becomes NaN."""
    sae, h = random_sae("jumprelu", D, n=N, input_norm="constant_norm_rescale", encoder=3.0), stream()
    h[5] = 0
    op = op_of(sae, Transfer(3, beta=1.0, unit=Unit.RESIDUAL_NORM))
    result, _, _ = run(sae, h, LayerProgram(0, (Channel(ReadKind.LATENT, feature_key(sae.digest, 3), (op,)),)))
    assert not result.delta.isnan().any()
    assert not result.delta[5].any()
    assert result.written[1:].sum() == T - 2


def slow(gate: Gate, bits: list[bool], prompt_len: int) -> tuple[list[bool], float]:
    """The definition in ``interventions.maps.gates``, token by token."""
    if gate.kind is GateKind.TRIGGER:
        return bits, 0.0
    opened, largest, held, level, heard = [], 0.0, False, 0.0, []
    for position, bit in enumerate(bits):
        evidence = position > 0 or gate.include_bos
        over = evidence and (gate.kind is not GateKind.SHARE_PROMPT or position < prompt_len)
        heard += [bit] if over else []
        value = 0.0
        if gate.kind is GateKind.SHARE_PROMPT and position == prompt_len - 1:
            value = sum(heard) / max(len(heard), 1)
        if gate.kind is GateKind.SHARE_SEEN and len(heard) >= gate.least:
            value = sum(heard) / len(heard)
        if gate.kind is GateKind.WINDOW and len(heard) >= gate.least:
            value = sum(heard[-gate.window :]) / min(len(heard), gate.window)
        if gate.kind is GateKind.CUSUM:
            level = max(0.0, level + bit - gate.k) if evidence else level
            value = level
        is_open = value > gate.threshold
        if gate.kind is GateKind.CUSUM and gate.reset and is_open:
            level = 0.0
        held = held or is_open if gate.latch or gate.kind is GateKind.SHARE_PROMPT else is_open
        opened.append(held)
        largest = max(largest, value)
    return opened, largest


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from([kind for kind in GateKind if kind is not GateKind.RULE]),
    st.integers(0, 9).map(lambda i: i / 10),
    st.integers(1, 4),
    st.integers(4, 9),
    st.sampled_from([0.0, 0.25, 0.5]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(1, T),
    st.integers(0, 30),
)
def test_a_gate_opens_where_the_definition_says(
    kind: GateKind,
    threshold: float,
    least: int,
    window: int,
    k: float,
    reset: bool,
    latch: bool,
    bos: bool,
    prompt: int,
    seed: int,
) -> None:
    sae, h = random_sae("jumprelu", D, n=N), stream(seed)
    evidence = tuple(sorted(feature_key(sae.digest, i) for i in (1, 4)))
    gate = Gate(kind, ReadKind.LATENT, evidence, threshold, least, window, k, reset, latch, bos)
    add = msgspec.structs.replace(op_of(sae, Transfer(0, beta=3.0)), gates=(0,), scope=1)
    layer = LayerProgram(0, (Channel(ReadKind.LATENT, feature_key(sae.digest, 0), (add,)),), (gate,))
    scope = slice_selector(3, None)
    result, opened, facts = run(sae, h, layer, (ALL, scope), prompt)
    bits = (sae.encode(h)[:, [1, 4]] != 0).any(dim=1).tolist()
    want, largest = slow(gate, bits, prompt)
    assert opened[0].tolist() == want
    assert facts[0].statistic == pytest.approx(largest, abs=1e-12)
    assert facts[0].open_from == (want.index(True) if any(want) else None)
    assert result.written.tolist() == [is_open and i >= 3 for i, is_open in enumerate(want)]


def test_the_digest_takes_in_everything_that_a_remap_says() -> None:
    sae = random_sae("jumprelu", D, n=N)
    gate = Gate(GateKind.CUSUM, ReadKind.LATENT, (feature_key(sae.digest, 1),), 2.0)
    op = msgspec.structs.replace(op_of(sae, Transfer(0, beta=3.0, gamma=1.0, source=2)), gates=(0,), scope=1)

    def digest(op: Op = op, gates: tuple[Gate, ...] = (gate,), scope: Selector = LATE) -> str:
        layer = LayerProgram(0, (Channel(ReadKind.LATENT, feature_key(sae.digest, 0), (op,)),), gates)
        return Program((layer,), (ALL, scope), {}).digest()

    changed = [
        digest(msgspec.structs.replace(op, **{name: value}))
        for name, value in {
            "gamma": 2.0,
            "source": feature_key(sae.digest, 3),
            "unit": UnitKind.RESIDUAL_NORM,
            "mean": mean_key(sae.digest),
            "scope": -1,
            "gates": (),
            "kind": OpKind.AFFINE,
        }.items()
    ]
    other = {
        "kind": GateKind.WINDOW,
        "read": ReadKind.MEMBER,
        "evidence": (feature_key(sae.digest, 2),),
        "threshold": 1.0,
    }
    other |= {"least": 2, "window": 3, "k": 0.5, "reset": True, "latch": True, "include_bos": True}
    changed += [digest(gates=(msgspec.structs.replace(gate, **{name: value}),)) for name, value in other.items()]
    changed += [digest(gates=(gate, msgspec.structs.replace(gate, k=0.5))), digest(scope=Selector(ends=((1, 2),)))]
    assert len({digest(), *changed}) == len(changed) + 1
    assert digest(msgspec.structs.replace(op, intervention=5)) == digest()


def test_the_rows_of_a_program_are_all_that_it_names() -> None:
    sae = random_sae("jumprelu", D, n=N)
    gate = Gate(GateKind.TRIGGER, ReadKind.LATENT, (feature_key(sae.digest, 9),))
    op = op_of(sae, Transfer(0, beta=3.0, gamma=1.0, source=2, unit=Unit.PREACT_MEAN))
    layer = LayerProgram(0, (Channel(ReadKind.LATENT, feature_key(sae.digest, 0), (op,)),), (gate,))
    keys = Program((layer,), (ALL,), {}).row_keys
    assert set(keys) == {*(feature_key(sae.digest, i) for i in (0, 2, 9)), mean_key(sae.digest)}


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=20),
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), max_size=4),
    st.booleans(),
)
def test_mentions_are_resolved_to_the_positions_that_they_take(
    prompt: list[int], names: list[list[int]], bos: bool
) -> None:
    inside = tuple(sorted({tuple(name) for name in names}))
    kept = Selector((Range(Bound(True, -1), Bound(True, 0)),), (), bos, (), inside)
    ids = [*prompt, *prompt[:3]]  # what is generated mentions nothing any more
    mask = kept.resolved(prompt).mask(torch.arange(len(ids)), torch.tensor(ids), len(prompt))
    due = np.zeros(len(ids), np.bool_)
    for name in inside:
        for start in range(len(prompt) - len(name) + 1):
            due[start : start + len(name)] |= prompt[start : start + len(name)] == list(name)
    due[len(prompt) - 1] = True
    due[0] &= bos
    assert mask.tolist() == due.tolist()
    if inside:
        with pytest.raises(ValueError, match="not resolved"):
            kept.mask(torch.arange(len(ids)), torch.tensor(ids), len(prompt))
        ended = Selector(include_bos=bos, ends=inside)
        with pytest.raises(ValueError, match="whole sequences"):
            ended.mask(torch.arange(1, len(ids) + 1), torch.tensor(ids), len(prompt))
