"""Trackio: a SQLite file and a local page; in the run folder unless TRACKIO_DIR says otherwise."""

import os

from smedjan_common.reporting.trackers import Start


class Tracker:
    """smedjan_common.reporting.trackers.Tracker."""

    def start(self, start: Start) -> None:
        os.environ.setdefault("TRACKIO_DIR", str(start.place))  # read when it is imported
        import trackio  # pyright: ignore[reportMissingImports]

        self._trackio = trackio
        project = os.environ.get("TRACKIO_PROJECT", "smedjan")
        trackio.init(project=project, name=start.run_id, config=start.config, resume="allow", embed=False)

    def log(self, step: int, figures: dict[str, float]) -> None:
        self._trackio.log({"step": step, **figures}, step=step)

    def text(self, step: int, text: str) -> None:
        self._trackio.log({"sample": text}, step=step)

    def finish(self, exit_code: int) -> None:
        self._trackio.finish()
