"""Open-Sora 1.2's STDiT3: cached from Python, in a loop of the caller's own.

diffusers has no class for it; `cineray.pipeline.adapters.open_sora_transformer` is ours. One deep block is a spatial
block and the temporal block after it. Guidance doubles the batch: `torch.cat([model_args["y"], y_null])` in
opensora/schedulers/rf/__init__.py puts the conditional rows first.
"""

from cineray.pipeline.adapters.model import BlockLayout, Model

MODEL = Model(
    transformer="STDiT3",
    family="open-sora",
    layout=BlockLayout(
        lists=("spatial_blocks", "temporal_blocks"),
        counts=("depth",),
        interleaved=True,
        layers=tuple(
            f"{blocks}.{layer}"
            for blocks in ("spatial_blocks", "temporal_blocks")
            for layer in ("attn", "cross_attn", "mlp")
        ),
    ),
    branches=("cond", "uncond"),
    stacked=True,
    pipelines={},
)
