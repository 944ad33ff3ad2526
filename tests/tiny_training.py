"""Tiny training runs: coloured shapes that move over noise, a few pairs, and what is seen of it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from training.module import SiameseModule
from training.recipe import Recipe, recipe_from_dict

COLOURS = [(30, 40, 230), (40, 220, 40), (230, 60, 30), (40, 220, 230)]


def picture(rng: np.random.Generator, box: tuple[int, int, int, int], colour: tuple[int, int, int]) -> np.ndarray:
    image = rng.integers(60, 140, (120, 160, 3)).astype(np.uint8)
    x, y, w, h = box
    cv2.ellipse(image, (x + w // 2, y + h // 2), (w // 2, h // 2), 0, 0, 360, colour, -1)
    return image


def moving_shapes(root: Path) -> Path:
    """Two videos to train on, one to validate on, four outlined stills."""
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


def watching(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Seen]:
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
