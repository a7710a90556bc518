# petalnet in a container.
#
#   docker build -t petalnet .                                for CPUs
#   docker build -t petalnet:cuda --build-arg DEVICE=cuda .   for NVIDIA GPUs; run it with --gpus all
#   docker run -v petalnet:/state -p 31330:31330 petalnet node MODEL --serve auto --initial-peers …
#
# Keys, what was downloaded and what was measured are in /state, which is worth keeping; docs/your-own-swarm.md says more.
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
# A dependency of libp2p is compiled from source.
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential libgmp-dev \
    && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/petalnet
WORKDIR /build
COPY constraints.txt ./
RUN /opt/petalnet/bin/pip install --upgrade -c constraints.txt pip
# PyTorch first: it is most of the image, and stays as it is while petalnet changes. Its wheels on PyPI are those with CUDA.
ARG DEVICE=cpu
RUN case "$DEVICE" in cpu) index="--index-url https://download.pytorch.org/whl/cpu" ;; cuda) index="" ;; \
        *) echo "DEVICE is cpu or cuda, not $DEVICE" >&2; exit 1 ;; esac \
    && /opt/petalnet/bin/pip install $index "$(grep '^torch==' constraints.txt)"
COPY pyproject.toml README.md LICENSE ./
COPY petalnet petalnet
RUN /opt/petalnet/bin/pip install -c constraints.txt --build-constraint constraints.txt .

FROM python:${PYTHON}-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgmp10 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/petalnet /opt/petalnet
RUN useradd --system --uid 10001 --user-group --home-dir /state petalnet && install -d -o petalnet -g petalnet -m 700 /state
ENV PATH=/opt/petalnet/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PETALNET_STATE_DIR=/state \
    PETALNET_CONFIG=/state/config.toml \
    PETALNET_CACHE_DIR=/state/cache \
    HF_HOME=/state/huggingface
USER petalnet
WORKDIR /state
VOLUME /state
EXPOSE 31330
# A node leaves in good order at SIGTERM, within --drain-time (30 s): give it that with `docker stop --time 60`.
STOPSIGNAL SIGTERM
ENTRYPOINT ["petalnet"]
CMD ["--help"]
