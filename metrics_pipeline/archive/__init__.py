"""Partitions kept as Parquet, outside the database: made, proved against the table, read again, brought back."""
