// Preloaded into the real server: writes when it was where, to the file that ENGINE_TIMELINE names.
//
// The file: 4096 bytes with the names of the calls, one a line, then a record for each call that ended.
// A call takes about 0.1 us longer for it. Every argument is an integer or a pointer, six at most,
// so that one wrapper serves for all; what returns a std::string takes its address as the first.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define CALLS                                                         \
    CALL(llama_process)                                               \
    CALL(llama_synchronize)                                           \
    CALL(llama_set_sampler)                                           \
    CALL(llama_state_seq_get_data_ext)                                \
    CALL(llama_state_seq_set_data_ext)                                \
    CALL(_Z19common_sampler_initPK11llama_modelR22common_params_sampling) \
    CALL(_Z21common_sampler_sampleP14common_samplerP13llama_contextib) \
    CALL(_Z21common_sampler_acceptP14common_samplerib)                \
    CALL(_Z21common_token_to_pieceB5cxx11PK13llama_contextib)         \
    CALL(ggml_backend_sched_reserve)                                  \
    CALL(ggml_backend_sched_reset)                                    \
    CALL(ggml_backend_sched_alloc_graph)                              \
    CALL(ggml_backend_sched_graph_compute_async)                      \
    CALL(cudaStreamBeginCapture)                                      \
    CALL(cudaStreamEndCapture)                                        \
    CALL(cudaGraphInstantiate)                                        \
    CALL(cudaGraphExecUpdate)                                         \
    CALL(cudaGraphLaunch)                                             \
    CALL(send)

#define CALL(name) AT_##name,
enum { CALLS COUNT };
#undef CALL

struct record {
    uint64_t start_ns;
    uint32_t length_ns;
    uint32_t call;
    uint64_t size; // of what is sent, saved or restored, in bytes
};

enum { HEAD = 4096, MOST = 8 << 20 };
static struct record *records;
static atomic_size_t next;

static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void note(uint32_t call, uint64_t start, long size)
{
    size_t at = records ? atomic_fetch_add(&next, 1) : MOST;
    uint64_t length = now() - start;
    if (at < MOST)
        records[at] = (struct record){start, length > UINT32_MAX ? UINT32_MAX : (uint32_t)length, call, (uint64_t)size};
}

#define CALL(name)                                                                          \
    long name(long a, long b, long c, long d, long e, long f)                               \
    {                                                                                       \
        static long (*real)(long, long, long, long, long, long);                            \
        if (!real)                                                                          \
            *(void **)&real = dlsym(RTLD_NEXT, #name);                                      \
        uint64_t start = now();                                                             \
        long result = real(a, b, c, d, e, f);                                               \
        note(AT_##name, start, c);                                                          \
        return result;                                                                      \
    }
CALLS
#undef CALL

#define CALL(name) #name "\n"
__attribute__((constructor)) static void begin(void)
{
    static const char names[HEAD] = CALLS;
    int serves = strcmp(program_invocation_short_name, "llama-server") == 0;
    const char *path = serves ? getenv("ENGINE_TIMELINE") : NULL; // no other process that inherits it
    size_t bytes = HEAD + MOST * sizeof(struct record);
    int file = path ? open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600) : -1;
    if (file < 0 || ftruncate(file, (off_t)bytes) != 0)
        return;
    char *map = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (map == MAP_FAILED)
        return;
    memcpy(map, names, HEAD);
    records = (struct record *)(map + HEAD);
}
