// Preloaded into the real server: candidates of a tune that crash at their start, or in the middle of it.
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int is(const char *name, const char *value)
{
    const char *set = getenv(name);
    return set && strcmp(set, value) == 0;
}

__attribute__((constructor)) static void fault(void)
{
    if (strcmp(program_invocation_short_name, "llama-server") != 0)
        return;
    if (is("LLAMA_ARG_UBATCH", "2048"))
        abort();
    if (is("LLAMA_ARG_KV_UNIFIED", "0"))
        alarm(3); // ends it, as nobody handles the signal
}
