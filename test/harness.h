/* SPDX-License-Identifier: MIT
 *
 * harness.h: what the black-box tests share: cases and their report, a part
 * that runs beside the others, a server to talk to, a connection with a read
 * buffer, HTTP responses and WebSocket frames.
 *
 * A case is begin(), some checks, finish(). The first check that fails is the
 * one reported, and after it nothing is waited for any more, so that a broken
 * case costs one deadline and not ten.
 *
 * The program under test is $CHAT (default ./chat). $PATIENCE is the deadline
 * of every wait in seconds: 5, and 10 where the program is a sanitizer build.
 */
#ifndef HARNESS_H
#define HARNESS_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <regex.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* ---- Cases ------------------------------------------------------------- */

static struct {
    const char *program; /* the binary under test */
    double patience;     /* seconds to wait for anything */
    char name[200];      /* of the case that runs */
    char why[700];       /* its first failed check, empty so far */
    int passed, failed, skipped;
} test;

static inline double now(void) {
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

/* When a wait that begins now has to end. */
static inline double deadline(void) {
    return now() + (test.why[0] ? 0 : test.patience);
}

/* The bytes as printable text, cut after 100, in one of eight buffers. */
static inline const char *shown(const void *bytes, size_t n) {
    static char buffers[8][440];
    static unsigned turn;
    const unsigned char *in = bytes;
    char *out = buffers[turn++ % 8], *at = out;

    for (size_t i = 0; i < n && i < 100; i++) {
        if (in[i] >= ' ' && in[i] < 0x7f && in[i] != '\\') *at++ = (char)in[i];
        else at += sprintf(at, "\\x%02x", in[i]);
    }
    if (n > 100) sprintf(at, "... (%zu bytes)", n);
    else *at = '\0';
    return out;
}

__attribute__((format(printf, 1, 2))) static inline void begin(
    const char *format, ...) {
    va_list list;

    va_start(list, format);
    vsnprintf(test.name, sizeof test.name, format, list);
    va_end(list);
    test.why[0] = '\0';
}

/* Records the detail if this is the case's first failed check. */
__attribute__((format(printf, 2, 3))) static inline bool expect(
    bool good, const char *format, ...) {
    va_list list;

    if (good || test.why[0]) return good;
    va_start(list, format);
    vsnprintf(test.why, sizeof test.why, format, list);
    va_end(list);
    return good;
}

static inline void finish(void) {
    if (test.why[0]) printf("FAILED - %s: %s\n", test.name, test.why);
    else printf("ok - %s\n", test.name);
    test.failed += test.why[0] != '\0';
    test.passed += test.why[0] == '\0';
    test.why[0] = '\0';
    fflush(stdout);
}

static inline void skip(const char *name, const char *reason) {
    printf("skipped: %s: %s\n", name, reason);
    test.skipped++;
}

/* Does the file hold these bytes? A sanitizer build names its runtime. */
static inline bool file_mentions(const char *path, const char *word) {
    bool found = false;
    struct stat st;
    int fd = open(path, O_RDONLY | O_CLOEXEC);

    if (fd >= 0 && fstat(fd, &st) == 0 && st.st_size > 0) {
        size_t size = (size_t)st.st_size;
        void *map = mmap(NULL, size, PROT_READ, MAP_PRIVATE, fd, 0);

        if (map != MAP_FAILED) {
            found = memmem(map, size, word, strlen(word)) != NULL;
            munmap(map, size);
        }
    }
    if (fd >= 0) close(fd);
    return found;
}

static inline void harness_open(void) {
    const char *patience = getenv("PATIENCE"), *program = getenv("CHAT");

    test.program = program ? program : "./chat";
    test.patience = 5;
    if (file_mentions(test.program, "__asan_") ||
        file_mentions(test.program, "__ubsan_"))
        test.patience = 10;
    if (patience) test.patience = atof(patience);
    unsetenv("CHAT_SECRET");
    signal(SIGPIPE, SIG_IGN);
}

/* A part that mostly waits runs in a process of its own, beside the others;
 * what it printed is shown and counted at the end. */
static struct {
    pid_t pid;
    int output;
} beside;

static inline void begin_beside(void (*run)(void)) {
    beside.output = memfd_create("output", MFD_CLOEXEC);
    fflush(stdout);
    beside.pid = fork();
    if (beside.pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        dup2(beside.output, 1);
        run();
        exit(0);
    }
}

static inline void end_beside(void) {
    char *text, *rest;
    struct stat st;
    int status = -1;

    if (!beside.pid) return;
    begin("the part beside the others came to its end");
    waitpid(beside.pid, &status, 0);
    expect(status == 0, "status %x", (unsigned)status);
    finish();
    fstat(beside.output, &st);
    rest = text = calloc(1, (size_t)st.st_size + 1);
    if (pread(beside.output, text, (size_t)st.st_size, 0) < 0) perror("pread");
    for (char *line; (line = strsep(&rest, "\n")) && rest;) {
        puts(line);
        test.passed += !strncmp(line, "ok - ", 5);
        test.failed += !strncmp(line, "FAILED - ", 9);
    }
    free(text);
}

struct part {
    const char *name;
    void (*run)(void);
    bool beside; /* the others: see begin_beside */
};

/* Runs the parts that the command line names, or all of them. */
static inline void run_parts(const struct part *parts, size_t count, int argc,
                             char **argv) {
    for (size_t i = 0; i < count; i++) {
        bool wanted = argc < 2;

        for (int k = 1; k < argc; k++)
            wanted |= !strcmp(argv[k], parts[i].name);
        if (wanted && parts[i].beside) begin_beside(parts[i].run);
        else if (wanted) parts[i].run();
    }
    end_beside();
}

/* The exit status of a test program. */
static inline int harness_close(void) {
    printf("# %d passed, %d failed, %d skipped\n", test.passed, test.failed,
           test.skipped);
    return test.failed ? 1 : 0;
}

/* Waits until the descriptor is ready or the time has come. */
static inline bool wait_for(int fd, short events, double until) {
    for (;;) {
        struct pollfd p = { .fd = fd, .events = events };
        double left = until - now();
        int n = poll(&p, 1, left > 0 ? (int)(left * 1000) + 1 : 0);

        if (n > 0) return true;
        if ((n == 0 && now() >= until) || (n < 0 && errno != EINTR))
            return false;
    }
}

/* ---- The server -------------------------------------------------------- */

struct server {
    pid_t pid;
    int port;
    int err;    /* pipe from its stderr */
    int out;    /* memory file that is its stdout */
    char *said; /* all of stderr so far, a string */
    size_t said_len;
    const char *may_say; /* regex of lines it may print beside the first */
    bool without_rights; /* root's right to read anything is taken away */
    rlim_t descriptors;  /* that it may have; 0: as many as we */
};

/* Takes what stderr has; false at its end (the process has gone). */
static inline bool server_listen(struct server *s, double until) {
    char piece[4096];
    ssize_t n;

    if (!wait_for(s->err, POLLIN, until)) return true;
    n = read(s->err, piece, sizeof piece);
    if (n <= 0) return false;
    s->said = realloc(s->said, s->said_len + (size_t)n + 1);
    memcpy(s->said + s->said_len, piece, (size_t)n);
    s->said_len += (size_t)n;
    s->said[s->said_len] = '\0';
    return true;
}

/* Starts the program with these arguments, a NULL-ended list. */
static inline void server_spawn(struct server *s, const char *const *args) {
    const char *argv[32] = { test.program };
    int pipes[2], n = 1;

    while (*args && n < 31) argv[n++] = *args++;
    s->out = memfd_create("stdout", MFD_CLOEXEC);
    s->said = calloc(1, 1);
    s->said_len = 0;
    s->port = 0;
    if (pipe2(pipes, O_CLOEXEC) || s->out < 0) {
        perror("pipe");
        exit(1);
    }
    fflush(stdout);
    s->pid = fork();
    if (s->pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (s->descriptors)
            setrlimit(RLIMIT_NOFILE,
                      &(struct rlimit){ s->descriptors, s->descriptors });
        if (s->without_rights) /* CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH */
            for (unsigned long right = 1; right <= 2; right++)
                prctl(PR_CAPBSET_DROP, right, 0L, 0L, 0L);
        dup2(s->out, 1);
        dup2(pipes[1], 2);
        signal(SIGPIPE, SIG_DFL);
        execv(test.program, (char *const *)(uintptr_t)argv);
        perror(test.program);
        _exit(127);
    }
    close(pipes[1]);
    s->err = pipes[0];
}

/* Waits for the process to end by itself: its exit status, 128 + signal, or
 * -1 if it had to be killed. Its stderr is complete then. */
static inline int server_end(struct server *s) {
    double until = deadline();
    int status = 0, killed = 0;

    while (server_listen(s, until))
        if (now() >= until && !killed++) {
            kill(s->pid, SIGKILL);
            until = now() + 1;
        } else if (now() >= until) {
            break;
        }
    close(s->err);
    waitpid(s->pid, &status, 0);
    s->pid = 0;
    if (killed) return -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

/* Waits for a piece of text on stderr, searched from an offset. */
static inline bool server_says(struct server *s, size_t from,
                               const char *text) {
    double until = deadline();

    while (!strstr(s->said + from, text))
        if (now() >= until || !server_listen(s, until))
            return strstr(s->said + from, text) != NULL;
    return true;
}

/* Starts a server and waits until it listens. A failure is reported as a case
 * of its own, so this stands between cases. */
static inline bool server_start(struct server *s, const char *const *args) {
    const char *line = NULL, *slash = NULL, *all[30] = { "-p", "0" };
    int n = 2;

    while (*args && n < 29) all[n++] = *args++;
    begin("a server starts (%s %s)", all[2] ? all[2] : "",
          all[3] ? all[3] : "");
    server_spawn(s, all);
    if (server_says(s, 0, "chat: listening on http"))
        line = strstr(s->said, "chat: listening on http");
    if (line && !server_says(s, (size_t)(line - s->said), "\n")) line = NULL;
    if (line) slash = strchr(strstr(line, "://") + 3, '/');
    while (slash && slash > line && slash[-1] >= '0' && slash[-1] <= '9')
        slash--;
    if (slash && slash[-1] == ':') s->port = atoi(slash);
    if (s->port > 0) return true;
    expect(false, "no port in: %s", shown(s->said, s->said_len));
    finish();
    kill(s->pid, SIGKILL);
    server_end(s);
    return false;
}
#define START(server, ...) \
    server_start((server), (const char *[]){ __VA_ARGS__, NULL })

/* Checks that stderr holds the first line and what it may say, no more. */
static inline void expect_quiet(const struct server *s) {
    char *copy = strdup(s->said), *rest = copy;
    regex_t allowed;

    regcomp(&allowed, s->may_say ? s->may_say : "^$", REG_EXTENDED | REG_NOSUB);
    for (char *line; (line = strsep(&rest, "\n")) && *line;)
        expect(strncmp(line, "chat: listening on http", 23) == 0 ||
                   regexec(&allowed, line, 0, NULL, 0) == 0,
               "stderr: %s", shown(line, strlen(line)));
    regfree(&allowed);
    free(copy);
}

static inline void server_free(struct server *s) {
    close(s->out);
    free(s->said);
    s->said = NULL;
}

/* SIGTERM, exit 0, a quiet stderr: a case of its own. */
static inline void server_stop(struct server *s, const char *what) {
    int status;

    begin("%s: the server stops cleanly", what);
    kill(s->pid, SIGTERM);
    status = server_end(s);
    expect(status == 0, "exit status %d, stderr: %s", status,
           shown(s->said, s->said_len));
    expect_quiet(s);
    finish();
    server_free(s);
}

/* Its stdout so far, as a string to free. */
static inline char *server_output(const struct server *s) {
    struct stat st;
    char *text;
    ssize_t n;

    fstat(s->out, &st);
    text = malloc((size_t)st.st_size + 1);
    n = pread(s->out, text, (size_t)st.st_size, 0);
    text[n > 0 ? n : 0] = '\0';
    return text;
}

/* A UDP port that is free now. */
static inline int free_port(void) {
    struct sockaddr_in any = { .sin_family = AF_INET };
    socklen_t length = sizeof any;
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

    if (bind(fd, (struct sockaddr *)&any, sizeof any) < 0 ||
        getsockname(fd, (struct sockaddr *)&any, &length) < 0)
        perror("a free port");
    close(fd);
    return ntohs(any.sin_port);
}

/* ---- A connection ------------------------------------------------------ */

struct peer {
    int fd;            /* -1 if there was no connection */
    unsigned char *in; /* unread bytes are in[start .. end) */
    size_t start, end, size;
    bool ended; /* nothing more will come: closed or reset */
};

static inline struct peer *peer_connect(const void *address, socklen_t length,
                                        int receive_buffer) {
    struct peer *p = calloc(1, sizeof *p);
    const struct sockaddr *to = address;
    struct timeval limit = { .tv_sec = 5 };
    int one = 1;

    p->fd = socket(to->sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    setsockopt(p->fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
    setsockopt(p->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (receive_buffer)
        setsockopt(p->fd, SOL_SOCKET, SO_RCVBUF, &receive_buffer,
                   sizeof receive_buffer);
    if (connect(p->fd, to, length) < 0) {
        expect(false, "connect: %s", strerror(errno));
        close(p->fd);
        p->fd = -1;
        p->ended = true;
        return p;
    }
    fcntl(p->fd, F_SETFL, O_NONBLOCK);
    return p;
}

static inline struct peer *peer_open(int port) {
    struct sockaddr_in to = { .sin_family = AF_INET,
                              .sin_port = htons((uint16_t)port),
                              .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };

    return peer_connect(&to, sizeof to, 0);
}

static inline void peer_close(struct peer *p) {
    if (p->fd >= 0) close(p->fd);
    free(p->in);
    free(p);
}

/* Sends all of it. False if the other side has gone or takes nothing more;
 * that is for the caller to judge. */
static inline bool peer_send(struct peer *p, const void *bytes, size_t n) {
    const char *at = bytes;
    double until = deadline();

    while (n > 0 && p->fd >= 0) {
        ssize_t sent = send(p->fd, at, n, MSG_NOSIGNAL);

        if (sent >= 0) {
            at += sent;
            n -= (size_t)sent;
        } else if (errno != EAGAIN && errno != EINTR) {
            return false;
        } else if (!wait_for(p->fd, POLLOUT, until)) {
            return false;
        }
    }
    return p->fd >= 0;
}

static inline bool peer_text(struct peer *p, const char *text) {
    return peer_send(p, text, strlen(text));
}

/* Reads what is there without waiting: true if bytes came. */
static inline bool peer_take(struct peer *p) {
    ssize_t n;

    if (p->start == p->end) p->start = p->end = 0;
    if (p->start > p->size / 2) {
        memmove(p->in, p->in + p->start, p->end - p->start);
        p->end -= p->start;
        p->start = 0;
    }
    if (p->size - p->end < 65536) {
        p->size = p->size * 2 + 131072;
        p->in = realloc(p->in, p->size);
    }
    n = p->ended ? 0 : recv(p->fd, p->in + p->end, p->size - p->end, 0);
    if (n > 0) p->end += (size_t)n;
    else if (n == 0 || (errno != EAGAIN && errno != EINTR)) p->ended = true;
    return n > 0;
}

/* Waits for more bytes: false at the end of the stream or the deadline. */
static inline bool peer_more(struct peer *p, double until) {
    while (!p->ended && wait_for(p->fd, POLLIN, until))
        if (peer_take(p)) return true;
    return false;
}

/* The other side closes the connection, and sends nothing before. */
static inline void expect_end(struct peer *p) {
    double until = deadline();

    if (p->start == p->end) peer_more(p, until);
    expect(p->start == p->end, "more bytes came: %s",
           shown(p->in + p->start, p->end - p->start));
    expect(p->ended, "the connection was not closed");
}

/* ---- HTTP -------------------------------------------------------------- */

struct response {
    int status; /* 0 if there was none */
    char head[20000];
    const unsigned char *body; /* valid until the peer reads again */
    size_t length;
};

/* The value of a header field, in a buffer of its own; NULL if not there. */
static inline const char *header(const struct response *r, const char *name) {
    static char values[4][1000];
    static unsigned turn;
    size_t length = strlen(name);

    for (const char *line = strstr(r->head, "\r\n"); line;
         line = strstr(line, "\r\n")) {
        line += 2;
        if (strncasecmp(line, name, length) == 0 && line[length] == ':') {
            char *value = values[turn++ % 4];

            line += length + 1;
            line += strspn(line, " \t");
            snprintf(value, sizeof values[0], "%.*s",
                     (int)strcspn(line, "\r\n"), line);
            return value;
        }
    }
    return NULL;
}

/* What every response owes, whatever it answers. */
static inline void expect_proper(const struct response *r) {
    const char *value = header(r, "X-Content-Type-Options");

    for (const char *at = r->head; *at; at++)
        expect((*at != '\n' || at[-1] == '\r') &&
                   (*at != '\r' || at[1] == '\n'),
               "a lone CR or LF in the header");
    if (r->status >= 200)
        expect(value && strcasecmp(value, "nosniff") == 0,
               "status %d without nosniff", r->status);
}

/* Reads one response. `to_head`: it answers HEAD, so it has no body. */
static inline void read_response(struct peer *p, bool to_head,
                                 struct response *r) {
    double until = deadline();
    unsigned char *blank = NULL;
    const char *length;
    size_t head;

    r->status = 0;
    r->head[0] = '\0';
    r->body = NULL;
    r->length = 0;
    do {
        if (p->end > p->start)
            blank = memmem(p->in + p->start, p->end - p->start, "\r\n\r\n", 4);
    } while (!blank && peer_more(p, until));
    if (!expect(blank != NULL, "no response%s; got: %s",
                p->ended ? ", connection closed" : " in time",
                shown(p->in + p->start, p->end - p->start)))
        return;
    head = (size_t)(blank - (p->in + p->start)) + 4;
    if (!expect(head < sizeof r->head, "header of %zu bytes", head)) return;
    memcpy(r->head, p->in + p->start, head);
    r->head[head - 2] = '\0';
    p->start += head;
    if (!expect(sscanf(r->head, "HTTP/1.1 %3d ", &r->status) == 1,
                "status line: %s", shown(r->head, strcspn(r->head, "\r"))))
        return;
    expect_proper(r);
    if (r->status < 200 || r->status == 204 || r->status == 304) return;
    length = header(r, "Content-Length");
    if (!expect(length && length[strspn(length, "0123456789")] == '\0',
                "status %d without a Content-Length", r->status) ||
        to_head)
        return;
    r->length = (size_t)strtoull(length, NULL, 10);
    while (p->end - p->start < r->length && peer_more(p, until))
        until = deadline();
    expect(p->end - p->start >= r->length, "body of %zu bytes, announced %zu",
           p->end - p->start, r->length);
    if (p->end - p->start < r->length) r->length = p->end - p->start;
    r->body = p->in + p->start;
    p->start += r->length;
}

static inline void expect_body(const struct response *r, const char *text) {
    expect(r->length == strlen(text) && !memcmp(r->body, text, r->length),
           "body %s, expected %s", shown(r->body, r->length),
           shown(text, strlen(text)));
}

/* GET on a connection of its own, which the caller closes. */
static inline struct peer *http_get(int port, const char *target,
                                    struct response *r) {
    struct peer *p = peer_open(port);
    char request[9000];

    snprintf(request, sizeof request,
             "GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n", target);
    peer_text(p, request);
    read_response(p, false, r);
    return p;
}

/* Its first answer: it has started altogether, not only begun to listen. */
static inline bool server_answers(const struct server *s) {
    struct response r;

    begin("the server answers");
    peer_close(http_get(s->port, "/", &r));
    if (expect(r.status > 0, "no answer")) return true;
    finish();
    return false;
}

/* The value of a metric, -1 if /metrics has not got it. */
static inline double metric(int port, const char *name) {
    struct response r;
    struct peer *p = http_get(port, "/metrics", &r);
    char *text = strndup(r.body ? (const char *)r.body : "", r.length);
    size_t n = strlen(name);
    double value = -1;

    for (char *line = text; line; line = strchr(line, '\n')) {
        line += *line == '\n';
        if (!strncmp(line, name, n) && line[n] == ' ') value = atof(line + n);
    }
    free(text);
    peer_close(p);
    return value;
}

/* Waits until a metric has at least this value. */
static inline void expect_metric(int port, const char *name, double least) {
    double until = deadline(), value;

    while ((value = metric(port, name)) < least && now() < until)
        poll(NULL, 0, 5);
    expect(value >= least, "%s is %g, expected %g", name, value, least);
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

/* Takes the opening response and checks it. */
static inline void ws_opened(struct peer *p) {
    struct response r;
    const char *accept;

    read_response(p, false, &r);
    accept = header(&r, "Sec-WebSocket-Accept");
    expect(r.status == 101, "opening: status %d", r.status);
    expect(r.status != 101 || (accept && !strcmp(accept, WS_ACCEPT)),
           "opening: Sec-WebSocket-Accept: %s", accept ? accept : "(none)");
}

static inline void ws_ask(struct peer *p, const char *target) {
    char request[9000];

    snprintf(request, sizeof request,
             "GET %s HTTP/1.1\r\nHost: localhost\r\n" WS_HEADERS "\r\n",
             target);
    peer_text(p, request);
}

static inline struct peer *ws_open(int port, const char *target) {
    struct peer *p = peer_open(port);

    ws_ask(p, target);
    ws_opened(p);
    return p;
}

/* Writes a frame. `form`: 7, 16 or 64 bits of length, 0 for the shortest.
 * The mask is never 0, so that a server that forgets it is noticed. */
static inline size_t ws_encode(unsigned char *to, int first, bool masked,
                               int form, const void *data, size_t n) {
    static const unsigned char mask[4] = { 0x37, 0xfa, 0x21, 0x3d };
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

static inline bool ws_send(struct peer *p, int first, const void *data,
                           size_t n) {
    unsigned char *bytes = malloc(n + 14);
    bool sent = peer_send(p, bytes, ws_encode(bytes, first, true, 0, data, n));

    free(bytes);
    return sent;
}

static inline bool ws_text(struct peer *p, const char *text) {
    return ws_send(p, TEXT, text, strlen(text));
}

/* Takes a frame from the buffer: false if it is not complete. What a server
 * must never send fails the case. */
static inline bool ws_take(struct peer *p, struct frame *f) {
    const unsigned char *in = p->in + p->start;
    size_t have = p->end - p->start, head = 2, extra;
    unsigned long long n;

    if (have < 2) return false;
    extra = (in[1] & 127) == 126 ? 2 : (in[1] & 127) == 127 ? 8 : 0;
    if (have < head + extra) return false;
    n = extra ? 0 : in[1] & 127;
    for (size_t i = 0; i < extra; i++) n = n << 8 | in[head + i];
    head += extra;
    expect(!(in[1] & 0x80), "a masked frame from the server");
    expect(!(in[0] & 0x70), "a reserved bit from the server: %02x", in[0]);
    expect(extra != 2 || n > 125, "length %llu in 16 bits", n);
    expect(extra != 8 || n > 65535, "length %llu in 64 bits", n);
    if (n > have - head) return false;
    *f = (struct frame){ .first = in[0],
                         .length = (size_t)n,
                         .data = in + head };
    p->start += head + (size_t)n;
    return true;
}

/* Waits for a frame: false at the end of the stream or the deadline. */
static inline bool ws_next(struct peer *p, struct frame *f) {
    double until = deadline();

    while (!ws_take(p, f))
        if (!peer_more(p, until)) return false;
    return true;
}

static inline void ws_expect(struct peer *p, int first, const void *data,
                             size_t n) {
    struct frame f;

    if (!ws_next(p, &f)) {
        expect(false, "no frame%s, expected %s",
               p->ended ? ", connection closed" : " in time", shown(data, n));
        return;
    }
    expect(f.first == first && f.length == n && !memcmp(f.data, data, n),
           "frame %02x %s, expected %02x %s", (unsigned)f.first,
           shown(f.data, f.length), (unsigned)first, shown(data, n));
}

static inline void ws_expect_text(struct peer *p, const char *text) {
    ws_expect(p, TEXT, text, strlen(text));
}

/* The close code of a frame, 0 if it has none, -1 if it is no close frame. */
static inline int close_code(const struct frame *f) {
    if (f->first != CLOSE || f->length == 1) return -1;
    return f->length ? f->data[0] << 8 | f->data[1] : 0;
}

/* A ping and its answer: the server has read what was sent before. */
static inline void ws_sync(struct peer *p) {
    struct frame f = { 0 };

    ws_send(p, PING, "sync", 4);
    while (f.first != PONG && ws_next(p, &f))
        ;
    expect(f.first == PONG && f.length == 4 && !memcmp(f.data, "sync", 4),
           "no answer to a ping");
}

/* Sends byte by byte. The clock is a WebSocket of the same server. After each
 * byte it is pinged twice: the first answer may come from the round that reads
 * the byte, the second comes after it. So each byte is read alone. */
static inline void send_chopped(struct peer *p, struct peer *clock,
                                const void *bytes, size_t n) {
    const char *at = bytes;

    for (size_t i = 0; i < n && peer_send(p, at + i, 1); i++)
        for (int k = 0; k < 2 && !test.why[0]; k++) ws_sync(clock);
}

#endif
