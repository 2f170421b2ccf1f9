"""The whole run behind ``editserver sae train``: text → activations → dictionaries → judgement → cards. Resumable.

Everything between is kept in a work folder: conversations, activations per source and layer, training checkpoints. A run
that was stopped goes on where it was. With ``stream`` no activations are kept: they are read from the model as they are
needed and mixed in a buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from sae_weights.formats import load_sae, save_saelens
from sae_weights.training import chats, corpus
from sae_weights.training.activations import Activations, Truncated, cached, collect
from sae_weights.training.card import write_card
from sae_weights.training.evaluate import reconstruction, splice
from sae_weights.training.stream import Streamed
from sae_weights.training.text import SHARES, Text, bundled_sources, flattened, own_text
from sae_weights.training.trainer import Feed, Progress, Recipe, Shuffled, State, Trainer, train

HELD_OUT_TOKENS = 150_000
"""Held-out tokens of one source that are judged, at most."""


@dataclass(frozen=True)
class Plan:
    """What to train.

    Attributes:
        layers: decoder layers whose output is read; one dictionary each, from one pass of the model over the text.
        tokens: training tokens in all (several passes over the text if it is shorter).
        distinct: different tokens to read activations of, at most.
        conversations: how many chats the model is asked to answer; ``chats`` names a file of answered ones instead.
        own_text: the user's files instead of the built-in corpora.
        stream: keep no activations.
    """

    layers: tuple[int, ...]
    tokens: int
    distinct: int = 2_500_000
    conversations: int = 1500
    chats: Path | None = None
    own_text: tuple[Path, ...] = ()
    stream: bool = False
    recipe: Recipe = field(default_factory=Recipe)
    model_name: str = "smollm2-135m-instruct"
    options: str = ""
    """The command line that made it, for the card."""


Report = Callable[[str, int, int], None]
"""(stage, done, total)"""


def texts(tokenizer: Any, model: Callable[[], Any], plan: Plan, work: Path, report: Report) -> dict[str, Text]:
    """The text of a run, per source, cut to its share of ``plan.distinct``."""
    if plan.own_text:
        text = own_text(plan.own_text, tokenizer)
        if not text.held_out:
            raise ValueError("the text is shorter than two windows: nothing could be held out")
        sources = {"text": text}
        shares = {"text": 1.0}
    else:
        # A base model has no template to hold conversations in: it is trained on the other text alone.
        chatty = getattr(tokenizer, "chat_template", None) is not None
        path = plan.chats or work / "chats.jsonl"
        if chatty and plan.chats is None and sum(1 for _ in chats.read(path)) < plan.conversations:
            asked = chats.prompts(*corpus.topics(work), plan.conversations, seed=0)
            chats.generate(model(), tokenizer, asked, path, report=lambda done, n, _s: report("answering", done, n))
        conversations = list(chats.read(path)) if chatty else []
        sources = bundled_sources(tokenizer, conversations, work, lambda stage: report(stage, 1, 1))
        shares = SHARES
    for name, text in sources.items():
        text.cap(int(plan.distinct * shares[name]))
        kept = Text(train=text.held_out)
        kept.cap(HELD_OUT_TOKENS)
        text.held_out = kept.train
    return sources


def run(
    load_model: Callable[[], Any],
    tokenizer: Any,
    plan: Plan,
    out: Sequence[Path],
    work: Path,
    *,
    report: Report = lambda stage, done, total: None,
    log: Callable[[int, Progress, int], None] = lambda layer, line, total: None,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """Train one dictionary per layer, save SAELens folders to ``out`` with their cards; return the cards' figures.

    ``log(layer, line, total steps)`` comes about every hundred steps.
    """
    work.mkdir(parents=True, exist_ok=True)
    sources = texts(tokenizer, load_model, plan, work, report)
    held = _held_out(load_model, plan, sources, work, report)
    seen: list[dict[str, Activations]] = [{} for _ in plan.layers]
    if not plan.stream:
        for name, text in sources.items():
            parts = cached(
                load_model, plan.layers, text.train, work / f"train-{name}", report=_staged(report, f"reading {name}")
            )
            for part, of_layer in zip(parts, seen, strict=True):
                of_layer[name] = part
    results = []
    for at, (layer, folder) in enumerate(zip(plan.layers, out, strict=True)):
        results.append(
            _train_layer(load_model, plan, layer, at, folder, work, sources, held[at], seen[at], log, device)
        )
    return results


def _train_layer(
    load_model: Callable[[], Any],
    plan: Plan,
    layer: int,
    at: int,
    folder: Path,
    work: Path,
    sources: dict[str, Text],
    held: dict[str, Activations],
    seen: dict[str, Activations],
    log: Callable[[int, Progress, int], None],
    device: str,
) -> dict[str, Any]:
    feed: Feed
    if plan.stream:
        sequences = list(flattened(sources))
        feed = streamed = Streamed(Truncated(load_model(), layer), sequences, seed=plan.recipe.seed)
        median, dropped = streamed.median_norm, 0
        sample = streamed.sample(20_000)
        distinct = {name: text.tokens() for name, text in sources.items()}
    else:
        values = torch.cat([a.values for a in seen.values()])
        median = float(sum(a.median_norm * len(a.values) for a in seen.values()) / len(values))
        sample = values[torch.randperm(len(values), generator=torch.Generator().manual_seed(0))[:20_000]]
        feed = Shuffled(values, plan.recipe.seed)
        dropped = sum(a.dropped for a in seen.values())
        distinct = {name: len(a.values) for name, a in seen.items()}
    checkpoint = work / f"layer-{layer}.pt"
    state = State.load(checkpoint) if checkpoint.exists() else None
    if state is not None and state.recipe != plan.recipe:
        raise ValueError(f"{checkpoint} is of a run with another recipe; remove it or name another work folder")
    trainer = Trainer(plan.recipe, sample, plan.tokens // plan.recipe.batch, state, device)
    train(trainer, feed, checkpoint=checkpoint, report=lambda line, total: log(layer, line, total))
    if isinstance(feed, Streamed):
        dropped = feed.dropped
    metadata = {"model_name": plan.model_name, "training_architecture": plan.recipe.objective}
    sae = trainer.export(layer, sample, metadata)
    judged = torch.cat([a.values for a in held.values()])
    stats = reconstruction(sae, judged)
    sidecar = {
        "median_norm": round(median, 3),
        "max_activation": [round(float(v), 3) for v in stats.max_activation],
        "density": [round(float(v), 6) for v in stats.density],
    }
    save_saelens(sae, folder, dtype=torch.bfloat16, sidecar=sidecar)
    figures = judge(load_model, folder, layer, held, {n: t.held_out for n, t in sources.items()}, median)
    figures |= {
        "model": plan.model_name,
        "layer": layer,
        "options": plan.options,
        "built_in_text": not plan.own_text,
        "training_tokens": trainer.steps * plan.recipe.batch,
        "distinct_tokens": distinct,
        "outliers_dropped": dropped,
        "median_norm": round(median, 2),
        "recipe": asdict(plan.recipe),
        "curve": [
            {"tokens": line.tokens, "fvu": round(line.fvu, 4), "l0": round(line.l0, 1), "dead": line.dead}
            for line in trainer.log
        ],
    }
    write_card(folder, figures)
    return figures


def _held_out(
    load_model: Callable[[], Any], plan: Plan, sources: dict[str, Text], work: Path, report: Report
) -> list[dict[str, Activations]]:
    held: list[dict[str, Activations]] = [{} for _ in plan.layers]
    for name, text in sources.items():
        if plan.stream:
            parts = collect(Truncated(load_model(), *plan.layers), text.held_out)
        else:
            stage = f"held-out {name}"
            parts = cached(load_model, plan.layers, text.held_out, work / f"held-{name}", report=_staged(report, stage))
        for part, of_layer in zip(parts, held, strict=True):
            of_layer[name] = part
    return held


def _staged(report: Report, stage: str) -> Callable[[int, int], None]:
    return lambda done, total: report(stage, done, total)


def judge(
    load_model: Callable[[], Any],
    folder: Path,
    layer: int,
    held: dict[str, Activations],
    held_text: dict[str, list[list[int]]],
    median: float,
    spliced_sequences: int = 48,
) -> dict[str, Any]:
    """Figures of the *saved* dictionary on held-out documents, source by source."""
    sae = load_sae(folder)
    model = load_model()
    sources: dict[str, Any] = {}
    for name in held:
        stats = reconstruction(sae, held[name].values)
        sources[name] = {"tokens": stats.tokens, "fvu": round(stats.fvu, 4), "l0": round(stats.l0, 2)}
        if name in ("prose", "chat", "text"):
            loss = splice(model, sae, layer, [t[:256] for t in held_text[name][:spliced_sequences]], median)
            ce = {k: round(v, 4) for k, v in asdict(loss).items() if k != "tokens"} | {"tokens": loss.tokens}
            sources[name] |= {"ce": ce, "ce_recovered": round(loss.recovered, 4)}
    together = reconstruction(sae, torch.cat([a.values for a in held.values()]))
    dead = {"dead": round(together.dead, 4), "dead_judged_on_tokens": together.tokens}
    return {"held_out": sources, **dead}
