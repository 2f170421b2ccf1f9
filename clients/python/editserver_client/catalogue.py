"""What the server knows about: itself, its SAEs, their features, the library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, Field, PlainValidator
from pydantic.dataclasses import dataclass

from .inspection import ANSWER, TokenReading
from .rules import NormalForm
from .tensors import TensorLike, as_wire
from .wire import STRICT, Wire


class SAEInfo(BaseModel):
    """A dictionary that the server has loaded."""

    model_config = ANSWER
    id: str
    layer: int
    hook: str
    architecture: str
    d_model: int
    n_features: int
    digest: str
    editable: bool
    top_k: bool | int | None = None


class Capabilities(BaseModel):
    """What this server can do, and its limits."""

    model_config = ANSWER
    version: str
    vllm: str
    model: str
    d_model: int
    n_layers: int
    armed_layers: list[int]
    limits: dict[str, Any]
    device_limits: dict[str, int] | None = None
    """On a GPU: what one request may need there, whatever `limits` allow; `layer_…`: at one layer."""
    saes: list[SAEInfo | str]
    intervention_types: list[str]
    schemas: dict[str, Any]


class FeatureInfo(BaseModel):
    """A feature in a list; `score` ranks it when the list answers a search."""

    model_config = ANSWER
    index: int
    label: str | None = None
    density: float | None = None
    max_activation: float | None = None
    score: float | None = None


class FeatureContext(BaseModel):
    """A stretch of text on which a feature fires: one activation per token, the largest at `peak`."""

    model_config = ANSWER
    tokens: list[str]
    activations: list[float]
    peak: int
    source: str = ""

    @property
    def text(self) -> str:
        """The tokens as running text."""
        return "".join(self.tokens)


class TokenWeight(BaseModel):
    """A token that a feature's direction promotes or suppresses (logit lens), and how much."""

    model_config = ANSWER
    token: str
    weight: float


class Neighbour(BaseModel):
    """A feature whose decoder row points nearly the same way."""

    model_config = ANSWER
    index: int
    label: str | None = None
    cosine: float


class FeatureCard(FeatureInfo):
    """Everything the server knows about one feature; what is not known is `None`.

    `label_source` says who gave the label: "automatic", "hand", "neuronpedia:…" or "delphi". `mean_activation` and
    `quantiles` (by "0.5", "0.99" …) are over the tokens on which it fires. `contexts` come strongest first.
    """

    label_source: str | None = None
    mean_activation: float | None = None
    contexts: list[FeatureContext] | None = None
    promoted: list[TokenWeight] | None = None
    suppressed: list[TokenWeight] | None = None
    neighbours: list[Neighbour] | None = None
    quantiles: dict[str, float] | None = None


class Activations(BaseModel):
    """Readings of one input, the `index`-th."""

    model_config = ANSWER
    index: int
    tokens: list[TokenReading]


class ContrastFeature(BaseModel):
    """How well one feature separates the positive from the negative texts.

    `auroc_interval` holds the AUROC with 95 % confidence; the means are of the activations pooled over each text.
    """

    model_config = ANSWER
    index: int
    label: str | None = None
    score: float
    auroc: float | None = None
    auroc_interval: tuple[float, float] | None = None
    density: float | None = None
    mean_positive: float | None = None
    mean_negative: float | None = None


class Contrast(BaseModel):
    """Features that separate two sets of texts, best first; `score_name` says what `score` is.

    `tokens` were judged; `outlier_tokens` were not, their norm being no ordinary token's; at `truncated_tokens` more
    features were active than the server reports.
    """

    model_config = ANSWER
    score_name: str
    data: list[ContrastFeature]
    tokens: int | None = None
    outlier_tokens: int | None = None
    truncated_tokens: int | None = None


class CalibrationPoint(BaseModel):
    """One strength: mean KL(clean ‖ edited) of the next token, in nats, and the doses where the edit fired."""

    model_config = ANSWER
    strength: float
    kl: float
    dose_mean: float | None = None
    dose_max: float | None = None
    clamped: int | None = None


class StrengthCalibration(CalibrationPoint):
    """The strength found; `intervention` is the one given with that strength in it, ready to be sent.

    `curve` has every strength that was run. `within_tolerance` is False where the KL jumps across the target.
    """

    curve: list[CalibrationPoint]
    target_kl: float | None = None
    within_tolerance: bool | None = None
    prompts: int | None = None
    intervention: dict[str, Any] | None = None


class Tokenization(BaseModel):
    """Token ids as the model gets them: entry i stands at absolute position i."""

    model_config = ANSWER
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Artifact(BaseModel):
    """A library entry; every version is addressed by its content's `digest`. `body` comes with `get` only.

    So does, with a rule set, its `normal` form as the server would run it now; None where it could not (`problem` says why).
    """

    model_config = ANSWER
    name: str
    kind: str
    version: int | str
    digest: str
    body: dict[str, Any] | None = None
    normal: NormalForm | None = None
    problem: dict[str, Any] | None = None


def _layers(given: Any) -> Any:
    if not isinstance(given, Mapping) or not given:
        raise ValueError("expected a mapping of layer to vector with at least one layer")
    return {str(int(layer)): as_wire(values) for layer, values in given.items()}


@dataclass(frozen=True, config=STRICT)
class Vector(Wire):
    """A steering vector for the library: one vector [d_model] for each of its layers."""

    layers: Annotated[Mapping[int, TensorLike], PlainValidator(_layers)]
    description: str | None = Field(default=None, kw_only=True)
    meta: Mapping[str, Any] | None = Field(default=None, kw_only=True)
