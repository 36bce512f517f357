"""Hand-off files: strict, self-describing, and never a pickle."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from evaluation.__main__ import main as evaluation
from finetune.__main__ import main as finetune
from poserelay.__main__ import main as poserelay
from poserelay.checkpoint import (
    UNUSED_FUSE_ROWS,
    describe,
    init_from,
    load_exactly,
    load_resume,
    parts_by_joint,
    read_export,
    save_resume,
    upstream_of,
    verify_handoff,
    write_export,
)
from poserelay.command import to_plain
from poserelay.config import InputConfig, ModelConfig, Named
from poserelay.errors import UserError
from poserelay.keypoints import Skeleton, load_skeleton
from poserelay.model import (
    PoseModel,
    SingleStageModel,
    build_backbone,
    build_model,
    build_single_stage,
    load_model,
)
from poserelay.run import is_finished, open_run
from pretrain.__main__ import main as pretrain

BACKBONE = Named("timm", {"model": "test_resnet"})
SMALL = Named("simple", {"deconv_channels": [8]})


def config(skeleton: str = "coco17", head: Named = SMALL) -> ModelConfig:
    return ModelConfig(BACKBONE, head, None, skeleton, InputConfig(height=64, width=64))


def export(model: PoseModel | SingleStageModel, path: Path, **changes: object) -> Path:
    described = describe(
        stage="finetune",
        method="simple",
        model=to_plain(model.config),
        skeleton=model.skeleton,
        config={"seed": 1, "run_dir": "elsewhere", "data": {"images": "a/b"}},
        upstream=None,
        metrics={"AP": 0.5},
    )
    write_export(path, model.state_dict(), {**described, **changes})
    return path


def test_the_file_alone_rebuilds_the_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_model(config()).eval()
    images = torch.randn(2, 3, 64, 64)
    again = load_model(export(model, tmp_path / "a.safetensors"))
    assert torch.equal(again(images), model(images))
    assert again.skeleton == model.skeleton
    assert again.input == model.input


def test_equal_models_give_equal_bytes_and_no_paths(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_model(config())
    one, two = export(model, tmp_path / "a.safetensors"), export(model, tmp_path / "b.safetensors")
    assert one.read_bytes() == two.read_bytes()
    _, described = read_export(one)
    assert "elsewhere" not in json.dumps(described)
    assert "a/b" not in json.dumps(described)
    assert described["config"] == {"seed": 1}
    assert set(described) >= {
        "format",
        "stage",
        "method",
        "backbone",
        "head",
        "refiner",
        "skeleton",
        "input",
        "upstream",
    }


def test_prefixes_of_compiled_and_parallel_modules_go(tmp_path: Path) -> None:
    model = build_model(config())
    wrapped = {f"module._orig_mod.{name}": value for name, value in model.state_dict().items()}
    export(model, tmp_path / "a.safetensors")
    _, described = read_export(tmp_path / "a.safetensors")
    write_export(tmp_path / "b.safetensors", wrapped, described)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_rows_follow_their_joints_between_skeletons(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = build_model(config("coco17"))
    target = build_model(config("lsp14"))
    fresh = {name: value.clone() for name, value in target.head.state_dict().items()}
    report = init_from(target, export(source, tmp_path / "a.safetensors"))
    assert report.joints_initialised == ("neck", "head_top")
    coco, lsp = load_skeleton("coco17").joints, load_skeleton("lsp14").joints
    for row, joint in enumerate(lsp):
        weight = target.head.state_dict()["final_layer.weight"][row]
        if joint in coco:
            assert torch.equal(weight, source.head.state_dict()["final_layer.weight"][coco.index(joint)])
        else:
            assert torch.equal(weight, fresh["final_layer.weight"][row])
    for name, value in source.backbone.state_dict().items():
        assert torch.equal(value, target.backbone.state_dict()[name])


def test_both_decoders_of_ccm_follow_their_joints(tmp_path: Path) -> None:
    """A -> C of CCM's Table 5: AIC's 14 joints to COCO's 17."""
    head = Named("ccm", {"channels": [8]})
    source, target = build_model(config("aic14", head)), build_model(config("coco17", head))
    report = init_from(target, export(source, tmp_path / "aic.safetensors"))
    assert report.joints_initialised == ("nose", "left_eye", "right_eye", "left_ear", "right_ear")
    row = source.skeleton.joints.index("left_knee")
    for name in ("final_layer.weight", "auxiliary.final_layer.weight"):
        copied, own = source.head.state_dict()[name], target.head.state_dict()[name]
        assert own.shape[0] == 17
        assert torch.equal(own[target.skeleton.joints.index("left_knee")], copied[row])


