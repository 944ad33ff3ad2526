"""Objectives: terms by hand on small maps, which network each fits, and that every model learns by its own."""

from __future__ import annotations

import math
import warnings
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from siamtrack.nets import MODELS
from siamtrack.nets.build import build_model
from siamtrack.nets.decode import AnchorBased, AnchorFree, AnchorMaps, Grid, RawMaps, learns_update
from siamtrack.nets.siamfc import ResponseMaps
from siamtrack.plain import to_plain
from siamtrack.scene import SceneFrame
from training.data import Track, read_video
from training.dataset import PairDataset, collate
from training.images import ImageCache
from training.labels import RULES
from training.losses import balanced_cross_entropy, dynamic_labels, focal_loss, ladl_loss
from training.module import SiameseModule, cells_of
from training.objectives import OBJECTIVES, build_objective, check_fit
from training.pairs import PairConfig, PairSampler
from training.recipe import recipe_from_dict

# --- anchor-free, on 3 x 3 cells of stride 8 -----------------------------------------------------------------------

GRID = Grid(size=3, stride=8, origin=12.0)  # cells at 12, 20, 28
TRUTH = (20.0, 20.0, 40.0, 24.0)  # corners (0, 8) and (40, 32)
FREE = AnchorFree(GRID)


def exact_ltrb(grow: float = 0.0) -> Tensor:
    """Distances ``[1, 4, 3, 3]`` with which every cell proposes the true box, each side `grow` further out."""
    x, y = GRID.points().T
    cx, cy, w, h = TRUTH
    sides = torch.stack([x - (cx - w / 2), y - (cy - h / 2), cx + w / 2 - x, cy + h / 2 - y])
    return (sides + grow).reshape(1, 4, 3, 3)


def batch(labels: list[int]) -> dict[str, Tensor]:
    return {"box": torch.tensor([TRUTH]), "labels": torch.tensor([labels], dtype=torch.int8)}


LABELS = [0, -1, 0, 1, 1, 0, 0, 0, 0]  # targets: the middle row's left and middle cell
torch.manual_seed(0)
ONE_LOGIT, TWO_LOGITS, QUALITY = torch.randn(1, 1, 3, 3), torch.randn(1, 2, 3, 3), torch.randn(1, 1, 3, 3)


@pytest.mark.parametrize("name", ["siamban", "siamcan", "siamcar", "siamla"])
def test_exact_boxes_have_no_regression_loss(name: str) -> None:
    terms = build_objective(name)(RawMaps(ONE_LOGIT, exact_ltrb(), QUALITY), batch(LABELS), FREE)
    assert set(terms) == {"cls", "loc", "quality"}
    assert float(terms["loc"]) == pytest.approx(0, abs=1e-6)
    assert "quality" not in build_objective(name)(RawMaps(ONE_LOGIT, exact_ltrb()), batch(LABELS), FREE)


@pytest.mark.parametrize(
    ("name", "config", "loss"),
    # Boxes 4 px larger on every side: I = 960, U = 48 * 32 = 1536, same centre, box around both = the larger one.
    [
        ("siamban", {}, 1 - 961 / 1537),
        ("siamcan", {}, 1 - 960 / 1536),
        ("siamcan", {"regression": "giou"}, 1 - 960 / 1536),
        ("siamcar", {}, -math.log(961 / 1537)),
        ("siamla", {}, -math.log(961 / 1537)),
        ("siamla", {"regression": "iou"}, 1 - 961 / 1537),
    ],
)
def test_regression_terms(name: str, config: dict[str, Any], loss: float) -> None:
    terms = build_objective(name, config)(RawMaps(ONE_LOGIT, exact_ltrb(4.0)), batch(LABELS), FREE)
    assert float(terms["loc"]) == pytest.approx(loss, rel=1e-5)


def test_siamcar_weighs_regression_by_centreness() -> None:
    """Of two target cells only the one off the centre is wrong."""
    ltrb = exact_ltrb()
    ltrb[:, :, 1, 0] += 4.0
    # Cell (12, 20): l 12, r 28, t = b = 12.
    share, wrong = math.sqrt(12 / 28), -math.log(961 / 1537)
    weighed = build_objective("siamcar")(RawMaps(TWO_LOGITS, ltrb, QUALITY), batch(LABELS), FREE)
    assert float(weighed["loc"]) == pytest.approx(wrong * share / (1 + share), rel=1e-5)
    plain = build_objective("siamla")(RawMaps(ONE_LOGIT, ltrb, QUALITY), batch(LABELS), FREE)
    assert float(plain["loc"]) == pytest.approx(wrong / 2, rel=1e-5)  # SiamLA Eq. 2, erratum L6
    score = torch.sigmoid(QUALITY[0, 0, 1, :2])
    centreness = -(share * score[0].log() + (1 - share) * (1 - score[0]).log() + score[1].log()) / 2
    assert float(weighed["quality"]) == pytest.approx(float(centreness), rel=1e-5)


