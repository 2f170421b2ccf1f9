"""One engine per configuration and session; each starts when the first test asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from editserver.demo.model import ensure_demo_model
from tests.engine.dictionaries import ARCHITECTURES, write_sae
from tests.engine.lab import Lab
from tests.engine.support import Engine

LAYERS = (0, 15, 29)


@pytest.fixture(scope="session")
def model() -> Path:
    """The demo model's checkpoint."""
    return ensure_demo_model()


@pytest.fixture(scope="session")
def sae_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``{architecture}/l{layer}`` for every architecture and layer, and two per-token input norms at layer 15."""
    root = tmp_path_factory.mktemp("saes")
    folders = {
        f"{a}/l{layer}": write_sae(root / a / f"l{layer}", layer, a, 576) for a in ARCHITECTURES for layer in LAYERS
    }
    for norm in ("constant_norm_rescale", "layer_norm"):
        folders[f"{norm}/l15"] = write_sae(root / norm, 15, "jumprelu", 576, norm=norm)
    return folders


@pytest.fixture(scope="session")
def engine(model: Path, sae_folders: dict[str, Path]) -> Iterator[Engine]:
    """fp32, eager, prefix caching on, armed at layers 0, 15 and 29, a KV cache of 3,072 tokens."""
    engine = Engine.start(model, sae_folders, LAYERS, num_gpu_blocks_override=96, max_num_batched_tokens=512)
    yield engine
    engine.stop()


@pytest.fixture(scope="session")
def lab(engine: Engine) -> Iterator[Lab]:
    """The session's engine with a memory of what it answers to requests that run alone."""
    lab = Lab(engine)
    yield lab
    print("\nfp32 eager, largest |Δ log p| from the run alone:", lab.worst)
