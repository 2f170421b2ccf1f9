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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])  # not this folder: its kernels.py is not the package "kernels"

from benchmarks.gpu.stock import Ask, Broken, Engine, Seen, announce  # noqa: E402

EPILOG = """
columns
  requests, load  see benchmarks/gpu/README.md; "vanilla's next run": what is no difference at all
  vanilla, edits  tokens per second without and with editserver
  ratio, min, max vanilla / editserver of the seconds, paired round by round: median and extremes
  TTFT, TPOT      of each (v: vanilla, e: editserver), in ms, and the median ratio

Every run is checked by the engine's records; one that fails, or edited or read another number of tokens than it had to, is
said (WRONG), kept in the JSON, and makes the exit status 1; the other loads go on. The JSON is written after each group.

examples
  python benchmarks/gpu/serve.py --out serve.json         # 8B shape, random weights, under 10 minutes
  python benchmarks/gpu/serve.py --shape 1B --rounds 3    # shorter
  python benchmarks/gpu/serve.py --tiny                   # on a CPU: does the script run to its end?
"""

LLAMA: dict[str, dict[str, int]] = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4},
}
KV_HEADS = {"1B": 8, "8B": 8, "tiny": 2}
VOCAB = {"1B": 128_256, "8B": 128_256, "tiny": 512}


