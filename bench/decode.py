"""Speed of decoding with random weights: ours in JAX or MLX, or transformers with a static cache and torch.compile, one process each.

    python -m bench.decode --backend jax --size medium --rows 1 64 --output bench/results/decode.json

Each row of the batch has a prompt of `--prompt` tokens; then `--tokens` tokens are drawn in blocks, greedily or as `--temperature` and
`--top-p` say, the host waiting for every block, as it must to give text out. All of it is done twice, and the first time, which
compiles, does not count. `--by-step` draws on the host instead, a token at a time. The roofline is what reading the weights once a
token would take at `--bandwidth`.
"""

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Callable

import numpy as np

from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_common.inference.drawing import Draw
from smedjan_common.inference.memory import inference_bytes
from smedjan_common.inference.sampling import Sampling, sample
from smedjan_common.model.params import parameter_table
from smedjan_common.training.memory import BYTES
from smedjan_mlx import openblas

STEPS = 16  # of a block


def main() -> None:
    """Run the cases and print their rows as JSON; `--output` appends them to a JSON list."""
    args = _arguments()
    if args.backend == "mlx":
        openblas.preload(sys.argv[1:])
    mixer = {"mixer": tuple(args.mixer.split(","))}
    model = ModelConfig.preset(args.size, vocab_size=args.vocab_size, context_length=args.max_len, **mixer)
    for rows in args.rows:
        started = time.perf_counter()
        begin, go_on, about = PEERS[args.backend](model, rows, args)
        _timed(begin, go_on, args.tokens * rows)
        first = time.perf_counter() - started
        seconds, drawn = _timed(begin, go_on, args.tokens * rows)
        row = {
            "backend": args.backend,
            "size": args.size,
            "mixer": args.mixer,
            "parameters": model.num_params(),
            "rows": rows,
            "dtype": args.dtype,
            "prompt": args.prompt,
            "tokens": args.tokens,
            "max_len": args.max_len,
            "temperature": args.temperature,
            "top_p": args.top_p,
            "by_step": args.by_step,
            "tokens_per_second": round(drawn / seconds, 1),
            "milliseconds_per_step": round(seconds / drawn * rows * 1e3, 4),
            "roofline_tokens_per_second": round(rows * args.bandwidth / (model.num_params() * BYTES[args.dtype])),
            "seconds_to_begin": round(first, 1),
            "estimated_bytes": inference_bytes(model, rows, args.max_len, args.dtype),
            **about(),
            "command": "python -m bench.decode " + " ".join(sys.argv[1:]),
        }
        print(json.dumps(row), flush=True)
        if args.output:
            path = pathlib.Path(args.output)
            known = json.loads(path.read_text()) if path.exists() else []
            path.write_text(json.dumps([*known, row], indent=1) + "\n")


def _timed(begin: Callable[[], None], go_on: Callable[[], int], tokens: int) -> tuple[float, int]:
    """Seconds that so many tokens take after the prompts, and how many they were."""
    begin()
    started, drawn = time.perf_counter(), 0
    while drawn < tokens:
        drawn += go_on()
    return time.perf_counter() - started, drawn


def _ours(backend, params: dict, model: ModelConfig, rows: int, args: argparse.Namespace):
    decoder, asked, ids = backend.decoder(params, args.max_len, rows), {}, []
    params.clear()
    how = [Sampling(args.temperature, top_p=args.top_p, seed=row) for row in range(rows)]

    def begin() -> None:
        rng = np.random.default_rng(0)
        ids[:] = rng.integers(0, model.vocab_size, (rows, args.prompt)).tolist()
        decoder.reset()
        asked.clear()
        for row, text in enumerate(ids):
            text.append(sample(decoder.feed(text, row), text, how[row], len(text)))

    def block() -> int:
        for row, logits in asked.items():
            ids[row].append(sample(logits, ids[row], how[row], len(ids[row])))
        drawn = len(asked)
        given = decoder.block([Draw(row, ids[row][-1], ids[row], how[row], 1 << 30) for row in range(rows)], STEPS)
        asked.clear()
        for row, each in enumerate(given):
            ids[row] += each.tokens
            drawn += len(each.tokens)
            if each.logits is not None:
                asked[row] = each.logits
        return drawn

    def step() -> int:
        logits = decoder.step(np.array([text[-1] for text in ids]), np.ones(rows, bool))
        for row, text in enumerate(ids):
            text.append(sample(logits[row], text, how[row], len(text)))
        return rows

    def about() -> dict:
        device = backend.describe()
        return {"peak_memory_bytes": backend.peak_memory(), "device": device.name, "versions": device.versions}

    return begin, step if args.by_step else block, about


