"""The Dagster definitions, a file for each stage; nothing outside this package imports Dagster."""
