#!/bin/sh
# Applies our patches to the engine's source, unless ENGINE_PATCHES is none.
#   usage: patch.sh SOURCE PATCHES
set -eu
if [ "$ENGINE_PATCHES" = none ]; then exit; fi
if ! cat "$2"/*.patch | sha256sum | grep -q "^$ENGINE_PATCHES"; then
    echo "docker/patches are not those of x-engine in compose.yaml, $ENGINE_PATCHES." >&2
    exit 1
fi
for patch in "$2"/*.patch; do
    if ! patch --directory="$1" --strip=1 --forward --quiet --input="$patch"; then
        echo "$patch does not apply to this engine; GLM_ENGINE_PATCHES=none builds it without ours." >&2
        exit 1
    fi
done
