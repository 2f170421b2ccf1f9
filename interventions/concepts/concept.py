"""The artefact: what has to be known to take one concept away, tied to one SAE at one layer of one model.

Its file is a safetensors file with one metadata entry, ``concept``: canonical JSON of everything that is not a tensor. Nothing
in it is executable. A concept is named by the digest of its content, never by a file name.

Format 2 has a detector (:mod:`interventions.concepts.detector`), whose score is plain arrays too. A concept without one is
written as format 1, so that bytes and digests of older concepts stay what they were.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn, get_args

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from interventions.concepts.density import Densities
from interventions.concepts.detector import ARRAYS, Detector
from interventions.concepts.gain import TAU, GainTable, Range, Transfer, Whole, gain_table
from interventions.concepts.moments import Moments
from interventions.concepts.posterior import class_index, posterior, prior_weights
from interventions.concepts.salient import By, Selection
from interventions.concepts.separability import separability
from interventions.errors import InterventionError
from interventions.wording import choices, nearest, printable, show

Method = Literal["app", "attenuate", "mask", "range"]
METHODS: tuple[Method, ...] = get_args(Method)

MAX_FEATURES = 4096
MAX_BINS = 4096
MAX_CLASSES = 256
MAX_NAME = 128
MAX_BYTES = 64 * 1024 * 1024
"""Largest file."""
MAX_NOTES_BYTES = 64 * 1024
"""Largest ``fitted_on``, as JSON."""

_PLAIN, _DETECTING = 1, 2
"""Formats: without and with a detector."""
_DIGEST = re.compile(r"[0-9a-f]{64}")
TENSORS: dict[str, tuple[torch.dtype, str]] = {
    "features": (torch.int64, "n"),
    "edges": (torch.float32, "n 2"),
    "posterior": (torch.float32, "n bins"),
    "separability": (torch.float32, "n"),
    "scores": (torch.float32, "n"),
    "tokens": (torch.int64, "k"),
    "firing": (torch.int64, "k n"),
    "mean": (torch.float32, "k n"),
    "std": (torch.float32, "k n"),
    "priors": (torch.float32, "k"),
}
"""Name → dtype and shape; n latents, k classes."""
FACTS = ("sae_digest", "layer", "model", "target", "classes", "background", "by", "max_rate", "dense", "fitted_on")


@dataclass(frozen=True, eq=False)
class Concept:
    """A concept in the latents of one SAE; n of them, k classes, nb bins.

    Attributes:
        sae_digest: sha256 (hex) of the SAE's content.
        layer: decoder layer, 0-based.
        model: name of the model on which it was fitted.
        target: the class that is taken away.
        classes: names of all classes, the background among them.
        background: name of the background class; ``None`` without one.
        features: int64 ``[n]``, latents, ascending.
        edges: float32 ``[n, 2]``, range of the bins.
        posterior: float32 ``[n, nb]``, P(target | bin).
        separability: float32 ``[n]``, D_JS over all classes.
        scores: float32 ``[n]``, why each latent was selected.
        tokens: int64 ``[k]``, tokens of each class.
        firing: int64 ``[k, n]``, tokens on which each latent fired.
        mean, std: float32 ``[k, n]``, of the positive activations.
        priors: float32 ``[k]``, > 0 or = 0, sum 1.
        by, max_rate, dense: how latents were selected, see :class:`interventions.concepts.salient.Selection`.
        fitted_on: provenance, any JSON object (data and its sha256, settings, versions).
        detector: when the concept counts as present, for rules; ``None`` without one.

    Raises:
        InterventionError: ``invalid_artifact``, ``param`` naming the field.
    """

    sae_digest: str
    layer: int
    model: str
    target: str
    classes: tuple[str, ...]
    background: str | None
    features: Tensor
    edges: Tensor
    posterior: Tensor
    separability: Tensor
    scores: Tensor
    tokens: Tensor
    firing: Tensor
    mean: Tensor
    std: Tensor
    priors: Tensor
    by: By
    max_rate: float | None
    dense: int = 0
    fitted_on: Mapping[str, Any] = field(default_factory=dict)
    detector: Detector | None = None

    def __post_init__(self) -> None:
        _check_facts(self)
        _check_tensors(self)

    @property
    def n_bins(self) -> int:
        """nb."""
        return self.posterior.shape[1]

    @property
    def firing_rate(self) -> Tensor:
        """q_c, float64 ``[k, n]``."""
        return self.firing.double() / self.tokens.double()[:, None]

    @property
    def table(self) -> GainTable:
        """One row per latent, in the order of ``features``."""
        return gain_table(self.edges, self.posterior)

    def transfer(self, method: Method, tau: float = TAU) -> Transfer:
        """The transfer function of a method; ``tau`` is for "range" only.

        Raises:
            ValueError: an unknown method or a negative ``tau``.
        """
        if method == "app":
            return self.table
        if method == "range":
            c = self.classes.index(self.target)
            return Range(self.mean[c], self.std[c], tau)
        if method in METHODS:
            return Whole()
        raise ValueError(f"method: {method!r} is not a method; there are {choices(METHODS)}")

    def check_sae(self, digest: str, layer: int, n_features: int) -> None:
        """Refuse an SAE other than the one on which the concept was fitted.

        Raises:
            InterventionError: ``invalid_artifact``: another content, another layer, or a latent that it does not have.
        """
        if digest != self.sae_digest:
            _fail("sae_digest", f"the concept {self.target!r} was fitted on the SAE {self.sae_digest}, not on {digest}")
        if layer != self.layer:
            _fail(
                "layer", f"the concept {self.target!r} was fitted at layer {self.layer}; this SAE edits layer {layer}"
            )
        if int(self.features[-1]) >= n_features:
            _fail("features", f"index {int(self.features[-1])}; this SAE has 0..{n_features - 1}")
        if self.detector is not None and self.detector.features()[-1] >= n_features:
            _fail("detector", f"index {self.detector.features()[-1]}; this SAE has 0..{n_features - 1}")

    @property
    def digest(self) -> str:
        """sha256 (hex) of the content: the facts and every tensor's name, shape and little-endian values."""
        sha = hashlib.sha256(b"editserver-concept/1")
        facts = _canonical(self._facts()).encode()
        sha.update(f"{len(facts)}:".encode() + facts)
        for name, tensor in sorted(self._tensors().items()):
            values = _little_endian(tensor)
            sha.update(f"{name}:{list(tensor.shape)}:{len(values)}:".encode() + values)
        return sha.hexdigest()

    def to_bytes(self) -> bytes:
        """The safetensors file. Equal concepts give equal bytes."""
        written: bytes = save_tensors(self._tensors(), {"concept": _canonical(self._facts())})
        return written

    @classmethod
    def from_bytes(cls, raw: bytes) -> Concept:
        """Read :meth:`to_bytes`; nothing in ``raw`` is trusted.

        Raises:
            InterventionError: ``invalid_artifact``, ``param`` naming the field where there is one.
        """
        if len(raw) > MAX_BYTES:
            _fail(None, f"{len(raw)} bytes; a concept has at most {MAX_BYTES}")
        try:
            tensors: dict[str, Tensor] = load_tensors(raw)
            header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
            facts = json.loads(header["__metadata__"]["concept"])
        except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            reason = "no metadata entry concept" if isinstance(error, KeyError) else str(error)[:200]
            _fail(None, f"not a concept file: {reason}")
        version = facts.pop("format", None) if isinstance(facts, dict) else None
        if type(version) is not int or version not in (_PLAIN, _DETECTING):
            _fail("format", f"expected a concept of format {_PLAIN} or {_DETECTING}")
        detector = _detector(facts, tensors) if version == _DETECTING else None
        for kind, known, given in (("field", FACTS, facts), ("tensor", tuple(TENSORS), tensors)):
            for name in known:
                if name not in given:
                    _fail(name, f"missing {kind}")
            for name in given:
                if name not in known:
                    _fail(printable(str(name)[:64]), f"unknown {kind}.{nearest(str(name), known)}")
        if isinstance(facts["classes"], list):
            facts["classes"] = tuple(facts["classes"])
        fields: dict[str, Any] = facts | tensors
        return cls(**fields, detector=detector)

    def _facts(self) -> dict[str, Any]:
        facts = {name: getattr(self, name) for name in FACTS}
        if self.detector is None:
            return {"format": _PLAIN} | facts
        return {"format": _DETECTING, "detector": self.detector.facts()} | facts

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {name: getattr(self, name).contiguous() for name in TENSORS}
        if self.detector is not None:
            tensors |= {name: torch.from_numpy(array) for name, array in self.detector.arrays().items()}
        return tensors


