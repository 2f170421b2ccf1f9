"""Fitting concepts to labelled texts, as a job."""

from __future__ import annotations

import asyncio
import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from editserver import __version__
from editserver.api.body import read_json, validate
from editserver.api.concept_fit import fit
from editserver.api.concept_labels import MAX_WORDS, Labelling, Marked, MarkedText, TokenLabels, as_marked
from editserver.api.concept_plan import UNLABELLED, Examples, Plan
from editserver.api.concept_report import readout
from editserver.api.errors import moved
from editserver.api.evidence import read_all
from editserver.api.passes import (
    MAX_FIT_CLASSES,
    MAX_FIT_TEXTS,
    MAX_FIT_TOKENS,
    Prompt,
    render,
    shortened,
    with_stream,
)
from editserver.api.state import EditState, editing
from editserver.catalogue import ServedSAE
from editserver.library import NAME
from interventions.compiled import Compiled
from interventions.concepts.concept import MAX_NAME
from interventions.concepts.density import N_BINS, SMOOTHING
from interventions.concepts.detection import TOP as DETECTOR_TOP
from interventions.concepts.detection import Recipe
from interventions.concepts.fitting import Choice
from interventions.concepts.salient import MAX_RATE, TOP
from interventions.concepts.tree import MAX_DEPTH
from interventions.errors import InterventionError
from interventions.rules.proposition import MAX_FEATURES
from interventions.spec import parse_inspect
from interventions.suppression import max_bins
from interventions.wording import choices, nearest, show

router = APIRouter()

BACKGROUND = "background"
"""Class of the texts given as ``background``."""
STRENGTHS = (1.0, 2.0, 3.0)
TOKENS_PER_TEXT = 256
MAX_STRENGTHS = 8


