"""Remaps, mentions and gates in the worker against the oracle, over chunks, shared prefixes and recomputation."""

from __future__ import annotations

import itertools

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from editserver.engine.history import History
from interventions.program import Channel, Gate, GateKind, LayerProgram, Op, OpKind, Program, UnitKind, mean_key
from interventions.selectors import ALL, Selector, slice_selector
from tests.engine.kernel_steps import LAYER, D, dictionaries
from tests.engine.remap_programs import (
    BLOCK,
    LISTENING,
    N_BLOCKS,
    Run,
    Server,
    feature_key,
    heard,
    random_gate,
    random_mentions,
    random_remap,
    random_sequence,
    read_kind,
)

KINDS = (
    "jumprelu",
    "gated",
    "layer_norm",
    "unit_norm",
    "topk",
    "topk_layer_norm",
    "abstopk",
    "polysae",
    "polysae_unit_norm",
)


def cuts(random: np.random.Generator, start: int, n: int) -> list[tuple[int, int]]:
    """``start … n`` in chunks of any size."""
    inner = [p for p in range(start + 1, n) if random.random() < 0.3]
    edges = [start, *inner, n]
    return list(itertools.pairwise(edges))


def assert_is_the_oracles(run: Run, server: Server, name: str, after: torch.Tensor, first: int = 0) -> None:
    want, facts = run.expected()
    journal = server.journals[name]
    mine = journal.fired(LAYER, first, len(run.ids)).view(np.int64)
    assert np.array_equal(mine, want.fired[first:].numpy())
    h = run.hidden
    size = h.float().norm(dim=-1, keepdim=True) + want.delta.norm(dim=-1, keepdim=True)
    error = ((after.float() - want.apply(h).float()) / size)[first:].abs()
    assert float(error.max()) <= (2e-5 if h.dtype is torch.float32 else 2**-7)
    assert server.facts(name) == heard(facts, run.program)


def run_through(server: Server, name: str, run: Run, random: np.random.Generator, row: int = 0) -> torch.Tensor:
    """The whole request, in chunks."""
    server.add(name, run)
    pieces = [server.step({name: (run, a, b, row)})[name] for a, b in cuts(random, 0, len(run.ids))]
    return torch.cat(pieces)


def paged(server: Server, random: np.random.Generator) -> None:
    """Every row's blocks anywhere in the KV cache, none shared."""
    server.table.reshape(-1)[:N_BLOCKS] = random.permutation(N_BLOCKS)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([torch.float32, torch.bfloat16]))
def test_remaps_do_what_the_oracle_says_in_any_chunks_and_company(seed: int, dtype: torch.dtype) -> None:
    random = np.random.default_rng(seed)
    runs = {f"r{i}": random_sequence(seed + i, dtype) for i in range(2)}
    assume(not any(run.doubtful().any() for run in runs.values()))
    server = Server(dtype)
    paged(server, random)
    left, after = {}, {name: [] for name in runs}
    for name, run in runs.items():
        server.add(name, run)
        left[name] = cuts(random, 0, len(run.ids))
    while any(left.values()):
        step = {}
        for row, (name, run) in enumerate(runs.items()):
            if left[name] and (random.random() < 0.7 or sum(map(bool, left.values())) == 1):
                step[name] = (run, *left[name].pop(0), row)
        for name, tokens in server.step(step).items() if step else ():
            after[name].append(tokens)
    for name, run in runs.items():
        assert_is_the_oracles(run, server, name, torch.cat(after[name]))


