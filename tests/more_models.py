"""Models that are rendered, beside those of `BUILDERS`: at toy size with random weights, and a clip of each."""

from typing import Any

import torch
from conftest import _wan_parts, build_flux, build_hunyuan, hunyuan_transformer, wan_vae
from every_model import build_dit, build_stable_audio
from PIL import Image


def _with_labels() -> Any:
    pipe = build_dit()
    # as the published model_index.json has it; the pipeline itself does not save it
    pipe.register_to_config(id2label={"0": "tench, Tinca tinca", "7": "cock", "8": "hen"})
    return pipe


def build_hunyuan_image(condition: str) -> Any:
    """HunyuanVideoImageToVideoPipeline: the language model sees 576 patches of the picture, as the pipeline has it."""
    from diffusers import HunyuanVideoImageToVideoPipeline
    from tiny.text import TEXT_DIM, new_llama
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    text = build_hunyuan()
    torch.manual_seed(3)
    tokenizer, _ = new_llama()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    llava = LlavaConfig(
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_DIM,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=1024,
            pad_token_id=0,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=48,
            patch_size=2,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    llava.pad_token_id = 0  # type: ignore[attr-defined]  # as every configuration has it
    channels = 4
    return HunyuanVideoImageToVideoPipeline(
        text_encoder=LlavaForConditionalGeneration(llava).eval(),
        tokenizer=tokenizer,
        text_encoder_2=text.text_encoder_2,
        tokenizer_2=text.tokenizer_2,
        transformer=hunyuan_transformer(
            in_channels=channels if condition == "token_replace" else 2 * channels + 1,
            guidance_embeds=condition == "token_replace",
            image_condition_type=condition,
        ),
        vae=text.vae,
        scheduler=text.scheduler,
        image_processor=CLIPImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}),
    )


# the pipeline cuts off 108 tokens in front, which is its instruction with Qwen's tokenizer and ten more than with ours
CHAT = (
    "{{ '<|more|>' * 10 }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_hunyuan15(takes_image: bool = False, guidance_scale: float = 6.0, seed: int = 6, **transformer: Any) -> Any:
    """HunyuanVideo15Pipeline with 3 blocks, or the one that takes a picture; a pixel of a latent is 8 x 8."""
    from diffusers import (
        AutoencoderKLHunyuanVideo15,
        ClassifierFreeGuidance,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideo15ImageToVideoPipeline,
        HunyuanVideo15Pipeline,
        HunyuanVideo15Transformer3DModel,
    )
    from tiny.text import TEXT_DIM, new_llama
    from transformers import (
        ByT5Tokenizer,
        Qwen2_5_VLTextConfig,
        Qwen2_5_VLTextModel,
        SiglipImageProcessorPil,
        SiglipVisionConfig,
        SiglipVisionModel,
        T5Config,
        T5EncoderModel,
    )

    torch.manual_seed(seed)
    tokenizer, _ = new_llama()
    tokenizer.chat_template = CHAT
    qwen = Qwen2_5_VLTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_DIM,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
        pad_token_id=0,
    )
    byt5 = T5Config(vocab_size=384, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    parts: dict[str, Any] = {
        "text_encoder": Qwen2_5_VLTextModel(qwen).eval(),
        "tokenizer": tokenizer,
        "text_encoder_2": T5EncoderModel(byt5).eval(),
        "tokenizer_2": ByT5Tokenizer(),
        "vae": AutoencoderKLHunyuanVideo15(
            latent_channels=4,
            block_out_channels=(8, 8, 8, 8),  # type: ignore[arg-type]  # diffusers annotates tuple[int]
            layers_per_block=1,
            spatial_compression_ratio=8,
        ).eval(),
        "transformer": HunyuanVideo15Transformer3DModel(
            in_channels=9,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=3,
            num_refiner_layers=1,
            text_embed_dim=TEXT_DIM,
            text_embed_2_dim=24,
            image_embed_dim=16,
            rope_axes_dim=(4, 6, 6),
            target_size=32,
            **transformer,
        ).eval(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0),
        "guider": ClassifierFreeGuidance(guidance_scale=guidance_scale),
    }
    if not takes_image:
        return HunyuanVideo15Pipeline(**parts)
    siglip = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    return HunyuanVideo15ImageToVideoPipeline(
        **parts,
        image_encoder=SiglipVisionModel(siglip).eval(),
        feature_extractor=SiglipImageProcessorPil(size={"height": 32, "width": 32}),
    )


def build_wan22() -> Any:
    """WanPipeline with two experts, as A14B."""
    from diffusers import WanPipeline

    return WanPipeline(**_wan_parts(0), transformer_2=_wan_parts(1)["transformer"], boundary_ratio=0.875)


def build_wan22_image() -> Any:
    """WanImageToVideoPipeline with two experts and no image encoder, as A14B."""
    from diffusers import WanImageToVideoPipeline

    parts, second = _wan_parts(0, in_channels=12), _wan_parts(1, in_channels=12)["transformer"]
    return WanImageToVideoPipeline(**parts, transformer_2=second, boundary_ratio=0.9)


def build_ti2v(takes_image: bool) -> Any:
    """A timestep for each token, and a VAE whose pixels are put into 2 x 2 patches, as TI2V-5B."""
    from diffusers import WanImageToVideoPipeline, WanPipeline

    parts = _wan_parts(0)
    torch.manual_seed(5)
    parts["vae"] = wan_vae(is_residual=True, in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16)
    return (WanImageToVideoPipeline if takes_image else WanPipeline)(**parts, expand_timesteps=True)


def build_vace(seed: int = 0, **transformer: Any) -> Any:
    """WanVACEPipeline with 4 blocks, behind the first and the third of which a hint is added."""
    from diffusers import WanVACEPipeline, WanVACETransformer3DModel
    from tiny.text import TEXT_DIM

    parts = _wan_parts(seed)
    torch.manual_seed(seed + 7)
    parts["transformer"] = WanVACETransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT_DIM,
        freq_dim=32,
        ffn_dim=64,
        vace_in_channels=2 * 4 + 64,
        **{"num_layers": 4, "vace_layers": [0, 2], **transformer},
    ).eval()
    return WanVACEPipeline(**parts)


