"""Numbers that others published, on other models and other tasks: something to read beside ours, not to compare with."""

from __future__ import annotations

DSG_TABLE = (
    ("base", 100.0, 100.0, 7.36),
    ("GA", 99.44, 99.35, 7.44),
    ("NPO", 97.95, 99.35, 7.29),
    ("SSD", 99.44, 99.68, 7.24),
    ("SCRUB", 94.97, 99.35, 6.09),
    ("static clamp (Farrell et al.)", 59.22, 99.03, 7.33),
    ("RMU", 50.00, 99.47, 7.21),
    ("DSG", 29.64, 99.34, 7.78),
)
"""Table 1 of 2504.08192, as quoted by others: not checked against the paper."""

CLAIMS = (
    ("zero ablation of a topic's latents forgets nothing; negative clamps are needed", "qualitative", "2410.19278"),
    ("clamps of several latents have side effects of RMU's size or above", "qualitative", "2410.19278"),
    ("DSG, reproduced: WMDP-Bio / MMLU, % of base", "29.37 / 99.41", "an independent reproduction"),
    ("static against dynamic clamp, utility", "0.393 / 0.560", "the same"),
    ("answers recovered behind 1600 benign tokens, share gate", "0.853 to 0.909", "the same"),
    ("the same, CUSUM gate", "0.029", "the same"),
    ("the same, window gates", "0.069 to 0.096", "the same"),
    ("window gates open on benign padded text", "0.118 to 0.22", "the same"),
    ("clamps from layer 20 on (of 26) do nothing, layers 1 to 16 work", "qualitative", "the same"),
    (
        "known → unknown: recall falls, others hardly change, activations like those of unknown entities",
        "no table was readable",
        "2509.15631 (it trains weights)",
    ),
)
"""Claim, figure, source."""
