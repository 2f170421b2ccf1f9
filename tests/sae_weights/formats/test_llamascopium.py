"""llamascopium's folders mean to us what they mean to llamascopium, which wrote them."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_weights import SAEFormatError
from sae_weights.formats import Hints, load_sae
from tests.sae_weights.formats.agreement import assert_near, check_agreement
from tests.sae_weights.oracle import needs_oracle, run_oracle

D, N, LAYERS = 12, 48, 3


def small_config(**changes):
    return {
        "sae_type": "sae",
        "d_model": 6,
        "expansion_factor": 3.0,
        "use_decoder_bias": True,
        "act_fn": "jumprelu",
        "norm_activation": "dataset-wise",
        "sparsity_include_decoder_norm": True,
        "top_k": 4,
        "use_triton_kernel": False,
        "sparsity_threshold_for_triton_spmm_kernel": 0.996,
        "jumprelu_threshold_window": 2.0,
        "hook_point_in": "blocks.2.hook_resid_post",
        "hook_point_out": "blocks.2.hook_resid_post",
        "use_glu_encoder": False,
    } | changes


def small_tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "W_E": torch.randn(6, 18, generator=generator),
        "b_E": torch.randn(18, generator=generator),
        "W_D": torch.randn(18, 6, generator=generator),
        "b_D": torch.randn(6, generator=generator),
        "activation_function.log_jumprelu_threshold": torch.randn(18, generator=generator),
        "dataset_average_activation_norm.blocks.2.hook_resid_post": torch.tensor(3.5),
    }


def write_small(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(small_config(), indent=4))
    save_file(small_tensors(), folder / "sae_weights.safetensors")
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    root = tmp_path_factory.mktemp("llamascopium")
    run_oracle("oracle_llamascopium.py", root)
    return root


def by_oracle(test):
    for mark in needs_oracle:
        test = mark(test)
    return test


SAES = [
    f"sae.{act}.{norm}.{gate}"
    for act in ("relu", "jumprelu", "topk", "batchtopk")
    for norm in ("dataset-wise", "token-wise", "inference")
    for gate in ("gated-by-norm", "plain")
] + ["sae.no-decoder-bias", "sae.bfloat16"]
GLUS = [
    f"glu.{act}.{norm}" for act in ("relu", "jumprelu", "topk") for norm in ("dataset-wise", "token-wise", "inference")
]
TRANSCODERS = [
    f"transcoder.{act}.{norm}" for act in ("relu", "jumprelu", "topk") for norm in ("dataset-wise", "inference")
]


@by_oracle
@pytest.mark.parametrize("case", SAES + GLUS)
def test_an_sae_computes_what_llamascopium_computes(work, case):
    sae = load_sae(work / case)
    answers = load_file(work / case / "answers.safetensors")
    assert sae.origin.format == "llamascopium"
    assert sae.hook.edit_layer == 7
    assert sae.refusal is None
    assert sae.architecture == {"sae": sae.architecture, "glu": "glu"}[case.split(".")[0]]
    check_agreement(sae, answers["x"], answers["f"], answers["x_hat"])


@by_oracle
@pytest.mark.parametrize("case", TRANSCODERS)
def test_a_transcoder_computes_what_llamascopium_computes_and_is_not_served(work, case):
    sae = load_sae(work / case)
    answers = load_file(work / case / "answers.safetensors")
    assert (str(sae.hook), str(sae.hook_out)) == ("ln2.normalized(7)", "mlp_out(7)")
    assert "transcoder" in sae.refusal
    check_agreement(sae, answers["x"], answers["f"], answers["x_hat"])


@by_oracle
@pytest.mark.parametrize("norm", ["dataset-wise", "inference"])
@pytest.mark.parametrize("act", ["relu", "jumprelu", "topk"])
def test_a_crosscoder_reads_and_writes_all_its_places(work, act, norm):
    folder = work / f"crosscoder.{act}.{norm}"
    sae, answers = load_sae(folder), load_file(folder / "answers.safetensors")
    assert [str(hook) for hook in sae.hooks] == ["resid_post(0)", "resid_post(1)", "resid_post(2)"]
    assert "crosscoder" in sae.refusal
    per_place = answers["f"]
    # llamascopium gates every place by itself: where a latent is on at all, it has the same value at each open place.
    check_agreement(sae, answers["x"].flatten(1), per_place.amax(dim=1), answers["x_hat"].flatten(1))
    if act != "relu":
        assert ((per_place > 0).any(dim=1) & ~(per_place > 0).all(dim=1)).any(), "no gate differs between places"


@by_oracle
@pytest.mark.parametrize("gate", ["gated-by-norm", "plain"])
@pytest.mark.parametrize("norm", ["dataset-wise", "inference"])
@pytest.mark.parametrize("act", ["relu", "jumprelu", "topk"])
def test_the_layers_of_a_clt_add_up_to_the_whole(work, act, norm, gate):
    folder = work / f"clt.{act}.{norm}.{gate}"
    answers = load_file(folder / "answers.safetensors")
    x, f, x_hat = answers["x"], answers["f"], answers["x_hat"]
    total = torch.zeros_like(x_hat)
    for layer in range(LAYERS):
        sae = load_sae(folder, hints=Hints(hook=f"blocks.{layer}.ln2.hook_normalized"))
        assert (sae.d_model, sae.d_out) == (D, (LAYERS - layer) * D)
        assert sae.metadata["hook_names_out"] == [f"blocks.{out}.hook_mlp_out" for out in range(layer, LAYERS)]
        written = sae.decode_for(x[:, layer], f[:, layer])
        total[:, layer:] += written.unflatten(1, (LAYERS - layer, D))
        check_agreement(sae, x[:, layer], f[:, layer], written)
    assert_near(total, x_hat, "the sum of all layers")


def test_a_clt_asks_which_layer(tmp_path):
    places = {"hook_points_in": ["blocks.0.hook_resid_mid", "blocks.1.hook_resid_mid"]}
    places["hook_points_out"] = ["blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"]
    config = small_config(sae_type="clt", act_fn="relu", norm_activation="inference") | places
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {"W_E": torch.randn(2, 6, 18), "b_E": torch.randn(2, 18)}
    tensors |= {f"W_D.{i}": torch.randn(i + 1, 18, 6) for i in range(2)} | {
        f"b_D.{i}": torch.randn(6) for i in range(2)
    }
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    with pytest.raises(SAEFormatError, match=r"holds 2 layers.*blocks\.0\.hook_resid_mid, blocks\.1\.hook_resid_mid"):
        load_sae(tmp_path)
    with pytest.raises(SAEFormatError, match="reads blocks"):
        load_sae(tmp_path, hints=Hints(hook="blocks.5.hook_resid_mid"))
    assert load_sae(tmp_path, hints=Hints(hook="blocks.1.hook_resid_mid")).d_out == 6


def test_norms_that_were_never_measured_are_not_read(tmp_path):
    write_small(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(small_config(norm_activation="inference")))
    name = "dataset_average_activation_norm.blocks.2.hook_resid_post"
    digests = set()
    for value in (3.5, float("nan"), 0.0):
        save_file(small_tensors() | {name: torch.tensor(value)}, tmp_path / "sae_weights.safetensors")
        digests.add(load_sae(tmp_path).digest)
    assert len(digests) == 1


def test_a_pt_file_holds_the_same(tmp_path):
    safe = load_sae(write_small(tmp_path / "safe"))
    folder = write_small(tmp_path / "pickled")
    (folder / "sae_weights.safetensors").unlink()
    torch.save({"sae": small_tensors(), "version": "2.0.0b34"}, folder / "sae_weights.pt")
    assert load_sae(folder).digest == safe.digest


def test_what_is_stored_survives_a_reopening(tmp_path):
    sae = load_sae(write_small(tmp_path))
    again = sae.origin.open()
    assert again.digest == sae.digest
    assert not sae.materialised


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sae_type": "lorsa"},
            r"config\.json: field 'sae_type' is 'lorsa', which is refused: its latents are attention",
        ),
        ({"sae_type": "molt"}, "field 'sae_type' is 'molt', which is refused: its latents switch linear maps"),
        ({"norm_activation": "batch-wise"}, "'batch-wise', which divides by the mean norm of the tokens"),
        ({"norm_activation": "layer-wise"}, "field 'norm_activation' is 'layer-wise'; expected one of dataset-wise"),
        (
            {"norm_activation": "token-wise", "hook_point_out": "blocks.2.hook_mlp_out"},
            "a transcoder's output has a norm",
        ),
        ({"act_fn": "layertopk"}, "'layertopk', which ranks the latents of all layers together"),
        ({"act_fn": "gelu"}, "field 'act_fn' is 'gelu'; expected one of relu"),
        ({"act_fn": "topk", "top_k": 0}, "field 'top_k' is 0; expected a whole number of at least 1"),
        ({"act_fn": "topk", "top_k": 19}, r"k: 19; expected 1\.\.18"),
        ({"d_model": 7}, r"tensor 'W_E' has shape \[6, 18\]; expected \[7, any\]"),
        ({"d_model": "6"}, "field 'd_model' is '6'; expected a whole number"),
        ({"hook_point_in": "embed"}, "field 'hook_point_in' is 'embed'; expected a hook of a layer"),
        ({"hook_point_in": None}, "field 'hook_point_in' is None; expected a hook"),
        ({"hook_point_in": "blocks.9.hook_resid_post"}, r"no tensor 'dataset_average_activation_norm\.blocks\.9"),
        ({"use_glu_encoder": True}, "no tensor 'W_E_glu'"),
        ({"use_decoder_bias": False}, "tensor 'b_D' of shape"),
        ({"use_decoder_bias": "no"}, "field 'use_decoder_bias' is 'no'; expected true or false"),
        (
            {"apply_decoder_bias_to_pre_encoder": True},
            "field 'apply_decoder_bias_to_pre_encoder' is True; expected false",
        ),
    ],
)
def test_a_wrong_field_is_named(tmp_path, changes, message):
    write_small(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(small_config(**changes)))
    with pytest.raises(SAEFormatError, match=message):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    ("hints", "message"),
    [
        (Hints(norm_scaling_factor=2.0), "norm_scaling_factor 2.0 given; the file holds the norms"),
        (Hints(k=3), "field 'top_k' makes it k = None; the given k is 3"),
        (Hints(hook="blocks.9.hook_resid_post"), "are different places"),
        (Hints(hook_out="nowhere"), "hook_out: 'nowhere'; expected one like"),
    ],
)
def test_a_hint_that_does_not_fit_is_refused(tmp_path, hints, message):
    with pytest.raises(SAEFormatError, match=message):
        load_sae(write_small(tmp_path), hints=hints)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_norm_that_is_none_is_refused(tmp_path, value):
    write_small(tmp_path)
    name = "dataset_average_activation_norm.blocks.2.hook_resid_post"
    save_file(small_tensors() | {name: torch.tensor(value)}, tmp_path / "sae_weights.safetensors")
    with pytest.raises(
        SAEFormatError, match=r"sae_weights\.safetensors: tensor 'dataset_average.*expected a positive norm"
    ):
        load_sae(tmp_path)
