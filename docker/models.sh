# `docker compose run --rm models q4 q8 --update` is `invoke download --quant q4 --quant q8 --update`,
# as whoever owns the folder of models: no setting is needed, and no file becomes root's.
set -eu

for argument; do
    shift
    case $argument in
        -*) set -- "$@" "$argument" ;;
        *) set -- "$@" --quant "$argument" ;;
    esac
done
if [ -s /run/secrets/ca ]; then export SSL_CERT_FILE=/run/secrets/ca; fi
owner=$(stat --format=%u:%g /app/models)
exec setpriv --reuid="${owner%:*}" --regid="${owner#*:}" --clear-groups python3 -m invoke download "$@"
