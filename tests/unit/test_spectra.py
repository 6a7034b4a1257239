"""How far two sounds are apart: the distances against scipy's transform, and `cineray compare` on WAV and FLAC."""

import json

import numpy as np
import pytest

from cineray.jobs.cli.main import main
from cineray.pipeline.media.flac import write_flac
from cineray.pipeline.media.sound import write_wav
from cineray.pipeline.media.spectra import RESOLUTIONS, compare_sounds, snr_db

RATE = 44100


def chord(seconds=0.2, seed=0, channels=2):
    """Tones that fade, [number of samples, channels] int16."""
    hertz = np.random.default_rng(seed).uniform(100, 8000, (channels, 3))
    t = np.arange(round(seconds * RATE)) / RATE
    waves = np.sin(2 * np.pi * hertz[..., None] * t).sum(axis=1) * np.exp(-3 * t)
    return np.round(6000 * waves.T).astype(np.int16)


def noisy(samples, sigma):
    noise = np.random.default_rng(1).normal(0, sigma, samples.shape)
    return np.clip(samples + noise, -32768, 32767).round().astype(np.int16)


def test_distances_are_those_of_scipys_transform():
    """arXiv 1910.11480, equations 4 and 5, with the log in dB; scipy scales by the sum of the window."""
    from scipy.signal import stft

    a, b = noisy(chord(channels=1), 300), chord(channels=1)
    logs, convergences = [], []
    for transform, window, hop in RESOLUTIONS:
        weights = np.zeros(transform)
        begin = (transform - window) // 2
        weights[begin : begin + window] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
        x, y = (
            np.abs(stft(s[:, 0] / 32768, window=weights, nperseg=transform, noverlap=transform - hop, padded=False)[2])
            * weights.sum()
            for s in (a, b)
        )
        x, y = (np.maximum(m, np.sqrt(1e-7)) for m in (x, y))
        logs.append(np.mean(np.abs(20 * np.log10(x / y))))
        convergences.append(np.linalg.norm(x - y) / np.linalg.norm(y))
    found = compare_sounds(a, b)
    assert found.log_stft_db == pytest.approx(np.mean(logs), rel=1e-6)
    assert found.stft_convergence == pytest.approx(np.mean(convergences), rel=1e-6)


def test_half_as_loud_is_six_decibels_and_half_apart():
    loud = (np.random.default_rng(0).integers(-8000, 8000, (20000, 2)) * 2).astype(np.int16)
    found = compare_sounds(loud // 2, loud)
    assert found.log_stft_db == pytest.approx(6.0206, abs=0.001)
    assert found.stft_convergence == pytest.approx(0.5, abs=1e-4)
    assert found.snr == pytest.approx(6.0206, abs=1e-3)


def test_more_noise_is_further_and_equal_is_nothing():
    clean = chord()
    found = [compare_sounds(noisy(clean, sigma), clean) for sigma in (3, 30, 300)]
    for name in ("log_stft_db", "stft_convergence"):
        assert getattr(found[0], name) < getattr(found[1], name) < getattr(found[2], name)
    assert found[0].snr > found[1].snr > found[2].snr
    same = compare_sounds(clean, clean)
    assert (same.log_stft_db, same.stft_convergence, same.snr, same.is_equal) == (0.0, 0.0, float("inf"), True)


@pytest.mark.parametrize("length", [1, 37, 5000])
def test_silence_and_the_shortest_sounds_have_finite_distances(length):
    silence = np.zeros((length, 1), np.int16)
    one = silence.copy()
    one[-1] = 1
    assert compare_sounds(silence, silence).is_equal
    assert np.isfinite([compare_sounds(one, silence).log_stft_db, snr_db(one, silence)]).all()


@pytest.fixture
def compare(capsys):
    def run(*words):
        capsys.readouterr()
        code = main(["compare", *map(str, words), "--json"])
        said = capsys.readouterr()
        return code, json.loads(said.out.splitlines()[-1]) if said.out else None, said.err

    return run


@pytest.mark.process  # ffmpeg writes FLAC
def test_a_wav_and_a_flac_of_the_same_samples_are_equal(tmp_path, compare):
    write_wav(chord(), tmp_path / "a.wav", RATE, {})
    write_flac(chord(), tmp_path / "b.flac", RATE, {})
    code, found, _ = compare(tmp_path / "a.wav", tmp_path / "b.flac")
    assert code == 0
    assert found["clips"] == [{"id": "b", "log_stft_db": 0.0, "stft_convergence": 0.0, "snr": 100.0, "equal": True}]


def test_folders_of_sounds_have_a_mean_and_the_worst_of_each_metric(tmp_path, compare):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    for name, sigma in (("one", 10), ("two", 100)):
        write_wav(chord(), tmp_path / "a" / f"{name}.wav", RATE, {})
        write_wav(noisy(chord(), sigma), tmp_path / "b" / f"{name}.wav", RATE, {})
    code, found, _ = compare(tmp_path / "a", tmp_path / "b")
    assert code == 0
    one, two = found["clips"]
    assert found["worst"] == {name: two[name] for name in ("log_stft_db", "stft_convergence", "snr")}
    assert found["mean"]["snr"] == pytest.approx((one["snr"] + two["snr"]) / 2, abs=1e-3)
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0


def test_what_cannot_be_compared_is_one_line(tmp_path, compare):
    from PIL import Image

    sounds = {"a": chord(), "short": chord(0.1), "mono": chord(channels=1)}
    for name, samples in sounds.items():
        write_wav(samples, tmp_path / f"{name}.wav", RATE, {})
    write_wav(chord(), tmp_path / "slow.wav", 22050, {})
    (tmp_path / "cut.wav").write_bytes((tmp_path / "a.wav").read_bytes()[:1000])
    Image.new("RGB", (16, 16)).save(tmp_path / "p.png")
    for other, reason in {
        "short.wav": "has 8820 samples of 2 channels at 44100 Hz",
        "mono.wav": "has 8820 samples of 1 channel at 44100 Hz",
        "slow.wav": "at 22050 Hz; only sounds of the same length, channels and rate can be compared",
        "cut.wav": "cut.wav: its samples are cut",
        "p.png": "a.wav is a sound, and is compared with sounds alone",
    }.items():
        code, _, err = compare(tmp_path / "a.wav", tmp_path / other)
        assert code == 2
        assert len(err.splitlines()) == 1
        assert reason in err
    code, _, err = compare(tmp_path / "a.wav", tmp_path / "a.wav", "--difference", tmp_path / "d.mp4")
    assert code == 2
    assert "--difference shows frames" in err
