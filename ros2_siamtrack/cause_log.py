"""Warnings, once for each cause: what goes wrong in a stream goes wrong thirty times a second."""

from __future__ import annotations

import re
import threading
import time
from typing import Any

QUIET_S = 5.0  # a cause that was quiet for so long is told again
CAUSES_KEPT = 100


class CauseLog:
    """Logs a warning once for as long as its cause goes on. Any thread may use it.

    Args:
        logger: of the node.
    """

    def __init__(self, logger: Any) -> None:
        self._logger = logger
        self._occurred_s: dict[str, float] = {}  # cause -> when last, oldest first
        self._lock = threading.Lock()

    def warn(self, text: str, cause: str = "") -> None:
        """Log a text, if its cause is news; without one that is the text itself, numbers and names aside."""
        if self.is_news(cause or re.sub(r"'[^']*'|\d+", "#", text)):
            self._logger.warning(text)

    def is_news(self, cause: str) -> bool:
        """Note that a cause occurs; True when it is new, or comes back after it was quiet for a while."""
        now_s = time.monotonic()
        with self._lock:
            before_s = self._occurred_s.pop(cause, -QUIET_S)
            self._occurred_s[cause] = now_s
            if len(self._occurred_s) > CAUSES_KEPT:
                del self._occurred_s[next(iter(self._occurred_s))]
        return now_s - before_s >= QUIET_S
