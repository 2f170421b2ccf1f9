"""A small valid checkpoint of every registered format, and tools to damage the files it is made of.

``MAKERS`` maps "format" or "format.variant" to a function that writes one into a folder and returns the path to open.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_weights import SAE, Hook, save_native, save_saelens
from tests.sae_weights.formats import (
    test_bussmann,
    test_circuit_tracer,
    test_clt,
    test_crosscoder_model_diff,
    test_dictionary_learning,
    test_e2e,
    test_itda,
    test_llamascopium,
    test_openai_gpt2,
    test_polysae,
)
from tests.sae_weights.formats.draws import Draws

D, N, K = 6, 18, 4
Maker = Callable[[Path], Path]


def matrices(*, encoder: str, decoder: str, enc_rows: bool, dec_rows: bool) -> dict[str, Tensor]:
    """Encoder and decoder under these names; rows: feature-major, else the feature is a column."""
    draws = Draws(0)
    W_enc, W_dec = draws.normal(N, D), draws.uneven(N, D)
    return {
        encoder: W_enc if enc_rows else W_enc.T.contiguous(),
        decoder: W_dec if dec_rows else W_dec.T.contiguous(),
    }


def vectors(**lengths: int) -> dict[str, Tensor]:
    draws = Draws(1)
    return {name.replace("__", "."): draws.normal(n, spread=0.4).abs() for name, n in lengths.items()}


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2))


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    elif path.suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})
    else:
        torch.save(tensors, path)
    return path


def canonical(architecture: str = "jumprelu") -> SAE:
    gate = vectors(b_enc=N, threshold=N)
    if architecture == "topk":
        del gate["threshold"]
    tensors = matrices(encoder="W_enc", decoder="W_dec", enc_rows=True, dec_rows=True)
    return SAE.from_tensors(
        architecture=architecture,
        hook=Hook("resid_post", 1),
        b_dec=torch.ones(D),
        gate=gate,
        k=K if architecture == "topk" else None,
        **tensors,
    )


def editserver(folder: Path) -> Path:
    return save_native(canonical(), folder)


def editserver_topk(folder: Path) -> Path:
    return save_native(canonical("topk"), folder)


def saelens(folder: Path) -> Path:
    save_saelens(canonical(), folder)
    return folder


def saelens_topk(folder: Path) -> Path:
    save_saelens(canonical("topk"), folder)
    return folder


def _saelens(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    write_tensors(folder / "sae_weights.safetensors", tensors)
    told = {"sae_lens_version": "6.54.12", "hook_name": "blocks.3.hook_resid_post", "model_name": "tiny"}
    base: dict[str, Any] = {"d_in": D, "d_sae": N, "dtype": "float32", "apply_b_dec_to_input": True, "metadata": told}
    base |= {"normalize_activations": "none", "reshape_activations": "none"}
    write_json(folder / "cfg.json", base | config)
    write_json(folder / "editserver.json", {"median_norm": 3.5, "max_activation": [1.0] * N, "density": [0.1] * N})
    return folder


def saelens_gated(folder: Path) -> Path:
    tensors = matrices(encoder="W_enc", decoder="W_dec", enc_rows=False, dec_rows=True)
    return _saelens(folder, tensors | vectors(b_gate=N, b_mag=N, r_mag=N, b_dec=D), architecture="gated")


def saelens_training(folder: Path) -> Path:
    tensors = matrices(encoder="W_enc", decoder="W_dec", enc_rows=False, dec_rows=True) | vectors(b_enc=N, b_dec=D)
    tensors["topk_threshold"] = torch.tensor(0.5, dtype=torch.float64)
    write_json(folder / "activation_scaler.json", {"scaling_factor": 0.37})
    kind: dict[str, Any] = {"architecture": "matryoshka_batchtopk", "k": K, "matryoshka_widths": [6, N]}
    return _saelens(folder, tensors, normalize_activations="expected_average_only_in", **kind)


def saelens_pursuit(folder: Path) -> Path:
    tensors = {"W_dec": torch.nn.functional.normalize(Draws(0).normal(N, D), dim=1), "b_dec": torch.ones(D)}
    pursuit: dict[str, Any] = {"architecture": "matching_pursuit", "residual_threshold": 0.01, "max_iterations": 4}
    return _saelens(folder, tensors, **pursuit, stop_on_duplicate_support=True)


def saelens_skip_transcoder(folder: Path) -> Path:
    tensors = matrices(encoder="W_enc", decoder="W_dec", enc_rows=False, dec_rows=True)
    tensors |= vectors(b_enc=N, threshold=N, b_dec=D) | {"W_skip": torch.eye(D)}
    told = {
        "sae_lens_version": "6.54.12",
        "hook_name": "blocks.3.hook_mlp_in",
        "hook_name_out": "blocks.3.hook_mlp_out",
    }
    config: dict[str, Any] = {"architecture": "jumprelu_skip_transcoder", "d_out": D, "apply_b_dec_to_input": False}
    return _saelens(folder, tensors, metadata=told, **config)


def _gemma_layers(place: Path, layers: int, **config: Any) -> Path:
    for layer in range(layers):
        draws = Draws(layer)
        tensors = {"w_enc": draws.normal(D, N), "w_dec": draws.normal(N, layers, D)}
        write_tensors(place / f"params_layer_{layer}.safetensors", tensors | vectors(b_enc=N, threshold=N, b_dec=D))
    fixed = {"width": N, "model_name": "google/gemma-3-4b-pt", "architecture": "jump_relu", "affine_connection": False}
    write_json(place / "config.json", fixed | config)
    return place


def gemma_scope_2_crosscoder(folder: Path) -> Path:
    place = folder / "gemma-scope-2-4b-pt" / "crosscoder" / "layer_9_17_width_65k_l0_medium"
    hooks = "model.layers.{9,17}.output"
    return _gemma_layers(place, 2, type="crosscoder", hf_hook_point_in=hooks, hf_hook_point_out=hooks)


def gemma_scope_2_clt(folder: Path) -> Path:
    place = folder / "gemma-scope-2-270m-pt" / "clt" / "width_262k_l0_big"
    hook = "model.layers.{all}.pre_feedforward_layernorm.output"
    return _gemma_layers(place, 1, type="clt", hf_hook_point_in=hook) / "params_layer_0.safetensors"


def gemma_scope(folder: Path) -> Path:
    place = folder / "gemma-scope-2b-pt-res" / "layer_20" / "width_16k" / "average_l0_71"
    tensors = matrices(encoder="W_enc", decoder="W_dec", enc_rows=False, dec_rows=True)
    write_tensors(place / "params.npz", tensors | vectors(b_enc=N, threshold=N, b_dec=D))
    return place


def gemma_scope_2(folder: Path) -> Path:
    place = folder / "gemma-scope-2-4b-pt" / "resid_post" / "layer_17_width_16k_l0_big"
    tensors = matrices(encoder="w_enc", decoder="w_dec", enc_rows=False, dec_rows=True)
    write_tensors(place / "params.safetensors", tensors | vectors(b_enc=N, threshold=N, b_dec=D))
    hook = "model.layers.17.output"
    config = {"width": N, "model_name": "google/gemma-3-4b-pt", "architecture": "jump_relu", "l0": 150, "type": "sae"}
    write_json(
        place / "config.json",
        config | {"hf_hook_point_in": hook, "hf_hook_point_out": hook, "affine_connection": False},
    )
    return place


def llama_scope(folder: Path) -> Path:
    place = folder / "Llama3_1-8B-Base-L15R-8x"
    tensors = matrices(encoder="encoder.weight", decoder="decoder.weight", enc_rows=True, dec_rows=False)
    write_tensors(place / "checkpoints" / "final.safetensors", tensors | vectors(encoder__bias=N, decoder__bias=D))
    hook = "blocks.15.hook_resid_post"
    config: dict[str, Any] = {"hook_point_in": hook, "hook_point_out": hook, "d_model": D, "d_sae": N}
    config |= {"expansion_factor": N // D, "use_decoder_bias": True, "apply_decoder_bias_to_pre_encoder": False}
    config |= {"act_fn": "jumprelu", "jump_relu_threshold": 0.2, "norm_activation": "dataset-wise", "top_k": 50}
    config |= {"dataset_average_activation_norm": {"in": 6.3, "out": 6.3}, "sparsity_include_decoder_norm": True}
    write_json(place / "hyperparams.json", config | {"use_glu_encoder": False})
    return place


def llama_scope_r1(folder: Path) -> Path:
    place = folder / "800M-Slimpajama-0-OpenR1-Math-220k" / "L15R"
    hook = "blocks.15.hook_resid_post"
    tensors = matrices(encoder="encoder.weight", decoder="decoder.weight", enc_rows=True, dec_rows=False)
    tensors |= vectors(encoder__bias=N, decoder__bias=D, log_jumprelu_threshold=N)
    tensors[f"dataset_average_activation_norm.{hook}"] = torch.tensor(3.5)
    write_tensors(place / "sae_weights.safetensors", tensors)
    config: dict[str, Any] = {"hook_point_in": hook, "hook_point_out": hook, "d_model": D, "expansion_factor": N // D}
    config |= {"use_decoder_bias": True, "apply_decoder_bias_to_pre_encoder": False, "act_fn": "jumprelu", "top_k": 50}
    config |= {"norm_activation": "dataset-wise", "sparsity_include_decoder_norm": False}
    write_json(place / "config.json", config | {"jumprelu_threshold_window": 2.0})
    return place


def qwen_scope(folder: Path) -> Path:
    place = folder / "SAE-Res-Qwen3-1.7B-Base-W32K-L0_4"
    tensors = matrices(encoder="W_enc", decoder="W_dec", enc_rows=True, dec_rows=False)
    config: dict[str, Any] = {"model_type": "topk_sae", "base_model": "Qwen/Qwen3-1.7B-Base", "d_model": D, "d_sae": N}
    write_json(
        place / "config.json", config | {"k": K, "num_layers": 28, "hook_point": "resid_post", "dtype": "float32"}
    )
    return write_tensors(place / "layer5.sae.pt", tensors | vectors(b_enc=N, b_dec=D))


def goodfire(folder: Path) -> Path:
    tensors = matrices(encoder="encoder_linear.weight", decoder="decoder_linear.weight", enc_rows=True, dec_rows=False)
    tensors |= vectors(encoder_linear__bias=N, decoder_linear__bias=D)
    return write_tensors(folder / "Llama-3.1-8B-Instruct-SAE-l19.pth", tensors)


def connor_rob(folder: Path) -> Path:
    tensors = matrices(encoder="W_enc", decoder="W_dec", enc_rows=False, dec_rows=True) | vectors(b_enc=N, b_dec=D)
    config = {"act_name": "blocks.5.attn.hook_z", "act_size": D, "dict_size": N, "model_name": "gpt2-small", "seed": 49}
    write_json(folder / "run_9_cfg.json", config)
    return write_tensors(folder / "run_9.pt", tensors)


def _trainer(folder: Path, state: dict[str, Tensor], dict_class: str) -> Path:
    write_tensors(folder / "ae.pt", state)
    trainer: dict[str, Any] = {"dict_class": dict_class, "activation_dim": D, "dict_size": N, "layer": 7}
    trainer |= {"lm_name": "tiny/model", "submodule_name": "resid_post_layer_7"}
    if "k" in state:
        trainer["k"] = K
    write_json(folder / "config.json", {"trainer": trainer, "buffer": {"d_submodule": D, "io": "out", "ctx_len": 128}})
    return folder


def dictionary_learning(folder: Path) -> Path:
    state = matrices(encoder="encoder.weight", decoder="decoder.weight", enc_rows=True, dec_rows=False)
    state |= vectors(encoder__bias=N, b_dec=D)
    return _trainer(folder, state | {"k": torch.tensor(K), "threshold": torch.tensor(0.5)}, "BatchTopKSAE")


def dictionary_learning_matryoshka(folder: Path) -> Path:
    state = matrices(encoder="W_enc", decoder="W_dec", enc_rows=False, dec_rows=True) | vectors(b_enc=N, b_dec=D)
    state |= {"k": torch.tensor(K), "threshold": torch.tensor(0.5), "group_sizes": torch.tensor([6, 12])}
    return _trainer(folder, state, "MatryoshkaBatchTopKSAE")


def dictionary_learning_gated(folder: Path) -> Path:
    state = matrices(encoder="encoder.weight", decoder="decoder.weight", enc_rows=True, dec_rows=False)
    return _trainer(folder, state | vectors(decoder_bias=D, r_mag=N, gate_bias=N, mag_bias=N), "GatedAutoEncoder")


def sparsify(folder: Path) -> Path:
    place = folder / "layers.12"
    tensors = matrices(encoder="encoder.weight", decoder="W_dec", enc_rows=True, dec_rows=True)
    write_tensors(place / "sae.safetensors", tensors | vectors(encoder__bias=N, b_dec=D))
    config: dict[str, Any] = {"activation": "topk", "expansion_factor": 3, "normalize_decoder": True, "num_latents": 0}
    write_json(place / "cfg.json", config | {"k": K, "multi_topk": False, "skip_connection": False, "d_in": D})
    return place


def llamascopium_glu(folder: Path) -> Path:
    path = test_llamascopium.write_small(folder)
    tensors = test_llamascopium.small_tensors()
    tensors |= {"W_E_glu": tensors["W_E"].flip(0).contiguous(), "b_E_glu": tensors["b_E"].flip(0)}
    write_tensors(path / "sae_weights.safetensors", tensors)
    write_json(path / "config.json", test_llamascopium.small_config(use_glu_encoder=True))
    return path


def llamascopium_pt(folder: Path) -> Path:
    path = test_llamascopium.write_small(folder)
    (path / "sae_weights.safetensors").unlink()
    torch.save({"sae": test_llamascopium.small_tensors(), "version": "2.0.0b34"}, path / "sae_weights.pt")
    return path


def llamascopium_crosscoder(folder: Path) -> Path:
    draws, places = Draws(2), ["blocks.2.hook_resid_post", "blocks.3.hook_resid_post"]
    tensors = {"W_E": draws.normal(2, D, N), "b_E": draws.normal(2, N), "W_D": draws.normal(2, N, D)}
    tensors |= {"b_D": draws.normal(2, D), "activation_function.log_jumprelu_threshold": draws.normal(N)}
    tensors |= {f"dataset_average_activation_norm.{place}": torch.tensor(3.0) for place in places}
    write_tensors(folder / "sae_weights.safetensors", tensors)
    write_json(folder / "config.json", test_llamascopium.small_config(sae_type="crosscoder") | {"hook_points": places})
    return folder


def llamascopium_clt(folder: Path) -> Path:
    draws = Draws(3)
    tensors = {"W_E": draws.normal(1, D, N), "b_E": draws.normal(1, N), "W_D.0": draws.normal(1, N, D)}
    tensors |= {"b_D.0": draws.normal(D), "activation_function.log_jumprelu_threshold": draws.normal(1, N)}
    write_tensors(folder / "sae_weights.safetensors", tensors)
    places = {"hook_points_in": ["blocks.2.hook_resid_mid"], "hook_points_out": ["blocks.2.hook_mlp_out"]}
    config = test_llamascopium.small_config(sae_type="clt", norm_activation="inference")
    write_json(folder / "config.json", config | places)
    return folder


MAKERS: dict[str, Maker] = {
    "editserver": editserver,
    "editserver.topk": editserver_topk,
    "saelens": saelens,
    "saelens.topk": saelens_topk,
    "saelens.gated": saelens_gated,
    "saelens.training": saelens_training,
    "saelens.pursuit": saelens_pursuit,
    "saelens.skip_transcoder": saelens_skip_transcoder,
    "gemma_scope": gemma_scope,
    "gemma_scope_2": gemma_scope_2,
    "gemma_scope_2.crosscoder": gemma_scope_2_crosscoder,
    "gemma_scope_2.clt": gemma_scope_2_clt,
    "llama_scope": llama_scope,
    "llama_scope_r1": llama_scope_r1,
    "qwen_scope": qwen_scope,
    "goodfire": goodfire,
    "connor_rob": connor_rob,
    "dictionary_learning": dictionary_learning,
    "dictionary_learning.matryoshka": dictionary_learning_matryoshka,
    "dictionary_learning.gated": dictionary_learning_gated,
    "dictionary_learning.crosscoder": test_dictionary_learning.write_crosscoder,
    "dictionary_learning.variational": test_dictionary_learning.write_variational,
    "sparsify": sparsify,
    "bussmann": test_bussmann.write_small,
    "bussmann.jumprelu": test_bussmann.write_jumprelu,
    "top_afa": test_bussmann.write_top_afa,
    "openai_gpt2": test_openai_gpt2.write_small,
    "e2e": test_e2e.write_small,
    "itda": test_itda.write_small,
    "polysae": test_polysae.write_small,
    "polysae.shared": test_polysae.write_shared,
    "crosscoder_model_diff": test_crosscoder_model_diff.write_small,
    "llamascopium": test_llamascopium.write_small,
    "llamascopium.glu": llamascopium_glu,
    "llamascopium.pt": llamascopium_pt,
    "llamascopium.crosscoder": llamascopium_crosscoder,
    "llamascopium.clt": llamascopium_clt,
    "circuit_tracer": test_circuit_tracer.write_small,
    "clt": test_clt.write_small,
}


# Damage

WEIGHTS = (".safetensors", ".npz", ".pt", ".pth")
TEXTS = (".json", ".yaml", ".yml")
Key = tuple[str, ...]
ALONE = "tensor"
"""What is called the tensor of a file that holds nothing else."""


def files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The files of a checkpoint with one of these suffixes, in order."""
    return sorted(path for path in folder.rglob("*") if path.suffix in suffixes)


