"""Networks for images."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from case import Case


def images(n):
    return torch.randn(n, 3, 8, 8), torch.randint(0, 4, (n,))


def small_cnn():
    return nn.Sequential(
        nn.Conv2d(3, 8, kernel_size=3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, kernel_size=3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )


class BasicBlock(nn.Module):
    def __init__(self, in_planes, planes, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Identity()
        if stride > 1 or in_planes != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(in_planes, planes, 1, stride=stride), nn.BatchNorm2d(planes))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class TinyResNet(nn.Module):
    def __init__(self, num_classes=4):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layer1 = BasicBlock(8, 8)
        self.layer2 = BasicBlock(8, 16, stride=2)
        self.fc = nn.Linear(16, num_classes)

    def forward(self, x):
        x = self.layer2(self.layer1(self.stem(x)))
        return self.fc(torch.flatten(F.avg_pool2d(x, x.shape[-1]), 1))


class DoubleConv(nn.Sequential):
    def __init__(self, cin, cout):
        super().__init__(nn.Conv2d(cin, cout, 3, padding=1), nn.GroupNorm(2, cout), nn.SiLU())


class SegmentationUNet(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.inc, self.down1, self.down2 = DoubleConv(3, 4), DoubleConv(4, 8), DoubleConv(8, 8)
        self.up1, self.conv1 = nn.ConvTranspose2d(8, 8, 2, stride=2), DoubleConv(16, 8)
        self.up2, self.conv2 = nn.ConvTranspose2d(8, 4, 2, stride=2), DoubleConv(8, 4)
        self.outc = nn.Conv2d(4, classes, 1)

    def forward(self, x):
        x1 = self.inc(x)
        x2 = self.down1(F.max_pool2d(x1, 2))
        x3 = self.down2(F.max_pool2d(x2, 2))
        y = self.conv1(torch.cat([x2, self.up1(x3)], dim=1))
        y = self.conv2(torch.cat([x1, self.up2(y)], dim=1))
        return self.outc(y)


def segmentation(n):
    labels = torch.randint(0, 3, (n, 8, 8))
    labels[torch.rand(n, 8, 8) < 0.3] = 255
    return torch.randn(n, 3, 8, 8), labels


class SqueezeExcite(nn.Module):
    def __init__(self, channels, reduction=2):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // reduction, 1)
        self.fc2 = nn.Conv2d(channels // reduction, channels, 1)

    def forward(self, x):
        s = F.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(s))))


class MBConv(nn.Module):
    def __init__(self, channels, expand=2):
        super().__init__()
        hidden = channels * expand
        self.expand = nn.Conv2d(channels, hidden, 1, bias=False)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False)
        self.norm = nn.GroupNorm(4, hidden)
        self.se = SqueezeExcite(hidden)
        self.project = nn.Conv2d(hidden, channels, 1, bias=False)

    def forward(self, x):
        h = F.hardswish(self.depthwise(F.hardswish(self.expand(x))))
        return x + self.project(self.se(self.norm(h)))


class MobileNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(MBConv(8), MBConv(8))
        self.classifier = nn.Linear(8, 4)

    def forward(self, x):
        return self.classifier(self.blocks(self.stem(x)).mean(dim=(-2, -1)))


class ConvAutoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(6, 12, 3, stride=2, padding=1)
        )
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(12, 6, 2, stride=2), nn.LeakyReLU(0.2), nn.ConvTranspose2d(6, 3, 2, stride=2), nn.Tanh()
        )

    def forward(self, x):
        return self.decoder(self.encoder(x))


class ManyNorms(nn.Module):
    def __init__(self):
        super().__init__()
        self.c1, self.n1 = nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, affine=True)
        self.c2, self.n2 = nn.Conv2d(8, 8, 3), nn.GroupNorm(4, 8)
        self.n3, self.out = nn.LayerNorm([8, 4, 4]), nn.Linear(8 * 4 * 4, 4)
        self.prelu = nn.PReLU(8)

    def forward(self, x):
        x = self.prelu(self.n1(self.c1(x)))
        x = self.n3(F.elu(self.n2(self.c2(x))))
        return self.out(x.flatten(1))


class DropPath(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        keep = 1 - self.p
        mask = torch.rand(x.size(0), *[1] * (x.dim() - 1), dtype=x.dtype, device=x.device) < keep
        return x / keep * mask


class StochasticDepthNet(nn.Module):
    def __init__(self, depth=3):
        super().__init__()
        self.embed = nn.Linear(3 * 64, 16)
        self.layers = nn.ModuleList(
            [nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Dropout(0.2)) for _ in range(depth)]
        )
        self.paths = nn.ModuleList([DropPath(0.1 * i) for i in range(depth)])
        self.head = nn.Linear(16, 4)

    def forward(self, img):
        h = self.embed(img.flatten(1))
        for layer, path in zip(self.layers, self.paths, strict=True):
            h = h + path(layer(h))
        return self.head(h)


class ViT(nn.Module):
    def __init__(self, dim=16, heads=4, depth=2, patch=4):
        super().__init__()
        self.patchify = nn.Conv2d(3, dim, patch, stride=patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 5, dim) * 0.02)
        self.norms = nn.ModuleList([nn.LayerNorm(dim) for _ in range(depth)])
        self.attns = nn.ModuleList([nn.MultiheadAttention(dim, heads, batch_first=True) for _ in range(depth)])
        self.mlps = nn.ModuleList(
            [nn.Sequential(nn.Linear(dim, 32), nn.GELU(), nn.Linear(32, dim)) for _ in range(depth)]
        )
        self.head = nn.Linear(dim, 4)

    def forward(self, x):
        x = self.patchify(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        self.maps = []
        for norm, attn, mlp in zip(self.norms, self.attns, self.mlps, strict=True):
            y = norm(x)
            y, weights = attn(y, y, y, need_weights=True, average_attn_weights=False)
            self.maps.append(weights.detach())
            x = x + y
            x = x + mlp(x)
        return self.head(x[:, 0])


class MixerLayer(nn.Module):
    def __init__(self, tokens, channels):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.token_mix = nn.Sequential(nn.Linear(tokens, 8), nn.GELU(), nn.Linear(8, tokens))
        self.channel_mix = nn.Sequential(nn.Linear(channels, 24), nn.GELU(), nn.Linear(24, channels))

    def forward(self, x):
        x = x + self.token_mix(self.ln1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channel_mix(self.ln2(x))


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.unfold, self.embed = nn.Unfold(4, stride=4), nn.Linear(48, 12)
        self.layers = nn.Sequential(*[MixerLayer(4, 12) for _ in range(2)])
        self.out = nn.Linear(12, 4)

    def forward(self, x):
        return self.out(self.layers(self.embed(self.unfold(x).mT)).mean(1))


class Detector(nn.Module):
    """A class and a box at each of four places."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1))
        self.heads = nn.ModuleDict({"logits": nn.Conv2d(8, 3, 1), "boxes": nn.Conv2d(8, 4, 1)})

    def forward(self, image):
        features = F.relu(self.backbone(image))
        return {name: head(features).flatten(2).transpose(1, 2) for name, head in self.heads.items()}


