"""dictionary_learning's folders mean to us what they mean to its own classes; its forks', what their equations say."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_weights import Hook, SAEFormatError, load_sae
from sae_weights.formats import Hints
from tests.sae_weights.formats.agreement import check_agreement
from tests.sae_weights.formats.draws import Draws
from tests.sae_weights.oracle import needs_oracle, run_oracle

D, N, K, TOKENS, LAYER = 12, 48, 6, 40, 7
GROUPS = [8, 16, 24]


def linear(draws):
    """The two linear layers, as ``torch.nn.Linear`` stores them."""
    return {
        "encoder.weight": draws.normal(N, D),
        "encoder.bias": draws.normal(N, spread=0.4),
        "decoder.weight": draws.uneven(N, D).T.contiguous(),
    }


def plain(draws):
    """Two matrices as parameters, feature dimension last and first."""
    return {
        "W_enc": draws.normal(D, N),
        "b_enc": draws.normal(N, spread=0.4),
        "W_dec": draws.uneven(N, D),
        "b_dec": draws.normal(D, spread=0.5),
    }


def buffers(threshold):
    return {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(threshold, dtype=torch.float32)}


STATES = {
    "AutoEncoder": lambda draws: linear(draws) | {"bias": draws.normal(D)},
    "AutoEncoderNew": lambda draws: linear(draws) | {"decoder.bias": draws.normal(D)},
    "GatedAutoEncoder": lambda draws: {
        "decoder_bias": draws.normal(D),
        "r_mag": draws.normal(N, spread=0.3),
        "gate_bias": draws.normal(N),
        "mag_bias": draws.normal(N),
        "encoder.weight": draws.normal(N, D),
        "decoder.weight": draws.normal(D, N),
    },
    "JumpReluAutoEncoder": lambda draws: plain(draws) | {"threshold": draws.normal(N).abs()},
    "AutoEncoderTopK": lambda draws: linear(draws) | {"b_dec": draws.normal(D)} | buffers(1.25),
    "BatchTopKSAE": lambda draws: linear(draws) | {"b_dec": draws.normal(D)} | buffers(1.5),
    "MatryoshkaBatchTopKSAE": lambda draws: plain(draws) | buffers(1.5) | {"group_sizes": torch.tensor(GROUPS)},
}
ARCHITECTURES = {
    "AutoEncoder": "relu",
    "AutoEncoderNew": "relu",
    "GatedAutoEncoder": "gated",
    "JumpReluAutoEncoder": "jumprelu",
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "batchtopk",
    "MatryoshkaBatchTopKSAE": "matryoshka",
}


def write(folder, state, dict_class, **trainer):
    """A trainer's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "ae.pt")
    config = {
        "trainer": {
            "trainer_class": "SomeTrainer",
            "dict_class": dict_class,
            "activation_dim": D,
            "dict_size": N,
            "device": "cuda:0",
            "layer": LAYER,
            "lm_name": "EleutherAI/pythia-70m-deduped",
            "submodule_name": f"resid_post_layer_{LAYER}",
            "norm_factor": 11.5,
            **trainer,
        },
        "buffer": {"d_submodule": D, "io": "out", "n_ctxs": 244, "ctx_len": 1024, "device": "cuda:0"},
    }
    if "k" in state:
        config["trainer"]["k"] = int(state["k"])
    (folder / "config.json").write_text(json.dumps(config, indent=4))
    return folder


def write_crosscoder(folder):
    """A BatchTopK crosscoder for tests of other modules."""
    state = crosscoder(Draws(0)) | {"code_normalization_id": torch.tensor(1)} | buffers(1.0)
    return write(folder, state, "BatchTopKCrossCoder")


