"""What there is in a simulation: nodes, gangs, finishers and the clips in hand, as they stand at one moment."""

from collections import deque
from dataclasses import dataclass, field

from cineray.jobs.simulate.assumptions import Assumptions, PlannedClip
from cineray.jobs.simulate.attempt import Attempt
from cineray.jobs.simulate.ledger import Use


@dataclass(slots=True)
class Node:
    """A place for gangs; when it is lost, another one takes it, with a name of its own.

    Attributes:
        life: how many nodes have stood here.
        slowness: its gangs' steps take so many times as long.
    """

    number: int
    life: int = 0
    is_there: bool = False
    is_draining: bool = False
    slowness: float = 1.0
    gangs: list["Gang"] = field(default_factory=list)
    finishers: list["Finisher"] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"node-{self.number}.{self.life}"

    @property
    def takes_actors(self) -> bool:
        return self.is_there and not self.is_draining


@dataclass(slots=True)
class Clip:
    """A clip in hand: the steps that are kept on disk, and the seconds of GPUs that went into them."""

    name: str
    plan: PlannedClip
    num_kept: int = 0
    gpu_s: float = 0.0


@dataclass(slots=True)
class Gang:
    """A gang slot.

    Attributes:
        life: grows when what was to happen to the gang no longer will.
        is_wanted: to be placed as soon as its node takes actors.
        use, since_s: what its GPUs do, and since when; None while idle.
        told_step: the last one that the run was told of.
        room: in gangs as they began; 0 while another has it.
        others: that have no room meanwhile.
    """

    number: int
    node: Node
    life: int = 0
    is_wanted: bool = False
    is_there: bool = False
    use: Use | None = Use.NO_NODE
    since_s: float = 0.0
    clip: Clip | None = None
    attempt: Attempt | None = None
    told_step: int = 0
    room: int = 1
    others: tuple["Gang", ...] = ()


@dataclass(slots=True)
class Finisher:
    """A finisher slot: its actor decodes one clip after the other and, beside that, encodes one prompt after the other.

    Attributes: as a gang's; `finishing` and `encoding` begin with what is worked on.
    """

    number: int
    node: Node
    life: int = 0
    is_wanted: bool = False
    is_there: bool = False
    finishing: deque[Clip] = field(default_factory=deque)
    encoding: deque[Clip] = field(default_factory=deque)


@dataclass(frozen=True, slots=True)
class Fleet:
    """All slots, each on a node."""

    nodes: list[Node]
    gangs: list[Gang]
    finishers: list[Finisher]

    @classmethod
    def of(cls, assumed: Assumptions, num_finishers: int) -> "Fleet":
        """Gangs fill one node after the other; finishers go round."""
        nodes = [Node(number) for number in range(-(-assumed.gangs // assumed.gangs_per_node))]
        gangs = [Gang(number, nodes[number // assumed.gangs_per_node]) for number in range(assumed.gangs)]
        finishers = [Finisher(number, nodes[number % len(nodes)]) for number in range(num_finishers)]
        for gang in gangs:
            gang.node.gangs.append(gang)
        for finisher in finishers:
            finisher.node.finishers.append(finisher)
        return cls(nodes, gangs, finishers)
