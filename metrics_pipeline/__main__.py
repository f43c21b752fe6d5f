"""`python -m metrics_pipeline` is the `metrics-pipeline` command."""

from metrics_pipeline.cli import main

main()