def test_the_auxiliary_decoder_may_be_in_one_of_two_models_alone(tmp_path: Path) -> None:
    whole = build_model(config(head=Named("ccm", {"channels": [8]})))
    alone = build_model(config(head=Named("ccm", {"channels": [8], "auxiliary": False})))
    with_it, without = export(whole, tmp_path / "with.safetensors"), export(alone, tmp_path / "without.safetensors")
    fresh = {name: value.clone() for name, value in whole.head.state_dict().items()}
    assert init_from(whole, without).news == ["the auxiliary decoder"]
    for name, value in whole.head.state_dict().items():
        assert torch.equal(value, fresh[name] if name.startswith("auxiliary.") else alone.head.state_dict()[name])
    assert init_from(alone, with_it).news == []
    assert torch.equal(alone.head.state_dict()["mixers.0.deconv.weight"], fresh["mixers.0.deconv.weight"])
    narrow = build_model(config(head=Named("ccm", {"channels": [4]})))
    with pytest.raises(UserError, match="with the same kwargs"):
        init_from(narrow, with_it)


@given(data=st.data())
@settings(deadline=None)
def test_parts_by_joint_on_any_skeletons(data: st.DataObject) -> None:
    names = [f"joint{index}" for index in range(8)]
    source = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    target = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    state = {
        "rows": torch.arange(len(source)),
        "pairs": torch.stack([torch.arange(2) + 10 * row for row in range(len(source))]).flatten().expand(3, -1),
        "all": torch.ones(5),
    }
    own = {"rows": -torch.ones(len(target)), "pairs": -torch.ones(3, 2 * len(target)), "all": torch.zeros(5)}
    axes = {"rows": 0, "pairs": 1, "elsewhere": 0}
    copied, missing = parts_by_joint(state, own, axes, Skeleton("a", tuple(source)), Skeleton("b", tuple(target)))
    expected = [source.index(joint) if joint in source else -1 for joint in target]
    assert copied["rows"].tolist() == expected
    pairs = [entry for row in expected for entry in ((-1, -1) if row == -1 else (10 * row, 10 * row + 1))]
    assert copied["pairs"].tolist() == [pairs] * 3
    assert copied["all"] is state["all"]
    assert list(missing) == [joint for joint in target if joint not in source]


def single_stage(skeleton: Skeleton, **kwargs: object) -> SingleStageModel:
    """With weights and statistics of a size that shows."""
    head = Named("cir", {"general_channels": 8, "joint_channels": 4, "instance_channels": 6, "points": 2, **kwargs})
    model = build_single_stage(ModelConfig(BACKBONE, head, None, skeleton.name, InputConfig(64, 64)), skeleton)
    for name, value in model.head.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5 if name.endswith("running_var") else 0.3 * torch.randn_like(value))
    return model.eval()


CONSTRUCTIONS = [
    {},
    {"pose_query": "automatic", "quality": True},
    {"pose_query": "keypoint", "points": 0},
    {"pose_query": "none", "kqe": False},
]


