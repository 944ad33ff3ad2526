"""A rendered drone clip with exact ground truth: a red rover among look-alikes, under trees and under a highway.

Tests, `siamtrack demo` and the ROS clip player use it, so none of them needs a download. Everything still (ground,
roads, roofs, trees) is painted once on a plane; a frame is that plane seen through a moving camera, with vehicles
stamped on it at sub-pixel positions. Every motion is a closed formula of time, so frames come in any order and one seed
always gives the same pixels.

Lengths are in units: one unit is one pixel of a 1280 x 720 image at zoom 1. Other image sizes scale the whole picture.
Coordinates are continuous (see `siamtrack.boxes`).
"""

from __future__ import annotations

from siamtrack.scene.render import Scene, SceneFrame

__all__ = ["Scene", "SceneFrame"]
