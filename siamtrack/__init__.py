"""Follow one chosen object in a camera stream.

>>> from siamtrack import SiamTracker
>>> tracker = SiamTracker.from_pretrained()
>>> tracker.init(frame_bgr, (x, y, w, h))
>>> track = tracker.update(next_frame_bgr)
"""

from __future__ import annotations

from siamtrack.bundle import Bundle, BundleError, load_bundle
from siamtrack.state import State
from siamtrack.tracker import SiamTracker, Track
from siamtrack.version import __version__

__all__ = ["Bundle", "BundleError", "SiamTracker", "State", "Track", "__version__", "load_bundle"]
