"""The strength at which an intervention has a wanted effect on the next token, measured on the served engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from editserver.api.body import read_json, validate
from editserver.api.errors import moved
from editserver.api.passes import MAX_CALIBRATION_PROMPTS, Passes, Prompt, Text, render, run
from editserver.api.state import EditState, editing
from interventions.errors import InterventionError
from interventions.fitting.strength import REFUSED, Calibration, TargetNotReached, calibrate, kl_divergence
from interventions.spec import BUILT, Remap, Rules, Steer, Suppress, parse_interventions

router = APIRouter()

EVALUATIONS = 20
TOLERANCE = 0.05
CALIBRATED_OPS = ("set", "add")
CALIBRATED_METHODS = ("app", "attenuate")
CLIENT_CLOSED = 499
"""Status for nobody: the client hung up."""


class CalibrateBody(BaseModel):
    """What is calibrated, on which prompts, to which effect."""

    model_config = ConfigDict(extra="forbid", strict=True)

    intervention: Any = Field(
        description="A steer, a remap, a suppress by app or attenuate, or an edit_features with an op set or add; its "
        "strength (value) gives sign and first guess."
    )
    prompts: Annotated[list[Text], Field(min_length=1)] = Field(
        description="Texts, or chats as lists of messages.", json_schema_extra={"maxItems": MAX_CALIBRATION_PROMPTS}
    )
    target_kl: float = Field(
        0.5, ge=1e-3, le=20, allow_inf_nan=False, description="Wanted mean of KL(clean ‖ edited), in nats."
    )


class CurvePoint(BaseModel):
    """One strength that was run; doses over the tokens where the edit fired."""

    strength: float
    kl: float
    dose_mean: float | None
    dose_max: float | None
    clamped: int = Field(description="Tokens that the server's dose limit scaled down.")


class CalibrateAnswer(CurvePoint):
    """The strength found, what it does, and everything that was measured on the way."""

    target_kl: float
    within_tolerance: bool = Field(description=f"Whether kl is within {TOLERANCE:.0%} of target_kl.")
    prompts: int
    curve: list[CurvePoint] = Field(description="By |strength|, ascending.")
    intervention: dict[str, Any] = Field(description="The intervention as given, with the strength found.")


def _body_schema() -> dict[str, Any]:
    """The body's JSON schema; the intervention types are among the OpenAPI components already."""
    schema = CalibrateBody.model_json_schema()
    types = [{"$ref": f"#/components/schemas/{model.__name__}"} for model in BUILT.values() if model is not Rules]
    schema["properties"]["intervention"]["oneOf"] = types
    return schema


@dataclass(frozen=True)
class Dial:
    """The number of an intervention that is turned: ``strength``, or ``value`` of its first set or add op.

    Attributes:
        raw: the intervention as given.
        given: that number as given; its sign is kept.
    """

    raw: dict[str, Any]
    given: float

    @classmethod
    def of(cls, raw: Any) -> Dial:
        """Validate the form of ``raw`` and find its dial.

        Raises:
            InterventionError: ``invalid_intervention``; ``param`` is a path below ``interventions``.
        """
        (spec,) = parse_interventions([raw])
        if isinstance(spec, Steer):
            if spec.mode == "cap":
                raise _invalid("mode cap has no strength to calibrate", "interventions[0].mode")
            if spec.strength == 0:
                raise _invalid("0 has no sign to keep; give the strength to start from", "interventions[0].strength")
            return cls(raw, spec.strength)
        if isinstance(spec, Suppress):
            if spec.chosen not in CALIBRATED_METHODS:
                message = f"{spec.chosen} has no strength to calibrate; {' and '.join(CALIBRATED_METHODS)} have"
                raise _invalid(message, "interventions[0].method")
            if spec.strength == 0:
                raise _invalid("0 is no strength to start from", "interventions[0].strength")
            return cls(raw, spec.strength)
        if isinstance(spec, Remap):
            if spec.strength == 0:
                raise _invalid("0 is no strength to start from", "interventions[0].strength")
            return cls(raw, spec.strength)
        if isinstance(spec, Rules):
            raise _invalid("a rule set has no strength to calibrate; its actions have", "interventions[0].type")
        values = [edit.value for edit in spec.features if edit.op in CALIBRATED_OPS and edit.value]
        if not values:
            message = "nothing to calibrate: needs an op set or add with a value other than 0, to start from"
            raise _invalid(message, "interventions[0].features")
        return cls(raw, float(values[0]))

    def at(self, strength: float) -> dict[str, Any]:
        """The intervention at ``strength``; set and add values keep their ratio to the first."""
        if self.raw.get("features") is None:
            return self.raw | {"strength": strength}
        edits = [
            edit | {"value": edit["value"] * (strength / self.given)} if edit["op"] in CALIBRATED_OPS else edit
            for edit in self.raw["features"]
        ]
        return self.raw | {"features": edits}


