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
from sae_lens.saes.abstopk_sae import AbsTopKSAE, AbsTopKSAEConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.gated_sae import GatedSAE, GatedSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.matching_pursuit_sae import MatchingPursuitSAE, MatchingPursuitSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
from sae_lens.saes.transcoder import (
    JumpReLUSkipTranscoder,
    JumpReLUSkipTranscoderConfig,
    JumpReLUTranscoder,
    JumpReLUTranscoderConfig,
    SkipTranscoder,
    SkipTranscoderConfig,
    Transcoder,
    TranscoderConfig,
)
from sae_lens.training.activation_scaler import ActivationScaler, ActivationWhitening
from safetensors.torch import load_file, save_file

D, N, TOKENS, K = 24, 96, 40, 7
INPUT_SCALE = 0.37
NORMS = ("none", "constant_norm_rescale", "layer_norm", "expected_average_only_in")
INFERENCE = {
    "standard": (StandardSAE, StandardSAEConfig, {}),
    "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig, {}),
    "gated": (GatedSAE, GatedSAEConfig, {}),
    "topk": (TopKSAE, TopKSAEConfig, {"k": K}),
    "topk-rescaled": (TopKSAE, TopKSAEConfig, {"k": K, "rescale_acts_by_decoder_norm": True}),
    "abstopk": (AbsTopKSAE, AbsTopKSAEConfig, {"k": K}),
    "abstopk-rescaled": (AbsTopKSAE, AbsTopKSAEConfig, {"k": K, "rescale_acts_by_decoder_norm": True}),
}
PURSUIT = {
    "threshold": {"residual_threshold": 0.6},
    "iterations": {"residual_threshold": 0.0, "max_iterations": 9, "stop_on_duplicate_support": False},
    "support": {"residual_threshold": 1e-3},
}
WHITENED = ("standard", "jumprelu", "gated", "topk", "topk-rescaled", "abstopk-rescaled", "batchtopk", "batchtopk-raw")
D_OUT = 18
TRANSCODERS = {
    "transcoder": (Transcoder, TranscoderConfig, {}),
    "skip_transcoder": (SkipTranscoder, SkipTranscoderConfig, {}),
    "jumprelu_transcoder": (JumpReLUTranscoder, JumpReLUTranscoderConfig, {}),
    "jumprelu_skip_transcoder": (JumpReLUSkipTranscoder, JumpReLUSkipTranscoderConfig, {}),
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


def build(kinds, name, generator, hook="blocks.3.hook_resid_post", told=None, **settings):
    sae_class, config_class, own = kinds[name]
    metadata = SAEMetadata(model_name="tiny", hook_name=hook, **(told or {}))
    return randomise(sae_class(config_class(d_in=D, d_sae=N, metadata=metadata, **(own | settings))), generator)


def inputs(generator):
    # Tokens of different size and mean, so that a per-token norm that is left out shows.
    size = torch.rand(TOKENS, 1, generator=generator) * 4 + 0.2
    return (torch.randn(TOKENS, D, generator=generator) + 0.7) * size


@torch.no_grad()
def answer(sae, folder, x):
    f = sae.encode(x)
    answers = {"x": x, "f": f, "x_hat": sae(x) if hasattr(sae, "W_skip") else sae.decode(f)}
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

    for name, norm, subtract in itertools.product(PURSUIT, NORMS[:3], (True, False)):
        folder = root / f"pursuit-{name}.{norm}.{'centred' if subtract else 'plain'}"
        kinds = {name: (MatchingPursuitSAE, MatchingPursuitSAEConfig, PURSUIT[name])}
        sae = build(kinds, name, generator, normalize_activations=norm, apply_b_dec_to_input=subtract)
        sae.W_dec.data /= sae.W_dec.data.norm(dim=-1, keepdim=True)
        sae.save_model(folder)
        answer(SAE.load_from_disk(folder), folder, inputs(generator))

    places = {"hook_name_out": "blocks.3.hook_mlp_out"}
    for name, d_out in itertools.product(TRANSCODERS, (D, D_OUT)):
        settings = {"d_out": d_out, "apply_b_dec_to_input": False}
        folder = root / f"{name}.{d_out}"
        build(TRANSCODERS, name, generator, "blocks.3.ln2.hook_normalized", places, **settings).save_model(folder)
        answer(SAE.load_from_disk(folder), folder, inputs(generator))

    # On the centred model that it was trained on, this one sees x without its mean and writes to a stream without it.
    kwargs = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    folder, x = root / "centred-model", inputs(generator)
    build(INFERENCE, "standard", generator, "blocks.3.hook_resid_pre", kwargs).save_model(folder)
    mean = x.mean(dim=-1, keepdim=True)
    answer(SAE.load_from_disk(folder), folder, x - mean)
    answers = load_file(folder / "answers.safetensors")
    save_file({**answers, "x": x, "x_hat": answers["x_hat"] + mean}, folder / "answers.safetensors")

    for name, subtract in itertools.product(WHITENED, (True, False)):
        whitened(root / f"whitened-{name}.{'centred' if subtract else 'plain'}", name, subtract, generator)

    heads = build(INFERENCE, "jumprelu", generator, hook="blocks.2.attn.hook_z", reshape_activations="hook_z")
    heads.save_model(root / "hook_z")
    answer(SAE.load_from_disk(root / "hook_z"), root / "hook_z", inputs(generator).reshape(TOKENS, 3, D // 3))


def whitened(folder, name, subtract, generator):
    """A checkpoint from before the whitening was folded, and what SAELens' folding makes of it."""
    spread = torch.rand(D, generator=generator) * 3 + 0.2
    basis = torch.linalg.qr(torch.randn(D, D, generator=generator))[0]
    whitening = ActivationWhitening(
        torch.randn(D, generator=generator), basis @ torch.diag(1 / spread), torch.diag(spread) @ basis.T
    )
    settings = {"normalize_activations": "covariance_whitening", "apply_b_dec_to_input": subtract}
    if name.startswith("batchtopk"):
        settings |= {"k": K, "rescale_acts_by_decoder_norm": name == "batchtopk"}
        sae = build(TRAINING, "batchtopk", generator, **settings)
        sae.topk_threshold.fill_(2.5)
    else:
        sae = build(INFERENCE, name, generator, **settings)
    sae.save_model(folder)
    ActivationScaler(whitening=whitening).save(str(folder / "activation_scaler.json"))
    sae.fold_activation_whitening(whitening.mean, whitening.matrix, whitening.inverse_matrix)
    if name.startswith("batchtopk"):
        sae.save_inference_model(folder / "inference")
        sae = SAE.load_from_disk(folder / "inference")
    answer(sae, folder, inputs(generator))


def main():
    work = Path(sys.argv[1])
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(20)
    make_theirs(work / "theirs", generator)
    for folder in sorted((work / "ours").iterdir()):
        sae = SAE.load_from_disk(folder)
        x = inputs(generator)[:, : sae.cfg.d_in]
        # What a centred dictionary is given by the model that its metadata asks for.
        kwargs = sae.cfg.metadata.model_from_pretrained_kwargs or {}
        mean = x.mean(dim=-1, keepdim=True) * bool(kwargs.get("center_writing_weights"))
        answer(sae, folder, x - mean)
        answers = load_file(folder / "answers.safetensors")
        save_file({**answers, "x": x, "x_hat": answers["x_hat"] + mean}, folder / "answers.safetensors")


if __name__ == "__main__":
    main()
