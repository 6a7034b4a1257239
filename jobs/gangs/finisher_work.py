"""What is done to a clip before and after the gangs: text encoding; decoding, writing and committing."""

import threading
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cineray.jobs.console.terminal import tell
from cineray.jobs.gangs.faults import explain_shortage, fault_of, free_memory, with_memory
from cineray.jobs.gangs.messages import ClipFault, RunSpec, Task
from cineray.jobs.output.commit import commit_clip
from cineray.jobs.output.folder import OutputError, OutputFolder
from cineray.jobs.output.hardware import begin_peak, hardware
from cineray.jobs.output.record import clip_record, policy_text, render_options
from cineray.jobs.output.step_keeper import MAX_NOTES_BYTES
from cineray.jobs.threads import loading_threads, rank_threads
from cineray.pipeline.footprint.fit import FINISHER, SHARED, check_own_gpu
from cineray.pipeline.loading.checkpoint import open_checkpoint
from cineray.pipeline.loading.model import LoadedModel, load_model
from cineray.pipeline.render import DenoisedClip, RenderedClip, decode_clip
from cineray.pipeline.request import ClipRequest, explain
from cineray.pipeline.resume.decoded_frames import read_frames
from cineray.pipeline.resume.encoded_prompts import encode_prompt, is_encoded
from cineray.pipeline.resume.step_state import read_step_state
from cineray.pipeline.resume.tensor_file import TensorFileError

MAX_TOKEN_BYTES = 4096  # of float32 latents: 256 for Wan, HunyuanVideo, FLUX.1 and Stable Audio Open, 64 for DiT
TILED = "the GPU had too little memory to decode it whole; it was decoded in tiles, which may show at their borders"


