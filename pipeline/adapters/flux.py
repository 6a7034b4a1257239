"""FLUX.1: cached from Python, in diffusers' FluxPipeline. One branch per step: guidance is embedded."""

from cineray.caching.policies.dicache import DiCacheConfig
from cineray.caching.policies.magcache import MagCacheConfig
from cineray.caching.policies.taylorseer import TaylorSeerConfig
from cineray.caching.policies.teacache import TeaCacheConfig
from cineray.pipeline.adapters.model import BlockLayout, Model, ModulatedNorm, ShardedArguments

MODEL = Model(
    transformer="FluxTransformer2DModel",
    family="flux",
    layout=BlockLayout(
        lists=("transformer_blocks", "single_transformer_blocks"),
        counts=("num_layers", "num_single_layers"),
        output="text, hidden",
        shared=("image_rotary_emb", "joint_attention_kwargs"),
        layers=("attn", "ff", "ff_context", "proj_mlp"),
        unread=("context_embedder", "pos_embed"),
    ),
    branches=("cond",),
    sharded=ShardedArguments(attention="attn", rotary="image_rotary_emb", rotary_dim=0, text_first=True),
    pipelines={"FluxPipeline": None},
    presets={
        # the threshold from section 4.1, all else from FLUX/run_flux_dicache.py
        "dicache-paper": DiCacheConfig(
            threshold=0.4, gamma_clip=(1.0, 1.5), last_step_full=True, compute_first_after_warmup=True
        ),
        "teacache": TeaCacheConfig(),
        "magcache": MagCacheConfig(skip_at_threshold=True, round_retention=True),  # MagCache4FLUX/magcache_flux.py
        "taylorseer": TaylorSeerConfig(interval=6, warmup_steps=3),  # TaylorSeer-FLUX, cache_functions/cache_init.py
    },
    signals={"modulated-input": ModulatedNorm("norm1")},
)
