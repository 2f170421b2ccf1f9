"""The type that models are run in while their activations are read."""

from __future__ import annotations

import pytest
import torch

from sae_weights.precision import quick_dtype


@pytest.mark.parametrize(("multiplies", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_cpu_without_bfloat16_products_runs_float32(multiplies, dtype, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: multiplies)
    assert quick_dtype() == quick_dtype("cpu") == quick_dtype(torch.device("cpu")) == dtype
    assert quick_dtype("cuda:0") == torch.bfloat16
