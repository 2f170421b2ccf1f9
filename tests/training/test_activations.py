"""Activations are the layer's own output; position 0, padding and massive tokens never reach the trainer."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sae_weights.training.activations import OUTLIER, Truncated, collect, windows


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


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_truncated_model_gives_that_layers_output(layer):
    found = collect(Truncated(tiny_model(), layer), SEQUENCES, batch=2)
    by_length = sorted(SEQUENCES, key=len)
    expected = torch.cat(expected_rows(layer, by_length))
    # bf16 storage of an fp32 model: half a unit in the eighth bit.
    torch.testing.assert_close(found.values.float(), expected, rtol=2**-8, atol=1e-6)


def test_batching_and_padding_change_no_row():
    one, many = (collect(Truncated(tiny_model(), 2), SEQUENCES, batch=size).values.float() for size in (1, 4))
    assert one.shape == many.shape == (sum(len(s) - 1 for s in SEQUENCES), 16)
    torch.testing.assert_close(one, many, rtol=2**-7, atol=1e-5)


class Scripted:
    """Stands for the model: token id i gets an activation of norm i."""

    def __call__(self, input_ids, attention_mask):
        return torch.nn.functional.one_hot(torch.zeros_like(input_ids), 4).float() * input_ids[..., None]


def test_position_zero_and_outliers_are_dropped_and_counted():
    huge = int(OUTLIER * 110)  # 1001 would round to 1000 in bf16
    found = collect(Scripted(), [[5000, 99, 100, 101, huge], [7000, 100, 100, 100, 1000]])
    assert found.median_norm == 100.0
    assert found.dropped == 1
    # The bound itself is ordinary: 1000 = 10 × 100. Position 0 (5000, 7000) is gone without being counted as outlier.
    assert sorted(found.values.float().norm(dim=1).tolist())[-1] == 1000.0
    assert len(found.values) == 7


def test_windows_cut_texts_and_drop_a_short_rest():
    assert [len(w) for w in windows(list(range(300)), 128)] == [128, 128, 44]
    assert [len(w) for w in windows(list(range(260)), 128)] == [128, 128]
    assert list(windows(list(range(40)), 20))[1] == list(range(20, 40))
