"""What ranks compare at their start: random inputs of every kind, alike on all of them, and never nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from editserver.engine.compat import parallel
from editserver.engine.splice import UnsupportedModel

pytest.importorskip("vllm")

N, D, VOCABULARY = 300, 4, 50


class Model(torch.nn.Module):
    def forward(self, **inputs: Any) -> dict[str, Any]:
        return inputs


def run(monkeypatch: pytest.MonkeyPatch, seed: int, **inputs: Any) -> dict[str, Any]:
    """The inputs as the model sees them."""
    context = SimpleNamespace(is_padding=torch.ones(N, dtype=torch.bool))
    monkeypatch.setattr("vllm.forward_context.get_forward_context", lambda: context)
    model = Model()
    with parallel._random_inputs(model, VOCABULARY, seed):
        seen: dict[str, Any] = model(**inputs)
    assert not context.is_padding.any(), "experts pass over padding"
    assert model(**inputs).keys() == inputs.keys()
    return seen


def test_tokens_embeddings_and_what_a_stage_is_handed_are_random_and_the_same_on_every_rank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def inputs() -> dict[str, Any]:
        states = SimpleNamespace(tensors={name: torch.zeros(N, D) for name in ("hidden_states", "residual")})
        return {
            "input_ids": torch.zeros(N, dtype=torch.int32),
            "positions": torch.arange(N),
            "inputs_embeds": torch.zeros(N, D),
            "intermediate_tensors": states,
        }

    one, same, other = (run(monkeypatch, seed, **inputs()) for seed in (1, 1, 2))
    assert one["input_ids"].dtype is torch.int32
    assert 0 <= int(one["input_ids"].min()) < int(one["input_ids"].max()) < VOCABULARY
    assert torch.equal(one["positions"], torch.arange(N))

    def streams(seen: dict[str, Any]) -> list[torch.Tensor]:
        return [seen["input_ids"], seen["inputs_embeds"], *seen["intermediate_tensors"].tensors.values()]

    for a, b, c in zip(streams(one), streams(same), streams(other), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
        assert len(a.unique(dim=0)) > N // 10, "in all its rows"


def test_what_a_model_is_not_given_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"input_ids": None, "inputs_embeds": None, "intermediate_tensors": None, "positions": torch.arange(3)}
    seen = run(monkeypatch, 0, **given)
    assert {name for name, value in seen.items() if value is not None} == {"positions"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("split", [False, True])
def test_the_largest_difference_of_a_token_is_found_and_nothing_is_changed(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, split: bool
) -> None:
    hidden, zeros = torch.randn(N, D).to(dtype), torch.randn(N, D).to(dtype)
    stream = (hidden.float() + zeros.float()).to(dtype) if split else hidden
    others = stream.clone()
    others[N - 1] *= 1.5
    sent = iter(others.split(parallel.ROWS))

    def broadcast(h: torch.Tensor, src: int) -> None:
        assert src == 0
        h.copy_(next(sent).view(torch.uint8))

    monkeypatch.setattr("vllm.distributed.parallel_state.get_tp_group", lambda: SimpleNamespace(broadcast=broadcast))
    before = hidden.clone()
    found = parallel._difference(hidden, zeros if split else None, dtype)
    assert found == pytest.approx(1 / 3, rel=2e-2)
    assert torch.equal(hidden, before)
    sent = iter(stream.clone().split(parallel.ROWS))
    assert parallel._difference(hidden, zeros if split else None, dtype) == 0.0


def test_a_stream_of_zeros_proves_nothing_and_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    group = SimpleNamespace(broadcast=lambda h, src: h)
    monkeypatch.setattr("vllm.distributed.parallel_state.get_tp_group", lambda: group)
    with pytest.raises(UnsupportedModel, match="its ranks cannot be compared"):
        parallel._difference(torch.zeros(N, D), torch.zeros(N, D), torch.float32)


def test_batches_of_every_size_are_compared_where_they_may_go_other_ways() -> None:
    assert parallel.sizes(8192, on_device=False) == [1, 16, 61]
    assert parallel.sizes(8, on_device=False) == [1, 8]
    assert parallel.sizes(6000, on_device=True) == [1, 16, 61, 256, 1024, 4096, 6000]


@pytest.mark.parametrize(
    ("answers", "configured", "raised"),
    [(True, True, ValueError), (False, True, SystemExit), (False, False, ValueError)],
)
def test_a_worker_that_nobody_hears_ends_with_its_failure(
    monkeypatch: pytest.MonkeyPatch, answers: bool, configured: bool, raised: type[BaseException]
) -> None:
    from editserver.engine.config import EngineConfig

    def execute_model(self: Any, scheduler_output: Any) -> Any:
        if scheduler_output is None:
            raise ValueError("broken")
        return scheduler_output

    monkeypatch.setattr(parallel, "_answers", lambda: answers)
    additional = {"editserver": EngineConfig((1,)).as_dict()} if configured else {}
    worker = SimpleNamespace(vllm_config=SimpleNamespace(additional_config=additional))
    heard = parallel._heard(execute_model)
    assert heard(worker, 3) == 3
    with pytest.raises(raised):
        heard(worker, None)
