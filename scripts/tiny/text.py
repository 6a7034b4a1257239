"""Word-level tokenizers and small text encoders for the tiny checkpoints.

The encoders are real UMT5, Llama and CLIP classes, trained together with the transformer. Words outside the
grammar become `<unk>`.
"""

import re

from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from tiny.shapes import all_captions

# Words, single punctuation marks, newlines and <|special|> marks. HunyuanVideo's pipeline cuts off the first 95
# tokens, the instruction of its prompt template; split this way and without a BOS token the instruction has
# just 95, as it has with Llama 3's tokenizer.
TOKEN = r"<\|[a-z_]+\|>|\w+|[^\w\s]|\n"
PAD, EOS, UNK, BOS = "<pad>", "</s>", "<unk>", "<s>"
TEXT_DIM = 64


def _vocabulary(more: str = "") -> dict[str, int]:
    """Word -> number: of the grammar, of HunyuanVideo's template, of `more`."""
    text = " ".join(map(str, all_captions())) + " " + DEFAULT_PROMPT_TEMPLATE["template"].format("") + more
    return {word: i for i, word in enumerate([PAD, EOS, UNK, BOS, *sorted(set(re.findall(TOKEN, text.lower())))])}


def new_tokenizer(template: str, max_length: int, more: str = "") -> PreTrainedTokenizerFast:
    """A lower-casing word-level tokenizer; `template` places special tokens around `$A`, `more` has words besides."""
    vocabulary = _vocabulary(more)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN), behavior="removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(t, vocabulary[t]) for t in (EOS, BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        model_max_length=max_length,
        padding_side="right",
    )


def new_umt5() -> tuple[PreTrainedTokenizerFast, UMT5EncoderModel]:
    config = UMT5Config(
        vocab_size=len(_vocabulary()),
        d_model=TEXT_DIM,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return new_tokenizer(f"$A {EOS}", 512), UMT5EncoderModel(config)


def new_t5(words: str, max_length: int) -> tuple[PreTrainedTokenizerFast, T5EncoderModel]:
    """T5 v1.1, which knows `words` besides the grammar's."""
    tokenizer = new_tokenizer(f"$A {EOS}", max_length, " " + words)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_DIM,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
    )
    return tokenizer, T5EncoderModel(config)


def new_llama() -> tuple[PreTrainedTokenizerFast, LlamaModel]:
    """The pipeline reads the hidden states before the last two layers, so two of the four shape the text."""
    config = LlamaConfig(
        vocab_size=len(_vocabulary()),
        hidden_size=TEXT_DIM,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=3,
        eos_token_id=1,
    )
    return new_tokenizer("$A", 512), LlamaModel(config)


def new_clip() -> tuple[PreTrainedTokenizerFast, CLIPTextModel]:
    config = CLIPTextConfig(
        vocab_size=len(_vocabulary()),
        hidden_size=TEXT_DIM,
        intermediate_size=128,
        projection_dim=TEXT_DIM,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        pad_token_id=0,
        bos_token_id=3,
        eos_token_id=1,
    )
    return new_tokenizer(f"{BOS} $A {EOS}", 77), CLIPTextModel(config)