def _jax(model: ModelConfig, rows: int, args: argparse.Namespace):
    import jax

    from smedjan_jax.backend import JaxBackend

    backend = JaxBackend(model, _train(args))
    key = jax.random.key(0)
    make = jax.jit(lambda number, shape: 0.02 * jax.random.normal(jax.random.fold_in(key, number), shape), static_argnums=1)
    return _ours(backend, {n: make(i, s.shape) for i, (n, s) in enumerate(parameter_table(model).items())}, model, rows, args)


def _mlx(model: ModelConfig, rows: int, args: argparse.Namespace):
    import mlx.core as mx

    from smedjan_mlx.backend import MlxBackend

    backend = MlxBackend(model, _train(args))
    params = {name: 0.02 * mx.random.normal(spec.shape) for name, spec in parameter_table(model).items()}
    return _ours(backend, params, model, rows, args)


def _train(args: argparse.Namespace) -> TrainConfig:
    return TrainConfig(steps=1, batch_size=1, seq_len=args.max_len, lr=1e-3, dtype=args.dtype)


def _torch(model: ModelConfig, rows: int, args: argparse.Namespace):
    """transformers' Llama of the same shape with a StaticCache, its step and argmax in CUDA graphs; STEPS tokens before the host looks."""
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=model.padded_vocab_size,
        hidden_size=model.dim,
        intermediate_size=model.ffn_dim,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        max_position_embeddings=args.max_len,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    torch.set_default_device("cuda")
    torch.set_default_dtype(getattr(torch, args.dtype))
    net = transformers.LlamaForCausalLM(config).eval()
    cache = transformers.StaticCache(config=config, max_cache_len=args.max_len)
    tokens = torch.randint(0, model.vocab_size, (rows, args.prompt))

    def forward(ids, at):
        out = net(input_ids=ids, past_key_values=cache, cache_position=at, position_ids=at[None].expand(rows, -1), use_cache=True)
        return out.logits[:, -1:].argmax(-1)

    compiled = torch.compile(forward, mode="reduce-overhead", fullgraph=True)
    held = {}

    def begin() -> None:
        with torch.inference_mode():
            cache.reset()
            held.update(token=forward(tokens, torch.arange(args.prompt)).clone(), at=torch.tensor([args.prompt]))

    def block() -> int:
        with torch.inference_mode():
            taken = []
            for _ in range(STEPS):
                held["token"] = compiled(held["token"], held["at"]).clone()
                held["at"] += 1
                taken.append(held["token"])
            torch.cat(taken, dim=1).tolist()
        return STEPS * rows

    def about() -> dict:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        return {"peak_memory_bytes": torch.cuda.max_memory_allocated(), "device": torch.cuda.get_device_name(), "versions": versions}

    return begin, block, about


PEERS = {"jax": _jax, "mlx": _mlx, "torch": _torch}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=PEERS, required=True)
    parser.add_argument("--size", default="medium")
    parser.add_argument("--mixer", default="attention")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=384)
    parser.add_argument("--max-len", type=int, default=1024)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--by-step", action="store_true", help="the host draws, a token at a time")
    parser.add_argument("--bandwidth", type=float, default=3.35e12, help="bytes per second of the device's memory")
    parser.add_argument("--output", default="")
    return parser.parse_args()


if __name__ == "__main__":
    main()
