"""The custom op that sits in the compiled graph after each armed layer.

``editserver::edit(hidden!, residual!, layer)`` and ``editserver::edit_stream(hidden!, layer)`` mutate their tensors and
return nothing. The state that they act on is looked up when they run, never when they are traced: what a program says
is data, and the graph is the same for everybody. (Registered with ``torch.library.Library`` directly: it dispatches
faster than the decorator, cf. vllm/utils/torch_utils.py:1068.)

On a CPU their C++ form may stand in front of these (:mod:`editserver.engine.native`); ``…_in_python`` is whom that asks.
"""

from __future__ import annotations

import torch

from editserver.engine import native
from editserver.engine.engine import Engine

_library = torch.library.Library("editserver", "FRAGMENT")
_library.define("edit(Tensor(a!) hidden, Tensor(b!) residual, int layer) -> ()")
_library.define("edit_stream(Tensor(a!) hidden, int layer) -> ()")
_library.define("edit_in_python(Tensor(a!) hidden, Tensor(b!) residual, int layer) -> ()")
_library.define("edit_stream_in_python(Tensor(a!) hidden, int layer) -> ()")
_on_cpu: torch.library.Library | None = None

_worker: Engine | None = None


def install(worker: Engine) -> None:
    """Make ``worker`` the one that this process's ops act through."""
    global _worker
    _worker = worker
    native.serve(getattr(worker, "jobs", None))


def give_way() -> None:
    """The C++ op is about to be registered for the CPU."""
    global _on_cpu
    if _on_cpu is not None:
        _on_cpu._destroy()
        _on_cpu = None


def take_over() -> None:
    """The op on the CPU is Python's, as long as it does not :func:`give_way`."""
    global _on_cpu
    if _on_cpu is None:
        _on_cpu = torch.library.Library("editserver", "IMPL", "CPU")
        _on_cpu.impl("edit", _edit)
        _on_cpu.impl("edit_stream", _edit_stream)


def current() -> Engine | None:
    """The worker installed in this process, if any."""
    return _worker


def _require() -> Engine:
    if _worker is None:
        raise RuntimeError("an armed layer ran in a process that has no editserver engine")
    return _worker


def _edit(hidden: torch.Tensor, residual: torch.Tensor, layer: int) -> None:
    _require().run(layer, hidden, residual)


def _edit_stream(hidden: torch.Tensor, layer: int) -> None:
    _require().run(layer, hidden.view(-1, hidden.shape[-1]), None)


def _edit_fake(hidden: torch.Tensor, residual: torch.Tensor, layer: int) -> None:
    return None


def _edit_stream_fake(hidden: torch.Tensor, layer: int) -> None:
    return None


for _key in ("CPU", "CUDA"):  # which engine is installed decides what runs, not the key
    _library.impl("edit_in_python", _edit, _key)
    _library.impl("edit_stream_in_python", _edit_stream, _key)
_library.impl("edit", _edit, "CUDA")
_library.impl("edit_stream", _edit_stream, "CUDA")
take_over()
torch.library.register_fake("editserver::edit", _edit_fake, lib=_library)
torch.library.register_fake("editserver::edit_stream", _edit_stream_fake, lib=_library)
