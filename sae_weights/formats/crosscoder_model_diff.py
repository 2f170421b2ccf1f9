"""Kissane's crosscoder between two models (crosscoder-model-diff-replication): cfg.json and cc_weights.pt.

Layout: a hub folder ``blocks.14.hook_resid_pre/{cfg.json, cc_weights.pt}``, or a training's ``N_cfg.json`` and ``N.pt``;
cfg.json ``{d_in d, dict_size n, hook_point, model_name, …}``; a state dict, fp32 or bf16::

    W_enc [2, d, n], b_enc [n], W_dec [n, 2, d], b_dec [2, d]

f = relu(Σ_m x_m · W_enc[m] + b_enc), x̂_m = f · W_dec[:, m] + b_dec[m]. The canonical input is (base model, chat model)
one after the other, [N, 2·d]. Any number of models is read.

Nothing is folded. In training each model's activations were scaled to an average norm of √d by a factor that the checkpoint
does not hold: x is in those units. Where both models share one factor, norm_scaling_factor folds it in.

Source: github.com/ckkissane/crosscoder-model-diff-replication e221e8d, crosscoder.py and buffer.py.
"""

from __future__ import annotations

from pathlib import Path

from sae_weights.errors import SAEFormatError
from sae_weights.folding import Folding
from sae_weights.sae import SAE

from .base import Format, Hints
from .dictionary_learning_crosscoder import concatenated_hooks
from .input_scale import constant_scale
from .json_object import read_json_object
from .nested_fields import NestedFields
from .pickled import PickledFile
from .tensors import refuse_others

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "cc_weights.pt"


class CrosscoderModelDiff(Format):
    """See the module."""

    name = "crosscoder_model_diff"
    title = "Kissane's crosscoder between two models"
    files = f"{WEIGHTS_FILE} + {CONFIG_FILE}"
    reference = "github.com/ckkissane/crosscoder-model-diff-replication"
    architectures = ("relu",)
    edited = False

    def recognises(self, path: Path) -> bool:
        if path.is_dir():
            return (path / WEIGHTS_FILE).is_file()
        return path.name == WEIGHTS_FILE or (path.suffix == ".pt" and _config_of(path).is_file())

    def open(self, path: Path, hints: Hints) -> SAE:
        weights = path / WEIGHTS_FILE if path.is_dir() else path
        config = _config_of(weights)
        fields, file = NestedFields(config, read_json_object(config)), PickledFile(weights)
        refuse_others(file, {"W_enc", "b_enc", "W_dec", "b_dec"}, "this crosscoder")
        d, n = fields.count("d_in"), fields.count("dict_size")
        file.require("W_dec")
        shape = file.shapes["W_dec"]
        if len(shape) != 3 or shape[1] < 1:
            raise SAEFormatError(f"{weights}: tensor 'W_dec' has shape {shape}; expected [{n}, models, {d}]")
        models = shape[1]
        for name, wanted in {"W_dec": [n, models, d], "W_enc": [models, d, n]}.items():
            file.require(name, wanted)
        file.require("b_enc", [n])
        file.require("b_dec", [models, d])
        hooks = concatenated_hooks(self, weights, fields, models, hints, fields.text("hook_point", ""))
        model = fields.content.get("model_name")
        return SAE.from_tensors(
            label=str(weights),
            architecture="relu",
            hook=hooks[0],
            hooks=hooks,
            W_enc=file.tensor("W_enc").permute(2, 0, 1).reshape(n, models * d),
            W_dec=file.tensor("W_dec").reshape(n, models * d),
            b_dec=file.tensor("b_dec").flatten(),
            gate={"b_enc": file.tensor("b_enc")},
            folding=Folding(input_scale=constant_scale(weights, hints)),
            metadata={"model_name": model} if isinstance(model, str) else {},
        )


def _config_of(weights: Path) -> Path:
    return weights.parent / (CONFIG_FILE if weights.name == WEIGHTS_FILE else f"{weights.stem}_cfg.json")
