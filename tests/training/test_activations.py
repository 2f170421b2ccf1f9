"""Activations are the layers' own outputs; position 0, padding and massive tokens never reach the trainer."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from sae_weights.training import activations
from sae_weights.training.activations import (
    OUTLIER,
    Truncated,
    batches,
    cached,
    collect,
    decoder_layers,
    layers_path,
    windows,
)


def tiny_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


def expected_rows(layer, sequences):
    """Each sequence alone through the whole model, position 0 dropped."""
    model, rows = tiny_model(), []
    model.model.layers[layer].register_forward_hook(
        lambda _m, _i, out: rows.append((out[0] if isinstance(out, tuple) else out)[0, 1:])
    )
    with torch.inference_mode():
        for ids in sequences:
            model(input_ids=torch.tensor([ids]))
    return rows


SEQUENCES = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [20, 21, 22, 23], [30, 31, 32, 33, 34, 35, 36, 37]]


def in_order(sequences):
    """The sequences as the batches take them."""
    return [sequences[i] for members in batches(sequences) for i in members]


def test_truncated_model_gives_the_outputs_of_all_its_layers():
    found = collect(Truncated(tiny_model(), 2, 0, 3), SEQUENCES)
    for layer, part in zip((2, 0, 3), found, strict=True):
        expected = torch.cat(expected_rows(layer, in_order(SEQUENCES)))
        # bf16 storage of an fp32 model: half a unit in the eighth bit.
        torch.testing.assert_close(part.values.float(), expected, rtol=2**-8, atol=1e-6)


def test_layers_behind_the_deepest_hook_are_cut_off():
    model = tiny_model()
    Truncated(model, 1, 0)
    assert len(model.model.layers) == 2


def test_a_layer_outside_the_model_is_refused():
    with pytest.raises(ValueError, match=r"layer 4; the model has 0\.\.3"):
        Truncated(tiny_model(), 4)


def test_layers_are_found_in_other_model_families():
    config = GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=3, n_head=2)
    assert len(decoder_layers(GPT2LMHeadModel(config))) == 3


class Nested(torch.nn.Module):
    """``lists``: name of a module list → its length; the model has three layers."""

    def __init__(self, **lists):
        super().__init__()
        self.config = LlamaConfig(num_hidden_layers=3)
        for name, length in lists.items():
            setattr(self, name, torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(length)))


def test_lists_inside_the_layers_are_not_taken_for_them_and_twins_are_refused():
    model = Nested(layers=3)
    model.layers[0] = Nested(experts=3)
    assert layers_path(model) == "layers"
    with pytest.raises(ValueError, match="expected one list of 3 decoder layers, found text and vision"):
        layers_path(Nested(text=3, vision=3))
    with pytest.raises(ValueError, match="expected one list of 3 decoder layers, found none"):
        layers_path(Nested(layers=4))


def test_batching_and_padding_change_no_row():
    one = collect(Truncated(tiny_model(), 2), in_order(SEQUENCES), tokens_per_batch=1)[0].values.float()
    many = collect(Truncated(tiny_model(), 2), SEQUENCES, tokens_per_batch=1000)[0].values.float()
    assert one.shape == many.shape == (sum(len(s) - 1 for s in SEQUENCES), 16)
    by_norm = [rows[rows[:, 0].argsort()] for rows in (one, many)]
    torch.testing.assert_close(*by_norm, rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 9, 50, 10_000])
def test_every_sequence_is_in_one_batch(tokens):
    sequences = [[1] * (3 + i % 7) for i in range(40)]
    made = batches(sequences, tokens)
    assert sorted(i for members in made for i in members) == list(range(40))
    assert all(len(m) == 1 or len(m) * max(len(sequences[i]) for i in m) <= tokens for m in made)


class Scripted:
    """Stands for the model: token id i gets an activation of norm i."""

    layers = (0,)

    def __call__(self, input_ids, attention_mask):
        return [torch.nn.functional.one_hot(torch.zeros_like(input_ids), 4).float() * input_ids[..., None]]


def test_position_zero_and_outliers_are_dropped_and_counted():
    huge = int(OUTLIER * 110)  # 1001 would round to 1000 in bf16
    (found,) = collect(Scripted(), [[5000, 99, 100, 101, huge], [7000, 100, 100, 100, 1000]])
    assert found.median_norm == 100.0
    assert found.dropped == 1
    # The bound itself is ordinary: 1000 = 10 × 100. Position 0 (5000, 7000) is gone without being counted as outlier.
    assert sorted(found.values.float().norm(dim=1).tolist())[-1] == 1000.0
    assert len(found.values) == 7


MANY = [[(7 * i + j) % 60 for j in range(5 + i % 9)] for i in range(60)]


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(activations, "TOKENS_PER_BATCH", 64)
    real = activations.batches
    monkeypatch.setattr(activations, "batches", lambda sequences, tokens=64: real(sequences, tokens))


def test_cached_activations_are_the_collected_ones(tmp_path, small_batches):
    kept = cached(tiny_model, (1, 3), MANY, tmp_path / "part")
    for layer, part in zip((1, 3), kept, strict=True):
        (whole,) = collect(Truncated(tiny_model(), layer), MANY, tokens_per_batch=64)
        assert torch.equal(part.values, whole.values)
    again = cached(lambda: pytest.fail("read the model again"), (1, 3), MANY, tmp_path / "part")
    assert torch.equal(again[0].values, kept[0].values)


def test_a_stopped_reading_goes_on_in_the_batch_it_was_in(tmp_path, small_batches):
    whole = cached(tiny_model, (1, 3), MANY, tmp_path / "whole")

    class Stop(Exception):
        pass

    calls = []

    def stop(done, total):
        calls.append(done)
        if len(calls) == 3:
            raise Stop

    with pytest.raises(Stop):
        cached(tiny_model, (1, 3), MANY, tmp_path / "part", report=stop)
    with (tmp_path / "part-l1.bf16").open("ab") as file:
        file.write(b"half a batch")  # written before the power went
    resumed = cached(tiny_model, (1, 3), MANY, tmp_path / "part")
    for a, b in zip(whole, resumed, strict=True):
        assert torch.equal(a.values, b.values)


def test_a_work_folder_of_another_text_is_refused(tmp_path, small_batches):
    cached(tiny_model, (1,), MANY, tmp_path / "part")
    with pytest.raises(ValueError, match="belongs to a run with other text or layers"):
        cached(tiny_model, (1,), MANY[:20], tmp_path / "part")
    with pytest.raises(ValueError, match="belongs to a run with other text or layers"):
        cached(tiny_model, (2,), MANY, tmp_path / "part")


def test_windows_cut_texts_and_drop_a_short_rest():
    assert [len(w) for w in windows(list(range(300)), 128)] == [128, 128, 44]
    assert [len(w) for w in windows(list(range(260)), 128)] == [128, 128]
    assert list(windows(list(range(40)), 20))[1] == list(range(20, 40))
