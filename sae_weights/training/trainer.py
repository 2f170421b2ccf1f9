"""BatchTopK training on a CPU in minutes: bf16 encoder, sparse decoder, fused Adam.

Per batch of B tokens the B·k largest activations are kept (Bussmann et al. 2024, arXiv 2412.06410); what is saved is the
JumpReLU form with the threshold at which held-out tokens keep k latents on average, which needs one row per latent.
Inputs are scaled to E‖x‖ = √d while training; saving folds that away and leaves unit decoder rows, so that an
activation is a length in the residual stream.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sae_weights.hook import Hook
from sae_weights.sae import SAE


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters.

    Attributes:
        n_features, k: latents, and how many of them a token keeps on average.
        batch, lr, warmup: tokens per step, peak learning rate, steps until it is reached; it falls linearly over the
            last ``decay`` of the run.
        dead_after: steps without firing after which a latent counts as dead and gets the auxiliary loss.
        aux_weight: weight of the auxiliary loss (dead latents predict what is left of the reconstruction).
        per_row: candidates per token, as a multiple of k, among which the batch's largest are found.
    """

    n_features: int = 4608
    k: int = 32
    batch: int = 2048
    lr: float = 1e-3
    warmup: int = 150
    decay: float = 0.3
    dead_after: int = 150
    aux_weight: float = 1 / 32
    per_row: int = 3
    seed: int = 0


@dataclass
class Progress:
    """One line of the training log."""

    tokens: int
    seconds: float
    fvu: float
    dead: int


