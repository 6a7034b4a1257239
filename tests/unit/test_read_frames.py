"""The reader of frames that judges the tiny checkpoints, on clips whose content is known."""

import json
import sys
from collections import Counter
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from check_obedience import Outcome, Pair, contact_sheet, measure, pick_pairs, summary
from tiny.kinds import PROPERTIES, STILLS, drawn_frames
from tiny.reading import Reading, read_frames
from tiny.shapes import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, Caption, all_captions

CAPTIONS = [pair.caption for pair in pick_pairs(24)]


def named(reading: Reading) -> Caption:
    return Caption(**{name: getattr(reading, name) for name in PROPERTIES})


def test_the_captions_below_hold_every_word():
    words = {word for caption in CAPTIONS for word in str(caption).split()}
    assert words >= {*COLOURS, *SHAPES, *DIRECTIONS, *BACKGROUNDS}


@pytest.mark.parametrize("noise_sigma", [0.0, 12.0])
@pytest.mark.parametrize("caption", CAPTIONS, ids=str)
def test_reads_what_was_drawn(caption, noise_sigma):
    assert named(read_frames(drawn_frames(caption, seed=5, noise_sigma=noise_sigma))) == caption


@pytest.mark.parametrize(("shape", "fill_ratio"), [("circle", np.pi / 4), ("square", 1.0), ("triangle", 0.5)])
def test_fill_ratio_is_the_geometric_one(shape, fill_ratio):
    caption = Caption(colour="red", shape=shape, direction="up", background="navy")
    # 0.07: the drawn corners are cut by one pixel of antialiasing, most of all the triangle's
    assert read_frames(drawn_frames(caption, seed=6)).fill_ratio == pytest.approx(fill_ratio, abs=0.07)


def still_of(inside):
    """A red shape on black, 33 px wide: `inside` takes x and y from -1 to 1."""
    at = (np.arange(64) - 31.5) / 16.5
    covered = np.array(inside(at[None, :], at[:, None]) & (np.abs(at[None, :]) <= 1) & (np.abs(at[:, None]) <= 1))
    return np.where(covered[..., None], COLOURS["red"], BACKGROUNDS["black"]).astype(np.uint8)[None]


@pytest.mark.parametrize("bent", [0.0, 0.05, 0.1, 0.16])
def test_a_square_whose_sides_are_bent_inwards_is_a_square_still(bent):
    def inside(x, y):
        return (abs(x) <= 1 - bent * (1 - y**2)) & (abs(y) <= 1 - bent * (1 - x**2))

    reading = read_frames(still_of(inside))
    assert reading.shape == "square"
    assert bent < 0.16 or reading.fill_ratio < (1 + np.pi / 4) / 2  # by which it would have been a circle


def test_a_disk_with_a_dent_is_a_circle_and_a_diamond_is_nothing():
    assert read_frames(still_of(lambda x, y: (x**2 + y**2 <= 1) & (x + y <= 1.2))).shape == "circle"
    assert read_frames(still_of(lambda x, y: abs(x) + abs(y) <= 1)).shape is None


def test_displacement_is_the_speed_times_the_frames():
    caption = Caption(colour="white", shape="square", direction="left", background="black")
    frames = np.full((9, 64, 64, 3), 8, dtype=np.uint8)
    for i, frame in enumerate(frames):
        frame[20:40, 40 - 2 * i : 60 - 2 * i] = 248
    reading = read_frames(frames)
    assert named(reading) == caption
    assert reading.displacement_px == pytest.approx((-16, 0), abs=0.01)
    assert reading.area_px == pytest.approx(400, abs=0.1)


def test_blank_clip_has_a_background_and_nothing_else():
    reading = read_frames(np.full((17, 64, 64, 3), 112, dtype=np.uint8))
    assert reading == Reading(background="gray", background_rgb=(112, 112, 112))


def test_pure_noise_has_nothing():
    assert read_frames(np.random.default_rng(7).integers(0, 256, (17, 64, 64, 3), dtype=np.uint8)) == Reading()


def test_resting_shape_has_no_direction():
    frame = drawn_frames(CAPTIONS[0], seed=8)[:1]
    reading = read_frames(np.repeat(frame, 17, axis=0))
    assert (reading.shape, reading.direction) == (CAPTIONS[0].shape, None)


