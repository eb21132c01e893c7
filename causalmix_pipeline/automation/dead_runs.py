"""The sensor that closes runs whose process was killed, so that they are tried again."""

import dagster as dg

from causalmix_pipeline.resources.instance import close_dead_runs

#: Seconds between two looks; a look reads the open runs and their processes.
LOOK_SECONDS = 30


@dg.sensor(
    name="dead_runs",
    minimum_interval_seconds=LOOK_SECONDS,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Closes runs whose process was killed and gives their slots back; Dagster then "
    "tries them again from where they stopped.",
)
def dead_runs(context: dg.SensorEvaluationContext) -> dg.SkipReason:
    """Close what is dead."""
    closed = close_dead_runs(context.instance)
    return dg.SkipReason(f"Closed: {', '.join(closed)}." if closed else "Every open run is alive.")
