"""Learning from trained networks: the mean of their answers is what the student is told besides the truth.

Networks of one recipe and different seeds err differently, and their mean errs less than each of them. A student told
that mean takes most of it into a single network (Hinton et al., "Distilling the Knowledge in a Neural Network", 2015).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from siamtrack.nets.checkpoint import load_checkpoint
from siamtrack.nets.decode import Candidates, Decoder, learns_update, takes_size
from training.losses import diou_loss, soft_focal_loss


class Teachers:
    """Trained networks with the same candidates as the student; no part of its module, so in none of its checkpoints.

    The first stages of a backbone, which no run of a recipe has trained, are computed once for all of them, where the
    backbone says that they can be run alone (`siamtrack.nets.backbones.MobileNetV2`).

    Args:
        paths: checkpoints that `siamtrack.nets.checkpoint.load_checkpoint` reads.
        student: the network that will learn from them, not on a GPU yet, its frozen stages marked as such.

    Raises:
        ValueError: a checkpoint cannot be read, its network has other crops or candidates than the student, or the
            student has no candidates (SiamFC's response maps).
    """

    def __init__(self, paths: Sequence[Path], student: nn.Module) -> None:
        if not isinstance(student.decoder, Decoder):
            raise ValueError(f"{type(student).__name__} has no candidates to distil: leave `distil` out of the recipe")
        self.nets = [load_checkpoint(path).net for path in paths]
        for path, net in zip(paths, self.nets, strict=True):
            if _shape(net) != _shape(student):
                raise ValueError(f"teacher {path} does not fit: it has {_shape(net)}, the student {_shape(student)}")
            net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.trunk = nn.Sequential(*_take_shared_stages([student, *self.nets]))

    def __deepcopy__(self, memo: dict[int, Any]) -> Teachers:
        """Themselves: the average of a student's weights needs no teachers of its own."""
        return self

    def to(self, device: torch.device) -> None:
        """Move them to where the batches are."""
        for net in self.nets:
            net.to(device)

    @torch.no_grad()
    def __call__(self, crops: Mapping[str, Tensor], size: Tensor) -> Candidates:
        """The mean of their boxes and of their scores, candidate by candidate.

        Args:
            crops: by name, normalised, as the student takes them.
            size: ``[N, 2]`` of the targets in the template crops, for teachers that want to know.
        """
        features = {name: self.trunk(crop) for name, crop in crops.items()}
        given = [features | ({"size": size} if takes_size(net) else {}) for net in self.nets]
        answers = (candidates(net, net(**inputs)) for net, inputs in zip(self.nets, given, strict=True))
        boxes, scores = zip(*answers, strict=True)
        return Candidates(torch.stack(boxes).mean(dim=0), torch.stack(scores).mean(dim=0))


def candidates(net: nn.Module, raw: Any) -> Candidates:
    """Boxes and scores of a network's raw maps, in FP32: BF16 knows pixels above 128 only as whole ones."""
    with torch.autocast(raw[0].device.type, enabled=False):
        return cast(Decoder, net.decoder).candidates(in_full(raw))


def in_full(raw: Any) -> Any:
    """Raw maps of any kind in FP32."""
    return type(raw)(*(None if values is None else values.float() for values in raw))


def distil_terms(student: Candidates, teachers: Candidates) -> dict[str, Tensor]:
    """How far the student is from its teachers.

    "cls" is a focal loss with their scores as soft labels; "loc" the DIoU loss between the boxes, where each candidate
    counts by the teachers' score.
    """
    weight = teachers.scores
    loc = (weight * diou_loss(student.boxes, teachers.boxes)).sum() / weight.sum().clamp(min=1)
    return {"cls": soft_focal_loss(student.scores, teachers.scores), "loc": loc}


def _take_shared_stages(nets: Sequence[nn.Module]) -> list[nn.Module]:
    """The first stages of the student's backbone that are frozen, and the same in all teachers; cut out of these."""
    student, *teachers = [cast(Any, net).backbone for net in nets]
    names = {module: name for name, module in student.named_modules()}
    shared: list[nn.Module] = []
    for stages in zip(*(backbone.trainable_stages() for backbone in (student, *teachers)), strict=False):
        frozen = not any(parameter.requires_grad for parameter in stages[0].parameters())
        within = len(shared) < getattr(student, "in_a_row", 0)
        if not (within and frozen and all(_same(stages[0], stage) for stage in stages[1:])):
            break
        shared.append(stages[0])
        for backbone in teachers:
            backbone.set_submodule(names[stages[0]], nn.Identity())
    return shared


def _same(a: nn.Module, b: nn.Module) -> bool:
    """Equal but for rounding: a moving average of weights that never move drifts in the last digits."""
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.allclose(ours[n], theirs[n], rtol=1e-4, atol=0) for n in ours)


def _shape(net: nn.Module) -> str:
    """What must be the same of teacher and student, for people to read."""
    any_net, decoder = cast(Any, net), cast(Any, net.decoder)
    values = any_net.normalisation
    places = f"{getattr(decoder, 'anchors', 0)} x {decoder.grid.size} x {decoder.grid.size} candidates"
    templates = "three templates" if learns_update(net) else "one template"
    return (
        f"crops of {any_net.template_size} and {any_net.search_size} px less {values.mean} times {values.scale:.5f}, "
        f"{places} of stride {decoder.grid.stride} from {decoder.grid.origin} px, {templates}"
    )
