"""What an output folder keeps of clips that the manifest asks for no more."""

import json

import pytest
from gang_runs import render, write_manifest

from cineray.jobs.output.results import ClipResult, ResultLog
from cineray.jobs.run import RunReport

pytestmark = pytest.mark.process


def test_a_run_that_has_rendered_all_removes_what_others_left_to_go_on(checkpoint_folder, tmp_path, capsys):
    state = tmp_path / "out" / ".state"
    for kind in ("steps", "failures"):
        (state / kind).mkdir(parents=True)
    steps = state / "steps" / "gone.0123456789ab.safetensors"
    steps.write_bytes(b"x")
    failure = {"id": "gone", "fingerprint": "0123456789ab", "status": "retrying", "reasons": ["gang-0: rank 1 died"]}
    (state / "failures" / "gone.0123456789ab.json").write_text(json.dumps(failure))
    foreign = state / "steps" / "notes.txt"
    foreign.write_text("mine")
    code, _, stderr = render(
        capsys, write_manifest(tmp_path / "m.jsonl", ["a"], 1), tmp_path / "out", checkpoint_folder("wan")
    )
    assert code == 0, stderr
    assert [path for path in state.rglob("*") if path.is_file()] == [foreign]
    foreign.unlink()
    code, *_ = render(
        capsys, write_manifest(tmp_path / "m.jsonl", ["a"], 1), tmp_path / "out", checkpoint_folder("wan")
    )
    assert code == 0
    assert not state.exists()


@pytest.mark.parametrize(
    ("status", "more", "is_complete"),
    [
        ("done", {}, True),
        ("existing", {}, True),
        ("failed", {}, False),
        ("quarantined", {}, False),
        ("done", {"stopped_by": 15}, False),
        ("done", {"abort_reason": "every gang was lost"}, False),
    ],
)
def test_only_then(new_request, status, more, is_complete):
    results = ResultLog()
    results.add(ClipResult.of(new_request(), status, 1.0))
    assert RunReport(results=results, wall_s=1.0, **more).is_complete == is_complete
