"""What a request may say: the models of ``interventions`` and ``inspect``, and the two functions that read them.

Only form is checked here (types, ranges, which fields go together); names, layers, dimensions and limits need to know
the server and are checked by :mod:`interventions.compile`. Anything that is not right raises
:class:`~interventions.errors.InterventionError` whose ``param`` is the path of the field.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PrivateAttr, ValidationError, model_validator

from interventions.errors import Code, InterventionError
from interventions.fields import (
    ALL_TOKENS,
    Flag,
    Integer,
    Integers,
    Name,
    Number,
    Tokens,
    Values,
    fault,
    one_of,
)
from interventions.items import Common, Item, first_fault, join
from interventions.remap_spec import Remap
from interventions.rules_spec import Rules
from interventions.suppress_spec import InlineConcept, Suppress
from interventions.wording import choices, nearest, printable, show

__all__ = [
    "BUILT",
    "EditFeatures",
    "FeatureEdit",
    "InlineConcept",
    "Inspect",
    "Intervention",
    "InterventionSpec",
    "Remap",
    "Rules",
    "Steer",
    "Suppress",
    "join",
    "parse_inspect",
    "parse_interventions",
    "schemas",
]

MODES = ("add", "normalized", "project_out", "cap")
OPS = ("set", "scale", "add", "clamp", "ablate")


class Steer(Common):
    """Adds, projects out or caps along a direction.

    The direction v is a library vector, given ``values``, or the decoder row of an SAE feature. ``add``: h + s·v.
    ``normalized``: h + s·‖h‖·v̂. ``project_out``: h − s·(h·v̂)v̂. ``cap``: h·v̂ clamped into [``min``, ``max``].
    """

    type: Literal["steer"] = Field("steer", description="Kind of intervention.")
    vector: Name | None = Field(None, description="Name of a library vector; it brings its layers.")
    values: Values | None = Field(
        None, description="The vector itself: d_model numbers, one such list per layer, or base64."
    )
    sae: Name | None = Field(None, description="SAE id; with `feature`.")
    feature: Integer | None = Field(
        None, description="Index of the feature whose decoder row is the vector (not normalised)."
    )
    layer: Integer | None = Field(None, description="Decoder layer (0-based); only with `values`.")
    layers: Integers | None = Field(None, description="Several decoder layers; only with `values`.")
    strength: Number = Field(1.0, description="Factor s; not with mode cap.")
    mode: Annotated[Literal["add", "normalized", "project_out", "cap"], BeforeValidator(one_of(*MODES))] = Field(
        "add", description="What is done along the vector."
    )
    min: Number | None = Field(None, description="Lower bound of h·v̂; only with mode cap.")
    max: Number | None = Field(None, description="Upper bound of h·v̂; only with mode cap.")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.given("sae") and not self.given("feature"):
            raise fault("is required with sae: the index of the feature to steer along", "feature")
        if self.given("feature") and not self.given("sae"):
            raise fault("is required with feature: the id of the SAE", "sae")
        sources = [name for name in ("vector", "values", "feature") if self.given(name)]
        if len(sources) != 1:
            have = f"got {' and '.join(sources)}" if sources else "got none"
            raise fault(f"needs exactly one of vector, values, sae with feature; {have}")
        placed = [name for name in ("layer", "layers") if self.given(name)]
        if sources == ["values"]:
            if len(placed) != 1:
                have = "both" if placed else "none"
                raise fault(f"values need exactly one of layer and layers; got {have}", "layer")
        elif placed:
            own = {
                "vector": "a library vector has its own layers",
                "feature": "a feature is written at its SAE's layer",
            }
            raise fault(f"goes with values only: {own[sources[0]]}", placed[0])
        return self

    @model_validator(mode="after")
    def _mode_fields(self) -> Self:
        if self.mode == "cap":
            if self.given("strength"):
                raise fault("does not go with mode cap, which has min and max", "strength")
            if self.min is None and self.max is None:
                raise fault("mode cap needs min or max or both", "min")
            _ordered(self.min, self.max)
        else:
            for name in ("min", "max"):
                if self.given(name):
                    raise fault(f"goes with mode cap only, not with {self.mode}", name)
        return self


class FeatureEdit(Item):
    """One op on one latent: with a the activation, ``set``: value. ``scale``: value·a. ``add``: a + value.

    ``clamp``: min(max(a, ``min``), ``max``). ``ablate``: 0.
    """

    index: Integer = Field(description="Index of the latent.")
    op: Annotated[Literal["set", "scale", "add", "clamp", "ablate"], BeforeValidator(one_of(*OPS))] = Field(
        description="What happens to its activation."
    )
    value: Number | None = Field(None, description="Operand of set, scale and add.")
    min: Number | None = Field(None, description="Lower bound of clamp; above 0 it wakes the latent.")
    max: Number | None = Field(None, description="Upper bound of clamp.")
    only_if_active: Flag = Field(False, description="Act only on tokens where the latent is not 0.")

    @model_validator(mode="after")
    def _op_fields(self) -> Self:
        takes_value = self.op in ("set", "scale", "add")
        if takes_value and self.value is None:
            raise fault(f"is required by op {self.op}", "value")
        if not takes_value and self.given("value"):
            raise fault(f"does not go with op {self.op}", "value")
        if self.op == "clamp":
            if self.min is None and self.max is None:
                raise fault("op clamp needs min or max or both", "min")
            _ordered(self.min, self.max)
        else:
            for name in ("min", "max"):
                if self.given(name):
                    raise fault(f"goes with op clamp only, not with {self.op}", name)
        return self


def _ordered(low: float | None, high: float | None) -> None:
    if low is not None and high is not None and low > high:
        raise fault(f"min {low:g} is above max {high:g}", "min")


def _feature_list(value: Any) -> Any:
    if not isinstance(value, list):
        raise fault(f"expected a list of feature edits, got {show(value)}")
    if not value:
        raise fault("the list is empty; name at least one feature")
    return value


class EditFeatures(Common):
    """Edits latents of one SAE; the SAE's reconstruction error is preserved: h + decode(z') − decode(z)."""

    type: Literal["edit_features"] = Field("edit_features", description="Kind of intervention.")
    sae: Name = Field(description="SAE id.")
    features: Annotated[list[FeatureEdit], BeforeValidator(_feature_list)] = Field(
        description="The edits; each index once.", json_schema_extra={"minItems": 1}
    )

    @model_validator(mode="after")
    def _each_index_once(self) -> Self:
        seen: dict[int, int] = {}
        for i, edit in enumerate(self.features):
            first = seen.setdefault(edit.index, i)
            if first != i:
                raise fault(f"{show(edit.index)} is already edited by features[{first}]", "features", i, "index")
        return self


class Inspect(Item):
    """Asks for the activations of one SAE: listed features always, ``top_k`` the largest non-zero ones."""

    _param: str = PrivateAttr("inspect")

    sae: Name = Field(description="SAE id.")
    top_k: Integer = Field(0, description="How many of the largest activations by magnitude (needs the full encode).")
    features: Integers | None = Field(None, description="Features always reported, 0 included.")
    tokens: Tokens = Field(default_factory=lambda: ALL_TOKENS, description="Which tokens; as for interventions.")
    include_bos: Flag = Field(False, description="Whether position 0 is reported too.")
    after: Flag = Field(False, description="Report the re-encoded, edited residual stream instead of the unedited one.")

    @property
    def param(self) -> str:
        """Path of the inspection in the request: ``inspect`` or ``inspect[1]``."""
        return self._param

    @model_validator(mode="after")
    def _something_to_report(self) -> Self:
        if self.top_k < 0 or (self.given("top_k") and self.top_k == 0):
            raise fault(f"expected at least 1, got {show(self.top_k)}", "top_k")
        if not self.top_k and not self.features:
            raise fault("needs top_k or features")
        return self


Intervention = Steer | EditFeatures | Suppress | Remap | Rules
InterventionSpec = Annotated[Intervention, Field(discriminator="type")]
"""The union as a field type, for a model that embeds it."""

BUILT: dict[str, type[Intervention]] = {
    "steer": Steer,
    "edit_features": EditFeatures,
    "suppress": Suppress,
    "remap": Remap,
    "rules": Rules,
}
"""Type name → model, for every intervention of this version."""


class _Reader:
    """Validates one object and says where it went wrong."""

    def __init__(self, code: Code) -> None:
        self.code = code

    def read(self, model: type[Item], data: Any, param: str) -> Any:
        try:
            return model.model_validate(data)
        except ValidationError as error:
            message, path = first_fault(error)
        raise self.error(message, join(param, *path))

    def error(self, message: str, param: str) -> InterventionError:
        return InterventionError(self.code, printable(f"{param}: {message}"), printable(param))


_interventions = _Reader("invalid_intervention")
_inspections = _Reader("invalid_inspection")


def parse_interventions(raw: Any) -> list[Intervention]:
    """Read the request's ``interventions`` field (parsed JSON); ``None`` and ``[]`` are no interventions.

    Raises:
        InterventionError: ``invalid_intervention``, ``param`` naming the field; also for unknown types and
            fields. Rule sets and ``when`` are read later, when the server is known.
    """
    if raw is None:
        return []
    if not isinstance(raw, list):
        raise _interventions.error(f"expected a list of interventions, got {show(raw)}", "interventions")
    specs: list[Intervention] = []
    ids: dict[str, int] = {}
    for i, data in enumerate(raw):
        spec = _intervention(data, i)
        first = ids.setdefault(spec.id, i)
        if first != i:
            message = f"{show(spec.id)} is already the id of interventions[{first}]"
            raise _interventions.error(message, f"interventions[{i}].id")
        specs.append(spec)
    return specs


def _intervention(data: Any, i: int) -> Intervention:
    param = f"interventions[{i}]"
    if not isinstance(data, dict):
        raise _interventions.error(f"expected an object, got {show(data)}", param)
    kind = data.get("type")
    built = choices(BUILT)
    if kind is None:
        raise _interventions.error(f"is required; one of {built}", f"{param}.type")
    if not isinstance(kind, str):
        raise _interventions.error(f"expected one of {built}, got {show(kind)}", f"{param}.type")
    if kind not in BUILT:
        raise _interventions.error(f"{show(kind)} is not one of {built}.{nearest(kind, BUILT)}", f"{param}.type")
    fields = {"id": str(i)} | {key: value for key, value in data.items() if value is not None}
    spec: Intervention = _interventions.read(BUILT[kind], fields, param)
    spec._param = param
    return spec


def parse_inspect(raw: Any) -> list[Inspect]:
    """Read the request's ``inspect`` field (parsed JSON): an object, or a list with one per SAE; ``None`` is none.

    Raises:
        InterventionError: ``invalid_inspection``, ``param`` naming the field.
    """
    if raw is None:
        return []
    if not isinstance(raw, (dict, list)):
        raise _inspections.error(f"expected an object or a list of objects, got {show(raw)}", "inspect")
    specs: list[Inspect] = []
    saes: dict[str, str] = {}
    for i, data in enumerate(raw if isinstance(raw, list) else [raw]):
        param = f"inspect[{i}]" if isinstance(raw, list) else "inspect"
        spec: Inspect = _inspections.read(Inspect, data, param)
        first = saes.setdefault(spec.sae, param)
        if first != param:
            raise _inspections.error(f"{spec.sae!r} is already inspected by {first}; one per SAE", f"{param}.sae")
        spec._param = param
        specs.append(spec)
    return specs


def schemas() -> dict[str, Any]:
    """JSON schemas of the built intervention types and of ``inspect``, by name."""
    models: dict[str, type[Item]] = {**BUILT, "inspect": Inspect}
    return {name: model.model_json_schema() for name, model in models.items()}
