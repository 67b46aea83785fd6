# HAProxy, Debian's package, in an image that holds nothing else: no shell, no package manager.
# Its configuration is mounted, so this is built anew only for another package.

ARG BASE=debian:trixie-slim

FROM ${BASE} AS assembled
ENV DEBIAN_FRONTEND=noninteractive
# Debian's images delete what apt downloads, which would empty the cache mount.
RUN --mount=type=cache,id=glm-apt-cache,target=/var/cache/apt,sharing=locked \
    --mount=type=cache,id=glm-apt-lists,target=/var/lib/apt,sharing=locked \
    rm -f /etc/apt/apt.conf.d/docker-clean \
 && apt-get update \
 && apt-get install --yes --no-install-recommends haproxy
# cp keeps a path; the loader's leads through lib64, which Debian links to usr/lib64.
RUN mkdir -p /out/usr/lib /out/usr/lib64 /out/tmp \
 && ln -s usr/lib usr/lib64 /out \
 && cp --dereference --parents /usr/sbin/haproxy /usr/share/doc/haproxy/copyright \
        $(ldd /usr/sbin/haproxy | grep -o '/[^ ]*') /out \
 && chroot --userspec=10001:10001 /out /usr/sbin/haproxy -v


FROM scratch
COPY --from=assembled /out/ /
USER 10001:10001
ENTRYPOINT ["/usr/sbin/haproxy", "-f", "/etc/haproxy.cfg"]
LABEL org.opencontainers.image.title="gateway" \
      org.opencontainers.image.description="HAProxy from Debian"
