"""Caches that cannot help: clips of so few steps that a cache has nothing to skip are rendered without one."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from cineray.caching.spec import CacheSpec, parse_spec
from cineray.pipeline.request import ClipRequest

# Step-distilled checkpoints and LoRAs take 4 to 8 steps, of which each is needed: their makers, and those of other
# renderers, rule caches out for them (NVIDIA TensorRT-LLM, visual generation, on FastWan: "not applicable"). A warm-up
# of three steps and a computed last one leave at most four to skip.
MAX_IDLE_STEPS = 8
# What `dicache` chooses by itself is worse than as many computed steps alone on clips that are this short: 12 steps on
# tiny-wan had 40.5 dB at 1.24x, 10 uncached ones 45.5 dB; at 20 steps it is 50.5 against 41.7. A threshold that is
# given is one's own choice.
MAX_PRESET_STEPS = 15


def is_idle(request: ClipRequest) -> bool:
    """Whether the clip asks for a cache that cannot help, and does not insist on it.

    A schedule or a trace from a file was made for its number of steps, and stays.
    """
    if request.num_inference_steps > MAX_PRESET_STEPS or request.cache == "none":
        return False
    spec = parse_spec(request.cache)
    if spec.name == "none" or spec.file is not None or spec.is_short:
        return False
    return request.num_inference_steps <= _most_steps(spec)


def _most_steps(spec: CacheSpec) -> int:
    return MAX_PRESET_STEPS if spec.name == "dicache" and "threshold" not in spec.options else MAX_IDLE_STEPS


def without_idle_cache(request: ClipRequest) -> ClipRequest:
    return replace(request, cache="none") if is_idle(request) else request


@dataclass(frozen=True, slots=True)
class WithoutIdleCaches:
    """The clips, those with a cache that cannot help without it; anew each time, where `requests` gives them anew."""

    requests: Iterable[ClipRequest]

    def __iter__(self) -> Iterator[ClipRequest]:
        return map(without_idle_cache, self.requests)


class IdleCaches:
    """Remembers which caches of a batch cannot help, to say so once for each."""

    def __init__(self) -> None:
        self._found: set[tuple[str, int]] = set()

    def add(self, request: ClipRequest) -> None:
        if is_idle(request):
            self._found.add((request.cache, request.num_inference_steps))

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(
            f"--cache {cache} is off for clips of {steps} steps: with {_most_steps(parse_spec(cache))} or fewer "
            "each is needed; "
            f'--cache "{_insisting(cache)}" has it on all the same'
            for cache, steps in sorted(self._found)
        )


def _insisting(cache: str) -> str:
    return f"{cache[:-1]},short=true)" if cache.endswith(")") else f"{cache}(short=true)"
