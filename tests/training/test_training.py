"""The loop: resuming, checkpointing, budgets; and checkpoints that survive damage."""

from __future__ import annotations

import json
import math

import pytest
import torch

from hestctl.budget import Budget, Multiplier
from hestctl.errors import HestError
from hestctl.generation.engine import Generator
from hestctl.model.backbone import tiny_backbone
from hestctl.model.likelihood import answer_loss
from hestctl.model.methods import METHODS, build_tuner
from hestctl.settings import MethodSettings, TrainSettings
from hestctl.training.checkpoint import (
    latest_checkpoint,
    load_tensors,
    prune_checkpoints,
    save_checkpoint,
    save_tensors,
)
from hestctl.training.loop import Trainer

COSTS = (0.0, 0.5e-6, 1e-6)


def trainer_for(name, rows, *, emax_share=None, dual="clamp", lambda0=0.1, alpha=0.05, **train):
    backbone = tiny_backbone()
    tuner = build_tuner(
        MethodSettings(name=name),
        backbone.model,
        layers=backbone.num_layers,
        hidden=backbone.hidden_size,
        states=(0, 1, 2),
        seed=0,
    )
    budget = multiplier = None
    if emax_share is not None:
        work = sum(len(row.prompt_ids) + 8 for row in rows) / len(rows)
        everything = work * backbone.num_layers * 16 * COSTS[2]
        budget = Budget(emax_share * everything, "test", None, 8, 8, 1)
        multiplier = Multiplier(lambda0, alpha, dual)
    defaults = {"warmup_steps": 1, "batch_size": 2, "accumulation": 2, "learning_rate": 5e-3, "epochs": 3}
    settings = TrainSettings(**{**defaults, **train})
    return Trainer(backbone, tuner, rows, settings, costs_j=COSTS, budget=budget, multiplier=multiplier)


def losses(trainer, steps=None):
    out = []
    for metric in trainer.steps():
        out.append((metric.task_loss, metric.energy_j, metric.multiplier))
        if steps is not None and len(out) == steps:
            break
    return out


@pytest.mark.parametrize("name", ["hest", "tabs", "lora"])
def test_a_resumed_run_has_the_losses_of_one_left_alone(name, samples, tmp_path):
    rows = samples(10)
    share = 0.3 if name == "hest" else None
    whole = trainer_for(name, rows, emax_share=share)
    whole.start()
    expected = losses(whole)

    first = trainer_for(name, rows, emax_share=share)
    first.start()
    begun = losses(first, steps=4)
    save_checkpoint(tmp_path, first.step, *first.state())
    second = trainer_for(name, rows, emax_share=share)
    torch.manual_seed(1234)  # the global random state must not matter
    found, warnings = latest_checkpoint(tmp_path)
    second.restore(found.step, found.tensors, found.state)
    assert warnings == []
    assert begun + losses(second) == expected
    assert len(expected) == 9


def test_gradient_checkpointing_reuses_the_gate_noise(samples):
    rows = samples(8)
    plain = trainer_for("hest", rows, emax_share=0.3)
    saving = trainer_for("hest", rows, emax_share=0.3, gradient_checkpointing=True)
    passes = []
    for trainer in (plain, saving):
        trainer.start()
        calls = []
        trainer.backbone.layers[1].input_layernorm.register_forward_hook(
            lambda *_, calls=calls: calls.append(1)
        )
        passes.append(calls)
    for (a, energy_a, _), (b, energy_b, _) in zip(losses(plain), losses(saving), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
        assert energy_a == pytest.approx(energy_b, rel=1e-5)
    assert len(passes[1]) == 2 * len(passes[0])  # every layer really ran again in the backward pass


def test_accumulation_makes_the_same_step_as_one_large_batch(samples):
    rows = samples(8)
    small = trainer_for("lora", rows, batch_size=2, accumulation=2)
    large = trainer_for("lora", rows, batch_size=4, accumulation=1)
    for (a, _, _), (b, _, _) in zip(losses(small), losses(large), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.trained])
def test_training_lowers_the_loss_on_what_it_sees(name, samples):
    rows = samples(4)
    trainer = trainer_for(
        name, rows, emax_share=0.5 if name == "hest" else None, epochs=30, scale_learning_rate=0.05
    )
    trainer.start()
    seen = losses(trainer)
    assert seen[-1][0] < 0.9 * seen[0][0]


@pytest.mark.parametrize("share", [0.1, 0.2, 0.4])
def test_a_budgeted_training_starts_at_its_budget(share, samples):
    trainer = trainer_for("hest", samples(8), emax_share=share, accumulation=4)
    trainer.start()
    assert next(iter(trainer.steps())).energy_ratio == pytest.approx(1.0, abs=0.03)


