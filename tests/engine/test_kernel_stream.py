"""How the kernel reads the model's tensors and writes to them: to the bit as torch would."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from editserver.engine.kernel_cpu import BFLOAT16, FLOAT32, load_tokens
from editserver.engine.worker import EngineWorker
from tests.engine.kernel_steps import LAYER, D, Step, new_worker, random_step

FORM = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}


def loaded(hidden: torch.Tensor, residual: torch.Tensor | None, index: np.ndarray) -> torch.Tensor:
    h = np.empty((len(index), hidden.shape[1]), np.float32)
    at = 0 if residual is None else residual.data_ptr()
    load_tokens(FORM[hidden.dtype], hidden.data_ptr(), at, index, h)
    return torch.from_numpy(h)


def test_every_bfloat16_is_read_as_the_number_that_it_is() -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).reshape(256, 256)
    mine = loaded(every, None, np.arange(256))
    assert torch.equal(mine.isnan(), every.isnan())
    assert torch.equal(mine.nan_to_num(7.0), every.float().nan_to_num(7.0))


@pytest.mark.parametrize("dtype", FORM)
def test_the_stream_is_the_rounded_sum_of_its_halves(dtype: torch.dtype) -> None:
    """Ties, subnormals, overflow and what is no number among them."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**15), 2**15, (2, 512, 96), generator=generator, dtype=torch.int16)
    hidden, residual = bits.view(torch.bfloat16).to(dtype)
    residual[::2] = hidden[::2] * 2.0**-9  # where the last bit decides
    index = torch.randperm(512, generator=generator)[:100].sort().values
    want = (hidden.float() + residual.float()).to(dtype).float()[index]
    mine = loaded(hidden, residual, index.numpy())
    assert torch.equal(mine.isnan(), want.isnan())
    assert torch.equal(mine.nan_to_num(7.0), want.nan_to_num(7.0))


def after(worker: EngineWorker, step: Step) -> Step:
    done = step.run(worker)
    assert any(record.fired.strip(b"\0") for record in done.records.values())
    return done


@pytest.mark.parametrize("split", [False, True])
def test_tensors_in_strides_are_edited_like_others(split: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    step = random_step(3, torch.bfloat16, split, 5, plain=0.2)
    plain = after(new_worker(torch.bfloat16), step)
    worker = new_worker(torch.bfloat16)
    run = worker.run

    def strided(layer: int, hidden: torch.Tensor, residual: torch.Tensor | None) -> None:
        wide = torch.zeros(len(hidden), 2 * D, dtype=hidden.dtype)
        wide[:, :D] = hidden
        run(layer, wide[:, :D], residual)
        assert not wide[:, D:].any()
        hidden.copy_(wide[:, :D])

    monkeypatch.setattr(worker, "run", strided)
    other = after(worker, step)
    assert torch.equal(other.hidden, plain.hidden)
    assert not split or torch.equal(other.residual, plain.residual)
    assert other.records == plain.records


def test_a_plan_beyond_the_tensors_is_an_error() -> None:
    step = random_step(3, torch.float32, False, 2, plain=0.0)
    worker = new_worker(torch.float32)
    payload = step.parts[0].payload
    assert payload is not None
    worker.add_request("a", payload, list(range(len(payload.row_keys))), 4)
    # the second row of the batch is planned, the first is not
    worker.begin_step(["other", "a"], np.array([0, 3, 4], np.int32), np.arange(4), np.zeros(4, np.int32))
    with pytest.raises(RuntimeError, match="plan up to token 4"):
        worker.run(LAYER, torch.zeros(3, D), None)
