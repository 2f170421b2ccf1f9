"""The architectures by their canonical name. A new one is one file and one line here."""

from __future__ import annotations

from .abstopk import AbsTopK
from .base import NO_SETTINGS, Architecture, Execution, Gate, RowForm, Whole
from .batchtopk import BatchTopK
from .crosscoder import Crosscoder
from .e2e import EndToEnd
from .feature_choice import FeatureChoice
from .gated import Gated
from .glu import GLU
from .gradient import Gradient
from .group_sparse import GroupSparse
from .groupmax import GroupMax
from .itda import ITDA
from .jumprelu import JumpReLU
from .lorsa import Lorsa
from .matching_pursuit import MatchingPursuit
from .matryoshka import Matryoshka
from .mutual_choice import MutualChoice
from .p_anneal import PAnneal
from .plain_topk import PlainTopK
from .polysae import PolySAE
from .relu import ReLU
from .structured import Structured
from .temporal import Temporal
from .top_afa import TopAFA
from .topk import TopK, topk_members
from .vsae import VariationalTopK

ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        # Row-separable: f_j needs row j only.
        ReLU(),
        JumpReLU(),
        Gated(),
        BatchTopK(),
        Matryoshka(),
        PAnneal(),
        FeatureChoice(),
        MutualChoice(),
        Structured(),
        GroupSparse(),
        EndToEnd(),
        # Dictionary-wide: f_j needs every row.
        TopK(),
        Gradient(),
        AbsTopK(),
        PlainTopK(),
        VariationalTopK(),
        GroupMax(),
        TopAFA(),
        MatchingPursuit(),
        ITDA(),
        GLU(),
        PolySAE(),
        Crosscoder(),
        # Sequence-wide: refused.
        Temporal(),
        Lorsa(),
    )
}

__all__ = [
    "ARCHITECTURES",
    "NO_SETTINGS",
    "Architecture",
    "Execution",
    "Gate",
    "RowForm",
    "Whole",
    "topk_members",
]
