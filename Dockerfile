# klein-kv serve. No weights inside: mount an artifact folder at /artifacts. docs/serving.md says how.
FROM python:3.12-slim AS build
COPY . /source
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /source

FROM python:3.12-slim
ARG EXTRAS=serve,cpu
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir "$(ls /wheels/*.whl)[${EXTRAS}]" \
    && useradd --system --uid 10001 --no-create-home klein
USER 10001
WORKDIR /tmp
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health/live', timeout=2)"]
ENTRYPOINT ["klein-kv", "serve"]
CMD ["/artifacts", "--host", "0.0.0.0", "--api-key-file", "/run/secrets/keys"]
