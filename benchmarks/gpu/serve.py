"""What editing costs in stock vLLM on a GPU: throughput, time to the first token, time per token, against vLLM without it.

Two engines on one device, one without the plugin and one armed at three layers, are given the same requests in turns; every
request of an edited load has a program of its own. Weights are random unless ``--model`` names some (``--real`` loads them):
what an edit costs does not depend on what a model says. Reported are medians over rounds, and medians of the paired ratios

    ratio = vanilla / editserver        (1: costs nothing; of seconds, of TTFT, of TPOT)

``--tiny`` runs everything to the end on vLLM's CPU backend with a model of a few thousand weights: it proves the script.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])  # not this folder: its kernels.py is not the package "kernels"

from benchmarks.gpu.stock import Ask, Broken, Engine, Seen, announce  # noqa: E402

LLAMA: dict[str, dict[str, int]] = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4},
}
KV_HEADS = {"1B": 8, "8B": 8, "tiny": 2}
VOCAB = {"1B": 128_256, "8B": 128_256, "tiny": 512}
ASYNCHRONOUS = "asynchronous scheduling"


@dataclass(frozen=True)
class Load:
    """What the requests of a group carry on the armed engine; ``kind`` "idle": nothing."""

    kind: str
    latents: int = 0

    @property
    def name(self) -> str:
        what = {
            "idle": "armed, idle",
            "edited": f"{self.latents} latents × 3 layers",
            "rules": "8 propositions, 12 rules",
        }
        return what.get(self.kind, f"inspect {self.latents} features × 3 layers")


@dataclass(frozen=True)
class Group:
    """Requests of one shape, all sent at once. ``shared``: tokens at the start of every prompt that are in the prefix cache."""

    name: str
    requests: int
    prompt: int
    output: int
    loads: tuple[Load, ...]
    shared: int = 0

    @property
    def computed(self) -> int:
        """Tokens per request that are fed without a cache: all but the last sampled one."""
        return self.prompt + self.output - 1


IDLE, RULES, INSPECT = Load("idle"), Load("rules", 32), Load("inspected", 8)


def edits(*latents: int) -> tuple[Load, ...]:
    return tuple(Load("edited", n) for n in latents)


GROUPS = (
    Group("16 requests", 16, 32, 128, (IDLE, *edits(1, 8, 64))),
    Group("256 requests", 256, 32, 64, (IDLE, *edits(1, 8))),
    Group("1 request", 1, 32, 128, (IDLE, *edits(1, 8, 64))),
    Group("16 prompts", 16, 512, 8, (IDLE, *edits(8))),
    Group("16 behind a cached prefix", 16, 1088, 32, (IDLE, *edits(8)), shared=1024),
    Group("16 requests", 16, 32, 128, (INSPECT, RULES)),
)
TINY = (
    Group("3 requests", 3, 9, 6, (IDLE, *edits(1, 8))),
    Group("1 request", 1, 9, 6, (IDLE, *edits(1))),
    Group("3 prompts", 3, 40, 2, edits(8)),
    Group("3 behind a cached prefix", 3, 300, 3, edits(8), shared=256),
    Group("3 requests", 3, 9, 6, (INSPECT, RULES)),
)


def write_model(folder: Path, shape: str) -> Path:
    """The config of a Llama of this shape, for dummy weights."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        **LLAMA[shape],
        num_key_value_heads=KV_HEADS[shape],
        vocab_size=VOCAB[shape],
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        architectures=["LlamaForCausalLM"],
        dtype="float32" if shape == "tiny" else "bfloat16",
    )
    config.save_pretrained(folder)
    return folder


