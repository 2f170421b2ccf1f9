"""A small server's worth of names: SAEs of every architecture, library vectors and a tokenizer, all in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from interventions.compile import Compiled, compile_request
from interventions.concepts.concept import Concept
from interventions.errors import InterventionError
from interventions.limits import Limits
from interventions.maps.map import LatentMap
from interventions.rules.build import Context, Dictionary
from interventions.rules.proposition import Proposition
from interventions.spec import parse_inspect, parse_interventions
from sae_weights.sae import SAE, Hook
from tests.concepts.samples import made_concept
from tests.engine.dictionaries import WHOLE, random_sae

D, N = 16, 40
PIECES = ["a", "b", "ab", " ab", "c", " ", "Paris", " Paris", " Lond", "on", "Lond", "é", " c", "d"]


def make_sae(
    architecture: str = "jumprelu",
    d: int = D,
    n: int = N,
    seed: int = 0,
    layer: int = 1,
    input_norm: Any = "none",
    k: int = 5,
) -> SAE:
    """A random dictionary whose latents are on for about a third of unit-variance tokens."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    if architecture in WHOLE:
        return random_sae(architecture, d, n=n, layer=layer, input_norm=input_norm, encoder=1.0, decoder=1.0, seed=seed)
    if architecture == "gated":
        gate = {"b_gate": 0.3 * normal(n), "b_mag": 0.3 * normal(n), "r_mag": 0.2 * normal(n)}
    else:
        gate = {"b_enc": 0.3 * normal(n)}
    if architecture in ("jumprelu", "batchtopk"):
        gate["threshold"] = 0.2 + normal(n).abs() * 0.3
    return SAE.from_tensors(
        architecture=architecture,
        hook=Hook("resid_post", layer),
        W_enc=normal(n, d) / math.sqrt(d),
        W_dec=normal(n, d) / math.sqrt(d),
        b_dec=0.1 * normal(d),
        gate=gate,
        input_norm=input_norm,
        k=k if architecture == "topk" else None,
    )


@dataclass
class Offered:
    id: str
    layer: int
    sae: SAE
    full_encode: bool = True


@dataclass
class Server:
    """Everything that ``interventions.compile.Catalogue`` asks for."""

    d_model: int = D
    n_layers: int = 4
    vocab_size: int = 100
    armed_layers: tuple[int, ...] = (1, 2)
    limits: Limits = field(default_factory=Limits)
    max_dose: float = math.inf
    refuse_over_dose: bool = False
    saes: dict[str, Offered] = field(default_factory=dict)
    vectors: dict[str, Mapping[int, Any]] = field(default_factory=dict)
    concepts: dict[str, tuple[str, Concept]] = field(default_factory=dict)
    """Name → the SAE that it was fitted on, and the concept."""
    maps: dict[str, LatentMap] = field(default_factory=dict)
    rulesets: dict[str, Any] = field(default_factory=dict)
    propositions: dict[str, Proposition] = field(default_factory=dict)
    """The library's, by name."""

    def sae(self, name: str) -> Offered:
        if name not in self.saes:
            raise InterventionError("unknown_sae", f"no SAE {name!r}")
        return self.saes[name]

    def vector(self, name: str) -> Mapping[int, Any]:
        if name not in self.vectors:
            raise InterventionError("unknown_vector", f"no vector {name!r}")
        return self.vectors[name]

    def concept(self, name: str) -> tuple[Offered, Concept]:
        if name not in self.concepts:
            raise InterventionError("unknown_concept", f"no concept {name!r}")
        sae, concept = self.concepts[name]
        return self.saes[sae], concept

    def map(self, name: str) -> tuple[Offered, LatentMap]:
        if name not in self.maps:
            raise InterventionError("unknown_map", f"no map {name!r}")
        found = self.maps[name]
        return next(offered for offered in self.saes.values() if offered.sae.digest == found.sae), found

    def ruleset(self, name: str) -> Any:
        if name not in self.rulesets:
            raise InterventionError("unknown_ruleset", f"no rule set {name!r}")
        return self.rulesets[name]

    def rule_context(self) -> Context:
        known = {name: Dictionary(offered.layer, offered.sae.n_features) for name, offered in self.saes.items()}
        return Context(known, self.propositions, self.limits)

    def encode_text(self, text: str) -> list[int]:
        ids = []
        while text:
            piece = max((p for p in PIECES if text.startswith(p)), key=len, default=text[0])
            ids.append(PIECES.index(piece) if piece in PIECES else 99)
            text = text[len(piece) :]
        return ids

    def decode_token(self, token_id: int) -> str:
        return PIECES[token_id] if token_id < len(PIECES) else "�"


