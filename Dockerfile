# One image to train with, for CPUs or NVIDIA GPUs; launch/setup.sh builds what is in it, as everywhere.
#
#   docker build -t hvdtrain .                                                                            CPUs
#   docker build -t hvdtrain:gpu --build-arg BUILD_IMAGE=nvidia/cuda:13.0.2-devel-ubuntu24.04 \
#       --build-arg BASE_IMAGE=ubuntu:24.04 --build-arg TORCH=torch==2.14.1 .                             GPUs
#
# The CUDA toolkit is needed to build Horovod and stays behind in the first stage: torch's wheels bring the CUDA and NCCL
# libraries that a run loads. Both images must be one release of one distribution (Debian's or Ubuntu's packages).
#
# How it was tried: the CPU image (1.72 GB, of it 0.09 the system's; 26 November 2026) is built and trained in by
# tests/e2e/test_image.py, with buildah. Of the GPU image the
# step that is its own, launch/setup.sh with TORCH=torch==2.14.1 and CUDA_CAPABILITIES=80,90,100, was run with CUDA 13.0
# on a machine without a GPU: `horovodrun --check-build` in it shows NCCL, MPI and Gloo. It was never run on a GPU.
ARG BASE_IMAGE=debian:bookworm-slim
ARG BUILD_IMAGE=${BASE_IMAGE}

FROM ${BUILD_IMAGE} AS build
ENV DEBIAN_FRONTEND=noninteractive
RUN apt-get update && apt-get install -y --no-install-recommends g++ make python3-dev python3-venv && \
    rm -rf /var/lib/apt/lists/*
# What a set-up reads, and no more: a change of hvdtrain itself does not build Horovod again.
WORKDIR /opt/hvdtrain
COPY setup.py setup.cfg README.md LICENSE ./
COPY launch launch
COPY hvdtrain/__init__.py hvdtrain/py.typed hvdtrain/
COPY hvdtrain/install hvdtrain/install
# GPUs: the compute capabilities to compile for, such as 80,90,100; none: what setup.sh takes where it sees no GPU.
ARG TORCH=torch==2.13.0
ARG CUDA_CAPABILITIES=
ENV HVDTRAIN_WITHOUT_TESTS=1
RUN HVDTRAIN_TORCH=${TORCH} HOROVOD_BUILD_CUDA_CC_LIST=${CUDA_CAPABILITIES} XDG_CACHE_HOME=/var/cache PIP_NO_CACHE_DIR=1 \
    launch/setup.sh
# What only a build needs, and what packages bring to be tested themselves: 0.3 GB. Compiled Python stays, though it is as
# much: under a read-only root no start could write it anew, and each would take twice as long.
RUN .venv/bin/python -m pip uninstall --yes cmake && cd .venv/lib/python3.*/site-packages && \
    rm -rf torch/test torch/bin/*[Tt]est* torch/bin/protoc* && find . -type d -name tests -prune -exec rm -rf {} +

FROM ${BASE_IMAGE}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="hvdtrain" \
    org.opencontainers.image.description="Data-parallel training of PyTorch models with Horovod" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}" \
    org.opencontainers.image.licenses="Apache-2.0"
ENV DEBIAN_FRONTEND=noninteractive
# g++ and Python's headers are for torch.compile; ssh is how mpirun and horovodrun reach other hosts.
RUN apt-get update && \
    apt-get install -y --no-install-recommends g++ python3-dev openssh-client openssh-server && \
    rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_* && mkdir -p /run/sshd && \
    (userdel --remove ubuntu 2> /dev/null || true) && \
    useradd --uid 1000 --create-home --shell /bin/bash hvdtrain && \
    printf 'Host *\n  Port 2222\n  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n' \
    > /etc/ssh/ssh_config.d/hvdtrain.conf
COPY --from=build /opt/hvdtrain /opt/hvdtrain
COPY hvdtrain /opt/hvdtrain/hvdtrain
# Caches go to /tmp, that of horovodrun (~/.horovod) too: the root may be read-only (docker run --read-only --tmpfs /tmp).
ENV PATH=/opt/hvdtrain/.venv/bin:$PATH VIRTUAL_ENV=/opt/hvdtrain/.venv HVDTRAIN_WITHOUT_TESTS=1 \
    HOME=/home/hvdtrain XDG_CACHE_HOME=/tmp/cache TORCHINDUCTOR_CACHE_DIR=/tmp/cache/inductor
# The sshd of a worker (launch/mpijob.yaml), as this user; its keys come from outside, by a mount at ~/.ssh.
RUN printf '%s\n' 'Port 2222' 'HostKey /home/hvdtrain/.ssh/id_rsa' 'PidFile /home/hvdtrain/sshd.pid' 'UsePAM no' \
    'StrictModes no' 'PasswordAuthentication no' "SetEnv PATH=$PATH" > /home/hvdtrain/.sshd_config && \
    mkdir -p /home/hvdtrain/.ssh /workspace && ln -s /tmp /home/hvdtrain/.horovod && \
    chown -R hvdtrain: /home/hvdtrain /workspace && \
    chmod 1777 /home/hvdtrain /workspace # for docker run --user N, any N
USER hvdtrain
WORKDIR /workspace
# Is the environment there, and can anything be written? It costs nothing; `python -m hvdtrain doctor` looks closer.
HEALTHCHECK --interval=1m --timeout=5s CMD ["sh", "-c", "command -v horovodrun && : > /tmp/.healthy"]
CMD ["/opt/hvdtrain/launch/local.sh"]
