"""Finding and arming decoder layers: on a transformers Llama and on modules shaped like vLLM's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from editserver.engine import op, splice
from editserver.engine.config import EngineConfig
from editserver.engine.splice import UnsupportedModel
from editserver.engine.worker import EngineWorker
from interventions.compile import compile_request
from interventions.program import Payload
from interventions.spec import parse_interventions

D, DEPTH = 64, 4
ATTENTION = [f"model.layers.{i}.self_attn.attn" for i in range(DEPTH)]


class Block(nn.Module):
    """A decoder layer as most of vLLM's families have it: the residual stream is the sum of what it returns."""

    def __init__(self, returns: str = "split") -> None:
        super().__init__()
        self.returns = returns
        self.proj = nn.Linear(D, D)
        self.self_attn = nn.Module()

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor | None = None) -> object:
        stream = hidden.clone() if residual is None else hidden + residual
        out = self.proj(stream)
        if self.returns == "split":
            return out, stream
        return (out + stream, None) if self.returns == "no residual" else out + stream


class PPMissingLayer(nn.Identity):
    """What vLLM puts where another pipeline rank has the layer."""


class Decoder(nn.Module):
    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


class Model(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.model = Decoder(list(layers) or [Block() for _ in range(DEPTH)])


@pytest.fixture
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=D, intermediate_size=96, num_hidden_layers=DEPTH, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def worker() -> Iterator[EngineWorker]:
    """An engine armed at layers 1 and 3, in place of whichever this process has; its next step adds 5 to unit 0."""
    before = op.current()
    worker = EngineWorker(EngineConfig((1, 3)), D, torch.float32, 32)
    op.install(worker)
    yield worker
    op._worker = before


def plan(worker: EngineWorker, payload: Payload, n: int) -> None:
    worker.add_request("a", payload, list(range(len(payload.row_keys))), n)
    positions = np.arange(n)
    worker.begin_step(["a"], np.array([0, n], np.int32), positions, positions.astype(np.int32))


def steering(layer: int) -> Payload:
    class Shape:
        """All that compiling a given vector asks of a server."""

        from interventions.limits import Limits

        d_model, n_layers, vocab_size, armed_layers, limits = D, DEPTH, 50, (1, 3), Limits()
        max_dose, refuse_over_dose = float("inf"), False

    values = [5.0] + [0.0] * (D - 1)
    spec = parse_interventions([{"type": "steer", "values": values, "layer": layer, "include_bos": True}])
    return compile_request(spec, [], Shape()).payload()  # type: ignore[arg-type]


def test_both_ways_find_the_layers_of_a_transformers_model(llama: LlamaForCausalLM) -> None:
    found = splice.locate(llama, DEPTH, ATTENTION)
    assert [found[i] for i in range(DEPTH)] == list(llama.model.layers)


def test_a_multimodal_models_language_model_is_searched_not_its_vision_tower(llama: LlamaForCausalLM) -> None:
    both = nn.Module()
    both.tower = Decoder([Block() for _ in range(DEPTH)])
    both.language_model = llama
    names = [f"language_model.{name}" for name in ATTENTION]
    with pytest.raises(UnsupportedModel, match="2 lists of 4 layers"):
        splice.locate(both, DEPTH, names)
    both.get_language_model = lambda: llama
    assert list(splice.locate(both, DEPTH, names).values()) == list(llama.model.layers)


def test_layers_of_other_pipeline_ranks_are_left_out() -> None:
    model = Model(PPMissingLayer(), PPMissingLayer(), Block(), Block())
    assert sorted(splice.locate(model, DEPTH, ATTENTION[2:])) == [2, 3]


def test_a_drafters_layers_in_the_same_table_do_not_confuse(llama: LlamaForCausalLM) -> None:
    names = [*ATTENTION, "drafter.layers.0.self_attn.attn", "model.embedder.attn"]
    assert sorted(splice.locate(llama, DEPTH, names)) == list(range(DEPTH))


@pytest.mark.parametrize(
    ("names", "at"), [(ATTENTION[:-1], r"\[3\]"), (ATTENTION[1:], r"\[0\]"), ([], r"\[0, 1, 2, 3\]")]
)
def test_ways_that_disagree_are_refused_naming_both(names: list[str], at: str) -> None:
    with pytest.raises(UnsupportedModel, match=rf"found by shape and by attention differ at {at}") as refused:
        splice.locate(Model(), DEPTH, names)
    assert f"({DEPTH} and {len(names)} found)" in str(refused.value)
    assert "Model" in str(refused.value)


def test_the_same_indices_in_another_list_are_a_disagreement() -> None:
    model = Model()
    model.other = Decoder([Block() for _ in range(DEPTH + 1)])
    names = [f"other.layers.{i}.self_attn.attn" for i in range(DEPTH)]
    with pytest.raises(UnsupportedModel, match="differ at"):
        splice.locate(model, DEPTH, names)


def test_no_list_of_the_models_depth_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="0 lists of 7 layers"):
        splice.locate(Model(), 7, ATTENTION)


