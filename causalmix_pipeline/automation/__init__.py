"""Sensors, schedules, automation conditions and jobs."""
