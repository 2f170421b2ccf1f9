"""EleutherAI sparsify (formerly sae): a folder per hookpoint with cfg.json and sae.safetensors.

Layout: ``layers.12/``, ``layers.12.mlp/`` … (the module's name in the base model; with several seeds ``…/seed0/``)::

    encoder.weight [n, d], encoder.bias [n], W_dec [n, d], b_dec [d], [W_skip [d, d]]           fp32, fp16 or bf16
    cfg.json: activation "topk" | "groupmax" (older: absent), k, d_in, num_latents (0: d_in · expansion_factor),
              expansion_factor, normalize_decoder, multi_topk, skip_connection, transcode (older: absent), signed (older)

W_dec is feature-major, like the encoder.

Folded, and why:

- The encoder sees x − b_dec, unless ``transcode``: then b_dec belongs to another place.
- ``signed`` (2024): the k largest |p| survive without a ReLU: AbsTopK.
- W_skip adds x · W_skipᵀ, with x as it came in.
- normalize_decoder and multi_topk concern training. SAELens 6.54 takes the first for "no b_dec in the encoder", transposes
  W_dec, and calls every hookpoint the residual stream; the authors' code does none of that.

``layers.L`` is the output of decoder layer L: resid_post(L). With ``transcode`` the module's input is read and its output
written: ``layers.L.mlp`` reads mlp_in(L) and writes mlp_out(L).

Source: eai-sparsify 1.3.3, sparse_coder.py and fused_encoder.py (MIT); for ``signed`` git 03e05f9, sae/sae.py.
"""

from __future__ import annotations

import re
from pathlib import Path

from sae_weights.errors import SAEFormatError
from sae_weights.folding import Folding
from sae_weights.hook import Hook
from sae_weights.sae import SAE

from .base import Format, Hints
from .input_scale import constant_scale
from .json_object import read_json_object
from .layout import Matrix, TensorRows
from .nested_fields import NestedFields
from .tensor_file import TensorFile

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae.safetensors"
_HOOKPOINT = re.compile(r"(?:[A-Za-z_]+\.)*(?:layers|h|blocks)\.(\d{1,4})(?:\.([A-Za-z_.0-9]+))?")
_SEED = re.compile(r"seed\d+")
# What a module of a layer is called in the field: (what goes in, what comes out).
_POINTS = {
    None: ("resid_pre", "resid_post"),
    "mlp": ("mlp_in", "mlp_out"),
    "attn": ("attn_in", "attn_out"),
    "attention": ("attn_in", "attn_out"),
    "self_attn": ("attn_in", "attn_out"),
}


class Sparsify(Format):
    """See the module."""

    name = "sparsify"
    title = "EleutherAI sparsify"
    files = f"{CONFIG_FILE} + {WEIGHTS_FILE}, in a folder named after the module (layers.12, layers.12.mlp)"
    reference = "eai-sparsify 1.3.3, github.com/EleutherAI/sparsify"
    architectures = ("topk", "groupmax", "abstopk")

    def recognises(self, path: Path) -> bool:
        return (path / WEIGHTS_FILE).is_file()

    def open(self, path: Path, hints: Hints) -> SAE:
        fields = NestedFields(path / CONFIG_FILE, read_json_object(path / CONFIG_FILE))
        transcode = fields.flag("transcode", False)
        activation = fields.choice("activation", ("topk", "groupmax"), "topk")
        architecture = "abstopk" if activation == "topk" and fields.flag("signed", False) else activation
        k = fields.count("k")
        if hints.k not in (None, k):
            raise SAEFormatError(f"{fields.path}: field 'k' is {k} and the given k is {hints.k}; expected the same")
        file = TensorFile(path / WEIGHTS_FILE)
        d = fields.count("d_in")
        file.require("encoder.bias")
        n = file.shapes["encoder.bias"][0]
        for matrix in ("encoder.weight", "W_dec"):
            file.require(matrix, [n, d])
        skips = fields.flag("skip_connection", False)
        if skips != ("W_skip" in file.shapes):
            has = "no" if skips else "a"
            raise fields.wrong("skip_connection", f"{not skips}".lower() + f": {WEIGHTS_FILE} has {has} 'W_skip'")
        hook, hook_out = self._hooks(path, hints, transcode)
        return SAE(
            architecture=architecture,
            hook=hook,
            hook_out=hook_out,
            source=TensorRows(
                file,
                encoder=Matrix("encoder.weight"),
                decoder=Matrix("W_dec"),
                b_dec="b_dec",
                gate={"b_enc": "encoder.bias"},
                extras={"W_skip": "W_skip"} if skips else {},
                what="sparsify's layout",
            ),
            folding=Folding(input_scale=constant_scale(path, hints), subtract_b_dec=not transcode),
            k=k,
            metadata={"hookpoint": _hookpoint(path)},
        )

    def _hooks(self, path: Path, hints: Hints, transcode: bool) -> tuple[Hook, Hook | None]:
        """Where it reads, and where it writes if that is elsewhere."""
        match = _HOOKPOINT.fullmatch(_hookpoint(path))
        layer = int(match[1]) if match else None
        module = match[2] if match else None
        into, out = _POINTS.get(module, (f"{module}.in", str(module)))
        stated = None if layer is None else Hook(into if transcode else out, layer).hook_name
        hook = self.hook(path, hints, stated)
        if not transcode:
            return hook, None
        if hints.hook_out is not None:
            return hook, self.hook(path, Hints(hook=hints.hook_out))
        return hook, Hook(out, hook.layer)


def _hookpoint(path: Path) -> str:
    """The module's name: the folder's, or of the folder above one that is called after a seed."""
    absolute = path.absolute()
    return absolute.parent.name if _SEED.fullmatch(absolute.name) else absolute.name
