"""Parameters: declared with ranges, refused with a reason, and changed while the node runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
from geometry_msgs.msg import Point
from rcl_interfaces.srv import DescribeParameters, SetParameters

from ros2_siamtrack.parameters import PARAMETERS, refusal
from tests.ros.conftest import ListeningTracker, Parameter, Rig, until


def set_remotely(rig: Rig, **values: Any) -> list[Any]:
    """What `ros2 param set` does."""
    client = rig.world.create_client(SetParameters, "siamtrack/set_parameters")
    assert client.wait_for_service(30)
    messages = [Parameter(name, value=value).to_parameter_msg() for name, value in values.items()]
    future = client.call_async(SetParameters.Request(parameters=messages))
    until(future.done)
    return future.result().results


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("timeout_s", 0.0, "out of range"),
        ("timeout_s", math.nan, "out of range"),
        ("timeout_s", "long", "type"),
        ("init_point_size_px", 1.0, "out of range"),
        ("debug_image_hz", -1.0, "out of range"),
        ("penalty_k", -0.5, "penalty_k must be at least 0, or -1 for the model's own value, got -0.5"),
        ("window_influence", 1.5, "out of range"),
        ("size_rate", -0.1, "size_rate must be at least 0"),
        ("second_look", 0.5, "second_look must be at least 1, 0 for none, or -1 for the model's own value, got 0.5"),
        ("second_look", 2.5, "out of range"),
        ("model", "other", "read-only"),
        ("backend", "onnxruntime", "read-only"),
        ("precision", "fp32", "read-only"),
        ("build_engines", "auto", "read-only"),
        ("engine_key_file", __file__, "read-only"),
        ("processing", "every", "read-only"),
        ("threads", 2, "read-only"),
    ],
)
def test_refused_with_a_reason(rig: Rig, name: str, value: Any, reason: str) -> None:
    before = rig.tracker.get_parameter(name).value
    (result,) = set_remotely(rig, **{name: value})
    assert not result.successful
    assert reason in result.reason.lower() or reason in result.reason
    assert rig.tracker.get_parameter(name).value == before


def test_changed_while_it_runs(rig: Rig) -> None:
    rig.follow(0, 1)
    tracker: list[Any] = []
    rig.worker.configure(tracker.append)
    assert rig.worker.settle()
    own = tracker[0].runner.bundle.manifest.tracking
    assert tracker[0].tracking == own
    results = set_remotely(
        rig, penalty_k=0.2, window_influence=0.1, size_rate=0.5, second_look=0.0, timeout_s=3.0, debug_image_hz=5.0
    )
    assert all(result.successful for result in results)
    assert rig.worker.settle()
    now = tracker[0].tracking
    assert (now.penalty_k, now.window_influence, now.size_rate, now.second_look) == (0.2, 0.1, 0.5, 0)
    assert set_remotely(rig, penalty_k=-1.0, window_influence=-1.0)[0].successful
    assert rig.worker.settle()
    now = tracker[0].tracking
    assert (now.penalty_k, now.window_influence, now.size_rate) == (own.penalty_k, own.window_influence, 0.5)
    rig.show(2)
    rig.state("TRACKING")


def test_the_template_update_is_live(rig: Rig) -> None:
    """The default model renews its template; 1 switches that off, -1 back to what the manifest says."""
    tracker: list[Any] = []
    rig.worker.configure(tracker.append)
    for asked, then in ((1.0, 1.0), (0.9, 0.9), (-1.0, None)):
        assert set_remotely(rig, update_min_score=asked)[0].successful
        assert rig.worker.settle()
        own = tracker[0].runner.bundle.manifest.update
        assert tracker[0].template_update == dataclasses.replace(own, min_score=own.min_score if then is None else then)


def test_a_model_that_keeps_its_template_takes_the_parameter(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(model="siamla-mobilenetv2", update_min_score=0.5)
    tracker: list[Any] = []
    rig.worker.configure(tracker.append)
    assert rig.worker.settle()
    assert tracker[0].template_update is None
    rig.follow(0, 1)


def test_the_size_of_a_clicked_box_is_live(rig: Rig) -> None:
    set_remotely(rig, init_point_size_px=30.0)
    rig.ask(Point(x=200.0, y=100.0), "image_mouse_left")
    rig.show(0)
    until(lambda: rig.received["roi"])
    assert (rig.received["roi"][0].width, rig.received["roi"][0].height) == (31, 31)  # 15 pixels round 200.5


def test_given_at_start_they_reach_the_tracker(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(penalty_k=0.3, size_rate=0.0)
    tracker: list[Any] = []
    rig.worker.configure(tracker.append)
    assert rig.worker.settle()
    assert (tracker[0].tracking.penalty_k, tracker[0].tracking.size_rate) == (0.3, 0.0)


def test_descriptors() -> None:
    node = ListeningTracker(namespace="/described")
    try:
        for parameter in PARAMETERS:
            descriptor = node.describe_parameter(parameter.name)
            assert descriptor.description and descriptor.read_only == (not parameter.live)
            assert node.get_parameter(parameter.name).value == parameter.default
            assert not refusal(parameter.name, parameter.default)
            if parameter.choices:
                assert all(choice in descriptor.additional_constraints for choice in parameter.choices)
            elif isinstance(parameter.default, (int, float)) and not isinstance(parameter.default, bool):
                assert descriptor.floating_point_range or descriptor.integer_range
    finally:
        node.destroy_node()


def test_descriptors_are_served(rig: Rig) -> None:
    client = rig.world.create_client(DescribeParameters, "siamtrack/describe_parameters")
    assert client.wait_for_service(30)
    future = client.call_async(DescribeParameters.Request(names=["timeout_s"]))
    until(future.done)
    (descriptor,) = future.result().descriptors
    assert descriptor.floating_point_range[0].from_value == 0.05
