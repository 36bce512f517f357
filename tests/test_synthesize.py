from __future__ import annotations

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO

from poserelay.errors import UserError
from poserelay.keypoints import load_skeleton
from poserelay.synthesize import SynthesizeConfig, main, synthesize
from poserelay.synthesize.annotation import annotate
from poserelay.synthesize.body import PARTS, PERSON, body_points
from poserelay.synthesize.painting import render
from poserelay.synthesize.people import Person, draw_person
from poserelay.synthesize.pose import Pose, draw_pose
from poserelay.synthesize.scene import Scene, draw_scene
from poserelay.synthesize.solids import Head, Solid, Tube, plain

SKELETON = load_skeleton("coco17")


def joint_parts(joint: str) -> set[str]:
    """By anatomy, not from the renderer: the parts that meet in a joint, and those that lie over it like a skin."""
    side, _, place = joint.rpartition("_")
    own = {
        "nose": {"nose", "head"},
        "eye": {"head", "nose"},
        "ear": {"head", f"{side}_ear"},
        "shoulder": {"torso", f"{side}_upper_arm"},
        "elbow": {f"{side}_upper_arm", f"{side}_forearm"},
        "wrist": {f"{side}_forearm", f"{side}_hand"},
        "hip": {"torso", "pelvis", "skirt", f"{side}_thigh"},
        "knee": {f"{side}_thigh", f"{side}_shin"},
        "ankle": {f"{side}_shin", f"{side}_foot"},
    }
    return own[place]


def recolored(scene: Scene, labels: set[int]) -> Scene:
    """The same scene with some parts in flat magenta paint."""
    paint = np.array([5000, -5000, 5000], np.float32)

    def repaint(solid: Solid) -> Solid:
        if solid.label not in labels:
            return solid
        if isinstance(solid, Head):
            return solid._replace(skin=paint, hair=paint, hairline=-9.0)
        return solid._replace(cloth=plain(paint))

    return scene._replace(solids=[repaint(solid) for solid in scene.solids])


def scene(index: int, size: int = 128) -> Scene:
    return draw_scene(np.random.default_rng([17, index]), size)


def neutral(**changes: object) -> Pose:
    """Upright, arms hanging, average proportions, facing the camera."""
    zeros = np.zeros((2, 4))
    pose = Pose("stand", 0.0, 0.0, 0.0, np.zeros(3), np.zeros(3), zeros, zeros, np.zeros(2), np.ones(7), 1.0)
    return pose._replace(**changes)  # pyright: ignore[reportArgumentType]


def flags(person: Person, size: int = 256) -> dict[str, int]:
    """Visibility of a person alone in the picture."""
    background = np.zeros((size, size, 3), np.float32)
    light = np.array([0, -0.6, -0.8], np.float32)
    alone = Scene(background, np.ones((size, size), np.float32), light, person.solids, [person])
    keypoints = annotate(person, render(alone)[1], SKELETON)["keypoints"]
    return dict(zip(SKELETON.joints, keypoints[2::3], strict=True))


def seen_by_camera(yaw: float, **changes: object) -> dict[str, int]:
    """Visibility of somebody with short hair, without a backpack, 200 pixels tall."""
    for seed in range(50):
        generator = np.random.default_rng(seed)
        person = draw_person(generator, neutral(yaw=yaw, **changes), np.eye(3), (128.0, 230.0), 115.0, 1)
        if not {PERSON + PARTS.index("hair"), PERSON + PARTS.index("bag")} & {solid.label for solid in person.solids}:
            return flags(person)
    raise AssertionError("no such person in 50 seeds")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synthesised") / "set"
    assert synthesize(out, 24, 5, size=128) == out / "annotations.json"
    return out


