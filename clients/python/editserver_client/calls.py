"""Every endpoint as data: what to send and how to read the answer. The clients only add the I/O."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar
from urllib.parse import quote

from pydantic import TypeAdapter, ValidationError

from .body import LabelledTexts, Messages, Texts, chat_messages, labelled_texts, texts
from .catalogue import (
    Activations,
    Artifact,
    Capabilities,
    Contrast,
    FeatureCard,
    FeatureInfo,
    SAEInfo,
    StrengthCalibration,
    Tokenization,
)
from .exceptions import UnexpectedResponse
from .interventions import Intervention
from .jobs import JobStatus
from .responses import ChatResponse, CompletionResponse
from .rules import NormalForm, RulesetLike, ruleset_body
from .wire import Wire, to_json

T = TypeVar("T")
Kind = Literal["vectors", "concepts", "maps", "rulesets"]


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request; `read` turns the decoded JSON of a success into the typed answer."""

    method: str
    path: str
    read: Callable[[Any], T]
    json: Mapping[str, Any] | None = None
    params: Mapping[str, str | int] | None = None


def reader(answer: type[T]) -> Callable[[Any], T]:
    adapter: TypeAdapter[T] = TypeAdapter(answer)

    def read(body: Any) -> T:
        try:
            return adapter.validate_python(body)
        except ValidationError as error:
            raise UnexpectedResponse(f"the answer is not the contract's {answer.__name__}: {error}") from error

    return read


def _list_reader(item: type[T]) -> Callable[[Any], list[T]]:
    read_item = reader(item)

    def read(body: Any) -> list[T]:
        entries = body.get("data") if isinstance(body, Mapping) else body
        if not isinstance(entries, list):
            raise UnexpectedResponse(f"expected a list of {item.__name__}, got {str(body)[:200]}")
        return [read_item(entry) for entry in entries]

    return read


read_chat = reader(ChatResponse)
read_completion = reader(CompletionResponse)
_read_capabilities = reader(Capabilities)
_read_sae = reader(SAEInfo)
_read_saes = _list_reader(SAEInfo)
_read_features = _list_reader(FeatureInfo)
_read_feature = reader(FeatureCard)
_read_activations = _list_reader(Activations)
_read_contrast = reader(Contrast)
_read_calibration = reader(StrengthCalibration)
_read_tokens = reader(Tokenization)
_read_artifact = reader(Artifact)
_read_artifacts = _list_reader(Artifact)
_read_job = reader(JobStatus)
_read_jobs = _list_reader(JobStatus)
_read_normal_form = reader(NormalForm)


def chat(body: Mapping[str, Any]) -> Call[ChatResponse]:
    return Call("POST", "/v1/chat/completions", read_chat, json=body)


def complete(body: Mapping[str, Any]) -> Call[CompletionResponse]:
    return Call("POST", "/v1/completions", read_completion, json=body)


def capabilities() -> Call[Capabilities]:
    return Call("GET", "/v1/capabilities", _read_capabilities)


def saes() -> Call[list[SAEInfo]]:
    return Call("GET", "/v1/saes", _read_saes)


def sae(id: str) -> Call[SAEInfo]:
    return Call("GET", _sae_path(id), _read_sae)


def features(id: str, q: str | None, limit: int | None) -> Call[list[FeatureInfo]]:
    params = {name: value for name, value in (("q", q), ("limit", limit)) if value is not None}
    return Call("GET", f"{_sae_path(id)}/features", _read_features, params=params)


def feature(id: str, index: int) -> Call[FeatureCard]:
    return Call("GET", f"{_sae_path(id)}/features/{int(index)}", _read_feature)


def activations(
    id: str,
    input: str | Sequence[str] | None,
    messages: Messages | None,
    features: Sequence[int] | None,
    top_k: int | None,
) -> Call[list[Activations]]:
    if (input is None) == (messages is None):
        raise TypeError("give exactly one of input and messages")
    body: dict[str, Any] = {}
    if messages is not None:
        body["messages"] = chat_messages(messages)
    else:
        body["input"] = input if isinstance(input, str) else list(input or ())
    if features is not None:
        body["features"] = list(features)
    if top_k is not None:
        body["top_k"] = top_k
    return Call("POST", f"{_sae_path(id)}/activations", _read_activations, json=body)


