"""Real diffusers classes at toy size, with random weights, in ordinary checkpoint folders."""

import os
import signal
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch loads; more threads than free cores wait by spinning
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 gets 3 % of a core beside the other worker of pytest-xdist

import hypothesis
import pytest
import torch
from fast_watch import FastWatch

from cineray.jobs.exact_products import multiply_exactly

multiply_exactly()  # as in every process that cineray starts; read at MKL's first product

hypothesis.settings.register_profile(
    "no deadline", deadline=None
)  # a first import of scipy takes seconds on busy cores
hypothesis.settings.load_profile("no deadline")

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "scripts"))  # the trainer's text encoders and tokenizers serve the tests too


def wan_vae(**changes: Any) -> Any:
    """AutoencoderKLWan with 4 latent channels."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.5, 1.0, 2.0],
        **changes,
    ).eval()


def hunyuan_transformer(**changes: Any) -> Any:
    """HunyuanVideoTransformer3DModel with 2 dual-stream and 2 single-stream blocks."""
    from diffusers import HunyuanVideoTransformer3DModel
    from tiny.text import TEXT_DIM

    return HunyuanVideoTransformer3DModel(
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=TEXT_DIM,
        pooled_projection_dim=TEXT_DIM,
        rope_axes_dim=(4, 6, 6),
        **{"in_channels": 4, **changes},
    ).eval()


def _wan_parts(seed: int, **transformer: Any) -> dict[str, Any]:
    from diffusers import UniPCMultistepScheduler, WanTransformer3DModel
    from tiny.text import TEXT_DIM, new_umt5

    torch.manual_seed(seed)
    tokenizer, text_encoder = new_umt5()
    return {
        "tokenizer": tokenizer,
        "text_encoder": text_encoder.eval(),
        "vae": wan_vae(),
        "transformer": WanTransformer3DModel(
            attention_head_dim=12,
            text_dim=TEXT_DIM,
            freq_dim=32,
            ffn_dim=64,
            num_layers=3,
            out_channels=4,
            **{"num_attention_heads": 4, "in_channels": 4, **transformer},
        ).eval(),
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
        ),
    }


def build_wan(seed: int = 0, **transformer: Any):
    """WanPipeline with 3 blocks and 4 latent channels."""
    from diffusers import WanPipeline

    return WanPipeline(**_wan_parts(seed, **transformer))


def build_wan_i2v(seed: int = 0):
    """WanImageToVideoPipeline with an image encoder, as in Wan 2.1 I2V."""
    from diffusers import WanImageToVideoPipeline
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(seed + 100)
    vision = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=32,
            patch_size=16,
        )
    )
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    parts = _wan_parts(seed, in_channels=4 + 4 + 4, image_dim=32, added_kv_proj_dim=48)
    return WanImageToVideoPipeline(image_encoder=vision.eval(), image_processor=processor, **parts)


def build_hunyuan(seed: int = 0):
    """HunyuanVideoPipeline with 2 dual-stream and 2 single-stream blocks and embedded guidance."""
    from diffusers import (
        AutoencoderKLHunyuanVideo,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoPipeline,
    )
    from tiny.text import new_clip, new_llama

    torch.manual_seed(seed)
    tokenizer, text_encoder = new_llama()
    tokenizer_2, text_encoder_2 = new_clip()
    return HunyuanVideoPipeline(
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2.eval(),
        tokenizer_2=tokenizer_2,
        transformer=hunyuan_transformer(),
        vae=AutoencoderKLHunyuanVideo(
            block_out_channels=(8, 8, 8, 8),  # type: ignore[arg-type]  # diffusers annotates tuple[int]
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=4,
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )


def build_flux(seed: int = 0):
    """FluxPipeline with 2 dual-stream and 2 single-stream blocks."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from tiny.text import TEXT_DIM, new_clip, new_umt5
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(seed)
    tokenizer, text_encoder = new_clip()
    tokenizer_2, _ = new_umt5()
    t5 = T5Config(vocab_size=len(tokenizer_2), d_model=TEXT_DIM, d_kv=16, d_ff=64, num_layers=1, num_heads=4)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=AutoencoderKL(
            block_out_channels=(8,),
            norm_num_groups=4,
            latent_channels=4,
            shift_factor=0.1,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ).eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(t5).eval(),
        tokenizer_2=tokenizer_2,
        transformer=FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=TEXT_DIM,
            pooled_projection_dim=TEXT_DIM,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        ).eval(),
    )


