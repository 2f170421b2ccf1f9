"""`make bench`: throughput of an editing server as a ratio to vLLM without the plugin, measured in one run.

Two engines with the same model live side by side, one vanilla and one armed at layers 10, 15 and 20. Every case runs on
both in turn (A B, B A, …), and the table gives the median over the rounds of the paired ratio vanilla / armed seconds:
1.00 means that editing cost nothing. Edits are SAE feature edits that act on every token (`add`, a different set of
latents for each request), so nothing is skipped; the editing engine's receipts are checked to say so.
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

LAYERS = (10, 15, 20)


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    n_requests: int
    prompt_len: int
    max_tokens: int
    n_latents: int


CASES = {
    "idle": Case("armed, no request edits", 16, 32, 64, 0),
    "1": Case("16 requests, 1 latent on 3 layers each", 16, 32, 64, 1),
    "8": Case("16 requests, 8 latents on 3 layers each", 16, 32, 64, 8),
    "32": Case("16 requests, 32 latents on 3 layers each", 16, 32, 64, 32),
    "64": Case("64 requests, 64 configurations of 8 latents", 64, 32, 32, 8),
    "prompt": Case("16 prompts of 512 tokens, 8 latents", 16, 512, 4, 8),
}


def random_sae(layer: int, d_model: int, n_features: int, folder: Path) -> Path:
    """A dictionary of random directions in SAELens' layout: speed does not depend on what the features mean."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(layer)
    w_dec = torch.nn.functional.normalize(torch.randn(n_features, d_model, generator=generator), dim=1)
    folder.mkdir(parents=True)
    save_file(
        {
            "W_enc": w_dec.T.contiguous(),
            "b_enc": torch.zeros(n_features),
            "W_dec": w_dec,
            "b_dec": torch.zeros(d_model),
        },
        folder / "sae_weights.safetensors",
    )
    (folder / "cfg.json").write_text(
        f'{{"architecture": "standard", "d_in": {d_model}, "d_sae": {n_features}, "dtype": "float32", '
        f'"apply_b_dec_to_input": false, "normalize_activations": "none", "reshape_activations": "none", '
        f'"metadata": {{"hook_name": "blocks.{layer}.hook_resid_post"}}}}'
    )
    return folder


def payload_maker(digests: dict[int, str], n_features: int) -> Callable[[int, int], bytes | None]:
    """``make(request, n_latents)``: the payload of a request that edits its own latents at every armed layer."""
    from interventions.program import Channel, LayerProgram, Op, Payload, Program, ReadKind, feature_key
    from interventions.selectors import ALL

    def make(request: int, n_latents: int) -> bytes | None:
        if not n_latents:
            return None
        inf = float("inf")
        op = Op(1.0, 0.05, -inf, inf, False, 0, 0)
        layers = tuple(
            LayerProgram(
                layer,
                tuple(
                    Channel(ReadKind.LATENT, key, (op,))
                    for key in sorted(
                        feature_key(digests[layer], (request * n_latents + i) % n_features) for i in range(n_latents)
                    )
                ),
            )
            for layer in LAYERS
        )
        program = Program(layers, (ALL,), {})
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

    from benchmarks.engine_process import EngineProcess
    from editserver.demo.model import ensure_demo_model
    from editserver.engine.config import EngineConfig, SAESource
    from sae_weights import load_sae

    console = Console(width=110)
    model = ensure_demo_model()
    n_features = 4608
    with tempfile.TemporaryDirectory() as scratch:
        sources = []
        for layer in LAYERS:
            sae = load_sae(random_sae(layer, 576, n_features, Path(scratch) / str(layer)))
            sources.append(SAESource(f"random/l{layer}", f"{scratch}/{layer}", sae.digest, layer))
        engine_args = {
            "model": str(model),
            "gpu_memory_utilization": 0.2,
            "max_model_len": 1024,
            "max_num_seqs": 64,
            "enforce_eager": args.eager,
        }
        config = EngineConfig(armed=LAYERS, saes=tuple(sources))
        console.print("Starting two engines (the first start compiles the model: a minute or two) …")
        vanilla = EngineProcess(False, **engine_args)
        vanilla.wait_ready()
        armed = EngineProcess(True, **engine_args, additional_config={"editserver": config.as_dict()})
        armed.wait_ready()
        make = payload_maker({s.layer: s.digest for s in sources}, n_features)
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
                payloads = [make(r, case.n_latents) for r in range(case.n_requests)]
                plain: list[bytes | None] = [None] * case.n_requests
                seconds: dict[str, list[float]] = {"vanilla": [], "armed": []}
                work = case.n_requests * (case.prompt_len if name == "prompt" else case.max_tokens)
                for round_ in range(args.rounds + 1):
                    order = ("vanilla", "armed") if round_ % 2 else ("armed", "vanilla")
                    for which in order:
                        engine, load = (vanilla, plain) if which == "vanilla" else (armed, payloads)
                        took, _, edited = engine.run(prompts, load, case.max_tokens)
                        if which == "armed" and case.n_latents:
                            due = case.n_requests * (case.prompt_len + case.max_tokens - 2)
                            assert edited == due, f"{edited} tokens edited, {due} expected"
                        if round_:  # the first one warms up
                            seconds[which].append(took)
                    progress.advance(task)
                ratios = [v / a for v, a in zip(seconds["vanilla"], seconds["armed"], strict=True)]
                table.add_row(
                    case.name,
                    f"{work / statistics.median(seconds['vanilla']):.0f}",
                    f"{work / statistics.median(seconds['armed']):.0f}",
                    f"{statistics.median(ratios):.3f}",
                    f"{min(ratios):.3f}",
                    f"{max(ratios):.3f}",
                )
        console.print(table)
        vanilla.close()
        armed.close()


if __name__ == "__main__":
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
