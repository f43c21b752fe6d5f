-- How many rows were ever inserted (PostgreSQL's own counter), and did a producer run report just now?
SELECT
  (SELECT n_tup_ins FROM pg_stat_user_tables WHERE relid = 'public.metrics'::regclass),
  EXISTS (SELECT FROM producer_runs WHERE updated_at > now() - make_interval(secs => %(seconds)s))
