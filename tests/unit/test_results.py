"""Results that lie in a file until they are printed."""

import io
import json

from cineray.jobs.output.results import ClipResult, ResultLog


def test_all_results_come_back_as_one_json_line(new_request):
    log = ResultLog()
    record = {"trace": {"computed_steps": 3, "skipped_steps": 1, "cost": 0.75}, "resumed_at": [2]}
    log.add(ClipResult.of(new_request(id="a"), "done", 1.23456, "a.mp4", record))
    log.add(ClipResult.of(new_request(id="b"), "quarantined", 0.0, error='"gang-0" died'))
    out = io.StringIO()
    log.print_json({"wall_s": 2.0}, out)
    log.add(ClipResult.of(new_request(id="c"), "existing", 0.0, "c.mp4"))
    assert out.getvalue().count("\n") == 1
    printed = json.loads(out.getvalue())
    assert printed["wall_s"] == 2.0
    first, second = printed["clips"]
    assert (first["id"], first["status"], first["computed_steps"], first["cost"]) == ("a", "done", 3, 0.75)
    assert (first["wall_s"], first["resumed_at"], "error" in first) == (1.235, [2], False)
    assert (second["video"], second["steps"], second["error"]) == (None, 0, '"gang-0" died')
    assert [clip["id"] for clip in log] == ["a", "b", "c"]
    assert log.counts == {"done": 1, "quarantined": 1, "existing": 1}


def test_no_clip_is_an_empty_list():
    out = io.StringIO()
    ResultLog().print_json({"wall_s": 0.0}, out)
    assert json.loads(out.getvalue()) == {"clips": [], "wall_s": 0.0}


def test_a_clip_is_told_in_one_form(new_request):
    request = new_request(id="a")
    done = ClipResult.of(request, "done", 1.26, "a.mp4")
    assert done.line() == "a: done in 1.3 s -> a.mp4"
    assert done.line("the cache never skipped") == "a: done in 1.3 s -> a.mp4: the cache never skipped"
    assert ClipResult.of(request, "existing", 0.0, "a.mp4").line() == "a: existing -> a.mp4"
    assert ClipResult.of(request, "failed", 2.0, error="no disk").line("unheard") == "a: failed in 2.0 s: no disk"
