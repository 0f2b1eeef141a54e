# The commands of the project, on GPUs where the host hands them on, on CPUs elsewhere:
#
#     docker build --build-arg COMMIT="$(git describe --always --abbrev=12 --dirty=+)" --tag etrm .
#     docker run --rm --gpus all --ipc=host --volume "$PWD/data:/etrm/data" --volume "$PWD/runs:/etrm/runs" etrm \
#         python pretrain_etrm.py data=arc1 run_name=first
#
# PyTorch's wheel brings CUDA, so that the host needs nothing but NVIDIA's driver and container toolkit.
FROM python:3.13.1-slim-bookworm

# What torch.compile builds kernels with.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++=4:12.2.0-3 \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 etrm && install --directory --owner=etrm /etrm /etrm/data /etrm/runs
WORKDIR /etrm
COPY requirements.txt requirements-no-deps.txt ./
RUN pip install --no-cache-dir --requirement requirements.txt \
    && pip install --no-cache-dir --no-deps --requirement requirements-no-deps.txt
COPY --chown=etrm . .
RUN pip install --no-cache-dir --no-deps --editable .

ARG COMMIT=""
ENV ETRM_COMMIT=$COMMIT
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000
CMD ["python", "pretrain_etrm.py", "--help"]
