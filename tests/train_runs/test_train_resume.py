"""Training runs that stop and go on: to the last bit what one that never stopped is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model_export.onnx_export import export_bundle
from model_export.verify import compare_with_onnxruntime, random_pairs
from siamtrack.nets.checkpoint import load_checkpoint
from tests.tiny_training import Seen, assert_same, read, tiny
from training.module import SiameseModule
from training.recipe import load_recipe
from training.train import check_same_recipe, train

pytestmark = pytest.mark.usefixtures("threads_as_before")


def test_resume_is_exact_and_freezing_freezes(
    data: Path, tmp_path: Path, watch: Callable[..., Seen], capsys: pytest.CaptureFixture[str]
) -> None:
    # One test for what needs the same two runs: they are the expensive part.
    recipe = tiny()
    straight = watch()
    last = train(recipe, data, tmp_path / "straight")
    assert last == tmp_path / "straight" / "last.ckpt"
    assert len(straight.losses) == 2 * 2
    first_half = watch(crash_at=1)
    with pytest.raises(ConnectionAbortedError):
        train(recipe, data, tmp_path / "resumed")
    assert len(first_half.losses) == 2
    second_half = watch()
    resumed = train(recipe, data, tmp_path / "resumed")

    # The run continued where it stopped, and ended as if it had never been stopped.
    assert first_half.losses + second_half.losses == straight.losses
    ours, theirs = read(last), read(resumed)
    for key in ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers"):
        assert_same(ours[key], theirs[key], key)
    assert (ours["epoch"], ours["global_step"]) == (theirs["epoch"], theirs["global_step"]) == (1, 4)
    averaged, current = ours["state_dict"], ours["current_model_state"]
    assert (averaged["net.neck16.weight"] != current["net.neck16.weight"]).any()

    # Every epoch is judged on the same pairs, or the best checkpoint would be the luckiest.
    assert len(straight.validation) == 2
    assert straight.validation[0] == straight.validation[1] == first_half.validation[0]
    assert (tmp_path / "straight" / "best.ckpt").is_file()
    assert list((tmp_path / "straight").glob("events.out.tfevents*"))
    assert load_recipe(tmp_path / "straight" / "recipe.yaml") == recipe

    # Epoch 0: the whole backbone is frozen. Epoch 1: its last two stages train, the others never.
    start, thaw = straight.before
    end = {name.removeprefix("net."): value for name, value in current.items() if name.startswith("net.")}
    thawing = ("backbone.stages.3.", "backbone.stages.4.")
    for name in start:
        if not name.startswith("backbone."):
            continue
        assert torch.equal(start[name], thaw[name]), f"{name} moved while frozen"
        moved = not torch.equal(thaw[name], end[name])
        assert moved == name.startswith(thawing), f"{name} {'moved' if moved else 'did not move'}"
    assert any(name.startswith(thawing) for name in start)
    assert not torch.equal(start["neck16.weight"], thaw["neck16.weight"])

    # The state from before the thaw is kept.
    frozen = read(tmp_path / "straight" / "frozen.ckpt")
    assert (frozen["epoch"], frozen["global_step"]) == (0, 2)
    assert torch.equal(frozen["current_model_state"]["net.neck16.weight"], thaw["neck16.weight"])

    # What it wrote exports, with the averaged weights, and computes the same.
    checkpoint = load_checkpoint(last)
    assert checkpoint.model == recipe.model
    for name, value in checkpoint.net.state_dict().items():
        assert torch.equal(value, averaged[f"net.{name}"]), name
    bundle = export_bundle(checkpoint.model, checkpoint.net, tmp_path / "bundle", "none", checkpoint.provenance)
    assert bundle.manifest.provenance["seed"] == "1"
    difference = compare_with_onnxruntime(checkpoint.net, bundle, random_pairs(bundle, 2))
    assert difference.ok, difference


@pytest.mark.parametrize(("augment", "workers"), [("cpu", 0), ("device", 0), ("cpu", 1)])
def test_resume_within_an_epoch_is_exact(
    data: Path, tmp_path: Path, watch: Callable[..., Seen], monkeypatch: pytest.MonkeyPatch, augment: str, workers: int
) -> None:
    """Stopped after three of four steps, in the frozen and in the thawed epoch; checkpoints are of every second one."""
    recipe = tiny(augment, pairs_per_epoch=16)
    recipe = replace(recipe, data=replace(recipe.data, workers=workers))
    straight = watch()
    last = train(recipe, data, tmp_path / "straight", checkpoint_steps=2)
    assert len(straight.losses) == 8
    for out, stop in ((tmp_path / "frozen", 3), (tmp_path / "thawed", 7)):
        begun = watch()
        step = SiameseModule.training_step

        def stopped(
            self: SiameseModule, batch: Any, i: int, stop: int = stop, begun: Seen = begun, step: Any = step
        ) -> Any:
            if len(begun.losses) == stop:
                raise ConnectionAbortedError("power cut")
            return step(self, batch, i)

        monkeypatch.setattr(SiameseModule, "training_step", stopped)
        with pytest.raises(ConnectionAbortedError):
            train(recipe, data, out, checkpoint_steps=2)
        assert read(out / "last.ckpt")["global_step"] == stop - 1
        rest = watch()
        resumed = train(recipe, data, out, checkpoint_steps=2)
        assert rest.losses == straight.losses[stop - 1 :]  # neither the epoch anew nor a step left out
        ours, theirs = read(last), read(resumed)
        for key in ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers"):
            assert_same(ours[key], theirs[key], key)
        assert (ours["epoch"], ours["global_step"]) == (theirs["epoch"], theirs["global_step"]) == (1, 8)
        assert rest.validation == straight.validation[stop // 4 :]
        assert [start["from_step"] for start in json.loads((out / "run.json").read_text())] == [0, stop - 1]


def test_an_epoch_ends_once_wherever_a_run_is_stopped(
    data: Path, tmp_path: Path, watch: Callable[..., Seen], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the first epoch's validation, of a run whose steps between checkpoints divide an epoch's."""
    recipe = tiny(pairs_per_epoch=16)
    straight = watch()
    train(recipe, data, tmp_path / "straight", checkpoint_steps=2)

    def stopped(self: SiameseModule, batch: Any, batch_idx: int) -> None:
        raise ConnectionAbortedError("power cut")

    watch()
    monkeypatch.setattr(SiameseModule, "validation_step", stopped)
    with pytest.raises(ConnectionAbortedError):
        train(recipe, data, tmp_path / "run", checkpoint_steps=2)
    rest = watch()
    train(recipe, data, tmp_path / "run", checkpoint_steps=2)
    assert rest.losses == straight.losses[2:] and rest.validation == straight.validation
    epochs = [json.loads(line)["epoch"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert epochs == [0, 1] and (tmp_path / "run" / "frozen.ckpt").is_file()


def test_finished_run_is_not_trained_again(data: Path, tmp_path: Path, watch: Callable[..., Seen]) -> None:
    recipe = tiny(epochs=1, pairs_per_epoch=4, validation_pairs=0)
    first = watch()
    train(recipe, data, tmp_path)
    again = watch()
    train(recipe, data, tmp_path)
    (tmp_path / "best.ckpt").write_text("of the run before")
    (tmp_path / "imported.ckpt").write_text("of somebody else")
    with pytest.raises(ValueError, match="no folder of videos"):
        train(recipe, tmp_path / "mistyped", tmp_path, resume=False)
    assert (tmp_path / "last.ckpt").exists() and (tmp_path / "best.ckpt").exists()
    fresh = watch()
    train(recipe, data, tmp_path, resume=False)
    assert [len(seen.losses) for seen in (first, again, fresh)] == [1, 0, 1]
    assert fresh.losses == first.losses
    assert not (tmp_path / "best.ckpt").exists() and (tmp_path / "imported.ckpt").exists()
    assert len(list(tmp_path.glob("events.*"))) == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    assert [start["from_step"] for start in json.loads((tmp_path / "run.json").read_text())] == [0]


@pytest.mark.parametrize("augment", ["cpu", "device"])
def test_resume_repeats_dropout_and_triplets(
    data: Path, tmp_path: Path, watch: Callable[..., Seen], augment: str
) -> None:
    """DASTSiam: three templates a sample, dropout in its transformers; validated with template updates."""
    changes: dict[str, Any] = {"model": "dastsiam-mobilenetv2", "objective_config": {}, "model_config": {"blocks": 1}}
    recipe = tiny(augment, pairs_per_epoch=4, batch_size=2, **changes)
    straight = watch()
    last = train(recipe, data, tmp_path / "straight")
    watch(crash_at=1)
    with pytest.raises(ConnectionAbortedError):
        train(recipe, data, tmp_path / "resumed")
    torch.rand(7)  # whatever the process has drawn in the meantime
    second_half = watch()
    resumed = train(recipe, data, tmp_path / "resumed")
    assert len(second_half.losses) == 2
    assert second_half.losses == straight.losses[2:]
    assert_same(read(last)["state_dict"], read(resumed)["state_dict"])
    assert (tmp_path / "straight" / "best.ckpt").is_file()  # validated
    checkpoint = load_checkpoint(last)  # the network it was trained as, not the default one
    assert checkpoint.net.config.blocks == 1  # type: ignore[union-attr]
    assert checkpoint.provenance["model_config"] == '{"blocks": 1}'


def test_a_run_from_before_a_field_was_known_goes_on(data: Path, tmp_path: Path) -> None:
    recipe = tiny(epochs=1, pairs_per_epoch=4, validation_pairs=0)
    last = train(recipe, data, tmp_path / "run")
    content = read(last)
    for name in ("sets", "shards"):
        del content["hyper_parameters"]["recipe"]["data"][name]
    torch.save(content, last)
    check_same_recipe(recipe, last)
    with pytest.raises(ValueError, match=r"was started with another recipe \(other: seed\)"):
        check_same_recipe(tiny(epochs=1, pairs_per_epoch=4, validation_pairs=0, seed=9), last)
