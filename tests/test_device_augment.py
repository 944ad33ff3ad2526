"""Light and noise on whole batches: each effect by hand, and all of them against the same on single crops."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from siamtrack.nets.build import build_model
from training.augment import (
    KERNEL_PX,
    Corruption,
    Effects,
    Light,
    LightConfig,
    draw_effects,
    motion_kernel,
    photometric,
)
from training.collect import collect
from training.dataset import PairDataset, Sample, collate
from training.device_augment import as_arrays, augmented
from training.loading import crop_shape, make_samplers
from training.module import cells_of
from training.recipe import Recipe, recipe_from_dict
from training.show import GAP_PX, draw_sheet

PLAIN = Light(1.0, 1.0, (0.0, 0.0, 0.0), grey=False)
SIDE = 41
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.fixture(params=DEVICES)
def put_on(request: pytest.FixtureRequest) -> Callable[..., np.ndarray]:
    """Puts effects on crops ``[N, S, S, 3]``, by way of samples and a batch on the device."""

    def run(crops: np.ndarray, *effects: Effects) -> np.ndarray:
        samples: list[Sample] = [
            {"search": crop, **as_arrays({"search": effect})} for crop, effect in zip(crops, effects, strict=True)
        ]
        batch = {name: value.to(request.param) for name, value in collate(samples).items()}
        before = batch["search"].clone()
        out = augmented(batch)
        assert out.keys() == {"search"}
        assert torch.equal(batch["search"], before)  # what a loader holds is not written into
        assert out["search"].dtype == torch.uint8
        return out["search"].cpu().numpy()

    return run


def light(**changes: Any) -> Effects:
    return Effects(dataclasses.replace(PLAIN, **changes))


def photo(seed: int = 0, side: int = 127) -> np.ndarray:
    """Soft blobs of colour under fine grain: edges to blur, and values from dark to bright."""
    rng = np.random.default_rng(seed)
    blobs = cv2.resize(rng.integers(0, 256, (9, 9, 3)).astype(np.uint8), (side, side), interpolation=cv2.INTER_CUBIC)
    return np.clip(blobs + rng.normal(0, 12, blobs.shape), 0, 255).astype(np.uint8)


def test_gain_gamma_and_tint(put_on: Callable[..., np.ndarray]) -> None:
    crops = np.full((4, SIDE, SIDE, 3), 64, np.uint8)
    tint = light(tint_bgr=(0.0, 20 / 255, -70 / 255))
    out = put_on(crops, light(), light(gain=1.5), light(gamma=2.0), tint)
    for crop, wanted in zip(out, ((64, 64, 64), (96, 96, 96), (16, 16, 16), (64, 84, 0)), strict=True):
        np.testing.assert_allclose(crop.reshape(-1, 3), np.tile(wanted, (SIDE**2, 1)), atol=1)


def test_grey(put_on: Callable[..., np.ndarray]) -> None:
    crops = np.tile(np.array([[200, 100, 50]], np.uint8), (2, SIDE, SIDE, 1))
    coloured, grey = put_on(crops, light(), light(grey=True))
    assert (coloured == (200, 100, 50)).all()
    assert (grey == round(0.114 * 200 + 0.587 * 100 + 0.299 * 50)).all()


def point() -> np.ndarray:
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    image[20, 20] = 255
    return image


def test_motion_blur(put_on: Callable[..., np.ndarray]) -> None:
    """Along its line, each crop its own; even lengths as OpenCV has their middle."""
    lines = [(9, 0.0), (9, np.pi / 2), (4, 0.0), (KERNEL_PX, 0.7)]
    drawn = [light(motion_px=length, motion_rad=angle) for length, angle in lines]
    out = put_on(np.stack([point()] * 4), *drawn)
    row = out[0][20, :, 0]
    assert np.flatnonzero(row).tolist() == list(range(16, 25))
    assert set(row[16:25].tolist()) == {round(255 / 9)}
    np.testing.assert_array_equal(out[1], out[0].transpose(1, 0, 2))
    for (length, angle), blurred in zip(lines, out, strict=True):
        np.testing.assert_allclose(blurred, cv2.filter2D(point(), -1, motion_kernel(length, angle)), atol=1)


def test_gaussian_blur(put_on: Callable[..., np.ndarray]) -> None:
    out = put_on(np.stack([point()] * 2), light(sigma_px=0.6), light(sigma_px=2.0))
    for sigma, blurred in zip((0.6, 2.0), out, strict=True):
        distance = np.hypot(*(np.mgrid[:SIDE, :SIDE] - 20))
        wanted = np.exp(-(distance**2) / (2 * sigma**2))
        np.testing.assert_allclose(blurred[:, :, 1], 255 * wanted / wanted.sum(), atol=1)


def test_loss_of_resolution(put_on: Callable[..., np.ndarray]) -> None:
    """Stripes of a pixel are gone at half the resolution, a slope stays; each crop has its own side."""
    side = 64
    stripes = np.tile(np.array([0, 200] * 32, np.uint8)[None, :, None], (side, 1, 3))
    slope = np.tile((3 * np.arange(side, dtype=np.uint8))[:, None, None], (1, side, 3))
    flat, even, kept = put_on(np.stack([stripes, slope, stripes]), light(coarse_px=32), light(coarse_px=17), light())
    assert (flat == 100).all()
    np.testing.assert_allclose(even[4:-4].astype(int), slope[4:-4], atol=1)
    np.testing.assert_array_equal(kept, stripes)


def test_noise_is_of_its_deviation_and_its_seed(put_on: Callable[..., np.ndarray]) -> None:
    crops = np.full((4, 127, 127, 3), 128, np.uint8)
    kinds = [(10.0, 1), (10.0, 2), (10.0, 1), (3.0, 1)]
    drawn = [Effects(PLAIN, Corruption(deviation), seed) for deviation, seed in kinds]
    out = put_on(crops, *drawn).astype(float) - 128
    for (deviation, _), noise in zip(kinds, out, strict=True):
        assert noise.std() == pytest.approx(deviation, rel=0.03)
        assert abs(noise.mean()) < 0.2
        assert abs(np.corrcoef(noise[:, :, 0].ravel(), noise[:, :, 1].ravel())[0, 1]) < 0.05  # of each channel
    np.testing.assert_array_equal(out[0], out[2])
    assert (out[0] != out[1]).mean() > 0.9
    alone = put_on(crops[:1], drawn[1]).astype(float) - 128
    np.testing.assert_array_equal(alone[0], out[1])  # whatever else is in the batch


def test_rectangle(put_on: Callable[..., np.ndarray]) -> None:
    crops = np.full((2, SIDE, SIDE, 3), 7, np.uint8)
    painted, plain = put_on(crops, Effects(PLAIN, Corruption(0.0, (5, 10, 25, 14), (1, 2, 250))), Effects(PLAIN))
    wanted = np.full((SIDE, SIDE, 3), 7, np.uint8)
    wanted[10:14, 5:25] = (1, 2, 250)
    np.testing.assert_array_equal(painted, wanted)
    assert (plain == 7).all()


def test_half_precision_around_it_changes_nothing(put_on: Callable[..., np.ndarray]) -> None:
    crops, drawn = np.stack([photo()] * 3), (light(sigma_px=1.5), light(coarse_px=50), light(grey=True))
    wanted = put_on(crops, *drawn)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cuda", torch.bfloat16, torch.cuda.is_available()):
        np.testing.assert_array_equal(put_on(crops, *drawn), wanted)


@pytest.mark.parametrize(
    "config",
    [LightConfig(), LightConfig(colour=1, motion=0.5, motion_shape="cross", motion_px=45)],
    ids=["ours", "pysot"],
)
def test_the_same_draw_gives_the_same_crop_as_in_the_loader(
    put_on: Callable[..., np.ndarray], config: LightConfig
) -> None:
    """Light, blur and resolution of 300 draws, but for rounding: OpenCV's arithmetic is of whole numbers."""
    crops = np.stack([photo(seed % 5) for seed in range(300)])
    ours = put_on(crops, *(draw_effects(127, False, np.random.default_rng([3, seed]), config) for seed in range(300)))
    wanted = np.stack([photometric(crop, np.random.default_rng([3, seed]), config) for seed, crop in enumerate(crops)])
    difference = np.abs(ours.astype(int) - wanted)
    assert difference.max() <= 2
    assert difference.mean() < 0.1
    changed = np.abs(wanted.astype(int) - crops)
    assert changed.mean() > 50 * difference.mean()


