-- Simulated runs that never said how they ended: whoever holds the lock knows that they are dead.
UPDATE producer_runs
SET state = 'failed'
WHERE source = 'simulated' AND state = 'running' AND run_id <> %(run_id)s