class Bench:
    """Both engines, and what was measured on them.

    Attributes:
        report: what goes into the JSON.
    """

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        from transformers import AutoConfig

        from benchmarks.dictionaries import write_random
        from editserver.engine.config import EngineConfig

        self.began, self.limit = time.perf_counter(), args.seconds
        shape = "tiny" if args.tiny else args.shape
        model = args.model or str(write_model(scratch / "model", shape))
        text = AutoConfig.from_pretrained(model).get_text_config()
        depth, d_model = int(text.num_hidden_layers), int(text.hidden_size)
        self.vocab = int(text.vocab_size)
        layers = args.layers or [depth // 4, depth // 2, 3 * depth // 4]
        self.width = 512 if args.tiny else args.width
        self.saes = {n: write_random(scratch, f"random/l{n}", n, d_model, self.width) for n in layers}
        groups = TINY if args.tiny else GROUPS
        rows = max(g.requests * load.latents for g in groups for load in g.loads) * len(layers)
        config = EngineConfig(tuple(layers), tuple(self.saes.values()), bank_rows=max(64, rows))
        engine_args: dict[str, Any] = {
            "model": model,
            "load_format": "auto" if args.real else "dummy",
            "skip_tokenizer_init": True,
            "dtype": "float32" if args.tiny else "bfloat16",
            "max_model_len": 512 if args.tiny else 2048,
            "max_num_seqs": max(g.requests for g in groups),
            "gpu_memory_utilization": args.share,
            "enable_prefix_caching": True,
            "seed": 0,
            **({"enforce_eager": True, "block_size": 32} if args.tiny else {}),
            **args.engine_args,
        }
        self.vanilla = Engine(False, **engine_args)
        additional = {"editserver": config.as_dict()}
        own: dict[str, Any] = {}
        try:
            self.armed = Engine(True, **engine_args, additional_config=additional)
        except Broken as error:
            if ASYNCHRONOUS not in str(error):
                self.vanilla.close()
                raise
            own = {"async_scheduling": False}
            self.armed = Engine(True, **engine_args, **own, additional_config=additional)
        self.report: dict[str, Any] = {
            "model": args.model or f"Llama {shape}, random weights",
            "layers": layers,
            "latents wide": self.width,
            "machine": platform.machine(),
            "engine": {k: v for k, v in engine_args.items() if k != "model"},
            "armed only": own,
            "starts": {"vanilla": asdict(self.vanilla.start), "editserver": asdict(self.armed.start)},
            "results": [],
            "refused": [],
            "wrong": [],
            "skipped": [],
        }

    @property
    def late(self) -> bool:
        """Whether nothing new should be begun."""
        return time.perf_counter() - self.began > self.limit

    def asks(self, group: Group, load: Load | None) -> list[Ask]:
        """The requests: prompts of their own behind what they share; behind a cached prefix all have one program, or none of
        it would be cached."""
        from benchmarks.gpu.programs import payload

        made = []
        for r in range(group.requests):
            numbers = [7 * i for i in range(group.shared)]
            numbers += [13 * i + 101 * r + 5 for i in range(group.prompt - group.shared)]
            prompt = [1, *(3 + number % (self.vocab - 3) for number in numbers[1:])]
            carried = None
            if load is not None and load.kind != "idle":
                kind: Any = load.kind
                carried = payload(kind, 0 if group.shared else r, load.latents, self.saes, self.width)
            made.append(Ask(prompt, group.output, carried))
        return made

    def measure(self, group: Group, rounds: int) -> None:
        """Vanilla and every load in turns; the first round warms up, and fills the prefix cache."""
        wanted: dict[Load | None, list[Ask]] = {load: self.asks(group, load) for load in (None, *group.loads)}
        seen: dict[Load | None, list[Seen]] = {load: [] for load in wanted}
        for round_ in range(rounds + 1):
            order = list(wanted)
            turn = round_ % len(order)
            for load in order[turn:] + order[:turn]:
                engine = self.vanilla if load is None else self.armed
                try:
                    one = engine.run(wanted[load], warm=bool(group.shared))
                except Broken as error:
                    if load is None:
                        raise
                    self.report["refused"].append([group.name, load.name, str(error)[-2000:]])
                    raise
                if round_:
                    check(group, load, one, len(self.saes))
                    seen[load].append(one)
            if self.late and round_ >= 3:
                break
        for load in group.loads:
            self.report["results"].append(line_of(group, load, seen[None], seen[load]))
            print(in_columns(self.report["results"][-1]), flush=True)

    def save(self, out: Path) -> None:
        """What there is so far."""
        self.report["seconds"] = time.perf_counter() - self.began
        out.write_text(json.dumps(self.report, indent=1))

    def close(self) -> None:
        """Stop both engines."""
        self.vanilla.close()
        self.armed.close()


def check(group: Group, load: Load | None, seen: Seen, n_layers: int) -> None:
    """Every token that had to be edited or read was, by the engine's records; position 0 never is."""
    if group.shared:
        least = group.requests * (group.shared - 128)
        assert seen.cached >= least, f"{seen.cached} tokens came from the prefix cache, {least} or more expected"
    elif load is not None:
        due = group.requests * (group.computed - 1)
        edited = due * n_layers if load.kind == "edited" else 0
        read = {"inspected": due * n_layers, "rules": due}.get(load.kind, 0)
        assert (seen.edited, seen.read) == (edited, read), f"{seen.edited} edited, {seen.read} read: {edited, read} due"
    if load is not None and load.kind == "edited":
        assert seen.edited > 0, "nothing was edited"


def line_of(group: Group, load: Load, vanilla: Sequence[Seen], ours: Sequence[Seen]) -> dict[str, Any]:
    """One row of the table: tokens per second, milliseconds, and paired ratios."""

    def middle(name: str, runs: Sequence[Seen]) -> list[float]:
        return [statistics.median(getattr(run, name)) for run in runs]

    tokens = group.requests * (group.output if group.output > 8 else group.prompt + group.output)
    line: dict[str, Any] = {"requests": group.name, "load": load.name}
    for name, runs in (("vanilla", vanilla), ("editserver", ours)):
        line[f"{name} tok/s"] = tokens / statistics.median(run.seconds for run in runs)
        line[f"{name} TTFT ms"] = 1e3 * statistics.median(middle("ttft", runs))
        line[f"{name} TPOT ms"] = 1e3 * statistics.median(middle("tpot", runs))
    pairs = list(zip(vanilla, ours, strict=True))
    ratios = [v.seconds / o.seconds for v, o in pairs]
    line |= {"ratio": statistics.median(ratios), "ratio min": min(ratios), "ratio max": max(ratios)}
    for name in ("ttft", "tpot"):
        both = zip(middle(name, vanilla), middle(name, ours), strict=True)
        line[f"ratio {name.upper()}"] = statistics.median(v / o for v, o in both)
    line["seconds"] = [[v.seconds, o.seconds] for v, o in pairs]
    return line


COLUMNS = ("vanilla tok/s", "editserver tok/s", "ratio", "ratio min", "ratio max")
TIMES = ("vanilla TTFT ms", "editserver TTFT ms", "ratio TTFT", "vanilla TPOT ms", "editserver TPOT ms", "ratio TPOT")


def heading() -> str:
    short = ("vanilla", "edits", "ratio", "min", "max", "TTFT v", "TTFT e", "ratio", "TPOT v", "TPOT e", "ratio")
    return f"{'requests':<27}{'load':<34}" + "".join(f"{name:>9}" for name in short)


def in_columns(line: dict[str, Any]) -> str:
    def shown(name: str) -> str:
        digits = 3 if "ratio" in name else 1 if "tok/s" in name else 2
        return f"{line[name]:>9.{digits}f}"

    return f"{line['requests']:<27}{line['load']:<34}" + "".join(map(shown, COLUMNS + TIMES))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a few small sizes on a CPU: a test of the script")
    parser.add_argument("--shape", choices=["1B", "8B"], default="8B", help="of the random weights (default 8B)")
    parser.add_argument("--model", help="a folder or Hugging Face id, instead of --shape")
    parser.add_argument("--real", action="store_true", help="with --model: load its weights")
    parser.add_argument(
        "--layers", type=int, nargs="*", help="armed layers (default: at 1/4, 1/2 and 3/4 of the depth)"
    )
    parser.add_argument("--width", type=int, default=8192, help="latents of each dictionary (default 8192)")
    parser.add_argument("--rounds", type=int, default=7, help="paired runs per group (default 7)")
    parser.add_argument("--share", type=float, default=0.4, help="of the memory, for each of the two engines")
    parser.add_argument("--seconds", type=float, default=480, help="no new group is begun after that (default 480)")
    parser.add_argument("--engine-args", type=json.loads, default={}, help="further arguments of both engines, as JSON")
    parser.add_argument("--out", type=Path, default=Path("serve.json"))
    args = parser.parse_args(argv)
    if args.tiny:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        args.share, args.rounds = 0.2, min(args.rounds, 2)
    with tempfile.TemporaryDirectory() as scratch:
        announce(Path(scratch) / "plugin")
        print("starting two engines …", flush=True)
        bench = Bench(args, Path(scratch))
        try:
            start = bench.report["starts"]["editserver"]
            print(f"{start['device']}; vLLM {start['vllm']} ({start['runner']} runner), torch {start['torch']}")
            print(heading(), flush=True)
            for group in TINY if args.tiny else GROUPS:
                if bench.late:
                    bench.report["skipped"].append([group.name, [load.name for load in group.loads]])
                    continue
                try:
                    bench.measure(group, args.rounds)
                except Broken as error:
                    print(f"{group.name}: {str(error).strip().splitlines()[-1]}")
                    break
                except AssertionError as error:  # the next group may be right
                    bench.report["wrong"].append([group.name, str(error)])
                    print(f"WRONG: {group.name}: {error}", flush=True)
                bench.save(args.out)
        finally:
            bench.save(args.out)
            bench.close()
    kv = {name: found["kv_tokens"] for name, found in bench.report["starts"].items()}
    print(f"{bench.report['model']}; KV cache {kv} tokens; {bench.report['seconds']:.0f} s; {args.out}")
    for group_name, load in bench.report["skipped"]:
        print(f"skipped for lack of time: {group_name}: {', '.join(load)}")
    return 1 if bench.report["refused"] or bench.report["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
