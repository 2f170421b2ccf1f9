"""Promises 2 and 3 for gates: what they have heard survives prefix hits, chunks and preemption."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from editserver.engine.compat.core import _salted
from editserver.engine.compat.kv_groups import whole_group
from editserver.engine.config import EngineConfig
from editserver.engine.wire import KEY
from interventions.program import Payload
from interventions.selectors import Selector
from tests.engine import checks
from tests.engine.gate_checks import gated
from tests.engine.lab import Lab
from tests.engine.support import Ask, prompt_of

pytestmark = pytest.mark.engine


def test_a_prefix_hit_brings_the_state_of_the_gates_with_it(lab: Lab) -> None:
    checks.gated_prefix(lab)


@pytest.mark.parametrize("size", [17, 64])
def test_gates_open_at_the_same_token_at_every_chunk_size(lab: Lab, size: int) -> None:
    checks.gated_chunks(lab, size)


def test_preempted_requests_have_the_same_gates_when_they_come_back(lab: Lab) -> None:
    checks.gated_preempted(lab)


def test_where_nothing_keeps_hit_bits_with_the_kv_a_gated_request_reads_no_prefix(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As behind a sliding window or next to recurrent states: slower, never wrong."""
    from editserver.engine.compat import core, runner

    for module in (core, runner):
        monkeypatch.setattr(module, "whole_group", lambda config: None)
    ask = Ask(prompt_of(730, 70), gated(lab, prompt_of(730, 70)), max_tokens=3)
    other = Ask(ask.prompt, max_tokens=3)
    lab.engine.reset_cache()
    first, again = (lab.engine.run([ask])[0] for _ in range(2))
    assert (first.cached, again.cached) == (0, 0)
    assert first.same_bits(again)
    assert [lab.engine.run([other])[0].cached for _ in range(2)] == [0, 64], "plain requests share as ever"


def test_only_a_cache_of_whole_sequences_keeps_hit_bits(lab: Lab) -> None:
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec, RSWASpec, SlidingWindowSpec

    sizes = {"block_size": 32, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
    full, window = FullAttentionSpec(**sizes), SlidingWindowSpec(**sizes, sliding_window=64)
    state = MambaSpec(block_size=32, shapes=((4,),), dtypes=(torch.float32,))

    def group(*specs: object) -> int | None:
        return whole_group(SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=s) for s in specs]))

    assert whole_group(lab.engine.scheduler.kv_cache_config) == 0
    assert [group(full), group(window, full), group(window), group(full, state), group()] == [0, 1, None, None, None]
    assert group(RSWASpec(**sizes, rswa_window=64)) is None


def test_a_payload_with_unresolved_mentions_is_refused(lab: Lab) -> None:
    from vllm import SamplingParams

    compiled = lab.engine.compile(Ask([1, 2, 3], [{"type": "steer", "values": [1.0] * 576, "layer": 15}]))
    program = compiled.program
    assert program is not None
    program = type(program)(program.layers, (Selector(inside=((2, 3),)),), program.vectors)
    for sent in (program, program.resolved([1, 2, 3])):
        params = SamplingParams(max_tokens=1, extra_args={KEY: Payload(sent, (), sent.digest()).to_bytes()})
        request = SimpleNamespace(sampling_params=params, prompt_token_ids=[1, 2, 3], cache_salt=None)
        if sent is program:
            with pytest.raises(ValueError, match="must be resolved to positions"):
                _salted(request, EngineConfig.of(lab.engine.core.vllm_config))
        else:
            _salted(request, EngineConfig.of(lab.engine.core.vllm_config))
            assert request.cache_salt is not None
