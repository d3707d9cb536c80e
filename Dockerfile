# clipup for CPUs:  docker build -t clipup . && docker run --rm -v "$PWD/runs:/work/runs" clipup demo
# PIP_ARGS selects a build of torch (pip takes the CUDA build unless told otherwise):  --build-arg PIP_ARGS="..."
FROM python:3.12-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++
COPY . /source
RUN CLIPUP_CUDA=OFF pip wheel --no-deps --wheel-dir /wheels /source

FROM python:3.12-slim
ARG PIP_ARGS=""
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/*
RUN --mount=from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir ${PIP_ARGS} "$(echo /wheels/*.whl)[demo,train,eval,search]"
WORKDIR /work
ENTRYPOINT ["clipup"]
CMD ["--help"]
