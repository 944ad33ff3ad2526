"""Averages of checkpoints: arithmetic by hand, export of the mean, refusals."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from siamtrack.bundle import sha256
from siamtrack.nets import MODELS
from siamtrack.nets.checkpoint import load_checkpoint
from siamtrack.plain import to_plain
from training.average import average, main
from training.recipe import Recipe


def checkpoint(path: Path, value: float, model: str = "siamcan-mobilenetv2", **config: Any) -> Path:
    """A run whose weights all are `value`, saved after epoch 10 * value."""
    net = MODELS[model]()
    state = {
        f"net.{name}": torch.full_like(tensor, value) if tensor.is_floating_point() else torch.full_like(tensor, 3)
        for name, tensor in net.state_dict().items()
    }
    content = {
        "state_dict": state,
        "hyper_parameters": {"recipe": to_plain(Recipe(model=model, model_config=config))},
        "epoch": int(10 * value),
        "global_step": int(100 * value),
        "pytorch-lightning_version": "2.6.0",
        "optimizer_states": [],
    }
    torch.save(content, path)
    return path


@pytest.mark.parametrize(("shares", "wanted"), [((), 2.5), ((1.0, 3.0), 3.25), ((0.5, 0.5), 2.5)])
def test_the_mean_is_exported(tmp_path: Path, shares: tuple[float, ...], wanted: float) -> None:
    paths = [checkpoint(tmp_path / "a.ckpt", 1.0), checkpoint(tmp_path / "b.ckpt", 4.0)]
    average(paths, tmp_path / "mean.ckpt", shares)
    found = load_checkpoint(tmp_path / "mean.ckpt")
    assert found.model == "siamcan-mobilenetv2"
    for name, tensor in found.net.state_dict().items():
        expected = torch.full_like(tensor, wanted if tensor.is_floating_point() else 3)
        torch.testing.assert_close(tensor, expected, msg=name)
    assert found.provenance["epoch"] == "40"
    hashes = [entry.split(":")[0] for entry in found.provenance["averaged"].split()]
    assert hashes == [sha256(path) for path in paths]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [checkpoint(tmp_path / f"{i}.ckpt", float(i)) for i in (1, 2, 3)]
    assert main([*map(str, paths), "--out", str(tmp_path / "mean.ckpt"), "--shares", "1", "1", "2"]) == 0
    state = torch.load(tmp_path / "mean.ckpt", weights_only=True)["state_dict"]
    torch.testing.assert_close(state["net.neck16.weight"], torch.full_like(state["net.neck16.weight"], 2.25))
    assert "mean of 3 checkpoints" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("names", "shares", "message"),
    [
        (["a"], [], "expected two or more checkpoints"),
        (["a", "b"], ["1"], "a share above 0 for each"),
        (["a", "b"], ["1", "0"], "a share above 0 for each"),
        (["a", "gone"], [], "gone.ckpt: no such file"),
        (["a", "garbage"], [], "garbage.ckpt: not a file of tensors and plain values"),
        (["a", "bare"], [], "bare.ckpt: not a checkpoint of training.train"),
        (["a", "other"], [], r"other.ckpt is a siamla-mobilenetv2, .*a.ckpt a siamcan-mobilenetv2: only one network"),
        (["a", "narrow"], [], r"narrow.ckpt is a siamcan-mobilenetv2 with {'blocks': 2}"),
    ],
)
def test_command_refuses(
    tmp_path: Path, names: list[str], shares: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "ab":
        checkpoint(tmp_path / f"{name}.ckpt", 1.0)
    checkpoint(tmp_path / "other.ckpt", 1.0, "siamla-mobilenetv2")
    checkpoint(tmp_path / "narrow.ckpt", 1.0, blocks=2)
    (tmp_path / "garbage.ckpt").write_bytes(b"no checkpoint")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "bare.ckpt")
    paths = [str(tmp_path / f"{name}.ckpt") for name in names]
    assert main([*paths, "--out", str(tmp_path / "mean.ckpt"), *(["--shares", *shares] if shares else [])]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "mean.ckpt").exists()
