"""Weights & Biases: offline unless WANDB_MODE says otherwise; `wandb sync` sends the run later.

wandb's own step only grows, so a run that went on would lose rows: ours is logged as a value, and every figure is drawn over it.
"""

import os

from smedjan_common.reporting.trackers import Start


class Tracker:
    """smedjan_common.reporting.trackers.Tracker."""

    def start(self, start: Start) -> None:
        import wandb

        self._html = wandb.Html
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "smedjan"),
            id=start.run_id,
            name=start.folder.name,
            dir=str(start.place),
            config=start.config,
            resume="allow",
            mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, figures: dict[str, float]) -> None:
        self._run.log({"step": step, **figures})

    def text(self, step: int, text: str) -> None:
        self._run.log({"step": step, "sample": self._html(f"<pre>{_escaped(text)}</pre>")})

    def finish(self, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