def build_concept(
    moments: Moments,
    densities: Densities,
    selection: Selection,
    target: str,
    *,
    sae_digest: str,
    layer: int,
    model: str,
    background: str | None = None,
    priors: Mapping[str, float] | None = None,
    fitted_on: Mapping[str, Any] | None = None,
) -> Concept:
    """Put a fit together.

    Args:
        moments: of all latents of the SAE.
        densities: of the selected latents only, in their order, or of all latents.
        selection: from :func:`interventions.concepts.salient.select`.

    Raises:
        ValueError: densities of other classes or latents, a class without tokens, wrong priors.
        InterventionError: ``invalid_artifact``.
    """
    index = torch.tensor(selection.features, dtype=torch.int64)
    if densities.classes != moments.classes:
        raise ValueError("densities: expected the classes of the moments")
    if densities.counts.shape[1] == moments.n_features:
        densities = densities.select(index)
    few = moments.select(index)
    if not torch.equal(densities.firing, few.firing) or not torch.equal(densities.tokens, few.tokens):
        raise ValueError("densities: not of the selected latents, or not of the tokens of the moments")
    class_index(densities.classes, target)
    return Concept(
        sae_digest=sae_digest,
        layer=layer,
        model=model,
        target=target,
        classes=densities.classes,
        background=background,
        features=index,
        edges=densities.edges,
        posterior=posterior(densities, target, priors).float(),
        separability=separability(densities).float(),
        scores=torch.tensor(selection.scores, dtype=torch.float32),
        tokens=few.tokens,
        firing=few.firing,
        mean=few.mean.float(),
        std=few.std.float(),
        priors=prior_weights(densities, priors).float(),
        by=selection.by,
        max_rate=selection.max_rate,
        dense=selection.dense,
        fitted_on=fitted_on or {},
    )


