"""ITDA's run folders, against the encoder of the authors' train.py written out."""

from __future__ import annotations

import pytest
import torch
import yaml

from sae_weights import Hook, SAEFormatError, load_sae
from sae_weights.formats import Hints
from tests.sae_weights.formats.agreement import check_agreement
from tests.sae_weights.formats.draws import Draws

D, N, K, TOKENS = 12, 48, 5, 40


def write(folder, atoms, **config):
    folder.mkdir(parents=True)
    torch.save(atoms, folder / "atoms.pt")
    torch.save(torch.arange(2 * len(atoms)).reshape(-1, 2), folder / "atom_indices.pt")
    written = {
        "wandb_name": "itda",
        "layer": 3,
        "lm_name": "EleutherAI/pythia-70m-deduped",
        "device": "cuda",
        "submodule_name": None,
        "steps": 100,
        "activation_dim": D,
        "k": K,
        "loss_threshold": 0.1,
        "dataset": "monology/pile-uncopyrighted",
        "seq_len": 128,
        "batch_size": 4,
        "seed": None,
        "max_dict_size": 0,
    }
    stated = {name: value for name, value in (written | config).items() if value != "absent"}
    (folder / "metadata.yaml").write_text(yaml.dump(stated))
    return folder


def unit_rows(draws, n=N):
    atoms = draws.normal(n, D)
    return atoms / atoms.norm(dim=1, keepdim=True)


def write_small(folder):
    """One for tests of other modules."""
    return write(folder, unit_rows(Draws(0)))


def pursued(atoms, x, k):
    """``mp_encode``, one token at a time."""
    f = torch.zeros(len(x), len(atoms))
    for token, row in enumerate(x):
        residual = row.clone()
        for _ in range(k):
            correlation = atoms @ residual
            best = int(correlation.abs().argmax())
            f[token, best] += correlation[best]
            residual = residual - correlation[best] * atoms[best]
    return f


@pytest.mark.parametrize(("stated", "k"), [(K, K), ("absent", 40)])
def test_a_run_is_decomposed_as_the_authors_do(tmp_path, stated, k):
    draws = Draws(1)
    atoms = unit_rows(draws)
    sae = load_sae(write(tmp_path / "9vrfil97", atoms, k=stated))
    x = draws.tokens(TOKENS, D)
    f = pursued(atoms, x, k)
    assert (f < 0).any()
    check_agreement(sae, x, f, f @ atoms)
    assert (sae.architecture, sae.k, sae.hook) == ("itda", k, Hook("resid_post", 3))
    assert sae.metadata["model_name"] == "EleutherAI/pythia-70m-deduped"


def refusal(path, **hints):
    with pytest.raises(SAEFormatError) as error:
        load_sae(path, hints=Hints(**hints))
    return str(error.value)


def test_what_does_not_fit_is_named_with_its_place(tmp_path):
    atoms = unit_rows(Draws(1))
    assert "orthogonal matching pursuit" in refusal(write(tmp_path / "1", atoms, k="absent", l0=8))
    assert "'k'" in refusal(write(tmp_path / "2", atoms), k=K + 1)
    assert "activation_dim" in refusal(write(tmp_path / "3", atoms, activation_dim=D + 1))
    assert "atoms.pt" in refusal(write(tmp_path / "4", {"atoms": atoms}))
    assert "atoms.pt" in refusal(write(tmp_path / "5", atoms[0]))
    assert "norm_scaling_factor" in refusal(write(tmp_path / "6", atoms), norm_scaling_factor=2.0)
    assert "--hook" in refusal(write(tmp_path / "7", atoms, layer="absent"))
    torch.save(torch.zeros(3, 2), tmp_path / "2" / "atom_indices.pt")
    assert "atom_indices.pt" in refusal(tmp_path / "2")
    (tmp_path / "3" / "metadata.yaml").unlink()
    assert "metadata.yaml" in refusal(tmp_path / "3")
