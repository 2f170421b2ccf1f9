"""Dictionaries that tests make: random features, scaled so that a few of them fire on the demo model's residual stream."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sae_weights.architectures import ARCHITECTURES as ALL
from sae_weights.formats import save_native
from sae_weights.hook import Hook
from sae_weights.sae import SAE

N_FEATURES = 96
ARCHITECTURES = ("standard", "jumprelu", "gated", "topk")
WHOLE = (
    "abstopk", "glu", "gradient", "groupmax", "itda", "matching_pursuit", "plain_topk", "polysae", "top_afa", "vsae",
)  # fmt: skip
"""The dictionary-wide architectures besides TopK."""
THRESHOLD = 1.8
"""Calibrated by hand: about as many of a TopK dictionary's latents pass it as are members."""


def random_sae(
    architecture: str,
    d: int,
    *,
    n: int = N_FEATURES,
    layer: int = 0,
    input_norm: Any = "none",
    encoder: float = 0.2,
    decoder: float = 3.0,
    seed: int = 0,
    settings: dict[str, Any] | None = None,
    metadata: dict[str, Any] | None = None,
) -> SAE:
    """A canonical SAE of any architecture, its encoder and decoder rows of these norms, about a third of it on."""
    random = torch.Generator().manual_seed(1000 * layer + seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    form = ALL[architecture]
    rows = torch.nn.functional.normalize(normal(n, d), dim=1)
    own = torch.nn.functional.normalize(normal(n, d), dim=1) * encoder
    gate = {name: 0.5 * normal(n) for name in form.gate_tensors}
    extras, settings, k = {}, settings or {}, max(1, n // 8) if form.needs_k else None
    if "threshold" in form.gate_tensors:
        gate["threshold"] = torch.rand(n, generator=random)
    if form.tied:  # coefficients are projections on unit atoms
        gate["b_enc"] = torch.zeros(n)
        decoder, own = 1.0, None
    if architecture == "matching_pursuit":
        settings = {"max_iterations": n // 8, "residual_threshold": 0.01}
    if architecture == "vsae":
        settings = {"signed": True}
    if architecture == "top_afa":  # as many latents as explain the norm: they must be able to
        own = own * 25 * math.sqrt(d) / n * 3 / decoder
        gate["b_enc"] = torch.zeros(n)
    if architecture == "glu":
        gate |= {"W_glu": normal(n, d) * 0.05, "b_glu": normal(n)}
        settings = {"k": n // 8}
    if architecture == "polysae":
        ranks = {"1": 24, "2": 10, "3": 5}
        gate |= {f"U{i}": normal(n, r) / math.sqrt(r) for i, r in ranks.items()}
        extras = {f"C{i}": torch.linalg.qr(normal(max(d, r), r))[0][:d] * decoder for i, r in ranks.items()}
        settings = {"k": n // 8, "lambda2": 0.2, "lambda3": 0.05}
        rows, decoder = gate["U1"] @ extras["C1"].T, 1.0
    return SAE.from_tensors(
        architecture=architecture,
        hook=Hook("resid_post", layer),
        W_enc=own,
        W_dec=rows * decoder,
        b_dec=torch.zeros(d) if form.tied else 0.1 * normal(d),
        gate=gate,
        extras=extras,
        settings=settings,
        input_norm=input_norm,
        k=k,
        metadata=metadata,
    )


def write_native(folder: Path, layer: int, architecture: str, d_model: int, **fields: Any) -> Path:
    """:func:`random_sae` in the feature-major layout of ``editserver sae import``."""
    return save_native(random_sae(architecture, d_model, layer=layer, **fields), folder)


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
