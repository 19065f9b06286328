"""Gates of attention and of shared experts in architectures that always have them: are there any in this model?

A model of ours without gates is written there with gates of zero, each a half, and twice what follows (ties.gated, ties.scaled). So gates
that are zero in every layer are none.
"""

import dataclasses
from collections.abc import Callable, Mapping

from convert import ties
from convert.portable import Lazy
from smedjan_common.config import ModelConfig

GATES = ("attention_gate", "shared_gate")


def ungated(config: ModelConfig, layout: Callable[[ModelConfig], list[ties.Tie]], tensors: Mapping[str, Lazy]) -> ModelConfig:
    """The model without each kind of gate that is zero everywhere. tensors: others' by name, all of `layout(config)`; of gates that are
    not zero the first layer's alone is read."""
    for name in GATES:
        if getattr(config, name):
            plain = dataclasses.replace(config, **{name: False})
            config = config if ties.lost(layout(plain), tensors) else plain
    return config