def _detector(facts: dict[str, Any], tensors: dict[str, Tensor]) -> Detector:
    """Take the detector out of a file's facts and tensors."""
    if "detector" not in facts:
        _fail("detector", "missing field")
    given = {name: tensors.pop(name) for name in ARRAYS if name in tensors}
    arrays = {}
    for name, tensor in given.items():
        dtype, _ = ARRAYS[name]
        if _plain(tensor.dtype) != dtype:
            _fail(name, f"expected {dtype}, got {_plain(tensor.dtype)}")
        arrays[name] = np.asarray(tensor.numpy())
    return Detector.from_arrays(facts.pop("detector"), arrays)


def _fail(param: str | None, message: str) -> NoReturn:
    message = printable(message)
    raise InterventionError("invalid_artifact", f"{param}: {message}" if param else message, param)


def _canonical(facts: Mapping[str, Any]) -> str:
    return json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _little_endian(tensor: Tensor) -> bytes:
    values = tensor.contiguous().numpy()
    raw: bytes = (values if sys.byteorder == "little" else values.byteswap()).tobytes()
    return raw


def _check_facts(concept: Concept) -> None:
    if not isinstance(concept.sae_digest, str) or not _DIGEST.fullmatch(concept.sae_digest):
        _fail("sae_digest", f"expected a sha256 of 64 lower-case hex digits, got {show(concept.sae_digest)}")
    for name in ("layer", "dense"):
        number = getattr(concept, name)
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 2**31:
            _fail(name, f"expected an integer ≥ 0, got {show(number)}")
    if not isinstance(concept.model, str) or not 0 < len(concept.model) <= 4 * MAX_NAME:
        _fail("model", f"expected a name, got {show(concept.model)}")
    classes = concept.classes
    if not isinstance(classes, tuple) or not all(
        isinstance(name, str) and 0 < len(name) <= MAX_NAME for name in classes
    ):
        _fail("classes", f"expected a list of names of at most {MAX_NAME} characters, got {show(classes)}")
    if not 2 <= len(classes) <= MAX_CLASSES or len(set(classes)) != len(classes):
        _fail("classes", f"expected 2 to {MAX_CLASSES} different names, got {len(classes)}")
    if concept.target not in classes:
        _fail("target", f"{show(concept.target)} is not one of the classes: {choices(classes)}")
    if concept.background is not None and concept.background not in classes:
        _fail("background", f"{show(concept.background)} is not one of the classes: {choices(classes)}")
    if concept.background == concept.target:
        _fail("background", f"{show(concept.target)} is the target itself")
    if concept.by not in get_args(By):
        _fail("by", f"expected one of {choices(get_args(By))}, got {show(concept.by)}")
    rate = concept.max_rate
    if rate is not None and (isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1):
        _fail("max_rate", f"expected a share between 0 and 1 or null, got {show(rate)}")
    if not isinstance(concept.fitted_on, Mapping):
        _fail("fitted_on", f"expected an object, got {show(concept.fitted_on)}")
    try:
        size = len(_canonical(concept.fitted_on))
    except (TypeError, ValueError, RecursionError):
        _fail("fitted_on", "holds what JSON cannot carry")
    if size > MAX_NOTES_BYTES:
        _fail("fitted_on", f"{size} bytes of JSON; at most {MAX_NOTES_BYTES}")
    if concept.detector is not None and not isinstance(concept.detector, Detector):
        _fail("detector", f"expected a detector, got {show(concept.detector)}")


