"""How a server is started: settings, dictionaries, and what the command line makes of them, without a server."""

from __future__ import annotations

import dataclasses
import json
import os
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from editserver.api.knowledge import FeatureKnowledge
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
    slow_numbers,
    start_sooner,
)
from editserver.engine.config import EngineConfig, SAESource
from editserver.engine.rows import Dictionaries
from editserver.settings import DoseBound, Settings, SettingsError
from sae_weights.formats import save_native
from sae_weights.formats.saelens import save_saelens
from sae_weights.hook import Hook
from sae_weights.knowledge import FILE, KnowledgeStore
from sae_weights.sae import SAE
from tests.engine.dictionaries import random_sae


@pytest.mark.parametrize("text", ["", "x", "0", "-1", "nan", "1:cut"])
def test_a_dose_that_is_no_dose_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="--max-dose"):
        DoseBound.parse(text)


def test_dose_modes() -> None:
    assert DoseBound.parse("0.8") == DoseBound.parse("0.8:") == DoseBound.parse("0.8:clamp") == DoseBound(0.8, False)
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


@pytest.mark.parametrize(("multiplies", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_the_demo_computes_in_what_the_cpu_multiplies_and_others_are_told(
    multiplies: bool, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: multiplies)
    flags = demo_flags([])
    assert flags[flags.index("--dtype") + 1] == dtype
    assert slow_numbers(Namespace(dtype="float32")) is None
    said = slow_numbers(Namespace(dtype="auto"))
    assert said is None if multiplies else said is not None and "--dtype float32" in said


def test_the_demo_is_served_under_its_name_with_its_layers_armed_and_one_api_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_PLUGINS", "editserver")
    monkeypatch.setenv("VLLM_USE_AOT_COMPILE", "1")
    args = prepare("demo", Options(), ["--data-parallel-size", "2"])
    config = EngineConfig.from_dict(args.additional_config["editserver"])
    assert config.armed == (10, 15, 20)
    assert [source.id for source in config.saes] == ["smollm2-135m/l10", "smollm2-135m/l15", "smollm2-135m/l20"]
    assert config.full_encode == tuple(source.id for source in config.saes)
    assert args.served_model_name == ["smollm2-135m-instruct"]
    assert args.enable_prompt_tokens_details  # receipts say what came from the prefix cache
    assert args.api_server_count == 1  # bank and receipts belong to one, however many engines there are
    assert os.environ["VLLM_USE_AOT_COMPILE"] == "1"  # the user's word


def test_on_a_cpu_inductors_cache_serves_the_next_start(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform

    for on_cpu, wanted in ((True, "0"), (False, None)):
        monkeypatch.setenv("VLLM_USE_AOT_COMPILE", "")
        monkeypatch.delenv("VLLM_USE_AOT_COMPILE")
        monkeypatch.setattr(type(current_platform), "is_cpu", lambda _, on_cpu=on_cpu: on_cpu)
        start_sooner()
        assert os.environ.get("VLLM_USE_AOT_COMPILE") == wanted


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
    sizes: Any = [SimpleNamespace(id=f"{n}", sae=SimpleNamespace(n_features=n)) for n in (32_768, 32_769)]
    assert full_encode_ids(sizes, []) == ("32768",)
    assert full_encode_ids(sizes, ["32769"]) == ("32768", "32769")
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