def brightness(crop: np.ndarray) -> float:
    return float(crop.mean())


def sharpness(crop: np.ndarray) -> float:
    return float(np.log(cv2.Laplacian(crop.astype(np.float32), cv2.CV_32F).var()))


@pytest.mark.parametrize("of", [brightness, sharpness])
def test_both_ways_are_distributed_alike(put_on: Callable[..., np.ndarray], of: Callable[..., float]) -> None:
    """Of draws that have nothing to do with each other: Kolmogorov and Smirnov's distance of two samples of 400."""
    count = 400
    crops = np.stack([photo()] * count)
    ours = put_on(crops, *(draw_effects(127, False, np.random.default_rng([1, seed])) for seed in range(count)))
    theirs = [photometric(photo(), np.random.default_rng([2, seed])) for seed in range(count)]

    def distance(a: list[float], b: list[float]) -> float:
        values = np.sort(a + b)
        below = [np.searchsorted(np.sort(x), values, "right") / len(x) for x in (a, b)]
        return float(np.abs(below[0] - below[1]).max())

    limit = 1.63 * np.sqrt(2 / count)  # one in a hundred pairs of samples of one distribution is further apart
    assert distance([of(crop) for crop in ours], [of(crop) for crop in theirs]) < limit
    # The same test tells light that is a tenth brighter.
    stronger = [of(photometric(photo(), np.random.default_rng([2, s])) * 1.1) for s in range(count)]
    assert distance([of(crop) for crop in ours], stronger) > limit


