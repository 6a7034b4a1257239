"""The real code at its real size on a GPU that is not there.

Few blocks of each list: neither a step's transients nor the order of its exchanges depend on how many there are.
"""

import itertools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cineray.distributed.consensus import GangConsensus
from cineray.distributed.layout import parse_layout
from cineray.pipeline.footprint.cases import ALWAYS_SKIPS, NUM_LAYERS, Case, blank_picture, request_of, run
from cineray.pipeline.footprint.exchange_log import Exchange, disagreement
from cineray.pipeline.footprint.fake_gpu import GPU, fake_gpu
from cineray.pipeline.footprint.fit import block_linear_parameters
from cineray.pipeline.footprint.laws import read_table, with_tokens
from cineray.pipeline.footprint.layer_caches import layer_cache_bytes
from cineray.pipeline.footprint.measure import StepTaken, denoise_on
from cineray.pipeline.footprint.operations import forward_flop
from cineray.pipeline.footprint.published import published, published_checkpoint, published_names
from cineray.pipeline.footprint.subject import empty_part, fake_weights, load_fake, num_parameters
from cineray.pipeline.loading.options import LoadOptions
from cineray.pipeline.loading.prepare import quantize

pytestmark = pytest.mark.slow

MODELS_DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"
WAN, HUNYUAN, FLUX = "wan2.1-t2v-14b", "hunyuan-video", "flux.1-dev"
I2V, HUNYUAN_15, I2V_15 = "hunyuan-video-i2v", "hunyuan-video-1.5-t2v-480p", "hunyuan-video-1.5-i2v-480p"
DIT, SOUND, OPEN_SORA = "dit-xl-2-256", "stable-audio-open-1.0", "open-sora-1.2"


@pytest.mark.parametrize("model", published_names())
def test_parameters_are_as_many_as_the_published_weights_have(model):
    """Repositories show sizes in three figures."""
    for part, size in published(model).published_bytes.items():
        said = num_parameters(model, part) * size["element_bytes"]
        assert said == pytest.approx(size["bytes"], rel=0.004), part


@pytest.mark.parametrize(
    ("model", "billions"),
    [
        ("wan2.1-t2v-1.3b", 1.4190),
        (WAN, 14.288),
        ("wan2.1-i2v-14b-720p", 16.395),
        ("wan2.2-i2v-a14b", 14.289),
        ("wan2.2-ti2v-5b", 4.9998),
        (HUNYUAN, 12.821),
        ("hunyuan-video-i2v-33ch", 12.811),
        ("hunyuan-video-1.5-t2v-480p", 8.3266),
        ("hunyuan-video-1.5-i2v-720p", 8.3266),
        ("wan2.1-vace-1.3b", 2.15397),
        ("wan2.1-vace-14b", 17.3376),
        ("flux.1-dev", 11.901),
        ("flux.1-schnell", 11.891),
        ("stable-audio-open-1.0", 1.0569),
        ("dit-xl-2-256", 0.749826),
        ("dit-xl-2-512", 0.749826),
        ("open-sora-1.2", 1.207644),
    ],
)
def test_parameters_of_the_transformers(model, billions):
    """As docs/models.md has them."""
    assert num_parameters(model, "transformer") == pytest.approx(billions * 1e9, rel=1e-4)
    assert f"| {model} | {billions:.3f} |" in MODELS_DOCUMENT.read_text()


def test_dit_has_as_many_parameters_as_its_authors_say_with_one_copy_of_its_embeddings():
    """675 M (arXiv 2212.09748); diffusers has a copy in each of the 28 blocks."""
    found = published("dit-xl-2-256")
    transformer = empty_part(found, "transformer", "DiTTransformer2DModel")
    copies = [sum(p.numel() for p in block.norm1.emb.parameters()) for block in transformer.transformer_blocks]
    once = num_parameters("dit-xl-2-256", "transformer") - sum(copies[1:])
    assert once == pytest.approx(675e6, rel=0.001)


@pytest.mark.parametrize(
    "model", [WAN, "wan2.1-i2v-14b-720p", HUNYUAN, HUNYUAN_15, "stable-audio-open-1.0", "wan2.1-vace-1.3b"]
)
def test_weights_that_can_be_held_in_8_bits_are_as_many_as_the_blocks_have(model):
    found = published(model)
    transformer = empty_part(found, "transformer", found.files["model_index.json"]["transformer"][1])
    lists = [module for module in transformer.children() if isinstance(module, torch.nn.ModuleList)]
    layers = [layer for each in lists for layer in each.modules() if isinstance(layer, torch.nn.Linear)]
    assert block_linear_parameters(found.config("transformer")) == sum(layer.weight.numel() for layer in layers)


