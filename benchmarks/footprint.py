"""What a tracking process costs beside time: seconds to import, resident memory, in fresh processes.

    python -m benchmarks.footprint

Writes ``footprint.csv``: one row a repetition.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import command, write_csv

DEFAULT_OUT = Path("benchmarks/results")
CHILD = """
import json, sys, time
began = time.perf_counter()
from siamtrack import SiamTracker
imported = time.perf_counter() - began
import numpy as np
from siamtrack.benchmark import resident_memory_mib
frame = np.random.default_rng(0).integers(0, 256, (720, 1280, 3), dtype=np.uint8)
tracker = SiamTracker.from_pretrained(threads=2)
loaded = time.perf_counter() - began
tracker.init(frame, (600, 300, 80, 60))
for _ in range(100):
    tracker.update(frame)
print(json.dumps({"import_s": imported, "import_and_load_s": loaded, "resident_mib": resident_memory_mib()}))
assert "torch" not in sys.modules
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.footprint", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repetitions", type=int, default=5, help="fresh processes (default %(default)s)")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    options = parser.parse_args(arguments)
    rows = []
    for _ in range(options.repetitions):
        child = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
        rows.append(json.loads(child.stdout))
        print(rows[-1])
    write_csv(options.out / "footprint.csv", rows, command("benchmarks.footprint", arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
