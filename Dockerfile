# Our image: the wheel with its locked packages (target `pipeline`), and the same with the locked jars (`connect`).
# Every download is compared with a hash that is committed: requirements/runtime.txt and connect/jars.lock.
ARG PYTHON=python:3.13.9-slim-bookworm

FROM ${PYTHON} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /opt/metrics-pipeline
RUN python -m venv /opt/venv
COPY requirements/runtime.txt requirements/runtime.txt
RUN /opt/venv/bin/python -m pip install --quiet --require-hashes --no-deps -r requirements/runtime.txt
COPY . .
# No second installation beside it: what runs is what `pip install` gives everybody.
RUN /opt/venv/bin/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir /opt/wheel . \
 && /opt/venv/bin/python -m pip install --quiet --no-deps --no-index /opt/wheel/metrics_pipeline-*.whl \
 && chmod -R a+rX /opt/venv

FROM build AS jars
ENV PIPELINE_CACHE_DIR=/opt/jars
RUN /opt/venv/bin/metrics-pipeline container fetch \
 && chmod -R a+rX /opt/jars

FROM ${PYTHON} AS pipeline
LABEL org.opencontainers.image.title="metrics-pipeline" org.opencontainers.image.licenses="MIT"
# The numbers that metrics_pipeline/compose/secrets.py gives files to. Volumes take the owner of the folder they cover;
# root without capabilities has to be able to enter it, too.
RUN groupadd --gid 10001 pipeline \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/metrics-pipeline --shell /usr/sbin/nologin pipeline \
 && install --directory --owner=10001 --group=10001 --mode=0755 /var/lib/metrics-pipeline
COPY --from=build /opt/venv /opt/venv
COPY compose/workspace.yaml /opt/metrics-pipeline/compose/workspace.yaml
ENV PATH=/opt/venv/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    LISTEN_HOST=0.0.0.0 \
    PIPELINE_DATA_DIR=/var/lib/metrics-pipeline \
    DAGSTER_HOME=/var/lib/metrics-pipeline/dagster_home
# Our own folder: Dagster looks for an env file where it runs.
WORKDIR /var/lib/metrics-pipeline
USER 10001:10001
CMD ["metrics-pipeline", "--help"]

FROM pipeline AS connect
COPY --from=jars /opt/jars /opt/jars
ENV PIPELINE_CACHE_DIR=/opt/jars PIPELINE_DATA_DIR=/run/metrics-pipeline
WORKDIR /run/metrics-pipeline
CMD ["metrics-pipeline", "container", "connect"]
