"""Cut the data of a recipe into shards: ``python -m training.prepare RECIPE --data DATA --out SHARDS``.

Train with ``--shards``, or name the folder as ``data.shards`` of the recipe: training reads a few large files instead
of millions of small ones, and decodes what pairs can need of an image instead of all of it, or with ``--raw`` nothing.
Started again, it checks each finished shard by its SHA-256 and goes on with those that are missing, damaged, or planned
otherwise.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import cv2
from tqdm import tqdm

from siamtrack.cluster import ray_cluster
from siamtrack.crop import context_size
from siamtrack.nets.build import build_model
from siamtrack.plain import to_plain
from training.collect import collect_raw
from training.loading import crop_shape
from training.recipe import Recipe, load_recipe
from training.shards import (
    OVERSAMPLING,
    RAW_PHOTO_PX,
    Piece,
    ShardJob,
    finished,
    reach_needed,
    write_manifest,
    write_shard,
)
from training.tracks import ImageRef, Sighting, Track

# For planning only: JPEG takes more than that, and raw pixels take 3, but windows reach over the edges of their images.
BYTES_PER_PIXEL, RAW_BYTES_PER_PIXEL = 0.12, 1.0


def prepare(
    recipe: Recipe,
    root: Path,
    out: Path,
    shard_mb: float = 50.0,
    processes: int = 1,
    cluster: str | None = None,
    quality: int | None = 95,
) -> tuple[int, int]:
    """Write all shards that are not there yet, then the manifest.

    Args:
        recipe: its `data` says what is cut; held-out videos are cut too.
        root: folder that its paths are relative to.
        out: folder of the shards, made when missing.
        shard_mb: about how large a shard gets; it is planned from boxes, before any image is opened.
        processes: on this machine.
        cluster: address of a Ray cluster (``ray://host:10001``, ``auto``), or "local" for one on this machine with
            `processes` cores. Data and `out` must lie at the same paths on every machine.
        quality: of JPEG, 1 to 100; None stores raw pixels.

    Returns:
        How many shards were written, and how many there are.

    Raises:
        ValueError: the data cannot be read, or there is none.
        ImportError: a cluster is wanted and Ray is not installed.
    """
    root = root.resolve()  # jobs run in other folders, and a shard's plan must not depend on how it was written
    videos, stills, photos = collect_raw(recipe.data, root)
    if not photos and {"cutout", "region"} & {kind for kind, share in recipe.data.pairs.mix.items() if share > 0}:
        photos = sorted({t.sightings[0].image for t in stills})
    tracks, kinds = [*videos, *stills], ["video"] * len(videos) + ["still"] * len(stills)
    out.mkdir(parents=True, exist_ok=True)
    jobs = plan(recipe, tracks, kinds, photos, out.resolve(), shard_mb, quality)
    if not jobs:
        raise ValueError("the recipe names no data: give it `data.sets`, `data.videos`, `data.stills` or `data.photos`")
    with tqdm(total=len(jobs), unit="shard", desc="checking") as bar:
        waiting = []
        for job in jobs:
            if finished(job) is None:
                waiting.append(job)
            else:
                bar.update()
        bar.set_description("cutting")
        for _ in run_jobs(waiting, processes, cluster):
            bar.update()
    write_manifest(out, jobs, tracks, kinds, to_plain(recipe.data))
    return len(waiting), len(jobs)


def plan(
    recipe: Recipe,
    tracks: Sequence[Track],
    kinds: Sequence[str],
    photos: Sequence[ImageRef],
    out: Path,
    shard_mb: float,
    quality: int | None,
) -> list[ShardJob]:
    """All shards in order. What is in which depends on boxes alone, so that a second start plans the same."""
    shape = crop_shape(build_model(recipe.model, recipe.model_config))
    pairs = recipe.data.pairs
    reach = reach_needed(pairs.template, pairs.search, shape.template_px, shape.search_px)
    jobs: list[ShardJob] = []
    pieces: list[Piece] = []
    first, size = 0, 0.0
    raw = quality is None
    bytes_per_pixel, photo_limit = (RAW_BYTES_PER_PIXEL, 5.0 * RAW_PHOTO_PX**2) if raw else (BYTES_PER_PIXEL, math.inf)
    for piece, pixels in _pieces(tracks, kinds, photos, reach, OVERSAMPLING * shape.template_px, photo_limit):
        if pieces and size + pixels * bytes_per_pixel > shard_mb * 1e6:
            jobs.append(ShardJob(out, len(jobs), first, tuple(pieces), reach, shape.template_px, quality))
            first, pieces, size = first + len(pieces), [], 0.0
        pieces.append(piece)
        size += pixels * bytes_per_pixel
    if pieces:
        jobs.append(ShardJob(out, len(jobs), first, tuple(pieces), reach, shape.template_px, quality))
    return jobs


def _pieces(
    tracks: Sequence[Track],
    kinds: Sequence[str],
    photos: Sequence[ImageRef],
    reach: float,
    context_limit_px: float,
    photo_limit_px: float,
) -> Iterator[tuple[Piece, float]]:
    """All samples to store, each with about how many pixels it has."""
    for number, (track, kind) in enumerate(zip(tracks, kinds, strict=True)):
        for seen, frame in zip(track.sightings, track.frames, strict=True):
            context = min(context_size(*seen.box_xywh[2:]), context_limit_px)
            yield Piece(number, int(frame), seen, kind == "video"), (2 * reach * context) ** 2
    for number, photo in enumerate(photos):
        pixels = min(Path(str(photo)).stat().st_size / BYTES_PER_PIXEL, photo_limit_px)
        yield Piece(-1, number, Sighting(photo, (0.0, 0.0, 0.0, 0.0)), False), pixels


def run_jobs(jobs: Sequence[ShardJob], processes: int = 1, cluster: str | None = None) -> Iterator[int]:
    """Write shards, and give the number of each that is done. Raises as `prepare`."""
    if cluster is not None:
        yield from _on_ray(jobs, processes, cluster)
    elif processes == 1:
        yield from map(_run, jobs)
    else:
        # Not by fork: PyTorch is loaded, and its threads do not survive one.
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            futures = [pool.submit(_run, job) for job in jobs]
            try:
                for future in as_completed(futures):
                    yield future.result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


def _run(job: ShardJob) -> int:
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        write_shard(job)
    finally:
        cv2.setNumThreads(threads)
    return job.number


def _on_ray(jobs: Sequence[ShardJob], processes: int, address: str) -> Iterator[int]:
    with ray_cluster(address, processes, ("training", "siamtrack")) as ray:
        # `write_shard`, not `_run`: what a worker imports then needs neither PyTorch nor Lightning.
        write = ray.remote(write_shard)
        waiting = {write.options(num_cpus=1).remote(job): job.number for job in jobs}
        while waiting:
            done, _ = ray.wait(list(waiting))
            ray.get(done[0])
            yield waiting.pop(done[0])


def main(arguments: list[str] | None = None) -> int:
    """Command line entry; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m training.prepare", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("recipe", type=Path, help="YAML file, see training/recipes/")
    parser.add_argument("--data", type=Path, required=True, help="folder the recipe's data paths are relative to")
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--shard-mb", type=float, default=50.0, help="about how large a shard gets (default 50)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="default: one a core")
    parser.add_argument(
        "--cluster", help="cut on a Ray cluster: its address, such as ray://host:10001, or `local` for one made here"
    )
    pixels = parser.add_mutually_exclusive_group()
    pixels.add_argument("--quality", type=int, default=95, help="of JPEG, 1 to 100 (default 95)")
    pixels.add_argument(
        "--raw", action="store_true", help="raw pixels in place of JPEG: nothing to decode, about eight times the disk"
    )
    options = parser.parse_args(arguments)
    try:
        if options.processes < 1 or not options.shard_mb > 0 or not 1 <= options.quality <= 100:
            raise ValueError("--processes must be at least 1, --shard-mb above 0, --quality 1 to 100")
        recipe = load_recipe(options.recipe)
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, shards=""))
        quality = None if options.raw else options.quality
        written, count = prepare(
            recipe, options.data, options.out, options.shard_mb, options.processes, options.cluster, quality
        )
    except (ValueError, FileNotFoundError, ImportError, ConnectionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{count} shards in {options.out}, {written} of them written now")
    return 0


if __name__ == "__main__":
    sys.exit(main())
