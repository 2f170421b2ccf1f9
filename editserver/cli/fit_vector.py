"""What ``editserver fit vector`` does: examples, model, fits, dose curve, library, report."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from editserver import __version__
from editserver.cli.fit_report import METHOD_WORDS, Outcome, rounded, write_report
from editserver.cli.vector_store import Folder, Server, Store
from editserver.demo.model import MODEL_NAME, ensure_demo_model
from editserver.library import NAME, Vector
from editserver.settings import Settings
from interventions.fitting.dose import DOSES, PROMPTS, DoseCurve, Trial, dose_curve
from interventions.fitting.pairs import Examples, Passage, read_pairs, read_prompts, read_texts
from interventions.fitting.pooling import Pool, Reader
from interventions.fitting.vectors import HELD_OUT, LayerFit, Method, Split, best, fit_layer, split
from sae_weights.precision import quick_dtype

DEMO = "demo"
DEMO_LAYERS = (10, 15, 20)
"""Layers that are compared for the demo model unless the user says: those that its server arms."""


class UsageError(ValueError):
    """Options that do not go together, or name what does not exist; the message names the option."""


@dataclass(frozen=True)
class Job:
    """One fit, checked as far as that is possible without the model."""

    name: str
    examples: Examples
    layers: str | None
    method: Method
    pool: Pool
    model: str
    dtype: str
    store: Store
    report: Path | None
    trial: Trial | None
    seed: int
    description: str | None

    @classmethod
    def of(
        cls,
        *,
        name: str,
        pairs: Path | None,
        positive: Path | None,
        negative: Path | None,
        layer: int | None,
        layers: str | None,
        method: Method,
        pool: Pool | None,
        model: str,
        dtype: str | None,
        library: Path | None,
        url: str | None,
        api_key: str | None,
        report: Path | None,
        prompts: Path | None,
        tokens: int,
        doses: str | None,
        temperature: float,
        max_perplexity: float,
        curve: bool,
        seed: int,
        description: str | None,
    ) -> Job:
        """The command line's options.

        Raises:
            UsageError, PairsError: an option that cannot be, or a file that cannot be used.
        """
        if not NAME.fullmatch(name):
            raise UsageError(
                f"{name!r} is not a name: letters, digits, '.', '_', '-', at most 128, not starting with '.'"
            )
        if (pairs is None) == (positive is None and negative is None):
            raise UsageError("give either --pairs FILE, or --positive FILE and --negative FILE")
        if pairs is not None:
            examples = read_pairs(pairs)
        elif positive is None or negative is None:
            raise UsageError("--positive and --negative go together")
        else:
            examples = read_texts(positive, negative)
        if layer is not None and layers is not None:
            raise UsageError("--layer fits one layer, --layers compares several; give one of them")
        if method == "pca" and not examples.paired:
            raise UsageError(
                "--method pca works on differences of pairs; two separate lists have none: use --method mean"
            )
        if url is not None and library is not None:
            raise UsageError("--library stores in a folder, --url on a running server; give one of them")
        trial = Trial(
            prompts=PROMPTS if prompts is None else read_prompts(prompts),
            doses=DOSES if doses is None else _numbers(doses),
            max_tokens=tokens,
            temperature=temperature,
            seed=seed,
            perplexity_ratio=max_perplexity,
        )
        return cls(
            name=name,
            examples=examples,
            layers=layers if layer is None else str(layer),
            method=method,
            pool=pool or ("last" if examples.in_context else "mean"),
            model=model,
            dtype=dtype or str(quick_dtype()).removeprefix("torch."),
            store=Server(url, api_key) if url is not None else Folder(library or Settings().library),
            report=report,
            trial=trial if curve else None,
            seed=seed,
            description=description,
        )


def run(job: Job, console: Console) -> Outcome:
    """Fit, measure, store and report; progress goes to ``console``.

    Raises:
        UsageError, PairsError, FitError, DemoModelError, InterventionError: what stands in the way, before anything is
            stored.
    """
    groups = job.examples.groups()
    parts = split(*groups, seed=job.seed)
    job.store.check()
    if job.report is not None:
        job.report.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        stage = _stages(progress)
        stage(f"loading {job.model}")(0, 1)
        model, tokenizer, model_name = load_model(job.model, job.dtype)
        stage(f"loading {job.model}")(1, 1)
        layers = parse_layers(job.layers, int(model.config.get_text_config().num_hidden_layers), job.model)
        fits = fit_layers(job, Reader(model, tokenizer, layers), parts, groups, stage)
        chosen = best(fits)
        curve = None
        if job.trial is not None:
            curve = dose_curve(
                model,
                tokenizer,
                chosen,
                pool=job.pool,
                in_context=job.examples.in_context,
                trial=job.trial,
                report=stage("answers at each dose"),
            )
    meta = provenance(job, parts, fits, chosen, curve, model_name, config_sha256(model.config))
    words = METHOD_WORDS[job.method]
    described = job.description or f"{words} of {job.examples.source} at layer {chosen.layer} of {model_name}"
    vector = Vector({chosen.layer: chosen.vector.astype(np.float32)}, described, meta)
    vector = first_dated(vector, job.store.get(job.name))
    listing = job.store.put(job.name, vector)
    outcome = Outcome(tuple(fits), chosen, curve, vector, listing, model_name, job.store, job.report)
    if job.report is not None:
        write_report(job.report, outcome)
    return outcome


def _stages(progress: Progress) -> Callable[[str], Callable[[int, int], None]]:
    tasks: dict[str, Any] = {}

    def stage(name: str) -> Callable[[int, int], None]:
        def report(done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=total)
            progress.update(tasks[name], completed=done, total=total)

        return report

    return stage


def load_model(source: str, dtype: str) -> tuple[Any, Any, str]:
    """Model, tokenizer and the name that the report gives it.

    Raises:
        UsageError: nothing there that ``transformers`` can load.
        DemoModelError: the demo model's package is missing.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    path = str(ensure_demo_model()) if source == DEMO else source
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # two displays on one terminal garble each other
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    except (OSError, ValueError) as error:
        first = str(error).strip().split("\n")[0]
        raise UsageError(f"--model {source}: cannot be loaded ({first})") from error
    finally:
        if bars:
            logging.enable_progress_bar()
    name = MODEL_NAME if source == DEMO else Path(source).name if Path(source).is_dir() else source
    return model.eval(), tokenizer, name


