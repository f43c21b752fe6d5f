-- Let a sink be the one that stores the readings.
INSERT INTO sink_state (active) VALUES (%(active)s)
ON CONFLICT (only_row) DO UPDATE SET active = excluded.active, changed_at = now() WHERE sink_state.active <> excluded.active
