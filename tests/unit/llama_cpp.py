"""llama.cpp itself, from prebuilt wheels (xllamacpp), in a process of its own.

Its flash attention on a CPU works partly in float16 (3e-4 off here), so it is switched off, and keys and values are kept in float32.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smedjan_common.tokenizer import Tokenizer
from tests.unit.convert_models import PROMPT, TEXT, greedy, logits

LLAMA_CPP = """
import json, sys, urllib.request
import xllamacpp as x

asked = json.load(sys.stdin)
params = x.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.cpuparams.n_threads, params.verbosity = asked["model"], 128, 1, 1, -1
params.cache_type_k = params.cache_type_v = x.ggml_type.GGML_TYPE_F32
params.warmup, params.flash_attn_type = False, x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = x.Server(params)

def post(path, **values):
    request = urllib.request.Request(server.listening_address + path, json.dumps(values).encode(), {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request))

def complete(ids, count):
    greedy = dict(temperature=0, top_k=1, samplers=["top_k"], return_tokens=True, n_probs=asked["size"], cache_prompt=False)
    return post("/completion", prompt=ids, n_predict=count, **greedy)

texts = [post("/tokenize", content=text, add_special=True, parse_special=False)["tokens"] for text in asked["texts"]]
back = [post("/detokenize", tokens=ids)["content"] for ids in texts]
steps = [complete(ids, 1).get("completion_probabilities") or [{"top_logprobs": []}] for ids in asked["prefixes"]]
logprobs = [{entry["id"]: entry["logprob"] for entry in step[0]["top_logprobs"]} for step in steps]
print(json.dumps([texts, back, logprobs, complete(asked["prompt"], asked["tokens"])["tokens"]]))
"""


def llama_cpp(path: Path, **asked: Any) -> list[Any]:
    """[ids of texts, their texts again, log probabilities after each prefix (none where its next token is no whole text), greedy ids]."""
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed (extra: oracle)")
    asked["model"] = str(path)
    done = subprocess.run([sys.executable, "-c", LLAMA_CPP], input=json.dumps(asked), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def log_softmax(scores: np.ndarray) -> np.ndarray:
    shifted = scores.astype(np.float64) - scores.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def agrees(path: Path, source: Path, tok: Tokenizer, tolerance: float, text_too: bool) -> None:
    """Asserts that llama.cpp makes of a GGUF file what MLX makes of the checkpoint `source`: ids, probabilities and, if so, greedy text."""
    texts = [TEXT, PROMPT, "l'été 12345\n\n  x 🔥", "!!  ?", "a<|endoftext|>b"]
    ids, size = tok.encode(TEXT)[:100], tok.vocab_size
    prefixes = [ids[:end] for end in range(4, 100, 8)]
    asked = {"texts": texts, "prefixes": prefixes, "prompt": tok.encode(PROMPT), "tokens": 48, "size": size}
    found, back, logprobs, text = llama_cpp(path, **asked)
    assert found == [tok.encode(text) for text in texts]
    assert back == texts
    ours = log_softmax(logits("mlx", source, np.array([ids], np.int32))[0])
    known = [(len(prefix), row) for prefix, row in zip(prefixes, logprobs, strict=True) if row]
    assert len(known) >= 6
    for end, row in known:
        theirs = np.array([row[str(number)] for number in range(size)])
        assert np.abs(theirs - ours[end - 1]).max() / np.abs(ours[end - 1]).max() < tolerance
    if text_too:
        assert text[: text.index(tok.eot_id) if tok.eot_id in text else None] == greedy("mlx", source)
