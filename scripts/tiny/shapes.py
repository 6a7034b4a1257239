"""Captioned moving shapes, drawn by code: the world that the tiny checkpoints are trained on.

A scene is one flat shape that moves at constant speed along one axis over a flat background. Nothing here
knows a model; the trainer and the obedience check both import it, so they agree on what a caption means.
"""

from dataclasses import dataclass
from itertools import product

import torch

COLOURS = {
    "red": (224, 48, 40),
    "green": (48, 192, 72),
    "blue": (56, 104, 248),
    "yellow": (248, 216, 48),
    "purple": (168, 56, 208),
    "white": (248, 248, 248),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # (x, y), y grows downwards
BACKGROUNDS = {"black": (8, 8, 8), "gray": (112, 112, 112), "navy": (16, 20, 88)}

SIZE = 64  # pixels, height and width
NUM_FRAMES = 17
RADIUS_PX = (9.0, 13.0)
SPEED_PX = (1.0, 1.6)  # per frame: 16 to 26 px over a clip

# The three shapes get similar areas from one radius: half side of the square, circumradius of the triangle.
SQUARE_HALF_SIDE = 0.88
TRIANGLE_CIRCUMRADIUS = 1.35


@dataclass(frozen=True, kw_only=True, slots=True)
class Caption:
    """What a sentence of the grammar says."""

    colour: str
    shape: str
    direction: str
    background: str

    def __str__(self) -> str:
        return f"a {self.colour} {self.shape} moving {self.direction} on a {self.background} background"

    @property
    def still(self) -> str:
        """What a single frame of it shows; the name of a class of tiny-dit."""
        return f"a {self.colour} {self.shape} on a {self.background} background"


def all_captions() -> list[Caption]:
    """The 216 sentences of the grammar, in a fixed order."""
    return [
        Caption(colour=c, shape=s, direction=d, background=b)
        for c, s, d, b in product(COLOURS, SHAPES, DIRECTIONS, BACKGROUNDS)
    ]


def all_stills() -> list[Caption]:
    """A caption for each of the 54 stills, in the order of tiny-dit's classes; all of them move left."""
    return [c for c in all_captions() if c.direction == "left"]


def _coverage(shape: str, x: torch.Tensor, y: torch.Tensor, radius: float) -> torch.Tensor:
    """Share of each pixel that the shape covers, from its signed distance; edges are one pixel wide."""
    if shape == "circle":
        distance = torch.sqrt(x * x + y * y) - radius
    elif shape == "square":
        distance = torch.maximum(x.abs(), y.abs()) - SQUARE_HALF_SIDE * radius
    else:  # equilateral, one corner up; the centre is the centroid
        inradius = TRIANGLE_CIRCUMRADIUS * radius / 2
        slanted = 0.8660254 * x.abs() - 0.5 * y - inradius
        distance = torch.maximum(slanted, y - inradius)
    return (0.5 - distance).clamp(0, 1)


def draw_clip(
    caption: Caption, generator: torch.Generator, num_frames: int = NUM_FRAMES, first_frame: int = 0
) -> torch.Tensor:
    """One clip of the caption with a random radius, speed and place.

    Args:
        generator: the only source of randomness; it is drawn from five times, whatever `num_frames` is.
        first_frame: where in the 17-frame movement a shorter clip starts.

    Returns:
        [3, num_frames, 64, 64] float32 in [-1, 1]. The shape stays inside the frame for 17 frames.
    """
    u = torch.rand(5, generator=generator).tolist()
    radius = RADIUS_PX[0] + u[0] * (RADIUS_PX[1] - RADIUS_PX[0])
    speed = SPEED_PX[0] + u[1] * (SPEED_PX[1] - SPEED_PX[0])
    dx, dy = DIRECTIONS[caption.direction]
    reach = radius * (TRIANGLE_CIRCUMRADIUS if caption.shape == "triangle" else 1.0) + 1
    travel = speed * (NUM_FRAMES - 1)

    def start(toward: int, share: float) -> float:
        low = reach + (travel if toward < 0 else 0)
        high = SIZE - reach - (travel if toward > 0 else 0)
        return low + share * (high - low) if high > low else (low + high) / 2

    x0, y0 = start(dx, u[2]), start(dy, u[3])
    time = torch.arange(first_frame, first_frame + num_frames, dtype=torch.float32).view(-1, 1, 1)
    pixel = torch.arange(SIZE, dtype=torch.float32) + 0.5
    x = pixel.view(1, 1, -1) - (x0 + dx * speed * time)
    y = pixel.view(1, -1, 1) - (y0 + dy * speed * time)
    x, y = torch.broadcast_tensors(x, y)
    cover = _coverage(caption.shape, x, y, radius)  # [F, H, W]
    front, back = (
        torch.tensor(rgb, dtype=torch.float32).view(3, 1, 1, 1) / 127.5 - 1
        for rgb in (COLOURS[caption.colour], BACKGROUNDS[caption.background])
    )
    return back + cover * (front - back)


def draw_batch(num_clips: int, generator: torch.Generator, num_frames: int = NUM_FRAMES) -> torch.Tensor:
    """Random clips of random captions: [num_clips, 3, num_frames, 64, 64] float32 in [-1, 1]."""
    captions = all_captions()
    chosen = torch.randint(len(captions), (num_clips,), generator=generator).tolist()
    starts = torch.randint(NUM_FRAMES - num_frames + 1, (num_clips,), generator=generator).tolist()
    return torch.stack(
        [draw_clip(captions[c], generator, num_frames, first) for c, first in zip(chosen, starts, strict=True)]
    )
