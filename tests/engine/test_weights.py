"""Adapters and quantised weights: what is edited is the residual stream, whatever computed it.

Real ones: vLLM's CPU backend on the tiny model with LoRA adapters, and in each quantised format that this backend runs.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from interventions.oracle import select
from interventions.reference import _Pass
from tests.engine.engine_process import BLOCK, Answered, Asked, Start, run
from tests.engine.tiny import write_model
from tests.engine.tiny_cases import N_NEW, STEER, Bench, Made, features, prompt_of
from tests.engine.tiny_weights import (
    FORMATS,
    RANK,
    dequantised,
    int8_saturates,
    runs_here,
    write_adapter,
    write_quantised,
)

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def base(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(model, tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapted(model: Any, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """What the model with the first adapter is."""
    return Bench(write_adapter(model, folder.parent / "first", 1), tmp_path_factory.mktemp("adapted"))


# -- one process, one start after the other -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cases(base: Bench, adapted: Bench, folder: Path) -> dict[str, tuple[Bench, Made]]:
    """Every machinery with the adapter; plain and steered without it, and with the second one's weights behind its name."""
    with_it = adapted.cases(adapter=str(folder.parent / "first"))
    without = {"base plain": base.make(prompt_of(7)), "base steer": base.make(prompt_of(8), [STEER])}
    return {name: (adapted, made) for name, made in with_it.items()} | {n: (base, m) for n, m in without.items()}


QUANTISED: tuple[list[dict[str, Any]], ...] = (
    [STEER],
    [features("jumprelu/l1", [{"index": i, "op": "scale", "value": 0.0 if i % 2 else 2.0} for i in range(60)])],
    [features("topk/l1", [{"index": i, "op": "set", "value": 25.0} for i in (3, 50)])],
)


