"""Training one dictionary: bf16 encoder, sparse decoder and gradients, fused Adam. Minutes on a CPU; a GPU runs it as is.

Three objectives:

* ``batchtopk`` (Bussmann et al. 2024, arXiv 2412.06410): of a batch of B tokens the B·k largest activations are kept.
  Saved as JumpReLU with the one threshold at which tokens keep k latents on average: one row per latent at inference.
* ``topk`` (Gao et al. 2024, arXiv 2406.04093): every token keeps its k largest.
* ``jumprelu`` (Rajamanoharan et al. 2024, arXiv 2407.14435): a learnt threshold per latent, straight-through gradients,
  and the penalty (L0/k − 1)², which aims at an L0 of k.

Inputs are scaled to E‖x‖ = √d while training; saving folds that and the decoder's norms away, so that an activation is
a length in the residual stream.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from sae_weights.hook import Hook
from sae_weights.precision import quick_dtype
from sae_weights.sae import SAE
from sae_weights.training import sparse

Objective = Literal["batchtopk", "topk", "jumprelu"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters.

    Attributes:
        objective: which latents a token keeps (see the module).
        n_features, k: latents, and how many of them a token keeps on average.
        batch, lr, warmup: tokens per step, peak learning rate, steps until it is reached; it falls linearly over the
            last ``decay`` of the run.
        dead_after: steps without firing after which a latent counts as dead and gets the auxiliary loss.
        aux_weight: weight of the auxiliary loss (dead latents predict what is left of the reconstruction).
        kernel_width, l0_weight: JumpReLU only: width of the gradient's kernel in scaled units; weight of the L0
            penalty relative to the input's variance.
    """

    n_features: int = 4608
    k: int = 32
    batch: int = 2048
    lr: float = 1e-3
    warmup: int = 150
    decay: float = 0.3
    dead_after: int = 150
    aux_weight: float = 1 / 32
    seed: int = 0
    objective: Objective = "batchtopk"
    kernel_width: float = 0.5
    l0_weight: float = 0.3

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective {self.objective!r}; one of {', '.join(OBJECTIVES)}")
        if not 0 < self.k <= self.n_features:
            raise ValueError(f"k = {self.k}; expected 1..{self.n_features} (the number of latents)")


@dataclass
class Progress:
    """One line of the training log: means over the steps since the last one; ``seconds`` since the run (re)started."""

    tokens: int
    seconds: float
    fvu: float
    dead: int
    l0: float = 0.0
    tokens_per_second: float = 0.0


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
        raw = torch.load(path, weights_only=True, map_location="cpu")
        return cls(
            Recipe(**raw["recipe"]),
            raw["scale"],
            raw["params"],
            raw["optimizer"],
            raw["step"],
            raw["silent_for"],
            [Progress(**line) for line in raw["log"]],
        )