@dataclass(frozen=True)
class Load:
    """What the requests of a group carry on the armed engine; ``kind`` "idle": nothing; "again": vanilla is compared with itself,
    which says what is no difference at all."""

    kind: str
    latents: int = 0

    @property
    def name(self) -> str:
        what = {
            "idle": "armed, idle",
            "edited": f"{self.latents} latents × 3 layers",
            "rules": "8 propositions, 12 rules",
            "again": "none: vanilla's next run",
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


IDLE, RULES, INSPECT, AGAIN = Load("idle"), Load("rules", 32), Load("inspected", 8), Load("again")


def edits(*latents: int) -> tuple[Load, ...]:
    return tuple(Load("edited", n) for n in latents)


GROUPS = (
    Group("16 requests", 16, 32, 128, (IDLE, *edits(1, 8, 64))),
    Group("256 requests", 256, 32, 64, (IDLE, *edits(1, 8))),
    Group("1 request", 1, 32, 128, (IDLE, *edits(1, 8, 64))),
    Group("16 prompts", 16, 512, 8, (IDLE, *edits(8))),
    Group("16 behind a cached prefix", 16, 1088, 32, (IDLE, *edits(8)), shared=1024),
    Group("16 requests, read", 16, 32, 128, (INSPECT, RULES)),
)
TINY = (
    Group("3 requests", 3, 9, 6, (IDLE, *edits(1, 8))),
    Group("1 request", 1, 9, 6, (IDLE, *edits(1))),
    Group("3 prompts", 3, 40, 2, edits(8)),
    Group("3 behind a cached prefix", 3, 300, 3, edits(8), shared=256),
    Group("3 requests, read", 3, 9, 6, (INSPECT, RULES)),
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
    """Both engines, once started, and what was measured on them.

    Attributes:
        groups: what is sent, made before anything is started: what cannot be made is known then.
        report: what goes into the JSON.
    """

    vanilla: Engine
    armed: Engine

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        """Raises ImportError where something is not installed, ValueError where ``--width`` is too small for a group."""
        from transformers import AutoConfig

        from benchmarks.dictionaries import write_random
        from benchmarks.gpu.programs import payload
        from editserver import __version__
        from editserver.engine.config import EngineConfig

        self.began, self.limit, self.out = time.perf_counter(), args.seconds, args.out
        shape = "tiny" if args.tiny else args.shape
        model = args.model or str(write_model(scratch / "model", shape))
        text = AutoConfig.from_pretrained(model).get_text_config()
        depth, d_model = int(text.num_hidden_layers), int(text.hidden_size)
        layers = args.layers or [depth // 4, depth // 2, 3 * depth // 4]
        width = 512 if args.tiny else args.width
        self.saes = {n: write_random(scratch, f"random/l{n}", n, d_model, width) for n in layers}

        def carried(kind: Any, request: int, latents: int) -> bytes:
            return payload(kind, request, latents, self.saes, width)

        groups = TINY if args.tiny else GROUPS
        self.vocab = int(text.vocab_size)
        self.groups = {
            group: {load: asks(group, load, self.vocab, carried) for load in (None, *group.loads)} for group in groups
        }
        rows = max(g.requests * load.latents for g in groups for load in g.loads) * len(layers)
        config = EngineConfig(tuple(layers), tuple(self.saes.values()), bank_rows=max(64, rows))
        self.engine_args: dict[str, Any] = {
            "model": model,
            "load_format": "auto" if args.real else "dummy",
            "skip_tokenizer_init": True,
            "dtype": "float32" if args.tiny else "bfloat16",
            "max_model_len": 512 if args.tiny else 2048,
            "max_num_seqs": max(g.requests for g in groups),
            "gpu_memory_utilization": args.share,
            "enable_prefix_caching": True,
            "seed": 0,
            # On a GPU of this size `vllm serve` takes as many tokens at a time.
            **({"enforce_eager": True, "block_size": 32} if args.tiny else {"max_num_batched_tokens": 8192}),
            **args.engine_args,
        }
        self.additional = {"editserver": config.as_dict()}
        self.report: dict[str, Any] = {
            "model": args.model or f"Llama {shape}, random weights",
            "layers": layers,
            "latents wide": width,
            "machine": platform.machine(),
            "editserver": __version__,
            "engine": {k: v for k, v in self.engine_args.items() if k != "model"},
            "starts": {},
            "results": [],
            "wrong": [],
            "skipped": [],
        }
        self.save()

    def start(self) -> None:
        """Both engines, one after the other: each finds out how much memory there is.

        Raises:
            Broken: one did not start.
        """
        self.vanilla = self._started("vanilla", False, {})
        try:
            self.armed = self._started("editserver", True, {"additional_config": self.additional})
        except Broken:
            self.vanilla.close()
            raise

    def _started(self, name: str, armed: bool, more: dict[str, Any]) -> Engine:
        print(f"{name} starts …", flush=True)
        engine = Engine(armed, **self.engine_args, **more)
        start = engine.start
        self.report["starts"][name] = asdict(start)
        self.save()
        print(
            f"{name}: {start.device}; vLLM {start.vllm} ({start.runner} runner), torch {start.torch}; "
            f"{', '.join(f'{what}: {value}' for what, value in start.chosen.items())}; started in {start.seconds:.0f} s",
            flush=True,
        )
        return engine

    @property
    def late(self) -> bool:
        """Whether nothing new should be begun."""
        return time.perf_counter() - self.began > self.limit

    def run(self, rounds: int) -> None:
        """All groups, as far as there is time."""
        for group in self.groups:
            if self.late:
                self.report["skipped"].append([group.name, [load.name for load in group.loads]])
            else:
                self.measure(group, rounds)
            self.save()

    def measure(self, group: Group, rounds: int) -> None:
        """Vanilla and every load in turns; the first round warms up, brings the rows, and fills the prefix cache. A load of
        which a run fails, or was not what it had to be, is left out from there on, and reported."""
        wanted = dict(self.groups[group])
        seen: dict[Load | None, list[Seen]] = {load: [] for load in wanted}
        for round_ in range(rounds + 1):
            order = list(wanted)
            turn = round_ % len(order)
            for load in order[turn:] + order[:turn]:
                engine = self.vanilla if load is None else self.armed
                sent = [behind(ask, group.shared, round_, self.vocab) for ask in wanted[load]]
                try:
                    one = engine.run(sent, warm=bool(group.shared))
                    if round_:
                        check(group, load, one, len(self.saes))
                except (Broken, AssertionError) as error:
                    self.wrong(group, load, str(error))
                    if load is None:
                        return  # there is nothing to compare with
                    del wanted[load]
                    continue
                if round_:
                    seen[load].append(one)
            if self.late and round_ >= 3:
                break
        again = [line_of(group, AGAIN, seen[None][:-1], seen[None][1:])] if len(seen[None]) > 1 else []
        lines = [line_of(group, load, seen[None], seen[load]) for load in wanted if load is not None]
        for line in again + lines:
            self.report["results"].append(line)
            print(in_columns(line), flush=True)

    def wrong(self, group: Group, load: Load | None, what: str) -> None:
        """What does not count, and why."""
        name = "vanilla" if load is None else load.name
        self.report["wrong"].append([group.name, name, what[-4000:]])
        print(f"WRONG: {group.name}, {name}: {what.strip().splitlines()[-1]}", flush=True)

    def save(self) -> None:
        """What there is so far."""
        self.report["seconds"] = time.perf_counter() - self.began
        self.out.write_text(json.dumps(self.report, indent=1))

    def close(self) -> None:
        """Stop both engines."""
        self.vanilla.close()
        self.armed.close()


def asks(group: Group, load: Load | None, vocab: int, carried: Callable[[str, int, int], bytes]) -> list[Ask]:
    """The requests: prompts of their own behind what they share; behind a cached prefix all have one program, or none of it
    would be cached. ``carried``: (kind, request, latents) → what a request brings along."""
    made = []
    for r in range(group.requests):
        numbers = [7 * i for i in range(group.shared)]
        numbers += [13 * i + 101 * r + 5 for i in range(group.prompt - group.shared)]
        prompt = [1, *(3 + number % (vocab - 3) for number in numbers[1:])]
        own = None
        if load is not None and load.kind != "idle":
            own = carried(load.kind, 0 if group.shared else r, load.latents)
        made.append(Ask(prompt, group.output, own))
    return made


def behind(ask: Ask, shared: int, round_: int, vocab: int) -> Ask:
    """The same request with other tokens behind the shared prefix, if there is one: else all of it would be in the cache after
    the first round."""
    if not shared:
        return ask
    new = (3 + (token - 3 + 1009 * round_) % (vocab - 3) for token in ask.prompt[shared:])
    return replace(ask, prompt=[*ask.prompt[:shared], *new])


def check(group: Group, load: Load | None, seen: Seen, n_layers: int) -> None:
    """Prompts came from the prefix cache where they should, and every token that was then left and had to be edited or read
    was, by the engine's records; position 0 never is."""
    due = group.requests * (group.computed - 1)
    if group.shared:
        most = group.requests * group.shared
        least = most - group.requests * 128
        assert least <= seen.cached <= most, (
            f"{seen.cached} tokens came from the prefix cache, {least} to {most} expected"
        )
        due = group.requests * group.computed - seen.cached
    else:
        assert not seen.cached, f"{seen.cached} tokens came from the prefix cache, which should have been empty"
    kind = load.kind if load is not None else "idle"
    edited = due * n_layers if kind == "edited" else 0
    read = {"inspected": due * n_layers, "rules": due}.get(kind, 0)
    assert (seen.edited, seen.read) == (edited, read), f"{seen.edited} edited, {seen.read} read: {edited, read} due"


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
    """Exit status: 0 where every run was what it had to be."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="a few small sizes on a CPU: a test of the script")
    parser.add_argument("--shape", choices=["1B", "8B"], default="8B", help="of the random weights (default 8B)")
    parser.add_argument("--model", help="a folder or Hugging Face id, instead of --shape")
    parser.add_argument("--real", action="store_true", help="with --model: load its weights")
    parser.add_argument(
        "--layers", type=int, nargs="*", help="armed layers (default: at 1/4, 1/2 and 3/4 of the depth)"
    )
    parser.add_argument("--width", type=int, default=8192, help="latents of each dictionary (default 8192)")
    parser.add_argument("--rounds", type=int, default=7, help="paired runs per group (default 7)")
    parser.add_argument("--share", type=float, default=0.4, help="of the memory, for each engine (default 0.4)")
    parser.add_argument("--seconds", type=float, default=480, help="no new group is begun after that (default 480)")
    parser.add_argument("--engine-args", type=json.loads, default={}, help="further arguments of both engines, as JSON")
    parser.add_argument("--out", type=Path, default=Path("serve.json"), help="the report (default serve.json)")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    if args.tiny:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        args.share, args.rounds = 0.2, min(args.rounds, 2)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        announce(Path(scratch) / "plugin")
        bench = Bench(args, Path(scratch))
        bench.start()
        try:
            print(heading(), flush=True)
            bench.run(args.rounds)
        finally:
            bench.save()
            bench.close()
    report = bench.report
    kv = {name: found["kv_tokens"] for name, found in report["starts"].items()}
    print(f"{report['model']}; KV cache {kv} tokens; {report['seconds']:.0f} s; {args.out}")
    for group_name, loads in report["skipped"]:
        print(f"skipped for lack of time: {group_name}: {', '.join(loads)}")
    for group_name, load, _ in report["wrong"]:
        print(f"WRONG: {group_name}, {load}")
    return 1 if report["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
