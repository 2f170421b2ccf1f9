"""What the first edited request would otherwise wait for: the kernels are compiled, or loaded, when a worker starts."""

from __future__ import annotations

import math

import numpy as np
import torch

from editserver.engine.full_encode import warm_up_joint
from editserver.engine.kernel_cpu import (
    PLAIN_INPUT,
    READ_COLUMNS,
    hit_tokens,
    read_features,
    read_latents,
    read_listed,
)
from editserver.engine.worker import EngineWorker
from interventions.program import (
    Channel,
    Gate,
    GateKind,
    LayerProgram,
    Op,
    Payload,
    Program,
    ReadKind,
    vector_key,
)
from interventions.rules.code import ActionCode, ConclusionCode, OpCode, RuleCode, RuleProgram
from interventions.selectors import ALL

NAME = "warm-up"


def _program(layer: int, d_model: int) -> Program:
    """Adds nothing, from the last prompt token on, because a rule says so."""
    rule = RuleCode(0, ((int(OpCode.ENDED), 0),), 0)
    rules = RuleProgram((), (), (rule,), (ConclusionCode(layer),), (ActionCode(0),))
    values = np.zeros(d_model, "<f4").tobytes()
    add = Op(1.0, 1.0, -math.inf, math.inf, False, 0, 0, gates=(0,))
    channel = Channel(ReadKind.NONE, vector_key(values), (add,))
    gate = Gate(GateKind.RULE, ReadKind.LATENT, (), action=0)
    return Program((LayerProgram(layer, (channel,), (gate,)),), (ALL,), {channel.row: values}, rules=rules)


def warm_up(worker: EngineWorker) -> None:
    """Run one step of a program that changes nothing, and call what it does not need."""
    if not worker.config.armed:
        return
    layer = worker.config.armed[0]
    worker.add_request(NAME, Payload(_program(layer, worker.d_model), (), None), [0], 1)
    positions, token_ids = np.arange(2, dtype=np.int64), np.zeros(2, np.int32)
    worker.begin_step([NAME], np.array([0, 2], np.int32), positions, token_ids)
    hidden = torch.zeros(2, worker.d_model, dtype=worker.dtype)
    worker.run(layer, hidden, hidden.clone())
    worker.end_step()
    worker.remove_request(NAME)
    h, out = hidden.float().numpy(), np.empty((2, 1), np.float32)
    bank = worker.bank.read.numpy(), worker.bank.gate.numpy()
    read_latents(h, np.zeros(1, np.int32), PLAIN_INPUT, *bank, out)
    none = np.zeros(0, np.int64)
    read_features(h, np.zeros((0, 7), np.int64), none, none, none, *bank, out)
    pointers, rows = np.zeros(2, np.int32), np.zeros((0, len(READ_COLUMNS)), np.int32)
    tokens = np.zeros(2, np.int32), np.zeros(2, np.uint64)
    read_listed(h, *tokens, pointers, rows, np.zeros(0, np.uint64), *bank, out)
    hit_tokens(h, none, np.zeros(0, np.int32), PLAIN_INPUT, np.uint64(1), *bank, np.zeros(2, np.uint64))
    if not all(worker.dictionaries[digest].additive for digest in worker.dictionaries.digests):
        warm_up_joint()
