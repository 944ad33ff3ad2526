"""The child process of `siamtrack.engines.trial_load`: deserialise engines, and perhaps die of it."""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from pathlib import Path


def main(order: str) -> None:
    """What the child process of `trial_load` does: hash, deserialise, make a context; exits non-zero with a reason."""
    wanted = json.loads(order)
    trt = importlib.import_module(wanted["module"])
    runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
    for file, digest in wanted["files"].items():
        content = Path(file).read_bytes()
        if hashlib.sha256(content).hexdigest() != digest:
            sys.exit(f"{file}: changed since it was checked")
        engine = runtime.deserialize_cuda_engine(content)
        if engine is None:
            sys.exit(f"{file}: TensorRT {trt.__version__} does not deserialise it")
        # As the runner does it, which brings the scratch memory itself: an engine may be built to insist on that.
        if engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED) is None:
            sys.exit(f"{file}: no execution context, perhaps for want of GPU memory")


if __name__ == "__main__":
    main(sys.stdin.read())
