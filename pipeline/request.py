"""What a user asks for: one clip, and the rules that its numbers must keep for a given model."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from cineray.text import shorten

# Sixteen times the 512 tokens that Wan reads at about 4 characters each would be 32k; nobody types that.
MAX_PROMPT_CHARS = 20_000
MAX_SIDE_PX = 8192
MAX_FRAMES = 4097
MAX_STEPS = 1000  # the schedulers' num_train_timesteps
MAX_SEED = 2**32 - 1  # PyTorch's generator on the CPU, which draws the noise, takes the low 32 bits of a seed alone
MIN_SECONDS = 0.1  # of sound; the shortest click that a person would ask for
MAX_REFERENCES = 16  # pictures; each is a latent frame more, and nobody's examples have more than four
MAX_CONDITIONING = 10  # of `conditioning_scale`; 1 is what the model was trained with
IMAGE_FITS = ("stretch", "crop", "pad")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff]")  # less tab and line ends; lone surrogates
CLIP_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class InputError(ValueError):
    """Something that the user gave cannot be used; each line says what, where, allowed, got, what to do.

    Args:
        lines: one message each; a line end within one is the user's own, and is escaped where it is shown.
    """

    def __init__(self, *lines: str) -> None:
        super().__init__(*lines)

    @property
    def lines(self) -> tuple[str, ...]:
        return self.args

    def __str__(self) -> str:
        return "\n".join(self.lines)


def explain(error: BaseException, limit: int = 300) -> str:
    """An exception of whatever type in one line: what it says, after its type where the message is not one of ours."""
    try:
        said = " ".join(str(error).split())[:limit]
    except Exception as worse:  # noqa: BLE001  # its own __str__ fails
        said = f"(it cannot be shown: {type(worse).__name__})"
    if said and isinstance(error, InputError):
        return said
    name = type(error).__name__
    return f"{name}: {said}" if said else name


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureFacts:
    """What a picture's file held when its clip was taken in hand.

    Args:
        sha256: of the file, in hex.
        width, height: pixels, as it is shown.
        is_plain: it shows the pixels that lie in the file: no transparency, orientation, profile or depth to apply.
        notes: what is to be said of it, such as that it is animated.
    """

    sha256: str
    width: int
    height: int
    is_plain: bool = True
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipRequest:
    """One clip. Sizes in pixels; `guidance_scale` 1 or less means no classifier-free guidance on Wan.

    `image` is the path of the first frame for image-to-video models, `image_fit` one of IMAGE_FITS: what to do where
    it has another shape than the clip. `flow_shift` moves the steps towards the noise; None is the model's own for
    the size. `guidance_scale_2` is that of a second expert; None is the first one's. `seconds` is how long a sound is.
    A model that knows no frames, sides or frame rate has 1 there. `picture` is set once the clip is taken in hand
    (`Pictures.pinned`), and so are `control_digests`: SHA-256 of the files that VACE takes, `control_files`, in hex.
    `reference_images` are paths of pictures, `control_video` of a video that the clip follows; `control_mask` of a
    video or picture: black is kept of the control video, white is made anew. `conditioning_scale` is how much of what
    VACE makes of these is added; None is 1.
    """

    id: str
    prompt: str
    negative_prompt: str | None = None
    seed: int = 0
    width: int
    height: int
    num_frames: int
    num_inference_steps: int
    guidance_scale: float
    fps: int
    cache: str = "none"
    image: str | None = None
    image_fit: str = "stretch"
    flow_shift: float | None = None
    guidance_scale_2: float | None = None
    seconds: float | None = None
    reference_images: tuple[str, ...] = ()
    control_video: str | None = None
    control_mask: str | None = None
    conditioning_scale: float | None = None
    picture: PictureFacts | None = None
    control_digests: tuple[str, ...] = ()

    @property
    def control_files(self) -> tuple[str, ...]:
        """Reference images, control video and mask, as far as there are any."""
        return (*self.reference_images, *filter(None, (self.control_video, self.control_mask)))


@dataclass(frozen=True, kw_only=True, slots=True)
class SizeRule:
    """What a model can render: frames are `frame_step` k + 1, sides are multiples of `side_step` pixels.

    Args:
        takes_control: reference images, and a control video with its mask.
        goes_on_from: frames at the end of a control video, behind which the clip goes on; None where it cannot.
        frame_offset: of `frame_step` k + offset; with 0 a single frame can be had too.
        needs_image: where `takes_image`: there is no clip without one.
        frame_step: None where nobody can choose the number of frames, nor their rate.
        frame_rate: in that case, the value of `fps`: samples a second of a sound, else 1.
        side_step: None where there are no pixels.
        fixed_side: the only width and height, in pixels.
        max_seconds: of a sound; None where nothing sounds.
        no_negative: why there is no negative prompt, where it is not taken.
    """

    frame_step: int | None
    side_step: int | None
    takes_image: bool
    takes_negative_prompt: bool
    frame_offset: int = 1
    needs_image: bool = True
    takes_flow_shift: bool = False
    takes_second_guidance: bool = False
    takes_control: bool = False
    goes_on_from: int | None = None
    fixed_side: int | None = None
    max_seconds: float | None = None
    frame_rate: int = 1
    no_negative: str = "this model's guidance is embedded, there is no negative branch"

    @property
    def encodes_pixels(self) -> bool:
        """Whether a clip's files go through the VAE before it is denoised."""
        return self.takes_image or self.takes_control

    @property
    def control_fields(self) -> tuple[str, ...]:
        """Fields of a request that name files which a clip is controlled by."""
        if self.takes_control:
            return ("reference_images", "control_video", "control_mask")
        return () if self.goes_on_from is None else ("control_video",)

    def num_control_frames(self, request: ClipRequest) -> int:
        """Frames that a control video must have at least."""
        return self.goes_on_from or request.num_frames


