"""Work on a Ray cluster, for the tools that spread theirs. Ray is optional and loaded here only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LOCAL_CLUSTER = "local"
CHECKOUT = Path(__file__).resolve().parents[1]


@contextmanager
def ray_cluster(address: str, processes: int, packages: Sequence[str]) -> Iterator[Any]:
    """The module `ray`, connected; disconnected at the end.

    Args:
        address: ``ray://HOST:PORT``, ``HOST:PORT``, ``auto``, or `LOCAL_CLUSTER` for one that lives here meanwhile.
        processes: cores of the local cluster.
        packages: top folders of the checkout that a remote cluster's workers need.

    Raises:
        ImportError: Ray is not installed; the message says how to.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError(f"--cluster needs Ray: pip install 'siamtrack[cluster]' ({error})") from error
    # Ray prints much; what went wrong comes back with the result.
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == LOCAL_CLUSTER:
        ray.init(address=LOCAL_CLUSTER, num_cpus=processes, include_dashboard=False, **quiet)
    else:
        folders = [str(CHECKOUT / name) for name in packages]
        ray.init(address=address, runtime_env={"py_modules": folders}, **quiet)
    try:
        yield ray
    finally:
        ray.shutdown()
