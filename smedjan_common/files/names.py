"""The names of what smedjan writes, each in this one place."""

CONFIG, METRICS, PLOT, SAMPLES, DATA = "config.json", "metrics.jsonl", "loss.png", "samples", "data"  # in a run folder
GIVEN = "config.toml"  # in a run folder: the flags that were given
TRACKERS = "trackers"  # in a run folder: what trackers of others write
FINAL = "final"  # a run's weights when all steps are done
MANIFEST, WEIGHTS, OPTIMIZER = "checkpoint.json", "model.safetensors", "optimizer.safetensors"  # in a checkpoint
TOKENIZER = "tokenizer.json"  # in a checkpoint, beside token files, on its own
CHAT_TEMPLATE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"  # beside it, where a model has a chat template
GENERATION_CONFIG = "generation_config.json"  # beside it, where it says which tokens begin and end a text
QUICKSTART = "quickstart"  # in DATA, what `smedjan quickstart` trains on
TRAIN_TOKENS, VAL_TOKENS = "train.bin", "val.bin"
