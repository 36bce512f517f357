"""Teachers and the losses of a step, against the equations by hand."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from poserelay.batch import CropBatch
from poserelay.config import InputConfig, ModelConfig, Named
from poserelay.errors import UserError
from poserelay.heatmaps import decode, encode, heatmap_to_input, input_to_heatmap, target_weight
from poserelay.keypoints import Skeleton, load_skeleton
from poserelay.losses import joints_mse
from poserelay.model import PoseModel, build_model
from semi.diagnostics import FIGURES, Watch, figures
from semi.step import SemiStep, Student
from semi.teachers import (
    TEACHERS,
    MeanTeacher,
    NetworkTeacher,
    StoredTeacher,
    Targets,
    TrainedTeacher,
    by_joint,
    matched_rows,
)
from semi.views import HardViews

SIZE, HEATMAP = (64, 64), (8, 8)
COCO = load_skeleton("coco17")
CONFIG = ModelConfig(
    Named("timm", {"model": "test_resnet"}),
    Named("simple", {"deconv_channels": [8, 8]}),
    input=InputConfig(*SIZE),
)


def network(seed: int, skeleton: Skeleton = COCO) -> PoseModel:
    torch.manual_seed(seed)
    model = build_model(CONFIG, skeleton)
    nn.init.normal_(model.head.final_layer.weight, std=0.1)  # peaks that differ between crops
    return model


def crops(count: int, seed: int, skeleton: Skeleton = COCO) -> CropBatch:
    generator = torch.Generator().manual_seed(seed)
    joints = len(skeleton.joints)
    noise = torch.rand(count, 3, 8, 8, generator=generator)
    return CropBatch(
        images=(nn.functional.interpolate(noise, SIZE, mode="bilinear") * 255).to(torch.uint8),
        keypoints=torch.rand(count, joints, 2, generator=generator) * 63,
        visibility=torch.randint(0, 3, (count, joints), generator=generator),
        affine=torch.eye(2, 3).expand(count, 2, 3),
        boxes=torch.zeros(count, 4),
        scores=torch.ones(count),
        areas=torch.ones(count),
        image_ids=list(range(count)),
        annotation_ids=[None] * count,
    )


def truth(batch: CropBatch, sigma: float = 2.0) -> tuple[Tensor, Tensor]:
    """Target maps and weights, as fine-tuning makes them."""
    keypoints = input_to_heatmap(batch.keypoints, SIZE, HEATMAP)
    return encode(keypoints, batch.visibility, HEATMAP, sigma), target_weight(
        keypoints, batch.visibility, HEATMAP, sigma
    )


def step_of(models: Sequence[PoseModel], teachers: Sequence[Any], **more: Any) -> SemiStep:
    settings: dict[str, Any] = {"views": None, "contrast": None, "lambda_u": 1.0, "sigma": 2.0, "quantize": False}
    settings |= {"lambda_p": 0.0, "icon_gamma": 0.0}
    return SemiStep([Student(model, 0) for model in models], teachers, **settings | more).train()


def named(step: SemiStep, values: Tensor) -> dict[str, float]:
    return dict(zip(step.terms, values.tolist(), strict=True))


def test_labels_alone_are_fine_tunings_loss() -> None:
    model, labelled = network(0), crops(4, 1)
    values = named(step := step_of([model], []), step(labelled, None, torch.Generator()))
    predicted = model(model.preprocess(labelled.images))
    wanted = joints_mse(predicted, *truth(labelled)).item()
    assert values["loss"] == values["supervised"] == pytest.approx(wanted, rel=1e-6)


def test_ccms_auxiliary_decoder_learns_from_labelled_crops_alone() -> None:
    torch.manual_seed(0)
    model = build_model(replace(CONFIG, head=Named("ccm", {"channels": [8, 8]})), COCO)
    head: Any = model.head
    nn.init.normal_(head.auxiliary.final_layer.weight, std=0.1)
    labelled, unlabelled = crops(4, 1), crops(4, 2)
    values = named(step := step_of([model], [], auxiliary_weight=0.3), step(labelled, None, torch.Generator()))
    whole, auxiliary, _ = model.supervised(model.preprocess(labelled.images))
    assert auxiliary is not None
    assert auxiliary.shape[-1] == 2 * whole.shape[-1]
    place = input_to_heatmap(labelled.keypoints, SIZE, (16, 16))
    targets, weight = (
        encode(place, labelled.visibility, (16, 16), 4.0),
        target_weight(place, labelled.visibility, (16, 16), 4.0),
    )
    extra = joints_mse(auxiliary, targets, weight).item()
    assert extra > 0.001
    wanted = joints_mse(whole, *truth(labelled)).item() + 0.3 * extra
    assert values["supervised"] == pytest.approx(wanted, rel=1e-6)
    taught = named(
        step := step_of([model], [Perfect()], auxiliary_weight=0.3), step(labelled, unlabelled, torch.Generator())
    )
    answered = model.supervised(model.preprocess(unlabelled.images))[0]
    assert taught["unlabelled"] == pytest.approx(joints_mse(answered, *truth(unlabelled)).item(), rel=1e-6)


class Perfect:
    """Knows the labels that the crops carry."""

    def __call__(self, batch: CropBatch) -> Targets:
        heatmaps, weight = truth(batch)
        return Targets(heatmaps, heatmaps.amax((-2, -1)), weight)


def gradients(step: SemiStep, values: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(values[0], [p for p in step.parameters() if p.requires_grad]))


def test_a_perfect_pseudo_teacher_is_supervision_on_the_same_targets() -> None:
    """Eq. 6 with gamma 0 and lambda_u 1: loss and gradients of both batches supervised."""
    model, labelled, unlabelled = network(0), crops(4, 1), crops(4, 2)
    supervised = copy.deepcopy(model)

    class Drawn(nn.Module):
        """A model that answers with the targets, so that gamma and the mask are the teacher's own."""

        input, stride, skeleton = model.input, model.stride, COCO

        def preprocess(self, images: Tensor) -> Tensor:
            return images

        def forward(self, images: Tensor) -> Tensor:
            return truth(unlabelled)[0]

    drawn: Any = Drawn()
    teacher = TrainedTeacher(drawn, COCO, gamma=0.0)
    assert torch.equal(teacher(unlabelled).mask, truth(unlabelled)[1])
    step = step_of([model], [teacher])
    values = step(labelled, unlabelled, torch.Generator())
    both = sum(
        joints_mse(supervised(supervised.preprocess(batch.images)), *truth(batch)) for batch in (labelled, unlabelled)
    )
    assert isinstance(both, Tensor)
    supervised_gradients = torch.autograd.grad(both, list(supervised.parameters()))
    assert values[0].item() == pytest.approx(both.item(), rel=1e-5)
    # batch norms of both see the crops in the same order
    for ours, wanted in zip(gradients(step, values), supervised_gradients, strict=True):
        assert torch.allclose(ours, wanted, atol=1e-6)


