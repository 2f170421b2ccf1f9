"""circuit-tracer's per-layer transcoders: one safetensors file per layer, and YAML beside them.

Layout (``model_kind: transcoder_set``)::

    layer_N.safetensors   W_enc [n, d], b_enc [n], W_dec [n, d_out], b_dec [d_out], W_skip [d_out, d] (some),
                          activation_function.threshold [n] (JumpReLU; ReLU without it)
    config.yaml           model_name, feature_input_hook (hook_resid_mid, mlp.hook_in …), feature_output_hook;
                          activation: topk and k (facebook/crv-8b-instruct-transcoders, whose k = 128 its own code knows)
    wandb-config.yaml     mwhanna's sets (one of them spells it wanb-config.yaml): d_model.value, d_feature.value; the
                          14B set has no config.yaml and reads mlp.hook_in, writes mlp.hook_out like the others

A path is a layer's file, or a folder with one such file; in a folder with several, the layer of the given hook.

Nothing is folded: no bias is subtracted from the input, no norm is applied. The skip matrix sees the same input. A JumpReLU
here is p · 1[p > θ] without a ReLU: the same for θ ≥ 0, and refused for θ < 0. TopK keeps the k largest p as they are, even
negative ones ("plain_topk").

Source: circuit-tracer 0.5.0, transcoder/single_layer_transcoder.py and utils/hf_utils.py (MIT); Zhao et al. 2025,
arXiv:2510.09312 for TopK; sae-lens 6.54, loading/pretrained_sae_loaders.py for mwhanna's.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_weights.errors import SAEFormatError
from sae_weights.hook import Hook, parse_hook_name
from sae_weights.sae import SAE

from .base import Format, Hints
from .fields import Fields
from .layout import Matrix, TensorRows
from .tensor_file import TensorFile
from .yaml_config import read_yaml_object

CONFIG_FILE = "config.yaml"
WANDB_FILES = ("wandb-config.yaml", "wanb-config.yaml")
THRESHOLD = "activation_function.threshold"
# Sets whose k stands in the code that reads them instead of in their config.
_KNOWN_K = {"crv-8b-instruct-transcoders": 128}
_ACTIVATIONS = ("relu", "jump_relu", "jumprelu", "topk")


class CircuitTracer(Format):
    """See the module."""

    name = "circuit_tracer"
    title = "circuit-tracer transcoders"
    files = f"layer_N.safetensors (W_enc, W_dec) + {CONFIG_FILE}"
    reference = "circuit-tracer 0.5.0, transcoder/single_layer_transcoder.py"
    architectures = ("relu", "jumprelu", "plain_topk")
    edited = False

    def recognises(self, path: Path) -> bool:
        try:
            if path.is_dir():
                return bool(layers_in(path, "layer")) or _kind(path) == "transcoder_set"
            return layer_of(path, "layer") is not None
        except OSError:
            return False

    def open(self, path: Path, hints: Hints) -> SAE:
        weights, layer = one_layer(path, "layer", hints)
        file = TensorFile(weights)
        file.require("b_enc")
        n = (file.shapes["b_enc"] or [0])[0]
        config, hook, hook_out = hooks_of(self, weights, layer, hints)
        activation = None if config.content.get("activation") is None else config.choice("activation", _ACTIVATIONS)
        gate: dict[str, str | Tensor] = {"b_enc": "b_enc"}
        architecture, k = "relu", None
        if activation == "topk":
            architecture, k = "plain_topk", _k(config, weights, hints)
        elif THRESHOLD in file.shapes:
            architecture = "jumprelu"
        elif activation in ("jump_relu", "jumprelu"):
            file.require(THRESHOLD)
        source = TensorRows(
            file,
            encoder=Matrix("W_enc"),
            decoder=Matrix("W_dec"),
            b_dec="b_dec",
            gate=gate if architecture != "jumprelu" else gate | {"threshold": thresholds(file, THRESHOLD, n)},
            extras={"W_skip": "W_skip"} if "W_skip" in file.shapes else {},
            ignore=[THRESHOLD] if architecture == "jumprelu" else [],
            what=f"a {architecture} transcoder",
        )
        _check_wandb(weights, source)
        return SAE(
            architecture=architecture,
            hook=hook,
            hook_out=hook_out,
            source=source,
            k=k,
            metadata=_metadata(config, hook, hook_out),
        )


def layer_of(path: Path, prefix: str) -> int | None:
    """N of a file called PREFIX_N.safetensors."""
    match = re.fullmatch(rf"{prefix}_(\d{{1,3}})\.safetensors", path.name)
    return int(match[1]) if match else None


def layers_in(folder: Path, prefix: str) -> dict[int, Path]:
    """Layer → file, in order."""
    found = {layer: path for path in folder.iterdir() if (layer := layer_of(path, prefix)) is not None}
    return dict(sorted(found.items()))


def one_layer(path: Path, prefix: str, hints: Hints) -> tuple[Path, int]:
    """The file of the one layer that is meant, and its number; raises SAEFormatError listing them otherwise."""
    hinted = parse_hook_name(hints.hook) if hints.hook else None
    if not path.is_dir():
        layer = layer_of(path, prefix)
        if layer is None:
            raise SAEFormatError(f"{path}: expected a file {prefix}_N.safetensors, or a folder that holds one")
        if hinted is not None and hinted.layer != layer:
            raise SAEFormatError(
                f"{path}: belongs to layer {layer}; the given hook {hints.hook!r} to layer {hinted.layer}"
            )
        return path, layer
    found = layers_in(path, prefix)
    if hinted is not None and hinted.layer in found:
        return found[hinted.layer], hinted.layer
    if len(found) == 1 and hinted is None:
        return next((file, layer) for layer, file in found.items())
    if not found:
        listed = _listed_elsewhere(path)
        raise SAEFormatError(f"{path}: holds no {prefix}_N.safetensors{listed}")
    listed = ", ".join(file.name for file in found.values())
    raise SAEFormatError(
        f"{path}: holds {len(found)} layers, and a dictionary is one of them; give the path of its file ({listed}) "
        "or the hook of its layer"
    )


def hooks_of(one: Format, weights: Path, layer: int, hints: Hints) -> tuple[Fields, Hook, Hook | None]:
    """The set's config, where a layer's dictionary reads, and where it writes (None: where it reads)."""
    if hints.norm_scaling_factor is not None:
        raise SAEFormatError(
            f"{weights}: norm_scaling_factor {hints.norm_scaling_factor} given; these dictionaries were trained on activations "
            "as they are"
        )
    place = weights.parent / CONFIG_FILE
    if place.exists():
        config = Fields(place, read_yaml_object(place))
    else:
        beside = next((weights.parent / name for name in WANDB_FILES if (weights.parent / name).exists()), None)
        known = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "mlp.hook_out"} if beside else {}
        config = Fields(beside or place, known)
    stated = {}
    for field in ("feature_input_hook", "feature_output_hook"):
        if field not in config.content and (hints.hook if field == "feature_input_hook" else hints.hook_out):
            continue
        value = config.content.get(field)
        name = f"blocks.{layer}.{value}"
        if not isinstance(value, str) or parse_hook_name(name) is None:
            raise config.wrong(field, "a place within a layer, as in 'hook_resid_mid' or 'mlp.hook_in'")
        stated[field] = name
    hook = one.hook(weights, hints, stated.get("feature_input_hook"))
    out_name = hints.hook_out or stated.get("feature_output_hook", "")
    hook_out = parse_hook_name(out_name)
    if hook_out is None:
        raise SAEFormatError(f"hook_out: {out_name!r}; expected one like 'blocks.{layer}.hook_mlp_out'")
    return config, hook, None if hook_out == hook else hook_out


def thresholds(file: TensorFile, name: str, n: int) -> Tensor:
    """The thresholds [n] of a JumpReLU that is p · 1[p > θ]; raises SAEFormatError where a ReLU would differ from it."""
    file.require(name, [n], [1, n])
    theta = file.tensor(name).flatten()
    if bool((theta < 0).any()):
        raise SAEFormatError(
            f"{file.path}: tensor {name!r} has negative values, below which this JumpReLU lets negative activations pass"
        )
    return theta.float()


def _k(config: Fields, weights: Path, hints: Hints) -> int:
    if "k" in config.content:
        k = config.count("k")
        if hints.k is not None and hints.k != k:
            raise SAEFormatError(f"{config.path}: field 'k' is {k}; the given k is {hints.k}")
        return k
    if hints.k is not None:
        return hints.k
    for name, k in _KNOWN_K.items():
        if name in str(weights):
            return k
    raise SAEFormatError(f"{config.path}: field 'k' is missing; expected the number of latents per token (or give one)")


def _check_wandb(weights: Path, source: TensorRows) -> None:
    """mwhanna's second config states the sizes: files of two sets in one folder must not pass."""
    for name in WANDB_FILES:
        place = weights.parent / name
        if not place.exists():
            continue
        content = read_yaml_object(place)
        for field, have in {"d_model": source.d_model, "d_feature": source.n_features}.items():
            entry = content.get(field)
            value = entry.get("value") if isinstance(entry, dict) else entry
            if value is not None and value != have:
                raise Fields(place, content | {field: value}).wrong(field, f"{have}, as in {weights.name}")


def _metadata(config: Fields, hook: Hook, hook_out: Hook | None) -> dict[str, Any]:
    model = config.content.get("model_name")
    return {
        **({"model_name": model} if isinstance(model, str) else {}),
        "hook_name": hook.hook_name,
        **({"hook_name_out": hook_out.hook_name} if hook_out else {}),
    }


def _kind(folder: Path) -> Any:
    try:
        return read_yaml_object(folder / CONFIG_FILE).get("model_kind")
    except SAEFormatError:
        return None


def _listed_elsewhere(folder: Path) -> str:
    try:
        elsewhere = read_yaml_object(folder / CONFIG_FILE).get("transcoders")
    except SAEFormatError:
        return ""
    if not isinstance(elsewhere, list) or not elsewhere:
        return ""
    return f"; its {CONFIG_FILE} names files elsewhere ({str(elsewhere[0])[:120]} …): open one of those"
