// Runs the server so that it can answer and never call, and does the duties of PID 1 for it.
//
//     confine PROGRAM ARGUMENT...
//
// A filter of system calls, on top of Docker's own, that no program can take off again: sockets are TCP, which listen
// and accept, or local; connect() fails, and so does what would do the same by another name. It is PID 1 itself, since
// Docker's would be a process of the same user without the filter, which the server could make call in its place.
#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <netinet/in.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define LOAD(what) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, what))
#define RETURN(action) BPF_STMT(BPF_RET | BPF_K, action)
#define ALLOW RETURN(SECCOMP_RET_ALLOW)
#define DENY RETURN(SECCOMP_RET_ERRNO | EPERM)
#define ABSENT RETURN(SECCOMP_RET_ERRNO | ENOENT)
// Each lets the next statement, or the next `count`, run only if it holds.
#define EQUAL(value, count) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, 0, count)
#define UNEQUAL(value) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, 1, 0)
#define AT_LEAST(value) BPF_JUMP(BPF_JMP | BPF_JGE | BPF_K, value, 0, 1)
#define BIT(value) BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, value, 0, 1)
#define NEVER(call) EQUAL(call, 1), DENY
#define NEVER_WITH(call, flags, flag) EQUAL(call, 4), LOAD(flags), BIT(flag), DENY, ALLOW

static struct sock_filter filter[] = {
    LOAD(arch), UNEQUAL(AUDIT_ARCH_X86_64), DENY,
    LOAD(nr), AT_LEAST(0x40000000), DENY, // the x32 calls
    EQUAL(__NR_connect, 1), ABSENT, // CUDA looks for its multi-process service: as if there were none
    NEVER(__NR_io_uring_setup), // its operations pass no filter
    NEVER(__NR_ptrace), NEVER(__NR_process_vm_writev), NEVER(__NR_pidfd_getfd), // through another process
    NEVER_WITH(__NR_sendto, args[3], MSG_FASTOPEN),
    NEVER_WITH(__NR_sendmsg, args[2], MSG_FASTOPEN),
    NEVER_WITH(__NR_sendmmsg, args[3], MSG_FASTOPEN),
    UNEQUAL(__NR_socket), ALLOW,
    LOAD(args[0]), EQUAL(AF_UNIX, 1), ALLOW, EQUAL(AF_NETLINK, 1), ALLOW,
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AF_INET, 2, 0), UNEQUAL(AF_INET6), DENY,
    LOAD(args[1]), BPF_STMT(BPF_ALU | BPF_AND | BPF_K, 0xf), UNEQUAL(SOCK_STREAM), DENY, // not UDP, not raw
    LOAD(args[2]), EQUAL(0, 1), ALLOW, EQUAL(IPPROTO_TCP, 1), ALLOW,
    DENY,
};

static int fail(const char *what)
{
    fprintf(stderr, "confine: ");
    perror(what);
    return 127;
}

// Half of the time that compose.yaml gives it: what has begun to end takes two seconds.
#define AGAIN_S 8

// Runs in PID 1: gives the child every signal, and ends as it does. The engine's handler of SIGTERM may wait for a lock
// that the thread it interrupts holds, for ever: a second one ends it at once.
static int lead(pid_t child, const sigset_t *all)
{
    for (;;) {
        int number, status;
        sigwait(all, &number);
        if (number == SIGTERM)
            alarm(AGAIN_S);
        if (number != SIGCHLD)
            kill(child, number == SIGALRM ? SIGTERM : number);
        else
            for (pid_t ended; (ended = waitpid(-1, &status, WNOHANG)) > 0;)
                if (ended == child)
                    return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
    }
}

int main(int count, char **arguments)
{
    const struct sock_fprog program = {.len = sizeof filter / sizeof *filter, .filter = filter};
    sigset_t all, before;

    if (count < 2) {
        errno = EINVAL;
        return fail("no program");
    }
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program))
        return fail("no filter");
    if (getpid() == 1) {
        sigfillset(&all);
        sigprocmask(SIG_SETMASK, &all, &before);
        const pid_t child = fork();
        if (child < 0)
            return fail("fork");
        if (child > 0)
            return lead(child, &all);
        setpgid(0, 0);
        sigprocmask(SIG_SETMASK, &before, NULL);
    }
    execv(arguments[1], arguments + 1);
    return fail(arguments[1]);
}