def test_files_are_coco_and_jpeg(dataset: Path) -> None:
    coco = COCO(str(dataset / "annotations.json"))
    assert sorted(coco.imgs) == list(range(24))
    category = coco.loadCats(1)[0]
    assert tuple(category["keypoints"]) == SKELETON.joints
    assert all(1 <= joint <= 17 for limb in category["skeleton"] for joint in limb)
    for image in coco.imgs.values():
        data = (dataset / "images" / image["file_name"]).read_bytes()
        assert data[:2] == b"\xff\xd8"
        assert data[-2:] == b"\xff\xd9"
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        assert picture is not None
        assert picture.shape == (128, 128, 3)
        assert picture.std() > 5
        assert 1 <= len(coco.getAnnIds(imgIds=image["id"])) <= 4


def test_box_area_and_keypoints_agree_with_the_mask(dataset: Path) -> None:
    coco = COCO(str(dataset / "annotations.json"))
    for person in coco.anns.values():
        mask = coco.annToMask(person)
        rows, columns = np.nonzero(mask)
        assert person["area"] == len(rows) > 0
        size = [np.ptp(columns) + 1, np.ptp(rows) + 1]
        np.testing.assert_array_equal(person["bbox"], [columns.min(), rows.min(), *size])
        keypoints = np.array(person["keypoints"]).reshape(17, 3)
        assert person["num_keypoints"] == np.count_nonzero(keypoints[:, 2])
        for x, y, flag in keypoints:
            assert flag in (0, 1, 2)
            if flag == 0:
                assert (x, y) == (0, 0)
            else:
                assert 0 <= x <= 127
                assert 0 <= y <= 127
            if flag == 2:
                assert mask[round(y), round(x)]


@pytest.mark.parametrize("index", range(12))
def test_visibility_follows_what_paint_reaches_the_picture(index: int) -> None:
    """Give the parts of a joint another colour: its pixel changes exactly where the joint is not hidden by others."""
    original = scene(index)
    picture, labels = render(original)
    for person in original.people:
        keypoints = np.array(annotate(person, labels, SKELETON)["keypoints"]).reshape(17, 3)
        for joint, (_, _, flag) in zip(SKELETON.joints, keypoints, strict=True):
            x, y = person.joints[joint]
            if not (0 <= round(x, 2) <= 127 and 0 <= round(y, 2) <= 127):
                assert flag == 0, joint
                continue
            paint = recolored(original, {PERSON * person.number + PARTS.index(part) for part in joint_parts(joint)})
            pixel = (round(round(y, 2)), round(round(x, 2)))
            # Parts cover their edge pixels partly; a pixel belongs to what covers half of it. The paint is so strong
            # that a change below 500 is under a tenth of cover and one above 3000 more than half at any shade.
            change = np.abs(render(paint)[0][pixel] - picture[pixel]).max()
            if flag == 2:
                assert change > 500, joint
            elif person.facing[joint]:
                assert change < 3000, joint


def test_the_mask_is_where_the_person_was_painted() -> None:
    original = scene(3)
    picture, labels = render(original)
    for person in original.people:
        ids = {PERSON * person.number + part for part in range(len(PARTS))}
        change = np.abs(render(recolored(original, ids))[0] - picture).max(axis=2)
        mask = labels // PERSON == person.number
        assert change[mask].min() > 300
        assert np.mean(change[~mask] > 3000) < 0.01  # nothing but soft edges


def test_from_the_front_everything_is_seen() -> None:
    assert set(seen_by_camera(0).values()) == {2}


def test_from_behind_the_face_is_hidden_and_the_limbs_are_not() -> None:
    apart = np.array([[15.0, 0, 0, 0]] * 2)  # arms beside the thighs
    hidden = {joint for joint, flag in seen_by_camera(180, arms=apart).items() if flag == 1}
    assert hidden == {"nose", "left_eye", "right_eye"}


