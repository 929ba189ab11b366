"""Tiny random text encoders in the folders' layout and formats of the releases."""

import json

import numpy as np

WORDS = ["a", "red", "fox", "with", "two", "tails", "in", "the", "snow"]
QWEN_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VISION_SPECIALS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def byte_letters():
    """The printable letters that stand for bytes in byte-level vocabularies."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def write_clip_tokenizer(folder):
    """CLIP's tokenizer, a token a letter; returns the number of its tokens."""
    letters = byte_letters()
    vocabulary = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    _write_bpe(folder, vocabulary, "CLIPTokenizer", 77, "<|endoftext|>")
    return len(vocabulary)


def write_flux(folder):
    """CLIP and T5 with their tokenizers."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    torch.manual_seed(0)
    size = write_clip_tokenizer(folder / "tokenizer")
    clip = transformers.CLIPTextConfig(
        vocab_size=size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
    )
    transformers.CLIPTextModel(clip).save_pretrained(folder / "text_encoder")
    pieces = ["<pad>", "</s>", "<unk>", *WORDS]
    tokens = Tokenizer(models.WordLevel({w: i for i, w in enumerate(pieces)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", eos_token="</s>", model_max_length=512
    ).save_pretrained(folder / "tokenizer_2")
    t5 = transformers.T5Config(
        vocab_size=len(pieces),
        d_model=24,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=3,
        feed_forward_proj="gated-gelu",
    )
    transformers.T5EncoderModel(t5).save_pretrained(folder / "text_encoder_2")
    return folder


def write_qwen_edit(folder, pipeline):
    """The same with the processor of its pictures, of a pipeline that edits."""
    write_qwen(folder, VISION_SPECIALS)
    (folder / "processor").mkdir()
    settings = {"image_processor_type": "Qwen2VLImageProcessor", "merge_size": 2}
    settings |= {"patch_size": 14, "temporal_patch_size": 2}
    settings |= {"min_pixels": 56 * 56, "max_pixels": 280 * 280}
    (folder / "processor" / "preprocessor_config.json").write_text(json.dumps(settings))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    return folder


def write_qwen(folder, more_specials=()):
    """Qwen2.5-VL with its tokenizer."""
    import torch
    import transformers

    torch.manual_seed(1)
    specials = (*QWEN_SPECIALS, *more_specials)
    vocabulary = [*byte_letters(), *specials]
    _write_bpe(folder / "tokenizer", vocabulary, "Qwen2Tokenizer", 4096, "<|endoftext|>", specials)
    names = ("vision_start", "vision_end", "image", "video")
    ids = {f"{name}_token_id": len(vocabulary) + i - 4 for i, name in enumerate(names)}
    config = transformers.Qwen2_5_VLConfig(
        **(ids if more_specials else {}),
        text_config={
            "vocab_size": len(vocabulary),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [1, 1, 2],
                "rope_theta": 1e6,
            },
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 32,
        },
    )
    network = transformers.Qwen2_5_VLForConditionalGeneration(config)
    network.save_pretrained(folder / "text_encoder")
    return folder


# Of Mistral's and Qwen3's templates, what text alone needs.
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]"
    "{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}!{% endif %}"
)
QWEN3_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
LAYERED = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def write_flux2(folder, klein=False, layers=32):
    """The language model of FLUX.2 [dev] or [klein] with its tokenizer."""
    import torch
    import transformers

    torch.manual_seed(2)
    vocabulary = [*byte_letters(), *QWEN_SPECIALS]
    more = {"chat_template": QWEN3_TEMPLATE if klein else MISTRAL_TEMPLATE}
    more |= {} if klein else {"padding_side": "left", "bos_token": "<|im_start|>"}
    specials = QWEN_SPECIALS
    kind, longest = "Qwen2Tokenizer", 4096
    _write_bpe(folder / "tokenizer", vocabulary, kind, longest, "<|endoftext|>", specials, **more)
    text = LAYERED | {"num_hidden_layers": layers, "vocab_size": len(vocabulary)}
    if klein:
        network = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**text))
    else:
        seen = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        seen |= {"num_attention_heads": 2, "head_dim": 4, "model_type": "pixtral"}
        config = transformers.Mistral3Config(
            text_config=text | {"model_type": "mistral"}, vision_config=seen
        )
        network = transformers.Mistral3ForConditionalGeneration(config)
    network.save_pretrained(folder / "text_encoder")
    return folder


def _write_bpe(folder, vocabulary, kind, longest, end, specials=(), **more):
    folder.mkdir(parents=True, exist_ok=True)
    table = {token: i for i, token in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(table))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    settings = {
        "tokenizer_class": kind,
        "model_max_length": longest,
        "pad_token": end,
        "eos_token": end,
        "unk_token": end,
    }
    if kind == "CLIPTokenizer":
        settings["bos_token"] = "<|startoftext|>"
    else:
        settings["additional_special_tokens"] = list(specials[1:])
    settings |= more
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def rounded(array):
    """As the cache keeps it."""
    import ml_dtypes

    return np.asarray(array, ml_dtypes.bfloat16)
