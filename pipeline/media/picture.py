"""Input pictures, decoded as a viewer shows them, or refused with a reason; read without torch.

What is applied: EXIF orientation, all bits of 16-bit greys, transparency over white, embedded colour profiles and PNG's
gamma, to sRGB. Of animations and files with several pages the first is used, with a note. What has no agreed meaning
(32-bit whole numbers, floats beyond 0 to 1) is refused. Does not know: PNG's cHRM and cICP, HDR gain maps.
"""

import hashlib
import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageCms

from cineray.files import read_regular
from cineray.pipeline.request import ClipRequest, InputError, PictureFacts
from cineray.text import shorten

# none that runs another program (EPS), or that nobody sends; MPO, of phones and stereo cameras, counts as JPEG
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
MAX_PICTURE_PX = 1024**3 // 4 // 3  # where Pillow begins to warn of decompression bombs: 89 million, 256 MiB of RGB
MAX_PICTURE_BYTES = 2**29  # a TIFF of so many pixels at 16 bits a channel
SAME_SHAPE = 1.02  # a circle that is 2 % too wide still looks round
BACKGROUND = "white"  # of a page in a browser
SRGB_LEVELS = 2  # profiles of sRGB from several makers differ from each other by rounding
SRGB_GAMMA = 1 / 2.2  # what PNG's gAMA says of sRGB: 45455
_ORIENTATION = 0x0112
_PHOTOMETRIC = 262
_BITS_PER_SAMPLE = 258
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SPACES = {"RGB": "RGB ", "L": "GRAY", "CMYK": "CMYK", "LAB": "Lab "}


class PictureError(InputError):
    """A picture cannot be used; says which, why and what is allowed."""


def first_frame(request: ClipRequest) -> Image.Image:
    """The clip's picture, RGB: of the clip's size, but for `stretch`, which the model's own preprocessing does.

    Raises:
        PictureError: it cannot be used, or is not what it was when the clip was taken in hand.
    """
    assert request.image is not None  # the size rule made it required
    shown, facts = shown_picture(request.image)
    if request.picture is not None and facts.sha256 != request.picture.sha256:
        raise PictureError(f"{_named(request.image)} was changed after it was checked; run the same command again")
    return fitted(shown, request.width, request.height, request.image_fit)