def test_corruption_is_of_half_the_templates() -> None:
    drawn = [draw_effects(127, True, np.random.default_rng([4, seed])).corruption for seed in range(1000)]
    deviations = np.array([c.deviation for c in drawn])
    assert np.mean(deviations > 0) == pytest.approx(0.5, abs=0.05)
    assert 14 < deviations.max() <= 15
    corners = np.array([c.patch_xyxy for c in drawn])
    areas = (corners[:, 2:] - corners[:, :2]).prod(axis=1) / 127**2
    assert np.mean(areas > 0) == pytest.approx(0.5, abs=0.05)
    assert 0.15 < areas.max() <= 0.2
    assert draw_effects(127, False, np.random.default_rng(0)).corruption == Corruption()


def test_kernels_are_of_sum_one_and_about_the_middle() -> None:
    for drawn in (light(sigma_px=0.6), light(sigma_px=2.0), light(motion_px=13), light(motion_px=3)):
        kernel = drawn.light.kernel()
        assert kernel is not None
        assert kernel.shape == (KERNEL_PX, KERNEL_PX)
        assert kernel.sum() == pytest.approx(1, abs=1e-6)
        np.testing.assert_allclose(kernel, kernel[::-1, ::-1])
    assert PLAIN.kernel() is None
    assert motion_kernel(4, 0.0).shape == (4, 4)


# --- samples and recipes -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for video in range(3):
        folder = root / "videos" / f"clip{video}"
        (folder / "img").mkdir(parents=True)
        for frame in range(4):
            assert cv2.imwrite(str(folder / "img" / f"{frame}.png"), photo(10 * video + frame, 160))
        (folder / "groundtruth.txt").write_text("40,30,40,30\n" * 4)
    return root