@pytest.mark.parametrize(("yaw", "near", "far"), [(90, "right", "left"), (-90, "left", "right")])
def test_in_profile_the_far_side_is_hidden(yaw: float, near: str, far: str) -> None:
    # Striding, so that the legs do not cover each other, with both arms behind the back, so that they do.
    stride, swept = np.array([[0, 25.0, 0, 0], [0, -25.0, 0, 0]]), np.array([[0, -40.0, 0, 0]] * 2)
    visible = seen_by_camera(yaw, legs=stride, arms=swept)
    assert all(visible[f"{far}_{joint}"] == 1 for joint in ("eye", "ear", "shoulder", "elbow", "hip"))
    assert all(visible[f"{near}_{joint}"] == 2 for joint in ("eye", "ear", "shoulder", "elbow", "wrist", "hip"))
    assert all(visible[f"{side}_{joint}"] == 2 for side in ("left", "right") for joint in ("knee", "ankle"))
    assert visible["nose"] == 2


def test_an_object_in_front_hides_and_one_behind_does_not() -> None:
    generator = np.random.default_rng(0)
    person = draw_person(generator, neutral(), np.eye(3), (128.0, 230.0), 115.0, 1)
    knee = person.joints["left_knee"]
    grey = np.full(3, 90, np.float32)
    ball = Tube(0, 0, knee, knee + 0.01, (9.0, 9.0), (9.0, 9.0), plain(grey))
    assert flags(person._replace(solids=[*person.solids, ball]))["left_knee"] == 1
    assert flags(person._replace(solids=[*person.solids, ball]))["right_knee"] == 2
    assert flags(person._replace(solids=[ball, *person.solids]))["left_knee"] == 2


def test_kinematics_by_hand() -> None:
    points, _ = body_points(neutral(), np.eye(3))
    np.testing.assert_allclose(points["left_hip"], [0.092, 0, 0], atol=1e-12)  # their left is our right
    np.testing.assert_allclose(points["left_ankle"], [0.092, 0.82, 0], atol=1e-12)  # below: y is down
    np.testing.assert_allclose(points["right_wrist"], [-0.172, -0.51 + 0.045 + 0.535, 0], atol=1e-12)
    assert points["nose"][2] < points["head"][2]  # towards the camera

    spread, _ = body_points(neutral(arms=np.array([[90.0, 0, 0, 0], [90.0, 0, 0, 0]])), np.eye(3))
    np.testing.assert_allclose(spread["left_wrist"] - spread["left_shoulder"], [0.535, 0, 0], atol=1e-12)
    np.testing.assert_allclose(spread["right_wrist"] - spread["right_shoulder"], [-0.535, 0, 0], atol=1e-12)

    # Seen from the side (facing right), seated, a forearm raised: thighs point right, shins down, knees bend backwards.
    seated = np.array([[0, 90.0, 0, 90.0]] * 2)
    raised = np.array([[0, 0, 0, 90.0]] * 2)
    side, _ = body_points(neutral(yaw=90.0, legs=seated, arms=raised), np.eye(3))
    np.testing.assert_allclose(side["left_knee"] - side["left_hip"], [0.42, 0, 0], atol=1e-12)
    np.testing.assert_allclose(side["left_ankle"] - side["left_knee"], [0, 0.40, 0], atol=1e-12)
    np.testing.assert_allclose(side["right_wrist"] - side["right_elbow"], [0.25, 0, 0], atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), yaw=st.floats(-180, 180))
def test_bones_keep_their_length_and_the_camera_only_turns(seed: int, yaw: float) -> None:
    pose = draw_pose(np.random.default_rng(seed))
    points, _ = body_points(pose, np.eye(3))
    turned, _ = body_points(pose._replace(yaw=yaw), np.eye(3))
    _, shoulder, upper_arm, forearm, hip, thigh, shin = pose.stretch
    bones = [(("hip", "knee"), 0.42 * thigh), (("knee", "ankle"), 0.40 * shin)]
    bones += [(("shoulder", "elbow"), 0.285 * upper_arm), (("elbow", "wrist"), 0.25 * forearm)]
    for side in ("left", "right"):
        for (start, end), length in bones:
            for body in (points, turned):
                found = np.linalg.norm(body[f"{side}_{start}"] - body[f"{side}_{end}"])
                assert found == pytest.approx(abs(length))
    assert np.linalg.norm(points["left_hip"] - points["right_hip"]) == pytest.approx(abs(0.184 * hip))
    assert np.linalg.norm(points["left_shoulder"] - points["right_shoulder"]) >= abs(0.34 * shoulder) - 1e-9


