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
from .formats import FORMATS, Hints, Origin, load_sae, save_native, save_saelens
from .sae import SAE, FeatureRows, Hook

__all__ = [
    "FORMATS",
    "SAE",
    "FeatureRows",
    "Folding",
    "Hints",
    "Hook",
    "Origin",
    "SAEFormatError",
    "bundled",
    "load_sae",
    "resolve",
    "save_native",
    "save_saelens",
]
