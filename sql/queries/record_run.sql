-- What a producer run was promised in one partition so far; ranges of offsets are added, so writing twice changes nothing.
INSERT INTO producer_runs (
    run_id, partition, log_id, source, state, acknowledged, failed, unknown, offsets, started_at, updated_at
)
VALUES (
    %(run_id)s,
    %(partition)s,
    %(log_id)s,
    %(source)s,
    %(state)s,
    %(acknowledged)s,
    %(failed)s,
    %(unknown)s,
    %(offsets)s::int8multirange,
    %(started_at)s,
    clock_timestamp()
)
ON CONFLICT (run_id, partition) DO UPDATE
SET
    state = excluded.state,
    log_id = excluded.log_id,
    acknowledged = excluded.acknowledged,
    failed = excluded.failed,
    unknown = excluded.unknown,
    offsets = producer_runs.offsets + excluded.offsets,
    updated_at = excluded.updated_at
