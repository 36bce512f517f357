"""`poserelay convert`: the annotations of other datasets, as their sites ship them, as one COCO-keypoint JSON.

One file per dataset reads its layouts into COCO records; what several need is here. Ids count from 1 in the order of
the source (a COCO file keeps its own), keypoints and boxes are in image pixels whose (0, 0) is the centre of the
top-left pixel, and the joints are those of the packaged skeleton, or the file's own (deeplabcut, coco). No `area` is
added (but OCHuman's, the whole box): `read_coco` then takes 0.53 of the box. Imports no torch.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import scipy.io
from numpy.typing import ArrayLike
from PIL import Image
from tqdm import tqdm

from ..config import ConvertConfig
from ..errors import UserError
from ..keypoints import Skeleton, load_skeleton, match_joints
from ..run import write_json, write_text

SKELETONS = {
    "mpii": "mpii16",
    "aic": "aic14",
    "lsp": "lsp14",
    "crowdpose": "crowdpose14",
    "ochuman": "coco17",
    "posetrack18": "posetrack18",
}
"""Packaged skeletons of the datasets that have one."""
CATEGORY = 1
"""Id of the one category."""
THREADS = 16
"""They wait for the disk, mostly, so that their number does not follow the cores'."""
LOST = "on a picture that is missing or unreadable"
NO_AREA = "whose box has no area"
OUTSIDE = "whose box lies outside its picture"
NAMED = 20
"""Names that the report lists of what was left out for one reason."""


@dataclass
class Conversion:
    """COCO records, and what was left out of them."""

    images: list[dict[str, Any]] = field(default_factory=list)
    annotations: list[dict[str, Any]] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    """How many of what, and why, such as "persons whose box has no area"."""
    names: dict[str, list[str]] = field(default_factory=dict)
    """The first `NAMED` of what was dropped for each reason, as a message would call them."""
    notes: list[str] = field(default_factory=list)
    """What else the user should know."""
    skeleton: Skeleton | None = None
    """Of a dataset whose joints are the file's own."""
    boxes: list[dict[str, Any]] = field(default_factory=list)
    """COCO detections of the persons of a hidden test set, instead of annotations."""

    def drop(self, reason: str, name: str) -> None:
        """Count what is left out, and keep its name where there are few."""
        self.dropped[reason] += 1
        kept = self.names.setdefault(reason, [])
        if len(kept) < NAMED:
            kept.append(name)


def main(config: ConvertConfig) -> None:
    """Entry of `poserelay convert`; prints the path of the JSON, and on stderr what is in it and what was left out.

    The same goes into a report beside the JSON (`report_path`), with names. The same input gives the same bytes. Raises
    UserError: as the dataset's reader and `check_out`; no person is left.
    """
    out = Path(config.out)
    check_out(out, config)
    found = read(config)
    found.dropped = +found.dropped  # without zeros
    if not found.annotations and not found.boxes:
        raise UserError(f"{config.annotations}: no person left to convert ({_listed(found) or 'it has none'})")
    skeleton = found.skeleton or load_skeleton(SKELETONS[config.dataset])
    write_json(
        out,
        {
            "info": _info(config.dataset),
            "images": found.images,
            "annotations": found.annotations,
            "categories": [category(skeleton, found.skeleton.name if found.skeleton else "person")],
        },
    )
    if found.boxes:
        write_json(boxes_path(out), found.boxes)
        found.notes.append(f"the {len(found.boxes)} persons' boxes are in {boxes_path(out).name}; no joints are known")
    labelled = sum(any(record["keypoints"][2::3]) and not record["iscrowd"] for record in found.annotations)
    if crowds := sum(record["iscrowd"] for record in found.annotations):
        found.notes.append(
            f"{crowds} of the persons are marked iscrowd, and neither trained on nor counted as labelled"
        )
    counts = {"pictures": len(found.images), "persons": len(found.annotations), "labelled": labelled}
    dropped = [
        {"reason": reason, "count": count, "names": found.names.get(reason, [])}
        for reason, count in found.dropped.items()
    ]
    report = {"info": _info(config.dataset), **counts, "dropped": dropped, "notes": found.notes}
    write_text(report_path(out), json.dumps(report, indent=1) + "\n")
    told = f"{counts['pictures']} pictures, {counts['persons']} persons"
    print(f"convert: {told}, {labelled} of them with labelled joints", file=sys.stderr)
    for line in [f"left out: {count} {reason}" for reason, count in found.dropped.items()] + found.notes:
        print(f"convert: {line}", file=sys.stderr)
    print(out)


