"""Quality of service, by what a topic is for. Functions, since rclpy writes overrides into the profile it is given."""

from __future__ import annotations

from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy


def newest_frame_qos() -> QoSProfile:
    """Sensor data, of which only the newest counts."""
    return QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)


def every_message_qos() -> QoSProfile:
    """Nothing is lost on the way; the publisher has to offer that."""
    return QoSProfile(history=HistoryPolicy.KEEP_ALL, reliability=ReliabilityPolicy.RELIABLE)


def reliable_qos() -> QoSProfile:
    """Offered to reliable and best-effort subscribers alike."""
    return QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE)


def latched_qos() -> QoSProfile:
    """Who joins late gets the last message."""
    return QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)
