"""Llama Scope (Llama-3.1-8B base): a folder of hyperparams.json and checkpoints/final.safetensors.

Layout::

    fnlp/Llama3_1-8B-Base-LX{R,A,M,TC}-{8x,32x}/Llama3_1-8B-Base-L{layer}{R,A,M,TC}-{8x,32x}/
        hyperparams.json        {"hook_point_in", "hook_point_out", "d_model": 4096, "d_sae", "act_fn": "jumprelu",
                                 "jump_relu_threshold", "norm_activation": "dataset-wise",
                                 "dataset_average_activation_norm": {"in", "out"}, "sparsity_include_decoder_norm": true,
                                 "use_decoder_bias", "apply_decoder_bias_to_pre_encoder": false, …}
        checkpoints/final.safetensors   encoder.weight [n, d], encoder.bias [n], decoder.weight [d, n], decoder.bias [d]
                                        bfloat16

Trained as TopK (``top_k`` is a left-over), then given one threshold θ for all features::

    p = s_in · x · W_enc + b_enc        s = √d / E‖x‖ of the hook, "in" and "out"
    f = p · 1[p · ‖d_j‖ > θ · s_out]    ‖d_j‖ of the stored decoder, only with sparsity_include_decoder_norm
    x̂ = (f · W_dec + b_dec) / s_out

Folded: both scales, and ‖d_j‖ into the thresholds. θ was measured after the authors had folded the scales, on what a
feature writes in the units of the model's own output; hence s_out. For the residual SAEs s_in = s_out and this is what
sae-lens does, which leaves out ‖d_j‖; for the transcoders (LXTC, which sae-lens does not list) only s_out gives them the
sparsity of the others: θ · s_out is between 1.6 and 2.1 for all of those whose configs we have seen.

Source: He et al. 2024, arXiv:2410.20526; github.com/OpenMOSS/Language-Model-SAEs.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_weights.folding import Folding
from sae_weights.input_norm import InputNorm
from sae_weights.sae import SAE

from .base import Format, Hints
from .fields import Fields
from .json_object import read_json_object
from .layout import Matrix, TensorRows
from .tensor_file import TensorFile

CONFIG_FILE = "hyperparams.json"
WEIGHTS_FILE = "checkpoints/final.safetensors"
MODEL = "meta-llama/Llama-3.1-8B"
_AVERAGES = "dataset_average_activation_norm"
# "inference": the authors' code has folded the scales. Their "batch-wise" has no meaning for one token: refused.
_NORMS = ("dataset-wise", "token-wise", "inference", "none")


class LlamaScope(Format):
    """See the module."""

    name = "llama_scope"
    title = "Llama Scope"
    files = f"{CONFIG_FILE} + {WEIGHTS_FILE}"
    reference = "arXiv:2410.20526"
    architectures = ("jumprelu",)

    def recognises(self, path: Path) -> bool:
        return (path / CONFIG_FILE).is_file() and (path / WEIGHTS_FILE).is_file()

    def open(self, path: Path, hints: Hints) -> SAE:
        config = Fields(path / CONFIG_FILE, read_json_object(path / CONFIG_FILE))
        config.choice("act_fn", ("jumprelu",))
        file = TensorFile(path / WEIGHTS_FILE)
        norms = config.content.get(_AVERAGES)
        named = norms if isinstance(norms, Mapping) else {}
        averages = Fields(config.path, {f"{_AVERAGES}.{place}": named.get(place) for place in ("in", "out")})
        scales = read_scales(config, hints, averages, f"{_AVERAGES}.in", f"{_AVERAGES}.out")
        theta = config.number("jump_relu_threshold") * scales.output
        threshold = torch.full(file.shapes.get("encoder.bias", [0]), theta, dtype=torch.float64)
        return open_linear(self, path, hints, config, file, scales, threshold, model=MODEL)


class Scales(NamedTuple):
    """How inputs and outputs were scaled in training."""

    norm: InputNorm
    input: float
    output: float


def read_scales(config: Fields, hints: Hints, averages: Fields, of_input: str, of_output: str) -> Scales:
    """The scales by the config's ``norm_activation``; ``averages`` hold E‖x‖ of the two hooks under these names."""
    mode = config.choice("norm_activation", _NORMS, default="dataset-wise")
    if mode == "token-wise":
        return Scales("constant_norm_rescale", 1.0, 1.0)
    if mode != "dataset-wise":
        return Scales("none", 1.0, 1.0)
    root_d, given = math.sqrt(config.count("d_model")), hints.norm_scaling_factor
    if averages.content.get(of_input) is None and given is not None:
        return Scales("none", given, given)
    scales = Scales("none", root_d / averages.number(of_input), root_d / averages.number(of_output))
    if given is not None and not math.isclose(given, scales.input, rel_tol=1e-2):
        raise averages.wrong(of_input, f"{root_d / given:.6g}, which goes with the given norm_scaling_factor {given}")
    return scales


def open_linear(
    form: Format,
    path: Path,
    hints: Hints,
    config: Fields,
    file: TensorFile,
    scales: Scales,
    threshold: Tensor,
    *,
    model: str,
    ignore: Collection[str] = (),
) -> SAE:
    """A JumpReLU dictionary of OpenMOSS whose matrices are those of two linear layers; threshold [n] in scaled units."""
    if config.flag("use_glu_encoder", False):
        raise config.wrong("use_glu_encoder", "false, as in every release with tensors named encoder.weight")
    transcoder = config.hook("hook_point_in") != config.hook("hook_point_out")
    subtract = config.flag("apply_decoder_bias_to_pre_encoder", False)
    if transcoder and (subtract or scales.norm != "none"):
        field = "apply_decoder_bias_to_pre_encoder" if subtract else "norm_activation"
        raise config.wrong(
            field, "another value: the bias and the norm of an input say nothing about another place's output"
        )
    source = TensorRows(
        file,
        encoder=Matrix("encoder.weight"),
        decoder=Matrix("decoder.weight", transposed=True),
        b_dec="decoder.bias" if config.flag("use_decoder_bias", True) else None,
        gate={"b_enc": "encoder.bias", "threshold": threshold},
        ignore=ignore,
        what="a JumpReLU dictionary of OpenMOSS",
    )
    if source.d_model != config.count("d_model"):
        raise config.wrong("d_model", f"{source.d_model}, which is what {file.path.name} has")
    hook = form.hook(path, hints, config.hook("hook_point_in").hook_name)
    metadata: dict[str, Any] = {"model_name": model, "hook_name": hook.hook_name}
    return SAE(
        architecture="jumprelu",
        hook=hook,
        hook_out=config.hook("hook_point_out") if transcoder else None,
        source=source,
        folding=Folding(
            input_scale=scales.input,
            output_scale=scales.output,
            subtract_b_dec=subtract,
            threshold_in_decoder_norm=config.flag("sparsity_include_decoder_norm", True),
        ),
        input_norm=scales.norm,
        metadata=metadata,
    )
