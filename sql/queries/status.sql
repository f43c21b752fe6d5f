-- Rows ever inserted (PostgreSQL's own counter), whether a producer run reported just now, the active sink, the COPY sink's sessions, and whether this is a standby.
SELECT
  (
    SELECT sum(s.n_tup_ins)::bigint
    FROM pg_partition_tree('metrics') AS t
    INNER JOIN pg_stat_user_tables AS s ON s.relid = t.relid
  ),
  EXISTS (SELECT FROM producer_runs WHERE updated_at BETWEEN now() - make_interval(secs => %(seconds)s) AND clock_timestamp()),
  (SELECT active FROM sink_state),
  (
    SELECT count(*)
    FROM pg_stat_activity
    WHERE datname = current_database() AND application_name LIKE 'metrics-pipeline sink%%'
  ),
  pg_is_in_recovery()
