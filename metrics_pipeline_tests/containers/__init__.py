"""`make containers`: docker-compose.yaml really run, on an engine of its own where there is none."""
