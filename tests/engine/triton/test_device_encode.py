"""Whole dictionaries on the device against those on the host."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
import torch

from editserver.engine.config import EngineConfig, SAESource
from editserver.engine.resident import Resident, ResidentSet
from editserver.engine.rows import Dictionaries, RowBank
from editserver.engine.triton.capacity import EncodeCapacity
from editserver.engine.triton.encode import DeviceEncode
from editserver.engine.triton.fill import NotOnDevice, fill
from editserver.engine.triton.readout import take
from editserver.engine.triton.step import DeviceStep
from editserver.engine.wire import StepRecord
from interventions.program import (
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
    vector_key,
)
from interventions.selectors import ALL, PROMPT, Selector
from sae_weights import SAE, load_sae
from sae_weights.formats import save_native
from tests.engine.dictionaries import random_sae, write_native, write_sae
from tests.engine.flat_batches import random_stream
from tests.engine.triton.batches import CAPACITY, LAYER, ON, SLOTS, TOKENS

D = 40
NATIVE = ("abstopk", "plain_topk", "gradient", "vsae", "polysae", "matching_pursuit")
ENCODED = ("topk", "topk_layer_norm", "jumprelu", "gated_unit_norm", *NATIVE[:4])
EVERYWHERE = Selector(ALL.ranges, (), True)
SMALL = EncodeCapacity(rows=16, programs=2, top=24)


@cache
def dictionaries() -> tuple[EngineConfig, dict[str, SAE]]:
    root = Path(mkdtemp(prefix="whole-saes-"))
    folders = {name: write_sae(root / name, LAYER, name, D) for name in ("topk", "jumprelu")}
    folders["topk_layer_norm"] = write_sae(root / "n", LAYER, "topk", D, norm="layer_norm", seed=8)
    folders["gated_unit_norm"] = write_native(root / "u", LAYER, "gated", D, input_norm="unit_norm", encoder=6, seed=9)
    folders |= {name: write_native(root / name, LAYER, name, D) for name in NATIVE}
    twins = random_sae("topk", D, layer=LAYER)
    rows, bias = (t.repeat_interleave(2, dim=0)[: len(t)] for t in (twins.W_enc, twins.gate["b_enc"]))
    made = SAE.from_tensors(
        architecture="topk",
        hook=twins.hook,
        W_enc=rows,
        W_dec=twins.W_dec,
        b_dec=twins.b_dec,
        gate={"b_enc": bias},
        k=11,
    )
    folders["twins"] = save_native(made, root / "twins")
    saes = {name: load_sae(folder) for name, folder in folders.items()}
    sources = tuple(SAESource(name, sae.origin.as_dict(), sae.digest, LAYER) for name, sae in saes.items())
    return EngineConfig((LAYER,), sources, tuple(saes), bank_rows=CAPACITY.bank_rows), saes


class Whole:
    """A device that encodes whole dictionaries, with one request's payload on every row."""

    def __init__(self) -> None:
        config = dictionaries()[0]
        self.dictionaries = Dictionaries(config)
        self.encode = DeviceEncode(SMALL, config, self.dictionaries, TOKENS, SLOTS, D, ON)
        self.step = DeviceStep(CAPACITY, (LAYER,), D, ON, lanes=5, encode=self.encode)
        self.bank = RowBank(CAPACITY.bank_rows, D, self.dictionaries)
        self.residents = ResidentSet(self.dictionaries, (LAYER,))

    def settle(self, payload: Payload, prompt_len: int = 4) -> None:
        slots = {key: i for i, key in enumerate(payload.row_keys)}
        self.bank.upload(list(slots), list(slots.values()), payload.program.vectors if payload.program else {})
        at = torch.tensor(list(slots.values()), dtype=torch.int64)
        self.step.bank.put(at, self.bank.read[at], self.bank.write[at], self.bank.gate[at])
        self.residents.add(Resident("r", payload, prompt_len, slots))
        self.residents.refresh()
        fill(self.step.tables, self.residents, encode=self.encode)

    def run(
        self, h: torch.Tensor, start: int = 0, plain: int = 0, decode: bool = False
    ) -> tuple[torch.Tensor, StepRecord]:
        """The stream afterwards, and the record of the tokens from position ``start`` on, behind ``plain`` other tokens."""
        n = len(h)
        names = ["plain", "r"] if plain else ["r"]
        mapped = np.full(CAPACITY.residents, -1, np.int32)
        mapped[len(names) - 1] = 0
        self.step.tables.map_slots(mapped)
        lengths = [plain, n] if plain else [n]
        positions = np.concatenate((np.arange(plain), np.arange(start, start + n)))
        arrays = (
            np.cumsum([0, *lengths], dtype=np.int32),
            np.arange(len(names)),
            positions,
            np.zeros(plain + n, np.int32),
        )
        self.step.plan(*(torch.from_numpy(one).to(ON) for one in arrays), len(names), plain + n, max(lengths))
        hidden = torch.cat([torch.randn(plain, D), h]).to(ON)
        self.step.members.fill_(math.nan)  # of whoever had these tokens before
        self.step.run(LAYER, hidden, None, decode)
        requests = [self.residents.requests.get(name) for name in names]
        return hidden[plain:].cpu(), take(self.step, requests, plain + n).records()["r"]