def _more(*values: Any) -> Any:
    """A case for `scripts/test --all`."""
    return pytest.param(*values, marks=pytest.mark.exhaustive)


def rows() -> Iterator[Any]:
    """A few of the table's: each family, with and without ranks, with a cache."""
    decoded = ((WAN, "decode"), (HUNYUAN, "decode"), (HUNYUAN, "tiled"))  # Wan's many small tiles take half a minute
    denoised = ((WAN, "denoise"), (HUNYUAN, "denoise"), (I2V_15, "denoise"))
    encoded = ((WAN, "encode-text-host"), (HUNYUAN, "encode-text-host"), (I2V_15, "encode-text-host"))
    for row in read_table():
        size = (row["width"], row["height"], row["frames"])
        what = (row["model"], row["part"])
        is_denoised = what in denoised and size == (1280, 720, 81) and row["layout"] in ("1", "ring2xulysses4")
        is_denoised |= what in denoised and row["weights_as"] == "sharded" and row["layout"] == "ulysses8"
        is_decoded = what == (HUNYUAN_15, "tiled") and size == (480, 272, 33)
        is_decoded |= what in decoded and size == (832, 480, 33) and row["layout"] != "ulysses2"
        if (is_denoised and row["cache"] != "none") or is_decoded or what in encoded:
            is_dear = row["part"] == "tiled" or row["layout"] == "ring2xulysses4"
            is_dear |= row["model"] == I2V_15 or (row["part"] == "decode" and row["layout"] == "1")
            yield _more(row) if is_dear else row


FIELDS = ("model", "part", "width", "height", "frames", "layout", "cache", "weights_as")


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row['model']}-{row['part']}-{row['layout']}")
def test_peaks_operations_and_waits_are_no_more_than_the_table_says(row):
    now = run(Case(**{name: row[name] for name in FIELDS}))
    for phase, size in row["phases"].items():
        assert now["phases"][phase] <= 1.02 * size, phase
    assert now["flop"] <= 1.02 * row["flop"]
    for name in ("cache_bytes", "num_host_reads", "num_masked", "num_exchanges"):
        assert now.get(name, 0) <= row.get(name, 0), name


@pytest.mark.parametrize("model", [WAN, "wan2.1-i2v-14b-720p", HUNYUAN, I2V, HUNYUAN_15, I2V_15])
def test_encoders_on_the_host_leave_the_gpu_and_do_the_same_work(model):
    (there,), (away,) = (
        [row for row in read_table() if (row["model"], row["part"]) == (model, part)]
        for part in ("encode-text", "encode-text-host")
    )
    assert away["weights"] < 8192  # buffers such as rotary frequencies, and Llava's places of patches
    assert away["phases"]["encode"] < 0.2 * there["weights"]
    assert away["flop"] == there["flop"]


def uneven_size(model):
    """Of an odd number of image tokens, but for DiT's 256; or of places of a frame."""
    fixed = {DIT: (256, 256, 1), SOUND: (1, 1, 1), OPEN_SORA: (272, 144, 17)}
    if model in fixed:
        return fixed[model]
    return (288, 160, 9) if model == "wan2.2-ti2v-5b" else (272, 144, 1 if model == FLUX else 9)


def denoise(model, layout, cache):
    width, height, frames = uneven_size(model)
    case = Case(model=model, part="denoise", width=width, height=height, frames=frames, layout=layout, cache=cache)
    with fake_gpu() as gpu:
        loaded = load_fake(model, published_checkpoint(model).model.denoiser_parts, NUM_LAYERS)
        with picture(case) as image:
            return denoise_on(gpu, loaded, request_of(case, image), parse_layout(layout), encodes_image=False)


@contextmanager
def picture(case: Case) -> Iterator[str | None]:
    """A file for models that take a first frame."""
    if not published_checkpoint(case.model).size_rule.takes_image:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        yield blank_picture(folder, case)


