"""What a user hands in as a cache policy: a plan, or one short line; files are regular, bounded, and read once."""

import json
import os
from typing import Any, get_type_hints

import pytest

from cineray.caching.spec import POLICIES, options_class
from cineray.pipeline.loading.checkpoint import open_checkpoint

ODD = (
    *("", "0", "-1", "-0", "1", "1.5", "nan", "inf", "-inf", "1e400", "-1e308", "9" * 40, "9" * 5000, "-" + "9" * 40),
    *("1:2", "2:1", "nan:1", "1:inf", "1:2:3", "1_000", "0x10", "1e3", "true", "None", "x" * 10**5, "1:" * 10**4),
    *("\x1b]0;owned\x07", "a\x00b", "\u202e", "a/b", "/dev/zero", "/", "..", "=", "a=b", "[/b]"),
)


def plan_or_line(checkpoint, spec: str) -> Any:
    """The plan, or the message, of which a terminal could be shown every character."""
    try:
        return checkpoint.plan_cache(spec)
    except ValueError as error:
        line = str(error)
        assert line.isprintable()
        assert len(line) < 600
        return line


@pytest.mark.parametrize("model", ["tiny-wan", "tiny-hunyuan"])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_option_of_every_policy_takes_a_value_or_refuses_it_in_one_line(model, policy):
    checkpoint = open_checkpoint(model)
    for option in get_type_hints(options_class(POLICIES[policy])):
        for value in ODD:
            plan = plan_or_line(checkpoint, f"{policy}({option}={value})")
            if not isinstance(plan, str):
                assert plan is not None
                assert not {"nan", "inf"} & set(plan.text.replace("=", ",").replace(":", ",").split(","))
                assert len(plan.text) < 600


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("", "is not of the form"),
        ("x" * 10**6, "unknown policy 'xxx"),
        ("a\nb", r"cache 'a\nb' is not of the form"),
        ("\x1b[31m", r"cache '\x1b[31m' is not of the form"),
        ("dicache(" + "x" * 10**6 + "=1)", "unknown option 'xxx"),
        ("dicache(threshold=1,threshold=2)", "option threshold of dicache is given twice: '1', '2'"),
        ("interval(gamma_clip=2:1)", "gamma_clip must be two numbers, low and high, got (2.0, 1.0)"),
        ("interval(gamma_clip=nan:1)", "gamma_clip must be two numbers"),
        ("taylorseer(order=" + "9" * 40 + ")", "option order of taylorseer: must be at most 1000000, got '999"),
        ("teacache(threshold=1,coefficients=" + ":".join(["1"] * 10**5) + ")", "must have at most 16 numbers"),
        ("magcache(profile=\x1b]0;pwned\x07)", r"magcache profile \x1b]0;pwned\x07 is neither"),
        ("magcache(profile=/dev/zero)", "cannot be read: is not a regular file"),
        ("smoothcache:/dev/zero", "cannot be read: is not a regular file"),
        ("smoothcache:" + "a" * 10**5, "cannot be read: File name too long"),
        ("smoothcache:a[/b]/s.json", "schedule a[/b]/s.json cannot be read: No such file"),
        ("smoothcache:a\0b", "cannot be read: embedded null byte"),
        ("replay:/dev/zero", "cannot be read: is not a regular file"),
        ("replay:\0", "cannot be read: embedded null byte"),
    ],
)
def test_foreign_text_in_a_policy_is_escaped_and_short(spec, said):
    assert said in plan_or_line(open_checkpoint("tiny-wan"), spec)


ROWS = {"attn1": [1, 0, 1]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[" * 10**5, "is not JSON: nested too deeply"),
        ("", "is not JSON"),
        ("\x1b", "is not JSON"),
        ("[]", "must be an object"),
        ({"attn1-" + "9" * 5000: [1]}, "is not in this model"),
        ({"attn1-01": [1]}, "layer 'attn1-01' is not in this model"),
        ({"attn1-\u0663": [1]}, r"layer 'attn1-\u0663' is not in this model"),
        ({"x" * 10**5: [1]}, "is not in this model"),
        ({"attn1": [[1]]}, "row 'attn1' must be a list of 0 and 1"),
        ({"attn1": [float("nan")]}, "must be a list of 0 and 1"),
        ({f"attn1-{n}": [1] * (n + 1) for n in range(16)}, "rows must have one length, got [1, 2,"),
    ],
)
def test_a_hostile_schedule_is_one_line(tmp_path, content, said):
    path = tmp_path / "s.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    assert said in plan_or_line(open_checkpoint("tiny-wan"), f"smoothcache:{path}")


@pytest.mark.parametrize("spec", ["smoothcache:{}", "replay:{}", "magcache(profile={})", "dicache(profile={})"])
def test_special_and_huge_files_are_refused_unread_and_links_are_followed(tmp_path, spec):
    checkpoint = open_checkpoint("tiny-wan")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(2**30)
    for name, said in (
        ("fifo", "is not a regular file"),
        ("folder", "is not a regular file"),
        ("loop", "Too many levels of symbolic links"),
        ("huge", "has more than"),
    ):
        assert said in plan_or_line(checkpoint, spec.format(tmp_path / name))
    (tmp_path / "s.json").write_text(json.dumps(ROWS))
    (tmp_path / "link").symlink_to("s.json")
    plans = [checkpoint.plan_cache(f"smoothcache:{tmp_path / name}") for name in ("s.json", "link")]
    assert plans[0] == plans[1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"threshold": -1}, "threshold: Input should be greater than or equal to 0"),
        ({"max_skips": -1}, "max_skips: Input should be greater than or equal to 0"),
        ({"max_skips": 10**40}, "max_skips: Input should be less than or equal to 1000000"),
        ({"retention": 2}, "retention: Input should be less than or equal to 1"),
        ({"never_skip": [-1]}, "never_skip.0"),
        ({"\x1b[31m" * 10**4: 1}, r"\x1b[31m"),
        ({"family": "\x1b[31m" + "f" * 10**5}, r"is for another model: \x1b[31mfff"),
        ({"transformer": {"num_layers": "x" * 10**6}}, "is for another model: wan with num_layers xxx"),
        ({"source": 7}, "source: Input should be a valid string"),
    ],
)
def test_a_hostile_profile_is_one_line(tmp_path, changes, said):
    profile = {
        "policy": "magcache",
        "family": "wan",
        "transformer": {"num_layers": 16},
        "source": "a test",
        "ratios": {"cond": [1.0, 0.9]},
        "threshold": 0.1,
        "max_skips": 3,
    }
    path = tmp_path / "p.json"
    path.write_text("\ufeff" + json.dumps(profile))
    checkpoint = open_checkpoint("tiny-wan")
    assert checkpoint.plan_cache(f"magcache(profile={path})") is not None
    path.write_text(json.dumps(profile | changes))
    assert said in plan_or_line(checkpoint, f"magcache(profile={path})")
    path.write_text('{"transformer":' * 10**5)
    assert "is not a magcache profile" in plan_or_line(checkpoint, f"magcache(profile={path})")