def _check_tensors(concept: Concept) -> None:
    for name, ndim in (("features", 1), ("posterior", 2)):
        if getattr(concept, name).ndim != ndim:
            _fail(name, f"expected {ndim} dimensions, got shape {list(getattr(concept, name).shape)}")
    n, bins, k = len(concept.features), concept.posterior.shape[1], len(concept.classes)
    extents = {"n": n, "bins": bins, "k": k, "2": 2}
    for name, (dtype, dims) in TENSORS.items():
        tensor = getattr(concept, name)
        shape = [extents[dim] for dim in dims.split()]
        if tensor.dtype is not dtype or list(tensor.shape) != shape:
            _fail(
                name, f"expected {_plain(dtype)} of shape {shape}, got {_plain(tensor.dtype)} of {list(tensor.shape)}"
            )
        if not bool(tensor.isfinite().all()):
            _fail(name, "holds a value that is not finite")
    if not 1 <= n <= MAX_FEATURES:
        _fail("features", f"expected 1 to {MAX_FEATURES} latents, got {n}")
    if not 1 <= bins <= MAX_BINS:
        _fail("posterior", f"expected 1 to {MAX_BINS} bins, got {bins}")
    if int(concept.features[0]) < 0 or not bool((concept.features.diff() > 0).all()):
        _fail("features", "expected indices ≥ 0, ascending, each once")
    inverse = bins / (concept.edges[:, 1].double() - concept.edges[:, 0].double())
    if not bool(
        ((concept.edges[:, 0] < concept.edges[:, 1]) & inverse.float().isfinite() & (inverse.float() > 0)).all()
    ):
        _fail("edges", "expected low < high for every latent")
    for name in ("posterior", "separability", "priors"):
        values = getattr(concept, name)
        if bool(((values < 0) | (values > 1)).any()):
            _fail(name, "holds a value outside [0, 1]")
    if abs(float(concept.priors.double().sum()) - 1) > 1e-4:
        _fail("priors", f"sum to {float(concept.priors.double().sum()):.6g}; expected 1")
    if bool((concept.tokens < 1).any()):
        _fail("tokens", "a class has none")
    if bool(((concept.firing < 0) | (concept.firing > concept.tokens[:, None])).any()):
        _fail("firing", "expected counts between 0 and the tokens of the class")
    for name in ("mean", "std"):
        if bool((getattr(concept, name) < 0).any()):
            _fail(name, "holds a negative value; positive activations have none")


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
