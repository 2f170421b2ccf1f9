# syntax=docker/dockerfile:1
# docker build .                    the GPU server, from vLLM's official image
# docker build --target cpu .       the CPU server
# docker run --gpus all -p 8000:8000 -v editserver-cache:/cache IMAGE MODEL [any option of `editserver serve`]
#
# No weights are baked in, except for the dictionaries that ship inside the sae_weights package. Everything that a server
# downloads or compiles goes to /cache.

ARG VLLM_VERSION=0.32.0

FROM python:3.11-slim AS wheel
WORKDIR /src
COPY LICENSE pyproject.toml ./
COPY editserver editserver
COPY interventions interventions
COPY sae_weights sae_weights
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .


FROM python:3.11-slim AS cpu
# libnuma1: vLLM's CPU kernels are linked to it. g++: torch.compile builds the model's kernels with it at start.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/*
COPY requirements/cpu.lock /tmp/requirements/cpu.lock
COPY tools/setup_venv.py /tmp/tools/setup_venv.py
RUN python -m venv /opt/venv \
    && PIP_NO_CACHE_DIR=1 /opt/venv/bin/python /tmp/tools/setup_venv.py /tmp/requirements/cpu.lock \
    && rm -r /tmp/requirements /tmp/tools
COPY --from=wheel /wheels /tmp/wheels
RUN /opt/venv/bin/python -m pip install --no-cache-dir --no-deps /tmp/wheels/*.whl && rm -r /tmp/wheels
RUN useradd --create-home --uid 10001 editserver \
    && install --directory --owner=editserver /cache
ENV PATH=/opt/venv/bin:$PATH \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    VLLM_CACHE_ROOT=/cache/vllm \
    TORCHINDUCTOR_CACHE_DIR=/cache/torchinductor \
    HEALTH_URL=http://127.0.0.1:8000/health
VOLUME /cache
USER editserver
WORKDIR /home/editserver
EXPOSE 8000
# A first start may download and compile for minutes. With --port or TLS, set HEALTH_URL to match.
HEALTHCHECK --interval=15s --timeout=5s --start-period=15m --retries=4 \
    CMD ["python3", "-c", "import os, urllib.request; urllib.request.urlopen(os.environ['HEALTH_URL'], timeout=4)"]
ENTRYPOINT ["editserver", "serve"]
CMD ["--help"]


# The last stage is the one that `docker build .` makes.
FROM vllm/vllm-openai:v${VLLM_VERSION} AS gpu
USER root
COPY --from=wheel /wheels /tmp/wheels
# What vLLM was released with stays: a dependency of ours may be added, none of these may be exchanged.
RUN python3 -m pip list --format=freeze \
        | grep -E '^(vllm|torch|triton|transformers|tokenizers|numpy|numba|llvmlite|fastapi|starlette|pydantic)==' \
        > /tmp/as-released.txt \
    && PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --no-cache-dir --constraint /tmp/as-released.txt /tmp/wheels/*.whl \
    && rm -r /tmp/wheels /tmp/as-released.txt
RUN useradd --create-home --uid 10001 editserver \
    && install --directory --owner=editserver /cache
ENV XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    VLLM_CACHE_ROOT=/cache/vllm \
    TORCHINDUCTOR_CACHE_DIR=/cache/torchinductor \
    TRITON_CACHE_DIR=/cache/triton \
    FLASHINFER_WORKSPACE_BASE=/cache \
    HEALTH_URL=http://127.0.0.1:8000/health
VOLUME /cache
USER editserver
WORKDIR /home/editserver
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=15m --retries=4 \
    CMD ["python3", "-c", "import os, urllib.request; urllib.request.urlopen(os.environ['HEALTH_URL'], timeout=4)"]
ENTRYPOINT ["editserver", "serve"]
CMD ["--help"]
