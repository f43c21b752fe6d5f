-- How many keys stand in some Parquet files and not in others, by DuckDB.
SELECT count(*)
FROM read_parquet($former) AS former
ANTI JOIN read_parquet($files) AS present USING (device_id, published_at, metric_name)
