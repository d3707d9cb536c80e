# clipup for CPUs:  docker build -t clipup . && docker run --rm -v "$PWD/runs:/data/runs" clipup demo
# Training with data workers needs more shared memory than Docker gives:  docker run --shm-size=8g ...
# torch's CUDA build is large; the CPU build, from its index:  docker build --build-arg PIP_EXTRA_INDEX_URL=... -t clipup .
FROM python:3.12-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++
COPY . /source
RUN CLIPUP_CUDA=OFF pip wheel --no-deps --wheel-dir /wheels /source

FROM python:3.12-slim
ARG PIP_EXTRA_INDEX_URL=""
RUN --mount=from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir "$(echo /wheels/*.whl)[demo,train,eval,search]"
WORKDIR /data
ENTRYPOINT ["clipup"]
CMD ["--help"]
