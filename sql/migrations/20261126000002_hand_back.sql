-- Kafka Connect takes the readings back from the COPY sink: with the role that stores them, so that nobody who starts it needs the owner's.

-- migrate:up

SET LOCAL lock_timeout = '10s';
SET LOCAL statement_timeout = '5min';

-- Only this way: the COPY sink's time begins in provisioning, which knows where the connector stopped.
CREATE FUNCTION activate_connect() RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
UPDATE public.sink_state SET active = 'connect', changed_at = now() WHERE active <> 'connect';
END;
COMMENT ON FUNCTION activate_connect IS 'Ends the COPY sink''s time: its transactions that commit after this one store nothing.';

REVOKE EXECUTE ON FUNCTION activate_connect FROM PUBLIC;
GRANT EXECUTE ON FUNCTION activate_connect TO metrics_writer;

-- migrate:down

SET LOCAL lock_timeout = '10s';
SET LOCAL statement_timeout = '5min';

DROP FUNCTION activate_connect;
