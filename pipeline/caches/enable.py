"""`cineray.enable_cache`: a cache on any diffusers pipeline or transformer, ours or anyone's loop around it."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import nn

from cineray.caching.consensus import Consensus, SingleProcess
from cineray.caching.controller import CacheController
from cineray.caching.forecast import Forecasting
from cineray.caching.plan import AnyPlan, CachePlan, PolicyConfig
from cineray.caching.policies.smoothcache import LayerPlan
from cineray.caching.policies.taylorseer import SeriesPlan
from cineray.caching.spec import POLICIES, Policies
from cineray.caching.step_controller import StepController
from cineray.caching.trace import Trace
from cineray.pipeline.adapters import MODELS, Model, Models, transformers_in
from cineray.pipeline.adapters.cache_plan import plan_cache
from cineray.pipeline.blocks import is_sharded
from cineray.pipeline.caches.blocks import BlockRunner
from cineray.pipeline.caches.clip_progress import ClipProgress
from cineray.pipeline.caches.corrector import CorrectedScheduler, Stepper, is_flow
from cineray.pipeline.caches.layers import run_schedule
from cineray.pipeline.caches.other_caches import other_cache, switched_on
from cineray.pipeline.caches.signals import SIGNAL_READERS, NewReader, signal_reader
from cineray.pipeline.caches.step_forecaster import CleanHistory, ForecastingScheduler
from cineray.pipeline.caches.step_tracker import Listener, StepTracker, check_not_compiled_whole, refuse_other_cache
from cineray.pipeline.caches.taylorseer import run_series
from cineray.pipeline.linear_runs import LinearRuns


@dataclass(frozen=True, slots=True)
class _Attached:
    """A transformer with a cache; and who decides, where steps are skipped whole."""

    transformer: nn.Module
    tracker: StepTracker
    controller: StepController | None


class CacheHandle:
    """A cache that is attached to one transformer, or to those that render a clip's steps in turn.

    Attributes:
        trace: what it did to the clip in flight, or to the last one.
        policy: the policy with all its options, as text.
    """

    def __init__(
        self, plan: AnyPlan, trace: Trace, attached: Sequence[_Attached], history: CleanHistory, runs: LinearRuns
    ) -> None:
        self.policy = plan.text
        self.trace = trace
        self._attached = attached
        self._history = history
        self._runs = runs
        self._corrected: tuple[dict[str, Any], Any] | None = None  # (a pipeline's attributes, the scheduler put there)

    def corrected(self, scheduler: Any) -> Any:
        """A scheduler to step with in place of this one: it corrects skipped steps, where the policy asks for that and
        the scheduler allows it, and forecasts them where the policy forecasts whole steps; else it is this one. A
        pipeline's is exchanged by `enable_cache`."""
        forecasting, stepper, flows = self.trace.forecasting, scheduler, is_flow(scheduler)
        if forecasting.corrector and flows:
            stepper = CorrectedScheduler(stepper, lambda: self.trace.last_outcomes, forecasting.curvature, self._runs)
        if forecasting.target == "clean_latents":
            self._history.flow = scheduler if flows else None
            stepper = ForecastingScheduler(stepper, flows, self._history, lambda: self.trace.entries[-1], self._holds)
        return stepper

    def skips_step(self, transformer: nn.Module, step_index: int, num_steps: int) -> bool:
        """For a loop that steps with `corrected`: whether the step to come needs no call of this transformer, whose
        output is then not read. If so, the step counts as taken."""
        controller = next(one.controller for one in self._attached if one.transformer is transformer)
        return controller is not None and controller.skips_step(step_index, num_steps)

    def _holds(self, held_bytes: int) -> None:
        self.trace.held_bytes = max(self.trace.held_bytes, held_bytes)

    def disable(self) -> None:
        """Takes the cache off; the transformer is as before. Again does nothing, whatever else is attached since."""
        for one in self._attached:
            one.tracker.detach()
        if self._corrected is not None:
            attributes, corrected = self._corrected
            if attributes.get("scheduler") is corrected:
                attributes["scheduler"] = _innermost(corrected)
            self._corrected = None

    def correct(self, pipe: Any) -> None:
        """Lets a pipeline's loop step with `corrected`, until `disable`."""
        corrected = self.corrected(pipe.scheduler)
        if corrected is not pipe.scheduler:
            # not by setattr, which would write the class into the pipeline's configuration
            vars(pipe)["scheduler"] = corrected
            self._corrected = vars(pipe), corrected

    def __enter__(self) -> "CacheHandle":
        return self

    def __exit__(self, *_: object) -> None:
        self.disable()


