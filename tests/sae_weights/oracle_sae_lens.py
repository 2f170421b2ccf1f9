"""Run by test_sae_lens_oracle.py with the interpreter that has sae-lens; imports nothing of ours.

    python oracle_sae_lens.py WORK

Writes WORK/theirs/<case>/: SAEs with random weights, saved by sae-lens. For each of them, and for each folder that it
finds in WORK/ours/, writes <folder>/answers.safetensors: x, what ``encode`` made of it (f), and ``decode(f)`` (x_hat).
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import torch
from sae_lens import SAE
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.gated_sae import GatedSAE, GatedSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
from safetensors.torch import save_file

D, N, TOKENS, K = 24, 96, 40, 7
INPUT_SCALE = 0.37
NORMS = ("none", "constant_norm_rescale", "layer_norm", "expected_average_only_in")
INFERENCE = {
    "standard": (StandardSAE, StandardSAEConfig, {}),
    "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig, {}),
    "gated": (GatedSAE, GatedSAEConfig, {}),
    "topk": (TopKSAE, TopKSAEConfig, {"k": K}),
    "topk-rescaled": (TopKSAE, TopKSAEConfig, {"k": K, "rescale_acts_by_decoder_norm": True}),
}
TRAINING = {
    "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, {}),
    "matryoshka": (MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig, {"matryoshka_widths": [32]}),
}


def randomise(sae, generator):
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            spread = 1.0 if name.startswith("W_") else 0.4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
            if name == "threshold":
                parameter.abs_()
    return sae


def build(kinds, name, generator, hook="blocks.3.hook_resid_post", **settings):
    sae_class, config_class, own = kinds[name]
    metadata = SAEMetadata(model_name="tiny", hook_name=hook)
    return randomise(sae_class(config_class(d_in=D, d_sae=N, metadata=metadata, **(own | settings))), generator)


def inputs(generator):
    # Tokens of different size and mean, so that a per-token norm that is left out shows.
    size = torch.rand(TOKENS, 1, generator=generator) * 4 + 0.2
    return (torch.randn(TOKENS, D, generator=generator) + 0.7) * size


@torch.no_grad()
def answer(sae, folder, x):
    f = sae.encode(x)
    answers = {"x": x, "f": f, "x_hat": sae.decode(f)}
    save_file({name: tensor.contiguous() for name, tensor in answers.items()}, folder / "answers.safetensors")


def make_theirs(root, generator):
    for name, norm, subtract in itertools.product(INFERENCE, NORMS, (True, False)):
        folder = root / f"{name}.{norm}.{'centred' if subtract else 'plain'}"
        build(INFERENCE, name, generator, normalize_activations=norm, apply_b_dec_to_input=subtract).save_model(folder)
        sae = SAE.load_from_disk(folder)
        if norm == "expected_average_only_in":
            sae.fold_activation_norm_scaling_factor(INPUT_SCALE)
        answer(sae, folder, inputs(generator))

    for name, norm, rescale in itertools.product(TRAINING, NORMS, (True, False)):
        folder = root / f"{name}.{norm}.{'rescaled' if rescale else 'raw'}"
        settings = {"normalize_activations": norm, "rescale_acts_by_decoder_norm": rescale}
        training = build(TRAINING, name, generator, k=K, **settings)
        training.topk_threshold.fill_(2.5)
        training.save_model(folder / "training")
        if norm == "expected_average_only_in":
            training.fold_activation_norm_scaling_factor(INPUT_SCALE)
        training.save_inference_model(folder / "inference")
        sae, x = SAE.load_from_disk(folder / "inference"), inputs(generator)
        for part in ("training", "inference"):
            answer(sae, folder / part, x)

    heads = build(INFERENCE, "jumprelu", generator, hook="blocks.2.attn.hook_z", reshape_activations="hook_z")
    heads.save_model(root / "hook_z")
    answer(SAE.load_from_disk(root / "hook_z"), root / "hook_z", inputs(generator).reshape(TOKENS, 3, D // 3))


def main():
    work = Path(sys.argv[1])
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(20)
    make_theirs(work / "theirs", generator)
    for folder in sorted((work / "ours").iterdir()):
        sae = SAE.load_from_disk(folder)
        answer(sae, folder, inputs(generator)[:, : sae.cfg.d_in])


if __name__ == "__main__":
    main()
