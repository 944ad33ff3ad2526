"""Images parsed from the bytes that rclpy itself puts on the wire."""

from __future__ import annotations

import array
import contextlib
import struct

import cv2
import numpy as np
import pytest
from rclpy.serialization import serialize_message
from sensor_msgs.msg import CompressedImage, Image

from ros2_siamtrack.images import LAYOUTS, MessageError, RosFrame, parse_compressed_image, parse_image
from tests.ros.conftest import header_message, image_message, stamp_ns

HEIGHT, WIDTH = 6, 8
RNG = np.random.default_rng(1)
BGR = cv2.resize(RNG.integers(0, 256, (3, 4, 3), dtype=np.uint8), (WIDTH, HEIGHT))
STAMP = stamp_ns(7)


def parse(message: Image) -> RosFrame:
    return parse_image(serialize_message(message), 1)


def padded(message: Image, padding: int, last_row_too: bool = True) -> Image:
    """The same picture with rows of `padding` more bytes."""
    rows = np.frombuffer(message.data, np.uint8).reshape(message.height, -1)
    wide = np.full((message.height, message.step + padding), 0xAA, np.uint8)
    wide[:, : message.step] = rows
    message.step += padding
    data = wide.tobytes()
    message.data = array.array("B", data if last_row_too else data[: len(data) - padding])
    return message