def test_classification_terms() -> None:
    labels = torch.tensor([LABELS], dtype=torch.int8)
    for logits in (ONE_LOGIT, TWO_LOGITS):
        raw, flat = RawMaps(logits, exact_ltrb()), logits.flatten(2)
        assert torch.equal(
            build_objective("siamban")(raw, batch(LABELS), FREE)["cls"], balanced_cross_entropy(flat, labels)
        )
        focal = build_objective("siamcan", {"classification": "focal"})(raw, batch(LABELS), FREE)["cls"]
        assert torch.equal(focal, focal_loss(flat, labels))


@pytest.mark.parametrize("ladl", ["nonlinear", "linear", "off"])
def test_siamla_classifies_by_the_cells_own_boxes(ladl: str) -> None:
    labels = [0, 2, 0, 2, 1, 0, 0, 0, -1]
    ltrb = exact_ltrb()
    ltrb[:, :, 0, 1] += 4.0  # IoU 960 / 1536
    ltrb[:, :, 1, 0] += 8.0  # IoU 960 / 2240
    iou = torch.tensor([[1, 960 / 1536, 1, 960 / 2240, 1, 1, 1, 1, 1]])
    flat, targets = ONE_LOGIT.flatten(2), torch.tensor([labels])
    found = build_objective("siamla", {"ladl": ladl, "boundary": 0.3})(RawMaps(ONE_LOGIT, ltrb), batch(labels), FREE)[
        "cls"
    ]
    if ladl == "off":  # a constant label of lambda at the boundary, plain cross-entropy
        score = torch.sigmoid(flat[0, 0])
        positive = torch.stack(
            [-(q * score[i].log() + (1 - q) * (1 - score[i]).log()) for i, q in ((1, 0.3), (3, 0.3), (4, 1))]
        )
        wanted = 0.5 * positive.mean() - 0.5 * (1 - score[[0, 2, 5, 6, 7]]).log().mean()
    else:
        wanted = ladl_loss(flat, targets, dynamic_labels(iou, targets, 0.3, linear=ladl == "linear"))
    assert float(found) == pytest.approx(float(wanted), rel=1e-4)


def test_siamla_localisation_learns_the_overlap_or_centreness() -> None:
    raw, targets = RawMaps(ONE_LOGIT, exact_ltrb(4.0), QUALITY), torch.tensor([LABELS])
    score, iou = torch.sigmoid(QUALITY.flatten()), 960 / 1536
    losses = -(iou * score.log() + (1 - iou) * (1 - score).log())  # background cells, too, propose that box
    wanted = 0.5 * losses[targets[0] == 1].mean() + 0.5 * losses[targets[0] == 0].mean()
    found = build_objective("siamla")(raw, batch(LABELS), FREE)["quality"]
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)
    of_siamcar = build_objective("siamcar")(raw, batch(LABELS), FREE)["quality"]
    assert torch.equal(
        build_objective("siamla", {"localisation": "centreness"})(raw, batch(LABELS), FREE)["quality"], of_siamcar
    )


def test_siamla_localisation_of_a_negative_pair_is_nothing() -> None:
    """Its box is a foreign target's: a cell that outlines that one exactly is no better than any other."""
    raw = RawMaps(ONE_LOGIT, exact_ltrb(), QUALITY)
    found = build_objective("siamla")(raw, batch([0] * 9), FREE)["quality"]
    assert float(found) == pytest.approx(float(-0.5 * (1 - torch.sigmoid(QUALITY)).log().mean()), rel=1e-5)
    both = {key: torch.cat([batch([0] * 9)[key], batch(LABELS)[key]]) for key in ("box", "labels")}
    pair = RawMaps(*(maps.repeat(2, 1, 1, 1) for maps in (ONE_LOGIT, exact_ltrb(), QUALITY)))
    score = torch.sigmoid(QUALITY.flatten())
    background = torch.cat([-(1 - score).log(), -score[torch.tensor(LABELS) == 0].log()])  # of IoU 0, and of IoU 1
    wanted = 0.5 * -score[torch.tensor(LABELS) == 1].log().mean() + 0.5 * background.mean()
    assert float(build_objective("siamla")(pair, both, FREE)["quality"]) == pytest.approx(float(wanted), rel=1e-5)


