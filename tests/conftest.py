"""Fixtures shared by all tests. None needs a download; `dev_data` skips where the folder is not there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from siamtrack import Bundle, SiamTracker, load_bundle
from siamtrack.scene import Scene, SceneFrame

DEV_DATA = Path(__file__).parents[2] / "shared" / "data" / "dev"


@pytest.fixture(scope="session")
def default_bundle() -> Bundle:
    return load_bundle()


@pytest.fixture(scope="session")
def _open_tracker() -> Iterator[SiamTracker]:
    # One thread: what a test says must not depend on the machine's cores, and the tests may run beside other work.
    tracker = SiamTracker.from_pretrained(threads=1)
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
