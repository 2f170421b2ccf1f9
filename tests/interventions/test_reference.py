"""The reference executor on a tiny random Llama: hooks, phases, receipts and readings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from interventions.compile import compile_request
from interventions.errors import InterventionError
from interventions.reference import ReferenceExecutor
from interventions.spec import parse_inspect, parse_interventions

D, VOCAB = 32, 60
PROMPT = [1, 7, 12, 5, 33, 20]
RAMP = [0.2 * (i - 9) for i in range(D)]
STEER = {"type": "steer", "layer": 1, "values": RAMP}


def tiny_llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=D,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture
def small(make_server):
    return make_server(d_model=D, n_layers=3, armed_layers=(0, 1, 2), vocab_size=VOCAB)


@pytest.fixture
def executor(model, small):
    return ReferenceExecutor(model, {offered.sae.digest: offered.sae for offered in small.saes.values()})


@pytest.fixture
def payload(small):
    def build(*interventions, inspect=None):
        return compile_request(parse_interventions(list(interventions)), parse_inspect(inspect), small).payload()

    return build


def plain_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def hooked_logits(model, ids, layer, change):
    """Logits with ``change(hidden [t, d])`` applied by a bare forward hook."""

    def hook(_module, _inputs, output):
        hidden = output[0] if isinstance(output, tuple) else output
        changed = change(hidden[0])[None]
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = model.model.layers[layer].register_forward_hook(hook)
    try:
        return plain_logits(model, ids)
    finally:
        handle.remove()


def test_without_a_payload_it_is_the_model(executor, model, payload):
    assert torch.equal(executor.forward(PROMPT, len(PROMPT)).logits, plain_logits(model, PROMPT))
    assert torch.equal(executor.forward(PROMPT, len(PROMPT), payload()).logits, plain_logits(model, PROMPT))


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_steering_is_a_forward_hook_on_the_decoder_layer(executor, model, payload, layer):
    def change(hidden):
        return torch.cat([hidden[:1], hidden[1:] + 1.5 * torch.tensor(RAMP)])

    expected = hooked_logits(model, PROMPT, layer, change)
    got = executor.forward(PROMPT, len(PROMPT), payload({**STEER, "layer": layer, "strength": 1.5}))
    torch.testing.assert_close(got.logits, expected, rtol=1e-5, atol=1e-5)
    assert (got.logits - plain_logits(model, PROMPT)).abs().max() > 0.1
    assert list(got.layers) == [layer]


def test_hooks_are_gone_afterwards(executor, model, payload):
    before = plain_logits(model, PROMPT)
    executor.forward(PROMPT, len(PROMPT), payload(STEER, inspect={"sae": "relu", "top_k": 2}))
    assert torch.equal(plain_logits(model, PROMPT), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_edit_that_never_fires_is_bit_identical_to_no_edit(small, payload, dtype):
    model = tiny_llama(dtype)
    executor = ReferenceExecutor(model, {offered.sae.digest: offered.sae for offered in small.saes.values()})
    idle = payload({**STEER, "mode": "cap", "min": -1e6, "max": 1e6})
    result = executor.forward(PROMPT, len(PROMPT), idle)
    assert torch.equal(result.logits, plain_logits(model, PROMPT).float())
    assert result.stats(0, 1).fired == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unselected_tokens_before_the_edit_keep_their_logits(small, payload, dtype):
    model = tiny_llama(dtype)
    result = ReferenceExecutor(model).forward(PROMPT, len(PROMPT), payload({**STEER, "tokens": {"from": 3}}))
    plain = plain_logits(model, PROMPT).float()
    assert torch.equal(result.logits[:3], plain[:3])
    assert (result.logits[3:] != plain[3:]).any(dim=-1).all()


def test_phases_follow_the_prompt_length_not_the_pass(executor, payload):
    ids = [*PROMPT, 9, 4, 30]
    on_generated = executor.forward(ids, len(PROMPT), payload({**STEER, "tokens": "generated"}))
    on_slice = executor.forward(ids, len(PROMPT), payload({**STEER, "tokens": {"from": len(PROMPT)}}))
    assert torch.equal(on_generated.logits, on_slice.logits)
    on_all = executor.forward(ids, len(ids), payload({**STEER, "tokens": "prompt"}))
    everywhere = executor.forward(ids, len(PROMPT), payload(STEER))
    assert torch.equal(on_all.logits, everywhere.logits)


def test_generation_is_greedy_and_stops(executor, model):
    result = executor.generate(PROMPT, max_tokens=6)
    ids = list(PROMPT)
    for _ in range(6):
        ids.append(int(plain_logits(model, ids)[-1].argmax()))
    assert result.token_ids == ids[len(PROMPT) :]
    assert result.logprobs.shape == (6, VOCAB)
    torch.testing.assert_close(result.logprobs.exp().sum(dim=-1), torch.ones(6))
    stopped = executor.generate(PROMPT, max_tokens=6, stop_token_ids=[result.token_ids[2]])
    assert stopped.token_ids == result.token_ids[: result.token_ids.index(result.token_ids[2]) + 1]


def test_recomputing_all_tokens_equals_feeding_one_at_a_time_into_a_cache(executor, model, payload):
    """The edited KV of earlier tokens never changes: a cached decode loop with the same hook gives the same tokens."""
    steered = payload({**STEER, "strength": 2.0, "tokens": ["prompt", "generated"]})
    reference = executor.generate(PROMPT, steered, max_tokens=6)
    position = 0

    def hook(_module, _inputs, output):
        nonlocal position
        hidden = output[0] if isinstance(output, tuple) else output
        edited = hidden + 2.0 * torch.tensor(RAMP)
        if position == 0:
            edited[:, 0] = hidden[:, 0]
        position += hidden.shape[1]
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    handle = model.model.layers[1].register_forward_hook(hook)
    try:
        with torch.no_grad():
            cached, ids, logprobs = None, torch.tensor([PROMPT]), []
            for _ in range(6):
                out = model(ids, past_key_values=cached, use_cache=True)
                cached = out.past_key_values
                logprobs.append(out.logits[0, -1].log_softmax(dim=-1))
                ids = logprobs[-1].argmax().reshape(1, 1)
    finally:
        handle.remove()
    torch.testing.assert_close(reference.logprobs, torch.stack(logprobs), rtol=1e-3, atol=1e-3)


def test_generated_leaves_the_first_answer_token_alone(executor, payload):
    plain = executor.generate(PROMPT, max_tokens=4)
    strong = {**STEER, "strength": 20.0}
    later = executor.generate(PROMPT, payload({**strong, "tokens": "generated"}), max_tokens=4)
    assert torch.equal(later.logprobs[0], plain.logprobs[0])
    assert not torch.equal(later.logprobs[1], plain.logprobs[1])
    from_last = executor.generate(
        PROMPT, payload({**strong, "tokens": ["last_prompt_token", "generated"]}), max_tokens=4
    )
    assert not torch.equal(from_last.logprobs[0], plain.logprobs[0])


def test_receipts_count_what_was_fed(executor, payload, small):
    built = compile_request(parse_interventions([STEER, {**STEER, "tokens": "prompt"}]), [], small)
    result = executor.generate(PROMPT, built.payload(), max_tokens=5)
    fed = [*PROMPT, *result.token_ids[:-1]]
    selector = built.entries[0].selector
    assert selector.count(fed, len(PROMPT)) == (len(PROMPT) + 5 - 2, len(PROMPT) - 1)
    stats = [result.forward.stats(i, 1) for i in (0, 1)]
    assert [s.fired for s in stats] == [len(PROMPT) + 5 - 2, len(PROMPT) - 1]
    doses = result.forward.layers[1].dose
    assert stats[0].dose_max == float(doses.max())
    assert abs(stats[1].dose_mean - float(doses[1 : len(PROMPT)].mean())) < 1e-6
    assert result.forward.stats(0, 2).fired == 0


def test_readings_are_pre_edit_at_their_own_layer_and_see_earlier_edits(executor, payload, small, model):
    sae = small.saes["relu"].sae
    captured = {}

    def keep(_module, _inputs, output):
        captured["h"] = (output[0] if isinstance(output, tuple) else output)[0]

    for edited_layer in (0, 1):
        steer = {**STEER, "layer": edited_layer, "strength": 3.0}
        # bare hook: the edit of layer 0 is upstream of the reading at layer 1, an edit of layer 1 is not
        if edited_layer == 0:
            handle = model.model.layers[1].register_forward_hook(keep)
            hooked_logits(model, PROMPT, 0, lambda x: torch.cat([x[:1], x[1:] + 3.0 * torch.tensor(RAMP)]))
        else:
            handle = model.model.layers[1].register_forward_hook(keep)
            plain_logits(model, PROMPT)
        handle.remove()
        f = sae.encode(captured["h"])
        result = executor.forward(
            PROMPT, len(PROMPT), payload(steer, inspect={"sae": "relu", "features": [4, 0], "top_k": 3})
        )
        (readings,) = result.readings
        assert [position for position, _ in readings] == [1, 2, 3, 4, 5]
        for position, pairs in readings:
            assert [index for index, _ in pairs[:2]] == [4, 0]
            np.testing.assert_allclose([v for _, v in pairs], f[position, [i for i, _ in pairs]], rtol=1e-4, atol=1e-4)
            assert all(value != 0 and index not in (4, 0) for index, value in pairs[2:])
            top = set(f[position].abs().topk(3).indices.tolist()) - {0, 4}
            assert {index for index, _ in pairs[2:]} == {i for i in top if f[position, i] != 0}


def test_after_reads_the_edited_stream(executor, payload):
    edit = {"type": "edit_features", "sae": "relu", "features": [{"index": 3, "op": "add", "value": 4}]}
    for tokens in ("all", {"from": 3, "to": 5}):
        asked = {"sae": "relu", "features": [3], "tokens": tokens}
        before = executor.forward(PROMPT, len(PROMPT), payload(edit, inspect=asked)).readings[0]
        after = executor.forward(PROMPT, len(PROMPT), payload(edit, inspect={**asked, "after": True})).readings[0]
        plain = executor.forward(PROMPT, len(PROMPT), payload(inspect=asked)).readings[0]
        assert before == plain
        assert [position for position, _ in after] == [position for position, _ in before]
        assert after != before


def test_a_listed_feature_is_reported_once_even_if_it_is_among_the_largest(executor, payload):
    top = executor.forward(PROMPT, 6, payload(inspect={"sae": "relu", "top_k": 3})).readings[0]
    first = [pairs[0][0] for _, pairs in top]
    asked = {"sae": "relu", "top_k": 3, "features": sorted(set(first))}
    for (_, alone), (_, pairs) in zip(
        top, executor.forward(PROMPT, 6, payload(inspect=asked)).readings[0], strict=True
    ):
        indices = [index for index, _ in pairs]
        assert len(indices) == len(set(indices))
        assert set(indices) == set(asked["features"]) | {index for index, _ in alone}


@pytest.mark.parametrize(
    ("tokens", "expected"), [("prompt", [1, 2, 3, 4, 5]), ("generated", [6, 7]), ("last_prompt_token", [5])]
)
def test_readings_select_by_phase(executor, payload, tokens, expected):
    asked = payload(inspect={"sae": "relu", "features": [3], "tokens": tokens})
    readings = executor.forward([*PROMPT, 3, 9], len(PROMPT), asked).readings[0]
    assert [position for position, _ in readings] == expected


def test_inspection_omits_position_zero_unless_asked(executor, payload):
    asked = {"sae": "relu", "features": [3]}
    assert executor.forward(PROMPT, 6, payload(inspect=asked)).readings[0][0][0] == 1
    assert executor.forward(PROMPT, 6, payload(inspect={**asked, "include_bos": True})).readings[0][0][0] == 0


def test_topk_edits_and_readings_run_through_the_full_encode(executor, payload, small):
    sae = small.saes["topk"].sae
    edit = {"type": "edit_features", "sae": "topk", "features": [{"index": 3, "op": "set", "value": 2}]}
    result = executor.forward(PROMPT, len(PROMPT), payload(edit, inspect={"sae": "topk", "features": [3], "top_k": 5}))
    readings = result.readings[0]
    assert all(sum(value != 0 for _, value in pairs) <= sae.k for _, pairs in readings)
    delta = result.layers[1].delta
    for position, pairs in readings:
        expected = (2 - dict(pairs)[3]) * sae.W_dec[3]
        torch.testing.assert_close(delta[position], expected, rtol=1e-4, atol=1e-5)


def test_a_refusing_program_ends_the_pass(executor, payload, small):
    small.max_dose, small.refuse_over_dose = 1e-3, True
    with pytest.raises(InterventionError) as caught:
        executor.forward(PROMPT, len(PROMPT), payload(STEER))
    assert (caught.value.code, caught.value.status) == ("dose_exceeded", 400)
    assert "layer 1, position 1" in caught.value.message


def test_a_clamping_program_says_so_in_its_receipt(executor, payload, small):
    small.max_dose = 1e-3
    result = executor.forward(PROMPT, len(PROMPT), payload(STEER))
    stats = result.stats(0, 1)
    assert (stats.fired, stats.clamped) == (5, 5)
    assert abs(stats.dose_max - 1e-3) < 1e-6
