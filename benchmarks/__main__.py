"""``make bench``: what editing costs, as ratios to vLLM without the plugin, measured in one run on this machine.

Vanilla vLLM and the systems that are compared with it live side by side, and take turns: in every round each load of a
scenario runs once, between two runs of vanilla. The table gives the median over the rounds of vanilla / system, so 1.00
says that editing cost nothing, 0.97 that it cost 3 %. Requests of one load all edit differently, on every token, and the
receipts are checked to say so. Everything is written to a JSON file, from which `python -m benchmarks.page` makes
docs/benchmarks.md.

examples:
  make bench                                      the default scenarios and the page (an hour or more on two quiet cores)
  make bench ARGS=--quick                         does everything work? small cases, one round, no page
  python -m benchmarks --cases decode --rounds 3  one scenario
  python -m benchmarks --systems editserver       without the peer
  python -m benchmarks --cases http --into R.json once more, into a record that is there
  python -m benchmarks --list                     every scenario, load, goal and system
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.engine_process import BARE
from benchmarks.scenarios import SCENARIOS, SYSTEMS, VANILLA

LARGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""For every system: with small pages, two processes of the same program differ by more than what is measured here."""
STARTS, ROUNDS = 3, 3


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = [name for name, scenario in SCENARIOS.items() if scenario.default]
    extra = [name for name in SCENARIOS if name not in default]
    parser.add_argument(
        "--cases", nargs="+", metavar="CASE", choices=[*SCENARIOS, "all"], default=default,
        help=f"scenarios; default: {' '.join(default)}. Besides: {' '.join(extra)}, or all",
    )  # fmt: skip
    parser.add_argument(
        "--systems", nargs="+", metavar="SYSTEM", choices=list(SYSTEMS),
        help="next to vanilla, which always takes part; default: editserver, and the peer where `make bench-peers` installed it",
    )  # fmt: skip
    parser.add_argument(
        "--starts", type=int, default=STARTS,
        help="how often vanilla and editserver are started, to be measured anew: a process keeps a speed of its own for its "
        f"life (default {STARTS})",
    )  # fmt: skip
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS,
        help=f"rounds of each start that count, after one that warms up (default {ROUNDS})",
    )  # fmt: skip
    parser.add_argument(
        "--quick", action="store_true", help="small cases, one round: shows that everything works, measures nothing"
    )
    parser.add_argument(
        "--bare", action="store_true",
        help="vanilla and peers as installed, without the room for Python's frames that editserver gives itself "
        "(benchmarks/room): where depths are unlucky, editing then seems to make a model faster",
    )  # fmt: skip
    parser.add_argument(
        "--hold-slow-memory", action="store_true",
        help="time nearly all free memory first, and keep what is slow from all systems: on a virtual machine, where a process "
        "lies may decide how fast it is for its life (takes a minute or two and, for that long, nearly all memory)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"],
        help="what the model is computed in; default: bfloat16, or float32 on a CPU that multiplies no bfloat16",
    )  # fmt: skip
    parser.add_argument("--eager", action="store_true", help="vLLM without torch.compile")
    parser.add_argument(
        "--out", type=Path, help="the JSON file; default: benchmarks/results/MACHINE-DATE.json, with --quick out/"
    )
    parser.add_argument(
        "--into",
        type=Path,
        metavar="RECORD",
        help="replace these scenarios in a record of this machine, or add them to it",
    )
    parser.add_argument("--list", action="store_true", help="list what there is and stop")
    args = parser.parse_args(argv)
    if "all" in args.cases:
        args.cases = list(SCENARIOS)
    if min(args.rounds, args.starts) < 1:
        parser.error("--rounds and --starts must be at least 1")
    if args.into and (args.out or args.quick):
        parser.error("--into goes with neither --out nor --quick")
    if args.into and not args.into.is_file():
        parser.error(f"--into: there is no record {args.into}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the record."""
    args = parse(argv)
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 140)
    if args.list:
        _list(console)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # engines that stand still are let go on the way out
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if args.bare:
        os.environ[BARE] = "1"
    for name, value in LARGE_PAGES.items():
        os.environ.setdefault(name, value)

    from benchmarks import machine, slow_memory
    from benchmarks.results import FOLDER, SCHEMA, merged, read
    from benchmarks.runner import Plan, run
    from benchmarks.systems import Bench, available, peer_installed, settings, write_dictionaries
    from benchmarks.tables import show
    from editserver.cli.serve import served_dtype
    from editserver.demo.model import cache_root, ensure_demo_model

    there = available()
    chosen = args.systems or there
    if missing := [name for name in chosen if name not in there]:
        sys.exit(f"{', '.join(missing)} is not installed here: make bench-peers")
    if not peer_installed():
        console.print("[dim]vllm-lens is not installed (make bench-peers): compared with vanilla vLLM only[/dim]")
    scenarios = [SCENARIOS[name] for name in dict.fromkeys(args.cases)]
    if args.quick:
        scenarios, args.rounds, args.starts = [one.smaller() for one in scenarios], 1, 1
    plan = Plan(scenarios, [VANILLA, *(name for name in chosen if name != VANILLA)], args.rounds, args.starts)
    if idle := [one.id for one in scenarios if not plan.entries(one)]:
        console.print(f"[dim]{', '.join(idle)}: nothing there for {', '.join(chosen)}[/dim]")
        plan.scenarios = [one for one in scenarios if one.id not in idle]
    cache, logs = cache_root() / "benchmarks", Path(tempfile.mkdtemp(prefix="benchmarks-"))
    console.print(f"[dim]what the engines say is kept in {logs}[/dim]")
    bench = Bench(
        ensure_demo_model(), cache, logs, args.eager, args.dtype or served_dtype(), write_dictionaries(cache, scenarios)
    )
    began, now = time.monotonic(), datetime.now(UTC)
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "date": now.strftime("%Y-%m-%d %H:%M UTC"),
        "command": "python -m benchmarks " + shlex.join(sys.argv[1:] if argv is None else argv),
        "quick": args.quick,
        "model": f"SmolLM2-135M-Instruct, {bench.dtype}" + (", eager" if args.eager else ""),
        "machine": machine.describe(),
        "versions": machine.versions(),
        "settings": settings(),
    }
    record["groups"] = [str(group) for group, _ in plan.groups()]
    before = read(args.into) if args.into else None
    folder = Path("out") if args.quick else FOLDER
    out = args.out or args.into or folder / f"{machine.slug()}-{now:%Y-%m-%d}.json"
    columns = (TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn())
    bars = Progress(*columns, console=console, transient=True, refresh_per_second=1)
    with slow_memory.held(console) if args.hold_slow_memory else nullcontext() as held, bars as bar:
        task = bar.add_task("", total=plan.n_turns)

        def tell(what: str, advance: int = 0) -> None:
            bar.update(task, description=what, advance=advance)

        record["scenarios"] = []
        for measured in run(plan, bench, tell):
            measured["room"] = not args.bare
            if held is not None:
                measured["slow_memory"] = held
            record["scenarios"] = [one for one in record["scenarios"] if one["id"] != measured["id"]] + [measured]
            took = round(time.monotonic() - began)
            record |= {"systems": plan.record, "failures": plan.failures, "took_seconds": took}
            _write(merged(before, record) if before else record, out)  # whatever happens to the rest
            console.print(f"[dim]{took // 60:3} min {took % 60:2} s  {measured['title']}[/dim]")
    if not record["scenarios"]:
        sys.exit("nothing was measured:\n" + "\n".join(plan.failures))
    record |= {
        "failures": [said.splitlines()[0] for said in plan.failures],
        "took_seconds": round(time.monotonic() - began),
    }
    _write(merged(before, record) if before else record, out)
    show(record, console)
    console.print(f"{record['took_seconds'] // 60} min {record['took_seconds'] % 60} s. Written: {out}")
    if plan.failures:
        sys.exit("not measured:\n" + "\n".join(plan.failures))
    if not args.quick:
        console.print("The page: python -m benchmarks.page")


