"""Goodfire's Llama SAEs, and qresearch's in the same manner: one PyTorch file that holds two linear layers.

Layout::

    Llama-3.1-8B-Instruct-SAE-l19.pth, Llama-3.3-70B-Instruct-SAE-l50.pt      float32, n = 65,536
        encoder_linear.weight [n, d], encoder_linear.bias [n], decoder_linear.weight [d, n], decoder_linear.bias [d]
    DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt, Llama-3.2-1B-Instruct-SAE-l9.pt   (qresearch; bfloat16)
        encoder.weight, encoder.bias, decoder.weight, decoder.bias

ReLU; the decoder's bias is not subtracted from the input, and decoder rows have free norms. There is no config: the file's
name says model and layer, taken as the residual stream after that layer, as sae-lens does. (qresearch's own example feeds
the *input* of layer l; ``--hook blocks.l.hook_resid_pre`` reads it so.)

Source: goodfire.ai/blog/sae-open-source-announcement; huggingface.co/qresearch.
"""

from __future__ import annotations

import re
from pathlib import Path

from sae_weights.errors import SAEFormatError
from sae_weights.sae import SAE

from .base import Format, Hints
from .layout import Matrix, TensorRows
from .pickled import PickledFile

_FILE = re.compile(r"(.+)-SAE-l(\d{1,3})\.(?:pth|pt)")
_LAYERS = (("encoder_linear", "decoder_linear"), ("encoder", "decoder"))


class Goodfire(Format):
    """See the module."""

    name = "goodfire"
    title = "Goodfire, qresearch"
    files = "<model>-SAE-l<layer>.pth or .pt (encoder_linear.weight …)"
    reference = "goodfire.ai/blog/sae-open-source-announcement"
    architectures = ("relu",)

    def recognises(self, path: Path) -> bool:
        return _file(path) is not None

    def open(self, path: Path, hints: Hints) -> SAE:
        weights = path if path.is_file() else _file(path)
        if weights is None:
            raise SAEFormatError(f"{path}: no file named <model>-SAE-l<layer>.pth or .pt")
        file = PickledFile(weights)
        encoder, decoder = next((pair for pair in _LAYERS if f"{pair[0]}.weight" in file.shapes), _LAYERS[0])
        source = TensorRows(
            file,
            encoder=Matrix(f"{encoder}.weight"),
            decoder=Matrix(f"{decoder}.weight", transposed=True),
            b_dec=f"{decoder}.bias",
            gate={"b_enc": f"{encoder}.bias"},
            what="a pair of linear layers",
        )
        named = _FILE.fullmatch(weights.name)
        # The author's own example for these files reads another place than sae-lens does: a given hook decides.
        stated = f"blocks.{named[2]}.hook_resid_post" if named and hints.hook is None else None
        hook = self.hook(weights, hints, stated)
        return SAE(
            architecture="relu",
            hook=hook,
            source=source,
            metadata={"hook_name": hook.hook_name, **({"model_name": named[1]} if named else {})},
        )


def _file(path: Path) -> Path | None:
    """The file itself, or the only such file of a folder."""
    if path.is_file():
        return path if _FILE.fullmatch(path.name) else None
    try:
        found = [entry for entry in path.iterdir() if _FILE.fullmatch(entry.name)]
    except OSError:
        return None
    return found[0] if len(found) == 1 else None
