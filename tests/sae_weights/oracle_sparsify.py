"""Run by formats/test_sparsify.py with the interpreter that has eai-sparsify; imports nothing of ours.

    python oracle_sparsify.py WORK

For each folder under WORK that holds cfg.json and x.safetensors: loads it with ``SparseCoder.load_from_disk`` and writes
answers.safetensors: x, the latents as a dense tensor (f) and ``forward(x).sae_out`` (x_hat).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from absent_packages import stand_in_for
from safetensors.torch import load_file, save_file

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
stand_in_for("natsort", "schedulefree", "wandb")

from sparsify.sparse_coder import SparseCoder  # noqa: E402


@torch.no_grad()
def answer(folder):
    coder = SparseCoder.load_from_disk(folder)
    # For its loss forward() decodes 4k latents a second time, and returns that reconstruction instead of the first.
    coder.cfg.multi_topk = False
    x = load_file(folder / "x.safetensors")["x"]
    top_acts, top_indices, _ = coder.encode(x)
    f = torch.zeros(len(x), coder.num_latents).scatter_(1, top_indices, top_acts)
    answers = {"x": x, "f": f, "x_hat": coder(x).sae_out}
    save_file({name: tensor.contiguous() for name, tensor in answers.items()}, folder / "answers.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for config in sorted(Path(sys.argv[1]).rglob("cfg.json")):
        answer(config.parent)
