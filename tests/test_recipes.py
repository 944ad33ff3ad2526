"""Recipes: the shipped ones, the papers', learning rates, weights to start from, and what is refused."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import yaml

from siamtrack.nets import MODELS
from siamtrack.nets.backbones import ResNet50Dilated
from siamtrack.nets.build import build_model
from siamtrack.plain import to_plain
from training.augment import Jitter, jittered_window
from training.module import SiameseModule, load_backbone, lr_factor
from training.recipe import OptimConfig, Recipe, load_recipe, recipe_from_dict

RECIPES = Path(__file__).parent.parent / "training" / "recipes"


def test_learning_rate_of_the_paper() -> None:
    """Section 4.1: 0.001 to 0.005 over 5 of 20 epochs, then exponentially to 0.00005."""
    optim = load_recipe(RECIPES / "siamcan-r50.yaml").optim
    rates = [optim.lr * lr_factor(step, 2000, 500, optim) for step in range(2001)]
    assert rates[0] == pytest.approx(0.001)
    assert rates[500] == pytest.approx(0.005)
    assert rates[2000] == pytest.approx(0.00005)
    assert all(a < b for a, b in itertools.pairwise(rates[:501]))
    assert all(a > b for a, b in itertools.pairwise(rates[500:]))
    assert rates[250] == pytest.approx(math.sqrt(0.001 * 0.005))  # geometric warm-up
    assert rates[1250] == pytest.approx(math.sqrt(0.005 * 0.00005))  # exponential decay


def test_learning_rate_cosine() -> None:
    optim = OptimConfig(lr=1e-3, warmup_start=1e-4, final_lr=1e-5, decay="cosine")
    rates = [optim.lr * lr_factor(step, 1000, 200, optim) for step in range(1201)]
    assert (rates[0], rates[200], rates[1000]) == pytest.approx((1e-4, 1e-3, 1e-5))
    assert rates[600] == pytest.approx((1e-3 + 1e-5) / 2)  # half way down
    assert all(a > b for a, b in itertools.pairwise(rates[200:1001]))
    assert rates[1200] == pytest.approx(1e-5)  # past the end it stays


def test_learning_rate_without_warm_up_starts_at_its_peak() -> None:
    assert lr_factor(0, 100, 0, OptimConfig()) == 1


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipes_load_and_come_back(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.model == re.sub("-(head|size|distil)$", "", path.stem)
    assert recipe_from_dict(to_plain(recipe)) == recipe  # as checkpoints store it
    assert recipe_from_dict(yaml.safe_load(yaml.safe_dump(to_plain(recipe)))) == recipe
    assert load_recipe(path, {"epochs": 3}).epochs == 3
    in_shards = load_recipe(path, shards="cut")
    assert in_shards.data.shards == "cut" and replace(in_shards.data, shards="") == recipe.data


def test_paper_recipe_is_the_paper() -> None:
    recipe = load_recipe(RECIPES / "siamcan-r50.yaml")
    assert (recipe.epochs, recipe.batch_size, recipe.unfreeze_epoch, recipe.unfreeze_stages) == (20, 28, 10, 3)
    assert (recipe.data.labels.positives, recipe.data.labels.negatives) == (16, 48)
    assert (recipe.optim.optimiser, recipe.optim.warmup_epochs, recipe.data.pairs.negative) == ("sgd", 5, 0.2)


@pytest.mark.parametrize(
    ("name", "wanted"),
    # Epochs, pairs, batch, frozen epochs, stages thawed; peak and last rate, warm-up; shares of negative pairs.
    [
        ("siamfc", (50, 9335, 8, 0, 5, 0.01, 1e-5, 0, 0.0)),
        ("siamrpnpp-r50", (20, 600_000, 224, 10, 3, 0.005, 5e-4, 5, 0.2)),
        ("siamban-r50", (20, 1_000_000, 84, 10, 3, 0.005, 5e-5, 5, 0.2)),
        ("siamcar-r50", (20, 600_000, 80, 10, 3, 0.005, 5e-4, 5, 0.0)),
        ("siamla-r50", (50, 600_000, 128, 5, 3, 0.005, 1e-5, 5, 0.0)),
        ("dastsiam-r50", (50, 60_000, 12, 10, 2, 0.005, 5e-4, 10, 0.0)),  # see the next test
    ],
)
def test_paper_recipes_are_the_papers(name: str, wanted: tuple[float, ...]) -> None:
    r = load_recipe(RECIPES / f"{name}.yaml")
    assert wanted == (
        *(r.epochs, r.pairs_per_epoch, r.batch_size, r.unfreeze_epoch, r.unfreeze_stages),
        *(r.optim.lr, r.optim.final_lr, r.optim.warmup_epochs, r.data.pairs.negative),
    )
    assert (r.optim.optimiser, r.optim.decay, r.optim.clip) == ("sgd", "exponential", 10)
    assert r.optim.weight_decay == (5e-4 if name == "siamfc" else 1e-4)


def test_dastsiam_rate_falls_when_the_backbone_thaws() -> None:
    """Section 3.1: "fixed for the first 10 epochs", then from 0.005 to 0.0005 "for the remainder"."""
    optim = load_recipe(RECIPES / "dastsiam-r50.yaml").optim
    rates = [optim.lr * lr_factor(epoch, 50, 10, optim) for epoch in (0, 5, 10, 30, 50)]
    assert rates == pytest.approx([0.005, 0.005, 0.005, math.sqrt(0.005 * 0.0005), 0.0005])


@pytest.mark.parametrize("name", ["siamrpnpp", "siamban", "siamcar", "siamcan", "siamla", "dastsiam"])
def test_paper_jitter_is_that_of_independent_sides(name: str) -> None:
    """Width and height of pysot's crops vary each on its own, by 5 % and 18 %: as much, and uncorrelated."""
    pairs = load_recipe(RECIPES / f"{name}-r50.yaml").data.pairs
    rng = np.random.default_rng(0)
    for jitter, share in ((pairs.template, 0.05), (pairs.search, 0.18)):
        windows = [jittered_window((0, 0, 2e4, 1e4), 127, 255, jitter, rng) for _ in range(3000)]
        logs = np.log([(window.width, window.height) for window in windows])
        assert logs.std(axis=0) == pytest.approx([share / math.sqrt(3)] * 2, rel=0.05)
        assert abs(np.corrcoef(logs.T)[0, 1]) < 0.08


