-- What was changed in a partition that is being split comes into its copy, as it is now.
INSERT INTO {copy}
SELECT m.*
FROM split_noted AS n
INNER JOIN {table} AS m USING (device_id, published_at, metric_name)
