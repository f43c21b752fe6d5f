"""Readings out of files: where they stand in them, and how they are written."""
