"""What must hold of the parts of a dictionary before it is one."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .architectures import ARCHITECTURES, Architecture
from .errors import SAEFormatError

SKIP = "W_skip"


def check_tensors(
    architecture: str,
    W_enc: Tensor | None,
    W_dec: Tensor,
    b_dec: Tensor,
    gate: Mapping[str, Tensor],
    extras: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Name → tensor on the CPU, after names and shapes were checked; raises SAEFormatError naming the one that is wrong."""
    if architecture not in ARCHITECTURES:
        raise SAEFormatError(f"architecture: {architecture!r}; expected one of {', '.join(sorted(ARCHITECTURES))}")
    form = ARCHITECTURES[architecture]
    for name, matrix in {"W_enc": W_enc, "W_dec": W_dec}.items():
        if matrix is not None and matrix.ndim != 2:
            raise SAEFormatError(f"{name}: shape {list(matrix.shape)}; expected [n_features, d_model]")
    if W_enc is None and not form.tied:
        raise SAEFormatError(f"W_enc: missing; architecture {architecture!r} has an encoder")
    n, d_out = W_dec.shape
    check_names(form, gate, extras)
    shapes: dict[str, list[int | None]] = {} if W_enc is None else {"W_enc": [n, None]}
    shapes["b_dec"] = [d_out]
    shapes |= {name: [n, None] if name in form.gate_matrices else [n] for name in gate}
    if W_enc is not None and SKIP in extras:
        shapes[SKIP] = [d_out, W_enc.shape[1]]
    given = {"b_dec": b_dec, **gate, **extras} | ({} if W_enc is None else {"W_enc": W_enc})
    for name, expected in shapes.items():
        have = list(given[name].shape)
        if len(have) != len(expected) or any(e not in (None, h) for e, h in zip(expected, have, strict=True)):
            shown = [("any" if e is None else e) for e in expected]
            raise SAEFormatError(f"{name}: shape {have}; expected {shown}")
    tensors = {name: tensor.detach().cpu() for name, tensor in given.items()}
    tensors["W_dec"] = W_dec.detach().cpu()
    if W_enc is None or W_enc is W_dec:
        tensors["W_enc"] = tensors["W_dec"]
    return tensors


def check_names(form: Architecture, gate: Mapping[str, Any], extras: Mapping[str, Any]) -> None:
    """Raise SAEFormatError unless the gate and the extras hold what the architecture has, and nothing else."""
    if missing := [name for name in form.gate_tensors if name not in gate]:
        raise SAEFormatError(f"gate: {sorted(gate)}; architecture {form.name!r} also needs {missing}")
    if extra := [name for name in gate if name not in form.gate_tensors + form.optional_gate]:
        raise SAEFormatError(
            f"gate: {extra} does not belong to architecture {form.name!r}, which has "
            f"{list(form.gate_tensors + form.optional_gate)}"
        )
    if missing := [name for name in form.extra_tensors if name not in extras]:
        raise SAEFormatError(f"extras: {sorted(extras)}; architecture {form.name!r} also needs {missing}")
    if extra := [name for name in extras if name not in (*form.extra_tensors, *form.optional_extras, SKIP)]:
        raise SAEFormatError(f"extras: {extra} does not belong to architecture {form.name!r}")


def check_settings(form: Architecture, given: Mapping[str, Any], n_features: int) -> dict[str, Any]:
    """The architecture's settings with its defaults filled in; raises SAEFormatError for others, and for wrong types."""
    for name, value in given.items():
        if name not in form.settings:
            near = difflib.get_close_matches(name, form.settings, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise SAEFormatError(f"settings: {name!r} is none of architecture {form.name!r}{hint}")
        default = form.settings[name]
        if not _same_kind(value, default):
            raise SAEFormatError(f"settings: {name} is {value!r}; expected {type(default).__name__}, as {default!r} is")
        if isinstance(value, float) and not math.isfinite(value):
            raise SAEFormatError(f"settings: {name} is {value}; expected a finite number")
    # 1 and 1.0 are one number, with one digest.
    numbers = {name: float(given[name]) for name in given if isinstance(form.settings[name], float)}
    settings = {**form.settings, **given, **numbers}
    sizes = settings.get("group_sizes")
    if sizes:
        whole = all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes)
        if not whole or sum(sizes) != n_features:
            raise SAEFormatError(f"settings: group_sizes {list(sizes)}; expected sizes that add up to {n_features}")
        settings["group_sizes"] = list(sizes)
    return settings


def _same_kind(value: Any, default: Any) -> bool:
    """Whether a setting has the type of its default; a whole number is a number, but a bool is none."""
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, float):
        return isinstance(value, int | float)
    if isinstance(default, list):
        return isinstance(value, list | tuple)
    return isinstance(value, type(default))