class FitConceptBody(BaseModel):
    """Labelled texts, which class is taken away, and how its latents are chosen."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(description="The concept's name in the library.")
    sae: str = Field(description="SAE in whose latents it is fitted (needs the full encode).")
    concepts: dict[str, Annotated[list[MarkedText], Field(min_length=1)]] = Field(
        description=f"Class → its texts, or chats as lists of messages; at most {MAX_FIT_TEXTS} in all. Where `labels` is "
        "position, those of the target are objects with places in them.",
        min_length=1,
        json_schema_extra={"maxProperties": MAX_FIT_CLASSES},
    )
    target: str = Field(description="The class that the concept takes away.")
    background: Any = Field(
        None,
        description="Ordinary text: texts, which become a class of their own, or the name of one of `concepts`. It says which "
        "latents are dense, and keeps text outside the other classes from being forced into one of them.",
        json_schema_extra={"anyOf": [{"type": "string"}, {"type": "array"}, {"type": "null"}]},
    )
    top: int = Field(TOP, ge=1, description="Latents of the concept, the best first; fewer if fewer qualify.")
    by: Literal["difference", "mean", "separability"] = Field(
        "difference",
        description="Score of a latent: its mean activation on the target less that on the other classes; its mean activation; "
        "or the Jensen-Shannon distance between the target and the others.",
    )
    max_rate: float | None = Field(
        MAX_RATE,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="Latents that fire on a larger share of background tokens are dense and left out; null keeps them.",
    )
    bins: int = Field(N_BINS, ge=2, description="Bins of a density; at most d_model − 3.")
    priors: dict[str, float] | None = Field(None, description="Class → weight in P(class | a); uniform by default.")
    held_out: float = Field(
        0.2,
        ge=0,
        lt=1,
        allow_inf_nan=False,
        description="Share of each class's texts kept for the report; 0: no report.",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Of the choice of held-out texts.")
    strengths: Annotated[list[float], Field(min_length=1, max_length=MAX_STRENGTHS)] = Field(
        list(STRENGTHS), description="Strengths of method app in the report."
    )
    tokens_per_text: int = Field(TOKENS_PER_TEXT, ge=2, description="Longer texts are read up to there.")
    labels: Literal["sentence", "word", "position"] = Field(
        "sentence",
        description="What of the target's texts is of the concept: all of their tokens, those of `words`, or those at places.",
    )
    words: Annotated[list[str], Field(max_length=MAX_WORDS)] | None = Field(
        None, description="Words and phrases that are labelled in the target's texts, whatever their case."
    )
    span_tokens: Literal["last", "all"] | None = Field(
        None,
        description="Which tokens of a word or span are labelled; the last one of a word by default, all of a span.",
    )
    detector: Literal["auto", "single", "multi", "relation"] | None = Field(
        "auto",
        description="How rules tell that the concept is present: by one latent, a weighted sum, or a decision tree; auto "
        "takes what does best on held-out folds; null: not at all.",
    )
    detector_top: int = Field(
        DETECTOR_TOP, ge=1, le=MAX_FEATURES, description="Latents that a detector may choose from."
    )
    detector_weights: Literal["difference", "log_decay"] = Field(
        "difference",
        description="Of a weighted sum: (difference of means)/σ², or 1 − ln(i + 1)/ln(k + 1) by rank i.",
    )
    tree_depth: int = Field(MAX_DEPTH, ge=1, le=MAX_DEPTH, description="Of a tree, at most.")


class FitAnswer(BaseModel):
    """The job that fits; GET /v1/jobs/{job} tells how far it is."""

    job: str


@router.post(
    "/v1/concepts/fit",
    status_code=202,
    response_model=FitAnswer,
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": FitConceptBody.model_json_schema()}},
        }
    },
)
async def fit_concept(request: Request) -> Any:
    """Fit a concept to labelled texts in the background and put it into the library.

    The job's `result` is `{"concept": {"name", "kind", "version", "digest"}, "report": {…}}`. Texts are read through the served
    engine, one at a time and at low priority. Position 0 and tokens of an extraordinary norm are no evidence.
    """
    state = editing(request)
    state.jobs.check_room()
    body = validate(FitConceptBody, await read_json(request, "invalid_artifact"), "invalid_artifact")
    plan = await _plan(state, body)
    job = state.jobs.submit("concept", plan.name, plan.total, lambda job: fit(state, plan, job))
    return {"job": job.id}


async def _plan(state: EditState, body: FitConceptBody) -> Plan:
    """Everything checked, texts tokenised.

    Raises:
        InterventionError: with the field.
    """
    if not NAME.fullmatch(body.name):
        raise _bad("name", f"{show(body.name)} is not a name: letters, digits, '.', '_', '-', at most 128")
    sae = _dictionary(state, body.sae)
    classes, texts, background = _classes(body)
    if body.target not in classes:
        raise _bad(
            "target",
            f"{show(body.target)} is not a class; there are {choices(classes)}.{nearest(body.target, classes)}",
        )
    if body.target == background:
        raise _bad("background", f"{show(background)} is the target itself")
    labelling = _labelling(body, classes, texts)
    _check_limits(state, body, sae, classes, texts)
    _check_priors(body.priors, [*classes, UNLABELLED] if labelling.by_token else classes)
    prompts, labels = list[Prompt](), list[int]()
    marked: list[Marked | None] = []
    for label, name in enumerate(classes):
        param = (
            BACKGROUND if body.background and name == BACKGROUND and name not in body.concepts else f"concepts.{name}"
        )
        rendered = await render(state, [one.text for one in texts[label]], param, "invalid_artifact")
        short = [shortened(prompt, body.tokens_per_text) for prompt in rendered]
        prompts += short
        labels += [label] * len(rendered)
        marked += texts[label] if labelling.by_token and name == body.target else [None] * len(short)
    _check_prompts(prompts)
    tokens = await asyncio.to_thread(_token_labels, labelling, state.catalogue.tokenizer, prompts, marked)
    examples = Examples(tuple(classes), prompts, labels, _held_out(labels, body), tokens)
    choice = Choice(body.target, background, body.by, body.top, body.max_rate, body.bins, body.priors)
    provenance = _provenance(state, body, sae, examples, texts)
    recipe = None
    if body.detector is not None:
        level: Literal["token", "text"] = "token" if labelling.by_token else "text"
        weights, depth = body.detector_weights, body.tree_depth
        recipe = Recipe(body.detector, level, body.detector_top, weights, depth, body.max_rate)
        _check_stream(state, sae)
    reads = readout(state, sae)
    return Plan(body.name, sae, reads, examples, choice, tuple(body.strengths), labelling, recipe, provenance)


def _check_stream(state: EditState, sae: ServedSAE) -> None:
    """A detector is judged beside a probe of the residual stream."""
    try:
        with_stream(state, Compiled(None, ()), sae.layer)
    except InterventionError as error:
        raise moved(error, f"detector: {error.message}; null fits a concept without one", "detector") from None


def _token_labels(
    labelling: Labelling, tokenizer: Any, prompts: Sequence[Prompt], marked: Sequence[Marked | None]
) -> list[TokenLabels | None]:
    if not labelling.by_token:
        return [None] * len(prompts)
    # A fast tokenizer is one thread's; this one is the requests'.
    own = copy.deepcopy(tokenizer)
    pairs = zip(prompts, marked, strict=True)
    return [None if given is None else labelling.of(own, prompt, given) for prompt, given in pairs]


def _labelling(body: FitConceptBody, classes: Sequence[str], texts: Sequence[Sequence[Marked]]) -> Labelling:
    words = tuple(body.words or ())
    if body.labels == "word" and not words:
        raise _bad("words", "labels is word: which ones?")
    if body.labels != "word" and words:
        raise _bad("words", f"goes with labels word; labels is {body.labels}")
    for i, word in enumerate(words):
        if not word.strip() or len(word) > MAX_NAME:
            raise _bad(f"words[{i}]", f"expected 1 to {MAX_NAME} characters, got {show(word)}")
    for name, given in zip(classes, texts, strict=True):
        for i, one in enumerate(given):
            if (one.spans or one.positions) and (body.labels != "position" or name != body.target):
                where = f"concepts.{name}[{i}]"
                raise _bad(where, "places are labelled in texts of the target, where labels is position")
    if body.labels != "sentence" and UNLABELLED in classes:
        raise _bad("concepts", f"{show(UNLABELLED)} is the class of the tokens that no label names")
    return Labelling(body.labels, words, body.span_tokens or ("last" if body.labels == "word" else "all"))


def _dictionary(state: EditState, name: str) -> ServedSAE:
    try:
        sae = state.catalogue.sae(name)
    except InterventionError as error:
        raise InterventionError("unknown_sae", f"sae: {error.message}", "sae") from None
    if not sae.full_encode:
        message = f"a fit looks at all latents; start the server with --full-encode {sae.id}"
        raise _bad("sae", f"{message} ({sae.sae.architecture} SAE)")
    if sae.sae.signed:
        message = (
            f"the latents of {sae.id} ({sae.sae.architecture}) may be negative; densities are of positive activations"
        )
        raise _bad("sae", message)
    try:
        state.compile([], parse_inspect(read_all(state, sae)))
    except InterventionError as error:
        raise moved(error, f"sae: {error.message}", "sae") from None
    return sae


def _classes(body: FitConceptBody) -> tuple[list[str], list[list[Marked]], str | None]:
    """Names of the classes, the texts of each, and which one is the background."""
    classes, texts = list(body.concepts), [list(given) for given in body.concepts.values()]
    for name in classes:
        if not 0 < len(name) <= MAX_NAME:
            raise _bad("concepts", f"{show(name)} is no name of a class: 1 to {MAX_NAME} characters")
    background = body.background
    if isinstance(background, str):
        if background not in classes:
            message = f"{show(background)} is not a class; there are {choices(classes)}.{nearest(background, classes)}"
            raise _bad("background", f"{message} Texts are given as a list")
        return classes, texts, background
    if background is None:
        return classes, texts, None
    if not isinstance(background, list) or not background:
        raise _bad("background", f"expected texts, or the name of a class; got {show(background)}")
    if BACKGROUND in classes:
        raise _bad("background", f"{show(BACKGROUND)} is one of concepts already; name it, instead of giving texts")
    ordinary = []
    for i, text in enumerate(background):
        try:
            ordinary.append(as_marked(text))
        except ValueError as error:
            raise _bad(f"background[{i}]", str(error)) from None
    return [*classes, BACKGROUND], [*texts, ordinary], BACKGROUND


def _check_limits(
    state: EditState, body: FitConceptBody, sae: ServedSAE, classes: Sequence[str], texts: Sequence[Sequence[Marked]]
) -> None:
    if len(classes) < 2 and body.labels == "sentence":
        raise _bad("concepts", "one class has nothing to differ from; give another one, or texts as background")
    rows = min(state.catalogue.limits.rows, state.config.bank_rows) // 2
    bins = max_bins(state.catalogue.d_model)
    n_texts = sum(map(len, texts))
    checks = (
        ("concepts", len(classes), MAX_FIT_CLASSES, "classes"),
        ("concepts", n_texts, MAX_FIT_TEXTS, "texts in all"),
        ("top", body.top, min(rows, state.most_latents(sae)), "latents (under app each takes two rows of limits.rows)"),
        ("bins", body.bins, bins, "bins (d_model − 3)"),
    )
    for field, given, allowed, what in checks:
        if given > allowed:
            raise InterventionError("limit_exceeded", f"{field}: {given}; this server allows {allowed} {what}", field)
    for i, strength in enumerate(body.strengths):
        if not 0 < strength <= 1000:
            raise _bad(f"strengths[{i}]", f"expected a number above 0, at most 1000, got {show(strength)}")
    for name, examples in zip(classes, texts, strict=True):
        if body.held_out > 0 and len(examples) < 2:
            field = f"concepts.{name}" if name in body.concepts else BACKGROUND
            raise _bad(field, "one text cannot be both fitted and held out; give more, or held_out 0")


def _check_priors(priors: Mapping[str, float] | None, classes: Sequence[str]) -> None:
    if priors is None:
        return
    for name in priors:
        if name not in classes:
            raise _bad("priors", f"{show(name)} is not a class; there are {choices(classes)}.{nearest(name, classes)}")
    missing = [name for name in classes if name not in priors]
    if missing:
        raise _bad("priors", f"expected a weight for each class; {choices(missing)} has none")
    weights = list(priors.values())
    if not all(np.isfinite(weight) and weight >= 0 for weight in weights) or not 0 < sum(weights) < float("inf"):
        raise _bad("priors", f"expected finite weights ≥ 0, not all zero, got {weights}")


def _check_prompts(prompts: Sequence[Prompt]) -> None:
    for prompt in prompts:
        if len(prompt.token_ids) < 2:
            raise _bad(prompt.param, "has one token only; the first token is never evidence")
    tokens = sum(len(prompt.token_ids) for prompt in prompts)
    if tokens > MAX_FIT_TOKENS:
        message = f"concepts: {tokens} tokens; this server allows {MAX_FIT_TOKENS} in one fit (fewer texts, or tokens_per_text)"
        raise InterventionError("limit_exceeded", message, "concepts")


def _held_out(labels: Sequence[int], body: FitConceptBody) -> list[bool]:
    """The held-out share of each class, at least one text and not all, drawn by ``seed``."""
    held = np.zeros(len(labels), bool)
    for label in sorted(set(labels)) if body.held_out > 0 else ():
        here = np.flatnonzero(np.array(labels) == label)
        count = min(max(1, round(body.held_out * len(here))), len(here) - 1)
        held[np.random.default_rng([body.seed, label]).permutation(here)[:count]] = True
    return [bool(one) for one in held]


def _provenance(
    state: EditState, body: FitConceptBody, sae: ServedSAE, examples: Examples, texts: Sequence[Sequence[Marked]]
) -> dict[str, Any]:
    """What the concept was fitted on: no clock and no path in it, so that equal requests give equal concepts."""
    kept = examples.indices(False)
    words = {"words": {"count": len(body.words), "sha256": _sha256(body.words)}} if body.words else {}
    return words | {
        "editserver": __version__,
        "vllm": state.vllm_version,
        "sae": sae.id,
        "classes": {
            name: {
                "texts": len(texts[label]),
                "fitted": sum(examples.labels[i] == label for i in kept),
                "sha256": _sha256([one.as_json() for one in texts[label]]),
            }
            for label, name in enumerate(examples.classes)
        },
        "settings": {
            "top": body.top,
            "bins": body.bins,
            "smoothing": SMOOTHING,
            "held_out": body.held_out,
            "seed": body.seed,
            "tokens_per_text": body.tokens_per_text,
        },
    }


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _bad(param: str, message: str) -> InterventionError:
    return InterventionError("invalid_artifact", f"{param}: {message}", param)