@pytest.fixture(scope="session")
def saes() -> dict[str, SAE]:
    """name → SAE: one per architecture and one per input normalisation."""
    found = {name: make_sae(name, seed=i) for i, name in enumerate(("relu", "jumprelu", "gated", "topk", "batchtopk"))}
    found["rescaled"] = make_sae("jumprelu", seed=7, input_norm="constant_norm_rescale")
    found["layer_norm"] = make_sae("relu", seed=8, input_norm="layer_norm")
    found["topk_layer_norm"] = make_sae("topk", seed=9, input_norm="layer_norm")
    found["unit_norm"] = make_sae("jumprelu", seed=10, input_norm="unit_norm")
    found["centre"] = make_sae("gated", seed=11, input_norm="centre")
    found |= {name: make_sae(name, seed=20 + i) for i, name in enumerate(WHOLE)}
    found["polysae_unit_norm"] = make_sae("polysae", seed=12, input_norm="unit_norm")
    found["stand-in"] = make_sae("topk", seed=13).thresholded(0.7)
    return found


@pytest.fixture
def server(saes: dict[str, SAE]) -> Server:
    random = np.random.default_rng(0)
    vectors = {
        "formal": {1: random.normal(size=D).astype(np.float32), 2: torch.from_numpy(random.normal(size=D)).float()},
        "zero": {1: np.zeros(D, np.float32)},
        "half zero": {1: np.zeros(D, np.float32), 2: np.ones(D, np.float32)},
        "elsewhere": {3: np.ones(D, np.float32)},
        "narrow": {1: np.ones(D - 1, np.float32)},
        "broken": {1: np.full(D, np.nan, np.float32)},
    }
    concepts = {name: (name, made_concept(sae, 1, n_bins=9, seed=i)) for i, (name, sae) in enumerate(saes.items())}
    concepts["fine"] = ("relu", made_concept(saes["relu"], 1, n_bins=D, seed=50))
    concepts["full"] = ("relu", made_concept(saes["relu"], 1, n_bins=D - 3, seed=51))
    return Server(saes={name: Offered(name, 1, sae) for name, sae in saes.items()}, vectors=vectors, concepts=concepts)


@pytest.fixture
def make_server() -> Callable[..., Server]:
    """``make_server(d_model=…, …)``: a server with one SAE per architecture at layer 1, and no vectors."""

    def build(**fields: Any) -> Server:
        names = ("relu", "jumprelu", "gated", "topk")
        saes = {name: make_sae(name, d=fields["d_model"], seed=i) for i, name in enumerate(names)}
        return Server(saes={name: Offered(name, 1, sae) for name, sae in saes.items()}, **fields)

    return build


@pytest.fixture
def compiled(server: Server) -> Callable[..., Compiled]:
    """``compiled(*interventions, inspect=None)``: parse and compile JSON against ``server``."""

    def run(*interventions: dict[str, Any], inspect: Any = None) -> Compiled:
        return compile_request(parse_interventions(list(interventions)), parse_inspect(inspect), server)

    return run


@pytest.fixture
def refused(compiled: Callable[..., Compiled]) -> Callable[..., InterventionError]:
    """``refused(*interventions, inspect=None)``: the error that parsing and compiling raises."""

    def run(*interventions: dict[str, Any], inspect: Any = None) -> InterventionError:
        with pytest.raises(InterventionError) as caught:
            compiled(*interventions, inspect=inspect)
        return caught.value

    return run