def stream(n: int, seed: int = 0) -> torch.Tensor:
    return random_stream(np.random.default_rng(seed), n, D, torch.float32, False)[0]


def reading(
    name: str, features: tuple[int, ...], top_k: int, after: bool = False, selector: Selector = EVERYWHERE
) -> Read:
    return Read(dictionaries()[1][name].digest, LAYER, features, top_k, selector, after)


@pytest.mark.parametrize("name", ENCODED)
def test_readings_are_the_hosts(name: str) -> None:
    n, prompt = (18, 12) if name == "topk" else (7, 5)  # more than are encoded at a time, or not
    device, h = Whole(), stream(n)
    features = (3, 40, 41, 95) if name not in ("jumprelu", "gated_unit_norm") else ()
    after = name in ENCODED[1:3]  # nothing is edited: the same
    device.settle(
        Payload(None, (reading(name, features, 5, selector=PROMPT), reading(name, (), 9, after)), None), prompt
    )
    _, record = device.run(h, plain=2)
    z = dictionaries()[1][name].encode(h)
    listed = np.frombuffer(record.reads[0][0], np.float32).reshape(len(h), -1)
    want = z[:, list(features)].numpy().copy()
    want[prompt:] = np.nan
    want[0] = np.nan  # position 0 is none of the prompt's tokens here
    np.testing.assert_allclose(listed, want, 1e-4, 1e-4)
    for (_, index, value), top_k, rows in ((record.reads[0], 5, slice(1, prompt)), (record.reads[1], 9, slice(0, n))):
        indices = np.frombuffer(index, np.int32).reshape(len(h), top_k)
        values = np.frombuffer(value, np.float32).reshape(len(h), top_k)
        magnitudes = z.abs().topk(top_k, dim=1).values.numpy()
        np.testing.assert_allclose(np.abs(values[rows]), magnitudes[rows], 1e-4, 1e-4)
        np.testing.assert_allclose(values[rows], z.numpy()[np.arange(len(h))[:, None], indices][rows], 1e-4, 1e-4)
        outside = np.ones(len(h), bool)
        outside[rows] = False
        assert (indices[outside] < 0).all()


def test_of_equal_latents_the_first_is_a_member() -> None:
    device, h = Whole(), stream(8, 5)
    device.settle(Payload(None, (reading("twins", (), 24),), None))
    _, record = device.run(h)
    index, value = (np.frombuffer(record.reads[0][i], kind).reshape(len(h), 24) for i, kind in ((1, "<i4"), (2, "<f4")))
    for indices, values in zip(index, value, strict=True):
        members = dict(zip(indices[values != 0].tolist(), values[values != 0].tolist(), strict=True))
        assert len(members) == 11
        (alone,) = (i for i in members if i ^ 1 not in members)
        assert alone % 2 == 0
        assert members[alone] == min(members.values())


def member_program(name: str, gates: tuple[Gate, ...] = (), selector: Selector = EVERYWHERE) -> Program:
    """Doubles some members, the last of them behind the gates."""
    sae = dictionaries()[1][name]
    behind = tuple(range(len(gates)))
    channels = tuple(
        Channel(ReadKind.MEMBER, feature_key(sae.digest, i), (Op(2.0, 0.5, -math.inf, math.inf, True, 0, i, gates=g),))
        for i, g in ((1, ()), (2, ()), (7, behind))
    )
    return Program((LayerProgram(LAYER, channels, gates),), (selector,), {})


