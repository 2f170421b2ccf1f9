"""What a hostile checkpoint may hold: code, headers that lie, configs that are none, values of any kind."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import warnings
import zipfile

import numpy as np
import torch

# Code


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (str(self.marker),))


def evil_contents(marker):
    """Contents that run code in whoever unpickles them."""
    plain = pickle.dumps({"W_enc": Evil(marker)}, protocol=2)
    yield "a pickle", plain
    yield "an old pickle", pickle.dumps(Evil(marker), protocol=0)
    zipped = io.BytesIO()
    torch.save({"W_enc": torch.ones(2), "config": Evil(marker)}, zipped)
    yield "a torch archive", zipped.getvalue()
    old = io.BytesIO()
    torch.save({"W_enc": torch.ones(2), "config": Evil(marker)}, old, _use_new_zipfile_serialization=False)
    yield "an old torch file", old.getvalue()
    archive = io.BytesIO()
    np.savez(archive, W_enc=np.array([Evil(marker)], dtype=object), b_dec=np.zeros(3))
    yield "an archive of objects", archive.getvalue()
    array = io.BytesIO()
    np.save(array, np.array([Evil(marker)], dtype=object), allow_pickle=True)
    yield "an array of objects", array.getvalue()


def _first_array(file):
    with np.load(file, allow_pickle=True) as archive:
        return archive["W_enc"]


UNPICKLE = {
    "a pickle": pickle.load,
    "an old pickle": pickle.load,
    "a torch archive": lambda file: torch.load(file, weights_only=False),
    "an old torch file": lambda file: torch.load(file, weights_only=False),
    "an archive of objects": _first_array,
    "an array of objects": lambda file: np.load(file, allow_pickle=True),
}
"""Who would run each of them."""


# Headers that lie

HUGE = 1 << 40


def lying_safetensors(tensors):
    """Headers over a few bytes of content."""
    name = next(iter(tensors))[0]
    for header in (
        {name: {"dtype": "F32", "shape": [HUGE, HUGE], "data_offsets": [0, 16]}},
        {name: {"dtype": "F32", "shape": [4], "data_offsets": [0, 1 << 62]}},
        {name: {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}},
        {name: {"dtype": "F32", "shape": [-1, 4], "data_offsets": [0, 16]}},
        {name: {"dtype": "F32", "shape": [1 << 63], "data_offsets": [0, 16]}},
        {name: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "b": {"dtype": "F32", "shape": [4]}},
        {name: {"dtype": "X32", "shape": [4], "data_offsets": [0, 16]}},
        {name: None},
        {"__metadata__": {"digest": 3}, name: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}},
    ):
        text = json.dumps(header).encode()
        yield struct.pack("<Q", len(text)) + text + b"\x00" * 16
    yield struct.pack("<Q", HUGE) + b"{}"
    yield struct.pack("<Q", (1 << 64) - 1) + b"{}"
    deep = b'{"a":' * 50_000
    yield struct.pack("<Q", len(deep)) + deep


def lying_npz(tensors):
    """Archives whose arrays are said to be larger than they are, and ones that unpack to more than they hold."""
    for shape in (f"({HUGE},)", f"({HUGE}, {HUGE})", "(-1,)", "(1 << 40,)", "('a',)", "(" + "1," * 5000 + ")"):
        header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
        array = b"\x93NUMPY\x02\x00" + struct.pack("<I", len(header) + 1) + header + b"\n" + b"\x00" * 16
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as file:
            for (name,) in tensors:
                file.writestr(f"{name}.npy", array)
        yield archive.getvalue()
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as file, file.open("W_enc.npy", "w", force_zip64=True) as out:
        np.lib.format.write_array_header_2_0(out, {"descr": "<f4", "fortran_order": False, "shape": (1 << 33,)})
        for _ in range(64):
            out.write(b"\x00" * (1 << 20))
    yield bomb.getvalue()
    yield zeros_that_unpack_to(128 << 20)


def zeros_that_unpack_to(size):
    """An archive whose matrices are as large as they say, and hardly take any space while they are packed."""
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as file, file.open("W_enc.npy", "w") as out:
        np.lib.format.write_array_header_2_0(
            out, {"descr": "<f4", "fortran_order": False, "shape": (size // 4096, 1024)}
        )
        for _ in range(size >> 20):
            out.write(b"\x00" * (1 << 20))
    return bomb.getvalue()


def lying_torch(tensors):
    """Tensors that are said to be larger than what is stored of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch no longer likes quantised tensors; files may hold them all the same
        quantised = torch.quantize_per_tensor(torch.ones(3, 3), 0.1, 0, torch.qint8)
    for tensor in (
        torch.ones(1).expand(1 << 20, 1 << 20),
        torch.ones(()).as_strided((1 << 30, 1 << 30), (0, 0)),
        torch.ones(3, 3).to_sparse(),
        quantised,
        torch.ones(3, 3, device="meta"),
    ):
        content = {}
        for key in tensors:
            inner = content
            for part in key[:-1]:
                inner = inner.setdefault(part, {})
            inner[key[-1]] = tensor
        stored = io.BytesIO()
        torch.save(content, stored)
        yield stored.getvalue()
    for content in ([torch.ones(3)], torch.ones(3), 7, None, {1: torch.ones(3)}, {(1, 2): torch.ones(3)}):
        stored = io.BytesIO()
        torch.save(content, stored)
        yield stored.getvalue()
    packed = io.BytesIO()
    plain = io.BytesIO()
    torch.save({"W_enc": torch.zeros(1 << 20)}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    yield packed.getvalue()
    # Shapes that fit each other, so that nothing but their size is wrong.
    expanded = {}
    for key, tensor in tensors.items():
        inner = expanded
        for part in key[:-1]:
            inner = inner.setdefault(part, {})
        inner[key[-1]] = torch.ones(()).expand([1 << 20] * tensor.ndim) if tensor.is_floating_point() else tensor
    stored = io.BytesIO()
    torch.save(expanded, stored)
    yield stored.getvalue()
    for value in (10**400, float("nan"), -(1 << 70), b"x" * 5000, "x" * 5000, {"x" * 5000: 1}, torch.Size([1 << 40])):
        stored = io.BytesIO()
        torch.save({"W_enc": torch.ones(3, 3), "k": value}, stored)
        yield stored.getvalue()
    nested = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save({"W_enc": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}, nested)
    yield nested.getvalue()
    deep: dict = {}
    for _ in range(300):
        deep = {"a": deep}
    stored = io.BytesIO()
    torch.save(deep, stored)
    yield stored.getvalue()


LIES = {".safetensors": lying_safetensors, ".npz": lying_npz, ".pt": lying_torch, ".pth": lying_torch}


# Configs

NOT_A_CONFIG = (
    b"",
    b"\x00",
    b"\xff\xfe{}",
    b"null",
    b"[]",
    b"3",
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b"{" * 5_000,
    b'{"d_model": ' + b"9" * 5_000 + b"}",
    b'{"d_model": 1e999999}',
    b"- " * 3_000,
    b"a: &a [1]\nb: " + b"[" * 2_000,
    b"? [1, 2]\n: 3\n",
    b"2026-13-45: 2026-13-45\n",
    b"d_model: 2026-13-45\n",
    b"&a [*a]\n",
    b"a: &a {b: *a}\n",
    "a\u0085b: \ud7ff".encode(),
    b"\x01: 1\n",
    b"%YAML 9.9\n---\na: 1\n",
    b"<<: 3\n",
)


def laughs():
    """Nine levels of nine aliases: 387 million values in 400 bytes."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    return "\n".join([*lines, "model_kind: *a8", "feature_input_hook: *a8", "d_model: *a8"]).encode()


ODD = (
    None,
    True,
    [],
    {},
    "",
    "x",
    "\x00",
    "blocks.1.hook_resid_post",
    -1,
    0,
    0.5,
    7,
    10**30,
    float("nan"),
    float("inf"),
    -float("inf"),
    [1],
    ["x"],
    [None],
    [[]],
    {"a": 1},
    {"value": {}},
    "x" * 5000,
    [0] * 5000,
    1 << 70,
)


ODD_YAML = (
    "",
    "~",
    "[]",
    "{}",
    "3",
    "0x_",
    "[1, 2]",
    "{a: 1}",
    "true",
    "'x'",
    ".nan",
    ".inf",
    "2026-01-01",
    "9" * 5000,
)
