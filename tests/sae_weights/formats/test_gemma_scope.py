"""Gemma Scope 1: archives as they were published, by sae-lens' numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sae_weights import Hints, Hook, SAEFormatError, load_sae
from tests.sae_weights.formats.agreement import check_agreement
from tests.sae_weights.formats.published import GEMMA_SCOPE, D, N, answer, sae_tensors, save_npz
from tests.sae_weights.oracle import needs_oracle

HOOKS = {
    "gemma-res": (Hook("resid_post", 20), "google/gemma-2-2b"),
    "gemma-res-old-names": (Hook("resid_post", 9), "google/gemma-2-9b-it"),
    "gemma-mlp": (Hook("mlp_out", 3), "google/gemma-2-9b"),
    "gemma-att": (Hook("attn.z", 25), "google/gemma-2-2b"),
    "gemma-embedding": (Hook("resid_pre", 0), "google/gemma-2-2b"),
}


class TestOracle:
    pytestmark = needs_oracle

    @pytest.mark.parametrize("case", GEMMA_SCOPE)
    def test_a_published_archive_means_to_us_what_it_means_to_sae_lens(self, case):
        path, answers = answer(case)
        sae = load_sae(path)
        assert (sae.architecture, sae.hook, sae.metadata["model_name"]) == ("jumprelu", *HOOKS[case])
        assert (sae.origin.format, load_sae(path / "params.npz").digest) == ("gemma_scope", sae.digest)
        check_agreement(sae, **answers)

    def test_a_transcoder_reads_the_normalised_mlp_input_and_writes_the_mlp_output(self):
        path, answers = answer("gemma-transcoder")
        sae = load_sae(path)
        assert (sae.hook, sae.hook_out) == (Hook("ln2.normalized", 5), Hook("mlp_out", 5))
        assert "transcoder" in sae.refusal
        check_agreement(sae, **answers)


def written(folder, tensors):
    save_npz(folder / "params.npz", tensors)
    return folder


def test_the_equation_of_the_paper(tmp_path):
    raw = sae_tensors(0)
    sae = load_sae(written(tmp_path / "gemma-scope-2b-pt-res" / "layer_20" / "width_16k" / "average_l0_71", raw))
    x = torch.randn(20, D) * 3
    p = x @ raw["W_enc"] + raw["b_enc"]
    f = p.relu() * (p > raw["threshold"])
    check_agreement(sae, x, f, f @ raw["W_dec"] + raw["b_dec"])


def test_an_embedding_dictionary_reads_the_stream_that_is_root_d_times_the_embedding(tmp_path):
    raw = sae_tensors(1)
    folder = tmp_path / "gemma-scope-2b-pt-res" / "embedding" / "width_4k" / "average_l0_6"
    sae = load_sae(written(folder, raw))
    embedding = torch.randn(20, D)
    p = embedding @ raw["W_enc"] + raw["b_enc"]
    f = p.relu() * (p > raw["threshold"])
    named = load_sae(folder, hints=Hints(hook="hook_embed"))  # as sae-lens' registry calls the place
    assert sae.hook == named.hook == Hook("resid_pre", 0)
    check_agreement(sae, embedding * D**0.5, f, (f @ raw["W_dec"] + raw["b_dec"]) * D**0.5)


def test_the_site_comes_from_the_repository_or_from_the_caller(tmp_path):
    folder = written(tmp_path / "layer_20" / "width_16k", sae_tensors(0))
    with pytest.raises(SAEFormatError, match=r"params\.npz: its path does not say .* --hook blocks\.20"):
        load_sae(folder)
    assert load_sae(folder, hints=Hints(hook="blocks.20.hook_resid_post")).hook == Hook("resid_post", 20)
    cached = tmp_path / "models--google--gemma-scope-2b-pt-mlp" / "snapshots" / "abc" / "layer_4" / "width_16k" / "l0_9"
    assert load_sae(written(cached, sae_tensors(0))).hook == Hook("mlp_out", 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threshold": None}, r"params\.npz: no tensor 'threshold'"),
        ({"W_dec": torch.zeros(N, D + 1)}, r"params\.npz: "),
        ({"b_enc": torch.zeros(N - 1)}, r"params\.npz: tensor 'b_enc' has shape \[95\]; expected \[96\]"),
        ({"r_mag": torch.zeros(N)}, r"params\.npz: tensor 'r_mag' .* does not belong to a Gemma Scope dictionary"),
        ({"W_enc": torch.zeros(D, N, dtype=torch.int32)}, r"tensor 'W_enc' has dtype I32; expected F64"),
    ],
)
def test_a_wrong_array_is_named(tmp_path, changes, message):
    tensors = {name: t for name, t in (sae_tensors(0) | changes).items() if t is not None}
    folder = tmp_path / "gemma-scope-2b-pt-res" / "layer_20" / "width_16k"
    with pytest.raises(SAEFormatError, match=message):
        load_sae(written(folder, tensors))


def test_an_archive_with_pickled_objects_is_refused(tmp_path):
    folder = tmp_path / "gemma-scope-2b-pt-res" / "layer_20"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", W_enc=np.array([{"a": 1}], dtype=object))
    with pytest.raises(SAEFormatError, match=r"params\.npz: not a readable \.npz file at array 'W_enc'"):
        load_sae(folder)
