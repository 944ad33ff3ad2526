"""The GPU's crop, on the host: its arithmetic is in whole numbers and compiled from the same file."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from siamtrack.crop import Image, Window, crop, square_window
from siamtrack.runners.cuda.compiler import compile_source
from siamtrack.runners.cuda.device import CudaError
from siamtrack.runners.cuda.driver import CudaDevice
from siamtrack.runners.cuda.runner import KERNELS
from siamtrack.runners.cuda.windows import LARGEST_SIDE_PX, WINDOW, Plan, plan_windows, sampled_rows, write_pixels
from tests.host_cuda import host_kernels, needs_nvrtc

FILL = (10.4, 200.6, 30.5)
SIZES = (1, 2, 7, 31, 127, 223, 255)


def noise(height: int, width: int, seed: int = 0) -> Image:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def gpu_crops(image: Image, windows: list[Window], fills: list[tuple[float, float, float]], size_px: int) -> Image:
    return run_plan(image, plan_windows(image.shape, windows, fills, size_px, 64 * len(windows)), size_px)


def run_plan(image: Image, plan: Plan, size_px: int) -> Image:
    count = len(plan.table)
    block = np.full(plan.nbytes + 1, 0xAA, np.uint8)
    block[: 64 * count] = plan.table.view(np.uint8)
    write_pixels(image, plan, block[: plan.nbytes])
    assert block[-1] == 0xAA
    crops = np.empty((count, size_px, size_px, 3), np.uint8)
    address = [ctypes.c_void_p(array.ctypes.data) for array in (block, crops)]
    host_kernels().siamtrack_crop(*address, ctypes.c_int(size_px), ctypes.c_int(count))
    return crops


def difference(image: Image, window: Window, size_px: int, fill: tuple[float, float, float] = FILL) -> int:
    crops = gpu_crops(image, [window], [fill], size_px)
    return int(np.abs(crops[0].astype(int) - crop(image, window, size_px, fill)).max())


def test_the_table_is_laid_out_as_the_kernel_reads_it() -> None:
    assert WINDOW.itemsize == 64
    assert [WINDOW.fields[name][1] for name in ("pitch", "step_x", "pixels", "fill")] == [28, 32, 48, 56]


@pytest.mark.parametrize("shape", [(60, 80), (7, 5), (1, 1), (480, 640), (721, 1283)])
def test_random_windows_differ_from_the_cpu_crop_by_a_grey_level_at_most(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(shape[0])
    image = noise(*shape)
    seen = {"inside": 0, "partly": 0, "outside": 0}
    for _ in range(1000):
        side = int(np.exp(rng.uniform(0, np.log(5 * max(shape)))))
        height = max(1, int(side * rng.uniform(0.5, 2))) if rng.random() < 0.3 else side
        left = int(rng.uniform(-1.1 * side - 2, shape[1] + 0.1 * side + 2))
        top = int(rng.uniform(-1.1 * height - 2, shape[0] + 0.1 * height + 2))
        window = Window(left, top, side, height)
        size_px = int(rng.choice(SIZES))
        fill = tuple(rng.uniform(0, 255, 3))
        assert difference(image, window, size_px, fill) <= 1, (window, size_px, fill)
        if left >= shape[1] or top >= shape[0] or left + side <= 0 or top + height <= 0:
            seen["outside"] += 1
        elif left >= 0 and top >= 0 and left + side <= shape[1] and top + height <= shape[0]:
            seen["inside"] += 1
        else:
            seen["partly"] += 1
    assert seen["partly"] > 100
    assert seen["outside"] > 20


def test_4k_windows_of_every_kind() -> None:
    image = noise(2160, 3840)
    windows = [
        Window(0, 0, 3840, 2160), Window(-200, -900, 4001, 4001), Window(3000, 1500, 1203, 1177),
        Window(3839, 2159, 1, 1), Window(1000, 1000, 255, 255), Window(1000, 1000, 511, 510), Window(17, 19, 3, 2),
        Window(3500, -50, 600, 601), Window(-5000, -5000, 20000, 20000), Window(-9000, -20000, 40001, 40001),
    ]  # fmt: skip
    for window in windows:
        for size_px in (127, 255):
            assert difference(image, window, size_px) <= 1, (window, size_px)


def test_a_window_of_a_million_pixels_needs_no_memory_for_its_border() -> None:
    # No tracker asks for one: a target as large as a 4K image has a window of some 16,000 pixels.
    image = np.full((2160, 3840, 3), 200, np.uint8)
    plan = plan_windows(image.shape, [square_window(1920, 1080, 1_000_000)], [FILL], 255, 64)
    assert plan.nbytes < 100_000
    is_fill = (run_plan(image, plan, 255)[0] == np.round(FILL)).all(axis=-1)
    assert 0.9 < is_fill.mean() < 1


def test_a_window_of_the_crops_size_is_an_exact_copy() -> None:
    image = noise(60, 80)
    np.testing.assert_array_equal(gpu_crops(image, [Window(5, 7, 32, 32)], [FILL], 32)[0], image[7:39, 5:37])


def test_few_values_differ_at_all() -> None:
    image = noise(480, 640)
    for side in (60, 150, 222, 300, 446, 450):
        window = Window(100, -20, side, side)
        crops = gpu_crops(image, [window], [FILL], 223)[0]
        assert (crops != crop(image, window, 223, FILL)).mean() < 0.001, side


def test_outside_is_the_rounded_fill() -> None:
    crops = gpu_crops(noise(60, 80), [Window(80, 0, 20, 20), Window(-40, -40, 20, 20)], [FILL] * 2, 9)
    assert (crops == (10, 201, 30)).all()


def test_windows_of_a_batch_do_not_mix() -> None:
    image = noise(480, 640)
    windows = [Window(-30, 10, 100, 100), Window(1000, 0, 50, 50), Window(0, 0, 640, 480), Window(33, 44, 55, 66)]
    fills = [(1.0, 2.0, 3.0), (4.0, 5.0, 6.0), (7.0, 8.0, 9.0), (0.0, 0.0, 0.0)]
    crops = gpu_crops(image, windows, fills, 63)
    for one, window, fill in zip(crops, windows, fills, strict=True):
        np.testing.assert_array_equal(one, gpu_crops(image, [window], [fill], 63)[0])
        assert np.abs(one.astype(int) - crop(image, window, 63, fill)).max() <= 1


@pytest.mark.parametrize(
    "view",
    [lambda i: i[:, ::-1], lambda i: i[::-1], lambda i: i[..., ::-1], lambda i: i[::2, ::2], lambda i: i[10:, 5:-5]],
    ids=["mirrored", "upside_down", "rgb", "every_second", "roi"],
)
@pytest.mark.parametrize("window", [Window(-10, 30, 50, 50), Window(-100, -100, 400, 400)])
def test_a_view_gives_what_its_copy_gives(view: object, window: Window) -> None:
    image = view(noise(240, 320))
    copy = np.ascontiguousarray(image)
    np.testing.assert_array_equal(gpu_crops(image, [window], [FILL], 31), gpu_crops(copy, [window], [FILL], 31))


def test_what_is_uploaded_depends_on_the_window_and_not_on_the_camera() -> None:
    small, large = (720, 1280), (2160, 3840)
    for side in (1, 100, 446, 700):
        window = Window(10, 10, side, side)
        sizes = {plan_windows(shape, [window], [FILL], 223, 256).nbytes for shape in (small, large)}
        assert len(sizes) == 1
        rows = min(side, 2 * 223)  # of a taller one only the rows that are sampled
        assert sizes == {256 + rows * side * 3}


def test_rows_between_the_sampled_ones_are_not_uploaded() -> None:
    image = noise(1000, 1000)
    plan = plan_windows(image.shape, [Window(0, -500, 1000, 2000)], [FILL], 31, 64)
    (patch,) = plan.patches
    assert patch is not None
    assert patch.shape[0] <= 2 * 16 + 2  # half of the 31 output rows lie inside
    spoiled = image.copy()
    spoiled[np.setdiff1d(np.arange(1000), patch.rows)] ^= 0xFF
    np.testing.assert_array_equal(run_plan(image, plan, 31), run_plan(spoiled, plan, 31))


@pytest.mark.parametrize("height", [1, 2, 30, 31, 32, 62, 63, 1000, 999_999])
def test_sampled_rows_are_those_opencv_reads(height: int) -> None:
    rows = sampled_rows(height, 31)
    centre = (np.arange(31) + 0.5) * height / 31 - 0.5
    np.testing.assert_array_equal(rows[:, 0], np.clip(np.floor(centre + 1e-9), 0, height - 1))
    assert ((rows[:, 1] - rows[:, 0] == 1) | (rows[:, 1] == height - 1) | (rows[:, 1] == 0)).all()


def test_a_window_beyond_all_bounds_is_refused() -> None:
    with pytest.raises(ValueError, match=r"does not fit: sides and positions may be \d+ pixels at most"):
        plan_windows((60, 80), [Window(0, 0, LARGEST_SIDE_PX + 1, 5)], [FILL], 31, 64)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_check_kernel_finds_what_is_no_finite_number(dtype: type) -> None:
    values = np.linspace(-60000, 60000, 1001).astype(dtype)
    check = host_kernels().siamtrack_check

    def flag(array: np.ndarray) -> int:
        found = ctypes.c_int(0)
        half = ctypes.c_int(array.itemsize == 2)
        check(ctypes.c_void_p(array.ctypes.data), ctypes.c_longlong(array.size), half, ctypes.byref(found))
        return found.value

    assert flag(values) == 0
    for bad in (np.nan, np.inf, -np.inf):
        for place in (0, 500, 1000):
            spoiled = values.copy()
            spoiled[place] = bad
            assert flag(spoiled) == 1


@needs_nvrtc
@pytest.mark.parametrize(("capability", "start"), [(75, b"\x7fELF"), (87, b"\x7fELF"), (90, b"\x7fELF"), (999, b"//")])
def test_kernels_compile_at_run_time_as_machine_code_or_for_newer_gpus_as_ptx(capability: int, start: bytes) -> None:
    image = compile_source(KERNELS.read_text(), capability)
    assert image.startswith(start)
    assert b"siamtrack_crop" in image
    assert b"siamtrack_check" in image


@needs_nvrtc
def test_a_kernel_that_does_not_compile_shows_the_compilers_words() -> None:
    with pytest.raises(CudaError, match=r"does not compile.*sm_90.*nonsense"):
        compile_source('extern "C" __global__ void f() { nonsense; }', 90)


def test_without_cuda_python_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda.bindings", "cuda.bindings.driver", "cuda.bindings.nvrtc"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(CudaError, match=r"needs cuda-python: pip install 'siamtrack\[tensorrt\]'"):
        CudaDevice()
    with pytest.raises(CudaError, match=r"needs cuda-python: pip install 'siamtrack\[tensorrt\]'"):
        compile_source("", 90)


def test_kernels_compile_with_nvcc_without_a_warning(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        pytest.skip("needs nvcc")
    target = tmp_path / "kernels.ptx"
    done = subprocess.run(
        [nvcc, "-ptx", "-Werror", "all-warnings", "-o", str(target), str(KERNELS)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert ".entry siamtrack_crop" in target.read_text()
