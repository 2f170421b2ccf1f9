"""The trainer finds planted features, resumes exactly, and exports the dictionary that it trained."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from sae_weights.formats import load_sae, save_saelens
from sae_weights.training.evaluate import reconstruction
from sae_weights.training.trainer import Recipe, Shuffled, State, Trainer, train

RECIPE = Recipe(n_features=64, k=3, batch=512, lr=3e-3, warmup=20, dead_after=30)


def trainer_for(rows, steps, recipe=RECIPE):
    return Trainer(recipe, rows[:4096], steps)


@pytest.fixture(scope="module")
def trained(planted):
    trainer = trainer_for(planted.rows, 600)
    train(trainer, Shuffled(planted.rows[2_000:]))
    return trainer


@pytest.fixture(scope="module")
def exported(trained, planted):
    return trained.export(5, planted.rows[2_000:12_000], {"model_name": "planted"})


def test_planted_features_are_recovered(exported, planted):
    cosine = F.normalize(exported.W_dec, dim=1) @ planted.directions.T
    best = cosine.max(dim=0).values
    assert (best > 0.95).float().mean() >= 0.9, best.sort().values[:8]


def test_trained_dictionary_explains_held_out_tokens_at_the_asked_sparsity(exported, planted):
    held_out = reconstruction(exported, planted.rows[:2_000])
    assert held_out.fvu < 0.1
    assert held_out.l0 == pytest.approx(RECIPE.k, rel=0.15)


def test_untrained_dictionary_explains_little(planted):
    # The figure above is the training's work: before it, the same form leaves most of the variance.
    fresh = trainer_for(planted.rows, 1).export(5, planted.rows[:4096])
    assert reconstruction(fresh, planted.rows[:2_000]).fvu > 0.3


def moved_after_one_step(rows, aux_weight):
    """How far the encoder rows of eight dead latents, just out of reach of the batch's top k, move in one step."""
    trainer = trainer_for(
        rows, 10, Recipe(n_features=64, k=3, batch=512, lr=3e-3, dead_after=20, aux_weight=aux_weight)
    )
    with torch.no_grad():
        x = rows[:512] * trainer.scale - trainer.b_dec
        trainer.b_enc[:8] = 0.3 - (x @ trainer.W_enc[:8].T).amax(dim=0)  # positive on a token or two, never large
    trainer.silent_for[:8] = 1000
    before = trainer.W_enc[:8].detach().clone()
    trainer.step(rows[:512])
    assert (trainer.silent_for[:8] > 1000).all()  # none of them made it into the top k
    return (trainer.W_enc[:8].detach() - before).norm(dim=1)


def test_dead_latents_learn_only_from_the_auxiliary_loss(planted):
    assert torch.count_nonzero(moved_after_one_step(planted.rows, aux_weight=0.0)) == 0
    assert torch.count_nonzero(moved_after_one_step(planted.rows, aux_weight=1 / 32)) >= 6


def test_export_computes_what_was_trained(trained, exported, planted):
    x = planted.rows[:500]
    with torch.no_grad():
        scaled = (x * trained.scale - trained.b_dec) @ trained.W_enc.T + trained.b_enc
        in_memory = torch.where(scaled / trained.scale > exported.gate["threshold"], scaled.relu() / trained.scale, 0.0)
        recon = (in_memory * trained.scale) @ trained.W_dec / trained.scale + trained.b_dec / trained.scale
    f = exported.encode(x)
    assert torch.equal(f != 0, in_memory != 0)
    torch.testing.assert_close(f, in_memory, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(exported.decode_for(x, f), recon, rtol=1e-4, atol=1e-3)


def test_exported_decoder_rows_have_unit_norm_so_activations_are_lengths(exported):
    torch.testing.assert_close(exported.W_dec.norm(dim=1), torch.ones(RECIPE.n_features), rtol=1e-5, atol=1e-5)


def test_threshold_lets_k_latents_through_on_the_calibration_tokens(trained, planted):
    calibration = planted.rows[2_000:6_000]
    sae = trained.export(5, calibration)
    l0 = (sae.encode(calibration) != 0).sum(dim=1).float().mean()
    assert float(l0) == pytest.approx(RECIPE.k, abs=0.01)


def test_saved_bf16_file_reconstructs_like_the_exported_dictionary(exported, planted, tmp_path):
    loaded = load_sae(save_saelens(exported, tmp_path / "sae", dtype=torch.bfloat16))
    before, after = (reconstruction(sae, planted.rows[:2_000]) for sae in (exported, loaded))
    assert loaded.hook == exported.hook
    assert after.fvu == pytest.approx(before.fvu, abs=5e-3)
    assert after.l0 == pytest.approx(before.l0, rel=0.02)


def test_resumed_run_equals_an_uninterrupted_one(planted, tmp_path):
    rows = planted.rows[:6_000]  # 11 batches an epoch: the break at step 17 is inside the second
    whole = trainer_for(rows, 40)
    train(whole, Shuffled(rows))

    torch.manual_seed(0)
    first = trainer_for(rows, 40)
    first.total_steps = 17
    # The rate depends on the length of the whole run, which an interruption does not change.
    first._rate = lambda: whole.recipe.lr * min(1.0, (first.steps + 1) / RECIPE.warmup)  # type: ignore[method-assign]
    train(first, Shuffled(rows), checkpoint=tmp_path / "run.pt", every=17)
    resumed = Trainer(RECIPE, rows[:10], 40, State.load(tmp_path / "run.pt"))
    assert resumed.steps == 17
    train(resumed, Shuffled(rows))
    assert resumed.steps == 40
    for name, value in whole.params.items():
        assert torch.equal(resumed.params[name], value), name


def test_checkpoint_is_replaced_whole(planted, tmp_path):
    trainer = trainer_for(planted.rows, 4)
    train(trainer, Shuffled(planted.rows), checkpoint=tmp_path / "run.pt", every=2)
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]
    assert State.load(tmp_path / "run.pt").step == 4


def test_fewer_activations_than_a_batch_is_said(planted):
    trainer = trainer_for(planted.rows, 4)
    with pytest.raises(ValueError, match="100 activations are fewer than one batch of 512"):
        train(trainer, Shuffled(planted.rows[:100]))


@pytest.mark.parametrize("objective", ["topk", "jumprelu"])
def test_other_objectives_find_the_planted_features_too(objective, planted):
    recipe = replace(RECIPE, objective=objective, kernel_width=2.0)
    trainer = trainer_for(planted.rows, 600, recipe)
    train(trainer, Shuffled(planted.rows[2_000:]))
    sae = trainer.export(5, planted.rows[2_000:6_000])
    assert sae.architecture == objective
    held_out = reconstruction(sae, planted.rows[:2_000])
    assert held_out.fvu < 0.15
    assert held_out.l0 == pytest.approx(RECIPE.k, rel=0.3)
    best = (F.normalize(sae.W_dec, dim=1) @ planted.directions.T).max(dim=0).values
    assert (best > 0.9).float().mean() >= 0.85, best.sort().values[:8]


def test_recipes_that_cannot_be_are_refused_by_name():
    with pytest.raises(ValueError, match="objective 'l1'; one of batchtopk, topk, jumprelu"):
        Recipe(objective="l1")
    with pytest.raises(ValueError, match=r"k = 65; expected 1..64"):
        Recipe(n_features=64, k=65)
