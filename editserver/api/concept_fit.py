"""The job that fits a concept: texts through the served engine, statistics, the artefact, its report, the library.

One text is in the engine at a time. It is slower than a batch, but the fit then takes at most one place of what the server
computes in a step, and the same texts give the same bits on a server that is otherwise idle: what a step computes for a text may
depend, in its last bits, on what else is in the step.
"""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from editserver.api.concept_plan import Evidence, Plan, Readings, patient_pass
from editserver.api.concept_report import describe, measure
from editserver.api.evidence import Seen, norm_probe, ordinary_tokens, read_all, truncated_tokens
from editserver.api.jobs import Job
from editserver.api.passes import tells_logprobs
from editserver.api.state import EditState
from interventions.concepts.fitting import Fit, fit_concept
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
    report = await asyncio.to_thread(describe, state, plan, found)
    report["outlier_tokens"] = int(sum((~kept).sum() for kept in readings.kept))
    texts = [text.seen for text in readings.texts]
    report["truncated_tokens"] = truncated_tokens(state, plan.sae, texts, readings.kept)
    report["held_out"] = None
    if any(plan.examples.held_out):
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
    readings = Readings([])
    for i, prompt in enumerate(plan.examples.prompts):
        wanted = told and plan.examples.held_out[i]
        passes = await patient_pass(state, prompt, probe, inspect, prompt_logprobs=wanted)
        seen = Seen.of(passes, 0, plan.sae.layer)
        readout = seen if same else Seen.of(passes, 0, None, 1)
        readings.texts.append(Evidence(seen, readout, passes.prompt_logprobs[0] if wanted else None))
        job.advance(i + 1, "reading")
    readings.kept = ordinary_tokens(plan.sae, [text.seen for text in readings.texts])
    return readings


def _fit(state: EditState, plan: Plan, readings: Readings) -> Fit:
    examples = plan.examples
    k = len(examples.classes)
    batches = [
        firings(readings.texts[i].seen, readings.kept[i], examples.labels[i], k) for i in examples.indices(False)
    ]
    return fit_concept(
        batches,
        examples.classes,
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
