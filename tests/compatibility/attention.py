"""Transformers of many kinds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from case import Case

VOCAB, T, D = 24, 8, 16


def text(n):
    ids = torch.randint(1, VOCAB, (n, T))
    return ids, torch.roll(ids, -1, dims=1)


def padded(n):
    ids = torch.randint(1, VOCAB, (n, T))
    lengths = torch.randint(3, T + 1, (n, 1))
    return ids.masked_fill(torch.arange(T) >= lengths, 0), torch.randint(0, 3, (n,))


def lm_loss(logits, labels):
    return F.cross_entropy(logits.view(-1, VOCAB), labels.view(-1))


class PaddedEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, D, padding_idx=0)
        layer = nn.TransformerEncoderLayer(D, nhead=4, dim_feedforward=32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.head = nn.Linear(D, 3)

    def forward(self, ids):
        pad = ids == 0
        x = self.encoder(self.embed(ids), src_key_padding_mask=pad)
        x = x.masked_fill(pad.unsqueeze(-1), 0.0).sum(1) / (~pad).sum(1, keepdim=True)
        return self.head(x)


class CausalSelfAttention(nn.Module):
    def __init__(self, n_head=4):
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.n_head = n_head
        self.register_buffer("bias", torch.tril(torch.ones(T, T)).view(1, 1, T, T), persistent=False)

    def forward(self, x):
        B, L, C = x.size()
        q, k, v = self.c_attn(x).split(C, dim=2)
        q, k, v = (t.view(B, L, self.n_head, C // self.n_head).transpose(1, 2) for t in (q, k, v))
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :L, :L] == 0, float("-inf"))
        y = F.softmax(att, dim=-1) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, L, C))


class GPTBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(D), CausalSelfAttention(), nn.LayerNorm(D)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(D, 4 * D), "act": nn.GELU(), "c_proj": nn.Linear(4 * D, D)})

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        m = self.mlp
        return x + m.c_proj(m.act(m.c_fc(self.ln_2(x))))


class GPT(nn.Module):
    def __init__(self, n_layer=2):
        super().__init__()
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(VOCAB, D), "wpe": nn.Embedding(T, D),
            "h": nn.ModuleList([GPTBlock() for _ in range(n_layer)]), "ln_f": nn.LayerNorm(D),
        })  # fmt: skip
        self.lm_head = nn.Linear(D, VOCAB, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, idx):
        pos = torch.arange(0, idx.size(1), dtype=torch.long, device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(pos)
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x))


class Translator(nn.Module):
    def __init__(self):
        super().__init__()
        self.src, self.tgt = nn.Embedding(VOCAB, D), nn.Embedding(VOCAB, D)
        self.transformer = nn.Transformer(D, 2, 1, 1, 32, dropout=0.0, batch_first=True)
        self.generator = nn.Linear(D, VOCAB)

    def forward(self, src, tgt):
        mask = nn.Transformer.generate_square_subsequent_mask(tgt.size(1), device=tgt.device)
        mask = mask.to(self.generator.weight.dtype)
        return self.generator(self.transformer(self.src(src), self.tgt(tgt), tgt_mask=mask))


def sentence_pairs(n):
    target = torch.randint(0, VOCAB, (n, T))
    return torch.randint(0, VOCAB, (n, 5)), target[:, :-1], target[:, 1:]


def sequence_loss(logits, labels):
    return nn.functional.cross_entropy(logits.transpose(1, 2), labels)


class ALiBiAttention(nn.Module):
    def __init__(self, heads=4):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.out, self.heads = nn.Linear(D, D), heads
        slopes = torch.tensor([2.0 ** (-8 * (i + 1) / heads) for i in range(heads)])
        distance = torch.arange(T)[None] - torch.arange(T)[:, None]
        self.register_buffer("alibi", slopes[:, None, None] * distance, persistent=False)
        self.register_buffer("future", distance > 0)

    def forward(self, x):
        b, n, _ = x.shape
        split = lambda y: y.reshape(b, n, self.heads, -1).transpose(1, 2)  # noqa: E731
        scores = split(self.q(x)) @ split(self.k(x)).transpose(-1, -2) / 2 + self.alibi[:, :n, :n]
        weights = scores.masked_fill(self.future[:n, :n], -1e9).softmax(-1)
        return self.out((weights @ split(self.v(x))).transpose(1, 2).flatten(2))


class Rotary(nn.Module):
    """Caches its tables at the first call, and for longer sequences again."""

    def __init__(self, dim):
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / (100 ** (torch.arange(0, dim, 2).float() / dim)))
        self.seq_len_cached, self.cos_cached, self.sin_cached = 0, None, None

    def forward(self, x):
        n = x.shape[-2]
        if n > self.seq_len_cached:
            self.seq_len_cached = n
            freqs = torch.outer(torch.arange(n, device=x.device).type_as(self.inv_freq), self.inv_freq)
            emb = torch.cat((freqs, freqs), dim=-1)
            self.cos_cached, self.sin_cached = emb.cos(), emb.sin()
        x1, x2 = x.chunk(2, dim=-1)
        return x * self.cos_cached[:n] + torch.cat((-x2, x1), dim=-1) * self.sin_cached[:n]


class RotaryAttention(nn.Module):
    def __init__(self, heads=4):
        super().__init__()
        self.qkv, self.proj, self.heads = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False), heads
        self.rotary = Rotary(D // heads)

    def forward(self, x):
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(self.rotary(q), self.rotary(k), v, is_causal=True)
        return self.proj(y.transpose(1, 2).reshape(b, n, d))


class WindowAttention(nn.Module):
    def __init__(self, window=3, heads=2):
        super().__init__()
        self.to_qkv, self.to_out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.window, self.heads = window, heads

    def forward(self, x):
        i = torch.arange(x.size(1), device=x.device)
        allowed = (i[:, None] - i[None, :]).abs() < self.window
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.to_qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        return self.to_out(y.transpose(1, 2).flatten(-2))


class LinearAttention(nn.Module):
    """The causal kernel, with its weights in a ParameterList."""

    def __init__(self, heads=4):
        super().__init__()
        d = D // heads
        self.w = nn.ParameterList([nn.Parameter(torch.randn(heads, D, d) / 4) for _ in range(3)])
        self.o = nn.Parameter(torch.randn(heads, d, D) / 4)

    def forward(self, x):
        q, k, v = (torch.einsum("bnd,hde->bhne", x, w) for w in self.w)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        kv = torch.einsum("bhne,bhnf->bhnef", k, v).cumsum(2)
        z = 1 / torch.einsum("bhne,bhne->bhn", q, k.cumsum(2))
        y = torch.einsum("bhne,bhnef,bhn->bhnf", q, kv, z)
        return torch.einsum("bhnf,hfd->bnd", y, self.o)


class LM(nn.Module):
    """A language model with some kind of attention."""

    def __init__(self, attention):
        super().__init__()
        self.emb = nn.Embedding(VOCAB, D)
        self.attn = nn.ModuleList([attention() for _ in range(2)])
        self.ff = nn.ModuleList([nn.Sequential(nn.Linear(D, 32), nn.ReLU(), nn.Linear(32, D)) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, VOCAB)

    def forward(self, ids):
        x = self.emb(ids)
        for attn, ff in zip(self.attn, self.ff, strict=True):
            x = x + attn(x)
            x = x + ff(self.norm(x))
        return self.head(x)


@dataclass
class MaskedLMOutput:
    loss: torch.Tensor | None
    logits: torch.Tensor


class MaskedLM(nn.Module):
    """Computes its loss, over the tokens that have a label."""

    def __init__(self):
        super().__init__()
        self.embeddings, self.position = nn.Embedding(VOCAB, D), nn.Embedding(T, D)
        self.register_buffer("position_ids", torch.arange(T).unsqueeze(0), persistent=False)
        self.layer = nn.ModuleList([WindowAttention(window=T) for _ in range(2)])
        self.dense, self.decoder = nn.Linear(D, D), nn.Linear(D, VOCAB)

    def forward(self, input_ids, labels=None):
        x = self.embeddings(input_ids) + self.position(self.position_ids[:, : input_ids.size(1)])
        for layer in self.layer:
            x = x + layer(x)
        logits = self.decoder(F.gelu(self.dense(x)))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.view(-1, VOCAB), labels.view(-1))
        return MaskedLMOutput(loss, logits)


def masked_text(n):
    ids = torch.randint(1, VOCAB, (n, T))
    masked = torch.rand(n, T) < 0.4
    masked[:, 0] = True
    return {"input_ids": ids.masked_fill(masked, 0), "labels": ids.masked_fill(~masked, -100)}


class LoRALinear(nn.Module):
    def __init__(self, base, rank=2, alpha=4):
        super().__init__()
        self.base = base
        for p in base.parameters():
            p.requires_grad = False
        self.lora_A = nn.Parameter(torch.randn(rank, base.in_features) * 0.1)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))
        self.scaling = alpha / rank

    def forward(self, x):
        return self.base(x) + x @ self.lora_A.T @ self.lora_B.T * self.scaling


def lora_gpt():
    model = GPT()
    for p in model.parameters():
        p.requires_grad = False
    for block in model.transformer.h:
        block.attn.c_attn = LoRALinear(block.attn.c_attn)
        block.attn.c_proj = LoRALinear(block.attn.c_proj)
    return model


class Perceiver(nn.Module):
    """Latents that read the input several times with the same weights."""

    def __init__(self, n_latents=4, depth=3):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(n_latents, D) * 0.1)
        self.project = nn.Linear(5, D)
        self.cross = nn.MultiheadAttention(D, 2, batch_first=True)
        self.process = nn.TransformerEncoderLayer(D, 2, 32, 0.0, batch_first=True, norm_first=True)
        self.classify, self.depth = nn.Linear(D, 3), depth

    def forward(self, points):
        context = self.project(points)
        z = self.latents.unsqueeze(0).repeat(points.shape[0], 1, 1)
        for _ in range(self.depth):
            z = z + self.cross(z, context, context, need_weights=False)[0]
            z = self.process(z)
        return self.classify(z.mean(1))


CASES = {
    "TransformerEncoder, padding": Case(
        make=PaddedEncoder, data=padded, loss="cross_entropy", optimizer="adamw", lr=0.003, split_at="encoder.layers.1"
    ),
    "GPT, tied": Case(make=GPT, data=text, loss=lm_loss, optimizer="adamw", lr=0.003, split_at="transformer.h.1"),
    "nn.Transformer": Case(
        make=Translator, data=sentence_pairs, loss=sequence_loss, split_at="generator"
    ),
    "ALiBi": Case(make=lambda: LM(ALiBiAttention), data=text, loss=lm_loss, split_at="attn.1"),
    "rotary, cached": Case(make=lambda: LM(RotaryAttention), data=text, loss=lm_loss, split_at="attn.1"),
    "sliding window": Case(
        make=lambda: LM(WindowAttention), data=text, loss=lm_loss, double=False, split_at="attn.1"
    ),
    "linear attention": Case(make=lambda: LM(LinearAttention), data=text, loss=lm_loss, split_at="attn.1"),
    "masked LM, own loss": Case(
        make=MaskedLM, data=masked_text, split_at="layer.1", weigh=lambda batch: (batch["labels"] != -100).sum().item()
    ),
    "LoRA": Case(make=lora_gpt, data=text, loss=lm_loss, optimizer="adamw", lr=0.01, split_at="transformer.h.1"),
    "Perceiver": Case(
        make=Perceiver, data=lambda n: (torch.randn(n, 6, 5), torch.randint(0, 3, (n,))), loss="cross_entropy",
        split_at="classify",
    ),
}  # fmt: skip
