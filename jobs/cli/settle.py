"""What `--layout auto` and `--elastic-tail` settle before a run begins: by the plan for its own clips."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cineray.distributed.layout import Layout, check_layout
from cineray.jobs.console.terminal import tell
from cineray.jobs.manifest.order import longest_first
from cineray.jobs.run_options import RunOptions, decodes_on_gang
from cineray.pipeline.request import ClipRequest, InputError

if TYPE_CHECKING:
    from cineray.jobs.planning.choice import Choice, Larger, Seconds
    from cineray.jobs.planning.evidence import ClipKind
    from cineray.jobs.planning.machines import Machines
    from cineray.jobs.run import RunPlan
    from cineray.pipeline.loading.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True, slots=True)
class Settled:
    """A run whose layout is known.

    Args:
        requests: in the order in which they are handed out.
        larger: gangs that may stand in the place of several at the end.
        choice: of `--layout auto`, where a plan had numbers for it.
        about: goes into run.json.
    """

    options: RunOptions
    requests: Iterable[ClipRequest]
    larger: "tuple[Larger, ...]" = ()
    choice: "Choice | None" = None
    about: Mapping[str, Any] = field(default_factory=dict)


def settle(plan: "RunPlan", requests: Iterable[ClipRequest], studies: Sequence[Path]) -> Settled:
    """Chooses the layout of `--layout auto` and the larger gangs of `--elastic-tail`; says in a line what and why.

    Args:
        requests: the run's clips, which have been checked; gives them anew each time that it is iterated.
        studies: files of `cineray study`.

    Raises:
        InputError: no cluster, a study file of another model, or no layout whose memory is enough.
    """
    from cineray.jobs.survey import committed

    options, checkpoint = plan.options, plan.checkpoint
    kind_of, is_done = _kinds_of(checkpoint), committed(plan.out, checkpoint, plan.load_options, plan.lossless)
    num_tokens: dict[ClipKind, int] = {}
    kinds: Counter[ClipKind] = Counter()
    for request in requests:
        if not is_done(request):
            kind = kind_of(request)
            kinds[kind] += 1
            if kind not in num_tokens:
                num_tokens[kind] = checkpoint.num_shared_tokens(request)
    settled = Settled(options=options, requests=requests)
    if not kinds:
        return replace(settled, options=_on(options, Layout())) if options.picks_layout else settled
    machines = _machines(options, plan.load_options.device)
    seconds = _seconds(plan, machines, studies)
    layouts = _layouts(plan, machines, kinds, seconds, min(num_tokens.values()))
    if options.picks_layout:
        choice, layout, why = _chosen(plan, machines, kinds, seconds, layouts)
        num_clips = sum(kinds.values())
        tell(f"--layout auto: {num_clips} {'clip' if num_clips == 1 else 'clips'} on {machines.text}: {why}")
        settled = Settled(
            options=_on(options, layout),
            requests=_in_order(requests, kind_of, kinds, choice) if layout.gangs > 1 else requests,
            choice=choice,
            about={"layout_chosen": {"layout": layout.text, "why": why, "num_clips": num_clips}},
        )
    if not options.elastic_tail:
        return settled
    return replace(settled, larger=_larger(settled.options, machines, kinds, seconds, layouts))


def _chosen(
    plan: "RunPlan",
    machines: "Machines",
    kinds: "Mapping[ClipKind, int]",
    seconds: "Seconds",
    layouts: list[Layout],
) -> "tuple[Choice | None, Layout, str]":
    """(the choice, if there are numbers for one; the layout; why)."""
    from cineray.jobs.planning.choice import choose

    is_cuda = plan.load_options.device == "cuda"
    try:
        choice = choose(machines, kinds, layouts, seconds, lambda layout: _decode(plan, layout))
    except InputError as error:
        num_gangs = min(machines.num_places, sum(kinds.values())) if is_cuda else 1
        layout = Layout(gangs=max(1, num_gangs))
        return None, layout, f"{layout.gangs} x 1 rank, as the plan has no numbers: {error.lines[0]}"
    return choice, choice.layout, choice.text


def _in_order(
    requests: Iterable[ClipRequest],
    kind_of: "Callable[[ClipRequest], ClipKind]",
    kinds: "Iterable[ClipKind]",
    choice: "Choice | None",
) -> Iterable[ClipRequest]:
    """The longest first: by the plan's seconds, else by what there is to compute. What is done already goes last."""
    lengths = {kind: float(_size(kind)) for kind in kinds} if choice is None else choice.clip_s
    return longest_first(requests, lambda request: lengths.get(kind_of(request), 0.0), [*lengths.values(), 0.0])


def _larger(
    options: RunOptions,
    machines: "Machines",
    kinds: "Mapping[ClipKind, int]",
    seconds: "Seconds",
    layouts: list[Layout],
) -> "tuple[Larger, ...]":
    from cineray.jobs.planning.choice import larger_gangs

    base = replace(options.layout, gangs=1)
    if options.num_gangs == 1:
        tell("--elastic-tail: there is one gang, which has nobody's room to take")
        return ()
    why = f"no larger gang than {base.text} is known to be faster on {machines.text}"
    try:
        known = larger_gangs(base, machines, kinds, layouts, seconds)
        larger = tuple(gang for gang in known if gang.num_gangs <= options.num_gangs)
    except InputError as error:
        larger, why = (), error.lines[0]
    if larger:
        said = ", ".join(f"{gang.layout.text} {gang.speedup:.2f} times as fast" for gang in larger)
        tell(f"--elastic-tail: gangs may grow at the end, by the plan: {said}")
    else:
        tell(f"--elastic-tail: gangs stay as they are: {why}")
    return larger


