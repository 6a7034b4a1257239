"""`render --audit-adapt`: waves, what lies on disk, and what a repeated or broken-off batch does."""

import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cineray.caching.profile import QualityPoint, QualityProfile
from cineray.jobs.adapt_record import NAME, AdaptRecord
from cineray.jobs.adapting import KNOWN_PER_NEW, Adaptable
from cineray.jobs.audit import FOLDER
from cineray.jobs.cli.main import main

NUM_CLIPS, SHARE = 7, 0.4  # of which 0, 3 and 5 are audited
IDS = [f"clip{number}" for number in range(NUM_CLIPS)]


def _more(*values):
    """A case for `scripts/test --all`."""
    return pytest.param(*values, marks=pytest.mark.exhaustive)


FLOOR = 60  # the random model keeps 43 dB at each speed


def write_quality(path, *means):
    """A quality profile of any model that promises so many dB at 1.5x, 2x and 3x."""
    points = [
        QualityPoint(speedup=speedup, psnr_db=(mean - 1, mean, mean + 1))
        for speedup, mean in zip((1.5, 2.0, 3.0), means, strict=True)
    ]
    profile = QualityProfile(family="any", transformer={}, source="", fitted="generic", points=tuple(points))
    path.write_text(profile.model_dump_json())
    return path


def words(folder, model, cache, *more, share=SHARE):
    """The command of a render of small clips with a floor into OUT."""
    manifest = folder / "clips.jsonl"
    rows = [{"id": name, "prompt": "a red circle", "seed": seed} for seed, name in enumerate(IDS)]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = ["--width", "32", "--height", "32", "--frames", "5", "--steps", "16", "--fps", "8", "--lossless"]
    asked = ["--cache", cache, "--audit", str(share), "--audit-adapt"]
    out = ["--manifest", str(manifest), "--out", str(folder / "out"), "--model", str(model)]
    return ["render", *out, *small, *asked, *more]


@pytest.fixture(scope="module")
def finished(checkpoint_folder, tmp_path_factory):
    """(folder, words) of a batch whose profile promises far too much, rendered to its end."""
    folder = tmp_path_factory.mktemp("adapted")
    quality = write_quality(folder / "quality.json", 90, 85, 80)
    command = words(folder, checkpoint_folder("wan"), f"auto(psnr>={FLOOR},profile={quality})")
    assert main(command) == 0
    return folder, command


@pytest.fixture
def copied(finished, tmp_path):
    """(output folder, words) of a copy of that batch."""
    folder, command = finished
    shutil.copytree(folder / "out", tmp_path / "out")
    return tmp_path / "out", [str(tmp_path / "out") if word == str(folder / "out") else word for word in command]


def policies(out):
    """The cache of each clip without its profile, as its sidecar has it."""
    sidecars = (json.loads(path.read_text()) for path in out.glob("*.json") if path.name.count(".") == 2)
    return {record["id"]: record["cache"].split(",")[0] for record in sidecars}


def files(out):
    return {path.relative_to(out): path.stat().st_mtime_ns for path in out.rglob("*.mp4")}


def names(out):
    return {str(path) for path in files(out)}


@pytest.mark.slow
@pytest.mark.process
def test_clips_to_come_get_slower_settings_each_in_its_sidecar_and_its_name(finished, tmp_path):
    folder, command = finished
    out = folder / "out"
    at_once, slower, uncached = "fitted(speedup=3.0", "fitted(speedup=1.5", "none"
    expected = [at_once, slower, slower, slower, uncached, uncached, uncached]
    assert policies(out) == dict(zip(IDS, expected, strict=True))
    assert {path.name.split(".")[0] for path in (out / FOLDER).glob("*.mp4")} == {"clip0", "clip3"}
    # each is the clip that a setting of its own gives: the same name, so the same fingerprint
    other = [word for word in command if word != "--audit-adapt"]
    other[other.index("--cache") + 1] = "fitted(speedup=1.5,profile=generic)"
    other[other.index("--out") + 1] = str(tmp_path / "other")
    del other[other.index("--audit") : other.index("--audit") + 2]
    assert main(other) == 0
    assert names(tmp_path / "other") & names(out) == {name for name in names(out) if name[:5] in IDS[1:4]}