@pytest.fixture(scope="module")
def results(
    folder: Path, base: Bench, cases: dict[str, tuple[Bench, Made]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """By start, by step."""
    adapter, config = str(folder.parent / "first"), base.config.as_dict()
    toggled = [Asked(prompt_of(20 + i), None, N_NEW, f"toggled{i}") for i in range(4)]
    edited = [replace(one, salt=f"edited{i}") for i, one in enumerate(toggled)]
    edited[1] = replace(edited[1], payload=base.make(edited[1].prompt, [STEER]).asked.payload, adapter=adapter)
    toggled[1] = replace(toggled[1], adapter=adapter)
    one = base.make(prompt_of(30), [STEER]).asked
    matrix = [replace(one, payload=p, adapter=a) for p in (None, one.payload) for a in (None, adapter)]
    lora: dict[str, Any] = {"mixed": [made.asked for _, made in cases.values()]}
    lora |= {"toggled": toggled, "edited": edited}
    lora |= {f"cold {i}": [ask] for i, ask in enumerate(matrix)} | {f"warm {i}": [ask] for i, ask in enumerate(matrix)}
    flags = {"enable_lora": True, "max_lora_rank": max(8, RANK), "max_loras": 2}
    starts = {"lora": (Start(str(folder), config, list(lora.values()), flags), lora)}
    for name in filter(runs_here, FORMATS):
        steps: dict[str, Any] = {"watch": "watch"}
        for i, edits in enumerate(([], *QUANTISED)):
            steps |= {f"{i}": [base.make(prompt_of(40 + i), edits).asked], f"streams {i}": "watched"}
        written = write_quantised(folder, folder.parent / name, name)
        starts[name] = Start(str(written), config, list(steps.values()), {"dtype": "bfloat16"}), steps
    found = run([start for start, _ in starts.values()], tmp_path_factory.mktemp("run"))
    return {
        name: dict(zip(steps, one, strict=True)) for (name, (_, steps)), one in zip(starts.items(), found, strict=True)
    }


def test_edited_requests_with_an_adapter_answer_as_merged_weights_do(
    results: dict[str, dict[str, Any]], cases: dict[str, tuple[Bench, Made]]
) -> None:
    for (name, (bench, made)), answered in zip(cases.items(), results["lora"]["mixed"], strict=True):
        bench.assert_answered(made, answered, name)


def test_the_adapter_is_felt(adapted: Bench, base: Bench) -> None:
    a, b = (bench.reference.generate(prompt_of(0), None, 1).logprobs for bench in (adapted, base))
    assert float((a - b).abs().max()) > 0.5


def test_an_edited_row_with_an_adapter_changes_no_bit_of_its_neighbours(results: dict[str, dict[str, Any]]) -> None:
    toggled, edited = results["lora"]["toggled"], results["lora"]["edited"]
    for row in (0, 2, 3):
        assert (toggled[row].tokens, toggled[row].top) == (edited[row].tokens, edited[row].top)
    assert toggled[1].top != edited[1].top


def test_neither_adapters_nor_edits_share_a_prefix_with_others(results: dict[str, dict[str, Any]]) -> None:
    cold: list[Answered] = [results["lora"][f"cold {i}"][0] for i in range(4)]
    warm: list[Answered] = [results["lora"][f"warm {i}"][0] for i in range(4)]
    assert [one.cached for one in cold] == [0] * 4
    assert [one.cached for one in warm] == [BLOCK] * 4
    for one, other in zip(cold, warm, strict=True):
        assert one.tokens == other.tokens
        assert max(abs(one.top[0][t] - other.top[0][t]) for t in one.top[0]) < 1e-4
    assert len({tuple(one.top[0].items()) for one in cold}) == 4


@pytest.fixture
def quantised(name: str, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the steps of one format gave, by their names."""
    if name not in results:
        pytest.skip(f"vLLM's build for this CPU has no kernel for {name}")
    return results[name]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("case", range(len(QUANTISED)))
def test_an_edit_on_quantised_weights_is_the_oracles_on_the_engines_own_stream(
    quantised: dict[str, Any], base: Bench, case: int
) -> None:
    prompt = prompt_of(41 + case)
    made = base.make(prompt, QUANTISED[case])
    (answered,), streams = quantised[f"{case + 1}"], quantised[f"streams {case + 1}"]
    program = made.compiled.payload().program
    assert program is not None
    n_fed = len(prompt) + N_NEW - 1
    positions, ids = torch.arange(n_fed), torch.tensor([*prompt, *answered.tokens[:-1]])
    for at in program.layers:
        before, after = streams[0][at.layer]
        assert before.dtype == torch.bfloat16
        assert len(before) == n_fed
        state = _Pass(
            made.compiled.payload(), select(program.selectors, positions, ids, len(prompt)), positions, ids, 0
        )
        due = base.reference._edit(state, at, before)
        changed = (due != before).any(dim=1)
        assert changed[1:].all()
        assert torch.equal((after != before).any(dim=1), changed)
        assert torch.allclose(after.float(), due.float(), rtol=2**-7, atol=2**-7)
        assert float((after == due).float().mean()) > 0.99
        fired = state.layers[at.layer].fired
        assert answered.journal.stats(0, at.layer, n_fed).fired == int((fired & 1).sum())


NOISE = {"int8": 0.1, "fp8": 0.2, "int4": 0.1}
"""What activations lose that are quantised as they come, relative to the stream (int4's are quantised where the CPU has AMX)."""


@pytest.mark.parametrize("name", FORMATS)
def test_quantised_weights_are_those_of_the_checkpoint(quantised: dict[str, Any], model: Any, name: str) -> None:
    if name == "int8" and int8_saturates():
        pytest.skip(
            "vLLM's int8 product of 64 times 127 x 127 is wrong on this CPU (no VNNI): nothing says what to expect"
        )
    rounded = dequantised(model, name)
    (answered,), streams = quantised["0"], quantised["streams 0"]
    ids = torch.tensor([[*prompt_of(40), *answered.tokens[:-1]]])
    with torch.no_grad():
        due, unrounded = (m.model(ids, output_hidden_states=True).hidden_states for m in (rounded, model))
    for layer, (before, after) in streams[0].items():
        assert torch.equal(before, after)
        off = [
            float(((before - h[0]).norm(dim=1) / h[0].norm(dim=1)).median())
            for h in (due[layer + 1], unrounded[layer + 1])
        ]
        assert off[0] < NOISE[name], (name, layer)
        assert off[0] < 0.9 * off[1], (name, layer)
    assert sorted(streams[0]) == [1, 2]
    assert np.isfinite(answered.top[0][answered.tokens[0]])