def one_op(
    name: str, unit: UnitKind, *, source: bool, active: bool, gate: GateKind | None = None, seed: int = 0
) -> Run:
    """Ten latents of one dictionary, each with one remap of this unit."""
    random = np.random.default_rng(seed)
    sae = dictionaries()[1][name]
    mean = mean_key(sae.digest) if unit is UnitKind.PREACT_MEAN else ""
    inf = float("inf")
    channels = []
    for i in range(10):
        other = feature_key(sae.digest, i + 20) if source else ""
        size = 0.05 if unit is UnitKind.RESIDUAL_NORM else 2.0
        op = Op(
            0.5, -size, -inf, inf, active, 0, 0, OpKind.REMAP, gamma=1.5 if source else 0.0, source=other, unit=unit
        )
        op = msgspec.structs.replace(op, mean=mean, gates=() if gate is None else (0,))
        channels.append(Channel(read_kind(sae), feature_key(sae.digest, i), (op,)))
    gates = () if gate is None else (msgspec.structs.replace(random_gate(random, sae, gate), threshold=0.2),)
    layer = LayerProgram(LAYER, tuple(sorted(channels, key=lambda c: (c.read, c.row))), gates)
    hidden = torch.from_numpy(random.normal(size=(16, D)) * 9).float()
    return Run(Program((layer,), (ALL,), {}), torch.from_numpy(random.integers(0, 5, 16)), 9, hidden)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("unit", UnitKind)
@pytest.mark.parametrize(("source", "active"), [(False, True), (True, False)])
def test_every_unit_and_source_on_every_kind_of_dictionary(
    name: str, unit: UnitKind, source: bool, active: bool
) -> None:
    run = one_op(name, unit, source=source, active=active)
    server = Server()
    after = run_through(server, "a", run, np.random.default_rng(1))
    sure = ~run.doubtful()
    want = run.expected()[0]
    assert sure.sum() >= 6
    assert (want.fired[sure] != 0).any()
    torch.testing.assert_close(after[sure], want.apply(run.hidden)[sure], rtol=1e-4, atol=1e-3)
    assert np.array_equal(
        server.journals["a"].fired(LAYER, 0, 16).view(np.int64)[sure.numpy()], want.fired[sure].numpy()
    )


