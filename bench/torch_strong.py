"""The peer that counts: a Llama in PyTorch written for speed, of the same shape as ours, for bench/train_speed.py.

One matmul for queries, keys and values, one for gate and up; attention by cuDNN's or the flash kernel; everything from the tokens to the
loss inside torch.compile, logits in bfloat16 and the loss in float32; bf16 autocast over float32 masters, fused AdamW, clipping at 1.
Facts about what makes PyTorch fast are its documentation's; shapes are those of a ModelConfig.

Shapes: B batch, T positions, D width, H heads, K head size.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from smedjan_common.config import ModelConfig
from smedjan_common.model import rope

BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]  # in this order


class Norm(nn.Module):
    """RMSNorm over the last axis, in float32."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], None, self.eps).to(x.dtype) * self.weight.to(x.dtype)


class Block(nn.Module):
    """Attention and SwiGLU, each after a norm and added to what came in."""

    def __init__(self, model: ModelConfig):
        super().__init__()
        D, width = model.dim, model.ffn_dim
        self.heads, self.kv_heads, self.head_dim = model.heads, model.kv_heads, model.head_dim
        self.mixer_norm, self.ffn_norm = Norm(D, model.norm_eps), Norm(D, model.norm_eps)
        self.qkv = nn.Linear(D, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=False)
        self.out = nn.Linear(self.heads * self.head_dim, D, bias=False)
        self.gate_up, self.down = nn.Linear(D, 2 * width, bias=False), nn.Linear(width, D, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        B, T, _ = x.shape
        heads = self.qkv(self.mixer_norm(x)).view(B, T, -1, self.head_dim).transpose(1, 2)
        query, key, value = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        query, key = (turned(each, cos, sin) for each in (query, key))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=self.heads > self.kv_heads)
        x = x + self.out(mixed.transpose(1, 2).reshape(B, T, -1))
        gate, up = self.gate_up(self.ffn_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [B, H, T, K] turned by the angles of its positions [T, K / 2]: feature i with feature i + K / 2."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).to(x.dtype)


class Net(nn.Module):
    """The decoder, from tokens to the mean loss; the table of the tokens is the head."""

    def __init__(self, model: ModelConfig, length: int):
        super().__init__()
        self.embed = nn.Embedding(model.padded_vocab_size, model.dim)
        self.blocks = nn.ModuleList([Block(model) for _ in range(model.layers)])
        self.norm = Norm(model.dim, model.norm_eps)
        for name, table in zip(("cos", "sin"), rope.tables(model, length, model.head_dim), strict=True):
            self.register_buffer(name, torch.from_numpy(np.asarray(table, np.float32)), persistent=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=model.init_std)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens).to(torch.bfloat16)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = self.norm(x).flatten(0, 1) @ self.embed.weight.to(x.dtype).T
        return F.cross_entropy(logits.float(), targets.flatten())


def strong(model: ModelConfig, batch: np.ndarray):
    """A step on the batch [B, T + 1], what waits for the device, and what tells about it, as bench/train_speed.py wants them."""
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    net = Net(model, batch.shape[1] - 1).cuda()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    compiled, tokens, held = torch.compile(net), torch.from_numpy(batch.astype(np.int64)).cuda(), {}

    def step():
        with torch.autocast("cuda", dtype=torch.bfloat16), sdpa_kernel(BACKENDS, set_priority=True):
            loss = compiled(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        held["loss"] = loss.detach()

    def device():
        return {
            "loss": float(held["loss"]),
            "peak_memory_bytes": torch.cuda.max_memory_allocated(),
            "device": torch.cuda.get_device_name(),
            "versions": {"torch": torch.__version__},
        }

    return step, torch.cuda.synchronize, device
