-- Bytes of the tables that the summaries are kept in, with their indexes.
SELECT sum(pg_total_relation_size(name))::bigint
FROM unnest(ARRAY['device_deltas', 'device_slots', 'device_metric_totals', 'ingestion_minutes']::regclass []) AS name
