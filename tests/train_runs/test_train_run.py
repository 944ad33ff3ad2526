"""Whole training runs, tiny: loss falls, a broken batch moves nothing, and the folder says what was run.

The data is made here: coloured shapes that move over noise. Nothing is downloaded and no ImageNet weights are used.
"""

from __future__ import annotations

import copy
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from siamtrack.nets.checkpoint import load_checkpoint
from siamtrack.nets.decode import AnchorFree
from siamtrack.plain import to_plain
from tests.tiny_training import Seen, assert_same, read, snapshot, tiny
from training.loading import PairDataModule
from training.module import VALIDATION, SiameseModule
from training.objectives import SiamCAN
from training.prepare import prepare
from training.recipe import recipe_from_dict
from training.show import draw_sheet
from training.train import main, train
from training.watch import Throughput, git_commit

pytestmark = pytest.mark.usefixtures("threads_as_before")


def test_training_from_shards(data: Path, tmp_path: Path, watch: Callable[..., Seen]) -> None:
    """The same pairs, but for JPEG, so nearly the same losses; nothing else of the data is read."""
    recipe = tiny(epochs=1)
    prepare(recipe, data, tmp_path / "shards")
    raw = watch()
    train(recipe, data, tmp_path / "raw")
    stored = watch()
    alone = tiny(
        epochs=1,
        data={"shards": "shards", "validation_videos": ["clip2"], "labels": {"nearest": True}, "cache_gb": 0.1},
    )
    train(alone, tmp_path, tmp_path / "stored")
    assert stored.losses == pytest.approx(raw.losses, rel=0.05)
    assert stored.losses != raw.losses


def test_run_folder_says_what_was_run(data: Path, tmp_path: Path) -> None:
    recipe = tiny(epochs=2, pairs_per_epoch=4, batch_size=2, seed=5)
    train(recipe, data, tmp_path)
    (start,) = json.loads((tmp_path / "run.json").read_text())
    assert (start["seed"], start["processes"], start["from_step"]) == (5, 1, 0)
    assert start["git_commit"] == git_commit()
    first, second = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (first["epoch"], first["step"], second["epoch"], second["step"]) == (0, 2, 1, 4)
    assert {"train/loss", "train/cls", "val/iou", "train/samples_per_s", "train/data_wait"} <= set(second)
    assert second["train/samples_per_s"] > 0
    assert 0 < second["train/data_wait"] < 1
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    (image,) = events.Images("train/samples")
    sheet = cv2.imdecode(np.frombuffer(image.encoded_image_string, np.uint8), cv2.IMREAD_COLOR)
    module = SiameseModule(to_plain(recipe))
    loaders = PairDataModule(recipe, data, module.net)
    loaders.setup("fit")
    np.testing.assert_array_equal(sheet, draw_sheet(loaders.training_set(), range(6)))


def test_data_wait_is_the_share_of_time_without_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0, 3.0, 4.0, 4.0, 6.0])  # start, epoch; three seconds of waiting, one of work; none and two
    monkeypatch.setattr("training.watch.time.perf_counter", lambda: next(clock))
    logged: dict[str, float] = {}
    module: Any = SimpleNamespace(log=lambda name, value, prog_bar: logged.__setitem__(name, value))
    trainer: Any = SimpleNamespace(world_size=2)
    watched, batch = Throughput(), {"search": np.zeros(6)}
    watched.on_train_start(trainer, module)
    watched.on_train_epoch_start(trainer, module)
    for wanted in ({"train/samples_per_s": 3.0, "train/data_wait": 0.75}, {"train/samples_per_s": 4.0}):
        watched.on_train_batch_start(trainer, module, batch, 0)
        watched.on_train_batch_end(trainer, module, None, batch, 0)
        assert logged.items() >= wanted.items()
    assert logged["train/data_wait"] == 0.5


