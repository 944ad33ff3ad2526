"""Whole training runs, tiny: loss falls, resuming is exact, freezing freezes, and the checkpoint exports.

The data is made here: coloured shapes that move over noise. Nothing is downloaded and no ImageNet weights are used.
"""

from __future__ import annotations

import copy
import csv
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from model_export.onnx_export import export_bundle
from model_export.verify import compare_with_onnxruntime, random_pairs
from siamtrack.nets.checkpoint import load_checkpoint
from siamtrack.plain import to_plain
from training.loading import PairDataModule
from training.module import SiameseModule
from training.objectives import SiamCAN
from training.prepare import prepare
from training.recipe import Recipe, load_recipe, recipe_from_dict
from training.show import draw_sheet
from training.train import check_same_recipe, main, train
from training.watch import CHECKOUT, Throughput, git_commit

pytestmark = pytest.mark.usefixtures("threads_as_before")

COLOURS = [(30, 40, 230), (40, 220, 40), (230, 60, 30), (40, 220, 230)]


def picture(rng: np.random.Generator, box: tuple[int, int, int, int], colour: tuple[int, int, int]) -> np.ndarray:
    image = rng.integers(60, 140, (120, 160, 3)).astype(np.uint8)
    x, y, w, h = box
    cv2.ellipse(image, (x + w // 2, y + h // 2), (w // 2, h // 2), 0, 0, 360, colour, -1)
    return image


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos to train on, one to validate on, four outlined stills."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for v in range(3):
        folder = root / "videos" / f"clip{v}"
        (folder / "img").mkdir(parents=True)
        rows = []
        for i in range(5):
            box = (20 + 12 * i, 30 + 6 * v + 3 * i, 36 + 2 * i, 30)
            assert cv2.imwrite(str(folder / "img" / f"{i:04d}.png"), picture(rng, box, COLOURS[v]))
            rows.append(",".join(map(str, box)))
        (folder / "groundtruth.txt").write_text("\n".join(rows))
    stills = root / "stills"
    (stills / "img").mkdir(parents=True)
    with (stills / "boxes.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "x", "y", "w", "h", "label", "mask"])
        for i in range(4):
            x, y, w, h = box = (30 + 10 * i, 25 + 8 * i, 44, 40)
            assert cv2.imwrite(str(stills / "img" / f"{i}.png"), picture(rng, box, COLOURS[i]))
            outline = [x, y + h / 2, x + w / 2, y, x + w, y + h / 2, x + w / 2, y + h]
            table.writerow([f"{i}.png", x, y, w, h, "ellipse", json.dumps([outline])])
    return root


def tiny(augment: str = "cpu", **changes: Any) -> Recipe:
    content: dict[str, Any] = {
        "model": "siamcan-mobilenetv2",
        "epochs": 2,
        "pairs_per_epoch": 8,
        "batch_size": 4,
        "objective_config": {"classification": "focal"},
        "unfreeze_epoch": 1,
        "unfreeze_stages": 2,
        "validation_pairs": 4,
        "data": {
            "videos": ["videos"],
            "validation_videos": ["clip2"],
            "stills": ["stills"],
            "labels": {"nearest": True},
            "augment": augment,
            "cache_gb": 0.1,
        },
        "optim": {"optimiser": "adamw", "lr": 0.002, "backbone_lr": 0.1, "warmup_epochs": 0.5, "ema": 0.7},
    }
    return recipe_from_dict({**content, **changes})


def snapshot(module: SiameseModule) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.net.state_dict().items()}  # type: ignore[union-attr]


@dataclass
class Seen:
    """What happened in a run, epoch by epoch."""

    before: list[dict[str, Tensor]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    validation: list[bytes] = field(default_factory=list)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Seen]:
    """Notes what the modules of later runs see; stops a run before epoch `crash_at`, as a power cut would."""

    def start(crash_at: int | None = None) -> Seen:
        seen = Seen()
        monkeypatch.undo()
        begin, step, check = (
            getattr(SiameseModule, n) for n in ("on_train_epoch_start", "training_step", "validation_step")
        )

        def on_train_epoch_start(self: SiameseModule) -> None:
            if self.current_epoch == crash_at:
                raise ConnectionAbortedError("power cut")
            seen.before.append(snapshot(self))
            begin(self)

        def training_step(self: SiameseModule, batch: Any, batch_idx: int) -> Any:
            loss = step(self, batch, batch_idx)
            seen.losses.append(float(loss.detach()))
            return loss

        def validation_step(self: SiameseModule, batch: Any, batch_idx: int) -> None:
            seen.validation.append(batch["search"].numpy().tobytes())
            check(self, batch, batch_idx)

        for hook in (on_train_epoch_start, training_step, validation_step):
            monkeypatch.setattr(SiameseModule, hook.__name__, hook)
        return seen

    return start


def read(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def assert_same(ours: Any, theirs: Any, where: str = "") -> None:
    """Equal to the last bit, in nested containers too."""
    if isinstance(ours, Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_same(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs), where
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(a, b, f"{where}/{i}")
    else:
        assert ours == theirs, where


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


# Started by the next test, and once more by Lightning for the second process.
TWO_PROCESSES = """
import sys
from pathlib import Path
import torch
from training.module import SiameseModule
from training.objectives import SiamCAN
from training.recipe import load_recipe
from training.train import train
from training.objectives import SiamCAN

compute, begin, states = SiamCAN.__call__, SiameseModule.on_train_batch_start, []

def note(self, batch, batch_idx):
    begin(self, batch, batch_idx)
    self.noted = states
    states.append((self.global_rank, {n: v.clone() for n, v in self.net.state_dict().items()}))

def call(self, raw, batch, decoder):
    terms = compute(self, raw, batch, decoder)
    rank, _ = states[-1]
    return {**terms, "cls": terms["cls"] * float("nan")} if (rank, len(states)) == (1, 2) else terms

SiamCAN.__call__, SiameseModule.on_train_batch_start = call, note
recipe, data, out = (Path(v) for v in sys.argv[1:])
train(load_recipe(recipe), data, out, devices=2)
torch.save([state for _, state in states], out / f"rank{states[0][0]}.pt")
"""


@pytest.mark.parametrize("augment", ["cpu", "device"])
def test_a_batch_broken_in_one_process_stops_the_step_in_both(data: Path, tmp_path: Path, augment: str) -> None:
    recipe = tmp_path / "r.yaml"
    content = to_plain(tiny(augment, epochs=1, pairs_per_epoch=12, validation_pairs=0))
    content["optim"] |= {"optimiser": "sgd", "lr": 0.01, "ema": 0.0}
    recipe.write_text(json.dumps(content))
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    (tmp_path / "run").mkdir()
    subprocess.run(
        [sys.executable, str(script), str(recipe), str(data), str(tmp_path / "run")],
        check=True,
        timeout=300,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    ranks = [read(tmp_path / "run" / f"rank{rank}.pt") for rank in (0, 1)]
    weights = [
        [{n: v for n, v in state.items() if "running" not in n and "num_" not in n} for state in r] for r in ranks
    ]
    assert [len(r) for r in ranks] == [3, 3]
    for ours, theirs in zip(*weights, strict=True):
        assert_same(ours, theirs)  # the processes hold the same weights at every step
    first, second, third = ranks[0]
    assert not torch.equal(first["neck16.weight"], second["neck16.weight"])
    assert_same(second, third)  # the second step, broken in the other process, moved nothing
    assert_same(second, ranks[1][2])  # nor there; before each step statistics are those of process 0


def test_validation_counts_every_pair_the_same(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five pairs in batches of four and one."""
    scores: list[Tensor] = []
    search = SiameseModule.validation_step

    def validation_step(self: SiameseModule, batch: Any, batch_idx: int) -> None:
        before = self._validated.clone()
        search(self, batch, batch_idx)
        scores.append(self._validated - before)

    monkeypatch.setattr(SiameseModule, "validation_step", validation_step)
    train(tiny(epochs=1, pairs_per_epoch=4, validation_pairs=5), data, tmp_path)
    assert [part[0, 1].item() for part in scores] == [4, 1]
    total, count = sum(part[0] for part in scores)  # type: ignore[misc]
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["val/iou"] == pytest.approx((total / count).item())
    assert "val/score_absent" not in line  # one held-out video: every pair shows its target


def test_two_machines_train_as_one(data: Path, tmp_path: Path) -> None:
    """As torchrun starts it, a process on each. One has the validation pair with its target, one that without."""
    recipe, run = tmp_path / "r.yaml", tmp_path / "run"
    changes = {"epochs": 1, "pairs_per_epoch": 8, "validation_pairs": 2, "unfreeze_epoch": 0}
    content = to_plain(tiny(**changes))
    content["data"]["validation_videos"] = ["clip1", "clip2"]  # with two, a share of pairs is negative
    recipe.write_text(json.dumps(content))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    command += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
    script = ["-m", "training.train", str(recipe), "--data", str(data), "--out", str(run)]
    machines = [
        subprocess.Popen(
            [*command, "--node_rank", rank, *script],
            cwd=CHECKOUT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for rank in "01"
    ]
    try:
        said = [machine.communicate(timeout=240)[0] for machine in machines]
    except BaseException:
        for machine in machines:
            machine.terminate()  # torchrun ends its workers, which are in sessions of their own
        for machine in machines:
            print(machine.communicate(timeout=60)[0])
        raise
    assert [machine.returncode for machine in machines] == [0, 0], said
    (start,) = json.loads((run / "run.json").read_text())
    assert start["processes"] == 2
    (line,) = (json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines())
    assert line["step"] == 2 and {"val/iou", "val/score_seen", "val/score_absent"} <= line.keys()


def test_sigterm_ends_both_processes(data: Path, tmp_path: Path) -> None:
    """A scheduler asks the first one alone; none may be left waiting for the other."""
    recipe, run = tmp_path / "r.yaml", tmp_path / "run"
    recipe.write_text(json.dumps(to_plain(tiny(epochs=1000, validation_pairs=0))))
    command = [sys.executable, "-m", "training.train", str(recipe), "--data", str(data), "--out", str(run)]
    process = subprocess.Popen(
        [*command, "--devices", "2"],
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    ends = time.monotonic() + 120
    try:
        while not (run / "last.ckpt").exists():
            assert process.poll() is None and time.monotonic() < ends
            time.sleep(0.1)
        process.terminate()
        said, _ = process.communicate(timeout=60)  # all that was written, by both, until both have ended
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        print(process.communicate()[0])
        raise
    assert process.returncode == 1, said
    assert read(run / "last.ckpt")["global_step"] >= 2


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