def read(path: Path) -> dict[Key, Tensor]:
    """Every tensor of a weights file by its keys (several where dicts are nested)."""
    if path.suffix == ".safetensors":
        return {(name,): tensor for name, tensor in load_file(path).items()}
    if path.suffix == ".npz":
        with np.load(path) as archive:
            return {(name,): torch.from_numpy(archive[name]) for name in archive.files}
    content = torch.load(path, weights_only=True)
    return {(ALONE,): content} if isinstance(content, Tensor) else _flat(content, ())


def rewrite(path: Path, change: Callable[[Key, Tensor], Tensor | None]) -> None:
    """Replace every tensor by what ``change`` makes of it; None leaves it out."""
    if path.suffix == ".pt" or path.suffix == ".pth":
        content = torch.load(path, weights_only=True)
        alone = isinstance(content, Tensor)
        torch.save(change((ALONE,), content) if alone else _changed(content, (), change), path)
        return
    kept = {key[0]: new for key, tensor in read(path).items() if (new := change(key, tensor)) is not None}
    path.unlink()
    write_tensors(path, kept)


def _flat(content: Any, above: Key) -> dict[Key, Tensor]:
    if isinstance(content, Tensor):
        return {above: content}
    inner = content.items() if isinstance(content, dict) else []
    return {key: tensor for name, value in inner for key, tensor in _flat(value, (*above, str(name))).items()}


def _changed(content: Any, above: Key, change: Callable[[Key, Tensor], Tensor | None]) -> Any:
    if isinstance(content, Tensor):
        return change(above, content)
    if not isinstance(content, dict):
        return content
    inner = {name: _changed(value, (*above, str(name)), change) for name, value in content.items()}
    return {name: value for name, value in inner.items() if value is not None or content[name] is None}
