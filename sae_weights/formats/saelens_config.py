"""SAELens' cfg.json: read, checked, and brought from its older spellings to the current one."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

from sae_weights.architectures import ARCHITECTURES
from sae_weights.errors import SAEFormatError
from sae_weights.hook import Hook, parse_hook_name
from sae_weights.input_norm import InputNorm

from .base import Hints
from .json_object import read_json_object

# SAELens' names → ours. batchtopk and matryoshka_batchtopk are training checkpoints: SAELens saves their inference form
# as jumprelu. A transcoder is its activation function; what makes it one is hook_name_out.
ARCHITECTURE_NAMES = {
    "standard": "relu",
    "jumprelu": "jumprelu",
    "gated": "gated",
    "topk": "topk",
    "abstopk": "abstopk",
    "batchtopk": "batchtopk",
    "matryoshka_batchtopk": "matryoshka",
    "matching_pursuit": "matching_pursuit",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
    "temporal": "temporal",
}
TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
SKIP_TRANSCODERS = ("skip_transcoder", "jumprelu_skip_transcoder")
TRAINED = ("batchtopk", "matryoshka_batchtopk")
_TOPK = ("topk", "abstopk")
_PRE_6_NAMES = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
# Settings of before 6.0 that 6.0 moved under "metadata".
_PRE_6_METADATA = (
    "model_name",
    "hook_name",
    "hook_head_index",
    "model_class_name",
    "model_from_pretrained_kwargs",
    "prepend_bos",
    "context_size",
    "dataset_path",
    "neuronpedia_id",
    "sae_lens_training_version",
    "hook_name_out",
    "hook_head_index_out",
    "hf_hook_name",
    "hf_hook_name_out",
)
SCALED_INPUT = "expected_average_only_in"
WHITENED = "covariance_whitening"
_NORMS = ("none", "constant_norm_rescale", "layer_norm")
_CENTRING = "center_writing_weights"
# Places that TransformerLens' centred models hold without their mean: the stream, and what is written to it.
_CENTRED_POINTS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
# Models with RMSNorm: TransformerLens does not centre their weights, whatever it is asked.
_RMS_MODELS = re.compile(r"gemma|llama|mistral|mixtral|qwen|olmo|smollm|deepseek|phi-3|yi-", re.IGNORECASE)


@dataclass(frozen=True)
class SAELensConfig:
    """The fields of cfg.json that decide what the SAE computes, plus its metadata."""

    architecture: str  # ours
    stored_architecture: str  # SAELens'
    d_in: int
    d_out: int
    d_sae: int
    apply_b_dec_to_input: bool
    input_norm: InputNorm
    scaled_input: bool  # inputs were scaled by a constant, which the config does not hold
    whitened: bool  # inputs were whitened by matrices, which lie beside the config
    rescale_acts_by_decoder_norm: bool
    k: int | None
    settings: dict[str, Any]
    hook: Hook
    hook_out: Hook | None
    metadata: dict[str, Any]


def read_config(path: Path, hints: Hints | None = None, sidecar: Mapping[str, Any] | None = None) -> SAELensConfig:
    """Read cfg.json. Raises SAEFormatError naming the file, the field, what it is and what it may be.

    ``hints.overrides`` are fields that SAELens' registry puts in place of the file's; ``sidecar`` joins the metadata.
    """
    hints = hints or Hints()
    overrides = hints.overrides or {}
    fields = _Fields(path, {**read_json_object(path), **overrides})
    if _before_6(fields):
        fields = _from_pre_6(fields)
    told = {name: overrides[name] for name in _PRE_6_METADATA if name in overrides}
    metadata = {**fields.get("metadata", dict, default={}), **told, **(sidecar or {})}
    stored = fields.choice("architecture", ARCHITECTURE_NAMES)
    architecture = ARCHITECTURE_NAMES[stored]
    if ARCHITECTURES[architecture].execution == "sequence":
        raise SAEFormatError(
            f"{path}: field 'architecture' is {stored!r}, which is refused: {ARCHITECTURES[architecture].why_not}"
        )
    transcoder = stored in TRANSCODERS
    d_in, d_sae = fields.count("d_in"), fields.count("d_sae")
    sizes = _group_sizes(fields, metadata, d_sae) if architecture in ("jumprelu", "matryoshka") else []
    if sizes and not transcoder:
        architecture = "matryoshka"  # also where save_saelens wrote one, as jumprelu with widths among the metadata
    fields.choice("reshape_activations", ("none", "hook_z"), default="none")
    subtract = fields.get("apply_b_dec_to_input", bool, default=not transcoder)
    if transcoder and subtract:
        raise fields.wrong("apply_b_dec_to_input", True, "false: the b_dec of a transcoder is no input")
    hook = _hook(path, "hook", hints.hook, metadata, ("hook_name", "hf_hook_name"))
    norm = _norm(fields, stored)
    return SAELensConfig(
        architecture=architecture,
        stored_architecture=stored,
        d_in=d_in,
        d_out=fields.count("d_out") if transcoder else d_in,
        d_sae=d_sae,
        apply_b_dec_to_input=subtract,
        input_norm=_input_norm(fields, norm, _centred(metadata, hook)),
        scaled_input=norm == SCALED_INPUT,
        whitened=norm == WHITENED,
        rescale_acts_by_decoder_norm=(
            fields.get("rescale_acts_by_decoder_norm", bool, default=stored in TRAINED)
            if stored in (*TRAINED, *_TOPK)
            else False
        ),
        k=fields.count("k") if stored in _TOPK else None,
        settings=_settings(fields, architecture, sizes),
        hook=hook,
        hook_out=(
            _hook(path, "hook_out", hints.hook_out, metadata, ("hook_name_out", "hf_hook_name_out"))
            if transcoder
            else None
        ),
        metadata=metadata,
    )


def _norm(fields: _Fields, stored: str) -> str:
    # SAELens would normalise a transcoder's input and not its output, and cannot whiten a tied encoder.
    allowed: tuple[str, ...] = (*_NORMS, SCALED_INPUT, WHITENED)
    if stored in TRANSCODERS:
        allowed = ("none", SCALED_INPUT)
    elif stored == "matching_pursuit":
        allowed = (*_NORMS, SCALED_INPUT)
    return fields.choice("normalize_activations", allowed, default="none")


def _input_norm(fields: _Fields, norm: str, centred: bool) -> InputNorm:
    """What is done to each token."""
    if not centred:
        return cast(InputNorm, norm) if norm in _NORMS else "none"
    if norm not in ("none", "layer_norm", SCALED_INPUT) or fields.content.get("architecture") in TRANSCODERS:
        raise fields.wrong("metadata.model_from_pretrained_kwargs", {_CENTRING: True}, f"no centring beside {norm!r}")
    return "layer_norm" if norm == "layer_norm" else "centre"


def _centred(metadata: Mapping[str, Any], hook: Hook) -> bool:
    """Whether it was trained on a stream without its mean, as TransformerLens' centred models hold it."""
    kwargs = metadata.get("model_from_pretrained_kwargs")
    asked = isinstance(kwargs, dict) and kwargs.get(_CENTRING) is True
    return asked and hook.point in _CENTRED_POINTS and not _RMS_MODELS.search(str(metadata.get("model_name")))