def contrast(
    id: str, positive: Texts, negative: Texts, limit: int, pool: str | None, max_density: float | None
) -> Call[Contrast]:
    body: dict[str, Any] = {"positive": texts(positive), "negative": texts(negative), "limit": limit}
    body |= {name: value for name, value in (("pool", pool), ("max_density", max_density)) if value is not None}
    return Call("POST", f"{_sae_path(id)}/contrast", _read_contrast, json=body)


def calibrate_strength(
    intervention: Intervention | Mapping[str, Any], prompts: Texts, target_kl: float
) -> Call[StrengthCalibration]:
    body = {"intervention": to_json(intervention), "prompts": texts(prompts), "target_kl": target_kl}
    return Call("POST", "/v1/calibrate_strength", _read_calibration, json=body)


_LISTS = ("strengths", "words")


def fit_concept(
    name: str,
    sae: str,
    concepts: Mapping[str, LabelledTexts],
    target: str,
    background: str | Texts | None,
    keep_dense: bool,
    options: Mapping[str, Any],
) -> Call[str]:
    """Options left at None are absent, so that the server's default rules."""
    if keep_dense and options.get("max_rate") is not None:
        raise TypeError("give max_rate or keep_dense, not both")
    body: dict[str, Any] = {"name": name, "sae": sae, "target": target}
    body["concepts"] = {label: labelled_texts(given) for label, given in concepts.items()}
    if background is not None:
        body["background"] = background if isinstance(background, str) else texts(background)
    for option, value in options.items():
        if value is not None:
            body[option] = list(value) if option in _LISTS else dict(value) if option == "priors" else value
    if options.get("detector") == "none":
        body["detector"] = None
    if keep_dense:
        body["max_rate"] = None
    return Call("POST", "/v1/concepts/fit", _read_job_id, json=body)


def list_jobs() -> Call[list[JobStatus]]:
    return Call("GET", "/v1/jobs", _read_jobs)


def get_job(id: str) -> Call[JobStatus]:
    return Call("GET", _job_path(id), _read_job)


def delete_job(id: str) -> Call[JobStatus]:
    return Call("DELETE", _job_path(id), _read_job)


def tokenize(input: Messages, model: str | None, params: Mapping[str, Any]) -> Call[Tokenization]:
    body: dict[str, Any] = {"prompt": input} if isinstance(input, str) else {"messages": chat_messages(input)}
    if model is not None:
        body["model"] = model
    return Call("POST", "/tokenize", _read_tokens, json={"return_token_strs": True, **body, **params})


def list_artifacts(kind: Kind) -> Call[list[Artifact]]:
    return Call("GET", f"/v1/library/{kind}", _read_artifacts)


def put_artifact(kind: Kind, name: str, body: Wire | Mapping[str, Any]) -> Call[Artifact]:
    return Call("PUT", _artifact_path(kind, name), _read_artifact, json=to_json(body))


def get_artifact(kind: Kind, name: str) -> Call[Artifact]:
    return Call("GET", _artifact_path(kind, name), _read_artifact)


def delete_artifact(kind: Kind, name: str) -> Call[None]:
    return Call("DELETE", _artifact_path(kind, name), lambda _: None)


def put_ruleset(
    name: str, ruleset: RulesetLike, description: str | None, meta: Mapping[str, Any] | None
) -> Call[Artifact]:
    notes = {name: value for name, value in (("description", description), ("meta", meta)) if value is not None}
    return put_artifact("rulesets", name, ruleset_body(ruleset) | notes)


def check_ruleset(ruleset: RulesetLike) -> Call[NormalForm]:
    return Call("POST", "/v1/rulesets/check", _read_normal_form, json=ruleset_body(ruleset))


def health() -> Call[None]:
    return Call("GET", "/health", lambda _: None)


def _sae_path(id: str) -> str:
    """SAE ids contain slashes, and the routes take them as path."""
    if not id.strip("/"):
        raise ValueError("the SAE id is empty")
    return f"/v1/saes/{quote(id.strip('/'), safe='/')}"


def _artifact_path(kind: Kind, name: str) -> str:
    if not name:
        raise ValueError("the name is empty")
    return f"/v1/library/{kind}/{quote(name, safe='')}"


def _job_path(id: str) -> str:
    if not id:
        raise ValueError("the id of the job is empty")
    return f"/v1/jobs/{quote(id, safe='')}"


def _read_job_id(body: Any) -> str:
    if not isinstance(body, Mapping) or not isinstance(body.get("job"), str):
        raise UnexpectedResponse(f"expected the id of a job, got {str(body)[:200]}")
    return str(body["job"])
