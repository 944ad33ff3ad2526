"""The node's parameters: one table, with descriptions, ranges and defaults."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor

from siamtrack.bundle import TrackingSpec, UpdateSpec
from siamtrack.engine_files import DEFAULT_PRECISION
from siamtrack.engines import BUILD_POLICIES
from siamtrack.runners import BACKENDS, PRECISION_CHOICES, EngineOptions
from siamtrack.tracker import SiamTracker

FROM_MODEL = -1.0
UPDATE_PARAMETERS = {"update_min_score": "min_score"}  # by their names in the manifest's `update`
TRACKING_PARAMETERS = (
    "penalty_k",
    "window_influence",
    "size_rate",
    "uncertain_rate",
    "motion_rate",
    "second_look",
    *UPDATE_PARAMETERS,
)


@dataclass(frozen=True)
class Parameter:
    """One parameter.

    Attributes:
        name: as in YAML and ``ros2 param set``.
        default: value and type.
        description: what it does, with unit.
        live: may change while the node runs; structural ones are read-only.
        bounds: smallest and largest allowed number.
        choices: allowed texts.
    """

    name: str
    default: Any
    description: str
    live: bool = False
    bounds: tuple[float, float] | None = None
    choices: tuple[str, ...] = ()

    def descriptor(self) -> ParameterDescriptor:
        """As ROS wants it."""
        descriptor = ParameterDescriptor(description=self.description, read_only=not self.live)
        if self.choices:
            descriptor.additional_constraints = "one of: " + ", ".join(self.choices)
        if self.bounds and isinstance(self.default, float):
            low, high = self.bounds
            descriptor.floating_point_range = [FloatingPointRange(from_value=low, to_value=high)]
        elif self.bounds:
            low, high = self.bounds
            descriptor.integer_range = [IntegerRange(from_value=int(low), to_value=int(high), step=1)]
        return descriptor


PARAMETERS = (
    Parameter("autostart", True, "configure and activate at start; false leaves it to a lifecycle manager"),
    Parameter("model", "", "shipped model name or bundle folder; empty for the default model"),
    Parameter(
        "backend",
        BACKENDS[0],
        "what runs the model; tensorrt needs an NVIDIA GPU and refuses without; auto: tensorrt where it can, else "
        "onnxruntime with a warning",
        choices=BACKENDS,
    ),
    Parameter("threads", 0, "CPU threads of the model; 0 for the cores, up to 4", bounds=(0, 256)),
    Parameter(
        "precision",
        PRECISION_CHOICES[0],
        f"what the model computes in; auto: {DEFAULT_PRECISION} with tensorrt; with onnxruntime int8 where bundle and "
        "CPU have it, else fp32",
        choices=PRECISION_CHOICES,
    ),
    Parameter(
        "build_engines",
        "never",
        "never: missing or unfit engines are refused; auto: they are built while configuring, which takes minutes",
        choices=BUILD_POLICIES,
    ),
    Parameter(
        "engine_key_file", "", "key that TensorRT's engines must be signed with; empty: unsigned ones are taken too"
    ),
    Parameter(
        "image_transport", "raw", "raw: topic image; compressed: topic image/compressed", choices=("raw", "compressed")
    ),
    Parameter(
        "processing",
        "newest",
        "newest: always the latest frame, older ones are dropped; every: each frame in order, for bag replay",
        choices=("newest", "every"),
    ),
    Parameter("buffer_s", 2.0, "how far back a stamped box may lie, seconds", bounds=(0.0, 60.0)),
    Parameter("buffer_mb", 256.0, "memory for that, megabytes", bounds=(1.0, 16384.0)),
    Parameter("init_point_size_px", 64.0, "side of the box a clicked point starts", live=True, bounds=(2.0, 4096.0)),
    Parameter(
        "timeout_s", 1.0, "no image for this long: target LOST, diagnostics ERROR", live=True, bounds=(0.05, 3600.0)
    ),
    Parameter("debug_image_hz", 10.0, "rate limit of debug_image/compressed", live=True, bounds=(0.1, 1000.0)),
    Parameter(
        "penalty_k", FROM_MODEL, "size-change penalty; -1: as the model says", live=True, bounds=(FROM_MODEL, 10.0)
    ),
    Parameter(
        "window_influence",
        FROM_MODEL,
        "cosine window weight; -1: as the model says",
        live=True,
        bounds=(FROM_MODEL, 1.0),
    ),
    Parameter(
        "size_rate", FROM_MODEL, "how fast the size follows; -1: as the model says", live=True, bounds=(FROM_MODEL, 1.0)
    ),
    Parameter(
        "uncertain_rate",
        FROM_MODEL,
        "factor on size_rate while UNCERTAIN; 1 for none; -1: as the model says",
        live=True,
        bounds=(FROM_MODEL, 1.0),
    ),
    Parameter(
        "motion_rate",
        FROM_MODEL,
        "how fast the velocity follows that the search leads by; 0 for none; -1: as the model says",
        live=True,
        bounds=(FROM_MODEL, 1.0),
    ),
    Parameter(
        "second_look",
        FROM_MODEL,
        "after a weak frame also search where the target was last seen, in a window of so many ordinary widths, 1 to "
        "2, which takes longer; 0 for never; -1: as the model says. Without effect where its lost_windows is 1",
        live=True,
        bounds=(FROM_MODEL, 2.0),
    ),
    Parameter(
        "update_min_score",
        FROM_MODEL,
        "score above which a frame may renew the template; 1 for never; -1: as the model says, which may be never",
        live=True,
        bounds=(FROM_MODEL, 1.0),
    ),
)


def refusal(name: str, value: Any) -> str:
    """Why a value cannot be, beyond what descriptors check; "" when it can."""
    known = {p.name: p for p in PARAMETERS}
    if name not in known:
        return ""
    if known[name].choices and value not in known[name].choices:
        return f"{name} must be one of {', '.join(known[name].choices)}, got {value!r}"
    if name == "engine_key_file" and value and not Path(value).is_file():
        return f"engine_key_file must be a file, or empty for engines without a signature; there is no file {value!r}"
    if name in TRACKING_PARAMETERS and FROM_MODEL < value < 0:
        return f"{name} must be at least 0, or {FROM_MODEL:g} for the model's own value, got {value:g}"
    if name == "second_look" and 0 < value < 1:
        return f"second_look must be at least 1, 0 for none, or {FROM_MODEL:g} for the model's own value, got {value:g}"
    return ""


def engine_options(build_engines: str, engine_key_file: str) -> EngineOptions:
    """What the parameters of the same names ask of TensorRT."""
    key_file = Path(engine_key_file) if engine_key_file else None
    return EngineOptions(key_file=key_file, build=build_engines)


def tune(tracker: SiamTracker, values: dict[str, float]) -> None:
    """Set some of `TRACKING_PARAMETERS`; `FROM_MODEL` stands for the model's own value.

    A model that keeps its first template keeps it, whatever its update parameters are set to.
    """
    manifest = tracker.runner.bundle.manifest
    update = {UPDATE_PARAMETERS[name]: value for name, value in values.items() if name in UPDATE_PARAMETERS}
    tracking = {name: value for name, value in values.items() if name not in UPDATE_PARAMETERS}
    tracker.tracking = replace(tracker.tracking, **_chosen(manifest.tracking, tracking))
    if manifest.update is not None and tracker.template_update is not None:
        tracker.template_update = replace(tracker.template_update, **_chosen(manifest.update, update))


def _chosen(own: TrackingSpec | UpdateSpec, values: dict[str, float]) -> dict[str, Any]:
    return {name: getattr(own, name) if value == FROM_MODEL else value for name, value in values.items()}
