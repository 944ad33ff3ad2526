"""Whole training runs, tiny: loss falls, resuming is exact, freezing freezes, and the checkpoint exports.

The data is made here: coloured shapes that move over noise. Nothing is downloaded and no ImageNet weights are used.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from model_export.checkpoint import load_checkpoint
from model_export.onnx_export import export_bundle
from model_export.verify import compare_with_onnxruntime, random_pairs
from siamtrack.plain import to_plain
from training.module import SiameseModule
from training.recipe import Recipe, load_recipe, recipe_from_dict
from training.train import main, train

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


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """`train` sets the process up for itself; what pytest runs next must not notice."""
    threads, cv2_threads = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)  # on shared cores, threads mostly wait for each other
    yield
    torch.set_num_threads(threads)
    cv2.setNumThreads(cv2_threads)


def tiny(**changes: Any) -> Recipe:
    content: dict[str, Any] = {
        "model": "siamcan-mobilenetv2",
        "epochs": 2,
        "pairs_per_epoch": 8,
        "batch_size": 4,
        "classification": "focal",
        "unfreeze_epoch": 1,
        "unfreeze_stages": 2,
        "validation_pairs": 4,
        "data": {
            "videos": ["videos"],
            "validation_videos": ["clip2"],
            "stills": ["stills"],
            "labels": {"nearest": True, "positives": 0, "negatives": 0},
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

    # What it wrote exports, with the averaged weights, and computes the same.
    checkpoint = load_checkpoint(last)
    assert checkpoint.model == recipe.model
    for name, value in checkpoint.net.state_dict().items():
        assert torch.equal(value, averaged[f"net.{name}"]), name
    bundle = export_bundle(checkpoint.model, checkpoint.net, tmp_path / "bundle", "none", checkpoint.provenance)
    assert bundle.manifest.provenance["seed"] == "1"
    difference = compare_with_onnxruntime(checkpoint.net, bundle, random_pairs(bundle, 2))
    assert difference.ok, difference


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
            "labels": {"nearest": True, "positives": 0, "negatives": 0},
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
    fresh = watch()
    train(recipe, data, tmp_path, resume=False)
    assert [len(seen.losses) for seen in (first, again, fresh)] == [1, 0, 1]
    assert fresh.losses == first.losses


def test_broken_batch_does_not_reach_the_weights(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.module.focal_loss", lambda logits, labels: logits.sum() * float("nan"))
    recipe = tiny(
        epochs=1, pairs_per_epoch=4, validation_pairs=0, optim={"optimiser": "sgd", "weight_decay": 0.0, "ema": 0.0}
    )
    train(recipe, data, tmp_path)
    state = read(tmp_path / "last.ckpt")["state_dict"]
    assert all(torch.isfinite(value).all() for value in state.values())
    assert float(state["net.cls.predict.bias"][0]) == pytest.approx(-np.log(99))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone": "nowhere.safetensors"}, "no backbone weights at"),
        ({"data": {"videos": ["films"]}}, "no folder of videos at"),
        ({"data": {"videos": ["videos"], "validation_videos": ["clip9"]}}, "validation videos not found: clip9"),
        ({"data": {"videos": ["videos"], "stills": ["nothing"]}}, "nothing"),
        ({"colour": 3}, "unknown field colour"),
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


def test_batch_must_split_evenly(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size 4 does not split evenly over 3 devices"):
        train(tiny(), data, tmp_path / "run", devices=3)
    assert not (tmp_path / "run").exists()


def test_command_without_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none.yaml"), "--data", str(tmp_path), "--out", str(tmp_path / "run")]) == 2
    assert "none.yaml" in capsys.readouterr().err
