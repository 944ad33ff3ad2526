"""How further processes are started. Imports nothing heavy, so that they can be started before anything is loaded."""

from __future__ import annotations

import multiprocessing
from typing import Any

PRELOAD = ["__main__", "evaluation.parallel", "onnxruntime"]


def context() -> Any:
    """Fresh processes, not copies of this one: it may hold threads of ONNX Runtime, which do not survive a fork."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    chosen = multiprocessing.get_context("forkserver")
    chosen.set_forkserver_preload(PRELOAD)
    return chosen


def warm_up() -> None:
    """Have what the processes need loaded in the background, where the system can."""
    if "forkserver" in multiprocessing.get_all_start_methods():
        from multiprocessing import forkserver

        context()
        forkserver.ensure_running()
