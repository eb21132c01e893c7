"""The sensor that closes runs whose process was killed, so that they are tried again.

It also removes old evaluations of the conditions. A refresh leaves 1 to 2 MB of them, most of what
the database grows by, and Dagster itself keeps them for 30 days.
"""

import time

import dagster as dg

from causalmix_pipeline.resources.instance import close_dead_runs
from causalmix_pipeline.resources.settings import Settings

#: Seconds between two looks; a look reads the open runs and their processes.
LOOK_SECONDS = 30

#: Days for which the UI can show why an asset was asked for.
EVALUATION_DAYS = 7


def make_dead_run_sensor(settings: Settings) -> dg.SensorDefinition:
    """The sensor that closes the project's dead runs."""

    @dg.sensor(
        name="dead_runs",
        minimum_interval_seconds=LOOK_SECONDS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Closes runs whose process was killed and gives their slots back; Dagster then "
        "tries them again from where they stopped. Removes old evaluations of the conditions.",
    )
    def dead_runs(context: dg.SensorEvaluationContext) -> dg.SkipReason:
        closed = close_dead_runs(context.instance, settings)
        if context.instance.schedule_storage:
            before = time.time() - EVALUATION_DAYS * 86400
            context.instance.schedule_storage.purge_asset_evaluations(before)
        told = f"Closed: {', '.join(closed)}." if closed else "Every open run is alive."
        return dg.SkipReason(told)

    return dead_runs
