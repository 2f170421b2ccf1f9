"""What the edit costs on a GPU, inside CUDA graphs, beside a transformer-shaped loop of the model's own matrix products.

PyTorch and Triton only: no vLLM, no weights. Per model width, one graph without editing and one with three armed layers are
captured; the second is replayed idle, and with programs that are all different. A loop is every product of a decoder layer
with its norms and activation, without attention, so it is faster than the model and the ratios are on the careful side.

    ratio = step without editing / step with it        (same batch, taken in turns: the median over the rounds)
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

SHAPES = ("8B", "1B", "70B")

EPILOG = """
columns
  phase           decode: one token per request; prompt: 2048 tokens, 16 × 512, 256 × 32: the edit's own launches alone.
                  served: decode with all launches that a server captures (gates, rules, inspections), whoever asks for them
  programs        requests, each with a program of its own; 0: armed, and nobody has one
  latents         of a program at each of the three armed layers
  vanilla, edited median step in ms without and with the armed layers
  ratio           vanilla / edited; low, high: 5th and 95th percentile over the rounds. Goals at 8B, decode and served, 8 latents:
                  16 programs ≥ 0.99, 256 programs ≥ 0.97
  us_per_layer    what one armed layer adds to the step, in µs
  (once per step a server also plans: one launch before the graph, which is not in the step here)

Before a batch is timed it is checked on the device: idle is vanilla bit for bit, both variants of the kernel give the same
bits, a replay repeats them, the edit is the definition's in float64. What does not hold, or fails, is said (WRONG), kept in
the JSON, and makes the exit status 1; the run goes on with the next batch. The JSON is written after each of them.

examples
  python benchmarks/gpu/kernels.py --out kernels.json            # everything, under 10 minutes
  python benchmarks/gpu/kernels.py --shapes 8B --each 0.2        # the goals alone, in a minute or two
  python benchmarks/gpu/kernels.py --interpret --tiny            # on a CPU: does the script run to its end?
"""


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    made = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--out", type=Path, default=Path("kernels.json"), help="the report (default kernels.json)")
    made.add_argument("--shapes", nargs="+", choices=SHAPES, help="model widths (default: all, in this order)")
    made.add_argument("--seconds", type=float, default=480, help="no new measurement is begun after that (default 480)")
    made.add_argument("--each", type=float, default=0.6, help="seconds per measurement (default 0.6)")
    made.add_argument("--ahead", action="store_true", help="read an edit's rows in a launch of their own when decoding")
    made.add_argument("--lanes", type=int, help="log2 of the lanes of a sum over d, at most (default 10)")
    made.add_argument("--decode-warps", type=int, help="warps of a decode program (default 8)")
    made.add_argument("--interpret", action="store_true", help="run on a CPU under Triton's interpreter")
    made.add_argument("--tiny", action="store_true", help="a few small sizes: a test of the script, not of a speed")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 where all that must hold does."""
    args = parser().parse_args(argv)
    import torch
    import triton.language  # noqa: F401  before the interpreter is asked for: its own functions are not interpreted

    if args.interpret:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        print("no CUDA device here; --interpret --tiny runs the script on a CPU", file=sys.stderr)
        return 2
    args.out.parent.mkdir(parents=True, exist_ok=True)
    from benchmarks.gpu import edit_cost
    from editserver.engine.triton import step

    if args.lanes:
        step.MOST_LANES = args.lanes
    if args.decode_warps:
        step.DECODE["num_warps"] = args.decode_warps
    settings = edit_cost.Settings(
        torch.device("cpu" if args.interpret else "cuda"),
        edit_cost.of(args.shapes, args.tiny),
        edit_cost.SMALL if args.tiny else edit_cost.FULL,
        args.seconds,
        0.0 if args.tiny else args.each,
        args.ahead,
        args.out,
    )
    return 0 if edit_cost.Bench(settings).run() else 1


if __name__ == "__main__":
    sys.path[0] = str(
        Path(__file__).resolve().parents[2]
    )  # not this folder: its kernels.py is not the package "kernels"
    sys.exit(main())
