"""Ten more families of transformers, small and with random weights, in float32 as they are made."""

from __future__ import annotations

import torch
import transformers
from hugging_face import IGNORED, LABELS, LENGTH, VOCABULARY, Case
from torch import nn

PAD = 0


def bart() -> nn.Module:
    """Encoder and decoder with learned positions, and a tied head with a bias in a buffer."""
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=VOCABULARY, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=2 * LENGTH,
            pad_token_id=PAD, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
            dropout=0.0,
        )
    )  # fmt: skip


def mixtral() -> nn.Module:
    """Mixture of experts: tokens are routed by their content."""
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, max_position_embeddings=2 * LENGTH, pad_token_id=PAD,
        )
    )  # fmt: skip


def balanced_mixtral() -> nn.Module:
    """The same with its loss for balanced experts, which is one over the whole batch."""
    model = mixtral()
    model.config.output_router_logits, model.config.router_aux_loss_coef = True, 0.1
    model.router_aux_loss_coef = 0.1
    return model


def mamba() -> nn.Module:
    """State space: a scan over time."""
    return transformers.MambaForCausalLM(
        transformers.MambaConfig(
            vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=2, pad_token_id=PAD, use_cache=False
        )
    )


def wav2vec2() -> nn.Module:
    """Audio: convolutions over samples, and attention."""
    return transformers.Wav2Vec2ForSequenceClassification(
        transformers.Wav2Vec2Config(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, conv_dim=(8, 8),
            conv_stride=(4, 2), conv_kernel=(8, 4), num_feat_extract_layers=2, num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=2, num_labels=LABELS, classifier_proj_size=8, hidden_dropout=0.0,
            activation_dropout=0.0, attention_dropout=0.0, feat_proj_dropout=0.0, final_dropout=0.0, layerdrop=0.0,
            mask_time_prob=0.0,
        )
    )  # fmt: skip


def whisper() -> nn.Module:
    """Speech to text: spectra into an encoder, text from a decoder."""
    return transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            vocab_size=VOCABULARY, num_mel_bins=4, d_model=16, encoder_layers=2, decoder_layers=2,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
            max_source_positions=LENGTH, max_target_positions=2 * LENGTH, pad_token_id=PAD, bos_token_id=1,
            eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
        )
    )  # fmt: skip


def convnext() -> nn.Module:
    """Vision: depthwise convolutions."""
    return transformers.ConvNextForImageClassification(
        transformers.ConvNextConfig(
            patch_size=2, hidden_sizes=[8, 12, 16, 16], depths=[1, 1, 1, 1], num_labels=LABELS, drop_path_rate=0.0
        )
    )


def segformer() -> nn.Module:
    """Vision, dense: a class for each pixel, and pixels without one."""
    return transformers.SegformerForSemanticSegmentation(
        transformers.SegformerConfig(
            num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[3, 3],
            strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=8, num_labels=LABELS,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout_prob=0.0, drop_path_rate=0.0,
            semantic_loss_ignore_index=IGNORED,
        )
    )  # fmt: skip


def yolos() -> nn.Module:
    """Detection: boxes and classes, matched with those of the image."""
    return transformers.YolosModel(
        transformers.YolosConfig(
            image_size=[16, 16], patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=32, num_detection_tokens=5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


class Detector(nn.Module):
    """A detector that counts on one box an image, as a user writes it around a backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.boxes = yolos(), nn.Linear(16, 4)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """The mean distance of all boxes."""
        found = self.boxes(self.backbone(pixel_values=pixel_values).last_hidden_state[:, -5:]).sigmoid()
        return {"loss": nn.functional.l1_loss(found, labels[:, None].expand_as(found)), "logits": found}


class Contrastive(nn.Module):
    """Each text against all images of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.clip = clip()

    def forward(self, **given: torch.Tensor) -> object:
        """The model's own loss, which it computes only if asked."""
        return self.clip(**given, return_loss=True)


def clip() -> nn.Module:
    """Two towers."""
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={
                **small, "vocab_size": VOCABULARY, "max_position_embeddings": 2 * LENGTH, "eos_token_id": 2,
                "bos_token_id": 1, "pad_token_id": PAD,
            },
            vision_config={**small, "image_size": 8, "patch_size": 4},
            projection_dim=8,
        )
    )  # fmt: skip


def padded(samples: int) -> dict[str, torch.Tensor]:
    """Text of many lengths in padded rows, in which the padding has no label: each slice weighs something else."""
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(3, 2 * LENGTH + 1, (samples, 1), generator=generator)
    ids = torch.randint(3, VOCABULARY, (samples, 2 * LENGTH), generator=generator)
    mask = (torch.arange(2 * LENGTH) < lengths).long()
    ids = ids.masked_fill(mask == 0, PAD)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORED)}


def waves(samples: int) -> dict[str, torch.Tensor]:
    """Sound of many lengths, and its class."""
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(200, 401, (samples, 1), generator=generator)
    mask = (torch.arange(400) < lengths).long()
    return {
        "input_values": torch.randn(samples, 400, generator=generator) * mask, "attention_mask": mask,
        "labels": torch.randint(LABELS, (samples,), generator=generator),
    }  # fmt: skip


def speech(samples: int) -> dict[str, torch.Tensor]:
    """Spectra, and text of many lengths."""
    generator = torch.Generator().manual_seed(3)
    return {
        "input_features": torch.randn(samples, 4, 2 * LENGTH, generator=generator), "labels": padded(samples)["labels"],
    }  # fmt: skip


def pictures(samples: int, size: int) -> dict[str, torch.Tensor]:
    """Images and their classes."""
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(samples, 3, size, size, generator=generator)
    return {"pixel_values": pixels, "labels": torch.randint(LABELS, (samples,), generator=generator)}


def scenes(samples: int) -> dict[str, torch.Tensor]:
    """Images and a class for most of their pixels."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(LABELS, (samples, 16, 16), generator=generator)
    unknown = torch.rand(samples, 16, 16, generator=generator) < torch.rand(samples, 1, 1, generator=generator) * 0.6
    return pictures(samples, 16) | {"labels": labels.masked_fill(unknown, IGNORED)}


def boxes(samples: int) -> dict[str, torch.Tensor]:
    """Images and a box in each."""
    generator = torch.Generator().manual_seed(2)
    return pictures(samples, 16) | {"labels": torch.rand(samples, 4, generator=generator)}


def captions(samples: int) -> dict[str, torch.Tensor]:
    """Images and their texts."""
    texts = padded(samples)
    ids = texts["input_ids"].masked_fill(texts["attention_mask"] == 0, 2)
    pixels = pictures(samples, 8)["pixel_values"]
    return {"input_ids": ids, "attention_mask": texts["attention_mask"], "pixel_values": pixels}


FAMILIES = {
    "BART (encoder-decoder)": Case(bart, padded),
    "Mixtral (mixture of experts)": Case(mixtral, padded),
    "Mixtral, balanced": Case(balanced_mixtral, padded),
    "Mamba (state space)": Case(mamba, padded),
    "Wav2Vec2 (audio)": Case(wav2vec2, waves),
    "Whisper (speech to text)": Case(whisper, speech),
    "ConvNext (vision)": Case(convnext, lambda samples: pictures(samples, 32)),
    "Segformer (segmentation)": Case(segformer, scenes),
    "YOLOS (detection)": Case(Detector, boxes),
    "CLIP (contrastive)": Case(Contrastive, captions),
}
