# One image for a laptop and, through Apptainer, for clusters; Binder takes .binder/ instead.
# docs/many-machines.md says how to build it with PyTorch for CPUs (2 GB) or, by default on Linux,
# for CUDA.
FROM python:3.11-slim-bookworm

ARG NB_UID=1000
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends git libegl1 libgl1 make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid "$NB_UID" reader
COPY --chown=reader . /home/reader/dtlib
USER $NB_UID
ENV HOME=/home/reader
WORKDIR /home/reader/dtlib
ENV PATH=/home/reader/dtlib/.venv/bin:$PATH MUJOCO_GL=egl

# The address of PyTorch's builds for CPUs, from PyTorch's installation page; empty: pip's choice.
# constraints.txt pins every other version.
ARG TORCH_INDEX=""
# hadolint ignore=DL3013
RUN python -m venv .venv \
    && pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch==2.13.0 \
    && pip install --no-cache-dir -c constraints.txt -e ".[test,lab,cluster]" \
    && pip install --no-cache-dir -c constraints.txt --no-deps d4rl \
    && touch .venv/installed

EXPOSE 8888
CMD ["jupyter", "lab", "--ip=0.0.0.0", "--LabApp.default_url=/lab/tree/notebooks/README.md"]
