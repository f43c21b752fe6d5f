-- How many sessions does the watcher have?
SELECT count(*)
FROM pg_stat_activity
WHERE datname = current_database() AND application_name = 'metrics-pipeline watcher'
