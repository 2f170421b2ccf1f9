"""Dose curves: how much a vector changes what a model writes, and what that costs in coherence.

The dose of a strength s is ‖s·v‖ / median ‖h‖. At each dose a few neutral prompts are answered with the vector added to
``resid_post`` of the last prompt token and of every generated token, so that the first answer token is steered too. Then the
*unsteered* model judges the answer:

- perplexity = exp(mean −log p(token)) of all answer tokens after their prompts. Loops are cheap by this measure, hence
- repetition: the share of an answer's three-token sequences that already stood earlier in it;
- effect: the answer is read again without steering and pooled as the examples were; its projection on û is put on the scale
  on which the held-out negatives' mean is 0 and the held-out positives' mean is 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interventions.fitting.pairs import Passage
from interventions.fitting.pooling import Pool, Reader
from interventions.fitting.vectors import LayerFit
from interventions.selectors import GENERATED, LAST_PROMPT_TOKEN, union
from sae_weights.training.activations import decoder_layers

STEERED = union([LAST_PROMPT_TOKEN, GENERATED], include_bos=False)
"""The tokens that are steered: ``["last_prompt_token", "generated"]`` of a request."""

DOSES = (0.0, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5)
"""Magnitudes of the default grid; both signs are measured."""

MAX_PERPLEXITY = 1.5
"""Coherent: perplexity at most this multiple of the unsteered answers'."""
MAX_REPETITION = 0.2
"""Coherent: repetition at most this much above the unsteered answers'."""

ROWS = 48
"""Answers that are generated side by side."""

PROMPTS = (
    "Tell me about a typical day in a small town.",
    "Describe the room in which you would like to work.",
    "What did people think of the new library?",
    "Write a short message to a neighbour about a parcel.",
    "How do I make a pot of tea?",
    "Tell me what happened at the market this morning.",
    "Describe a walk along a river.",
    "Write a few sentences about a train journey.",
    "What should I know before I visit a museum?",
    "Tell me about a meal that somebody cooked yesterday.",
    "Explain why leaves change their colour in autumn.",
    "Write a short note to a colleague about tomorrow's plans.",
)
"""Prompts that ask for no particular manner."""


@dataclass(frozen=True)
class DosePoint:
    """What one strength does; means over the prompts.

    Attributes:
        dose: signed, ‖s·v‖ / median ‖h‖.
        strength: s.
        effect: 0 = like the held-out negatives, 1 = like the positives; ``None`` if no answer had any text, or the
            held-out classes lie the wrong way round.
        effect_error: standard error of the effect over the prompts; ``None`` for fewer than two answers.
        perplexity: of the answers under the unsteered model; ``None`` without any answer token.
        repetition: share of repeated three-token sequences.
        tokens: answer tokens in all.
        coherent: whether perplexity and repetition are within their bounds.
        answer: the beginning of the first prompt's answer.
    """

    dose: float
    strength: float
    effect: float | None
    effect_error: float | None
    perplexity: float | None
    repetition: float
    tokens: int
    coherent: bool
    answer: str


@dataclass(frozen=True)
class DoseCurve:
    """Points by rising dose, and what follows from them.

    Attributes:
        points: from the most negative dose to the most positive one.
        recommended: the positive strength with the largest effect such that it and every smaller positive dose of the
            grid is coherent; ``None`` if none raises the effect over that of dose 0.
        recommended_negative: the same with negative strengths and the smallest effect.
        max_perplexity: the largest perplexity that counted as coherent.
        max_repetition: the largest repetition that did.
    """

    points: tuple[DosePoint, ...]
    recommended: float | None
    recommended_negative: float | None
    max_perplexity: float
    max_repetition: float

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self) | {"points": [asdict(point) for point in self.points]}

    def at(self, strength: float) -> DosePoint:
        """The point of a strength of the grid."""
        return next(point for point in self.points if point.strength == strength)


@dataclass(frozen=True)
class Trial:
    """How the curve is measured.

    Attributes:
        prompts: what is asked. In a chat template if the tokenizer has one and ``chat``, else continued as they are.
        doses: magnitudes; 0 is always measured, and both signs.
        max_tokens: longest answer.
        temperature: 0 is greedy; above, tokens are drawn, with the same random numbers at every dose.
        seed: of those numbers.
        perplexity_ratio: coherent up to this multiple of the unsteered perplexity.
    """

    prompts: Sequence[str] = PROMPTS
    doses: Sequence[float] = DOSES
    max_tokens: int = 40
    temperature: float = 0.0
    seed: int = 0
    perplexity_ratio: float = MAX_PERPLEXITY
    chat: bool = True


