"""Run by formats/test_e2e.py with the interpreter that has e2e-sae; imports nothing of ours.

    python oracle_e2e_sae.py WORK

For each WORK/<case>/ (one .pt file: the state of an ``nn.ModuleDict`` of SAEs by position, as e2e_sae saves it; and
x.safetensors): loads it strictly and writes answers.safetensors: x, and for the position p of each SAE ``f.p`` and
``x_hat.p``.
"""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

# By path: importing the package needs its training scripts, which its wheel does not hold.
FILE = Path(sysconfig.get_path("purelib")) / "e2e_sae" / "models" / "sparsifiers.py"
spec = importlib.util.spec_from_file_location("sparsifiers", FILE)
sparsifiers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sparsifiers)


@torch.no_grad()
def answer(folder):
    state = torch.load(next(folder.glob("*.pt")), map_location="cpu")
    x = load_file(folder / "x.safetensors")["x"]
    saes = torch.nn.ModuleDict()
    for name, weight in state.items():
        if name.endswith(".decoder.weight"):
            d, n = weight.shape
            saes[name.removesuffix(".decoder.weight")] = sparsifiers.SAE(d, n, init_decoder_orthogonal=False)
    saes.load_state_dict(state)
    answers = {"x": x}
    for position, sae in saes.items():
        x_hat, f = sae(x)
        answers |= {f"f.{position}": f, f"x_hat.{position}": x_hat}
    save_file({name: tensor.contiguous() for name, tensor in answers.items()}, folder / "answers.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case in sorted(Path(sys.argv[1]).iterdir()):
        answer(case)
