"""Text encoders: the released PyTorch networks, kept as they are, and one that needs none.

They run once, in `--mode=prepare`; training reads what they made. `transformers` comes with the
extra `text` and is loaded only when a released encoder is.

Source: how the pipelines of FLUX.1 and Qwen-Image in `diffusers` encode prompts, to which the tests
compare. Those of FLUX.2 are in `flux2_encoders.py`.
"""

import contextlib
import hashlib
import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from piflow_jax import hub
from piflow_jax.data.flux2_encoders import Flux2Encoder, KleinEncoder
from piflow_jax.data.reference_sizes import qwen_edit_size
from piflow_jax.data.released_encoders import Released, floats
from piflow_jax.data.torch_parts import load_network, load_part, read_kind

__all__ = [
    "FluxEncoder",
    "QwenEditEncoder",
    "QwenEncoder",
    "TextEncoder",
    "WordEncoder",
    "load_text_encoder",
]

_WORDS = "words"
_WIDEST = 2**16
_FLUX2 = {"mistral3": Flux2Encoder, "qwen3": KleinEncoder}
# Qwen-Image describes its task to the language model and drops what comes of this description.
_QWEN_SYSTEM = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:"
)
_QWEN_TEMPLATE = (
    "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
_QWEN_DROPPED = 34
# Its editors are given another task, and see the references before the prompt.
_EDIT_SYSTEM = (
    "Describe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. "
    "Generate a new image that meets the user's requirements while maintaining consistency with "
    "the original input where appropriate."
)
_EDIT_DROPPED = 64
_EDIT_PAD = "<|image_pad|>"
_EDIT_PICTURE = f"<|vision_start|>{_EDIT_PAD}<|vision_end|>"
# By the class that model_index.json names: what stands for a picture, its number included, and the
# side of a square picture as the encoder sees it.
_EDITORS = {
    "QwenImageEditPipeline": (_EDIT_PICTURE, 1024),
    "QwenImageEditPlusPipeline": (f"Picture {{}}: {_EDIT_PICTURE}", 384),
}


class TextEncoder(Protocol):
    """What turns prompts into embeddings.

    Attributes:
      identity: Hash of its weights and of how it is used.
      tokenizer: What takes prompts apart: its kind, and a hash of what it makes of difficult ones,
        which depends on the version of its library too.
      compute: How it is evaluated, for the record.
      text_features: Width `D` of the text embeddings.
      pooled_features: Width `P` of the pooled embedding; 0 if there is none.
      max_length: Tokens of a prompt, at most.
      sees_references: Whether a prompt's embedding depends on the images that it edits. A call then
        also takes the pictures of each prompt, lists of uint8[H, W, 3], and `tokens` their sizes,
        lists of (height, width).
    """

    identity: str
    tokenizer: str
    compute: str
    text_features: int
    pooled_features: int
    max_length: int
    sees_references: bool

    def tokens(self, prompts: Sequence[str]) -> list[tuple[list, int]]:
        """Returns what is read of each of `prompts`, and how many tokens beyond it are cut off."""
        ...

    def __call__(self, prompts: Sequence[str]) -> list[dict[str, np.ndarray]]:
        """Returns `text: float32[L, D]` and perhaps `pooled: float32[P]` of each of `prompts`."""
        ...


class WordEncoder:
    """Hashes words to fixed random vectors: no weights, the same on every machine.

    A token is its word's vector plus half a vector of its place, so that order counts; the pooled
    embedding is the mean of the words' own. All have unit variance or less. For miniatures.

    Args:
      text_features: Width of the text embeddings.
      pooled_features: Width of the pooled embedding.
      max_length: Words of a prompt, at most.
    """

    sees_references = False

    def __init__(self, text_features: int = 64, pooled_features: int = 32, max_length: int = 77):
        self.text_features = text_features
        self.pooled_features = pooled_features
        self.max_length = max_length
        self.identity = f"{_WORDS}:{text_features}:{pooled_features}, {max_length} words"
        self.tokenizer = _WORDS
        self.compute = "float32"

    def tokens(self, prompts: Sequence[str]) -> list[tuple[list, int]]:
        """Returns the words of each of `prompts`, and the number of those beyond the limit."""
        # The empty prompt has a token too.
        words = (["", *prompt.lower().split()] for prompt in prompts)
        return [(w[: self.max_length], max(len(w) - self.max_length, 0)) for w in words]

    def __call__(self, prompts: Sequence[str]) -> list[dict[str, np.ndarray]]:
        """Returns `text: float32[L, D]` and `pooled: float32[P]` of each of `prompts`."""
        return [self._encode(words) for words, _ in self.tokens(prompts)]

    def _encode(self, words: list[str]) -> dict[str, np.ndarray]:
        places = [f"{i}" for i in range(len(words))]
        text = _vectors(words, "text", self.text_features)
        text += _vectors(places, "place", self.text_features) / 2
        pooled = _vectors(words, "pooled", self.pooled_features).mean(axis=0)
        return {"text": text, "pooled": pooled}


class FluxEncoder(Released):
    """FLUX.1's two encoders: the tokens of T5, and CLIP's pooled embedding.

    T5 sees and makes padding, and FLUX.1 attends to it, so all `max_length` tokens belong to the
    embedding, whatever the prompt's length.

    Args:
      folder: The release's, or what it has of `tokenizer`, `text_encoder`, `tokenizer_2` and
        `text_encoder_2`.
      max_length: Tokens of T5; 0 are 512, the most. Fewer make the cache and every later step
        cheaper, and images a little different.
      dtype: Of the weights, `bfloat16` or `float32`.
      device: PyTorch's name of the device.
    """

    name, longest = "flux", 512
    parts = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")

    def _load(self, transformers: Any, folder: Path, **options: str) -> tuple[Any, ...]:
        """Loads all parts; returns the tokenizers."""
        parts = [folder / part for part in self.parts]
        # Of CLIP the pipelines have the one called so; under transformers 4 others differ from it.
        self._clip_tokens = load_part(transformers.CLIPTokenizer, parts[0])
        self._t5_tokens = load_part(transformers.AutoTokenizer, parts[2])
        self._clip = load_network(transformers.CLIPTextModel, parts[1], **options)
        self._t5 = load_network(transformers.T5EncoderModel, parts[3], **options)
        self.text_features = self._t5.config.d_model
        self.pooled_features = self._clip.config.hidden_size
        return self._clip_tokens, self._t5_tokens

    def tokens(self, prompts: Sequence[str]) -> list[tuple[list, int]]:
        """Returns the tokens of each of `prompts` for both encoders, and how many T5 lacks."""
        clip, t5 = (
            tokenizer(list(prompts), verbose=False).input_ids
            for tokenizer in (self._clip_tokens, self._t5_tokens)
        )
        return [
            (
                _cut(first, self._clip.config.max_position_embeddings)
                + _cut(second, self.max_length),
                max(len(second) - self.max_length, 0),
            )
            for first, second in zip(clip, t5, strict=True)
        ]

    def __call__(self, prompts: Sequence[str]) -> list[dict[str, np.ndarray]]:
        """Returns `text: float32[max_length, D]`, `pooled: float32[P]` of each of `prompts`."""
        longest = self._clip.config.max_position_embeddings  # 77
        with self._torch.inference_mode():
            pooled = self._clip(self._ids(self._clip_tokens, prompts, longest)).pooler_output
            text = self._t5(self._ids(self._t5_tokens, prompts, self.max_length))[0]
        pairs = zip(floats(text), floats(pooled), strict=True)
        return [{"text": tokens, "pooled": vector} for tokens, vector in pairs]

    def _ids(self, tokenizer, prompts: Sequence[str], length: int):
        tokens = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="pt",
        )
        return tokens.input_ids.to(self._device)


