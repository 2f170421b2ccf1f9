"""Run by test_llamascopium.py with the interpreter that has llamascopium; imports nothing of ours.

    python oracle_llamascopium.py WORK

Writes WORK/<case>/: random dictionaries, saved by llamascopium itself (config.json, sae_weights.safetensors), each with
answers.safetensors: x, the features f, and the reconstruction x_hat in the model's own space.
"""

from __future__ import annotations

import itertools
import sys
import sysconfig
import types
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file

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

from llamascopium.models.clt import CLTConfig, CrossLayerTranscoder  # noqa: E402
from llamascopium.models.crosscoder import Crosscoder, CrosscoderConfig  # noqa: E402
from llamascopium.models.sae import SAEConfig, SparseAutoEncoder  # noqa: E402
from llamascopium.models.sparse_dictionary import SparseDictionary  # noqa: E402

D, N, TOKENS, K, LAYERS = 12, 48, 30, 6, 3
RESIDUAL, MLP_IN, MLP_OUT = "blocks.7.hook_resid_post", "blocks.7.ln2.hook_normalized", "blocks.7.hook_mlp_out"
NORMS = {"in": 11.3, "out": 4.7}


def randomise(model, generator):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if name.endswith("log_jumprelu_threshold"):
                values = values * 0.5 - 0.3
            elif name.split(".")[0] not in ("W_E", "W_D", "W_E_glu"):
                values = values * 0.4
            elif name.startswith("W_D"):
                # Decoder rows of different length: a dictionary that leaves their norms out would show.
                values = values * (0.2 + torch.rand(values.shape[:-1], generator=generator))[..., None]
            parameter.copy_(values)
    return model


def tokens(generator, *shape):
    size = torch.rand(shape[0], *(1,) * (len(shape) - 1), generator=generator) * 4 + 0.2
    return (torch.randn(*shape, generator=generator) + 0.4) * size


def save(model, folder):
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    model.cfg.save_hyperparameters(folder)
    return SparseDictionary.from_pretrained(str(folder), dtype=torch.float32)


@torch.no_grad()
def one_by_one(function, x):
    """BatchTopK looks at the whole batch: a token alone is a batch of its own."""
    return torch.cat([function(token[None]) for token in x])


def answer(folder, **tensors):
    tensors = {name: tensor.detach().float().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "answers.safetensors")


@torch.no_grad()
def sae(root, case, generator, hooks=(RESIDUAL, RESIDUAL), **settings):
    cfg = SAEConfig(
        hook_point_in=hooks[0], hook_point_out=hooks[1], d_model=D, expansion_factor=N / D, top_k=K, **settings
    )
    model = randomise(SparseAutoEncoder(cfg), generator)
    if cfg.norm_activation == "dataset-wise":
        # One hook has one norm: the name that comes last wins, as it does when llamascopium measures them.
        model.set_dataset_average_activation_norm({hooks[1]: NORMS["out"], hooks[0]: NORMS["in"]})
    model = save(model, root / case)
    x = tokens(generator, TOKENS, D)
    f = one_by_one(model.encode, x * model.compute_norm_factor(x, hook_point=hooks[0]))
    answer(root / case, x=x, f=f, x_hat=model.decode(f) / model.compute_norm_factor(x, hook_point=hooks[1]))


@torch.no_grad()
def crosscoder(root, case, generator, **settings):
    hooks = [f"blocks.{layer}.hook_resid_post" for layer in range(LAYERS)]
    cfg = CrosscoderConfig(hook_points=hooks, d_model=D, expansion_factor=N / D, top_k=K, **settings)
    model = randomise(Crosscoder(cfg), generator)
    if cfg.norm_activation == "dataset-wise":
        model.set_dataset_average_activation_norm({hook: 3.0 + 2 * i for i, hook in enumerate(hooks)})
    model = save(model, root / case)
    x = tokens(generator, TOKENS, LAYERS, D)
    factors = torch.stack([model.compute_norm_factor(x[:, i], hook_point=hook) for i, hook in enumerate(hooks)])
    f = one_by_one(model.encode, x * factors[:, None])
    answer(root / case, x=x, f=f, x_hat=model.decode(f) / factors[:, None])


@torch.no_grad()
def clt(root, case, generator, **settings):
    hooks_in = [f"blocks.{layer}.ln2.hook_normalized" for layer in range(LAYERS)]
    hooks_out = [f"blocks.{layer}.hook_mlp_out" for layer in range(LAYERS)]
    cfg = CLTConfig(
        hook_points_in=hooks_in, hook_points_out=hooks_out, d_model=D, expansion_factor=N / D, top_k=K, **settings
    )
    model = randomise(CrossLayerTranscoder(cfg), generator)
    if cfg.norm_activation == "dataset-wise":
        norms = {hook: 3.0 + 2 * i for i, hook in enumerate(hooks_in)}
        model.set_dataset_average_activation_norm(norms | {hook: 9.0 - 2 * i for i, hook in enumerate(hooks_out)})
    model = save(model, root / case)
    x = tokens(generator, TOKENS, LAYERS, D)
    factors_in = torch.stack([model.compute_norm_factor(x[:, i], hook_point=h) for i, h in enumerate(hooks_in)])
    factors_out = torch.stack([model.compute_norm_factor(x[:, i], hook_point=h) for i, h in enumerate(hooks_out)])
    f = one_by_one(model.encode, x * factors_in[:, None])
    x_hat = model.decode(f) / factors_out[:, None, None]  # [layer, token, d]
    answer(root / case, x=x, f=f, x_hat=x_hat.transpose(0, 1))


def main():
    root = Path(sys.argv[1])
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(4)
    for act, norm, with_norm in itertools.product(
        ("relu", "jumprelu", "topk", "batchtopk"), ("dataset-wise", "token-wise", "inference"), (True, False)
    ):
        settings = {"act_fn": act, "norm_activation": norm, "sparsity_include_decoder_norm": with_norm}
        sae(root, f"sae.{act}.{norm}.{'gated-by-norm' if with_norm else 'plain'}", generator, **settings)
    for act, norm in itertools.product(("relu", "jumprelu", "topk"), ("dataset-wise", "token-wise", "inference")):
        sae(root, f"glu.{act}.{norm}", generator, act_fn=act, norm_activation=norm, use_glu_encoder=True)
    for act, norm in itertools.product(("relu", "jumprelu", "topk"), ("dataset-wise", "inference")):
        sae(root, f"transcoder.{act}.{norm}", generator, hooks=(MLP_IN, MLP_OUT), act_fn=act, norm_activation=norm)
    sae(root, "sae.no-decoder-bias", generator, act_fn="jumprelu", use_decoder_bias=False)
    sae(root, "sae.bfloat16", generator, act_fn="jumprelu", dtype=torch.bfloat16)
    for act, norm in itertools.product(("relu", "jumprelu", "topk"), ("dataset-wise", "inference")):
        crosscoder(root, f"crosscoder.{act}.{norm}", generator, act_fn=act, norm_activation=norm)
    for act, norm, with_norm in itertools.product(
        ("relu", "jumprelu", "topk"), ("dataset-wise", "inference"), (True, False)
    ):
        settings = {"act_fn": act, "norm_activation": norm, "sparsity_include_decoder_norm": with_norm}
        clt(root, f"clt.{act}.{norm}.{'gated-by-norm' if with_norm else 'plain'}", generator, **settings)


if __name__ == "__main__":
    main()
