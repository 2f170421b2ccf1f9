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
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from editserver.engine import native, op
from editserver.engine.compat import handshake, signatures
from editserver.engine.config import EngineConfig
from editserver.engine.splice import UnsupportedModel

logger = logging.getLogger("vllm.editserver")

RELIED_ON: signatures.Relied = {
    "vllm.v1.worker.gpu_worker:Worker.compile_or_warm_up_model": ("self",),
    "vllm.v1.worker.gpu_worker:Worker.execute_model": ("self", "scheduler_output"),
    "vllm.v1.worker.gpu_worker:Worker.sample_tokens": ("self", "grammar_output"),
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
    """Overwrite ``h``, contiguous, with what TP rank 0 has there; a collective of all ranks, on the current stream, which may
    be captured."""
    from vllm.distributed.parallel_state import get_tp_group

    get_tp_group().device_communicator.broadcast(h.view(torch.uint8), 0)


def sizes(most: int, on_device: bool) -> list[int]:
    """Tokens of the batches that are compared, ``most`` at most."""
    beyond = [most, *(4**k for k in range(4, 12))] if on_device else []
    return sorted({min(n, most) for n in (*BATCHES, *beyond)})


ROWS = 256
"""Tokens that are filled in and compared at a time: the KV cache has most of the memory by now."""


@contextmanager
def _random_inputs(model: torch.nn.Module, vocabulary: int, seed: int) -> Iterator[None]:
    """Whatever ``model`` is run with, it is random, and the same on every rank: its tokens, or their embeddings (models of
    several modalities), and what an earlier stage hands it. No token is padding, which mixtures of experts pass over."""

    def exchange(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        from vllm.forward_context import get_forward_context

        padding = getattr(get_forward_context(), "is_padding", None)
        if padding is not None:
            padding.fill_(False)
        random = torch.Generator().manual_seed(seed)
        if (ids := kwargs.get("input_ids")) is not None:
            kwargs = kwargs | {"input_ids": torch.randint(0, vocabulary, ids.shape, generator=random).to(ids)}
        states = kwargs.get("intermediate_tensors")
        streams = [kwargs.get("inputs_embeds"), *(states.tensors.values() if states is not None else ())]
        for stream in streams:  # in place, in the runner's own buffers
            for first in range(0, len(stream) if stream is not None else 0, ROWS):
                part = stream[first : first + ROWS]
                part.copy_(torch.randn(part.shape, generator=random))
        return args, kwargs

    handle = model.register_forward_pre_hook(exchange, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _difference(hidden: torch.Tensor, residual: torch.Tensor | None, dtype: torch.dtype) -> float:
    """The largest ||h − h_0|| / ||h_0|| of a token, h being this rank's stream and h_0 rank 0's; 0.0: no bit differs.

    A collective of all ranks. Raises UnsupportedModel, on all of them, where rank 0's is zero: nothing would be compared.
    """
    from vllm.distributed.parallel_state import get_tp_group

    worst, something = 0.0, False
    for first in range(0, len(hidden), ROWS):
        own = hidden[first : first + ROWS].float()
        if residual is not None:
            own = (
                own + residual[first : first + ROWS].float()
            )  # not in place: float() of a float is the layer's own tensor
        own = own.to(dtype)
        other = own.clone()
        get_tp_group().broadcast(other.view(torch.uint8), 0)
        something = something or bool(other.any())
        if not torch.equal(own.view(torch.uint8), other.view(torch.uint8)):
            distance = (own.float() - other.float()).norm(dim=-1) / other.float().norm(dim=-1).clamp_min(1e-30)
            worst = max(worst, float(distance.nan_to_num(nan=torch.inf).max().clamp_min(1e-30)))
    if not something:
        raise UnsupportedModel("a batch of random tokens leaves the residual stream zero: its ranks cannot be compared")
    return worst


@contextmanager
def _compared(engine: Any, worst: dict[int, float]) -> Iterator[set[int]]:
    """While this lasts nothing is edited: at every armed layer the ranks' streams are compared, and ``worst`` is brought up
    to date. The layers that ran."""
    ran: set[int] = set()

    def run(layer: int, hidden: torch.Tensor, residual: torch.Tensor | None) -> None:
        worst[layer] = max(worst.get(layer, 0.0), _difference(hidden, residual, engine.dtype))
        ran.add(layer)

    engine.run = run
    try:
        with native.aside(getattr(engine, "jobs", None)):
            yield ran
    finally:
        del engine.run


def differences(runner: Any, engine: Any) -> dict[int, float]:
    """Layer → :func:`_difference` over random batches of :func:`sizes`.

    A collective of all ranks. No graph may have been captured: what it replays calls nobody.
    """
    from vllm.config import CUDAGraphMode

    worst: dict[int, float] = {}
    most = int(runner.scheduler_config.max_num_batched_tokens)
    for seed, n in enumerate(sizes(most, runner.device.type != "cpu")):
        with (
            _random_inputs(runner.get_model(), runner.model_config.get_vocab_size(), seed),
            _compared(engine, worst) as ran,
        ):
            # V1: without attention, what it returns is not initialised. V2 runs it always, and takes no notice of either.
            runner._dummy_run(n, force_attention=True, cudagraph_runtime_mode=CUDAGraphMode.NONE)
        if missed := set(engine.config.armed) - ran:
            raise UnsupportedModel(f"the model does not call the edit op of layers {sorted(missed)}")
    return worst


def prove(runner: Any, engine: Any) -> bool:
    """Whether this rank and all others hold the same ``h``, bit by bit, at every armed layer; a collective of all workers.

    ``engine.agree`` is set to what its steps need; ``engine`` is None where a stage of a pipeline has no armed layer. Ranks of
    one stage have to agree where those of any other do: what it hands on differs, too.

    Raises:
        UnsupportedModel: on all workers, where a layer returns shares, or ranks have to agree and cannot.
    """
    from vllm.distributed.parallel_state import get_pp_group, get_tp_group

    ranks = get_tp_group().world_size
    if ranks == 1:
        return True
    worst = {} if engine is None else differences(runner, engine)
    for group in (get_tp_group(), get_pp_group()):
        found: list[Any] = [None] * group.world_size
        torch.distributed.all_gather_object(found, worst, group=group.cpu_group)
        layers = sorted({layer for one in found for layer in one})
        worst = {layer: max(one.get(layer, 0.0) for one in found) for layer in layers}
    bound = ROUNDING.get(runner.model_config.dtype, 0.0)
    if broken := {layer: value for layer, value in worst.items() if value > bound}:
        layer, value = max(broken.items(), key=lambda item: item[1])
        raise UnsupportedModel(
            f"with --tensor-parallel-size {ranks}, what layer {layer} returns differs between ranks by {value:.2g} of its norm: "
            "it is not the residual stream, but each rank's share of it. Start with --tensor-parallel-size 1 (layers "
            f"concerned: {sorted(broken)})"
        )
    equal = not any(worst.values())
    if not equal:
        try:
            take_rank_zeros(torch.zeros(1, device=runner.device))
        except ValueError as error:  # all ranks are started with the same settings
            raise UnsupportedModel(
                f"the residual stream is rounded differently on the ranks of --tensor-parallel-size {ranks}, so they have to take "
                f"rank 0's, and this start has no broadcast that can be captured: {error} (is VLLM_DISABLE_PYNCCL set?)"
            ) from error
    if engine is not None:
        engine.agree = None if equal else take_rank_zeros
        how = (
            "bit by bit"
            if equal
            else f"but for rounding (up to {max(worst.values()):.2g} of its norm): rank 0's counts"
        )
        logger.info("editserver: %d tensor-parallel ranks hold the same residual stream, %s", ranks, how)
    return equal


def _heard(method: Any) -> Any:
    """``method`` of a worker, whose exceptions end its process where it is not the one that answers.

    vLLM hears of those of the answering worker alone (vllm/v1/executor/multiproc_executor.py:1048), and goes on after the
    others': a rank that is not in step with its neighbours. It does hear of processes that end.
    """

    @functools.wraps(method)
    def heard(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except Exception:
            if EngineConfig.of(self.vllm_config) is None or _answers():
                raise
            logger.exception("editserver: this worker failed, and nobody but its process can say so")
            raise SystemExit(1) from None

    return heard


def _answers() -> bool:
    """Whether this worker's outputs are the engine's."""
    from vllm.distributed.parallel_state import get_pp_group, get_tp_group

    return bool(get_pp_group().is_last_rank and get_tp_group().rank_in_group == 0)


def install(vllm_config: Any) -> None:
    """Have the worker's class prove what :func:`prove` says and, once it is started up, that it is armed; and fail for all to
    hear (called in the worker when its model has been armed)."""
    from vllm.utils.import_utils import resolve_obj_by_qualname

    signatures.check(RELIED_ON)
    worker_class = resolve_obj_by_qualname(vllm_config.parallel_config.worker_cls)
    original = worker_class.compile_or_warm_up_model
    if hasattr(original, "editserver"):
        return

    @functools.wraps(original)
    def compile_or_warm_up_model(self: Any) -> Any:
        engine, configured = op.current(), EngineConfig.of(self.vllm_config) is not None
        if configured:
            prove(self.model_runner, engine)
        times = original(self)
        if configured:  # the API process asks the workers of one data-parallel engine only
            answer = getattr(self, handshake.METHOD)()
            if not answer["ok"]:
                raise UnsupportedModel(answer["error"])
        return times

    compile_or_warm_up_model.editserver = True  # type: ignore[attr-defined]
    worker_class.compile_or_warm_up_model = compile_or_warm_up_model
    for name in ("execute_model", "sample_tokens"):
        setattr(worker_class, name, _heard(getattr(worker_class, name)))