class Answerer:
    """Answers of a model, some of them steered at one layer: h + s·v, as ``steer`` with mode ``add`` means it."""

    def __init__(self, model: Any, layer: int, vector: Tensor, stop_token_ids: Sequence[int] = ()) -> None:
        """``vector`` is v, ``[d_model]``; generation ends after one of ``stop_token_ids``, which is left out."""
        self.model = model.eval()
        self._module = decoder_layers(model)[layer]
        self._vector = vector.float().to(model.device)
        self._stop = frozenset(stop_token_ids)

    @torch.inference_mode()
    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        strengths: Sequence[float],
        max_tokens: int,
        temperature: float = 0.0,
        seeds: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """One answer per prompt, each with its own strength (0 leaves every bit as it is). ``seeds``: one per prompt."""
        device = self.model.device
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        ids, mask = _left_padded(prompts, device)
        s = torch.tensor(strengths, dtype=torch.float32, device=device)
        state: dict[str, Tensor] = {}

        def hook(_module: Any, _inputs: Any, output: Any) -> Any:
            h = output[0] if isinstance(output, tuple) else output
            written = state["selected"] & (s != 0)[:, None]
            changed = torch.where(written[..., None], (h.float() + s[:, None, None] * self._vector).to(h.dtype), h)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        handle = self._module.register_forward_hook(hook)
        answers: list[list[int]] = [[] for _ in prompts]
        ended = [False] * len(prompts)
        cache: Any = None
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        try:
            for step in range(max_tokens):
                state["selected"] = _selected(positions, ids, lengths) & mask[:, -positions.shape[1] :].bool()
                output = self.model(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
                cache = output.past_key_values
                sampled = _sample(output.logits[:, -1].float(), temperature, seeds, step)
                for row, token in enumerate(sampled.tolist()):
                    ended[row] |= token in self._stop
                    if not ended[row]:
                        answers[row].append(token)
                if all(ended):
                    break
                ids, mask = sampled[:, None], torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
                positions = (lengths + step)[:, None]
        finally:
            handle.remove()
        return answers


def _left_padded(rows: Sequence[Sequence[int]], device: Any) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[*[0] * (width - len(row)), *row] for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def _selected(positions: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
    """bool ``[rows, tokens]``: what ``STEERED`` selects."""
    rows = zip(positions, ids, lengths.tolist(), strict=True)
    return torch.stack([STEERED.mask(where, what, length) for where, what, length in rows])


def _sample(logits: Tensor, temperature: float, seeds: Sequence[int] | None, step: int) -> Tensor:
    """Tokens of the next step: the most likely ones, or drawn with Gumbel noise that depends on seed and step only."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    noise = []
    for seed in seeds or [0] * len(logits):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        noise.append(-torch.empty(logits.shape[-1]).exponential_(generator=generator).log())
    return (logits / temperature + torch.stack(noise).to(logits.device)).argmax(dim=-1)


@torch.inference_mode()
def negative_log_likelihoods(
    model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], rows: int = 16
) -> list[Tensor]:
    """−log p of each answer token after its prompt, under the model as it is: one float32 ``[len(answer)]`` per row."""
    found: list[Tensor] = []
    for start in range(0, len(prompts), rows):
        part = list(zip(prompts[start : start + rows], answers[start : start + rows], strict=True))
        tail = max(len(answer) for _, answer in part)
        # All answers begin in one column, so that few logits are needed: pads lie left of the prompts, right of the answers.
        ids, mask = _left_padded([prompt for prompt, _ in part], model.device)
        end = torch.tensor([[*answer, *[0] * (tail - len(answer))] for _, answer in part], dtype=torch.int64)
        on = torch.tensor([[1] * len(answer) + [0] * (tail - len(answer)) for _, answer in part], dtype=torch.int64)
        ids, mask = torch.cat([ids, end.to(ids.device)], dim=1), torch.cat([mask, on.to(ids.device)], dim=1)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        logits = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=tail + 1
        ).logits
        logprobs = logits[:, :-1].float().log_softmax(dim=-1)
        nll = -logprobs.gather(2, ids[:, ids.shape[1] - tail :, None])[..., 0].cpu()
        found += [nll[i, : len(answer)] for i, (_, answer) in enumerate(part)]
    return found


def repetition(token_ids: Sequence[int], n: int = 3) -> float:
    """Share of the n-token sequences that already stood earlier in ``token_ids``; 0 for shorter texts."""
    grams = [tuple(token_ids[i : i + n]) for i in range(len(token_ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def dose_curve(
    model: Any,
    tokenizer: Any,
    fit: LayerFit,
    *,
    pool: Pool = "mean",
    in_context: bool = False,
    trial: Trial | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> DoseCurve:
    """Measure the curve of ``fit.vector``.

    Args:
        pool, in_context: how the examples were read, so that answers are read alike: after their prompt if the examples
            were completions, else as texts of their own.
        report: ``(answers done, answers in all)``.
    """
    trial = trial or Trial()
    magnitudes = sorted({0.0, *(abs(dose) for dose in trial.doses)})
    doses = [-dose for dose in reversed(magnitudes) if dose] + magnitudes
    strengths = [dose / fit.dose for dose in doses]
    passages = [_asked(prompt, tokenizer, trial.chat) for prompt in trial.prompts]
    prompts = [passage.encode(tokenizer).token_ids for passage in passages]
    vector = torch.from_numpy(fit.vector).float()
    answerer = Answerer(model, fit.layer, vector, stop_tokens(model, tokenizer))

    jobs = [(strength, i) for strength in strengths for i in range(len(prompts))]
    answers: list[list[int]] = []
    for start in range(0, len(jobs), ROWS):
        part = jobs[start : start + ROWS]
        seeds = [trial.seed * 10_007 + i for _, i in part]
        rows = [prompts[i] for _, i in part]
        answers += answerer.answer(rows, [s for s, _ in part], trial.max_tokens, trial.temperature, seeds)
        report(len(answers), len(jobs))

    nll = negative_log_likelihoods(model, [prompts[i] for _, i in jobs], answers)
    texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
    read = [Passage(passages[i].prompt if in_context else "", text) for text, (_, i) in zip(texts, jobs, strict=True)]
    effects = _effects(Reader(model, tokenizer, [fit.layer]), fit, read, pool)

    n = len(prompts)
    rows_of = [slice(k * n, (k + 1) * n) for k in range(len(doses))]
    raw = [_measures(answers[rows], nll[rows], effects[rows]) for rows in rows_of]
    base = raw[doses.index(0.0)]
    ceiling = trial.perplexity_ratio * (base[2] or math.inf)
    most = base[3] + MAX_REPETITION
    points = tuple(
        DosePoint(
            dose,
            strength,
            *measured,
            coherent=measured[2] is not None and measured[2] <= ceiling and measured[3] <= most,
            answer=texts[rows.start][:200],
        )
        for dose, strength, measured, rows in zip(doses, strengths, raw, rows_of, strict=True)
    )
    return DoseCurve(points, recommend(points, 1), recommend(points, -1), ceiling, most)


def _asked(prompt: str, tokenizer: Any, chat: bool) -> Passage:
    if chat and tokenizer.chat_template:
        return Passage(({"role": "user", "content": prompt},))
    return Passage(text=prompt)


def stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: those of the generation config, else the tokenizer's end token."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured, tokenizer.eos_token_id]
    return sorted({int(token) for token in ids if token is not None})


def _effects(reader: Reader, fit: LayerFit, passages: Sequence[Passage], pool: Pool) -> list[float | None]:
    """The effect of each answer; ``None`` for one of which nothing counts (no text, or a single token).

    All are ``None`` if the held-out classes lie the wrong way round: then there is no scale.
    """
    span = fit.positive_mean - fit.negative_mean
    tokens = [passage.encode(reader.tokenizer) if passage.text else None for passage in passages]
    kept = [i for i, one in enumerate(tokens) if one is not None and len(one.token_ids) > max(1, one.start)]
    found: list[float | None] = [None] * len(passages)
    if kept and span > 0:
        rows = reader.pool([passages[i] for i in kept], pool, {fit.layer: fit.median_norm}).values[fit.layer]
        unit = fit.vector / np.linalg.norm(fit.vector)
        projected = rows.double().numpy() @ unit
        scaled = (projected - fit.negative_mean) / span
        for i, value in zip(kept, scaled.tolist(), strict=True):
            found[i] = value
    return found


def _measures(
    answers: Sequence[Sequence[int]], nll: Sequence[Tensor], effects: Sequence[float | None]
) -> tuple[float | None, float | None, float | None, float, int]:
    """Effect, its standard error, perplexity, repetition and tokens of the answers at one dose."""
    known = np.array([effect for effect in effects if effect is not None])
    every = torch.cat(list(nll))
    error = float(known.std(ddof=1) / math.sqrt(len(known))) if len(known) > 1 else None
    perplexity = float(every.double().mean().exp()) if len(every) else None
    repeated = float(np.mean([repetition(answer) for answer in answers]))
    return float(known.mean()) if len(known) else None, error, perplexity, repeated, len(every)


def recommend(points: Sequence[DosePoint], sign: int) -> float | None:
    """The strength of that sign with the most effect, among the doses before the first incoherent one."""
    zero = next(point for point in points if point.dose == 0)
    chosen, most = None, sign * (zero.effect or 0.0)
    for point in sorted((p for p in points if p.dose * sign > 0), key=lambda p: abs(p.dose)):
        if not point.coherent or point.effect is None:
            break
        if sign * point.effect > most:
            chosen, most = point.strength, sign * point.effect
    return chosen
