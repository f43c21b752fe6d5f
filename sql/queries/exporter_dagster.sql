-- In Dagster's own database: how many of the runs kept are in which state, by job?
SELECT pipeline_name, status, count(*)
FROM runs
GROUP BY pipeline_name, status
ORDER BY pipeline_name, status
