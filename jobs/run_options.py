"""The options of a run: one dataclass from the command line, which shows its defaults, to every rank."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

from cineray.distributed.layout import Layout, parse_layout
from cineray.jobs.output.lease import MIN_TTL_S, TTL_S
from cineray.pipeline.request import InputError

AUTO = "auto"
Decode = Literal["auto", "gang", "finisher"]
if TYPE_CHECKING:  # `--help` should not wait for them
    from cineray.pipeline.adapters import Model
    from cineray.pipeline.loading.options import LoadOptions

MAX_ACTORS = 10_000  # of a kind; the largest clusters of Ray have some thousand nodes


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOptions:
    """How a run is carried out, from the command line to the ranks; nothing here changes pixels.

    Args:
        sp: ranks that share the tokens of one clip.
        layout_name: layout of one gang, as `parse_layout` reads it; in place of `sp` and `cfg_parallel`. AUTO: it is
            chosen, with the number of gangs, before the run begins.
        elastic_tail: gangs may grow when there are fewer clips than gangs.
        address: of a Ray cluster; "local" or None for this machine.
        num_finishers: actors that encode prompts and decode; None for one per four gangs.
        hang_s: a gang whose step takes longer is killed.
        checkpoint_s: seconds between two step states of a clip.
        lease_s: a driver that is silent for so long loses the output folder.
        decode: by the "gang", each rank a band of rows, or by a "finisher"; "auto" as `decodes_on_gang` says. By rows
            a few of 100,000 values are the next of 256 levels, as between two GPUs.
        shard_weights: each rank that shares a clip's tokens holds a part of the transformer's weights.
    """

    sp: int = 1
    cfg_parallel: bool = False
    layout_name: str | None = None
    num_gangs: int = 1
    address: str | None = None
    num_finishers: int | None = None
    hang_s: float = 300.0
    checkpoint_s: float = 60.0
    lease_s: float = TTL_S
    elastic_tail: bool = False
    decode: Decode = "auto"
    shard_weights: bool = False

    def __post_init__(self) -> None:
        for name, value in (("sp", self.sp), ("gangs", self.num_gangs), ("finishers", self.num_finishers or 1)):
            if not 1 <= value <= MAX_ACTORS:
                raise InputError(f"--{name} must be 1 to {MAX_ACTORS}, got {value}")
        self._check_layout()
        if not self.hang_s > 0:
            raise InputError(f"--hang-timeout must be above 0, got {self.hang_s:g}")
        if not self.lease_s >= MIN_TTL_S:
            raise InputError(
                f"--lease-timeout must be {MIN_TTL_S:g} or more, got {self.lease_s:g}: a living driver would be taken "
                "for dead"
            )
        if not self.checkpoint_s >= 0:
            raise InputError(f"--checkpoint-every must be 0 or more, got {self.checkpoint_s:g}")
        if self.decode not in get_args(Decode):
            raise InputError(f"--decode must be {', '.join(get_args(Decode))}, got {self.decode}")

        if self.shard_weights and not self.picks_layout and self.layout.sequence_ranks == 1:
            raise InputError(
                f"--shard-weights needs ranks that share a clip's tokens, layout {self.layout.text} has none; "
                "give --sp 2 or more, or leave it out"
            )

    def check_goes_with(self, options: "LoadOptions") -> None:
        """Raises InputError where weights that are sharded cannot be loaded so, or where a kernel would not be used."""
        others = (("--quantize", options.quantize), ("--offload", options.offload))
        asked = [f"{name} {value}" for name, value in others if value != "none"]
        asked += ["--compile"] if options.compile else []
        if self.shard_weights and asked:
            raise InputError(f"--shard-weights does not go with {' or '.join(asked)}; leave one of them out")
        if not self.picks_layout:
            self._check_attention(options.attention)

    def _check_attention(self, name: str) -> None:
        if self.layout.ring > 1 and name not in ("auto", "native", "xfuser"):
            raise InputError(
                f"--attention {name} is not used in layout {self.layout.text}: a ring adds up parts of the softmax, by "
                "PyTorch's kernels; leave it out, or take a layout without a ring"
            )
        if self.layout.sequence_ranks == 1 and name == "xfuser":
            raise InputError(
                f"--attention xfuser is that of ranks that share a clip's tokens, layout {self.layout.text} has none; "
                "give --sp 2 or more, or leave it out"
            )

    def _check_layout(self) -> None:
        if self.layout_name is None:
            return
        if self.sp != 1 or self.cfg_parallel:
            raise InputError("give --layout, or --sp and --cfg-parallel, not both")
        if self.picks_layout:
            if self.num_gangs != 1:
                raise InputError("--layout auto chooses the number of gangs, too; leave --gangs out")
            return
        try:
            layout = parse_layout(self.layout_name)
        except ValueError as error:
            said = str(error)
            raise InputError(f"--{said}" if said.startswith("layout") else f"--layout: {said}") from None
        if layout.gangs > 1:
            raise InputError(f"--layout {layout.text} is that of one gang; leave gangs{layout.gangs} out, give --gangs")
        if layout.world_size > MAX_ACTORS:
            raise InputError(f"--layout {layout.text} takes {layout.world_size} ranks; {MAX_ACTORS} are the most")

    @property
    def picks_layout(self) -> bool:
        """Whether nobody knows the layout yet."""
        return self.layout_name == AUTO

    @property
    def layout(self) -> Layout:
        """Layout of one gang; of AUTO there is none."""
        if self.layout_name is not None:
            return parse_layout(self.layout_name)
        return Layout(cfg=2 if self.cfg_parallel else 1, ulysses=self.sp)

    def on(self, layout: Layout) -> "RunOptions":
        """The same on another layout; the number of gangs stays."""
        return replace(self, sp=1, cfg_parallel=False, layout_name=replace(layout, gangs=1).text)

    @property
    def collective_s(self) -> float:
        """Seconds after which a collective fails: later than the driver notices that a gang hangs."""
        return 2 * self.hang_s

    @property
    def is_local(self) -> bool:
        return self.address in (None, "local")

    @property
    def uses_ray(self) -> bool:
        return self.address is not None or self.num_gangs > 1 or self.layout.world_size > 1


MIN_DECODING_RANKS = 4  # with fewer, a finisher's decode beside the next clip's steps costs the gang no more


def decodes_on_gang(run: RunOptions, options: "LoadOptions", model: "Model") -> bool:
    """Whether the ranks decode. By themselves they do where four GPUs or more share a frame that is not tiled."""
    if run.decode != "auto":
        return run.decode == "gang"
    is_wide = run.layout.world_size >= MIN_DECODING_RANKS
    return options.device == "cuda" and is_wide and bool(model.row_convolutions) and not options.vae_tiling
