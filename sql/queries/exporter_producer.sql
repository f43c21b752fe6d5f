-- Did a producer run report within the last seconds?
SELECT EXISTS (SELECT FROM producer_runs WHERE updated_at > now() - make_interval(secs => %(seconds)s))
