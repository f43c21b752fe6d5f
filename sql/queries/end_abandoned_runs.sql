-- Runs that never said how they ended. Simulated ones: whoever holds the lock knows that they are dead.
-- Others hold none; one that lives says so every few seconds, and one that says so again later is running again.
UPDATE producer_runs
SET state = 'failed'
WHERE
    state = 'running'
    AND run_id <> %(run_id)s
    AND (source = 'simulated' OR updated_at < clock_timestamp() - interval '1 hour')
