"""Where in the model an SAE reads: the hook point and its layer."""

from __future__ import annotations

import re
from dataclasses import dataclass

# The same place under TransformerLens' older (hook_resid_*) and newer (hook_in, hook_out) names.
_RESIDUAL_ALIASES = {"in": "resid_pre", "out": "resid_post"}
_TRANSFORMER_LENS = re.compile(r"blocks\.(\d{1,4})\.(.+)")
# A decoder layer as Hugging Face names it: model.layers.3, model.language_model.layers.3, transformer.h.3
_HF_LAYER = re.compile(r"(?:[A-Za-z_][A-Za-z0-9_]*\.)*(?:layers|h|blocks)\.(\d{1,4})(?:\.(.+))?")
_HF_RESIDUAL = {None: "resid_post", "output": "resid_post", "input": "resid_pre"}


@dataclass(frozen=True)
class Hook:
    """A place in the model: ``Hook("resid_post", 15)`` is the residual stream after decoder layer 15 (0-based)."""

    point: str
    layer: int

    @property
    def edit_layer(self) -> int | None:
        """The layer whose ``resid_post`` this is: resid_post(L) → L, resid_pre(L > 0) → L − 1, any other → None."""
        if self.point == "resid_post":
            return self.layer
        if self.point == "resid_pre" and self.layer > 0:
            return self.layer - 1
        return None

    @property
    def hook_name(self) -> str:
        """The TransformerLens name: ``blocks.15.hook_resid_post``, ``blocks.3.attn.hook_z``."""
        module, _, name = self.point.rpartition(".")
        return f"blocks.{self.layer}.{module + '.' if module else ''}hook_{name}"

    def __str__(self) -> str:
        return f"{self.point}({self.layer})"


def parse_hook_name(name: str) -> Hook | None:
    """A TransformerLens name (``blocks.L.hook_resid_post``) or a Hugging Face one (``model.layers.L``); else None.

    A Hugging Face decoder layer means its output, as a forward hook sees it. Names of other places keep their last
    part: ``blocks.3.attn.hook_z`` → ``Hook("attn.z", 3)``, ``model.layers.3.mlp`` → ``Hook("mlp", 3)``.
    """
    if match := _TRANSFORMER_LENS.fullmatch(name):
        module, _, last = match[2].rpartition(".")
        short = last.removeprefix("hook_")
        if not module:
            short = _RESIDUAL_ALIASES.get(short, short)
        return Hook(f"{module}.{short}" if module else short, int(match[1]))
    if match := _HF_LAYER.fullmatch(name):
        return Hook(_HF_RESIDUAL.get(match[2], match[2]), int(match[1]))
    return None