def boxes_path(out: Path) -> Path:
    """Where the boxes of a hidden test set go: test.boxes.json beside test.json."""
    return out.with_suffix(".boxes.json")


def report_path(out: Path) -> Path:
    """Where the report on a conversion goes: train.report.json beside train.json."""
    return out.with_suffix(".report.json")


def read(config: ConvertConfig) -> Conversion:
    """The records of the dataset that the configuration names."""
    from .aic import read_aic
    from .coco import read_any_coco
    from .crowdpose import read_crowdpose
    from .deeplabcut import read_deeplabcut
    from .lsp import read_lsp
    from .mpii import read_mpii, read_mpii_test
    from .ochuman import read_ochuman
    from .posetrack18 import read_posetrack18

    path = Path(config.annotations)
    pictures = None if config.images is None else Pictures(Path(config.images), config.max_unreadable)
    if config.dataset == "mpii":
        if config.split == "test":
            return read_mpii_test(path, pictures)
        return read_mpii(path, pictures, None if config.head_boxes is None else Path(config.head_boxes))
    if config.dataset == "aic":
        return read_aic(path, pictures)
    if config.dataset == "lsp":
        return read_lsp(path, pictures, config.split)
    if config.dataset == "ochuman":
        return read_ochuman(path, config.split, config.iou_range)
    if config.dataset == "posetrack18":
        return read_posetrack18(path, pictures, config.ignore_regions)
    if config.dataset in ("deeplabcut", "coco"):
        skeleton = None if config.skeleton is None else load_skeleton(config.skeleton)
        reader = read_deeplabcut if config.dataset == "deeplabcut" else read_any_coco
        return reader(path, pictures, skeleton, config.box_margin)
    return read_crowdpose(path)


def check_out(out: Path, config: ConvertConfig) -> None:
    """Raise UserError unless `out` and its report are new files, or ones of this dataset that this command wrote."""
    if config.dataset == "posetrack18" and out.resolve().parent == Path(config.annotations).resolve():
        raise UserError(f"--out {out}: is in the folder that --annotations reads; name another one")
    for file in (out, report_path(out)):
        start = json.dumps({"info": _info(config.dataset)}, indent=None if file is out else 1)
        if file.exists() and not (file.is_file() and _starts_with(file, start.rstrip("}\n ").encode())):
            raise UserError(
                f"--out {file}: exists and is no {config.dataset} file that we converted; name another file"
            )
    for name in ("annotations", "head_boxes"):
        source = getattr(config, name)
        if source is not None and Path(source).exists() and out.exists() and out.samefile(source):
            raise UserError(f"--out {out}: would write over what --{name} reads; name another file")


def category(skeleton: Skeleton, name: str = "person") -> dict[str, Any]:
    """The COCO category with the joints and limbs of a skeleton."""
    limbs = [[index + 1 for index in skeleton.indices(limb)] for limb in skeleton.limbs]
    return {
        "id": CATEGORY,
        "name": name,
        "supercategory": name,
        "keypoints": list(skeleton.joints),
        "skeleton": limbs,
    }


def person(number: int, image_id: int, box: Sequence[float], joints: Sequence[Sequence[float]]) -> dict[str, Any]:
    """A COCO annotation. box: xywh; joints: K of (x, y, visibility), image pixels; unlabelled ones become 0, 0, 0."""
    keypoints: list[float] = []
    for x, y, visibility in joints:
        keypoints += (x, y, int(visibility)) if visibility else (0, 0, 0)
    return {
        "id": number,
        "image_id": image_id,
        "category_id": CATEGORY,
        "iscrowd": 0,
        "bbox": list(box),
        "keypoints": keypoints,
        "num_keypoints": sum(v > 0 for v in keypoints[2::3]),
    }