@pytest.mark.parametrize("name", ["jumprelu", "topk", "polysae"])
@pytest.mark.parametrize("kind", LISTENING)
def test_every_gate_on_every_kind_of_dictionary_opens_when_the_oracles_does(name: str, kind: GateKind) -> None:
    seed = next(
        s
        for s in range(200)
        if not (run := one_op(name, UnitKind.ABSOLUTE, source=True, active=False, gate=kind, seed=s)).doubtful().any()
        and 0 < int((run.expected()[0].fired != 0).sum()) < 14
    )
    run = one_op(name, UnitKind.ABSOLUTE, source=True, active=False, gate=kind, seed=seed)
    for chunks in range(3):
        server = Server()
        after = run_through(server, "a", run, np.random.default_rng(chunks))
        assert_is_the_oracles(run, server, "a", after)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_a_shared_prefix_brings_the_gates_state_with_it(seed: int) -> None:
    """Another request over the same blocks, with a tail of its own: bit for bit what it does when it computes everything."""
    random = np.random.default_rng(seed)
    first = random_sequence(seed, n=24)
    shared = BLOCK * int(random.integers(1, 6))
    server = Server()
    paged(server, random)
    run_through(server, "first", first, random)
    tail = torch.from_numpy(random.normal(size=(24 - shared, D)) * 9).float()
    second = Run(
        first.program,
        torch.cat([first.ids[:shared], torch.from_numpy(random.integers(0, 5, 24 - shared))]),
        first.prompt_len if first.program.needs_prompt_len else max(first.prompt_len, shared),
        torch.cat([first.hidden[:shared], tail]),
    )
    assume(second.prompt_len >= shared)  # nothing but a prompt is ever looked up
    cold = Server()
    paged(cold, random)
    whole = run_through(cold, "second", second, random)
    server.table[1] = server.table[0, : shared // BLOCK].tolist() + server.table[1, shared // BLOCK :].tolist()
    server.add("second", second)
    hit = [server.step({"second": (second, a, b, 1)})["second"] for a, b in cuts(random, shared, 24)]
    assert torch.equal(torch.cat(hit), whole[shared:])
    assert server.facts("second") == cold.facts("second")


def gated(seed: int) -> Run:
    """A sequence whose gates open in the middle of it."""
    for s in range(seed, seed + 400):
        run = random_sequence(s, n=24)
        facts = run.expected()[1]
        if any(
            g.over_sequence and f.open_from and f.open_from > 8
            for f, g in zip(facts, run.program.layers[0].gates, strict=True)
        ):
            return run
    raise AssertionError("no such sequence")


def test_a_prefix_that_is_computed_in_the_very_step_that_shares_it_counts() -> None:
    run = gated(0)
    server = Server()
    paged(server, np.random.default_rng(0))
    server.table[1, :2] = server.table[0, :2]
    server.add("a", run)
    server.add("b", run)
    for order in (("a", "b"), ("b", "a")):
        for name in order:
            server.add(name, run)
        whole = {"a": (run, 0, 24, 0), "b": (run, 8, 24, 1)}
        step = server.step({name: whole[name] for name in order})
        assert torch.equal(step["b"], step["a"][8:])
        assert server.facts("a") == server.facts("b")


@pytest.mark.parametrize("back_to", [0, 8])
def test_a_request_that_is_computed_again_has_the_same_gates(back_to: int) -> None:
    """Preempted at position 17, back from the start or from its own cached blocks, which lie elsewhere now or do not."""
    run = gated(50)
    server = Server()
    random = np.random.default_rng(3)
    paged(server, random)
    whole = run_through(server, "calm", run, random, row=2)
    server.add("a", run)
    server.step({"a": (run, 0, 11, 0)})
    server.step({"a": (run, 11, 17, 0)})
    keep = back_to // BLOCK
    server.table[1, :keep] = server.table[0, :keep]
    again = [server.step({"a": (run, a, b, 1)})["a"] for a, b in ((back_to, 13), (13, 17), (17, 18), (18, 24))]
    assert torch.equal(torch.cat(again), whole[back_to:])
    assert server.facts("a") == server.facts("calm")


def test_without_a_cache_that_carries_bits_a_gate_hears_everything_or_stops() -> None:
    run = gated(100)
    server = Server(without_blocks=True)
    after = run_through(server, "a", run, np.random.default_rng(0))
    assert torch.equal(after, run_through(Server(), "a", run, np.random.default_rng(1)))
    server.worker.remove_request("a")
    server.add("a", run)
    with pytest.raises(RuntimeError, match="continues at position 8 behind a gate"):
        server.step({"a": (run, 8, 24, 0)})


def test_an_id_that_comes_back_has_forgotten_everything() -> None:
    server = Server()
    first, second = gated(150), gated(300)
    run_through(server, "a", first, np.random.default_rng(0))
    server.worker.remove_request("a")
    assert torch.equal(
        run_through(server, "a", second, np.random.default_rng(1)),
        run_through(Server(), "b", second, np.random.default_rng(2)),
    )


def test_programs_without_gates_remember_nothing() -> None:
    server = Server()
    run_through(server, "a", one_op("jumprelu", UnitKind.ABSOLUTE, source=True, active=False), np.random.default_rng(0))
    run_through(
        server,
        "b",
        one_op("topk", UnitKind.ABSOLUTE, source=True, active=False, gate=GateKind.TRIGGER),
        np.random.default_rng(0),
    )
    assert not server.worker._memory._bits


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1))
@example(0)
def test_mentions_are_found_across_chunks_and_behind_a_cached_prefix(seed: int) -> None:
    random = np.random.default_rng(seed)
    selectors = [random_mentions(random), ALL, random_mentions(random)]
    ids = random.integers(0, 5, 30)
    prompt_len = int(random.integers(1, 31))
    cached = int(random.integers(0, prompt_len))
    history = History.of(selectors, ids[:prompt_len].tolist())
    assert history is not None
    again = cuts(random, cached, 30)[:-1]  # computed once, lost, and computed again
    for chunks in (again, cuts(random, int(random.integers(0, prompt_len)), 30)):
        for a, b in chunks:
            bits = history.take(a, ids[a:b])
            for number, selector in enumerate(selectors):
                mask = Selector(ends=selector.ends, include_bos=selector.include_bos).mask(
                    torch.arange(30), torch.from_numpy(ids), prompt_len
                )
                want = mask[a:b].numpy()
                assert np.array_equal(bits >> np.uint64(number) & np.uint64(1) != 0, want)


def test_no_history_is_kept_where_nothing_looks_back() -> None:
    assert History.of([ALL], [1, 2]) is None
    with pytest.raises(RuntimeError, match=r"tokens 2 to 4 .* are not known"):
        History([Selector(ends=((1, 2),))], [1, 2]).take(5, np.array([1]))


