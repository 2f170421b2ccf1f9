"""Tensor parallelism: every rank edits its own copy of the residual stream, so all ranks must decide the same.

All ranks get the same scheduler output and make the same plan; a program decides by thresholds on ``h``. Where an all-reduce
adds in another order on each rank (shared memory with three or more ranks does), copies of ``h`` differ in their last bits,
and so could decisions. Every worker therefore proves at its start, before ``compile_or_warm_up_model``
(vllm/v1/worker/gpu_worker.py:908, cpu_worker.py:264) captures any graph, on random tokens:

* bit-equal copies at every armed layer: ranks decide alone;
* copies that differ by rounding: at every step, ranks take rank 0's: the CPU's engine for the tokens that programs look at,
  a device's for the whole batch, by a collective that graphs capture;
* copies that differ by more: what the layer returns is not the residual stream but one rank's share of it (an all-reduce
  that is deferred into the next layer). The worker does not start.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from editserver.engine import op
from editserver.engine.compat import handshake, signatures
from editserver.engine.splice import UnsupportedModel

RELIED_ON: signatures.Relied = {
    "vllm.v1.worker.gpu_worker:Worker.compile_or_warm_up_model": ("self",),
    "vllm.distributed.device_communicators.base_device_communicator:DeviceCommunicatorBase.broadcast": (
        "self",
        "tensor",
        "src",
    ),
}

BATCHES = (1, 16, 61)
"""Tokens of the batches that are compared, and on a device the sizes beyond them: a collective may go another way for
another size."""

ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 6e-2}
"""Largest ||h_rank − h_0|| / ||h_0|| of a token that is taken for rounding. A share of the stream is off by its order."""


def take_rank_zeros(h: torch.Tensor) -> None:
    """Overwrite ``h``, contiguous, with what TP rank 0 has there; a collective of all ranks, on the current stream."""
    from vllm.distributed.parallel_state import get_tp_group

    get_tp_group().device_communicator.broadcast(h, 0)


def sizes(most: int, on_device: bool) -> list[int]:
    """Tokens of the batches that are compared, ``most`` at most."""
    beyond = [most, *(4**k for k in range(4, 12))] if on_device else []
    return sorted({min(n, most) for n in (*BATCHES, *beyond)})


@contextmanager
def _random_tokens(model: torch.nn.Module, vocabulary: int, seed: int) -> Iterator[None]:
    """Whatever ``model`` is run with, its tokens are random: the same on every rank."""

    def exchange(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        ids = kwargs.get("input_ids")
        if ids is not None:
            made = torch.randint(0, vocabulary, ids.shape, generator=torch.Generator().manual_seed(seed))
            kwargs = kwargs | {"input_ids": made.to(ids)}
        return args, kwargs

    handle = model.register_forward_pre_hook(exchange, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _streams_of(engine: Any) -> Iterator[dict[int, torch.Tensor]]:
    """Layer → ``h`` as its op sees it, dtype of the model, while nothing is edited."""
    seen: dict[int, torch.Tensor] = {}

    def run(layer: int, hidden: torch.Tensor, residual: torch.Tensor | None) -> None:
        stream = hidden.float() if residual is None else hidden.float() + residual.float()
        seen[layer] = stream.to(engine.dtype)

    engine.run = run
    try:
        yield seen
    finally:
        del engine.run


def differences(runner: Any, engine: Any) -> dict[int, float]:
    """Layer → the largest relative difference between this rank's ``h`` and rank 0's, over :func:`sizes`; 0.0: no bit differs.

    A collective of all ranks. No graph may have been captured: what it replays calls nobody.
    """
    from vllm.config import CUDAGraphMode

    worst: dict[int, float] = {}
    most = int(runner.scheduler_config.max_num_batched_tokens)
    for seed, n in enumerate(sizes(most, runner.device.type != "cpu")):
        with (
            _random_tokens(runner.get_model(), runner.model_config.get_vocab_size(), seed),
            _streams_of(engine) as seen,
        ):
            # V1: without attention, what it returns is not initialised. V2 runs it always, and takes no notice of either.
            runner._dummy_run(n, force_attention=True, cudagraph_runtime_mode=CUDAGraphMode.NONE)
        if missed := set(engine.config.armed) - seen.keys():
            raise UnsupportedModel(f"the model does not call the edit op of layers {sorted(missed)}")
        for layer, own in sorted(seen.items()):
            other = own.clone()
            take_rank_zeros(other)
            found = 0.0
            if not torch.equal(own.view(torch.uint8), other.view(torch.uint8)):
                distance = (own.float() - other.float()).norm(dim=-1) / other.float().norm(dim=-1).clamp_min(1e-30)
                found = float(distance.nan_to_num(nan=torch.inf).max().clamp_min(1e-30))
            worst[layer] = max(found, worst.get(layer, 0.0))
    return worst


def prove(runner: Any, engine: Any) -> bool:
    """Whether this rank and all others hold the same ``h``, bit by bit, at every armed layer; a collective of all ranks.

    ``engine.agree`` is set to what its steps need. Raises UnsupportedModel, on all ranks, where a layer returns shares.
    """
    from vllm.distributed.parallel_state import get_tp_group

    group = get_tp_group()
    if group.world_size == 1:
        return True
    found: list[Any] = [None] * group.world_size
    torch.distributed.all_gather_object(found, differences(runner, engine), group=group.cpu_group)
    worst = {layer: max(by_layer[layer] for by_layer in found) for layer in found[0]}
    bound = ROUNDING.get(engine.dtype, 0.0)
    if broken := {layer: value for layer, value in worst.items() if value > bound}:
        layer, value = max(broken.items(), key=lambda item: item[1])
        raise UnsupportedModel(
            f"with --tensor-parallel-size {group.world_size}, what layer {layer} returns differs between ranks by "
            f"{value:.2g} of its norm: it is not the residual stream, but each rank's share of it. Start with "
            f"--tensor-parallel-size 1 (layers concerned: {sorted(broken)})"
        )
    equal = not any(worst.values())
    engine.agree = None if equal else take_rank_zeros
    return equal


def install(vllm_config: Any) -> None:
    """Have the worker's class prove what :func:`prove` says, and, once it is started up, that it is armed (called in the
    worker when its model has been armed)."""
    from vllm.utils.import_utils import resolve_obj_by_qualname

    signatures.check(RELIED_ON)
    worker_class = resolve_obj_by_qualname(vllm_config.parallel_config.worker_cls)
    original = worker_class.compile_or_warm_up_model
    if hasattr(original, "editserver"):
        return

    @functools.wraps(original)
    def compile_or_warm_up_model(self: Any) -> Any:
        engine = op.current()
        if engine is not None:
            prove(self.model_runner, engine)
        times = original(self)
        if engine is not None:
            answer = getattr(
                self, handshake.METHOD
            )()  # the API process asks the workers of one data-parallel engine only
            if not answer["ok"]:
                raise UnsupportedModel(answer["error"])
        return times

    compile_or_warm_up_model.editserver = True  # type: ignore[attr-defined]
    worker_class.compile_or_warm_up_model = compile_or_warm_up_model