def joints_box(places: np.ndarray, margins: ArrayLike) -> list[float]:
    """Box xywh about joints `[n, 2]`, grown on each side by `margins` (one, or those of x and y), image pixels."""
    low, high = places.min(axis=0), places.max(axis=0)
    return [*(low - margins).tolist(), *(high - low + 2 * np.asarray(margins)).tolist()]


def clipped_box(places: np.ndarray, margin: float, size: tuple[int, int]) -> list[float]:
    """`joints_box` within a picture of (width, height); with a side of 0 or less where it lies outside."""
    x, y, width, height = joints_box(places, margin)
    left, top = max(x, 0.0), max(y, 0.0)
    return [left, top, min(x + width, float(size[0])) - left, min(y + height, float(size[1])) - top]


def box_problem(record: Mapping[str, Any], size: tuple[int, int]) -> str | None:
    """Why `read_coco` would refuse an annotation on a picture of (width, height); None where it would not."""
    x, y, width, height = record["bbox"]
    if not record["num_keypoints"]:
        return None
    if width <= 0 or height <= 0:
        return NO_AREA
    return OUTSIDE if x >= size[0] or y >= size[1] or x + width <= 0 or y + height <= 0 else None


@dataclass(frozen=True)
class Pictures:
    """A folder of pictures, of which only the headers are read."""

    folder: Path
    max_unreadable: float
    """Share of the pictures asked for that may be missing or unreadable."""

    def sizes(self, names: Sequence[str]) -> dict[str, tuple[int, int]]:
        """(width, height) of each picture as stored, without those that are missing or unreadable.

        Raises:
            UserError: no such folder, or more pictures than `max_unreadable` are missing or unreadable.
        """
        if not self.folder.is_dir():
            raise UserError(f"{self.folder}: no such folder of pictures; check --images")
        found: dict[str, tuple[int, int]] = {}
        with (
            ThreadPoolExecutor(THREADS) as pool,
            tqdm(total=len(names), desc="headers", disable=not sys.stderr.isatty(), leave=False) as bar,
        ):
            for part in pool.map(self._sizes, [names[start : start + 256] for start in range(0, len(names), 256)]):
                found |= {name: size for name, size in part.items() if size is not None}
                bar.update(len(part))
        lost = [name for name in names if name not in found]
        if len(lost) > self.max_unreadable * len(names):
            raise UserError(
                f"{self.folder / lost[0]}: missing or unreadable, as {len(lost)} of {len(names)} pictures are; check "
                "--images, complete the download, or allow it by --max_unreadable"
            )
        return found

    def _sizes(self, names: Sequence[str]) -> dict[str, tuple[int, int] | None]:
        return {name: _header_size(self.folder / name) for name in names}


def require_pictures(pictures: Pictures | None, path: Path) -> Pictures:
    """Raise UserError where a layout without the pictures' sizes comes without the pictures."""
    if pictures is None:
        raise UserError(f"{path}: does not say how large its pictures are; name their folder by --images")
    return pictures


def place_pictures(found: Conversion, names: Sequence[str], pictures: Pictures, first: int = 1) -> dict[str, int]:
    """Add the pictures to `found.images`, numbered from `first`; returns the id of each that could be read."""
    unique = list(dict.fromkeys(names))
    sizes = pictures.sizes(unique)
    ids = {name: number for number, name in enumerate(unique, first) if name in sizes}
    for name, number in ids.items():
        width, height = sizes[name]
        found.images.append({"id": number, "file_name": name, "width": width, "height": height})
    for name in unique:
        if name not in ids:
            found.drop("pictures that are missing or unreadable", name)
    return ids


def fill_sizes(records: Sequence[dict[str, Any]], pictures: Pictures | None, path: Path, found: Conversion) -> set[int]:
    """Give records of `images` the width and height that they lack; returns the ids of those whose picture is lost.

    Raises UserError: as `require_pictures` where one lacks them.
    """
    lacking = [
        record
        for record in records
        if (record.get("width") is None or record.get("height") is None) and isinstance(record.get("file_name"), str)
    ]
    if not lacking:
        return set()
    sizes = require_pictures(pictures, path).sizes(list(dict.fromkeys(record["file_name"] for record in lacking)))
    lost = set()
    for record in lacking:
        if record["file_name"] in sizes:
            record["width"], record["height"] = sizes[record["file_name"]]
        else:
            lost.add(record["id"])
            found.drop("pictures that are missing or unreadable", record["file_name"])
    return lost