def test_siamfc_jitter_is_one_scale_for_both_sides() -> None:
    pairs = load_recipe(RECIPES / "siamfc.yaml").data.pairs
    assert pairs.template == pairs.search == Jitter(shift_px=4, scale=0.05, stretch=0)


def test_siamban_takes_three_tenths_stills() -> None:
    assert load_recipe(RECIPES / "siamban-r50.yaml").data.pairs.mix == {"video": 0.7, "still": 0.3}


def test_training_starts_from_a_checkpoint(tmp_path: Path) -> None:
    def module(weights: Path | None, root: str | None = "") -> Any:
        return SiameseModule({"model": "siamcan-mobilenetv2", "weights": str(weights or "")}, root)

    net = MODELS["siamcan-mobilenetv2"]()
    for name, prefix in (("bare", ""), ("run", "net.")):
        state = {prefix + key: value for key, value in net.state_dict().items()}
        extra = {"search_graph.net.mix.0.weight": torch.zeros(1)} if prefix else {}
        torch.save({"state_dict": state | extra, "epoch": 3}, tmp_path / f"{name}.pth")
        for key, value in module(tmp_path / f"{name}.pth").net.state_dict().items():
            torch.testing.assert_close(value, net.state_dict()[key])
    # A run that is resumed or exported has its own weights, wherever it once started.
    assert module(tmp_path / "gone.pth", root=None).recipe.weights
    with pytest.raises(ValueError, match=r"gone.pth: no such file"):
        module(tmp_path / "gone.pth")
    torch.save(MODELS["siamla-mobilenetv2"]().state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other.pth does not fit SiamCANEdge: attention.conv.weight"):
        module(tmp_path / "other.pth")


def test_backbone_of_another_model_s_run(tmp_path: Path) -> None:
    run = SiameseModule(to_plain(Recipe(model="siamcan-mobilenetv2")))
    path = tmp_path / "run.ckpt"
    torch.save({"state_dict": run.state_dict(), "epoch": 3}, path)
    recipe = Recipe(model="siamla-mobilenetv2", backbone=str(path))
    module = SiameseModule(to_plain(recipe), data_root="elsewhere")  # runs are not where the data is
    ours, theirs = module.net.backbone.state_dict(), run.net.backbone.state_dict()
    assert len(ours) > 50
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value)
    with pytest.raises(ValueError, match=r"run.ckpt does not fit ResNet50Dilated: "):
        load_backbone(ResNet50Dilated(), path)


