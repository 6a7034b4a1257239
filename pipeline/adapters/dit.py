"""DiT (DiT-XL/2), images by class label: cached from Python, in diffusers' DiTPipeline.

The pipeline does not say which step it is; its scheduler knows. Guidance doubles the batch:
`torch.cat([class_labels, class_null])` in pipelines/dit/pipeline_dit.py puts the conditional rows first.
"""

from cineray.pipeline.adapters.model import BlockLayout, Model

MODEL = Model(
    transformer="DiTTransformer2DModel",
    family="dit",
    layout=BlockLayout(
        lists=("transformer_blocks",),
        counts=("num_layers",),
        shared=("cross_attention_kwargs",),
        layers=("attn1", "ff"),
    ),
    branches=("cond", "uncond"),
    stacked=True,
    pipelines={"DiTPipeline": None},
)
