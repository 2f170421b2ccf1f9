"""Run by test_circuit_tracer.py and test_clt.py with the interpreter that has circuit-tracer; imports nothing of ours.

    python oracle_circuit_tracer.py WORK

Writes WORK/<case>/ with the files that circuit-tracer saves (layer_N.safetensors, or W_enc_N and W_dec_N), the config.yaml
of such a repository, and answers.safetensors: x [layer, token, d], the features f and the reconstruction x_hat.
"""

from __future__ import annotations

import sys
import sysconfig
import types
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file


def skip_initialisation(*packages):
    """The packages' own __init__ files import plots and web services: here only single modules of them are used."""
    for name in packages:
        module = types.ModuleType(name)
        module.__path__ = [str(Path(sysconfig.get_paths()["purelib"], *name.split(".")))]
        sys.modules[name] = module


skip_initialisation("circuit_tracer", "circuit_tracer.transcoder", "circuit_tracer.utils")
sys.modules["circuit_tracer.utils"].get_default_device = lambda: torch.device("cpu")

from circuit_tracer.transcoder.activation_functions import JumpReLU, TopK  # noqa: E402
from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder, load_clt  # noqa: E402
from circuit_tracer.transcoder.single_layer_transcoder import (  # noqa: E402
    SingleLayerTranscoder,
    TranscoderSet,
    load_transcoder_set,
)

D, N, TOKENS, K, LAYERS = 12, 48, 30, 6, 3
# With 40 of 48 kept, some of those kept are negative: circuit-tracer's TopK has no ReLU.
MANY = 40


@torch.no_grad()
def randomise(model, generator):
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if name.endswith("threshold"):
            values = values.abs() * 0.8
        elif not name.startswith(("W_enc", "W_dec", "W_skip")):
            values = values * 0.4
        parameter.copy_(values)
    return model


def tokens(generator):
    size = torch.rand(LAYERS, TOKENS, 1, generator=generator) * 4 + 0.2
    return (torch.randn(LAYERS, TOKENS, D, generator=generator) + 0.4) * size


def answer(folder, config, **tensors):
    (folder / "config.yaml").write_text(config)
    tensors = {name: tensor.detach().float().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "answers.safetensors")


def activation(kind):
    if kind == "jumprelu":
        return JumpReLU(torch.zeros(N), 0.1)
    return {"relu": F.relu, "topk": TopK(K), "topk-many": TopK(MANY)}[kind]


@torch.no_grad()
def transcoder_set(root, kind, skip, generator, dtype=torch.float32):
    folder = root / f"set.{kind}.{'skip' if skip else 'plain'}{'' if dtype == torch.float32 else '.bfloat16'}"
    single = {
        layer: randomise(
            SingleLayerTranscoder(D, N, activation(kind), layer, skip_connection=skip, dtype=dtype), generator
        )
        for layer in range(LAYERS)
    }
    hooks = {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out"}
    transcoders = TranscoderSet(single, **hooks)
    transcoders.to_safetensors(str(folder))
    # Read back by its own loader where it has one: TopK is known to the code, not to the loader of 0.5.0.
    if not kind.startswith("topk"):
        paths = {layer: str(folder / f"layer_{layer}.safetensors") for layer in range(LAYERS)}
        transcoders = load_transcoder_set(paths, scan="", **hooks, lazy_encoder=False, lazy_decoder=False)
    x = tokens(generator)
    f = transcoders.encode(x)
    config = "model_name: tiny/model\nmodel_kind: transcoder_set\n"
    config += "".join(f"{name}: {value}\n" for name, value in hooks.items())
    if kind.startswith("topk"):
        config += f"activation: topk\nk: {K if kind == 'topk' else MANY}\n"
    answer(folder, config, x=x, f=f, x_hat=transcoders.decode(f, x))


@torch.no_grad()
def clt(root, kind, generator):
    folder = root / f"clt.{kind}"
    model = CrossLayerTranscoder(LAYERS, N, D, kind, lazy_decoder=False, dtype=torch.float32)
    randomise(model, generator).to_safetensors(str(folder))
    model = load_clt(str(folder), lazy_decoder=False, dtype=torch.float32)
    x = tokens(generator)
    f = model.encode(x)
    # Row l of this: what the features of layer l alone write to the outputs of layers l and later.
    alone = torch.stack(
        [
            model.decode(f * (torch.arange(LAYERS) == layer)[:, None, None].float()) - model.b_dec[:, None]
            for layer in range(LAYERS)
        ]
    )
    config = "model_name: tiny/model\nmodel_kind: cross_layer_transcoder\n"
    config += "feature_input_hook: hook_resid_mid\nfeature_output_hook: hook_mlp_out\n"
    answer(folder, config, x=x, f=f, x_hat=model.decode(f), alone=alone)


def main():
    root = Path(sys.argv[1])
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(5)
    for kind in ("relu", "jumprelu", "topk", "topk-many"):
        for skip in (False, True):
            transcoder_set(root, kind, skip, generator)
    transcoder_set(root, "relu", False, generator, torch.bfloat16)
    for kind in ("relu", "jump_relu"):
        clt(root, kind, generator)


if __name__ == "__main__":
    main()
