"""Small checkpoints in exactly the layouts that were published, and what sae-lens' own loaders make of them.

``answered()`` writes all of them once per test run, below hub/<owner>/<repository>/…, and asks the oracle once.
"""

from __future__ import annotations

import functools
import json
import math
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.sae_weights.oracle import run_oracle

D, N = 24, 96


@dataclass(frozen=True)
class Published:
    """One checkpoint: where it lies in the hub, and how sae-lens is to read it."""

    case: str
    loader: str
    repository: str
    folder: str
    overrides: dict[str, Any] = field(default_factory=dict)
    scale: float | None = None
    centre: bool = False


def random(seed: int, **shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Tensors by name: matrices of spread 1, vectors of spread 0.4, thresholds positive."""
    g = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in shapes.items():
        tensor = torch.randn(shape, generator=g) * (1.0 if len(shape) > 1 else 0.4)
        made[name] = tensor.abs() if "threshold" in name else tensor
    return made


def sae_tensors(seed: int, d: int = D, n: int = N, d_out: int | None = None) -> dict[str, torch.Tensor]:
    """The five tensors of a JumpReLU dictionary in sae-lens' orientation."""
    out = d if d_out is None else d_out
    return random(seed, W_enc=(d, n), b_enc=(n,), threshold=(n,), W_dec=(n, out), b_dec=(out,))


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2))


def save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def save_npz(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})


