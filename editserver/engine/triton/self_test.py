"""At start, on the very device that will edit: the kernels against the definition, and against themselves.

Batches of made-up requests go through an armed layer, by the same buffers, kernels and compiled variants that requests will use
afterwards. Proven are, of what the server was started with:

* edits and inspections: every transfer function, way of reading and input normalisation;
* gates over sequences, mentions, and rules, over steps that follow one another;
* whole dictionaries: of the server's own one of every kind and size, its largest activations included.

Each batch must do what :mod:`interventions.oracle` (for rules :mod:`interventions.rules.machine`) says, wherever the last bits of h
decide nothing. The decode variant, the stream in one tensor instead of two halves, a sequence in steps and, on a GPU, the replay
of a captured CUDA graph must give the same bits; a graph must edit nothing while nothing is planned.

A device that fails is not edited on: the server does not start.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from editserver.engine.triton.encode import DeviceEncode
from editserver.engine.triton.self_test_checks import SEED, check
from editserver.engine.triton.self_test_made import Made, Request
from editserver.engine.triton.self_test_programs import edits, gates, mentions, rules, whole
from editserver.engine.triton.self_test_trial import ONE_STEP, SelfTestError, Trial
from editserver.engine.triton.step import DeviceStep

__all__ = ["SelfTestError", "prove"]

logger = logging.getLogger("vllm.editserver")

SEQUENCE, BLOCK_SIZE = 20, 16
"""Tokens of a request that looks back, and of a block of its KV cache."""
BRIEF_SEQUENCE, BRIEF_BLOCK_SIZE = 9, 4


@dataclass(frozen=True)
class Way:
    """How a batch is run: arguments of :meth:`Trial.run`."""

    split: bool
    decode: bool | None
    left: Sequence[int] = ONE_STEP
    captured: bool = False

    def __str__(self) -> str:
        variant = "each step's own" if self.decode is None else "the decode" if self.decode else "the prompt"
        how = "a captured graph of " if self.captured else ""
        streams = "two tensors" if self.split else "one tensor"
        return f"{how}{variant} variant on {streams} in {len(self.left)} step{'s' * (len(self.left) > 1)}"


@dataclass(frozen=True)
class Plan:
    """Requests that are proven together, the first way against the definition, each other against the first."""

    layer: int
    made: Made
    requests: Sequence[Request]
    ways: Sequence[Way]
    block_size: int = 0


def prove(step: DeviceStep, dtype: torch.dtype, brief: bool = False) -> None:
    """Run the trials on ``step``'s device for a model of ``dtype``; the step has no KV cache yet, and is left as it was: idle, and
    nobody is resident.

    ``brief``: few requests, tokens and ways, for where an interpreter runs the kernels.

    Raises:
        SelfTestError: something differs; the message says what, and of which stage.
    """
    if not step.layers:
        return
    started, tokens = time.perf_counter(), 0
    try:
        for plan in plans(step, dtype, brief):
            for requests in _that_fit(step, plan.requests, brief):
                tokens += sum(request.n for request in requests)
                _prove(Trial(step, plan.layer, plan.made, requests, plan.block_size), plan.ways)
    except RuntimeError as error:
        device = step.state.device
        message = f"the kernels fail their self-test on {device}, so nothing is edited here: {error}"
        raise SelfTestError(message) from error
    logger.info(
        "editserver: the kernels passed their self-test on %s: %d tokens, %.1f s, compilation included",
        step.state.device,
        tokens,
        time.perf_counter() - started,
    )


def plans(step: DeviceStep, dtype: torch.dtype, brief: bool) -> Iterator[Plan]:
    """All that is proven of what the step was made with."""
    captures = step.state.is_cuda

    def new() -> Made:
        return Made(step.d_model, dtype, np.random.default_rng(SEED))

    first, made = step.layers[0], new()
    once = [Way(True, False), Way(True, True), Way(False, False), Way(False, True)][: 2 if brief else 4]
    once += [Way(True, decode, captured=True) for decode in (False, True) if captures]
    yield Plan(first, made, edits(made, first, (2, 1, 1, 1, 1, 1) if brief else (5, 1, 3, 2, 1, 4)), once)

    block_size, left = (BRIEF_BLOCK_SIZE, (1, 0)) if brief else (BLOCK_SIZE, (2, 1, 0))
    made, ways = new(), [Way(True, None, left), *([] if brief else [Way(True, None), Way(False, None, left)])]
    ways += [Way(True, None, left, captured=True)] * captures
    yield Plan(first, made, _looking_back(made, step, brief), ways, block_size)

    if step.encode is not None:
        ways = [Way(True, None), *([] if brief else [Way(False, None, left)])]
        ways += [Way(True, None, captured=True)] * captures
        n = min(3 if brief else 6, step.capacity.tokens)
        for layer, digests in _kinds(step.encode).items():
            made, top = new(), step.encode.capacity.top
            requests = [whole(made, layer, one, step.encode.weights[one], top, n) for one in digests]
            yield Plan(layer, made, requests, ways, block_size)


def _looking_back(made: Made, step: DeviceStep, brief: bool) -> list[Request]:
    room = step.capacity
    n = min(BRIEF_SEQUENCE if brief else SEQUENCE, room.tokens)
    found = [gates(made, step.layers[0], n)]
    if step.rules is not None:
        found.append(rules(made, step.layers[0], n))
    if room.history >= n:
        found.append(mentions(made, step.layers[0], n))
    return found


def _kinds(encode: DeviceEncode) -> dict[int, list[str]]:
    """By layer, digests of dictionaries of which no two are encoded by the same compiled kernels."""
    found: dict[int, list[str]] = {}
    known = set()
    for layer, digests in encode.saes.items():
        for digest in digests:
            own = encode.weights[digest]
            kind = (len(own.gate), own.k, own.form, own.magnitudes, own.scale is None, own.norm)
            if kind not in known:
                found.setdefault(layer, []).append(digest)
            known.add(kind)
    return found


def _that_fit(step: DeviceStep, requests: Sequence[Request], brief: bool) -> list[list[Request]]:
    """One batch after the other; ``brief``: the first one alone."""
    room, found = step.capacity, [list[Request]()]
    for request in requests:
        grown = [*found[-1], request]
        rows = {key for one in grown for key in one.payload.row_keys}
        fits = len(grown) <= room.rows and sum(one.n for one in grown) <= room.tokens and len(rows) <= room.bank_rows
        if fits or not found[-1]:
            found[-1] = grown
        else:
            found.append([request])
    return found[:1] if brief else found


def _prove(trial: Trial, ways: Sequence[Way]) -> None:
    try:
        stream = records = None
        for way in ways:
            again, told = trial.run(way.split, way.decode, way.left, way.captured)
            if stream is None or records is None:
                stream, records = again, told
                check(trial, stream, records)
                continue
            for i, (request, here) in enumerate(zip(trial.requests, trial.bounds, strict=True)):
                if not torch.equal(again[here], stream[here]) or told[f"{i}"] != records[f"{i}"]:
                    raise SelfTestError(f"{request.stage}: made-up request {i}: {way} gives other bits than {ways[0]}")
    except SelfTestError:
        raise
    except RuntimeError as error:
        raise SelfTestError(f"{trial.stages}: {error}") from error
    finally:
        trial.leave()
