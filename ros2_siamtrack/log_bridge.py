"""What the library logs on a tracker's thread, in the node's log."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

LIBRARY = "siamtrack"


class LogBridge(logging.Handler):
    """Hands warnings and errors of one thread on to a node.

    Args:
        logger: gives the node's logger.
    """

    def __init__(self, logger: Callable[[], Any]) -> None:
        super().__init__(logging.WARNING)
        self._logger = logger
        self._thread = 0

    def open(self) -> None:
        """Hand on what the calling thread logs from now on."""
        self._thread = threading.get_ident()
        logging.getLogger(LIBRARY).addHandler(self)

    def close(self) -> None:
        """Hand on nothing any more; safe to call twice."""
        logging.getLogger(LIBRARY).removeHandler(self)
        super().close()

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        if record.thread != self._thread:
            return
        if record.levelno >= logging.ERROR:
            self._logger().error(record.getMessage())
        else:  # a line of its own: rclpy refuses two severities from one
            self._logger().warning(record.getMessage())
