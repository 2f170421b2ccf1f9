"""Which features of an SAE separate positive from negative texts, measured on the served engine."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from editserver.api.body import read_json, validate
from editserver.api.errors import moved, not_found
from editserver.api.evidence import Floats, Seen, norm_probe, ordinary_tokens, read_all, truncated_tokens
from editserver.api.passes import MAX_CONTRAST_TEXTS, Passes, Text, render, run
from editserver.api.state import EditState, editing
from editserver.catalogue import ServedSAE
from interventions.errors import InterventionError
from interventions.fitting.separation import auroc_columns

router = APIRouter()

SCORE_NAME = "difference_of_means"
MAX_LIMIT = 1000
Texts = Annotated[list[Text], Field(min_length=1)]


class ContrastBody(BaseModel):
    """Two sets of texts, and how their features are compared."""

    model_config = ConfigDict(extra="forbid", strict=True)

    positive: Texts = Field(
        description="Texts (or chats: lists of messages) that have what is looked for.",
        json_schema_extra={"maxItems": MAX_CONTRAST_TEXTS},
    )
    negative: Texts = Field(
        description="Texts or chats that do not, alike in every other way.",
        json_schema_extra={"maxItems": MAX_CONTRAST_TEXTS},
    )
    limit: int = Field(10, ge=1, le=MAX_LIMIT, description="How many features, best first.")
    pool: Literal["max", "mean"] = Field("max", description="How a text's tokens become one number per feature.")
    max_density: float = Field(
        0.5, gt=0, le=1, allow_inf_nan=False, description="Features that fire on a larger share of tokens are left out."
    )


class ContrastFeature(BaseModel):
    """One feature.

    ``score`` = (mean_positive − mean_negative) / the largest activation that is known or was seen here.
    """

    index: int
    label: str | None
    score: float
    auroc: float
    auroc_interval: list[float] = Field(description="95 %, over texts.")
    density: float = Field(description="Share of tokens on which it fires: as known, else in the texts given.")
    mean_positive: float = Field(description="Mean over the positive texts of the pooled activation.")
    mean_negative: float


class ContrastAnswer(BaseModel):
    """Features by score, the best first."""

    score_name: str
    pool: str
    data: list[ContrastFeature]
    tokens: int = Field(description="Tokens that were judged.")
    outlier_tokens: int = Field(description="Tokens left out because their norm is no ordinary token's.")
    truncated_tokens: int = Field(description="Tokens with more active features than are reported; the smallest miss.")


@router.post(
    "/v1/saes/{sae_id:path}/contrast",
    openapi_extra={"requestBody": {"content": {"application/json": {"schema": ContrastBody.model_json_schema()}}}},
)
async def contrast(request: Request, sae_id: str) -> ContrastAnswer:
    """Features that separate `positive` from `negative` texts: difference of means, AUROC with its interval, density.

    Per text and feature the activations of the prompt's tokens are pooled; position 0 and outlier tokens do not count.
    """
    state = editing(request)
    try:
        sae = state.catalogue.sae(sae_id)
    except InterventionError as error:
        raise not_found(error) from None
    body = validate(ContrastBody, await read_json(request, "invalid_inspection"), "invalid_inspection")
    for field, texts in (("positive", body.positive), ("negative", body.negative)):
        if len(texts) > MAX_CONTRAST_TEXTS:
            message = f"{field}: {len(texts)} texts; this server allows {MAX_CONTRAST_TEXTS}"
            raise InterventionError("limit_exceeded", message, field)
    if not sae.full_encode:
        message = f"contrast looks at all features; start the server with --full-encode {sae.id}"
        raise InterventionError("invalid_inspection", f"{message} ({sae.sae.architecture} SAE)", None)
    prompts = await render(state, body.positive, "positive", "invalid_inspection")
    prompts += await render(state, body.negative, "negative", "invalid_inspection")
    for prompt in prompts:
        if len(prompt.token_ids) < 2:
            message = f"{prompt.param}: has one token only; the first token is never evidence"
            raise InterventionError("invalid_inspection", message, prompt.param)
    try:
        passes = await run(state, prompts, [norm_probe(state, sae.layer)], read_all(state, sae))
    except InterventionError as error:  # of fields that this request does not have
        raise moved(error, error.message, None) from None
    return await asyncio.to_thread(_compare, state, sae, body, passes)


def _compare(state: EditState, sae: ServedSAE, body: ContrastBody, passes: Passes) -> ContrastAnswer:
    texts = [Seen.of(passes, i, sae.layer) for i in range(len(passes.choices))]
    ordinary = ordinary_tokens(sae, texts)
    columns = np.unique(np.concatenate([text.features for text in texts]))
    pooled = np.zeros((len(texts), len(columns)))
    firing = np.zeros(len(columns))
    for i, (text, kept) in enumerate(zip(texts, ordinary, strict=True)):
        pooled[i], counts = _pool(text, kept, columns, body.pool)
        firing += counts
    n_tokens = int(sum(kept.sum() for kept in ordinary))
    return ContrastAnswer(
        score_name=SCORE_NAME,
        pool=body.pool,
        data=_ranked(state, sae, body, columns, pooled, firing / max(1, n_tokens)),
        tokens=n_tokens,
        outlier_tokens=int(sum((~kept).sum() for kept in ordinary)),
        truncated_tokens=truncated_tokens(state, sae, texts, ordinary),
    )


def _pool(text: Seen, kept: npt.NDArray[np.bool_], columns: npt.NDArray[np.int64], pool: str) -> tuple[Floats, Floats]:
    """One text as ``(pooled activations, number of tokens on which each fires)``, both ``[columns]``."""
    pooled, counts = np.zeros(len(columns)), np.zeros(len(columns))
    inside = kept[text.tokens]
    at, values = np.searchsorted(columns, text.features[inside]), text.values[inside]
    np.add.at(counts, at, values != 0)
    if pool == "mean":
        np.add.at(pooled, at, values / max(1, int(kept.sum())))
        return pooled, counts
    pooled[:] = -np.inf
    np.maximum.at(pooled, at, values)
    silent = counts < kept.sum()  # on some token it is 0, which may be the largest of a signed feature
    pooled[silent] = np.maximum(pooled[silent], 0.0)
    return np.where(np.isfinite(pooled), pooled, 0.0), counts


def _ranked(
    state: EditState,
    sae: ServedSAE,
    body: ContrastBody,
    columns: npt.NDArray[np.int64],
    pooled: Floats,
    firing: Floats,
) -> list[ContrastFeature]:
    knowledge = state.knowledge(sae.id)
    facts = [knowledge.listing(int(index)) for index in columns]
    density = np.array([d if (d := fact["density"]) is not None else f for fact, f in zip(facts, firing, strict=True)])
    known = np.array([m if (m := fact["max_activation"]) is not None else 0.0 for fact in facts])
    kept = density <= body.max_density
    columns, pooled, density = columns[kept], pooled[:, kept], density[kept]
    if not len(columns):
        return []
    n = len(body.positive)
    unit = np.maximum(known[kept], np.abs(pooled).max(axis=0))
    means = pooled[:n].mean(axis=0), pooled[n:].mean(axis=0)
    score = (means[0] - means[1]) / np.where(unit > 0, unit, 1.0)
    value, low, high = auroc_columns(pooled[:n], pooled[n:])
    best = np.lexsort((columns, -value, -score))[: body.limit]
    labels = knowledge.labels
    return [
        ContrastFeature(
            index=int(columns[j]),
            label=labels.get(int(columns[j])),
            score=float(score[j]),
            auroc=float(value[j]),
            auroc_interval=[float(low[j]), float(high[j])],
            density=float(density[j]),
            mean_positive=float(means[0][j]),
            mean_negative=float(means[1][j]),
        )
        for j in best
    ]
