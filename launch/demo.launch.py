"""Plays a clip, tracks in it and records: ``ros2 launch siamtrack demo.launch.py``; ends with the clip.

The picture with the box is on ``/demo/siamtrack/debug_image/compressed``; ``view:=true`` shows it, where rqt_image_view
is installed. Another clip: ``source:=clip.mp4 init:=298,160,48,80``.
"""

from pathlib import Path

from ament_index_python.packages import get_package_share_directory
from launch.actions import DeclareLaunchArgument, EmitEvent, IncludeLaunchDescription, RegisterEventHandler
from launch.conditions import IfCondition
from launch.event_handlers import OnProcessExit
from launch.events import Shutdown
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration, PythonExpression
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

from launch import LaunchDescription


def text(name: str) -> ParameterValue:
    return ParameterValue(LaunchConfiguration(name), value_type=str)


def generate_launch_description() -> LaunchDescription:
    namespace, source, record = (LaunchConfiguration(name) for name in ("namespace", "source", "record"))
    # Only the rendered scene has a truth to record.
    truth = PythonExpression(["'clip_player/truth' if '", source, "' == 'scene' else ''"])
    clip = Node(
        package="siamtrack",
        executable="clip_player",
        namespace=namespace,
        parameters=[
            {
                "source": text("source"),
                "init": text("init"),
                "rate_hz": ParameterValue(LaunchConfiguration("rate_hz"), value_type=float),
                "loop": ParameterValue(LaunchConfiguration("loop"), value_type=bool),
                "wait_for": 1,
            }
        ],
        output="screen",
    )
    tracker_file = Path(get_package_share_directory("siamtrack")) / "launch" / "tracker.launch.py"
    return LaunchDescription(
        [
            DeclareLaunchArgument("namespace", default_value="demo", description="of all nodes"),
            DeclareLaunchArgument(
                "source", default_value="scene", description="video, image folder or glob; scene: the rendered clip"
            ),
            DeclareLaunchArgument("init", default_value="truth", description="X,Y,W,H; truth: the rendered clip's own"),
            DeclareLaunchArgument("rate_hz", default_value="30.0", description="frames a second"),
            DeclareLaunchArgument("loop", default_value="false", description="start over", choices=["true", "false"]),
            DeclareLaunchArgument("record", default_value="", description="CSV file for boxes; empty: none"),
            DeclareLaunchArgument(
                "view",
                default_value="false",
                description="show it; if it stays empty, refresh the topics",
                choices=["true", "false"],
            ),
            IncludeLaunchDescription(
                PythonLaunchDescriptionSource(str(tracker_file)),
                # Its other arguments (model, backend, ...) may be given to this file too.
                launch_arguments={"namespace": namespace}.items(),
            ),
            Node(
                package="siamtrack",
                executable="record_boxes",
                namespace=namespace,
                parameters=[{"file": text("record"), "truth": ParameterValue(truth, value_type=str)}],
                condition=IfCondition(PythonExpression(["'", record, "' != ''"])),
                output="screen",
            ),
            Node(
                package="rqt_image_view",
                executable="rqt_image_view",
                arguments=[["/", namespace, "/siamtrack/debug_image/compressed"]],
                condition=IfCondition(LaunchConfiguration("view")),
            ),
            clip,
            RegisterEventHandler(
                OnProcessExit(target_action=clip, on_exit=[EmitEvent(event=Shutdown(reason="the clip has ended"))])
            ),
        ]
    )