def write_variational(folder):
    """A variational dictionary for tests of other modules."""
    return write(folder, linear(Draws(0)) | {"decoder.bias": Draws(1).normal(D)} | buffers(1.0), "VSAETopK")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Every class, answered by the authors' code."""
    root = tmp_path_factory.mktemp("dictionary_learning")
    for seed, (name, state) in enumerate(STATES.items()):
        draws = Draws(seed)
        write(root / name, state(draws), name)
        save_file({"x": draws.tokens(TOKENS, D)}, root / name / "x.safetensors")
    for case, name, change in (
        ("half", "AutoEncoderTopK", lambda t: t.bfloat16() if t.ndim else t),
        ("untrained", "BatchTopKSAE", lambda t: torch.tensor(-1.0) if t.ndim == 0 and t.is_floating_point() else t),
    ):
        draws = Draws(20)
        write(root / case, {key: change(t) for key, t in STATES[name](draws).items()}, name)
        save_file({"x": draws.tokens(TOKENS, D)}, root / case / "x.safetensors")
    run_oracle("oracle_dictionary_learning.py", root)
    return root


@needs_oracle[0]
@needs_oracle[1]
@pytest.mark.parametrize("case", [*STATES, "half", "untrained"])
def test_a_folder_means_what_the_authors_class_computes(work, case):
    sae = load_sae(work / case)
    answers = load_file(work / case / "answers.safetensors")
    check_agreement(sae, answers["x"], answers["f"], answers["x_hat"])
    assert sae.hook == Hook("resid_post", LAYER)
    assert sae.metadata["model_name"] == "EleutherAI/pythia-70m-deduped"
    if case in ARCHITECTURES:
        assert sae.architecture == ARCHITECTURES[case]


def test_an_autoencoder_is_given_decoder_rows_of_norm_1(tmp_path):
    sae = load_sae(write(tmp_path / "a", STATES["AutoEncoder"](Draws(1)), "AutoEncoder"))
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(N))


def test_a_p_annealed_dictionary_is_named_after_its_trainer(tmp_path):
    folder = write(tmp_path / "a", STATES["AutoEncoder"](Draws(1)), "AutoEncoder", trainer_class="PAnnealTrainer")
    assert load_sae(folder).architecture == "p_anneal"


def test_a_prefix_of_matryoshka_groups_is_the_dictionary_of_its_first_rows(tmp_path):
    draws = Draws(3)
    state = STATES["MatryoshkaBatchTopKSAE"](draws)
    folder = write(tmp_path / "m", state, "MatryoshkaBatchTopKSAE")
    sae = load_sae(folder, hints=Hints(groups=2))
    x, n = draws.tokens(TOKENS, D), sum(GROUPS[:2])
    f = torch.relu((x - state["b_dec"]) @ state["W_enc"][:, :n] + state["b_enc"][:n])
    f = f * (f > 1.5)
    check_agreement(sae, x, f, f @ state["W_dec"][:n] + state["b_dec"])
    assert list(sae.settings["group_sizes"]) == GROUPS[:2]


@pytest.mark.parametrize("name", ["AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder"])
def test_without_a_config_the_tensors_tell_the_class_and_the_folder_the_layer(tmp_path, name):
    state = STATES[name](Draws(5))
    stated = load_sae(write(tmp_path / "stated", state, name))
    folder = tmp_path / "resid_out_layer7" / "10_32768"
    folder.mkdir(parents=True)
    torch.save(state, folder / "ae.pt")
    told = load_sae(folder)
    assert (told.digest, told.hook) == (stated.digest, stated.hook)


def test_a_checkpoint_of_a_step_and_a_compiled_dictionary_are_read_as_the_final_one(tmp_path):
    state = STATES["BatchTopKSAE"](Draws(6))
    folder = write(tmp_path / "trainer_0", state, "BatchTopKSAE")
    (folder / "checkpoints").mkdir()
    torch.save(state, folder / "checkpoints" / "ae_5000.pt")
    compiled = write(tmp_path / "compiled", {f"_orig_mod.{n}": t for n, t in state.items()}, "BatchTopKSAE", k=K)
    digests = {load_sae(path).digest for path in (folder, folder / "checkpoints" / "ae_5000.pt", compiled)}
    assert len(digests) == 1