def recipe_of(augment: str, model: str = "siamcan-mobilenetv2") -> Recipe:
    content: dict[str, Any] = {"videos": ["videos"], "validation_videos": ["clip2"], "augment": augment}
    content |= {"pairs": {"mix": {"video": 1.0}}, "labels": {"positives": 2, "negatives": 5}}
    return recipe_from_dict({"model": model, "data": content})


def datasets(augment: str, data: Path, model: str = "siamcan-mobilenetv2") -> list[PairDataset]:
    """Of training and of validation."""
    recipe = recipe_of(augment, model)
    net = build_model(recipe.model, {"blocks": 1} if model == "dastsiam-mobilenetv2" else {})
    shape = crop_shape(net)
    found = collect(recipe, data, shape.template_px, shape.search_px)
    return [
        PairDataset(sampler, cells_of(net), recipe.labels, 1, 8)
        for sampler in make_samplers(recipe, found, shape)
        if sampler is not None
    ]


def batches(augment: str, data: Path, model: str, number: int = 16) -> list[dict[str, Tensor]]:
    return [collate([dataset[i] for i in range(number)]) for dataset in datasets(augment, data, model)]


@pytest.mark.parametrize("model", ["siamcan-mobilenetv2", "dastsiam-mobilenetv2"])
def test_a_recipe_gives_the_same_samples_either_way(data: Path, model: str) -> None:
    (ours, our_validation), (wanted, validation) = (batches(augment, data, model) for augment in ("device", "cpu"))
    assert augmented(wanted) == wanted  # in the loader it has been done
    done = augmented(ours)
    assert done.keys() == wanted.keys()
    for name in ("template", "search"):
        assert (done[name].float() - wanted[name].float()).abs().max() <= 2  # rounding
        assert (ours[name].float() - wanted[name].float()).abs().mean() > 3  # what the loader left out
    # Noise is drawn in another way, and so is what is drawn after it: which cells are kept.
    for name in {"box", "positive"} if "history" in wanted else {"box", "positive", "labels"}:
        assert torch.equal(done[name], wanted[name]), name
    assert our_validation.keys() == validation.keys()
    for name, value in validation.items():
        assert torch.equal(our_validation[name], value), name


def test_a_sample_is_the_same_in_any_batch_and_any_order(data: Path) -> None:
    dataset, _ = datasets("device", data, "dastsiam-mobilenetv2")
    together = augmented(collate([dataset[i] for i in (5, 3, 9)]))
    alone = augmented(collate([dataset[3]]))
    for name, value in alone.items():
        assert torch.equal(together[name][1], value[0]), name


def test_the_sheet_shows_what_the_network_sees(data: Path) -> None:
    """The tile's upper left is the template, unscaled; that of the loader's crop has neither light nor noise yet."""
    dataset, _ = datasets("device", data, "dastsiam-mobilenetv2")
    sheet = draw_sheet(dataset, range(1))
    sample, seen = dataset[0], augmented(collate([dataset[0]]))
    for row, name in enumerate(("template", "history", "current")):
        top = GAP_PX + 127 * row
        tile = sheet[top : top + 127, GAP_PX : GAP_PX + 127]
        np.testing.assert_array_equal(tile, seen[name][0].numpy())
        assert (tile != sample[name]).any()


def test_where_to_augment_is_one_of_two() -> None:
    assert recipe_from_dict({"model": "siamfc"}).data.augment == "cpu"
    with pytest.raises(ValueError, match=r"augment must be one of cpu, device, got 'gpu'"):
        recipe_of("gpu")


def test_effects_are_alike_in_shape() -> None:
    """They are stacked into batches: of a fixed shape and type, whatever was drawn."""
    shapes = [
        {name: (value.shape, value.dtype) for name, value in as_arrays({"a": effects}).items()}
        for effects in (light(), light(sigma_px=1.0), draw_effects(127, True, np.random.default_rng(0)))
    ]
    assert shapes[0] == shapes[1] == shapes[2]