@router.post(
    "/v1/calibrate_strength",
    response_model=CalibrateAnswer,
    openapi_extra={"requestBody": {"content": {"application/json": {"schema": _body_schema()}}}},
)
async def calibrate_strength(request: Request) -> Any:
    """The strength at which the mean of KL(clean ‖ edited) over the prompts' next tokens reaches `target_kl`.

    The divergence is exact, over the whole vocabulary, at each prompt's last token. The edit is the one that a request
    would run, `tokens` and the server's dose limit included.
    """
    state = editing(request)
    body = validate(CalibrateBody, await read_json(request, "invalid_intervention"), "invalid_intervention")
    if len(body.prompts) > MAX_CALIBRATION_PROMPTS:
        message = f"prompts: {len(body.prompts)} prompts; this server allows {MAX_CALIBRATION_PROMPTS}"
        raise InterventionError("limit_exceeded", message, "prompts")
    try:
        dial = Dial.of(body.intervention)
        prompts = await render(state, body.prompts, "prompts", "invalid_intervention")
        measurement = Measurement(state, dial, prompts, request)
        found = await measurement.search(body.target_kl)
    except InterventionError as error:
        raise _placed(error) from None
    except ClientClosed:
        return Response(status_code=CLIENT_CLOSED)
    points = {point.strength: point for point in measurement.points}
    sign = math.copysign(1.0, dial.given)
    best = points[sign * found.strength]
    return CalibrateAnswer(
        **best.model_dump(),
        target_kl=body.target_kl,
        within_tolerance=found.converged,
        prompts=len(prompts),
        curve=sorted(measurement.points, key=lambda point: abs(point.strength)),
        intervention=dial.at(best.strength),
    )


class ClientClosed(Exception):
    """The client hung up between two measurements."""


class Measurement:
    """Runs an intervention at one strength after another, on the same prompts.

    Attributes:
        points: what ran so far.
    """

    def __init__(self, state: EditState, dial: Dial, prompts: Sequence[Prompt], request: Request) -> None:
        self.points: list[CurvePoint] = []
        self._state, self._dial, self._prompts, self._request = state, dial, prompts, request
        self._clean: list[Any] = []
        self._sign = math.copysign(1.0, dial.given)
        self._refusal: InterventionError | None = None

    async def search(self, target: float) -> Calibration:
        """Find the strength.

        Raises:
            InterventionError: the target cannot be reached, or the intervention cannot run at all.
            ClientClosed: nobody waits for the answer.
        """
        first = self._dial.at(self._dial.given)
        await run(self._state, self._prompts[:0], [first])  # refuses what no strength could mend, before anything runs
        self._clean = (await run(self._state, self._prompts, logprobs=True)).logprobs
        try:
            return await calibrate(
                self._kl, target, start=abs(self._dial.given), tolerance=TOLERANCE, evaluations=EVALUATIONS
            )
        except TargetNotReached as error:
            raise self._unreached(error, target) from None

    async def _kl(self, strength: float) -> float:
        if await self._request.is_disconnected():
            raise ClientClosed
        signed = self._sign * strength
        try:
            passes = await run(self._state, self._prompts, [self._dial.at(signed)], logprobs=True)
        except InterventionError as error:
            if error.code != "dose_exceeded":
                raise
            self._refusal = error
            return REFUSED
        if passes.edit.compiled.entries[0].noop:
            raise _invalid("changes nothing: its vector is zero", "interventions[0]")
        kl = float(np.mean([kl_divergence(p, q) for p, q in zip(self._clean, passes.logprobs, strict=True)]))
        if math.isfinite(kl):
            self.points.append(_point(signed, kl, passes))
        return kl

    def _unreached(self, error: TargetNotReached, target: float) -> InterventionError:
        nearest = error.nearest
        if nearest is None:
            return self._refusal or _invalid("no strength has a finite effect", "interventions[0]")
        point = next(p for p in self.points if p.strength == self._sign * nearest.strength)
        where = f"{point.kl:.3g} at strength {point.strength:g}"
        if error.above:
            return _invalid(
                f"the edit acts however small its strength; the smallest KL reached is {where}", "target_kl"
            )
        message = f"a KL of {target:g} is not reached; the largest is {where}"
        maximum = self._state.catalogue.max_dose
        if self._refusal is not None:
            message += f" (above it the server refuses doses over {maximum:g})"
        elif point.clamped:
            message += f" ({point.clamped} tokens were scaled down there to the server's largest dose, {maximum:g})"
        else:
            return _invalid(message, "target_kl")
        return InterventionError("dose_exceeded", f"target_kl: {message}", "target_kl")


def _point(strength: float, kl: float, passes: Passes) -> CurvePoint:
    entry = passes.edit.compiled.entries[0]
    stats = []
    for choice in passes.choices:
        assert choice.journal is not None
        stats += [choice.journal.stats(0, layer, choice.fed) for layer in entry.layers]
    fired = sum(one.fired for one in stats)
    mean = sum(one.fired * one.dose_mean for one in stats) / max(1, fired)
    largest = max(one.dose_max for one in stats)
    clamped = sum(one.clamped for one in stats)
    return CurvePoint(strength=strength, kl=kl, dose_mean=_finite(mean), dose_max=_finite(largest), clamped=clamped)


def _finite(value: float) -> float | None:
    """JSON has no infinity: a dose beyond float32 is null."""
    return round(value, 6) if math.isfinite(value) else None


def _invalid(message: str, param: str) -> InterventionError:
    return InterventionError("invalid_intervention", f"{param}: {message}", param)


def _placed(error: InterventionError) -> InterventionError:
    """Here the one intervention stands under its own name."""
    param = error.param
    for listed in ("interventions[0]", "interventions"):
        if param is not None and param.startswith(listed):
            param = "intervention" + param.removeprefix(listed)
            break
    message = error.message.replace("interventions[0]", "intervention")
    return moved(error, message, param)
