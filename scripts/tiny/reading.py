"""Reads colour, shape, direction and background off the frames of a clip; knows no caption and no model.

A clip is taken for one flat shape over a flat background, as in tiny.shapes. What cannot be seen is None, never a
guess. Only the largest region of each frame is read, so a second, smaller shape goes unnoticed. Positions and areas
come from soft coverage, the place of a pixel between the background's colour (0) and the shape's (1), so that
antialiased and blurred edges count with their share.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from math import pi, sqrt

import numpy as np

from tiny.shapes import BACKGROUNDS, COLOURS, DIRECTIONS, RADIUS_PX, SPEED_PX, TRIANGLE_CIRCUMRADIUS

RGB = tuple[int, int, int]

# What tells the shapes apart: (area / bounding box, skewness of the coverage over y, weight of the corners: the mean of
# x^2 y^2 from the centre over the means of x^2 and of y^2). The width of a triangle with one corner up grows linearly
# from top to bottom, and such a distribution has skewness -2 sqrt(2) / 5. The box alone calls a square a circle whose
# sides are bent inwards by an eighth; its corners still weigh what a square's do.
SIGNATURES = {
    "circle": (pi / 4, 0.0, 2 / 3),
    "square": (1.0, 0.0, 1.0),
    "triangle": (0.5, -2 * sqrt(2) / 5, 4 / 5),
}


def _half_gap(points: Mapping[str, tuple[float, ...]]) -> float:
    """Half of the smallest distance between two of the points."""
    return min(float(np.linalg.norm(np.subtract(a, b))) for a, b in combinations(points.values(), 2)) / 2


# Farther from every signature than three quarters of the way between the two most alike (circle and square) is none of
# them: a diamond (0.39 from a circle), a triangle with a corner down. Blur of 2 px standard deviation moves a triangle
# by 0.18.
SHAPE_TOLERANCE = 1.5 * _half_gap(SIGNATURES)
# RGB distance, 0..255 per channel: a border whose typical pixel strays farther from its median is not flat
BORDER_TOLERANCE = _half_gap(BACKGROUNDS)
# A pixel nearer to the shape than to the background, for the pair with the least contrast (green on gray)
FOREGROUND_DISTANCE = min(
    float(np.linalg.norm(np.subtract(c, b))) / 2 for c in COLOURS.values() for b in BACKGROUNDS.values()
)
BORDER_PX = 2  # shapes are drawn to stay 1 px inside the frame: they never hold the majority of this ring
EDGE_PX = 2  # a drawn edge is 1 px wide, a decoded one about 2: left out of the core, counted in the coverage
# A quarter of the smallest drawn shape (the triangle; equilateral, area 3 sqrt(3) / 4 R^2): less is a speck
MIN_AREA_PX = 3 * sqrt(3) / 4 * (TRIANGLE_CIRCUMRADIUS * RADIUS_PX[0]) ** 2 / 4
MIN_SEEN = 0.75  # share of frames: a shape that is gone for more than a quarter of a clip did not cross it
MIN_SPEED_PX = SPEED_PX[0] / 2  # per frame: slower than half of the slowest drawn shape is standing still
MIN_AXIS_RATIO = 2.0  # of the larger to the smaller displacement: within 27 degrees of an axis, else it is diagonal


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What was seen in a clip; None where nothing could be.

    Args:
        background_rgb, colour_rgb: the medians that were named, 0..255.
        displacement_px: (dx, dy) from the first to the last frame, y grows downwards.
        fill_ratio: area over area of the bounding box, of the mean over the frames.
        skewness: of the coverage over y, mean over the frames; negative for a corner up.
        corners: how much corners weigh, mean over the frames; 1 for a rectangle, 2/3 for a disk.
        area_px: mean over the frames.
    """

    colour: str | None = None
    shape: str | None = None
    direction: str | None = None
    background: str | None = None
    background_rgb: RGB | None = None
    colour_rgb: RGB | None = None
    displacement_px: tuple[float, float] | None = None
    fill_ratio: float | None = None
    skewness: float | None = None
    corners: float | None = None
    area_px: float | None = None