def read_mat(path: Path, *names: str) -> list[Any]:
    """Variables of a MATLAB file (up to version 7), structs as objects, everything as arrays; raises UserError."""
    try:
        with open(path, "rb") as file:
            found = scipy.io.loadmat(file, struct_as_record=False)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the path") from None
    except Exception as error:  # scipy's reader raises what its parsing comes across
        raise UserError(f"{path}: not a MATLAB file of version 5 to 7 ({error}); it may be cut short") from None
    if missing := [name for name in names if name not in found]:
        there = ", ".join(name for name in found if not name.startswith("__")) or "nothing"
        raise UserError(f"{path}: no variable {missing[0]} (it holds {there}); give the dataset's own file")
    return [found[name] for name in names]


def numbers(value: Any, count: int, where: str) -> list[float]:
    """`value` where it is a list of so many finite numbers; UserError beginning with `where` if not."""
    if not isinstance(value, list) or len(value) != count:
        text = json.dumps(value, default=str)
        raise UserError(f"{where}: found {text if len(text) <= 60 else text[:57] + '...'}, expected {count} numbers")
    for entry in value:
        if not is_number(entry):
            raise UserError(f"{where}: found {json.dumps(entry)} among its {count} values, expected numbers")
    return value


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a JSON value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def tidy_coco(path: Path, data: Any, skeleton: Skeleton) -> Conversion:
    """A COCO-keypoint file of one kind of body with our joints, in our order, and only records that `read_coco` takes.

    Joints are matched by name. Of an image are kept id, file_name, width, height and crowdIndex, of an annotation id,
    image_id, iscrowd, bbox, area, keypoints and num_keypoints.

    Raises:
        UserError: not such a file, other joints, or a field that is missing or of the wrong kind; names the record.
    """
    check_lists(path, data)
    source, order = _matched_category(path, data.get("categories"), skeleton)
    found = Conversion()
    sizes: dict[int, tuple[int, int]] = {}
    for record in data["images"]:
        image = coco_image(path, record)
        if image["id"] in sizes:
            found.drop("images whose id appeared before", f"image {image['id']}")
            continue
        sizes[image["id"]] = image["width"], image["height"]
        found.images.append(image)
    seen: set[int] = set()
    for record in data["annotations"]:
        annotation, problem = coco_annotation(path, record, source, order, sizes, seen)
        if problem:
            found.drop(f"persons {problem}", f"annotation {record['id']}")
            continue
        seen.add(annotation["id"])
        found.annotations.append(annotation)
    return found


def check_lists(path: Path, data: Any) -> None:
    """Raise UserError unless `data`, of the file `path`, has COCO's lists images and annotations."""
    if not isinstance(data, dict) or not all(isinstance(data.get(k), list) for k in ("images", "annotations")):
        raise UserError(f"{path}: not a COCO file: no lists images and annotations; give the dataset's own file")


def _matched_category(path: Path, categories: Any, skeleton: Skeleton) -> tuple[Any, list[int]]:
    """Id of the category with keypoints, and for each of our joints its place in the file."""
    records = categories if isinstance(categories, list) else []
    with_joints = [record for record in records if isinstance(record, dict) and record.get("keypoints")]
    if len(with_joints) != 1:
        raise UserError(f"{path}: {len(with_joints)} categories with keypoints, expected exactly one")
    joints = with_joints[0]["keypoints"]
    known = isinstance(joints, list) and all(isinstance(joint, str) for joint in joints)
    order = match_joints(joints, skeleton.joints) if known else []
    missing = [joint for joint, place in zip(skeleton.joints, order, strict=False) if place is None]
    if not known or missing or len(joints) != len(skeleton.joints) or "id" not in with_joints[0]:
        found = ", ".join(map(str, joints)) if isinstance(joints, list) else str(joints)
        raise UserError(
            f"{path}: category {with_joints[0].get('name')!r} has other joints ({found}) than {skeleton.name} "
            f"({', '.join(skeleton.joints)}); check that the file is of the dataset you named"
        )
    return with_joints[0]["id"], [place for place in order if place is not None]


