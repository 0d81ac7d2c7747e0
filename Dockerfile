# One image for all commands: `serve` (the default), `worker`, `reconcile`, `db upgrade`, `doctor` …
# It contains no build tools, does not run as root, and needs no writable file system except /data, for
# the SQLite file, unless TRACKER_DATABASE_URL is a PostgreSQL.

FROM python:3.13-slim AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
# Rarely changing layers come first: the dependencies are reinstalled only when their lock changes.
COPY requirements/runtime.txt requirements/build.txt requirements/
RUN python -m venv --without-pip /opt/tracker \
    && python -m venv /opt/build \
    && /opt/build/bin/pip install --require-hashes --only-binary :all: -r requirements/build.txt \
    && /opt/build/bin/pip --python /opt/tracker/bin/python install --require-hashes \
        --only-binary :all: -r requirements/runtime.txt
COPY pyproject.toml README.md LICENSE CHANGELOG.md ./
COPY tracker tracker
COPY migrations migrations
COPY docs/runbook.md docs/
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /dist . \
    && /opt/build/bin/pip --python /opt/tracker/bin/python install --no-deps /dist/*.whl

FROM python:3.13-slim
LABEL org.opencontainers.image.title="FLORA run tracker" \
      org.opencontainers.image.licenses="MIT"
# By number, so that an orchestrator can see that it is not root.
RUN groupadd --gid 10001 tracker \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /data --shell /usr/sbin/nologin tracker \
    && install --directory --owner=10001 --group=10001 --mode=0750 /data
COPY --from=build /opt/tracker /opt/tracker
ENV PATH=/opt/tracker/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    TRACKER_DATABASE_URL=sqlite:////data/tracker.db \
    TRACKER_LOG_FORMAT=json
USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 8080 8081
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8080/healthz', timeout=4)"]
ENTRYPOINT ["tracker"]
# Everything on one port. Requests from outside the container need a token: set TRACKER_API_TOKEN. With
# `--callbacks-port 8081` callbacks and health have a separate port.
CMD ["serve", "--host", "0.0.0.0", "--port", "8080"]
