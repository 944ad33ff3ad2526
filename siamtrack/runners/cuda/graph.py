"""`CudaGraph`: work captured on a stream, through cuda-python: pycuda has no graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from siamtrack.runners.cuda.cuda_python_binding import call
from siamtrack.runners.cuda.device import CudaError


class CudaGraph:
    """See `Graph`. Holds the graph too: its first node, the upload, is found in it when the size changes.

    Args:
        driver: module ``cuda.bindings.driver``.
        graph: captured.
        stream: to launch it on.
        context: of the stream.

    Raises:
        CudaError: the graph does not begin with an upload, or cannot be launched.
    """

    def __init__(self, driver: Any, graph: Any, stream: Any, context: Any) -> None:
        self._driver, self._graph, self._stream, self._context = driver, graph, stream, context
        self.closed = False
        _, count = call(driver, driver.cuGraphGetRootNodes, graph, 0)
        roots, count = call(driver, driver.cuGraphGetRootNodes, graph, count)
        if count != 1:
            raise CudaError(f"the captured frame begins with {count} operations, expected one, the upload")
        self._upload = roots[0]
        kind = call(driver, driver.cuGraphNodeGetType, self._upload)
        if kind != driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_MEMCPY:
            raise CudaError(f"the captured frame begins with {kind}, expected the upload")
        self._copy = call(driver, driver.cuGraphMemcpyNodeGetParams, self._upload)
        self._executable = call(driver, driver.cuGraphInstantiate, graph, 0)
        try:
            self._resize(int(self._copy.WidthInBytes))  # refused now rather than in flight
        except BaseException:
            driver.cuGraphExecDestroy(self._executable)
            raise

    def launch(self, upload_bytes: int) -> None:
        if upload_bytes != self._size:
            self._resize(upload_bytes)
        call(self._driver, self._driver.cuGraphLaunch, self._executable, self._stream)

    def _resize(self, upload_bytes: int) -> None:
        """The one thing that differs between frames. One-dimensional copies may change their size so."""
        driver = self._driver
        self._copy.WidthInBytes = upload_bytes
        executable, upload = self._executable, self._upload
        call(driver, driver.cuGraphExecMemcpyNodeSetParams, executable, upload, self._copy, self._context)
        self._size = upload_bytes

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._driver.cuGraphExecDestroy(self._executable)
            self._driver.cuGraphDestroy(self._graph)


def capture(driver: Any, stream: Any, context: Any, work: Callable[[], None]) -> CudaGraph:
    """Record what `work` queues on a stream, without running it.

    Args:
        driver: module ``cuda.bindings.driver``.
        stream: ``CUstream``.
        context: ``CUcontext`` of the stream, current on this thread.
        work: queues on the stream, through whatever binding.

    Raises:
        CudaError: it cannot be captured. The stream is usable again.
    """
    # Thread-local: other threads, such as a camera driver's, may go on calling CUDA meanwhile.
    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    call(driver, driver.cuStreamBeginCapture, stream, mode)
    try:
        work()
    except BaseException:
        status, graph = driver.cuStreamEndCapture(stream)
        if int(status) == 0 and int(graph):
            driver.cuGraphDestroy(graph)
        raise
    graph = call(driver, driver.cuStreamEndCapture, stream)
    try:
        return CudaGraph(driver, graph, stream, context)
    except BaseException:
        driver.cuGraphDestroy(graph)
        raise
