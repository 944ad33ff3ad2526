"""Camera images from serialised messages, parsed in place.

A subscription that takes `sensor_msgs/Image` as bytes and views the pixels costs a fraction of one that builds message
objects, and at 4K the difference is a frame time. Nothing here imports ROS: the layout is the CDR encoding that every
ROS 2 middleware puts on the wire.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from siamtrack.crop import Image

# encoding -> bytes a pixel, channels, sample type
LAYOUTS: dict[str, tuple[int, type[np.generic]]] = {
    "bgr8": (3, np.uint8),
    "rgb8": (3, np.uint8),
    "mono8": (1, np.uint8),
    "8UC1": (1, np.uint8),
    "8UC3": (3, np.uint8),
    "bgra8": (4, np.uint8),
    "rgba8": (4, np.uint8),
    "8UC4": (4, np.uint8),
    "mono16": (1, np.uint16),
    "16UC1": (1, np.uint16),
    "bgr16": (3, np.uint16),
    "rgb16": (3, np.uint16),
    "yuv422": (2, np.uint8),
    "uyvy": (2, np.uint8),
    "yuv422_yuy2": (2, np.uint8),
    "yuyv": (2, np.uint8),
    "bayer_rggb8": (1, np.uint8),
    "bayer_bggr8": (1, np.uint8),
    "bayer_gbrg8": (1, np.uint8),
    "bayer_grbg8": (1, np.uint8),
}

# OpenCV names a Bayer pattern by its second row's second and third pixel, ROS by its first two pixels.
CONVERSIONS: dict[str, int] = {
    "bgra8": cv2.COLOR_BGRA2BGR,
    "8UC4": cv2.COLOR_BGRA2BGR,
    "rgba8": cv2.COLOR_RGBA2BGR,
    "yuv422": cv2.COLOR_YUV2BGR_UYVY,
    "uyvy": cv2.COLOR_YUV2BGR_UYVY,
    "yuv422_yuy2": cv2.COLOR_YUV2BGR_YUY2,
    "yuyv": cv2.COLOR_YUV2BGR_YUY2,
    "bayer_rggb8": cv2.COLOR_BayerBG2BGR,
    "bayer_bggr8": cv2.COLOR_BayerRG2BGR,
    "bayer_gbrg8": cv2.COLOR_BayerGR2BGR,
    "bayer_grbg8": cv2.COLOR_BayerGB2BGR,
}


class MessageError(ValueError):
    """A message whose content contradicts itself or cannot be decoded."""


@dataclass(frozen=True)
class Header:
    """``std_msgs/Header`` as plain values."""

    sec: int
    nanosec: int
    frame_id: str

    @property
    def stamp_ns(self) -> int:
        """Nanoseconds since the epoch of the clock in use."""
        return self.sec * 1_000_000_000 + self.nanosec


@dataclass(frozen=True, eq=False)
class RosFrame:
    """A frame for `siamtrack.session`: its header and its undecoded picture.

    Attributes:
        header: of the message.
        arrival_ns: ROS time when the message was taken.
        height: pixels; 0 for a compressed image before it is decoded.
        width: likewise.
        encoding: ROS image encoding, or the compressed format.
        step: bytes a row; 0 for a compressed image.
        big_endian: of 16-bit samples.
        data: the payload, uint8 ``[n]``; a view into the serialised message.
        compressed: whether `data` is a compressed file.
        convert: what to do with an encoding this module does not know.
    """

    header: Header
    arrival_ns: int
    height: int
    width: int
    encoding: str
    step: int
    big_endian: bool
    data: NDArray[np.uint8] = field(repr=False)
    compressed: bool = False
    convert: Callable[[RosFrame], Image] | None = None

    @property
    def stamp_ns(self) -> int:
        return self.header.stamp_ns

    @property
    def size_bytes(self) -> int:
        return int(self.data.nbytes)

    def bgr(self) -> Image:
        """The picture as uint8 ``[H, W, 3]``; a view without a copy for bgr8, rgb8 and mono8.

        Raises:
            MessageError: a picture that its decoder refuses.
        """
        # Not cached: the buffer of past frames must not grow by pictures that nobody counts.
        if self.encoding not in LAYOUTS and self.convert is not None:
            return self.convert(self)
        try:
            return _decompress(self) if self.compressed else _to_bgr(self)
        except cv2.error as error:  # such as an odd width in yuv422
            what = f"{self.width}x{self.height} {self.encoding} image"
            raise MessageError(f"OpenCV cannot decode a {what}: {' '.join(str(error).split())}") from error


def parse_image(serialised: bytes, arrival_ns: int, convert: Callable[[RosFrame], Image] | None = None) -> RosFrame:
    """A serialised ``sensor_msgs/Image``, viewed in place.

    Args:
        serialised: CDR bytes, as a raw subscription gives them.
        arrival_ns: ROS time of taking it.
        convert: see `RosFrame`.

    Raises:
        MessageError: truncated, not such a message, an unknown encoding without `convert`, or less data than the
            picture needs.
    """
    reader = _CdrReader(serialised)
    header = reader.header()
    height, width = reader.uint32(), reader.uint32()
    encoding = reader.string()
    big_endian = bool(reader.uint8())
    step = reader.uint32()
    frame = RosFrame(header, arrival_ns, height, width, encoding, step, big_endian, reader.payload(), convert=convert)
    _check_layout(frame)
    return frame


def parse_compressed_image(serialised: bytes, arrival_ns: int) -> RosFrame:
    """A serialised ``sensor_msgs/CompressedImage``; decoded when its picture is first asked for.

    Raises:
        MessageError: truncated, or not such a message.
    """
    reader = _CdrReader(serialised)
    header, encoding = reader.header(), reader.string()
    return RosFrame(header, arrival_ns, 0, 0, encoding, 0, False, reader.payload(), compressed=True)


class _CdrReader:
    """Reads plain CDR (XCDR1), either byte order, front to back."""

    def __init__(self, serialised: bytes) -> None:
        if len(serialised) < 4 or serialised[0] != 0 or serialised[1] not in (0, 1):
            raise MessageError(f"not a plain CDR message: {len(serialised)} bytes, begins {serialised[:4].hex()}")
        self._data = serialised
        self._order = "<" if serialised[1] == 1 else ">"
        self._at = 4  # alignment counts from here

    def uint8(self) -> int:
        return int(self._unpack("B", 1))

    def uint32(self) -> int:
        return int(self._unpack("I", 4))

    def string(self) -> str:
        length = self.uint32()
        raw = self._take(length)
        return bytes(raw[:-1]).decode("utf-8", errors="replace")

    def payload(self) -> NDArray[np.uint8]:
        length = self.uint32()
        self._require(length)
        view = np.frombuffer(self._data, np.uint8, length, self._at)
        self._at += length
        return view

    def header(self) -> Header:
        sec = int(self._unpack("i", 4))
        return Header(sec, self.uint32(), self.string())

    def _unpack(self, code: str, size: int) -> Any:
        self._at += -(self._at - 4) % size
        return struct.unpack(self._order + code, self._take(size))[0]

    def _take(self, size: int) -> bytes:
        self._require(size)
        self._at += size
        return self._data[self._at - size : self._at]

    def _require(self, size: int) -> None:
        if self._at + size > len(self._data):
            raise MessageError(f"message is truncated: {size} bytes wanted at {self._at}, it has {len(self._data)}")


def _check_layout(frame: RosFrame) -> None:
    what = f"{frame.width}x{frame.height} {frame.encoding} image"
    if frame.width < 1 or frame.height < 1:
        raise MessageError(f"{what} is empty")
    if frame.encoding not in LAYOUTS:
        if frame.convert is None:
            raise MessageError(f"unknown image encoding {frame.encoding!r}; known: {', '.join(LAYOUTS)}")
        return
    row_bytes = _row_bytes(frame)
    if frame.step < row_bytes:
        raise MessageError(f"{what}: step is {frame.step} bytes, a row needs {row_bytes}")
    # The last row need not be padded to the full step.
    needed = frame.step * (frame.height - 1) + row_bytes
    if len(frame.data) < needed:
        raise MessageError(f"{what}: data has {len(frame.data)} bytes, {needed} are needed")


def _row_bytes(frame: RosFrame) -> int:
    channels, kind = LAYOUTS[frame.encoding]
    return frame.width * channels * np.dtype(kind).itemsize


def _to_bgr(frame: RosFrame) -> Image:
    channels, kind = LAYOUTS[frame.encoding]
    row_bytes = _row_bytes(frame)
    rows = np.lib.stride_tricks.as_strided(frame.data, (frame.height, row_bytes), (frame.step, 1), writeable=False)
    if kind is np.uint16:
        wide = np.ascontiguousarray(rows).view(">u2" if frame.big_endian else "<u2")
        # Sensors of 10, 12 or 14 bits fill the low bits: shift by what the brightest pixel uses, not by 8. In steps of
        # two bits, as sensors come, so that brightness does not flicker with one bright pixel.
        bits = max(8, -(-int(wide.max()).bit_length() // 2) * 2)
        rows = (wide >> (bits - 8)).astype(np.uint8)
    pixels = rows.reshape(frame.height, frame.width, channels) if channels > 1 else rows
    if frame.encoding in ("bgr8", "8UC3", "bgr16"):
        return pixels
    if frame.encoding in ("rgb8", "rgb16"):
        return pixels[:, :, ::-1]
    if frame.encoding in CONVERSIONS:
        return np.asarray(cv2.cvtColor(np.ascontiguousarray(pixels), CONVERSIONS[frame.encoding]), np.uint8)
    return np.broadcast_to(pixels[:, :, None], (frame.height, frame.width, 3))


def _decompress(frame: RosFrame) -> Image:
    image = cv2.imdecode(frame.data, cv2.IMREAD_COLOR) if len(frame.data) else None
    if image is None:
        raise MessageError(f"compressed image ({frame.encoding!r}, {len(frame.data)} bytes) does not decode")
    return np.asarray(image, np.uint8)
