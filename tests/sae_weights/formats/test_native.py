"""editserver's own layout keeps every number, reads by row, and carries its digest."""

from __future__ import annotations

import json

import pytest
import torch

from sae_weights import SAEFormatError, load_sae, save_native
from sae_weights.formats import Origin


@pytest.fixture
def x():
    return torch.randn(11, 6, generator=torch.Generator().manual_seed(5)) * 2


@pytest.mark.parametrize("architecture", ["relu", "jumprelu", "gated", "topk"])
@pytest.mark.parametrize("input_norm", ["none", "layer_norm", "unit_norm", "centre"])
def test_a_written_dictionary_is_the_same_function(make_sae, tmp_path, x, architecture, input_norm):
    sae = make_sae(architecture, input_norm=input_norm, metadata={"model_name": "tiny"})
    again = load_sae(save_native(sae, tmp_path / "sae"))
    assert again.digest == sae.digest == again.compute_digest()
    assert torch.equal(again.encode(x), sae.encode(x))
    assert torch.equal(again.decode_for(x, again.encode(x)), sae.decode_for(x, sae.encode(x)))
    assert (again.hook, again.k, again.input_norm) == (sae.hook, sae.k, sae.input_norm)
    assert again.metadata["model_name"] == "tiny"


def test_rows_are_read_without_the_dictionary(make_sae, tmp_path):
    sae = make_sae("jumprelu")
    again = load_sae(save_native(sae, tmp_path / "sae"))
    rows = again.rows([7, 2])
    assert not again.materialised
    assert torch.equal(rows.decoder, sae.W_dec[[7, 2]])
    assert torch.equal(rows.encoder, sae.W_enc[[7, 2]])
    assert again.digest == sae.digest
    assert not again.materialised


def test_opening_one_reads_no_matrix_and_computes_no_digest(make_sae, tmp_path, monkeypatch):
    folder = save_native(make_sae("jumprelu"), tmp_path / "sae")

    def refused(*_):
        raise AssertionError("the whole dictionary is read")

    monkeypatch.setattr("sae_weights.sae.SAE.blocks", refused)
    assert len(load_sae(folder).digest) == 64


def test_matrices_of_bfloat16_values_are_stored_as_such(make_sae, tmp_path):
    sae = make_sae("relu")
    rounded = type(sae).from_tensors(
        architecture="relu",
        hook=sae.hook,
        W_enc=sae.W_enc.bfloat16().float(),
        W_dec=sae.W_dec.bfloat16(),
        b_dec=sae.b_dec,
        gate=dict(sae.gate),
    )
    again = load_sae(save_native(rounded, tmp_path / "sae"))
    assert again.digest == rounded.digest
    small = (tmp_path / "sae" / "sae.safetensors").stat().st_size
    save_native(sae, tmp_path / "full")
    assert small < (tmp_path / "full" / "sae.safetensors").stat().st_size * 0.7
    forced = load_sae(save_native(sae, tmp_path / "forced", dtype=torch.bfloat16))
    assert forced.digest == forced.compute_digest() != sae.digest


def test_progress_counts_up_to_the_end(make_sae, tmp_path):
    seen: list[tuple[int, int]] = []
    save_native(make_sae("topk"), tmp_path / "sae", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_an_origin_opens_the_same_dictionary_elsewhere(make_sae, tmp_path):
    save_native(make_sae("topk"), tmp_path / "sae")
    sae = load_sae(tmp_path / "sae")
    assert sae.origin is not None
    carried = Origin.from_dict(json.loads(json.dumps(sae.origin.as_dict())))
    assert carried.open().digest == sae.digest
    stand_in = load_sae(tmp_path / "sae", hints=type(sae.origin.hints)(threshold=0.25))
    assert stand_in.origin is not None
    reopened = Origin.from_dict(json.loads(json.dumps(stand_in.origin.as_dict()))).open()
    assert reopened.approximates == "topk (k = 4)"
    assert reopened.digest == stand_in.digest != sae.digest


def test_a_threshold_stands_in_for_membership(make_sae, tmp_path, x):
    sae = make_sae("topk")
    stand_in = sae.thresholded(0.5)
    pre = sae.pre_activations(x)
    assert torch.equal(stand_in.encode(x), pre * (pre > 0.5))
    assert stand_in.row_separable
    assert not sae.row_separable
    with pytest.raises(SAEFormatError, match="row-separable already"):
        make_sae("relu").thresholded(0.5)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("architecture", "juumprelu", "field 'architecture' is 'juumprelu'"),
        ("architecture", "gated", "also needs"),
        ("version", 2, "expected 'editserver-sae' 1"),
        ("hooks", [], "field 'hooks'"),
        ("hooks", ["somewhere"], "'somewhere'"),
        ("input_norm", "batch_norm", "field 'input_norm' is 'batch_norm'"),
        ("settings", {"temperature": 1}, "'temperature' is none of"),
        ("k", 3, "takes none"),
    ],
)
def test_a_config_that_lies_is_refused_by_field(make_sae, tmp_path, field, value, message):
    folder = save_native(make_sae("jumprelu"), tmp_path / "sae")
    config = json.loads((folder / "sae.json").read_text())
    (folder / "sae.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(SAEFormatError, match=message):
        load_sae(folder)
