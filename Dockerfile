# Three images: `serve` is an MLServer for Core 2 with burnish's runtime in it; `job-cpu` and `job-gpu` run campaigns.
# docs/howto/build-images.md has the commands, and what of this was ever run.
FROM python:3.11.15-slim-bookworm@sha256:d29f48a31a8b408ed19272ca1e7b10ebae13b240a27e862d3d4217c528e2e0c3 AS base
# User 1000 is the one that Core 2 runs its servers as; group 0 may do the same, for clusters that choose the user.
RUN useradd --uid 1000 --gid 0 --create-home --shell /usr/sbin/nologin burnish \
 && chmod g=u /home/burnish
# OpenVINO and MLflow send nothing home; CI is the one word that OpenVINO knows for it.
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/home/burnish \
    CI=true \
    MLFLOW_DISABLE_TELEMETRY=true

# --- where things are installed: none of these stages is in an image but for its /opt/venv -----------------------

FROM base AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv \
 && pip install 'pip==26.3'
WORKDIR /opt/source
COPY pyproject.toml constraints.txt constraints-gpu.txt LICENSE README.md ./

FROM build AS build-serve
RUN pip install -c constraints.txt --group serve

FROM build AS build-job
COPY optimize optimize
COPY profiles profiles
COPY registry registry

FROM build-job AS build-job-cpu
# PyPI's torch is the build for CUDA, which takes several GB.
ARG PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
RUN pip install -c constraints.txt --build-constraint constraints.txt '.[all]'

FROM build-job AS build-job-gpu
# Every package is listed, so pip has nothing to resolve: it would bring onnxruntime in beside onnxruntime-gpu, over
# whose files it writes.
RUN pip install --no-deps -r constraints-gpu.txt \
 && pip install --no-deps --build-constraint constraints-gpu.txt .

# --- the images --------------------------------------------------------------------------------------------------

FROM base AS serve
LABEL org.opencontainers.image.title="burnish-serve" \
      org.opencontainers.image.description="MLServer with burnish's runtime, for Seldon Core 2" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build-serve /opt/venv /opt/venv
COPY profiles/__init__.py /opt/burnish/profiles/
COPY profiles/serving /opt/burnish/profiles/serving
# Core 2 sets MLSERVER_MODELS_DIR, ports and workers. The last five are profiles.serving.mlserver.ENVIRONMENT.
ENV PYTHONPATH=/opt/burnish \
    MLSERVER_MODELS_DIR=/mnt/models \
    MALLOC_ARENA_MAX=1 \
    MALLOC_MMAP_THRESHOLD_=33554432 \
    MALLOC_TOP_PAD_=67108864 \
    MALLOC_TRIM_THRESHOLD_=268435456 \
    GRPC_EXPERIMENTS=-event_engine_listener
USER 1000
WORKDIR /home/burnish
EXPOSE 8080 8081 8082
CMD ["sh", "-c", "exec mlserver start \"$MLSERVER_MODELS_DIR\""]

FROM base AS job-cpu
LABEL org.opencontainers.image.title="burnish-job-cpu" \
      org.opencontainers.image.description="burnish, with every engine and server for the CPU" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build-job-cpu /opt/venv /opt/venv
USER 1000
WORKDIR /home/burnish
ENTRYPOINT ["burnish"]
CMD ["--help"]

FROM base AS job-gpu
LABEL org.opencontainers.image.title="burnish-job-gpu" \
      org.opencontainers.image.description="burnish, with ONNX Runtime and torch for CUDA" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build-job-gpu /opt/venv /opt/venv
# The libraries are for ONNX Runtime; torch finds them by itself.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    LD_LIBRARY_PATH=/opt/venv/lib/python3.11/site-packages/nvidia/cu13/lib:/opt/venv/lib/python3.11/site-packages/nvidia/cudnn/lib
USER 1000
WORKDIR /home/burnish
ENTRYPOINT ["burnish"]
CMD ["--help"]
