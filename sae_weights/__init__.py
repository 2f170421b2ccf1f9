"""What a sparse autoencoder is: architectures, checkpoint formats, bundled dictionaries.

>>> from sae_weights import resolve
>>> name, sae = resolve("smollm2-135m/l15")
>>> sae.rows([7, 42]).decoder.shape
torch.Size([2, 576])
"""

from __future__ import annotations

from .catalogue import bundled, resolve
from .errors import SAEFormatError
from .folding import Folding
from .formats.saelens import load_sae, save_saelens
from .sae import SAE, FeatureRows, Hook

__all__ = [
    "SAE",
    "FeatureRows",
    "Folding",
    "Hook",
    "SAEFormatError",
    "bundled",
    "load_sae",
    "resolve",
    "save_saelens",
]
