/* SPDX-License-Identifier: MIT
 *
 * harness.h: what server.c is written with: cases and their report, parts that
 * run side by side, a server to talk to, a connection with a read buffer, HTTP
 * answers and WebSocket frames.
 *
 * A case is begin(), some checks, finish(). The first check that fails is the
 * one reported, and after it nothing is waited for any more, so that a broken
 * case costs one deadline and not ten.
 *
 *   CHAT=./chat   the program under test
 *   BUILD=build   where it is built with other limits
 *   PATIENCE=10   seconds in which what must happen has to happen
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <regex.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define COUNT(array) (sizeof(array) / sizeof *(array))

/* ---- Cases ------------------------------------------------------------- */

static struct {
    bool sanitized;  /* it is a sanitizer build: slower, and larger */
    double patience; /* seconds to wait for anything */
    char name[500];  /* of the case that runs */
    char why[700];   /* its first failed check, empty so far */
    int failed;
} test;

static double seconds(clockid_t clock) {
    struct timespec t = {0};
    clock_gettime(clock, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}
#define now() seconds(CLOCK_MONOTONIC)

/* When a wait that begins now has to end. */
static double deadline(void) {
    return now() + (test.why[0] ? 0 : test.patience);
}

/* Waits until the descriptor is ready or the time has come. */
static bool wait_for(int fd, short events, double until) {
    struct pollfd p = {.fd = fd, .events = events};
    double left = until - now();
    return poll(&p, 1, left > 0 ? (int)(left * 1000) + 1 : 0) > 0;
}

/* The bytes as printable text, cut after 100, in one of eight buffers. */
static const char *shown(const void *bytes, size_t n) {
    static char buffers[8][440];
    static unsigned turn;
    const unsigned char *in = bytes;
    char *out = buffers[turn++ % 8], *at = out;
    for (size_t i = 0; i < n && i < 100; i++) {
        if (in[i] >= ' ' && in[i] < 0x7f && in[i] != '\\') *at++ = (char)in[i];
        else at += sprintf(at, "\\x%02x", in[i]);
    }
    *at = '\0';
    if (n > 100) sprintf(at, "... (%zu bytes)", n);
    return out;
}

static bool matches(const char *text, const char *pattern) {
    regex_t regex;
    regcomp(&regex, pattern, REG_EXTENDED | REG_NOSUB);
    bool found = regexec(&regex, text, 0, NULL, 0) == 0;
    regfree(&regex);
    return found;
}

#define PRINTF(n)  __attribute__((format(printf, n, n + 1)))
#define begin(...) snprintf(test.name, sizeof test.name, __VA_ARGS__)

/* Records the detail if this is the case's first failed check. */
PRINTF(2) static bool expect(bool good, const char *format, ...) {
    va_list list;
    if (good || test.why[0]) return good;
    va_start(list, format);
    vsnprintf(test.why, sizeof test.why, format, list);
    va_end(list);
    for (char *c = test.why; (c = strchr(c, '\n'));) *c = ' ';
    return good;
}

static void finish(void) {
    if (test.why[0]) printf("FAILED - %s: %s\n", test.name, test.why);
    else printf("ok - %s\n", test.name);
    fflush(stdout);
    if (test.why[0] && ++test.failed == 30) exit(1); /* that will do */
    test.why[0] = '\0';
}

/* Goes into a new folder, which has links to the programs under test. */
static void harness_open(char *folder) {
    const char *patience = getenv("PATIENCE");
    struct rlimit limit;
    test.sanitized = !system("grep -qE '__(a|ub)san_' \"${CHAT:-./chat}\"");
    test.patience = patience ? atof(patience) : test.sanitized ? 20 : 10;
    test.sanitized |= test.patience >= 30; /* or valgrind */
    /* What ASan keeps of freed memory may not hide what the program takes. */
    setenv("ASAN_OPTIONS", "quarantine_size_mb=2", 0);
    signal(SIGPIPE, SIG_IGN);
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    setenv("FOLDER", mkdtemp(folder), 1);
    if (system("ln -s \"$(realpath \"${CHAT:-chat}\")\" $FOLDER/chat &&"
               "ln -s \"$(realpath \"${BUILD:-build}\")\"/chat-* $FOLDER") ||
        chdir(folder))
        perror(folder);
}

/* ---- Parts, side by side, each in a process of its own ------------------ */

struct part {
    const char *name;
    void (*run)(void);
};

/* Runs the parts that the command line names, or all of them; returns the
 * exit status of the test. */
static int run_parts(const struct part *part, int argc, char **argv) {
    int status, failed = 0;
    for (; part->name; part++) {
        bool wanted = argc < 2;
        for (int k = 1; k < argc; k++) wanted |= !strcmp(argv[k], part->name);
        if (!wanted || fork() > 0) continue;
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        part->run();
        exit(test.failed > 0);
    }
    for (; wait(&status) > 0; failed |= status)
        if (!WIFEXITED(status)) printf("FAILED - a part: status %x\n", status);
    return failed != 0;
}

/* ---- The server -------------------------------------------------------- */

struct server {
    const char *may_say; /* regex of lines it may print beside the first */
    pid_t pid;
    int port, out, err; /* memory files that are its stdout and stderr */
};

/* What it has written to one of them. */
static const char *written(int fd) {
    static char texts[4][100000];
    static unsigned turn;
    char *text = texts[turn++ % 4];
    ssize_t n = pread(fd, text, sizeof *texts - 1, 0);
    text[n > 0 ? n : 0] = '\0';
    return text;
}

/* Runs a command line of the shell, which has to end as the server. */
static struct server server_spawn(const char *command) {
    struct server s = {.out = memfd_create("stdout", MFD_CLOEXEC),
                       .err = memfd_create("stderr", MFD_CLOEXEC)};
    fflush(stdout);
    s.pid = fork();
    if (s.pid) return s;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    dup2(s.out, 1);
    dup2(s.err, 2);
    signal(SIGPIPE, SIG_DFL);
    execl("/bin/sh", "sh", "-c", command, NULL);
    _exit(127);
}

/* Waits for a piece of text on stderr. */
static bool server_says(const struct server *s, const char *text) {
    siginfo_t gone = {0};
    double until = deadline();
    while (!strstr(written(s->err), text) && !gone.si_pid && now() < until) {
        poll(NULL, 0, 2);
        waitid(P_PID, (id_t)s->pid, &gone, WEXITED | WNOHANG | WNOWAIT);
    }
    return expect(strstr(written(s->err), text) != NULL, "no \"%s\" in: %s",
                  text, written(s->err));
}

/* Waits for the process to end, and kills it if that takes too long: its exit
 * status, or 128 + signal. */
static int server_end(const struct server *s) {
    double until = deadline();
    int status = 0;
    while (waitpid(s->pid, &status, WNOHANG) == 0) {
        if (now() >= until) kill(s->pid, SIGKILL);
        poll(NULL, 0, 2);
    }
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

/* Starts a server and waits until it listens. If it does not, that is a failed
 * case, or if its build is not there a skipped one; and the end of the part. */
PRINTF(1) static struct server server_start(const char *format, ...) {
    char command[1000];
    va_list list;
    va_start(list, format);
    vsnprintf(command, sizeof command, format, list);
    va_end(list);
    begin("%.300s", command);
    struct server s = server_spawn(command);
    if (server_says(&s, "/, bus")) {
        const char *end = strstr(written(s.err), "/, bus");
        while (end[-1] != ':') end--;
        s.port = atoi(end);
        return s;
    }
    kill(s.pid, SIGKILL);
    if (server_end(&s) != 127) finish();
    else printf("skipped: %s: needs it in $BUILD\n", test.name);
    exit(test.failed > 0);
}

/* A signal, exit 0, and of the lines on stderr only those that it may say. */
static void expect_stop(const struct server *s, int number) {
    kill(s->pid, number);
    int status = server_end(s);
    expect(status == 0, "exit status %d: %s", status, written(s->err));
    char *rest = (char *)(uintptr_t)written(s->err);
    for (char *line; (line = strsep(&rest, "\n")) && *line;)
        expect(!strncmp(line, "chat: listening on http", 23) ||
                   (s->may_say && matches(line, s->may_say)),
               "stderr: %s", shown(line, strlen(line)));
    close(s->out);
    close(s->err);
}

/* The last check of a case. */
static void finish_stop(const struct server *s) {
    expect_stop(s, SIGTERM);
    finish();
}

/* The processor time that it has used, in seconds. */
static double server_cpu(const struct server *s) {
    clockid_t clock;
    return clock_getcpuclockid(s->pid, &clock) ? 0 : seconds(clock);
}

/* What it has in memory, in MiB. */
static double server_memory(const struct server *s) {
    char path[40];
    long pages = 0;
    snprintf(path, sizeof path, "/proc/%d/statm", (int)s->pid);
    FILE *file = fopen(path, "re");
    if (!file || fscanf(file, "%*d %ld", &pages) != 1) perror(path);
    if (file) fclose(file);
    return (double)pages * (double)sysconf(_SC_PAGESIZE) / (1 << 20);
}

static void expect_memory(const struct server *s, double before, double most) {
    double grown = server_memory(s) - before;
    expect(grown < most * (test.sanitized ? 2 : 1), "it took %.1f MiB", grown);
}

/* ---- A connection ------------------------------------------------------ */

#define peer_open(port)         peer_connect(port, 0)
#define peer_text(p, text)      peer_send(p, text, strlen(text))
#define ws_text(p, text)        ws_send(p, TEXT, text, strlen(text))
#define ws_expect_text(p, text) ws_expect(p, TEXT, text, strlen(text))

struct peer {
    int fd;
    unsigned char *in; /* unread bytes are in[start .. end) */
    size_t start, end, size;
    bool ended; /* nothing more will come: closed or reset */
};

/* Connects to a port of 127.0.0.1. `buffer`: what the kernel takes before it
 * stops the other side, or us; 0 for the usual. */
static struct peer *peer_connect(int port, int buffer) {
    struct sockaddr_in to = {.sin_family = AF_INET,
                             .sin_port = htons((uint16_t)port),
                             .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct peer *p = calloc(1, sizeof *p);
    int one = 1;
    p->in = malloc(1);
    p->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    setsockopt(p->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    for (int i = 0; buffer && i < 2; i++)
        setsockopt(p->fd, SOL_SOCKET, i ? SO_RCVBUF : SO_SNDBUF, &buffer,
                   sizeof buffer);
    p->ended = connect(p->fd, (struct sockaddr *)&to, sizeof to) < 0;
    expect(!p->ended, "connect: %s", strerror(errno));
    fcntl(p->fd, F_SETFL, O_NONBLOCK);
    return p;
}

static void peer_close(struct peer *p) {
    close(p->fd);
    free(p->in);
    free(p);
}

/* Sends all of it. False if the other side has gone or takes nothing more;
 * that is for the caller to judge. */
static bool peer_send(struct peer *p, const void *bytes, size_t n) {
    const char *at = bytes;
    double until = deadline();
    while (n > 0) {
        ssize_t sent = send(p->fd, at, n, MSG_NOSIGNAL);
        if (sent < 0 && (errno != EAGAIN || !wait_for(p->fd, POLLOUT, until)))
            return false;
        at += sent > 0 ? sent : 0;
        n -= sent > 0 ? (size_t)sent : 0;
    }
    return true;
}

/* Reads what is there without waiting: true if bytes came. */
static bool peer_take(struct peer *p) {
    if (p->size - p->end < 65536) {
        p->end -= p->start;
        memmove(p->in, p->in + p->start, p->end);
        p->start = 0;
        p->size = p->end * 2 + 131072;
        p->in = realloc(p->in, p->size);
    }
    ssize_t n = p->ended ? 0 : recv(p->fd, p->in + p->end, p->size - p->end, 0);
    if (n > 0) p->end += (size_t)n;
    else p->ended |= n == 0 || errno != EAGAIN;
    return n > 0;
}

/* Waits for more bytes: false at the end of the stream or the deadline. */
static bool peer_more(struct peer *p, double until) {
    while (!p->ended && wait_for(p->fd, POLLIN, until))
        if (peer_take(p)) return true;
    return false;
}

/* Reads to the end of the stream and drops it; returns how much it was. */
static size_t peer_drain(struct peer *p) {
    size_t n = p->end - p->start;
    for (double until = deadline(); peer_more(p, until); p->start = p->end)
        n += p->end - p->start;
    expect(p->ended, "the connection was not closed");
    return n;
}

/* The other side closes the connection, and sends nothing before. */
static void expect_end(struct peer *p) {
    if (p->start == p->end) peer_more(p, deadline());
    expect(p->start == p->end, "more bytes came: %s",
           shown(p->in + p->start, p->end - p->start));
    expect(p->ended, "the connection was not closed");
}

/* ---- HTTP -------------------------------------------------------------- */

struct response {
    int status; /* 0 if there was none */
    char head[20000];
    const char *body; /* with a NUL behind; valid until the next one is read */
    size_t length;
};

/* The value of a header field, in one of four buffers; NULL if not there. */
static const char *header(const struct response *r, const char *name) {
    static char values[4][1000];
    static unsigned turn;
    char key[410];
    snprintf(key, sizeof key, "\r\n%s:", name);
    const char *at = strcasestr(r->head, key);
    if (!at) return NULL;
    at += strlen(key);
    at += strspn(at, " \t");
    snprintf(values[turn++ % 4], sizeof *values, "%.*s",
             (int)strcspn(at, "\r\n"), at);
    return values[(turn - 1) % 4];
}

/* Reads a response, and checks what every one owes: clean lines, and but for
 * 100 and 101 a Date, nosniff, Connection: close and a length. `to_head`: it
 * answers HEAD, so it has no body. */
static struct response read_response(struct peer *p, bool to_head) {
    static char *body;
    struct response r = {0};
    double until = deadline();
    unsigned char *end = NULL;
    do end = memmem(p->in + p->start, p->end - p->start, "\r\n\r\n", 4);
    while (!end && peer_more(p, until));
    size_t size = end ? (size_t)(end - (p->in + p->start)) + 4 : 0;
    if (!expect(size && size < sizeof r.head, "no response%s; got: %s",
                p->ended ? ", connection closed" : " in time",
                shown(p->in + p->start, p->end - p->start)))
        return r;
    memcpy(r.head, p->in + p->start, size - 2);
    p->start += size;
    expect(sscanf(r.head, "HTTP/1.1 %3d ", &r.status) == 1, "status line: %s",
           shown(r.head, strcspn(r.head, "\r")));
    for (const char *at = r.head; *at; at++)
        expect(*at == '\n' ? at[-1] == '\r' : *at != '\r' || at[1] == '\n',
               "a lone CR or LF in the header");
    if (r.status < 200) return r;
    const char *connection = header(&r, "Connection");
    const char *length = header(&r, "Content-Length");
    expect(header(&r, "Date") && header(&r, "X-Content-Type-Options") &&
               connection && strstr(connection, "close") && length,
           "no Date, nosniff, Connection: close or length: %s", r.head);
    if (!length || to_head || r.status == 304) return r;
    r.length = (size_t)strtoull(length, NULL, 10);
    while (p->end - p->start < r.length && peer_more(p, deadline()))
        ;
    size_t have = p->end - p->start;
    if (!expect(have >= r.length, "body of %zu, not %zu", have, r.length))
        r.length = have;
    body = realloc(body, r.length + 1);
    memcpy(body, p->in + p->start, r.length);
    body[r.length] = '\0';
    r.body = body;
    p->start += r.length;
    return r;
}

static void expect_body(const struct response *r, const char *text) {
    expect(r->body && r->length == strlen(text) && !strcmp(r->body, text),
           "body %s, expected %s", shown(r->body, r->length),
           shown(text, strlen(text)));
}

/* GET, on a connection of its own. */
static struct response http_get(int port, const char *target) {
    struct peer *p = peer_open(port);
    char request[9000];
    snprintf(request, sizeof request, "GET %s HTTP/1.1\r\nHost: a\r\n\r\n",
             target);
    peer_text(p, request);
    struct response r = read_response(p, false);
    peer_close(p);
    return r;
}

static void expect_status(int port, const char *target, int status) {
    int got = http_get(port, target).status;
    expect(got == status, "%s: status %d, expected %d", target, got, status);
}

/* ---- WebSocket --------------------------------------------------------- */

#define WS_KEY    "dGhlIHNhbXBsZSBub25jZQ=="
#define WS_ACCEPT "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
#define WS_HEADERS                                  \
    "Upgrade: websocket\r\nConnection: Upgrade\r\n" \
    "Sec-WebSocket-Key: " WS_KEY "\r\n"             \
    "Sec-WebSocket-Version: 13\r\n"

enum { TEXT = 0x81, BINARY = 0x82, CLOSE = 0x88, PING = 0x89, PONG = 0x8a };

struct frame {
    int first; /* FIN, RSV and opcode as they came */
    size_t length;
    const unsigned char *data; /* valid until the peer reads again */
};

static void ws_ask(struct peer *p, const char *target) {
    char request[9000];
    snprintf(request, sizeof request,
             "GET %s HTTP/1.1\r\nHost: a\r\n" WS_HEADERS "\r\n", target);
    peer_text(p, request);
}

/* Takes the opening response and checks it. */
static void ws_opened(struct peer *p) {
    struct response r = read_response(p, false);
    const char *accept = header(&r, "Sec-WebSocket-Accept");
    expect(r.status == 101 && accept && !strcmp(accept, WS_ACCEPT),
           "opening: status %d, Sec-WebSocket-Accept: %s", r.status, accept);
}

static struct peer *ws_open(int port, const char *target) {
    struct peer *p = peer_open(port);
    ws_ask(p, target);
    ws_opened(p);
    return p;
}

/* Writes a frame. `form`: 7, 16 or 64 bits of length, 0 for the shortest.
 * The mask is never 0, so that a server that forgets it is noticed. */
static size_t ws_encode(unsigned char *to, int first, bool masked, int form,
                        const void *data, size_t n) {
    static const unsigned char mask[4] = {0x37, 0xfa, 0x21, 0x3d};
    const unsigned char *from = data;
    size_t at = 2;
    if (form == 0) form = n < 126 ? 7 : n < 65536 ? 16 : 64;
    to[0] = (unsigned char)first;
    to[1] = (unsigned char)(form == 7 ? n : form == 16 ? 126 : 127);
    for (int bits = form - 8; form > 7 && bits >= 0; bits -= 8)
        to[at++] = (unsigned char)((unsigned long long)n >> bits);
    if (masked) {
        to[1] |= 0x80;
        memcpy(to + at, mask, 4);
        at += 4;
    }
    for (size_t i = 0; i < n; i++)
        to[at++] = from[i] ^ (masked ? mask[i & 3] : 0);
    return at;
}

static bool ws_send(struct peer *p, int first, const void *data, size_t n) {
    unsigned char *bytes = malloc(n + 14);
    bool sent = peer_send(p, bytes, ws_encode(bytes, first, true, 0, data, n));
    free(bytes);
    return sent;
}

/* Takes a frame from the buffer: false if it is not complete. What a server
 * must never send fails the case. */
static bool ws_take(struct peer *p, struct frame *f) {
    const unsigned char *in = p->in + p->start;
    size_t have = p->end - p->start, extra;
    if (have < 2) return false;
    extra = (in[1] & 127) == 126 ? 2 : (in[1] & 127) == 127 ? 8 : 0;
    if (have < 2 + extra) return false;
    unsigned long long n = extra ? 0 : in[1] & 127;
    for (size_t i = 0; i < extra; i++) n = n << 8 | in[2 + i];
    expect(!(in[1] & 0x80) && !(in[0] & 0x70), "a mask or reserved bit");
    expect(!extra || n > (extra == 2 ? 125 : 65535), "%llu in %zu bytes", n,
           extra);
    if (n > have - 2 - extra) return false;
    *f = (struct frame){in[0], (size_t)n, in + 2 + extra};
    p->start += 2 + extra + (size_t)n;
    return true;
}

/* Waits for a frame: false at the end of the stream or the deadline. */
static bool ws_next(struct peer *p, struct frame *f) {
    double until = deadline();
    while (!ws_take(p, f))
        if (!peer_more(p, until)) return false;
    return true;
}

static void ws_expect(struct peer *p, int first, const void *data, size_t n) {
    struct frame f = {0};
    expect(ws_next(p, &f), "no frame%s, expected %s",
           p->ended ? ", connection closed" : " in time", shown(data, n));
    expect(f.first == first && f.length == n && !memcmp(f.data, data, n),
           "frame %02x %s, expected %02x %s", (unsigned)f.first,
           shown(f.data, f.length), (unsigned)first, shown(data, n));
}

/* A ping and its answer: the server has read what was sent before. */
static void ws_sync(struct peer *p) {
    struct frame f = {0};
    ws_send(p, PING, "sync", 4);
    while (f.first != PONG && ws_next(p, &f))
        ;
    expect(f.first == PONG && f.length == 4 && !memcmp(f.data, "sync", 4),
           "no answer to a ping");
}

/* Sends byte by byte. The clock is a WebSocket of the same server. After each
 * byte it is pinged twice: the first answer may come from the round that reads
 * the byte, the second comes after it. So each byte is read alone. */
static void send_chopped(struct peer *p, struct peer *clock, const void *bytes,
                         size_t n) {
    const char *at = bytes;
    for (size_t i = 0; i < n && peer_send(p, at + i, 1); i++)
        for (int k = 0; k < 2 && !test.why[0]; k++) ws_sync(clock);
}