def test_the_multiplier_brings_the_energy_back_to_its_budget(samples):
    def last_ratio(**dual):
        trainer = trainer_for(
            "hest",
            samples(8),
            emax_share=0.3,
            epochs=60,
            threshold_learning_rate=0.05,
            accumulation=4,
            **dual,
        )
        trainer.start()
        with torch.no_grad():
            trainer.tuner.spectral.gate.threshold.sub_(1.5)
        ratios = [metric.energy_ratio for metric in trainer.steps()]
        assert ratios[0] > 1.5
        return sum(ratios[-10:]) / 10

    assert last_ratio(dual="pi") == pytest.approx(1.0, abs=0.25)
    assert last_ratio(dual="clamp") <= 1.25
    assert last_ratio(dual="none", lambda0=0.0) > 1.5


def test_a_method_without_budget_reports_energy_and_no_ratio(samples):
    trainer = trainer_for("tabs", samples(4))
    trainer.start()
    metric = next(iter(trainer.steps()))
    assert metric.energy_j > 0
    assert metric.energy_ratio is None
    assert metric.multiplier is None


def test_a_loss_that_is_not_finite_stops_before_the_update(samples):
    trainer = trainer_for("tabs", samples(4))
    with torch.no_grad():
        trainer.tuner.spectral.scale[0, 0] = math.nan
    before = {k: v for k, v in trainer.tuner.state().items() if k != "scale"}
    with pytest.raises(HestError, match="diverged at step 0"):
        losses(trainer)
    after = trainer.tuner.state()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_memory_running_out_halves_the_micro_batch_and_keeps_the_step(samples, monkeypatch):
    rows = samples(4)
    expected = losses(trainer_for("lora", rows, batch_size=4, accumulation=1), steps=1)
    trainer = trainer_for("lora", rows, batch_size=4, accumulation=1)
    sizes = []

    def tight(backbone, batch):
        sizes.append(len(batch.input_ids))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("simulated")
        return answer_loss(backbone, batch)

    monkeypatch.setattr("hestctl.training.loop.answer_loss", tight)
    assert losses(trainer, steps=1)[0][0] == pytest.approx(expected[0][0], rel=1e-5)
    assert sizes == [4, 2, 2]


def test_memory_for_not_even_one_sample_is_an_error_that_says_what_to_do(samples, monkeypatch):
    trainer = trainer_for("lora", samples(2))

    def never(backbone, batch):
        raise torch.OutOfMemoryError("simulated")

    monkeypatch.setattr("hestctl.training.loop.answer_loss", never)
    with pytest.raises(HestError, match="one sample at a time") as caught:
        losses(trainer)
    assert "--max-tokens" in caught.value.hint


def test_validation_uses_the_hard_gates(samples):
    rows = samples(3)
    trainer = trainer_for("hest", rows, emax_share=0.3)
    trainer.start()
    generator = Generator(trainer.backbone, trainer.tuner.spectral, None)
    together = generator.answer_nll(rows)
    alone = [generator.answer_nll([row])[0] for row in rows]
    assert together == pytest.approx(alone, rel=1e-4)


def tensors(value=1.0):
    return {"a": torch.full((3,), value), "b": torch.zeros(2, 2)}


@pytest.mark.parametrize("damage", ["truncate", "flip", "missing", "manifest"])
def test_a_damaged_checkpoint_yields_to_the_one_before(damage, tmp_path):
    save_checkpoint(tmp_path, 4, tensors(4.0), {"multiplier": 0.5})
    newest = save_checkpoint(tmp_path, 8, tensors(8.0), {"multiplier": 0.7})
    file = newest / "tensors.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "truncate":
        file.write_bytes(content[:-3])
    elif damage == "flip":
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "missing":
        file.unlink()
    else:
        (newest / "manifest.json").write_text("{")
    found, warnings = latest_checkpoint(tmp_path)
    assert found.step == 4
    assert torch.equal(found.tensors["a"], tensors(4.0)["a"])
    assert len(warnings) == 1
    assert "step-00000008" in warnings[0]


def test_a_checkpoint_torn_while_it_was_written_is_not_seen(tmp_path):
    save_checkpoint(tmp_path, 4, tensors(), {})
    torn = tmp_path / ".aside-00000008-1"
    torn.mkdir()
    (torn / "state.json").write_text(json.dumps({"step": 8}))
    assert latest_checkpoint(tmp_path)[0].step == 4
    prune_checkpoints(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def test_pruning_keeps_the_newest(tmp_path):
    for step in (2, 4, 6, 8):
        save_checkpoint(tmp_path, step, tensors(), {})
    prune_checkpoints(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000006", "step-00000008"]


def test_a_full_disk_keeps_the_earlier_checkpoint_and_names_the_bytes(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 4, tensors(), {})

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hestctl.training.checkpoint.save_file", full)
    with pytest.raises(HestError, match="No space left") as caught:
        save_checkpoint(tmp_path, 8, tensors(), {})
    assert "28 bytes" in caught.value.hint
    assert latest_checkpoint(tmp_path)[0].step == 4
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def test_a_pickle_offered_as_an_adapter_is_refused_and_not_run(tmp_path):
    path = tmp_path / "adapter.safetensors"
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(HestError, match="not a whole safetensors file"):
        load_tensors(path)
    save_tensors(path, tensors(), {})
    assert torch.equal(load_tensors(path)["a"], tensors()["a"])
