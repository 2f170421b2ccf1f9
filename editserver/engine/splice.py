"""Find the decoder layers of a loaded model and arm some of them, before anything is traced.

Arming swaps the class of one layer *instance* for a subclass whose ``forward`` ends in our op: parameter names, hooks,
``isinstance`` and every other instance of the class (drafters) stay as they are, and torch.compile traces it like any
other layer. The layers are located in two independent ways that must agree.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

import editserver.engine.op  # noqa: F401  (registers the ops that the armed forward calls)


class UnsupportedModel(RuntimeError):
    """The model's layers cannot be found or do not carry the residual stream; the message says what was seen."""


def _is_missing(layer: nn.Module) -> bool:
    return type(layer).__name__ == "PPMissingLayer"


def _language_model(model: nn.Module) -> nn.Module:
    get = getattr(model, "get_language_model", None)
    found = get() if callable(get) else model
    return found if isinstance(found, nn.Module) else model


def layers_by_shape(model: nn.Module, n_layers: int) -> dict[int, nn.Module]:
    """Way A: the unique ``ModuleList`` of the model's depth whose members are of at most a few classes."""
    root = _language_model(model)
    found = [m for m in root.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
    found = [m for m in found if len({type(x) for x in m if not _is_missing(x)}) in (1, 2, 3)]
    if len(found) != 1:
        raise UnsupportedModel(
            f"{type(model).__name__} has {len(found)} lists of {n_layers} layers, expected exactly one"
        )
    return {i: layer for i, layer in enumerate(found[0]) if not _is_missing(layer)}


def layers_by_attention(model: nn.Module, attention_names: Iterable[str]) -> dict[int, nn.Module]:
    """Way B: the containers ``….<index>`` of the attention (or mamba) layers that vLLM registered by name."""
    found: dict[int, nn.Module] = {}
    for name in attention_names:
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if at is None:
            continue
        try:
            found[int(parts[at])] = model.get_submodule(".".join(parts[: at + 1]))
        except AttributeError:
            continue  # a drafter's layer: registered in the same table, but not part of this model
    return found


def locate(model: nn.Module, n_layers: int, attention_names: Iterable[str]) -> dict[int, nn.Module]:
    """The decoder layers by global index; :class:`UnsupportedModel` unless both ways find the same modules."""
    shape, attention = layers_by_shape(model, n_layers), layers_by_attention(model, attention_names)
    different = [i for i in shape.keys() | attention.keys() if shape.get(i) is not attention.get(i)]
    if different:
        raise UnsupportedModel(
            f"{type(model).__name__}: the layers found by shape and by attention differ at {sorted(different)[:5]} "
            f"({len(shape)} and {len(attention)} found); editserver does not know this model's layout"
        )
    return shape


def _positions_of(forward: Callable[..., Any]) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
    """What a layer's ``forward`` is given as ``positions``, or None; its place among the arguments differs by family."""
    names = list(inspect.signature(forward).parameters)[1:]
    place = names.index("positions") if "positions" in names else None

    def positions(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args[place] if place is not None and place < len(args) else kwargs.get("positions")

    return positions


def _check_stream(output: Any, positions: Any, width: int | None, layer: int) -> None:
    """Raise UnsupportedModel unless a layer's ``output`` has one row of ``width`` numbers per position.

    A tensor that is the stream itself may be ``[1, tokens, width]``.

    Shapes are all that is looked at: under torch.compile this runs when the layer is traced, and costs nothing after.
    """
    alone = isinstance(output, torch.Tensor)
    shape = output.shape if alone else output[0].shape
    whole = len(shape) == 2 or (len(shape) == 3 and shape[0] == 1 and (alone or output[1] is None))
    if not whole or (width is not None and shape[-1] != width):
        raise UnsupportedModel(
            f"layer {layer} returns a tensor of shape {tuple(shape)}, not one row of {width or 'd_model'} numbers per token: "
            "it does not carry one residual stream (several streams per token, or something else)"
        )
    if isinstance(positions, torch.Tensor) and shape[-2] != positions.shape[-1]:
        raise UnsupportedModel(
            f"layer {layer} returns {shape[-2]} rows for {positions.shape[-1]} positions: the residual stream is shared out "
            "between ranks (sequence parallelism)"
        )


def _armed_class(base: type[nn.Module], layer: int, width: int | None) -> type[nn.Module]:
    base_forward = base.forward
    positions = _positions_of(base_forward)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = base_forward(self, *args, **kwargs)
        _check_stream(output, positions(args, kwargs), width, layer)
        if isinstance(output, torch.Tensor):
            torch.ops.editserver.edit_stream(output, layer)
        elif output[1] is None:
            torch.ops.editserver.edit_stream(output[0], layer)
        else:
            torch.ops.editserver.edit(output[0], output[1], layer)
        return output

    return type(f"Edited{base.__name__}", (base,), {"forward": forward, "editserver_layer": layer})


def arm(layers: Mapping[int, nn.Module], armed: Iterable[int], width: int | None = None) -> list[int]:
    """Arm the layers ``armed``; returns those that are now armed. Arming twice is an error.

    ``width``: of the residual stream. A layer that returns something else than one row of it per position raises
    UnsupportedModel as soon as it runs or is traced: in the dummy batches of the start.
    """
    done = []
    for index in armed:
        layer = layers.get(index)
        if layer is None:
            raise UnsupportedModel(f"layer {index} cannot be armed: this worker has the layers {sorted(layers)}")
        if hasattr(type(layer), "editserver_layer"):
            raise UnsupportedModel(f"layer {index} is armed already")
        layer.__class__ = _armed_class(type(layer), index, width)
        done.append(index)
    return done
