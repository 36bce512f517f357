"""`poserelay select`: which pictures to annotate, by coverage of a backbone's embedding space.

Everything is computed from unit vectors whose similarities are exact (`neighbours.unit`), so the choice depends neither
on threads nor on faiss or torch. No matrix of all pictures by all pictures is made.
"""

from __future__ import annotations

import math
import posixpath
import sys
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .checkpoint import verify_handoff
from .config import SelectConfig
from .datasets.coco import check_images_exist, read_coco, read_image_list
from .datasets.sampling import draw_generator
from .datasets.unlabelled import FilePictures, list_images
from .distributed import start
from .embeddings import embed, load_backbone
from .errors import UserError
from .neighbours import CHUNK, Backend, nearest, unit
from .subsets import Subset, is_subset, read_subset, write_subset

Method = Literal["kmeans", "kcentre"]

ITERATIONS = 50
"""Of Lloyd's algorithm at most."""


class Selection(NamedTuple):
    """Which of N pictures to annotate."""

    chosen: list[int]
    """Rising indices."""
    distinct: int
    """Pictures that could have been chosen."""


def main(config: SelectConfig) -> None:
    """Entry of `poserelay select`; prints the path of the list. Raises UserError, CheckFailed."""
    out = Path(config.out)
    check_out(out, config)
    checkpoint_sha256 = verify_handoff(config.checkpoint)
    candidates = picture_names(config.images, config.annotations)
    included = labelled_names(config.include, config.images) if config.include else []
    names = sorted(set(candidates) - set(included))
    if config.count > len(names):
        found = f"{len(names)} pictures in {config.images}" + (f" are not in {config.include}" if included else "")
        raise UserError(f"count is {config.count}, but only {found}; lower it")
    device = start(config.device, "fp32", config.threads).device
    backbone, input = load_backbone(config.checkpoint)
    pictures = FilePictures([Path(config.images, name) for name in (*included, *names)])
    embedded = embed(
        backbone.to(device), input, pictures, batch_size=config.batch_size, workers=config.workers, progress=True
    )
    for message in embedded.unreadable:
        print(f"warning: left out: {message}", file=sys.stderr)

    vectors, rows = embedded.vectors.to(device), embedded.rows
    split = int((rows < len(included)).sum())
    readable = [names[row - len(included)] for row in rows[split:].tolist()]
    selection = select(
        vectors[split:],
        config.count,
        method=config.method,
        duplicate_similarity=config.duplicate_similarity,
        seed=config.seed,
        included=vectors[:split],
    )
    subset = Subset(
        images=[readable[index] for index in selection.chosen],
        included=included,
        method=config.method,
        count=config.count,
        seed=config.seed,
        duplicate_similarity=config.duplicate_similarity,
        checkpoint_sha256=checkpoint_sha256,
    )
    write_subset(out, subset)
    duplicates = len(readable) - selection.distinct
    print(
        f"select: {config.count} of {len(names)} pictures by {config.method}; {duplicates} near-duplicates and "
        f"{len(embedded.unreadable)} unreadable left out",
        file=sys.stderr,
    )
    print(out)


def check_out(out: Path, config: SelectConfig) -> None:
    """Raise UserError unless `out` is a new file, or a list of pictures that was not read for this one."""
    if out.exists() and not is_subset(out):
        raise UserError(f"--out {out}: exists and is no list of pictures of ours; name another file")
    if out.exists() and config.include and out.samefile(config.include):
        raise UserError(f"--out {out}: would write over what --include reads; name another file")


def picture_names(folder: str, annotations: str | None) -> list[str]:
    """Names relative to `folder`, sorted: of its pictures, or of those that the COCO file lists.

    Raises UserError where there are none, or one that is listed is missing.
    """
    if annotations is None:
        return sorted(file.relative_to(folder).as_posix() for file in list_images(folder))
    names = read_image_list(annotations)
    check_images_exist(names, folder)
    return sorted({posixpath.normpath(name) for name in names})


def labelled_names(path: str, folder: str) -> list[str]:
    """Names relative to `folder`, sorted, of the pictures of a `Subset`, or of a COCO file's with labelled persons.

    Raises UserError where the file is neither, has none, or one is missing.
    """
    if is_subset(Path(path)):
        names = read_subset(path).labelled
    else:
        annotations = read_coco(path)
        labelled = set(annotations.labelled_image_ids)
        files = zip(annotations.image_ids, annotations.file_names, strict=True)
        names = [name for image_id, name in files if image_id in labelled]
    if not names:
        raise UserError(f"--include {path}: no picture in it carries a labelled person; leave the option out")
    check_images_exist(names, folder)
    return sorted({posixpath.normpath(name) for name in names})


