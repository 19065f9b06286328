"""MLflow: a SQLite file in the run folder, unless MLFLOW_TRACKING_URI names a server."""

import logging
import os
import time

from smedjan_common.reporting.trackers import Start

_ID = "smedjan.run_id"  # a tag: MLflow gives ids of its own
_LONGEST = 6000  # characters of a parameter


class Tracker:
    """smedjan_common.reporting.trackers.Tracker."""

    def start(self, start: Start) -> None:
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]
        from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]

        self._metric = Metric
        for name in ("alembic", "mlflow"):
            logging.getLogger(name).setLevel(logging.WARNING)
        uri = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{start.place / 'mlflow.db'}")
        self._client = client = MlflowClient(uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "smedjan")
        found = client.get_experiment_by_name(name)
        experiment = (
            found.experiment_id if found else client.create_experiment(name, artifact_location=(start.place / "artifacts").as_uri())
        )
        known = client.search_runs([experiment], f"tags.`{_ID}` = '{start.run_id}'", max_results=1)
        if known:
            self._run = known[0].info.run_id
            client.update_run(self._run, status="RUNNING")
        else:
            self._run = client.create_run(experiment, run_name=start.folder.name, tags={_ID: start.run_id}).info.run_id
            for name, value in _flat(start.config).items():
                client.log_param(self._run, name, str(value)[:_LONGEST])

    def log(self, step: int, figures: dict[str, float]) -> None:
        now = time.time_ns() // 1_000_000
        self._client.log_batch(self._run, [self._metric(name, value, now, step) for name, value in figures.items()])

    def text(self, step: int, text: str) -> None:
        self._client.log_text(self._run, text, f"samples/step-{step:08d}.txt")

    def finish(self, exit_code: int) -> None:
        self._client.set_terminated(self._run, "FINISHED" if exit_code == 0 else "KILLED")


def _flat(config: dict, before: str = "") -> dict:
    flat = {}
    for name, value in config.items():
        flat |= _flat(value, f"{before}{name}.") if isinstance(value, dict) else {f"{before}{name}": value}
    return flat