def test_diagonal_movement_has_no_direction():
    frames = drawn_frames(Caption(colour="red", shape="circle", direction="right", background="black"), seed=9)
    frames = np.stack([np.roll(frame, i, axis=0) for i, frame in enumerate(frames)])
    assert read_frames(frames).direction is None


def test_triangle_with_a_corner_down_is_no_shape():
    frames = drawn_frames(Caption(colour="red", shape="triangle", direction="right", background="black"), seed=10)
    assert read_frames(frames[:, ::-1]).shape is None


def test_shape_that_vanishes_halfway_is_not_read():
    frames = drawn_frames(CAPTIONS[0], seed=11)
    frames[8:] = frames[0, 0, 0]
    assert read_frames(frames).colour is None


def test_wrong_caption_is_a_miss():
    drawn = Caption(colour="red", shape="circle", direction="left", background="gray")
    asked = Caption(colour="blue", shape="circle", direction="right", background="gray")
    outcomes = measure([Pair(caption=asked, seed=12)], [drawn_frames(drawn, seed=12)])
    report = json.loads(json.dumps(summary(outcomes, vae_db=35.0)))
    hits = {name: row["hits"] for name, row in report["properties"].items()}
    assert hits == {"colour": 0, "shape": 1, "direction": 0, "background": 1, "all": 0}
    (miss,) = report["properties"]["colour"]["misses"]
    assert (miss["caption"], miss["seed"], miss["read"]["colour"]) == (str(asked), 12, "red")
    assert miss["wrong"] == ["colour", "direction"]
    assert not report["passed"]


@pytest.mark.parametrize(("psnr_db", "passed"), [(30.0, True), (29.9, False)])
def test_report_fails_below_the_psnr_limit(psnr_db, passed):
    pairs = pick_pairs(2)
    outcomes = measure(pairs, [drawn_frames(p.caption, p.seed) for p in pairs])
    assert summary(outcomes, psnr_db)["passed"] is passed


@pytest.mark.parametrize("num_pairs", [12, 48])
def test_pairs_are_evenly_spread(num_pairs):
    words = {"colour": COLOURS, "shape": SHAPES, "direction": DIRECTIONS, "background": BACKGROUNDS}
    captions = [pair.caption for pair in pick_pairs(num_pairs)]
    for name in words:
        counts = Counter(getattr(c, name) for c in captions)
        assert counts == dict.fromkeys(words[name], num_pairs // len(words[name]))
    for one, other in combinations(words, 2):
        counts = Counter((getattr(c, one), getattr(c, other)) for c in captions)
        sizes = [counts[pair] for pair in product(words[one], words[other])]
        assert max(sizes) - min(sizes) <= 2


def test_pairs_go_through_all_captions_before_one_comes_again():
    pairs = pick_pairs(220)
    assert {p.caption for p in pairs[:216]} == set(all_captions())
    assert len({p.seed for p in pairs}) == 220


def test_contact_sheet_holds_four_frames_of_each_clip():
    clip = drawn_frames(CAPTIONS[0], seed=13)
    outcome = Outcome(pair=Pair(caption=CAPTIONS[0], seed=13), reading=read_frames(clip))
    sheet = np.asarray(contact_sheet([outcome], [clip]))
    for place, index in enumerate((0, 5, 11, 16)):
        shown = sheet[14:142:2, 130 * place : 130 * place + 128 : 2]
        np.testing.assert_array_equal(shown, clip[index])


def test_stills_are_judged_by_all_but_their_direction():
    pairs = pick_pairs(54, STILLS)
    assert len({pair.caption.still for pair in pairs}) == 54
    drawn = [drawn_frames(pair.caption, pair.seed, num_frames=1) for pair in pairs]
    report = summary(measure(pairs, drawn), vae_db=35.0, kind=STILLS)
    assert report["passed"]
    assert list(report["properties"]) == ["colour", "shape", "background", "all"]
    assert report["properties"]["all"]["hits"] == 54
    wrong = summary(measure(pairs, drawn[1:] + drawn[:1]), vae_db=35.0, kind=STILLS)
    assert not wrong["passed"]
    sheet = contact_sheet(measure(pairs, drawn), drawn, STILLS)
    assert sheet.height < 9 * 64 * 3  # six stills in a row
