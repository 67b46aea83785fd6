# Write the image's bill of materials, CycloneDX JSON: the engine, what is compiled into it, and the package of every
# library copied. Fail for a library of which no package is known.
set -eu

app=/out/app
lib=/out/root/usr/lib/$(gcc -print-multiarch)

component() { # type, name, version, purl
    printf '{"type":"%s","name":"%s","version":"%s","purl":"%s","bom-ref":"%s"}\n' "$1" "$2" "$3" "$4" "$4"
}
version() { # of a macro in a header of the engine's
    sed -n "s/^#define $1 *\"\{0,1\}\([0-9.]*\).*/\1/p" "/src/vendor/$2"
}

for file in "$lib"/*.so*; do
    name=${file##*/}
    if package=$(dpkg-query --search "*/$name" 2>/dev/null | head -n 1) && [ "$package" ]; then
        dpkg-query --show --showformat '${Package} ${Version} ${Architecture}\n' "${package%%: *}"
    else
        record=$(grep -l "/$name," /opt/wheels/*.dist-info/RECORD | head -n 1)
        wheel=$(basename "${record%/RECORD}" .dist-info)
        [ "$wheel" ] || { echo "No package is known for $name." >&2; exit 1; }
        echo "$(echo "${wheel%-*}" | sed 's/_/-/g') ${wheel##*-} wheel"
    fi
done > /owners

{
    component application llama.cpp "b$ENGINE_BUILD" "pkg:github/ggml-org/llama.cpp@$ENGINE_COMMIT"
    httplib=$(version CPPHTTPLIB_VERSION cpp-httplib/httplib.h)
    component library cpp-httplib "$httplib" "pkg:github/yhirose/cpp-httplib@v$httplib"
    json=
    for part in MAJOR MINOR PATCH; do json=$json.$(version "NLOHMANN_JSON_VERSION_$part" nlohmann/json.hpp); done
    component library nlohmann-json "${json#.}" "pkg:github/nlohmann/json@v${json#.}"
    sort -u /owners | while read -r name version kind; do
        at=$(printf %s "$name@$version" | sed 's/+/%2B/g; s/:/%3A/g') # as a purl has them
        case $kind in
            wheel) component library "$name" "$version" "pkg:pypi/$at" ;;
            *) component library "$name" "$version" "pkg:deb/debian/$at?arch=$kind&distro=trixie" ;;
        esac
    done
} > /components
[ "$(grep -c '"version":""' /components)" = 0 ] || { echo "A version is not known." >&2; cat /components >&2; exit 1; }
printf '{"bomFormat":"CycloneDX","specVersion":"1.6","version":1,"metadata":{"component":{"type":"container","name":"%s","version":"b%s","bom-ref":"image"}},"components":[\n%s\n]}\n' \
    glm-server "$ENGINE_BUILD" "$(sed '$!s/$/,/' /components)" > "$app/sbom.cdx.json"
rm /components /owners