MORE_MODELS = {
    "flux": build_flux,
    "dit": _with_labels,
    "stable_audio": build_stable_audio,
    "hunyuan_concat": lambda: build_hunyuan_image("latent_concat"),
    "hunyuan_replace": lambda: build_hunyuan_image("token_replace"),
    "hunyuan15": build_hunyuan15,
    "hunyuan15_image": lambda: build_hunyuan15(takes_image=True),
    "wan22": build_wan22,
    "wan22_image": build_wan22_image,
    "vace": build_vace,
    "ti2v": lambda: build_ti2v(takes_image=False),
    "ti2v_image": lambda: build_ti2v(takes_image=True),
}
# of `ClipRequest`, where they are not those of `new_request`; "image" is made by `with_picture`
_STILL = {"num_frames": 1, "fps": 1}
CLIPS: dict[str, dict[str, Any]] = {
    "flux": _STILL,
    "dit": {**_STILL, "prompt": "cock", "width": 8, "height": 8},
    "stable_audio": {**_STILL, "fps": 64, "width": 1, "height": 1, "seconds": 1.5},
    "hunyuan_concat": {"image": ""},
    "hunyuan_replace": {"image": ""},
    "hunyuan15": {"prompt": 'a red circle that says "go" and "stop" moving left', "height": 48},
    "hunyuan15_image": {"image": "same"},
    "wan22": {"flow_shift": 3.0, "guidance_scale_2": 2.0},
    "wan22_image": {"flow_shift": 3.0, "image": ""},
    "vace": {"flow_shift": 3.0, "reference_images": ""},
    "ti2v": {"flow_shift": 3.0, "width": 64},
    "ti2v_image": {"flow_shift": 3.0, "width": 64, "image": ""},
}


def clip_of(name: str, new_request: Any, folder: Any, **changes: Any) -> Any:
    """A small request for a model of `MORE_MODELS`; its picture is written to a folder, in the clip's shape or not."""
    values = {**CLIPS[name], **changes}
    if "reference_images" in values:
        values |= {"reference_images": (str(folder / "reference.png"),)}
        noise = torch.randint(0, 256, (24, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
        Image.fromarray(noise.numpy()).save(values["reference_images"][0])
    if "image" in values:
        size = (32, 32) if values["image"] == "same" else (40, 56)
        values["image"] = str(folder / "first.png")
        noise = torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        Image.fromarray(noise.numpy()).save(values["image"])
    return new_request(**values)
