// Preloaded into the real server: faults that hardware, or a clock that is set, bring about, on the sight of a file in
// GLM_FAULTS. Our own commands see the clock so, too.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#include "llama.h"

static int asked(const char *fault)
{
    char path[PATH_MAX];
    const char *folder = getenv("GLM_FAULTS");
    return folder && snprintf(path, sizeof path, "%s/%s", folder, fault) > 0 && access(path, F_OK) == 0;
}

int32_t llama_process(struct llama_context *ctx, enum llama_process_type type, struct llama_batch_ext *batch)
{
    int32_t (*real)(struct llama_context *, enum llama_process_type, struct llama_batch_ext *) =
        dlsym(RTLD_NEXT, "llama_process");
    if (asked("crash"))
        abort();
    if (asked("fail")) // as after a CUDA error that sticks
        return -3;
    while (asked("hang")) // as a kernel that never ends
        usleep(10000);
    return real(ctx, type, batch);
}

struct llama_model *llama_model_load_from_file(const char *path, struct llama_model_params params)
{
    struct llama_model *(*real)(const char *, struct llama_model_params) =
        dlsym(RTLD_NEXT, "llama_model_load_from_file");
    while (asked("stall")) // as a disk that gives nothing
        usleep(10000);
    for (volatile long i = 0; asked("slow"); i++) // as a disk that gives little
        if (i % 1000 == 0)
            usleep(1000);
    return real(path, params);
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
    const int status = syscall(SYS_clock_gettime, clock, now);
    if (status == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        now->tv_sec += asked("tomorrow") ? 86400 : asked("yesterday") ? -86400 : 0;
    return status;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone)
{
    struct timespec exact;
    const int status = clock_gettime(CLOCK_REALTIME, &exact);
    (void)zone;
    *now = (struct timeval){exact.tv_sec, exact.tv_nsec / 1000};
    return status;
}

time_t time(time_t *now)
{
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (now)
        *now = exact.tv_sec;
    return exact.tv_sec;
}
