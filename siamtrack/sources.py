"""Where frames come from: a video file, a folder or glob of images, a camera, or a network stream.

`open_source` looks at what it is given and answers with one `FrameSource`, so whatever reads frames need not care::

    with open_source("clips/drone.mp4") as source:
        for index, frame in source:
            ...

Every frame is uint8 ``[H, W, 3]`` BGR: grey images are spread over three channels, alpha is dropped, 16-bit images are
scaled to 8 bits.
"""

from __future__ import annotations

import abc
import glob
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


class FrameSource(abc.ABC):
    """Frames in order, each with its index from 0; a context manager that lets go of the device or file at the end.

    Iterate once: a video, a camera and a stream cannot be rewound, so a second pass needs a second `open_source`.

    Attributes:
        name: short, for a title or a file name ("drone", "camera 0").
        fps: frames a second, or None where the source does not say (images, some streams).
        length: number of frames, or None where there is no end (camera, stream). From a video's header, which may
            be off by a few: good for a progress bar, not for sizing an array.
    """

    name: str
    fps: float | None
    length: int | None

    @abc.abstractmethod
    def __iter__(self) -> Iterator[tuple[int, Image]]: ...

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of the file or device. Calling it twice does no harm."""

    def __enter__(self) -> FrameSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class ImageSource(FrameSource):
    """A list of image files, read one at a time as they are asked for."""

    def __init__(self, paths: Sequence[Path], name: str) -> None:
        self.name, self.fps, self.length = name, None, len(paths)
        self._paths: list[Path] = list(paths)

    def __iter__(self) -> Iterator[tuple[int, Image]]:
        for index, path in enumerate(self._paths):
            yield index, _read_image(path)

    def close(self) -> None:
        """Nothing is held open between images."""


class CaptureSource(FrameSource):
    """A video file, camera or stream behind OpenCV's `VideoCapture`."""

    def __init__(self, target: str | int, name: str, complaint: str, endless: bool) -> None:
        self.name = name
        self._capture: Any = cv2.VideoCapture(target)
        if isinstance(target, int):
            # A camera driver queues old frames by default; a tracker wants the newest. Drivers may ignore this.
            self._capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)
        # Some files open and then hold nothing that decodes, so only a first frame proves the source good.
        self._first: Any = self._capture.read()[1] if self._capture.isOpened() else None
        if self._first is None:
            self._capture.release()
            raise ValueError(complaint)
        fps, length = self._capture.get(cv2.CAP_PROP_FPS), self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.fps = float(fps) if 0 < fps <= 1000 else None
        self.length = int(length) if not endless and 0 < length < 1e9 else None

    def __iter__(self) -> Iterator[tuple[int, Image]]:
        index, frame = 0, self._first
        self._first = None
        while frame is not None:
            yield index, frame
            frame, index = self._capture.read()[1], index + 1

    def close(self) -> None:
        self._first = None
        self._capture.release()


def open_source(spec: str) -> FrameSource:
    """Open a source of frames by what its name looks like.

    Args:
        spec: one of: a camera index ("0"); a stream URL ("rtsp://...", "http://..."); a folder of images (or a folder
            whose ``img`` subfolder holds them, as in OTB); an image file; a video file; a glob of images
            ("shots/*.png", quoted so that the shell leaves it alone). Images come in natural order, img2 before img10.

    Raises:
        ValueError: nothing there, a folder or glob without images, or something that does not decode. While iterating:
            an image that does not decode, by name.
    """
    if not spec:
        raise ValueError("the source is empty: give a video file, an image folder, a glob, a camera index or a URL")
    if spec.isascii() and spec.isdigit():
        return CaptureSource(
            int(spec),
            name=f"camera {spec}",
            complaint=f"camera {spec} does not open or gives no frame: check that it is plugged in, that no other "
            f"program holds it and that you may read it (for a folder named {spec}, write ./{spec})",
            endless=True,
        )
    if "://" in spec:
        return CaptureSource(
            spec,
            name=spec,
            complaint=f"stream {spec} does not open or gives no frame: check the address, user and password, and that "
            "this machine can reach it",
            endless=True,
        )
    path = Path(spec).expanduser()
    if path.is_dir():
        return _open_folder(path)
    if path.is_file():
        if path.suffix.lower() in IMAGE_SUFFIXES:
            return ImageSource([path], name=path.stem)
        return CaptureSource(
            str(path),
            name=path.stem,
            complaint=f"{path} does not decode as a video: the file is damaged, not a video, or in a codec that this "
            "build of OpenCV lacks (try: ffmpeg -i INPUT -c:v libx264 OUTPUT.mp4)",
            endless=False,
        )
    if glob.has_magic(spec):
        return _open_glob(str(path))
    raise ValueError(
        f"no such file or folder: {spec} (expected a video file, an image folder, a quoted glob such as 'shots/*.png', "
        "a camera index such as 0, or a URL such as rtsp://host/stream)"
    )


def natural_key(path: Path) -> tuple[list[tuple[int, int, str]], str]:
    """Sort key that orders runs of digits by value, so that img2 comes before img10."""
    parts = re.findall(r"[0-9]+|[^0-9]+", str(path))
    # Numbers before text at the same place; the plain string last, so img1 and img01 have a fixed order.
    return [(0, int(part), "") if part[0] in "0123456789" else (1, 0, part.lower()) for part in parts], str(path)


def _open_folder(folder: Path) -> ImageSource:
    paths = list_images(folder)
    if not paths and (folder / "img").is_dir():
        paths = list_images(folder / "img")
    if not paths:
        raise ValueError(f"no images in folder {folder}: looked for {_suffix_list()} there and in {folder / 'img'}")
    return ImageSource(paths, name=folder.resolve().name)


def _open_glob(pattern: str) -> ImageSource:
    matches = [Path(match) for match in glob.glob(pattern, recursive=True)]
    paths = sorted((path for path in matches if _is_image(path)), key=natural_key)
    if not paths:
        found = f"matches {len(matches)} paths, none of them an image" if matches else "matches nothing"
        raise ValueError(f"glob {pattern} {found}: expected files that end in {_suffix_list()}")
    return ImageSource(paths, name=paths[0].resolve().parent.name)


def list_images(folder: Path) -> list[Path]:
    """Image files of a folder in natural order; hidden files are left out."""
    return sorted((path for path in folder.iterdir() if _is_image(path)), key=natural_key)


def _is_image(path: Path) -> bool:
    # Dot files are left out: macOS leaves "._img1.jpg" beside every image on a shared disk.
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()


def _suffix_list() -> str:
    return ", ".join(sorted(IMAGE_SUFFIXES))


def _read_image(path: Path) -> Image:
    image: Any = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise ValueError(f"{path} does not decode as an image: the file is damaged, empty, unreadable or not an image")
    return image
