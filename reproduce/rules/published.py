"""What the paper and its page report, from notes and audits by others: other models, other data, no intervals."""

from __future__ import annotations

HOPS = (
    ("Llama-3.1-8B base", "51.0", "50.8", "50.3"),
    ("Llama-3.1-8B instruct", "71.0", "60.2", "58.5"),
    ("the same, chain of thought", "77.8", "70.6", "59.7"),
    ("Llama-3.1-8B + ActivationReasoning", "95.0", "95.6", "95.3"),
    ("Gemma-2-9B base", "48.5", "47.5", "47.9"),
    ("Gemma-2-9B instruct", "77.0", "57.9", "55.0"),
    ("the same, chain of thought", "86.3", "64.4", "45.1"),
    ("Gemma-2-9B + ActivationReasoning", "93.5", "93.5", "93.5"),
)
"""PrOntoQA, accuracy in % at 1, 3 and 5 hops."""

RAIL = (
    ("Llama-3.1-8B", "41.0", "29.7"),
    ("Llama-3.1-8B + ActivationReasoning", "74.7", "62.7"),
    ("Gemma-2-9B + ActivationReasoning", "", "86.0 (+60.3)"),
)
"""Rail2Country, accuracy in %, mono and meta."""

SAFETY = "BeaverTails, Llama-3.1-8B: 83.0 overall with rules (+25.2); R_relation above R_multi above R_single."
