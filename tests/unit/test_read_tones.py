"""The reader of sounds that judges tiny-audio, on tones whose content is known."""

import sys
from itertools import pairwise
from math import log2, pi
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from check_obedience import Outcome, Pair, describe, measure, pick_pairs, summary
from tiny.kinds import SOUNDS, drawn_sound
from tiny.tones import COURSES, FIFTH, NUM_SAMPLES, PITCHES, PROPERTIES, RATE, TIMBRES, Heard, Tone, read_tone
from tiny_clips import tiny_clip

HOLDING = Tone(pitch="middle", timbre="bright", course="holding")


def sine(hz: np.ndarray | float, level: float = 0.3) -> np.ndarray:
    """[NUM_SAMPLES, 1]; `hz` may be of each sample."""
    angle = 2 * pi * np.cumsum(np.broadcast_to(hz, NUM_SAMPLES)) / RATE
    return level * np.sin(angle)[:, None]


@pytest.mark.parametrize("noise", [0.0, SOUNDS.noise])
def test_reads_every_tone_that_was_drawn(noise):
    for seed, tone in enumerate(SOUNDS.captions):
        heard = read_tone(drawn_sound(tone, seed, noise))
        assert Tone(**{name: getattr(heard, name) for name in PROPERTIES}) == tone


def test_the_sentences_say_every_word_and_differ():
    assert len({str(tone) for tone in SOUNDS.captions}) == 27
    assert {word for tone in SOUNDS.captions for word in str(tone).split()} >= {*PITCHES, *TIMBRES, *COURSES}


def test_measures_a_known_sound():
    heard = read_tone(sine(150 * 2 ** np.linspace(-0.5 * FIFTH, 0.5 * FIFTH, NUM_SAMPLES)))
    assert heard.pitch_hz == pytest.approx(150, rel=0.01)
    assert heard.bend == pytest.approx(FIFTH, abs=0.02)
    assert (heard.pitch, heard.timbre, heard.course) == ("middle", "pure", "rising")
    assert heard.overtones == pytest.approx((0, 0), abs=0.01)


@pytest.mark.parametrize(("level", "is_heard"), [(0.025, True), (0.015, False)])
def test_what_is_quieter_than_a_fiftieth_is_silence_in_both_forms_of_samples(level, is_heard):
    samples = sine(150, level * 2**0.5)
    for form in (samples, (samples * 32768).round().astype(np.int16)):
        assert (read_tone(form).pitch == "middle") is is_heard


def test_silence_has_nothing():
    assert read_tone(np.zeros((NUM_SAMPLES, 1), dtype=np.int16)) == Heard()


def test_noise_is_no_tone():
    noise = np.random.default_rng(4).normal(0, 0.2, (NUM_SAMPLES, 1))
    heard = read_tone(noise)
    assert (heard.pitch, heard.timbre, heard.course) == (None, None, None)


def test_a_pitch_between_all_classes_and_a_course_too_steep_have_no_name():
    assert read_tone(sine(100 / 2**0.8)).pitch is None
    steep = read_tone(sine(150 * 2 ** np.linspace(-FIFTH, FIFTH, NUM_SAMPLES)))
    assert (steep.pitch, steep.course) == ("middle", None)


def test_a_tone_that_jumps_is_not_one_tone():
    heard = read_tone(np.concatenate([sine(100)[: NUM_SAMPLES // 2], sine(225)[: NUM_SAMPLES // 2]]))
    assert (heard.pitch, heard.course) == (None, None)


def test_an_obedience_report_of_sounds_counts_each_property():
    asked = Tone(pitch="low", timbre="bright", course="rising")
    (outcome,) = measure([Pair(caption=asked, seed=1)], [drawn_sound(HOLDING, 1)], SOUNDS)
    report = summary([outcome], vae_db=16.0, kind=SOUNDS)
    hits = {name: row["hits"] for name, row in report["properties"].items()}
    assert hits == {"pitch": 0, "timbre": 1, "course": 0, "all": 0}
    assert not report["passed"]
    (miss,) = report["properties"]["all"]["misses"]
    assert describe(miss["read"], SOUNDS).startswith("middle bright holding (pitch_hz ")
    right = [Outcome(pair=Pair(caption=HOLDING, seed=1), reading=outcome.reading)]
    assert summary(right, vae_db=15.0, kind=SOUNDS)["passed"]
    assert not summary(right, vae_db=14.9, kind=SOUNDS)["passed"]


def test_54_pairs_of_tones_hold_every_word_18_times():
    captions = [pair.caption for pair in pick_pairs(54, SOUNDS)]
    for name, words in zip(PROPERTIES, (PITCHES, TIMBRES, COURSES), strict=True):
        assert {word: [getattr(c, name) for c in captions].count(word) for word in words} == dict.fromkeys(words, 18)


def test_a_manifest_of_sounds_differs_in_every_word_from_row_to_row():
    tones = {str(tone): tone for tone in SOUNDS.captions}
    rows = [tones[tiny_clip(number, SOUNDS)["prompt"]] for number in range(27)]
    assert len({*rows}) == 27
    for one, next_one in pairwise(rows):
        assert all(getattr(one, name) != getattr(next_one, name) for name in PROPERTIES)


def test_drawn_pitches_stay_within_their_class():
    for name, hz in PITCHES.items():
        found = [
            read_tone(drawn_sound(Tone(pitch=name, timbre="pure", course="holding"), seed)).pitch_hz
            for seed in range(12)
        ]
        assert all(abs(log2(f / hz)) < 1 / 12 + 0.02 for f in found if f)
        assert max(f for f in found if f) / min(f for f in found if f) > 1.08  # the caption leaves it open