def test_opening_one_reads_no_matrix(tmp_path, monkeypatch):
    folder = write(tmp_path / "b", STATES["BatchTopKSAE"](Draws(6)), "BatchTopKSAE")
    sae = load_sae(folder)
    assert sae.rows([3, 1]).encoder.shape == (2, D)
    assert not sae.materialised


@pytest.mark.parametrize(
    ("submodule", "io", "hook", "hook_out"),
    [
        ("resid_post_layer_7", "out", Hook("resid_post", 7), None),
        ("resid_pre_layer_7", "out", Hook("resid_pre", 7), None),
        ("resid_post_layer_7", "in", Hook("resid_pre", 7), None),
        ("attention_layer7", "out", Hook("attn_out", 7), None),
        ("mlp_out_layer7", "out", Hook("mlp_out", 7), None),
        ("mlp_out_layer7", "in_and_out", Hook("mlp_in", 7), Hook("mlp_out", 7)),
    ],
)
def test_the_hook_follows_from_the_module_and_its_side(tmp_path, submodule, io, hook, hook_out):
    folder = write(tmp_path / "a", STATES["AutoEncoderNew"](Draws(1)), "AutoEncoderNew", submodule_name=submodule)
    config = json.loads((folder / "config.json").read_text())
    config["buffer"]["io"] = io
    (folder / "config.json").write_text(json.dumps(config))
    sae = load_sae(folder)
    assert (sae.hook, sae.hook_out) == (hook, hook_out)
    assert (sae.refusal is None) == (hook.edit_layer is not None and hook_out is None)


# Forks


@pytest.mark.parametrize("april", [True, False])
@pytest.mark.parametrize("learned_variance", [True, False])
def test_a_variational_dictionary_is_read_at_its_mean(tmp_path, april, learned_variance):
    draws = Draws(8)
    b_dec = draws.normal(D)
    state = linear(draws) | buffers(-1.0) | {("decoder.bias" if april else "b_dec"): b_dec}
    if learned_variance:
        state |= {"var_encoder.weight": draws.normal(N, D), "var_encoder.bias": draws.normal(N)}
    sae = load_sae(write(tmp_path / "v", state, "VSAETopK", var_flag=int(learned_variance)))
    x = draws.tokens(TOKENS, D)
    mu = (x if april else x - b_dec) @ state["encoder.weight"].T + state["encoder.bias"]
    top = mu.relu().topk(K)
    f = torch.zeros(TOKENS, N).scatter(1, top.indices, top.values)
    check_agreement(sae, x, f, f @ state["decoder.weight"].T + b_dec)
    assert (sae.architecture, sae.k, sae.settings["signed"]) == ("vsae", K, False)


def test_a_variational_dictionary_without_a_relu_keeps_signs(tmp_path):
    draws = Draws(9)
    state = linear(draws) | {"bias": draws.normal(D), "k": torch.tensor(K)}
    sae = load_sae(write(tmp_path / "v", state, "VSAETopK"))
    x = draws.tokens(TOKENS, D)
    mu = (x - state["bias"]) @ state["encoder.weight"].T + state["encoder.bias"]
    top = mu.abs().topk(K).indices
    f = torch.zeros(TOKENS, N).scatter(1, top, mu.gather(1, top))
    assert (f < 0).any()
    check_agreement(sae, x, f, f @ state["decoder.weight"].T + state["bias"])


