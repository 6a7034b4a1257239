"""Prompts on disk and clips that wait, against the plain lists that they stand for."""

from hypothesis import given, settings
from hypothesis import strategies as st

from cineray.jobs.gangs import prompts
from cineray.jobs.gangs.prompts import MAX_PROMPTS, EncodedPrompts, WaitingClips

KEYS = st.sampled_from(["p0", "p1", "p2", "p3"])


@settings(max_examples=300)
@given(st.data())
def test_waiting_clips_are_a_list_that_is_searched(data):
    encoded = EncodedPrompts()
    waiting, plain, keys, asked = WaitingClips(encoded), [], {}, set()
    for number in range(data.draw(st.integers(0, 40))):
        what = data.draw(st.sampled_from(["last", "first", "remove", "encode", "lose", "take"]))
        if what in ("last", "first"):
            name = f"c{number}"
            keys[name] = data.draw(KEYS)
            (waiting.append if what == "last" else waiting.append_first)(name, keys[name])
            plain.insert(len(plain) if what == "last" else 0, name)
        elif what == "remove" and plain:
            name = plain.pop(data.draw(st.integers(0, len(plain) - 1)))
            waiting.remove(name)
        elif what == "encode":
            key = data.draw(KEYS)
            asked.discard(key)
            encoded.add(key, ())
            waiting.prompt_added(key)
        elif what == "lose":
            key = data.draw(KEYS)
            asked.discard(key)
            encoded.drop(key)
            waiting.prompt_lost(key)
        elif what == "take":
            taken = [(name, key) for name, key in waiting.take_unencoded() if key not in encoded and key not in asked]
            wanted = [(name, keys[name]) for name in plain if keys[name] not in encoded and keys[name] not in asked]
            assert taken == wanted
            asked |= {key for _, key in taken}
        assert list(waiting) == plain
        assert len(waiting) == len(plain)
        assert waiting.next() == next((name for name in plain if keys[name] in encoded), None)
        key = data.draw(KEYS)
        assert waiting.with_prompt(key) == [name for name in plain if keys[name] == key]


def test_prompts_that_no_clip_needs_are_removed_the_oldest_first(monkeypatch):
    monkeypatch.setattr(prompts, "MAX_PROMPTS", 3)
    encoded = EncodedPrompts()
    for key in "abc":
        encoded.need(key)
        assert encoded.add(key, (f"{key} is long",)) == []
    encoded.need("d")
    assert encoded.add("d", ()) == []  # too many, and every one is needed
    encoded.release("c")
    encoded.release("b")
    assert list(encoded) == ["a", "b", "c", "d"]
    assert encoded.add("a", ("new",)) == ["b"]  # it is the youngest now, and c may stay
    assert list(encoded) == ["c", "d", "a"]
    assert encoded.warnings("a") == ("new",)


def test_a_prompt_stays_while_one_of_two_clips_needs_it(monkeypatch):
    monkeypatch.setattr(prompts, "MAX_PROMPTS", 1)
    encoded = EncodedPrompts()
    encoded.need("a")
    encoded.need("a")
    encoded.add("a", ())
    encoded.release("a")
    encoded.need("b")
    assert encoded.add("b", ()) == []
    encoded.release("a")
    encoded.need("c")
    assert encoded.add("c", ()) == ["a"]


def test_many_prompts_are_kept():
    encoded = EncodedPrompts()
    removed = [key for number in range(MAX_PROMPTS + 2) for key in encoded.add(str(number), ())]
    assert removed == ["0", "1"]
