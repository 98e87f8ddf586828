# syntax=docker/dockerfile:1
# Three images out of one file:
#   docker build --target gateway -t burnish:gateway .   gateway and command line, no torch
#   docker build --target cpu     -t burnish:cpu .       everything on one machine without a GPU
#   docker build --target cuda    -t burnish:cuda .      everything on one machine with an NVIDIA GPU
# All write to /data alone and run as a user without rights. No key is in any of them.

FROM python:3.11-slim AS base
ENV PYTHONDONTWRITEBYTECODE=1 \
    PATH=/opt/burnish/.venv/bin:$PATH \
    BURNISH_DATA=/data \
    BURNISH_HOST=0.0.0.0
RUN useradd --create-home --uid 10001 burnish \
    && install --directory --owner=burnish --group=burnish --mode=0700 /data
VOLUME /data
EXPOSE 8000
# The first start makes the model and the database before the gateway answers.
HEALTHCHECK --interval=10s --timeout=5s --start-period=180s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
WORKDIR /opt/burnish

# What is installed depends on these files alone, so a change of code doesn't install it again: the
# packages are empty until later, and the environment refers to them where they lie.
FROM base AS sources
ENV PIP_CACHE_DIR=/var/cache/pip
COPY pyproject.toml README.md LICENSE bootstrap.py ./
RUN mkdir feedback tuner server && touch feedback/__init__.py tuner/__init__.py server/__init__.py

FROM sources AS gateway-environment
RUN --mount=type=cache,target=/var/cache/pip \
    python -m venv .venv && .venv/bin/pip install --quiet --editable ".[postgres]"

# bootstrap.py knows which torch goes with which vLLM, and what must not stay beside it.
FROM sources AS cpu-environment
RUN --mount=type=cache,target=/var/cache/pip \
    python -c "import sys, bootstrap; bootstrap.environment({'cpu', 'postgres'}, sys.executable)"

FROM sources AS cuda-environment
RUN --mount=type=cache,target=/var/cache/pip \
    python -c "import sys, bootstrap; bootstrap.environment({'gpu', 'postgres'}, sys.executable)"

# vLLM's CPU build links libnuma.
FROM base AS engine-base
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libnuma1 \
    && rm -rf /var/lib/apt/lists/*

FROM base AS gateway
COPY --from=gateway-environment /opt/burnish /opt/burnish
COPY feedback feedback
COPY tuner tuner
COPY server server
USER 10001
CMD ["burnish", "gateway"]

# The CUDA libraries come with the wheels of torch and vLLM; the driver comes from the host, through
# NVIDIA's container toolkit. `utility` brings nvidia-smi, by which Burnish sees that there is a GPU.
FROM engine-base AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=cuda-environment /opt/burnish /opt/burnish
COPY feedback feedback
COPY tuner tuner
COPY server server
USER 10001
CMD ["burnish", "serve"]

# Last, so that `docker build .` without a target makes the one that runs everywhere.
FROM engine-base AS cpu
COPY --from=cpu-environment /opt/burnish /opt/burnish
COPY feedback feedback
COPY tuner tuner
COPY server server
USER 10001
CMD ["burnish", "serve"]