@pytest.mark.parametrize("used", [True, False])
def test_a_forks_normalised_activations_are_folded(tmp_path, used):
    draws = Draws(10)
    state = linear(draws) | {"b_dec": draws.normal(D)} | buffers(0.4)
    mean, std = draws.normal(D), draws.normal(D).abs() + 0.5
    g = 1.0 / (std.square().sum() + 1e-8).sqrt()
    state |= {
        "target_rms": torch.tensor(1.0),
        "activation_mean": mean if used else mean * torch.nan,
        "activation_std": std if used else std * torch.nan,
        "activation_global_scale": g if used else torch.tensor(1.0),
    }
    sae = load_sae(write(tmp_path / "b", state, "BatchTopKSAE"))
    x = draws.tokens(TOKENS, D)
    seen = (x - mean) * g if used else x
    f = torch.relu((seen - state["b_dec"]) @ state["encoder.weight"].T + state["encoder.bias"])
    f = f * (f > 0.4)
    x_hat = f @ state["decoder.weight"].T + state["b_dec"]
    check_agreement(sae, x, f, x_hat / (g + 1e-8) + mean if used else x_hat)


L = 3


def crosscoder(draws):
    return {
        "encoder.weight": draws.normal(L, D, N, spread=0.6),
        "encoder.bias": draws.normal(N, spread=0.4),
        "decoder.weight": torch.stack([draws.uneven(N, D) for _ in range(L)]),
        "decoder.bias": draws.normal(L, D),
    }


def crosscoded(state, x, c=None, theta=None):
    """The fork's equations for x [N, L, d]: f [N, n] and x_hat [N, L, d]."""
    f = torch.relu(torch.einsum("bld,ldf->bf", x, state["encoder.weight"]) + state["encoder.bias"])
    if theta is not None:
        f = f * (f * c > theta)
    return f, torch.einsum("bf,lfd->bld", f, state["decoder.weight"]) + state["decoder.bias"]


def test_a_crosscoder_reads_the_places_one_after_another(tmp_path):
    draws = Draws(11)
    state = crosscoder(draws) | {"code_normalization_id": torch.tensor(1)}
    sae = load_sae(write(tmp_path / "c", state, "CrossCoder", layer=13))
    x = draws.tokens(TOKENS * L, D).reshape(TOKENS, L, D)
    f, x_hat = crosscoded(state, x)
    check_agreement(sae, x.flatten(1), f, x_hat.flatten(1))
    assert sae.hooks == (Hook("resid_post", 13),) * L
    assert "crosscoder" in (sae.refusal or "")


@pytest.mark.parametrize("code", ["CROSSCODER", "SAE", "MIXED", "NONE"])
@pytest.mark.parametrize("normalised", [True, False])
def test_a_batchtopk_crosscoders_code_norm_and_activation_norm_are_folded(tmp_path, code, normalised):
    draws = Draws(12)
    number = ["CROSSCODER", "SAE", "MIXED", "NONE"].index(code) + 1
    # Codes of different size: a threshold that keeps about half of what a ReLU would.
    state = crosscoder(draws) | {"code_normalization_id": torch.tensor(number)}
    each = state["decoder.weight"].norm(dim=2)
    joint, total = each.square().sum(0).sqrt(), each.sum(0)
    c = {"CROSSCODER": total, "SAE": joint, "MIXED": 0.7 * joint + 0.2 * total, "NONE": torch.ones(N)}[code]
    theta = 2.0 * float(c.median())
    state |= buffers(theta)
    x = draws.tokens(TOKENS * L, D).reshape(TOKENS, L, D)
    mean, std = draws.normal(L, D), draws.normal(L, D).abs() + 0.5
    g = 5.0 / (std.square().sum(-1) + 1e-8).sqrt()
    unused = torch.full((L, D), torch.nan)
    state |= {
        "target_rms": torch.tensor(5.0),
        "activation_mean": mean if normalised else unused,
        "activation_std": std if normalised else unused,
        "activation_global_scale": g if normalised else torch.ones(L),
    }
    alphas = {"code_normalization_alpha_sae": 0.7, "code_normalization_alpha_cc": 0.2}
    sae = load_sae(write(tmp_path / "c", state, "BatchTopKCrossCoder", layer=[3, 5, 8], **alphas))
    seen = (x - mean) * g[:, None] if normalised else x
    f, x_hat = crosscoded(state, seen, c, theta)
    assert 0.02 < (f > 0).float().mean() < 0.48
    x_hat = x_hat / (g[:, None] + 1e-8) + mean if normalised else x_hat
    check_agreement(sae, x.flatten(1), f, x_hat.flatten(1))
    assert [hook.layer for hook in sae.hooks] == [3, 5, 8]


