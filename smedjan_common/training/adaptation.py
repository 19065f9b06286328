"""Options of training with adapters (LoRA): what of a model is trained while the rest stays as it is (smedjan_common.model.adapters)."""

from dataclasses import dataclass

from smedjan_common.model.adapters import ALL, Adapters
from smedjan_common.model.options import option

# of the default learning rate of pre-training, by command: ten times what the whole model takes (Schulman et al., 2025), texts as answers
RATES = {"train": 2.0, "sft": 2.0, "dpo": 0.05}


@dataclass(frozen=True)
class Adaptation:
    """Options of runs with adapters. The last two have no flag: a run whose tokenizer has gained tokens says which."""

    lora_rank: int = option(
        0,
        "Train adapters of this rank (LoRA) beside the weights of --pretrained, which stay as they are. 0: train the weights themselves.",
        least=0,
    )
    lora_alpha: float = option(32.0, "LoRA: what an adapter adds is multiplied by this over --lora-rank.", over=0, most=1e6)
    lora_targets: str = option(
        ALL,
        "LoRA: which linear maps have adapters, parts of their names joined by commas (q_proj,v_proj or mixer). all: all of mixers and"
        " feed-forwards.",
    )
    lora_rows_from: int = option(0, least=0)
    lora_rows: int = option(0, least=0)

    @property
    def adapters(self) -> Adapters | None:
        """What is trained; None: all of the model."""
        if not self.lora_rank:
            return None
        targets = tuple(filter(None, (part.strip() for part in self.lora_targets.split(","))))
        return Adapters(self.lora_rank, self.lora_alpha, targets, (self.lora_rows_from, self.lora_rows_from + self.lora_rows))
