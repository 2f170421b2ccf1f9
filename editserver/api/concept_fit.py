"""The job that fits a concept: texts through the served engine, statistics, the artefact, its report, the library.

One text is in the engine at a time. It is slower than a batch, but the fit then takes at most one place of what the server
computes in a step, and the same texts give the same bits on a server that is otherwise idle: what a step computes for a text may
depend, in its last bits, on what else is in the step.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from editserver.api.concept_detector import add_detector, kept_rows, stream_of
from editserver.api.concept_plan import Evidence, Plan, Readings, patient_pass
from editserver.api.concept_report import describe, measure
from editserver.api.evidence import Seen, norm_probe, ordinary_tokens, read_all, truncated_tokens
from editserver.api.jobs import Job
from editserver.api.passes import tells_logprobs
from editserver.api.state import EditState
from interventions.concepts.fitting import Fit, fit_concept
from interventions.concepts.labelled import NEGATIVE, POSITIVE
from interventions.concepts.moments import Firings
from interventions.errors import InterventionError


async def fit(state: EditState, plan: Plan, job: Job) -> dict[str, Any]:
    """Run the plan: the job's result, ``{"concept", "report"}``.

    Raises:
        InterventionError: ``invalid_artifact`` where no latent qualifies; what a pass raises.
    """
    readings = await _read(state, plan, job)
    job.advance(len(plan.examples.prompts), "fitting")
    try:
        found = await asyncio.to_thread(_fit, state, plan, readings)
    except ValueError as error:
        if isinstance(error, InterventionError):
            raise
        raise InterventionError("invalid_artifact", str(error)) from None
    job.advance(len(plan.examples.prompts), "fitting the detector")
    concept, detection = await asyncio.to_thread(add_detector, state, plan, found.concept, readings)
    found = replace(found, concept=concept)
    report = await asyncio.to_thread(describe, state, plan, found)
    report["detector"] = detection
    report["outlier_tokens"] = int(sum((~kept).sum() for kept in readings.kept))
    texts = [text.seen for text in readings.texts]
    report["truncated_tokens"] = truncated_tokens(state, plan.sae, texts, readings.kept)
    report["held_out"] = None
    if any(plan.examples.held_out) and plan.methods:
        report["held_out"] = await measure(state, plan, found.concept, readings, job)
    listing = state.catalogue.concepts.put(plan.name, found.concept)
    job.advance(plan.total, "done")
    return {"concept": listing.as_dict(), "report": report}


async def _read(state: EditState, plan: Plan, job: Job) -> Readings:
    """The plain pass over every text."""
    other, same = plan.readout
    inspect = [read_all(state, plan.sae)] + ([] if same else [read_all(state, other)])
    probe = [norm_probe(state, plan.sae.layer)]
    told = tells_logprobs(state)
    layer = plan.sae.layer if plan.recipe is not None else None
    rows = kept_rows(state, plan)
    readings = Readings([])
    for i, prompt in enumerate(plan.examples.prompts):
        wanted = told and plan.examples.held_out[i]
        passes = await patient_pass(state, prompt, probe, inspect, prompt_logprobs=wanted, stream=layer)
        seen = Seen.of(passes, 0, plan.sae.layer)
        readout = seen if same else Seen.of(passes, 0, None, 1)
        stream = stream_of(plan, passes, len(inspect), seen, rows[i]) if layer is not None else None
        readings.texts.append(Evidence(seen, readout, passes.prompt_logprobs[0] if wanted else None, stream))
        job.advance(i + 1, "reading")
    readings.kept = ordinary_tokens(plan.sae, [text.seen for text in readings.texts])
    return readings


def _fit(state: EditState, plan: Plan, readings: Readings) -> Fit:
    examples = plan.examples
    classes = plan.token_classes
    batches = []
    for i in examples.indices(False):
        seen, kept, tokens = readings.texts[i].seen, readings.kept[i], examples.tokens[i]
        parts = [(kept, examples.labels[i])]
        if tokens is not None:
            parts = [(kept & (tokens == POSITIVE), examples.labels[i]), (kept & (tokens == NEGATIVE), len(classes) - 1)]
        batches += [firings(seen, mask, label, len(classes)) for mask, label in parts]
    return fit_concept(
        batches,
        classes,
        plan.sae.sae.n_features,
        plan.choice,
        sae_digest=plan.sae.sae.digest,
        layer=plan.sae.layer,
        model=state.model,
        fitted_on=plan.fitted_on,
    )


def firings(seen: Seen, kept: npt.NDArray[np.bool_], label: int, n_classes: int) -> Firings:
    """The ``kept`` tokens of one text."""
    inside = kept[seen.tokens]
    features, values = torch.from_numpy(seen.features[inside]), torch.from_numpy(seen.values[inside])
    return Firings.of(label, n_classes, int(kept.sum()), features, values)
