"""What cineray must know of a model: how its transformer is built, how it is called, who renders with it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cineray.caching.plan import PolicyConfig
from cineray.caching.policy import Signal
from cineray.pipeline.adapters.protocol import Adapter
from cineray.pipeline.media.output import VIDEO, Output
from cineray.pipeline.request import ClipRequest

SHIPPED = Path(__file__).resolve().parents[1] / "checkpoints"
TINY_CLIP = {"width": 64, "height": 64, "num_frames": 17, "fps": 8}  # what the tiny checkpoints were trained on


def num_heads(config: Mapping[str, Any]) -> int:
    """Attention heads of a transformer by its configuration, STDiT3's own name for them too; 1 where it says none."""
    return config.get("num_attention_heads", config.get("num_heads", 1))


def hidden_size(config: Mapping[str, Any]) -> int:
    """Channels of a token in a transformer's blocks; STDiT3 says them, the others their heads."""
    return config.get("hidden_size") or config["num_attention_heads"] * config["attention_head_dim"]


def out_channels(config: Mapping[str, Any]) -> int:
    """Channels of what a transformer gives; STDiT3's has a variance beside each where it learns them."""
    if "pred_sigma" in config:
        return config["in_channels"] * (2 if config["pred_sigma"] else 1)
    return config.get("out_channels") or config["in_channels"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockLayout:
    """How a transformer class passes hidden states through its blocks.

    Args:
        lists: names of the block lists, in order; the probe lies in the first.
        counts: where the configuration says how many blocks each list has; one name for interleaved lists.
        interleaved: the lists run in turn, one block of each, and such a group counts as one block.
        mask: place of the attention mask that hides padded text, from the hidden states; None where there is none.
        output: what a block returns: "hidden", "hidden, text" or "text, hidden".
        shared: arguments, by position (from the hidden states) or keyword, that have no batch dimension.
        layers: the layers that feed a residual add, which a SmoothCache schedule may name: attributes of a block, or
            list.attribute where the lists' layers are of different types.
        layer_names: what SmoothCache's authors call a layer type, where it is another name -> the layer type.
        hints: a list of blocks that run before those of `lists` and make what is added behind some of them.
        hinted: where the configuration says behind which.
        unread: modules whose output the blocks alone read, so that they can be left out where no block runs.
        called_apart: a module of the first block that the transformer's forward calls by itself, too; "" for none.
    """

    lists: tuple[str, ...]
    counts: tuple[str, ...]
    interleaved: bool = False
    output: str = "hidden"
    shared: tuple[int | str, ...] = ()
    mask: int | None = None
    layers: tuple[str, ...]
    layer_names: Mapping[str, str] = field(default_factory=dict)
    hints: str | None = None
    hinted: str | None = None
    unread: tuple[str, ...] = ()
    called_apart: str = ""

    @property
    def all_lists(self) -> tuple[str, ...]:
        """`lists`, and `hints` behind them."""
        return self.lists if self.hints is None else (*self.lists, self.hints)

    def num_hints(self, config: Mapping[str, Any]) -> int:
        """Blocks of `hints`."""
        return 0 if self.hinted is None else len(config[self.hinted])


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardedArguments:
    """Arguments of a block that follow the tokens. Places count from the hidden states.

    Args:
        attention: the block's attention over image tokens (and text tokens, where it is joint), or list.attribute where
            the blocks of one list alone attend to tokens of other ranks.
        rotary: place of the rotary embedding, a pair of tensors; its tokens are on dimension `rotary_dim`. None where
            there is none, or where it follows no token.
        text_first: text stands before the image in joint attention and in the rotary embedding.
        first_frame: place of the number of tokens of the first frame, which get their own modulation; or None.
        masks_tokens_here: the attention makes its mask of the tokens that it is given, which are a rank's own.
        timesteps: the module that embeds timesteps, which has one for each token [B, S, F] where the model gives one to
            each; "" for none.
        gathered: the module behind the blocks whose output [..., S, F] is put together of all ranks' tokens.
        frames: place of a pair of tensors that have a row for each frame, where ranks share the places of a frame and
            each has its own in all frames; None where they share all tokens alike.
        num_frames: frames of a clip, as `frames` has rows.
    """

    attention: str
    rotary: int | str | None = None
    rotary_dim: int = 0
    text_first: bool = False
    first_frame: int | None = None
    masks_tokens_here: bool = False
    timesteps: str = ""
    gathered: str = "proj_out"
    frames: int | None = None
    num_frames: Callable[[ClipRequest], int] | None = None

    def attention_of(self, blocks: str) -> str | None:
        """The attribute of a list's blocks that attends to tokens of other ranks; None where none does."""
        of_list, _, attribute = self.attention.rpartition(".")
        return attribute if of_list in ("", blocks) else None


@dataclass(frozen=True, slots=True)
class ModuleOutput:
    """A signal that a module of the transformer gives before the blocks run: [B, D], the same for all tokens, or with
    a dimension of tokens [B, S, D]."""

    module: str


@dataclass(frozen=True, slots=True)
class TimestepArgument:
    """A signal that the first block is called with: the timestep's conditioning; with a dimension of tokens where it
    has `num_token_dims` dimensions."""

    num_token_dims: int


@dataclass(frozen=True, slots=True)
class ModulatedNorm:
    """A signal of image tokens: as this norm of the first block modulates them by the timestep's conditioning."""

    norm: str


SignalSource = ModuleOutput | TimestepArgument | ModulatedNorm


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownCheckpoint:
    """A checkpoint that can be named on the command line."""

    source: str  # folder or hub id
    note: str
    defaults: Mapping[str, Any] = field(default_factory=dict)  # where they differ from the family's


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """One transformer class and all that is particular to it.

    Args:
        transformer: its class name.
        family: whose calibrated profiles fit.
        branches: the guidance branches of a step, in the order in which the model's own pipeline makes them.
        stacked: they stand one after the other in the batch of one call; else each has a call of its own.
        sharded: how its tokens are sharded over a gang's ranks.
        output: what its clips are.
        pipelines: diffusers pipeline class -> rendering adapter, or None where cineray caches but does not render.
        pipelines_from: module that has the pipeline classes.
        presets: by the name of a cache policy, the options that its authors give it for this model.
        signals: what TeaCache may judge by, and where it is read; the second one comes with its `ret_steps`.
        row_convolutions: classes of the decoder's convolutions that pad by themselves, so that ranks can decode a band
            of rows each; none where the first rank must decode alone.
        takes_lora: diffusers' pipelines of this transformer fuse LoRAs into it.
        can_tile: its VAE can decode in tiles.
        pixel_fields: of a request that change this model's pixels and no other's, such as "fps".
        encoder_parts: components of the pipeline that `Adapter.encode` alone needs.
        denoiser_parts: components that the denoising loop alone needs.
        read_parts: components whose configuration the pipeline's constructor reads, though they stay out of memory.
        decoder_parts: components that `Adapter.decode` needs, and `encode` may.
        checkpoints: name on the command line -> checkpoint.
    """

    transformer: str
    family: str
    layout: BlockLayout
    branches: tuple[str, ...]
    stacked: bool = False
    sharded: ShardedArguments
    output: Output = VIDEO
    pipelines: Mapping[str, Adapter | None]
    pipelines_from: str = "diffusers"
    presets: Mapping[str, PolicyConfig] = field(default_factory=dict)
    signals: Mapping[Signal, SignalSource] = field(default_factory=dict)
    row_convolutions: tuple[str, ...] = ()
    takes_lora: bool = True
    can_tile: bool = True
    pixel_fields: tuple[str, ...] = ()
    encoder_parts: tuple[str, ...] = ("text_encoder",)
    denoiser_parts: tuple[str, ...] = ("transformer",)
    decoder_parts: tuple[str, ...] = ("vae",)
    read_parts: tuple[str, ...] = ("vae",)
    checkpoints: Mapping[str, KnownCheckpoint] = field(default_factory=dict)
