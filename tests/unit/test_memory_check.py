"""What does not fit into a GPU is refused before weights are read, with the nearest setup that does; by forecast."""

import json
from dataclasses import replace

import pytest

from cineray.distributed.layout import Layout, parse_layout
from cineray.jobs import memory_check as memory_check_module
from cineray.jobs.cli.main import main
from cineray.jobs.manifest.check import RunDefaults, check_manifest, check_prompts
from cineray.jobs.memory_check import MemoryCheck, memory_check
from cineray.jobs.outlook import Outlook
from cineray.jobs.run_options import RunOptions
from cineray.pipeline.footprint.fit import (
    FINISHER,
    RANK,
    SHARED,
    Setup,
    check_room,
    demands,
    fits,
    nearest_fit,
    published_like,
    shortage,
)
from cineray.pipeline.footprint.forecast import forecast
from cineray.pipeline.footprint.published import published, published_checkpoint
from cineray.pipeline.loading.checkpoint import open_checkpoint
from cineray.pipeline.loading.errors import LoadingError
from cineray.pipeline.loading.options import LoadOptions
from cineray.pipeline.request import ClipRequest, InputError

WAN, HUNYUAN = published_checkpoint("wan2.1-t2v-14b"), published_checkpoint("hunyuan-video")
CLIP = ClipRequest(
    id="1",
    prompt="a cat",
    width=1280,
    height=720,
    num_frames=81,
    num_inference_steps=50,
    guidance_scale=5.0,
    fps=16,
    cache="dicache",
)
CUDA = LoadOptions(device="cuda")
H100, L40S, RTX4090 = 85_520_000_000, 48_300_000_000, 25_300_000_000


def on_ray(layout: str = "1", shares_gpu: bool = True, **options) -> Setup:
    return Setup(
        options=replace(CUDA, **options), layout=parse_layout(layout), has_finishers=True, shares_gpu=shares_gpu
    )


def of(setup: Setup, place: str, model=WAN):
    return next(d for d in demands(model, CLIP, setup) if d.place == place)


def test_a_rank_beside_a_finisher_takes_what_the_planner_says_less_its_margin():
    memory, _ = forecast(
        WAN.name, width=1280, height=720, frames=81, cfg=1, ring=1, ulysses=8, cache="dicache", decode="finisher"
    )
    shared = of(on_ray("ulysses8"), SHARED)
    parts = memory.weights + memory.activations + memory.cache + memory.vae + memory.text_encoder
    assert shared.tensor_bytes == parts
    apart = on_ray("ulysses8", shares_gpu=False, text_encoders="host")
    assert of(apart, RANK).tensor_bytes + of(apart, FINISHER).tensor_bytes == parts


def test_text_encoders_stay_on_a_gpu_that_a_finisher_has_for_itself():
    """UMT5-XXL has 11.4 GB, of which a layer has 2.1 GB at most: its table of words."""
    beside, apart = of(on_ray("ulysses8"), SHARED), of(on_ray("ulysses8", shares_gpu=False), FINISHER)
    assert beside.parts["text encoders"] == pytest.approx(2.1e9, rel=0.01)
    assert apart.parts["text encoders"] == pytest.approx(11.49e9, rel=0.01)
    kept = of(on_ray("ulysses8", text_encoders="gpu"), SHARED)
    assert kept.parts["text encoders"] == apart.parts["text encoders"]
    (alone,) = demands(WAN, CLIP, Setup(options=CUDA))
    (host,) = demands(WAN, CLIP, Setup(options=replace(CUDA, text_encoders="host")))
    assert alone.tensor_bytes - host.tensor_bytes == pytest.approx(9.38e9, rel=0.01)


def test_one_process_does_one_thing_after_the_other():
    (alone,) = demands(WAN, CLIP, Setup(options=CUDA))
    assert alone.tensor_bytes < of(on_ray(), SHARED).tensor_bytes
    assert "decode" in alone.parts  # which takes more than a step with its cache
    (offloaded,) = demands(WAN, CLIP, Setup(options=replace(CUDA, offload="model")))
    assert "text encoders" not in offloaded.parts
    assert offloaded.parts["transformer"] == alone.parts["transformer"]
    (by_layer,) = demands(WAN, CLIP, Setup(options=replace(CUDA, offload="group")))
    assert by_layer.parts["transformer"] < alone.parts["transformer"] / 50


@pytest.mark.parametrize(
    ("changes", "place", "share"),
    [
        ({"quantize": "fp8"}, RANK, {"transformer": 0.5}),
        ({"vae_tiling": True}, FINISHER, {"decode": 0.155}),
        ({"vae_dtype": "bfloat16"}, FINISHER, {"decode": 0.5, "VAE": 0.5}),
        ({"dtype": "float32"}, RANK, {"transformer": 2.0, "step": 2.0, "cache": 2.0}),
    ],
)
def test_options_change_the_parts_that_they_are_about(changes, place, share):
    before, after = of(on_ray(shares_gpu=False), place), of(on_ray(shares_gpu=False, **changes), place)
    for name, size in before.parts.items():
        assert after.parts[name] / size == pytest.approx(share.get(name, 1.0), rel=0.1), name


