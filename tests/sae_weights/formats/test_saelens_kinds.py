"""What SAELens folders hold besides plain SAEs, without its interpreter: equations, groups, overrides, refusals."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from sae_weights import SAE, Folding, Hints, Hook, Origin, SAEFormatError, load_sae, save_saelens
from tests.sae_weights.formats.agreement import check_agreement

D, N = 6, 16


def tensors(**more):
    g = torch.Generator().manual_seed(5)
    base = {
        "W_enc": torch.randn(D, N, generator=g),
        "W_dec": torch.randn(N, D, generator=g),
        "b_enc": torch.randn(N, generator=g),
        "b_dec": torch.randn(D, generator=g),
    }
    return {name: tensor for name, tensor in (base | more).items() if tensor is not None}


def write(folder, raw, *, metadata=None, **config):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in raw.items()}, folder / "sae_weights.safetensors")
    told = {"sae_lens_version": "6.54.12", "hook_name": "blocks.3.hook_resid_post", **(metadata or {})}
    full = {"architecture": "standard", "d_in": D, "d_sae": N, "apply_b_dec_to_input": False, "metadata": told}
    (folder / "cfg.json").write_text(json.dumps(full | config))
    return folder


# AbsTopK, matching pursuit


def test_abstopk_keeps_the_strongest_of_either_sign(tmp_path):
    raw, x = tensors(), torch.randn(20, D)
    sae = load_sae(write(tmp_path, raw, architecture="abstopk", k=3))
    p = x @ raw["W_enc"] + raw["b_enc"]
    f = p * torch.zeros_like(p).scatter(-1, p.abs().topk(3, dim=-1).indices, 1.0)
    assert (f < 0).any()
    check_agreement(sae, x, f, f @ raw["W_dec"] + raw["b_dec"])


def test_the_scale_of_a_pursuits_input_scales_what_it_stops_at(tmp_path):
    unit = torch.nn.functional.normalize(tensors()["W_dec"], dim=-1)
    raw = {"W_dec": unit, "b_dec": tensors()["b_dec"]}
    plain = {"architecture": "matching_pursuit", "residual_threshold": 0.5, "apply_b_dec_to_input": True}
    sae = load_sae(write(tmp_path / "1", raw, **plain))
    scaled = write(tmp_path / "2", raw, **plain, normalize_activations="expected_average_only_in")
    x, s = torch.randn(40, D) * 2, 0.25
    f = sae.encode(s * x)
    check_agreement(load_sae(scaled, norm_scaling_factor=s), x, f, sae.decode(f) / s)


def test_a_pursuit_without_centring_has_no_bias_at_all(tmp_path):
    unit = torch.nn.functional.normalize(tensors()["W_dec"], dim=-1)
    raw = {"W_dec": unit, "b_dec": torch.full((D,), 9.0)}
    sae = load_sae(write(tmp_path, raw, architecture="matching_pursuit"))
    assert not sae.b_dec.any()
    assert sae.settings["max_iterations"] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"residual_threshold": -1}, "field 'residual_threshold' is -1; expected a number of at least 0"),
        ({"residual_threshold": 10**400}, "field 'residual_threshold' is 1000.*; expected a number of at least 0"),
        ({"max_iterations": 0}, "field 'max_iterations' is 0; expected a whole number of at least 1"),
        ({"stop_on_duplicate_support": 1}, "field 'stop_on_duplicate_support' is 1; expected true or false"),
        ({"normalize_activations": "unit_norm"}, "field 'normalize_activations' is 'unit_norm'; expected one of none"),
    ],
)
def test_a_wrong_setting_of_a_pursuit_is_named(tmp_path, changes, message):
    raw = {"W_dec": tensors()["W_dec"], "b_dec": tensors()["b_dec"]}
    with pytest.raises(SAEFormatError, match=message):
        load_sae(write(tmp_path, raw, architecture="matching_pursuit", **changes))


# Transcoders

OUT = {"hook_name": "blocks.3.ln2.hook_normalized", "hook_name_out": "blocks.3.hook_mlp_out"}


def test_a_skip_transcoder_adds_a_map_of_its_input(tmp_path):
    raw = tensors(W_dec=torch.randn(N, 4), b_dec=torch.randn(4), W_skip=torch.randn(4, D))
    sae = load_sae(write(tmp_path, raw, architecture="skip_transcoder", d_out=4, metadata=OUT))
    x = torch.randn(20, D)
    f = (x @ raw["W_enc"] + raw["b_enc"]).relu()
    check_agreement(sae, x, f, f @ raw["W_dec"] + raw["b_dec"] + x @ raw["W_skip"].T)
    assert (sae.hook_out, sae.d_out) == (Hook("mlp_out", 3), 4)


@pytest.mark.parametrize(
    ("config", "metadata", "raw", "message"),
    [
        ({"d_out": D}, {"hook_name_out": None}, {}, "metadata.hook_name_out missing; expected a hook"),
        ({"d_out": D, "apply_b_dec_to_input": True}, {}, {}, "field 'apply_b_dec_to_input' is True; expected false"),
        (
            {"d_out": D, "normalize_activations": "layer_norm"},
            {},
            {},
            "is 'layer_norm'; expected one of none, expected_",
        ),
        ({"d_out": 5}, {}, {}, r"tensor 'W_dec' has shape \[16, 6\]; expected \[16, 5\]"),
        ({"d_out": D}, {}, {"W_skip": torch.zeros(D, D)}, "tensor 'W_skip' .* does not belong to architecture 'trans"),
        ({"d_out": D, "architecture": "skip_transcoder"}, {}, {}, "no tensor 'W_skip'"),
    ],
)
def test_what_makes_no_transcoder_is_named(tmp_path, config, metadata, raw, message):
    config = {"architecture": "transcoder", **config}
    with pytest.raises(SAEFormatError, match=message):
        load_sae(write(tmp_path, tensors(**raw), metadata={**OUT, **metadata}, **config))


def test_a_transcoders_output_may_be_named_by_the_caller(tmp_path):
    folder = write(tmp_path, tensors(), architecture="transcoder", d_out=D, metadata=OUT | {"hook_name_out": None})
    hints = Hints(hook_out="blocks.3.hook_mlp_out")
    assert load_sae(folder, hints=hints).hook_out == Hook("mlp_out", 3)


# Matryoshka


def test_a_matryoshka_checkpoint_has_groups_and_any_prefix_of_them_is_a_dictionary(tmp_path):
    raw = tensors(topk_threshold=torch.tensor(0.3, dtype=torch.float64))
    config = {"architecture": "matryoshka_batchtopk", "k": 4, "rescale_acts_by_decoder_norm": False}
    sae = load_sae(write(tmp_path, raw, matryoshka_widths=[3, 8], **config))
    assert (sae.architecture, sae.settings["group_sizes"]) == ("matryoshka", [3, 5, 8])
    x = torch.randn(20, D)
    p = x @ raw["W_enc"][:, :8] + raw["b_enc"][:8]
    f = p.relu() * (p > 0.3)
    x_hat = f @ raw["W_dec"][:8] + raw["b_dec"]
    check_agreement(load_sae(tmp_path, hints=Hints(groups=2)), x, f, x_hat)
    # Written as the JumpReLU that it is, it keeps its groups.
    again = load_sae(save_saelens(sae, tmp_path / "again"))
    assert (again.architecture, again.settings, again.digest) == ("matryoshka", sae.settings, sae.digest)
    assert json.loads((tmp_path / "again" / "cfg.json").read_text())["architecture"] == "jumprelu"
    check_agreement(again.prefix(2), x, f, x_hat)
    assert load_sae(save_saelens(again.prefix(2), tmp_path / "prefix")).digest == again.prefix(2).digest


@pytest.mark.parametrize("widths", [[8, 3], [0, 8], [3, 20], [3, 3], "3, 8", [3.5], [True]])
def test_widths_that_are_none_are_named(tmp_path, widths):
    raw = tensors(topk_threshold=torch.tensor(0.3, dtype=torch.float64))
    with pytest.raises(
        SAEFormatError, match=r"field 'matryoshka_widths' is .*; expected growing widths up to d_sae, 16"
    ):
        load_sae(write(tmp_path, raw, architecture="matryoshka_batchtopk", matryoshka_widths=widths))


# Models that TransformerLens centres

CENTRED = {"model_from_pretrained_kwargs": {"center_writing_weights": True}, "model_name": "gpt2-small"}


def test_a_dictionary_of_a_centred_model_is_given_the_stream_without_its_mean(tmp_path):
    raw, x = tensors(), torch.randn(20, D) + 3
    folder = write(tmp_path, raw, metadata=CENTRED, apply_b_dec_to_input=True)
    sae = load_sae(folder)
    mean = x.mean(dim=-1, keepdim=True)
    f = ((x - mean - raw["b_dec"]) @ raw["W_enc"] + raw["b_enc"]).relu()
    check_agreement(sae, x, f, f @ raw["W_dec"] + raw["b_dec"] + mean)
    again = load_sae(save_saelens(sae, tmp_path / "again"))
    assert (again.input_norm, again.digest) == ("centre", sae.digest)


@pytest.mark.parametrize(
    ("metadata", "config", "expected"),
    [
        ({}, {}, "centre"),
        ({"hook_name": "blocks.3.hook_mlp_out"}, {}, "centre"),
        ({"hook_name": "blocks.3.attn.hook_z"}, {}, "none"),
        ({"hook_name": "blocks.3.mlp.hook_post"}, {}, "none"),
        ({"model_name": "gemma-2-2b"}, {}, "none"),
        ({"model_from_pretrained_kwargs": {"center_writing_weights": False}}, {}, "none"),
        ({"model_from_pretrained_kwargs": None}, {}, "none"),
        ({}, {"normalize_activations": "layer_norm"}, "layer_norm"),
    ],
)
def test_the_mean_is_taken_off_where_the_centred_model_lacks_it(tmp_path, metadata, config, expected):
    assert load_sae(write(tmp_path, tensors(), metadata=CENTRED | metadata, **config)).input_norm == expected


def test_centring_and_rescaling_together_are_refused(tmp_path):
    with pytest.raises(SAEFormatError, match=r"center_writing_weights.*no centring beside 'constant_norm_rescale'"):
        load_sae(write(tmp_path, tensors(), metadata=CENTRED, normalize_activations="constant_norm_rescale"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"mean": torch.zeros(D + 1)},
            r"activation_whitening\.safetensors: tensor 'mean' has shape \[7\]; expected \[6\]",
        ),
        ({"matrix": torch.zeros(D, D)}, "tensor 'inverse_matrix' is not the inverse of 'matrix'"),
        ({"matrix": torch.full((D, D), torch.nan)}, "tensor 'inverse_matrix' is not the inverse of 'matrix'"),
        ({"more": torch.zeros(1)}, "tensor 'more' .* does not belong to SAELens' whitening"),
    ],
)
def test_wrong_whitening_is_named(tmp_path, changes, message):
    folder = write(tmp_path, tensors(), normalize_activations="covariance_whitening")
    with pytest.raises(SAEFormatError, match=r"activation_whitening\.safetensors: no such file"):
        load_sae(folder)
    right = {"mean": torch.zeros(D), "matrix": torch.eye(D) * 2, "inverse_matrix": torch.eye(D) / 2}
    save_file(right | changes, folder / "activation_whitening.safetensors")
    with pytest.raises(SAEFormatError, match=message):
        load_sae(folder)


def test_what_the_registry_knows_better_replaces_the_configs_fields(tmp_path):
    old = {"d_in": D, "d_sae": N, "hook_point": "blocks.8.hook_resid_pre", "model_name": "gpt2-small"}
    write(tmp_path, tensors())
    (tmp_path / "cfg.json").write_text(json.dumps(old))
    assert load_sae(tmp_path).input_norm == "none"
    centred = load_sae(tmp_path, hints=Hints(overrides=CENTRED))
    assert (centred.input_norm, centred.hook) == ("centre", Hook("resid_pre", 8))
    hints = Hints(overrides={"normalize_activations": "constant_norm_rescale", "hook_name": "blocks.2.hook_resid_pre"})
    other = load_sae(tmp_path, hints=hints)
    assert (other.input_norm, other.hook) == ("constant_norm_rescale", Hook("resid_pre", 2))
    same = Origin.from_dict(json.loads(json.dumps(other.origin.as_dict()))).open()
    assert same.digest == other.digest
    # A sidecar may say so too.
    (tmp_path / "editserver.json").write_text(json.dumps(CENTRED))
    assert load_sae(tmp_path).input_norm == "centre"


def test_a_hook_that_the_caller_names_must_be_one_and_agree(tmp_path):
    folder = write(tmp_path, tensors())
    assert load_sae(folder, hints=Hints(hook="model.layers.3")).hook == Hook("resid_post", 3)
    with pytest.raises(
        SAEFormatError, match=r"the given hook 'blocks\.4\.hook_resid_post' and .* are different places"
    ):
        load_sae(folder, hints=Hints(hook="blocks.4.hook_resid_post"))
    with pytest.raises(SAEFormatError, match="hook: 'layer three'; expected one like"):
        load_sae(folder, hints=Hints(hook="layer three"))


# Refused


def test_a_temporal_sae_is_refused_with_its_reason(tmp_path):
    with pytest.raises(SAEFormatError, match=r"cfg\.json: .*'temporal', which is refused: it attends over all earlier"):
        load_sae(write(tmp_path / "1", tensors(), architecture="temporal"))
    theirs = tmp_path / "layer_12" / "temporal"
    theirs.mkdir(parents=True)
    (theirs / "conf.yaml").write_text("sae: {kval_topk: 192}")
    save_file({"D": torch.zeros(N, D)}, theirs / "latest_ckpt.safetensors")
    with pytest.raises(SAEFormatError, match="a temporal SAE, which is refused: it attends over all earlier"):
        load_sae(theirs)


def test_what_saelens_cannot_express_is_refused_before_anything_is_written(make_sae, tmp_path):
    wide = {"hook": Hook("resid_post", 3), "hooks": (Hook("resid_post", 3), Hook("resid_post", 5))}
    rows = {"W_enc": torch.randn(N, 12), "W_dec": torch.randn(N, 12), "b_dec": torch.zeros(12)}
    crosscoder = SAE.from_tensors(architecture="relu", gate={"b_enc": torch.zeros(N)}, **wide, **rows)
    scaled = {"W_dec": torch.randn(N, D), "b_dec": torch.zeros(D), "gate": {"b_enc": torch.zeros(N)}}
    pursuit = SAE.from_tensors(
        architecture="matching_pursuit", hook=Hook("resid_post", 3), folding=Folding(input_scale=0.5), **scaled
    )
    for sae, message in (
        (crosscoder, "a crosscoder: SAELens has nothing"),
        (make_sae("itda"), "architecture 'itda': SAELens has nothing"),
        (make_sae("polysae"), "architecture 'polysae'"),
        (make_sae("relu", input_norm="unit_norm"), "input_norm 'unit_norm'"),
        (make_sae("topk", folding=Folding(rank_by_decoder_norm=True)), r"ranked in other units .*rank_scale"),
        (make_sae("gated", hook_out=Hook("mlp_out", 3)), "architecture 'gated' in a transcoder"),
        (make_sae("relu", more_extras={"W_skip": torch.zeros(D, D)}), "tensor 'W_skip'"),
        (pursuit, "a folded input scale"),
    ):
        with pytest.raises(SAEFormatError, match=message):
            save_saelens(sae, tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("architecture", ["relu", "jumprelu"])
def test_transcoders_are_written_and_read_back(make_sae, tmp_path, architecture, skip):
    extras = {"W_skip": torch.randn(D, D)} if skip else {}
    sae = make_sae(architecture, hook_out=Hook("mlp_out", 3), more_extras=extras)
    again = load_sae(save_saelens(sae, tmp_path))
    assert (again.digest, again.hook, again.hook_out) == (sae.digest, sae.hook, sae.hook_out)
