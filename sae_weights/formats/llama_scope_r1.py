"""Llama Scope R1-Distill: a folder of config.json and sae_weights.safetensors, with a threshold per feature.

Layout::

    OpenMOSS-Team/Llama-Scope-R1-Distill/{800M-Slimpajama-0-OpenR1-Math-220k, …}/L{layer}R/
        config.json     {"hook_point_in", "hook_point_out", "d_model": 4096, "expansion_factor": 8, "act_fn": "jumprelu",
                         "norm_activation": "dataset-wise", "sparsity_include_decoder_norm": false,
                         "apply_decoder_bias_to_pre_encoder": false, …}
        sae_weights.safetensors     encoder.weight [n, d], encoder.bias [n], decoder.weight [d, n], decoder.bias [d],
                                    log_jumprelu_threshold [n], dataset_average_activation_norm.<hook>, numbers
                                    float32

JumpReLU trained as such: the threshold is exp(log_jumprelu_threshold), in the units of the scaled input, and is not
scaled again. Folded: s = √d / E‖x‖, which the weights file holds (sae-lens takes it from its registry; the hint
``norm_scaling_factor`` serves where a copy has lost it). sae-lens calls the model Llama-3.1-8B; it is the R1 distillate.

Source: huggingface.co/OpenMOSS-Team/Llama-Scope-R1-Distill, arXiv:2410.20526.
"""

from __future__ import annotations

from pathlib import Path

from sae_weights.errors import SAEFormatError
from sae_weights.sae import SAE

from .base import Format, Hints
from .fields import Fields
from .json_object import read_json_object
from .llama_scope import open_linear, read_scales
from .tensor_file import TensorFile

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "sae_weights.safetensors"
MODEL = "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
_AVERAGE = "dataset_average_activation_norm."
_THRESHOLD = "log_jumprelu_threshold"


class LlamaScopeR1(Format):
    """See the module."""

    name = "llama_scope_r1"
    title = "Llama Scope R1-Distill"
    files = f"{CONFIG_FILE} + {WEIGHTS_FILE} (encoder.weight, {_THRESHOLD})"
    reference = "huggingface.co/OpenMOSS-Team/Llama-Scope-R1-Distill"
    architectures = ("jumprelu",)

    def recognises(self, path: Path) -> bool:
        if not (path / CONFIG_FILE).is_file() or not (path / WEIGHTS_FILE).is_file():
            return False
        try:
            return _THRESHOLD in TensorFile(path / WEIGHTS_FILE).shapes
        except SAEFormatError:
            # Unreadable weights: the config still says whose they are, and the error will name the file.
            return _is_ours(path / CONFIG_FILE)

    def open(self, path: Path, hints: Hints) -> SAE:
        config = Fields(path / CONFIG_FILE, read_json_object(path / CONFIG_FILE))
        config.choice("act_fn", ("jumprelu",))
        file = TensorFile(path / WEIGHTS_FILE)
        stored = [name for name in file.shapes if name.startswith(_AVERAGE)]
        for name in stored:
            file.require(name, [], [1])
        averages = Fields(file.path, {name: float(file.tensor(name)) for name in stored})
        places = [_AVERAGE + str(config.content.get(field)) for field in ("hook_point_in", "hook_point_out")]
        scales = read_scales(config, hints, averages, *places)
        file.require(_THRESHOLD)
        threshold = file.tensor(_THRESHOLD).double().exp()
        return open_linear(
            self, path, hints, config, file, scales, threshold, model=MODEL, ignore=[_THRESHOLD, *stored]
        )


def _is_ours(path: Path) -> bool:
    try:
        config = read_json_object(path)
    except SAEFormatError:
        return False
    return "hook_point_in" in config and "sae_type" not in config
