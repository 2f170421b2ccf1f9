"""The one exception that tells a caller what is wrong with an intervention."""

from __future__ import annotations

from typing import Literal

Code = Literal[
    "invalid_intervention",
    "invalid_inspection",
    "invalid_artifact",
    "unknown_sae",
    "unknown_feature",
    "unknown_vector",
    "unknown_concept",
    "unknown_map",
    "unknown_ruleset",
    "unknown_job",
    "layer_not_armed",
    "wrong_dimension",
    "rule_syntax",
    "rule_layer_order",
    "dose_exceeded",
    "limit_exceeded",
    "unsupported_with_interventions",
    "capacity",
    "forbidden_by_policy",
    "unauthorized",
    "intervention_failed",
]

STATUS: dict[str, int] = {
    "capacity": 429,
    "forbidden_by_policy": 403,
    "unauthorized": 401,
    "intervention_failed": 500,
}
"""HTTP status of the codes that are not a plain 400."""


class InterventionError(ValueError):
    """An intervention (or inspection) that cannot be carried out exactly as asked.

    ``code`` is one of the stable codes of the HTTP contract, ``param`` the path of the offending field in the request
    (``interventions[2].features[0].index``), ``status`` the HTTP status (400 unless the contract says otherwise).
    """

    def __init__(self, code: Code, message: str, param: str | None = None, status: int | None = None) -> None:
        super().__init__(message)
        self.code: str = code
        self.message = message
        self.param = param
        self.status = status if status is not None else STATUS.get(code, 400)
