"""Encoded prompts on disk and the clips that wait for a gang, ordered so that nobody looks at all of them.

A run has thousands of gangs and some thousand clips ahead of them; every event asks which clip is next.
"""

import heapq
from collections import Counter
from collections.abc import Container, Iterator

MAX_PROMPTS = 256  # encoded prompts kept on disk, 4 MB each for the largest text encoders


class EncodedPrompts:
    """The prompts that are encoded on disk, and how many clips of the run need each."""

    def __init__(self) -> None:
        self._encoded: dict[str, tuple[int, tuple[str, ...]]] = {}  # when, as a count, and the warnings
        self._num_encoded = 0
        self._num_needed: Counter[str] = Counter()
        self._unneeded: set[str] = set()

    def __contains__(self, key: object) -> bool:
        return key in self._encoded

    def __iter__(self) -> Iterator[str]:
        return iter(self._encoded)

    def warnings(self, key: str) -> tuple[str, ...]:
        """What of a prompt was not read."""
        return self._encoded[key][1]

    def need(self, key: str) -> None:
        """One more clip needs it."""
        self._num_needed[key] += 1
        self._unneeded.discard(key)

    def release(self, key: str) -> None:
        """One of the clips that needed it has ended."""
        self._num_needed[key] -= 1
        if not self._num_needed[key]:
            del self._num_needed[key]
            if key in self._encoded:
                self._unneeded.add(key)

    def add(self, key: str, warnings: tuple[str, ...]) -> list[str]:
        """It was encoded; keys of those to remove from the disk for it, the oldest first."""
        self.drop(key)
        self._num_encoded += 1
        self._encoded[key] = self._num_encoded, warnings
        if not self._num_needed[key]:
            self._unneeded.add(key)
        num_too_many = max(0, len(self._encoded) - MAX_PROMPTS)
        removed = heapq.nsmallest(num_too_many, self._unneeded, key=lambda old: self._encoded[old][0])
        for old in removed:
            self.drop(old)
        return removed

    def drop(self, key: str) -> None:
        """It cannot be read, or is removed."""
        self._encoded.pop(key, None)
        self._unneeded.discard(key)


class WaitingClips:
    """Names of clips that wait for a gang, in the order in which they go on.

    Args:
        encoded: keys of the prompts that are encoded.

    Attributes:
        unencoded: those whose prompt nobody was asked to encode yet; some of them may have gone on or have company.
    """

    def __init__(self, encoded: Container[str]) -> None:
        self._encoded = encoded
        self._waiting: dict[str, tuple[int, str]] = {}  # name -> place, prompt key
        self._names: dict[str, set[str]] = {}  # by prompt key
        self._ready: list[tuple[int, str]] = []  # a heap of those whose prompt is encoded, and of some who are gone
        self.unencoded: set[str] = set()
        self._first, self._last = 0, -1

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._waiting, key=self._place))

    def append(self, name: str, key: str) -> None:
        """The clip goes on after all others."""
        self._last += 1
        self._add(name, key, self._last)

    def append_first(self, name: str, key: str) -> None:
        """The clip goes on before all others."""
        self._first -= 1
        self._add(name, key, self._first)

    def remove(self, name: str) -> None:
        _, key = self._waiting.pop(name)
        self._names[key].remove(name)
        if not self._names[key]:
            del self._names[key]

    def next(self) -> str | None:
        """The first one whose prompt is encoded."""
        while self._ready:
            place, name = self._ready[0]
            if self._waiting.get(name, (None, ""))[0] == place and self._waiting[name][1] in self._encoded:
                return name
            heapq.heappop(self._ready)
        return None

    def with_prompt(self, key: str) -> list[str]:
        """Those that wait with this prompt."""
        return sorted(self._names.get(key, ()), key=self._place)

    def prompt_added(self, key: str) -> None:
        """A prompt has been encoded."""
        for name in self._names.get(key, ()):
            heapq.heappush(self._ready, (self._place(name), name))

    def prompt_lost(self, key: str) -> None:
        """A prompt is not encoded after all, and nobody is encoding it."""
        self.unencoded.update(self._names.get(key, ()))

    def take_unencoded(self) -> list[tuple[str, str]]:
        """(name, prompt key) of `unencoded`, which are then taken care of."""
        names = sorted((name for name in self.unencoded if name in self._waiting), key=self._place)
        self.unencoded.clear()
        return [(name, self._waiting[name][1]) for name in names]

    def _add(self, name: str, key: str, place: int) -> None:
        self._waiting[name] = place, key
        self._names.setdefault(key, set()).add(name)
        if key in self._encoded:
            heapq.heappush(self._ready, (place, name))
        else:
            self.unencoded.add(name)

    def _place(self, name: str) -> int:
        return self._waiting[name][0]
