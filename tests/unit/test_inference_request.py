"""Requests that no model can answer are refused before anything is computed."""

import pytest

from smedjan_common.errors import ConfigError
from smedjan_common.inference.request import Request
from smedjan_common.inference.sampling import Sampling


@pytest.mark.parametrize(
    ("request_", "what"),
    [
        (Request([]), "no token"),
        (Request([1, 300]), "token 300"),
        (Request([-1]), "token -1"),
        (Request([1], max_tokens=-1), "--max-tokens is -1"),
        (Request([1], logprobs=65), "logprobs is 65"),
        (Request([1], logprobs=-1), "logprobs is -1"),
        (Request([1], sampling=Sampling(temperature=-1)), "--temperature"),
        (Request([1], sampling=Sampling(logit_bias=((300, 1.0),))), "names the token 300"),
    ],
)
def test_what_cannot_be_answered_is_refused(request_, what):
    with pytest.raises(ConfigError, match=what):
        request_.validate(300)


def test_the_farthest_that_can_is_taken():
    Request([0, 299], 0, Sampling(logit_bias=((299, -100.0),)), logprobs=64).validate(300)
