"""Every byte that editing keeps is counted before vLLM sizes its KV cache, and none more is allocated than was counted."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from editserver.engine import memory, op
from editserver.engine.compat import memory as counting
from editserver.engine.config import EngineConfig, SAESource
from editserver.engine.gates import Blocks, HitMemory
from editserver.engine.memory import WORD_BITS, Budget, Footprint
from editserver.engine.rules import KeptBits
from editserver.engine.warm_up import warm_up
from editserver.engine.worker import EngineWorker
from sae_weights import load_sae
from sae_weights.architectures import ARCHITECTURES
from sae_weights.formats import save_native
from tests.engine.dictionaries import WHOLE, random_sae

CONFIG = EngineConfig((1, 4, 6), bank_rows=48, propositions=130)


def arrays_of(worker: EngineWorker) -> int:
    """Bytes of all tensors and arrays that hang from the worker, its plan and its bank."""
    found = [value for part in (worker, worker.plan, worker.bank) for value in vars(part).values()]
    found += worker._outcomes.arrays
    return sum(a.nbytes for a in found if isinstance(a, np.ndarray | torch.Tensor))


# -- what is counted is what is there --------------------------------------------------------------------------------


def test_buffers_of_a_worker_are_of_the_predicted_size() -> None:
    worker = EngineWorker(CONFIG, 96, torch.bfloat16, 72)
    footprint = worker.footprint()
    assert footprint == memory.on_cpu(CONFIG, 96, 72)
    assert sum(footprint.reserved.values()) == arrays_of(worker)
    assert footprint.reserved["row bank"] == worker.bank.n_bytes
    warm_up(worker)
    assert arrays_of(worker) == sum(footprint.reserved.values()), "warming up left buffers that nobody counts"


def test_bits_along_with_the_kv_cache_are_of_the_predicted_size() -> None:
    blocks = Blocks(np.zeros((1, 4), np.int32), 16, 16 * 40)
    hits, kept = HitMemory(), KeptBits()
    words = -(-CONFIG.propositions // WORD_BITS)
    for layer in CONFIG.armed:
        hits.of(layer, blocks)
        kept.of(layer, blocks, 1)
        kept.of(layer, blocks, words)
    footprint = memory.on_cpu(CONFIG, 96, 72)
    assert hits.n_bytes + kept.n_bytes == footprint.kept_per_token * blocks.n_slots


@pytest.mark.parametrize("architecture", ["relu", "jumprelu", "gated", "topk", *WHOLE])
def test_a_whole_dictionary_is_of_the_predicted_size(architecture: str) -> None:
    assert architecture in ARCHITECTURES
    sae = random_sae(architecture, 32)
    predicted = sae.whole_bytes
    assert not sae.materialised
    tensors = {id(t): t for t in (sae.W_enc, sae.W_dec, *sae.gate.values())}
    assert sae.materialised
    assert predicted == sum(t.nbytes for t in tensors.values())


def test_buffers_of_a_device_are_of_the_predicted_size(tmp_path: Path) -> None:
    pytest.importorskip("triton.language")
    from editserver.engine.abilities import Abilities
    from editserver.engine.triton.capacity import Capacity, EncodeCapacity, RuleCapacity
    from editserver.engine.triton.step import Cache
    from editserver.engine.triton.worker import DeviceWorker

    sae = load_sae(save_native(random_sae("topk", 96, layer=4), tmp_path / "topk"))
    assert sae.origin is not None
    source = SAESource("topk", sae.origin.as_dict(), sae.digest, 4)
    config = EngineConfig(CONFIG.armed, (source,), ("topk",), CONFIG.bank_rows, CONFIG.propositions)
    capacity = Capacity.of(tokens=128, rows=8, bank_rows=48, history=64)
    rules = RuleCapacity.of(requests=capacity.residents, propositions=config.propositions)
    abilities = Abilities(capacity, rules, EncodeCapacity(), {sae.digest: "topk"})
    cpu = torch.device("cpu")
    worker = DeviceWorker(config, 96, torch.float32, cpu, capacity, 2, rules=rules, encode=abilities.encode)
    footprint = worker.footprint()
    assert footprint.on_device
    assert footprint == memory.on_device(config, 96, abilities, drafts=2)
    assert footprint.fixed_bytes == worker.step.n_bytes
    assert footprint.reserved["whole dictionaries"] > 0
    table, slots = torch.zeros(8, 4, dtype=torch.int32), torch.zeros(128, dtype=torch.int64)
    assert worker.kept_bytes == 0
    worker.step.attach(Cache(table, slots, 16, 16 * 40))
    assert worker.kept_bytes == footprint.kept_per_token * 16 * 40


# -- how a budget is divided -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("available", [0, 1, 999, 10_000, 123_457, 2**33 + 17])
def test_blocks_and_what_is_kept_with_them_fill_the_budget_and_no_more(available: int) -> None:
    budget = Budget.of(available, 640, 16, 24)
    whole = 640 + 16 * 24
    assert budget.kv_bytes == 640 * budget.n_blocks
    assert budget.kv_bytes + budget.kept_bytes <= available < budget.kv_bytes + budget.kept_bytes + whole
    assert budget.share == (pytest.approx(16 * 24 / whole) if budget.n_blocks else 0)
    assert Budget.of(available, 640, 16, 0).n_blocks == available // 640


@pytest.mark.parametrize(
    ("explicit", "on_device", "taken"),
    [(None, False, True), (None, True, False), (10**6, False, False), (10**6, True, False)],
)
def test_what_a_measurement_cannot_have_seen_is_taken_off(
    explicit: int | None, on_device: bool, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages of a CPU's buffers count when they are written to; a GPU's buffers were there when it was profiled."""
    footprint = Footprint({"bank": 30_000}, {"work": 5_000}, {"bits": 8}, on_device)
    config = SimpleNamespace(cache_config=SimpleNamespace(kv_cache_memory_bytes=explicit))
    monkeypatch.setattr(counting, "block_of", lambda *_: (1000, 16))
    budget = counting.divide(config, {}, 10**6, footprint)
    assert budget == Budget.of(10**6 - 35_000 * taken, 1000, 16, 8)