def test_git_commit_says_when_files_differ(tmp_path: Path) -> None:
    assert git_commit(tmp_path) == ""
    who = ["-c", "user.name=a", "-c", "user.email=a@b.invalid", "-c", "commit.gpgsign=false"]
    (tmp_path / "a").write_text("1")
    for command in (["init", "-q"], ["add", "a"], [*who, "commit", "-q", "-m", "a"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    assert re.fullmatch("[0-9a-f]{40}", git_commit(tmp_path))
    (tmp_path / "a").write_text("2")
    assert re.fullmatch(r"[0-9a-f]{40}\+changes", git_commit(tmp_path))


def test_loss_falls(data: Path, tmp_path: Path, watch: Callable[..., Seen]) -> None:
    seen = watch()
    recipe = tiny(
        epochs=1,
        pairs_per_epoch=96,
        batch_size=6,
        validation_pairs=0,
        data={
            "videos": ["videos"],
            "stills": ["stills"],
            "labels": {"nearest": True},
            "pairs": {"mix": {"video": 0.5, "still": 0.5}, "negative": 0.0, "distractor": 0.0, "occluder": 0.0},
            "cache_gb": 0.1,
        },
        optim={"optimiser": "adamw", "lr": 0.002, "warmup_epochs": 0.1, "warmup_start": 0.0002, "decay": "cosine"},
    )
    train(recipe, data, tmp_path)
    assert len(seen.losses) == 16
    assert np.mean(seen.losses[-4:]) < 0.75 * np.mean(seen.losses[:4])
    content = read(tmp_path / "last.ckpt")
    assert "current_model_state" not in content  # no averaging was asked for
    load_checkpoint(tmp_path / "last.ckpt")


def breaks_by_value(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**terms, "cls": terms["cls"] * float("nan")}


def breaks_by_size(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**terms, "cls": terms["cls"] + 1e5}


def breaks_by_gradient(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**terms, "cls": terms["cls"] + (terms["cls"] * 0).sqrt()}  # a finite loss, of infinite slope


@pytest.mark.parametrize("spoil", [breaks_by_value, breaks_by_size, breaks_by_gradient])
@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_a_broken_batch_moves_nothing(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    optimiser: str,
) -> None:
    """Weights, momentum and BatchNorm's statistics stay as they are, to the last bit; the next batch trains again."""
    states: list[dict[str, Any]] = []
    compute, begin = SiamCAN.__call__, SiameseModule.on_train_batch_start

    def on_train_batch_start(self: SiameseModule, batch: Any, batch_idx: int) -> None:
        begin(self, batch, batch_idx)
        states.append({"net": snapshot(self), "optimiser": copy.deepcopy(self.optimizers().state_dict())})

    def call(self: SiamCAN, raw: Any, batch: Any, decoder: Any) -> dict[str, Tensor]:
        terms = compute(self, raw, batch, decoder)
        return spoil(terms) if len(states) == 2 else terms

    monkeypatch.setattr(SiamCAN, "__call__", call)
    monkeypatch.setattr(SiameseModule, "on_train_batch_start", on_train_batch_start)
    optim = {"optimiser": optimiser, "lr": 0.01, "weight_decay": 0.1, "warmup_epochs": 0.0, "ema": 0.0}
    train(tiny(epochs=1, pairs_per_epoch=16, validation_pairs=0, optim=optim), data, tmp_path)
    first, second, third, fourth = states
    for state in second, fourth:  # the same learning rate in all: what the schedule set is not the step's doing
        state["optimiser"].pop("param_groups")
    third["optimiser"].pop("param_groups")
    assert_same(second["net"], third["net"])
    assert_same(second["optimiser"], third["optimiser"])
    assert second["optimiser"]["state"]  # there was momentum to act
    for before, after in (first, second), (third, fourth):
        for name in ("neck16.weight", "neck_norm.running_mean"):
            assert not torch.equal(before["net"][name], after["net"][name])
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["train/skipped"] == 1 and 0 < line["train/epoch_loss"] < 100  # the broken batch is no part of it


def test_validation_counts_every_pair_the_same(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five pairs in batches of four and one, boxes in full precision."""
    scores: list[Tensor] = []
    search = SiameseModule.validation_step

    def validation_step(self: SiameseModule, batch: Any, batch_idx: int) -> None:
        before = self._validated.clone()
        search(self, batch, batch_idx)
        scores.append(self._validated - before)

    monkeypatch.setattr(SiameseModule, "validation_step", validation_step)
    decode = AnchorFree.forward

    def forward(self: AnchorFree, raw: Any, *rest: Tensor) -> Any:
        choice = decode(self, raw, *rest)
        assert {choice.box.dtype, choice.score.dtype} == {torch.float32}
        return choice

    monkeypatch.setattr(AnchorFree, "forward", forward)
    train(tiny(epochs=1, pairs_per_epoch=4, validation_pairs=5, precision="bf16-mixed"), data, tmp_path)
    assert [part[:3, 1].tolist() for part in scores] == [[4] * 3, [1] * 3]
    totals, counts = sum(scores)[:3].T  # type: ignore[index]
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert [line[name] for name in VALIDATION[:3]] == pytest.approx((totals / counts).tolist())
    assert 0 <= line["val/hit"] <= 1
    assert "val/score_absent" not in line  # one held-out video: every pair shows its target


def test_siamfc_trains_from_nothing(data: Path, tmp_path: Path, watch: Callable[..., Seen]) -> None:
    """A network that is all backbone, no boxes to regress, and validated on three scales."""
    seen = watch()
    recipe = tiny(
        model="siamfc",
        epochs=1,
        pairs_per_epoch=4,
        batch_size=2,
        objective_config={},
        unfreeze_epoch=0,
        unfreeze_stages=5,
        validation_pairs=2,
        optim={"lr": 0.01, "backbone_lr": 1.0, "warmup_epochs": 0.0},
    )
    train(recipe, data, tmp_path)
    assert len(seen.losses) == 2
    end = read(tmp_path / "last.ckpt")["state_dict"]
    for stage in range(1, 6):
        name = f"backbone.conv{stage}.0.weight"
        assert not torch.equal(seen.before[0][name], end[f"net.{name}"]), name
    assert (tmp_path / "best.ckpt").is_file()


def test_a_checkpoint_of_another_version_is_refused(data: Path, tmp_path: Path) -> None:
    last = train(tiny(epochs=1, pairs_per_epoch=4, validation_pairs=0), data, tmp_path / "run")
    content = read(last)
    content["hyper_parameters"]["recipe"]["model_config"] = {"colour": 3}
    torch.save(content, tmp_path / "odd.ckpt")
    with pytest.raises(ValueError, match=r"odd\.ckpt is of another version of siamcan-mobilenetv2: .*field colour"):
        load_checkpoint(tmp_path / "odd.ckpt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone": "nowhere.safetensors"}, "no backbone weights at"),
        ({"data": {"videos": ["films"]}}, "no folder of videos at"),
        ({"data": {"videos": ["videos"], "validation_videos": ["clip9"]}}, "validation videos not found: clip9"),
        ({"data": {"videos": ["videos"], "stills": ["nothing"]}}, "nothing"),
        ({"colour": 3}, "unknown field colour"),
        ({"pairs_per_epoch": 10}, "pairs_per_epoch 10 is less than one batch of batch_size 28"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_command_says_what_is_wrong(
    data: Path, tmp_path: Path, change: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(json.dumps({"model": "siamcan-mobilenetv2", **change}))  # JSON is YAML
    # One device: with more, Lightning would start this very command, pytest, once more for each.
    arguments = [str(recipe), "--data", str(data), "--out", str(tmp_path / "run"), "--devices", "1"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("error: ")
    assert message in error


@pytest.mark.parametrize("unfreeze_epoch", [0, 1], ids=["thawed", "frozen"])
def test_frozen_stages_keep_their_statistics(unfreeze_epoch: int) -> None:
    """ResNet-50 has BatchNorm: in a frozen stage it must not follow the data either (the edge backbone has none)."""
    module = SiameseModule(to_plain(recipe_from_dict({"model": "siamcan-r50", "unfreeze_epoch": unfreeze_epoch})))
    module.train().on_train_epoch_start()  # without a trainer the epoch is 0
    net: Any = module.net
    for name in ("bn1", "layer1", "layer2", "layer3", "layer4"):
        trains = unfreeze_epoch == 0 and name in ("layer2", "layer3", "layer4")
        part = getattr(net.backbone, name)
        assert {m.training for m in part.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {trains}, name
        assert {p.requires_grad for p in part.parameters()} == {trains}, name
    assert all(m.training for m in (*net.necks.modules(), *net.cls.modules(), *net.loc.modules()))


def test_a_network_that_is_told_the_size_goes_on_from_one_that_is_not(data: Path, tmp_path: Path) -> None:
    start = train(tiny(epochs=1), data, tmp_path / "start")
    told = tiny(epochs=1, weights=str(start), model_config={"takes_size": True})
    net = load_checkpoint(train(told, data, tmp_path / "told")).net
    assert net.shape.weight.abs().max() > 0  # type: ignore[union-attr, operator]
    inside, outside = net.mix[0].weight.chunk(2, dim=1)  # type: ignore[index, union-attr]
    assert not torch.equal(inside, outside)  # type: ignore[arg-type]


def test_batch_must_split_evenly(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size 4 does not split evenly over 3 devices"):
        train(tiny(), data, tmp_path / "run", devices=3)
    assert not (tmp_path / "run").exists()


def test_command_without_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.yaml").write_text("model: [siamcan")
    assert main([str(tmp_path / "broken.yaml"), "--data", str(tmp_path), "--out", str(tmp_path / "run")]) == 2
    assert re.search(r"error: .*broken\.yaml: not YAML: ", capsys.readouterr().err)
    assert main([str(tmp_path / "none.yaml"), "--data", str(tmp_path), "--out", str(tmp_path / "run")]) == 2
    assert "none.yaml" in capsys.readouterr().err