def test_gamma_keeps_the_confident_joints_only() -> None:
    model = network(3).eval()
    batch = crops(6, 4)
    with torch.no_grad():
        peaks = model(model.preprocess(batch.images)).amax((-2, -1))
    gamma = float(peaks.median())
    found = TrainedTeacher(model, COCO, gamma=gamma)(batch)
    assert torch.equal(found.mask > 0, peaks > gamma)
    assert 0 < found.mask.mean() < 1
    assert torch.equal(found.confidence, peaks)


def test_a_teacher_of_another_skeleton_is_matched_by_name() -> None:
    lsp = load_skeleton("lsp14")
    model = network(3, lsp).eval()
    batch = crops(3, 4)
    found = TrainedTeacher(model, COCO, gamma=-10.0)(batch)
    with torch.no_grad():
        own = model(model.preprocess(batch.images))
    assert torch.equal(found.heatmaps[:, COCO.joints.index("left_knee")], own[:, lsp.joints.index("left_knee")])
    nose = COCO.joints.index("nose")
    assert "nose" not in lsp.joints
    assert (found.mask[:, nose] == 0).all()
    assert (found.mask[:, COCO.joints.index("left_knee")] == 1).all()
    with pytest.raises(UserError, match="no joint in common"):
        matched_rows(Skeleton("fish", ("fin",)), COCO)
    maps, known = by_joint(own, (1, None))
    assert torch.equal(maps[:, 0], own[:, 1])
    assert known.tolist() == [True, False]