def test_where_nothing_is_left_the_server_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SimpleNamespace(cache_config=SimpleNamespace(kv_cache_memory_bytes=None))
    monkeypatch.setattr(counting, "block_of", lambda *_: (1000, 16))
    with pytest.raises(counting.OutOfMemory, match=r"editing needs 1\.0 MiB and 8 bytes per token.*--bank-rows"):
        counting.divide(config, {}, 2**20, Footprint({"bank": 2**20}, {}, {"bits": 8}))


def test_a_worker_that_is_not_armed_answers_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = counting._counting(lambda worker: 12_345)
    armed = SimpleNamespace(additional_config={"editserver": CONFIG.as_dict()})
    monkeypatch.setattr(op, "_worker", None)
    assert answer(SimpleNamespace(vllm_config=armed)) == 12_345
    monkeypatch.setattr(op, "_worker", EngineWorker(CONFIG, 96, torch.float32, 8))
    assert answer(SimpleNamespace(vllm_config=SimpleNamespace(additional_config={}))) == 12_345


# -- on a real engine ------------------------------------------------------------------------------------------------


@pytest.mark.engine
def test_what_a_real_engine_allocates_is_what_was_counted(lab: Any) -> None:
    from tests.engine.gate_checks import gated
    from tests.engine.rule_checks import ruled
    from tests.engine.support import Ask, prompt_of

    prompt = prompt_of(4242, 50)
    for edits in (gated(lab, prompt), ruled(lab, prompt)):
        lab.engine.run([Ask(prompt, edits, max_tokens=3)])
    worker = op.current()
    assert isinstance(worker, EngineWorker)
    footprint = worker.footprint()
    assert sum(footprint.reserved.values()) == arrays_of(worker)
    config = lab.engine.scheduler.vllm_config
    specs = lab.engine.runner.get_kv_cache_spec()
    block = counting.block_of(config, specs)
    assert block is not None
    kv_config = lab.engine.scheduler.kv_cache_config
    assert block[0] * kv_config.num_blocks == kv_config.kv_cache_tensors[0].size
    slots = kv_config.num_blocks * block[1]
    words = [bits.shape[1] for bits in worker._kept._bits.values()]
    assert words, "no rule was heard"
    assert worker._memory._bits, "no gate was heard"
    assert worker.kept_bytes == 8 * slots * (len(worker._memory._bits) + sum(words))
    assert worker.kept_bytes <= footprint.kept_per_token * slots
    whole = [worker.dictionaries[digest] for digest in worker.dictionaries.whole]
    real = sum(
        sum({t.data_ptr(): t.nbytes for t in (sae.W_enc, sae.W_dec, *sae.gate.values())}.values())
        for sae in whole
        if sae.materialised
    )
    assert 0 < real <= footprint.on_demand["whole dictionaries"]
