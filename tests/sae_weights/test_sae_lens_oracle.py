"""The real sae-lens as oracle: its folders mean to us what they mean to it, and it reads ours.

It runs in an environment of its own (``make setup-oracle``). Without that environment these tests fail; they are skipped
only if EDITSERVER_SKIP_ORACLE=1 says so.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sae_weights import SAE, Folding, Hook, load_sae, save_saelens
from tests.sae_weights.formats.agreement import check_agreement

ROOT = Path(__file__).parents[2]
ORACLE = Path(os.environ.get("EDITSERVER_ORACLE_PYTHON", ROOT / ".venv-oracle" / "bin" / "python"))
INPUT_SCALE = 0.37

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.skipif(os.environ.get("EDITSERVER_SKIP_ORACLE") == "1", reason="EDITSERVER_SKIP_ORACLE=1"),
]

NORMS = ("none", "constant_norm_rescale", "layer_norm", "expected_average_only_in")
THEIRS = [
    f"{name}.{norm}.{centred}"
    for name in ("standard", "jumprelu", "gated", "topk", "topk-rescaled", "abstopk", "abstopk-rescaled")
    for norm in NORMS
    for centred in ("centred", "plain")
]
TRAINED = [
    f"{name}.{norm}.{scaled}"
    for name in ("batchtopk", "matryoshka")
    for norm in NORMS
    for scaled in ("rescaled", "raw")
]
PURSUIT = [
    f"pursuit-{name}.{norm}.{centred}"
    for name in ("threshold", "iterations", "support")
    for norm in NORMS[:3]
    for centred in ("centred", "plain")
]
TRANSCODERS = [
    f"{name}.{d_out}"
    for name in ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
    for d_out in (24, 18)
]
WHITENED = [
    f"whitened-{name}.{centred}"
    for name in (
        "standard",
        "jumprelu",
        "gated",
        "topk",
        "topk-rescaled",
        "abstopk-rescaled",
        "batchtopk",
        "batchtopk-raw",
    )
    for centred in ("centred", "plain")
]
OURS = [
    f"{name}.{norm}.{dtype}"
    for name in ("relu", "jumprelu", "gated", "topk", "batchtopk", "abstopk", "matryoshka")
    for norm in ("none", "constant_norm_rescale", "layer_norm")
    for dtype in ("float32", "bfloat16")
]


def pursuit():
    """A matching-pursuit dictionary with rows of norm 1, as in training."""
    g = torch.Generator().manual_seed(91)
    return SAE.from_tensors(
        architecture="matching_pursuit",
        hook=Hook("resid_post", 3),
        W_dec=torch.nn.functional.normalize(torch.randn(96, 24, generator=g), dim=-1),
        b_dec=torch.randn(24, generator=g),
        gate={"b_enc": torch.zeros(96)},
        folding=Folding(subtract_b_dec=True),
        settings={"residual_threshold": 0.4, "max_iterations": 11},
    )


@pytest.fixture(scope="module")
def work(make_sae, tmp_path_factory):
    """A folder in which sae-lens has answered for every case, its own and ours."""
    assert ORACLE.exists(), f"{ORACLE} is missing: run `make setup-oracle` (or set EDITSERVER_SKIP_ORACLE=1)"
    root = tmp_path_factory.mktemp("oracle")
    for seed, case in enumerate(OURS):
        name, norm, dtype = case.split(".")
        sae = make_sae(name, d=24, n=96, seed=seed, input_norm=norm)
        save_saelens(sae, root / "ours" / case, dtype=getattr(torch, dtype))
    save_saelens(make_sae("relu", d=24, n=96, seed=90, input_norm="centre"), root / "ours" / "relu.centre.float32")
    save_saelens(pursuit(), root / "ours" / "pursuit")
    for skip in (False, True):
        extras = {"W_skip": torch.randn(24, 24)} if skip else {}
        transcoder = make_sae("jumprelu", d=24, n=96, seed=92, hook_out=Hook("mlp_out", 3), more_extras=extras)
        save_saelens(transcoder, root / "ours" / f"transcoder-{skip}")
    script = Path(__file__).parent / "oracle_sae_lens.py"
    run = subprocess.run([ORACLE, script, root], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    return root


def check(sae, folder):
    answers = load_file(folder / "answers.safetensors")
    x, f, x_hat = answers["x"], answers["f"], answers["x_hat"]
    assert (f != 0).any(dim=-1).float().mean() > 0.9  # the case exercises the dictionary
    pre = sae.pre_activations(x)
    if sae.k is not None:
        top = (pre.abs() if sae.signed else pre).topk(sae.k + 1, dim=-1).values
        decided = ((top[:, -2] - top[:, -1]) > 1e-4)[:, None].expand_as(pre)
    else:
        decided = (pre - sae.rows(range(sae.n_features)).threshold).abs() > 1e-4
    # Rounding may put a value within 1e-4 of its gate on either side; such values are few, or the case says nothing.
    assert decided.float().mean() > 0.95
    scale = f.abs().max().item()
    torch.testing.assert_close(sae.encode(x)[decided], f[decided], rtol=1e-4, atol=2e-6 * scale)
    torch.testing.assert_close(sae.decode_for(x, f), x_hat, rtol=1e-4, atol=2e-6 * x_hat.abs().max().item())


@pytest.mark.parametrize("case", THEIRS)
def test_a_folder_of_sae_lens_means_to_us_what_it_means_to_sae_lens(work, case):
    folder = work / "theirs" / case
    scaled = {"norm_scaling_factor": INPUT_SCALE} if "expected_average_only_in" in case else {}
    check(load_sae(folder, **scaled), folder)


@pytest.mark.parametrize("case", TRAINED)
@pytest.mark.parametrize("part", ["training", "inference"])
def test_batchtopk_checkpoints_equal_the_inference_model_that_sae_lens_makes_of_them(work, case, part):
    folder = work / "theirs" / case / part
    unfolded = part == "training" and "expected_average_only_in" in case
    sae = load_sae(folder, **({"norm_scaling_factor": INPUT_SCALE} if unfolded else {}))
    assert sae.architecture == (case.split(".")[0] if part == "training" else "jumprelu")
    check(sae, folder)


@pytest.mark.parametrize("case", PURSUIT)
def test_matching_pursuit_chooses_and_stops_as_in_sae_lens(work, case):
    sae = load_sae(work / "theirs" / case)
    assert (sae.architecture, sae.execution) == ("matching_pursuit", "dictionary")
    check_agreement(sae, **load_file(work / "theirs" / case / "answers.safetensors"))


@pytest.mark.parametrize("case", TRANSCODERS)
def test_a_transcoder_of_sae_lens_means_to_us_what_it_means_to_sae_lens(work, case):
    name, d_out = case.split(".")
    sae = load_sae(work / "theirs" / case)
    assert (sae.hook, sae.hook_out, sae.d_out) == (Hook("ln2.normalized", 3), Hook("mlp_out", 3), int(d_out))
    assert sae.architecture == ("jumprelu" if "jumprelu" in name else "relu")
    assert ("W_skip" in sae.extras) == ("skip" in name)
    check_agreement(sae, **load_file(work / "theirs" / case / "answers.safetensors"))


def test_a_dictionary_of_the_centred_gpt2_reads_the_stream_as_it_is(work):
    sae = load_sae(work / "theirs" / "centred-model")
    assert (sae.input_norm, sae.refusal) == ("centre", None)
    check_agreement(sae, **load_file(work / "theirs" / "centred-model" / "answers.safetensors"))


@pytest.mark.parametrize("case", WHITENED)
def test_whitening_is_folded_as_sae_lens_folds_it(work, case):
    sae = load_sae(work / "theirs" / case)
    assert sae.input_norm == "none"
    check_agreement(sae, **load_file(work / "theirs" / case / "answers.safetensors"))


def test_heads_are_flattened_as_sae_lens_flattens_them(work):
    sae = load_sae(work / "theirs" / "hook_z")
    assert sae.hook.edit_layer is None
    check(sae, work / "theirs" / "hook_z")


@pytest.mark.parametrize("case", OURS)
def test_sae_lens_reads_what_we_write(work, case):
    check(load_sae(work / "ours" / case), work / "ours" / case)


@pytest.mark.parametrize("case", ["relu.centre.float32", "pursuit", "transcoder-False", "transcoder-True"])
def test_sae_lens_reads_what_else_we_write(work, case):
    folder = work / "ours" / case
    check_agreement(load_sae(folder), **load_file(folder / "answers.safetensors"))
