"""Tokens that a device draws by itself are the host's, and where rounding could make them others it leaves them to the host."""

import numpy as np
import pytest

from smedjan_common.config import ModelConfig
from smedjan_common.inference import sampling
from smedjan_common.inference.drawing import Draw, Drawn, on_device, seen, settings, way
from smedjan_common.inference.sampling import Sampling, sample
from smedjan_common.model.params import initial_params
from tests.conformance import subjects
from tests.conformance.cases import train_config
from tests.conformance.conftest import installed

VOCAB = 300
CASES = (
    Sampling(temperature=0),
    Sampling(seed=(1 << 64) - 1),
    Sampling(seed=1, temperature=0.3),
    Sampling(seed=2, top_k=1),
    Sampling(seed=3, top_k=7, temperature=2.0),
    Sampling(seed=4, top_p=0.5),
    Sampling(seed=5, top_p=0.95, temperature=1.3),
    Sampling(seed=6, min_p=0.2),
    Sampling(seed=7, top_k=20, top_p=0.7, min_p=0.01),
    Sampling(seed=8, repetition_penalty=1.3),
    Sampling(seed=9, temperature=0, repetition_penalty=1.5),
    Sampling(seed=10, top_k=5, top_p=0.9, repetition_penalty=0.8, temperature=0.7),
)


def array(backend: str, values: np.ndarray):
    return subjects.framework(backend).array(values)


@pytest.fixture(scope="module", params=installed())
def drawn(request):
    """(logits, places, histories, chosen, sure) of 40 draws each of the cases, one of them with logits that are not finite."""
    rng, rows = np.random.default_rng(0), 40 * len(CASES)
    logits = (3 * rng.standard_normal((rows, VOCAB))).astype(np.float32)
    logits[0, 5] = np.nan
    histories = [rng.integers(0, VOCAB, 30).tolist() for _ in range(rows)]
    places = rng.integers(0, 1 << 30, rows)
    draws = [Draw(row, 0, histories[row], CASES[row % len(CASES)], 1) for row in range(rows)]
    backend, kind = request.param, way(draws, VOCAB)
    assert kind == (True, True, True, True)
    noise, draw = (subjects.module(backend, name) for name in ("noise", "sampling"))
    how = settings(draws, rows, VOCAB)
    on = type(how)(*(array(backend, values) for values in how))
    run = subjects.framework(backend).compile(
        lambda logits, place, texts: draw.draw(logits, noise.gumbel(on.seed, place, VOCAB), on, texts, kind)
    )
    given = run(array(backend, logits), array(backend, places.astype(np.int32)), array(backend, seen(draws, rows, VOCAB)))
    return logits, places, histories, *(np.asarray(each) for each in given)


def test_the_noise_of_the_device_is_that_of_numpy(backend: str):
    seeds, places, count = (0, 5, (1 << 64) - 1), (0, 70000, (1 << 31) - 1), 4099
    seed = np.array([[each & 0xFFFFFFFF, each >> 32] for each in seeds], np.uint32)
    noise = subjects.module(backend, "noise")
    high, low = noise.bits(array(backend, seed), array(backend, np.array(places, np.int32)), count)
    got = (np.asarray(high).astype(np.uint64) << np.uint64(32)) | np.asarray(low)
    np.testing.assert_array_equal(got, [sampling._bits(np.arange(count), *key) for key in zip(seeds, places, strict=True)])
    found = np.asarray(noise.gumbel(array(backend, seed), array(backend, np.array(places, np.int32)), count))
    want = np.stack([sampling.gumbel(np.arange(count), *key) for key in zip(seeds, places, strict=True)])
    assert np.abs(found - want).max() < 2.0**-19


def test_what_the_device_is_sure_of_the_host_chooses_too(drawn):
    logits, places, histories, chosen, sure = drawn
    for row in np.flatnonzero(sure):
        how = CASES[row % len(CASES)]
        assert chosen[row] == sample(logits[row], histories[row], how, int(places[row])), how


