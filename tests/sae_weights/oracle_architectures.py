"""Run by architectures/test_against_authors.py with the interpreter that has the authors' packages; imports nothing of ours.

    python oracle_architectures.py WORK

For each WORK/<case>/ (case.json, given.safetensors with x and the weights): builds the authors' own class with those
weights and writes answers.safetensors: f, and the reconstruction by f (x_hat).
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import types
from pathlib import Path

import torch
from absent_packages import stand_in_for
from sae_lens.saes.abstopk_sae import AbsTopKSAE, AbsTopKSAEConfig
from sae_lens.saes.matching_pursuit_sae import MatchingPursuitSAE, MatchingPursuitSAEConfig
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import load_file, save_file

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its decoder kernel needs a GPU
stand_in_for("circuitsvis", "natsort", "nnsight", "schedulefree", "umap", "wandb")

# The package of overcomplete imports vision models and scikit-learn as well; its module of SAEs does without.
package = types.ModuleType("overcomplete")
package.__path__ = list(importlib.util.find_spec("overcomplete").submodule_search_locations)
sys.modules["overcomplete"] = package
stand_in_for("cv2", "einops", "matplotlib", "scipy", "sklearn", "timm", "torchvision")

from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE  # noqa: E402
from overcomplete.sae.mp_sae import MpSAE  # noqa: E402
from sparsify.config import SparseCoderConfig  # noqa: E402
from sparsify.sparse_coder import SparseCoder  # noqa: E402


def of_sae_lens(kind, config, weights, options):
    n, d = weights["W_dec"].shape
    metadata = SAEMetadata(hook_name="blocks.3.hook_resid_post")
    sae = kind(config(d_in=d, d_sae=n, dtype="float32", device="cpu", metadata=metadata, **options))
    stored = {name: tensor.T if name == "W_enc" else tensor for name, tensor in weights.items()}
    sae.load_state_dict({name: stored[name].contiguous() for name in sae.state_dict()})
    return sae.encode, sae.decode


def abstopk(weights, options):
    return of_sae_lens(AbsTopKSAE, AbsTopKSAEConfig, weights, options)


def matching_pursuit(weights, options):
    return of_sae_lens(MatchingPursuitSAE, MatchingPursuitSAEConfig, weights, options)


def mp_sae(weights, options):
    n, d = weights["W_dec"].shape
    sae = MpSAE(d, n, dictionary_params={"initializer": weights["W_dec"]}, **options)
    sae.eval()
    return lambda x: sae.encode(x)[1], sae.decode


def groupmax(weights, options):
    n, d = weights["W_dec"].shape
    coder = SparseCoder(d, SparseCoderConfig(activation="groupmax", num_latents=n, normalize_decoder=False, **options))
    names = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
    coder.load_state_dict({theirs: weights[ours] for theirs, ours in names.items()})

    def encode(x):
        top_acts, top_indices, _ = coder.encode(x)
        return torch.zeros(len(x), n).scatter_(1, top_indices, top_acts)

    def decode(f):
        values, indices = f.topk(options["k"], dim=-1)
        return coder.decode(values, indices)

    return encode, decode


def matryoshka(weights, options):
    n, d = weights["W_dec"].shape
    sae = MatryoshkaBatchTopKSAE(d, n, k=4, group_sizes=options["group_sizes"])
    stored = {name: tensor.T if name == "W_enc" else tensor for name, tensor in weights.items()}
    sae.load_state_dict(sae.state_dict() | {"threshold": stored.pop("threshold")[0], **stored})
    sae.active_groups = options["active_groups"]
    return sae.encode, sae.decode


AUTHORS = {author.__name__: author for author in (abstopk, matching_pursuit, mp_sae, groupmax, matryoshka)}


@torch.no_grad()
def answer(folder):
    case = json.loads((folder / "case.json").read_text())
    weights = load_file(folder / "given.safetensors")
    x = weights.pop("x")
    encode, decode = AUTHORS[case["author"]](weights, case["options"])
    f = encode(x)
    save_file({"f": f.contiguous(), "x_hat": decode(f).contiguous()}, folder / "answers.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for given in sorted(Path(sys.argv[1]).iterdir()):
        answer(given)