def _group_sizes(fields: _Fields, metadata: Mapping[str, Any], d_sae: int) -> list[int]:
    """Sizes of a Matryoshka dictionary's groups from its cumulative widths, the last of which may be left out."""
    widths = fields.content.get("matryoshka_widths") or metadata.get("matryoshka_widths") or []
    ends = [*widths, d_sae] if isinstance(widths, list) and widths and widths[-1] != d_sae else widths
    whole = isinstance(ends, list) and all(isinstance(end, int) and not isinstance(end, bool) for end in ends)
    if not whole or any(end <= start for start, end in pairwise([0, *ends])):
        raise fields.wrong("matryoshka_widths", widths, f"growing widths up to d_sae, {d_sae}")
    return [end - start for start, end in pairwise([0, *ends])]


def _settings(fields: _Fields, architecture: str, group_sizes: list[int]) -> dict[str, Any]:
    if architecture == "matryoshka":
        return {"group_sizes": group_sizes}
    if architecture != "matching_pursuit":
        return {}
    limit = fields.content.get("residual_threshold", 0.01)
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 <= limit < 1e300:
        raise fields.wrong("residual_threshold", limit, "a number of at least 0")
    return {
        "residual_threshold": float(limit),
        "max_iterations": 0 if fields.content.get("max_iterations") is None else fields.count("max_iterations"),
        "stop_on_duplicate_support": fields.get("stop_on_duplicate_support", bool, default=True),
        "rectify": True,
    }


