"""A cluster that exists in numbers alone: performs the effects of a batch's state and thinks up what happens next."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from cineray.jobs.gangs import effects, events
from cineray.jobs.gangs.members import GangStage, Stage
from cineray.jobs.gangs.retry import RankOutcome
from cineray.jobs.gangs.state import BatchState

DIED = (RankOutcome(kind="died", reason="killed"), RankOutcome(kind="silent"))
WITH_NODE = (RankOutcome(kind="died", reason="its node has died", is_node_gone=True), RankOutcome(kind="silent"))
SHORT = RankOutcome(kind="raised", reason="out of memory: needs 5 GiB, has 1 GiB", fault="memory")


@dataclass
class World:
    """Actors and a disk for one run; `happen` lets one thing happen to them.

    Attributes:
        placing, starting, idle: gangs by what they do; `busy` the clip that each of the others denoises.
        finishing: clips in each finisher that is up, `encoding` its prompts.
        joined: gang -> the larger one that has its room.
        stands_with: the gang in whose group a finisher stands that has no place of its own.
        ended: how each clip ended.
    """

    state: BatchState
    clips: list[events.NewClip]
    now_s: float = 0.0
    placing: set[int] = field(default_factory=set)
    starting: set[int] = field(default_factory=set)
    idle: set[int] = field(default_factory=set)
    busy: dict[int, str] = field(default_factory=dict)
    asked: set[int] = field(default_factory=set)
    joined: dict[int, int] = field(default_factory=dict)
    steps: dict[int, int] = field(default_factory=dict)
    loading: set[int] = field(default_factory=set)
    finishing: dict[int, list[str]] = field(default_factory=dict)
    encoding: dict[int, list[str]] = field(default_factory=dict)
    stands_with: dict[int, int] = field(default_factory=dict)
    ended: dict[str, str] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    records: dict[str, str] = field(default_factory=dict)
    unread: list[events.NewClip] = field(default_factory=list)
    keys: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.unread = list(self.clips)
        self.keys = {clip.name: clip.prompt_key for clip in self.clips}

    def tell(self, event: events.Event, after_s: float = 0.1) -> None:
        """Lets time pass, tells the state, performs what it wants, and checks that all is where it must be."""
        self.now_s += after_s
        for effect in self.state.handle(event, self.now_s):
            self.done[type(effect).__name__] += 1
            self.perform(effect)
        self.check()

    def read(self) -> None:
        """Hands over the clips that the state wants."""
        wanted = self.state.num_wanted
        if wanted:
            new, self.unread = self.unread[:wanted], self.unread[wanted:]
            self.tell(events.ClipsRead(tuple(new), is_last=not self.unread))

    def perform(self, effect: effects.Effect) -> None:
        match effect:
            case effects.BuildGang(gang, others):
                for number in (gang, *others):
                    assert number not in self.placing | self.starting | self.idle | set(self.busy) | set(self.joined)
                self.placing.add(gang)
                self.joined |= dict.fromkeys(others, gang)
            case effects.KillGang(gang):
                for there in (self.placing, self.starting, self.idle, self.asked):
                    there.discard(gang)
                self.busy.pop(gang, None)
                assert gang not in self.joined
                self.joined = {number: lead for number, lead in self.joined.items() if lead != gang}
                assert gang not in self.stands_with.values()  # else Ray would end them unheard
            case effects.AssignClip(gang, clip):
                assert gang in self.idle  # so it has no clip
                assert gang not in self.asked  # its ranks would put every clip down
                assert clip not in self.busy.values()
                self.idle.remove(gang)
                self.busy[gang] = clip
                self.steps[gang] = 0
            case effects.RequestStop(gang):
                assert gang in self.busy
                self.asked.add(gang)
            case effects.BuildFinisher(finisher, gang):
                assert finisher not in self.loading | set(self.finishing)
                self.loading.add(finisher)
                if gang is not None:
                    assert gang in self.starting | self.idle | set(self.busy)  # its ranks hold their GPUs
                    self.stands_with[finisher] = gang
            case effects.KillFinisher(finisher):
                self.loading.discard(finisher)
                self.finishing.pop(finisher, None)
                self.encoding.pop(finisher, None)
                self.stands_with.pop(finisher, None)
            case effects.EncodePrompt(finisher, clip):
                assert self.keys[clip] not in [key for keys in self.encoding.values() for key in keys]
                self.encoding[finisher].append(self.keys[clip])
            case effects.FinishClip(finisher, clip):
                assert clip not in [name for names in self.finishing.values() for name in names]
                self.finishing[finisher].append(clip)
            case effects.EndClip(clip, status):
                assert clip not in self.ended  # ended at most once
                self.ended[clip] = status
            case effects.RecordFailure(clip, status):
                self.records[clip] = status
            case effects.Say(message):
                self.said.append(message)

    def check(self) -> None:
        """Each clip in one stage, and where its stage says."""
        state = self.state
        stages = {stage: sorted(c.name for c in state.clips.values() if c.stage is stage) for stage in Stage}
        assert stages[Stage.WAITING] == sorted(state.waiting)
        assert stages[Stage.DENOISED] == sorted(state.denoised)
        assert stages[Stage.DENOISING] == sorted(self.busy.values())
        assert stages[Stage.FINISHING] == sorted(name for names in self.finishing.values() for name in names)
        assert {gang.number for gang in state.gangs if gang.stage is GangStage.JOINED} == set(self.joined)
        assert {number: gang.number for gang in state.gangs for number in gang.others} == self.joined
        for clip in state.clips.values():
            if clip.awaits is not None:
                assert clip.stage is Stage.WAITING
                assert clip.awaits in self.placing | self.starting | self.idle
        known = [*state.clips, *self.ended, *(clip.name for clip in self.unread)]
        assert sorted(known) == sorted(clip.name for clip in self.clips)  # none is lost, none is there twice

    def possible(self, with_harm: bool) -> list[Callable[[], None]]:
        """What can happen now."""
        things: list[Callable[[], None]] = []

        def can(event: events.Event, before: Callable[[], object] = lambda: None) -> None:
            things.append(lambda: (before(), self.tell(event))[1])

        for gang in sorted(self.placing):
            can(
                events.GangPlaced(gang, frozenset({f"node{gang % 2}"})),
                lambda g=gang: (self.placing.remove(g), self.starting.add(g)),
            )
        for gang in sorted(self.starting):
            can(events.GangReady(gang), lambda g=gang: (self.starting.remove(g), self.idle.add(g)))
        for gang in sorted(self.busy):
            if gang not in self.asked:
                can(events.GangEnded(gang), lambda g=gang: (self.busy.pop(g), self.idle.add(g)))
            else:
                can(events.GangEnded(gang, preempted_at=3, is_kept=True), lambda g=gang: self.busy.pop(g))
                if with_harm:  # it was in its last step
                    can(events.GangEnded(gang), lambda g=gang: (self.busy.pop(g), self.idle.add(g)))
                    can(events.GangEnded(gang, preempted_at=3), lambda g=gang: self.busy.pop(g))
        for finisher in sorted(self.loading):
            if with_harm:
                can(events.FinisherPlaced(finisher))
            can(
                events.FinisherReady(finisher),
                lambda f=finisher: (
                    self.loading.remove(f),
                    self.finishing.update({f: []}),
                    self.encoding.update({f: []}),
                ),
            )
        for finisher, keys in sorted(self.encoding.items()):
            for key in keys[:1]:
                can(events.PromptEncoded(finisher, key), lambda f=finisher, k=key: self.encoding[f].remove(k))
        for finisher, names in sorted(self.finishing.items()):
            for name in names[:1]:
                can(events.VideoCommitted(finisher, name), lambda f=finisher, n=name: self.finishing[f].remove(n))
        can(events.Tick())
        for gang in sorted(self.busy):
            things.append(lambda g=gang: self.step(g))
        if with_harm:
            self._add_harm(can)
        return things

    def _add_harm(self, can: Callable[..., None]) -> None:
        for gang in sorted(self.starting | self.idle | set(self.busy)):
            can(events.GangEnded(gang, outcomes=DIED), lambda g=gang: self._bury(g))
            can(events.GangEnded(gang, outcomes=WITH_NODE), lambda g=gang: self._bury(g))
        for gang in sorted(self.busy):
            fault = (RankOutcome(kind="raised", reason="bad image", fault="input"),) * 2
            can(
                events.GangEnded(gang, outcomes=fault),
                lambda g=gang: (self.busy.pop(g), self.idle.add(g)),
            )
            can(
                events.GangEnded(gang, outcomes=(SHORT,)),
                lambda g=gang: (self.busy.pop(g), self.idle.add(g)),
            )
            can(events.GangEnded(gang, outcomes=(SHORT, RankOutcome(kind="silent"))), lambda g=gang: self._bury(g))
            can(
                events.PromptMissing(gang, "no such file"),
                lambda g=gang: (self.busy.pop(g), self.idle.add(g)),
            )
        for finisher in sorted(self.finishing):
            can(events.FinisherLost(finisher, "killed"))
            can(events.FinisherLost(finisher, "its node has died", is_node_gone=True))
            can(events.FinishersInTheWay((finisher,)))
            for key in self.encoding[finisher][:1]:
                forget = lambda f=finisher, k=key: self.encoding[f].remove(k)  # noqa: E731
                can(events.PromptFailed(finisher, key, "odd"), forget)
                can(events.PromptFailed(finisher, key, SHORT.reason, "memory"), forget)
            for name in self.finishing[finisher][:1]:
                remove = lambda f=finisher, n=name: self.finishing[f].remove(n)  # noqa: E731
                can(events.VideoFailed(finisher, name, "no frames"), remove)
                can(events.VideoFailed(finisher, name, SHORT.reason, "memory"), remove)
                can(events.LatentsMissing(finisher, name), remove)
        can(events.NodesDraining(frozenset({"node0"})))
        can(events.NodesDraining(frozenset()))

    def _bury(self, gang: int) -> None:
        self.busy.pop(gang, None)

    def step(self, gang: int, after_s: float = 1.0) -> None:
        """A gang is a step further."""
        self.steps[gang] += 1
        self.tell(events.StepReached(gang, self.steps[gang]), after_s)

    def run_out(self, max_events: int = 10_000) -> None:
        """Lets all go well until the run is over."""
        self.tell(events.NodesDraining(frozenset()))  # Ray places no gang on a node that goes; this world would
        for _ in range(max_events):
            self.read()
            if self.state.is_over:
                return
            self.possible(with_harm=False)[0]()
        raise AssertionError(f"not over: {self.state.clips}")