def detections(n):
    return torch.randn(n, 3, 8, 8), torch.randint(0, 3, (n, 4)), torch.rand(n, 4, 4)


def detection_step(model, batch):
    image, classes, boxes = batch
    out = model(image)
    class_loss = F.cross_entropy(out["logits"].transpose(1, 2), classes)
    return class_loss + 2.0 * F.smooth_l1_loss(out["boxes"].sigmoid(), boxes)


class CapsNet(nn.Module):
    def __init__(self, n_in=9, d_in=4, n_out=4, d_out=6):
        super().__init__()
        self.conv = nn.Conv2d(3, d_in, 4, stride=2)
        self.W = nn.Parameter(0.1 * torch.randn(n_in, n_out, d_out, d_in))

    @staticmethod
    def squash(v):
        sq = (v**2).sum(-1, keepdim=True)
        return sq / (1 + sq) * v / torch.sqrt(sq + 1e-8)

    def forward(self, x):
        u = self.squash(self.conv(x).flatten(2).transpose(1, 2))
        u_hat = torch.einsum("iodk,bik->biod", self.W, u)
        b = torch.zeros(u_hat.shape[:3], dtype=x.dtype, device=x.device)
        for i in range(3):
            c = b.softmax(dim=2)
            v = self.squash((c.unsqueeze(-1) * u_hat).sum(1))
            if i < 2:
                b = b + (u_hat.detach() * v.unsqueeze(1)).sum(-1)
        return v.norm(dim=-1)


def margin_loss(lengths, target):
    t = F.one_hot(target, 4).to(lengths)
    loss = t * F.relu(0.9 - lengths) ** 2 + 0.5 * (1 - t) * F.relu(lengths - 0.1) ** 2
    return loss.sum(1).mean()


def spectral_discriminator():
    sn = nn.utils.parametrizations.spectral_norm
    return nn.Sequential(
        sn(nn.Conv2d(3, 8, 3, stride=2, padding=1)), nn.LeakyReLU(0.1), sn(nn.Conv2d(8, 8, 3, stride=2, padding=1)),
        nn.LeakyReLU(0.1), nn.Flatten(), sn(nn.Linear(32, 4)),
    )  # fmt: skip


IGNORING = nn.CrossEntropyLoss(ignore_index=255)

CASES = {
    "CNN with BatchNorm": Case(make=small_cnn, data=images, loss="cross_entropy", sliced=True, split_at="4"),
    "ResNet": Case(make=TinyResNet, data=images, loss="cross_entropy", sliced=True, split_at="layer2"),
    "U-Net, ignored labels": Case(
        make=SegmentationUNet, data=segmentation, loss=IGNORING, split_at="up1",
        weigh=lambda batch: (batch[1] != 255).sum().item(),
    ),
    "MobileNet, SE": Case(make=MobileNet, data=images, loss="cross_entropy", optimizer="adamw", split_at="blocks.1"),
    "ConvTranspose autoencoder": Case(
        make=ConvAutoencoder, data=lambda n: 2 * (torch.rand(n, 3, 8, 8).tanh(),), loss="mse", split_at="decoder"
    ),
    "group, instance, layer norm": Case(make=ManyNorms, data=images, loss=F.cross_entropy, split_at="c2"),
    "stochastic depth": Case(
        make=StochasticDepthNet, data=images, loss="cross_entropy", sliced=True, split_at="layers.1"
    ),
    "ViT, attention maps": Case(make=ViT, data=images, loss="cross_entropy", optimizer="adamw", lr=0.003,
                                split_at="attns.1"),
    "MLP-Mixer": Case(make=Mixer, data=images, loss="cross_entropy", double=False, split_at="layers.1"),
    "detector, dict of outputs": Case(make=Detector, data=detections, step=detection_step, split_at="heads"),
    "capsules": Case(make=CapsNet, data=images, loss=margin_loss, lr=0.5),
    "spectral norm": Case(make=spectral_discriminator, data=images, loss="cross_entropy", sliced=True, split_at="2"),
}  # fmt: skip
