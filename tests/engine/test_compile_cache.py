"""Promise on torch.compile's cache: servers with and without edits, and with other armed layers, may share one.

A cached graph without the op would silently serve unedited answers; one with the op at another layer, wrong ones. Every
start is compared in fp32 with plain ``transformers`` and the pure functions.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from editserver.engine.config import EngineConfig
from editserver.engine.memory import Budget, kept_per_token
from interventions.program import Channel, LayerProgram, Op, Payload, Program, ReadKind, vector_key
from interventions.reference import ReferenceExecutor
from interventions.selectors import ALL
from tests.engine.tiny import D_MODEL, N_LAYERS, Job, Result, run_all, write_model

pytestmark = pytest.mark.engine

PROMPT = [1, *range(40, 60)]
FOUND = re.compile(r"(?:Directly load AOT compilation from path|due to a load failure from) (\S+?/model)\b")
"""What vLLM logs when its cache has an entry for this start. On a CPU, vLLM 0.32 finds the entry, cannot use its outer
layer (``'function' object has no attribute 'finalize_loading'``), and builds it anew around the cached Inductor graphs."""
SAVED = re.compile(r"saved AOT compiled function to (\S+?/model)\b")
SIZED = re.compile(r"KV cache size: ([\d,]+) tokens")
STARTS = ("without", "with layer 1", "with layer 2", "with layer 1 again", "without again")


def steering(layer: int) -> Payload:
    """A vector added at ``layer``, for every token but position 0."""
    v = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(layer)).numpy().astype("<f4").tobytes()
    op = Op(1.0, 4.0, -math.inf, math.inf, False, 0, 0)
    at = LayerProgram(layer, (Channel(ReadKind.NONE, vector_key(v), (op,)),))
    program = Program((at,), (ALL,), {vector_key(v): v})
    return Payload(program, (), program.digest())


@dataclass(frozen=True)
class Start:
    """One server's answers to: plain, edited at its own layer, edited at the other one; and the cache after it."""

    result: Result
    entries: frozenset[str]
    """vLLM's entries in the cache, after this start."""
    graphs: frozenset[str]
    """Inductor's compiled graphs in the cache, after this start."""


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def starts(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Start]:
    """Five servers, one after the other, torch.compile on, one cache."""
    root = tmp_path_factory.mktemp("cache")
    jobs = []
    for name in STARTS:
        armed = [int(word) for word in name.split() if word.isdigit()] or None
        payloads = [None, *(steering(layer).to_bytes().hex() for own in armed or () for layer in (own, 3 - own))]
        plugins = {"VLLM_PLUGINS": ""} if armed is None else {}
        jobs.append(Job(str(tiny_model), armed, [(PROMPT, p) for p in payloads], environment=plugins))
    environment = {"VLLM_CACHE_ROOT": str(root / "vllm"), "TORCHINDUCTOR_CACHE_DIR": str(root / "inductor")}
    found = {}
    for name, result in zip(STARTS, run_all(jobs, root / "starts", environment), strict=True):
        entries = frozenset(path for path in result.cached if path.endswith("/model"))
        found[name] = Start(result, entries, frozenset(path for path in result.cached if "/fxgraph/" in path))
    return found


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> ReferenceExecutor:
    from transformers import AutoModelForCausalLM

    return ReferenceExecutor(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32))


def assert_reference(reference: ReferenceExecutor, result: Result, i: int, payload: Payload | None) -> None:
    expected = reference.generate(PROMPT, payload, max_tokens=4)
    assert result.answers[i].get("tokens") == expected.token_ids, result.answers[i]
    for step, top in zip(expected.logprobs, result.top(i), strict=True):
        assert max(abs(float(step[token]) - value) for token, value in top.items()) < 1e-3


def difference(result: Result, i: int, j: int) -> float:
    a, b = result.top(i)[0], result.top(j)[0]
    return max((abs(a[t] - b[t]) for t in a.keys() & b.keys()), default=math.inf)


@pytest.mark.parametrize("name", STARTS)
def test_plain_answers_are_right_in_every_start(
    starts: dict[str, Start], reference: ReferenceExecutor, name: str
) -> None:
    assert_reference(reference, starts[name].result, 0, None)


@pytest.mark.parametrize("name", ["without", "without again"])
def test_without_the_plugin_nothing_of_ours_is_loaded(starts: dict[str, Start], name: str) -> None:
    result = starts[name].result
    assert result.editserver_modules == []
    assert not result.op_registered


@pytest.mark.parametrize(("name", "layer"), [("with layer 1", 1), ("with layer 2", 2), ("with layer 1 again", 1)])
def test_edits_act_at_the_armed_layer_of_this_start_and_nowhere_else(
    starts: dict[str, Start], reference: ReferenceExecutor, name: str, layer: int
) -> None:
    result, other = starts[name].result, 3 - layer
    assert [(h["ok"], h["armed"]) for h in result.handshakes] == [(True, [layer])]
    assert_reference(reference, result, 1, steering(layer))
    assert difference(result, 0, 1) >= 0.1
    assert result.fired[1][str(layer)] == len(PROMPT) + 4 - 2
    assert f"the program touches the layers [{other}], armed are [{layer}]" in result.answers[2]["error"]


def test_starts_that_differ_do_not_share_an_entry(starts: dict[str, Start]) -> None:
    first, one, two = (starts[name] for name in STARTS[:3])
    assert first.entries < one.entries < two.entries
    assert first.graphs < one.graphs < two.graphs
    assert len(two.entries) == 3
    for start in (first, one, two):
        assert not FOUND.search(start.result.log), "nothing of this start's own was in the cache yet"
    assert two.entries == {path for start in (first, one, two) for path in SAVED.findall(start.result.log)}


@pytest.mark.parametrize(("again", "before"), [("with layer 1 again", "with layer 1"), ("without again", "without")])
def test_equal_starts_meet_what_was_compiled_before(starts: dict[str, Start], again: str, before: str) -> None:
    assert FOUND.findall(starts[again].result.log) == SAVED.findall(starts[before].result.log)
    assert starts[again].entries == starts["with layer 2"].entries
    assert starts[again].graphs == starts["with layer 2"].graphs, "no graph was compiled again"
    assert starts[again].result.answers == starts[before].result.answers, "bit for bit"


def test_the_kv_cache_is_smaller_by_what_is_kept_along_with_it(starts: dict[str, Start]) -> None:
    """Not of the compile cache, but these starts show it: with the same GiB, and without editserver as without the plugin."""
    per_token = 2 * N_LAYERS * 2 * (D_MODEL // 4) * 4
    kept = sum(kept_per_token(EngineConfig((1,))).values())
    for name, start in starts.items():
        (tokens,) = {int(found.replace(",", "")) for found in SIZED.findall(start.result.log)}
        block = 128  # vLLM's default on a CPU
        assert tokens == block * Budget.of(2**30, block * per_token, block, 0 if "without" in name else kept).n_blocks
        assert ("bytes per token for gates and rules" in start.result.log) == ("without" not in name)