@pytest.mark.parametrize("kwargs", CONSTRUCTIONS, ids=str)
def test_a_single_stage_model_follows_its_joints(kwargs: dict[str, object], tmp_path: Path) -> None:
    """With the joints in another order it says the same, and nothing of a joint is left behind or mixed up."""
    torch.manual_seed(0)
    coco = load_skeleton("coco17")
    order = torch.randperm(17).tolist()
    turned = Skeleton("turned", tuple(coco.joints[index] for index in order))
    source, target = single_stage(coco, **kwargs), single_stage(turned, **kwargs)
    file = export(source, tmp_path / "a.safetensors")
    assert init_from(target, file).news == []
    images, pixels = torch.randn(2, 3, 64, 64), torch.tensor([[[3.0, 5.0], [8.0, 1.0]]]).expand(2, -1, -1)
    with torch.inference_mode():
        maps, found = source(images, pixels)
        maps_of_turned, found_of_turned = target(images, pixels)
    assert maps.score.std() > 0.01
    assert found.std() > 0.01
    torch.testing.assert_close(maps_of_turned.confidence, maps.confidence)
    torch.testing.assert_close(found_of_turned, found[:, :, order])


@pytest.mark.parametrize("kwargs", CONSTRUCTIONS, ids=str)
def test_a_single_stage_model_goes_to_other_joints(kwargs: dict[str, object], tmp_path: Path) -> None:
    torch.manual_seed(0)
    coco, crowdpose = load_skeleton("coco17"), load_skeleton("crowdpose14")
    source, target = single_stage(coco, **kwargs), single_stage(crowdpose, **kwargs)
    fresh = {name: value.clone() for name, value in target.head.state_dict().items()}
    report = init_from(target, export(source, tmp_path / "a.safetensors"))
    assert set(report.joints_initialised) == set(crowdpose.joints) - set(coco.joints)
    assert len(report.joints_initialised) == 2
    images, pixels = torch.randn(1, 3, 64, 64), torch.tensor([[[3.0, 5.0]]])
    with torch.inference_mode():
        (_, found), (_, again) = source(images, pixels), target(images, pixels)
    shared = [joint for joint in crowdpose.joints if joint in coco.joints]
    ours, theirs = ([skeleton.joints.index(joint) for joint in shared] for skeleton in (crowdpose, coco))
    torch.testing.assert_close(again[:, :, ours], found[:, :, theirs])
    bias = target.head.state_dict()["to_keypoint.bias"].unflatten(0, (14, 2))
    for joint in report.joints_initialised:
        row = crowdpose.joints.index(joint)
        assert torch.equal(bias[row], fresh["to_keypoint.bias"].unflatten(0, (14, 2))[row])
    for name in ("general.0.weight", "instance.0.weight", "score.weight"):
        assert torch.equal(target.head.state_dict()[name], source.head.state_dict()[name])


def test_a_single_stage_model_starts_from_its_own_file_exactly(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source, target = (single_stage(load_skeleton("coco17"), quality=True) for _ in range(2))
    assert init_from(target, export(source, tmp_path / "a.safetensors")).news == []
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value)
    narrow = single_stage(load_skeleton("crowdpose14"), quality=True, joint_channels=3)
    with pytest.raises(UserError, match=r"joint_features\.0\.weight is .* with the same kwargs"):
        init_from(narrow, tmp_path / "a.safetensors")


def test_a_single_stage_model_starts_from_a_pretrained_backbone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(BACKBONE)
    described = describe(
        stage="pretrain",
        method="mscl",
        model={"backbone": to_plain(BACKBONE), "input": to_plain(InputConfig(224, 224))},
        skeleton=None,
        config={},
        upstream=None,
        metrics={},
    )
    state = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    write_export(tmp_path / "a.safetensors", state, described)
    model = single_stage(load_skeleton("coco17"))
    before = {name: value.clone() for name, value in model.head.state_dict().items()}
    report = init_from(model, tmp_path / "a.safetensors")
    assert (report.stage, report.head_copied) == ("pretrain", False)
    for name, value in backbone.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[name], value)
    for name, value in before.items():
        assert torch.equal(model.head.state_dict()[name], value)


def test_top_down_and_single_stage_models_do_not_start_from_each_other(tmp_path: Path) -> None:
    top_down, whole = build_model(config()), single_stage(load_skeleton("coco17"))
    with pytest.raises(UserError, match=r"holds a simple head, the config names cir; .* from a backbone alone"):
        init_from(whole, export(top_down, tmp_path / "a.safetensors"))
    with pytest.raises(UserError, match=r"holds a cir head, the config names simple; .* export-weights` and `import"):
        init_from(top_down, export(whole, tmp_path / "b.safetensors"))