# Text refiners attend twice a call, to text alone: diffusers gives them a mask, whatever the prompt.
REFINED = {HUNYUAN: 2, I2V: 2, HUNYUAN_15: 2, I2V_15: 2}


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        (WAN, "1"),
        (WAN, "cfg2xring2xulysses2"),
        ("wan2.2-i2v-a14b", "ulysses2"),
        ("wan2.2-ti2v-5b", "1"),
        ("wan2.1-vace-1.3b", "ring2xulysses2"),
        (HUNYUAN, "ring2"),
        (HUNYUAN_15, "ulysses2"),
        (FLUX, "ring2xulysses2"),
        *(_more(model, "1") for model in ("wan2.1-vace-1.3b", HUNYUAN, HUNYUAN_15, FLUX)),
        *(_more(model, "ulysses2") for model in (I2V, I2V_15)),
    ],
)
def test_image_tokens_attend_without_a_mask(model, layout):
    """With one, attention leaves the flash kernels. It fails, too, where two tensors are of other devices or types."""
    taken = denoise(model, layout, ALWAYS_SKIPS)
    num_branches = len(published_checkpoint(model).model.branches) // parse_layout(layout).cfg
    assert taken.num_masked <= REFINED.get(model, 0) * len(taken.steps) * num_branches
    assert taken.num_unmasked > 0


# diffusers puts HunyuanVideo 1.5's three texts in order by masks, each of which the host waits to know
IN_ITS_CALLS = {HUNYUAN_15: 26}


def steps_of(model: str, layout: str, cache: str, num_steps: int) -> tuple[StepTaken, ...]:
    width, height, frames = uneven_size(model)
    case = Case(model=model, part="denoise", width=width, height=height, frames=frames, layout=layout, cache=cache)
    with fake_gpu() as gpu:
        loaded = load_fake(model, published_checkpoint(model).model.denoiser_parts, NUM_LAYERS)
        with picture(case) as image:
            request = replace(request_of(case, image), num_inference_steps=num_steps)
            return denoise_on(gpu, loaded, request, parse_layout(layout), encodes_image=False).steps


@pytest.mark.parametrize(
    ("model", "layout", "computed", "skipped", "planned"),
    [
        (WAN, "1", 1, 2, 0),  # the second branch follows the first one to a computed step
        (WAN, "ulysses2", 4, 6, 2),
        ("wan2.2-ti2v-5b", "cfg2", 3, 3, 1),
        (HUNYUAN, "1", 1, 1, 0),
        *(_more(model, "ulysses2", 4, 6, 2) for model in ("wan2.2-i2v-a14b", "wan2.2-ti2v-5b")),
        _more("wan2.1-vace-1.3b", "1", 1, 2, 0),
        *(_more(model, "ulysses2", 3, 3, 1) for model in (HUNYUAN, I2V)),
        (HUNYUAN_15, "ulysses2", 4, 6, 2),
        (FLUX, "ulysses2", 3, 3, 1),
        (OPEN_SORA, "ulysses2", 4, 4, 2),
    ],
)
def test_the_host_waits_for_the_gpu_a_few_times_a_step(model, layout, computed, skipped, planned):
    """Each wait drains the GPU's queue, and rules CUDA graphs out."""
    taken = steps_of(model, layout, ALWAYS_SKIPS, 5)
    reads = [step.num_host_reads - IN_ITS_CALLS.get(model, 0) for step in taken]
    assert [step.is_computed for step in taken] == [True, True, False, False, True]
    assert max(reads[0], reads[1], reads[4]) <= computed
    assert reads[2] <= skipped
    assert reads[3] <= planned


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        (WAN, "ulysses2"),
        (HUNYUAN, "ulysses2"),
        *(_more(*case) for case in (("wan2.2-i2v-a14b", "1"), (HUNYUAN_15, "1"), (FLUX, "ulysses2"))),
    ],
)
def test_forecasts_of_whole_steps_never_have_the_host_wait(model, layout):
    """But for a model's own waits, and one of HunyuanVideo and FLUX for the noise levels, in the first step."""
    taken = steps_of(model, layout, "fitted(speedup=2)", 16)
    own = [IN_ITS_CALLS.get(model, 0) if step.is_computed else 0 for step in taken]
    reads = [step.num_host_reads - waits for step, waits in zip(taken, own, strict=True)]
    assert {step.is_computed for step in taken} == {True, False}
    assert reads[0] <= 1
    assert max(reads[1:]) == 0
    assert not any(step.exchanges for step in taken if not step.is_computed)


