# Gather the image: /out/app holds the engine, /out/root the least that starts it.
set -eu

app=/out/app
root=/out/root
lib=/usr/lib/$(gcc -print-multiarch)
mkdir -p "$app" "$root/app" "$root$lib" "$root/usr/lib64" "$root/etc/ld.so.conf.d"
install -d -m 1777 "$root/tmp"
ln -s usr/lib usr/lib64 "$root"

cd /engine
cp llama-server llama-bench llama-batched-bench llama-fit-params /own/* "$app"
LD_LIBRARY_PATH=/usr/local/cuda/lib ldd llama-server llama-bench llama-batched-bench llama-fit-params /own/* |
    grep -o '/[^ ]* (' | tr -d ' (' | sort -u |
    while read -r file; do
        case $file in
            /engine/*) cp -L "$file" "$app" ;;
            /lib*/ld-*) cp -L "$file" "$root$lib" && ln -s "$lib/${file##*/}" "$root$file" ;;
            *) cp -L "$file" "$root$lib" ;;
        esac
    done
strip --strip-unneeded "$app"/*
chmod a-x "$app"/*.so* "$root$lib"/lib*
# What may run but not be read cannot be traced: the server, of the same user, cannot take over the health check.
chmod 0111 "$app/probe"
cp -r /src/LICENSE /src/licenses "$app"

echo "root:x:0:0:root:/:/usr/sbin/nologin
llama:x:10001:10001:llama:/tmp:/usr/sbin/nologin" > "$root/etc/passwd"
echo "root:x:0:
llama:x:10001:" > "$root/etc/group"

# NVIDIA's hook puts the driver into Debian's library folder only if it sees Debian, and then rewrites the cache.
cp /etc/debian_version "$root/etc"
echo "include /etc/ld.so.conf.d/*.conf" > "$root/etc/ld.so.conf"
echo "$lib" > "$root/etc/ld.so.conf.d/multiarch.conf"
ldconfig -r "$root"
