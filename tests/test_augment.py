"""What varies between two crops: window, light, noise, what is pasted. Numbers are worked by hand where possible."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest

from training.augment import (
    PYSOT_COLOUR,
    Cutout,
    Jitter,
    LightConfig,
    corrupted,
    draw_light,
    jittered_window,
    motion_kernel,
    paste,
    photometric,
)


def test_window_without_jitter_is_the_context_of_the_box() -> None:
    rng = np.random.default_rng(0)
    window = jittered_window((100, 80, 40, 40), 127, 255, Jitter(0, 0, 0), rng)
    side = 80 * 255 / 127  # sqrt((40 + 40) (40 + 40))
    assert (window.width, window.height) == (round(side), round(side))
    assert window.to_crop((100, 80, 40, 40), 255) == pytest.approx([127.5, 127.5, 63.5, 63.5], abs=1.0)


def test_jitter_stays_in_its_limits_and_uses_them() -> None:
    rng = np.random.default_rng(0)
    jitter = Jitter(shift_px=64, scale=0.2, stretch=0.1)
    windows = [jittered_window((500, 500, 100, 100), 127, 255, jitter, rng) for _ in range(500)]
    found = np.array([w.to_crop((500, 500, 100, 100), 255) for w in windows])
    shift, log_size = np.abs(found[:, :2] - 127.5), np.log(np.sqrt(found[:, 2] * found[:, 3]) / 63.5)
    log_stretch = np.log(found[:, 2] / found[:, 3])
    for values, limit, slack in ((shift, 64, 1), (np.abs(log_size), 0.2, 0.01), (np.abs(log_stretch), 0.1, 0.01)):
        assert 0.9 * limit < values.max() <= limit + slack


def test_photometric_returns_a_new_image_of_the_same_shape() -> None:
    image = np.random.default_rng(0).integers(0, 256, (127, 127, 3)).astype(np.uint8)
    image.flags.writeable = False
    outs = [photometric(image, np.random.default_rng(seed)) for seed in range(60)]
    assert all(o.shape == image.shape and o.dtype == np.uint8 for o in outs)
    assert len({o.tobytes() for o in outs}) == 60
    means = [abs(float(o.mean()) - float(image.mean())) for o in outs]
    assert max(means) > 10  # it does something
    assert max(means) < 100  # and leaves the picture recognisable


def test_motion_blur_keeps_brightness_and_runs_along_its_angle() -> None:
    image = np.zeros((41, 41, 3), np.uint8)
    image[20, 20] = 255
    blurred = cv2.filter2D(image, -1, motion_kernel(9, 0.0))[:, :, 0]
    assert np.flatnonzero(blurred.any(axis=1)).tolist() == [20]
    assert np.flatnonzero(blurred.any(axis=0)).tolist() == list(range(16, 25))
    assert int(blurred.sum()) == pytest.approx(255, abs=9)
    flat = np.full((41, 41, 3), 90, np.uint8)
    np.testing.assert_array_equal(cv2.filter2D(flat, -1, motion_kernel(7, 1.0)), flat)


NO_LIGHT: dict[str, Any] = dict.fromkeys(("gain", "gamma", "tint", "grey", "motion", "gaussian", "coarse"), 0.0)


def test_light_as_pysot_has_it() -> None:
    """An offset of every crop's colour, and a cross for a kernel."""
    fields = {**NO_LIGHT, "mildest": 1, "colour": 1, "motion": 0.2}
    config = LightConfig(**fields, motion_shape="cross", motion_px=45)
    drawn = [draw_light(255, np.random.default_rng(seed), config) for seed in range(4000)]
    assert {(light.gain, light.gamma, light.grey, light.sigma_px, light.coarse_px) for light in drawn} == {
        (1.0, 1.0, False, 0.0, 0)
    }
    tints = 255 * np.array([light.tint_bgr[::-1] for light in drawn])  # red, green, blue
    np.testing.assert_allclose(np.cov(tints.T), PYSOT_COLOUR @ PYSOT_COLOUR.T, atol=2.5)
    crosses = [light for light in drawn if light.motion_px]
    assert len(crosses) / len(drawn) == pytest.approx(0.2, abs=0.02)
    assert {light.motion_px for light in crosses} == set(range(5, 46, 2))
    for light in crosses[:20]:
        kernel = light.kernel()
        assert kernel is not None and kernel.shape == (45, 45) and kernel.sum() == pytest.approx(1, abs=1e-5)
        middle, half = 22, light.motion_px // 2
        assert kernel[middle - half, middle] == pytest.approx(light.upright / light.motion_px)
        assert np.count_nonzero(kernel) == 2 * light.motion_px - 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mildest": 1.5}, r"mildest must be in 0 to 1, got 1\.5"),
        ({"motion_shape": "star"}, "motion_shape must be one of line, cross, got 'star'"),
        ({"motion_shape": "cross", "motion_px": 3}, "motion_px of a cross must be at least 5, got 3"),
        ({"gaussian": 0.6, "coarse": 0.5}, r"chances must be at most 1, .*got grey 0\.12, 0\.12 \+ 0\.6 \+ 0\.5"),
        ({"tint": -1.0}, "tint must be at least 0"),
    ],
)
def test_light_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LightConfig(**fields)


