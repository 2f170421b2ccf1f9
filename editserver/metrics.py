"""Prometheus metrics of the edits, exposed by vLLM's own ``/metrics``.

They live in the default registry of the API process, which is what vLLM exposes with a single API process
(``vllm/v1/metrics/prometheus.py``; several API processes are refused at start).
"""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

REQUESTS = Counter(
    "editserver_requests",
    "Accepted requests by what they carry: each intervention type once per request, and inspect.",
    ["type"],
)
EDITED_TOKENS = Counter(
    "editserver_edited_tokens",
    "Tokens selected by an intervention, summed over interventions and layers.",
    ["type"],
)
DOSE = Histogram(
    "editserver_dose",
    "Mean ||delta|| / ||h|| over the tokens where an intervention fired, per receipt and layer.",
    ["type"],
    buckets=(0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 1.0, 1.5, 2.0, 5.0),
)
REFUSALS = Counter("editserver_refusals", "Requests refused or failed, by error code.", ["code"])
RULES_FIRED = Counter(
    "editserver_rules_fired",
    "Times that an action of a rule set began to act (do, refuse, flag, log), per choice.",
    ["action"],
)
RULE_REFUSALS = Counter(
    "editserver_rule_refusals",
    "Choices whose answer a rule replaced, by where it fired (prompt, generated).",
    ["phase"],
)
BANK_ROWS = Gauge("editserver_bank_rows_in_use", "Distinct rows that the requests in flight need.")
BANK_CAPACITY = Gauge("editserver_bank_rows_capacity", "Rows that fit into the bank.")
