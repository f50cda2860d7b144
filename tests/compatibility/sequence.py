"""Networks for sequences, without attention over all of them."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from case import Case
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence
from torch.utils.data import DataLoader, Dataset

VOCAB = 20


def sentences(n):
    return torch.randint(0, VOCAB, (n, 7)), torch.randint(0, 2, (n,))


class SentimentLSTM(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 8, padding_idx=0)
        self.lstm = nn.LSTM(8, 12, num_layers=2, batch_first=True)
        self.classifier = nn.Linear(12, 2)

    def forward(self, ids):
        _, (hidden, _) = self.lstm(self.embedding(ids))
        return self.classifier(hidden[-1])


class Utterances(Dataset):
    """Sequences of different lengths."""

    def __init__(self, n):
        self.items = [(torch.randint(1, VOCAB, (int(torch.randint(2, 8, ())),)), i % 3) for i in range(n)]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


def pad_collate(items):
    seqs, labels = zip(*items, strict=True)
    lengths = torch.tensor([len(s) for s in seqs])
    return pad_sequence(list(seqs), batch_first=True), lengths, torch.tensor(labels)


def utterances(n):
    return DataLoader(Utterances(n), batch_size=12, collate_fn=pad_collate)


class PackedGRU(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(VOCAB, 8, padding_idx=0)
        self.gru = nn.GRU(8, 6, bidirectional=True, batch_first=True)
        self.fc = nn.Linear(12, 3)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(self.emb(x), lengths.cpu(), batch_first=True, enforce_sorted=False)
        out, _ = self.gru(packed)
        out, _ = pad_packed_sequence(out, batch_first=True)
        return self.fc(out.sum(1) / lengths.unsqueeze(1))


class Seq2Seq(nn.Module):
    def __init__(self, hidden=10, teacher_forcing=0.5):
        super().__init__()
        self.src_emb, self.tgt_emb = nn.Embedding(VOCAB, hidden), nn.Embedding(VOCAB, hidden)
        self.encoder = nn.GRU(hidden, hidden, batch_first=True)
        self.decoder = nn.GRUCell(2 * hidden, hidden)
        self.attn, self.out = nn.Linear(2 * hidden, 1), nn.Linear(hidden, VOCAB)
        self.teacher_forcing = teacher_forcing

    def forward(self, src, tgt):
        memory, h = self.encoder(self.src_emb(src))
        h, token, logits = h[0], tgt[:, 0], []
        for t in range(1, tgt.shape[1]):
            query = h.unsqueeze(1).expand_as(memory)
            scores = self.attn(torch.cat([memory, query], -1)).squeeze(-1)
            context = (scores.softmax(1).unsqueeze(-1) * memory).sum(1)
            h = self.decoder(torch.cat([self.tgt_emb(token), context], -1), h)
            logits.append(self.out(h))
            forced = torch.rand(()).item() < self.teacher_forcing
            token = tgt[:, t] if forced else logits[-1].argmax(-1)
        return torch.stack(logits, 1)


def translations(n):
    return torch.randint(1, VOCAB, (n, 6)), torch.randint(1, VOCAB, (n, 5))


def translation_step(model, batch):
    src, tgt = batch
    return F.cross_entropy(model(src, tgt).reshape(-1, VOCAB), tgt[:, 1:].reshape(-1))


class TemporalBlock(nn.Module):
    def __init__(self, n_in, n_out, dilation):
        super().__init__()
        weight_norm = nn.utils.parametrizations.weight_norm
        self.pad = 2 * dilation
        self.conv = weight_norm(nn.Conv1d(n_in, n_out, 3, dilation=dilation))
        self.skip = nn.Conv1d(n_in, n_out, 1) if n_in != n_out else None

    def forward(self, x):
        y = torch.relu(self.conv(F.pad(x, (self.pad, 0))))
        return torch.relu(y + (x if self.skip is None else self.skip(x)))


class TCN(nn.Module):
    def __init__(self):
        super().__init__()
        sizes = [2, 8, 8, 8]
        self.net = nn.Sequential(*[TemporalBlock(sizes[i], sizes[i + 1], 2**i) for i in range(3)])
        self.linear = nn.Linear(8, 1)

    def forward(self, x):
        return self.linear(self.net(x)[:, :, -1])


class WaveNet(nn.Module):
    def __init__(self, channels=8, dilations=(1, 2, 4)):
        super().__init__()
        self.front = nn.Conv1d(1, channels, 1)
        self.gates = nn.ModuleList(nn.Conv1d(channels, 2 * channels, 2, dilation=d) for d in dilations)
        self.res = nn.ModuleList(nn.Conv1d(channels, channels, 1) for _ in dilations)
        self.skips = nn.ModuleList(nn.Conv1d(channels, channels, 1) for _ in dilations)
        self.dilations = dilations
        self.post = nn.Sequential(nn.ReLU(), nn.Conv1d(channels, 6, 1))

    def forward(self, wave):
        x, total = self.front(wave), 0
        for d, gate, res, skip in zip(self.dilations, self.gates, self.res, self.skips, strict=True):
            a, b = gate(F.pad(x, (d, 0))).chunk(2, dim=1)
            z = torch.tanh(a) * torch.sigmoid(b)
            total = total + skip(z)
            x = x + res(z)
        return self.post(total)


class SelectiveSSM(nn.Module):
    """A small selective scan, written as a loop."""

    def __init__(self, d_model=8, d_state=4):
        super().__init__()
        self.A_log = nn.Parameter(torch.log(torch.arange(1, d_state + 1).float()).repeat(d_model, 1))
        self.D = nn.Parameter(torch.ones(d_model))
        self.x_proj = nn.Linear(d_model, 2 * d_state + 1, bias=False)
        self.dt_bias = nn.Parameter(torch.zeros(d_model))
        self.d_state = d_state

    def forward(self, u):
        batch, length, d = u.shape
        A = -torch.exp(self.A_log)
        dt, B, C = self.x_proj(u).split([1, self.d_state, self.d_state], dim=-1)
        dt = F.softplus(dt + self.dt_bias)
        h = u.new_zeros(batch, d, self.d_state)
        ys = []
        for t in range(length):
            h = torch.exp(dt[:, t, :, None] * A) * h + dt[:, t, :, None] * B[:, t, None, :] * u[:, t, :, None]
            ys.append((h * C[:, t, None, :]).sum(-1))
        return torch.stack(ys, dim=1) + u * self.D


class Mamba(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 8)
        self.layers = nn.ModuleList([SelectiveSSM() for _ in range(2)])
        self.gates = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
        self.norm, self.lm_head = nn.LayerNorm(8), nn.Linear(8, VOCAB)

    def forward(self, ids):
        x = self.embed(ids)
        for ssm, gate in zip(self.layers, self.gates, strict=True):
            x = x + ssm(x) * F.silu(gate(x))
        return self.lm_head(self.norm(x))


def texts(n):
    ids = torch.randint(0, VOCAB, (n, 7))
    return ids[:, :-1], ids[:, 1:]


def lm_loss(logits, labels):
    return F.cross_entropy(logits.reshape(-1, logits.size(-1)), labels.reshape(-1))


class SpectrogramNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("window", torch.hann_window(16))
        self.conv = nn.Conv1d(9, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)

    def forward(self, wave):
        spec = torch.stft(wave, n_fft=16, hop_length=8, window=self.window, return_complex=True)
        x = torch.log1p(spec.real**2 + spec.imag**2)
        return self.fc(F.relu(self.conv(x)).amax(dim=-1))


class CellLoop(nn.Module):
    """An LSTM cell that keeps its state in the module while it runs."""

    def __init__(self):
        super().__init__()
        self.cell, self.readout = nn.LSTMCell(3, 10), nn.Linear(10, 1)
        self.state = None

    def forward(self, x):
        self.state = (x.new_zeros(len(x), 10), x.new_zeros(len(x), 10))
        for t in range(x.shape[1]):
            self.state = self.cell(x[:, t], self.state)
        return self.readout(self.state[0])


def numbers(*shape):
    return lambda n: (torch.randn(n, *shape), torch.randn(n, 1))


CASES = {
    "LSTM classifier": Case(make=SentimentLSTM, data=sentences, loss="cross_entropy", split_at="lstm"),
    "packed bidirectional GRU": Case(
        make=PackedGRU, data=utterances, loss="cross_entropy", double=False, split_at="gru"
    ),
    "seq2seq, teacher forcing": Case(
        make=Seq2Seq, data=translations, step=translation_step, sliced=True, split_at="decoder"
    ),
    "TCN, weight norm": Case(make=TCN, data=numbers(2, 12), loss="mse", split_at="net.1"),
    "WaveNet": Case(
        make=WaveNet, data=lambda n: (torch.randn(n, 1, 12), torch.randint(0, 6, (n, 12))), loss="cross_entropy",
        split_at="gates.1",
    ),
    "state space": Case(make=Mamba, data=texts, loss=lm_loss, optimizer="adamw", lr=0.003, split_at="layers.1"),
    "spectrogram, STFT": Case(
        make=SpectrogramNet, data=lambda n: (torch.randn(n, 64), torch.randint(0, 4, (n,))), loss="cross_entropy",
        split_at="fc",
    ),
    "LSTM cell in a loop": Case(make=CellLoop, data=numbers(5, 3), loss="mse", split_at="readout"),
}  # fmt: skip