def test_what_is_advised_fits_with_the_margin_and_what_is_refused_cannot():
    for model, setup, memory in (
        (WAN, Setup(options=CUDA), L40S),
        (WAN, on_ray("ulysses8"), L40S),
        (WAN, on_ray(), RTX4090),
        (HUNYUAN, on_ray("ulysses2"), L40S),
    ):
        assert any(shortage(d, memory) for d in demands(model, CLIP, setup))
        advised = nearest_fit(model, CLIP, setup, memory, 8)
        assert advised is not None
        assert fits(model, CLIP, advised[1], memory)


def test_advice_names_the_smallest_change_first():
    clip = replace(CLIP, width=832, height=480)
    found = nearest_fit(WAN, clip, Setup(options=CUDA), L40S, max_ranks=1)
    assert found is not None
    assert found[0] == "--text-encoders host"
    found = nearest_fit(WAN, replace(CLIP, cache="none"), Setup(options=CUDA), L40S, max_ranks=1)
    assert found is not None
    assert found[0] == "--offload model"
    found = nearest_fit(WAN, CLIP, on_ray("ulysses2"), 60_000_000_000, max_ranks=8)
    assert found is not None
    assert found[0] == "--decode gang"
    found = nearest_fit(WAN, CLIP, on_ray(vae_tiling=True, offload="group"), RTX4090, max_ranks=8)
    assert found is not None
    assert found[0] == "--sp 2"
    assert found[1].layout == Layout(ulysses=2)
    assert nearest_fit(WAN, CLIP, Setup(options=CUDA), 2_000_000_000, 8) is None


def test_a_prompt_that_does_not_fit_is_one_line_before_anything_loads():
    defaults = RunDefaults(
        seed=0, width=1280, height=720, num_frames=81, num_inference_steps=50, guidance_scale=5.0, fps=16, cache="none"
    )
    check = MemoryCheck(WAN, Setup(options=CUDA), L40S, max_ranks=1)
    with pytest.raises(InputError) as caught:
        check_prompts(["a cat"], defaults, WAN, more=check)
    (line,) = caught.value.lines
    assert line.startswith(
        "prompt 1: a clip of 1280x720, 81 frames does not fit, by forecast: it takes 59.5 GB of the GPU"
    )
    assert line.endswith("which has 48.3 GB; with --offload model it takes 37.3 GB and fits")
    assert check_prompts(["a cat"], defaults, WAN, more=MemoryCheck(WAN, Setup(options=CUDA), H100))


def test_rows_of_a_manifest_are_judged_each_by_its_size(tmp_path):
    defaults = RunDefaults(
        seed=0, width=832, height=480, num_frames=81, num_inference_steps=50, guidance_scale=5.0, fps=16, cache="none"
    )
    path = tmp_path / "m.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b", "width": 1280, "height": 720}\n{"prompt": "c"}\n')
    with pytest.raises(InputError) as caught:
        check_manifest(path, defaults, WAN, more=MemoryCheck(WAN, Setup(options=CUDA), 55_000_000_000))
    (line,) = caught.value.lines
    assert "m.jsonl line 2: a clip of 1280x720" in line


def test_what_is_near_the_limit_is_warned_of_and_not_refused():
    (need,) = demands(WAN, CLIP, Setup(options=CUDA))
    check = MemoryCheck(WAN, Setup(options=CUDA), need.tensor_bytes + 1, max_ranks=1)
    assert check(CLIP) is None
    assert "may run out of memory, by forecast: it takes 59.5 GB" in check.warnings[0]
    assert MemoryCheck(WAN, Setup(options=CUDA), need.tensor_bytes - 1)(CLIP) is not None


def test_unknown_models_and_unknown_gpus_refuse_nothing(monkeypatch):
    run = RunOptions()
    assert memory_check(open_checkpoint("tiny-wan"), CUDA, run) is None
    assert memory_check(WAN, LoadOptions(), run) is None
    monkeypatch.setattr(memory_check_module, "gpu_memory_bytes", lambda: ())
    check = memory_check(WAN, CUDA, run)
    assert check is not None
    assert check(CLIP) is None
    assert check.warnings == ()
    assert check.largest()[0].tensor_bytes > 50e9  # what a dry run shows