def select(
    vectors: Tensor,
    count: int,
    *,
    method: Method,
    duplicate_similarity: float = 1.0,
    seed: int = 0,
    included: Tensor | None = None,
    backend: Backend = "auto",
) -> Selection:
    """Choose `count` of N pictures by their embeddings `[N, d]`, complementing those of embeddings `included` `[M, d]`.

    Near-duplicates go first: a picture is dropped when its similarity with an included one, or with an earlier one that
    is kept, is above `duplicate_similarity` (see `duplicate_limit`; 1 keeps all).

    Raises:
        UserError: fewer distinct pictures than `count`.
    """
    candidates = unit(vectors)
    fixed = unit(included) if included is not None else candidates[:0]
    kept = torch.arange(len(candidates), device=candidates.device)
    if duplicate_similarity < 1:
        both = torch.cat([fixed, candidates])
        limit = duplicate_limit(both, duplicate_similarity)
        kept = kept[distinct(both, limit, fixed=len(fixed))[len(fixed) :]]
    if count > len(kept):
        raise UserError(
            f"count is {count}, but of {len(candidates)} readable pictures only {len(kept)} are distinct; "
            f"lower count or raise duplicate_similarity, which is {duplicate_similarity:g}"
        )
    if method == "kmeans":
        chosen = k_means(candidates[kept], count, fixed, seed=seed, backend=backend)
    else:
        chosen = k_centre(candidates[kept], count, fixed, backend=backend)
    return Selection(sorted(kept[torch.tensor(chosen, device=kept.device)].tolist()), len(kept))


def duplicate_limit(vectors: Tensor, similarity: float) -> float:
    """The cosine that is `similarity` on a scale where 1 is that of equal vectors and 0 the mean of all pairs.

    Embeddings may share most of their direction: cosines are then all near 1, and of an untrained network's even those
    of unlike pictures are above 0.98.

    vectors: `[N, d]`, unit. The rounding of equal ones stays above the limit.
    """
    mean = _sums(vectors, torch.zeros(len(vectors), dtype=torch.int64, device=vectors.device), 1) / max(1, len(vectors))
    spread = 1 - float(mean.square().sum())
    return min(1 - (1 - similarity) * spread, 1 - vectors.shape[1] ** 0.5 * 2.0**-23)


def distinct(vectors: Tensor, limit: float, *, fixed: int = 0, chunk: int = CHUNK) -> Tensor:
    """Whether each of unit vectors `[N, d]` has at most the cosine `limit` to all earlier ones kept, bool `[N]`.

    The first `fixed` are kept in any case. Compares `chunk` by `chunk` vectors at once.
    """
    kept = torch.ones(len(vectors), dtype=torch.bool, device=vectors.device)
    for first in range(0, len(vectors), chunk):
        block = vectors[first : first + chunk].double()
        dropped = torch.zeros(len(block), dtype=torch.bool, device=vectors.device)
        for before in range(0, first, chunk):
            earlier = vectors[before : before + chunk][kept[before : before + chunk]]
            dropped |= (block @ earlier.double().T > limit).any(1)
        close = (block @ block.T > limit).tril(-1).cpu()
        dropped = dropped.cpu()
        dropped[: max(0, fixed - first)] = False
        for row in torch.nonzero(close.any(1))[:, 0].tolist():
            if row >= fixed - first and not dropped[row]:
                dropped[row] = bool((close[row] & ~dropped).any())
        kept[first : first + chunk] = ~dropped.to(kept.device)
    return kept


def k_centre(vectors: Tensor, count: int, fixed: Tensor, *, backend: Backend = "auto") -> list[int]:
    """Indices of `count` of unit vectors `[N, d]`: each the least similar to those before it and to `fixed` `[M, d]`.

    Greedy k-centre (Gonzalez, 1985; core-sets, Sener and Savarese, 2018): its largest distance from a picture to the
    nearest centre is at most twice the smallest possible one. Without `fixed` it starts from the vector nearest to the
    mean.
    """
    covered = _coverage(vectors, fixed, backend)
    chosen: list[int] = []
    if not len(fixed):
        mean = unit(_sums(vectors, torch.zeros(len(vectors), dtype=torch.int64, device=vectors.device), 1))
        chosen.append(int(_similarity(vectors, mean)[:, 0].argmax()))
    while True:
        if chosen:
            covered = torch.maximum(covered, _similarity(vectors, vectors[chosen[-1:]])[:, 0])
            covered[chosen[-1]] = math.inf
        if len(chosen) == count:
            return chosen
        chosen.append(int(covered.argmin()))


