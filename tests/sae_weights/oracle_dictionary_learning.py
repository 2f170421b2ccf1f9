"""Run by formats/test_dictionary_learning.py with the interpreter that has dictionary_learning; imports nothing of ours.

    python oracle_dictionary_learning.py WORK

For each WORK/<case>/ (config.json, ae.pt, x.safetensors): loads the dictionary as ``dictionary_learning.utils.load_dictionary``
does, by the class that config.json names, and writes answers.safetensors: x, ``encode(x)`` (f) and ``decode(f)`` (x_hat).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from absent_packages import stand_in_for
from safetensors.torch import load_file, save_file

stand_in_for("circuitsvis", "einops", "nnsight", "tqdm", "umap", "wandb", "zstandard")

from dictionary_learning.dictionary import AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder  # noqa: E402
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE  # noqa: E402
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE  # noqa: E402
from dictionary_learning.trainers.top_k import AutoEncoderTopK  # noqa: E402

CLASSES = {
    kind.__name__: kind
    for kind in (
        AutoEncoder,
        AutoEncoderNew,
        GatedAutoEncoder,
        JumpReluAutoEncoder,
        AutoEncoderTopK,
        BatchTopKSAE,
        MatryoshkaBatchTopKSAE,
    )
}


@torch.no_grad()
def answer(folder):
    trainer = json.loads((folder / "config.json").read_text())["trainer"]
    torch.manual_seed(0)  # AutoEncoder.from_pretrained tries random inputs
    dictionary = CLASSES[trainer["dict_class"]].from_pretrained(str(folder / "ae.pt"))
    x = load_file(folder / "x.safetensors")["x"]
    f = dictionary.encode(x)
    answers = {"x": x, "f": f, "x_hat": dictionary.decode(f)}
    save_file({name: tensor.contiguous() for name, tensor in answers.items()}, folder / "answers.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case in sorted(Path(sys.argv[1]).iterdir()):
        answer(case)