def test_evidence_is_looked_at_once_and_a_trigger_only_where_something_is_selected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = one_op("topk", UnitKind.ABSOLUTE, source=True, active=False, gate=GateKind.SHARE_SEEN)
    late = slice_selector(12, 14)
    for kind, due in ((GateKind.SHARE_SEEN, 16), (GateKind.TRIGGER, 2)):
        server, encoded = Server(), [0]
        encode = server.worker.dictionaries.full_encode

        def counting(digest: str, h: torch.Tensor, encode=encode, encoded=encoded) -> torch.Tensor:
            encoded.append(len(h))
            return encode(digest, h)

        monkeypatch.setattr(server.worker.dictionaries, "full_encode", counting)
        layer = run.program.layers[0]
        gate = Gate(kind, layer.gates[0].read, layer.gates[0].evidence, 0.1)
        program = Program((msgspec.structs.replace(layer, gates=(gate,)),), (late,), {})
        server.add("a", Run(program, run.ids, 9, run.hidden))
        server.step({"a": (Run(program, run.ids, 9, run.hidden), 0, 16, 0)})
        assert sum(encoded) == due


@pytest.mark.parametrize("name", sorted(dictionaries()[1]))
def test_the_mean_row_is_the_mean_of_all_pre_activations(name: str) -> None:
    sae = dictionaries()[1][name]
    bank = Server().worker.bank
    bank.upload([mean_key(sae.digest)], [7], {})
    x = torch.randn(9, D, generator=torch.Generator().manual_seed(0)) * 8
    mean = sae.token_scale(x)[0] @ bank.read[7] + bank.gate[7, 0]
    torch.testing.assert_close(mean, sae.pre_activations(x).mean(dim=-1), rtol=1e-4, atol=1e-4)
    assert not bank.write[7].any()


def test_a_source_of_another_dictionary_is_refused() -> None:
    random = np.random.default_rng(0)
    one, other = (dictionaries()[1][name] for name in ("jumprelu", "gated"))
    op = random_remap(random, other, Op(0, 0, 0, 0, False, 0, 0))
    op = msgspec.structs.replace(op, gamma=1.0, source=feature_key(other.digest, 1))
    layer = LayerProgram(LAYER, (Channel(read_kind(one), feature_key(one.digest, 0), (op,)),))
    run = Run(Program((layer,), (ALL,), {}), torch.zeros(3, dtype=torch.int64), 2, torch.zeros(3, D))
    with pytest.raises(ValueError, match="sources are latents of the same SAE"):
        Server().add("a", run)


@pytest.mark.parametrize("name", ["jumprelu", "topk", "polysae"])
def test_sources_are_what_they_were_before_any_edit(name: str) -> None:
    """A → B → C shifts each activation by one, in whatever order the channels come."""
    sae, inf = dictionaries()[1][name], float("inf")
    hidden = torch.from_numpy(np.random.default_rng(2).normal(size=(16, D)) * 9).float()
    often = sorted(sae.encode(hidden).mean(dim=0).argsort(descending=True)[:6].tolist(), key=str)
    keys = [feature_key(sae.digest, i) for i in often]
    channels = [
        Channel(
            read_kind(sae),
            key,
            (Op(0.0, 0.0, -inf, inf, False, 0, 0, OpKind.REMAP, gamma=1.0, source=keys[(i + 1) % 6]),),
        )
        for i, key in enumerate(keys)
    ]
    run = Run(
        Program((LayerProgram(LAYER, tuple(channels)),), (ALL,), {}), torch.zeros(16, dtype=torch.int64), 9, hidden
    )
    after, sure = run_through(Server(), "a", run, np.random.default_rng(1)), ~run.doubtful()
    a = sae.encode(hidden)
    x = a.clone()
    x[1:, often] = a[1:, [*often[1:], often[0]]]
    assert sure.sum() >= 6
    torch.testing.assert_close((after - hidden)[sure], sae.delta(hidden, a, x)[sure], rtol=1e-3, atol=2e-3)