def test_siamla_labels_do_not_train_the_regression() -> None:
    """Erratum L4: the IoU is a label. The classification and localisation terms must not move the boxes."""
    ltrb = exact_ltrb(4.0).requires_grad_()
    terms = build_objective("siamla")(RawMaps(ONE_LOGIT, ltrb, QUALITY.clone().requires_grad_()), batch(LABELS), FREE)
    assert not terms["cls"].requires_grad
    terms["quality"].backward()
    assert ltrb.grad is None
    terms["loc"].backward()
    assert ltrb.grad is not None


# --- anchor-based and response -------------------------------------------------------------------------------------

ANCHORED = AnchorBased(GRID, [(40, 24), (20, 20)])


def anchor_batch(*targets: int) -> dict[str, Tensor]:
    labels = torch.zeros(1, 18, dtype=torch.int8)
    labels[0, list(targets)] = 1
    return {"box": torch.tensor([TRUTH]), "labels": labels}


def test_anchor_maps_are_read_in_the_decoders_order() -> None:
    """A certain right answer at the second anchor of cell (row 1, column 2), anywhere else a certain wrong one."""
    logits, deltas = torch.zeros(1, 4, 3, 3), torch.zeros(1, 8, 3, 3)
    logits[:, :2] = 20.0  # background, both anchors
    logits[:, 1, 1, 2], logits[:, 3, 1, 2] = 0.0, 20.0  # channel c A + a
    for k, value in enumerate([(20 - 28) / 20, 0.0, math.log(2), math.log(24 / 20)]):
        deltas[:, 2 * k + 1, 1, 2] = value  # channel k A + a
    item = anchor_batch(9 + 3 + 2)
    terms = build_objective("siamrpnpp")(AnchorMaps(logits, deltas), item, ANCHORED)
    assert {name: float(term) for name, term in terms.items()} == pytest.approx({"cls": 0, "loc": 0}, abs=1e-6)
    chosen = ANCHORED.candidates(AnchorMaps(logits, deltas))
    assert int(chosen.scores.argmax()) == 14  # the same anchor to the decoder, and the true box
    torch.testing.assert_close(chosen.boxes[0, 14], torch.tensor(TRUTH))


@pytest.mark.parametrize(
    ("name", "loss"), [("siamrpn", 0.125 + 1.5), ("siamrpnpp", 0.5 + 2.0), ("dastsiam", 0.125 + 1.5)]
)
def test_delta_terms_are_means_over_images(name: str, loss: float) -> None:
    """Two images with one and two target anchors, a third without: (loss + loss) / 3, whatever the anchors' number."""
    deltas = torch.zeros(3, 8, 3, 3)
    labels = torch.zeros(3, 18, dtype=torch.int8)
    labels[0, 4], labels[1, 4], labels[1, 13] = 1, 1, 1  # the middle cell's anchors
    deltas[:2, 0, 1, 1], deltas[:2, 2, 1, 1] = 0.5, -2.0  # off by these, anchor 0 is exact otherwise
    deltas[1, 1, 1, 1], deltas[1, 3, 1, 1] = 0.5, -2.0
    deltas[1, 5, 1, 1], deltas[1, 7, 1, 1] = math.log(2), math.log(24 / 20)
    item = {"box": torch.tensor([TRUTH] * 3), "labels": labels}
    terms = build_objective(name)(AnchorMaps(torch.zeros(3, 4, 3, 3), deltas), item, ANCHORED)
    assert float(terms["loc"]) == pytest.approx(2 * loss / 3, rel=1e-5)
    assert float(terms["cls"]) == pytest.approx(math.log(2), rel=1e-5)


