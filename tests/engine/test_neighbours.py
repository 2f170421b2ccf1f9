"""Promise 1: what one row of a batch is asked to do never changes a bit of the other rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine import checks
from tests.engine.conftest import LAYERS
from tests.engine.lab import Lab
from tests.engine.shallow import KEPT, shallow_saes, write_shallow
from tests.engine.support import Engine

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def compiled_lab(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """bf16 and ``torch.compile``, the engine core in its own process: what a server runs, six layers deep."""
    root = tmp_path_factory.mktemp("shallow")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_VEC_ISA_OK", "1")  # that g++ knows this CPU's instructions need not be tried out
        engine = Engine.start(
            write_shallow(model, root / "model"),
            shallow_saes(root),
            [KEPT.index(layer) for layer in LAYERS],
            processes=True,
            dtype="bfloat16",
            enforce_eager=False,
            num_gpu_blocks_override=96,
            max_num_batched_tokens=512,
        )
    lab = Lab(engine)
    yield lab
    print("\nbf16 compiled, largest |Δ log p| from the run alone:", lab.worst)
    engine.stop()


def test_toggling_one_rows_edit_leaves_seven_others_bit_identical_in_fp32(lab: Lab) -> None:
    checks.neighbours(lab)


def test_toggling_one_rows_edit_leaves_seven_others_bit_identical_compiled_in_bf16(compiled_lab: Lab) -> None:
    assert [worker["ok"] for worker in compiled_lab.engine.llm.collective_rpc("editserver_handshake")] == [True]
    checks.neighbours(compiled_lab)
