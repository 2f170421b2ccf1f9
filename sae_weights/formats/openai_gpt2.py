"""OpenAI's sparse_autoencoder for GPT-2 small: one .pt file per place and layer.

Layout: ``…/{location}[_v4 | _v5_32k | _v5_128k]/autoencoders/{layer}.pt``, a state dict, fp32::

    pre_bias [d], encoder.weight [n, d], latent_bias [n], decoder.weight [d, n]
    activation "TopK" | "ReLU", activation_state_dict {k: int, postact_fn: "ReLU"} (empty for ReLU)
    stats_last_nonzero [n] int64, latents_activation_frequency [n], latents_mean_square [n]: statistics

Folded, and why:

- The encoder sees x̃ − pre_bias; the decoder adds pre_bias.
- A TopK dictionary is one trained on layer-normed inputs: nothing else in the file says so, and the authors' loader decides
  by it too. Unbiased standard deviation + 1e-5, undone without the 1e-5. A ReLU dictionary has no norm.

Locations: resid_post_mlp is resid_post(L), resid_post_attn resid_mid(L), resid_delta_attn attn_out(L), resid_delta_mlp
mlp_out(L), mlp_post_act mlp.post(L). They come from TransformerLens with ``center_writing_weights=False``.

Source: github.com/openai/sparse_autoencoder 4965b94, model.py and paths.py (MIT). Gao et al. 2024, arXiv:2406.04093.
"""

from __future__ import annotations

import re
from pathlib import Path

from sae_weights.errors import SAEFormatError
from sae_weights.folding import Folding
from sae_weights.hook import Hook
from sae_weights.sae import SAE

from .base import Format, Hints
from .fields import shown
from .input_scale import PER_TOKEN, constant_scale
from .layout import Matrix, TensorRows
from .pickled import PickledFile

# activation.k: what the authors' state_dict() also writes of the activation, and their loader does not take.
_UNREAD = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square", "activation.k")
_LOCATIONS = {
    "mlp_post_act": "mlp.post",
    "resid_delta_attn": "attn_out",
    "resid_delta_mlp": "mlp_out",
    "resid_post_attn": "resid_mid",
    "resid_post_mlp": "resid_post",
}
_LOCATION = re.compile(rf"({'|'.join(_LOCATIONS)})(?![A-Za-z])")


class OpenAIGPT2(Format):
    """See the module."""

    name = "openai_gpt2"
    title = "OpenAI sparse_autoencoder (GPT-2)"
    files = "{layer}.pt (pre_bias, encoder.weight, latent_bias, decoder.weight)"
    reference = "github.com/openai/sparse_autoencoder"
    architectures = ("topk", "relu")

    def recognises(self, path: Path) -> bool:
        if path.suffix != ".pt" or not path.is_file():
            return False
        try:
            return {"pre_bias", "latent_bias", "encoder.weight"} <= PickledFile(path).shapes.keys()
        except (SAEFormatError, OSError):
            return False

    def open(self, path: Path, hints: Hints) -> SAE:
        file = PickledFile(path)
        activation = file.others.get("activation", "ReLU")
        after = file.others.get("activation_state_dict.postact_fn", "ReLU")
        if activation not in ("TopK", "ReLU"):
            raise SAEFormatError(f"{path}: 'activation' is {shown(activation)}; expected 'TopK' or 'ReLU'")
        if after != "ReLU":
            raise SAEFormatError(f"{path}: 'activation_state_dict.postact_fn' is {shown(after)}; expected 'ReLU'")
        topk = activation == "TopK"
        stated, k = _stated_hook(path), _k(file, hints) if topk else None
        return SAE(
            architecture="topk" if topk else "relu",
            hook=self.hook(path, hints, None if stated is None else stated.hook_name),
            source=TensorRows(
                file,
                encoder=Matrix("encoder.weight"),
                decoder=Matrix("decoder.weight", transposed=True),
                b_dec="pre_bias",
                gate={"b_enc": "latent_bias"},
                ignore=(*_UNREAD, "activation_state_dict.k"),
                what="OpenAI's layout",
            ),
            folding=Folding(
                input_scale=constant_scale(path, hints, unscalable=PER_TOKEN if topk else ""), subtract_b_dec=True
            ),
            input_norm="layer_norm" if topk else "none",
            k=k,
            metadata={"model_name": "gpt2-small"} if stated is not None else {},
        )


def _k(file: PickledFile, hints: Hints) -> int:
    name = "activation_state_dict.k"
    stored = float(file.tensor(name)) if file.shapes.get(name) == [] else None
    if stored is None or not stored.is_integer() or stored < 1:
        raise SAEFormatError(f"{file.path}: {name!r} is {stored}; expected a whole number of at least 1")
    if hints.k not in (None, int(stored)):
        raise SAEFormatError(f"{file.path}: {name!r} is {int(stored)} and the given k is {hints.k}; expected the same")
    return int(stored)


def _stated_hook(path: Path) -> Hook | None:
    """The place that the folders name, at the layer that the file is called after."""
    if not path.stem.isdigit() or len(path.stem) > 4:
        return None
    for part in reversed(path.absolute().parts[:-1]):
        if match := _LOCATION.search(part):
            return Hook(_LOCATIONS[match[1]], int(path.stem))
    return None
