"""Joints to heatmaps and back, batched on any device.

Frames: (0, 0) is the centre of the top-left pixel, x right, y down; sizes are (height, width). A joint moves between
the input picture and the heatmap with `input_to_heatmap` and `heatmap_to_input`; everything else is in heatmap pixels.

Eq. numbers are those of CCM (Zhang et al., "Towards High Performance Human Keypoint Detection", section 5).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Alignment = Literal["hrnet", "udp"]
Refine = Literal["none", "quarter", "parabola", "paraboloid", "dark"]


def input_to_heatmap(
    xy: Tensor, input_size: tuple[int, int], heatmap_size: tuple[int, int], alignment: Alignment = "hrnet"
) -> Tensor:
    """Input pixels `[..., 2]` to heatmap pixels `[..., 2]`.

    "hrnet" divides by the stride (x_heatmap = x_input / stride); "udp" maps corner pixel centres onto each other
    (unit length (w - 1) / (W - 1)), so that a mirrored picture's heatmap needs no shift.
    ValueError: another alignment.
    """
    return xy * _heatmap_per_input(xy, input_size, heatmap_size, alignment)


def heatmap_to_input(
    xy: Tensor, input_size: tuple[int, int], heatmap_size: tuple[int, int], alignment: Alignment = "hrnet"
) -> Tensor:
    """Heatmap pixels `[..., 2]` to input pixels `[..., 2]`: the inverse of `input_to_heatmap`."""
    return xy / _heatmap_per_input(xy, input_size, heatmap_size, alignment)


def _heatmap_per_input(
    xy: Tensor, input_size: tuple[int, int], heatmap_size: tuple[int, int], alignment: Alignment
) -> Tensor:
    if alignment not in ("hrnet", "udp"):
        raise ValueError(f"alignment {alignment!r}: choose 'hrnet' or 'udp'")
    edge = 1 if alignment == "udp" else 0
    (input_height, input_width), (height, width) = input_size, heatmap_size
    return xy.new_tensor([(width - edge) / (input_width - edge), (height - edge) / (input_height - edge)])


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def target_weight(keypoints: Tensor, visibility: Tensor, size: tuple[int, int], sigma: float) -> Tensor:
    """HRNet's weight of a joint in the loss: 1 if it is labelled and its 3-sigma patch reaches the map, else 0.

    keypoints `[..., K, 2]` in heatmap pixels (NaN allowed where unlabelled), visibility `[..., K]` (> 0: labelled),
    size (height, width), sigma in heatmap pixels. Returns float32 `[..., K]`.
    """
    keypoints = _at_least_float32(keypoints)
    centre = torch.trunc(keypoints + 0.5)
    height, width = size
    limit = centre.new_tensor([width, height])
    # HRNet tests the patch's exclusive end, so a patch that ends one pixel before the map still counts.
    reaches = (centre - 3 * sigma < limit) & (centre + 3 * sigma + 1 >= 0)
    return ((visibility > 0) & reaches.all(-1)).float()


def encode(
    keypoints: Tensor, visibility: Tensor, size: tuple[int, int], sigma: float, quantize: bool = False
) -> Tensor:
    """One Gaussian of peak 1 per joint.

    keypoints `[..., K, 2]` in heatmap pixels, visibility `[..., K]` (> 0: labelled), size (height, width), sigma in
    heatmap pixels. Returns float32 `[..., K, height, width]`; the map is zero where `target_weight` is.

    By default the Gaussian is centred on the joint and covers the whole map. `quantize=True` is HRNet's target for
    whole sigmas: centred on int(x + 0.5) and cut to the square patch of 3 sigma.
    ValueError: sigma not positive.
    """
    if not sigma > 0:
        raise ValueError(f"sigma must be positive, got {sigma}")
    height, width = size
    labelled = target_weight(keypoints, visibility, size, sigma) > 0
    centre = _at_least_float32(keypoints)
    if quantize:
        centre = torch.trunc(centre + 0.5)

    def profile(length: int, position: Tensor) -> Tensor:
        distance = torch.arange(length, device=position.device) - position[..., None]
        values = torch.exp(-distance.square() / (2 * sigma**2))
        if quantize:
            values = torch.where(distance.abs() <= 3 * sigma, values, 0)
        return torch.where(labelled[..., None], values, 0).float()

    # A Gaussian is separable: height + width exponentials per joint, not height x width.
    return profile(height, centre[..., 1])[..., :, None] * profile(width, centre[..., 0])[..., None, :]


def render(xy: Tensor, size: tuple[int, int], sigma: float) -> Tensor:
    """Gaussians of peak 1 over the whole map, `[..., height, width]`, for points `[..., 2]` in heatmap pixels.

    As `encode` draws them, but wherever the point lies, and in float64 where `xy` is. size (height, width), sigma in
    heatmap pixels.
    """
    x, y = _at_least_float32(xy).unbind(-1)

    def profile(length: int, position: Tensor) -> Tensor:
        distance = torch.arange(length, device=position.device) - position[..., None]
        return torch.exp(-distance.square() / (2 * sigma**2))

    return profile(size[0], y)[..., :, None] * profile(size[1], x)[..., None, :]


def decode(heatmaps: Tensor, refine: Refine = "none", blur: float = 0.0) -> tuple[Tensor, Tensor]:
    """The peak of each map: xy `[B, K, 2]` in heatmap pixels and its value, the score `[B, K]`.

    heatmaps `[B, K, H, W]`; float64 is kept, all else is decoded in float32. `blur` is the sigma of a Gaussian filter
    applied first, in heatmap pixels (0: none). After the largest pixel (the first of equals) was found, `refine` moves
    it:

    - "none": not at all;
    - "quarter": HRNet's 0.25 px towards the larger neighbour on each axis, only where 1 < x < W - 1 and 1 < y < H - 1;
    - "parabola": the vertex through three pixels per axis (Eq. 13);
    - "paraboloid": the vertex of the least-squares paraboloid of the 3x3 window (Eq. 17-22);
    - "dark": the Newton step on the map's logarithm of Zhang et al., "Distribution-aware coordinate representation for
      human pose estimation" (DARK), only where 1 < x < W - 2 and 1 < y < H - 2, with values under 1e-10 raised to it.

    Parabola and paraboloid fit the map's values, not their logarithms: on a noise-free Gaussian both are off by 0.01 px
    on average at sigma 2, the parabola by 0.02 px at sigma 1.6, where DARK is exact. Noise of 1 % of the peak makes
    that 0.055, 0.037 and 0.044 px (0.2 for "quarter"), and 0.017, 0.015 and 0.014 px after a blur of 1. The window of
    parabola and paraboloid is moved inside the map where the peak is at its border; DARK leaves the outer two pixels
    unrefined. DARK is meant for a blur as wide as the targets' Gaussian, blur=2 at sigma 2. There its authors cut the
    kernel to 11 pixels, pad with zeros, and take the largest pixel and the score from the map before the filter; here
    both are those of the filtered map.

    A vertex is kept within its window, one pixel around the middle, so always on the map; a window that is not concave
    (flat, a saddle, not finite) leaves the largest pixel, and so does a map with less than 3 pixels on a side. A map
    whose maximum is not positive gives (0, 0) and that maximum; a map that holds a NaN (or, with a blur, an infinity)
    gives (0, 0) and the score NaN, for the caller to refuse. After a blur, pixels that were equal differ by rounding:
    of a flat map any may be taken.
    ValueError: another refinement, or a blur that is no number of at least 0.
    """
    if refine not in ("none", "quarter", "parabola", "paraboloid", "dark"):
        raise ValueError(f"refine {refine!r}: choose 'none', 'quarter', 'parabola', 'paraboloid' or 'dark'")
    if not 0 <= blur < math.inf:
        raise ValueError(f"blur must be a sigma of at least 0 heatmap pixels, got {blur}")
    heatmaps = _at_least_float32(heatmaps)
    if blur == 0:
        return _peaks(heatmaps, refine)
    rows, columns = _blur_matrices(heatmaps, blur)
    found = []
    for part in parts_in_cache(heatmaps):
        # Named, not passed on: what lives into the next turn keeps the allocator from returning its pages in between.
        filtered = _filter(heatmaps[part], rows, columns)
        found.append(_peaks(filtered, refine))
    xy, score = zip(*found, strict=True)
    return torch.cat(xy), torch.cat(score)


def parts_in_cache(heatmaps: Tensor) -> list[slice]:
    """The persons to work on at once, so that on the CPU the maps between two steps do not leave its cache."""
    # The batch of an exported graph has no length yet that could be cut.
    if heatmaps.device.type != "cpu" or torch.compiler.is_exporting():
        return [slice(None)]
    persons = max(1, 2**19 // max(1, math.prod(heatmaps.shape[1:])))
    return [slice(start, start + persons) for start in range(0, max(1, len(heatmaps)), persons)]


def _peaks(heatmaps: Tensor, refine: Refine) -> tuple[Tensor, Tensor]:
    height, width = heatmaps.shape[-2:]
    flat = heatmaps.flatten(-2)
    # On the CPU numpy's argmax vectorises, torch's does not, but a graph holds it; both take the first of equals.
    by_numpy = flat.device.type == "cpu" and not torch.compiler.is_exporting()
    largest = torch.from_numpy(flat.detach().numpy().argmax(-1)) if by_numpy else flat.argmax(-1)
    score = flat.gather(-1, largest[..., None]).squeeze(-1)
    peak = torch.stack((largest % width, largest // width), -1)
    if refine == "none" or min(height, width) < 3:
        xy = peak.to(heatmaps.dtype)
    elif refine == "quarter":
        xy = peak + _quarter_shift(heatmaps, peak)
    elif refine == "parabola":
        xy = _parabola_peak(heatmaps, peak)
    elif refine == "paraboloid":
        xy = _paraboloid_peak(heatmaps, peak)
    else:
        xy = _dark_peak(heatmaps, peak)
    return torch.where(score[..., None] > 0, xy, 0), score


def _window_centre(heatmaps: Tensor, peak: Tensor) -> Tensor:
    """The pixel nearest to each peak (x, y) whose neighbours all lie on the map, `[B, K, 2]`."""
    height, width = heatmaps.shape[-2:]
    return torch.stack((peak[..., 0].clamp(1, width - 2), peak[..., 1].clamp(1, height - 2)), -1)


def _gather(heatmaps: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The values `[B, K, m, n]` at the pixels x, y (broadcast to `[B, K, m, n]`)."""
    index = y * heatmaps.shape[-1] + x
    return heatmaps.flatten(-2).gather(-1, index.flatten(-2)).unflatten(-1, index.shape[-2:])


