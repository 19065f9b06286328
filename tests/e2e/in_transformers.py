"""Models as transformers itself runs them: logits and greedy text. Tests that import this are skipped where it or torch is missing."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smedjan_common.tokenizer import Tokenizer
from tests.unit.convert_models import PROMPT

torch = pytest.importorskip("torch", reason="torch is not installed (extra: oracle)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: oracle)")


def load(path: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, **options).eval()


def hf_logits(path: Path, ids: np.ndarray, **options: Any) -> np.ndarray:
    with torch.no_grad():
        return load(path, **options)(torch.tensor(ids).long()).logits.float().numpy()


def hf_greedy(path: Path, prompt: str = PROMPT, tokens: int = 48) -> list[int]:
    tok = transformers.AutoTokenizer.from_pretrained(path)
    ids = tok(prompt, return_tensors="pt").input_ids
    out = load(path).generate(ids, max_new_tokens=tokens, attention_mask=torch.ones_like(ids), pad_token_id=0)
    return out[0, ids.shape[1] :].tolist()


def without_end(ids: list[int], tok: Tokenizer) -> list[int]:
    """transformers' text has the end-of-text token in it, ours ends before."""
    return ids[: ids.index(tok.eot_id)] if tok.eot_id in ids else ids


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())
