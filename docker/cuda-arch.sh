# Print the native code that CUDA_ARCH asks for (120a-real is sm_120a) in one line; refuse what nvcc cannot make.
set -eu

# From the help, since --list-gpu-code leaves out 120a; without the likes of 120f, which Debian's CMake does not take.
known=$(nvcc --help | grep -o "'sm_[0-9]*a\{0,1\}'" | tr -d "'sm_" | sort -uV | xargs)
refuse() {
    echo "CUDA_ARCH='$CUDA_ARCH' $1: give one or more of $known with -real, separated by ';'." >&2
    exit 1
}

names=
IFS=';'
for arch in $CUDA_ARCH; do
    name=${arch%-real}
    case " $known " in
        *" $name "*) names="$names sm_$name" ;;
        *) refuse "has '$arch'" ;;
    esac
done
[ -n "$names" ] || refuse "is empty"
# The engine's build makes every 12x a 12xa.
echo "$names" | xargs -n 1 | sed 's/^sm_12[0-9]$/&a/' | sort -u | xargs