def enable_cache(
    pipe_or_transformer: Any,
    policy: str | PolicyConfig,
    num_branches: int | None = None,
    scheduler: Any = None,
    *,
    policies: Policies = POLICIES,
    signals: Mapping[str, NewReader] = SIGNAL_READERS,
    models: Models = MODELS,
) -> CacheHandle:
    """Attaches a cache to a pipeline or transformer.

    Args:
        pipe_or_transformer: a diffusers pipeline, or its transformer.
        policy: text as on the command line ("dicache", "dicache(threshold=0.1)"), or a configuration.
        num_branches: guidance branches per step; default: what the family's pipeline makes. 1 says that no branches
            are stacked in the batch; else that is seen by the batch's halves being equal.
        scheduler: for a transformer in a loop that sets no `cache_context`: its timesteps tell the step. Step with
            `handle.corrected(scheduler)` to have skipped steps corrected, as a pipeline does.
        policies: what the text may name; one of your own is `{**POLICIES, "mine": MyConfig()}`.
        signals: readers of what a policy judges by, beside probes: `{**SIGNAL_READERS, "mine": MyReader}`.
        models: what can be cached; one of your own is `{**MODELS, **by_transformer(MINE)}`.

    Raises:
        ValueError: an unknown model or policy, an option out of range, a transformer compiled as a whole, or a cache
            that is enabled already.
    """
    transformers = transformers_of(pipe_or_transformer)
    plans = []
    for transformer in transformers:
        check_not_compiled_whole(transformer)
        kind = type(transformer).__name__
        if kind not in models:
            raise ValueError(
                f"enable_cache: {kind} is not supported; supported: {', '.join(transformers_in(models.values()))}"
            )
        plan = plan_cache(policy, kind, transformer.config, policies, models)
        if plan is None:
            raise ValueError("enable_cache: policy 'none' is no cache; leave the call out")
        plans.append(plan)
    refuse_other_cache(switched_on(pipe_or_transformer), transformers[0])
    if len({(plan.text, plan.num_blocks) for plan in plans}) > 1:
        raise ValueError(
            "enable_cache: the pipeline's transformers differ, and one trace cannot tell of both; enable a cache on "
            "each: enable_cache(pipe.transformer, ..., scheduler=pipe.scheduler), and the same for transformer_2"
        )
    steps = scheduler_of(pipe_or_transformer, scheduler)
    handle = _attach(transformers, plans, num_branches, steps, SingleProcess(), signals, models, LinearRuns())
    if pipe_or_transformer is not transformers[0] and hasattr(pipe_or_transformer, "scheduler"):
        handle.correct(pipe_or_transformer)
    return handle


def transformers_of(pipe_or_transformer: Any) -> list[Any]:
    """The pipeline's transformers: two where experts share the steps (Wan 2.2); or the transformer itself."""
    found: list[Any] = []
    for name in ("transformer", "transformer_2"):
        transformer = getattr(pipe_or_transformer, name, None)
        if transformer is not None and not any(transformer is other for other in found):
            found.append(transformer)
    return found or [pipe_or_transformer]


def scheduler_of(pipe_or_transformer: Any, scheduler: Any = None) -> Callable[[], Any] | None:
    """Looks up the scheduler that a loop uses: the one given, or the pipeline's at the time of the call."""
    if scheduler is not None:
        return lambda: scheduler
    return (lambda: pipe_or_transformer.scheduler) if hasattr(pipe_or_transformer, "scheduler") else None


def attach_cache(
    transformers: Sequence[nn.Module],
    plan: AnyPlan,
    num_branches: int | None = None,
    scheduler: Callable[[], Any] | None = None,
    consensus: Consensus | None = None,
    models: Models = MODELS,
    runs: LinearRuns | None = None,
) -> CacheHandle:
    """Attaches one cache whose plan was made for these transformers: one, or experts that share a clip's steps.

    Each expert has a history of its own, which is dropped when the next one takes over.

    Args:
        consensus: how a gang's ranks agree; None for one process.
        runs: of the scheduler's steps that earlier clips have found.

    Raises:
        ValueError: a cache is enabled already, a transformer is sharded already (the cache must see shards), or experts
            of different depths.
    """
    depths = {tuple(getattr(t.config, count) for count in models[type(t).__name__].layout.counts) for t in transformers}
    if len(depths) > 1:
        raise ValueError(
            "cache: the model's experts have different numbers of blocks, and one plan cannot hold for both"
        )
    plans = [plan] * len(transformers)
    agreed, found = consensus or SingleProcess(), runs or LinearRuns()
    return _attach(transformers, plans, num_branches, scheduler, agreed, SIGNAL_READERS, models, found)


