"""Models of transformers as their users make them, small and with random weights; nothing is downloaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from problems import seeded
from torch import nn

VOCABULARY, LENGTH, LABELS = 32, 8, 4
IGNORED = -100  # what transformers' losses leave out


def gpt2() -> nn.Module:
    """Tied head, Conv1D layers, dropout."""
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=16, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=1
        )
    )


def llama() -> nn.Module:
    """Rotary embedding, grouped queries, SwiGLU."""
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=LENGTH,
        )
    )  # fmt: skip


def bert() -> nn.Module:
    """Masked tokens, a tied decoder, dropout."""
    return transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=4, num_attention_heads=4, intermediate_size=32,
            max_position_embeddings=LENGTH,
        )
    )  # fmt: skip


def t5() -> nn.Module:
    """Encoder and decoder, one table of positions in each, dropout."""
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=VOCABULARY, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0
        )
    )


def vit() -> nn.Module:
    """Patches of images."""
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=4, num_attention_heads=4,
            intermediate_size=32, num_labels=LABELS,
        )
    )  # fmt: skip


def resnet() -> nn.Module:
    """Convolutions with BatchNorm."""
    return transformers.ResNetForImageClassification(
        transformers.ResNetConfig(
            embedding_size=4, hidden_sizes=[4, 8, 8], depths=[1, 1, 1], layer_type="basic", num_labels=LABELS
        )
    )


def tokens(samples: int) -> dict[str, torch.Tensor]:
    """Text for a causal model: the last two tokens are padding in every sample, so all slices weigh the same."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (samples, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[:, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORED)}


def masked_tokens(samples: int) -> dict[str, torch.Tensor]:
    """Two of the tokens of each sample are to be guessed."""
    batch = tokens(samples)
    guessed = torch.zeros_like(batch["labels"], dtype=torch.bool)
    guessed[:, 1:3] = True
    return batch | {"labels": batch["input_ids"].masked_fill(~guessed, IGNORED)}


def images(samples: int, size: int) -> dict[str, torch.Tensor]:
    """Images and their classes."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(samples, 3, size, size, generator=generator, dtype=torch.float64)
    return {"pixel_values": pixels, "labels": torch.randint(LABELS, (samples,), generator=generator)}


@dataclass(frozen=True)
class Case:
    """A model with data.

    Args:
        make: The model.
        data: ``data(samples)``.
    """

    make: Callable[[], nn.Module]
    data: Callable[[int], Any]

    def model(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The same weights each time."""
        return seeded(self.make, dtype).train()


T5 = Case(t5, tokens)

CASES = {
    "GPT-2": Case(gpt2, tokens),
    "Llama": Case(llama, tokens),
    "BERT": Case(bert, masked_tokens),
    "ViT": Case(vit, lambda samples: images(samples, 8)),
    "ResNet": Case(resnet, lambda samples: images(samples, 16)),
}