def _shown(value: float) -> str:
    """A number as it is, unless it has a thousand digits."""
    text = str(value)
    return text if len(text) <= 40 else f"{text[:10]}... ({len(text)} characters)"


def _nearest(value: int, step: int, offset: int) -> str:
    low = max(offset, (value - offset) // step * step + offset)
    return f"{low} or {low + step}" if low > 0 else f"{step}"


def problems(request: ClipRequest, rule: SizeRule) -> list[str]:
    """Everything about the request that the model cannot do, each in one phrase; empty if it can be rendered."""
    found = []

    def within(name: str, value: float, low: float, high: float, why: str = "") -> bool:
        if not low <= value <= high:
            found.append(f"{name} must be {low} to {high}{why}, got {_shown(value)}")
            return False
        return True

    if not CLIP_ID.fullmatch(request.id):
        found.append(
            f"id must be 1 to 100 of A-Z a-z 0-9 . _ - and begin with a letter or digit, got {shorten(request.id)}"
        )
    for name, text in (("prompt", request.prompt), ("negative_prompt", request.negative_prompt or "")):
        if len(text) > MAX_PROMPT_CHARS:
            found.append(f"{name} must have at most {MAX_PROMPT_CHARS} characters, got {len(text)}")
        elif _CONTROL.search(text):
            found.append(f"{name} must have no control characters, got {shorten(text)}")
    if not request.prompt.strip():
        found.append("prompt must not be empty")
    if rule.frame_step is None:
        found += [
            f"{name} cannot be used: this model's clips have no frames, got {_shown(value)}"
            for name, value, fixed in (("frames", request.num_frames, 1), ("fps", request.fps, rule.frame_rate))
            if value != fixed
        ]
    elif within("frames", request.num_frames, 1, MAX_FRAMES):
        found += _frames_problems(request.num_frames, rule.frame_step, rule.frame_offset)
    for name, side in (("width", request.width), ("height", request.height)):
        if rule.side_step is None:
            if side != 1:
                found.append(f"{name} cannot be used: this model's clips have no pixels, got {_shown(side)}")
        elif rule.fixed_side is not None:
            if side != rule.fixed_side:
                found.append(f"{name} must be {rule.fixed_side}, the only one of this model, got {_shown(side)}")
        elif within(name, side, 1, MAX_SIDE_PX) and side % rule.side_step:
            near = _nearest(side, rule.side_step, 0)
            found.append(f"{name} must be a multiple of {rule.side_step}, got {side}; nearest: {near}")
    found += _seconds_problems(request, rule)
    within("steps", request.num_inference_steps, 1, MAX_STEPS)
    within("seed", request.seed, 0, MAX_SEED, " (2^32 - 1: noise is drawn from 32 bits)")
    within("guidance", request.guidance_scale, 0, 100)
    if request.guidance_scale_2 is not None:
        within("guidance_2", request.guidance_scale_2, 0, 100)
        if not rule.takes_second_guidance:
            found.append("guidance_2 cannot be used: this model has one expert")
    if rule.frame_step is not None:
        within("fps", request.fps, 1, 240)
    if rule.takes_image and rule.needs_image and request.image is None:
        found.append("image is required: this model animates a first frame")
    if not rule.takes_image and request.image is not None:
        found.append("image cannot be used: this model renders from text alone")
    if request.image_fit not in IMAGE_FITS:
        found.append(f"image_fit must be stretch, crop or pad, got {shorten(request.image_fit)}")
    elif not (rule.takes_image or rule.takes_control) and request.image_fit != "stretch":
        found.append("image_fit cannot be used: this model renders from text alone")
    found += _control_problems(request, rule)
    if request.flow_shift is not None:
        within("flow_shift", request.flow_shift, 0.01, 100)
        if not rule.takes_flow_shift:
            found.append("flow_shift cannot be used: this model's schedule has none")
    if request.conditioning_scale is not None:
        within("conditioning_scale", request.conditioning_scale, 0, MAX_CONDITIONING)
        if not rule.takes_control:
            found.append("conditioning_scale cannot be used: this model takes no control")
    if not rule.takes_negative_prompt and request.negative_prompt is not None:
        found.append(f"negative_prompt cannot be used: {rule.no_negative}")
    return found


def _frames_problems(num_frames: int, step: int, offset: int) -> list[str]:
    if num_frames == 1 or num_frames % step == offset % step:
        return []
    allowed = f"{step}k+{offset}" if offset else f"1 or {step}k"
    return [f"frames must be {allowed}, got {num_frames}; nearest: {_nearest(num_frames, step, offset)}"]


def _control_problems(request: ClipRequest, rule: SizeRule) -> list[str]:
    found = [
        f"{name} cannot be used: this model takes none"
        for name in ("reference_images", "control_video", "control_mask")
        if getattr(request, name) and name not in rule.control_fields
    ]
    if len(request.reference_images) > MAX_REFERENCES:
        found.append(f"reference_images must be at most {MAX_REFERENCES}, got {len(request.reference_images)}")
    if rule.takes_control and request.control_mask is not None and request.control_video is None:
        found.append("control_mask needs a control_video, whose parts it hides")
    if rule.goes_on_from is not None and request.control_video is not None:
        if request.image is not None:
            found.append("image and control_video cannot both be given: a clip begins with one of them")
        if request.num_frames == 1:
            found.append(f"frames must be {rule.frame_step}k where a clip goes on from a control_video, got 1")
    return found


def _seconds_problems(request: ClipRequest, rule: SizeRule) -> list[str]:
    seconds, most = request.seconds, rule.max_seconds
    if most is None:
        return [] if seconds is None else ["seconds cannot be used: this model makes no sound"]
    if seconds is None:
        return [f"seconds are required: {MIN_SECONDS:g} to {most:g}"]
    if not MIN_SECONDS <= seconds <= most:  # NaN too
        return [f"seconds must be {MIN_SECONDS:g} to {most:g}, got {_shown(seconds)}"]
    return []


def is_plain(clip_id: str, prompt: str, seed: int) -> bool:
    """Whether `problems` finds nothing in what differs from clip to clip; for many clips that are alike in all else."""
    return (
        CLIP_ID.fullmatch(clip_id) is not None
        and len(prompt) <= MAX_PROMPT_CHARS
        and _CONTROL.search(prompt) is None
        and not prompt.isspace()
        and prompt != ""
        and 0 <= seed <= MAX_SEED
    )


def fingerprint(
    request: ClipRequest,
    policy: str,
    model_digest: str,
    render_options: dict[str, object],
    pixel_fields: Sequence[str] = (),
) -> str:
    """Twelve hex digits over everything that changes pixels and nothing else.

    The id, the device and the layout are left out, and the frame rate unless it is one of `pixel_fields`.

    Args:
        request: as `Adapter.effective` gives it: less what has no effect on pixels.
        policy: the cache policy with all its options, as text.
        render_options: what is common to a run: dtype, VAE tiling, lossless.
        pixel_fields: further fields of the request that change this model's pixels, as its `Model` says.

    Raises:
        ValueError: the request has a picture and is not `pinned`.
    """
    covered: dict[str, object] = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "seed": request.seed,
        "width": request.width,
        "height": request.height,
        "frames": request.num_frames,
        "steps": request.num_inference_steps,
        "guidance": request.guidance_scale,
        "cache": policy,
        "image": None,
        "model": model_digest,
        "options": render_options,
        **{name: getattr(request, name) for name in pixel_fields},
    }
    if request.flow_shift is not None:
        covered["flow_shift"] = request.flow_shift
    if request.guidance_scale_2 is not None:
        covered["guidance_2"] = request.guidance_scale_2
    if request.conditioning_scale is not None:
        covered["conditioning_scale"] = request.conditioning_scale
    if request.seconds is not None:
        covered["seconds"] = request.seconds
    if request.image is not None:
        picture = request.picture
        if picture is None:
            raise ValueError(f"clip {request.id} has no fingerprint before its picture was looked at")
        # one that needs more than its pixels to be shown is not what earlier versions made of the same file
        covered["image"] = picture.sha256 if picture.is_plain else f"{picture.sha256} as shown"
        if request.image_fit != "stretch":
            covered["image_fit"] = request.image_fit
    if request.control_files:
        if len(request.control_digests) != len(request.control_files):
            raise ValueError(f"clip {request.id} has no fingerprint before its control files were looked at")
        covered |= control_inputs(request)
    text = json.dumps(covered, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def picture_inputs(request: ClipRequest) -> dict[str, object]:
    """What a first frame is encoded from: the picture, by what it holds where that is known, and the clip's size."""
    picture = request.picture
    return {
        "image": request.image if picture is None else picture.sha256,
        "image_fit": request.image_fit,
        "size": [request.width, request.height],
    }


def control_inputs(request: ClipRequest) -> dict[str, object]:
    """What the files of `control_files` change, of a request that is `pinned`; empty where there are none."""
    if not request.control_files:
        return {}
    digests = list(request.control_digests)
    return {
        "reference_images": digests[: len(request.reference_images)],
        "control": digests[len(request.reference_images) :],
        "control_fit": request.image_fit if request.control_video is not None else None,
    }


def prompt_key(inputs: dict[str, object], model_digest: str, dtype: str) -> str:
    """Equal for requests that are encoded alike.

    Args:
        inputs: of the encoders, as `Adapter.encode_inputs` says.
    """
    text = json.dumps([inputs, model_digest, dtype], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
