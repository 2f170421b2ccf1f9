"""Does an SAE do what it says? Norms and checks over a whole dictionary, a block of rows at a time.

However wide the dictionary is, no more than a block of rows is in memory beside what is there already; only small ones
(``WHOLE_BYTES``) and those that are dictionary-wide are also encoded as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .architectures import ARCHITECTURES
from .errors import SAEFormatError
from .sae import SAE

SAMPLE = 32
"""Features whose rows are read a second time."""
TOKENS = 8
"""Random inputs."""
WHOLE_BYTES = 1 << 28
"""Up to this size (fp32) a dictionary is also encoded in one piece; eight times that where there is no other way."""
TOLERANCE = 1e-5

Report = Callable[[int, int], None]
"""(rows done, rows in all)"""


@dataclass(frozen=True)
class Norms:
    """Smallest, median and largest ‖row‖."""

    smallest: float
    median: float
    largest: float

    @classmethod
    def of(cls, norms: Tensor) -> Norms:
        """Of [n] norms."""
        return cls(float(norms.min()), float(norms.median()), float(norms.max()))


@dataclass(frozen=True)
class Check:
    """``passed`` is None where it could not be made; ``found`` says what was compared, with figures."""

    name: str
    passed: bool | None
    found: str


@dataclass(frozen=True)
class Examination:
    """What :func:`examine` found. ``encoder`` is None where the decoder is the encoder."""

    encoder: Norms | None
    decoder: Norms
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.passed is not False for check in self.checks)


@torch.inference_mode()
def examine(sae: SAE, *, verify: bool = False, report: Report = lambda done, total: None) -> Examination:
    """Read every row once; with ``verify`` compute the digest anew as well (once more).

    Raises SAEFormatError if a row cannot be read or is not finite.
    """
    n = sae.n_features
    generator = torch.Generator().manual_seed(0)
    sample = sorted(set(torch.randint(n, (SAMPLE,), generator=generator).tolist()) | {0, n - 1})
    x = _inputs(sae, generator)
    streamed = _stream(sae, x, sample, lambda done: report(done, n * (2 if verify else 1)))
    checks = [_rows_twice(sae, sample, streamed), *_computed(sae, x, sample, streamed)]
    if verify:
        checks.append(_digest(sae))
        report(2 * n, 2 * n)
    encoder = None if ARCHITECTURES[sae.architecture].tied else Norms.of(streamed.encoder_norms)
    return Examination(encoder, Norms.of(streamed.decoder_norms), tuple(checks))


@dataclass
class _Streamed:
    encoder_norms: Tensor  # [n]
    decoder_norms: Tensor  # [n]
    rows: dict[int, tuple[Tensor, Tensor]]
    f: Tensor  # [TOKENS, n], before membership where the dictionary is not row-separable
    decoded: Tensor  # [TOKENS, d_out]: f · W_dec + b_dec


def _inputs(sae: SAE, generator: torch.Generator) -> Tensor:
    """Random tokens of about the size that the dictionary was made for."""
    x = torch.randn(TOKENS, sae.d_model, generator=generator)
    size = sae.metadata.get("median_norm")
    usable = isinstance(size, (int, float)) and size > 0
    return x * (float(size) / sae.d_model**0.5 if usable and isinstance(size, (int, float)) else 1.0)


def _stream(sae: SAE, x: Tensor, sample: list[int], report: Callable[[int], None]) -> _Streamed:
    n, form = sae.n_features, ARCHITECTURES[sae.architecture]
    normalised, _ = sae.token_scale(x)
    found = _Streamed(
        torch.empty(n), torch.empty(n), {}, torch.empty(len(x), n), sae.b_dec.float().expand(len(x), -1).clone()
    )
    for rows, block in sae.blocks():
        found.encoder_norms[rows] = block.W_enc.norm(dim=1)
        found.decoder_norms[rows] = block.W_dec.norm(dim=1)
        f = form.row_form(block.gate).transfer(normalised @ block.W_enc.T)
        found.f[:, rows] = f
        found.decoded += f @ block.W_dec
        for i in sample:
            if rows.start <= i < rows.stop:
                found.rows[i] = (block.W_enc[i - rows.start].clone(), block.W_dec[i - rows.start].clone())
        report(rows.stop)
    return found


def _rows_twice(sae: SAE, sample: list[int], streamed: _Streamed) -> Check:
    name = "rows read alone are the rows read in order"
    alone = sae.rows(sample)
    wrong = [
        i
        for at, i in enumerate(sample)
        if not torch.equal(alone.encoder[at], streamed.rows[i][0])
        or not torch.equal(alone.decoder[at], streamed.rows[i][1])
    ]
    told = f"{len(sample)} of {sae.n_features} features" + (f"; they differ at {wrong[:5]}" if wrong else "")
    return Check(name, not wrong, told)


def _computed(sae: SAE, x: Tensor, sample: list[int], streamed: _Streamed) -> list[Check]:
    normalised, _ = sae.token_scale(x)
    alone = sae.rows(sample).activations(normalised)
    checks = [_close("one latent's row gives what all rows give", alone, streamed.f[:, sample])]
    size = 4 * sae.n_features * (sae.d_model + sae.d_out)
    whole = sae.materialised or size <= WHOLE_BYTES * (1 if sae.row_separable else 8)
    if sae.row_separable and not whole:
        finite = bool(streamed.f.isfinite().all() and streamed.decoded.isfinite().all())
        told = f"{TOKENS} random inputs, row by row; {size / 2**30:.1f} GiB are not encoded in one piece"
        return [*checks, Check("encode and decode are finite", finite, told)]
    if not whole:
        told = f"left out: all {sae.n_features} latents take {size / 2**30:.1f} GiB of memory"
        return [*checks, Check("encode and decode are finite", None, told)]
    f = sae.encode(x)
    out = sae.decode_for(x, f)
    l0 = float((f != 0).sum(dim=1).float().mean())
    finite = bool(f.isfinite().all() and out.isfinite().all())
    checks.append(Check("encode and decode are finite", finite, f"{TOKENS} random inputs, {l0:.1f} latents each"))
    if sae.row_separable:
        checks.append(_close("the row path is the full encode", streamed.f, f))
        if sae.additive:
            checks.append(_close("row-wise decode is the full decode", streamed.decoded, sae.decode(f)))
    elif sae.k is not None:
        most = int((f != 0).sum(dim=1).max())
        checks.append(Check("membership keeps k at most", most <= sae.k, f"k = {sae.k}, {most} at most"))
    return checks


def _close(name: str, found: Tensor, expected: Tensor) -> Check:
    # Where rounding moves a pre-activation over its threshold, the whole activation differs: such latents are counted.
    scale = float(expected.abs().max()) or 1.0
    apart = (found - expected).abs() > TOLERANCE * scale
    flipped = apart & ((found == 0) != (expected == 0))
    worst = float(torch.where(flipped, 0.0, (found - expected).abs()).max()) / scale
    told = f"largest difference {worst:.1e} of the largest value"
    if int(flipped.sum()):
        told += f"; {int(flipped.sum())} values on the edge of their threshold"
    few = int(flipped.sum()) <= max(1, found.numel() // 10_000)
    return Check(name, bool(worst <= TOLERANCE) and few, told)


def _digest(sae: SAE) -> Check:
    name = "the digest is that of the content"
    try:
        recorded, computed = sae.digest, sae.compute_digest()
    except SAEFormatError as error:
        return Check(name, False, str(error))
    told = computed if recorded == computed else f"recorded {recorded}, computed {computed}"
    return Check(name, recorded == computed, told)
