"""The whole run behind ``editserver sae train``: text → activations → dictionary → judgement → card. Resumable.

Everything between is kept in a work folder: conversations, activations per source, training checkpoints. A run that was
stopped goes on where it was.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sae_weights.formats.saelens import load_sae, save_saelens
from sae_weights.training import chats, corpus
from sae_weights.training.activations import Activations, Truncated, collect, windows
from sae_weights.training.card import write_card
from sae_weights.training.evaluate import reconstruction, splice
from sae_weights.training.trainer import BatchTopKTrainer, Progress, Recipe, State, train

HELD_OUT = 0.03
"""Share of the windows of every source that is never trained on."""


SHARES = {"prose": 0.5, "glosses": 0.1, "code": 0.07, "chat": 0.33}
"""How the distinct tokens divide between the sources."""


@dataclass(frozen=True)
class Plan:
    """What to train.

    Attributes:
        layer: decoder layer whose output is read.
        tokens: training tokens in all (several passes over the text if it is shorter).
        conversations: how many chats the model is asked to answer.
        window: tokens per sequence.
        distinct: different tokens to read activations of, at most; more passes make up for it.
    """

    layer: int
    tokens: int
    conversations: int = 1500
    window: int = 256
    distinct: int = 1_000_000
    recipe: Recipe = field(default_factory=Recipe)
    model_name: str = "smollm2-135m-instruct"


Report = Callable[[str, int, int], None]
"""(stage, done, total)"""


def sequences(
    tokenizer: Any, model: Callable[[], Any], plan: Plan, work: Path, report: Report
) -> dict[str, list[list[int]]]:
    """Token windows per source: prose, dictionary glosses, code, and conversations in the chat template."""
    brown = list(corpus.brown(work))
    sources: dict[str, list[list[int]]] = {}
    for name, documents in (
        ("prose", brown),
        ("glosses", list(corpus.wordnet(work))),
        ("code", list(corpus.python_sources())),
    ):
        sources[name] = list(_windows_of((d.text for d in documents), tokenizer, plan.window))
        report(f"tokenising {name}", 1, 1)
    path = work / "chats.jsonl"
    if sum(1 for _ in chats.read(path)) < plan.conversations:
        conversations = chats.prompts(*_topics(brown, work), plan.conversations, seed=0)
        chats.generate(model(), tokenizer, conversations, path, report=lambda done, n, _s: report("answering", done, n))
    texts = [tokenizer.apply_chat_template(c, tokenize=False) for c in chats.read(path)]
    # Prose as a user's message teaches the template's positions around ordinary text.
    quoted = [p for d in brown for p in d.text.split("\n") if 200 <= len(p) <= 900]
    random.Random(1).shuffle(quoted)
    for passage in quoted[: 2 * len(texts)]:
        messages = [{"role": "user", "content": passage}]
        texts.append(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    sources["chat"] = [ids for text in texts for ids in _first_windows(text, tokenizer, 2 * plan.window)]
    return sources


def _windows_of(texts: Iterable[str], tokenizer: Any, length: int) -> Iterable[list[int]]:
    for text in texts:
        yield from windows(tokenizer(text, add_special_tokens=False).input_ids, length)


def _first_windows(text: str, tokenizer: Any, length: int) -> list[list[int]]:
    """A conversation starts at position 0 and is not cut in the middle: serving sees it so."""
    return [tokenizer(text, add_special_tokens=False).input_ids[:length]]


def _topics(brown: Sequence[corpus.Document], work: Path) -> tuple[list[str], list[str]]:
    counts = Counter(w for d in brown for w in re.findall(r"[a-z]+", d.text))
    nouns = {w for w, _ in corpus.wordnet_glosses(work, ("noun",)) if re.fullmatch(r"[a-z]{3,}", w)}
    topics = [w for w in sorted(nouns) if counts[w] >= 8]
    return topics, [p for d in brown for p in d.text.split("\n") if 250 <= len(p) <= 600]


def split(windows_: list[list[int]], seed: int = 0) -> tuple[list[list[int]], list[list[int]]]:
    """(training, held out), the same for every run."""
    shuffled = list(windows_)
    random.Random(seed).shuffle(shuffled)
    held = max(1, int(len(shuffled) * HELD_OUT))
    return shuffled[held:], shuffled[:held]


def _cap(sequences_: list[list[int]], tokens: int) -> None:
    """Keep the first sequences (they are shuffled) up to ``tokens``."""
    seen = 0
    for i, sequence in enumerate(sequences_):
        seen += len(sequence)
        if seen > tokens:
            del sequences_[i:]
            return


def run(
    load_model: Callable[[], Any],
    tokenizer: Any,
    plan: Plan,
    out: Path,
    work: Path,
    *,
    report: Report = lambda stage, done, total: None,
    log: Callable[[Progress, int], None] = lambda line, total: None,
) -> dict[str, Any]:
    """Train, save a SAELens folder to ``out`` with its card, and return the card's figures."""
    work.mkdir(parents=True, exist_ok=True)
    parts = {name: split(w) for name, w in sequences(tokenizer, load_model, plan, work, report).items()}
    for name, (windows_, _) in parts.items():
        _cap(windows_, int(plan.distinct * SHARES[name]))
    held = {
        name: _activations(load_model, plan, part[1], work / f"held-{name}", name, report)
        for name, part in parts.items()
    }
    seen = {
        name: _activations(load_model, plan, part[0], work / f"train-{name}", name, report)
        for name, part in parts.items()
    }
    values = torch.cat([a.values for a in seen.values()])
    median = float(sum(a.median_norm * len(a.values) for a in seen.values()) / len(values))
    generator = torch.Generator().manual_seed(0)
    sample = values[torch.randperm(len(values), generator=generator)[:20_000]]
    checkpoint = work / f"layer-{plan.layer}.pt"
    state = State.load(checkpoint) if checkpoint.exists() else None
    trainer = BatchTopKTrainer(plan.recipe, sample, plan.tokens // plan.recipe.batch, state)
    train(trainer, values, checkpoint=checkpoint, report=log)
    sae = trainer.export(plan.layer, sample, {"model_name": plan.model_name, "training_architecture": "batchtopk"})
    judged = torch.cat([held["prose"].values, held["chat"].values])
    stats = reconstruction(sae, judged)
    sidecar = {
        "median_norm": round(median, 3),
        "max_activation": [round(float(v), 3) for v in stats.max_activation],
        "density": [round(float(v), 6) for v in stats.density],
    }
    save_saelens(sae, out, dtype=torch.bfloat16, sidecar=sidecar)
    figures = judge(load_model, out, plan, held, {name: part[1] for name, part in parts.items()}, median)
    figures |= {
        "layer": plan.layer,
        "options": f"--layer {plan.layer} --features {plan.recipe.n_features} --k {plan.recipe.k} --tokens {plan.tokens} "
        f"--distinct {plan.distinct} --conversations {plan.conversations}",
        "training_tokens": trainer.steps * plan.recipe.batch,
        "distinct_tokens": {name: len(a.values) for name, a in seen.items()},
        "outliers_dropped": sum(a.dropped for a in seen.values()),
        "median_norm": round(median, 2),
        "recipe": asdict(plan.recipe),
        "curve": [{"tokens": line.tokens, "fvu": round(line.fvu, 4), "dead": line.dead} for line in trainer.log],
    }
    write_card(out, figures)
    return figures


def judge(
    load_model: Callable[[], Any],
    folder: Path,
    plan: Plan,
    held: dict[str, Activations],
    texts: dict[str, list[list[int]]],
    median: float,
    spliced_sequences: int = 48,
) -> dict[str, Any]:
    """Figures of the *saved* dictionary on held-out text, chat and prose apart."""
    sae = load_sae(folder)
    model = load_model()
    figures: dict[str, Any] = {}
    for name in ("prose", "chat"):
        stats = reconstruction(sae, held[name].values)
        loss = splice(model, sae, plan.layer, [t[:128] for t in texts[name][:spliced_sequences]], median)
        figures[name] = {
            "tokens": stats.tokens,
            "fvu": round(stats.fvu, 4),
            "l0": round(stats.l0, 2),
            "ce": {k: round(v, 4) for k, v in asdict(loss).items() if k != "tokens"} | {"tokens": loss.tokens},
            "ce_recovered": round(loss.recovered, 4),
        }
    both = reconstruction(sae, torch.cat([a.values for a in held.values()]))
    figures["dead"] = round(both.dead, 4)
    figures["dead_judged_on_tokens"] = both.tokens
    return figures


def _activations(
    load_model: Callable[[], Any], plan: Plan, part: list[list[int]], path: Path, name: str, report: Report
) -> Activations:
    stored, meta = path.with_suffix(".safetensors"), path.with_suffix(".json")
    if meta.exists():
        facts = json.loads(meta.read_text())
        return Activations(load_file(stored)["values"], facts["median_norm"], facts["dropped"])
    found = collect(
        Truncated(load_model(), plan.layer),
        part,
        report=lambda done, total: report(f"activations of {name}", done, total),
    )
    save_file({"values": found.values}, stored)
    meta.write_text(json.dumps({"median_norm": found.median_norm, "dropped": found.dropped}))
    return found
