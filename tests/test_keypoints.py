from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from poserelay.errors import UserError
from poserelay.keypoints import (
    Skeleton,
    load_skeleton,
    match_joints,
    packaged_skeletons,
    resolve_skeleton,
    skeleton_from_category,
)

COCO = load_skeleton("coco17").joints


def test_packaged_skeletons() -> None:
    assert set(packaged_skeletons()) == {"coco17", "crowdpose14", "mpii16", "aic14", "lsp14", "posetrack18"}


@pytest.mark.parametrize("name", packaged_skeletons())
def test_packaged_skeleton_is_symmetric(name: str) -> None:
    skeleton = load_skeleton(name)
    assert skeleton.name == name
    # Mirroring twice changes nothing, mirrored joints share their sigma, and every left has its right.
    assert [skeleton.flip_index[k] for k in skeleton.flip_index] == list(range(len(skeleton.joints)))
    if name != "aic14":  # measured for each side
        assert [skeleton.sigmas[k] for k in skeleton.flip_index] == list(skeleton.sigmas)
    mirrored = [skeleton.joints[k] for k in skeleton.flip_index]
    swapped = [joint.replace("left", "?").replace("right", "left").replace("?", "right") for joint in skeleton.joints]
    assert mirrored == swapped
    assert len(skeleton.prcc_pairs) == 8
    assert len(skeleton.groups) == (6 if name == "coco17" else 4)
    assert skeleton.sigmas_assumed == (name in {"mpii16", "lsp14", "posetrack18"})


@pytest.mark.parametrize("name", packaged_skeletons())
def test_round_trip_through_json(name: str) -> None:
    skeleton = load_skeleton(name)
    assert Skeleton.from_dict(json.loads(json.dumps(skeleton.to_dict()))) == skeleton


def test_coco_agrees_with_pycocotools() -> None:
    from pycocotools.cocoeval import Params

    skeleton = load_skeleton("coco17")
    assert skeleton.sigmas == pytest.approx(Params(iouType="keypoints").kpt_oks_sigmas)
    assert skeleton.flip_index == (0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15)
    assert skeleton.indices(skeleton.upper_body) == tuple(range(11))  # HRNet's upper_body_ids


def test_mpii_upper_body_is_hrnets() -> None:
    skeleton = load_skeleton("mpii16")
    assert sorted(skeleton.indices(skeleton.upper_body)) == list(range(7, 16))


def test_match_joints_ignores_case_and_separators() -> None:
    assert match_joints(["Left Wrist", "HEAD-top", "nose"], ["nose", "left_wrist", "headTop", "tail"]) == [
        2,
        0,
        1,
        None,
    ]


def test_indices_of_unknown_joint() -> None:
    with pytest.raises(UserError, match=r"coco17.*left_wrst.*did you mean 'left_wrist'"):
        load_skeleton("coco17").indices(["nose", "left_wrst"])


def test_unknown_skeleton_lists_the_choices() -> None:
    with pytest.raises(UserError, match=r"coco71.*did you mean 'coco17'.*aic14.*posetrack18"):
        load_skeleton("coco71")
    with pytest.raises(UserError, match=r"absent\.yaml.*cannot read"):
        load_skeleton("absent.yaml")


def test_user_skeleton_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "mouse.yaml"
    path.write_text(
        yaml.safe_dump({"name": "mouse", "joints": ["nose", "paw_L", "paw_R"], "flip_pairs": [["paw_L", "paw_R"]]})
    )
    skeleton = load_skeleton(path)
    assert skeleton.flip_index == (0, 2, 1)
    assert skeleton.sigmas == (0.05, 0.05, 0.05)
    assert skeleton.sigmas_assumed
    path.write_text("name: [")
    with pytest.raises(UserError, match=r"mouse\.yaml: not a YAML file"):
        load_skeleton(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"joint": []}, "unknown field \"joint\" .did you mean 'joints'"),
        ({"joints": "nose"}, "field joints: expected a list"),
        ({"joints": []}, "field joints: empty"),
        ({"joints": ["a", "A_"]}, "field joints: 'A_' appears twice"),
        ({"name": None}, "field name"),
        ({"flip_pairs": [["left", "rihgt"]]}, "field flip_pairs: unknown joint 'rihgt' .did you mean 'right'"),
        ({"flip_pairs": [["left", "left"]]}, "field flip_pairs: 'left' appears twice"),
        ({"flip_pairs": [["left"]]}, "field flip_pairs: expected a pair"),
        ({"sigmas": [0.1]}, "field sigmas: 1 values for 3 joints"),
        ({"sigmas": [0.1, 0.0, 0.1]}, "field sigmas: found 0.0"),
        ({"sigmas": [0.1, float("nan"), 0.1]}, "field sigmas: found nan"),
        ({"sigmas": ["0.1", 0.1, 0.1]}, "field sigmas: expected a list of numbers"),
        ({"sigmas_assumed": "no"}, "field sigmas_assumed"),
        ({"groups": [{"proximal": ["left", "right"], "distal": "nose"}]}, "field groups: expected"),
        ({"upper_body": ["tail"]}, "field upper_body: unknown joint 'tail'"),
        ({"torso": ["left", "tail"]}, "field torso: unknown joint 'tail'"),
    ],
)
def test_wrong_fields_are_named(change: dict, message: str) -> None:
    data = {"name": "toy", "joints": ["nose", "left", "right"]} | change
    with pytest.raises(UserError, match=f"toy.yaml: .*{message}"):
        Skeleton.from_dict(data, "toy.yaml")


def test_category_gives_mirror_pairs_and_limbs() -> None:
    joints = [
        "nose",
        "left_eye",
        "right_eye",
        "L_ear",
        "R_ear",
        "pawL",
        "pawR",
        "bright",
        "paw1LH_top",
        "paw4RH_top",
        "left_x",
    ]
    skeleton = skeleton_from_category({"name": "cat", "keypoints": joints, "skeleton": [[1, 2], [1, 3]]})
    assert skeleton.flip_pairs == (("left_eye", "right_eye"), ("L_ear", "R_ear"), ("pawL", "pawR"))
    assert skeleton.limbs == (("nose", "left_eye"), ("nose", "right_eye"))
    assert skeleton.sigmas_assumed


@pytest.mark.parametrize("edges", [[], None, [[1, 2], [16, 14]], [[0, 1]]])
def test_category_with_unusable_limbs(edges: list | None) -> None:
    assert skeleton_from_category({"name": "cat", "keypoints": ["a", "b"], "skeleton": edges}).limbs == ()


def test_auto_prefers_the_packaged_skeleton_with_measured_sigmas() -> None:
    lspet = [joint.replace("_", " ").title() for joint in load_skeleton("lsp14").joints]
    assert resolve_skeleton("auto", {"name": "person", "keypoints": list(COCO)}) == load_skeleton("coco17")
    assert resolve_skeleton("auto", {"name": "person", "keypoints": lspet}) == load_skeleton("lsp14")
    assert resolve_skeleton("auto", {"name": "person", "keypoints": list(COCO[::-1])}).name == "person"
    assert resolve_skeleton("mpii16", {"name": "person", "keypoints": list(COCO)}).name == "mpii16"
