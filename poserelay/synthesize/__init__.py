"""Rendered pictures of articulated people with COCO-keypoint annotations, for demonstrations and tests.

A person is a 3-D skeleton with sampled proportions, joint angles and clothing. Every body part is a shaded solid; they
are painted far to near together with clutter and occluders, and a map of what each pixel shows is painted along:
visibility, box, area and mask are read from it. Imports no torch.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from ..config import File
from ..errors import UserError
from ..keypoints import Skeleton, load_skeleton
from ..run import is_temporary, write_json
from .annotation import annotate, coco_file
from .camera import photograph
from .painting import render
from .scene import draw_scene

RENDERER = 1  # raise it when the pictures of a seed change, so that an old folder is not taken for a new one


@dataclass(frozen=True)
class SynthesizeConfig:
    """Render pictures of people with COCO-keypoint annotations (17 joints)."""

    out: File
    """Folder for images/ and annotations.json; created, or continued where the same command was interrupted."""
    images: int = 1000
    """Number of pictures, with one to four people each."""
    seed: int = 0
    """Every picture depends on this and its index alone; another seed gives another set."""
    size: int = 256
    """Height and width of the pictures, pixels."""
    workers: int = os.cpu_count() or 1
    """Processes; their number changes nothing in the pictures."""

    def __post_init__(self) -> None:
        if self.images < 1:
            raise ValueError(f"images is {self.images}, expected at least 1")
        if self.size < 32:
            raise ValueError(f"size is {self.size}, expected at least 32 pixels")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}, expected 0 or more")
        if self.workers < 1:
            raise ValueError(f"workers is {self.workers}, expected at least 1")


def main(config: SynthesizeConfig) -> None:
    """Entry of `poserelay synthesize`; prints the path of the annotations."""
    print(synthesize(Path(config.out), config.images, config.seed, size=config.size, workers=config.workers))


def synthesize(out: Path, images: int, seed: int, *, size: int = 256, workers: int = 1) -> Path:
    """Write `out/images/000000.jpg ...` and `out/annotations.json` (COCO, 17 joints), and return the latter's path.

    The same arguments give the same bytes whatever the number of workers. annotations.json is written last: where it
    exists the set is complete, and a second call returns at once.

    Raises:
        UserError: `out` holds anything but this very set, complete or interrupted, or cannot be written.
    """
    recipe = {"images": images, "seed": seed, "size": size, "renderer": RENDERER}
    annotations = out / "annotations.json"
    if _claim(out, recipe) and annotations.exists():
        return annotations
    skeleton = load_skeleton("coco17")
    render_one = partial(_write_image, out / "images", seed, size, skeleton)
    bar = partial(tqdm, total=images, desc="synthesize", unit="image", disable=None)
    try:
        (out / "images").mkdir(exist_ok=True)
        if workers == 1:
            people = list(bar(map(render_one, range(images))))
        else:
            # Not forked: the caller may hold threads of torch or OpenCV.
            with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                people = list(bar(pool.map(render_one, range(images), chunksize=8)))
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror or error}; start again to continue") from error
    write_json(annotations, coco_file(people, size, skeleton, recipe))
    return annotations


def _claim(out: Path, recipe: dict[str, int]) -> bool:
    """Whether `out` already belongs to this set; an empty or new folder is marked as belonging to it."""
    marker = out / "synthesis.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        found = json.loads(marker.read_text(encoding="utf-8")) if marker.exists() else None
    except (OSError, ValueError) as error:
        raise UserError(f"{out}: cannot be used for synthesised pictures ({error}); choose another folder") from error
    if found is None:
        # What a kill leaves of the marker itself is no reason to refuse.
        if any(not is_temporary(entry.name) for entry in out.iterdir()):
            raise UserError(f"{out}: is not empty and holds no synthesised pictures; choose a new folder")
        write_json(marker, recipe)
        return False
    if found != recipe:
        raise UserError(
            f"{out}: holds another set ({found}), asked for {recipe}; choose a new folder or delete this one"
        )
    return True


def _write_image(folder: Path, seed: int, size: int, skeleton: Skeleton, index: int) -> list[dict[str, Any]]:
    cv2.setNumThreads(1)  # the workers share the cores
    generator = np.random.default_rng([seed, index])
    scene = draw_scene(generator, size)
    picture, labels = render(scene)
    picture, quality = photograph(generator, picture)
    _, encoded = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, quality])
    (folder / f"{index:06d}.jpg").write_bytes(encoded.tobytes())
    people = [annotate(person, labels, skeleton) for person in scene.people]
    return [person for person in people if person["area"]]