def test_corrupted_templates() -> None:
    """DASTSiam's noise: half of the images with Gaussian noise, half with a rectangle of one colour, up to a fifth."""
    image = np.full((63, 63, 3), 128, np.uint8)
    image.flags.writeable = False
    noisy, deviations, erased = [], [], []
    for seed in range(1000):
        out = corrupted(image, np.random.default_rng([1, seed]))
        assert (out.shape, out.dtype) == (image.shape, np.uint8)
        colours, counts = np.unique(out.reshape(-1, 3), axis=0, return_counts=True)
        noisy.append(len(colours) > 2)
        if noisy[-1]:
            deviations.append(float(np.median(np.abs(out.astype(int) - 128))) / 0.6745)
        else:
            erased.append(float(counts[(colours != 128).any(axis=1)].sum()) / 63**2)
    assert np.mean(noisy) == pytest.approx(0.5, abs=0.05)
    assert 12 < max(deviations) < 20
    assert np.mean(np.array(erased) > 0) == pytest.approx(0.5, abs=0.07)
    assert 0.15 < max(erased) <= 0.2


@pytest.mark.parametrize(
    ("centre", "size", "angle", "wanted"),
    [
        ((50, 40), (20, 10), 0, (50, 40, 20, 10)),
        ((50, 40), (20, 10), 90, (50, 40, 10, 20)),
        ((50, 40), (4, 2), 0, (50, 40, 4, 2)),  # far smaller than the cut-out: shrunk by area
        ((0, 40), (20, 10), 0, (5, 40, 10, 10)),  # half outside: the visible part
    ],
)
def test_paste_returns_the_box_of_what_it_painted(
    centre: tuple[float, float], size: tuple[float, float], angle: float, wanted: tuple[float, ...]
) -> None:
    canvas = np.zeros((80, 100, 3), np.uint8)
    cutout = Cutout(np.full((20, 40, 3), 200, np.uint8), np.full((20, 40), 255, np.uint8))
    found = paste(canvas, cutout, centre, size, angle)
    assert found == pytest.approx(wanted, abs=1.0)
    painted = canvas[:, :, 0] > 100
    assert painted.sum() == pytest.approx(wanted[2] * wanted[3], rel=0.25)
    assert found is not None
    columns, rows = np.flatnonzero(painted.any(axis=0)), np.flatnonzero(painted.any(axis=1))
    assert (columns[0] + columns[-1] + 1) / 2 == pytest.approx(found[0], abs=0.6)
    assert (rows[0] + rows[-1] + 1) / 2 == pytest.approx(found[1], abs=0.6)


def test_paste_off_the_canvas() -> None:
    canvas = np.zeros((50, 50, 3), np.uint8)
    cutout = Cutout(np.full((9, 9, 3), 200, np.uint8), np.full((9, 9), 255, np.uint8))
    assert paste(canvas, cutout, (-100, 20), (20, 20), 0) is None
    assert not canvas.any()


def test_paste_leaves_what_alpha_leaves_out() -> None:
    canvas = np.full((50, 50, 3), 10, np.uint8)
    alpha = np.zeros((20, 20), np.uint8)
    alpha[:, 10:] = 255
    found = paste(canvas, Cutout(np.full((20, 20, 3), 200, np.uint8), alpha), (25, 25), (20, 20), 0)
    assert found == pytest.approx((30, 25, 10, 20), abs=1)
    assert (canvas[:, :24] == 10).all()


def test_paste_blends_by_alpha_rounded() -> None:
    rng = np.random.default_rng(0)
    canvas, bgr = (rng.integers(0, 256, (50, 50, 3)).astype(np.uint8) for _ in range(2))
    alpha = rng.integers(0, 256, (50, 50)).astype(np.uint8)
    below, share = canvas.copy(), alpha[:, :, None] / 255
    assert paste(canvas, Cutout(bgr, alpha), (25, 25), (50, 50), 0) is not None
    np.testing.assert_array_equal(canvas, np.floor(below * (1 - share) + bgr * share + 127 / 255 + 1e-9))