BUILDERS = {"wan": build_wan, "wan_i2v": build_wan_i2v, "hunyuan": build_hunyuan}


FOLDERS = {"distributed": "ranks", "parity": "slow", "golden": "slow"}
DEAREST_FIRST = ("ray", "ranks", "slow", "process", "exhaustive")  # marks of tests that are not `fast`
WATCH = pytest.StashKey[FastWatch]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[WATCH] = FastWatch()
    # what starts pytest in the background may have it ignore these, and so would all that tests start
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.hookimpl(tryfirst=True)  # before marks select, and before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks folders, `fast` what has no other mark, and what xdist keeps on one worker, dearest first.

    A file stays together, for its fixtures; so does all that takes a Ray, of which there must not be two, and all that
    shares the ranks. These begin first, for they take longest.
    """
    first: dict[str, int] = {}
    groups = []
    for item in items:
        for folder, mark in FOLDERS.items():
            if folder in item.path.parts:
                item.add_marker(mark)
        marks = [name for name in DEAREST_FIRST if item.get_closest_marker(name)]
        if not marks:
            item.add_marker(pytest.mark.fast)
        groups.append(next((name for name in marks if name in ("ray", "ranks")), item.path.stem))
        item.add_marker(pytest.mark.xdist_group(groups[-1]))
        turn = DEAREST_FIRST.index(marks[0]) if marks else len(DEAREST_FIRST)
        first[groups[-1]] = min(turn, first.get(groups[-1], turn))
    items[:] = [item for _, item in sorted(zip(groups, items, strict=True), key=lambda pair: first[pair[0]])]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Refuses to begin where groups are not kept together: two Rays at once would wait for each other."""
    if session.config.getoption("loadgroup", False) and not all("@" in item.nodeid for item in session.items):
        raise pytest.UsageError("this pytest-xdist does not keep groups together with this pytest: see pyproject.toml")


def _watched(item: pytest.Item) -> Generator[None, object, object]:
    if item.get_closest_marker("fast") is None:
        return (yield)
    watch = item.config.stash[WATCH]
    watch.begin()
    try:
        result = yield
    finally:
        started = watch.end()
    if started:
        marks = ", ".join(DEAREST_FIRST)
        pytest.fail(f"a fast test starts nothing; mark it with one of {marks}: {'; '.join(started)}", pytrace=False)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, object, object]:
    return (yield from _watched(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    return (yield from _watched(item))


@pytest.fixture(scope="session")
def checkpoint_folder(tmp_path_factory):
    """Factory: name in BUILDERS or MORE_MODELS, or open_sora -> folder of a saved random checkpoint, made once."""
    from more_models import MORE_MODELS
    from open_sora_files import convert, publish

    builders = {**BUILDERS, **MORE_MODELS}
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / name
            if name == "open_sora":
                assert convert(publish(tmp_path_factory.mktemp("published")), made[name]) == 0
            else:
                builders[name]().save_pretrained(made[name])
        return made[name]

    return folder


@pytest.fixture(scope="session")
def loaded(checkpoint_folder):
    """Factory: name in BUILDERS or MORE_MODELS -> LoadedModel on the CPU in float32, made once."""
    from cineray.pipeline.loading.checkpoint import open_checkpoint
    from cineray.pipeline.loading.model import LoadOptions, load_model

    made = {}

    def model(name: str):
        if name not in made:
            made[name] = load_model(open_checkpoint(str(checkpoint_folder(name))), LoadOptions())
        return made[name]

    return model


@pytest.fixture(scope="session")
def ranks():
    """A RankPool: local processes that run a function together, job after job."""
    from rank_pool import RankPool

    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture
def new_request():
    """Factory of a small valid ClipRequest; keyword arguments override."""
    from cineray.pipeline.request import ClipRequest

    def request(**changes) -> ClipRequest:
        values = {
            "id": "1",
            "prompt": "a red circle moving left on a navy background",
            "width": 32,
            "height": 32,
            "num_frames": 5,
            "num_inference_steps": 4,
            "guidance_scale": 4.0,
            "fps": 8,
        }
        return ClipRequest(**(values | changes))

    return request