def test_variety() -> None:
    counts, heights, shown, frontal = set(), [], np.zeros(3), 0
    people = 0
    for index in range(60):
        drawn = scene(index)
        counts.add(len(drawn.people))
        _, labels = render(drawn)
        for person in drawn.people:
            keypoints = np.array(annotate(person, labels, SKELETON)["keypoints"]).reshape(17, 3)
            shown += np.bincount(keypoints[:, 2].astype(int), minlength=3)
            heights.append(person.scale)
            frontal += person.joints["left_shoulder"][0] > person.joints["right_shoulder"][0]
            people += 1
            assert np.count_nonzero(keypoints[:, 2]) >= 9
    assert counts == {1, 2, 3, 4}
    assert max(heights) > 3 * min(heights)
    assert np.all(shown / shown.sum() > [0.03, 0.15, 0.4])
    assert 0.6 < frontal / people < 0.95  # as in photographs, most face the camera


def test_workers_and_number_of_images_change_nothing(dataset: Path, tmp_path: Path) -> None:
    synthesize(tmp_path / "parallel", 24, 5, size=128, workers=2)
    assert contents(tmp_path / "parallel") == contents(dataset)
    synthesize(tmp_path / "fewer", 3, 5, size=128)
    for name, data in contents(tmp_path / "fewer" / "images").items():
        assert data == (dataset / "images" / name).read_bytes()
    synthesize(tmp_path / "other", 3, 6, size=128)
    assert contents(tmp_path / "other" / "images") != contents(tmp_path / "fewer" / "images")


def test_a_complete_set_is_left_alone_and_an_interrupted_one_is_finished(tmp_path: Path) -> None:
    annotations = synthesize(tmp_path / "set", 3, 1, size=64)
    complete = contents(tmp_path / "set")
    os.utime(annotations, (1, 1))
    synthesize(tmp_path / "set", 3, 1, size=64)
    assert annotations.stat().st_mtime == 1
    # As a kill leaves it: no annotations yet, one picture torn, one missing.
    annotations.unlink()
    (tmp_path / "set/images/000001.jpg").write_bytes(b"\xff\xd8")
    (tmp_path / "set/images/000002.jpg").unlink()
    synthesize(tmp_path / "set", 3, 1, size=64)
    assert contents(tmp_path / "set") == complete


def test_a_folder_with_anything_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/thesis.txt").write_text("the only copy")
    with pytest.raises(UserError, match="not empty"):
        synthesize(tmp_path / "foreign", 1, 0, size=64)
    assert contents(tmp_path / "foreign") == {"thesis.txt": b"the only copy"}
    with pytest.raises(UserError, match="thesis"):
        synthesize(tmp_path / "foreign/thesis.txt", 1, 0, size=64)
    synthesize(tmp_path / "set", 1, 0, size=64)
    with pytest.raises(UserError, match="another set"):
        synthesize(tmp_path / "set", 1, 1, size=64)
    (tmp_path / "set/synthesis.json").write_text("{")
    with pytest.raises(UserError, match="choose another folder"):
        synthesize(tmp_path / "set", 1, 0, size=64)


@pytest.mark.parametrize("wrong", [{"images": 0}, {"size": 8}, {"seed": -1}, {"workers": 0}])
def test_impossible_fields_are_named(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is {next(iter(wrong.values()))}"):
        SynthesizeConfig("out", **wrong)


def test_command_prints_the_annotations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(SynthesizeConfig(str(tmp_path / "set"), images=1, size=64, workers=1))
    path = Path(capsys.readouterr().out.strip())
    assert json.loads(path.read_text())["info"]["synthesis"]["images"] == 1


def test_a_kill_while_the_marker_is_written_does_not_spoil_the_folder(tmp_path: Path) -> None:
    (tmp_path / ".synthesis.json.123.tmp").write_text('{"ima')
    assert synthesize(tmp_path, 1, 0, size=64).exists()
