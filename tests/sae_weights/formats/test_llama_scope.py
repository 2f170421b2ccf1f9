"""Llama Scope and its R1-Distill continuation: folders as they were published, by sae-lens' numbers where it is right."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

from sae_weights import Hints, Hook, SAEFormatError, load_sae
from tests.sae_weights.formats.agreement import check_agreement
from tests.sae_weights.formats.published import (
    LLAMA_SCOPE,
    D,
    N,
    answer,
    llama_hyperparams,
    llama_tensors,
    r1_config,
    random,
    save,
    write_json,
)
from tests.sae_weights.oracle import needs_oracle, run_oracle

RESIDUAL, INPUT, OUTPUT = "blocks.8.hook_resid_post", "blocks.8.ln2.hook_normalized", "blocks.8.hook_mlp_out"


class TestOracle:
    pytestmark = needs_oracle

    @pytest.mark.parametrize("case", LLAMA_SCOPE)
    def test_a_published_folder_means_to_us_what_it_means_to_sae_lens(self, case):
        path, answers = answer(case)
        sae = load_sae(path)
        assert (sae.architecture, sae.hook.hook_name, sae.hook_out) == ("jumprelu", LLAMA_SCOPE[case][2], None)
        assert (sae.origin.format, sae.metadata["model_name"]) == ("llama_scope", "meta-llama/Llama-3.1-8B")
        check_agreement(sae, **answers)

    def test_the_r1_distillates_dictionary_means_to_us_what_it_means_to_sae_lens(self):
        path, answers = answer("llama-r1")
        sae = load_sae(path)
        assert (sae.origin.format, sae.hook) == ("llama_scope_r1", Hook("resid_post", 15))
        assert sae.metadata["model_name"] == "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
        check_agreement(sae, **answers)


AVERAGES = {
    "residual": (RESIDUAL, RESIDUAL, 6.3125, 6.3125),
    "transcoder": (INPUT, OUTPUT, math.sqrt(D), 3.390625),
    "transcoder-scaled": (INPUT, OUTPUT, 9.5, 3.390625),
}


class TestAuthors:
    pytestmark = needs_oracle

    @pytest.fixture(scope="class")
    def work(self, tmp_path_factory):
        root = tmp_path_factory.mktemp("llama-scope")
        for seed, (case, (hook_in, hook_out, average_in, average_out)) in enumerate(AVERAGES.items()):
            norms = {"in": average_in, "out": average_out}
            written(root / case, llama_tensors(20 + seed), hook_in, hook_out, dataset_average_activation_norm=norms)
        run_oracle("oracle_llama_scope.py", root)
        return root

    @pytest.mark.parametrize("case", AVERAGES)
    def test_decoder_norms_and_both_scales_count_as_in_the_authors_class(self, work, case):
        sae = load_sae(work / case)
        assert (sae.hook_out is None) == (case == "residual")
        check_agreement(sae, **load_file(work / case / "answers.safetensors"))


def written(folder, tensors, hook_in=RESIDUAL, hook_out=RESIDUAL, **changes):
    save(folder / "checkpoints" / "final.safetensors", tensors)
    write_json(folder / "hyperparams.json", llama_hyperparams(hook_in, hook_out, **changes))
    return folder


def by_the_authors_code(raw, x, theta, s_in, s_out, include_norm=True):
    """Inference of Language-Model-SAEs after it has folded the scales (standardize_parameters_of_dataset_norm)."""
    W_E, b_E = raw["encoder.weight"].T, raw["encoder.bias"] / s_in
    W_D, b_D = raw["decoder.weight"].T * (s_in / s_out), raw["decoder.bias"] / s_out
    p = x @ W_E + b_E
    norm = W_D.norm(dim=-1) if include_norm else torch.ones(N)
    f = p * (p * norm > theta) if include_norm else p.relu() * (p > theta)
    return f.relu(), f.relu() @ W_D + b_D


@pytest.mark.parametrize(
    ("hook_in", "hook_out", "averages"),
    [(RESIDUAL, RESIDUAL, (6.3125, 6.3125)), (INPUT, OUTPUT, (math.sqrt(D), 3.390625))],
)
def test_the_threshold_measures_what_a_feature_writes_in_the_models_own_units(tmp_path, hook_in, hook_out, averages):
    raw = llama_tensors(7)
    norms = {"in": averages[0], "out": averages[1]}
    folder = written(tmp_path, raw, hook_in, hook_out, dataset_average_activation_norm=norms)
    sae = load_sae(folder)
    s_in, s_out = (math.sqrt(D) / average for average in averages)
    x = torch.randn(40, D) * averages[0] / math.sqrt(D)
    f, x_hat = by_the_authors_code(raw, x, 0.2021484375, s_in, s_out)
    # Their folding leaves activations in units of 1/s_in; canonical ones are those of training.
    check_agreement(sae, x, f * s_in, x_hat)
    assert (sae.hook_out is not None) == (hook_in != hook_out)


def test_without_the_decoder_norm_one_threshold_serves_all(tmp_path):
    raw = llama_tensors(8)
    sae = load_sae(written(tmp_path, raw, sparsity_include_decoder_norm=False))
    s = math.sqrt(D) / 6.3125
    x = torch.randn(40, D)
    f, x_hat = by_the_authors_code(raw, x, 0.2021484375, s, s, include_norm=False)
    check_agreement(sae, x, f * s, x_hat)
    assert sae.rows([0, 5]).threshold.tolist() == pytest.approx([0.2021484375 * s] * 2)


def test_the_other_settings_of_the_config_count(tmp_path):
    raw = llama_tensors(9)
    del raw["decoder.bias"]
    plain = load_sae(written(tmp_path / "1", raw, norm_activation="inference", use_decoder_bias=False))
    x = torch.randn(40, D)
    p = x @ raw["encoder.weight"].T + raw["encoder.bias"]
    f = p.relu() * (p * raw["decoder.weight"].norm(dim=0) > 0.2021484375)
    check_agreement(plain, x, f, f @ raw["decoder.weight"].T)
    by_token = load_sae(written(tmp_path / "2", llama_tensors(9), norm_activation="token-wise"))
    assert by_token.input_norm == "constant_norm_rescale"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act_fn": "topk"}, r"hyperparams\.json: field 'act_fn' is 'topk'; expected one of jumprelu"),
        ({"norm_activation": "batch-wise"}, "field 'norm_activation' is 'batch-wise'; expected one of dataset-wise"),
        ({"use_glu_encoder": True}, "field 'use_glu_encoder' is True; expected false"),
        ({"jump_relu_threshold": -1}, "field 'jump_relu_threshold' is -1; expected a positive number"),
        ({"dataset_average_activation_norm": {"in": 0, "out": 1}}, "field 'dataset_average_activation_norm.in' is 0"),
        (
            {"dataset_average_activation_norm": None},
            "'dataset_average_activation_norm.in' is None; expected a positive",
        ),
        ({"hook_point_in": "embed"}, "field 'hook_point_in' is 'embed'; expected a hook"),
        ({"d_model": 7}, r"field 'd_model' is 7; expected 24, which is what final\.safetensors has"),
        ({"hook_point_out": OUTPUT, "norm_activation": "token-wise"}, "field 'norm_activation' is 'token-wise'"),
    ],
)
def test_a_wrong_field_is_named(tmp_path, changes, message):
    folder = written(tmp_path, llama_tensors(0))
    write_json(folder / "hyperparams.json", llama_hyperparams(RESIDUAL, RESIDUAL) | changes)
    with pytest.raises(SAEFormatError, match=message):
        load_sae(folder)


def test_a_wrong_tensor_is_named(tmp_path):
    raw = llama_tensors(0)
    for changes, message in (
        ({"decoder.weight": torch.zeros(D, N - 1)}, r"final\.safetensors: .*96 features and 'decoder\.weight' has 95"),
        ({"encoder.bias": torch.zeros(3)}, r"a vector of shape \[3\]; expected \[96\]|'encoder\.bias' has shape \[3\]"),
        ({"extra": torch.zeros(3)}, r"tensor 'extra' of shape \[3\] does not belong"),
    ):
        with pytest.raises(SAEFormatError, match=message):
            load_sae(written(tmp_path, raw | changes))


def distilled(folder, tensors, **changes):
    save(folder / "sae_weights.safetensors", tensors)
    write_json(folder / "config.json", r1_config(RESIDUAL, **changes))
    return folder


def r1_tensors(average):
    log = {"log_jumprelu_threshold": random(2, threshold=(N,))["threshold"].add(0.1).log()}
    stored = {} if average is None else {f"dataset_average_activation_norm.{RESIDUAL}": torch.tensor(average)}
    return llama_tensors(3) | log | stored


def test_the_distillates_scale_is_in_its_weights_or_comes_from_the_caller(tmp_path):
    sae = load_sae(distilled(tmp_path / "1", r1_tensors(3.5)))
    without = distilled(tmp_path / "2", r1_tensors(None))
    with pytest.raises(SAEFormatError, match=rf"field 'dataset_average_activation_norm\.{RESIDUAL}' is missing"):
        load_sae(without)
    scale = math.sqrt(D) / 3.5
    assert torch.allclose(load_sae(without, hints=Hints(norm_scaling_factor=scale)).W_enc, sae.W_enc)
    assert load_sae(tmp_path / "1", norm_scaling_factor=scale * 1.001).digest == sae.digest
    with pytest.raises(SAEFormatError, match=r"is 3\.5; expected .*which goes with the given norm_scaling_factor 9"):
        load_sae(tmp_path / "1", norm_scaling_factor=9)


def test_the_distillates_thresholds_are_in_the_units_of_training(tmp_path):
    raw = r1_tensors(3.5)
    x = torch.randn(40, D)
    s = math.sqrt(D) / 3.5
    p = s * x @ raw["encoder.weight"].T + raw["encoder.bias"]
    f = p.relu() * (p > raw["log_jumprelu_threshold"].exp())
    x_hat = (f @ raw["decoder.weight"].T + raw["decoder.bias"]) / s
    check_agreement(load_sae(distilled(tmp_path, raw)), x, f, x_hat)
