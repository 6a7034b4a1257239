"""Where weights go while they are loaded for a GPU: what diffusers is told, as no GPU is here."""

import pytest
import torch
from diffusers import DiffusionPipeline

from cineray.pipeline.loading import model as loading
from cineray.pipeline.loading.checkpoint import open_checkpoint
from cineray.pipeline.loading.model import load_model
from cineray.pipeline.loading.options import LoadOptions
from cineray.pipeline.loading.prepare import order_for_gpus

pytestmark = pytest.mark.slow


@pytest.fixture
def device_maps(monkeypatch):
    """What diffusers is told of where weights go; those for a CUDA device, which is not here, go to the CPU."""
    told = []
    from_pretrained = DiffusionPipeline.from_pretrained.__func__

    def recorded(kind, *arguments, device_map, **options):
        told.append(device_map)
        return from_pretrained(kind, *arguments, device_map=device_map and "cpu", **options)

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", classmethod(recorded))
    monkeypatch.setattr(DiffusionPipeline, "to", lambda pipe, device: told.append(("to", str(device))))
    monkeypatch.setattr(loading, "check_device", lambda device: None)
    return told


@pytest.mark.parametrize(
    ("skipped", "options", "told"),
    [
        ((), {"text_encoders": "gpu"}, ["cuda"]),
        (("text_encoder", "image_encoder", "vae"), {}, ["cuda"]),  # a rank
        (("text_encoder", "image_encoder"), {"text_encoders": "host"}, ["cuda"]),  # which has none to keep there
        ((), {"device": "cpu"}, [None, ("to", "cpu")]),
    ],
)
def test_on_a_gpu_tensors_go_there_one_by_one(device_maps, skipped, options, told):
    """Otherwise every rank would have a copy of all weights in host memory first."""
    asked = {"device": "cuda", "attention": "native", "dtype": "bfloat16"} | options
    model = load_model(open_checkpoint("tiny-wan"), LoadOptions(**asked), skipped)
    assert device_maps == told
    plain = load_model(open_checkpoint("tiny-wan"), LoadOptions(dtype="bfloat16"), skipped)
    for name, module in plain.pipe.components.items():
        if isinstance(module, torch.nn.Module):
            loaded = getattr(model.pipe, name).state_dict()
            for key, tensor in module.state_dict().items():
                assert loaded[key].dtype == tensor.dtype, (name, key)
                assert torch.equal(loaded[key], tensor), (name, key)


@pytest.mark.parametrize("options", [{"text_encoders": "host"}, {"offload": "model"}])
def test_what_stays_on_the_host_is_not_sent_to_the_gpu_first(device_maps, monkeypatch, options):
    moved = []
    monkeypatch.setattr(loading, "keep_encoders_on_host", lambda pipe, encoders, device: moved.append(encoders))
    monkeypatch.setattr(DiffusionPipeline, "enable_model_cpu_offload", lambda pipe: moved.append("offload"))
    asked = LoadOptions(device="cuda", attention="native", dtype="bfloat16", **options)
    load_model(open_checkpoint("tiny-wan"), asked)
    assert device_maps == [None]
    assert moved == [{"text_encoder", "image_encoder"} if "text_encoders" in options else "offload"]


@pytest.mark.usefixtures("device_maps")
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_on_a_gpu_kernels_of_3d_convolutions_are_channels_last(device):
    options = LoadOptions(device=device, attention="native", dtype="bfloat16", text_encoders="auto")
    vae = load_model(open_checkpoint("tiny-wan"), options, ("text_encoder", "image_encoder")).pipe.vae
    convolutions = [module for module in vae.modules() if isinstance(module, torch.nn.Conv3d)]
    wide = [c for c in convolutions if min(c.weight.shape[:2]) > 1 and max(c.weight.shape[2:]) > 1]
    assert len(wide) > 20
    ordered = [c.weight.is_contiguous(memory_format=torch.channels_last_3d) for c in wide]
    assert ordered == [device == "cuda"] * len(wide)


@pytest.mark.parametrize("name", ["wan", "hunyuan", "hunyuan15", "ti2v"])
def test_in_the_order_of_gpus_a_vae_decodes_the_same(checkpoint_folder, name):
    """On the CPU of this machine; every view and reshape of the decoders takes that order."""
    checkpoint = open_checkpoint(str(checkpoint_folder(name)))
    pipe = load_model(checkpoint, LoadOptions(), checkpoint.model.encoder_parts).pipe
    num_channels = pipe.vae.config.get("z_dim") or pipe.vae.config.latent_channels
    latents = torch.randn(1, num_channels, 3, 4, 6)
    frames = pipe.vae.decode(latents, return_dict=False)[0]
    order_for_gpus(pipe.vae)
    torch.testing.assert_close(pipe.vae.decode(latents, return_dict=False)[0], frames, rtol=1e-3, atol=1e-4)
