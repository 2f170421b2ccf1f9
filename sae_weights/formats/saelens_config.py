"""SAELens' cfg.json: read, checked, and brought from its older spellings to the current one."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from sae_weights.errors import SAEFormatError
from sae_weights.hook import Hook, parse_hook_name
from sae_weights.input_norm import InputNorm

from .json_object import read_json_object

# SAELens' names → ours. The last two are training checkpoints; SAELens saves their inference form as jumprelu.
ARCHITECTURE_NAMES = {
    "standard": "relu",
    "jumprelu": "jumprelu",
    "gated": "gated",
    "topk": "topk",
    "batchtopk": "batchtopk",
    "matryoshka_batchtopk": "batchtopk",
}
_TRAINED_WITH_DECODER_NORM = {"batchtopk", "matryoshka_batchtopk"}
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
)
SCALED_INPUT = "expected_average_only_in"


@dataclass(frozen=True)
class SAELensConfig:
    """The fields of cfg.json that decide what the SAE computes, plus its metadata untouched."""

    architecture: str  # ours
    stored_architecture: str  # SAELens'
    d_in: int
    d_sae: int
    apply_b_dec_to_input: bool
    normalize_activations: str  # an InputNorm, or SCALED_INPUT
    rescale_acts_by_decoder_norm: bool
    k: int | None
    hook: Hook
    metadata: dict[str, Any]


def read_config(path: Path) -> SAELensConfig:
    """Read cfg.json. Raises SAEFormatError naming the file, the field, what it is and what it may be."""
    fields = _Fields(path, read_json_object(path))
    if _before_6(fields):
        fields = _from_pre_6(fields)
    metadata = fields.get("metadata", dict, default={})
    stored = fields.choice("architecture", ARCHITECTURE_NAMES)
    architecture = ARCHITECTURE_NAMES[stored]
    fields.choice("reshape_activations", ("none", "hook_z"), default="none")
    return SAELensConfig(
        architecture=architecture,
        stored_architecture=stored,
        d_in=fields.count("d_in"),
        d_sae=fields.count("d_sae"),
        apply_b_dec_to_input=fields.get("apply_b_dec_to_input", bool, default=True),
        normalize_activations=fields.choice(
            "normalize_activations", (*get_args(InputNorm), SCALED_INPUT), default="none"
        ),
        rescale_acts_by_decoder_norm=(
            fields.get("rescale_acts_by_decoder_norm", bool, default=stored in _TRAINED_WITH_DECODER_NORM)
            if architecture in ("topk", "batchtopk")
            else False
        ),
        k=fields.count("k") if architecture == "topk" else None,
        hook=_hook(path, metadata),
        metadata=metadata,
    )


def scale_field(path: Path, content: Mapping[str, Any], field: str) -> float | None:
    """A positive finite number from a side file, or None if absent."""
    value = content.get(field)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise SAEFormatError(f"{path}: field {field!r} is {value!r}; expected a positive number")
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


def _hook(path: Path, metadata: Mapping[str, Any]) -> Hook:
    """The hook from metadata.hook_name, or from metadata.hf_hook_name where the first says nothing about a layer."""
    found: dict[str, Hook] = {}
    given = {name: metadata[name] for name in ("hook_name", "hf_hook_name") if metadata.get(name) is not None}
    for name, value in given.items():
        hook = parse_hook_name(value) if isinstance(value, str) else None
        if hook is not None:
            found[name] = hook
    if not found:
        shown = (
            ", ".join(f"metadata.{name} {_shown(value)}" for name, value in given.items())
            or "metadata.hook_name missing"
        )
        raise SAEFormatError(f"{path}: {shown}; expected a hook of a layer, as in 'blocks.15.hook_resid_post'")
    layers = {hook.edit_layer for hook in found.values() if hook.edit_layer is not None}
    if len(layers) > 1:
        told = " and ".join(f"metadata.{name} {value!r}" for name, value in given.items())
        raise SAEFormatError(f"{path}: {told} are different places; expected the same one")
    return next(iter(found.values()))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
