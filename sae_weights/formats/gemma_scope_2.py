"""Gemma Scope 2 (Gemma 3): safetensors, with a config in most folders.

Layout (float32)::

    google/gemma-scope-2-{270m,1b,4b,12b,27b}-{pt,it}/
        {resid_post,attn_out,mlp_out,transcoder}[_all]/layer_L_width_W_l0_{small,medium,big}[_affine]/
            config.json         {"hf_hook_point_in", "hf_hook_point_out", "architecture": "jump_relu", "width", "l0",
                                 "model_name", "affine_connection", "type": "sae" | "transcoder"}
            params.safetensors  w_enc [d, n], b_enc [n], threshold [n], w_dec [n, d], b_dec [d],
                                affine_skip_connection [d, d], applied as x · A
        crosscoder/layer_7_13_17_22_width_W_l0_N/    config.json ("type": "crosscoder") + params_layer_0 … 3.safetensors
        clt/width_W_l0_N[_affine]/                   config.json ("type": "clt") + params_layer_0 … L-1.safetensors
            of each layer: w_enc [d, n], b_enc [n], threshold [n], w_dec [n, layers, d], b_dec [d]

JumpReLU, strict comparison; b_dec is not subtracted from the input. Hooks (``hf_hook_point_in``): model.layers.L.output,
self_attn.o_proj.input (the heads, concatenated), post_feedforward_layernorm.output (the MLP's output), and for
transcoders pre_feedforward_layernorm.output (the MLP's input after its norm, gain included).

Folders uploaded without a config are understood by their names, as above.

Several layers: each layer's latents read that layer alone and write to every layer. A crosscoder (4 residual streams) is
one dictionary over the concatenated layers, n = 4 · n_layer, whose encoder rows are zero outside their own layer. A
cross-layer transcoder is opened one layer at a time: params_layer_L.safetensors is a transcoder that reads layer L and
writes to all layers (d_out = layers · d); it carries the bias and the skip connection of its own layer, so the sum over
all layers' files is the whole model. A skip connection of a crosscoder is refused: none was published.

Source: McDougall et al. 2025, Gemma Scope 2, and its tutorial; circuit-tracer 0.5.0.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sae_weights.errors import SAEFormatError
from sae_weights.hook import Hook
from sae_weights.sae import SAE

from .base import Format, Hints
from .fields import Fields
from .gemma_scope_2_layers import CrosscoderRows, LayerRows
from .json_object import read_json_object
from .layout import Matrix, TensorRows
from .tensor_file import TensorFile

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "params.safetensors"
_LAYER_FILE = re.compile(r"params_layer_(\d{1,3})\.safetensors")
_LAYER = re.compile(r"layer_(\d{1,3})_width_\w+")
_LAYERS = re.compile(r"layer_(\d{1,3}(?:_\d{1,3})+)_width_\w+")
_REPOSITORY = re.compile(r"gemma-scope-2-(\d+[mb])-(pt|it)")
_READS = {
    "resid_post": "output",
    "attn_out": "self_attn.o_proj.input",
    "mlp_out": "post_feedforward_layernorm.output",
    "transcoder": "pre_feedforward_layernorm.output",
}
# The same places under the names that the rest of the project, and sae-lens, use for them.
_POINTS = {"self_attn.o_proj.input": "attn.z", "post_feedforward_layernorm.output": "mlp_out"}


class GemmaScope2(Format):
    """See the module."""

    name = "gemma_scope_2"
    title = "Gemma Scope 2"
    files = f".../layer_L_width_W_l0_N/{WEIGHTS_FILE} (+ {CONFIG_FILE}), or params_layer_L.safetensors"
    reference = "Gemma Scope 2 (2025), huggingface.co/google/gemma-scope-2"
    architectures = ("jumprelu",)

    def recognises(self, path: Path) -> bool:
        if path.is_file():
            return path.name == WEIGHTS_FILE or bool(_LAYER_FILE.fullmatch(path.name))
        return (path / WEIGHTS_FILE).is_file() or bool(_layer_files(path))

    def open(self, path: Path, hints: Hints) -> SAE:
        if path.is_file() and (one := _LAYER_FILE.fullmatch(path.name)):
            return self._one_of_many(path, int(one[1]), hints)
        folder = path.parent if path.is_file() else path
        if not (folder / WEIGHTS_FILE).exists() and (files := _layer_files(folder)):
            return self._several(folder, files, hints)
        return self._single(folder, hints)

    def _single(self, folder: Path, hints: Hints) -> SAE:
        config = _config(folder)
        file = TensorFile(folder / WEIGHTS_FILE)
        extras = {}
        if "affine_skip_connection" in file.shapes:
            file.require("affine_skip_connection")
            extras["W_skip"] = file.tensor("affine_skip_connection").T.contiguous()
        source = TensorRows(
            file,
            encoder=Matrix("w_enc", transposed=True),
            decoder=Matrix("w_dec"),
            b_dec="b_dec",
            gate={"b_enc": "b_enc", "threshold": "threshold"},
            extras=extras,
            ignore=("affine_skip_connection",),
            what="a Gemma Scope 2 dictionary",
        )
        kind = folder.absolute().parent.name.removesuffix("_all")
        layer = _LAYER.match(folder.absolute().name)
        stated, out = config.content.get("hf_hook_point_in"), config.content.get("hf_hook_point_out")
        if stated is None and layer is not None and kind in _READS:
            stated = f"model.layers.{layer[1]}.{_READS[kind]}"
            if kind == "transcoder":
                out = f"model.layers.{layer[1]}.post_feedforward_layernorm.output"
        hook = _known(self.hook(folder, hints, _name(config, "hf_hook_point_in", stated), point=""))
        if not hook.point:
            raise SAEFormatError(
                f"{folder}: no {CONFIG_FILE}, and its path does not say which site of Gemma it is from "
                "(resid_post/layer_…, mlp_out/layer_… do); name its hook, e.g. --hook blocks.20.hook_resid_post"
            )
        out = hints.hook_out or _name(config, "hf_hook_point_out", out)
        return SAE(
            architecture="jumprelu",
            hook=hook,
            hook_out=None if out is None else _known(self.hook(folder, Hints(hook=out))),
            source=source,
            metadata=_metadata(folder, config, hook),
        )

    def _several(self, folder: Path, files: list[Path], hints: Hints) -> SAE:
        config = _config(folder)
        layers = _LAYERS.match(folder.absolute().name)
        if config.content.get("type") == "clt" or layers is None:
            raise SAEFormatError(
                f"{folder}: a cross-layer transcoder, {len(files)} layers that write to one another's outputs; open one "
                f"layer of it, e.g. {files[0]}"
            )
        numbers = [int(number) for number in layers[1].split("_")]
        if len(files) != len(numbers):
            raise SAEFormatError(f"{folder}: {len(files)} files of layers; its name speaks of {len(numbers)} layers")
        hooks = [Hook("resid_post", number) for number in numbers]
        return SAE(
            architecture="jumprelu",
            hook=hooks[0],
            hooks=hooks,
            source=CrosscoderRows(folder, [TensorFile(file) for file in files]),
            metadata=_metadata(folder, config, hooks[0]),
        )

    def _one_of_many(self, path: Path, index: int, hints: Hints) -> SAE:
        config = _config(path.parent)
        if config.content.get("type") == "crosscoder" or _LAYERS.match(path.absolute().parent.name):
            raise SAEFormatError(f"{path}: one of the layers of a crosscoder; open its folder, {path.parent}")
        hook = _known(self.hook(path, hints, f"model.layers.{index}.{_READS['transcoder']}"))
        return SAE(
            architecture="jumprelu",
            hook=hook,
            hook_out=Hook("mlp_out", index),
            source=LayerRows(TensorFile(path), index),
            metadata={**_metadata(path.parent, config, hook), "writes_to": "mlp_out of every layer, concatenated"},
        )


def _config(folder: Path) -> Fields:
    place = folder / CONFIG_FILE
    config = Fields(place, read_json_object(place) if place.exists() else {})
    if place.exists():
        config.choice("architecture", ("jump_relu",))
    return config


def _layer_files(folder: Path) -> list[Path]:
    """params_layer_0, params_layer_1 … as far as they go without a gap."""
    files: list[Path] = []
    while (file := folder / f"params_layer_{len(files)}.safetensors").is_file():
        files.append(file)
    return files


def _name(config: Fields, field: str, value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise config.wrong(field, "a hook, as in 'model.layers.17.output'")
    return value


def _known(hook: Hook) -> Hook:
    return Hook(_POINTS.get(hook.point, hook.point), hook.layer)


def _metadata(folder: Path, config: Fields, hook: Hook) -> dict[str, Any]:
    names = {"model_name": config.content.get("model_name"), "hf_hook_name": config.content.get("hf_hook_point_in")}
    if names["model_name"] is None and (found := _REPOSITORY.search("/".join(folder.absolute().parts))):
        names["model_name"] = f"google/gemma-3-{found[1]}-{found[2]}"
    told = {name: value for name, value in names.items() if isinstance(value, str)}
    return {"hook_name": hook.hook_name, **told, **{k: config.content[k] for k in ("l0",) if k in config.content}}
