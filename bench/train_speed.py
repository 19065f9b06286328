"""Training speed on random tokens: ours in JAX or MLX, transformers + torch.compile, or a PyTorch model written for speed (torch-strong,
bench/torch_strong.py), one process each.

    python bench/train_speed.py --backend jax --size medium --vocab-size 8192 --batch-size 64 --seq-len 1024 --output out.json

A step is forward, backward, clipping and AdamW, bf16 compute with float32 masters. After `--warmup` steps the median over
`--repeats` groups of `--steps` steps is taken, each group waiting for the device once, at its end, as the training loop does.
"""

import argparse
import json
import pathlib
import statistics
import sys
import time

import numpy as np

from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_common.model.flops import train_flops_per_token
from smedjan_common.training.mesh import parse_mesh
from smedjan_common.training.precision import PRECISIONS
from smedjan_mlx import openblas


def main() -> None:
    """Run one case and print its row as JSON; `--output` appends it to a JSON list."""
    args = _arguments()
    if args.backend == "mlx":
        openblas.preload(sys.argv[1:])
    model = ModelConfig.preset(args.size, vocab_size=args.vocab_size, context_length=args.seq_len)
    tokens = args.batch_size * args.seq_len
    started = time.perf_counter()
    step, wait, device = PEERS[args.backend](model, args)
    step()
    wait()
    first_step = time.perf_counter() - started
    for _ in range(args.warmup):
        step()
    wait()
    seconds = statistics.median(_timed(step, wait, args.steps) for _ in range(args.repeats)) / args.steps
    rate = tokens / seconds
    row = {
        "backend": args.backend,
        "size": args.size,
        "parameters": model.num_params(),
        "vocab_size": args.vocab_size,
        "batch_size": args.batch_size,
        "seq_len": args.seq_len,
        "dtype": args.dtype,
        "grad_accum": args.grad_accum,
        "gradient_checkpointing": args.gradient_checkpointing,
        "attention": args.attention,
        "tokens_per_second": round(rate),
        "milliseconds_per_step": round(seconds * 1e3, 3),
        "tflops_causal_once": round(rate * train_flops_per_token(model, args.seq_len) / 1e12, 1),
        "tflops_full_square": round(rate * train_flops_per_token(model, args.seq_len, full_square=True) / 1e12, 1),
        "seconds_to_first_step": round(first_step, 1),
        **device(),
        "command": "python " + " ".join(sys.argv),
    }
    print(json.dumps(row))
    if args.output:
        path = pathlib.Path(args.output)
        rows = json.loads(path.read_text()) if path.exists() else []
        path.write_text(json.dumps([*rows, row], indent=1) + "\n")


def _timed(step, wait, steps: int) -> float:
    started = time.perf_counter()
    for _ in range(steps):
        step()
    wait()
    return time.perf_counter() - started


def _batch(model: ModelConfig, args: argparse.Namespace) -> np.ndarray:
    return np.random.default_rng(0).integers(0, model.vocab_size, (args.batch_size, args.seq_len + 1)).astype(np.int32)


def _ours(backend_class, model: ModelConfig, args: argparse.Namespace):
    from smedjan_common.model.params import initial_params

    train = TrainConfig(
        steps=1000,
        batch_size=args.batch_size,
        seq_len=args.seq_len,
        lr=3e-4,
        grad_accum=args.grad_accum,
        gradient_checkpointing=args.gradient_checkpointing,
        dtype=args.dtype,
        attention=args.attention,
        deterministic=args.deterministic,
        mask_documents=args.mask_documents,
    )
    backend = backend_class(model, train, parse_mesh(args.mesh))
    held = {"state": backend.init(initial_params(model, 0)), "metrics": None}
    batch = _batch(model, args)
    borders = np.random.default_rng(1).random((args.batch_size, args.seq_len)) < 1 / 200  # documents of 200 tokens on average
    documents = np.cumsum(borders, axis=1, dtype=np.int32) if args.mask_documents else None

    def step():
        held["state"], held["metrics"] = backend.train_step(held["state"], batch[:, :-1], batch[:, 1:], 3e-4, documents)

    def device():
        about = backend.describe()
        return {
            "loss": backend.read(held["metrics"])["loss"],
            "peak_memory_bytes": backend.peak_memory(),
            "device": about.name,
            "devices": about.count,
            "mesh": about.mesh,
            "versions": about.versions,
        }

    return step, lambda: backend.read(held["metrics"]), device


def _jax(model: ModelConfig, args: argparse.Namespace):
    from smedjan_jax.backend import JaxBackend

    return _ours(JaxBackend, model, args)


def _mlx(model: ModelConfig, args: argparse.Namespace):
    from smedjan_mlx.backend import MlxBackend

    return _ours(MlxBackend, model, args)


def _torch(model: ModelConfig, args: argparse.Namespace):
    """transformers' Llama of the same shape: torch.compile, SDPA, autocast to bf16 over float32 masters, fused AdamW."""
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=model.padded_vocab_size,
        hidden_size=model.dim,
        intermediate_size=model.ffn_dim,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        max_position_embeddings=args.seq_len,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        use_cache=False,
    )
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    net = transformers.LlamaForCausalLM(config).cuda()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    compiled = torch.compile(net)
    batch = torch.from_numpy(_batch(model, args).astype(np.int64)).cuda()
    held = {}

    def step():
        with torch.autocast("cuda", dtype=torch.bfloat16):
            logits = compiled(input_ids=batch[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.float().reshape(-1, logits.shape[-1]), batch[:, 1:].reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        held["loss"] = loss.detach()

    def device():
        return {
            "loss": float(held["loss"]),
            "peak_memory_bytes": torch.cuda.max_memory_allocated(),
            "device": torch.cuda.get_device_name(),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }

    return step, torch.cuda.synchronize, device


def _torch_strong(model: ModelConfig, args: argparse.Namespace):
    from bench.torch_strong import strong

    return strong(model, _batch(model, args))


PEERS = {"jax": _jax, "mlx": _mlx, "torch": _torch, "torch-strong": _torch_strong}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=PEERS, required=True)
    parser.add_argument("--size", default="medium")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--dtype", default="bfloat16", choices=PRECISIONS)
    parser.add_argument("--grad-accum", type=int, default=1)
    parser.add_argument("--gradient-checkpointing", default="none", choices=("none", "dots", "full"))
    parser.add_argument("--attention", default="auto", choices=("auto", "fused", "plain"))
    parser.add_argument("--deterministic", action="store_true", help="the same bits every time")
    parser.add_argument("--mask-documents", action="store_true", help="attention inside documents of about 200 tokens")
    parser.add_argument("--mesh", default="data=1", help="devices of JAX, data=2 say")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", default="")
    return parser.parse_args()


if __name__ == "__main__":
    main()
