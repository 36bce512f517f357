from __future__ import annotations

import numpy as np
import pytest

from poserelay.drawing import FIRST_SIDE, MIDLINE, SECOND_SIDE, contact_sheet, draw_poses
from poserelay.keypoints import Skeleton

SKELETON = Skeleton(
    name="stick",
    joints=("nose", "left_hand", "right_hand"),
    flip_pairs=(("left_hand", "right_hand"),),
    limbs=(("nose", "left_hand"), ("nose", "right_hand"), ("left_hand", "right_hand")),
)
GREY = np.full((120, 160, 3), 128, dtype=np.uint8)
POSE = np.array([[[80.0, 20.0], [130.0, 100.0], [30.0, 100.0]]])
SURE = np.ones((1, 3))


def at(image: np.ndarray, x: int, y: int) -> tuple[int, ...]:
    return tuple(int(value) for value in image[y, x])


def test_sides_are_told_apart_by_colour() -> None:
    drawn = draw_poses(GREY, POSE, SURE, SKELETON)
    assert at(drawn, 130, 100) == FIRST_SIDE
    assert at(drawn, 30, 100) == SECOND_SIDE
    assert at(drawn, 80, 20) == MIDLINE
    assert at(drawn, 105, 60) == FIRST_SIDE  # halfway from nose to left hand
    assert at(drawn, 55, 60) == SECOND_SIDE
    assert at(drawn, 80, 100) == MIDLINE  # from side to side
    assert at(drawn, 5, 5) == (128, 128, 128)


def test_the_picture_given_is_not_drawn_on() -> None:
    before = GREY.copy()
    draw_poses(GREY, POSE, SURE, SKELETON)
    np.testing.assert_array_equal(GREY, before)


def test_uncertain_joints_take_their_limbs_with_them() -> None:
    drawn = draw_poses(GREY, POSE, np.array([[1.0, 0.1, 1.0]]), SKELETON, threshold=0.2)
    assert at(drawn, 130, 100) == (128, 128, 128)
    assert at(drawn, 105, 60) == (128, 128, 128)
    assert at(drawn, 55, 60) == pytest.approx(SECOND_SIDE, abs=20)


@pytest.mark.parametrize("wild", [np.nan, np.inf, 1e9, -1e9])
def test_wild_coordinates_do_not_break_the_rest(wild: float) -> None:
    pose = POSE.copy()
    pose[0, 1, 0] = wild
    drawn = draw_poses(GREY, pose, SURE, SKELETON)
    assert at(drawn, 55, 60) != (128, 128, 128)


def test_no_poses_leave_the_picture_as_it_is() -> None:
    np.testing.assert_array_equal(draw_poses(GREY, np.zeros((0, 3, 2)), np.zeros((0, 3)), SKELETON), GREY)
    np.testing.assert_array_equal(draw_poses(GREY, POSE, 0 * SURE, SKELETON), GREY)


def test_sub_pixel_positions_move_the_drawing() -> None:
    """Antialiased at a sixteenth of a pixel: the centroid of what changed follows the joint."""
    single = Skeleton(name="dot", joints=("nose",))

    def centroid(x: float) -> float:
        drawn = draw_poses(GREY, np.array([[[x, 50.0]]]), np.ones((1, 1)), single).astype(float)
        weight = np.abs(drawn - 128).sum(-1)
        return float((weight * np.arange(160)).sum() / weight.sum())

    assert centroid(80.5) - centroid(80.0) == pytest.approx(0.5, abs=0.1)
    assert centroid(80.0) == pytest.approx(80.0, abs=0.1)


def test_larger_persons_get_thicker_lines() -> None:
    canvas = np.full((900, 900, 3), 128, dtype=np.uint8)

    def share(scale: float) -> float:
        drawn = draw_poses(canvas, POSE * scale, SURE, SKELETON)
        return float((drawn != 128).any(-1).sum() / scale)

    assert share(6.0) > 2 * share(1.0)


def test_the_most_confident_pose_lies_on_top() -> None:
    single = Skeleton(name="pair", joints=("left_hand", "right_hand"), flip_pairs=(("left_hand", "right_hand"),))
    poses = np.array([[[50.0, 50.0], [10.0, 10.0]], [[10.0, 90.0], [50.0, 50.0]]])
    left_on_top = draw_poses(GREY, poses, np.array([[0.9, 0.9], [0.5, 0.5]]), single)
    right_on_top = draw_poses(GREY, poses, np.array([[0.5, 0.5], [0.9, 0.9]]), single)
    assert at(left_on_top, 50, 50) == FIRST_SIDE
    assert at(right_on_top, 50, 50) == SECOND_SIDE


def test_confidence_is_opacity() -> None:
    """A third at 0, all at 1, of the less certain joint along a limb; written out by hand on grey."""
    scores = np.array([[1.0, 0.25, 0.0]])
    drawn = draw_poses(GREY, POSE, scores, SKELETON, threshold=0.0, confidence=True)

    def faded(colour: tuple[int, ...], share: float) -> list[float]:
        return [128 + share * (value - 128) for value in colour]

    assert at(drawn, 80, 20) == MIDLINE
    assert at(drawn, 130, 100) == pytest.approx(faded(FIRST_SIDE, 0.5), abs=1)
    assert at(drawn, 30, 100) == pytest.approx(faded(SECOND_SIDE, 1 / 3), abs=1)
    assert at(drawn, 105, 60) == pytest.approx(faded(FIRST_SIDE, 0.5), abs=1)
    assert at(drawn, 80, 100) == pytest.approx(faded(MIDLINE, 1 / 3), abs=1)
    assert at(drawn, 5, 5) == (128, 128, 128)


