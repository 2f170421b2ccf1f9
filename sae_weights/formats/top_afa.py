"""Top-AFA (SewoongLee/top-afa-sae): the layout of Bussmann's BatchTopK, of which it is a fork, with sae_type "topafa".

Layout: config.json as in bussmann.py, sae.pt ``{W_enc [d, n], b_enc [n], W_dec [n, d], b_dec [d]}``, fp32. The repository's
other types (vanilla, topk, batchtopk, jumprelu) are Bussmann's and are read as such.

Folded: the encoder sees x̃ − b_dec and leaves b_enc out; ``input_unit_norm`` is the same layer norm per token. Latents are
ranked by activation times decoder norm, so decoder rows keep the norm that they have.

Source: github.com/SewoongLee/top-afa-sae 1c7a683, training/sae.py. Lee et al. 2025, arXiv:2503.24277.
"""

from __future__ import annotations

from pathlib import Path

from sae_weights.folding import Folding
from sae_weights.sae import SAE

from .base import Format, Hints
from .bussmann import CONFIG_FILE, WEIGHTS_FILE, describe, read_checkpoint, sae_type, unused_bias
from .input_scale import constant_scale
from .layout import Matrix, TensorRows

TYPE = "topafa"


class TopAFASAE(Format):
    """See the module."""

    name = "top_afa"
    title = "Top-AFA"
    files = f"{WEIGHTS_FILE} + {CONFIG_FILE} (sae_type {TYPE})"
    reference = "github.com/SewoongLee/top-afa-sae"
    architectures = ("top_afa",)

    def recognises(self, path: Path) -> bool:
        return sae_type(path) == TYPE

    def open(self, path: Path, hints: Hints) -> SAE:
        fields, file = read_checkpoint(path)
        fields.choice("sae_type", [TYPE])
        constant_scale(
            path, hints, unscalable="how many latents it keeps follows from the input's norm, so no scale can be folded"
        )
        return SAE(
            architecture="top_afa",
            hook=self.hook(path, hints, fields.text("hook_point", "")),
            source=TensorRows(
                file,
                encoder=Matrix("W_enc", transposed=True),
                decoder=Matrix("W_dec"),
                b_dec="b_dec",
                gate=unused_bias(fields.count("dict_size")),
                ignore=["b_enc"],
                what=f"a {TYPE!r} checkpoint",
            ),
            folding=Folding(subtract_b_dec=True),
            input_norm="layer_norm" if fields.flag("input_unit_norm", False) else "none",
            metadata=describe(fields),
        )