class FinisherWork:
    """The work of one finisher."""

    def __init__(self, spec: RunSpec) -> None:
        self._spec = spec
        self._model: LoadedModel | None = None
        # accelerate's hooks move the parts of a pipeline between CPU and GPU, and are all made anew after a decode:
        # with them one call at a time; else a prompt is encoded while a clip is decoded
        self._one_call: AbstractContextManager[Any] = (
            nullcontext() if spec.options.offload == "none" else threading.Lock()
        )

    def load(self, shares_gpu: bool) -> None:
        """Loads encoders and VAE.

        Args:
            shares_gpu: a rank is on this finisher's GPU, so that idle encoders had better not be.
        """
        checkpoint = open_checkpoint(self._spec.model).written_as(self._spec.file_format)
        checkpoint.model.output.check()
        check_own_gpu(self._spec.options.device, self._spec.demands, (FINISHER, SHARED))
        torch.set_num_threads(loading_threads(self._spec.options.device))
        without = checkpoint.model.denoiser_parts
        if self._spec.decodes_on_gang and not checkpoint.size_rule.encodes_pixels:  # pictures are encoded by the VAE
            without = (*without, *checkpoint.model.decoder_parts)
        options = self._spec.options
        if options.encoders_on_host(shares_gpu):
            options = replace(options, text_encoders="host")
        self._model = load_model(checkpoint, options, skip_components=without)
        torch.set_num_threads(rank_threads())

    def encode(self, task: Task) -> tuple[str, ...] | ClipFault:
        """Leaves the encoded prompts on disk; returns what of them is not read, a sentence for each."""
        assert self._model is not None
        torch.set_num_threads(rank_threads())
        folder = OutputFolder.existing(self._spec.out)
        path = folder.prompt_path(task.prompt_key)
        model = self._model
        try:
            cut = model.adapter.cut_prompts(model.pipe, task.request)
            if not is_encoded(path):
                with folder.translated_os_errors(f"keeping the prompt of clip {task.request.id}"), self._one_call:
                    with_memory(lambda: encode_prompt(model, task.request, path))
        except OutputError:
            raise
        except Exception as reason:  # noqa: BLE001  # whatever it is, the other clips go on
            return _fault(reason, folder, f"the prompt of clip {task.request.id} was encoded")
        return tuple(cut)

    def finish(self, task: Task) -> dict[str, Any] | ClipFault | None:
        """Decodes the latents that lie on disk, writes the video and commits it.

        Returns:
            The clip's record; None where there are no latents, or frames, that are surely this clip's.

        Raises:
            OutputError: the output folder is full or gone.
        """
        assert self._model is not None
        request, device = task.request, self._spec.options.device
        folder = OutputFolder.existing(self._spec.out, self._model.checkpoint.model.output)
        begin_peak(device)
        path = folder.step_path(request.id, task.fingerprint)
        found = self._read_latents(path, task)
        if found is None:
            return None
        clip, resumed_at = found
        try:
            if self._spec.decodes_on_gang:
                rendered, is_tiled = _read_decoded(clip, task, folder), False
            else:
                rendered, is_tiled = self._decode(clip, request)
            if rendered is None:
                return None
            misfit = folder.output.misfit(rendered.frames, request)
            if misfit is not None:
                _tell_unused(request.id, misfit)
                return None
            options = render_options(self._spec.options, self._spec.lossless)
            record = clip_record(
                request,
                task.fingerprint,
                self._model,
                options,
                rendered,
                task.layout or self._spec.run.layout,
                resumed_at,
                (*task.warnings, *([TILED] if is_tiled else [])),
            )
            used = hardware(device) | ({"ranks": list(task.ranks)} if task.ranks else {})
            commit_clip(folder, request, task.fingerprint, rendered, record, self._spec.lossless, used)
        except OutputError:
            raise
        except Exception as reason:  # noqa: BLE001  # whatever it is, the other clips go on
            return _fault(reason, folder, f"clip {request.id} was written")
        with suppress(OSError):  # the clip is committed, whatever lies there
            path.unlink(missing_ok=True)
            if self._spec.decodes_on_gang:
                folder.frames_path(request.id, task.fingerprint).unlink(missing_ok=True)
        return record

    def _decode(self, clip: DenoisedClip, request: ClipRequest) -> tuple[RenderedClip, bool]:
        """The frames, and whether memory was so short that they were decoded in tiles though nobody asked for it."""
        assert self._model is not None
        model, vae = self._model, self._model.pipe.vae
        with self._one_call:
            try:
                return with_memory(lambda: decode_clip(model, clip, request)), False
            except Exception as error:
                can_tile = hasattr(vae, "use_tiling")
                if fault_of(error) != "memory" or self._spec.options.vae_tiling or not can_tile:
                    raise
            free_memory()
            vae.enable_tiling()
            try:
                return decode_clip(model, clip, request), True
            finally:
                vae.disable_tiling()

    def _read_latents(self, path: Path, task: Task) -> tuple[DenoisedClip, list[int]] | None:
        """The denoised clip that lies on disk, and where it went on after a stop."""
        assert self._model is not None
        request = task.request
        checkpoint = self._model.checkpoint
        num_tokens = checkpoint.adapter.num_tokens(checkpoint.configs, request)
        max_bytes = MAX_TOKEN_BYTES * num_tokens + MAX_NOTES_BYTES
        try:
            state = read_step_state(path, task.fingerprint, max_bytes)
            if state is None or state.step != state.num_steps:
                return None
            if state.num_steps != request.num_inference_steps:
                raise ValueError("they are of another number of steps")
            notes, trace = state.notes, state.notes.finished
            if (trace is None) != (policy_text(request, self._model.checkpoint) == "none"):
                raise ValueError("they come from another cache")
        except ValueError as reason:
            _tell_unused(request.id, str(reason))
            return None
        latents = state.latents.to(self._model.pipe._execution_device)
        clip = DenoisedClip(latents=latents, trace=trace, encode_s=notes.encode_s, denoise_s=notes.denoise_s)
        return clip, list(notes.resumed_at)


def _read_decoded(clip: DenoisedClip, task: Task, folder: OutputFolder) -> RenderedClip | None:
    """The clip with the frames that its gang has left on disk."""
    request = task.request
    path = folder.frames_path(request.id, task.fingerprint)
    try:
        found = read_frames(path, task.fingerprint, (request.num_frames, request.height, request.width))
    except (FileNotFoundError, TensorFileError) as reason:
        said = "there are none" if isinstance(reason, FileNotFoundError) else str(reason)
        tell(f"cineray: clip {request.id} is decoded anew; its frames on disk are not used: {said}")
        return None
    return RenderedClip(
        frames=found.frames,
        latents=clip.latents.float().cpu(),
        trace=clip.trace,
        encode_s=clip.encode_s,
        denoise_s=clip.denoise_s,
        decode_s=found.decode_s,
    )


def _fault(error: Exception, folder: OutputFolder, doing: str) -> ClipFault:
    """What an error says of the clip.

    Raises:
        Exception: the error itself: the device is not well, and would not be for the next clip.
        OutputError: the folder is at fault.
    """
    fault = fault_of(error)
    if fault == "machine" and isinstance(error, RuntimeError):
        raise error
    if fault == "memory":
        reason = explain_shortage(error)
        free_memory()
        return ClipFault(reason=reason, fault="memory")
    folder.check(doing)  # a fault of the folder is not the clip's
    return ClipFault(reason=explain(error))


def _tell_unused(clip_id: str, reason: str) -> None:
    tell(f"cineray: clip {clip_id} begins anew; its latents on disk are not used: {reason}")
