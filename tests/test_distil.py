"""Learning from trained networks: what the teachers say, and how far a student is from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from golden_weights import draw
from torch import Tensor, nn

from siamtrack.nets.build import build_model
from siamtrack.nets.decode import Candidates
from siamtrack.plain import to_plain
from training.distil import Teachers, candidates, distil_terms
from training.losses import soft_focal_loss
from training.module import SiameseModule
from training.recipe import recipe_from_dict

MODEL = "siamcan-mobilenetv2"


def network(seed: int, model: str = MODEL, **config: Any) -> nn.Module:
    """Random weights, other ones for every seed, with which answers differ from place to place."""
    net = build_model(model, config).eval()
    net.load_state_dict({name: draw(f"{seed} {name}", value.shape) for name, value in net.state_dict().items()})
    return net


def recipe(**changes: Any) -> dict[str, Any]:
    """A recipe as a checkpoint keeps it."""
    content = {"model": MODEL, "objective_config": {"classification": "focal"}, "unfreeze_stages": 2}
    return to_plain(recipe_from_dict({**content, **changes}))


def save(net: nn.Module, path: Path, **changes: Any) -> Path:
    state = {f"net.{name}": value for name, value in net.state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": {"recipe": recipe(**changes)}}, path)
    return path


def crops(count: int = 2) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"template": torch.rand(count, 3, 127, 127) * 2 - 1, "search": torch.rand(count, 3, 209, 209) * 2 - 1}


def with_trunk_of(net: nn.Module, trunk: nn.Module, stages: int = 4) -> nn.Module:
    """The network with the first stages of another one's backbone."""
    for mine, other in zip(net.backbone.trainable_stages()[:stages], trunk.backbone.trainable_stages(), strict=False):  # type: ignore[operator, union-attr]
        mine.load_state_dict(other.state_dict())
    return net


def last_channels(net: nn.Module) -> nn.Module:
    """In the memory order of the teachers: another one rounds otherwise."""
    return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def freeze(net: nn.Module, stages: int) -> nn.Module:
    for stage in net.backbone.trainable_stages()[:stages]:  # type: ignore[operator, union-attr]
        stage.requires_grad_(False)
    return net


@pytest.mark.parametrize(("frozen", "same", "shared"), [(4, 4, 4), (6, 6, 4), (2, 4, 2), (6, 3, 3), (0, 4, 0)])
def test_teachers_answer_with_their_mean_whatever_they_share(
    tmp_path: Path, frozen: int, same: int, shared: int
) -> None:
    """What the student trains is computed by each of them, and what comes after the stage that is looked at twice."""
    student = freeze(last_channels(network(0)), frozen)
    nets = [with_trunk_of(network(seed), student, same) for seed in (1, 2, 3)]
    teachers = Teachers([save(net, tmp_path / f"{i}.ckpt") for i, net in enumerate(nets)], student)
    assert len(teachers.trunk) == shared
    batch = crops()
    with torch.no_grad():
        answers = [candidates(net, last_channels(net)(**batch)) for net in nets]
    said = teachers(batch, torch.full((2, 2), 60.0))
    for name in Candidates._fields:
        alone = torch.stack([getattr(answer, name) for answer in answers])
        assert alone.std(dim=0).max() > 1e-4, "teachers that agree show nothing"
        torch.testing.assert_close(getattr(said, name), alone.mean(dim=0), rtol=1e-4, atol=1e-4)


def test_teachers_are_told_the_size_if_they_ask(tmp_path: Path) -> None:
    nets = [network(1), network(2, takes_size=True)]
    configs: list[dict[str, Any]] = [{}, {"model_config": {"takes_size": True}}]
    paths = [save(net, tmp_path / f"{i}.ckpt", **configs[i]) for i, net in enumerate(nets)]
    teachers, batch = Teachers(paths, network(0, takes_size=True)), crops()
    sizes = torch.tensor([[60.0, 60], [60, 60]]), torch.tensor([[90.0, 40], [40, 90]])
    with torch.no_grad():
        alone = [
            candidates(nets[0], nets[0](**batch)).boxes,
            candidates(nets[1], nets[1](**batch, size=sizes[1])).boxes,
        ]
    said = [teachers(batch, size).boxes for size in sizes]
    torch.testing.assert_close(said[1], torch.stack(alone).mean(dim=0), rtol=1e-2, atol=0.1)
    assert (said[0] - said[1]).abs().max() > 1


def test_a_stage_that_one_teacher_has_trained_is_not_shared(tmp_path: Path) -> None:
    student = freeze(network(0), 4)
    nets = [with_trunk_of(network(seed), student) for seed in (1, 2)]
    with torch.no_grad():
        nets[1].backbone.stages[1][0].project.bias += 1e-3  # type: ignore[union-attr, index]
    teachers = Teachers([save(net, tmp_path / f"{i}.ckpt") for i, net in enumerate(nets)], student)
    assert len(teachers.trunk) == 2


