"""The rows of an SAE that one edit or reading needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .source import Bits


@dataclass(frozen=True)
class FeatureRows:
    """m features of an SAE in one form for every row-separable architecture, all fp32 except ``index``.

    With x̃ the normalised input (``SAE.token_scale``) and u = encoder · x̃::

        f(u) = relu(mag_scale · u + mag_bias) · 1[u + gate_bias > threshold]        (strict)

    For TopK this is f before membership: a feature outside the k largest pre-activations of the token is 0.
    """

    index: Tensor  # [m] int64
    encoder: Tensor  # [m, d]
    decoder: Tensor  # [m, d]
    gate_bias: Tensor  # [m]
    threshold: Tensor  # [m]
    mag_scale: Tensor  # [m]
    mag_bias: Tensor  # [m]

    def __len__(self) -> int:
        return self.index.shape[0]

    def activations(self, x_normalised: Tensor) -> Tensor:
        """f of these features for x̃ [..., d] → [..., m] fp32."""
        return self.transfer(x_normalised.float() @ self.encoder.T)

    def transfer(self, u: Tensor) -> Tensor:
        """f(u) elementwise for u [..., m] fp32."""
        magnitude = torch.relu(self.mag_scale * u + self.mag_bias)
        return magnitude * (u + self.gate_bias > self.threshold)

    def to(self, device: torch.device | str) -> FeatureRows:
        """The same rows on another device."""
        return FeatureRows(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


@dataclass(frozen=True)
class StoredFeatures:
    """All features of an SAE where they lie: what ``SAE.rows`` reads of them are the same numbers.

    Nobody has looked at them: rows that are not finite have to be refused, as ``SAE.rows`` does. ``unchanged`` has to be
    called before each use, and raises SAEFormatError where the file is another one now.
    """

    encoder: Bits  # [n, d]
    decoder: Bits  # [n, d]
    gate: npt.NDArray[np.float32]  # [n, 4]: gate_bias, threshold, mag_scale, mag_bias
    unchanged: Callable[[], None]