@pytest.mark.parametrize("name", ["topk", "topk_layer_norm", "abstopk"])
def test_members_are_edited_as_their_activations_say(name: str) -> None:
    device, h, sae = Whole(), stream(8, 1), dictionaries()[1][name]
    device.settle(Payload(member_program(name), (reading(name, (1, 2), 0, after=True),), None))
    edited, record = device.run(h)
    z = sae.encode(h)
    after = z.clone()
    for i in (1, 2, 7):
        after[:, i] = torch.where(z[:, i] != 0, 2 * z[:, i] + 0.5, z[:, i])
    want = h + sae.delta(h, z, after)
    assert (want != h).any()
    torch.testing.assert_close(edited, want, rtol=1e-4, atol=1e-3)
    listed = np.frombuffer(record.reads[0][0], np.float32).reshape(len(h), -1)
    np.testing.assert_allclose(listed, sae.encode(edited)[:, [1, 2]].numpy(), 1e-3, 1e-3)


def test_what_lies_where_nobody_encoded_reaches_no_one() -> None:
    """Members are edited in the prompt and a vector is added everywhere: elsewhere their columns are of another request."""
    device, h = Whole(), stream(6, 6)
    members, values = member_program("topk").layers[0].channels, np.ones(D, "<f4").tobytes()
    added = Channel(ReadKind.NONE, vector_key(values), (Op(1.0, 1.0, -math.inf, math.inf, False, 1, 9),))
    layer = LayerProgram(LAYER, (added, *members))
    device.settle(Payload(Program((layer,), (PROMPT, EVERYWHERE), {added.row: values}), (), None), prompt_len=4)
    edited, record = device.run(h)
    outside = [0, 4, 5]  # position 0 is none of the prompt's tokens here
    assert torch.equal(edited[outside], h[outside] + 1)
    assert np.frombuffer(record.fired, np.int64)[outside].tolist() == [1 << 9] * 3
    assert (edited[1:4] != h[1:4] + 1).any()


def test_evidence_may_need_a_whole_dictionary() -> None:
    device, h, sae = Whole(), stream(18, 2), dictionaries()[1]["topk"]
    evidence = tuple(sorted(feature_key(sae.digest, i) for i in (5, 6, 30)))
    device.settle(Payload(member_program("topk", (Gate(GateKind.TRIGGER, ReadKind.MEMBER, evidence),)), (), None))
    device.run(h)
    want = (sae.encode(h)[:, [5, 6, 30]] != 0).any(dim=1)
    assert want.any()
    assert not want.all()
    assert torch.equal(device.step.opened[0, : len(h)].cpu() != 0, want)


def test_a_tokens_bits_do_not_depend_on_its_company() -> None:
    device, h = Whole(), stream(18, 3)
    device.settle(Payload(member_program("topk"), (reading("jumprelu", (), 6),), None))
    whole, record = device.run(h, plain=3)
    for i in (5, 17):
        alone, one = device.run(h[i : i + 1], start=i, decode=True)
        assert torch.equal(alone[0], whole[i])
        size = 6 * 4
        assert one.reads[0][2] == record.reads[0][2][i * size : (i + 1) * size]


def test_tokens_that_nobody_asks_for_are_not_encoded() -> None:
    device, h = Whole(), stream(6, 4)
    device.settle(Payload(member_program("topk", selector=PROMPT), (), None), prompt_len=4)
    device.encode._pre.fill_(7.0)
    device.run(h, start=4, plain=2)
    assert (device.encode._pre == 7.0).all()
    device.run(h[:4], start=0)
    assert (device.encode._pre != 7.0).any()


@pytest.mark.parametrize("name", ["polysae", "matching_pursuit"])
def test_what_cannot_be_encoded_is_refused_by_name(name: str) -> None:
    device = Whole()
    with pytest.raises(NotOnDevice, match=name):
        device.settle(Payload(None, (reading(name, (1,), 0),), None))
    assert device.dictionaries[dictionaries()[1][name].digest].digest in device.encode.refused
