"""dictionary_learning (saprmarks; and forks): a folder of ae.pt and config.json, one class per architecture.

Layout: config.json ``{"trainer": {dict_class, layer, lm_name, submodule_name, k, activation_dim, dict_size …}, "buffer":
{io, ctx_len …}}``; ae.pt a state dict, fp32 or bf16 (checkpoints/ae_STEP.pt beneath it are of the same kind)::

    AutoEncoder             encoder.weight [n, d], encoder.bias [n], decoder.weight [d, n], bias [d]
    AutoEncoderNew          encoder.weight, encoder.bias, decoder.weight, decoder.bias [d]
    GatedAutoEncoder        encoder.weight, gate_bias, mag_bias, r_mag [n], decoder.weight, decoder_bias [d]
    JumpReluAutoEncoder     W_enc [d, n], b_enc, threshold [n], W_dec [n, d], b_dec [d]
    AutoEncoderTopK         encoder.*, decoder.weight, b_dec [d], k () int32, threshold () fp32
    BatchTopKSAE            the same tensors; forks add target_rms, activation_{mean, std} [d], activation_global_scale ()
    MatryoshkaBatchTopKSAE  W_enc [d, n], b_enc, W_dec [n, d], b_dec, k, threshold (), group_sizes [groups] int64
    VSAETopK (a fork)       encoder.*, decoder.weight, decoder.bias | b_dec | bias, k, [threshold], [var_encoder.*]
    CrossCoder, BatchTopKCrossCoder (a fork): see dictionary_learning_crosscoder.py

p-anneal, the April update and other trainers save one of these classes. Without a config.json the tensors tell the class,
except AutoEncoderTopK from BatchTopKSAE.

Folded, and why:

- AutoEncoder: ``from_pretrained`` brings decoder columns to norm 1 and scales the encoder to match; so do we (the
  fork of science-of-finetuning leaves them as stored: the same reconstruction in other units). The other classes are
  taken as they are.
- encode subtracts the decoder bias in AutoEncoder, Gated, TopK, BatchTopK and Matryoshka; not in AutoEncoderNew and not in
  JumpRelu (whose ``apply_b_dec_to_input`` is true only for dictionaries that came from elsewhere).
- θ of BatchTopK starts at −1 in training: such a dictionary is a plain ReLU until θ was estimated.
- ``trainer.norm_factor`` is folded into the biases before saving: nothing is left to apply.
- activation_mean and _std (forks): x̃ = (x − mean) · g with g = activation_global_scale, undone on the output with g + 1e-8.
- VSAETopK: the mean of the latents, without noise; var_encoder.* serves training only. Its variant that takes the k largest
  of |μ| without a ReLU keeps k as an int64 parameter, the ones with a ReLU as an int32 buffer: settings ``signed``.

Sources: dictionary_learning 0.1.0 and git 60ec6bf (MIT); github.com/science-of-finetuning/dictionary_learning 173f7fa.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_weights.errors import SAEFormatError
from sae_weights.folding import Folding
from sae_weights.hook import Hook
from sae_weights.sae import SAE

from .base import Format, Hints
from .dictionary_learning_crosscoder import CROSSCODERS, open_crosscoder
from .input_scale import constant_scale
from .json_object import read_json_object
from .layout import Matrix, TensorRows
from .nested_fields import NestedFields
from .pickled import PickledFile
from .tensor_file import TensorFile
from .tensors import Tensors, shown, whole_number

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "ae.pt"
HUB_FILE = "model.safetensors"
_COMPILED = "_orig_mod."
_NORMALISER = ("target_rms", "activation_mean", "activation_std", "activation_global_scale")


@dataclass(frozen=True)
class _Class:
    """How one dictionary class stores what."""

    architecture: str
    b_dec: str
    gate: Mapping[str, str]
    plain: bool = False  # parameters W_enc and W_dec instead of linear layers
    folding: Mapping[str, bool] = field(default_factory=dict)
    ignore: tuple[str, ...] = ()  # decide nothing, or are read apart from the others


_LINEAR = {"b_enc": "encoder.bias"}
_CENTRED = {"subtract_b_dec": True}
_CLASSES = {
    "AutoEncoder": _Class("relu", "bias", _LINEAR, folding=_CENTRED | {"decoder_norm": True}),
    "AutoEncoderNew": _Class("relu", "decoder.bias", _LINEAR),
    "GatedAutoEncoder": _Class(
        "gated",
        "decoder_bias",
        {"b_gate": "gate_bias", "b_mag": "mag_bias", "r_mag": "r_mag"},
        folding=_CENTRED,
    ),
    "JumpReluAutoEncoder": _Class(
        "jumprelu", "b_dec", {"b_enc": "b_enc", "threshold": "threshold"}, plain=True, ignore=("threshold",)
    ),
    "AutoEncoderTopK": _Class("topk", "b_dec", _LINEAR, folding=_CENTRED, ignore=("k", "threshold")),
    "BatchTopKSAE": _Class(
        "batchtopk",
        "b_dec",
        _LINEAR | {"threshold": "threshold"},
        folding=_CENTRED,
        ignore=("b_dec", "k", "threshold", *_NORMALISER),
    ),
    "MatryoshkaBatchTopKSAE": _Class(
        "matryoshka",
        "b_dec",
        {"b_enc": "b_enc", "threshold": "threshold"},
        plain=True,
        folding=_CENTRED,
        ignore=("k", "threshold", "group_sizes"),
    ),
    "VSAETopK": _Class(
        "vsae", "decoder.bias", _LINEAR, ignore=("k", "threshold", "var_encoder.weight", "var_encoder.bias")
    ),
}


class DictionaryLearning(Format):
    """See the module."""

    name = "dictionary_learning"
    title = "dictionary_learning"
    files = f"{WEIGHTS_FILE} + {CONFIG_FILE} (trainer)"
    reference = "github.com/saprmarks/dictionary_learning"
    architectures = ("relu", "p_anneal", "gated", "jumprelu", "topk", "batchtopk", "matryoshka", "vsae")

    def recognises(self, path: Path) -> bool:
        if path.is_dir():
            return (path / WEIGHTS_FILE).is_file() or self._from_hub(path)
        return path.name == WEIGHTS_FILE or (path.suffix == ".pt" and _config_of(path) is not None)

    def open(self, path: Path, hints: Hints) -> SAE:
        weights = path
        if path.is_dir():
            weights = path / (WEIGHTS_FILE if (path / WEIGHTS_FILE).exists() else HUB_FILE)
        config_path = _config_of(weights)
        content = read_json_object(config_path) if config_path is not None else {}
        config = NestedFields(config_path or weights, content)
        # A dictionary pushed to a hub keeps its constructor's arguments at the top level.
        trainer = config.inside("trainer") if "trainer" in content else config
        file = _tensors(weights)
        name = trainer.text("dict_class") if "dict_class" in trainer.content else _class_of(file)
        metadata = _metadata(name, trainer, config.inside("buffer"))
        if name in CROSSCODERS:
            return open_crosscoder(self, weights, file, name, trainer, hints, metadata)
        if name not in _CLASSES:
            raise trainer.wrong("dict_class", f"one of {', '.join([*_CLASSES, *CROSSCODERS])}")
        hook, hook_out = self._hooks(weights, trainer, config.inside("buffer"), hints)
        return _open(name, file, trainer, hints, hook, hook_out, metadata)

    def _from_hub(self, folder: Path) -> bool:
        """A dictionary that a fork's classes pushed to a hub: model.safetensors and the constructor's arguments."""
        try:
            config = read_json_object(folder / CONFIG_FILE)
            return {"activation_dim", "dict_size"} <= config.keys() and (folder / HUB_FILE).is_file()
        except (SAEFormatError, OSError):
            return False

    def _hooks(
        self, weights: Path, trainer: NestedFields, buffer: NestedFields, hints: Hints
    ) -> tuple[Hook, Hook | None]:
        io = buffer.text("io", "out")
        module = trainer.text("submodule_name", "/".join(weights.parts[-4:-1]))
        point, point_out = module_points(module)
        stated = None
        if "layer" in trainer.content:
            stated = Hook(point if io in ("in", "in_and_out") else point_out, trainer.layer("layer")).hook_name
        hook = self.hook(weights, hints, stated, point=point_out)
        if hints.hook_out is not None:
            return hook, self.hook(weights, Hints(hook=hints.hook_out))
        return hook, Hook(point_out, hook.layer) if io == "in_and_out" else None


def module_points(module: str) -> tuple[str, str]:
    """What goes in and out of a module that a trainer names: "resid_post_layer_3", "mlp_out_layer2", "attn" …"""
    if "mlp" in module:
        return "mlp_in", "mlp_out"
    if "attn" in module or "attention" in module:
        return "attn_in", "attn_out"
    return "resid_pre", "resid_pre" if "resid_pre" in module else "resid_post"


def _open(
    name: str,
    file: Tensors,
    trainer: NestedFields,
    hints: Hints,
    hook: Hook,
    hook_out: Hook | None,
    metadata: dict[str, Any],
) -> SAE:
    form = _CLASSES[name]
    n, d = _extents(file, form)
    b_dec: str | Tensor = form.b_dec
    gate: dict[str, str | Tensor] = dict(form.gate)
    folding: dict[str, Any] = dict(form.folding)
    settings: dict[str, Any] = {}
    scale = constant_scale(file.path, hints)
    if name == "VSAETopK" and b_dec not in file.shapes:
        # Before the April update's form: the decoder bias is subtracted from the input too.
        b_dec = "b_dec" if "b_dec" in file.shapes else "bias"
        folding = dict(_CENTRED)
    if "threshold" in gate:
        file.require("threshold", [], [n])
        gate["threshold"] = file.tensor("threshold").float().expand(n)
    elif "threshold" in file.shapes:
        file.require("threshold", [])
        metadata["threshold"] = float(file.tensor("threshold"))
    if name == "BatchTopKSAE" and (normaliser := _normaliser(file, d)) is not None:
        mean, g = normaliser
        file.require("b_dec", [d])
        stored = file.tensor("b_dec").double()
        folding = {"output_scale": (g + 1e-8) * scale, "subtract": (stored + mean * g)}
        b_dec, scale = stored + mean * (g + 1e-8), scale * g
    if name == "MatryoshkaBatchTopKSAE":
        if "group_sizes" not in file.shapes:
            raise SAEFormatError(f"{file.path}: no tensor 'group_sizes'; expected the sizes of the nested groups")
        settings["group_sizes"] = [int(size) for size in file.tensor("group_sizes").flatten()]
    if name == "VSAETopK":
        settings["signed"] = "threshold" not in file.shapes and file.dtypes.get("k") == "I64"
    k = latents_per_token(file, trainer, hints)
    if k is not None:
        metadata["k"] = k
    annealed = name == "AutoEncoder" and trainer.content.get("trainer_class") == "PAnnealTrainer"
    return SAE(
        architecture="p_anneal" if annealed else form.architecture,
        hook=hook,
        hook_out=hook_out,
        source=TensorRows(
            file,
            encoder=Matrix("W_enc", transposed=True) if form.plain else Matrix("encoder.weight"),
            decoder=Matrix("W_dec") if form.plain else Matrix("decoder.weight", transposed=True),
            b_dec=b_dec,
            gate=gate,
            ignore=form.ignore,
            what=f"dictionary_learning's {name}",
        ),
        folding=Folding(input_scale=scale, **folding),
        k=k if form.architecture in ("topk", "vsae") else None,
        settings=settings,
        metadata=metadata,
    )


def latents_per_token(file: Tensors, trainer: NestedFields, hints: Hints) -> int | None:
    """k of the checkpoint, of its config and as hinted, which must agree; None where nobody says."""
    said: dict[str, int] = {}
    if "k" in file.shapes:
        said[f"{file.path}: tensor 'k'"] = whole_number(file, "k")
    if "k" in trainer.content:
        said[f"{trainer.path}: field 'k'"] = trainer.count("k")
    if hints.k is not None:
        said["k as given"] = hints.k
    if len(set(said.values())) > 1:
        raise SAEFormatError("; ".join(f"{who} is {k}" for who, k in said.items()) + "; expected the same")
    return next(iter(said.values()), None)


def _extents(file: Tensors, form: _Class) -> tuple[int, int]:
    name = "W_dec" if form.plain else "decoder.weight"
    file.require(name)
    shape = file.shapes[name]
    if len(shape) != 2:
        raise SAEFormatError(f"{file.path}: tensor {name!r} has shape {shape}; expected a matrix")
    return (shape[0], shape[1]) if form.plain else (shape[1], shape[0])


def _normaliser(file: Tensors, d: int) -> tuple[Tensor, float] | None:
    """mean [d] fp64 and scale, where the checkpoint normalises its input; a fork writes NaN where it does not."""
    if "activation_mean" not in file.shapes or "activation_global_scale" not in file.shapes:
        return None
    file.require("activation_mean", [d])
    file.require("activation_std", [d])
    file.require("activation_global_scale", [])
    mean = file.tensor("activation_mean").double()
    if bool(mean.isnan().any()) or bool(file.tensor("activation_std").isnan().any()):
        return None
    return mean, float(file.tensor("activation_global_scale"))


def _tensors(weights: Path) -> Tensors:
    if weights.suffix == ".safetensors":
        return TensorFile(weights)
    file = PickledFile(weights)
    if "ae.encoder.weight" in file.shapes or "ae.W_enc" in file.shapes:
        raise SAEFormatError(
            f"{weights}: holds a trainer's state (step, optimizer, ae), written as a backup during training; "
            "its biases are not in the model's units yet. The training writes the dictionary in its place when it ends"
        )
    if file.shapes and all(name.startswith(_COMPILED) for name in file.shapes):
        return PickledFile(weights, prefix=_COMPILED)  # saved while compiled
    return file


def _class_of(file: Tensors) -> str:
    """The class that has these tensors."""
    names = file.shapes.keys()
    if len(file.shapes.get("encoder.weight", ())) == 3:
        return "BatchTopKCrossCoder" if "threshold" in names else "CrossCoder"
    if "var_encoder.weight" in names or {"decoder.bias", "k"} <= names:
        return "VSAETopK"
    if {"encoder.weight", "b_dec", "k"} <= names and "activation_mean" not in names:
        raise SAEFormatError(
            f"{file.path}: AutoEncoderTopK and BatchTopKSAE have these tensors; expected a {CONFIG_FILE} beside it, "
            'with {"trainer": {"dict_class": …}}'
        )
    telling = {
        "group_sizes": "MatryoshkaBatchTopKSAE",
        "activation_mean": "BatchTopKSAE",
        "r_mag": "GatedAutoEncoder",
        "threshold": "JumpReluAutoEncoder",
        "decoder.bias": "AutoEncoderNew",
        "bias": "AutoEncoder",
    }
    for tensor, name in telling.items():
        if tensor in names:
            return name
    raise SAEFormatError(f"{file.path}: none of dictionary_learning's classes; it holds {shown(file.shapes)}")


def _config_of(weights: Path) -> Path | None:
    """config.json beside the weights, or above the folder ``checkpoints``; for a .pt file only a trainer's."""
    above = [weights.parent] + ([weights.parent.parent] if weights.parent.name == "checkpoints" else [])
    for folder in above:
        try:
            if (folder / CONFIG_FILE).is_file():
                config = read_json_object(folder / CONFIG_FILE)
                if weights.name in (WEIGHTS_FILE, HUB_FILE) or isinstance(config.get("trainer"), dict):
                    return folder / CONFIG_FILE
        except (SAEFormatError, OSError):
            if weights.name == WEIGHTS_FILE:
                return folder / CONFIG_FILE  # opening says what is wrong with it
    return None


def _metadata(name: str, trainer: NestedFields, buffer: NestedFields) -> dict[str, Any]:
    """What is worth keeping of the config, under the names that the rest of the project uses."""
    kept = {
        "model_name": trainer.content.get("lm_name"),
        "context_size": buffer.content.get("ctx_len"),
        "dict_class": name,
        "trainer_class": trainer.content.get("trainer_class"),
        "submodule_name": trainer.content.get("submodule_name"),
    }
    return {key: value for key, value in kept.items() if isinstance(value, str | int)}
