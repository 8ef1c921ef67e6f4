# An image that runs campaigns on a CPU node: burnish, MLServer and tritonserver in one environment.
FROM python:3.11-slim-bookworm

# libpython is what the stub of Triton's Python backend links.
RUN apt-get update \
 && apt-get install -y --no-install-recommends libpython3.11 \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/burnish
COPY constraints.txt pyproject.toml LICENSE README.md ./
COPY optimize optimize
COPY profiles profiles
COPY registry registry
ARG PIP_EXTRA_INDEX_URL
RUN pip install --no-cache-dir 'pip==26.3' \
 && pip install --no-cache-dir -c constraints.txt '.[all]'

# Models are untrusted input: nothing here runs as root.
RUN useradd --create-home --uid 10001 burnish
USER burnish
WORKDIR /home/burnish
ENV MLFLOW_DISABLE_TELEMETRY=true
ENTRYPOINT ["burnish"]
CMD ["--help"]