def to_yuv(order: str) -> tuple[np.ndarray, np.ndarray]:
    """A picture packed as YUV 4:2:2, uint8 ``[H, W, 2]``, and the BGR it stands for (BT.601, video range)."""
    y = RNG.integers(16, 236, (HEIGHT, WIDTH)).astype(np.uint8)
    u, v = (RNG.integers(100, 156, (HEIGHT, WIDTH // 2)).astype(np.uint8) for _ in range(2))
    packed = np.empty((HEIGHT, WIDTH, 2), np.uint8)
    luma, chroma = (1, 0) if order == "uyvy" else (0, 1)
    packed[..., luma] = y
    packed[:, 0::2, chroma], packed[:, 1::2, chroma] = u, v
    c, d, e = 1.164 * (y - 16.0), u.repeat(2, axis=1) - 128.0, v.repeat(2, axis=1) - 128.0
    bgr = np.stack([c + 2.018 * d, c - 0.391 * d - 0.813 * e, c + 1.596 * e], axis=-1)
    return packed, np.clip(np.round(bgr), 0, 255)


def to_bayer(pattern: str) -> tuple[np.ndarray, np.ndarray]:
    """A mosaic of a picture of one colour, ``[H, W]``, and that picture; `pattern` is the first two rows' colours."""
    colour = {"r": 200, "g": 120, "b": 40}
    tile = np.array([[colour[pattern[0]], colour[pattern[1]]], [colour[pattern[2]], colour[pattern[3]]]], np.uint8)
    return np.tile(tile, (HEIGHT // 2, WIDTH // 2)), np.broadcast_to((40, 120, 200), (HEIGHT, WIDTH, 3))


def case(encoding: str) -> tuple[np.ndarray, np.ndarray, float]:
    """Samples in an encoding, the BGR picture they stand for, and how far rounding may lead from it."""
    grey = BGR[..., 1]
    opaque = np.full((HEIGHT, WIDTH, 1), 17, np.uint8)
    deep = (BGR.astype("<u2") << 8) | 0x7F  # uses all 16 bits
    deep[0, 0] = 0xFFFF
    top = (deep >> 8).astype(np.uint8)
    if encoding.startswith("bayer"):
        return (*to_bayer(encoding[6:10]), 1)
    if encoding in ("yuv422", "uyvy", "yuv422_yuy2", "yuyv"):
        return (*to_yuv("uyvy" if encoding in ("yuv422", "uyvy") else "yuyv"), 2)
    return {
        "bgr8": (BGR, BGR, 0),
        "8UC3": (BGR, BGR, 0),
        "rgb8": (BGR[..., ::-1], BGR, 0),
        "mono8": (grey, np.stack([grey] * 3, axis=-1), 0),
        "8UC1": (grey, np.stack([grey] * 3, axis=-1), 0),
        "bgra8": (np.concatenate([BGR, opaque], axis=2), BGR, 0),
        "8UC4": (np.concatenate([BGR, opaque], axis=2), BGR, 0),
        "rgba8": (np.concatenate([BGR[..., ::-1], opaque], axis=2), BGR, 0),
        "bgr16": (deep, top, 0),
        "rgb16": (deep[..., ::-1], top, 0),
        "mono16": (deep[..., 1], np.stack([top[..., 1]] * 3, axis=-1), 0),
        "16UC1": (deep[..., 1], np.stack([top[..., 1]] * 3, axis=-1), 0),
    }[encoding]


@pytest.mark.parametrize("padding", [0, 6])
@pytest.mark.parametrize("encoding", LAYOUTS)
def test_every_encoding(encoding: str, padding: int) -> None:
    samples, expected, tolerance = case(encoding)
    message = padded(image_message(np.ascontiguousarray(samples), STAMP, encoding), padding)
    frame = parse(message)
    assert (frame.header.sec, frame.header.nanosec, frame.header.frame_id) == (
        message.header.stamp.sec, message.header.stamp.nanosec, "camera_optical",
    )  # fmt: skip
    assert (frame.stamp_ns, frame.height, frame.width, frame.encoding) == (STAMP, HEIGHT, WIDTH, encoding)
    picture = frame.bgr()
    assert picture.shape == (HEIGHT, WIDTH, 3) and picture.dtype == np.uint8
    inner = slice(1, -1) if encoding.startswith("bayer") else slice(None)
    difference = np.abs(picture.astype(float) - expected)[inner, inner]
    assert difference.max() <= tolerance


@pytest.mark.parametrize("encoding", ["mono16", "16UC1", "bgr16", "rgb16"])
def test_big_endian_samples(encoding: str) -> None:
    samples, expected, _ = case(encoding)
    message = image_message(np.ascontiguousarray(samples.astype(">u2")), STAMP, encoding, is_bigendian=1)
    np.testing.assert_array_equal(parse(message).bgr(), expected)


@pytest.mark.parametrize(("bits", "shift"), [(8, 0), (9, 2), (10, 2), (11, 4), (12, 4), (14, 6), (16, 8)])
def test_sensors_that_fill_the_low_bits(bits: int, shift: int) -> None:
    samples = np.full((HEIGHT, WIDTH), 2**bits - 1, np.uint16)
    samples[:, 0] = 100
    picture = parse(image_message(samples, STAMP, "mono16")).bgr()
    assert (picture[:, 0] == 100 >> shift).all() and (picture[:, 1:] == (2**bits - 1) >> shift).all()


@pytest.mark.parametrize("encoding", ["bgr8", "rgb8", "mono8"])
@pytest.mark.parametrize("padding", [0, 6])
def test_no_copy_on_the_hot_path(encoding: str, padding: int) -> None:
    message = padded(image_message(np.ascontiguousarray(case(encoding)[0]), STAMP, encoding), padding)
    serialised = serialize_message(message)
    picture = parse_image(serialised, 1).bgr()
    assert np.shares_memory(picture, np.frombuffer(serialised, np.uint8))
    assert not picture.flags.writeable


def test_the_last_row_need_not_be_padded() -> None:
    message = padded(image_message(BGR, STAMP), 10, last_row_too=False)
    np.testing.assert_array_equal(parse(message).bgr(), BGR)
    message.data = message.data[:-1]
    with pytest.raises(MessageError, match=r"data has \d+ bytes, \d+ are needed"):
        parse(message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"step": 23}, "8x6 bgr8 image: step is 23 bytes, a row needs 24"),
        ({"step": 0}, "step is 0 bytes"),
        ({"height": 7}, "data has 144 bytes, 168 are needed"),
        ({"width": 0}, "0x6 bgr8 image is empty"),
        ({"height": 0}, "8x0 bgr8 image is empty"),
        ({"encoding": "martian"}, "unknown image encoding 'martian'; known: bgr8, "),
        ({"encoding": ""}, "unknown image encoding ''"),
        ({"encoding": "32FC1"}, "unknown image encoding '32FC1'"),
        ({"width": 2**32 - 1, "height": 2**32 - 1, "step": 2**32 - 1}, "4294967295x4294967295"),
        ({"height": 2**32 - 1}, "are needed"),
    ],
)
def test_images_that_contradict_themselves(fields: dict, message: str) -> None:
    with pytest.raises(MessageError, match=message):
        parse(image_message(BGR, STAMP, **{"encoding": "bgr8", **fields}))


def test_a_message_without_anything_in_it() -> None:
    with pytest.raises(MessageError, match="empty"):
        parse(Image())


def test_an_encoding_for_somebody_else() -> None:
    message = image_message(BGR, STAMP, "martian")
    frame = parse_image(serialize_message(message), 1, convert=lambda frame: BGR + frame.height)
    np.testing.assert_array_equal(frame.bgr(), BGR + HEIGHT)
    known = parse_image(serialize_message(image_message(BGR, STAMP)), 1, convert=lambda frame: 1 / 0)
    np.testing.assert_array_equal(known.bgr(), BGR)


def test_what_opencv_refuses_is_a_message_error() -> None:
    odd = image_message(np.zeros((4, 3, 2), np.uint8), STAMP, "yuv422")
    try:
        picture = parse(odd).bgr()
    except MessageError as error:
        assert "3x4 yuv422 image" in str(error) and "\n" not in str(error)
    else:
        assert picture.shape == (4, 3, 3)


@pytest.mark.parametrize("frame_id", ["", "a", "ab", "abc", "abcd", "kamera_ä"])
@pytest.mark.parametrize("encoding", ["bgr8", "mono8", "bayer_rggb8"])
def test_alignment_whatever_the_texts(frame_id: str, encoding: str) -> None:
    message = image_message(np.ascontiguousarray(case(encoding)[0]), STAMP, encoding)
    message.header.frame_id = frame_id
    frame = parse(message)
    assert (frame.header.frame_id, frame.height, frame.width, frame.step) == (frame_id, HEIGHT, WIDTH, message.step)
    assert frame.data.tobytes() == message.data.tobytes()


def test_a_stamp_before_1970() -> None:
    message = image_message(BGR, 0)
    message.header.stamp.sec, message.header.stamp.nanosec = -3, 5
    assert parse(message).stamp_ns == -3 * 10**9 + 5


def test_truncated_anywhere() -> None:
    serialised = serialize_message(image_message(BGR, STAMP))
    payload_end = serialised.index(BGR.tobytes()) + BGR.nbytes
    for length in range(payload_end):
        with pytest.raises(MessageError):
            parse_image(serialised[:length], 1)
        with pytest.raises(MessageError):
            parse_compressed_image(serialised[:length], 1).bgr()
    np.testing.assert_array_equal(parse_image(serialised[:payload_end], 1).bgr(), BGR)


def test_garbage_is_refused_and_nothing_worse() -> None:
    serialised = bytearray(serialize_message(image_message(BGR, STAMP)))
    header = serialised.index(BGR.tobytes())
    for _ in range(3000):
        broken = bytearray(serialised)
        for position in RNG.integers(0, header, 3):
            broken[position] = RNG.integers(0, 256)
        with contextlib.suppress(MessageError):
            parse_image(bytes(broken), 1).bgr()
        with contextlib.suppress(MessageError):
            parse_compressed_image(bytes(broken), 1).bgr()


@pytest.mark.parametrize("start", [b"", b"\0", b"\0\1\0", b"\0\2\0\0", b"\0\3\0\0", b"\1\1\0\0", b"\0\7\0\0"])
def test_other_encapsulations_are_refused(start: bytes) -> None:
    with pytest.raises(MessageError, match="not a plain CDR message"):
        parse_image(start + b"\0" * (100 if len(start) == 4 else 0), 1)


def test_big_endian_cdr() -> None:
    def text(value: str) -> bytes:
        return struct.pack(">I", len(value) + 1) + value.encode() + b"\0"

    body = b""
    for part in (struct.pack(">iI", 12, 34), text("cam"), struct.pack(">II", HEIGHT, WIDTH), text("bgr8"), b"\0"):
        body += b"\0" * (-len(body) % 4 if len(part) > 1 else 0) + part
    body += b"\0" * (-len(body) % 4) + struct.pack(">II", WIDTH * 3, BGR.nbytes) + BGR.tobytes()
    frame = parse_image(b"\0\0\0\0" + body, 1)
    assert (frame.stamp_ns, frame.header.frame_id) == (12 * 10**9 + 34, "cam")
    np.testing.assert_array_equal(frame.bgr(), BGR)


# --------------------------------------------------------------------------------------------------------- compressed


def compressed(data: bytes, picture_format: str = "jpeg") -> RosFrame:
    values = array.array("B", data)
    message = CompressedImage(header=header_message(STAMP), format=picture_format, data=values)
    return parse_compressed_image(serialize_message(message), 5)


@pytest.mark.parametrize(
    "picture_format", ["jpeg", "bgr8; jpeg compressed bgr8", "rgb8; png compressed bgr8", "png", ""]
)
def test_compressed(picture_format: str) -> None:
    large = cv2.resize(BGR, (64, 48))
    _, data = cv2.imencode(".png" if "png" in picture_format else ".jpg", large, (cv2.IMWRITE_JPEG_QUALITY, 98))
    frame = compressed(data.tobytes(), picture_format)
    assert (frame.stamp_ns, frame.arrival_ns, frame.size_bytes) == (STAMP, 5, len(data))
    picture = frame.bgr()
    assert picture.shape == large.shape
    assert np.abs(picture.astype(int) - large).mean() < (0.01 if "png" in picture_format else 4)


def test_compressed_grey_and_16_bit_become_bgr() -> None:
    _, grey = cv2.imencode(".png", BGR[..., 0])
    np.testing.assert_array_equal(compressed(grey.tobytes(), "png").bgr()[..., 2], BGR[..., 0])
    _, deep = cv2.imencode(".png", BGR.astype(np.uint16) << 8)
    assert compressed(deep.tobytes(), "png").bgr().dtype == np.uint8


@pytest.mark.parametrize("data", [b"", b"\0", b"garbage" * 50, b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_compressed_garbage(data: bytes) -> None:
    with pytest.raises(MessageError, match=r"does not decode|cannot decode"):
        compressed(data).bgr()


def test_pictures_are_not_hoarded() -> None:
    # The buffer of past frames counts a compressed frame's bytes; a picture kept with it would not be counted.
    _, data = cv2.imencode(".png", BGR)
    frame = compressed(data.tobytes(), "png")
    assert frame.bgr() is not frame.bgr()
