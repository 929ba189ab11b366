"""FLUX.2's text encoders: hidden states of three layers of a language model, side by side.

Source: how the pipelines of FLUX.2 [dev] and [klein] in `diffusers` encode prompts, to which the
tests compare.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from piflow_jax.data.released_encoders import Released, floats
from piflow_jax.data.torch_parts import load_network, load_part

__all__ = ["Flux2Encoder", "KleinEncoder"]

# FLUX.2 [dev] gives this role to its language model.
_SYSTEM = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing "
    "on object relationships, object\nattribution and actions without speculation."
)
# What stands for a picture in Mistral's templates, and is no word of a prompt.
_IMAGE = "[IMG]"


class _LayersEncoder(Released):
    """A language model that is given prompts by its chat template, all padded to one length.

    FLUX.2 attends to padding, so all `max_length` tokens belong to the embedding, whatever the
    prompt's length. See `Released` for its arguments.
    """

    longest = 512
    parts = ("tokenizer", "text_encoder")
    pooled_features = 0
    network: ClassVar[str]
    layers: ClassVar[tuple[int, ...]]
    template: ClassVar[dict[str, Any]]

    def _load(self, transformers: Any, folder: Path, **options: str) -> tuple[Any, ...]:
        """Loads both parts; returns the tokenizer."""
        self._tokens = load_part(transformers.AutoTokenizer, folder / "tokenizer")
        if not self._tokens.chat_template:
            raise ValueError(f"{folder / 'tokenizer'} has no chat template, such as a file .jinja")
        kind = getattr(transformers, self.network)
        network = load_network(kind, folder / "text_encoder", **options)
        settings = network.config.get_text_config()
        if settings.num_hidden_layers < max(self.layers):
            raise ValueError(
                f"{folder / 'text_encoder'} has {settings.num_hidden_layers} layers, and FLUX.2 "
                f"reads number {max(self.layers)}"
            )
        self._network = network.model  # without the logits of each word
        self.text_features = len(self.layers) * settings.hidden_size
        return (self._tokens,)

    def _messages(self, prompt: str) -> list[dict[str, Any]]:
        raise NotImplementedError

    def _read(self, prompts: Sequence[str], **options: Any) -> Any:
        """What the tokenizer makes of prompts in the template."""
        return self._tokens.apply_chat_template(
            [self._messages(prompt) for prompt in prompts],
            tokenize=True,
            return_dict=True,
            **self.template,
            **options,
        )

    def tokens(self, prompts: Sequence[str]) -> list[tuple[list, int]]:
        """Returns the tokens of each of `prompts` in the template, and how many are cut off."""
        rows = self._read(prompts)["input_ids"]
        return [(ids[: self.max_length], max(len(ids) - self.max_length, 0)) for ids in rows]

    def __call__(self, prompts: Sequence[str]) -> list[dict[str, np.ndarray]]:
        """Returns `text: float32[max_length, D]` of each of `prompts`."""
        options = {"padding": "max_length", "truncation": True, "max_length": self.max_length}
        tokens = self._read(prompts, return_tensors="pt", **options).to(self._device)
        with self._torch.inference_mode():
            states = self._network(
                input_ids=tokens["input_ids"],
                attention_mask=tokens["attention_mask"],
                output_hidden_states=True,
                use_cache=False,
            ).hidden_states
            text = self._torch.cat([states[layer] for layer in self.layers], dim=-1)
        return [{"text": row} for row in floats(text)]


class Flux2Encoder(_LayersEncoder):
    """FLUX.2 [dev]'s encoder: layers 10, 20 and 30 of Mistral 3."""

    name = "flux2"
    network = "Mistral3ForConditionalGeneration"
    layers = (10, 20, 30)
    template: ClassVar = {"add_generation_prompt": False}

    def _messages(self, prompt: str) -> list[dict[str, Any]]:
        pairs = (("system", _SYSTEM), ("user", prompt.replace(_IMAGE, "")))
        return [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in pairs]


class KleinEncoder(_LayersEncoder):
    """FLUX.2 [klein]'s encoder: layers 9, 18 and 27 of Qwen3."""

    name = "flux2_klein"
    network = "Qwen3ForCausalLM"
    layers = (9, 18, 27)
    template: ClassVar = {"add_generation_prompt": True, "enable_thinking": False}

    def _messages(self, prompt: str) -> list[dict[str, Any]]:
        return [{"role": "user", "content": prompt}]
