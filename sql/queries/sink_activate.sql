-- Let a sink be the one that stores the readings; what a quarantine left unfinished is nobody's any more.
WITH ended AS (
    UPDATE quarantines SET ended_at = clock_timestamp()
    WHERE ended_at IS NULL
)

INSERT INTO sink_state (active) VALUES (%(active)s)
ON CONFLICT (only_row) DO UPDATE SET active = excluded.active, changed_at = now() WHERE sink_state.active <> excluded.active
