"""One engine per configuration and session; each starts when the first test asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from editserver.demo.model import ensure_demo_model
from sae_weights import load_sae
from sae_weights.formats import Hints, Origin, save_native
from tests.engine.dictionaries import ARCHITECTURES, THRESHOLD, WHOLE, random_sae, write_native, write_sae
from tests.engine.lab import Lab
from tests.engine.support import Engine
from tests.engine.tiny import write_model
from tests.engine.tiny_cases import Bench, Made

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
def sae_classes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path | Origin]:
    """``{class}/l15`` for every way in which a dictionary is executed that the SAELens folders do not have."""
    root = tmp_path_factory.mktemp("classes")
    made: dict[str, Path | Origin] = {a: write_native(root / a, 15, a, 576) for a in WHOLE}
    for norm, encoder in (("unit_norm", 5.0), ("centre", 0.2)):
        made[norm] = write_native(root / norm, 15, "jumprelu", 576, input_norm=norm, encoder=encoder, seed=1)
    made["native"] = write_native(root / "native", 15, "gated", 576, seed=2)
    made["topk_layer_norm"] = write_native(root / "tln", 15, "topk", 576, input_norm="layer_norm", encoder=1.0, seed=3)
    calibrated = {"calibrated_threshold": THRESHOLD}
    made["approximate"] = write_native(root / "approximate", 15, "topk", 576, seed=4, metadata=calibrated)
    nested = random_sae("matryoshka", 576, layer=15, seed=5, settings={"group_sizes": [24, 40, 32]})
    prefix = load_sae(save_native(nested, root / "matryoshka"), hints=Hints(groups=2))
    assert prefix.origin is not None
    made["prefix"] = prefix.origin
    return {f"{name}/l15": place for name, place in made.items()}


@pytest.fixture(scope="session")
def engine(model: Path, sae_folders: dict[str, Path], sae_classes: dict[str, Path | Origin]) -> Iterator[Engine]:
    """fp32, eager, prefix caching on, armed at layers 0, 15 and 29, a KV cache of 3,072 tokens."""
    engine = Engine.start(
        model,
        sae_folders | sae_classes,
        LAYERS,
        approximate=["approximate/l15"],
        num_gpu_blocks_override=96,
        max_num_batched_tokens=512,
    )
    yield engine
    engine.stop()


@pytest.fixture(scope="session")
def lab(engine: Engine) -> Iterator[Lab]:
    """The session's engine with a memory of what it answers to requests that run alone."""
    lab = Lab(engine)
    yield lab
    print("\nfp32 eager, largest |Δ log p| from the run alone:", lab.worst)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's checkpoint, for engines in processes of their own."""
    return write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def bench(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Dictionaries and the reference for the tiny model."""
    return Bench.of(tiny, tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="session")
def cases(bench: Bench) -> dict[str, Made]:
    """A request of every machinery for the tiny model, by name."""
    return bench.cases()