class Trainer:
    """Trains one dictionary; :meth:`step` takes a batch of raw activations."""

    def __init__(
        self,
        recipe: Recipe,
        sample: Tensor,
        total_steps: int,
        state: State | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """``sample``: raw activations ``[m, d]`` from which scale and b_dec start (unused when resuming)."""
        self.recipe = recipe
        self.total_steps = total_steps
        self.device = torch.device(device)
        self.l0 = 0.0
        self._floor = 0.0
        if state is None:
            self.scale = math.sqrt(sample.shape[1]) / float(sample.float().norm(dim=1).mean())
            params = self._fresh(sample.float())
            self.steps = 0
            self.silent_for = torch.zeros(recipe.n_features, dtype=torch.int64)
            self.log: list[Progress] = []
        else:
            self.scale, self.steps, self.silent_for, self.log = state.scale, state.step, state.silent_for, state.log
            params = state.params
        self.params = {name: value.to(self.device).requires_grad_(True) for name, value in params.items()}
        self.silent_for = self.silent_for.to(self.device)
        self.optimizer = torch.optim.Adam(self.params.values(), lr=recipe.lr, fused=True)
        if state is not None:
            self.optimizer.load_state_dict(state.optimizer)

    def _fresh(self, x: Tensor) -> dict[str, Tensor]:
        n, generator = self.recipe.n_features, torch.Generator().manual_seed(self.recipe.seed)
        w = F.normalize(torch.randn(n, x.shape[1], generator=generator), dim=1)
        fresh = {"W_enc": w.clone(), "W_dec": w, "b_enc": torch.zeros(n), "b_dec": x.mean(0) * self.scale}
        if self.recipe.objective == "jumprelu":
            # Start where a batch top-k would cut: every latent fires and L0 is near its aim from the first step.
            pre = (x[:2048] * self.scale - fresh["b_dec"]) @ w.T
            first = pre.flatten().topk(len(pre) * self.recipe.k).values[-1]
            fresh["log_threshold"] = torch.full((n,), math.log(max(float(first), 1e-3)))
        return fresh

    def __getattr__(self, name: str) -> Tensor:
        """The trained tensors, in the scaled input space: ``W_enc``, ``W_dec``, ``b_enc``, ``b_dec``, …"""
        params: dict[str, Tensor] = self.__dict__.get("params", {})
        if name in params:
            return params[name]
        raise AttributeError(name)

    def state(self) -> State:
        """A snapshot that :meth:`State.save` can write."""
        optimizer = self.optimizer.state_dict()
        return State(self.recipe, self.scale, self.params, optimizer, self.steps, self.silent_for, self.log)

    def _rate(self) -> float:
        warm = min(1.0, (self.steps + 1) / self.recipe.warmup)
        left = (self.total_steps - self.steps) / max(1.0, self.recipe.decay * self.total_steps)
        return self.recipe.lr * warm * min(1.0, max(left, 0.0))

    @torch.no_grad()
    def _pre(self, x: Tensor) -> Tensor:
        """Pre-activations of scaled inputs, bf16 ``[B, n]``."""
        dtype = quick_dtype(x.device)
        product = torch.addmm(self.b_enc.to(dtype), (x - self.b_dec).to(dtype), self.W_enc.to(dtype).T)
        return product.bfloat16()

    def _keep(self, pre: Tensor) -> sparse.Fired:
        """The pairs (token, latent) that this objective looks at."""
        k = self.recipe.k
        if self.recipe.objective == "batchtopk":
            fired, smallest = sparse.largest(pre, len(pre) * k, self._floor)
            self._floor = 0.7 * smallest
            return fired
        if self.recipe.objective == "topk":
            top = pre.topk(k, dim=1)
            mask = torch.zeros_like(pre, dtype=torch.bool).scatter_(1, top.indices, top.values > 0)
            return sparse.pairs(mask, pre)
        # Those within reach of the kernel as well, for the thresholds' gradients.
        reach = self.log_threshold.detach().exp() - self.recipe.kernel_width / 2
        return sparse.pairs(pre > reach.clamp(min=0).to(pre.dtype), pre)

    def step(self, raw: Tensor) -> float:
        """One optimiser step on ``raw [B, d]``; returns the batch's FVU (fraction of variance unexplained)."""
        x = raw.to(self.device).float() * self.scale
        pre = self._pre(x)
        fired = self._keep(pre)
        values = sparse.encode(x, self.W_enc, self.b_enc, self.b_dec, fired)
        penalty = x.new_zeros(())
        chosen = fired.feature
        if self.recipe.objective == "jumprelu":
            theta = self.log_threshold.exp()[fired.feature]
            values, on = sparse.jump(values, theta, self.recipe.kernel_width)
            penalty = (on.sum() / (len(x) * self.recipe.k) - 1) ** 2
            chosen = chosen[on.detach() > 0]
        error = x - sparse.decode(values, fired, self.W_dec, self.b_dec)
        loss = error.pow(2).sum(1).mean()
        with torch.no_grad():
            variance = (x - x.mean(0)).pow(2).sum(1).mean()
            fvu = float(loss / variance)
            self.l0 = len(chosen) / len(x)
            self.silent_for += 1
            self.silent_for[chosen] = 0
            dead = (self.silent_for > self.recipe.dead_after).nonzero().squeeze(1)
        loss = loss + self.recipe.l0_weight * variance * penalty
        if len(dead) and self.recipe.aux_weight:
            loss = loss + self.recipe.aux_weight * self._aux_loss(x, dead, error.detach())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._constrain_gradient()
        torch.nn.utils.clip_grad_norm_(self.params.values(), 1.0 * math.sqrt(x.shape[1]))
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate()
        self.optimizer.step()
        with torch.no_grad():
            rows = self.params["W_dec"]
            rows /= rows.norm(dim=1, keepdim=True)
        self.steps += 1
        return fvu

    def _aux_loss(self, x: Tensor, dead: Tensor, error: Tensor) -> Tensor:
        pre = (x - self.b_dec.detach()) @ self.W_enc[dead].T + self.b_enc[dead]
        top, which = pre.topk(min(len(dead), error.shape[1] // 2), dim=1)
        weights = torch.zeros_like(pre).scatter(1, which, F.relu(top))
        return (error - weights @ self.W_dec[dead]).pow(2).sum(1).mean()

    @torch.no_grad()
    def _constrain_gradient(self) -> None:
        """Remove the part of the decoder's gradient that would only change row lengths."""
        grad = self.W_dec.grad
        assert grad is not None
        grad -= (grad * self.W_dec).sum(1, keepdim=True) * self.W_dec

    @torch.no_grad()
    def export(self, layer: int, calibration: Tensor, metadata: dict[str, Any] | None = None) -> SAE:
        """The dictionary in the model's own units; BatchTopK's threshold is calibrated on raw activations ``[m, d]``."""
        p = {name: value.detach().float().cpu() for name, value in self.params.items()}
        # TopK ranks activations of unit decoder rows, which training keeps: the norm is 1 but for rounding.
        b_dec = p["b_dec"] / self.scale
        # x - b_dec before the encoder is folded into its bias; scale·x in, activation/scale out.
        gate = {"b_enc": p["b_enc"] / self.scale - p["W_enc"] @ b_dec}
        architecture, k = "jumprelu", None
        if self.recipe.objective == "topk":
            architecture, k = "topk", self.recipe.k
        elif self.recipe.objective == "jumprelu":
            gate["threshold"] = p["log_threshold"].exp() / self.scale
        else:
            pre = (calibration.float() * self.scale - p["b_dec"]) @ p["W_enc"].T + p["b_enc"]
            kept = len(calibration) * self.recipe.k
            threshold = float(pre.flatten().topk(kept, sorted=True).values[-1]) / self.scale
            gate["threshold"] = torch.full((self.recipe.n_features,), max(threshold, 0.0))
        return SAE.from_tensors(
            architecture=architecture,
            hook=Hook("resid_post", layer),
            W_enc=p["W_enc"],
            W_dec=p["W_dec"],
            b_dec=b_dec,
            gate=gate,
            k=k,
            metadata=metadata,
        )


class Feed(Protocol):
    """Where batches come from; the same step gets the same batch in a resumed run."""

    def batches(self, batch: int, start: int) -> Iterator[Tensor]:
        """Raw activations ``[batch, d]`` from step ``start`` on, without end."""


@dataclass(frozen=True)
class Shuffled:
    """Activations that are all there, in memory or mapped: each epoch in a new random order."""

    values: Tensor
    seed: int = 0

    def batches(self, batch: int, start: int) -> Iterator[Tensor]:
        """Raises ValueError if there is less than one batch."""
        per_epoch = len(self.values) // batch
        if per_epoch == 0:
            raise ValueError(f"{len(self.values)} activations are fewer than one batch of {batch}")
        step = start
        while True:
            generator = torch.Generator().manual_seed(self.seed + step // per_epoch)
            order = torch.randperm(len(self.values), generator=generator)
            for at in range(step % per_epoch, per_epoch):
                yield self.values[order[at * batch : (at + 1) * batch]]
                step += 1


def train(
    trainer: Trainer,
    feed: Feed,
    *,
    checkpoint: Path | None = None,
    every: int = 100,
    report: Callable[[Progress, int], None] = lambda line, total: None,
) -> None:
    """Run until ``trainer.total_steps``.

    ``report(line, total steps)`` and, if given, the checkpoint come every ``every`` steps.
    """
    batch, started, first = trainer.recipe.batch, time.monotonic(), trainer.steps
    fvus: list[float] = []
    l0s: list[float] = []
    if trainer.steps >= trainer.total_steps:
        return
    for raw in feed.batches(batch, trainer.steps):
        fvus.append(trainer.step(raw))
        l0s.append(trainer.l0)
        if trainer.steps % every == 0 or trainer.steps == trainer.total_steps:
            dead = int((trainer.silent_for > trainer.recipe.dead_after).sum())
            seconds = time.monotonic() - started
            rate = (trainer.steps - first) * batch / seconds
            means = sum(fvus) / len(fvus), sum(l0s) / len(l0s)
            line = Progress(trainer.steps * batch, seconds, means[0], dead, means[1], rate)
            fvus.clear()
            l0s.clear()
            trainer.log.append(line)
            report(line, trainer.total_steps)
            if checkpoint is not None:
                trainer.state().save(checkpoint)
        if trainer.steps == trainer.total_steps:
            return