def scale_field(path: Path, content: Mapping[str, Any], field: str) -> float | None:
    """A positive finite number from a side file, or None if absent."""
    value = content.get(field)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise SAEFormatError(f"{path}: field {field!r} is {_shown(value)}; expected a positive number")
    return float(value)


class _Fields:
    """A JSON object whose fields are read with their expected type."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path = path
        self.content = content

    def get(self, field: str, kind: type, default: Any = None) -> Any:
        value = self.content.get(field, default)
        if value is None and default is not None:
            value = default
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.wrong(field, value, {dict: "an object", bool: "true or false", int: "a whole number"}[kind])
        return value

    def count(self, field: str) -> int:
        value = self.content.get(field)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.wrong(field, value, "a whole number of at least 1")
        return value

    def choice(self, field: str, allowed: Iterable[str], default: str | None = None) -> str:
        value = self.content.get(field, default)
        names = list(allowed)
        if value not in names:
            near = difflib.get_close_matches(value, names, n=1) if isinstance(value, str) else []
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise self.wrong(field, value, f"one of {', '.join(names)}{hint}")
        return str(value)

    def wrong(self, field: str, value: Any, expected: str) -> SAEFormatError:
        given = "missing" if value is None and field not in self.content else _shown(value)
        return SAEFormatError(f"{self.path}: field {field!r} is {given}; expected {expected}")


def _before_6(fields: _Fields) -> bool:
    """SAELens' own test: no version, or one below 6."""
    version = fields.content.get("sae_lens_version")
    metadata = fields.content.get("metadata")
    if not version and isinstance(metadata, dict):
        version = metadata.get("sae_lens_version")
    major = str(version).split(".", 1)[0] if version else "0"
    return not major.isdigit() or int(major) < 6


def _from_pre_6(fields: _Fields) -> _Fields:
    """Old spellings → current ones, by SAELens' rules; refuses settings that the current form cannot say."""
    old = {_PRE_6_NAMES.get(name, name): value for name, value in fields.content.items()}
    content: dict[str, Any] = {"architecture": "standard", **old}
    activation = old.get("activation_fn") or "relu"
    arguments = old.get("activation_fn_kwargs") or {}
    if not isinstance(arguments, dict):
        raise fields.wrong("activation_fn_kwargs", arguments, "an object")
    if activation == "topk":
        content["architecture"] = "topk"
    elif activation != "relu":
        raise fields.wrong("activation_fn", activation, "relu or topk")
    if content["architecture"] == "topk":
        content.setdefault("k", arguments.get("k"))
    if old.get("finetuning_scaling_factor"):
        raise fields.wrong("finetuning_scaling_factor", True, "false: fold the factor into W_dec first")
    norm = old.get("normalize_activations")
    if norm is None or isinstance(norm, bool):
        content["normalize_activations"] = SCALED_INPUT if norm else "none"
    given = old.get("metadata")
    moved = {name: old[name] for name in _PRE_6_METADATA if old.get(name) is not None}
    content["metadata"] = {**moved, **(given if isinstance(given, dict) else {})}
    if given is not None and not isinstance(given, dict):
        content["metadata"] = given
    return _Fields(fields.path, content)


def _hook(path: Path, what: str, hint: str | None, metadata: Mapping[str, Any], names: tuple[str, str]) -> Hook:
    """The hook that the caller names, else metadata's first name, else its second where the first names no layer."""
    found: dict[str, Hook] = {}
    given = {f"metadata.{name}": metadata[name] for name in names if metadata.get(name) is not None}
    if hint is not None:
        if parse_hook_name(hint) is None:
            raise SAEFormatError(f"{what}: {hint!r}; expected one like 'blocks.15.hook_resid_post'")
        given = {f"the given {what}": hint, **given}
    for name, value in given.items():
        hook = parse_hook_name(value) if isinstance(value, str) else None
        if hook is not None:
            found[name] = hook
    if not found:
        shown = ", ".join(f"{name} {_shown(value)}" for name, value in given.items()) or f"metadata.{names[0]} missing"
        raise SAEFormatError(f"{path}: {shown}; expected a hook of a layer, as in 'blocks.15.hook_resid_post'")
    layers = {hook.edit_layer for hook in found.values() if hook.edit_layer is not None}
    if len(layers) > 1:
        told = " and ".join(f"{name} {value!r}" for name, value in given.items())
        raise SAEFormatError(f"{path}: {told} are different places; expected the same one")
    return next(iter(found.values()))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
