"""Text encoders whose weights wait in host memory: the same prompts, and nothing left on the device between them."""

import pytest
import torch
from more_models import CLIPS, clip_of

from cineray.jobs.gangs import finisher_work
from cineray.jobs.gangs.finisher_work import FinisherWork
from cineray.jobs.gangs.messages import RunSpec
from cineray.jobs.run_options import RunOptions
from cineray.pipeline.loading import model as loading
from cineray.pipeline.loading.checkpoint import open_checkpoint
from cineray.pipeline.loading.model import load_model
from cineray.pipeline.loading.options import LoadOptions
from cineray.pipeline.loading.prepare import keep_encoders_on_host
from cineray.pipeline.request import InputError

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


def devices(pipe, names):
    parts = [part for name in names if isinstance(part := getattr(pipe, name, None), torch.nn.Module)]
    return {parameter.device.type for part in parts for parameter in part.parameters()}


@pytest.mark.parametrize("name", ["wan", "hunyuan", "hunyuan_concat", "hunyuan15_image", "flux", "stable_audio"])
def test_prompts_are_the_same_bit_for_bit_and_weights_are_gone_between_them(
    name, checkpoint_folder, new_request, tmp_path
):
    """With a CPU for a device: weights that are not at work have none, "meta"."""
    checkpoint = open_checkpoint(str(checkpoint_folder(name)))
    has_picture = "image" in CLIPS.get(name, {})  # which the VAE encodes, too
    # as a finisher has it; beside parts that stay, diffusers takes "meta" for the pipeline's device where no GPU is
    others = (*checkpoint.model.denoiser_parts, *(() if has_picture else checkpoint.model.decoder_parts))
    model = load_model(checkpoint, LoadOptions(), skip_components=others)
    request = clip_of(name, new_request, tmp_path) if name in CLIPS else new_request()
    names = (*checkpoint.model.encoder_parts, *(("vae",) if has_picture else ()))
    expected = model.adapter.encode(model.pipe, request)
    keep_encoders_on_host(model.pipe, names, CPU)
    for _ in range(2):
        assert devices(model.pipe, names) == {"meta"}
        found = model.adapter.encode(model.pipe, request)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("asked", "shares_gpu", "where"), [("auto", True, "meta"), ("auto", False, "cuda"), ("gpu", True, "cuda")]
)
def test_a_finisher_beside_a_rank_keeps_them_off_its_gpu(
    checkpoint_folder, tmp_path, monkeypatch, asked, shares_gpu, where
):
    """On a pretended GPU: what would be on it fails for want of one."""
    monkeypatch.setattr(finisher_work, "check_own_gpu", lambda *_: None)
    monkeypatch.setattr(loading, "check_device", lambda *_: None)
    monkeypatch.setattr(loading, "_check_loaded", lambda *_: None)  # would put timesteps on it
    spec = RunSpec(
        model=str(checkpoint_folder("wan")),
        options=LoadOptions(device="cuda", text_encoders=asked, attention="native"),
        out=tmp_path,
        lossless=False,
        run=RunOptions(sp=2),
        decodes_on_gang=True,
    )
    finisher = FinisherWork(spec)
    if where == "cuda" and not torch.cuda.is_available():
        with pytest.raises(InputError, match=r"(?i)cuda"):
            finisher.load(shares_gpu)
        return
    finisher.load(shares_gpu)
    assert devices(finisher._model.pipe, ("text_encoder",)) == {where}
    assert finisher._model.pipe._execution_device.type == "cuda"


def test_who_keeps_them_on_the_host():
    cuda = LoadOptions(device="cuda")
    assert [cuda.encoders_on_host(shares_gpu) for shares_gpu in (True, False)] == [True, False]
    assert not LoadOptions(device="cpu").encoders_on_host(shares_gpu=True)
    assert not LoadOptions(device="cuda", offload="model").encoders_on_host(shares_gpu=True)
    assert not LoadOptions(device="cuda", text_encoders="gpu").encoders_on_host(shares_gpu=True)
    assert LoadOptions(device="cuda", text_encoders="host").encoders_on_host(shares_gpu=False)
    with pytest.raises(InputError, match="text-encoders must be auto, gpu or host, got 'disk'"):
        LoadOptions(text_encoders="disk")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="it needs --device cuda"):
        LoadOptions(text_encoders="host")
    with pytest.raises(InputError, match="does not go with offload group"):
        LoadOptions(device="cuda", text_encoders="host", offload="group")