def test_a_list_of_as_many_different_things_is_not_taken_for_layers() -> None:
    model = Model()
    model.heads = nn.ModuleList([nn.Linear(2, 2), nn.ReLU(), nn.Tanh(), nn.GELU()])
    assert sorted(splice.locate(model, DEPTH, ATTENTION)) == list(range(DEPTH))


def test_an_armed_layer_keeps_its_names_class_and_state(llama: LlamaForCausalLM) -> None:
    names = [name for name, _ in llama.named_parameters()]
    modules = [name for name, _ in llama.named_modules()]
    weights = copy.deepcopy(llama.state_dict())
    base = type(llama.model.layers[1])
    assert splice.arm(splice.locate(llama, DEPTH, ATTENTION), (1, 3)) == [1, 3]
    assert [name for name, _ in llama.named_parameters()] == names
    assert [name for name, _ in llama.named_modules()] == modules
    assert llama.load_state_dict(weights) == ([], [])
    for i, layer in enumerate(llama.model.layers):
        assert isinstance(layer, base)
        assert (type(layer) is base) == (i not in (1, 3))
        assert getattr(type(layer), "editserver_layer", None) == (i if i in (1, 3) else None)
    assert llama.model.layers[1].__class__.__name__ == f"Edited{base.__name__}"
    assert not hasattr(base, "editserver_layer"), "other instances, a drafter's say, are as they were"


def test_arming_twice_is_refused() -> None:
    layers = splice.locate(Model(), DEPTH, ATTENTION)
    splice.arm(layers, (1,))
    with pytest.raises(UnsupportedModel, match="layer 1 is armed already"):
        splice.arm(layers, (2, 1))


def test_a_layer_that_is_not_there_is_refused_naming_those_that_are() -> None:
    model = Model(PPMissingLayer(), Block(), Block(), Block())
    with pytest.raises(UnsupportedModel, match=r"layer 0 cannot be armed: this worker has the layers \[1, 2, 3\]"):
        splice.arm(splice.locate(model, DEPTH, ATTENTION[1:]), (0,))


def test_an_idle_armed_model_computes_the_same_bits(llama: LlamaForCausalLM, worker: EngineWorker) -> None:
    ids = torch.arange(8)[None]
    with torch.no_grad():
        before = llama(ids).logits
        splice.arm(splice.locate(llama, DEPTH, ATTENTION), (1, 3))
        assert torch.equal(llama(ids).logits, before)


@pytest.mark.parametrize("returns", ["split", "no residual", "stream"])
def test_an_armed_layer_edits_the_stream_in_whatever_form_it_is_returned(worker: EngineWorker, returns: str) -> None:
    torch.manual_seed(1)
    model = Model(*(Block(returns) for _ in range(DEPTH)))
    hidden = torch.randn(6, D)
    with torch.no_grad():
        plain = model.model.layers[1](hidden)
        splice.arm(splice.locate(model, DEPTH, ATTENTION), (1, 3))
        plan(worker, steering(1), 6)
        edited = model.model.layers[1](hidden)
    assert type(edited) is type(plain)
    delta = _stream(edited) - _stream(plain)
    assert torch.allclose(delta[:, 0], torch.tensor(5.0), atol=1e-5)
    assert torch.allclose(delta[:, 1:], torch.tensor(0.0), atol=1e-5)
    if returns == "split":
        assert not edited[0].any(), "the delta and the sum are in the residual"


