"""Sensor readings: devices or files → producer → broker → sink → PostgreSQL → summaries, run by Dagster."""