def test_teachers_without_stages_to_run_alone(tmp_path: Path) -> None:
    """The stem of a ResNet has no module of its own, so nothing is cut out and each teacher computes it all."""
    student = freeze(network(0, "siamla-r50"), 5)
    teachers = Teachers([save(student, tmp_path / "a.ckpt", model="siamla-r50", objective_config={})], student)
    assert len(teachers.trunk) == 0


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (
            MODEL,
            "dastsiam-mobilenetv2",
            r"teacher .*t\.ckpt does not fit: .* three templates, the student .* one template",
        ),
        (MODEL, "siamcan-r50", r"crops of 127 and 255 px .* crops of 127 and 209 px"),
        ("siamfc", "siamfc", "SiamFC has no candidates to distil"),
    ],
)
def test_misfits_are_refused(tmp_path: Path, student: str, teacher: str, message: str) -> None:
    path = save(network(1, teacher), tmp_path / "t.ckpt", model=teacher, objective_config={})
    with pytest.raises(ValueError, match=message):
        Teachers([path], network(0, student))


def test_a_student_that_says_the_same_has_nothing_to_learn() -> None:
    net = network(0)
    said = candidates(net, net(**crops()))
    assert max(term.item() for term in distil_terms(said, said).values()) < 1e-5


def test_boxes_count_by_the_teachers_score() -> None:
    """Two of DIoU loss 1 - 1/2 and 1 - 1/3 + (5 / |(15, 10)|)^2: by hand, half of the one and all of the other."""
    boxes = torch.tensor([[[5.0, 5, 10, 10], [5, 5, 10, 10], [5, 5, 10, 10]]])
    ours = torch.tensor([[[5.0, 5, 10, 5], [10, 5, 10, 10], [400, 5, 10, 10]]])
    scores = torch.tensor([[0.5, 1.0, 0.0]])
    loc = distil_terms(Candidates(ours, scores), Candidates(boxes, scores))["loc"]
    shifted = 1 - 1 / 3 + 25 / (15**2 + 10**2)
    assert loc.item() == pytest.approx((0.5 * 0.5 + shifted) / 1.5, rel=1e-5)


def test_soft_focal_loss_by_hand() -> None:
    scores, labels = torch.tensor([[0.5, 0.2, 0.9]]), torch.tensor([[1.0, 0.2, 0.0]])
    loss = 0.5**2 * 0.6931472 + 0 + 0.9**2 * 2.3025851
    assert soft_focal_loss(scores, labels).item() == pytest.approx(loss / 1.2, rel=1e-5)
    assert soft_focal_loss(scores, labels * 0).isfinite()
    hard = torch.tensor([[0.0, 1.0]], requires_grad=True)
    soft_focal_loss(hard, torch.tensor([[1.0, 0.0]])).backward()
    assert hard.grad is not None
    assert hard.grad.isfinite().all()


def batch() -> dict[str, Tensor]:
    torch.manual_seed(0)
    pixels = {name: torch.randint(256, (2, side, side, 3), dtype=torch.uint8) for name, side in SIDES.items()}
    labels = torch.zeros(2, 196)
    labels[:, 100] = 1
    return {
        **pixels,
        "box": torch.tensor([[100.0, 110, 40, 50]] * 2),
        "size": torch.full((2, 2), 60.0),
        "labels": labels,
    }


SIDES = {"template": 127, "search": 209}


def test_share_says_how_much_of_the_loss_is_the_teachers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = str(save(network(1), tmp_path / "t.ckpt"))
    start = str(save(network(0), tmp_path / "s.ckpt"))
    losses = {}
    for share in (0.25, 1.0):
        module = SiameseModule(recipe(weights=start, distil={"teachers": [teacher], "share": share}), str(tmp_path))
        assert not any("teacher" in name for name in module.state_dict())
        logged: dict[str, Tensor] = {}
        monkeypatch.setattr(module, "log", lambda *_, **__: None)
        monkeypatch.setattr(module, "log_dict", logged.update)
        torch.manual_seed(0)
        losses[share] = module.training_step(batch(), 0).item()
        truth = logged["train/cls"] + logged["train/loc"]
        soft = logged["train/distil_cls"] + logged["train/distil_loc"]
        assert soft > 0.1
        assert losses[share] == pytest.approx(((1 - share) * truth + share * soft).item(), rel=1e-5)
    assert losses[0.25] != losses[1.0]


def test_steps_lead_to_the_teachers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = str(save(network(1), tmp_path / "t.ckpt"))
    module = SiameseModule(recipe(distil={"teachers": [teacher], "share": 1.0}), str(tmp_path))
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    monkeypatch.setattr(module, "log_dict", lambda *_, **__: None)
    optimiser, seen = torch.optim.Adam(module.parameters(), 1e-3), batch()
    losses = []
    for _ in range(12):
        optimiser.zero_grad()
        loss = module.training_step(dict(seen), 0)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("share", [0.0, 1.2])
def test_share_must_be_one(share: float) -> None:
    with pytest.raises(ValueError, match="share must be above 0 and at most 1"):
        recipe(distil={"teachers": ["a.ckpt"], "share": share})
