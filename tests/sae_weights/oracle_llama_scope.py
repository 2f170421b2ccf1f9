"""Run by formats/test_llama_scope.py with the interpreter that has llamascopium; imports nothing of ours.

    python oracle_llama_scope.py WORK

WORK/<case>/ are Llama Scope folders. Their authors' class is given the weights and the one threshold of each, folds the
scales of the data set with its own ``standardize_parameters_of_dataset_norm``, and answers in answers.safetensors: x, the
features f in the units of training, and x_hat.
"""

from __future__ import annotations

import json
import math
import sys
import sysconfig
import types
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

warnings.simplefilter("ignore")


def skip_initialisation(*packages):
    """The packages' own __init__ files import databases and web services: here only single modules of them are used."""
    for name in packages:
        module = types.ModuleType(name)
        module.__path__ = [str(Path(sysconfig.get_paths()["purelib"], *name.split(".")))]
        sys.modules[name] = module


skip_initialisation("llamascopium", "llamascopium.models", "llamascopium.backend")
language_model = types.ModuleType("llamascopium.backend.language_model")
language_model.LanguageModelConfig = object  # named in annotations only
sys.modules[language_model.__name__] = language_model

from llamascopium.models.sae import SAEConfig, SparseAutoEncoder  # noqa: E402


@torch.no_grad()
def answer(folder, generator):
    told = json.loads((folder / "hyperparams.json").read_text())
    raw = {name: t.float() for name, t in load_file(folder / "checkpoints" / "final.safetensors").items()}
    names = ("hook_point_in", "hook_point_out", "d_model", "act_fn", "norm_activation")
    names += ("sparsity_include_decoder_norm", "use_decoder_bias", "use_glu_encoder")
    cfg = SAEConfig(expansion_factor=told["d_sae"] / told["d_model"], **{name: told[name] for name in names})
    model = SparseAutoEncoder(cfg)
    for name, value in {
        "W_E": raw["encoder.weight"].T,
        "b_E": raw["encoder.bias"],
        "W_D": raw["decoder.weight"].T,
        "b_D": raw["decoder.bias"],
        "activation_function.log_jumprelu_threshold": torch.tensor(told["jump_relu_threshold"]).log(),
    }.items():
        model.get_parameter(name).copy_(value)
    norms = told["dataset_average_activation_norm"]
    model.set_dataset_average_activation_norm({cfg.hook_point_out: norms["out"], cfg.hook_point_in: norms["in"]})
    model.standardize_parameters_of_dataset_norm()
    x = torch.randn(60, cfg.d_model, generator=generator) * norms["in"] / math.sqrt(cfg.d_model)
    f = model.encode(x)
    scale = math.sqrt(cfg.d_model) / norms["in"]
    save_file({"x": x, "f": f * scale, "x_hat": model.decode(f)}, folder / "answers.safetensors")


def main():
    torch.set_num_threads(1)
    for seed, folder in enumerate(sorted(Path(sys.argv[1]).iterdir())):
        answer(folder, torch.Generator().manual_seed(seed))


if __name__ == "__main__":
    main()
