"""The self-check passes for what is right, fails for what is not, and needs no whole matrix for what is large."""

from __future__ import annotations

import pytest
import torch

from sae_weights import load_sae, save_native, self_check
from sae_weights.architectures import ARCHITECTURES
from sae_weights.self_check import examine

FROM_ITS_ROWS = ["relu", "jumprelu", "gated", "batchtopk", "topk"]


@pytest.mark.parametrize("architecture", FROM_ITS_ROWS)
def test_a_sound_dictionary_passes_every_check(make_sae, tmp_path, architecture):
    sae = load_sae(save_native(make_sae(architecture, d=24, n=300), tmp_path))
    found = examine(sae, verify=True)
    assert found.passed
    assert [check.name for check in found.checks if check.passed is not True] == []
    whole = make_sae(architecture, d=24, n=300)
    assert found.decoder.largest == pytest.approx(float(whole.W_dec.norm(dim=1).max()))
    assert found.encoder.median == pytest.approx(float(whole.W_enc.norm(dim=1).median()))


def test_another_content_than_the_recorded_digest_names_is_found(make_sae, tmp_path):
    folder = save_native(make_sae(d=24, n=300), tmp_path)
    weights = folder / "sae.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1  # the mantissa of the last value
    weights.write_bytes(data)
    assert examine(load_sae(folder)).passed
    failed = [check.name for check in examine(load_sae(folder), verify=True).checks if check.passed is False]
    assert failed == ["the digest is that of the content"]


def test_rows_that_differ_from_the_rows_read_in_order_are_found(make_sae, monkeypatch):
    sae = make_sae(d=24, n=300)
    read = type(sae).rows

    def off_by_one(self, indices):
        return read(self, [(i + 1) % 300 for i in indices])

    monkeypatch.setattr(type(sae), "rows", off_by_one)
    failed = {check.name for check in examine(sae).checks if check.passed is False}
    assert failed == {"rows read alone are the rows read in order", "one latent's row gives what all rows give"}


def test_an_encode_that_is_not_the_row_path_is_found(make_sae, monkeypatch):
    sae = make_sae("relu", d=24, n=300)
    monkeypatch.setattr(type(sae), "encode", lambda self, x: torch.relu(self.pre_activations(x)) * 1.01)
    failed = {check.name for check in examine(sae).checks if check.passed is False}
    assert "the row path is the full encode" in failed


@pytest.mark.parametrize(("architecture", "passed"), [("jumprelu", True), ("topk", None)])
def test_a_large_dictionary_is_never_held_whole(make_sae, tmp_path, monkeypatch, architecture, passed):
    monkeypatch.setattr(self_check, "WHOLE_BYTES", 1000)
    sae = load_sae(save_native(make_sae(architecture, d=24, n=300), tmp_path))
    found = examine(sae, verify=True)
    assert not sae.materialised
    assert found.passed
    finite = next(check for check in found.checks if check.name == "encode and decode are finite")
    assert finite.passed is passed


def test_every_architecture_can_be_examined(architecture_zoo):
    for sae in architecture_zoo:
        found = examine(sae)
        assert found.passed, (sae, found.checks)
        assert (found.encoder is None) == ARCHITECTURES[sae.architecture].tied


@pytest.fixture
def architecture_zoo(tmp_path):
    """One random dictionary of every architecture that can be built from its declared tensors alone."""
    from sae_weights import SAE, Hook

    made = []
    g = torch.Generator().manual_seed(0)
    for name, form in ARCHITECTURES.items():
        if form.execution == "sequence" or form.extra_tensors or form.gate_matrices:
            continue
        gate = {one: torch.rand(64, generator=g) * 0.3 for one in form.gate_tensors}
        W_dec = torch.nn.functional.normalize(torch.randn(64, 16, generator=g), dim=1)
        sae = SAE.from_tensors(
            architecture=name,
            hook=Hook("resid_post", 3),
            W_enc=None if form.tied else torch.randn(64, 16, generator=g),
            W_dec=W_dec,
            b_dec=torch.zeros(16),
            gate=gate,
            k=4 if form.needs_k else None,
        )
        made.append(load_sae(save_native(sae, tmp_path / name)))
    assert len(made) > 15
    return made