def save_pt(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


# Gemma Scope

GEMMA_SCOPE = {
    "gemma-res": ("google/gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71"),
    "gemma-res-old-names": ("google/gemma-scope-9b-it-res", "layer_9/width_131k/average_l0_121"),
    "gemma-mlp": ("google/gemma-scope-9b-pt-mlp", "layer_3/width_16k/average_l0_12"),
    "gemma-att": ("google/gemma-scope-2b-pt-att", "layer_25/width_65k/average_l0_77"),
    "gemma-embedding": ("google/gemma-scope-2b-pt-res", "embedding/width_4k/average_l0_6"),
}
GEMMA_TRANSCODER = ("google/gemma-scope-2b-pt-transcoders", "layer_5/width_16k/average_l0_87")


def gemma_scope(hub: Path) -> list[Published]:
    made = []
    for seed, (case, (repository, folder)) in enumerate(GEMMA_SCOPE.items()):
        tensors = sae_tensors(seed)
        if case == "gemma-embedding":
            # sae-lens scales the decoder for √d and leaves its bias behind; without a bias both are right.
            tensors["b_dec"] = torch.zeros(D)
        if "old-names" in case:
            tensors = {f"w{name[1:]}" if name.startswith("W") else name: t for name, t in tensors.items()}
        save_npz(hub / repository / folder / "params.npz", tensors)
        made.append(Published(case, "gemma_2", repository, folder, {"d_in": D, "d_sae": N}))
    repository, folder = GEMMA_TRANSCODER
    save_npz(hub / repository / folder / "params.npz", sae_tensors(50, d_out=D))
    sizes = {"d_in": D, "d_out": D, "d_sae": N}
    return [*made, Published("gemma-transcoder", "gemma_2_transcoder", repository, folder, sizes)]


# Gemma Scope 2

GEMMA_2_CONFIG = {"width": N, "model_name": "google/gemma-3-4b-pt", "architecture": "jump_relu", "l0": 150}
_PLACES = {
    "resid_post": ("output", "output", "sae"),
    "attn_out": ("self_attn.o_proj.input", "self_attn.o_proj.input", "sae"),
    "mlp_out": ("post_feedforward_layernorm.output", "post_feedforward_layernorm.output", "sae"),
    "transcoder": ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output", "transcoder"),
}
GEMMA_SCOPE_2 = {
    "gemma2-resid": "resid_post/layer_17_width_16k_l0_big",
    "gemma2-resid-all": "resid_post_all/layer_3_width_262k_l0_small",
    "gemma2-attn": "attn_out/layer_17_width_16k_l0_big",
    "gemma2-mlp": "mlp_out_all/layer_17_width_16k_l0_big",
    "gemma2-transcoder": "transcoder_all/layer_17_width_16k_l0_big",
    "gemma2-affine": "transcoder/layer_17_width_16k_l0_big_affine",
    "gemma2-no-config": "mlp_out/layer_22_width_65k_l0_medium",
}
GEMMA_2_REPOSITORY = "google/gemma-scope-2-4b-pt"


def gemma_scope_2(hub: Path) -> list[Published]:
    made = []
    for seed, (case, folder) in enumerate(GEMMA_SCOPE_2.items()):
        kind, name = folder.split("/")
        layer = name.split("_")[1]
        tensors = {name.lower(): t for name, t in sae_tensors(100 + seed, d_out=D).items()}
        if affine := name.endswith("affine"):
            tensors |= random(200 + seed, affine_skip_connection=(D, D))
        place = hub / GEMMA_2_REPOSITORY / folder
        save(place / "params.safetensors", tensors)
        reads, writes, sort = _PLACES[kind.removesuffix("_all")]
        hooks = {
            "hf_hook_point_in": f"model.layers.{layer}.{reads}",
            "hf_hook_point_out": f"model.layers.{layer}.{writes}",
        }
        if case != "gemma2-no-config":
            write_json(place / "config.json", {**GEMMA_2_CONFIG, **hooks, "affine_connection": affine, "type": sort})
        made.append(Published(case, "gemma_3", GEMMA_2_REPOSITORY, folder))
    return made


# Llama Scope

LLAMA_SCOPE = {
    "llama-residual": ("fnlp/Llama3_1-8B-Base-LXR-8x", "Llama3_1-8B-Base-L15R-8x", "blocks.15.hook_resid_post"),
    "llama-attention": ("fnlp/Llama3_1-8B-Base-LXA-32x", "Llama3_1-8B-Base-L2A-32x", "blocks.2.hook_attn_out"),
    "llama-mlp": ("fnlp/Llama3_1-8B-Base-LXM-8x", "Llama3_1-8B-Base-L7M-8x", "blocks.7.hook_mlp_out"),
}


def llama_hyperparams(hook_in: str, hook_out: str, **changes: Any) -> dict[str, Any]:
    """A published hyperparams.json, with the sizes of the small dictionary."""
    return {
        "device": "cuda:0",
        "seed": 42,
        "dtype": "torch.bfloat16",
        "hook_point_in": hook_in,
        "hook_point_out": hook_out,
        "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "expansion_factor": N // D,
        "d_model": D,
        "d_sae": N,
        "bias_init_method": "all_zero",
        "act_fn": "jumprelu",
        "jump_relu_threshold": 0.2021484375,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": 6.3125, "out": 6.3125},
        "decoder_exactly_fixed_norm": False,
        "sparsity_include_decoder_norm": True,
        "use_glu_encoder": False,
        "init_decoder_norm": 0.5,
        "init_encoder_norm": None,
        "top_k": 50,
        "tp_size": 1,
        **changes,
    }


def llama_tensors(seed: int) -> dict[str, torch.Tensor]:
    shapes = {"encoder.weight": (N, D), "encoder.bias": (N,), "decoder.weight": (D, N), "decoder.bias": (D,)}
    return random(seed, **shapes)


def llama_scope(hub: Path) -> list[Published]:
    made = []
    for seed, (case, (repository, folder, hook)) in enumerate(LLAMA_SCOPE.items()):
        tensors = llama_tensors(300 + seed)
        # Powers of two scaled to norm 1 exactly: there sae-lens, which leaves the decoder norm out, is right too.
        tensors["decoder.weight"] = torch.zeros(D, N)
        tensors["decoder.weight"][torch.arange(N) % D, torch.arange(N)] = 1.0
        save(
            hub / repository / folder / "checkpoints" / "final.safetensors",
            {name: tensor.bfloat16() for name, tensor in tensors.items()},
        )
        write_json(hub / repository / folder / "hyperparams.json", llama_hyperparams(hook, hook))
        scale = math.sqrt(D) / 6.3125
        made.append(Published(case, "llama_scope", repository, folder, scale=scale))
    repository, folder = LLAMA_R1
    hook = "blocks.15.hook_resid_post"
    tensors = llama_tensors(350) | random(351, threshold=(N,))
    tensors["log_jumprelu_threshold"] = tensors.pop("threshold").add(0.1).log()
    tensors[f"dataset_average_activation_norm.{hook}"] = torch.tensor(3.5)
    save(hub / repository / folder / "sae_weights.safetensors", tensors)
    write_json(hub / repository / folder / "config.json", r1_config(hook))
    return [*made, Published("llama-r1", "llama_scope_r1_distill", repository, folder, scale=math.sqrt(D) / 3.5)]


LLAMA_R1 = ("fnlp/Llama-Scope-R1-Distill", "800M-Slimpajama-0-OpenR1-Math-220k/L15R")


def r1_config(hook: str, **changes: Any) -> dict[str, Any]:
    """A published config.json of the R1 distillate's dictionaries, with the sizes of the small dictionary."""
    return {
        "hook_point_in": hook,
        "hook_point_out": hook,
        "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "expansion_factor": N // D,
        "d_model": D,
        "act_fn": "jumprelu",
        "norm_activation": "dataset-wise",
        "sparsity_include_decoder_norm": False,
        "top_k": 50,
        "jumprelu_threshold_window": 2.0,
        **changes,
    }


# Files of torch.save

QWEN = ("Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_7", "layer5.sae.pt")
GOODFIRE = ("Goodfire/Llama-3.1-8B-Instruct-SAE-l19", "Llama-3.1-8B-Instruct-SAE-l19.pth")
GOODFIRE_70B = ("Goodfire/Llama-3.3-70B-Instruct-SAE-l50", "Llama-3.3-70B-Instruct-SAE-l50.pt")
QRESEARCH = ("qresearch/DeepSeek-R1-Distill-Llama-8B-SAE-l19", "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt")
CONNOR_ROB = (
    "ckkissane/attn-saes-gpt2-small-all-layers",
    "gpt2-small_L5_Hcat_z_lr1.20e-03_l11.00e+00_ds49152_bs4096_dc1.00e-06_rsanthropic_rie25000_nr4_v9.pt",
)


def pickled(hub: Path) -> list[Published]:
    tensors = random(400, W_enc=(N, D), b_enc=(N,), W_dec=(D, N), b_dec=(D,))
    save_pt(hub / QWEN[0] / QWEN[1], tensors)
    write_json(
        hub / QWEN[0] / "config.json",
        {"model_type": "topk_sae", "base_model": "Qwen/Qwen3-1.7B-Base", "d_model": D, "d_sae": N, "k": 7}
        | {"num_layers": 28, "hook_point": "resid_post", "dtype": "float32"},
    )
    sizes = {"d_in": D, "d_sae": N}
    for repository, file in (GOODFIRE, GOODFIRE_70B):
        linear = {"encoder_linear.weight": (N, D), "encoder_linear.bias": (N,)}
        linear |= {"decoder_linear.weight": (D, N), "decoder_linear.bias": (D,)}
        save_pt(hub / repository / file, random(410, **linear))
    bf16 = {name: tensor.bfloat16() for name, tensor in llama_tensors(420).items()}
    save_pt(hub / QRESEARCH[0] / QRESEARCH[1], bf16)
    heads = sae_tensors(430)
    del heads["threshold"]
    save_pt(hub / CONNOR_ROB[0] / CONNOR_ROB[1], heads)
    write_json(
        hub / CONNOR_ROB[0] / CONNOR_ROB[1].replace(".pt", "_cfg.json"),
        {"act_name": "blocks.5.attn.hook_z", "act_size": D, "dict_size": N, "model_name": "gpt2-small", "seed": 49},
    )
    return [
        Published("qwen", "qwen_scope", *QWEN, sizes),
        Published("goodfire-8b", "goodfire", *GOODFIRE, sizes),
        Published("goodfire-70b", "goodfire", *GOODFIRE_70B, sizes),
        Published("qresearch", "deepseek_r1", *QRESEARCH, sizes | {"dtype": "float32"}),
        Published("connor-rob", "connor_rob_hook_z", *CONNOR_ROB),
    ]


@functools.cache
def answered() -> tuple[Path, dict[str, Published]]:
    """The hub's folder and what lies in it by case, after the oracle has answered for each."""
    folder = tempfile.TemporaryDirectory(prefix="published-")
    _kept.append(folder)
    work = Path(folder.name)
    made = [
        *gemma_scope(work / "hub"),
        *gemma_scope_2(work / "hub"),
        *llama_scope(work / "hub"),
        *pickled(work / "hub"),
    ]
    (work / "requests.json").write_text(json.dumps([asdict(one) for one in made]))
    run_oracle("oracle_published.py", work)
    return work, {one.case: one for one in made}


_kept: list[Any] = []


def answer(case: str) -> tuple[Path, dict[str, torch.Tensor]]:
    """A case's path in the hub and the oracle's answer: x, f, x_hat."""
    work, made = answered()
    one = made[case]
    return work / "hub" / one.repository / one.folder, load_file(work / "answers" / f"{case}.safetensors")