def fitted(picture: Image.Image, width: int, height: int, fit: str) -> Image.Image:
    """A picture of any shape as a first frame.

    Args:
        fit: "stretch" leaves the picture alone; "crop" covers the frame and cuts what stands over on both sides alike;
            "pad" puts the whole picture in the middle of a black frame. Resampled with Lanczos, as diffusers does.
    """
    if fit == "stretch":
        return picture
    across, down = width / picture.width, height / picture.height
    if fit == "crop":
        scale = max(across, down)
        left, top = (picture.width - width / scale) / 2, (picture.height - height / scale) / 2
        box = (max(0.0, left), max(0.0, top), picture.width - max(0.0, left), picture.height - max(0.0, top))
        return picture.resize((width, height), Image.Resampling.LANCZOS, box=box)
    scale = min(across, down)
    size = (
        min(width, max(1, round(picture.width * scale))),
        min(height, max(1, round(picture.height * scale))),
    )
    frame = Image.new("RGB", (width, height), "black")
    frame.paste(picture.resize(size, Image.Resampling.LANCZOS), ((width - size[0]) // 2, (height - size[1]) // 2))
    return frame


def fit_warning(request: ClipRequest) -> str | None:
    """What is to be said of a picture that is stretched to another shape."""
    picture = request.picture
    if picture is None or request.image is None or request.image_fit != "stretch":
        return None
    wider = (request.width / request.height) / (picture.width / picture.height)
    if max(wider, 1 / wider) <= SAME_SHAPE:
        return None
    return (
        f"image {shorten(Path(request.image).name)} is {picture.width}x{picture.height} and was stretched to "
        f"{request.width}x{request.height}; --image-fit crop or pad (image_fit in a manifest) keeps its shape"
    )


def _named(path: str) -> str:
    return f"image {shorten(path)}"


def refusal(path: str, reason: str) -> PictureError:
    allowed = f"{', '.join(FORMATS)} of at most {MAX_PICTURE_PX} pixels"
    return PictureError(f"{_named(path)} cannot be used: {reason}; allowed: {allowed}")


def shown_picture(path: str) -> tuple[Image.Image, PictureFacts]:
    """(a picture's pixels, RGB as shown; its facts).

    Raises:
        PictureError: it cannot be used.
    """
    try:
        content = read_regular(Path(path), MAX_PICTURE_BYTES)
    except (OSError, ValueError) as error:
        raise refusal(path, getattr(error, "strerror", None) or str(error)) from None
    try:
        with warnings.catch_warnings(action="ignore"), _open(content) as opened:
            if not 0 < opened.width * opened.height <= MAX_PICTURE_PX:
                raise _Unusable(f"it has {opened.width}x{opened.height} pixels")
            shown, notes = _shown(opened)
            is_plain = _is_plain(opened, shown)
    except _Unusable as error:
        raise refusal(path, str(error)) from None
    except Exception as error:  # noqa: BLE001  # decoders raise whatever a broken file makes them stumble over
        what = " ".join(str(error).split()) or type(error).__name__
        raise refusal(path, f"it cannot be decoded ({shorten(what, 120)})") from None
    name = shorten(Path(path).name)
    return shown, PictureFacts(
        sha256=hashlib.sha256(content).hexdigest(),
        width=shown.width,
        height=shown.height,
        is_plain=is_plain,
        notes=tuple(f"image {name} {note}" for note in notes),
    )


class _Unusable(Exception):
    """Why a picture that can be decoded is refused."""


def _open(content: bytes) -> Image.Image:
    Image.init()
    try:
        return Image.open(io.BytesIO(content), formats=[name for name in FORMATS if name in Image.OPEN])
    except Image.UnidentifiedImageError:
        raise _Unusable("it is empty" if not content else "it is no picture, or broken, or of another format") from None


def _shown(opened: Image.Image) -> tuple[Image.Image, list[str]]:
    """(RGB in sRGB, notes on what was left out)."""
    notes = []
    num_frames = getattr(opened, "n_frames", 1)
    if num_frames > 1 and opened.format != "MPO":
        notes.append(f"has {num_frames} frames or pages; the first is used")
    rawmode = _rawmode(opened)
    opened.load()
    alpha = _alpha(opened, rawmode)
    colours = _with_profile(_as_colours(opened, rawmode), opened.info.get("icc_profile"), notes)
    gamma = opened.info.get("gamma")
    if gamma and not opened.info.get("icc_profile") and "srgb" not in opened.info:
        colours = _with_gamma(colours, gamma)
    if alpha is not None and np.asarray(alpha).min() < 255:
        colours = Image.composite(colours, Image.new("RGB", colours.size, BACKGROUND), alpha)
    turn = _TURNS.get(_orientation(opened))
    return (colours if turn is None else colours.transpose(turn)), notes


def _is_plain(opened: Image.Image, shown: Image.Image) -> bool:
    """Whether a reader that knows of nothing but pixels sees the same."""
    try:
        return ImageChops.difference(opened.convert("RGB"), shown).getbbox() is None
    except ValueError:  # no way to RGB (LAB), or turned
        return False


def _rawmode(opened: Image.Image) -> str:
    """How the file packs its samples, such as "L;4"; before it is loaded."""
    tiles = getattr(opened, "tile", None)
    if not tiles:
        return ""
    arguments = tiles[0][3]
    raw = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return raw if isinstance(raw, str) else ""


def _orientation(opened: Image.Image) -> int:
    """Pillow has turned a TIFF already, and then says 1."""
    try:
        return int(opened.getexif().get(_ORIENTATION, 1))
    except Exception:  # noqa: BLE001  # a broken EXIF block: viewers show the picture as it lies
        return 1


def _alpha(opened: Image.Image, rawmode: str) -> Image.Image | None:
    """Opacity [H, W] of 0 to 255; None where all is opaque."""
    key = opened.info.get("transparency")
    if opened.mode in ("LA", "RGBA", "PA", "La", "RGBa"):
        return opened.getchannel(len(opened.getbands()) - 1)
    if key is None and getattr(opened.palette, "mode", "RGB") != "RGBA":
        return None
    if opened.mode == "P":
        return opened.convert("RGBA").getchannel("A")
    if key is None or isinstance(key, bytes):
        return None
    # one colour is transparent; it is given in the file's own bits
    step = {"L;2": 85, "L;4": 17}.get(rawmode, 1)
    levels = [level >> 8 if rawmode == "RGB;16B" else level * step for level in (key if type(key) is tuple else (key,))]
    pixels = np.asarray(opened.convert("L") if opened.mode == "1" else opened)
    hidden = (pixels.reshape(*pixels.shape[:2], -1) == np.array(levels)).all(axis=-1)
    return Image.fromarray(np.where(hidden, 0, 255).astype(np.uint8))


def _as_colours(opened: Image.Image, rawmode: str) -> Image.Image:
    """8 bits in the file's own colour space: L, RGB, CMYK or LAB, without alpha."""
    mode = opened.mode
    if mode.startswith("I;16") or (mode == "I" and opened.format == "PNG"):  # Pillow before 11 gave PNGs as "I"
        bits = 12 if rawmode == "I;12" else 16
        return _grey(np.asarray(opened).astype(np.float32) / (2**bits - 1), opened)
    if mode == "F":
        levels = np.asarray(opened)
        if not (np.isfinite(levels).all() and levels.min() >= 0 and levels.max() <= 1):
            raise _Unusable("its floats are not all from 0, black, to 1, white; save it with 8 or 16 bits")
        return _grey(levels, opened)
    if mode == "I":
        raise _Unusable("it has whole numbers of 32 bits, or signed ones, whose white is not known; save 8 or 16 bits")
    if mode in ("L", "RGB", "CMYK", "LAB"):
        return opened
    return opened.convert("L" if mode in ("1", "LA", "La") else "RGB")


def _grey(levels: np.ndarray, opened: Image.Image) -> Image.Image:
    """[H, W] from 0 to 1 -> L. TIFFs may say that 0 is white; Pillow minds that for 8 bits alone."""
    tags = getattr(opened, "tag_v2", None) or {}
    if tags.get(_PHOTOMETRIC) == 0:
        levels = 1 - levels
    return Image.fromarray((levels * 255).round().astype(np.uint8))


def _with_profile(colours: Image.Image, profile: bytes | None, notes: list[str]) -> Image.Image:
    """RGB in sRGB; without a profile, or with one of sRGB itself, RGB pixels stay as they are."""
    if colours.mode == "LAB":
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    if not profile:
        return colours.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space  # type: ignore[union-attr]  # annotated as the file that it was read from
        if space == "GRAY":
            colours = colours.convert("L")  # greys with 16 bits and alpha come as RGBA
        elif space == "RGB ":
            colours = colours.convert("RGB")
        if _SPACES[colours.mode] != space:
            raise ValueError
        transform = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            colours.mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError, ValueError, KeyError):
        notes.append("has a colour profile that cannot be used and was left out")
        return colours.convert("RGB")
    plain = None if colours.mode in ("CMYK", "LAB") else colours.convert("RGB")
    if plain is not None and _is_srgb(transform, colours.mode):
        return plain
    shown = ImageCms.applyTransform(colours, transform)
    assert shown is not None
    return shown


def _is_srgb(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether the transform changes no colour by more than rounding."""
    levels = np.linspace(0, 255, 9).round().astype(np.uint8)
    grid = levels[:, None] if mode == "L" else np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 1, 3)
    probe = Image.fromarray(grid)
    seen = ImageCms.applyTransform(probe, transform)
    assert seen is not None
    difference = np.asarray(seen).astype(int) - np.asarray(probe.convert("RGB")).astype(int)
    return bool(np.abs(difference).max() <= SRGB_LEVELS)


def _with_gamma(colours: Image.Image, gamma: float) -> Image.Image:
    """PNG specification, 13.13 "Decoder gamma handling", for a display of 2.2."""
    if not 0.1 < gamma < 10 or abs(gamma / SRGB_GAMMA - 1) < 0.05:  # absurd; or what encoders round to
        return colours
    curve = (np.linspace(0, 1, 256) ** (SRGB_GAMMA / gamma) * 255).round().astype(int).tolist()
    return colours.point(curve * 3)