def test_distillation_is_the_mean_over_views_brought_back() -> None:
    """A model that draws where it sees the brightest spot is right on every view, once brought back."""

    class Brightest(nn.Module):
        input, stride = CONFIG.input, 4
        skeleton = Skeleton("spot", ("spot",))

        def preprocess(self, images: Tensor) -> Tensor:
            return images.float()

        def forward(self, images: Tensor) -> Tensor:
            xy, _ = decode(images.mean(1, keepdim=True), refine="none")
            keypoints = input_to_heatmap(xy, SIZE, (16, 16))
            return encode(keypoints, torch.full(xy.shape[:2], 2), (16, 16), 1.5)

    batch = crops(1, 0, Brightest.skeleton)
    batch.images = torch.zeros(1, 3, *SIZE, dtype=torch.uint8)
    batch.images[..., 18:21, 38:41] = 255
    model: Any = Brightest()
    skeleton = Brightest.skeleton
    teacher = TrainedTeacher(model, skeleton, gamma=0.5, scales=(0.8, 1.2), rotations=(-30.0, 20.0), flip=True)
    found = teacher(batch)
    xy, _ = decode(found.heatmaps, refine="parabola")
    assert (heatmap_to_input(xy, SIZE, (16, 16))[0, 0] - torch.tensor([39.0, 19.0])).norm() < 2
    assert found.mask.all()