def _write(record: dict[str, Any], out: Path) -> None:
    """One line per round: a diff of two runs can be read."""
    import json

    rounds = {}
    for number, scenario in enumerate(record["scenarios"]):
        rounds[f'"rounds of {number}"'] = scenario["rounds"]
    slim = record | {"scenarios": [s | {"rounds": f"rounds of {n}"} for n, s in enumerate(record["scenarios"])]}
    text = json.dumps(slim, indent=1, ensure_ascii=False)
    for mark, value in rounds.items():
        lines = ",\n".join("    " + json.dumps(order) for order in value)
        text = text.replace(mark, f"[\n{lines}\n   ]")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text + "\n", encoding="utf-8")


def _list(console: Console) -> None:
    for scenario in SCENARIOS.values():
        console.print(
            f"[bold]{scenario.id}[/bold]  {scenario.title}" + ("" if scenario.default else "  [dim](by name)[/dim]")
        )
        for load in scenario.loads:
            unit = " ms" if scenario.quantity == "milliseconds" else ""
            goal = f"  goal {'<' if unit else '≥'} {load.goal:.3g}{unit}" if load.goal else ""
            console.print(f"    {load.id:12} {load.title}{goal}  [dim]{', '.join(load.systems)}[/dim]", highlight=False)
    console.print("\n[bold]systems[/bold]")
    for name, what in SYSTEMS.items():
        console.print(f"    {name:14} {what}", highlight=False)


if __name__ == "__main__":
    main()
