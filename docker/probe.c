// The container's health check: succeeds only if GET /health on the loopback answers with status 200.
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>

static int fail(const char *what)
{
    fprintf(stderr, "probe: %s\n", what);
    return EXIT_FAILURE;
}

int main(void)
{
    const char *text = getenv("LLAMA_ARG_PORT");
    char *end = NULL;
    const long port = text ? strtol(text, &end, 10) : 0;
    if (port < 1 || port > 65535 || *end)
        return fail("LLAMA_ARG_PORT must be a port from 1 to 65535");

    const struct sockaddr_in server = {
        .sin_family = AF_INET,
        .sin_port = htons((in_port_t)port),
        .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
    };
    const struct timeval patience = {.tv_sec = 3};
    const int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience) ||
        setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience))
        return fail("no socket");
    if (connect(fd, (const struct sockaddr *)&server, sizeof server))
        return fail("nothing listens");

    const char request[] = "GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    char reply[] = "HTTP/1.1 ___ ";
    const ssize_t size = sizeof reply - 1;
    if (send(fd, request, sizeof request - 1, MSG_NOSIGNAL) < 0 || recv(fd, reply, size, MSG_WAITALL) != size)
        return fail("no answer");
    return strcmp(reply, "HTTP/1.1 200 ") ? fail(reply) : EXIT_SUCCESS;
}