@pytest.mark.slow
@pytest.mark.process
def test_run_json_and_report_read_as_one_batch(finished, tmp_path):
    from contextlib import nullcontext

    from cineray.jobs.report.batch import batch_page

    out = finished[0] / "out"
    run = json.loads((out / "run.json").read_text())
    assert (run["num_clips"], run["counts"]) == (NUM_CLIPS, {"done": NUM_CLIPS})
    audit = run["audit"]
    assert [setting["speedup"] for setting in audit["settings"]] == [3.0, 1.5, 1.0]
    assert [setting["from"] for setting in audit["settings"]] == [0, 1, 4]
    assert (audit["num_clips"], audit["with_floors"], audit["below_floors"]) == (2, 2, ["clip0", "clip3"])
    assert audit["vmaf_worst"] < audit["vmaf_mean"] < 100
    page = batch_page(out, tmp_path / "page.html", lambda *_: nullcontext(lambda *_: None)).html
    assert "PSNR of 2 audited clips" in page
    assert "VMAF of 2 audited clips" in page
    assert "0 of 2" in page
    assert "1.5x from clip 2 on" in page
    assert "uncached from clip 5 on" in page


@pytest.mark.slow
@pytest.mark.process
def test_a_repeated_batch_renders_nothing(copied, capsys):
    out, command = copied
    before, audit = files(out), json.loads((out / "run.json").read_text())["audit"]
    record = (out / FOLDER / NAME).read_bytes()
    assert main([*command, "--dry-run", "--json"]) == 0
    counts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (counts["done"], counts["new"], counts["changed"]) == (NUM_CLIPS, 0, 0)
    shutil.rmtree(out / FOLDER / ".state", ignore_errors=True)
    for path in (out / FOLDER).glob("*.mp4"):  # what was compared need not be kept
        path.unlink()
    assert main([*command, "--json"]) == 0
    captured = capsys.readouterr()
    summary = json.loads(captured.out.splitlines()[-1])
    assert {clip["status"] for clip in summary["clips"]} == {"existing"}
    assert summary["audit"] == audit
    assert "the clips to come" not in captured.err
    assert files(out) == {name: time for name, time in before.items() if FOLDER not in name.parts}
    assert (out / FOLDER / NAME).read_bytes() == record


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize(
    ("num_waves", "num_scored", "num_videos"), [(1, 0, 0), _more(1, 1, 1), (2, 1, 2), _more(3, 2, 5)]
)
def test_a_batch_that_was_broken_off_gets_the_same_settings(copied, num_waves, num_scored, num_videos):
    out, command = copied
    expected, path = names(out), out / FOLDER / NAME
    record = json.loads(path.read_text())
    path.write_text(
        json.dumps(record | {"waves": record["waves"][:num_waves], "scored": record["scored"][:num_scored]})
    )
    for clip in IDS[num_videos:]:
        for file in out.rglob(f"{clip}.*"):
            file.unlink()
    assert main(command) == 0
    assert names(out) == expected
    assert json.loads(path.read_text()) == record


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.exhaustive  # tests/unit/test_adapting.py has the rule without rendering
def test_clips_that_keep_more_than_was_promised_get_faster_step_by_step(checkpoint_folder, tmp_path, capsys):
    quality = write_quality(tmp_path / "quality.json", 38, 36, 31)
    cache = f"auto(psnr>=34,profile={quality})"
    assert main(words(tmp_path, checkpoint_folder("wan"), cache, share=1)) == 0
    expected = [1.5] * 3 + [2.0] * 3 + [3.0]
    assert policies(tmp_path / "out") == {
        name: f"fitted(speedup={speedup}" for name, speedup in zip(IDS, expected, strict=True)
    }
    assert "the clips to come are rendered at 2x after 1.5x (0 of 3 audited clips fell below" in capsys.readouterr().err