def test_a_crosscoder_from_a_hub_is_the_same_as_the_trainers(tmp_path):
    state = crosscoder(Draws(13)) | {"code_normalization_id": torch.tensor(1)}
    folder = tmp_path / "gemma-2-2b-crosscoder-l13"
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    arguments = {"activation_dim": D, "dict_size": N, "num_layers": L, "code_normalization": "CROSSCODER"}
    (folder / "config.json").write_text(json.dumps(arguments))
    trained = load_sae(write(tmp_path / "c", state, "CrossCoder", layer=13))
    named = ",".join(["blocks.13.hook_resid_post"] * L)
    assert load_sae(folder, hints=Hints(hook=named)).digest == trained.digest == load_sae(folder).digest


# What is refused


def refusal(path, **hints):
    with pytest.raises(SAEFormatError) as error:
        load_sae(path, hints=Hints(**hints)).encode(torch.zeros(1, D))
    return str(error.value)


def test_two_classes_with_the_same_tensors_need_a_config(tmp_path):
    torch.save(STATES["AutoEncoderTopK"](Draws(1)), tmp_path / "ae.pt")
    assert "AutoEncoderTopK and BatchTopKSAE" in refusal(tmp_path)


def test_a_backup_of_a_running_training_is_no_dictionary(tmp_path):
    state = {"step": 100, "ae": STATES["BatchTopKSAE"](Draws(1)), "optimizer": {}, "config": {}, "norm_factor": 3.0}
    assert "backup" in refusal(write(tmp_path, state, "BatchTopKSAE", k=K))


@pytest.mark.parametrize("name", [name for name in STATES if name != "AutoEncoderTopK"])
def test_a_missing_tensor_is_named(tmp_path, name):
    for missing in STATES[name](Draws(1)):
        if missing == "k" or (missing == "threshold" and name == "AutoEncoderTopK"):
            continue
        state = STATES[name](Draws(1))
        del state[missing]
        said = refusal(write(tmp_path / missing, state, name))
        assert missing in said
        assert "ae.pt" in said


def test_what_does_not_fit_is_named_with_its_place(tmp_path):
    state = STATES["AutoEncoderTopK"](Draws(1))
    assert "'k'" in refusal(write(tmp_path / "k", state, "AutoEncoderTopK"), k=K + 1)
    assert "dict_class" in refusal(write(tmp_path / "class", state, "IdentityDict"))
    assert "layer" in refusal(write(tmp_path / "layer", state, "AutoEncoderTopK", layer="seven"))
    wide = state | {"encoder.bias": torch.zeros(N + 1)}
    assert "encoder.bias" in refusal(write(tmp_path / "wide", wide, "AutoEncoderTopK"))
    more = state | {"extra": torch.zeros(N)}
    assert "extra" in refusal(write(tmp_path / "more", more, "AutoEncoderTopK"))
    decoupled = crosscoder(Draws(1)) | {"code_normalization_id": torch.tensor(5)} | buffers(1.0)
    assert "DECOUPLED" in refusal(write(tmp_path / "decoupled", decoupled, "BatchTopKCrossCoder"))
    (tmp_path / "k" / "config.json").write_text("[1")
    assert "config.json" in refusal(tmp_path / "k")
    (tmp_path / "class" / "ae.pt").write_bytes(b"no torch file")
    (tmp_path / "class" / "config.json").unlink()
    assert "ae.pt" in refusal(tmp_path / "class")