def test_dastsiam_trains_both_branches_by_one_mask() -> None:
    """Erratum D12; weights lambda_1 lambda, lambda_1 and 1 (Eq. 7)."""
    second = torch.randn(1, 2, 3, 3)
    raw, item = AnchorMaps(torch.randn(1, 4, 3, 3), torch.zeros(1, 8, 3, 3), second), anchor_batch(4, 14)
    objective = build_objective("dastsiam", {"cls": 0.5, "second": 2})
    terms = objective(raw, item, ANCHORED)
    assert set(terms) == {"cls", "second", "loc"}
    assert torch.equal(terms["second"], balanced_cross_entropy(second.flatten(1)[:, None], item["labels"]))
    wanted = 0.5 * terms["cls"] + 2 * terms["second"] + terms["loc"]
    assert float(objective.total(terms)) == pytest.approx(float(wanted), rel=1e-6)
    with pytest.raises(ValueError, match="second classification branch, which only objective dastsiam trains"):
        build_objective("siamrpn")(raw, item, ANCHORED)
    assert "second" not in objective(raw._replace(second=None), item, ANCHORED)


def test_siamfc_term() -> None:
    response, labels = torch.randn(2, 1, 5, 5), torch.zeros(2, 25, dtype=torch.int8)
    labels[:, 12] = 1
    terms = build_objective("siamfc")(ResponseMaps(response), {"labels": labels}, None)
    assert list(terms) == ["cls"]
    assert torch.equal(terms["cls"], balanced_cross_entropy(response.flatten(2), labels))


# --- which fits what -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_every_model_has_an_objective_and_labels(model: str) -> None:
    recipe = recipe_from_dict({"model": model})
    objective, net = recipe.build_objective(), build_model(model)
    check_fit(recipe.objective_name, objective, model, net.decoder)
    assert recipe.labels.rule in RULES
    config: Any = net.config
    other = build_model(model, to_plain(config))  # its configuration as plain values builds the same
    assert {k: v.shape for k, v in other.state_dict().items()} == {k: v.shape for k, v in net.state_dict().items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": "dastsiam"}, "objective dastsiam does not fit siamcan-mobilenetv2: it needs AnchorBased maps"),
        ({"objective": "siamfc"}, "it needs ScaleDecoder maps, the network gives AnchorFree ones"),
        (
            {"model": "dastsiam-mobilenetv2", "objective": "siamla"},
            "needs AnchorFree maps, the network gives AnchorBased",
        ),
    ],
)
def test_objective_that_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SiameseModule(to_plain(recipe_from_dict({"model": "siamcan-mobilenetv2", **change})))


@pytest.mark.parametrize(
    ("name", "config", "rule"),
    [("siamla", {}, "siamla"), ("siamla", {"lals": False}, "siamcar"), ("siamrpnpp", {}, "siamrpn")],
)
def test_labels_follow_the_objective(name: str, config: dict[str, Any], rule: str) -> None:
    assert build_objective(name, config).rule == rule


