"""Pictures as viewers show them, or refused with a line; no torch."""

import io
import os
import struct
import subprocess
import sys
import zlib
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from cineray.pipeline.media.inputs import Pictures
from cineray.pipeline.media.picture import FORMATS, PictureError, first_frame, fit_warning, fitted
from cineray.pipeline.request import PictureFacts, fingerprint

GREY = np.tile(np.linspace(0, 255, 48).round().astype(np.uint8), (32, 1))  # [H, W]
RGB = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
ALPHA = np.zeros((32, 48), np.uint8)
ALPHA[:, 24:] = 255
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def as_rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=2)


def over_white(pixels: np.ndarray, is_hidden: np.ndarray) -> np.ndarray:
    return np.where(is_hidden[..., None], 255, pixels)


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(rows: list[bytes], bits: int, colour_type: int, extra: bytes = b"", size: tuple[int, int] = (48, 32)) -> bytes:
    """As other programs write them: bits, transparency and gamma that Pillow does not write."""
    header = struct.pack(">IIBBBBB", *size, bits, colour_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = (chunk(b"IHDR", header), extra, chunk(b"IDAT", pixels), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def deep(pixels: np.ndarray) -> np.ndarray:
    """16 bits, most significant byte first."""
    return (pixels.astype(np.uint16) * 257).astype(">u2")


def packed(grey: np.ndarray, bits: int) -> list[bytes]:
    levels = np.unpackbits(grey[..., None], axis=2)[:, :, :bits]
    return [np.packbits(row.reshape(-1)).tobytes() for row in levels]


def key(*levels: int) -> bytes:
    return chunk(b"tRNS", struct.pack(f">{len(levels)}H", *levels))


@pytest.fixture
def shown(tmp_path, new_request):
    """Writes a picture and gives the pixels [H, W, 3] that a model would get, and what is known of it."""

    def show(picture, name: str = "x.png", **options) -> tuple[np.ndarray, PictureFacts]:
        path = tmp_path / name
        if isinstance(picture, bytes):
            path.write_bytes(picture)
        else:
            image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
            image.save(path, **options)
        request = Pictures().pinned(new_request(image=str(path)))
        assert request.picture is not None
        return np.asarray(first_frame(request)).astype(int), request.picture

    return show


@pytest.mark.parametrize("name", ["x.png", "x.bmp", "x.tif", "x.webp", "x.jpg", "x.gif", "x.avif"])
def test_an_ordinary_picture_gives_the_pixels_that_it_always_gave(shown, name, tmp_path):
    if name == "x.avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    for picture in (Image.fromarray(RGB), Image.fromarray(GREY)):
        pixels, facts = shown(picture, name)
        assert np.array_equal(pixels, np.asarray(Image.open(tmp_path / name).convert("RGB")))
        assert (facts.width, facts.height, facts.is_plain, facts.notes) == (48, 32, True, ())


@pytest.mark.parametrize("name", ["x.png", "x.tif"])
def test_16_bit_grey_is_the_8_bit_picture(shown, name):
    pixels, facts = shown(GREY.astype(np.uint16) * 257, name)
    assert np.array_equal(pixels, as_rgb(GREY))
    assert not facts.is_plain


def test_other_depths(shown):
    assert np.array_equal(shown(png([deep(row).tobytes() for row in RGB], 16, 2))[0], RGB)
    big_endian = Image.frombytes("I;16B", (48, 32), deep(GREY).tobytes())
    assert np.array_equal(shown(big_endian, "x.tif")[0], as_rgb(GREY))
    white_is_zero = Image.fromarray(GREY.astype(np.uint16) * 257)
    assert np.array_equal(shown(white_is_zero, "x.tif", tiffinfo={262: 0})[0], 255 - as_rgb(GREY).astype(int))
    assert np.array_equal(shown(GREY.astype(np.float32) / 255, "x.tif")[0], as_rgb(GREY))
    assert np.array_equal(shown(Image.fromarray(GREY > 127), "x.png")[0], as_rgb((GREY > 127) * 255))


@pytest.mark.parametrize(
    "pixels",
    [
        GREY.astype(np.int32) * 257,
        GREY.astype(np.float32),
        np.where(GREY > 99, np.nan, 0.5).astype(np.float32),
        np.where(GREY > 99, -1, 0.5).astype(np.float32),
    ],
    ids=["32-bit whole numbers", "floats to 255", "nan", "negative"],
)
def test_what_has_no_agreed_white_is_refused(shown, pixels):
    with pytest.raises(PictureError, match="save"):
        shown(pixels, "x.tif")


def test_hidden_colours_do_not_appear(shown):
    colours, greys, hidden = RGB.copy(), GREY.copy(), ALPHA == 0
    rgba = Image.fromarray(np.dstack([colours, ALPHA]))
    expected = over_white(RGB, hidden)
    assert np.array_equal(shown(rgba, "x.png")[0], expected)
    assert np.array_equal(shown(rgba, "x.tif")[0], expected)
    assert np.array_equal(shown(rgba, "x.webp", lossless=True, exact=True)[0], expected)
    assert np.array_equal(
        shown(Image.fromarray(np.dstack([greys, ALPHA])), "x.png")[0], over_white(as_rgb(GREY), hidden)
    )
    pixels, facts = shown(Image.fromarray(np.dstack([RGB, np.full_like(ALPHA, 255)])))
    assert np.array_equal(pixels, RGB)
    assert facts.is_plain
    half = shown(Image.fromarray(np.dstack([RGB, np.full_like(ALPHA, 128)])))[0]
    assert np.abs(half - (RGB.astype(float) * 128 + 255.0 * 127) / 255).max() <= 1


def test_one_transparent_colour_in_every_depth(shown):
    level, colour = int(GREY[5, 20]), [int(level) for level in RGB[3, 3]]
    grey = over_white(as_rgb(GREY), np.asarray(np.equal(GREY, level)))
    rgb = over_white(RGB, np.equal(RGB, colour).all(axis=-1))
    assert np.array_equal(shown(png([row.tobytes() for row in GREY], 8, 0, key(level)))[0], grey)
    assert np.array_equal(shown(png([deep(row).tobytes() for row in GREY], 16, 0, key(level * 257)))[0], grey)
    assert np.array_equal(shown(png([row.tobytes() for row in RGB], 8, 2, key(*colour)))[0], rgb)
    deep_key = key(*(level * 257 for level in colour))
    assert np.array_equal(shown(png([deep(row).tobytes() for row in RGB], 16, 2, deep_key))[0], rgb)
    for bits, step in ((4, 17), (2, 85), (1, 255)):
        levels = GREY >> (8 - bits)
        expected = over_white(as_rgb(levels.astype(int) * step), levels == 1)
        assert np.array_equal(shown(png(packed(GREY, bits), bits, 0, key(1)))[0], expected)


def test_transparent_entries_of_a_palette(shown):
    palette = Image.fromarray(RGB).quantize(16)
    colours, index = np.asarray(palette.convert("RGB")), np.asarray(palette)
    assert np.array_equal(shown(palette, "x.png")[0], colours)
    assert np.array_equal(shown(palette, "x.png", transparency=3)[0], over_white(colours, index == 3))
    assert np.array_equal(shown(palette, "x.gif", transparency=3)[0], over_white(colours, index == 3))
    some = bytes([0, 255, 0] + [255] * 13)
    assert np.array_equal(
        shown(palette, "x.png", transparency=some)[0], over_white(colours, (index == 0) | (index == 2))
    )


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.webp"])
def test_orientation(shown, name, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = RGB if orientation <= 4 else RGB.transpose(1, 0, 2)
    across, down = {1: (1, 1), 2: (-1, 1), 3: (-1, -1), 4: (1, -1), 5: (1, 1), 6: (-1, 1), 7: (-1, -1), 8: (1, -1)}[
        orientation
    ]
    pixels, facts = shown(RGB, name, exif=exif, **({"lossless": True} if name == "x.webp" else {}))
    assert np.array_equal(pixels, turned[::down, ::across])
    assert (facts.height, facts.width) == turned.shape[:2]


def test_other_colour_spaces(shown):
    smooth = np.asarray(Image.fromarray(RGB[::8, ::8]).resize((48, 32), Image.Resampling.BICUBIC))
    image = Image.fromarray(smooth)
    for mode, name, options in (
        ("CMYK", "x.tif", {}),
        ("CMYK", "x.jpg", {"quality": 100}),
        ("YCbCr", "x.tif", {}),
    ):
        assert np.abs(shown(image.convert(mode), name, **options)[0] - smooth).max() <= 4, mode
    lab = ImageCms.profileToProfile(
        image, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert lab is not None
    assert np.abs(shown(lab, "x.tif")[0] - smooth).mean() <= 3  # 8 bits of Lab are coarse


def swapped_profile() -> bytes:
    """sRGB with its red and blue primaries exchanged: what a viewer shows has red and blue exchanged."""
    names = {SRGB[i : i + 4]: i for i in range(132, 132 + 12 * int.from_bytes(SRGB[128:132], "big"), 12)}
    profile = bytearray(SRGB)
    red, blue = names[b"rXYZ"], names[b"bXYZ"]
    profile[red + 4 : red + 12], profile[blue + 4 : blue + 12] = SRGB[blue + 4 : blue + 12], SRGB[red + 4 : red + 12]
    return bytes(profile)


def test_colour_profiles(shown):
    pixels, facts = shown(RGB, icc_profile=SRGB)
    assert np.array_equal(pixels, RGB)
    assert facts.is_plain
    pixels, facts = shown(RGB, icc_profile=swapped_profile())
    assert np.abs(pixels - RGB[..., ::-1]).max() <= 2
    assert not facts.is_plain
    pixels, facts = shown(np.dstack([RGB, ALPHA]), icc_profile=swapped_profile())
    assert np.abs(pixels - over_white(RGB[..., ::-1], ALPHA == 0)).max() <= 2
    for broken in (b"garbage", SRGB[:200]):
        pixels, facts = shown(RGB, icc_profile=broken)
        assert np.array_equal(pixels, RGB)
        assert "colour profile that cannot be used" in facts.notes[0]


def test_png_gamma(shown):
    rows = [row.tobytes() for row in GREY]

    def with_gamma(gamma: float, *more: bytes) -> np.ndarray:
        return shown(png(rows, 8, 0, chunk(b"gAMA", struct.pack(">I", round(gamma * 100_000))) + b"".join(more)))[0]

    linear = ((as_rgb(GREY) / 255) ** (1 / 2.2) * 255).round()
    assert np.array_equal(with_gamma(1.0), linear)
    for plain in (0.45455, 0, 0.00001, 20_000):
        assert np.array_equal(with_gamma(plain), as_rgb(GREY))
    assert np.array_equal(with_gamma(1.0, chunk(b"sRGB", b"\0")), as_rgb(GREY))


@pytest.mark.parametrize("name", ["x.png", "x.webp", "x.gif", "x.tif"])
def test_of_several_frames_the_first_is_used_and_said(shown, name):
    first, second = Image.new("RGB", (48, 32), (200, 0, 0)), Image.new("RGB", (48, 32), (0, 0, 200))
    options = {"lossless": True} if name == "x.webp" else {}
    pixels, facts = shown(first, name, save_all=True, append_images=[second], **options)
    assert np.array_equal(pixels, np.broadcast_to((200, 0, 0), (32, 48, 3)))
    assert facts.notes == (f"image {name!r} has 2 frames or pages; the first is used",)


def cut(name: str, **options) -> bytes:
    content = io.BytesIO()
    Image.fromarray(RGB).save(content, name, **options)
    return content.getvalue()[: -len(content.getvalue()) // 4]


BROKEN = {
    "empty": b"",
    "text": b"no picture",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "pdf": b"%PDF-1.4",
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n",
    "ppm": b"P6 1 1 255\nabc",
    "header": png([], 8, 2)[:40],
    "no rows": png([], 8, 2),
    "no width": png([b""] * 32, 8, 0, size=(0, 32)),
    "bomb": png([], 1, 0, size=(60_000, 60_000)),
    "small bomb": png([], 1, 0, size=(9_500, 9_500)),
    "overflow": png([], 8, 0, size=(2**31 - 1, 2**31 - 1)),
    **{f"cut {name}": cut(name) for name in FORMATS if name != "AVIF"},
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_picture_is_refused_in_one_line(shown, kind, capfd):
    with pytest.raises(PictureError, match=r"image '.*x.png' cannot be used: it .*; allowed: PNG, JPEG") as caught:
        shown(BROKEN[kind])
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    names = ("fifo", "loop", "none", "", "x" * 300, "nul\0", "half\ud800")
    for path in ("/dev/zero", *(str(tmp_path / name) for name in names)):
        with pytest.raises(PictureError, match="cannot be used") as caught:
            Pictures().facts(path)
        assert caught.value.lines[0].isprintable()


def test_flipped_bits_are_a_picture_or_a_line(tmp_path):
    """Nothing else, whatever a decoder stumbles over."""
    numbers = np.random.default_rng(1)
    for name in FORMATS:
        if name not in Image.OPEN:
            continue
        whole = io.BytesIO()
        Image.fromarray(RGB).save(whole, name)
        for _ in range(40):
            content = bytearray(whole.getvalue())
            for place in numbers.integers(0, len(content), numbers.integers(1, 5)):
                content[place] ^= 1 << int(numbers.integers(8))
            (tmp_path / "x").write_bytes(content)
            with suppress(PictureError):
                assert Pictures().facts(str(tmp_path / "x")).width > 0


def test_a_picture_is_decoded_once_until_it_changes(tmp_path, monkeypatch):
    path = str(tmp_path / "x.png")
    Image.fromarray(RGB).save(path)
    pictures, reads = Pictures(), []
    read = Image.open
    monkeypatch.setattr(Image, "open", lambda *a, **k: reads.append(1) or read(*a, **k))
    assert len({pictures.facts(path).sha256 for _ in range(5)}) == 1
    assert len(reads) == 1
    Image.fromarray(RGB[::-1]).save(path)
    pictures.facts(path)
    assert len(reads) == 2
    (tmp_path / "x.png").write_bytes(b"no picture")
    for _ in range(2):
        with pytest.raises(PictureError):
            pictures.facts(path)


def test_a_picture_that_changes_after_its_clip_was_taken_in_hand(tmp_path, new_request):
    path = tmp_path / "x.png"
    Image.fromarray(RGB).save(path)
    request = Pictures().pinned(new_request(image=str(path)))
    assert first_frame(request).size == (48, 32)
    Image.fromarray(RGB[::-1]).save(path)
    with pytest.raises(PictureError, match=r"x.png' was changed after it was checked"):
        first_frame(request)
    path.unlink()
    with pytest.raises(PictureError, match="No such file"):
        first_frame(request)


def test_fits():
    picture = Image.new("RGB", (96, 32), "red")
    picture.paste("blue", (32, 0, 64, 32))
    assert fitted(picture, 32, 32, "stretch") is picture
    assert np.array_equal(np.asarray(fitted(picture, 32, 32, "crop")), np.full((32, 32, 3), (0, 0, 255)))
    padded = np.asarray(fitted(picture, 48, 48, "pad"))
    assert not padded[:16].any()
    assert not padded[32:].any()
    assert padded[16:32].any(axis=2).all()
    same = Image.fromarray(RGB)
    for fit in ("crop", "pad"):
        assert np.array_equal(np.asarray(fitted(same, 48, 32, fit)), RGB)
        for size in ((1, 1), (9000, 1), (1, 9000)):
            assert fitted(Image.new("RGB", size), 832, 480, fit).size == (832, 480)


def test_a_stretch_is_said_where_it_is_seen(new_request):
    def warning(width: int, height: int, **changes) -> str | None:
        picture = PictureFacts(sha256="", width=width, height=height)
        return fit_warning(new_request(width=832, height=480, image="/a/b.png", picture=picture, **changes))

    assert warning(832, 480) is None
    assert warning(1664, 960) is None
    assert warning(840, 480) is None
    assert warning(1280, 720) == (
        "image 'b.png' is 1280x720 and was stretched to 832x480; --image-fit crop or pad (image_fit in a manifest) "
        "keeps its shape"
    )
    assert warning(480, 832) is not None
    assert warning(480, 832, image_fit="crop") is None


def test_the_fingerprint_of_an_ordinary_picture_is_the_one_it_always_had(tmp_path, new_request):
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "plain.bmp")
    request = new_request(image=str(tmp_path / "plain.bmp"))

    def mark(request) -> str:
        return fingerprint(Pictures().pinned(request), "none", "m", {})

    assert mark(request) == "c4b0d62ac9ab"
    with pytest.raises(ValueError, match="before its picture was looked at"):
        fingerprint(request, "none", "m", {})
    Image.fromarray(GREY.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    others = [replace(request, image_fit="crop"), replace(request, image_fit="pad")]
    others.append(replace(request, image=str(tmp_path / "deep.png")))
    assert len({mark(other) for other in (request, *others)}) == 4


@pytest.mark.process
def test_it_needs_no_torch():
    code = "import sys, cineray.pipeline.media.picture; print('torch' in sys.modules)"
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert run.stdout == "False\n"
