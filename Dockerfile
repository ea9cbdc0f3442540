# The collector and its commands, as `gradwatch` with whatever arguments the container is given.
FROM python:3.13-slim AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY agent agent
COPY collector collector
COPY slo slo
COPY alerts alerts
COPY dashboards dashboards
COPY migrations migrations
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.13-slim
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir "$(ls /wheels/gradwatch-*.whl)[collector]" && rm -r /wheels
USER 65534:65534
# OTLP over HTTP, the API, /metrics and run pages; OTLP over gRPC.
EXPOSE 4318 4317
ENTRYPOINT ["gradwatch"]
CMD ["--help"]