class Streams(nn.Module):
    """A layer that takes positions first, as vLLM's do, and returns ``shape(tokens)``."""

    def __init__(self, shape: Callable[[int], tuple[int, ...]]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, positions: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(self.shape(len(positions))), torch.zeros(self.shape(len(positions)))


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        (lambda n: (n, 4, D), rf"shape \(6, 4, {D}\), not one row of {D} numbers per token"),
        (lambda n: (n, D // 2), rf"shape \(6, {D // 2}\), not one row of {D} numbers per token"),
        (lambda n: (n // 2, D), "3 rows for 6 positions: the residual stream is shared out between ranks"),
        (lambda n: (n, 1, D), rf"shape \(6, 1, {D}\)"),
        (lambda n: (1, n, D), rf"shape \(1, 6, {D}\)"),
    ],
)
@pytest.mark.parametrize("by_name", [False, True])
def test_a_layer_that_does_not_return_one_row_per_position_is_refused_as_soon_as_it_runs(
    worker: EngineWorker, shape: Callable[[int], tuple[int, ...]], said: str, by_name: bool
) -> None:
    layer, given = Streams(shape), {"positions": torch.arange(6), "hidden": torch.zeros(6, D)}
    splice.arm({1: layer}, (1,), D)
    with pytest.raises(UnsupportedModel, match=rf"layer 1 returns .*{said}"):
        layer(**given) if by_name else layer(*given.values())


def test_layers_in_the_form_of_transformers_have_a_batch_of_one(llama: LlamaForCausalLM, worker: EngineWorker) -> None:
    splice.arm(splice.locate(llama, DEPTH, ATTENTION), (1,), D)
    with torch.no_grad():
        llama(torch.arange(6)[None])
        with pytest.raises(UnsupportedModel, match=rf"shape \(2, 6, {D}\)"):
            llama(torch.arange(6).repeat(2, 1))


def test_an_edit_at_one_armed_layer_leaves_the_other_alone(llama: LlamaForCausalLM, worker: EngineWorker) -> None:
    seen: dict[int, torch.Tensor] = {}
    splice.arm(splice.locate(llama, DEPTH, ATTENTION), (1, 3))
    for i, layer in enumerate(llama.model.layers):
        layer.register_forward_hook(lambda _m, _i, out, i=i: seen.__setitem__(i, _stream(out).clone()))
    ids = torch.arange(8)[None]
    with torch.no_grad():
        llama(ids)
        plain = dict(seen)
        plan(worker, steering(3), 8)
        llama(ids)
    assert all(torch.equal(seen[i], plain[i]) for i in (0, 1, 2))
    assert torch.allclose((seen[3] - plain[3])[0, :, 0], torch.tensor(5.0), atol=1e-5)


def test_torch_compile_keeps_the_op_in_one_graph(llama: LlamaForCausalLM, worker: EngineWorker) -> None:
    """What is edited is looked up when the op runs: one traced graph serves an idle step and an edited one."""
    splice.arm(splice.locate(llama, DEPTH, ATTENTION), (1,))
    layer = llama.model.layers[1]
    graphs = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    hidden = torch.randn(1, 5, D)
    rotary = llama.model.rotary_emb(hidden, torch.arange(5)[None])
    compiled = torch.compile(lambda h: layer(h, position_embeddings=rotary), backend=backend, fullgraph=True)
    with torch.no_grad():
        idle = _stream(compiled(hidden))
        plan(worker, steering(1), 5)
        edited = _stream(compiled(hidden))
    assert len(graphs) == 1
    assert "editserver.edit_stream" in str(graphs[0].code)
    assert torch.allclose((edited - idle)[0, :, 0], torch.tensor(5.0), atol=1e-5)


def test_an_armed_layer_in_a_process_without_an_engine_is_an_error(worker: EngineWorker) -> None:
    model = Model()
    splice.arm(splice.locate(model, DEPTH, ATTENTION), (1,))
    op._worker = None
    with pytest.raises(RuntimeError, match="no editserver engine"):
        model.model.layers[1](torch.randn(2, D))


def _stream(output: object) -> torch.Tensor:
    if isinstance(output, torch.Tensor):
        return output
    assert isinstance(output, tuple)
    return output[0] if output[1] is None else output[0] + output[1]
