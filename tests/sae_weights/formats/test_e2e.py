"""e2e_sae's files mean to us what they mean to Apollo's own code."""

from __future__ import annotations

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from sae_weights import Hook, SAEFormatError, load_sae
from sae_weights.formats import Hints
from tests.sae_weights.formats.agreement import check_agreement
from tests.sae_weights.formats.draws import Draws
from tests.sae_weights.oracle import needs_oracle, run_oracle

D, N, TOKENS = 12, 48, 40
POSITIONS = ["blocks-2-hook_resid_pre", "blocks-6-hook_resid_post", "blocks-6-hook_mlp_out"]


def one(draws):
    return {
        "encoder.0.weight": draws.normal(N, D),
        "encoder.0.bias": draws.normal(N, spread=0.4),
        "decoder.weight": draws.uneven(N, D).T.contiguous(),
        "decoder.bias": draws.normal(D),
    }


def write(folder, positions, draws):
    folder.mkdir(parents=True)
    state = {f"{position}.{name}": t for position in positions for name, t in one(draws).items()}
    torch.save(state, folder / "samples_400000.pt")
    hooks = [position.replace("-", ".") for position in positions]
    config = {"tlens_model_name": "gpt2", "saes": {"sae_positions": hooks, "dict_size_to_input_ratio": 4.0}}
    (folder / "final_config.yaml").write_text(yaml.dump(config))
    return folder


def write_small(folder):
    """One for tests of other modules."""
    return write(folder, POSITIONS[:1], Draws(0))


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    root = tmp_path_factory.mktemp("e2e")
    for case, positions in (("one", POSITIONS[:1]), ("several", POSITIONS)):
        draws = Draws(len(positions))
        write(root / case, positions, draws)
        save_file({"x": draws.tokens(TOKENS, D)}, root / case / "x.safetensors")
    run_oracle("oracle_e2e_sae.py", root)
    return root


@needs_oracle[0]
@needs_oracle[1]
@pytest.mark.parametrize(
    ("case", "position", "hook"),
    [("one", POSITIONS[0], None)] + [("several", p, p.replace("-", ".")) for p in POSITIONS],
)
def test_a_place_of_a_file_means_what_the_authors_code_computes(work, case, position, hook):
    sae = load_sae(work / case, hints=Hints(hook=hook))
    answers = load_file(work / case / "answers.safetensors")
    check_agreement(sae, answers["x"], answers[f"f.{position}"], answers[f"x_hat.{position}"])
    assert sae.architecture == "e2e"
    assert sae.hook.hook_name == position.replace("-", ".")
    assert sae.metadata["model_name"] == "gpt2"


def test_the_file_of_the_most_samples_is_read_and_one_sae_alone_too(tmp_path):
    draws = Draws(3)
    folder = write(tmp_path / "run", POSITIONS[:1], draws)
    last = one(draws)
    torch.save({f"{POSITIONS[0]}.{name}": t for name, t in last.items()}, folder / "samples_1000000.pt")
    sae = load_sae(folder)
    assert torch.equal(sae.b_dec, last["decoder.bias"])
    assert load_sae(folder / "samples_1000000.pt").digest == sae.digest
    torch.save(last, tmp_path / "alone.pt")
    alone = load_sae(tmp_path / "alone.pt", hints=Hints(hook="blocks.2.hook_resid_pre"))
    assert alone.digest == sae.digest
    assert alone.hook == Hook("resid_pre", 2)


def refusal(path, **hints):
    with pytest.raises(SAEFormatError) as error:
        load_sae(path, hints=Hints(**hints))
    return str(error.value)


def test_of_several_places_one_has_to_be_chosen(tmp_path):
    folder = write(tmp_path / "run", POSITIONS, Draws(1))
    assert "--hook blocks.2.hook_resid_pre" in refusal(folder)
    assert "none of them" in refusal(folder, hook="blocks.3.hook_resid_pre")


def test_what_does_not_fit_is_named_with_its_place(tmp_path):
    state = one(Draws(1))
    for missing in ("encoder.0.bias", "decoder.weight", "decoder.bias"):
        torch.save({name: t for name, t in state.items() if name != missing}, tmp_path / f"{missing}.pt")
        said = refusal(tmp_path / f"{missing}.pt", hook="blocks.2.hook_resid_pre")
        assert missing in said
    folder = write(tmp_path / "run", POSITIONS[:1], Draws(1))
    (folder / "final_config.yaml").write_text("tlens_model_name: !!python/object/apply:os.system ['true']")
    assert "final_config.yaml" in refusal(folder)
