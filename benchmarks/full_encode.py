"""What the full-encode path costs: one edit op's own time per step, without a model, for dictionaries of several widths.

Per width, a TopK dictionary (k = 64; one latent edited, or the 8 largest reported) beside a ReLU one (one latent edited,
row by row), for a decode step of 1 and of 16 requests and for a prompt of 512 tokens. Times are the best of several
runs, in milliseconds; memory is what the worker holds for the full-encode path (both matrices in float32).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from editserver.engine.worker import EngineWorker
    from interventions.program import Payload

LAYER = 0
STEPS = {"1 token": (1, 1), "16 requests": (16, 1), "prompt of 512": (1, 512)}
"""Name → requests, tokens of each."""


def payload(digest: str, kind: str) -> Payload:
    """A request that edits one latent ("row", "member") or inspects the largest ones ("inspect"), on every token."""
    from interventions.program import Channel, LayerProgram, Op, Payload, Program, Read, ReadKind, feature_key
    from interventions.selectors import END, Bound, Range, Selector

    everywhere = Selector((Range(Bound(False, 0), END),), (), True)
    if kind == "inspect":
        return Payload(None, (Read(digest, LAYER, (), 8, everywhere),), None)
    op = Op(1.0, 0.05, -float("inf"), float("inf"), False, 0, 0)
    channel = Channel(ReadKind.MEMBER if kind == "member" else ReadKind.LATENT, feature_key(digest, 3), (op,))
    program = Program((LayerProgram(LAYER, (channel,)),), (everywhere,), {})
    return Payload(program, (), program.digest())


def best_ms(worker: EngineWorker, one: Payload, requests: int, tokens: int, runs: int) -> float:
    """Milliseconds of the op in one step of so many requests."""
    names = [f"r{i}" for i in range(requests)]
    for name in names:
        worker.add_request(name, one, list(range(len(one.row_keys))), tokens)
    start = np.arange(0, (requests + 1) * tokens, tokens, dtype=np.int32)
    positions = np.tile(np.arange(tokens, dtype=np.int64), requests)
    hidden = torch.randn(requests * tokens, worker.d_model, generator=torch.Generator().manual_seed(0)) * 7
    best = float("inf")
    for _ in range(runs + 1):
        worker.begin_step(names, start, positions, np.zeros(len(positions), np.int32))
        stream = hidden.to(worker.dtype)
        began = time.perf_counter()
        worker.run(LAYER, stream, None)
        best = min(best, time.perf_counter() - began)
        worker.end_step()
    for name in names:
        worker.remove_request(name)
    return 1e3 * best


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="*", default=[4096, 16_384, 32_768, 65_536])
    parser.add_argument("--d-model", type=int, default=576)
    parser.add_argument("--runs", type=int, default=7, help="of which the fastest counts (default 7)")
    args = parser.parse_args(argv)
    from rich.console import Console
    from rich.table import Table

    from benchmarks.dictionaries import write_random
    from editserver.engine.config import EngineConfig
    from editserver.engine.worker import EngineWorker

    table = Table(title=f"The edit op per step, d_model {args.d_model}, {torch.get_num_threads()} threads, ms")
    table.add_column("latents", justify="right")
    table.add_column("memory", justify="right")
    for step in STEPS:
        for what in ("row edit", "TopK edit", "top_k"):
            table.add_column(f"{step}\n{what}", justify="right")
    for width in args.widths:
        with tempfile.TemporaryDirectory() as scratch:
            sources = (
                write_random(Path(scratch), "relu", LAYER, args.d_model, width),
                write_random(Path(scratch), "topk", LAYER, args.d_model, width, architecture="topk", k=64),
            )
            worker = EngineWorker(EngineConfig((LAYER,), sources, ("topk",), 64), args.d_model, torch.bfloat16, 1024)
            kinds = [payload(sources[0].digest, "row")]
            kinds += [payload(sources[1].digest, kind) for kind in ("member", "inspect")]
            times = [
                best_ms(worker, kind, requests, tokens, args.runs)
                for requests, tokens in STEPS.values()
                for kind in kinds
            ]
            memory = 2 * 4 * width * args.d_model / 2**20
            table.add_row(f"{width:,}", f"{memory:.0f} MiB", *(f"{t:.2f}" if t < 10 else f"{t:.0f}" for t in times))
    Console(width=130).print(table)


if __name__ == "__main__":
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
