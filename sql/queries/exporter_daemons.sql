-- In Dagster's own database: how many seconds ago did the daemon that is the longest silent give a sign of life?
SELECT extract(EPOCH FROM now() AT TIME ZONE 'UTC' - min(timestamp))::float8
FROM daemon_heartbeats
