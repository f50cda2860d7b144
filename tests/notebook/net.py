"""A small model and its data, as a cell."""

from __future__ import annotations

NET = """
import torch
from torch import nn
from torch.nn import functional as F

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 3)

    def forward(self, x):
        return self.body(x)

torch.manual_seed(0)
model = Net()
X, y = torch.randn(64, 6), torch.randint(3, (64,))
train_set = torch.utils.data.TensorDataset(X, y)
test_set = torch.utils.data.TensorDataset(X[:10], y[:10])
"""