class QwenEncoder(Released):
    """Qwen-Image's encoder: the last hidden states of Qwen2.5-VL, asked to describe an image.

    Args:
      folder: The release's, or what it has of `tokenizer` and `text_encoder`.
      max_length: Tokens of a prompt with the end of its template; 0 are 1024, the most.
      dtype: Of the weights, `bfloat16` or `float32`.
      device: PyTorch's name of the device.
    """

    name, longest = "qwen_image", 1024
    parts = ("tokenizer", "text_encoder")
    pooled_features = 0
    task, dropped = _QWEN_SYSTEM, _QWEN_DROPPED

    def _load(self, transformers: Any, folder: Path, **options: str) -> tuple[Any, ...]:
        """Loads both parts; returns the tokenizer."""
        self._tokens = load_part(transformers.AutoTokenizer, folder / "tokenizer")
        kind = transformers.Qwen2_5_VLForConditionalGeneration
        network = load_network(kind, folder / "text_encoder", **options)
        self._network = network.model  # without the logits of each word
        self.text_features = network.config.get_text_config().hidden_size
        return (self._tokens,)

    def tokens(self, prompts: Sequence[str]) -> list[tuple[list, int]]:
        """Returns the tokens of each of `prompts` behind the template, and how many are cut off."""
        templates = [_QWEN_TEMPLATE.format(self.task, prompt) for prompt in prompts]
        rows = [ids[self.dropped :] for ids in self._tokens(templates, verbose=False).input_ids]
        return [(ids[: self.max_length], max(len(ids) - self.max_length, 0)) for ids in rows]

    def __call__(self, prompts: Sequence[str]) -> list[dict[str, np.ndarray]]:
        """Returns `text: float32[L, D]` of each of `prompts`, with its own number of tokens."""
        tokens = self._tokens(
            [_QWEN_TEMPLATE.format(self.task, prompt) for prompt in prompts],
            max_length=self.max_length + self.dropped,
            padding=True,
            truncation=True,
            return_tensors="pt",
        ).to(self._device)
        with self._torch.inference_mode():
            hidden = self._network(
                input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
            ).last_hidden_state
        masks = tokens.attention_mask.bool().cpu().numpy()
        pairs = zip(floats(hidden), masks, strict=True)
        return [{"text": states[mask][self.dropped :]} for states, mask in pairs]


