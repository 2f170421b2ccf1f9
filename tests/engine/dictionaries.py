"""Dictionaries that tests make: random features, scaled so that a few of them fire on the demo model's residual stream."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

N_FEATURES = 96
ARCHITECTURES = ("standard", "jumprelu", "gated", "topk")


def write_sae(folder: Path, layer: int, architecture: str, d_model: int, *, norm: str = "none", seed: int = 0) -> Path:
    """A SAELens folder with ``N_FEATURES`` latents at ``resid_post`` of ``layer``; about a third of them fire per token."""
    generator = torch.Generator().manual_seed(1000 * layer + seed)
    n = N_FEATURES
    w_dec = torch.nn.functional.normalize(torch.randn(n, d_model, generator=generator), dim=1) * 3
    # Encoder rows of norm 0.2: on tokens of norm 100 to 500 pre-activations are a few units wide.
    w_enc = torch.nn.functional.normalize(torch.randn(n, d_model, generator=generator), dim=1) * 0.2
    if norm != "none":
        w_enc *= 5
    b_enc = 0.5 * torch.randn(n, generator=generator)
    tensors = {"W_enc": w_enc.T.contiguous(), "W_dec": w_dec, "b_dec": 0.1 * torch.randn(d_model, generator=generator)}
    config: dict[str, object] = {
        "architecture": architecture,
        "d_in": d_model,
        "d_sae": n,
        "dtype": "float32",
        "apply_b_dec_to_input": True,
        "normalize_activations": norm,
        "reshape_activations": "none",
        "metadata": {"hook_name": f"blocks.{layer}.hook_resid_post"},
    }
    if architecture == "gated":
        tensors |= {"b_gate": b_enc, "b_mag": b_enc + 0.3, "r_mag": 0.1 * torch.randn(n, generator=generator)}
    else:
        tensors["b_enc"] = b_enc
    if architecture == "jumprelu":
        tensors["threshold"] = torch.rand(n, generator=generator)
    if architecture == "topk":
        config |= {"k": 12, "rescale_acts_by_decoder_norm": False}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder
