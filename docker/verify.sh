# Fail unless the assembled image holds the native code asked for and all libraries, and starts as the pinned engine.
set -eu

root=/out/root
fail() {
    echo "The image is wrong: $*." | tr '\n' ' ' >&2
    exit 1
}
# Named as a command, the loader knows $ORIGIN without /proc.
loader=$(cd "$root" && echo usr/lib/*/ld-*)
load() {
    LD_LIBRARY_PATH=/tmp chroot --userspec=10001:10001 "$root" "/$loader" "$@"
}

if [ "$BACKEND" = cuda ]; then
    asked=$(sh /cuda-arch.sh)
    found=$(cuobjdump --list-elf "$root/app/libggml-cuda.so.0" | sed 's/.*\.\(sm_[^.]*\)\.cubin$/\1/' | sort -u | xargs)
    [ "$found" = "$asked" ] || fail "CUDA_ARCH asks for '$asked', libggml-cuda.so holds '$found'"
    # The driver's library is the only one that the image may lack; /tmp is not part of it.
    cp /usr/local/cuda/lib/stubs/libcuda.so "$root/tmp/libcuda.so.1"
fi

# As root: the health check may be run, not read.
for program in probe confine llama-server llama-bench llama-batched-bench llama-fit-params; do
    LD_LIBRARY_PATH=/tmp chroot "$root" "/$loader" --list "/app/$program" > /dev/null || fail "$program misses a library"
done

# All symbols at once, or a missing one would show when the first model is loaded.
version=$(LD_BIND_NOW=1 load /app/llama-server --version 2>&1) || fail "llama-server does not start: $version"
case $version in
    *"$ENGINE_BUILD"*"$ENGINE_COMMIT"*) ;;
    *) fail "$ENGINE_BUILD $ENGINE_COMMIT was asked for, llama-server is $version" ;;
esac