@dataclass
class State:
    """Everything a run needs in order to go on later."""

    recipe: Recipe
    scale: float
    params: dict[str, Tensor]
    optimizer: dict[str, Any]
    step: int
    silent_for: Tensor
    log: list[Progress] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write atomically; :meth:`load` reads it with ``weights_only=True``."""
        plain = {
            "recipe": asdict(self.recipe),
            "scale": self.scale,
            "params": {name: p.detach() for name, p in self.params.items()},
            "optimizer": self.optimizer,
            "step": self.step,
            "silent_for": self.silent_for,
            "log": [asdict(line) for line in self.log],
        }
        scratch = path.with_suffix(".tmp")
        torch.save(plain, scratch)
        scratch.rename(path)

    @classmethod
    def load(cls, path: Path) -> State:
        """Read what :meth:`save` wrote."""
        raw = torch.load(path, weights_only=True)
        return cls(
            Recipe(**raw["recipe"]),
            raw["scale"],
            raw["params"],
            raw["optimizer"],
            raw["step"],
            raw["silent_for"],
            [Progress(**line) for line in raw["log"]],
        )


class BatchTopKTrainer:
    """Trains one dictionary; :meth:`step` takes a batch of raw activations."""

    def __init__(self, recipe: Recipe, sample: Tensor, total_steps: int, state: State | None = None) -> None:
        """``sample``: raw activations ``[m, d]`` from which scale and b_dec start (unused when resuming)."""
        self.recipe = recipe
        self.total_steps = total_steps
        d = sample.shape[1]
        if state is None:
            generator = torch.Generator().manual_seed(recipe.seed)
            x = sample.float()
            self.scale = math.sqrt(d) / float(x.norm(dim=1).mean())
            w = F.normalize(torch.randn(recipe.n_features, d, generator=generator), dim=1)
            self.W_dec = w.clone()
            self.W_enc = w.clone()
            self.b_enc = torch.zeros(recipe.n_features)
            self.b_dec = x.mean(0) * self.scale
            self.steps = 0
            self.silent_for = torch.zeros(recipe.n_features, dtype=torch.int64)
            self.log: list[Progress] = []
        else:
            self.scale, self.steps, self.silent_for, self.log = state.scale, state.step, state.silent_for, state.log
            for name, value in state.params.items():
                setattr(self, name, value)
        for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
            getattr(self, name).requires_grad_(True)
        self.optimizer = torch.optim.Adam(self.params.values(), lr=recipe.lr, fused=True)
        if state is not None:
            self.optimizer.load_state_dict(state.optimizer)

    @property
    def params(self) -> dict[str, Tensor]:
        """The trained tensors, in the scaled input space."""
        return {"W_enc": self.W_enc, "W_dec": self.W_dec, "b_enc": self.b_enc, "b_dec": self.b_dec}

    def state(self) -> State:
        """A snapshot that :meth:`State.save` can write."""
        optimizer = self.optimizer.state_dict()
        return State(self.recipe, self.scale, self.params, optimizer, self.steps, self.silent_for, self.log)

    def _rate(self) -> float:
        warm = min(1.0, (self.steps + 1) / self.recipe.warmup)
        left = (self.total_steps - self.steps) / max(1.0, self.recipe.decay * self.total_steps)
        return self.recipe.lr * warm * min(1.0, max(left, 0.0))

    def step(self, raw: Tensor) -> float:
        """One optimiser step on ``raw [B, d]``; returns the batch's FVU (fraction of variance unexplained)."""
        x = raw.float() * self.scale
        pre = ((x - self.b_dec).bfloat16() @ self.W_enc.bfloat16().T).float() + self.b_enc
        active = F.relu(pre)
        candidates, index = active.topk(self.recipe.per_row * self.recipe.k, dim=1, sorted=False)
        with torch.no_grad():
            kept = len(x) * self.recipe.k
            threshold = candidates.flatten().kthvalue(candidates.numel() - kept + 1).values
            mask = (candidates >= threshold) & (candidates > 0)
            offsets = F.pad(mask.sum(1).cumsum(0)[:-1], (1, 0))
        chosen = index[mask]
        recon = (
            F.embedding_bag(chosen, self.W_dec, offsets, mode="sum", per_sample_weights=candidates[mask]) + self.b_dec
        )
        error = x - recon
        loss = error.pow(2).sum(1).mean()
        with torch.no_grad():
            variance = (x - x.mean(0)).pow(2).sum(1).mean()
            fvu = float(loss / variance)
            self.silent_for += 1
            self.silent_for[chosen] = 0
            dead = (self.silent_for > self.recipe.dead_after).nonzero().flatten()
        if len(dead):
            loss = loss + self.recipe.aux_weight * self._aux_loss(pre, dead, error.detach())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._constrain_gradient()
        torch.nn.utils.clip_grad_norm_(self.params.values(), 1.0 * math.sqrt(x.shape[1]))
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate()
        self.optimizer.step()
        with torch.no_grad():
            self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)
        self.steps += 1
        return fvu

    def _aux_loss(self, pre: Tensor, dead: Tensor, error: Tensor) -> Tensor:
        top, which = pre[:, dead].topk(min(len(dead), error.shape[1] // 2), dim=1)
        weights = torch.zeros(len(error), len(dead)).scatter(1, which, F.relu(top))
        return (error - weights @ self.W_dec[dead]).pow(2).sum(1).mean()

    @torch.no_grad()
    def _constrain_gradient(self) -> None:
        """Remove the part of the decoder's gradient that would only change row lengths."""
        grad = self.W_dec.grad
        assert grad is not None
        grad -= (grad * self.W_dec).sum(1, keepdim=True) * self.W_dec

    @torch.no_grad()
    def export(self, layer: int, calibration: Tensor, metadata: dict[str, Any] | None = None) -> SAE:
        """The JumpReLU form in the model's own units, its threshold calibrated on raw activations ``[m, d]``."""
        pre = (calibration.float() * self.scale - self.b_dec) @ self.W_enc.T + self.b_enc
        kept = len(calibration) * self.recipe.k
        threshold = float(pre.flatten().topk(kept, sorted=True).values[-1]) / self.scale
        n = self.recipe.n_features
        b_dec = self.b_dec / self.scale
        return SAE.from_tensors(
            architecture="jumprelu",
            hook=Hook("resid_post", layer),
            W_enc=self.W_enc.detach(),
            W_dec=self.W_dec.detach(),
            b_dec=b_dec,
            # x - b_dec before the encoder is folded into its bias; scale·x in, activation/scale out.
            gate={
                "b_enc": self.b_enc / self.scale - self.W_enc @ b_dec,
                "threshold": torch.full((n,), max(threshold, 0.0)),
            },
            metadata=metadata,
        )


def train(
    trainer: BatchTopKTrainer,
    activations: Tensor,
    *,
    checkpoint: Path | None = None,
    every: int = 100,
    report: Callable[[Progress, int], None] = lambda line, total: None,
) -> None:
    """Run until ``trainer.total_steps``, each epoch in a new random order that a resumed run repeats.

    ``report(line, total steps)`` and, if given, the checkpoint come every ``every`` steps.
    """
    recipe = trainer.recipe
    per_epoch = len(activations) // recipe.batch
    if per_epoch == 0:
        raise ValueError(f"{len(activations)} activations are fewer than one batch of {recipe.batch}")
    started, fvus = time.monotonic(), []
    epoch, order = -1, torch.empty(0)
    while trainer.steps < trainer.total_steps:
        at = trainer.steps % per_epoch
        if trainer.steps // per_epoch != epoch:
            epoch = trainer.steps // per_epoch
            order = torch.randperm(len(activations), generator=torch.Generator().manual_seed(recipe.seed + epoch))
        fvus.append(trainer.step(activations[order[at * recipe.batch : (at + 1) * recipe.batch]]))
        if trainer.steps % every == 0 or trainer.steps == trainer.total_steps:
            dead = int((trainer.silent_for > recipe.dead_after).sum())
            line = Progress(trainer.steps * recipe.batch, time.monotonic() - started, sum(fvus) / len(fvus), dead)
            fvus.clear()
            trainer.log.append(line)
            report(line, trainer.total_steps)
            if checkpoint is not None:
                trainer.state().save(checkpoint)