def _on(options: RunOptions, layout: Layout) -> RunOptions:
    return replace(options.on(layout), num_gangs=layout.gangs)


def _machines(options: RunOptions, device: str) -> "Machines":
    from cineray.jobs.planning.machines import machines_here

    if options.is_local:
        return machines_here(device)
    from cineray.jobs.gangs.cluster import machines_at

    assert options.address is not None
    return machines_at(options.address, device)


def _decode(plan: "RunPlan", layout: Layout) -> str:
    """How clips of gangs of this layout are decoded, as a plan calls it."""
    if decodes_on_gang(plan.options.on(layout), plan.load_options, plan.checkpoint.model):
        return "gang"
    return "tiled" if plan.load_options.vae_tiling else "finisher"


def _seconds(plan: "RunPlan", machines: "Machines", studies: Sequence[Path]) -> "Seconds":
    """The plan's own evidence where it knows model and card, else study files alone."""
    from cineray.jobs.planning.anchors import published
    from cineray.jobs.planning.choice import StudySeconds
    from cineray.jobs.planning.evidence import Evidence, num_branches_of
    from cineray.jobs.planning.exchange import WorkOf
    from cineray.jobs.planning.gpus import gpu_name, known_gpus
    from cineray.jobs.planning.sidecars import read_sidecars
    from cineray.jobs.planning.study_file import read_study
    from cineray.pipeline.footprint.forecast import forecast
    from cineray.pipeline.footprint.laws import forecast_names

    name = plan.checkpoint.name
    known = [read_study(path, name) for path in studies]
    card = gpu_name(machines.card) if plan.load_options.device == "cuda" else "cpu"
    if card not in known_gpus() or name not in forecast_names():
        return StudySeconds(known, card)
    try:
        past = read_sidecars(plan.out, num_branches_of(name))
    except InputError:
        past = ()  # a new folder, or one without such clips
    return Evidence(known_gpus()[card], WorkOf(forecast), published().tables, known, past)


def _layouts(
    plan: "RunPlan", machines: "Machines", kinds: "Mapping[ClipKind, int]", seconds: "Seconds", num_tokens: int
) -> list[Layout]:
    """Those of one gang that all clips can be shared by, and that fit into memory as far as it is known.

    Raises:
        InputError: the memory of none is enough.
    """
    from cineray.jobs.planning.choice import StudySeconds, all_layouts
    from cineray.jobs.planning.evidence import Evidence

    num_heads = plan.checkpoint.num_heads
    num_branches = min(kind.num_branches for kind in kinds)
    if isinstance(seconds, StudySeconds):
        try:
            timed = sorted(seconds.layouts(kinds), key=lambda layout: layout.ranks_per_gang)
        except InputError:
            return [Layout()]
        return [layout for layout in timed if _fits(layout, num_heads, num_branches, num_tokens)]
    assert isinstance(seconds, Evidence)
    gpu = seconds.gpu
    layouts = all_layouts(machines, num_heads, num_branches, num_tokens)
    needs = {
        layout: max(seconds.work_of(kind.shape, layout, kind.cache, _decode(plan, layout))[0].total for kind in kinds)
        for layout in layouts
    }
    fitting = [layout for layout, need in needs.items() if need <= gpu.memory_bytes]
    if not fitting and plan.options.picks_layout:
        raise InputError(
            f"--layout auto: no layout fits by the forecast: the smallest needs {min(needs.values()) / 1e9:.1f} GB on "
            f"the fullest card, {gpu.title} has {gpu.memory_bytes / 1e9:.1f} GB; use --vae-tiling or a --layout"
        )
    return fitting


def _fits(layout: Layout, num_heads: int, num_branches: int, num_tokens: int) -> bool:
    try:
        check_layout(layout, num_heads, num_branches)
    except ValueError:
        return False
    return layout.sequence_ranks <= num_tokens


def _kinds_of(checkpoint: "Checkpoint") -> "Callable[[ClipRequest], ClipKind]":
    """The kind of a request; a million of them have a few."""
    from cineray.jobs.planning.cache_share import computed_share_of
    from cineray.jobs.planning.evidence import ClipKind
    from cineray.jobs.planning.exchange import Shape

    @lru_cache(maxsize=1000)
    def kind(width: int, height: int, frames: int, steps: int, is_guided: bool, cache: str) -> ClipKind:
        policy = checkpoint.plan_cache(cache)
        text = "none" if policy is None else policy.text
        return ClipKind(
            shape=Shape(checkpoint.name, width, height, frames),
            steps=steps,
            num_branches=min(checkpoint.num_calls, 1 + is_guided),
            cache="none" if policy is None else cache,
            policy=text,
            computed_share=computed_share_of(text, checkpoint.name, (), None)[0],
        )

    return lambda r: kind(r.width, r.height, r.num_frames, r.num_inference_steps, r.guidance_scale > 1, r.cache)


def _size(kind: "ClipKind") -> int:
    """What stands for a clip's seconds where nobody knows them: enough to put clips in order."""
    shape = kind.shape
    return shape.width * shape.height * shape.frames * kind.steps * kind.num_branches
