"""FLUX.1: cached from Python, in diffusers' FluxPipeline. One branch per step: guidance is embedded."""

from cineray.pipeline.adapters.model import BlockLayout, Model, ShardedArguments

MODEL = Model(
    transformer="FluxTransformer2DModel",
    family="flux",
    layout=BlockLayout(
        lists=("transformer_blocks", "single_transformer_blocks"),
        counts=("num_layers", "num_single_layers"),
        output="text, hidden",
        shared=("image_rotary_emb", "joint_attention_kwargs"),
        layers=("attn", "ff", "ff_context", "proj_mlp"),
    ),
    branches=("cond",),
    sharded=ShardedArguments(attention="attn", rotary="image_rotary_emb", rotary_dim=0, text_first=True),
    pipelines={"FluxPipeline": None},
)