@pytest.mark.parametrize("name", OBJECTIVES)
def test_weights_are_the_fields_of_the_terms(name: str) -> None:
    objective = build_objective(name, {"cls": 3})
    terms = {field: torch.tensor(2.0) for field in ("cls", "loc", "quality", "second") if hasattr(objective, field)}
    wanted = 2 * sum(getattr(objective, field) for field in terms)
    assert float(objective.total(terms)) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("siamla", {"ladl": "maybe"}, "ladl must be one of nonlinear, linear, off, got 'maybe'"),
        ("siamla", {"boundary": 0}, "boundary must be above 0 and at most 1"),
        ("siamla", {"localisation": "both"}, "localisation must be one of iou, centreness"),
        ("siamrpn", {"regression": "diou"}, "regression must be one of l1, smooth_l1"),
        ("siamfc", {"loc": 1}, "unknown field loc; known: cls"),
        ("siamcar", {"cls": float("nan")}, "cls must be at least 0"),
    ],
)
def test_objective_errors(name: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_objective(name, config)


# --- every model learns --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tracks(scene: list[SceneFrame], tmp_path_factory: pytest.TempPathFactory) -> list[Track]:
    """The rendered clip as a training video."""
    folder = tmp_path_factory.mktemp("clip")
    rows = []
    for i, frame in enumerate(scene[::4]):
        (folder / "img").mkdir(exist_ok=True)
        assert cv2.imwrite(str(folder / "img" / f"{i}.png"), frame.image)
        rows.append(",".join(str(v) for v in frame.box_xywh))
    (folder / "groundtruth.txt").write_text("\n".join(rows))
    return read_video(folder)


def remember(backbone: nn.Module) -> None:
    """Let a frozen backbone compute each image once: the paper's networks are heavy."""
    kept: dict[tuple[float, ...], Any] = {}
    compute = backbone.forward

    def forward(image: Tensor) -> Any:
        key = (*image.shape, float(image.double().sum()))
        if key not in kept:
            with torch.no_grad():
                kept[key] = compute(image)
        return kept[key]

    backbone.forward = forward  # type: ignore[method-assign]


# The heads of the full-size networks would take minutes.
SMALLER: dict[str, dict[str, Any]] = {
    **{f"{name}-r50": {"channels": 64} for name in ("siamrpnpp", "siamban", "siamcan", "siamcar", "siamla")},
    "dastsiam-r50": {"transformer": {"width": 64, "layers": 1, "hidden": 64}},
}


def learn(tracks: list[Track], steps: int, **content: Any) -> list[float]:
    """Losses over so many steps on one and the same pair of samples; the backbone stays as it is, but SiamFC's."""
    torch.manual_seed(0)
    alone = content["model"].startswith("siamfc")  # nothing but a backbone
    recipe = recipe_from_dict({"unfreeze_epoch": 0, "unfreeze_stages": 5 if alone else 0, **content})
    module = SiameseModule(to_plain(recipe))
    net: Any = module.net
    config = PairConfig(mix={"video": 1.0}, negative=0.0, distractor=0.0, occluder=0.0)
    sampler = PairSampler(
        tracks, [], [], config, ImageCache(0.1), net.template_size, net.search_size, learns_update(net)
    )
    data = PairDataset(sampler, cells_of(net), recipe.labels, seed=1, length=2)
    samples = collate([data[0], data[1]])
    assert ("history" in samples) == ("current" in samples) == learns_update(net)
    assert (samples["labels"] > 0).any(dim=1).all()
    module.train().on_train_epoch_start()
    if not alone:
        remember(net.backbone)
    weights = [p for p in net.parameters() if p.requires_grad]
    optimiser, losses = torch.optim.AdamW(weights, 3e-4 if alone else 1e-3), []
    for step in range(steps):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no trainer to log to
            loss = module.training_step(samples, step)
        optimiser.zero_grad()
        loss.backward()
        if step == 0:
            unused = [n for n, p in net.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
            # A softmax over anchors or levels may leave single weights without a gradient; a branch must not be.
            assert len(unused) < 0.1 * len(weights), unused
        torch.nn.utils.clip_grad_norm_(weights, 10.0)
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("model", MODELS)
def test_every_model_trains(tracks: list[Track], model: str) -> None:
    steps = 6 if model.endswith("r50") else 10
    losses = learn(tracks, steps, model=model, model_config=SMALLER.get(model, {}))
    assert all(np.isfinite(losses))
    assert np.mean(losses[-2:]) < 0.85 * np.mean(losses[:2]), losses


@pytest.mark.parametrize(
    "content",
    [
        {"model": "siamcan-mobilenetv2", "data": {"labels": {"rule": "siamcan-circle"}}},
        {"model": "siamcan-mobilenetv2", "data": {"labels": {"rule": "siamban"}}},
        {
            "model": "siamcan-mobilenetv2",
            "objective_config": {"regression": "giou"},
            "model_config": {"channel_attention": False},
        },
        {"model": "siamla-mobilenetv2", "objective": "siamcar", "model_config": {"localisation": "centreness"}},
        {"model": "siamla-mobilenetv2", "objective_config": {"ladl": "off"}, "model_config": {"localisation": "none"}},
        {
            "model": "siamla-mobilenetv2",
            "objective_config": {"ladl": "linear", "lals": False, "localisation": "centreness"},
            "model_config": {"localisation": "centreness"},
        },
        {"model": "siamla-mobilenetv2", "model_config": {"non_local": False}},
        {"model": "siamla-mobilenetv2", "model_config": {"aggregation": False}, "objective_config": {"boundary": 0.4}},
        {
            "model": "dastsiam-mobilenetv2",
            "objective": "siamrpn",
            "model_config": {"st": False, "da": False, "second": False, "anchors_px": [[88, 40], [64, 64], [40, 80]]},
            "data": {"labels": {"nearest": True}},
        },
        {"model": "dastsiam-mobilenetv2", "model_config": {"st": False, "da": False}},
        {"model": "dastsiam-mobilenetv2", "model_config": {"st": False}},
        {"model": "dastsiam-mobilenetv2", "model_config": {"da": False}},
    ],
    ids=lambda content: " ".join(str(v) for k, v in content.items() if k != "model"),
)
def test_ablation_rows_train(tracks: list[Track], content: dict[str, Any]) -> None:
    losses = learn(tracks, 6, **content)
    assert losses[-1] < losses[0], losses