def read_frames(frames: np.ndarray) -> Reading:
    """Reads a clip.

    Args:
        frames: [F, H, W, 3] uint8 RGB.
    """
    pixels = frames.astype(np.float32)
    back = _border_colour(pixels)
    if back is None:
        return Reading()
    background = {"background": _nearest(back, BACKGROUNDS), "background_rgb": _rgb(back)}
    found = _find_shape(pixels, back)
    if found is None:
        return Reading(**background)
    front, cover, times = found
    area, centres, signature = _measures(cover)
    fill_ratio, skewness, corners = signature
    dx, dy = _displacement(times, centres, len(frames))
    return Reading(
        **background,
        colour=_nearest(front, COLOURS),
        colour_rgb=_rgb(front),
        shape=_shape(signature),
        direction=_direction(dx, dy, len(frames)),
        displacement_px=(dx, dy),
        fill_ratio=fill_ratio,
        skewness=skewness,
        corners=corners,
        area_px=area,
    )


def _find_shape(pixels: np.ndarray, back: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Colour [3] of the shape, its coverage [T, H, W] and the T frames that show it, of [F, H, W, 3] pixels.

    None if it is missing from too many frames, or is so mottled that its median colour is nobody's.
    """
    regions = _largest_regions(np.linalg.norm(pixels - back, axis=-1) > FOREGROUND_DISTANCE)
    core = ~_grow(~regions, EDGE_PX)
    if not core.any():
        return None
    front = np.median(pixels[core], axis=0)
    if np.linalg.norm(front - back) <= FOREGROUND_DISTANCE:
        return None
    cover = _coverage(pixels, back, front) * _grow(regions, EDGE_PX)
    seen = cover.sum(axis=(1, 2)) >= MIN_AREA_PX  # [F]
    return (front, cover[seen], np.flatnonzero(seen)) if seen.mean() >= MIN_SEEN else None


def _nearest(rgb: np.ndarray, names: Mapping[str, RGB]) -> str:
    return min(names, key=lambda name: float(np.linalg.norm(rgb - np.array(names[name]))))


def _rgb(colour: np.ndarray) -> RGB:
    red, green, blue = (round(float(c)) for c in colour)
    return red, green, blue


def _border_colour(pixels: np.ndarray) -> np.ndarray | None:
    """Median colour [3] of the ring along the edges over all frames, or None if the ring is not flat."""
    ring = np.ones(pixels.shape[1:3], dtype=bool)
    ring[BORDER_PX:-BORDER_PX, BORDER_PX:-BORDER_PX] = False
    border = pixels[:, ring].reshape(-1, 3)
    colour = np.median(border, axis=0)
    return colour if np.median(np.linalg.norm(border - colour, axis=-1)) <= BORDER_TOLERANCE else None


def _neighbour_max(values: np.ndarray) -> np.ndarray:
    """Largest of each value and its four neighbours in the frame; [F, H, W] -> [F, H, W]."""
    padded = np.pad(values, ((0, 0), (1, 1), (1, 1)))
    rows = np.maximum(padded[:, :-2, 1:-1], padded[:, 2:, 1:-1])
    columns = np.maximum(padded[:, 1:-1, :-2], padded[:, 1:-1, 2:])
    return np.maximum(values, np.maximum(rows, columns))


def _grow(mask: np.ndarray, num_px: int) -> np.ndarray:
    for _ in range(num_px):
        mask = _neighbour_max(mask)
    return mask


def _largest_regions(mask: np.ndarray) -> np.ndarray:
    """The largest 4-connected region of each frame; [F, H, W] bool -> the same, all False where there is none."""
    labels = mask * np.arange(1, mask.size + 1, dtype=np.int32).reshape(mask.shape)
    spread = _neighbour_max(labels) * mask
    while not np.array_equal(labels, spread):  # each region takes the largest number in it
        labels, spread = spread, _neighbour_max(spread) * mask
    areas = np.bincount(labels.ravel(), minlength=mask.size + 1)
    areas[0] = 0
    largest = areas[labels].reshape(len(mask), -1).argmax(axis=1)  # a pixel of the region
    winners = labels.reshape(len(mask), -1)[np.arange(len(mask)), largest]
    return mask & (labels == winners[:, None, None])


def _coverage(pixels: np.ndarray, back: np.ndarray, front: np.ndarray) -> np.ndarray:
    """Place of each pixel on the line from `back` to `front`; [F, H, W, 3] -> [F, H, W].

    Not clipped to 0..1: noise then cancels in the sums.
    """
    axis = front - back
    return (pixels - back) @ axis / (axis @ axis)


def _measures(cover: np.ndarray) -> tuple[float, np.ndarray, tuple[float, float, float]]:
    """Area in px, centres [F, 2] as (x, y) in px, and the signature; from coverage [F, H, W].

    The sides of the bounding box are the largest sums over a row and over a column: for these convex shapes they
    are the same as the extents, and an edge's blur does not widen them. Noise does, so the sums are first averaged
    over the frames.
    """
    rows, columns = cover.sum(axis=2), cover.sum(axis=1)  # [F, H], [F, W]
    areas = rows.sum(axis=1)
    y, x = np.arange(rows.shape[1]), np.arange(columns.shape[1])
    centres = np.stack([columns @ x, rows @ y], axis=1) / areas[:, None]
    offset = y - centres[:, 1:]  # [F, H]
    variance = ((rows * offset**2).sum(axis=1) / areas).clip(min=1 / 12)  # that of one row of pixels
    skewness = (rows * offset**3).sum(axis=1) / areas / variance**1.5
    width, height = _mean_profile(rows, centres[:, 1]).max(), _mean_profile(columns, centres[:, 0]).max()
    aside = x - centres[:, :1]  # [F, W]
    variance_aside = ((columns * aside**2).sum(axis=1) / areas).clip(min=1 / 12)
    both = np.einsum("fhw,fh,fw->f", cover, offset**2, aside**2) / areas
    corners = float((both / variance / variance_aside).mean())
    area = float(areas.mean())
    return area, centres, (area / float(width * height), float(skewness.mean()), corners)


def _mean_profile(sums: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Mean over frames of sums [F, N] that are shifted by whole pixels onto one centre; wraps at the ends."""
    return np.mean([np.roll(s, -round(float(c))) for s, c in zip(sums, centres, strict=True)], axis=0)


def _shape(signature: tuple[float, float, float]) -> str | None:
    distances = {s: float(np.linalg.norm(np.subtract(signature, drawn))) for s, drawn in SIGNATURES.items()}
    shape = min(distances, key=distances.__getitem__)
    return shape if distances[shape] <= SHAPE_TOLERANCE else None


def _displacement(times: np.ndarray, centres: np.ndarray, num_frames: int) -> tuple[float, float]:
    """(dx, dy) in px over the clip: slope of the least-squares line through the centres, times F - 1."""
    offset = times - times.mean()
    slope = offset @ centres / max(float(offset @ offset), 1.0)  # one frame alone has slope 0
    dx, dy = (float(s) * (num_frames - 1) for s in slope)
    return dx, dy


def _direction(dx: float, dy: float, num_frames: int) -> str | None:
    larger, smaller = sorted((abs(dx), abs(dy)), reverse=True)
    if larger < MIN_SPEED_PX * max(num_frames - 1, 1) or larger < MIN_AXIS_RATIO * smaller:
        return None
    return max(DIRECTIONS, key=lambda name: float(np.dot(DIRECTIONS[name], (dx, dy))))