def _attach(
    transformers: Sequence[nn.Module],
    plans: Sequence[AnyPlan],
    num_branches: int | None,
    scheduler: Callable[[], Any] | None,
    consensus: Consensus,
    signals: Mapping[str, NewReader],
    models: Models,
    runs: LinearRuns,
) -> CacheHandle:
    """One cache on all of these, or on none."""
    for transformer in transformers:
        kind = type(transformer).__name__
        if StepTracker.is_attached(transformer):
            raise ValueError(f"enable_cache: this {kind} has a cache already; call disable() of its handle first")
        if is_sharded(transformer):
            raise ValueError("enable_cache: the transformer is sharded already; enable the cache first, then shard")
        refuse_other_cache(other_cache(transformer), transformer)
    trace, history = _new_trace(plans[0]), CleanHistory()
    progress = ClipProgress()
    attached: list[_Attached] = []
    with ExitStack() as undo:
        for transformer, plan in zip(transformers, plans, strict=True):
            model = models[type(transformer).__name__]
            tracker = step_tracker_of(transformer, model, num_branches, scheduler, progress)
            skips = _step_controller(plan, trace, history)
            runner = (
                _new_runner(transformer, model, plan, trace, consensus, tracker, signals)
                if skips is None
                else BlockRunner(transformer, model.layout, skips, 0, None, tracker.where)
            )
            undo.callback(tracker.detach)
            attached.append(_Attached(transformer, tracker.attach(runner), skips))
        undo.pop_all()
    return CacheHandle(plans[0], trace, attached, history, runs)


def _step_controller(plan: AnyPlan, trace: Trace, history: CleanHistory) -> StepController | None:
    """Who decides, where whole steps are forecast."""
    if not isinstance(plan, CachePlan) or plan.forecasting.target != "clean_latents":
        return None
    return StepController(
        policy=plan.policy,
        forecasting=plan.forecasting,
        trace=trace,
        last_stepped=lambda: history.last_stepped,
        sigmas=history.sigmas,
        on_free=history.clear,
    )


def _innermost(scheduler: Any) -> Any:
    while isinstance(scheduler, Stepper):
        scheduler = scheduler.inner
    return scheduler


def _new_trace(plan: AnyPlan) -> Trace:
    if isinstance(plan, CachePlan):
        return Trace(
            policy=plan.text, forecasting=plan.forecasting, num_blocks=plan.num_blocks, probe_depth=plan.probe_depth
        )
    return Trace(policy=plan.text, forecasting=Forecasting(), num_blocks=plan.num_blocks, probe_depth=0, by_layer=True)


def _new_runner(
    transformer: nn.Module,
    model: Model,
    plan: AnyPlan,
    trace: Trace,
    consensus: Consensus,
    tracker: StepTracker,
    signals: Mapping[str, NewReader],
) -> Listener:
    if isinstance(plan, LayerPlan):
        return run_schedule(transformer, model.layout, plan.schedule, trace, tracker.where)
    if isinstance(plan, SeriesPlan):
        return run_series(transformer, model.layout, plan.config, trace, tracker.where)
    if not isinstance(plan, CachePlan):
        raise TypeError(f"enable_cache: nothing runs a {type(plan).__name__}")
    controller = CacheController(policy=plan.policy, forecasting=plan.forecasting, trace=trace, consensus=consensus)
    signal = signal_reader(transformer, model, plan.policy.signal, signals)
    return BlockRunner(transformer, model.layout, controller, plan.probe_depth, signal, tracker.where)


def step_tracker_of(
    transformer: nn.Module,
    model: Model,
    num_branches: int | None,
    scheduler: Callable[[], Any] | None,
    progress: ClipProgress | None = None,
) -> StepTracker:
    """A `StepTracker` for a transformer, with what its model says of the branches unless told otherwise."""
    stacked = model.branches if model.stacked and num_branches != 1 else ()
    calls = 1 if model.stacked else len(model.branches)
    return StepTracker(transformer, num_branches or calls, scheduler, stacked, progress)