class QwenEditEncoder(QwenEncoder):
    """The encoder of Qwen-Image-Edit, which sees the references; see `QwenEncoder`.

    Tokens of the pictures count among those of a prompt: about 1,400 for each in Qwen-Image-Edit,
    and 200 in its later versions, such as 2509, which take several.

    Args:
      folder: The release's, or what it has of `tokenizer`, `text_encoder`, `processor` and
        `model_index.json`.
      max_length: Tokens of a prompt with its pictures and the end of its template; 0 are 4096.
      dtype: Of the weights, `bfloat16` or `float32`.
      device: PyTorch's name of the device.
    """

    longest = 4096
    parts = ("tokenizer", "text_encoder", "processor")
    task, dropped = _EDIT_SYSTEM, _EDIT_DROPPED
    sees_references = True

    def _load(self, transformers: Any, folder: Path, **options: str) -> tuple[Any, ...]:
        """Loads all parts; returns the tokenizer."""
        editor = read_kind(folder / "model_index.json", "_class_name")
        if editor not in _EDITORS:
            raise ValueError(
                f"{folder / 'model_index.json'} names {editor!r}, not one of {', '.join(_EDITORS)}"
            )
        self.name = editor
        self._picture, self._side = _EDITORS[editor]
        self._pictures = load_part(transformers.AutoImageProcessor, folder / "processor")
        tokenizers = super()._load(transformers, folder, **options)
        # Transformers 5 places the tokens of pictures in three dimensions only if told which these
        # are. Earlier versions find them by themselves.
        self._typed = "mm_token_type_ids" in inspect.signature(self._network.forward).parameters
        return tokenizers

    def tokens(
        self,
        prompts: Sequence[str],
        sizes: Sequence[Sequence[tuple[int, int]]] | None = None,
    ) -> list[tuple[list, int]]:
        """Like `QwenEncoder.tokens`, with the tokens of pictures.

        Args:
          prompts: The prompts.
          sizes: Height and width of the references of each; None and empty ones are no pictures.

        Returns:
          The tokens of each behind the template, and how many are cut off.
        """
        sizes = [()] * len(prompts) if sizes is None else sizes
        pairs = zip(sizes, prompts, strict=True)
        return super().tokens(
            [self._numbered([self._count(*one) for one in own]) + text for own, text in pairs]
        )

    def _count(self, height: int, width: int) -> int:
        """Tokens of a picture without those around it."""
        size = qwen_edit_size(height, width, self._side)
        patches = self._pictures.get_number_of_image_patches(*size)
        return patches // self._pictures.merge_size**2

    def _numbered(self, counts: Sequence[int]) -> str:
        """What stands for pictures with these numbers of tokens, before a prompt."""
        return "".join(
            self._picture.format(i).replace(_EDIT_PAD, _EDIT_PAD * count)
            for i, count in enumerate(counts, start=1)
        )

    def __call__(
        self, prompts: Sequence[str], pictures: Sequence[Sequence[np.ndarray]] | None = None
    ) -> list[dict[str, np.ndarray]]:
        """Encodes prompts together with the pictures that they edit.

        Args:
          prompts: The prompts.
          pictures: The references of each, uint8[H, W, 3]; None and empty ones are no pictures.

        Returns:
          `text: float32[L, D]` of each, with its own number of tokens.
        """
        if pictures is None:
            return super().__call__(prompts)
        return [self._encode(*pair) for pair in zip(prompts, pictures, strict=True)]

    def _encode(self, prompt: str, pictures: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        from PIL import Image

        if not pictures:
            return super().__call__([prompt])[0]
        sizes = [qwen_edit_size(*pixels.shape[:2], self._side) for pixels in pictures]
        seen = self._pictures(
            images=[
                Image.fromarray(pixels).resize(size[::-1], Image.Resampling.LANCZOS)
                for pixels, size in zip(pictures, sizes, strict=True)
            ],
            return_tensors="pt",
        ).to(self._device)
        counts = (seen.image_grid_thw.prod(-1) // self._pictures.merge_size**2).tolist()
        text = [_QWEN_TEMPLATE.format(self.task, self._numbered(counts) + prompt)]
        tokens = self._tokens(text, return_tensors="pt").to(self._device)
        inputs = {name: tokens[name] for name in ("input_ids", "attention_mask")}
        inputs |= {name: seen[name] for name in ("pixel_values", "image_grid_thw")}
        if self._typed:
            pad = self._tokens.convert_tokens_to_ids(_EDIT_PAD)
            inputs["mm_token_type_ids"] = (tokens.input_ids == pad).int()
        with self._torch.inference_mode():
            hidden = self._network(**inputs).last_hidden_state
        [states] = floats(hidden)
        # The network is causal: what is cut off has not been seen by the rest.
        return {"text": states[self.dropped :][: self.max_length]}


def load_text_encoder(
    name: str, *, max_length: int = 0, dtype: str = "bfloat16", gpu: int = 0
) -> TextEncoder:
    """The encoder of a name.

    Args:
      name: The folder of a release of FLUX.1, FLUX.2, Qwen-Image or Qwen-Image-Edit (which of
        these, its files tell), its name on the Hugging Face hub, or "words", "words:D" or
        "words:D:P" for a `WordEncoder`.
      max_length: Tokens of a prompt, at most; 0 is the release's own limit, 512 or 1024.
      dtype: Of a released network's weights.
      gpu: Which of the GPUs that PyTorch sees; without any it is the CPU.

    Returns:
      The encoder.

    Raises:
      FileNotFoundError: There is no such folder.
      ImportError: A release, and PyTorch or `transformers` is not installed.
      ValueError: The folder is not of a release, the name is wrong, or the length too large.
    """
    if name.split(":")[0] == _WORDS:
        return _word_encoder(name, max_length)
    folder = Path(hub.local(name) if hub.is_name(name) else name)
    if not folder.is_dir():
        raise FileNotFoundError(f"{name}: there is no such folder of text encoders")
    with hub.remedied(folder, ValueError):
        kind, longest = _kind(folder)
    if not 0 <= max_length <= longest:
        raise ValueError(f"{name} takes {longest} tokens at most, not {max_length}")
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"{name}: text encoders need PyTorch and transformers, pip install 'piflow_jax[text]'"
        ) from error
    device = f"cuda:{gpu}" if torch.cuda.is_available() else "cpu"
    with _quiet(), hub.remedied(folder, ValueError):
        return kind(folder, max_length=max_length or longest, dtype=dtype, device=device)


def _word_encoder(name: str, max_length: int) -> WordEncoder:
    try:
        sizes = [int(size) for size in name.split(":")[1:]]
    except ValueError:
        sizes = [0]
    if len(sizes) > 2 or min(sizes, default=1) < 1 or max(sizes, default=1) > _WIDEST:
        raise ValueError(
            f"{name!r} is not like 'words:64:32', widths of text and pooled embedding, at most "
            f"{_WIDEST}"
        )
    return WordEncoder(*sizes, **({"max_length": max_length} if max_length else {}))


def _kind(folder: Path) -> tuple[type, int]:
    config = folder / "text_encoder" / "config.json"
    if not config.exists():
        raise ValueError(
            f"{folder} is no released folder of FLUX.1, FLUX.2 or Qwen-Image: it has no "
            "text_encoder/config.json"
        )
    kind = read_kind(config, "model_type")
    if kind == "qwen2_5_vl":
        encoder = QwenEditEncoder if (folder / "processor").is_dir() else QwenEncoder
    elif kind == "clip_text_model" and (folder / "text_encoder_2").is_dir():
        encoder = FluxEncoder
    elif kind in _FLUX2:
        encoder = _FLUX2[kind]
    else:
        raise ValueError(
            f"{folder}: FLUX.1 has a clip_text_model and a text_encoder_2, Qwen-Image a "
            f"qwen2_5_vl, FLUX.2 a {' or a '.join(_FLUX2)}, not {kind!r}"
        )
    return encoder, encoder.longest


def _cut(ids: list[int], length: int) -> list[int]:
    """Tokens as they are cut off: the last one, which ends the prompt, stays."""
    return ids if len(ids) <= length else [*ids[: length - 1], ids[-1]]


def _vectors(words: Sequence[str], use: str, size: int) -> np.ndarray:
    """Standard normal float32[len(words), size] from each word's hash."""
    rows = []
    for word in words:
        digest = hashlib.sha256(f"{use} {word}".encode()).digest()
        key = np.frombuffer(digest[:16], "<u8").astype(np.uint64)
        # Sums of twelve uniforms: NumPy keeps raw bits between versions, its normals it may not.
        words_ = np.random.Philox(key=key).random_raw(12 * size).reshape(12, size)
        rows.append((words_ / 2.0**64).sum(axis=0) - 6)
    return np.stack(rows).astype(np.float32)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars of loading."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
