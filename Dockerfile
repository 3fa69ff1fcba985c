# syntax=docker/dockerfile:1
FROM python:3.14-slim-trixie AS build
COPY requirements.lock /
RUN python -m venv /opt/backstop \
    && /opt/backstop/bin/pip install --no-cache-dir --disable-pip-version-check --require-hashes -r requirements.lock \
    && printf '#!/opt/backstop/bin/python\nfrom worker.cli import main\nmain()\n' > /opt/backstop/bin/backstop \
    && chmod 755 /opt/backstop/bin/backstop

FROM python:3.14-slim-trixie
ENV PATH=/opt/backstop/bin:$PATH \
    PYTHONPATH=/app \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    BACKSTOP_DATA=/var/lib/backstop \
    BACKSTOP_CONFIG=/etc/backstop/backstop.toml
RUN groupadd --gid 10001 backstop \
    && useradd --uid 10001 --gid 10001 --no-create-home --shell /usr/sbin/nologin backstop \
    && install -d -m 700 -o 10001 -g 10001 /var/lib/backstop
COPY --from=build /opt/backstop /opt/backstop
WORKDIR /app
COPY worker worker
COPY api api
COPY migrations migrations
COPY examples/backstop.compose.toml /etc/backstop/backstop.toml
RUN python -m compileall -q -j 0 worker api migrations
USER 10001:10001
STOPSIGNAL SIGTERM
ENTRYPOINT ["backstop"]
CMD ["--help"]