def k_means(vectors: Tensor, count: int, fixed: Tensor, *, seed: int = 0, backend: Backend = "auto") -> list[int]:
    """Indices of the vector nearest to the centre of each of the `count` clusters of `cluster`."""
    similarity, label = cluster(vectors, count, fixed, seed=seed, backend=backend)
    labels = label.cpu().numpy()
    order = np.lexsort((-similarity.cpu().numpy(), labels))  # stable: of equals the lower index
    return order[np.searchsorted(labels[order], np.arange(count))].tolist()


def cluster(
    vectors: Tensor, count: int, fixed: Tensor, *, seed: int = 0, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """Spherical k-means (Dhillon and Modha, 2001) of unit vectors `[N, d]`: a centre is the direction of a mean.

    `fixed` `[M, d]` are further centres that stay where they are, so that what they cover is not covered again.

    Returns:
        Similarity `[N]` of each vector with its centre, and label `[N]`: 0..count - 1, each at least once, or negative
        where the centre is a fixed one.
    """
    centres = vectors[seed_centres(vectors, count, fixed, seed, backend)]
    before = None
    for _ in range(ITERATIONS):
        similarity, label = (found[:, 0] for found in nearest(torch.cat([fixed, centres]), vectors, 1, backend=backend))
        label -= len(fixed)
        fill_empty(similarity, label, count)
        if before is not None and torch.equal(label, before):
            break
        before = label
        members = label >= 0
        centres = unit(_sums(vectors[members], label[members], count))
    return similarity, label


def seed_centres(vectors: Tensor, count: int, fixed: Tensor, seed: int, backend: Backend = "auto") -> list[int]:
    """Indices of `count` first centres among unit vectors `[N, d]`, by greedy k-means++ (Arthur, Vassilvitskii, 2007).

    Each is drawn with a probability proportional to the squared distance from the nearest centre so far, the best of
    2 + log(count) draws being taken.
    """
    draws = draw_generator(seed, 0, 0, 0)
    covered = _coverage(vectors, fixed, backend)
    chosen: list[int] = []
    while len(chosen) < count:
        # |a - b|^2 = 2 - 2 cos; before the first centre all are equally far
        far = (1 - covered).clamp(0, 2)
        far[chosen] = 0
        if not far.any():
            far = torch.ones_like(far)
            far[chosen] = 0
        cumulative = far.cpu().numpy().cumsum()
        wanted = draws.random(2 + int(math.log(count))) * cumulative[-1]
        drawn = np.searchsorted(cumulative, wanted, side="right").clip(max=np.flatnonzero(far.cpu().numpy())[-1])
        similarities = torch.maximum(covered[:, None], _similarity(vectors, vectors[drawn.tolist()]))
        best = int((1 - similarities).clamp(min=0).sum(0).argmin())
        chosen.append(int(drawn[best]))
        covered = similarities[:, best]
    return chosen


def fill_empty(similarity: Tensor, label: Tensor, count: int) -> None:
    """Give each cluster of 0..`count` - 1 without a member the vector least similar to its own centre, in place.

    similarity, label: `[N]`, N at least `count`; labels below 0 belong to centres that need no member.
    """
    sizes = torch.bincount(label[label >= 0], minlength=count)
    for cluster in torch.nonzero(sizes == 0)[:, 0].tolist():
        spare = (label < 0) | (sizes[label.clamp(min=0)] > 1)
        row = int(similarity.where(spare, math.inf).argmin())
        if label[row] >= 0:
            sizes[label[row]] -= 1
        label[row], similarity[row], sizes[cluster] = cluster, 1.0, 1


def _coverage(vectors: Tensor, fixed: Tensor, backend: Backend) -> Tensor:
    """Similarity `[N]`, float64, of each vector with the nearest of `fixed`; -inf where there are none."""
    if not len(fixed):
        return torch.full((len(vectors),), -math.inf, dtype=torch.float64, device=vectors.device)
    return nearest(fixed, vectors, 1, backend=backend)[0][:, 0].double()


def _similarity(vectors: Tensor, few: Tensor) -> Tensor:
    """Exact similarities `[N, F]`, float64, of unit vectors `[N, d]` with a few others `[F, d]`."""
    blocks = [vectors[start : start + CHUNK].double() @ few.double().T for start in range(0, len(vectors), CHUNK)]
    return torch.cat(blocks)


def _sums(vectors: Tensor, label: Tensor, count: int) -> Tensor:
    """Sum `[count, d]`, float64, of the unit vectors `[N, d]` of each label `[N]`: exact, so in any order."""
    sums = torch.zeros(count, vectors.shape[1], dtype=torch.float64, device=vectors.device)
    for first in range(0, len(vectors), CHUNK):
        sums.index_add_(0, label[first : first + CHUNK], vectors[first : first + CHUNK].double())
    return sums
