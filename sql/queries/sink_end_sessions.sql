-- End the sessions of some workers, whose processes are gone: their transactions and locks with them. How many there still were.
SELECT count(pg_terminate_backend(a.pid))
FROM pg_stat_activity AS a
WHERE a.application_name = ANY (%(names)s) AND a.usename = current_user AND a.datname = current_database()
