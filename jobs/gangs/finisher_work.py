"""What is done to a clip before and after the gangs: text encoding; decoding, writing and committing."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from cineray.jobs.console.terminal import tell
from cineray.jobs.gangs.messages import ClipFault, RunSpec, Task
from cineray.jobs.output.commit import commit_clip
from cineray.jobs.output.folder import OutputError, OutputFolder
from cineray.jobs.output.record import clip_record, policy_text, render_options
from cineray.jobs.output.step_keeper import MAX_NOTES_BYTES
from cineray.jobs.threads import rank_threads
from cineray.pipeline.loading.checkpoint import open_checkpoint
from cineray.pipeline.loading.model import LoadedModel, load_model
from cineray.pipeline.media.video import check_ffmpeg
from cineray.pipeline.render import DenoisedClip, decode_clip
from cineray.pipeline.request import explain
from cineray.pipeline.resume.encoded_prompts import encode_prompt, is_encoded
from cineray.pipeline.resume.step_state import read_step_state


class FinisherWork:
    """The work of one finisher."""

    def __init__(self, spec: RunSpec) -> None:
        self._spec = spec
        self._model: LoadedModel | None = None

    def load(self) -> None:
        torch.set_num_threads(rank_threads())
        check_ffmpeg()
        checkpoint = open_checkpoint(self._spec.model)
        self._model = load_model(checkpoint, self._spec.options, skip_components=checkpoint.model.denoiser_parts)

    def encode(self, task: Task) -> tuple[str, ...] | ClipFault:
        """Leaves the encoded prompts on disk; returns what of them is not read, a sentence for each."""
        assert self._model is not None
        torch.set_num_threads(rank_threads())
        folder = OutputFolder.existing(self._spec.out)
        path = folder.prompt_path(task.prompt_key)
        try:
            cut = self._model.adapter.cut_prompts(self._model.pipe, task.request)
            if not is_encoded(path):
                with folder.translated_os_errors(f"keeping the prompt of clip {task.request.id}"):
                    encode_prompt(self._model, task.request, path)
        except OutputError:
            raise
        except Exception as reason:  # noqa: BLE001  # whatever it is, the other clips go on
            folder.check(f"the prompt of clip {task.request.id} was encoded")  # a fault of the folder is not the clip's
            return ClipFault(reason=explain(reason))
        return tuple(cut)

    def finish(self, task: Task) -> dict[str, Any] | ClipFault | None:
        """Decodes the latents that lie on disk, writes the video and commits it.

        Returns:
            The clip's record; None where there are no latents that are surely this clip's.

        Raises:
            OutputError: the output folder is full or gone.
        """
        assert self._model is not None
        folder, request = OutputFolder.existing(self._spec.out), task.request
        path = folder.step_path(request.id, task.fingerprint)
        found = self._read_latents(path, task)
        if found is None:
            return None
        clip, resumed_at = found
        try:
            rendered = decode_clip(self._model, clip, request)
            if rendered.frames.shape[:3] != (request.num_frames, request.height, request.width):
                _tell_unused(request.id, f"they decode to frames of shape {rendered.frames.shape}")
                return None
            options = render_options(self._spec.options, self._spec.lossless)
            record = clip_record(
                request,
                task.fingerprint,
                self._model,
                options,
                rendered,
                self._spec.run.layout,
                resumed_at,
                task.warnings,
            )
            commit_clip(folder, request, task.fingerprint, rendered, record, self._spec.lossless)
        except OutputError:
            raise
        except Exception as reason:  # noqa: BLE001  # whatever it is, the other clips go on
            folder.check(f"clip {request.id} was written")
            return ClipFault(reason=explain(reason))
        with suppress(OSError):  # the clip is committed, whatever lies there
            path.unlink(missing_ok=True)
        return record

    def _read_latents(self, path: Path, task: Task) -> tuple[DenoisedClip, list[int]] | None:
        """The denoised clip that lies on disk, and where it went on after a stop."""
        assert self._model is not None
        request = task.request
        max_bytes = 4 * request.num_frames * request.height * request.width + MAX_NOTES_BYTES  # a VAE does not add
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


def _tell_unused(clip_id: str, reason: str) -> None:
    tell(f"cineray: clip {clip_id} begins anew; its latents on disk are not used: {reason}")
