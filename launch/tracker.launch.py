"""Starts a tracker: ``ros2 launch siamtrack tracker.launch.py image:=/camera/image_raw``.

Arguments left empty stay as the parameter file has them. The node configures and activates itself, so it is started as
a plain node; with ``autostart:=false`` a lifecycle manager does that.
"""

from pathlib import Path

from ament_index_python.packages import get_package_share_directory
from launch.actions import DeclareLaunchArgument, OpaqueFunction
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

from launch import LaunchContext, LaunchDescription

RESPAWN_DELAY_S = 1.0
TEXTS = ("model", "backend", "precision", "build_engines", "engine_key_file")
TRUTHS = ("use_sim_time", "autostart")


def generate_launch_description() -> LaunchDescription:
    params_file = str(Path(get_package_share_directory("siamtrack")) / "config" / "tracker.yaml")
    truth = {"choices": ["true", "false"]}
    unset_or_truth = {"choices": ["", "true", "false"]}
    return LaunchDescription(
        [
            DeclareLaunchArgument("namespace", default_value="", description="of the node and its relative topics"),
            DeclareLaunchArgument("image", default_value="image", description="image topic, without /compressed"),
            DeclareLaunchArgument("camera_info", default_value="camera_info", description="calibration topic"),
            DeclareLaunchArgument("model", default_value="", description="shipped model or bundle folder"),
            DeclareLaunchArgument(
                "backend", default_value="", description="what runs the model: onnxruntime, tensorrt or auto"
            ),
            DeclareLaunchArgument(
                "precision", default_value="", description="what the model computes in: auto, fp32, fp16 or int8"
            ),
            DeclareLaunchArgument("build_engines", default_value="", description="never, or auto: while configuring"),
            DeclareLaunchArgument("engine_key_file", default_value="", description="key that engines are signed with"),
            DeclareLaunchArgument("params_file", default_value=params_file, description="parameters, YAML"),
            DeclareLaunchArgument("use_sim_time", default_value="", description="follow /clock", **unset_or_truth),
            DeclareLaunchArgument("autostart", default_value="", description="become active alone", **unset_or_truth),
            DeclareLaunchArgument("respawn", default_value="false", description="start again when it ends", **truth),
            DeclareLaunchArgument("log_level", default_value="info", description="debug, info, warn, error or fatal"),
            OpaqueFunction(function=tracker),
        ]
    )


def tracker(context: LaunchContext) -> list[Node]:
    def value(name: str) -> str:
        return LaunchConfiguration(name).perform(context)

    # As text whatever it looks like: a model named 2026 is no number.
    chosen = {name: ParameterValue(value(name), value_type=str) for name in TEXTS if value(name)}
    chosen |= {name: value(name) == "true" for name in TRUTHS if value(name)}
    return [
        Node(
            package="siamtrack",
            executable="tracker_node",
            name="siamtrack",  # `chosen` is then written for it by name, and overrides any section of the file
            namespace=value("namespace"),
            parameters=[value("params_file"), *([chosen] if chosen else [])],
            remappings=[
                ("image", value("image")),
                ("image/compressed", value("image") + "/compressed"),
                ("camera_info", value("camera_info")),
            ],
            ros_arguments=["--log-level", value("log_level")],
            respawn=value("respawn") == "true",
            respawn_delay=RESPAWN_DELAY_S,
            output="screen",
        )
    ]
