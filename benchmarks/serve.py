"""`make bench`: throughput of an editing server as a ratio to vLLM without the plugin, measured in one run.

Two engines with the same model live side by side, one vanilla and one armed at layers 10, 15 and 20. Every case runs on
both in turn (A B, B A, …), and the table gives the median over the rounds of the paired ratio vanilla / armed seconds:
1.00 means that editing cost nothing. Edits are SAE feature edits that act on every token (`add`, a different set of
latents for each request), so nothing is skipped; the editing engine's receipts are checked to say so.

The concepts of the APP case have 50 latents each, no two requests the same ones, and since the dictionary's rows are
random, about half of them are active on every token: far more than of a concept that was fitted.

Cases with several loads run all of them in each round, so that they compare with each other as well: dictionaries of
4,608 and of 65,536 latents under the same edits, and what a TopK dictionary costs, whose every latent is computed for
every edited token.

Rules: each request has a rule set of its own, 8 propositions over 4 latents each at layer 15 and 16 rules on them (latches, counts,
windows, orders, and conclusions of conclusions), with a flag on every conclusion; and the same with a conclusion, true at some
of the tokens, that steers.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from editserver.engine.config import SAESource
    from interventions.rules.code import RuleProgram

LAYERS = (10, 15, 20)
D_MODEL = 576
WIDTHS = {"4k": 4608, "64k": 65_536, "topk": 4096}
"""Dictionaries: at every layer "4k" and "64k" (ReLU), "topk" (k = 64) at layer 15."""
K, TOP_K, N_BINS = 64, 8, 100


@dataclass(frozen=True)
class Load:
    """What the requests of a case ask for: ``n_latents`` edited at ``layers`` (by a gain table each with ``app``), or an
    inspection with ``top_k``, or ``rules``: "flag" reports what they conclude, "steer" acts on it too."""

    name: str
    n_latents: int
    dictionary: str = "4k"
    layers: tuple[int, ...] = LAYERS
    inspect: bool = False
    app: bool = False
    rules: str = ""


@dataclass(frozen=True)
class Case:
    """One workload, and the loads that are compared with it unedited."""

    n_requests: int
    prompt_len: int
    max_tokens: int
    loads: tuple[Load, ...]


AT_15 = (15,)
CASES = {
    "idle": Case(16, 32, 64, (Load("armed, no request edits", 0),)),
    "1": Case(16, 32, 64, (Load("16 requests, 1 latent on 3 layers each", 1),)),
    "8": Case(16, 32, 64, (Load("16 requests, 8 latents on 3 layers each", 8),)),
    "32": Case(16, 32, 64, (Load("16 requests, 32 latents on 3 layers each", 32),)),
    "64": Case(64, 32, 32, (Load("64 requests, 64 configurations of 8 latents", 8),)),
    "prompt": Case(16, 512, 4, (Load("16 prompts of 512 tokens, 8 latents", 8),)),
    "width": Case(
        16,
        32,
        64,
        (
            Load("8 latents of 4,608 on 3 layers", 8),
            Load("8 latents of 65,536 on 3 layers", 8, "64k"),
        ),
    ),
    "app": Case(16, 32, 64, (Load("16 requests, APP on a 50-latent concept each", 50, "4k", AT_15, app=True),)),
    "rules": Case(
        16,
        32,
        64,
        (
            Load("16 requests, 8 propositions and 16 rules each", 0, "4k", AT_15, rules="flag"),
            Load("the same, one conclusion steers", 0, "4k", AT_15, rules="steer"),
        ),
    ),
    "topk": Case(
        16,
        32,
        64,
        (
            Load("1 latent of ReLU 4k on 1 layer", 1, "4k", AT_15),
            Load("1 latent of TopK 4k on 1 layer (full encode)", 1, "topk", AT_15),
            Load("inspect top_k of TopK 4k on 1 layer (full encode)", 0, "topk", AT_15, True),
        ),
    ),
    "topk-prompt": Case(
        16,
        512,
        4,
        (
            Load("16 prompts of 512, 1 latent of ReLU 4k", 1, "4k", AT_15),
            Load("16 prompts of 512, 1 latent of TopK 4k (full encode)", 1, "topk", AT_15),
        ),
    ),
}


RULES = """
rule r01: p0 and p1 -> c01
rule r02: p2 or p3 and not p4 -> c02
rule r03: p5 xor p6 -> c03
rule r04: seen(p7) -> c04
rule r05: p0 -> latch c05
rule r06: last(8, p1) -> c06
rule r07: at least 3 of seen(p2) -> c07
rule r08: at least 40 % of seen(p3) -> c08
rule r09: seen(p4 before p5) -> c09
rule r10: prompt(p6) and not p7 -> c10
rule r11: c01 or c02 -> c11
rule r12: c11 and not c03 -> c12
rule r13: c04 and c06 -> c13
rule r14: c12 or c13 -> c14
rule r15: c07 xor c08 -> c15
rule r16: c14 and c05 or p6 -> c16
"""


def rule_program(sae: str, digest: str, layer: int, request: int, width: int) -> tuple[RuleProgram, int]:
    """The rules of one request, on latents of its own, and the number of the action on the last conclusion."""
    from interventions.rules.assemble import Dictionary, Part, Trigger, assemble
    from interventions.rules.reading import parse_ruleset

    step = width // 512
    lines = []
    for p in range(8):
        first = (request * 32 + p * 4) * step
        terms = [f"feature({sae}, {(first + i * step) % width})" for i in range(4)]
        lines.append(f"proposition p{p} = {' - '.join(terms)} > 0")
    heads = [f"c{number:02}" for number in range(1, 17)]
    ruleset = parse_ruleset("\n".join(lines) + RULES + "".join(f"on {head}: flag\n" for head in heads))
    triggers = [Trigger(0, head) for head in heads]
    made = assemble([Part(ruleset)], triggers, lambda _: Dictionary(digest, layer, False), effects=[layer])
    return made.program, made.actions[-1]


def payload_maker(sources: dict[str, SAESource]) -> Callable[[Load, int], bytes | None]:
    """``make(load, request)``: the payload of a request, which edits latents of its own at every layer of the load."""
    import numpy as np
    from msgspec.structs import replace

    from interventions.program import (
        Channel,
        Gate,
        GateKind,
        LayerProgram,
        Op,
        OpKind,
        Payload,
        Program,
        Read,
        ReadKind,
        feature_key,
        vector_key,
    )
    from interventions.selectors import ALL

    inf = float("inf")
    add = Op(1.0, 0.05, -inf, inf, False, 0, 0)

    def gain(vectors: dict[str, bytes], seed: int) -> Op:
        row = np.zeros(D_MODEL, "<f4")
        row[:3] = 0.0, N_BINS / 20.0, N_BINS  # activations from 0 to 20
        row[3 : 3 + N_BINS] = np.random.default_rng(seed).uniform(0.1, 0.9, N_BINS)
        key = vector_key(row.tobytes())
        vectors[key] = row.tobytes()
        return Op(1.0, 0.0, -inf, inf, False, 0, 0, OpKind.GAIN, 1.0, key)

    def make(load: Load, request: int) -> bytes | None:
        digests = {layer: sources[f"{load.dictionary}/l{layer}"].digest for layer in load.layers}
        if load.inspect:
            reads = tuple(Read(digest, layer, (), TOP_K, ALL) for layer, digest in digests.items())
            return Payload(None, reads, None).to_bytes()
        if load.rules:
            ((layer, digest),) = digests.items()
            rules, last = rule_program(f"{load.dictionary}/l{layer}", digest, layer, request, WIDTHS[load.dictionary])
            gate = Gate(GateKind.RULE, ReadKind.LATENT, (), action=last)
            steer = Channel(ReadKind.LATENT, feature_key(digest, 5 * request), (replace(add, gates=(0,)),))
            edits = (LayerProgram(layer, (steer,), (gate,)),) if load.rules == "steer" else ()
            program = Program(edits, (ALL,) if edits else (), {}, rules=rules)
            return Payload(program, (), program.digest()).to_bytes()
        if not load.n_latents:
            return None
        kind = ReadKind.MEMBER if load.dictionary == "topk" else ReadKind.LATENT
        width = WIDTHS[load.dictionary]
        step = 5 if load.app else width // 512  # spread over the file, as features that people pick are
        first = request * load.n_latents
        vectors: dict[str, bytes] = {}
        layers = []
        for layer in load.layers:
            keys = sorted(feature_key(digests[layer], (first + i) * step % width) for i in range(load.n_latents))
            ops = [gain(vectors, first + i) if load.app else add for i in range(load.n_latents)]
            layers.append(LayerProgram(layer, tuple(Channel(kind, k, (op,)) for k, op in zip(keys, ops, strict=True))))
        program = Program(tuple(layers), (ALL,), vectors)
        return Payload(program, (), program.digest()).to_bytes()

    return make


def main(argv: Sequence[str] | None = None) -> None:
    """Run the cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="paired runs per case (default 7)")
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES), help="default: all")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    args = parser.parse_args(argv)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from benchmarks.dictionaries import write_random
    from benchmarks.engine_process import EngineProcess
    from editserver.demo.model import ensure_demo_model
    from editserver.engine.config import EngineConfig

    console = Console(width=120)
    model = ensure_demo_model()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        used = {load.dictionary for name in args.cases for load in CASES[name].loads}
        found = [
            write_random(root, f"{name}/l{layer}", layer, D_MODEL, WIDTHS[name])
            for name in ("4k", "64k")
            for layer in LAYERS
            if name in used
        ]
        if "topk" in used:
            found.append(write_random(root, "topk/l15", 15, D_MODEL, WIDTHS["topk"], architecture="topk", k=K))
        engine_args = {
            "model": str(model),
            "gpu_memory_utilization": 0.2,
            "max_model_len": 1024,
            "max_num_seqs": 64,
            "enforce_eager": args.eager,
        }
        config = EngineConfig(LAYERS, tuple(found), tuple(one.id for one in found if one.id.startswith("topk")))
        console.print("Starting two engines (the first start compiles the model: a minute or two) …")
        vanilla = EngineProcess(False, **engine_args)
        vanilla.wait_ready()
        armed = EngineProcess(True, **engine_args, additional_config={"editserver": config.as_dict()})
        armed.wait_ready()
        make = payload_maker({one.id: one for one in found})
        table = Table(
            title=f"Throughput against vanilla vLLM, SmolLM2-135M, bf16, {platform.machine()} {os.cpu_count()} cores"
        )
        for heading in ("case", "vanilla tok/s", "editserver tok/s", "ratio (median)", "min", "max"):
            table.add_column(heading, justify="left" if heading == "case" else "right")
        with Progress(console=console) as progress:
            task = progress.add_task("measuring", total=len(args.cases) * (args.rounds + 1))
            for name in args.cases:
                case = CASES[name]
                prompts = [
                    [1] + [(7 * r + 13 * i) % 40000 + 100 for i in range(case.prompt_len - 1)]
                    for r in range(case.n_requests)
                ]
                plain: list[bytes | None] = [None] * case.n_requests
                payloads = {load: [make(load, r) for r in range(case.n_requests)] for load in case.loads}
                seconds: dict[Load | None, list[float]] = {None: []} | {load: [] for load in case.loads}
                work = case.n_requests * (case.prompt_len if case.prompt_len > case.max_tokens else case.max_tokens)
                due = case.n_requests * (case.prompt_len + case.max_tokens - 2)
                for round_ in range(args.rounds + 1):
                    order: list[Load | None] = [None, *case.loads]
                    turn = round_ % len(order)
                    for load in order[turn:] + order[:turn]:
                        if load is None:
                            took, _, _ = vanilla.run(prompts, plain, case.max_tokens)
                        else:
                            took, edited, read = armed.run(prompts, payloads[load], case.max_tokens)
                            expected = (due if load.n_latents else 0, due if load.inspect or load.rules else 0)
                            if load.rules == "steer":
                                assert 0 < edited < due, f"a rule let {edited} of {due} tokens be edited"
                                edited = 0
                            assert (edited, read) == expected, f"{edited} edited, {read} inspected; {expected} expected"
                        if round_:  # the first one warms up
                            seconds[load].append(took)
                    progress.advance(task)
                for load in case.loads:
                    ratios = [v / a for v, a in zip(seconds[None], seconds[load], strict=True)]
                    table.add_row(
                        load.name,
                        f"{work / statistics.median(seconds[None]):.0f}",
                        f"{work / statistics.median(seconds[load]):.0f}",
                        f"{statistics.median(ratios):.3f}",
                        f"{min(ratios):.3f}",
                        f"{max(ratios):.3f}",
                    )
                if name == "width":
                    narrow, wide = (seconds[load] for load in case.loads)
                    against = [a / b for a, b in zip(narrow, wide, strict=True)]
                    table.add_row("… 65,536 against 4,608, paired", "", "", f"{statistics.median(against):.3f}",
                                  f"{min(against):.3f}", f"{max(against):.3f}")  # fmt: skip
        console.print(table)
        vanilla.close()
        armed.close()


if __name__ == "__main__":
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
