"""The pieces that decide, without a server: guard, capacity, the engine's word, settings, the command line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from starlette.responses import JSONResponse
from typer.testing import CliRunner

from editserver.api.capacity import Capacity
from editserver.api.edit import Choice
from editserver.api.guard import BodyGuard, UnauthorizedEnvelope
from editserver.api.knowledge import FeatureKnowledge
from editserver.api.plugin import HandshakeError, check_handshake
from editserver.catalogue import CatalogueError, build_catalogue, check_distinct, check_fit, full_encode_ids, open_sae
from editserver.cli import main as cli
from editserver.cli.serve import (
    Options,
    UsageError,
    build_settings,
    demo_flags,
    merged,
    open_saes,
    parse_layers,
    parse_limits,
    plugin_names,
    prepare,
    refuse_flags,
)
from editserver.engine.config import EngineConfig, SAESource
from editserver.engine.journal import Journal
from editserver.engine.rows import Dictionaries
from editserver.engine.wire import StepRecord
from editserver.settings import DoseBound, Settings, SettingsError
from interventions.compile import Compiled
from interventions.errors import InterventionError
from interventions.program import Payload
from sae_weights.formats import save_native
from sae_weights.formats.saelens import save_saelens
from sae_weights.hook import Hook
from sae_weights.knowledge import FILE, KnowledgeStore
from sae_weights.sae import SAE
from tests.engine.dictionaries import random_sae

# guard ---------------------------------------------------------------------------------------------------------------


async def send(
    body: bytes, path: str = "/other", edits: bool = True, limit: int = 1000, **headers: str
) -> httpx.Response:
    seen: list[bytes] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        seen.append(message["body"])
        await JSONResponse({"got": len(message["body"])})(scope, receive, send)

    guard = BodyGuard(app, lambda: limit, lambda: edits)
    transport = httpx.ASGITransport(app=guard)
    async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
        answer = await client.post(path, content=body, headers=headers)
    assert not seen or seen == [body]
    return answer


async def test_plain_bodies_pass_unchanged() -> None:
    for body in (b"", b"{}", b'{"messages": [{"content": "interventions and inspect"}]}', b"\x00\xff", b"[1, 2]"):
        assert (await send(body)).status_code == 200


async def test_our_fields_pass_on_the_edited_routes_only_when_the_server_edits() -> None:
    body = b'{"interventions": [1]}'
    assert (await send(body, "/v1/completions")).status_code == 200
    for answer in (
        await send(body),
        await send(body, "/v1/completions/"),
        await send(body, "/v1/completions", edits=False),
    ):
        assert answer.json()["error"]["code"] == "unsupported_with_interventions"


async def test_absent_values_of_our_fields_pass_everywhere() -> None:
    assert (await send(b'{"interventions": [], "inspect": null}')).status_code == 200


async def test_form_fields_and_lists_of_bodies_are_seen() -> None:
    form = {"content-type": "application/x-www-form-urlencoded"}
    assert (await send(b"interventions=1", **form)).status_code == 400
    multipart = {"content-type": "multipart/form-data; boundary=x"}
    part = b'--x\r\nContent-Disposition: form-data; name="inspect"\r\n\r\n1\r\n--x--'
    assert (await send(part, **multipart)).status_code == 400
    assert (await send(b'[{"a": 1}, {"inspect": {}}]')).status_code == 400


async def test_a_body_over_the_limit_is_refused_with_and_without_a_length() -> None:
    assert (await send(b"x" * 1001)).status_code == 413
    assert (await send(b"x" * 1000)).status_code == 200

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("reached the route")

    messages = [{"type": "http.request", "body": b"x" * 600, "more_body": True}] * 2
    sent: list[Any] = []

    async def receive() -> Any:
        return messages.pop()

    async def collect(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    await BodyGuard(app, lambda: 1000, lambda: True)(scope, receive, collect)
    assert sent[0]["status"] == 413


async def test_vllms_unauthorized_gets_the_envelope_and_other_answers_stay() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        status = 401 if scope["path"] == "/no" else 200
        await JSONResponse({"error": "Unauthorized"}, status)(scope, receive, send)

    transport = httpx.ASGITransport(app=UnauthorizedEnvelope(app))
    async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
        assert (await client.get("/no")).json()["error"]["code"] == "unauthorized"
        assert (await client.get("/yes")).json() == {"error": "Unauthorized"}


# capacity ------------------------------------------------------------------------------------------------------------


def test_capacity_counts_distinct_rows_and_gives_them_back_once() -> None:
    capacity = Capacity(2)
    first = capacity.reserve(["a", "b"])
    second = capacity.reserve(["b"])
    assert capacity.in_use == 2
    second()
    second()
    assert capacity.in_use == 2
    first()
    assert capacity.in_use == 0


def test_capacity_refuses_what_never_fits_and_what_would_wait_too_long() -> None:
    capacity = Capacity(2)
    with pytest.raises(InterventionError) as caught:
        capacity.reserve(["a", "b", "c"])
    assert (caught.value.code, caught.value.status) == ("limit_exceeded", 400)
    held = [capacity.reserve([str(i), str(i + 1)]) for i in range(0, 8, 2)]
    capacity.reserve(["0", "7"])()
    with pytest.raises(InterventionError) as caught:
        capacity.reserve(["new"])
    assert (caught.value.code, caught.value.status) == ("capacity", 429)
    held[0]()
    capacity.reserve(["new"])


# the engine's word ---------------------------------------------------------------------------------------------------


def choice(journal: Journal | None, n_prompt: int = 5, n_output: int = 3, cached: int | None = 0) -> Choice:
    made = Choice(0, list(range(n_prompt)), Compiled(None, ()))
    made.output = list(range(n_output))
    made.journal, made.cached = journal, cached
    return made


def journal(*spans: tuple[int, int]) -> Journal:
    made = Journal(Payload(None, (), None))
    for start, stop in spans:
        made.add(StepRecord(start, stop - start, b"", b"", b""))
    return made


def test_an_output_that_the_engine_vouches_for_passes() -> None:
    choice(journal((0, 5), (5, 7))).check()
    choice(journal((4, 7)), cached=4).check()
    choice(journal((4, 7)), cached=None).check()


@pytest.mark.parametrize(
    ("record", "cached"),
    [
        (None, 0),
        (journal(), 0),
        (journal((0, 5)), 0),
        (journal((0, 4), (5, 7)), 0),
        (journal((1, 7)), 0),
        (journal((4, 7)), 2),
        (journal((5, 7)), None),
    ],
)
def test_an_output_without_a_complete_record_fails_the_request(record: Journal | None, cached: int | None) -> None:
    with pytest.raises(InterventionError) as caught:
        choice(record, cached=cached).check()
    assert (caught.value.code, caught.value.status) == ("intervention_failed", 500)


def test_a_handshake_that_proves_too_little_stops_the_start() -> None:
    config = EngineConfig(armed=(10, 15), saes=(SAESource("a", {"path": "/a"}, "d" * 64, 15),))
    good = {"version": config.version, "ok": True, "armed": [10, 15], "saes": ["d" * 64], "error": None}
    check_handshake(config, [good, good])
    bad: list[list[Any]] = [[], [None], [good, good | {"ok": False}], [good | {"version": "0"}]]
    bad += [[good | {"armed": [10]}], [good | {"saes": []}], [good | {"error": "silent layer"}]]
    for answers in bad:
        with pytest.raises(HandshakeError):
            check_handshake(config, answers)


# settings and command line -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "x", "0", "-1", "nan", "1:cut", "1:"])
def test_a_dose_that_is_no_dose_is_refused(text: str) -> None:
    if text == "1:":
        assert DoseBound.parse(text) == DoseBound(1.0, False)
        return
    with pytest.raises(SettingsError, match="--max-dose"):
        DoseBound.parse(text)


def test_dose_modes() -> None:
    assert DoseBound.parse("0.8") == DoseBound.parse("0.8:clamp") == DoseBound(0.8, False)
    assert DoseBound.parse("2:refuse") == DoseBound(2.0, True)


def test_layers_and_limits_are_read_or_refused_by_option() -> None:
    assert parse_layers("10, 15", lambda: 0) == {10, 15}
    assert parse_layers("all", lambda: 3) == {0, 1, 2}
    assert parse_limits(["rows=7", "top-k=3"], 9).as_dict().items() >= {"rows": 7, "top_k": 3, "bank_rows": 9}.items()
    for broken in ("", "a", "1-3", "-1"):
        with pytest.raises(UsageError, match="--arm-layers"):
            parse_layers(broken, lambda: 3)
    for limits, bank in ((["row=1"], None), (["rows=x"], None), (["rows=9"], 3), (["interventions=64"], None)):
        with pytest.raises(UsageError, match="--limit"):
            parse_limits(limits, bank)
    with pytest.raises(UsageError, match="--library"):
        build_settings(Options(library=Path("s3://bucket/x")))
    with pytest.raises(UsageError, match="--max-body-mib"):
        build_settings(Options(max_body_mib=0))


def test_the_demos_flags_give_way_to_the_users() -> None:
    flags = demo_flags(["--max_model_len", "99", "--dtype=float32"])
    assert "--max-model-len" not in flags
    assert "--dtype" not in flags
    assert "--served-model-name" in flags


def test_vllms_plugins_stay_enabled(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plugin_names("mine,other") == ["mine", "other", "editserver"]
    assert plugin_names("editserver") == ["editserver"]
    names = plugin_names(None)
    assert names[0] == "editserver"
    assert "lora_filesystem_resolver" in names


def test_what_only_the_command_line_shows_is_refused_by_name() -> None:
    plain = {"api_server_count": None, "headless": False, "grpc": False, "skip_tokenizer_init": False}
    refuse_flags(SimpleNamespace(**plain))  # type: ignore[arg-type]
    for change in ({"api_server_count": 2}, {"headless": True}, {"grpc": True}, {"skip_tokenizer_init": True}):
        with pytest.raises(UsageError, match=next(iter(change)).replace("_", "-")):
            refuse_flags(SimpleNamespace(**plain | change))  # type: ignore[arg-type]


def test_additional_config_is_merged_and_our_key_protected() -> None:
    config = EngineConfig(armed=(1,))
    assert merged({"x": 1}, config) == {"x": 1, "editserver": config.as_dict()}
    for broken in ({"editserver": {}}, [1]):
        with pytest.raises(UsageError, match="--additional-config"):
            merged(broken, config)


def make_sae(folder: Path, hook: Hook, d: int = 8) -> Path:
    rows = torch.eye(d)
    gate = {"b_enc": torch.zeros(d)}
    sae = SAE.from_tensors(architecture="relu", hook=hook, W_enc=rows, W_dec=rows, b_dec=torch.zeros(d), gate=gate)
    return save_saelens(sae, folder)


def test_an_sae_on_another_hook_is_refused_naming_the_hook(tmp_path: Path) -> None:
    make_sae(tmp_path / "mlp", Hook("mlp_out", 3))
    with pytest.raises(CatalogueError, match=r"mlp_out\(3\)"):
        open_sae(f"x={tmp_path / 'mlp'}")
    pre = make_sae(tmp_path / "pre", Hook("resid_pre", 4))
    assert open_sae(f"a/b={pre}").layer == 3
    assert open_sae(str(pre)).id == "pre"
    with pytest.raises(UsageError, match="is taken"):
        open_saes([f"x={pre}", f"x={pre}"])
    with pytest.raises(UsageError, match="/nowhere"):
        open_saes(["x=/nowhere"])


def make_topk(folder: Path, theta: Any = None, architecture: str = "topk") -> Path:
    sae = random_sae(
        architecture, 8, n=32, layer=3, metadata=None if theta is None else {"calibrated_threshold": theta}
    )
    return save_native(sae, folder)


def test_a_dictionary_that_no_server_can_edit_is_refused_naming_its_hooks(tmp_path: Path) -> None:
    rows = torch.eye(8)
    sae = SAE.from_tensors(
        architecture="relu",
        hook=Hook("ln2", 3),
        hook_out=Hook("mlp_out", 3),
        W_enc=rows,
        W_dec=rows,
        b_dec=torch.zeros(8),
        gate={"b_enc": torch.zeros(8)},
    )
    with pytest.raises(CatalogueError, match=r"--sae x=.*transcoder.*ln2\(3\).*mlp_out\(3\)"):
        open_sae(f"x={save_native(sae, tmp_path / 'transcoder')}")


def test_an_sae_of_another_model_is_refused_naming_both_widths_and_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_sae(tmp_path / "a", Hook("resid_post", 3))
    opened = [open_sae(f"mine={folder}")]
    check_fit(opened, 8, 4)
    with pytest.raises(CatalogueError) as caught:
        check_fit(opened, 576, 30)
    for word in ("mine", str(folder), "d_model 8", "576"):
        assert word in str(caught.value)
    with pytest.raises(CatalogueError, match=r"mine .*resid_post\(3\).*0\.\.2"):
        check_fit(opened, 8, 3)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    with pytest.raises(UsageError, match=r"mine .*d_model 8, the model has 576"):  # before anything is started
        prepare("demo", Options(saes=(f"mine={folder}",)), [])
    config = EngineConfig(armed=(3,), saes=(opened[0].source(),))
    shape = {"n_layers": 4, "vocab_size": 10, "tokenizer": None}
    with pytest.raises(CatalogueError, match=r"mine .*d_model 8, the model has 16"):
        build_catalogue(config, Settings(library=tmp_path), d_model=16, **shape)
    changed = dataclasses.replace(opened[0].source(), digest="0" * 64)
    with pytest.raises(CatalogueError, match=r"mine .*changed since the start"):
        build_catalogue(dataclasses.replace(config, saes=(changed,)), Settings(library=tmp_path), d_model=8, **shape)


def test_a_calibrated_threshold_stands_in_for_the_membership_rule(tmp_path: Path) -> None:
    folder = make_topk(tmp_path / "topk", 0.75)
    (exact,), (stand_in,) = open_saes([f"t={folder}"]), open_saes([f"t={folder}"], ["t"])
    assert (exact.sae.row_separable, stand_in.sae.row_separable) == (False, True)
    assert stand_in.sae.digest == exact.sae.thresholded(0.75).digest != exact.sae.digest
    both = [one.source() for one in (exact, dataclasses.replace(stand_in, id="cheap"))]
    for source in both:  # as another process does
        again = SAESource(**json.loads(json.dumps(dataclasses.asdict(source))))
        assert again.open().digest == source.digest
    config = EngineConfig(armed=(3,), saes=tuple(both))
    catalogue = build_catalogue(
        config, Settings(library=tmp_path), d_model=8, n_layers=4, vocab_size=10, tokenizer=None
    )
    shown = {name: sae.as_dict() for name, sae in catalogue.saes.items()}
    assert (shown["cheap"]["approximate"], shown["cheap"]["approximates"]) == (True, "topk (k = 4)")
    assert (shown["cheap"]["execution"], shown["cheap"]["editable"]) == ("row", True)
    assert (shown["t"]["approximate"], shown["t"]["execution"], shown["t"]["editable"]) == (False, "dictionary", False)
    for flag in ("--full-encode t", "--approximate t"):
        assert flag in shown["t"]["reason"]
    assert "reason" not in shown["cheap"]


@pytest.mark.parametrize(
    ("theta", "architecture", "reason"),
    [
        (None, "topk", r"no calibrated threshold.*editserver sae calibrate"),
        ("1", "topk", r"no calibrated threshold"),
        (-1.0, "topk", r"threshold: -1"),
        (1.0, "jumprelu", "edited exactly, row by row"),
        (1.0, "abstopk", "--full-encode t edits it exactly"),
        (1.0, "polysae", "--full-encode t edits it exactly"),
    ],
)
def test_what_no_threshold_can_stand_in_for_is_refused_by_name(
    tmp_path: Path, theta: Any, architecture: str, reason: str
) -> None:
    folder = make_topk(tmp_path / "sae", theta, architecture)
    with pytest.raises(UsageError, match=rf"--approximate t: .*{reason}"):
        open_saes([f"t={folder}"], ["t"])
    with pytest.raises(UsageError, match="--approximate u: no such SAE here; served are t"):
        open_saes([f"t={folder}"], ["u"])


def test_knowledge_of_a_dictionary_is_that_of_its_stand_in(tmp_path: Path) -> None:
    folder = make_topk(tmp_path / "topk", 0.75)
    (stand_in,) = open_saes([f"t={folder}"], ["t"])
    digest = open_sae(f"t={folder}").sae.digest
    with KnowledgeStore.create(folder / FILE, sae_digest=digest, n_features=32, meta={}) as writer:
        writer.set_labels([(1, "Paris, France", "hand")])
    assert FeatureKnowledge.read(folder, stand_in.sae).listing(1)["label"] == "Paris, France"


def test_opening_a_dictionary_reads_no_matrix_in_any_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In editserver's own layout, whose file carries the digest."""
    folder = make_topk(tmp_path / "topk", 0.75)
    monkeypatch.setattr(SAE, "blocks", lambda self: pytest.fail("the dictionary was read as a whole"))
    monkeypatch.setattr(SAE, "read", lambda self, rows: pytest.fail("rows were read"))
    opened = open_saes([f"exact={folder}", f"cheap={folder}"], ["cheap"])
    config = EngineConfig.from_dict(
        EngineConfig(armed=(3,), saes=tuple(one.source() for one in opened), full_encode=("exact",)).as_dict()
    )
    assert len(Dictionaries(config).digests) == 2
    build_catalogue(config, Settings(library=tmp_path), d_model=8, n_layers=4, vocab_size=10, tokenizer=None)


