"""SAELens folders (6.x; older configs too): cfg.json beside sae_weights.safetensors.

Layout, with n = d_sae and, for all but transcoders, d_in = d_out = d::

    standard, topk, abstopk          W_enc [d_in, n], b_enc [n], W_dec [n, d_out], b_dec [d_out]
    jumprelu                         + threshold [n], compared strictly
    gated                            W_enc, W_dec, b_dec, b_gate [n], b_mag [n], r_mag [n]
    matching_pursuit                 W_dec, b_dec, which counts only with apply_b_dec_to_input
    (jumprelu_)(skip_)transcoder     as standard or jumprelu; skip: W_skip [d_out, d_in]
    batchtopk, matryoshka_batchtopk  training checkpoints: as standard, with topk_threshold [], a float64
    temporal                         recognised, and refused: it reads the whole sequence (also as its authors publish
                                     it, conf.yaml + latest_ckpt.safetensors)

Beside them may lie ``editserver.json`` (an object whose fields join the metadata: median_norm, max_activation …, and
``norm_scaling_factor``) and, in training checkpoints, ``activation_scaler.json``.

Folded, and why:

- ``apply_b_dec_to_input`` (default true): the encoder sees x̃ − b_dec.
- ``normalize_activations: expected_average_only_in``: trained on s·x. s is in the training run's activation_scaler.json,
  in the registry of published SAEs, or given; without it the folder is refused (sae-lens silently applies none).
- ``rescale_acts_by_decoder_norm`` (topk, abstopk, training checkpoints): p·‖d_j‖ is ranked and is the activation.
- ``metadata.model_from_pretrained_kwargs.center_writing_weights``: trained on TransformerLens' centred GPT-2, whose
  stream has mean 0 at every token. On the model as it is, the mean is taken off first: input_norm "centre".

- ``covariance_whitening``, in training checkpoints: see whitening.py.

Per token: ``constant_norm_rescale``, ``layer_norm``.

Source: sae-lens 6.54.12, saes/ and loading/pretrained_sae_loaders.py (MIT).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_weights.architectures import ARCHITECTURES
from sae_weights.errors import SAEFormatError
from sae_weights.folding import Folding
from sae_weights.sae import SAE
from sae_weights.source import RowSource

from .base import Format, Hints
from .json_object import read_json_object
from .layout import Matrix, TensorRows
from .saelens_config import (
    ARCHITECTURE_NAMES,
    SCALED_INPUT,
    SKIP_TRANSCODERS,
    TRAINED,
    SAELensConfig,
    read_config,
    scale_field,
)
from .saelens_writer import CONFIG_FILE, SIDECAR_FILE, WEIGHTS_FILE, save_saelens
from .tensor_file import TensorFile
from .whitening import WhitenedRows

__all__ = ["CONFIG_FILE", "SCALER_FILE", "SIDECAR_FILE", "WEIGHTS_FILE", "SAELens", "save_saelens"]

SCALER_FILE = "activation_scaler.json"
TEMPORAL_FILES = ("conf.yaml", "latest_ckpt.safetensors")


class SAELens(Format):
    """See the module."""

    name = "saelens"
    title = "SAELens"
    files = f"{CONFIG_FILE} + {WEIGHTS_FILE}"
    reference = "github.com/decoderesearch/SAELens 6.54"
    architectures = tuple(dict.fromkeys(ARCHITECTURE_NAMES.values()))

    def recognises(self, path: Path) -> bool:
        # The last one asked: half a checkpoint is taken for one, so that the error names what is missing.
        return (path / CONFIG_FILE).is_file() or (path / WEIGHTS_FILE).exists() or _published_temporal(path)

    def open(self, path: Path, hints: Hints) -> SAE:
        if _published_temporal(path) and not (path / CONFIG_FILE).exists():
            raise SAEFormatError(f"{path}: a temporal SAE, which is refused: {ARCHITECTURES['temporal'].why_not}")
        sidecar_path = path / SIDECAR_FILE
        sidecar = read_json_object(sidecar_path) if sidecar_path.exists() else {}
        config = read_config(path / CONFIG_FILE, hints, sidecar)
        scale = _input_scale(path, config, sidecar, hints.norm_scaling_factor)
        if "residual_threshold" in config.settings:
            # Compared with the norm of what is left of the input, in the units of training.
            limit = config.settings["residual_threshold"] / scale
            config = replace(config, settings={**config.settings, "residual_threshold": limit})
        source: RowSource = _rows(TensorFile(path / WEIGHTS_FILE), config)
        folding = Folding(
            input_scale=scale,
            decoder_norm=config.rescale_acts_by_decoder_norm,
            subtract_b_dec=config.apply_b_dec_to_input,
        )
        if config.whitened:
            source = WhitenedRows(source, path, folding, ARCHITECTURES[config.architecture])
            folding = Folding()
        try:
            return SAE(
                architecture=config.architecture,
                hook=config.hook,
                hook_out=config.hook_out,
                source=source,
                folding=folding,
                input_norm=config.input_norm,
                k=config.k,
                settings=config.settings,
                metadata=config.metadata,
            )
        except SAEFormatError as error:
            raise error if str(path) in str(error) else SAEFormatError(f"{path}: {error}") from error


def _published_temporal(path: Path) -> bool:
    return all((path / name).is_file() for name in TEMPORAL_FILES)


def _rows(file: TensorFile, config: SAELensConfig) -> TensorRows:
    n, tied = config.d_sae, config.architecture == "matching_pursuit"
    if not tied:
        file.require("W_enc", [config.d_in, n])
    file.require("W_dec", [n, config.d_out])
    file.require("b_dec", [config.d_out])
    gate: dict[str, str | Tensor] = {}
    for name in ARCHITECTURES[config.architecture].gate_tensors:
        if tied:
            gate[name] = torch.zeros(n)
        elif name == "threshold" and config.stored_architecture in TRAINED:
            file.require("topk_threshold", [], [1])
            gate[name] = file.tensor("topk_threshold").reshape(()).float().expand(n)
        else:
            file.require(name, [n])
            gate[name] = name
    ignored = {"topk_threshold"} if config.stored_architecture in TRAINED else set()
    if "scaling_factor" in file.shapes and bool((file.tensor("scaling_factor") == 1).all()):
        ignored.add("scaling_factor")  # written, and meaningless, in releases before 6.0
    extras: dict[str, str | Tensor] = {}
    if config.stored_architecture in SKIP_TRANSCODERS:
        file.require("W_skip", [config.d_out, config.d_in])
        extras["W_skip"] = "W_skip"
    # Matching pursuit adds b_dec only where it has subtracted it.
    unused = tied and not config.apply_b_dec_to_input
    return TensorRows(
        file,
        encoder=None if tied else Matrix("W_enc", transposed=True),
        decoder=Matrix("W_dec"),
        b_dec=None if unused else "b_dec",
        gate=gate,
        extras=extras,
        ignore=ignored | ({"b_dec"} if unused else set()),
        what=f"architecture {config.stored_architecture!r}",
    )


def _input_scale(folder: Path, config: SAELensConfig, sidecar: Mapping[str, Any], argument: float | None) -> float:
    if not config.scaled_input:
        if argument is not None:
            raise SAEFormatError(
                f"{folder / CONFIG_FILE}: norm_scaling_factor {argument} given, but normalize_activations is "
                f"{config.input_norm!r}; only {SCALED_INPUT!r} takes one"
            )
        return 1.0
    scaler_path = folder / SCALER_FILE
    scaler = read_json_object(scaler_path) if scaler_path.exists() else {}
    found = (
        scale_field(folder / CONFIG_FILE, {"norm_scaling_factor": argument}, "norm_scaling_factor")
        or scale_field(folder / SIDECAR_FILE, sidecar, "norm_scaling_factor")
        or scale_field(scaler_path, scaler, "scaling_factor")
    )
    if found is None:
        raise SAEFormatError(
            f"{folder / CONFIG_FILE}: field 'normalize_activations' is {SCALED_INPUT!r}, which scales inputs by a "
            f"constant that the checkpoint does not hold; give it as 'norm_scaling_factor' in {SIDECAR_FILE} beside it"
        )
    return found
