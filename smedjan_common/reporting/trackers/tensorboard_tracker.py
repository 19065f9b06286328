"""TensorBoard's event files, written by tensorboardX: no account, no server; many programs show them."""

import json

from smedjan_common.reporting.trackers import Start


class Tracker:
    """smedjan_common.reporting.trackers.Tracker."""

    def start(self, start: Start) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(start.place), purge_step=start.step + 1)  # what was logged of later steps is hidden
        if start.step == 0:
            self._writer.add_text("config", f"```\n{json.dumps(start.config, indent=1)}\n```", 0)

    def log(self, step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def text(self, step: int, text: str) -> None:
        self._writer.add_text("sample", f"```\n{text}\n```", step)

    def finish(self, exit_code: int) -> None:
        self._writer.close()
