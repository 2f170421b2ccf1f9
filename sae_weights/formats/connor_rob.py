"""Kissane & Krzyzanowski's attention SAEs for GPT-2 small: a PyTorch file and a JSON config that share a name.

Layout::

    <run>.pt            W_enc [d, n], b_enc [n], W_dec [n, d], b_dec [d]      float32; a state dict
    <run>_cfg.json      {"act_name": "blocks.5.attn.hook_z", "act_size": d, "dict_size": n, "model_name", …}

ReLU with centring: b_dec is subtracted from the input. They read the heads before the output projection, concatenated
(hook_z). TransformerLens folds the value biases of GPT-2 into the output bias, so its hook_z is the model's own without
them: subtract W_V's bias from the o_proj input to get what these dictionaries were trained on.

Source: lesswrong.com/posts/FSTRedtjuHa4Gfdbr, huggingface.co/ckkissane/attn-saes-gpt2-small-all-layers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sae_weights.errors import SAEFormatError
from sae_weights.folding import Folding
from sae_weights.sae import SAE

from .base import Format, Hints
from .fields import Fields
from .json_object import read_json_object
from .layout import Matrix, TensorRows
from .pickled import PickledFile


class ConnorRob(Format):
    """See the module."""

    name = "connor_rob"
    title = "Kissane & Krzyzanowski (hook_z)"
    files = "<run>.pt + <run>_cfg.json"
    reference = "lesswrong.com/posts/FSTRedtjuHa4Gfdbr"
    architectures = ("relu",)
    edited = False

    def recognises(self, path: Path) -> bool:
        try:
            return path.suffix == ".pt" and path.is_file() and "act_name" in read_json_object(_config(path))
        except (SAEFormatError, OSError):
            return False

    def open(self, path: Path, hints: Hints) -> SAE:
        config = Fields(_config(path), read_json_object(_config(path)))
        stated = config.hook("act_name")
        source = TensorRows(
            PickledFile(path),
            encoder=Matrix("W_enc", transposed=True),
            decoder=Matrix("W_dec"),
            b_dec="b_dec",
            gate={"b_enc": "b_enc"},
            what="an attention SAE of Kissane & Krzyzanowski",
        )
        for field, found in (("act_size", source.d_model), ("dict_size", source.n_features)):
            if config.count(field) != found:
                raise config.wrong(field, f"{found}, which is what {path.name} has")
        hook = self.hook(path, hints, stated.hook_name)
        metadata: dict[str, Any] = {"hook_name": hook.hook_name}
        if isinstance(model := config.content.get("model_name"), str):
            metadata["model_name"] = model
        return SAE(
            architecture="relu",
            hook=hook,
            source=source,
            folding=Folding(subtract_b_dec=True),
            metadata=metadata,
        )


def _config(path: Path) -> Path:
    return path.with_name(f"{path.stem}_cfg.json")
