"""The strong torch peer: a Llama written for speed, with the initial values, order of data and settings of a run of ours.

Queries, keys and values by one matmul, gate and up by one, the loss inside torch.compile, cuDNN's attention, fused AdamW, float32
masters under autocast to bfloat16, gradients clipped at 1. The preset's shape with as many key/value heads as heads, and a tied head.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_common.model.params import parameter_table

JOINED = {"mixer.qkv": ("mixer.q_proj", "mixer.k_proj", "mixer.v_proj"), "ffn.gate_up": ("ffn.gate_proj", "ffn.up_proj")}


class Norm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(config.dim)), config.norm_eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], None, self.eps).to(x.dtype) * self.weight.to(x.dtype)


class Block(nn.Module):
    """x + attention(norm(x)), then x + swiglu(norm(x))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, M = config.dim, config.ffn_dim
        self.heads, self.mixer_norm, self.ffn_norm = config.heads, Norm(config), Norm(config)
        self.qkv, self.o = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
        self.gate_up, self.down = nn.Linear(D, 2 * M, bias=False), nn.Linear(M, D, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        B, T, D = x.shape
        K = D // self.heads
        query, key, value = self.qkv(self.mixer_norm(x)).view(B, T, 3, self.heads, K).permute(2, 0, 3, 1, 4)

        def turned(z: torch.Tensor) -> torch.Tensor:
            a, b = z[..., : K // 2], z[..., K // 2 :]
            return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(z.dtype)

        y = F.scaled_dot_product_attention(turned(query), turned(key), value, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(B, T, D))
        gate, up = self.gate_up(self.ffn_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Net(nn.Module):
    """The decoder; `forward` gives the mean loss."""

    def __init__(self, config: ModelConfig, seq_len: int):
        super().__init__()
        self.embed = nn.Embedding(config.padded_vocab_size, config.dim)
        self.layers, self.norm = nn.ModuleList(Block(config) for _ in range(config.layers)), Norm(config)
        theta = config.rope_base ** -(torch.arange(0, config.head_dim, 2).float() / config.head_dim)
        angles = torch.outer(torch.arange(seq_len).float(), theta)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens).to(torch.bfloat16)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        logits = self.norm(x) @ self.embed.weight.to(torch.bfloat16).T
        return F.cross_entropy(logits.float().view(-1, logits.shape[-1]), targets.reshape(-1))

    def take(self, params: dict[str, np.ndarray]) -> None:
        """Copy the values of a run of ours."""
        found = {name: torch.from_numpy(np.asarray(value)) for name, value in params.items()}
        theirs = {"qkv": JOINED["mixer.qkv"], "gate_up": JOINED["ffn.gate_up"], "o": ("mixer.o_proj",), "down": ("ffn.down_proj",)}
        with torch.no_grad():
            self.embed.weight.copy_(found["embed.weight"])
            self.norm.weight.copy_(found["norm.weight"])
            for number, layer in enumerate(self.layers):
                at = f"layers.{number}"
                for own, names in theirs.items():
                    getattr(layer, own).weight.copy_(torch.cat([found[f"{at}.{name}.weight"] for name in names]))
                for own in ("mixer_norm", "ffn_norm"):
                    getattr(layer, own).weight.copy_(found[f"{at}.{own}.weight"])


class Peer:
    """Training steps: `step(inputs, targets, lr)` returns the loss, on the device."""

    def __init__(self, model: ModelConfig, train: TrainConfig, params: dict[str, np.ndarray]):
        torch.set_float32_matmul_precision("high")
        assert (model.kv_heads, model.tied_head) == (model.heads, True)
        assert all(spec.decay == (len(spec.shape) > 1) for spec in parameter_table(model).values())
        net = Net(model, train.seq_len)
        net.take(params)
        self.net, self.clip = net.cuda(), train.clip_norm
        groups = [
            {"params": [p for p in self.net.parameters() if p.dim() > 1], "weight_decay": train.weight_decay},
            {"params": [p for p in self.net.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=train.lr, betas=(train.beta1, train.beta2), eps=train.eps, fused=True)
        self._loss: Any = torch.compile(self.net, dynamic=False)

    def step(self, inputs: np.ndarray, targets: np.ndarray, lr: float) -> torch.Tensor:
        tokens, wanted = (torch.from_numpy(each.astype(np.int64)).cuda(non_blocking=True) for each in (inputs, targets))
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION), torch.autocast("cuda", dtype=torch.bfloat16):
            loss = self._loss(tokens, wanted)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()