def test_little_is_left_to_the_host(drawn):
    _, _, _, _, sure = drawn
    assert not sure[0], "logits that are not finite are for the host to refuse"
    assert (~sure[1:]).sum() <= 4


def test_a_tie_is_left_to_the_host(backend: str):
    """Two tokens whose difference is under rounding: greedy takes the smaller id, as the host does; all else is for the host."""
    logits = np.full((4, 8), -5, np.float32)
    logits[:, [2, 6]] = 4
    cases = Sampling(temperature=0), Sampling(temperature=0, repetition_penalty=1.7), Sampling(top_k=3), Sampling()
    draws = [Draw(row, 0, [1, 2], how, 1) for row, how in enumerate(cases)]
    how = settings(draws, 4, 8)
    on = type(how)(*(array(backend, values) for values in how))
    noise = np.zeros((4, 8), np.float32)
    texts = np.zeros((4, 8), bool)
    given = subjects.module(backend, "sampling").draw(
        array(backend, logits), array(backend, noise), on, array(backend, texts), way(draws, 8)
    )
    chosen, sure = (np.asarray(each) for each in given)
    assert chosen[0] == 2
    assert sure.tolist() == [True, False, False, False]


def test_blocks_write_the_text_of_the_host(backend: str):
    """Rows of several kinds side by side, through blocks that end in the middle; one meets an end token, one its last token."""
    model = ModelConfig.build(vocab_size=VOCAB, dim=32, layers=2, heads=4, context_length=64, mixer=("attention", "ssm"), init_std=0.3)
    side = subjects.backend(backend, model, train_config())
    params, kinds, prompt, length = initial_params(model, 1), (CASES[0], CASES[4], CASES[8], CASES[11]), [1, 2, 3, 4], 21
    alone = [_by_host(side.decoder(params, 64, len(kinds)), row, prompt, how, length) for row, how in enumerate(kinds)]
    stop = frozenset({alone[1][9]})
    want = [alone[0], alone[1][: alone[1].index(alone[1][9]) + 1], alone[2][:6], alone[3]]
    decoder, most = side.decoder(params, 64, len(kinds)), (length, length, 6, length)
    logits, texts = [decoder.feed(prompt, row) for row in range(len(kinds))], [[] for _ in kinds]
    while going := [row for row in range(len(kinds)) if len(texts[row]) < len(want[row])]:
        for row in going:
            if logits[row] is not None:
                texts[row].append(sample(logits[row], prompt + texts[row], kinds[row], len(prompt + texts[row])))
        ids = [prompt + text for text in texts]
        draws = [
            Draw(row, ids[row][-1], ids[row], kinds[row], most[row] - len(texts[row]), stop if row == 1 else frozenset())
            for row in going
            if len(texts[row]) < len(want[row])
        ]
        assert all(on_device(draw.sampling, draw.stop_ids) for draw in draws)
        for draw, given in zip(draws, decoder.block(draws, 8) if draws else [], strict=True):
            assert isinstance(given, Drawn)
            texts[draw.row] += given.tokens
            logits[draw.row] = given.logits
            assert decoder.position(draw.row) == len(prompt + texts[draw.row]) - (given.logits is None)
    assert texts == want


def _by_host(decoder, row: int, prompt: list[int], how: Sampling, length: int) -> list[int]:
    logits, ids, only = decoder.feed(prompt, row), list(prompt), np.arange(decoder.rows) == row
    for _ in range(length):
        ids.append(sample(logits, ids, how, len(ids)))
        logits = decoder.step(np.full(decoder.rows, ids[-1]), only)[row]
    return ids[len(prompt) :]


def test_what_a_device_does_not_do_goes_the_way_of_the_host():
    assert on_device(Sampling(top_k=3, repetition_penalty=2.0), frozenset(range(8)))
    assert not on_device(Sampling(presence_penalty=0.5))
    assert not on_device(Sampling(frequency_penalty=0.5))
    assert not on_device(Sampling(logit_bias=((3, 1.0),)))
    assert not on_device(Sampling(temperature=1e-5)), "scores would overflow"
    assert not on_device(Sampling(), frozenset(range(9)))
