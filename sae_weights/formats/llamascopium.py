"""llamascopium (Language-Model-SAEs, OpenMOSS): a folder of config.json and sae_weights.safetensors.

Layout (``sae_type`` of the config decides it)::

    sae          W_E [d, n], b_E [n], W_D [n, d], b_D [d] unless use_decoder_bias is false
                 use_glu_encoder: W_E_glu [d, n], b_E_glu [n]
                 hook_point_in differs from hook_point_out: a transcoder
    crosscoder   W_E [H, d, n], b_E [H, n], W_D [H, n, d], b_D [H, d]; reads and writes H hook_points
    clt          W_E [L, d, n], b_E [L, n], W_D.i [i + 1, n, d] (from layers 0..i to layer i), b_D.i [d]
    all          activation_function.log_jumprelu_threshold [n] (clt: [L, n]), the logarithm of the threshold
                 dataset_average_activation_norm.HOOK, a number: E‖x‖ over the data set

The weights may also lie in sae_weights.pt, checkpoints/{pruned,final}.{safetensors,pt}; a .pt holds them under ``sae``.

Folded, and why:

- ``norm_activation: dataset-wise``: the dictionary was trained on s·x with s = √d / E‖x‖ of each hook, and predicts its
  output in the units of that hook's s. (``inference``: llamascopium has folded this already. In every other mode the
  stored norms are uninitialised memory and are not read.)
- ``token-wise``: s = √d / ‖x‖ of each token, our ``constant_norm_rescale``. Refused for several hooks and transcoders: the
  output was scaled by its own norm, which the input does not tell. ``batch-wise`` is refused: what a token gives would
  depend on the tokens beside it.
- ``sparsity_include_decoder_norm``: p_j · ‖d_j‖ is compared with the threshold, or ranked for TopK, while the value stays
  p_j. No bias is subtracted from the input.
- ``batchtopk``: llamascopium takes the k·B largest of a batch of B tokens. A token of its own is a batch of one: TopK.
- A crosscoder gates each place by ‖d_j‖ there (architecture "crosscoder"); with ReLU all its gates agree, and it is one
  dictionary over the concatenated places.
- Of a CLT one layer is opened, named by its input hook; its decoder row is the concatenation of what it writes to its own
  and all later layers, and it carries the output bias of its own layer, so that the decodes of all layers add up to the
  whole CLT's.

Source: llamascopium 2.0.0b34, models/{sparse_dictionary,sae,crosscoder,clt}.py (MIT).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_weights.architectures import ARCHITECTURES
from sae_weights.errors import SAEFormatError
from sae_weights.folding import Block, Folding
from sae_weights.hook import Hook, parse_hook_name
from sae_weights.input_norm import InputNorm
from sae_weights.sae import SAE
from sae_weights.source import MemoryRows

from .base import Format, Hints
from .fields import Fields
from .json_object import read_json_object
from .layout import Matrix, TensorRows
from .pickled import PickledFile
from .tensor_file import TensorFile
from .tensors import Tensors, refuse_others

CONFIG_FILE = "config.json"
WEIGHTS_FILES = (
    "sae_weights.safetensors",
    "sae_weights.pt",
    "checkpoints/pruned.safetensors",
    "checkpoints/pruned.pt",
    "checkpoints/final.safetensors",
    "checkpoints/final.pt",
)
LOG_THRESHOLD = "activation_function.log_jumprelu_threshold"
NORM_PREFIX = "dataset_average_activation_norm."
ACTIVATIONS = ("relu", "jumprelu", "topk", "batchtopk")
NORMS = ("dataset-wise", "inference", "token-wise")
_TYPES = ("sae", "crosscoder", "clt")
_REFUSED_TYPES = {
    "lorsa": ARCHITECTURES["lorsa"].why_not,
    "molt": "its latents switch linear maps of the input on and off, and have no decoder rows",
}
_MIN_DECODER_NORM = 1e-8


class Llamascopium(Format):
    """See the module."""

    name = "llamascopium"
    title = "llamascopium"
    files = f"{CONFIG_FILE} (sae_type, act_fn) + {WEIGHTS_FILES[0]} (W_E, W_D)"
    reference = "llamascopium 2.0.0b34, models/"
    architectures = ("relu", "jumprelu", "topk", "glu", "crosscoder", "lorsa")

    def recognises(self, path: Path) -> bool:
        if not path.is_dir():
            return False
        try:
            kind = read_json_object(path / CONFIG_FILE).get("sae_type")
            weights = _weights_file(path)
        except (SAEFormatError, OSError):
            return False
        if not isinstance(kind, str) or kind not in (*_TYPES, *_REFUSED_TYPES):
            return False
        if kind in _REFUSED_TYPES:
            return True
        try:
            # Older releases of the same authors have such a config too, with other tensors (encoder.weight …).
            return weights is not None and (
                weights.suffix == ".pt" or "encoder.weight" not in TensorFile(weights).shapes
            )
        except SAEFormatError:
            return True

    def open(self, path: Path, hints: Hints) -> SAE:
        fields = Fields(path / CONFIG_FILE, read_json_object(path / CONFIG_FILE))
        kind = fields.content.get("sae_type")
        if isinstance(kind, str) and kind in _REFUSED_TYPES:
            raise SAEFormatError(
                f"{fields.path}: field 'sae_type' is {kind!r}, which is refused: {_REFUSED_TYPES[kind]}"
            )
        kind = fields.choice("sae_type", _TYPES)
        if fields.content.get("apply_decoder_bias_to_pre_encoder"):
            raise fields.wrong("apply_decoder_bias_to_pre_encoder", "false, as in every release with tensors named W_E")
        weights = _weights_file(path)
        if weights is None:
            raise SAEFormatError(f"{path}: no weights; expected one of {', '.join(WEIGHTS_FILES)}")
        file: Tensors = TensorFile(weights) if weights.suffix == ".safetensors" else PickledFile(weights, prefix="sae.")
        checkpoint = _Checkpoint(file, fields)
        if hints.norm_scaling_factor is not None:
            raise SAEFormatError(
                f"{file.path}: norm_scaling_factor {hints.norm_scaling_factor} given; the file holds the norms that it needs"
            )
        if hints.k is not None and hints.k != checkpoint.k:
            raise SAEFormatError(f"{fields.path}: field 'top_k' makes it k = {checkpoint.k}; the given k is {hints.k}")
        if kind == "crosscoder":
            return _crosscoder(checkpoint, hints)
        if kind == "clt":
            return _clt(checkpoint, path, hints)
        return self._sae(checkpoint, path, hints)

    def _sae(self, checkpoint: _Checkpoint, path: Path, hints: Hints) -> SAE:
        fields, file = checkpoint.fields, checkpoint.file
        stated_in, stated_out = fields.hook("hook_point_in"), fields.hook("hook_point_out")
        hook = self.hook(path, hints, fields.content["hook_point_in"])
        norm = checkpoint.norm
        if norm == "token-wise" and stated_in != stated_out:
            raise fields.wrong("norm_activation", f"{_CONSTANT}: a transcoder's output has a norm of its own")
        scale_in = checkpoint.scale(fields.content["hook_point_in"])
        glu = fields.flag("use_glu_encoder", False)
        n = checkpoint.check_shapes("W_E", [checkpoint.d, None])[1]
        file.require("b_E", [n])
        gate: dict[str, str | Tensor] = {"b_enc": "b_E"}
        settings: dict[str, Any] = {}
        if checkpoint.act == "jumprelu":
            gate["threshold"] = checkpoint.threshold([n])
        if glu:
            file.require("W_E_glu", [checkpoint.d, n])
            file.require("b_E_glu", [n])
            # The second encoder reads the same scaled input; folding knows of the first only.
            gate["W_glu"] = (file.tensor("W_E_glu").T.double() * scale_in).float().contiguous()
            gate["b_glu"] = "b_E_glu"
            settings["k"] = checkpoint.k or 0
        source = TensorRows(
            file,
            encoder=Matrix("W_E", transposed=True),
            decoder=Matrix("W_D"),
            b_dec="b_D" if fields.flag("use_decoder_bias", True) else None,
            gate=gate,
            ignore=[LOG_THRESHOLD, "W_E_glu", *checkpoint.norm_names],
            what="a llamascopium SAE",
        )
        if source.d_out != checkpoint.d:
            raise SAEFormatError(
                f"{file.path}: tensor 'W_D' has width {source.d_out}; expected {checkpoint.d} (d_model)"
            )
        return SAE(
            architecture="glu" if glu else checkpoint.architecture,
            hook=hook,
            hook_out=_hook_out(hints, stated_out, stated_in, hook),
            source=source,
            folding=Folding(
                input_scale=scale_in,
                output_scale=checkpoint.scale(fields.content["hook_point_out"]),
                threshold_in_decoder_norm=checkpoint.by_norm and checkpoint.act == "jumprelu",
                rank_by_decoder_norm=checkpoint.by_norm and checkpoint.k is not None,
            ),
            input_norm=checkpoint.input_norm,
            k=None if glu else checkpoint.k,
            settings=settings,
            metadata=checkpoint.metadata(hook_name=fields.content["hook_point_in"]),
        )


_CONSTANT = "dataset-wise or inference"


class _Checkpoint:
    """What all kinds have in common: the activation, the normalisation, and the names that say so."""

    def __init__(self, file: Tensors, fields: Fields) -> None:
        self.file, self.fields = file, fields
        self.d = fields.count("d_model")
        self.act = fields.choice("act_fn", (*ACTIVATIONS, "layertopk", "batchlayertopk"), "relu")
        if self.act not in ACTIVATIONS:
            raise SAEFormatError(
                f"{fields.path}: field 'act_fn' is {self.act!r}, which ranks the latents of all layers together: "
                "the features of one layer follow from no single place"
            )
        if fields.content.get("norm_activation") == "batch-wise":
            raise SAEFormatError(
                f"{fields.path}: field 'norm_activation' is 'batch-wise', which divides by the mean norm of the tokens that "
                "happen to be encoded together: a token has no activations of its own"
            )
        self.norm = fields.choice("norm_activation", NORMS, "dataset-wise")
        self.input_norm: InputNorm = "constant_norm_rescale" if self.norm == "token-wise" else "none"
        self.k = fields.count("top_k", 50) if self.act in ("topk", "batchtopk") else None
        self.by_norm = fields.flag("sparsity_include_decoder_norm", True)
        self.architecture = {"relu": "relu", "jumprelu": "jumprelu"}.get(self.act, "topk")
        self.norm_names = [name for name in file.shapes if name.startswith(NORM_PREFIX)]

    def check_shapes(self, name: str, expected: list[int | None]) -> list[int]:
        """The shape of a tensor, of which the numbers are known."""
        self.file.require(name)
        shape = self.file.shapes[name]
        if (
            len(shape) != len(expected)
            or 0 in shape
            or any(e not in (None, h) for e, h in zip(expected, shape, strict=True))
        ):
            wanted = ", ".join("any" if e is None else str(e) for e in expected)
            raise SAEFormatError(f"{self.file.path}: tensor {name!r} has shape {shape}; expected [{wanted}]")
        return shape

    def threshold(self, shape: list[int]) -> Tensor:
        self.file.require(LOG_THRESHOLD, shape)
        # In float64, whose exponential rounds to the same float32 on every machine.
        return self.file.tensor(LOG_THRESHOLD).double().exp().float()

    def scale(self, hook_point: str) -> float:
        """What values of this hook were multiplied by in training."""
        if self.norm != "dataset-wise":
            return 1.0
        name = NORM_PREFIX + hook_point
        self.file.require(name, [], [1])
        average = float(self.file.tensor(name).double())
        if not (math.isfinite(average) and average > 0):
            raise SAEFormatError(f"{self.file.path}: tensor {name!r} is {average}; expected a positive norm")
        return math.sqrt(self.d) / average

    def in_memory(self, *, W_enc: Tensor, W_dec: Tensor, b_dec: Tensor, gate: dict[str, Tensor]) -> MemoryRows:
        """Rows that were folded here, fp32; errors about them name the file."""
        vectors = {name: tensor.float() for name, tensor in gate.items()}
        rows = MemoryRows(Block(W_enc.float().contiguous(), W_dec.float().contiguous(), vectors), b_dec.float())
        rows.label = str(self.file.path)
        return rows

    def metadata(self, **more: Any) -> dict[str, Any]:
        content = self.fields.content
        named = {
            name: content[name] for name in ("model_name", "sae_type", "act_fn") if isinstance(content.get(name), str)
        }
        return named | more


def _weights_file(folder: Path) -> Path | None:
    return next((folder / name for name in WEIGHTS_FILES if (folder / name).exists()), None)


def _hook_out(hints: Hints, stated_out: Hook, stated_in: Hook, hook: Hook) -> Hook | None:
    """Where the decoder writes, or None where that is where it reads."""
    if hints.hook_out is not None:
        hinted = parse_hook_name(hints.hook_out)
        if hinted is None:
            raise SAEFormatError(f"hook_out: {hints.hook_out!r}; expected one like 'blocks.15.hook_mlp_out'")
        return hinted
    return None if stated_out == stated_in else stated_out


def _decoder_norms(W_D: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(W_D.double(), dim=-1)
    return norms.clamp(min=_MIN_DECODER_NORM)


def _crosscoder(checkpoint: _Checkpoint, hints: Hints) -> SAE:
    fields, file, d = checkpoint.fields, checkpoint.file, checkpoint.d
    hooks = fields.hooks("hook_points")
    if hints.hook is not None and parse_hook_name(hints.hook) not in hooks:
        raise SAEFormatError(
            f"hook: {hints.hook!r}; this crosscoder reads {', '.join(hook.hook_name for hook in hooks)}"
        )
    if checkpoint.norm == "token-wise":
        raise fields.wrong("norm_activation", f"{_CONSTANT} for a crosscoder, whose places have norms of their own")
    heads = len(hooks)
    n = checkpoint.check_shapes("W_E", [heads, d, None])[2]
    for name, shape in {"b_E": [heads, n], "W_D": [heads, n, d], "b_D": [heads, d]}.items():
        file.require(name, shape)
    gate: dict[str, Tensor] = {}
    if checkpoint.act == "jumprelu":
        gate["threshold"] = checkpoint.threshold([n])
    refuse_others(
        file, {"W_E", "b_E", "W_D", "b_D", LOG_THRESHOLD, *checkpoint.norm_names}, "a llamascopium crosscoder"
    )
    scales = torch.tensor([checkpoint.scale(name) for name in fields.content["hook_points"]], dtype=torch.float64)
    W_D = file.tensor("W_D").double()
    gate["b_enc"] = file.tensor("b_E").double().sum(dim=0)
    settings: dict[str, Any] = {}
    plain = checkpoint.act == "relu"
    if not plain:
        gate["head_norm"] = _decoder_norms(W_D).T.contiguous()
        settings["k"] = checkpoint.k or 0
    return SAE(
        architecture="relu" if plain else "crosscoder",
        hook=hooks[0],
        hooks=hooks,
        source=checkpoint.in_memory(
            W_enc=(file.tensor("W_E").double() * scales[:, None, None]).permute(2, 0, 1).reshape(n, heads * d),
            W_dec=(W_D / scales[:, None, None]).permute(1, 0, 2).reshape(n, heads * d),
            b_dec=(file.tensor("b_D").double() / scales[:, None]).flatten(),
            gate=gate,
        ),
        settings=settings,
        metadata=checkpoint.metadata(hook_names=fields.content["hook_points"]),
    )


def _clt(checkpoint: _Checkpoint, path: Path, hints: Hints) -> SAE:
    fields, file, d = checkpoint.fields, checkpoint.file, checkpoint.d
    hooks_in, hooks_out = fields.hooks("hook_points_in"), fields.hooks("hook_points_out")
    layers = len(hooks_in)
    if len(hooks_out) != layers:
        raise fields.wrong("hook_points_out", f"{layers} hooks, one for each of hook_points_in")
    if checkpoint.norm == "token-wise":
        raise fields.wrong("norm_activation", f"{_CONSTANT} for a transcoder, whose outputs have norms of their own")
    n = checkpoint.check_shapes("W_E", [layers, d, None])[2]
    file.require("b_E", [layers, n])
    for out in range(layers):
        file.require(f"W_D.{out}", [out + 1, n, d])
        file.require(f"b_D.{out}", [d])
    names = {f"{name}.{out}" for name in ("W_D", "b_D") for out in range(layers)}
    refuse_others(file, {"W_E", "b_E", LOG_THRESHOLD, *names, *checkpoint.norm_names}, "a llamascopium CLT")
    layer = _chosen(hooks_in, path, hints)
    scales = [checkpoint.scale(name) for name in fields.content["hook_points_out"][layer:]]
    written = [file.rows(f"W_D.{out}", [layer])[0].double() for out in range(layer, layers)]
    gate = {"b_enc": file.rows("b_E", [layer])[0]}
    norms = _decoder_norms(torch.cat(written, dim=1)) if checkpoint.by_norm else torch.ones(n, dtype=torch.float64)
    if checkpoint.act == "jumprelu":
        gate["threshold"] = checkpoint.threshold([layers, n])[layer].double() / norms
    if checkpoint.k is not None and checkpoint.by_norm:
        gate["rank_scale"] = norms
    own_bias = file.tensor(f"b_D.{layer}").double() / scales[0]
    scale_in = checkpoint.scale(fields.content["hook_points_in"][layer])
    return SAE(
        architecture=checkpoint.architecture,
        hook=hooks_in[layer],
        hook_out=hooks_out[layer],
        source=checkpoint.in_memory(
            W_enc=file.rows("W_E", [layer])[0].T.double() * scale_in,
            W_dec=torch.cat([part / scale for part, scale in zip(written, scales, strict=True)], dim=1),
            b_dec=torch.cat([own_bias, torch.zeros(d * (layers - layer - 1), dtype=torch.float64)]),
            gate=gate,
        ),
        k=checkpoint.k,
        metadata=checkpoint.metadata(
            hook_name=fields.content["hook_points_in"][layer],
            hook_names_out=fields.content["hook_points_out"][layer:],
        ),
    )


def _chosen(hooks_in: list[Hook], path: Path, hints: Hints) -> int:
    """Which layer of a CLT is meant."""
    if len(hooks_in) == 1:
        return 0
    listed = ", ".join(hook.hook_name for hook in hooks_in)
    if hints.hook is None:
        raise SAEFormatError(f"{path}: holds {len(hooks_in)} layers; name the one to open by its hook: {listed}")
    wanted = parse_hook_name(hints.hook)
    if wanted not in hooks_in:
        raise SAEFormatError(f"hook: {hints.hook!r}; {path} reads {listed}")
    return hooks_in.index(wanted)
