"""The draws behind the expected numbers of the synthetic checks: one generator, the same order of calls, a tiny JumpReLU SAE."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

TOKENS, D_MODEL, FEATURES = 40, 32, 128
SELECTED = [3, 17, 90]
KNOWN, UNKNOWN, ENTITIES = [5, 6, 7, 8], [50, 51], 600


class TinySAE:
    """f = p·1[p > θ] with p = (h − b_dec) @ W_enc + b_enc; W_enc = W_decᵀ, unit rows. float64."""

    def __init__(self, d_model: int, n_features: int, seed: int) -> None:
        draws = np.random.default_rng(seed)
        rows = draws.normal(size=(n_features, d_model))
        self.W_dec = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        self.b_enc, self.threshold = -0.15, 0.05
        self.b_dec = 0.1 * draws.normal(size=d_model)

    def pre_activations(self, h: np.ndarray) -> np.ndarray:
        return (h - self.b_dec) @ self.W_dec.T + self.b_enc

    def encode(self, h: np.ndarray) -> np.ndarray:
        p = self.pre_activations(h)
        return p * (p > self.threshold)

    def decode(self, f: np.ndarray) -> np.ndarray:
        return f @ self.W_dec + self.b_dec


@dataclass(frozen=True)
class Draws:
    """h ``[40, 32]``; shares of 500 benign sequences and of 200,000 held-out ones; latents of the entities."""

    h: np.ndarray
    benign: np.ndarray
    held_out: np.ndarray
    known: np.ndarray
    unknown: np.ndarray
    target: np.ndarray


def published_draws() -> Draws:
    rng = np.random.default_rng(0)
    for _ in range(6):  # normal samples that other checks take
        rng.normal(size=20000)
    for _ in range(2):  # zero-inflated samples that other checks take
        rng.random(20000), rng.gamma(4, 1, 20000)
    h = rng.normal(size=(TOKENS, D_MODEL)) * 1.2
    benign, held_out = rng.beta(2, 40, 500), rng.beta(2, 40, 200000)

    def entity(on: list[int], off: list[int]) -> np.ndarray:
        z = (rng.random(200) < 0.05) * rng.gamma(4, 0.5, 200)
        z[on] = rng.gamma(8, 0.5, len(on)) * (rng.random(len(on)) < 0.9)
        z[off] *= rng.random(len(off)) < 0.1
        return z

    known = np.array([entity(KNOWN, UNKNOWN) for _ in range(ENTITIES)])
    unknown = np.array([entity(UNKNOWN, KNOWN) for _ in range(ENTITIES)])
    return Draws(h, benign, held_out, known, unknown, entity(KNOWN, UNKNOWN))