@pytest.mark.parametrize("model", [WAN, HUNYUAN, HUNYUAN_15, *map(_more, ("wan2.1-t2v-1.3b", I2V_15))])
@pytest.mark.parametrize("layout", ["ring2xulysses2", *map(_more, ("1", "ulysses2"))])
def test_operations_in_closed_form_are_those_that_pytorch_counts(model, layout):
    degrees, checkpoint = parse_layout(layout), published_checkpoint(model)
    taken = denoise(model, layout, ALWAYS_SKIPS)
    config = dict(checkpoint.configs.transformer) | {"num_layers": NUM_LAYERS}
    config |= {"num_single_layers": NUM_LAYERS} if "num_single_layers" in config else {}
    everywhere = 3 * 9 * 17
    here = -(-everywhere // degrees.sequence_ranks)
    said = forward_flop(config, here=here, everywhere=everywhere, sequence_ranks=degrees.sequence_ranks)
    num_branches = 1 if model == HUNYUAN else 2
    # a ulysses group's queries are a token more than an even share; the rest is a timestep's embedding
    assert num_branches * said.total == pytest.approx(taken.flop_of(is_computed=True), rel=0.01)
    assert num_branches * said.skipped(1) == pytest.approx(taken.flop_of(is_computed=False), rel=0.01)


@pytest.mark.parametrize("model", [WAN, HUNYUAN])
def test_a_series_of_each_layer_holds_what_the_closed_form_says(model):
    taken = denoise(model, "1", "taylorseer(interval=2,order=1)")
    config = dict(published_checkpoint(model).configs.transformer)
    config |= {name: NUM_LAYERS for name in ("num_layers", "num_single_layers") if name in config}
    plan = published_checkpoint(model).plan_cache("taylorseer(interval=2,order=1)")
    said = layer_cache_bytes(plan, config, here=3 * 9 * 17, num_branches=1 if model == HUNYUAN else 2)
    assert said == taken.cache_bytes


@pytest.mark.parametrize("model", [WAN, *map(_more, (HUNYUAN, HUNYUAN_15))])
def test_what_is_gathered_of_sharded_weights_does_not_depend_on_the_number_of_blocks(model):
    case = Case(
        model=model,
        part="denoise",
        width=832,
        height=480,
        frames=33,
        layout="ulysses4",
        cache=ALWAYS_SKIPS,
        weights_as="sharded",
    )
    assert run(case, num_layers=2)["phases"] == run(case, num_layers=4)["phases"]


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_weights_are_never_whole_on_a_gpu_that_they_reach_in_8_bits(kind):
    found = published(WAN)
    transformer = empty_part(found, "transformer", "WanTransformer3DModel", num_layers=8)
    with fake_gpu() as gpu:
        fake_weights(transformer, torch.bfloat16, (), torch.device("cpu"))
        whole = sum(parameter.nbytes for parameter in transformer.parameters())
        quantize(transformer, LoadOptions(device="cuda", quantize=kind), GPU)
        transformer.to(GPU)
        assert gpu.ledger.live_bytes < 0.55 * whole
        assert gpu.ledger.peak_bytes < 0.65 * whole


def test_transients_do_not_depend_on_the_number_of_blocks():
    case = Case(model=HUNYUAN, part="denoise", width=832, height=480, frames=33, layout="ulysses2", cache=ALWAYS_SKIPS)
    assert run(case, num_layers=2)["phases"] == run(case, num_layers=3)["phases"]


@pytest.mark.parametrize("cache", ["none", _more(ALWAYS_SKIPS)])
def test_hints_wait_in_memory_until_their_block_has_run(cache):
    """One hint with two blocks, three with six; all that the published model has are reckoned from either."""
    case = Case(model="wan2.1-vace-1.3b", part="denoise", width=480, height=272, frames=17, cache=cache)
    runs = [run(case, num_layers=number) for number in (2, 6)]
    few, more = (max(with_tokens(row)["phases"].values()) for row in runs)
    assert few == pytest.approx(more, rel=1e-3)
    assert max(runs[0]["phases"].values()) < max(runs[1]["phases"].values())


def logs_of(model: str, layout: str, cache: str) -> list[list[Exchange]]:
    """Each rank's exchanges; 459 image tokens, or 153 of FLUX or of a frame of Open-Sora, which no number of ranks but
    3, 9 and 17 divides."""
    width, height, frames = uneven_size(model)
    case = Case(model=model, part="denoise", width=width, height=height, frames=frames, layout=layout, cache=cache)
    logs = []
    with fake_gpu() as gpu:
        loaded = load_fake(model, published_checkpoint(model).model.denoiser_parts, NUM_LAYERS)
        for rank in range(parse_layout(layout).world_size):
            with picture(case) as image:
                request = request_of(case, image)
                taken = denoise_on(gpu, loaded, request, parse_layout(layout), rank, encodes_image=False)
            logs.append(taken.exchanges)
    return logs


@pytest.mark.parametrize(
    ("model", "layout", "cache"),
    [
        *itertools.product(["wan2.1-t2v-1.3b"], ["ulysses2", "cfg2"], [ALWAYS_SKIPS]),
        ("wan2.2-i2v-a14b", "cfg2xring2", ALWAYS_SKIPS),
        ("wan2.1-vace-1.3b", "ring2xulysses2", ALWAYS_SKIPS),
        (HUNYUAN, "ring2xulysses2", ALWAYS_SKIPS),
        (HUNYUAN_15, "cfg2xulysses2", ALWAYS_SKIPS),
        (FLUX, "ring2xulysses2", "none"),
        (OPEN_SORA, "ring2xulysses2", ALWAYS_SKIPS),
        (SOUND, "ulysses2", ALWAYS_SKIPS),
        *(
            _more(*case)
            for case in (
                *itertools.product(["wan2.1-t2v-1.3b"], ["ulysses2", "ring2", "cfg2"], ["none"]),
                ("wan2.1-t2v-1.3b", "ring2", ALWAYS_SKIPS),
                ("wan2.1-t2v-1.3b", "cfg2xring2xulysses2", "none"),
                ("wan2.1-t2v-1.3b", "ring2xulysses2", "taylorseer(interval=2,order=1)"),
                ("wan2.2-ti2v-5b", "ring2xulysses2", ALWAYS_SKIPS),
                ("wan2.1-t2v-1.3b", "cfg2xring2xulysses2", ALWAYS_SKIPS),
                ("wan2.1-t2v-1.3b", "cfg2xulysses2", ALWAYS_SKIPS),
                ("wan2.1-t2v-1.3b", "cfg2xring2", ALWAYS_SKIPS),
                ("wan2.2-ti2v-5b", "ulysses2", "none"),
                ("wan2.1-vace-1.3b", "ulysses2", "none"),
                (HUNYUAN, "ring2xulysses2", "none"),
                (I2V, "ring2xulysses2", ALWAYS_SKIPS),
                (HUNYUAN_15, "ulysses2", "none"),
                (I2V_15, "ring2xulysses2", ALWAYS_SKIPS),
                (FLUX, "ring2xulysses2", ALWAYS_SKIPS),
                (OPEN_SORA, "ulysses2", "none"),
                (SOUND, "ring2xulysses2", "none"),
                (DIT, "ring3", ALWAYS_SKIPS),
            )
        ),
    ],
)
def test_all_ranks_issue_the_same_exchanges_in_the_same_order(model, layout, cache):
    logs = logs_of(model, layout, cache)
    assert all(len(log) > 0 for log in logs)
    assert disagreement(logs) is None


def test_a_rank_that_skips_an_exchange_is_found(monkeypatch):
    real = GangConsensus.leader_value

    def skips_once(self, numbers):
        return numbers if self.mesh.rank == 1 else real(self, numbers)

    monkeypatch.setattr(GangConsensus, "leader_value", skips_once)
    assert disagreement(logs_of("wan2.1-t2v-1.3b", "ulysses2", ALWAYS_SKIPS)) is not None


def test_a_part_on_the_wrong_device_is_found():
    case = Case(model=WAN, part="denoise", width=272, height=144, frames=9)
    with fake_gpu() as gpu:
        loaded = load_fake(WAN, ("transformer",), NUM_LAYERS)
        loaded.pipe.transformer.proj_out.bias = torch.nn.Parameter(torch.empty(64), requires_grad=False)
        with pytest.raises(RuntimeError, match="device"):
            denoise_on(gpu, loaded, request_of(case), parse_layout("1"))
