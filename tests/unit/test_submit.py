"""What `cineray submit` would send: the command line and the files, with no cluster."""

import json
import shlex

import pytest

from cineray.jobs.cli.main import main
from cineray.jobs.gangs.submit import Submission, environment, write_manifest


@pytest.fixture
def submission(tmp_path):
    """Factory with keyword defaults."""

    def new(**changes) -> Submission:
        values = {
            "address": None,
            "render": ("--out", "/nfs/x"),
            "prompts": ("a red circle",),
            "manifest": None,
            "negative_prompt": None,
            "files": {},
            "out": tmp_path,
            "model": "tiny-wan",
            "from_source": False,
            "no_wait": False,
        }
        return Submission(**(values | changes))

    return new


def test_the_command_has_the_options_and_no_prompt(capsys):
    evil = 'a "cat" $(touch /tmp/x); `y`'
    code = main(
        [
            *("submit", "--cluster", "http://h:8265", "--from-source", "--dry-run", evil, "--sp", "2"),
            *("--out", "/nfs/x y", "--cfg-parallel", "--cache", "dicache(threshold=0.1)"),
            *("--negative-prompt", "$HOME", "--image-fit", "pad"),
        ]
    )
    assert code == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert "touch" not in line
    assert "$HOME" not in line
    words = shlex.split(line)
    sent = words[words.index("--") + 1 :]
    assert sent[:8] == ["python", "-m", "cineray", "render", "--manifest", "manifest.jsonl", "--address", "auto"]
    assert sent[8:] == [
        *("--sp", "2", "--out", "/nfs/x y", "--cfg-parallel", "--cache", "dicache(threshold=0.1)"),
        *("--image-fit", "pad"),
    ]
    env = json.loads(words[words.index("--runtime-env-json") + 1])
    assert env["py_modules"][0].endswith("/cineray")
    assert int(env["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) > 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a", "--out", "here"], "--out must be an absolute path on storage that every node sees, got here"),
        (["a", "--out", "/x", "--spp", "2"], "No such option '--spp'"),
        (["a"], "Missing option '--out'"),
        (["--out", "/x"], "give prompts or --manifest"),
        (["--out", "/x", "--manifest", "/none.jsonl"], "manifest /none.jsonl is not a file"),
        (["a", "--out", "/x", "--image", "b.png"], "--image must be an absolute path"),
    ],
)
def test_bad_input_is_refused_here_and_not_on_the_cluster(capsys, arguments, said):
    assert main(["submit", "--dry-run", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_the_clips_travel_as_a_manifest(submission, tmp_path):
    write_manifest(submission(prompts=("a", 'b "c"'), negative_prompt="gray"), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert rows == [{"prompt": "a", "negative_prompt": "gray"}, {"prompt": 'b "c"', "negative_prompt": "gray"}]


def test_an_image_that_would_stay_behind_is_an_error(submission, tmp_path):
    manifest = tmp_path / "m.jsonl"
    manifest.write_text('{"prompt": "a"}\n{"prompt": "b", "image": "first.png"}\n')
    with pytest.raises(ValueError, match="line 2: image must be an absolute path"):
        write_manifest(submission(prompts=(), manifest=manifest), tmp_path)


def test_a_client_with_a_token_says_so(tmp_path):
    assert environment({}, tmp_path) == {}
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("t")
    assert environment({}, tmp_path) == {"RAY_AUTH_MODE": "token"}
    assert environment({"RAY_AUTH_MODE": "disabled"}, tmp_path) == {}


def test_a_table_travels_as_json_lines_and_its_clips_keep_their_ids(submission, tmp_path):
    manifest = tmp_path / "m.csv"
    manifest.write_text("prompt,seed,id,image\n\na,3.0,,\nb,,x,/nfs/b.png\n", encoding="utf-16")
    write_manifest(submission(prompts=(), manifest=manifest), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert rows == [
        {"prompt": "a", "seed": 3, "id": "3"},
        {"prompt": "b", "id": "x", "image": "/nfs/b.png"},
    ]


def test_rows_that_cannot_be_read_are_refused_here(submission, tmp_path):
    manifest = tmp_path / "m.jsonl"
    manifest.write_text('{"prompt": "a"}\n{"promt": "b"}\n')
    with pytest.raises(ValueError, match="line 2: prompt is required; unknown field 'promt'"):
        write_manifest(submission(prompts=(), manifest=manifest), tmp_path)
    assert not (tmp_path / "manifest.jsonl").exists()
