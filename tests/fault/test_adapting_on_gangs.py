"""`render --audit-adapt` on two gangs: a wave after the first clip's audit, and one process finds all clips there."""

import json
from collections import Counter

import pytest
import ray
from gang_runs import events

from cineray.caching.profile import QualityPoint, QualityProfile
from cineray.jobs.adapt_record import NAME
from cineray.jobs.audit import FOLDER
from cineray.jobs.cli.main import main
from cineray.jobs.report.event_log import read_events
from cineray.jobs.report.timeline import sessions_of

pytestmark = [pytest.mark.ray, pytest.mark.exhaustive]

NUM_CLIPS = 4


@pytest.fixture(scope="module", autouse=True)
def _cluster():
    """A Ray with room for two gangs of a rank and a finisher."""
    ray.init(address="local", num_cpus=3, include_dashboard=False, object_store_memory=80 * 2**20)
    yield
    ray.shutdown()


def test_gangs_render_in_waves_and_one_process_finds_all_there(checkpoint_folder, tmp_path, capsys):
    means = {1.5: 90.0, 2.0: 85.0, 3.0: 80.0}  # the random model keeps 43 dB
    points = tuple(QualityPoint(speedup=speedup, psnr_db=(m - 1, m, m + 1)) for speedup, m in means.items())
    profile = QualityProfile(family="any", transformer={}, source="", fitted="generic", points=points)
    (tmp_path / "quality.json").write_text(profile.model_dump_json())
    manifest, out = tmp_path / "m.jsonl", tmp_path / "out"
    rows = [{"id": f"c{seed}", "prompt": "a red circle", "seed": seed} for seed in range(NUM_CLIPS)]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = ["--width", "32", "--height", "32", "--frames", "5", "--steps", "16", "--fps", "8", "--lossless"]
    cache = ["--cache", f"auto(psnr>=60,profile={tmp_path / 'quality.json'})", "--audit", "0.5", "--audit-adapt"]
    model = ["--model", str(checkpoint_folder("wan"))]
    command = ["render", "--manifest", str(manifest), "--out", str(out), *model, *small, *cache, "--json"]
    assert main([*command, "--gangs", "2"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [clip["status"] for clip in summary["clips"]] == ["done"] * NUM_CLIPS
    assert 0 < summary["gangs_busy"] <= 1
    # of 0 and 2, the first alone; gangs are built anew for each wave and its audits, which takes a while
    waves = json.loads((out / FOLDER / NAME).read_text())["waves"]
    assert [wave["begin"] for wave in waves] == [0, 1]
    assert [list(wave["settings"].values()) for wave in waves] == [[3.0], [1.5]]
    assert Counter(event["event"] for event in events(out))["wave"] == 1
    (session,) = sessions_of(read_events(out / "events.jsonl").events, {}, None)
    assert len(session.done) == NUM_CLIPS
    assert main(command) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {clip["status"] for clip in again["clips"]} == {"existing"}
    assert again["audit"] == summary["audit"]