def test_torchvision_backbone_is_fitted_to_raw_pixels(tmp_path: Path) -> None:
    """Weights for normalised RGB, in a network that takes BGR in 0..255: frozen, it could not make up for that."""
    torch.manual_seed(0)
    theirs, ours = ResNet50Dilated().eval(), ResNet50Dilated()
    state = {
        name: value[:, :, 1:2, 1:2] if "downsample.0" in name and value.shape[2] == 3 else value
        for name, value in theirs.state_dict().items()
    }
    path = tmp_path / "resnet50.safetensors"
    path.touch()
    with patch("training.module.read_tensors", return_value=state):
        load_backbone(ours, path)
    rgb = torch.rand(2, 3, 63, 63)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        wanted = theirs.bn1(theirs.conv1((rgb - mean[:, None, None]) / deviation[:, None, None]))
        found = ours.eval().bn1(ours.conv1(255 * rgb.flip(1)))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_paper_weights_of_the_terms() -> None:
    def weights(name: str) -> dict[str, float]:
        objective = load_recipe(RECIPES / f"{name}.yaml").build_objective()
        return {k: v for k, v in to_plain(objective).items() if type(v) is float and k != "boundary"}

    assert weights("siamrpnpp-r50") == {"cls": 1, "loc": 1.2}
    assert weights("siamcar-r50") == {"cls": 1, "loc": 3, "quality": 1}
    assert weights("siamla-r50") == {"cls": 1, "loc": 1, "quality": 1}
    assert weights("dastsiam-r50") == {"cls": 1, "loc": 1, "second": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, "unknown field colour"),
        ({"data": {"vidoes": ["x"]}}, "recipe.data: unknown field vidoes"),
        ({"data": {"pairs": {"mix": {"film": 1.0}}}}, "mix must give"),
        ({"data": {"pairs": {"search": {"shift_px": 1}}}}, r"recipe.data.pairs.search: missing field scale, stretch"),
        ({"data": []}, "recipe.data: expected a mapping, got list"),
        ({"epochs": "ten"}, "recipe.epochs: expected a whole number, got 'ten'"),
        ({"epochs": 2.5}, "recipe.epochs: expected a whole number"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"optim": {"lr": "fast"}}, "recipe.optim.lr: expected a number, got 'fast'"),
        ({"optim": {"lr": 0}}, "lr must be above 0"),
        ({"optim": {"optimiser": "lion"}}, "optimiser must be one of sgd, adamw, got 'lion'"),
        ({"optim": {"decay": "linear"}}, "decay must be one of"),
        ({"model": "siamnet"}, "model must be one of siamfc, .*, got 'siamnet'"),
        ({"model_config": {"chanels": 3}}, "model_config of siamcan-mobilenetv2: unknown field chanels; known: blocks"),
        ({"model_config": {"blocks": "two"}}, "model_config of siamcan-mobilenetv2.blocks: expected a whole number"),
        ({"model_config": ["blocks"]}, "recipe.model_config: expected a mapping"),
        ({"model": "siamban-r50", "model_config": {"correlation": "x"}}, "correlation must be one of"),
        ({"objective": "siamese"}, "objective must be one of siamfc, "),
        ({"objective_config": {"cls_weight": 1}}, "objective_config of siamcan: unknown field cls_weight; known: cent"),
        ({"objective_config": {"loc": "much"}}, "objective_config of siamcan.loc: expected a number, got 'much'"),
        ({"objective_config": {"loc": -1}}, "loc must be at least 0, got -1.0"),
        ({"objective_config": {"regression": "l1"}}, "regression must be one of iou, log_iou, giou, diou, got 'l1'"),
        ({"data": {"labels": {"rule": "circle"}}}, "recipe.data.labels: rule must be one of"),
        ({"data": {"labels": {"rule": "siamrpn"}}}, "anchors' labels; objective siamcan has no anchors"),
        ({"data": {"pairs": {"triplet_frames": 3}}}, "triplet_frames must be at least 4, got 3"),
        ({"model": None}, "recipe.model: expected text, got None"),
        ({"objective_config": {"classification": "hinge"}}, "classification must be one of balanced_ce, focal"),
        ({"data": {"labels": {"nearest": "yes"}}}, "recipe.data.labels.nearest: expected true or false"),
    ],
)
def test_recipe_errors_name_the_field(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe_from_dict({"model": "siamcan-mobilenetv2", **change})


def test_model_config_builds_the_model() -> None:
    recipe = recipe_from_dict({"model": "siamla-mobilenetv2", "model_config": {"channels": 32, "non_local": False}})
    net: Any = build_model(recipe.model, recipe.model_config)
    assert (net.config.channels, net.config.non_local, net.config.aggregation) == (32, False, True)
    assert net.neck16.weight.shape[0] == 32
    with pytest.raises(ValueError, match="unknown model 'siamnet'; known: siamfc"):
        build_model("siamnet")


def test_recipe_without_a_model() -> None:
    with pytest.raises(ValueError, match="recipe: missing field model"):
        recipe_from_dict({})


def test_recipe_file_errors(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("- a\n- b\n")
    with pytest.raises(ValueError, match=r"r\.yaml: expected a mapping of fields, got list"):
        load_recipe(file)
    file.write_text("model: siamcan-r50\nlr: 1\n")
    with pytest.raises(ValueError, match=r"r\.yaml: unknown field lr"):
        load_recipe(file)


def test_a_recipe_starts_from_another(tmp_path: Path) -> None:
    for name, text in {
        "a": "model: siamcan-r50\nseed: 7\nepochs: 3\noptim: {lr: 0.1, clip: 5}\ndata: {videos: [v], coco: {j: i}}",
        "b": "base: a.yaml\nepochs: 4\noptim: {lr: 0.2}\ndata: {videos: [w]}",
        "c": "base: b.yaml\noptim: {ema: 0.5}",
    }.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "c.yaml", {"seed": 9})
    assert (recipe.model, recipe.seed, recipe.epochs) == ("siamcan-r50", 9, 4)
    assert (recipe.optim.lr, recipe.optim.clip, recipe.optim.ema) == (0.2, 5, 0.5)
    assert (recipe.data.videos, recipe.data.coco) == (("w",), {"j": "i"})  # lists are not put together
    (tmp_path / "a.yaml").write_text("base: c.yaml\nmodel: siamcan-r50")
    with pytest.raises(ValueError, match=r"recipes that start from each other: c\.yaml, b\.yaml, a\.yaml"):
        load_recipe(tmp_path / "c.yaml")
    (tmp_path / "d.yaml").write_text("base: e.yaml")
    with pytest.raises(ValueError, match=r"d\.yaml: there is no recipe e\.yaml to start from"):
        load_recipe(tmp_path / "d.yaml")


def test_exponents_without_a_point_are_numbers(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("model: siamcan-r50\noptim: {lr: 1e-3}\n")  # YAML 1.1 reads 1e-3 as text
    assert load_recipe(file).optim.lr == 0.001


def ablation_rows() -> list[tuple[str, str]]:
    """Name of the recipe and the fields that each row of a table in ``docs/papers.md`` changes."""
    rows, table = [], ""
    for line in (RECIPES.parent.parent / "docs" / "papers.md").read_text().splitlines():
        named = re.search(r"[Rr]ecipe `([\w-]+)`", line)
        if line.startswith("#"):
            table = ""
        elif named and not re.search(r"`model: ", line):
            table = named[1]
        fields = re.findall(r"`((?:model|model_config|objective|objective_config|labels): [^`]+)`", line)
        fields += [f"model_config: {switches}" for switches in re.findall(r"\| `(\{[^`]+\})`", line)]
        if table and fields and line.startswith("| "):
            rows.append((named[1] if named else table, "\n".join(fields)))
    return rows


@pytest.mark.parametrize(("name", "fields"), ablation_rows())
def test_documented_ablations_are_recipes(name: str, fields: str) -> None:
    changes = yaml.safe_load(fields)
    content = to_plain(load_recipe(RECIPES / f"{name}.yaml"))
    content["data"]["labels"] |= changes.pop("labels", {})
    recipe = recipe_from_dict({**content, **changes})
    assert changes == {key: to_plain(recipe)[key] for key in changes}
    assert recipe.labels.rule


def test_every_table_of_ablations_is_found() -> None:
    assert {"siamcan-r50", "siamla-r50", "dastsiam-r50", "siamfc"} <= {name for name, _ in ablation_rows()}