def parse_layers(text: str | None, n_layers: int, model: str) -> list[int]:
    """``15``, ``10,15,20`` or ``all``; without it the demo's armed layers, or the layer at half depth.

    Raises:
        UsageError: not layers of this model.
    """
    if text is None:
        return list(DEMO_LAYERS) if model == DEMO else [n_layers // 2]
    if text.strip() == "all":
        return list(range(n_layers))
    layers: list[int] = []
    for part in text.split(","):
        if not part.strip().isdigit() or int(part) >= n_layers:
            raise UsageError(
                f"--layers {text}: {part.strip()!r} is not a layer; the model has 0..{n_layers - 1}, or all"
            )
        layers.append(int(part))
    return sorted(set(layers))


def fit_layers(
    job: Job,
    reader: Reader,
    parts: Split,
    groups: tuple[Sequence[int], Sequence[int]],
    stage: Callable[[str], Callable[[int, int], None]],
) -> list[LayerFit]:
    """One fit per layer of the reader."""
    examples = job.examples
    trained: list[Passage] = []
    for p, n in zip(parts.train.positive, parts.train.negative, strict=False):
        trained += [examples.positive[p], examples.negative[n]]
    medians = reader.median_norms(trained, stage("norms"))
    positive = reader.pool(examples.positive, job.pool, medians, stage("positive texts")).values
    negative = reader.pool(examples.negative, job.pool, medians, stage("negative texts")).values
    fits: list[LayerFit] = []
    report = stage("layers")
    for layer in reader.layers:
        fits.append(
            fit_layer(
                layer,
                positive[layer].numpy(),
                negative[layer].numpy(),
                parts,
                groups,
                method=job.method,
                paired=examples.paired,
                median_norm=medians[layer],
                seed=job.seed,
            )
        )
        report(len(fits), len(reader.layers))
    return fits


def provenance(
    job: Job,
    parts: Split,
    fits: Sequence[LayerFit],
    chosen: LayerFit,
    curve: DoseCurve | None,
    model_name: str,
    config_hash: str,
) -> dict[str, Any]:
    """Where the vector comes from and what is known about it: the library's ``meta``."""
    examples = job.examples
    kind = "pairs" if examples.paired else "texts"
    meta: dict[str, Any] = {
        "kind": "steering vector",
        "model": {"name": model_name, "config_sha256": config_hash, "dtype": job.dtype},
        "hook": "resid_post",
        "method": job.method,
        "pooling": job.pool,
        "layers_compared": [fit.layer for fit in fits],
        "examples": {
            "source": examples.source,
            "sha256": examples.sha256,
            "kind": kind,
            "positive": len(examples.positive),
            "negative": len(examples.negative),
        },
        "split": {
            "seed": job.seed,
            "held_out_share": HELD_OUT,
            "train": [len(parts.train.positive), len(parts.train.negative)],
            "held_out": [len(parts.held_out.positive), len(parts.held_out.negative)],
        },
        "fit": chosen.figures(),
        "dose_curve": None,
        "recommended_strength": None,
        "editserver": __version__,
        "date": datetime.now(UTC).date().isoformat(),
    }
    if curve is not None and job.trial is not None:
        columns = ("dose", "strength", "effect", "effect_error", "perplexity", "repetition", "tokens", "coherent")
        meta["recommended_strength"] = curve.recommended
        meta["dose_curve"] = {
            "prompts": len(job.trial.prompts),
            "prompts_sha256": hashlib.sha256("\n".join(job.trial.prompts).encode()).hexdigest(),
            "tokens": ["last_prompt_token", "generated"],
            "max_tokens": job.trial.max_tokens,
            "temperature": job.trial.temperature,
            "max_perplexity": curve.max_perplexity,
            "max_repetition": curve.max_repetition,
            "recommended_negative_strength": curve.recommended_negative,
            "columns": list(columns),
            "points": [[getattr(point, column) for column in columns] for point in curve.points],
        }
    plain: dict[str, Any] = rounded(meta)
    return plain


def config_sha256(config: Any) -> str:
    """sha256 of the model's configuration, without what depends on the machine or on transformers' version."""
    fields = {key: value for key, value in config.to_dict().items() if not key.startswith("_")}
    for key in ("transformers_version", "dtype", "torch_dtype"):
        fields.pop(key, None)
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()


def first_dated(vector: Vector, before: Vector | None) -> Vector:
    """``vector`` with the date of ``before`` if nothing else differs: fitting again makes no new version."""
    if before is None or "date" not in before.meta:
        return vector
    dated = replace(vector, meta={**vector.meta, "date": before.meta["date"]})
    return dated if dated.digest == before.digest else vector


def _numbers(text: str) -> list[float]:
    doses = []
    for part in text.split(","):
        try:
            dose = abs(float(part))
        except ValueError:
            raise UsageError(f"--doses {text}: {part.strip()!r} is not a number; write 0.2,0.5,1") from None
        if not math.isfinite(dose):
            raise UsageError(f"--doses {text}: {part.strip()!r} is not a finite number")
        doses.append(dose)
    return doses
