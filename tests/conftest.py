"""Fixtures shared by all tests. None needs a download; `dev_data` skips where the folder is not there."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import pytest

from siamtrack import Bundle, SiamTracker, load_bundle
from siamtrack.scene import Scene, SceneFrame

# A shell that runs the tests in the background has them ignore Ctrl-C, and so what they start; some of them send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

DEV_DATA = Path(__file__).parents[2] / "shared" / "data" / "dev"


@pytest.fixture(scope="session", autouse=True)
def _torch_on_one_thread() -> None:
    """On shared cores threads mostly wait for each other: fifty times slower beside another job."""
    if torch := sys.modules.get("torch"):  # tests that need it have imported it by now
        torch.set_num_threads(1)


@pytest.fixture
def threads_as_before() -> Iterator[None]:
    """For tests of commands that set up their process's threads: what pytest runs next must not notice."""
    import torch

    threads, cv2_threads = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    cv2.setNumThreads(cv2_threads)


@pytest.fixture(scope="session")
def default_bundle() -> Bundle:
    return load_bundle()


@pytest.fixture(scope="session")
def plain_bundle() -> Bundle:
    """A shipped model that keeps the template of the first frame."""
    return load_bundle("siamla-mobilenetv2")


@pytest.fixture(scope="session")
def _open_tracker() -> Iterator[SiamTracker]:
    # One thread and FP32: what a test says must not depend on the machine, and the tests may run beside other work.
    tracker = SiamTracker.from_pretrained(threads=1, precision="fp32")
    yield tracker
    tracker.close()


@pytest.fixture
def tracker(_open_tracker: SiamTracker) -> SiamTracker:
    """The default model without a target. Loaded once: do not close it."""
    _open_tracker.reset()
    return _open_tracker


@pytest.fixture(scope="session")
def scene() -> list[SceneFrame]:
    """Two seconds of the rendered clip, in which nothing hides the target. Do not write into the images."""
    clip = Scene(width=480, height=270, frames=60)
    frames = list(clip)
    for frame in frames:
        frame.image.setflags(write=False)
    return frames


@pytest.fixture(scope="session")
def dev_data() -> Path:
    """The labelled sequences for development, which are not part of the repository."""
    if not DEV_DATA.is_dir():
        pytest.skip(f"no development sequences at {DEV_DATA}")
    return DEV_DATA