def test_distillation_teaches_at_the_crops_edge_too() -> None:
    """A teacher that is right on every view is sure of joints that some views do not show."""
    batch = crops(12, 9)
    batch.visibility[:] = 2
    batch.keypoints[:, 3] = 5.9 * torch.rand(12, 2, generator=torch.Generator().manual_seed(0))

    class Right(nn.Module):
        """Draws the joints where they are; it is told how each view was turned by the pictures, which hold places."""

        input, stride, skeleton = CONFIG.input, 8, COCO

        def preprocess(self, images: Tensor) -> Tensor:
            return (torch.stack(torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="xy")) + 1000).expand(
                len(images), 2, 64, 64
            )

        def forward(self, places: Tensor) -> Tensor:
            """Joints `[B, K, 2]` of the crop on the view whose pixels hold the places of the crop that they show."""
            shown = (places[:, 0] > 500)[..., None]
            at = (places - 1000).permute(0, 2, 3, 1)
            distance = (
                (at[:, None] - batch.keypoints[:, :, None, None]).norm(dim=-1).masked_fill(~shown[..., 0][:, None], 1e3)
            )
            nearest = distance.flatten(2).min(-1)
            xy = torch.stack((nearest.indices % 64, nearest.indices // 64), -1)
            seen = torch.where(nearest.values < 1.0, 2, 0)
            return encode(input_to_heatmap(xy, SIZE, HEATMAP), seen, HEATMAP, 1.0)

    right: Any = Right()
    views = {"scales": (0.9, 1.0, 1.1), "rotations": (-15.0, 0.0, 15.0)}
    corner = (batch.keypoints < 6).all(-1)
    assert corner.sum() > 5
    teacher = TrainedTeacher(right, COCO, gamma=0.6, **views)
    found = teacher(batch).confidence
    images = right.preprocess(batch.images)
    plain = torch.stack(
        [teacher._seen(images, scale, turn)[0] for scale in views["scales"] for turn in views["rotations"]]
    )
    assert found[corner].mean() > 0.8 * found.mean()
    # A mean that counts the views without the corner as zeros would not be sure of it.
    assert plain.mean(0).amax((-2, -1))[corner].mean() < 0.5 * found[corner].mean()


def test_a_stored_teacher_draws_the_joints_of_the_crops() -> None:
    batch = crops(4, 5)
    batch.annotation_ids = [2, 0, 1, 2]
    batch.affine = batch.affine.clone()
    batch.affine[3, 0, 0] = -1.0  # a mirrored crop
    confidence = torch.rand(3, 17)
    found = StoredTeacher(network(0), confidence, gamma=0.5, sigma=2.0, quantize=False)(batch)
    wanted, weight = truth(batch)
    assert torch.equal(found.heatmaps, wanted)
    assert torch.equal(found.mask, weight)
    assert torch.equal(found.confidence[:3], confidence[[2, 0, 1]])
    left, right = (COCO.joints.index(f"{side}_knee") for side in ("left", "right"))
    assert found.confidence[3, left] == confidence[2, right]


@pytest.mark.parametrize("compat", [False, True])
def test_a_network_teaches_by_batch_statistics_and_keeps_its_running_ones(compat: bool) -> None:
    model, batch = network(1).train(), crops(4, 6)
    before = copy.deepcopy(model.state_dict())
    found = NetworkTeacher(model, compat=compat)(batch)
    after = model.state_dict()
    same = all(torch.equal(before[name], after[name]) for name in before)
    assert same != compat
    wanted = copy.deepcopy(model).train()
    wanted.load_state_dict(before)
    assert torch.equal(found.heatmaps, wanted(wanted.preprocess(batch.images)))
    assert not found.heatmaps.requires_grad
    assert (found.mask == 1).all()


def test_dual_networks_teach_each_other_on_the_hard_view() -> None:
    """.5 sup1 + .5 sup2 + cons12 + cons21, each network's crop cut at the other's joints, both turned alike."""
    first, second = network(1), network(2)
    labelled, unlabelled = crops(4, 7), crops(4, 8)
    copies = [copy.deepcopy(model).train() for model in (first, second)]
    views = HardViews(cutout_joints=2)
    step = step_of([first, second], TEACHERS["dual"]([first, second], None), views=views)
    values = named(step, step(labelled, unlabelled, torch.Generator().manual_seed(5)))

    generator = torch.Generator().manual_seed(5)
    turns = views.draw_turns(4, generator, torch.device("cpu"))
    images = copies[0].preprocess(unlabelled.images)
    with torch.no_grad():
        easy = [copy.deepcopy(model)(images) for model in copies]
    total, consistencies = 0.0, []
    for model, taught in zip(copies, reversed(easy), strict=True):
        joints = heatmap_to_input(decode(taught)[0], SIZE, HEATMAP)
        view = views.turn(views.cut(images, joints, generator), turns, SIZE)
        total += 0.5 * joints_mse(model(model.preprocess(labelled.images)), *truth(labelled)).item()
        consistencies.append(joints_mse(model(view), views.turn(taught, turns, SIZE), torch.ones(4, 17)).item())
    assert values["loss"] == pytest.approx(total + sum(consistencies), rel=1e-5)
    assert values["unlabelled"] == pytest.approx(sum(consistencies) / 2, rel=1e-5)
    assert len(FIGURES) == len([name for name in step.terms if name in FIGURES])


def test_the_mean_teacher_follows_and_belongs_to_what_is_saved() -> None:
    model = network(1)
    (teacher,) = TEACHERS["mean"]([model], None, decay=0.9)
    assert isinstance(teacher, MeanTeacher)
    step = step_of([model], [teacher])
    assert any(name.startswith("teacher1.model.") for name in step.state_dict())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    name = "head.final_layer.weight"
    expected = teacher.model.state_dict()[name].clone()
    for number in (1, 2, 200):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        teacher.follow(model, number)
        decay = min(0.9, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * model.state_dict()[name]
        assert torch.allclose(teacher.model.state_dict()[name], expected, atol=1e-6)
    with pytest.raises(UserError, match="decay"):
        MeanTeacher(model, decay=1.0)


def test_figures_of_a_hand_made_teacher() -> None:
    places = torch.tensor([[[2.0, 3.0], [5.0, 5.0]], [[1.0, 1.0], [6.0, 2.0]]])
    taught = (
        encode(places, torch.full((2, 2), 2), (8, 8), 1.0) * torch.tensor([[1.0, 0.5], [0.25, 0.0]])[..., None, None]
    )
    predicted = encode(
        places + torch.tensor([[[0.0, 0], [0, 3]], [[0, 0], [0, 0]]]), torch.full((2, 2), 2), (8, 8), 1.0
    )
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    confidence = torch.tensor([[1.0, 0.5], [0.25, torch.nan]])
    found = dict(zip(FIGURES, figures(taught, confidence, mask, predicted).tolist(), strict=True))
    assert found["peak"] == pytest.approx((1 + 0.5 + 0.25) / 3)
    assert found["peak_q50"] == pytest.approx(0.5)
    assert found["kept"] == 0.75
    assert found["agreement"] == pytest.approx(2 / 3)  # the second joint's peaks lie three pixels apart


def test_a_collapse_is_named_once_and_again_when_it_comes_back() -> None:
    watch = Watch(gamma=0.75, changes=True)
    assert Watch(gamma=0.75, changes=False).warnings({"peak_q50": 0.0, "labelled_peak": 0.5, "kept": 0.3}) == []
    good = {"peak_q50": 0.4, "peak_q90": 0.8, "labelled_peak": 0.5, "kept": 0.3}
    assert watch.warnings(good) == []
    (flat,) = watch.warnings(good | {"peak_q50": 0.01})
    assert "gone flat" in flat
    assert watch.warnings(good | {"peak_q50": 0.01}) == []
    assert watch.warnings(good) == []
    assert len(watch.warnings(good | {"peak_q50": 0.01})) == 1
    (silent,) = watch.warnings(good | {"kept": 0.0})
    assert "0.75" in silent
    assert "0.8" in silent
    (idle,) = watch.warnings(good | {"queries": 0.0})
    assert "contrasts nothing" in idle
