"""Stable Audio Open, sound from text: cached from Python, in diffusers' StableAudioPipeline.

The pipeline does not say which step it is; its scheduler knows. Guidance doubles the batch:
`torch.cat([negative_prompt_embeds, prompt_embeds])` in pipelines/stable_audio/pipeline_stable_audio.py puts the
unconditional rows first.
"""

from cineray.pipeline.adapters.model import BlockLayout, Model

MODEL = Model(
    transformer="StableAudioDiTModel",
    family="stable-audio",
    layout=BlockLayout(
        lists=("transformer_blocks",),
        counts=("num_layers",),
        shared=("rotary_embedding",),
        layers=("attn1", "attn2", "ff"),
    ),
    branches=("uncond", "cond"),
    stacked=True,
    pipelines={"StableAudioPipeline": None},
)
