# clipup for CPUs:  docker build -t clipup . && docker run --rm -v "$PWD/runs:/work/runs" clipup demo
# Training needs more shared memory than Docker gives:  docker run --ipc=host ...
# PIP_ARGS, options for pip, selects the CPU build of torch.
FROM python:3.12-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++
COPY . /source
RUN CLIPUP_CUDA=OFF pip wheel --no-deps --wheel-dir /wheels /source

FROM python:3.12-slim
ARG PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
RUN --mount=from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir ${PIP_ARGS} "$(echo /wheels/*.whl)[demo,train,eval,search]"
WORKDIR /work
ENTRYPOINT ["clipup"]
CMD ["--help"]
