"""circuit-tracer's per-layer transcoders mean to us what they mean to circuit-tracer, which wrote them."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_weights import SAEFormatError
from sae_weights.formats import Hints, load_sae
from tests.sae_weights.formats.agreement import check_agreement
from tests.sae_weights.oracle import needs_oracle, run_oracle

LAYERS = 3
CONFIG = """model_name: tiny/model
model_kind: transcoder_set
feature_input_hook: mlp.hook_in
feature_output_hook: mlp.hook_out
"""


def small_tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "W_enc": torch.randn(18, 6, generator=generator),
        "b_enc": torch.randn(18, generator=generator),
        "W_dec": torch.randn(18, 6, generator=generator),
        "b_dec": torch.randn(6, generator=generator),
        "W_skip": torch.randn(6, 6, generator=generator),
        "activation_function.threshold": torch.rand(18, generator=generator),
    }


def write_small(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(CONFIG)
    save_file(small_tensors(), folder / "layer_2.safetensors")
    return folder / "layer_2.safetensors"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    root = tmp_path_factory.mktemp("circuit_tracer")
    run_oracle("oracle_circuit_tracer.py", root)
    return root


def by_oracle(test):
    for mark in needs_oracle:
        test = mark(test)
    return test


CASES = [f"set.{act}.{skip}" for act in ("relu", "jumprelu", "topk", "topk-many") for skip in ("skip", "plain")]


@by_oracle
@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("case", [*CASES, "set.relu.plain.bfloat16"])
def test_a_transcoder_computes_what_circuit_tracer_computes(work, case, layer):
    sae = load_sae(work / case / f"layer_{layer}.safetensors")
    answers = load_file(work / case / "answers.safetensors")
    assert sae.origin.format == "circuit_tracer"
    assert (str(sae.hook), str(sae.hook_out)) == (f"resid_mid({layer})", f"mlp_out({layer})")
    assert sae.metadata["model_name"] == "tiny/model"
    assert "transcoder" in sae.refusal
    check_agreement(sae, answers["x"][layer], answers["f"][layer], answers["x_hat"][layer])


@by_oracle
def test_a_member_of_its_topk_may_be_negative(work):
    answers = load_file(work / "set.topk-many.plain" / "answers.safetensors")
    assert (answers["f"] < 0).any()
    assert load_sae(work / "set.topk-many.plain" / "layer_0.safetensors").signed


def test_a_folder_of_several_layers_asks_which(tmp_path):
    write_small(tmp_path)
    save_file(small_tensors(), tmp_path / "layer_11.safetensors")
    with pytest.raises(SAEFormatError, match=r"holds 2 layers.*layer_2\.safetensors, layer_11\.safetensors"):
        load_sae(tmp_path)
    chosen = load_sae(tmp_path, hints=Hints(hook="blocks.11.mlp.hook_in"))
    assert chosen.hook.layer == 11
    assert chosen.origin.open().hook.layer == 11
    with pytest.raises(SAEFormatError, match="belongs to layer 2"):
        load_sae(tmp_path / "layer_2.safetensors", hints=Hints(hook="blocks.11.mlp.hook_in"))


def test_a_folder_of_one_layer_is_that_layer(tmp_path):
    path = write_small(tmp_path)
    assert load_sae(tmp_path).digest == load_sae(path).digest


@pytest.mark.parametrize("name", ["wandb-config.yaml", "wanb-config.yaml"])
def test_a_set_without_a_config_reads_the_mlp(tmp_path, name):
    path = write_small(tmp_path)
    (tmp_path / "config.yaml").unlink()
    (tmp_path / name).write_text("d_model:\n  value: 6\nd_feature:\n  value: 18\nbatch_size:\n  value: 4096\n")
    sae = load_sae(path)
    assert (str(sae.hook), str(sae.hook_out)) == ("mlp.in(2)", "mlp.out(2)")
    (tmp_path / name).write_text("d_model:\n  value: 6\nd_feature:\n  value: 36\n")
    with pytest.raises(
        SAEFormatError, match=rf"{name}: field 'd_feature' is 36; expected 18, as in layer_2\.safetensors"
    ):
        load_sae(path)


def test_without_any_config_the_hooks_have_to_be_given(tmp_path):
    path = write_small(tmp_path)
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(SAEFormatError, match=r"config\.yaml: field 'feature_input_hook' is missing"):
        load_sae(path)
    sae = load_sae(path, hints=Hints(hook="blocks.2.hook_resid_mid", hook_out="blocks.2.hook_mlp_out"))
    assert (str(sae.hook), str(sae.hook_out)) == ("resid_mid(2)", "mlp_out(2)")


def test_k_is_stated_given_or_known_of_the_set(tmp_path):
    tensors = {name: t for name, t in small_tensors().items() if "threshold" not in name}
    topk = CONFIG + "activation: topk\n"
    path = write_small(tmp_path / "plain")
    save_file(tensors, path)
    (path.parent / "config.yaml").write_text(topk)
    with pytest.raises(SAEFormatError, match=r"config\.yaml: field 'k' is missing"):
        load_sae(path)
    assert load_sae(path, hints=Hints(k=5)).k == 5
    (path.parent / "config.yaml").write_text(topk + "k: 7\n")
    assert load_sae(path).k == 7
    with pytest.raises(SAEFormatError, match="field 'k' is 7; the given k is 5"):
        load_sae(path, hints=Hints(k=5))
    known = write_small(tmp_path / "models--facebook--crv-8b-instruct-transcoders")
    wide = {
        "W_enc": torch.randn(140, 6),
        "b_enc": torch.randn(140),
        "W_dec": torch.randn(140, 6),
        "b_dec": torch.randn(6),
    }
    save_file(wide, known)
    (known.parent / "config.yaml").write_text(topk)
    assert load_sae(known).k == 128


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            CONFIG.replace("mlp.hook_in", "[1, 2]"),
            r"config\.yaml: field 'feature_input_hook' is \[1, 2\]; expected a place",
        ),
        ("model_kind: transcoder_set\n", "field 'feature_input_hook' is missing"),
        (CONFIG + "activation: gelu\n", "field 'activation' is 'gelu'; expected one of relu"),
        (CONFIG + "activation: topk\nk: 0\n", "field 'k' is 0; expected a whole number"),
        (CONFIG + "activation: topk\nk: 5\n", "tensor 'activation_function.threshold' of shape"),
    ],
)
def test_a_wrong_field_is_named(tmp_path, config, message):
    path = write_small(tmp_path)
    (tmp_path / "config.yaml").write_text(config)
    with pytest.raises(SAEFormatError, match=message):
        load_sae(path)


def test_a_jumprelu_that_lets_negative_values_pass_is_refused(tmp_path):
    path = write_small(tmp_path)
    save_file(small_tensors() | {"activation_function.threshold": torch.full((18,), -0.5)}, path)
    with pytest.raises(
        SAEFormatError, match=r"layer_2\.safetensors: tensor 'activation_function\.threshold' has negative"
    ):
        load_sae(path)


def test_a_config_that_points_elsewhere_says_where(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG + "transcoders:\n  - hf://somebody/set/layer_0/params.npz\n")
    with pytest.raises(SAEFormatError, match=r"names files elsewhere \(hf://somebody/set/layer_0/params\.npz"):
        load_sae(tmp_path)
