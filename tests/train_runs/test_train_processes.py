"""Training in two processes, and on two machines."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from siamtrack.plain import to_plain
from tests.tiny_training import assert_same, read, tiny
from training.watch import CHECKOUT

pytestmark = pytest.mark.usefixtures("threads_as_before")


# Started by the next test, and once more by Lightning for the second process.
TWO_PROCESSES = """
import sys
from pathlib import Path
import torch
from training.module import SiameseModule
from training.objectives import SiamCAN
from training.recipe import load_recipe
from training.train import train
from training.objectives import SiamCAN

compute, begin, states = SiamCAN.__call__, SiameseModule.on_train_batch_start, []

def note(self, batch, batch_idx):
    begin(self, batch, batch_idx)
    self.noted = states
    states.append((self.global_rank, {n: v.clone() for n, v in self.net.state_dict().items()}))

def call(self, raw, batch, decoder):
    terms = compute(self, raw, batch, decoder)
    rank, _ = states[-1]
    return {**terms, "cls": terms["cls"] * float("nan")} if (rank, len(states)) == (1, 2) else terms

SiamCAN.__call__, SiameseModule.on_train_batch_start = call, note
recipe, data, out = (Path(v) for v in sys.argv[1:])
train(load_recipe(recipe), data, out, devices=2)
torch.save([state for _, state in states], out / f"rank{states[0][0]}.pt")
"""


@pytest.mark.parametrize("augment", ["cpu", "device"])
def test_a_batch_broken_in_one_process_stops_the_step_in_both(data: Path, tmp_path: Path, augment: str) -> None:
    recipe = tmp_path / "r.yaml"
    content = to_plain(tiny(augment, epochs=1, pairs_per_epoch=12, validation_pairs=0))
    content["optim"] |= {"optimiser": "sgd", "lr": 0.01, "ema": 0.0}
    recipe.write_text(json.dumps(content))
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    (tmp_path / "run").mkdir()
    subprocess.run(
        [sys.executable, str(script), str(recipe), str(data), str(tmp_path / "run")],
        check=True,
        timeout=300,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
    )
    ranks = [read(tmp_path / "run" / f"rank{rank}.pt") for rank in (0, 1)]
    weights = [
        [{n: v for n, v in state.items() if "running" not in n and "num_" not in n} for state in r] for r in ranks
    ]
    assert [len(r) for r in ranks] == [3, 3]
    for ours, theirs in zip(*weights, strict=True):
        assert_same(ours, theirs)  # the processes hold the same weights at every step
    first, second, third = ranks[0]
    assert not torch.equal(first["neck16.weight"], second["neck16.weight"])
    assert_same(second, third)  # the second step, broken in the other process, moved nothing
    assert_same(second, ranks[1][2])  # nor there; before each step statistics are those of process 0


def test_two_machines_train_as_one(data: Path, tmp_path: Path) -> None:
    """As torchrun starts it, a process on each. One has the validation pair with its target, one that without."""
    recipe, run = tmp_path / "r.yaml", tmp_path / "run"
    changes = {"epochs": 1, "pairs_per_epoch": 8, "validation_pairs": 2, "unfreeze_epoch": 0}
    content = to_plain(tiny(**changes))
    content["data"]["validation_videos"] = ["clip1", "clip2"]  # with two, a share of pairs is negative
    recipe.write_text(json.dumps(content))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    command += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
    script = ["-m", "training.train", str(recipe), "--data", str(data), "--out", str(run)]
    machines = [
        subprocess.Popen(
            [*command, "--node_rank", rank, *script],
            cwd=CHECKOUT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for rank in "01"
    ]
    try:
        said = [machine.communicate(timeout=240)[0] for machine in machines]
    except BaseException:
        for machine in machines:
            machine.terminate()  # torchrun ends its workers, which are in sessions of their own
        for machine in machines:
            print(machine.communicate(timeout=60)[0])
        raise
    assert [machine.returncode for machine in machines] == [0, 0], said
    (start,) = json.loads((run / "run.json").read_text())
    assert start["processes"] == 2
    (line,) = (json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines())
    assert line["step"] == 2 and {"val/iou", "val/score_seen", "val/score_absent"} <= line.keys()


def test_sigterm_ends_both_processes(data: Path, tmp_path: Path) -> None:
    """A scheduler asks the first one alone; none may be left waiting for the other."""
    recipe, run = tmp_path / "r.yaml", tmp_path / "run"
    recipe.write_text(json.dumps(to_plain(tiny(epochs=1000, validation_pairs=0))))
    command = [sys.executable, "-m", "training.train", str(recipe), "--data", str(data), "--out", str(run)]
    process = subprocess.Popen(
        [*command, "--devices", "2"],
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    ends = time.monotonic() + 120
    try:
        while not (run / "last.ckpt").exists():
            assert process.poll() is None and time.monotonic() < ends
            time.sleep(0.1)
        process.terminate()
        said, _ = process.communicate(timeout=60)  # all that was written, by both, until both have ended
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        print(process.communicate()[0])
        raise
    assert process.returncode == 1, said
    assert read(run / "last.ckpt")["global_step"] >= 2
