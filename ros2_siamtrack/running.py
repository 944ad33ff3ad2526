"""How a node's process begins and ends, once for all nodes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import rclpy
from rclpy.exceptions import ParameterException
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode
from rclpy.node import Node

N = TypeVar("N", bound=Node)

GIL_SWITCH_S = 1e-4  # Python's 5 ms lets the executor keep a frame from the thread that waits for it


def run_node(name: str, make: Callable[[], N], work: Callable[[N], None], arguments: list[str] | None = None) -> int:
    """Make a node, let it work, and clean up whatever happens.

    Args:
        name: in the log, for errors before the node exists.
        make: the node.
        work: returns when the node is done; `spin` for one that serves until it is stopped.
        arguments: of the command line; None for this process's own.

    Returns:
        Exit status: 0, also when stopped by a signal; 2 when a parameter or argument cannot be used.
    """
    sys.setswitchinterval(GIL_SWITCH_S)
    rclpy.init(args=arguments)
    node: N | None = None
    try:
        node = make()
        work(node)
    except (ValueError, ParameterException) as error:
        rclpy.logging.get_logger(name).error(str(error))
        return 2
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    except RuntimeError:  # rclpy's of a context that a signal ended between its look and its use
        if rclpy.ok():
            raise
    finally:
        if node is not None:
            node.destroy_node()
        rclpy.try_shutdown()
    return 0


def refuse_invalid_transitions(node: LifecycleNode) -> None:
    """Answer a transition that is not valid now with ``success: false``.

    rclpy of Humble and Jazzy raises in the executor instead, which would end the node (ros2/rclpy#1209).
    """
    change = node._service_change_state.callback

    def answer(request: Any, response: Any) -> Any:
        try:
            return change(request, response)
        except RuntimeError as error:
            if not node.context.ok():
                raise
            node.get_logger().warning(f"transition refused: {error}")
            response.success = False
            return response

    node._service_change_state.callback = answer


def spin(node: Node) -> None:
    """Serve callbacks until the process is stopped."""
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    executor.spin()
