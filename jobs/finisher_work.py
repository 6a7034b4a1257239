"""What is done to a clip before and after the gangs: text encoding; decoding, writing and committing."""

from contextlib import suppress
from typing import Any

import torch

from cineray.caching.trace import trace_from
from cineray.jobs.commit import commit_clip
from cineray.jobs.output_folder import OutputError, OutputFolder
from cineray.jobs.own_files import kind_of
from cineray.jobs.rank_work import CLIP_ERRORS, explain
from cineray.jobs.record import clip_record, render_options
from cineray.jobs.stages import ClipFault, RunSpec, Task
from cineray.pipeline.checkpoint import open_checkpoint
from cineray.pipeline.encoded_prompts import encode_prompt
from cineray.pipeline.loading import TRANSFORMER, LoadedModel, load_model
from cineray.pipeline.render import DenoisedClip, decode_clip
from cineray.pipeline.step_state import load_step_state
from cineray.pipeline.video import VideoError


class FinisherWork:
    """One finisher's."""

    def __init__(self, spec: RunSpec) -> None:
        self._spec = spec
        self._model: LoadedModel | None = None

    def load(self) -> None:
        torch.set_num_threads(1)
        self._model = load_model(open_checkpoint(self._spec.model), self._spec.options, without=TRANSFORMER)

    def encode(self, task: Task) -> ClipFault | None:
        assert self._model is not None
        torch.set_num_threads(1)
        folder = OutputFolder.existing(self._spec.out)
        path = folder.prompt_path(task.prompt_key)
        try:
            if kind_of(path) != "a file":
                with folder.explained(f"keeping the prompt of clip {task.request.id}"):
                    encode_prompt(self._model, task.request, path)
        except OutputError:
            raise
        except CLIP_ERRORS as reason:
            folder.check(f"the prompt of clip {task.request.id} was encoded")  # a fault of the folder is not the clip's
            return ClipFault(reason=explain(reason))
        return None

    def finish(self, task: Task) -> dict[str, Any] | ClipFault | None:
        """Decodes the latents that lie on disk, writes the video and commits it.

        Returns:
            The clip's record; None where there are no whole latents any more.

        Raises:
            OutputError: the output folder is full or gone.
        """
        assert self._model is not None
        folder, request = OutputFolder.existing(self._spec.out), task.request
        path = folder.step_path(request.id, task.mark)
        state = load_step_state(path)
        if state is None or state.step != state.num_steps:
            return None
        content = state.notes["finished"]
        clip = DenoisedClip(
            latents=state.latents.to(self._model.pipe._execution_device),
            trace=None if content is None else trace_from(content),
            encode_s=state.notes["encode_s"],
            denoise_s=state.notes["denoise_s"],
        )
        try:
            rendered = decode_clip(self._model, clip)
            options = render_options(self._spec.options, self._spec.lossless)
            record = clip_record(
                request, task.mark, self._model, options, rendered, self._spec.layout, state.notes["resumed_at"]
            )
            commit_clip(folder, request, task.mark, rendered, record, self._spec.lossless)
        except OutputError:
            raise
        except (*CLIP_ERRORS, VideoError) as reason:
            folder.check(f"clip {request.id} was written")
            return ClipFault(reason=explain(reason))
        with suppress(OSError):  # the clip is committed, whatever lies there
            path.unlink(missing_ok=True)
        return record