def _lines(heatmaps: Tensor, peak: Tensor, centre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three neighbours through the peak along x and along y, each `[B, K, 2]` (last axis: x, y)."""
    steps = torch.arange(-1, 2, device=peak.device)
    along, across = centre[..., None] + steps, peak[..., None].expand(*peak.shape, 3)
    x = torch.stack((along[..., 0, :], across[..., 0, :]), -2)
    y = torch.stack((across[..., 1, :], along[..., 1, :]), -2)
    z0, z1, z2 = _gather(heatmaps, x, y).unbind(-1)
    return z0, z1, z2


def _quarter_shift(heatmaps: Tensor, peak: Tensor) -> Tensor:
    height, width = heatmaps.shape[-2:]
    before, _, after = _lines(heatmaps, peak, _window_centre(heatmaps, peak))
    x, y = peak.unbind(-1)
    inside = (x > 1) & (x < width - 1) & (y > 1) & (y < height - 1)
    return torch.where(inside[..., None], 0.25 * torch.sign(after - before), 0)


def _vertex(peak: Tensor, centre: Tensor, offset: Tensor, concave: Tensor) -> Tensor:
    return torch.where(concave & offset.isfinite(), centre + offset.clamp(-1, 1), peak)


def _parabola_peak(heatmaps: Tensor, peak: Tensor) -> Tensor:
    centre = _window_centre(heatmaps, peak)
    z0, z1, z2 = _lines(heatmaps, peak, centre)
    curvature = z0 + z2 - 2 * z1
    return _vertex(peak, centre, (z0 - z2) / (2 * curvature), curvature < 0)


def _paraboloid_peak(heatmaps: Tensor, peak: Tensor) -> Tensor:
    centre = _window_centre(heatmaps, peak)
    steps = torch.arange(-1, 2, device=peak.device)
    z = _gather(heatmaps, centre[..., 0, None, None] + steps, centre[..., 1, None, None] + steps[:, None])
    # The least-squares fit with weights [1, 2, 1] x [1, 2, 1]: smooth across the axis, then differences along it.
    across_rows = (z[..., 0, :] + 2 * z[..., 1, :] + z[..., 2, :]) / 4
    across_columns = (z[..., 0] + 2 * z[..., 1] + z[..., 2]) / 4
    a = (across_rows[..., 0] + across_rows[..., 2]) / 2 - across_rows[..., 1]
    b = (across_columns[..., 0] + across_columns[..., 2]) / 2 - across_columns[..., 1]
    c = (z[..., 0, 0] + z[..., 2, 2] - z[..., 0, 2] - z[..., 2, 0]) / 4
    d = (across_rows[..., 2] - across_rows[..., 0]) / 2
    e = (across_columns[..., 2] - across_columns[..., 0]) / 2
    return _summit(peak, centre, a, b, c, d, e)


def _dark_peak(heatmaps: Tensor, peak: Tensor) -> Tensor:
    height, width = heatmaps.shape[-2:]
    x, y = peak.unbind(-1)
    inside = ((x > 1) & (x < width - 2) & (y > 1) & (y < height - 2))[..., None]
    steps = torch.arange(-2, 3, device=peak.device)
    # Outside, where the answer is the largest pixel, the window need only be on the map.
    columns = (x[..., None, None] + steps).clamp(0, width - 1)
    rows = (y[..., None, None] + steps[:, None]).clamp(0, height - 1)
    z = _gather(heatmaps, columns, rows).clamp(min=1e-10).log()
    middle_row, middle_column = z[..., 2, :], z[..., 2]
    # DARK's stencils: the second differences are two pixels wide.
    a = (middle_row[..., 4] + middle_row[..., 0] - 2 * middle_row[..., 2]) / 8
    b = (middle_column[..., 4] + middle_column[..., 0] - 2 * middle_column[..., 2]) / 8
    c = (z[..., 3, 3] + z[..., 1, 1] - z[..., 3, 1] - z[..., 1, 3]) / 4
    d = (middle_row[..., 3] - middle_row[..., 1]) / 2
    e = (middle_column[..., 3] - middle_column[..., 1]) / 2
    return torch.where(inside, _summit(peak, peak, a, b, c, d, e), peak)


def _summit(peak: Tensor, centre: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, e: Tensor) -> Tensor:
    """Where a x^2 + b y^2 + c x y + d x + e y, x and y counted from the centre, is largest (Eq. 22)."""
    determinant = c * c - 4 * a * b
    offset = torch.stack((2 * b * d - c * e, 2 * a * e - c * d), -1) / determinant[..., None]
    return _vertex(peak, centre, offset, ((a < 0) & (b < 0) & (determinant < 0))[..., None])


def gaussian_blur(heatmaps: Tensor, sigma: float) -> Tensor:
    """Gaussian filter of `[..., H, W]` maps, sigma in heatmap pixels, kernel to 4 sigma, edge pixels repeated outside.

    The same as cv2.GaussianBlur(map, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE). Peaks within two sigmas of the
    border are pulled towards it; of cv2's borders this one does it least. float64 is kept, all else becomes float32.
    """
    heatmaps = _at_least_float32(heatmaps)
    return _filter(heatmaps, *_blur_matrices(heatmaps, sigma))


def _filter(heatmaps: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    # As matrices: many times faster than a one-channel convolution on the CPU. In bf16 autocast they would lose digits.
    with torch.autocast(heatmaps.device.type, enabled=False):
        return rows @ heatmaps @ columns


def _blur_matrices(heatmaps: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    height, width = heatmaps.shape[-2:]
    return _blur_matrix(height, sigma).to(heatmaps), _blur_matrix(width, sigma).T.to(heatmaps)


def _blur_matrix(length: int, sigma: float) -> Tensor:
    radius = round(8 * sigma + 1) // 2
    steps = torch.arange(-radius, radius + 1)
    kernel = torch.softmax(-steps.double().square() / (2 * sigma**2), 0)
    source = (torch.arange(length)[:, None] + steps).clamp(0, length - 1)
    return kernel.new_zeros(length, length).scatter_add_(1, source, kernel.expand(length, -1))


def flip_back(heatmaps_of_flipped: Tensor, flip_index: Sequence[int], shift: float) -> Tensor:
    """The maps of the mirrored picture, aligned to those of the picture itself.

    heatmaps_of_flipped `[B, K, H, W]`; `flip_index` names for each joint its mirror joint (`Skeleton.flip_index`);
    `shift` in heatmap pixels, 0 to 1, moves the mirrored-back maps to the right by linear interpolation (Eq. 25 with
    shift = 1 / r; the leftmost column stays, as HRNet's). With the "hrnet" alignment the exact shift is 1 - 1 / stride,
    HRNet's own is 1; with "udp" it is 0. The peak of a Gaussian of sigma 2 lands within 0.012 px of where the shift
    should move it, exactly there at shift 0, 0.5 and 1. Returns `[B, K, H, W]`; float64 is kept, all else becomes
    float32.
    ValueError: shift outside 0 to 1.
    """
    if not 0 <= shift <= 1:
        raise ValueError(f"shift must be from 0 to 1 heatmap pixels, got {shift}")
    mirror_joints = torch.tensor(list(flip_index), device=heatmaps_of_flipped.device)
    mirrored = _at_least_float32(heatmaps_of_flipped).index_select(1, mirror_joints).flip(-1)
    if shift > 0:
        mirrored[..., 1:] = mirrored[..., 1:].lerp(mirrored[..., :-1], shift)
    return mirrored


def average_flip(heatmaps: Tensor, heatmaps_of_flipped: Tensor, flip_index: Sequence[int], shift: float) -> Tensor:
    """The mean of a picture's maps and its mirrored picture's, `[B, K, H, W]`; arguments as in `flip_back`."""
    heatmaps = _at_least_float32(heatmaps)
    average = torch.empty_like(heatmaps)
    for part in parts_in_cache(heatmaps):
        average[part] = flip_back(heatmaps_of_flipped[part], flip_index, shift).lerp_(heatmaps[part], 0.5)
    return average
