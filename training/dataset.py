"""Pairs as a PyTorch data set: labelled arrays, and which process sees which.

Sample ``i`` of a run depends on the run's seed and ``i`` alone, so a resumed run sees exactly the pairs it would have
seen, with any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, Sampler

from training.checks import not_negative, one_of
from training.device_augment import as_arrays
from training.labels import RULES, Cells, Labels, at_border, dastsiam_labels, foreign_labels, nearest_candidate, sample
from training.pairs import Pair, PairSampler

Rng = np.random.Generator
Sample = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class LabelConfig:
    """How cells are labelled.

    Attributes:
        rule: key of `training.labels.RULES`; empty for the objective's own.
        nearest: also make the cell nearest to the centre a target; on a coarse grid a small box has none otherwise.
        distance: of the rule dastsiam: squared radius of the target's region, in cells.
        positives: target cells kept of a pair, at random; with `negatives` also 0, all are kept.
        negatives: background cells kept of a pair, at random.
        foreign: background cells kept of a negative pair, from where the foreign target is (`foreign_labels`); 0 takes
            them from the whole map, `negatives` of them.
        border: rows and columns at the edge of the map that are ignored; 1 makes SiamFC's 17x17 map that of its 239 px
            training crop.
    """

    rule: str = ""
    nearest: bool = False
    distance: float = 4.0
    positives: int = 0
    negatives: int = 0
    foreign: int = 0
    border: int = 0

    def __post_init__(self) -> None:
        one_of("rule", self.rule, ("", *RULES))
        not_negative(positives=self.positives, negatives=self.negatives)
        not_negative(foreign=self.foreign, border=self.border)
        if not self.distance > 0:
            raise ValueError(f"distance must be above 0, got {self.distance}")

    def label(self, cells: Cells, pair: Pair, rng: Rng) -> Labels:
        """Labels ``[M]`` of a pair.

        Raises:
            ValueError: the rule needs anchors, the network has none.
        """
        rule = partial(dastsiam_labels, distance=self.distance) if self.rule == "dastsiam" else RULES[self.rule]
        if not pair.positive and self.foreign:
            return sample(foreign_labels(cells, pair.box_cxcywh, rule), 0, self.foreign, rng)
        if pair.positive:
            labels = rule(cells, pair.box_cxcywh)
            if self.nearest:
                labels[nearest_candidate(cells, pair.box_cxcywh)] = 1
        else:
            labels = np.zeros(len(cells.points), np.int8)
        if self.border:
            labels[at_border(cells, self.border)] = -1
        if self.positives or self.negatives:
            labels = sample(labels, self.positives, self.negatives, rng)
        return labels


class PairDataset(Dataset[Sample]):
    """Sample ``i`` as arrays.

    Crops uint8 ``template``, ``search``, and ``history``, ``current`` where pairs have them; ``box`` f32 [4]; ``size``
    f32 [2] of the target in the template; ``labels`` int8 [M]; ``positive``; and the arrays of
    `training.device_augment` where light and noise are left to it.

    Args:
        sampler: draws the pairs.
        cells: where the network's M candidates stand.
        labels: labelling switches; the rule must be named.
        seed: of the whole run.
        length: samples in an epoch; any index may be asked for.
    """

    def __init__(self, sampler: PairSampler, cells: Cells, labels: LabelConfig, seed: int, length: int) -> None:
        one_of("rule", labels.rule, RULES)
        self.sampler, self.cells, self.labels, self.seed, self.length = sampler, cells, labels, seed, length

    def __len__(self) -> int:
        return self.length

    def __getitems__(self, indices: list[int]) -> list[Sample]:
        """A batch, on as many threads as a network has in this process: in a loader process on one."""
        threads = min(torch.get_num_threads(), len(indices))
        if threads == 1:
            return [self[index] for index in indices]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(self.__getitem__, indices))

    def __getitem__(self, index: int) -> Sample:
        rng = np.random.default_rng([self.seed, index])
        pair = self.sampler.draw(rng)
        crops = {"template": pair.template, "search": pair.search}
        if pair.history is not None and pair.current is not None:
            crops |= {"history": pair.history, "current": pair.current}
        return {
            **crops,
            "box": pair.box_cxcywh.astype(np.float32),
            "size": np.array(pair.size, np.float32),
            "labels": self.labels.label(self.cells, pair, rng),
            "positive": np.array(pair.positive),
            **as_arrays(pair.effects),
        }


class EpochSampler(Sampler[int]):
    """Indices ``epoch * length + rank, + world, ...``: every process its share, every epoch new samples.

    Args:
        length: samples in an epoch, over all processes.
        rank: number of this process.
        world: how many processes there are.
        batch_size: samples a step in each process; matters where a run resumes.
        steps_done: how many steps the run has made. They say more than the epoch, which a resumed run is told only
            after loader processes have drawn their first samples.
    """

    def __init__(
        self, length: int, rank: int = 0, world: int = 1, batch_size: int = 1, steps_done: Callable[[], int] = int
    ) -> None:
        self.length, self.rank, self.world, self.epoch = length, rank, world, 0
        self.batch_size, self.steps_done = batch_size, steps_done

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch, also after a resume."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length // self.world

    def __iter__(self) -> Iterator[int]:
        steps = max(len(self) // self.batch_size, 1)  # an epoch
        epoch, step = divmod(max(self.steps_done(), self.epoch * steps), steps)
        start, skipped = epoch * self.length, step * self.batch_size * self.world
        return iter(range(start + skipped + self.rank, start + len(self) * self.world, self.world))


def collate(samples: list[Sample]) -> dict[str, torch.Tensor]:
    """Stack samples into tensors."""
    return {key: torch.from_numpy(np.stack([s[key] for s in samples])) for key in samples[0]}