def coco_image(path: Path, record: Any) -> dict[str, Any]:
    """What is kept of a record of `images`: id, file_name, width, height, crowdIndex. Raises UserError: malformed."""
    number = record.get("id") if isinstance(record, dict) else record
    where = f"{path}: image {number!r}"
    if not isinstance(record, dict) or type(number) is not int:
        raise UserError(f"{where}: expected an object with an integer id")
    image = image_record(record, number, where)
    if "crowdIndex" in record:
        crowding = record["crowdIndex"]
        if not is_number(crowding):
            raise UserError(f"{where}: field crowdIndex: found {crowding!r}, expected a number")
        image["crowdIndex"] = crowding
    return image


def image_record(record: Mapping[str, Any], number: int, where: str) -> dict[str, Any]:
    """A COCO image of id `number` with a record's file_name, width and height; UserError beginning with `where`."""
    name, size = record.get("file_name"), [record.get("width"), record.get("height")]
    if not isinstance(name, str) or not name:
        raise UserError(f"{where}: field file_name: found {name!r}, expected a file name")
    width, height = map(int, numbers(size, 2, f"{where}: fields width and height"))
    if min(width, height) < 1:
        raise UserError(f"{where}: fields width and height: found {size}, expected 1 pixel or more")
    return {"id": number, "file_name": name, "width": width, "height": height}


def coco_annotation(
    path: Path, record: Any, source: Any, order: Sequence[int], sizes: Mapping[int, tuple[int, int]], seen: set[int]
) -> tuple[dict[str, Any], str | None]:
    """An annotation of ours, and why it cannot be used, None where it can; raises UserError where it is malformed.

    Args:
        source: id of the category that is taken.
        order: for each of our joints its place in the record.
        sizes: (width, height) of each image by its id.
        seen: ids of the annotations before this one.
    """
    number = record.get("id") if isinstance(record, dict) else record
    where = f"{path}: annotation {number!r}"
    if not isinstance(record, dict) or type(number) is not int or type(record.get("image_id")) is not int:
        raise UserError(f"{where}: expected an object with an integer id and image_id")
    if record.get("category_id") != source:
        return {}, "of another category"
    size = sizes.get(record["image_id"])
    if number in seen or size is None:
        return {}, "whose id appeared before" if number in seen else "whose image is not in the file"
    count = len(order)
    flat = numbers(record.get("keypoints", [0] * (3 * count)), 3 * count, f"{where}: field keypoints")
    if not set(flat[2::3]) <= {0, 1, 2}:
        raise UserError(f"{where}: field keypoints: a visibility is not 0, 1 or 2")
    joints = [flat[3 * place : 3 * place + 3] for place in order]
    annotation = person(number, record["image_id"], numbers(record.get("bbox"), 4, f"{where}: field bbox"), joints)
    annotation["iscrowd"] = int(bool(record.get("iscrowd", 0)))
    if "area" in record:
        if not is_number(record["area"]) or record["area"] < 0:
            raise UserError(f"{where}: field area: found {record['area']!r}, expected pixels, 0 or more")
        annotation["area"] = record["area"]
    problem = box_problem(annotation, size)
    if is_number(record.get("num_keypoints")):
        # Not always the count of visibilities: the evaluators leave out whom it calls unlabelled.
        annotation["num_keypoints"] = int(record["num_keypoints"])
    return annotation, problem


def _header_size(path: Path) -> tuple[int, int] | None:
    try:
        with Image.open(path) as picture:
            return picture.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def _starts_with(path: Path, start: bytes) -> bool:
    with open(path, "rb") as file:
        return file.read(len(start)) == start


def _info(dataset: str) -> dict[str, str]:
    return {"converter": "poserelay convert", "dataset": dataset}


def _listed(found: Conversion) -> str:
    """What was left out, with an example of each."""
    examples = {reason: f" ({names[0]})" for reason, names in found.names.items()}
    return "; ".join(f"left out: {count} {why}{examples.get(why, '')}" for why, count in found.dropped.items())


def as_floats(values: Any, count: int) -> np.ndarray | None:
    """A MATLAB value as float64 `[count]`; None where it is something else, or not finite."""
    array = np.ravel(values)
    if array.size != count or array.dtype.kind not in "biuf" or not np.isfinite(array).all():
        return None
    return array.astype(np.float64)
