"""The COPY sink under crashes, cuts, pauses and restarts on real services: nothing lost, nothing doubled, or it is found here.

`make chaos` runs all of it for as long as it takes; `integration/test_sink_crashes.py` runs the same functions briefly.
"""