def test_full_encode_is_on_for_small_dictionaries_unless_told(tmp_path: Path) -> None:
    opened = [open_sae(f"a={make_sae(tmp_path / 'a', Hook('resid_post', 1))}")]
    assert full_encode_ids(opened, []) == ("a",)
    assert full_encode_ids(opened, ["none"]) == ()
    for chosen in (["b"], ["none", "a"]):
        with pytest.raises(CatalogueError, match="--full-encode"):
            full_encode_ids(opened, chosen)


def test_feature_knowledge_is_what_the_files_say(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_sae(tmp_path / "a", Hook("resid_post", 1))
    sae = open_sae(str(folder)).sae
    assert FeatureKnowledge.read(folder, sae).listing(2) == {
        "index": 2, "label": None, "density": None, "max_activation": None
    }  # fmt: skip
    with KnowledgeStore.create(folder / FILE, sae_digest=sae.digest, n_features=sae.n_features, meta={}) as writer:
        writer.set_labels([(1, "Paris, France", "hand")])
    known = FeatureKnowledge.read(folder, sae)
    assert [(f["index"], f["score"]) for f in known.search("paris rome", 5)] == [(1, 0.5)]
    assert not caplog.records
    (folder / FILE).write_text("[{}]")
    damaged = FeatureKnowledge.read(folder, sae)
    assert (damaged.labels, damaged.search("paris", 5), damaged.card(1)["contexts"]) == ({}, [], None)
    assert "not a file of feature knowledge" in caplog.text


def test_knowledge_of_other_weights_is_not_served(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_sae(tmp_path / "a", Hook("resid_post", 1))
    sae = open_sae(str(folder)).sae
    with KnowledgeStore.create(folder / FILE, sae_digest="0" * 64, n_features=sae.n_features, meta={}) as writer:
        writer.set_labels([(1, "of another dictionary", "hand")])
    assert FeatureKnowledge.read(folder, sae).listing(1)["label"] is None
    assert "digest 000000000000…" in caplog.text


def test_help_teaches_and_our_options_do_not_shadow_vllms() -> None:
    runner = CliRunner()
    text = runner.invoke(cli.app, ["serve", "--help"]).output
    for word in ("--sae", "--arm-layers", "--max-dose", "editserver serve demo", "--vllm-help"):
        assert word in text
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    theirs = {
        option for action in make_arg_parser(FlexibleArgumentParser())._actions for option in action.option_strings
    }
    command = next(c for c in cli.app.registered_commands if c.callback is cli.serve)
    assert command is not None
    ours = set(np.unique([word for word in text.split() if word.startswith("--") and word != "--help"]))
    assert not {option for option in ours if option in theirs} - {"--max-model-len", "--api-key", "--port"}


def test_our_options_may_be_spelt_with_underscores_as_vllms() -> None:
    spelt = cli.with_dashes(
        ["serve", "my_model", "--max_dose", "a_b", "--sae=x_y", "--arm_layers=1", "--a_b.c_d", "-tp"]
    )
    assert spelt == ["serve", "my_model", "--max-dose", "a_b", "--sae=x_y", "--arm-layers=1", "--a-b.c_d", "-tp"]


def test_an_unknown_flag_is_vllms_parsers_error(capfd: pytest.CaptureFixture[str]) -> None:
    outcome = CliRunner().invoke(cli.app, ["serve", "/nowhere", "--arm-layers", "1", "--no-such-flag"])
    assert outcome.exit_code == 2
    assert "--no-such-flag" in outcome.output + capfd.readouterr().err
    outcome = CliRunner().invoke(cli.app, ["serve", "--port", "8000"])
    assert outcome.exit_code == 2


def test_a_file_that_carries_another_dictionarys_digest_is_found_out(tmp_path: Path) -> None:
    """Programs know dictionaries by digest: a lying header must not put one dictionary's rows in another's place."""

    honest = save_native(random_sae("relu", 8, layer=2, seed=1), tmp_path / "honest")
    same = save_native(random_sae("relu", 8, layer=2, seed=1), tmp_path / "same")
    lying = save_native(random_sae("relu", 8, layer=2, seed=2), tmp_path / "lying")
    weights = lying / "sae.safetensors"
    claimed, own = (open_sae(str(folder)).sae.digest.encode() for folder in (honest, lying))
    weights.write_bytes(weights.read_bytes().replace(own, claimed))
    check_distinct([open_sae(str(honest)), open_sae(str(same))])
    with pytest.raises(CatalogueError, match=r"SAE lying: .* carries the digest"):
        check_distinct([open_sae(str(honest)), open_sae(str(lying))])
