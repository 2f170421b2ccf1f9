"""Relatives of the tiny model: LoRA adapters and quantised checkpoints, and what ``transformers`` runs."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.engine.tiny import N_LAYERS

PROJECTIONS = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
RANK, ALPHA = 4, 8
LINEAR = [
    f"model.layers.{i}.{block}.{name}" for i in range(N_LAYERS) for block, ns in PROJECTIONS.items() for name in ns
]
"""The linear layers inside the decoder layers."""


def write_adapter(model: Any, folder: Path, seed: int, size: float = 0.3) -> Any:
    """A random adapter of every linear layer, as PEFT writes it; returns a copy of ``model`` with it merged by hand."""
    random = torch.Generator().manual_seed(seed)
    merged = copy.deepcopy(model)
    tensors = {}
    for name in LINEAR:
        weight = merged.get_submodule(name).weight
        a = torch.randn(RANK, weight.shape[1], generator=random) * size / weight.shape[1] ** 0.5
        b = torch.randn(weight.shape[0], RANK, generator=random) * size
        tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
        weight.data += ALPHA / RANK * (b @ a)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    modules = sorted({name for names in PROJECTIONS.values() for name in names})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": modules}))
    return merged


FORMATS: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "int8": (
        "int-quantized",
        {"num_bits": 8, "type": "int", "strategy": "channel"},
        {"num_bits": 8, "type": "int", "strategy": "token"},
    ),
    "fp8": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "channel"},
        {"num_bits": 8, "type": "float", "strategy": "token"},
    ),
    "int4": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}, None),
}
"""Name → format of compressed-tensors, its weights, and its activations (quantised per token as they come, or not)."""


def runs_here(name: str) -> bool:
    """Whether vLLM's build for this CPU multiplies the format: the one for x86 without AVX-512 has no int4."""
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    return name != "int4" or hasattr(torch.ops._C, "cpu_gemm_wna16")


def int8_saturates() -> bool:
    """Whether vLLM's int8 product loses what it should not: without VNNI, oneDNN adds pairs of products in 16 bits."""
    from vllm import _custom_ops as ops
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    weights, scales = torch.full((32, 64), 127, dtype=torch.int8), torch.ones(32, 1)
    product = ops.create_onednn_scaled_mm(weights.t(), scales, torch.bfloat16, True, False, 1)
    x, scale, zero = ops.onednn_scaled_int8_quant(torch.full((4, 64), 127.0, dtype=torch.bfloat16))
    out = ops.onednn_scaled_mm(product, x, torch.zeros(4, 32, dtype=torch.bfloat16), scale, zero, None, None)
    return not torch.allclose(out.float(), torch.tensor(64 * 127.0**2), rtol=0.01)


def write_quantised(source: Path, folder: Path, name: str) -> Path:
    """The checkpoint in ``source`` with its linear layers in the format ``name``, bfloat16 otherwise."""
    form, weights, activations = FORMATS[name]
    shutil.copytree(source, folder)
    tensors = {key: value.bfloat16() for key, value in load_file(folder / "model.safetensors").items()}
    for layer in LINEAR:
        weight = tensors.pop(f"{layer}.weight").float()
        tensors |= {f"{layer}.{key}": value.contiguous() for key, value in _quantised(weight, name).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    group = {
        "targets": ["Linear"],
        "weights": weights | {"symmetric": True, "dynamic": False},
        "input_activations": None if activations is None else activations | {"symmetric": True, "dynamic": True},
        "output_activations": None,
    }
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16"}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def dequantised(model: Any, name: str) -> Any:
    """A copy of ``model`` with the weights that the format leaves of its own, in float32."""
    rounded = copy.deepcopy(model)
    for layer in LINEAR:
        weight = rounded.get_submodule(layer).weight
        values, scale = _rounded(weight.data.bfloat16().float(), name)
        weight.data = (values * scale).reshape(weight.shape)
    return rounded


def _rounded(weight: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Values on the format's grid ``[out, groups, in / groups]``, and scales ``[out, groups, 1]``."""
    top = {"int8": 127.0, "fp8": 448.0, "int4": 7.0}[name]
    grouped = weight.view(len(weight), -1, 32) if name == "int4" else weight[:, None]
    scale = (grouped.abs().amax(dim=-1, keepdim=True) / top).bfloat16().float()
    values = grouped / scale
    if name == "fp8":
        return values.clamp(-top, top).to(torch.float8_e4m3fn).float(), scale
    return values.round().clamp(-top, top), scale


def _quantised(weight: torch.Tensor, name: str) -> dict[str, torch.Tensor]:
    values, scale = _rounded(weight, name)
    flat, scales = values.reshape(weight.shape), scale[..., 0].bfloat16()
    if name == "fp8":
        return {"weight": flat.to(torch.float8_e4m3fn), "weight_scale": scales.float()}
    if name == "int8":
        return {"weight": flat.to(torch.int8), "weight_scale": scales.float()}
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    packed = pack_to_int32(flat.to(torch.int8), 4)
    return {"weight_packed": packed, "weight_scale": scales, "weight_shape": torch.tensor(weight.shape)}
