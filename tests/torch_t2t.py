"""T2T-ViT in plain eager PyTorch, by the names of its published files. It needs torch.

Written from the paper (arXiv:2101.11986) and the description of its files, to compare numbers and
speed with.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

_SPLITS = ((7, 4, 2), (3, 2, 1), (3, 2, 1))


class _Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class _Performer(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(64)
        self.kqv, self.proj = nn.Linear(width, 192), nn.Linear(64, 64)
        self.mlp = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.Dropout(0.1))
        rows = nn.init.orthogonal_(torch.empty(32, 64)) * math.sqrt(32)
        self.w = nn.Parameter(rows, requires_grad=False)

    def _features(self, x):
        squares = x.square().sum(-1, keepdim=True) / 2
        return torch.exp(x @ self.w.T - squares) / math.sqrt(len(self.w))

    def forward(self, x):
        key, query, value = self.kqv(self.norm1(x)).chunk(3, dim=-1)
        key, query = self._features(key), self._features(query)
        total = query @ key.sum(1, keepdim=True).transpose(1, 2)
        y = query @ (key.transpose(1, 2) @ value) / (total + 1e-8)
        y = value + F.dropout(self.proj(y), 0.1, self.training)
        return y + self.mlp(self.norm2(y))


class _Attention(nn.Module):
    def __init__(self, width: int, inner: int, heads: int, scale: float):
        super().__init__()
        self.heads, self.scale = heads, scale
        self.qkv, self.proj = nn.Linear(width, 3 * inner, bias=False), nn.Linear(inner, inner)

    def forward(self, x):
        """Attention's output, and the values."""
        n, t, _ = x.shape
        query, key, value = self.qkv(x).reshape(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = (query * self.scale @ key.transpose(-1, -2)).softmax(-1)
        return self.proj((weights @ value).transpose(1, 2).reshape(n, t, -1)), value


class _Transformer(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(64)
        self.attn, self.mlp = _Attention(width, 64, 1, width**-0.5), _Mlp(64, 64)

    def forward(self, x):
        y, value = self.attn(self.norm1(x))
        y = y + value.squeeze(1)
        return y + self.mlp(self.norm2(y))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = _Attention(width, width, heads, (width // heads) ** -0.5)
        self.mlp = _Mlp(width, hidden)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))[0]
        return x + self.mlp(self.norm2(x))


class _Tokens(nn.Module):
    def __init__(self, kind: str, width: int, channels: int):
        super().__init__()
        make = {"performer": _Performer, "transformer": _Transformer}[kind]
        self.attention1, self.attention2 = make(49 * channels), make(576)
        self.project = nn.Linear(576, width)

    def forward(self, x):
        layers = (self.attention1, self.attention2, self.project)
        for layer, (window, stride, padding) in zip(layers, _SPLITS, strict=True):
            rows, columns = ((s + 2 * padding - window) // stride + 1 for s in x.shape[2:])
            x = layer(F.unfold(x, window, stride=stride, padding=padding).transpose(1, 2))
            if layer is not self.project:
                x = x.transpose(1, 2).reshape(len(x), 64, rows, columns)
        return x


class T2T(nn.Module):
    """(n, c, h, w) -> (n, classes)."""

    def __init__(
        self,
        token_attention: str = "performer",
        *,
        num_classes: int,
        hidden_size: int,
        num_layers: int,
        num_heads: int,
        mlp_dim: int,
        patches: int,
        channels: int = 3,
    ):
        super().__init__()
        self.tokens_to_token = _Tokens(token_attention, hidden_size, channels)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, hidden_size))
        positions = torch.zeros(1, 1 + patches, hidden_size)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        blocks = (_Block(hidden_size, num_heads, mlp_dim) for _ in range(num_layers))
        self.blocks = nn.ModuleList(blocks)
        self.norm, self.head = nn.LayerNorm(hidden_size), nn.Linear(hidden_size, num_classes)

    def forward(self, x):
        x = self.tokens_to_token(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])