@pytest.mark.parametrize("shift", [(0, 0), (-70, -15), (60, 70), (-500, 0), (0.3, 0.7)])
def test_full_confidence_is_the_plain_drawing(shift: tuple[float, float]) -> None:
    """Also where a pose sticks out of the picture, or lies outside: the part that is blended is cut out of it."""
    noise = np.random.default_rng(0).integers(0, 256, GREY.shape, dtype=np.uint8)
    plain = draw_poses(noise, POSE + shift, SURE, SKELETON)
    faded = draw_poses(noise, POSE + shift, SURE, SKELETON, confidence=True)
    assert np.abs(plain.astype(int) - faded).max() <= 1


def test_uncertain_joints_are_left_out_with_confidence_too() -> None:
    scores = np.array([[1.0, 0.1, 1.0]])
    drawn = draw_poses(GREY, POSE, scores, SKELETON, threshold=0.2, confidence=True)
    assert at(drawn, 130, 100) == (128, 128, 128)
    assert at(drawn, 105, 60) == (128, 128, 128)


@pytest.mark.parametrize("shift", [(0, 40), (0, 0), (0, -19), (75, 0), (-100, -100)])
def test_a_pose_score_is_written_at_the_highest_joint(shift: tuple[int, int]) -> None:
    """Beside the border too, where it moves into the picture; another score gives another text in the same place."""
    pose = POSE + shift
    canvas = np.full((170, 160, 3), 128, dtype=np.uint8)
    bare = draw_poses(canvas, pose, SURE, SKELETON)
    seven, eight = (
        draw_poses(canvas, pose, SURE, SKELETON, pose_scores=np.array([score])).astype(int) for score in (0.77, 0.88)
    )
    rows, columns = np.nonzero((seven != bare).any(-1))
    x, y = pose[0, 0]
    assert seven[rows, columns].max() > 200
    assert rows.min() < max(y, 20)
    assert np.ptp(columns) == pytest.approx(26, abs=5)
    if shift == (0, 40):  # room above
        assert rows.max() < y - 10
        assert (columns.min() + columns.max()) / 2 == pytest.approx(x, abs=2)
    # What was there is the joints' surroundings, not they: the picture alone is hidden.
    hidden = (seven != bare).any(-1) & (bare != 128).any(-1)
    assert not hidden.any()
    other = np.argwhere((seven != eight).any(-1))
    assert len(other)
    assert (other >= [rows.min(), columns.min()]).all()
    assert (other <= [rows.max(), columns.max()]).all()


def labels(poses: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Which pixels the scores of poses `[N, 3, 2]` are written on."""
    canvas = np.full((*size, 3), 128, dtype=np.uint8)
    sure = np.ones(poses.shape[:2])
    written = draw_poses(canvas, poses, sure, SKELETON, pose_scores=np.full(len(poses), 0.88))
    return (written != draw_poses(canvas, poses, sure, SKELETON)).any(-1)


@pytest.mark.parametrize("factor", [0.3, 0.45, 0.7, 1.0, 3.0, 9.0])
def test_a_pose_score_is_at_most_a_quarter_as_high_as_the_person(factor: float) -> None:
    """And left out where it could not be read so; in a picture of any size."""
    for side in (100, 3000):
        rows = np.nonzero(labels(factor * (POSE - POSE.min((0, 1))) + 5, (side, side)))[0]
        if factor * 100 < 50:
            assert not len(rows)
        elif factor * 100 < side:
            assert 0 < np.ptp(rows) < max(factor * 100 / 4, 1) + 1


def test_the_scores_of_neighbours_do_not_hide_each_other() -> None:
    """Three persons nearly at one place: as many pixels as three labels far from each other."""
    near = POSE + np.array([[[120, 80]], [[124, 82]], [[128, 80]]])
    far = POSE + np.array([[[0, 80]], [[200, 80]], [[400, 80]]])
    assert labels(near, (300, 600)).sum() == pytest.approx(labels(far, (300, 600)).sum(), rel=0.03)


def test_the_smallest_picture_can_be_drawn_on() -> None:
    dot = np.full((1, 1, 3), 128, np.uint8)
    assert draw_poses(dot, POSE, SURE, SKELETON, confidence=True, pose_scores=np.ones(1)).shape == (1, 1, 3)


def test_contact_sheet_fits_and_centres_every_picture() -> None:
    colours = [(10, 20, 30), (40, 50, 60), (70, 80, 90)]
    shapes = [(50, 100), (100, 50), (30, 30)]
    pictures = [np.full((*shape, 3), colour, np.uint8) for shape, colour in zip(shapes, colours, strict=True)]
    sheet = contact_sheet(pictures, columns=2, side=40)
    assert sheet.shape == (80, 80, 3)
    # Scaled to 40 x 20, 20 x 40 and 40 x 40: the share of each colour, the rest white.
    for colour, pixels in zip(colours, (800, 800, 1600), strict=True):
        assert (sheet == colour).all(-1).sum() == pixels
    assert tuple(sheet[20, 0]) == colours[0]
    assert tuple(sheet[0, 60]) == colours[1]
    assert (sheet == 255).all(-1).sum() == 80 * 80 - 3200