def test_the_gpus_here_decide_for_a_local_run_and_not_for_a_cluster(monkeypatch):
    monkeypatch.setattr(memory_check_module, "gpu_memory_bytes", lambda: (L40S, L40S))
    here = memory_check(WAN, CUDA, RunOptions(sp=2))
    assert here is not None
    refusal = here(CLIP)
    assert refusal is not None
    assert "a GPU with a rank and a finisher" in refusal
    assert memory_check(WAN, CUDA, RunOptions(sp=2, address="10.0.0.1:6379"))(CLIP) is None  # type: ignore[misc]


def test_an_actor_refuses_what_its_gpu_cannot_hold():
    wanted = demands(WAN, CLIP, on_ray("ulysses8"))
    check_room(wanted, (RANK, SHARED), H100)
    check_room(wanted, (FINISHER,), RTX4090)
    with pytest.raises(LoadingError, match=r"takes 53.7 GB of a GPU with a rank and a finisher .*which has 48.3 GB"):
        check_room(wanted, (RANK, SHARED), L40S)


def test_a_clip_that_was_checked_is_told_with_what_it_takes():
    """For gangs that came up while the manifest was checked still."""
    check = MemoryCheck(WAN, on_ray("ulysses8"), None)
    small = replace(CLIP, width=832, height=480)
    assert check(CLIP) is check(small) is None
    assert check.of(replace(CLIP, id="7", prompt="a dog", seed=3), shares_gpu=True) == check.largest()
    assert check.of(small, shares_gpu=True) == demands(WAN, small, on_ray("ulysses8"))
    assert [d.place for d in check.of(small, shares_gpu=False)] == [RANK, FINISHER]
    assert check.of(replace(CLIP, num_frames=49), shares_gpu=True) == ()
    outlook = Outlook(check)
    idle = replace(CLIP, num_inference_steps=4)
    assert outlook(idle) is None
    assert outlook.demands_of(idle, shares_gpu=True) == demands(WAN, replace(idle, cache="none"), on_ray("ulysses8"))
    assert Outlook().demands_of(CLIP, shares_gpu=True) == ()


def test_a_folder_that_is_built_like_a_published_checkpoint_is_known_as_it():
    folder = replace(WAN, name="/data/wan", source="/data/wan", is_local=True)
    assert published_like(folder) == WAN
    fewer = {**WAN.configs.transformer, "num_layers": 2}
    assert published_like(replace(folder, configs=replace(WAN.configs, transformer=fewer))) is None
    assert published_like(open_checkpoint("tiny-hunyuan")) is None


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub's cache with Wan 14B's configuration, no weights; and two pretended GPUs of 48 GB."""
    found = published(WAN.name)
    cache = tmp_path / "hub" / f"models--{found.repository.replace('/', '--')}"
    for name, content in found.files.items():
        file = cache / "snapshots" / ("0" * 40) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(memory_check_module, "gpu_memory_bytes", lambda: (L40S, L40S))


@pytest.mark.usefixtures("hub")
def test_the_command_refuses_in_one_line_and_a_dry_run_shows_the_forecast(tmp_path, capsys):
    out = tmp_path / "out"
    command = ["render", "a cat", "--model", "wan2.1-t2v-14b", "--device", "cuda", "--out", str(out)]
    large = ["--width", "1280", "--height", "720"]
    assert main([*command, *large]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "cineray: prompt 1: a clip of 1280x720, 81 frames does not fit, by forecast: it takes 59.5 GB"
    )
    assert not out.exists()
    assert main([*command, *large, "--dry-run", "--json"]) == 2
    answer = json.loads(capsys.readouterr().out)
    assert answer["refused"] == 1
    assert answer["memory"][0]["bytes"] == sum(answer["memory"][0]["parts"].values()) > L40S
    assert main([*command, *large, "--offload", "group", "--dry-run"]) == 0
    assert "memory, by forecast: 23.9 GB of the GPU (transformer 0.3" in capsys.readouterr().out
    assert not out.exists()


@pytest.mark.parametrize(
    ("changes", "options"), [({"shards_weights": True}, {}), ({}, {"quantize": "int8"}), ({}, {"quantize": "fp8"})]
)
def test_wan_14b_at_480p_fits_four_cards_of_24_gb_whose_weights_are_shared_or_in_8_bits(changes, options):
    """`--sp 4 --shard-weights`, or `--quantize int8`: the gang decodes by itself, text encoders wait in host memory."""
    clip = replace(CLIP, width=832, height=480)
    setup = replace(on_ray("ulysses4", **options), decodes_on_gang=True, **changes)
    assert fits(WAN, clip, setup, RTX4090)
    assert not fits(WAN, clip, replace(setup, options=replace(setup.options, text_encoders="gpu")), RTX4090)
    whole = replace(on_ray("ulysses4"), decodes_on_gang=True)
    assert any(shortage(d, RTX4090) for d in demands(WAN, clip, whole))