@pytest.mark.process
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "is not a record of settings"),
        ('{"version": 1', "is not a record of settings"),
        ('{"version": 2, "share": 0.4, "profiles": {}}', "is not a record of settings: version"),
        ('{"share": 0.4, "profiles": {}, "waves": [{"begin": 3, "settings": {}}]}', "waves must be in order"),
        ('{"share": 0.5, "profiles": {}}', "by --audit 0.5, got 0.4"),
        ('{"share": 0.4, "profiles": {"a": "b"}}', "is of other floors or quality profiles"),
    ],
)
def test_what_is_no_record_of_this_batch_is_refused(checkpoint_folder, tmp_path, capsys, content, message):
    quality = write_quality(tmp_path / "quality.json", 90, 85, 80)
    (tmp_path / "out" / FOLDER).mkdir(parents=True)
    (tmp_path / "out" / FOLDER / NAME).write_text(content)
    assert main(words(tmp_path, checkpoint_folder("wan"), f"auto(psnr>={FLOOR},profile={quality})")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert NAME in line
    assert (tmp_path / "out" / FOLDER / NAME).read_text() == content


@pytest.mark.slow
@pytest.mark.process
def test_a_recorded_setting_that_the_profile_has_not_is_refused(copied, capsys):
    out, command = copied
    path = out / FOLDER / NAME
    path.write_text(path.read_text().replace(": 1.5", ": 1.6"))
    assert main(command) == 2
    assert "has a setting that the quality profile has not: 1.6" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cache", "more", "message"),
    [
        ("fitted(speedup=2)", [], "none has one; give --cache"),
        ("none", [], "none has one; give --cache"),
        ("auto(psnr>=99,profile={})", [], "cannot be kept: the slowest setting that was measured keeps 86.6 dB"),
        ("auto(psnr>=60,profile={})", ["--layout", "auto"], "which --layout auto knows nothing of"),
        ("auto(psnr>=60,profile={})", ["--elastic-tail"], "which --elastic-tail knows nothing of"),
    ],
)
def test_what_cannot_be_adapted_is_refused_before_loading(checkpoint_folder, tmp_path, capsys, cache, more, message):
    quality = write_quality(tmp_path / "quality.json", 90, 85, 80)
    assert main(words(tmp_path, checkpoint_folder("wan"), cache.format(quality), *more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_an_audit_there_is_nothing_to_go_by(capsys, tmp_path):
    assert (
        main(["render", "a red circle", "--cache", "auto(psnr>=40)", "--audit-adapt", "--out", str(tmp_path / "o")])
        == 2
    )
    assert "--audit-adapt goes by audited clips: give their share too" in capsys.readouterr().err


@given(
    places=st.lists(st.integers(0, 2000), unique=True, max_size=300).map(sorted),
    num_gangs=st.integers(1, 9),
    more=st.integers(1, 50),
)
def test_waves_follow_each_other_to_the_end(places, num_gangs, more):
    num_clips = (places[-1] if places else 0) + more
    batch = Adaptable(num_clips=num_clips, share=0.5, places=tuple(places), plans={})
    ends, begin = [], 0
    while begin < num_clips:
        ends.append(batch.end_of(begin, num_gangs))
        assert begin < ends[-1] <= num_clips
        begin = ends[-1]
    assert ends[-1] == num_clips
    if places:
        assert ends[0] == places[0] + 1  # all others learn from the first
        assert len(ends) <= 2 + len(places) / num_gangs
    if len(places) > 6 * KNOWN_PER_NEW:
        assert len(ends) < len(places) * 0.7 + 2


def test_a_record_survives_the_way_to_the_disk():
    record = AdaptRecord.model_validate(
        {"share": 0.1, "profiles": {"a": "d"}, "waves": [{"begin": 0, "settings": {"a": 2.25}}], "scored": []}
    )
    assert AdaptRecord.model_validate_json(record.model_dump_json()) == record