@pytest.mark.slow
def test_hrnets_unused_fusions_are_the_one_exception(tmp_path: Path) -> None:
    torch.manual_seed(0)
    named = Named("hrnet_w32")
    backbone = build_backbone(named)
    described = describe(
        stage="pretrain",
        method="mscl",
        model={"backbone": to_plain(named), "input": to_plain(InputConfig())},
        skeleton=None,
        config={},
        upstream=None,
        metrics={},
    )
    state = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    write_export(tmp_path / "a.safetensors", state, described)
    model = build_model(ModelConfig(named, Named("hrnet"), None, "coco17"))
    init_from(model, tmp_path / "a.safetensors")
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, backbone.state_dict()[name])
    assert not UNUSED_FUSE_ROWS.match("stage4.2.fuse_layers.0.9")


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """The hand-off file of a finished run, with those of its two networks beside it."""
    run = open_run(tmp_path / "run", "semi", {"seed": 1}, "auto")
    model = build_model(config())
    for name in ("model", "net1", "net2"):
        export(model, run.path / f"export/{name}.safetensors", method=name)
    run.heartbeat(7, 9)
    run.finish({}, None, threads=1)
    run.close()
    return run.export_path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_every_file_that_a_run_handed_off_is_recorded(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = json.loads((finished.parents[1] / "done.json").read_text())
    files = [finished.with_name(f"{name}.safetensors") for name in ("model", "net1", "net2")]
    assert done["exports"] == {file.name: digest(file) for file in files}
    assert done["export_sha256"] == digest(finished)
    assert [verify_handoff(file) for file in files] == [digest(file) for file in files]
    assert len({digest(file) for file in files}) == 3
    monkeypatch.chdir(finished.parent)
    assert upstream_of("model.safetensors") == {"stage": "finetune", "sha256": digest(finished)}


def test_the_record_of_an_older_run_is_enough(finished: Path) -> None:
    file = finished.parents[1] / "done.json"
    done = json.loads(file.read_text())
    del done["exports"]
    file.write_text(json.dumps(done))
    assert verify_handoff(finished) == digest(finished)
    with pytest.raises(UserError, match=r"not a file that the run .* wrote; it has model\.safetensors"):
        verify_handoff(finished.with_name("net1.safetensors"))


@pytest.mark.parametrize("name", ["model", "net2"])
def test_a_file_that_changed_since_its_run_finished(finished: Path, name: str) -> None:
    path = finished.with_name(f"{name}.safetensors")
    assert is_finished(finished.parents[1], {"seed": 1})
    export(build_model(config("lsp14")), path)
    with pytest.raises(UserError, match=rf"{name}\.safetensors: has changed since the run .*run finished; start that"):
        verify_handoff(path)
    assert not is_finished(finished.parents[1], {"seed": 1})  # so that starting it again does write it anew
    path.unlink()
    with pytest.raises(UserError, match=rf"{name}\.safetensors: is gone since the run"):
        verify_handoff(path)
    assert not is_finished(finished.parents[1], {"seed": 1})


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", '{"export_sha256": null, "exports": [1]}'])
def test_a_damaged_record_is_told(finished: Path, text: str) -> None:
    (finished.parents[1] / "done.json").write_text(text)
    with pytest.raises(UserError, match=r"done\.json of .*run is damaged; start that run again"):
        verify_handoff(finished)


def test_files_of_no_run_are_taken_as_they_are(finished: Path, tmp_path: Path) -> None:
    """Also in a folder called export; and a run directory's other folders are not its hand-off."""
    for folder in ("export", "elsewhere", "run/copies"):
        (tmp_path / folder).mkdir()
        file = tmp_path / folder / "model.safetensors"
        export(build_model(config("lsp14")), file)
        assert verify_handoff(file) == digest(file)
    with pytest.raises(UserError, match="no such file"):
        verify_handoff(tmp_path / "elsewhere/none.safetensors")
    (tmp_path / "a.pth").write_bytes(pickle.dumps(Exploit(tmp_path / "marker")))
    with pytest.raises(UserError, match="not a hand-off file"):
        upstream_of(tmp_path / "a.pth")


COMMANDS = {
    "finetune": (
        finetune,
        "--model.backbone.name resnet18 --model.head.name simple --data.annotations a --data.images i --run_dir NEW "
        "--init_from FILE",
    ),
    "linear": (pretrain, "linear --data.train a --data.validation a --run_dir NEW --init_from FILE"),
    "select": (poserelay, "select --images i --count 3 --out NEW --checkpoint FILE"),
    "test": (evaluation, "test --annotations a --images i --out NEW --checkpoint FILE"),
    "predict": (evaluation, "predict --images i --out NEW --checkpoint FILE"),
    "gradcam": (evaluation, "visualize --figure gradcam --device cpu --images i --out NEW --checkpoints [FILE]"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_reader_of_an_unfinished_run_stops_first(
    finished: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (finished.parents[1] / "done.json").unlink()
    status = finished.parents[1] / "status.json"
    status.write_text(status.read_text().replace('"done"', '"running"'))
    main, words = COMMANDS[command]
    assert main(words.replace("NEW", str(tmp_path / "new")).replace("FILE", str(finished)).split()) == 2
    error = capsys.readouterr().err
    assert f"the run {finished.parents[1]} has not finished (running, step 7 of 9); start that run again" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()


class Exploit:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_a_pickle_is_refused_without_running_it(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(pickle.dumps({"state_dict": Exploit(tmp_path / "marker")}))
    for read in (read_export, load_model, lambda file: init_from(build_model(config()), file)):
        with pytest.raises(UserError, match="not a hand-off file"):
            read(path)
    assert not (tmp_path / "marker").exists()


def test_a_pickle_in_place_of_a_resume_file_is_refused_without_running_it(tmp_path: Path) -> None:
    torch.save({"model": Exploit(tmp_path / "marker")}, tmp_path / "last.pt")
    with pytest.raises(UserError, match="no resume file is whole"):
        load_resume(tmp_path)
    assert not (tmp_path / "marker").exists()


def test_files_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(UserError, match="no such file"):
        read_export(path)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(UserError, match="without the metadata key"):
        read_export(path)
    save_file({"a": torch.ones(1)}, path, metadata={"poserelay": "{"})
    with pytest.raises(UserError, match="damaged"):
        read_export(path)
    save_file({"a": torch.ones(1)}, path, metadata={"poserelay": '{"format": 99}'})
    with pytest.raises(UserError, match="format 99"):
        read_export(path)
    export(build_model(config()), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a hand-off file"):
        read_export(path)


def test_other_keys_and_shapes_are_named(tmp_path: Path) -> None:
    model = build_model(config())
    state = model.state_dict()
    renamed = {("head.final_layer.wait" if name == "head.final_layer.weight" else name): v for name, v in state.items()}
    with pytest.raises(UserError, match=r"missing head\.final_layer\.weight; unexpected head\.final_layer\.wait"):
        load_exactly(model, renamed, "file")
    with pytest.raises(UserError, match=r"head\.final_layer\.bias is \[3\], expected \[17\]"):
        load_exactly(model, {**state, "head.final_layer.bias": torch.zeros(3)}, "file")
    wider = build_model(config(head=Named("simple", {"deconv_channels": [16]})))
    with pytest.raises(UserError, match="does not fit this model"):
        init_from(wider, export(model, tmp_path / "a.safetensors"))


def test_resume_files_keep_the_one_before(tmp_path: Path) -> None:
    assert load_resume(tmp_path) is None
    for step in (1, 2, 3):
        save_resume(tmp_path, {"step": step, "weights": torch.full((3,), float(step))})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "previous.pt"]
    assert load_resume(tmp_path)["step"] == 3  # pyright: ignore[reportOptionalSubscript]
    (tmp_path / "last.pt").unlink()  # as between the two renames
    assert load_resume(tmp_path)["step"] == 2  # pyright: ignore[reportOptionalSubscript]
    (tmp_path / "previous.pt").write_bytes(b"")
    with pytest.raises(UserError, match="no resume file is whole"):
        load_resume(tmp_path)
