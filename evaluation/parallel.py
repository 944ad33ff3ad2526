"""Many sequences at once: in this process, in several, or on a Ray cluster.

A sequence is the smallest piece of work, because a one-pass run cannot be cut. Every process keeps to the threads of
its tracker (one, by default) and to one for OpenCV, so that processes do not take each other's cores.
"""

from __future__ import annotations

import concurrent.futures
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2

from evaluation.layouts import SequenceRef
from evaluation.onepass import Result, run_ope
from evaluation.processes import context
from evaluation.sequences import Sequence as ImageSequence
from evaluation.trackers import TrackerSpec, make_tracker
from siamtrack.cluster import ray_cluster


@dataclass(frozen=True)
class Job:
    """One tracker on one sequence; `frames` is how long it is, for the order of work and the progress bar."""

    spec: TrackerSpec
    ref: SequenceRef
    frames: int


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of a job: a sequence and its result, or what went wrong."""

    job: Job
    sequence: ImageSequence | None = None
    result: Result | None = None
    error: str = ""


def run_job(job: Job) -> Outcome:
    """Do a job; never raises, since one bad sequence must not end the others."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        sequence = job.ref.load()
        return Outcome(job, sequence, run_ope(lambda: make_tracker(job.spec), sequence))
    except Exception as error:
        return Outcome(job, error=f"{type(error).__name__}: {error}")
    finally:
        cv2.setNumThreads(threads)


def run_jobs(jobs: Sequence[Job], processes: int = 1, cluster: str | None = None) -> Iterator[Outcome]:
    """Do jobs and give each outcome as it comes.

    Args:
        jobs: what to do, in any order.
        processes: processes on this machine; 1 works in this one.
        cluster: address of a Ray cluster (``ray://host:10001``, ``host:6379``, ``auto``), or "local" for one on this
            machine with `processes` cores that ends with the run. Sequences and bundles must lie at the same paths on
            every machine; the code is sent along.

    Raises:
        ImportError: a cluster is wanted and Ray is not installed.
        ConnectionError: there is no cluster at that address.
    """
    if cluster is not None:
        yield from _on_ray(schedule(jobs, processes), processes, cluster)
    elif processes == 1:
        yield from map(run_job, jobs)
    else:
        with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context()) as pool:
            futures = [pool.submit(run_job, job) for job in schedule(jobs, processes)]
            try:
                for future in concurrent.futures.as_completed(futures):
                    yield future.result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


def schedule(jobs: Sequence[Job], processes: int) -> list[Job]:
    """The order in which jobs are best handed out to processes that each take the next one when they are free.

    Longest first, then jobs are exchanged as long as that lets the last process end earlier: seven sequences on two
    processes would otherwise leave one of them idle for a while.
    """
    order = sorted(jobs, key=lambda job: (-job.frames, job.spec.name, job.ref.name))
    if len(order) > 60:  # with so many, the last one's length hardly matters
        return order
    best = _finish(order, processes)
    improved = True
    while improved:
        improved = False
        for i in range(len(order)):
            for j in range(i + 1, len(order)):
                order[i], order[j] = order[j], order[i]
                finish = _finish(order, processes)
                if finish < best:
                    best, improved = finish, True
                else:
                    order[i], order[j] = order[j], order[i]
    return order


def _finish(jobs: Sequence[Job], processes: int) -> int:
    """Frames that the busiest process plays."""
    loads = [0] * processes
    for job in jobs:
        heapq.heapreplace(loads, loads[0] + job.frames)
    return max(loads)


def _on_ray(jobs: Sequence[Job], processes: int, address: str) -> Iterator[Outcome]:
    with ray_cluster(address, processes, ("evaluation", "siamtrack")) as ray:
        waiting = [ray.remote(run_job).options(num_cpus=job.spec.threads).remote(job) for job in jobs]
        while waiting:
            done, waiting = ray.wait(waiting)
            yield ray.get(done[0])
