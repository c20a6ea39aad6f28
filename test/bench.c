/* bench.c: how many deliveries a second the chat makes, how late they are,
 * and how near that is to the least that the kernel asks for.
 *
 *   load (this process, one core)                 server (another core)
 *   N WebSocket clients, one epoll loop  <----->  chat, then the floor, ...
 *   S of them send
 *
 * The *floor* is a server without anything that could be left out: a fixed
 * answer to the handshake, no checks, no history, no time outs. It takes the
 * masks off, makes new frames and calls send() once a client and round, the
 * senders first. What the chat does beyond that is seen in the ratios. The
 * *peers* are other servers; "make peers" installs them, and those that are
 * not there are skipped.
 *
 * In a closed loop a sender has `window` messages under way, and sends the
 * next when one of them comes back. In an open loop messages go out at a
 * fixed rate, come what may, and what is late counts from when it was due.
 * Each run is a new server with new clients; servers take turns, and the
 * median of the runs' ratios is shown with the lowest and the highest, so
 * that a busy machine does less harm. CPU time is the server process's own,
 * of all its threads, from when the first message of a run is sent until the
 * last has come; what the kernel does in its name is in it.
 *
 * Every client has to get every message, and each sender's in their order:
 * else a line says FAILED, and the exit status is 1.
 *
 *   bench [-f] [-t SECONDS] [-n RUNS] [-x NAME=COMMAND]... [-o FILE]
 *         [-p FILE] [PART | SCENARIO]...
 *
 *   -t  to measure each server in each scenario, all runs together (2)
 *   -n  runs (4)
 *   -f  the floor alone, no peers
 *   -x  another server: a command that prints http://HOST:PORT
 *   -o  the summary, as Markdown, also into this file
 *   -p  a plot, as SVG, into this file
 *   PART is one of
 *     fanout    five usual scenarios, all servers; this is the default
 *     latency   the same, open loop at half of what chat and floor can do
 *     joins     handshakes a second, memory a client
 *     growth    from 100 to 19,000 clients in one channel
 *     channels  a small channel beside one with 10,000 clients
 *     http      GET / with keep-alive, by wrk, beside nginx
 *     workers   one process beside "chat -j 2", on two cores; the bus
 *     all
 *   SCENARIO is CLIENTS,SENDERS,WINDOW,BYTES[,RATE]; RATE is of messages a
 *   second, all senders together, and makes it an open loop. No senders: the
 *   clients are idle, only joining and memory are measured.
 *
 * SPDX-License-Identifier: MIT
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include "plot.h"

#define SECOND 1000000000LL   /* all times are nanoseconds */
#define PATIENCE (5 * SECOND) /* for a server to start, or to answer */
#define WARM_UP (SECOND / 5)
#define EVENTS 1024
#define READ_SIZE (256 * 1024)
#define DISCARD_SIZE 32768    /* bytes that wait, then are discarded */
#define OPEN_WINDOW 1024      /* under way a sender in an open loop */
#define RUNS_MAX 32
#define SERVERS_MAX 11
#define STAMP 8               /* a message begins with its sender and number */

/* Something that makes the numbers worthless. */
__attribute__((noreturn, format(printf, 1, 2)))
static void fail(const char *format, ...) {
    va_list list;
    va_start(list, format);
    printf("FAILED - bench: ");
    vprintf(format, list);
    printf("\n");
    va_end(list);
    exit(1); /* the kernel ends what we started: see server_start */
}

/* For calls that must succeed; -1 is their error. */
static int must(int result, const char *call) {
    if (result < 0) fail("%s: %s", call, strerror(errno));
    return result;
}

static void *reserve(size_t count, size_t size) {
    void *memory = calloc(count + 1, size);
    if (!memory) fail("out of memory");
    return memory;
}

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * SECOND + t.tv_nsec;
}

/* What this process has used. */
static int64_t cpu_time(void) {
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return t.tv_sec * SECOND + t.tv_nsec;
}

/* A process (0: this one) to one core, or (-1) to whichever has room. */
static void pin(pid_t pid, int core) {
    cpu_set_t set;
    if (core < 0) memset(&set, 0xFF, sizeof set);
    else CPU_ZERO(&set);
    if (core >= 0) CPU_SET(core, &set);
    sched_setaffinity(pid, sizeof set, &set); /* best effort */
}

/* ---- Frames -------------------------------------------------------------
 * What load and floor share. Frames are short texts, all in one frame.
 */
static const char handshake[] =
    "GET %s HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
    "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
static const char agreed[] =
    "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n"
    "Connection: Upgrade\r\n"
    "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";

/* The size of the frame's header up to the payload (mask not counted), and
 * of its payload. False: it is not there yet. */
static bool frame_read(const uint8_t *at, size_t left, size_t *header,
                       size_t *size) {
    if (left < 4) return false;
    *header = (at[1] & 127) < 126 ? 2 : 4;
    *size = *header == 2 ? at[1] & 127 : (size_t)at[2] << 8 | at[3];
    return true;
}

/* Writes a header; `mask` is 0x80 for a frame with one, which follows. */
static size_t frame_header(uint8_t *out, size_t size, uint8_t mask) {
    out[0] = 0x81; /* the only frame of a text message */
    out[1] = (uint8_t)(size < 126 ? size : 126) | mask;
    if (size < 126) return 2;
    out[2] = (uint8_t)(size >> 8);
    out[3] = (uint8_t)size;
    return 4;
}

static void mask(uint8_t *out, const uint8_t *in, size_t n,
                 const uint8_t key[4]) {
    uint64_t word, twice;
    size_t i = 0;
    memcpy(&twice, key, 4);
    memcpy((uint8_t *)&twice + 4, key, 4);
    for (; i + 8 <= n; i += 8) {
        memcpy(&word, in + i, 8);
        word ^= twice;
        memcpy(out + i, &word, 8);
    }
    for (; i < n; i++) out[i] = in[i] ^ key[i % 4];
}

/* A connection, with what the last read left of a frame. */
struct stream {
    int fd;
    uint8_t *rest;
    size_t rest_size;
};

/* Reads once, behind the rest. Returns how much there is now. */
static size_t stream_read(struct stream *s, uint8_t in[READ_SIZE]) {
    if (s->rest_size) memcpy(in, s->rest, s->rest_size);
    ssize_t n = recv(s->fd, in + s->rest_size, READ_SIZE - s->rest_size, 0);
    if (n <= 0) fail("cut off: %s", n ? strerror(errno) : "closed");
    return s->rest_size + (size_t)n;
}

static void stream_keep(struct stream *s, const uint8_t *at, size_t left) {
    s->rest_size = left;
    if (left == 0) return;
    s->rest = realloc(s->rest, left);
    if (!s->rest) fail("out of memory");
    memcpy(s->rest, at, left);
}

/* ---- The floor ----------------------------------------------------------
 * It trusts everybody: a request comes in one piece, a client always reads
 * (so its sockets may block), and nobody leaves.
 */
struct floor {
    struct stream *clients; /* sent to from the last to the first */
    int *place; /* in `clients`, by descriptor; -1 before the handshake */
    int count, talked;      /* in this round */
    uint8_t in[READ_SIZE], out[2 * READ_SIZE];
    size_t out_size;
};

static void floor_accept(struct floor *f, int listener, int epoll) {
    for (int fd; (fd = accept(listener, NULL, NULL)) >= 0;) {
        struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
        must(epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event), "epoll_ctl");
        f->place[fd] = -1;
    }
}

static void floor_agree(struct floor *f, int fd) {
    must((int)recv(fd, f->in, sizeof f->in, 0), "recv");
    must((int)send(fd, agreed, sizeof agreed - 1, MSG_NOSIGNAL), "send");
    f->place[fd] = f->count;
    f->clients[f->count++].fd = fd;
}

/* Reads once and makes frames for all of what came. */
static void floor_read(struct floor *f, int fd) {
    struct stream *from = &f->clients[f->place[fd]], moved = *from;
    size_t header, size, left = stream_read(&moved, f->in);
    uint8_t *at = f->in;
    while (frame_read(at, left, &header, &size) && left >= header + 4 + size) {
        uint8_t *out = f->out + f->out_size;
        out += frame_header(out, size, 0);
        mask(out, at + header + 4, size, at + header);
        f->out_size = (size_t)(out + size - f->out);
        at += header + 4 + size;
        left -= header + 4 + size;
    }
    stream_keep(&moved, at, left);
    /* Who talks is served first: so it can answer while the others get this
     * round's messages, and rounds are full. */
    int last = f->count - 1 - f->talked++ % f->count;
    *from = f->clients[last];
    f->place[from->fd] = f->place[fd];
    f->clients[last] = moved;
    f->place[fd] = last;
}

static void floor_flush(struct floor *f) {
    for (int i = f->count; f->out_size > 0 && i-- > 0;)
        must((int)send(f->clients[i].fd, f->out, f->out_size, MSG_NOSIGNAL),
             "send");
    f->out_size = 0;
    f->talked = 0;
}

static void floor_run(int most) {
    struct floor *f = reserve(1, sizeof *f);
    struct sockaddr_in at = {.sin_family = AF_INET,
                             .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct epoll_event events[EVENTS] = {{.events = EPOLLIN}};
    socklen_t size = sizeof at;
    int on = 1, epoll = epoll_create1(0);
    int listener = must(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0),
                        "socket");
    f->clients = reserve((size_t)most, sizeof *f->clients);
    f->place = reserve((size_t)most, sizeof *f->place);
    setsockopt(listener, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    must(bind(listener, (struct sockaddr *)&at, size), "bind");
    must(listen(listener, SOMAXCONN), "listen");
    getsockname(listener, (struct sockaddr *)&at, &size);
    fprintf(stderr, "http://localhost:%d/\n", ntohs(at.sin_port));
    events[0].data.fd = listener;
    epoll_ctl(epoll, EPOLL_CTL_ADD, listener, events);
    for (;;) {
        int n = epoll_wait(epoll, events, EVENTS, -1);
        for (int i = 0; i < n; i++) {
            if (f->out_size > READ_SIZE) floor_flush(f);
            int fd = events[i].data.fd;
            if (fd == listener) floor_accept(f, listener, epoll);
            else if (f->place[fd] < 0) floor_agree(f, fd);
            else floor_read(f, fd);
        }
        floor_flush(f);
    }
}

/* ---- A server -----------------------------------------------------------
 * A process on the first core that says on stderr (or stdout) where it is.
 */
struct server {
    pid_t pid;
    int said; /* what it prints */
    int port;
    clockid_t clock; /* the CPU time of all its threads */
    pid_t workers[2];
    int worker_count; /* those that are known: server_find_workers() */
};

/* Starts a command, or the floor where there is none. */
static struct server server_start(const char *command, int most) {
    struct server s = {0};
    int pipes[2];
    char line[1024] = "";
    must(pipe(pipes), "pipe");
    s.pid = must(fork(), "fork");
    if (s.pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        pin(0, 0);
        dup2(pipes[1], 1);
        dup2(pipes[1], 2);
        if (!command) floor_run(most);
        execl("/bin/sh", "sh", "-c", command, NULL);
        _exit(127);
    }
    close(pipes[1]);
    s.said = pipes[0];
    for (size_t size = 0; s.port == 0;) {
        struct pollfd p = {.fd = s.said, .events = POLLIN};
        ssize_t n = poll(&p, 1, PATIENCE / 1000000);
        if (n > 0) n = read(s.said, line + size, sizeof line - 1 - size);
        if (n <= 0) fail("%s did not start: %s", command, line);
        size += (size_t)n;
        char *address = strstr(line, "http://");
        if (address && strchr(line, '\n'))
            sscanf(address, "http://%*[^:]:%d", &s.port);
    }
    if (clock_getcpuclockid(s.pid, &s.clock)) fail("clock_getcpuclockid");
    return s;
}

/* Ends a server and its workers: these would be heard on the next one's bus.
 * When all have gone, there is nobody left who could say something. */
static void server_stop(const struct server *s) {
    struct pollfd p = {.fd = s->said, .events = POLLIN};
    char said[1024];
    kill(s->pid, SIGKILL);
    for (int i = 0; i < s->worker_count; i++) kill(s->workers[i], SIGKILL);
    waitpid(s->pid, NULL, 0);
    while (s->worker_count && poll(&p, 1, PATIENCE / 1000000) > 0)
        if (read(s->said, said, sizeof said) <= 0) break;
    close(s->said);
}

/* Waits until a server has forked so many. Each gets a core of its own; the
 * load, and a server without workers, go where there is room (else whatever
 * else runs on its core would slow down one process more than two). */
static void server_find_workers(struct server *s, int count) {
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/task/%d/children", s->pid, s->pid);
    for (int64_t end = now() + PATIENCE; s->worker_count < count;) {
        FILE *file = fopen(path, "r");
        if (!file || now() > end) fail("no workers: %s", path);
        s->worker_count = 0;
        for (pid_t pid; fscanf(file, "%d", &pid) == 1;) {
            if (s->worker_count == count) fail("too many workers: %s", path);
            s->workers[s->worker_count++] = pid;
        }
        fclose(file);
        usleep(1000);
    }
    pin(0, -1);
    pin(s->pid, -1);
    for (int i = 0; i < count; i++) pin(s->workers[i], i);
}

/* In nanoseconds, exact; the workers' as well. */
static int64_t server_cpu(const struct server *s) {
    struct timespec t;
    if (clock_gettime(s->clock, &t)) fail("the server has gone");
    int64_t time = t.tv_sec * SECOND + t.tv_nsec;
    for (int i = 0; i < s->worker_count; i++) {
        clockid_t clock;
        if (clock_getcpuclockid(s->workers[i], &clock) ||
            clock_gettime(clock, &t))
            fail("a worker has gone");
        time += t.tv_sec * SECOND + t.tv_nsec;
    }
    return time;
}

/* Bytes of its own, resident: what is not mapped from files. */
static double server_memory(const struct server *s) {
    char path[64], line[256];
    double size = 0;
    snprintf(path, sizeof path, "/proc/%d/status", s->pid);
    FILE *file = fopen(path, "r");
    while (file && fgets(line, sizeof line, file))
        sscanf(line, "RssAnon: %lf", &size);
    if (file) fclose(file);
    return size * 1024;
}

/* ---- Latencies ----------------------------------------------------------
 * Counted in buckets, 64 to each power of two: within 1.6 %.
 */
struct histogram {
    uint64_t count, buckets[59 * 64];
};

static void histogram_add(struct histogram *h, int64_t time) {
    uint64_t t = time > 64 ? (uint64_t)time : 64;
    int shift = 57 - __builtin_clzll(t); /* 64 <= t >> shift < 128 */
    h->buckets[(uint64_t)shift * 64 + (t >> shift) - 64]++;
    h->count++;
}

/* The time, in microseconds, that a part of all did not exceed. */
static double histogram_at(const struct histogram *h, double part) {
    uint64_t wanted = (uint64_t)(part * (double)h->count), seen = 0;
    for (uint64_t i = 0; i < 58 * 64; i++) {
        seen += h->buckets[i];
        if (seen > wanted) return (double)((i % 64 + 64) << i / 64) / 1000;
    }
    return 0;
}

/* ---- The load ----------------------------------------------------------- */
struct scenario {
    int clients, senders, window, size;
    double rate;      /* messages a second; 0: a closed loop */
    const char *path; /* to connect to; NULL: "/" */
};

struct client {
    struct stream stream;
    uint32_t *expected; /* by sender: the number of its next message */
    uint64_t discarded; /* bytes, unread: see load_discard() */
};

struct sender {
    uint32_t next, back; /* [back, next) is under way */
    int64_t *due; /* by number % ring: when it went out, or should have */
    uint8_t *out; /* frames that the kernel did not take yet */
    size_t out_size;
};

struct load {
    struct scenario scenario;
    uint32_t window, ring;
    struct client *clients;
    struct sender *senders;
    char *padding; /* what follows the stamp */
    int epoll;
    bool sending, measuring;
    int64_t start;            /* open loop: message k is due at ... */
    uint64_t scheduled;       /* ... start + k / rate; these are out */
    uint64_t sent, delivered; /* messages; to one client each */
    int checking;             /* clients that do; the others discard */
    bool across;              /* the window is that of client 1 alone */
    struct histogram late;
};

/* Sender and number, six bits to a letter, since the message is text. */
static void stamp_write(uint8_t stamp[STAMP], uint32_t sender, uint32_t n) {
    uint64_t both = (uint64_t)sender << 30 | (n & 0x3FFFFFFF);
    for (int i = STAMP; i-- > 0; both >>= 6) stamp[i] = '0' + (both & 63);
}

static void stamp_read(const uint8_t stamp[STAMP], uint32_t *sender,
                       uint32_t *n) {
    uint64_t both = 0;
    for (int i = 0; i < STAMP; i++) both = both << 6 | ((stamp[i] - '0') & 63);
    *sender = (uint32_t)(both >> 30);
    *n = both & 0x3FFFFFFF;
}

static void sender_flush(struct load *l, int i) {
    struct sender *s = &l->senders[i];
    int fd = l->clients[i].stream.fd;
    struct epoll_event event = {.events = EPOLLIN, .data.u32 = (uint32_t)i};
    ssize_t n = send(fd, s->out, s->out_size, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n < 0 && errno != EAGAIN) fail("send: %s", strerror(errno));
    if (n < 0) n = 0;
    s->out_size -= (size_t)n;
    memmove(s->out, s->out + n, s->out_size);
    if (s->out_size) event.events |= EPOLLOUT;
    if (s->out_size || n == 0) epoll_ctl(l->epoll, EPOLL_CTL_MOD, fd, &event);
}

static void sender_add(struct load *l, int i, int64_t due) {
    static const uint8_t key[4] = {0x37, 0xFA, 0x21, 0x3D};
    struct sender *s = &l->senders[i];
    uint8_t *out = s->out + s->out_size, message[UINT16_MAX];
    size_t size = (size_t)l->scenario.size;
    stamp_write(message, (uint32_t)i, s->next);
    memcpy(message + STAMP, l->padding, size - STAMP);
    out += frame_header(out, size, 0x80);
    memcpy(out, key, 4);
    mask(out + 4, message, size, key);
    s->out_size = (size_t)(out + 4 + size - s->out);
    s->due[s->next++ % l->ring] = due;
    l->sent++;
}

/* Closed loop: fills up the sender's window. */
static void sender_refill(struct load *l, int i, int64_t time) {
    struct sender *s = &l->senders[i];
    if (!l->sending || s->next - s->back >= l->window) return;
    while (s->next - s->back < l->window) sender_add(l, i, time);
    sender_flush(l, i);
}

/* Open loop: sends what is due, each sender in its turn. Returns when the
 * next is. */
static int64_t load_send_due(struct load *l, int64_t time) {
    double rate = l->scenario.rate;
    while (l->sending && rate > 0) {
        int i = (int)(l->scheduled % (uint64_t)l->scenario.senders);
        struct sender *s = &l->senders[i];
        double passed = (double)l->scheduled * (double)SECOND / rate;
        int64_t due = l->start + (int64_t)passed;
        if (due > time) return due;
        if (s->next - s->back >= l->window) break;
        sender_add(l, i, due);
        sender_flush(l, i);
        l->scheduled++;
    }
    return time + SECOND / 100;
}

/* One message has come to a client: is it the right one, and how late? */
static void client_take(struct load *l, int i, const uint8_t *message,
                        int64_t time) {
    uint32_t sender, n, *expected;
    stamp_read(message, &sender, &n);
    if (sender >= (uint32_t)l->scenario.senders ||
        memcmp(message + STAMP, l->padding, (size_t)l->scenario.size - STAMP))
        fail("client %d got what nobody sent", i);
    expected = &l->clients[i].expected[sender];
    if (n != *expected)
        fail("client %d got message %u of sender %u in place of %u", i, n,
             sender, *expected);
    ++*expected;
    l->delivered++;
    if (l->across ? i == 1 : sender == (uint32_t)i) l->senders[sender].back++;
    if (l->measuring && (i == 1 || !l->across))
        histogram_add(&l->late, time - l->senders[sender].due[n % l->ring]);
}

static void client_read(struct load *l, int i) {
    static uint8_t in[READ_SIZE];
    struct stream *stream = &l->clients[i].stream;
    size_t header, size, left = stream_read(stream, in);
    uint8_t *at = in;
    int64_t time = now();
    while (frame_read(at, left, &header, &size) && left >= header + size) {
        if (at[0] != 0x81 || size != (size_t)l->scenario.size)
            fail("client %d got a frame %02x %02x", i, at[0], at[1]);
        client_take(l, i, at + header, time);
        at += header + size;
        left -= header + size;
    }
    stream_keep(stream, at, left);
    if (l->across) i = i == 1 ? 0 : l->scenario.senders; /* whose window */
    if (i < l->scenario.senders && l->scenario.rate == 0)
        sender_refill(l, i, time);
}

/* A client that does not check what it gets lets it wait in the kernel until
 * it is worth a call, has it thrown away there, and counts the bytes: so the
 * load takes little of the cores that the server is to have. */
static void client_discard(struct load *l, int i) {
    uint64_t header = l->scenario.size < 126 ? 2 : 4;
    uint64_t frame = header + (uint64_t)l->scenario.size;
    struct client *c = &l->clients[i];
    ssize_t n = recv(c->stream.fd, NULL, READ_SIZE, MSG_TRUNC | MSG_DONTWAIT);
    if (n < 0 && errno == EAGAIN) return;
    if (n <= 0) fail("cut off: %s", n ? strerror(errno) : "closed");
    l->delivered += (c->discarded % frame + (uint64_t)n) / frame;
    c->discarded += (uint64_t)n;
    if (c->discarded > l->sent * frame) fail("client %d got too much", i);
}

/* Runs until that time, or until every client has everything. */
static void load_run(struct load *l, int64_t until) {
    struct epoll_event events[EVENTS];
    uint64_t all = (uint64_t)l->scenario.clients;
    for (int64_t time = now(); time < until; time = now()) {
        if (!l->sending && l->delivered == l->sent * all) return;
        int64_t wait = load_send_due(l, time) - time;
        struct timespec timeout = {0, wait};
        int n = epoll_pwait2(l->epoll, events, EVENTS, &timeout, NULL);
        for (int i = 0; i < n; i++) {
            int client = (int)events[i].data.u32;
            if (events[i].events & EPOLLOUT) sender_flush(l, client);
            if (client >= l->checking) client_discard(l, client);
            else if (events[i].events & ~(uint32_t)EPOLLOUT)
                client_read(l, client);
            if (l->scenario.rate > 0) load_send_due(l, now());
        }
        for (int i = l->checking; i < l->scenario.clients && !l->sending; i++)
            client_discard(l, i); /* the last bytes wake nobody */
    }
}

/* Sends for so long, and then waits until all has come. */
static void load_talk(struct load *l, int64_t time) {
    l->sending = true;
    l->start = now();
    l->scheduled = 0;
    for (int i = 0; l->scenario.rate == 0 && i < l->scenario.senders; i++)
        sender_refill(l, i, l->start);
    load_run(l, l->start + time);
    l->sending = false;
    load_run(l, now() + PATIENCE);
    uint64_t due = l->sent * (uint64_t)l->scenario.clients;
    if (l->delivered != due)
        fail("%llu of %llu deliveries came", (unsigned long long)l->delivered,
             (unsigned long long)due);
}

/* Waits for the answer to a handshake. */
static void client_agreed(struct load *l, int i) {
    char answer[2048] = "";
    int fd = l->clients[i].stream.fd;
    struct epoll_event event = {EPOLLIN, {.u32 = (uint32_t)i}};
    for (size_t size = 0; !strstr(answer, "\r\n\r\n");) {
        ssize_t n = recv(fd, answer + size, sizeof answer - 1 - size, 0);
        if (n <= 0) fail("no answer to the handshake");
        size += (size_t)n;
    }
    if (strncmp(answer, "HTTP/1.1 101", 12)) fail("%s", answer);
    int enough = DISCARD_SIZE + i % 64 * (DISCARD_SIZE / 64); /* in turn */
    if (i >= l->checking)
        setsockopt(fd, SOL_SOCKET, SO_RCVLOWAT, &enough, sizeof enough);
    must(epoll_ctl(l->epoll, EPOLL_CTL_ADD, fd, &event), "epoll_ctl");
}

/* A connection for client i. */
static int client_connect(int i, int port) {
    struct sockaddr_in to = {.sin_family = AF_INET,
                             .sin_port = htons((uint16_t)port),
                             .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct sockaddr_in from = {.sin_family = AF_INET};
    struct linger reset = {1, 0}; /* no port has to wait at the end */
    struct timeval patience = {PATIENCE / SECOND, 0};
    int on = 1, fd = must(socket(AF_INET, SOCK_STREAM, 0), "socket");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    /* An address has some 28,000 ports, the last found slowly. */
    from.sin_addr.s_addr = htonl(INADDR_LOOPBACK + (uint32_t)i / 10000);
    setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on);
    must(bind(fd, (struct sockaddr *)&from, sizeof from), "bind");
    must(connect(fd, (struct sockaddr *)&to, sizeof to), "connect");
    return fd;
}

/* Begins the handshake on a new connection. */
static void client_open(struct load *l, int i, int fd) {
    const char *path = l->scenario.path ? l->scenario.path : "/";
    char request[512];
    int size = snprintf(request, sizeof request, handshake, path);
    must((int)send(fd, request, (size_t)size, MSG_NOSIGNAL), "send");
    l->clients[i].stream.fd = fd;
}

/* Opens all connections, 64 at a time, and shakes hands. */
static void load_connect(struct load *l, int port) {
    int count = l->scenario.clients;
    for (int first = 0; first < count; first += 64) {
        int last = first + 64 < count ? first + 64 : count;
        for (int i = first; i < last; i++)
            client_open(l, i, client_connect(i, port));
        for (int i = first; i < last; i++) client_agreed(l, i);
    }
}

static struct load *load_open(struct scenario sc) {
    struct load *l = reserve(1, sizeof *l);
    size_t senders = (size_t)sc.senders, size = (size_t)sc.size;
    l->scenario = sc;
    l->checking = sc.clients;
    l->window = sc.rate > 0 ? OPEN_WINDOW : (uint32_t)sc.window;
    for (l->ring = 1024; l->ring < 4 * l->window;) l->ring *= 2;
    l->clients = reserve((size_t)sc.clients, sizeof *l->clients);
    l->senders = reserve(senders, sizeof *l->senders);
    l->padding = reserve(size, 1);
    for (int i = 0; i < sc.size; i++) l->padding[i] = (char)('a' + i % 26);
    for (int i = 0; i < sc.clients; i++)
        l->clients[i].expected = reserve(senders, sizeof(uint32_t));
    for (int i = 0; i < sc.senders; i++) {
        l->senders[i].due = reserve(l->ring, sizeof(int64_t));
        l->senders[i].out = reserve(l->window, size + 8);
    }
    l->epoll = must(epoll_create1(0), "epoll_create1");
    prctl(PR_SET_TIMERSLACK, 1); /* wake when told */
    return l;
}

/* ---- Measuring ----------------------------------------------------------
 * One run each: a server, its clients, and what came of it.
 */
enum column {
    RATE, PER_CPU, BUSY, LOAD, P50, P99, P999, JOIN_RATE, JOINS, MEMORY,
    PACKED, COLUMNS
};

enum part {
    FANOUT, LATENCY, JOINING, GROWTH, CHANNELS, HTTP, MACHINE, CORES, BUS, GIVEN, PARTS
};

struct result {
    double of[COLUMNS];
};

/* One thing to measure, with each server in each run. */
struct row {
    enum part part;
    const char *name; /* NULL: made from the scenario */
    struct scenario sc;
    struct result (*measure)(const char *command, struct scenario sc,
                             int64_t time);
    unsigned servers; /* a bit for each that takes part */
    int subject;      /* whose ratios to the others are shown: the chat */
    struct result results[SERVERS_MAX][RUNS_MAX];
};

static void result_latency(struct result *r, const struct load *l) {
    r->of[P50] = histogram_at(&l->late, 0.5);
    r->of[P99] = histogram_at(&l->late, 0.99);
    r->of[P999] = histogram_at(&l->late, 0.999);
}

/* What load_talk() brings about, and what it takes. */
static void measure_talk(struct result *r, struct load *l,
                         const struct server *server, int64_t time) {
    load_talk(l, WARM_UP);
    l->measuring = true;
    uint64_t before = l->delivered;
    int64_t start = now(), cpu = server_cpu(server), own = cpu_time();
    load_talk(l, time);
    double passed = (double)(now() - start);
    double used = (double)(server_cpu(server) - cpu);
    double load = (double)(cpu_time() - own);
    double delivered = (double)(l->delivered - before);
    r->of[RATE] = delivered * (double)SECOND / passed;
    r->of[PER_CPU] = delivered * (double)SECOND / used;
    r->of[BUSY] = 100 * used / passed;
    r->of[LOAD] = 100 * load / passed;
    result_latency(r, l);
}

static struct result measure_chat(const char *command, struct scenario sc,
                                  int64_t time) {
    struct result r = {0};
    struct server server = server_start(command, sc.clients + 64);
    struct load *l = load_open(sc);
    double memory = server_memory(&server), count = sc.clients;
    int64_t cpu = server_cpu(&server), start = now();
    load_connect(l, server.port);
    r.of[JOIN_RATE] = count * (double)SECOND / (double)(now() - start);
    r.of[JOINS] = count * (double)SECOND / (double)(server_cpu(&server) - cpu);
    if (sc.senders > 0) measure_talk(&r, l, &server, time);
    r.of[MEMORY] = (server_memory(&server) - memory) / count;
    server_stop(&server);
    return r;
}

/* How late a few clients in a channel of their own get their messages while
 * the scenario's are busy in theirs (or idle, if nobody sends). Each load is
 * a process; the small one goes first when it has something to do. */
static struct result measure_beside(const char *command, struct scenario sc,
                                    int64_t time) {
    struct result r = {0};
    struct server server = server_start(command, sc.clients + 64);
    struct sched_param first = {1};
    int pipes[2], status;
    char ready;
    must(pipe(pipes), "pipe");
    pid_t pid = must(fork(), "fork");
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        struct load *l = load_open(sc);
        load_connect(l, server.port);
        ready = write(pipes[1], "+", 1) == 1;
        if (sc.senders > 0) load_talk(l, time + 2 * WARM_UP);
        else usleep((useconds_t)((time + 2 * WARM_UP) / 1000));
        _exit(!ready); /* else: a fail() has exited with 1 */
    }
    close(pipes[1]);
    if (read(pipes[0], &ready, 1) != 1) exit(1); /* it said why */
    close(pipes[0]);
    struct load *l = load_open((struct scenario){10, 1, 1, 32, 200,
                                                 "/?channel=small"});
    if (sched_setscheduler(0, SCHED_FIFO, &first)) setpriority(0, 0, -20);
    load_connect(l, server.port);
    load_talk(l, WARM_UP);
    l->measuring = true;
    load_talk(l, time);
    result_latency(&r, l);
    if (waitpid(pid, &status, 0) < 0 || status) exit(1);
    server_stop(&server);
    return r;
}

static int workers_of(const char *command) {
    return strstr(command, " -j 2") ? 2 : 0;
}

/* The senders check what they get, the others only how much it is. */
static struct result measure_cores(const char *command, struct scenario sc,
                                   int64_t time) {
    struct result r = {0};
    struct server server = server_start(command, sc.clients + 64);
    struct load *l = load_open(sc);
    l->checking = sc.senders;
    server_find_workers(&server, workers_of(command));
    load_connect(l, server.port);
    measure_talk(&r, l, &server, time);
    server_stop(&server);
    return r;
}

/* What a second core can add on this machine: as many processes as there are
 * workers, each with a core of its own, do nothing but send and receive. Two
 * cores that are halves of one (hyperthreads) do much less than two whole. */
static struct result measure_machine(const char *command, struct scenario sc,
                                     int64_t time) {
    struct result r = {0};
    int results[2], count = workers_of(command) ? 2 : 1;
    double rounds;
    must(pipe(results), "pipe");
    for (int core = 0; core < count; core++) {
        if (must(fork(), "fork") > 0) continue;
        char *bytes = calloc(1, (size_t)sc.size);
        int pair[2];
        must(socketpair(AF_UNIX, SOCK_STREAM, 0, pair), "socketpair");
        pin(0, core);
        rounds = 0;
        for (int64_t end = now() + time; now() < end; rounds++)
            if (write(pair[0], bytes, (size_t)sc.size) != sc.size ||
                read(pair[1], bytes, (size_t)sc.size) != sc.size) _exit(1);
        _exit(write(results[1], &rounds, sizeof rounds) != sizeof rounds);
    }
    close(results[1]);
    while (read(results[0], &rounds, sizeof rounds) == sizeof rounds)
        r.of[RATE] += rounds * (double)SECOND / (double)time;
    while (wait(NULL) > 0);
    return r;
}

/* The files and connections that a process has open. */
static int count_open(pid_t pid) {
    char path[64];
    int count = 0;
    snprintf(path, sizeof path, "/proc/%d/fd", pid);
    DIR *dir = opendir(path);
    if (!dir) fail("%s: %s", path, strerror(errno));
    while (readdir(dir)) count++;
    closedir(dir);
    return count;
}

/* Sends a GET and reads the answer (as much of it as arrives at once). */
static void http_get(int fd, const char *path, char answer[4096]) {
    char request[256];
    int size = snprintf(request, sizeof request, "GET %s HTTP/1.1\r\n"
                        "Host: localhost\r\n\r\n", path);
    must((int)send(fd, request, (size_t)size, MSG_NOSIGNAL), "send");
    ssize_t n = recv(fd, answer, 4095, 0);
    if (n <= 0) fail("no answer to GET %s", path);
    answer[n] = '\0';
}

/* A connection to the worker of that number: the kernel shares them out, so
 * try until that worker has one more. Without workers there is one server. */
static int worker_connect(const struct server *s, int worker) {
    char answer[4096];
    for (int tries = 0; tries < 100; tries++) {
        pid_t pid = s->worker_count ? s->workers[worker] : s->pid;
        int before = count_open(pid), fd = client_connect(0, s->port);
        http_get(fd, "/metrics", answer); /* so it has been accepted */
        if (count_open(pid) > before) return fd;
        close(fd);
    }
    fail("no connection to worker %d", worker);
}

static double worker_datagrams(int fd) {
    char answer[4096];
    unsigned long long count = 0;
    http_get(fd, "/metrics", answer);
    char *at = strstr(answer, "\nchat_bus_datagrams_sent_total ");
    if (!at || sscanf(at, "%*s %llu", &count) != 1) fail("no metrics");
    return (double)count;
}

/* From a sender of the first worker to a client of the second one. */
static struct result measure_bus(const char *command, struct scenario sc,
                                 int64_t time) {
    struct result r = {0};
    struct server server = server_start(command, sc.clients + 64);
    struct load *l = load_open(sc);
    l->across = true;
    server_find_workers(&server, workers_of(command));
    for (int i = 0; i < 2; i++) {
        client_open(l, i, worker_connect(&server, i));
        client_agreed(l, i);
    }
    int watch = worker_connect(&server, 0);
    double before = worker_datagrams(watch);
    uint64_t sent = l->sent;
    measure_talk(&r, l, &server, time);
    double datagrams = worker_datagrams(watch) - before;
    if (datagrams > 0) r.of[PACKED] = (double)(l->sent - sent) / datagrams;
    server_stop(&server);
    return r;
}

/* One run of wrk. Fails if an answer was not the page. */
static double http_requests(int port, int64_t time) {
    char command[256], line[256];
    double requests = 0;
    long seconds = (long)((time + SECOND - 1) / SECOND);
    snprintf(command, sizeof command, "exec wrk -t1 -c32 -d%lds "
             "http://127.0.0.1:%d/ 2>&1", seconds, port);
    FILE *wrk = popen(command, "r");
    while (wrk && fgets(line, sizeof line, wrk)) {
        sscanf(line, " %lf requests in", &requests);
        if (strstr(line, "errors") || strstr(line, "Non-2xx"))
            fail("wrk: %s", line);
    }
    if (!wrk || pclose(wrk) || requests == 0) fail("wrk did not run: %s", line);
    return requests;
}

static struct result measure_http(const char *command, struct scenario sc,
                                  int64_t time) {
    struct result r = {0};
    struct server server = server_start(command, sc.clients);
    struct sockaddr_in at = {.sin_family = AF_INET,
                             .sin_port = htons((uint16_t)server.port),
                             .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int fd = -1, error = -1;
    for (int64_t end = now() + PATIENCE; error; close(fd)) { /* nginx: soon */
        if (now() > end) fail("%s does not listen", command);
        usleep(1000);
        fd = must(socket(AF_INET, SOCK_STREAM, 0), "socket");
        error = connect(fd, (struct sockaddr *)&at, sizeof at);
    }
    int64_t start = now(), cpu = server_cpu(&server);
    double requests = http_requests(server.port, time);
    double passed = (double)(now() - start);
    double used = (double)(server_cpu(&server) - cpu);
    r.of[RATE] = requests * (double)SECOND / passed;
    r.of[PER_CPU] = requests * (double)SECOND / used;
    r.of[BUSY] = 100 * used / passed;
    server_stop(&server);
    return r;
}

/* One run, in a process of its own that leaves nothing behind. */
static struct result run(const struct row *row, const char *command,
                         int64_t time) {
    struct result r;
    int pipes[2];
    must(pipe(pipes), "pipe");
    fflush(stdout);
    pid_t pid = must(fork(), "fork");
    if (pid == 0) {
        r = row->measure(command, row->sc, time);
        _exit(write(pipes[1], &r, sizeof r) != sizeof r);
    }
    close(pipes[1]);
    if (read(pipes[0], &r, sizeof r) != sizeof r) exit(1); /* it said why */
    close(pipes[0]);
    waitpid(pid, NULL, 0);
    return r;
}

/* ---- Tables -------------------------------------------------------------
 * All servers in turn, so many runs; then the medians, and the ratios of the
 * chat to each other server within a run.
 */
enum server_name {
    CHAT, FLOOR, BUN, WS, DENO, NGINX, FILES, WORKERS, OTHER
};
#define BIT(server) (1u << (server))
#define OTHERS (~(BIT(OTHER) - 1))
#define WEBSOCKETS (~(BIT(NGINX) | BIT(FILES) | BIT(WORKERS)))
#define ROWS_MAX 64

struct bench {
    struct {
        const char *name, *command; /* NULL: the floor, or it is not there */
    } servers[SERVERS_MAX];
    unsigned present; /* a bit for each */
    int runs, row_count;
    double seconds;
    struct row *rows; /* all that was measured */
};

static const struct {
    const char *name;
    int width, digits;
} columns[COLUMNS] = {
    {"deliv/s", 10, 0}, {"/cpu s", 10, 0}, {"busy %", 7, 0}, {"load %", 7, 0},
    {"p50 us", 9, 0}, {"p99", 9, 0}, {"p99.9", 9, 0}, {"joins/s", 9, 0},
    {"/cpu s", 9, 0}, {"B/client", 10, 0}, {"msgs/dgram", 11, 1}};

static int compare(const void *a, const void *b) {
    const double *x = a, *y = b;
    return (*x > *y) - (*x < *y);
}

struct spread {
    double low, median, high;
};

/* A column over all runs of server `a`, as ratios to server `b` if that is
 * not -1. All zero: it was not measured. */
static struct spread spread_of(const struct bench *bench, const struct row *row,
                               int a, int b, enum column column) {
    double all[RUNS_MAX];
    int runs = bench->runs;
    for (int i = 0; i < runs; i++) {
        all[i] = row->results[a][i].of[column];
        double other = b < 0 ? 1 : row->results[b][i].of[column];
        all[i] = other > 0 ? all[i] / other : 0;
    }
    qsort(all, (size_t)runs, sizeof *all, compare);
    return (struct spread){all[0], (all[(runs - 1) / 2] + all[runs / 2]) / 2,
                           all[runs - 1]};
}

static double median(const struct bench *b, const struct row *row, int server,
                     enum column column) {
    return spread_of(b, row, server, -1, column).median;
}

/* A number with its thousands apart. */
static const char *grouped(double value) {
    static char out[32];
    char digits[32];
    int n = snprintf(digits, sizeof digits, "%.0f", value), size = 0;
    for (int i = 0; i < n; i++) {
        if (i > 0 && (n - i) % 3 == 0) out[size++] = ',';
        out[size++] = digits[i];
    }
    out[size] = '\0';
    return out;
}

static void row_title(const struct row *row, char title[128]) {
    struct scenario sc = row->sc;
    int n = snprintf(title, 128, "%s clients, %d sender%s",
                     grouped(sc.clients), sc.senders,
                     sc.senders == 1 ? "" : "s");
    if (row->name) snprintf(title, 128, "%s", row->name);
    else if (sc.rate > 0)
        snprintf(title + n, 128 - (size_t)n, ", %.0f messages/s, %d bytes",
                 sc.rate, sc.size);
    else if (sc.senders > 0)
        snprintf(title + n, 128 - (size_t)n, ", window %d, %d bytes",
                 sc.window, sc.size);
}

/* What the row was measured for. */
static enum column row_column(const struct row *row) {
    if (row->part == HTTP) return PER_CPU;
    if (row->part == MACHINE || row->part == CORES) return RATE;
    if (row->part == BUS) return row->sc.rate > 0 ? P50 : RATE;
    if (row->part == CHANNELS || row->sc.rate > 0) return P99;
    return row->sc.senders > 0 ? PER_CPU : JOINS;
}

/* The line of a server, or (`to` not -1) of its ratios to another. */
static void row_line(const struct bench *b, const struct row *row, int server,
                     int to) {
    char name[64];
    snprintf(name, sizeof name, "%s%s%s", b->servers[server].name,
             to < 0 ? "" : "/", to < 0 ? "" : b->servers[to].name);
    printf("\n%-12s", name);
    for (int i = 0; i < COLUMNS; i++) {
        struct spread s = spread_of(b, row, server, to, i);
        if (median(b, row, row->subject, i) > 0)
            printf("%*.*f", columns[i].width, to < 0 ? columns[i].digits : 3,
                   s.median);
    }
    enum column main = row_column(row);
    struct spread s = spread_of(b, row, server, to, main);
    if (to >= 0)
        printf("   (%s %.2f to %.2f)", columns[main].name, s.low, s.high);
}

/* Prints what was measured of one row. */
static void row_print(const struct bench *b, const struct row *row) {
    char title[128];
    row_title(row, title);
    printf("\n%s\n%-12s", title, "");
    for (int i = 0; i < COLUMNS; i++)
        if (median(b, row, row->subject, i) > 0)
            printf("%*s", columns[i].width, columns[i].name);
    for (int s = 0; s < SERVERS_MAX; s++)
        if (row->servers & BIT(s)) row_line(b, row, s, -1);
    for (int s = 0; s < SERVERS_MAX; s++)
        if (s != row->subject && row->servers & BIT(s))
            row_line(b, row, row->subject, s);
    printf("\n");
}

/* Measures a new row with those servers that are there. */
static struct row *bench_row(struct bench *b, struct row what) {
    if (b->row_count == ROWS_MAX) fail("too many scenarios");
    struct row *row = &b->rows[b->row_count++];
    int64_t time = (int64_t)(b->seconds / b->runs * (double)SECOND);
    /* Of many clients, each gets a few messages. */
    int64_t least = (int64_t)what.sc.clients * SECOND / 10000;
    *row = what;
    row->servers &= b->present;
    for (int turn = 0; turn < b->runs; turn++)
        for (int i = 0; i < SERVERS_MAX; i++) {
            int s = turn % 2 ? SERVERS_MAX - 1 - i : i; /* to and fro */
            if (row->servers & BIT(s))
                row->results[s][turn] = run(row, b->servers[s].command,
                                            time > least ? time : least);
        }
    row_print(b, row);
    return row;
}

/* ---- The parts ---------------------------------------------------------- */
static const struct scenario usual[] = {
    {1000, 1, 1, 32, 0, NULL}, {1000, 1, 64, 32, 0, NULL},
    {200, 200, 1, 32, 0, NULL}, {200, 20, 1, 512, 0, NULL},
    {50, 10, 8, 3000, 0, NULL}};
enum { USUAL = sizeof usual / sizeof *usual };
static const int sizes[] = {100, 300, 1000, 3000, 10000, 19000};
enum { SIZES = sizeof sizes / sizeof *sizes };

static void part_fanout(struct bench *b) {
    for (int i = 0; i < USUAL; i++)
        bench_row(b, (struct row){FANOUT, .sc = usual[i],
            .measure = measure_chat, .servers = WEBSOCKETS});
}

/* Half of what the slower one of chat and floor can do: measured before, or
 * now. */
static void part_latency(struct bench *b) {
    unsigned both = BIT(CHAT) | BIT(FLOOR);
    for (int i = 0; i < USUAL; i++) {
        struct scenario sc = usual[i];
        struct row *row = NULL;
        for (int k = 0; k < b->row_count; k++)
            if (!memcmp(&b->rows[k].sc, &sc, sizeof sc)) row = &b->rows[k];
        if (!row) row = bench_row(b, (struct row){GIVEN, .sc = sc,
            .measure = measure_chat, .servers = both});
        double chat = median(b, row, CHAT, RATE);
        double least = median(b, row, FLOOR, RATE);
        sc.rate = (chat < least ? chat : least) / sc.clients / 2;
        bench_row(b, (struct row){LATENCY, .sc = sc, .measure = measure_chat,
                                  .servers = both | BIT(BUN) | OTHERS});
    }
}

static void part_joins(struct bench *b) {
    bench_row(b, (struct row){JOINING, "2,000 clients join",
        .sc = {2000, 0, 1, 32, 0, NULL}, .measure = measure_chat,
        .servers = WEBSOCKETS});
    bench_row(b, (struct row){JOINING, "10,000 clients join",
        .sc = {10000, 0, 1, 32, 0, NULL}, .measure = measure_chat,
        .servers = BIT(CHAT) | BIT(FLOOR) | BIT(BUN) | OTHERS});
}

static void part_growth(struct bench *b) {
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    for (int i = 0; i < SIZES; i++) {
        if ((rlim_t)sizes[i] + 100 > limit.rlim_cur) {
            printf("\nskipped: %d clients: RLIMIT_NOFILE is %llu\n", sizes[i],
                   (unsigned long long)limit.rlim_cur);
            continue;
        }
        bench_row(b, (struct row){GROWTH, .sc = {sizes[i], 1, 1, 32, 0, NULL},
            .measure = measure_chat,
            .servers = BIT(CHAT) | BIT(FLOOR) | BIT(BUN) | OTHERS});
    }
}

static void part_channels(struct bench *b) {
    static const char *const names[] = {
        "10 clients in a channel, 10,000 idle in another",
        "10 clients in a channel, 10,000 in another, 1 sender, window 4",
        "10 clients in a channel, 10,000 in another, 100 senders, window 1"};
    for (int i = 0; i < 3; i++)
        bench_row(b, (struct row){CHANNELS, names[i],
            .sc = {10000, i == 0 ? 0 : i == 1 ? 1 : 100, i == 1 ? 4 : 1, 32,
                   0, "/?channel=big"},
            .measure = measure_beside, .servers = BIT(CHAT) | OTHERS});
}

/* A port that nobody has at the moment. */
static int free_port(int type) {
    struct sockaddr_in at = {.sin_family = AF_INET,
                             .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof at;
    int fd = must(socket(AF_INET, type, 0), "socket");
    must(bind(fd, (struct sockaddr *)&at, sizeof at), "bind");
    getsockname(fd, (struct sockaddr *)&at, &length);
    close(fd);
    return ntohs(at.sin_port);
}

/* nginx as one process on a free port, with the same page; its files are
 * written to build/nginx. */
static bool nginx_prepare(char *command, size_t size) {
    int port = free_port(SOCK_STREAM);
    if (system("command -v nginx >/dev/null && command -v wrk >/dev/null &&"
               "mkdir -p build/nginx/html && cp index.html build/nginx/html"))
        return false;
    FILE *file = fopen("build/nginx/nginx.conf", "w");
    if (!file) fail("build/nginx/nginx.conf: %s", strerror(errno));
    fprintf(file, "daemon off;\nmaster_process off;\npid nginx.pid;\n"
            "error_log stderr error;\nevents { worker_connections 1024; }\n"
            "http {\n"
            "    client_body_temp_path tmp;\n    proxy_temp_path tmp;\n"
            "    fastcgi_temp_path tmp;\n    uwsgi_temp_path tmp;\n"
            "    scgi_temp_path tmp;\n"
            "    access_log off;\n    sendfile on;\n    tcp_nopush on;\n"
            "    open_file_cache max=100;\n    types { text/html html; }\n"
            "    keepalive_requests 1000000000;\n"
            "    server { listen 127.0.0.1:%d; root html; }\n}\n",
            port);
    if (fclose(file)) fail("build/nginx/nginx.conf: %s", strerror(errno));
    snprintf(command, size, "cd build/nginx && echo http://localhost:%d/ && "
             "exec nginx -e stderr -p . -c nginx.conf", port);
    return true;
}

static void part_http(struct bench *b) {
    static char nginx[256];
    if (!nginx_prepare(nginx, sizeof nginx)) {
        printf("skipped: http: needs nginx and wrk (Debian: nginx-light)\n");
        return;
    }
    b->servers[NGINX].command = nginx;
    b->present |= BIT(NGINX) | BIT(FILES);
    bench_row(b, (struct row){HTTP, "GET /, 32 connections kept alive",
        .sc = {.clients = 32}, .measure = measure_http,
        .servers = BIT(CHAT) | BIT(NGINX) | BIT(FILES) | OTHERS});
}

/* One process and two workers, which meet on a bus of their own. With one
 * sender, a send() carries a message or two, whoever makes it. With many, a
 * round of two workers is shorter and so less full: what the cores gain is
 * spent in part on more calls. */
static void part_workers(struct bench *b) {
    static char command[1100];
    static const struct row rows[] = {
        {MACHINE, "Two processes that only pass 2 KB through a socket",
         .sc = {2, 1, 1, 2000, 0, NULL}},
        {CORES, .sc = {400, 1, 2, 64, 0, NULL}},
        {CORES, .sc = {400, 8, 8, 64, 0, NULL}},
        {BUS, "From worker to worker, window 256, 32 bytes",
         .sc = {2, 1, 256, 32, 0, NULL}},
        {BUS, "From worker to worker, 1,000 messages/s, 32 bytes",
         .sc = {2, 1, 1, 32, 1000, NULL}}};
    if (sysconf(_SC_NPROCESSORS_ONLN) < 2) {
        printf("skipped: workers: there is one core only\n");
        return;
    }
    snprintf(command, sizeof command, "exec %s -p 0 -q --metrics -j 2 "
             "-b 239.255.80.80:%d", getenv("CHAT") ? getenv("CHAT") : "./chat",
             free_port(SOCK_DGRAM));
    b->servers[WORKERS].command = command;
    b->present |= BIT(WORKERS);
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        struct row row = rows[i];
        row.measure = row.part == MACHINE ? measure_machine
                      : row.part == CORES ? measure_cores
                                          : measure_bus;
        row.servers = BIT(CHAT) | BIT(WORKERS) |
                      (row.part == CORES ? OTHERS : 0);
        row.subject = WORKERS;
        bench_row(b, row);
    }
}

/* ---- The summary --------------------------------------------------------
 * Markdown tables. A cell is the median of the ratios and their range.
 */
static void spread_print(FILE *out, struct spread s) {
    int digits = s.median < 9.95 ? 2 : 0;
    if (s.median == 0) fprintf(out, " -");
    else fprintf(out, " %.*f (%.*f-%.*f)", digits, s.median, digits, s.low,
                 digits, s.high);
}

/* The ratios to the floor and to the peers that are there. */
static void summary_part(FILE *out, const struct bench *b, enum part part,
                         enum column column, const char *head) {
    bool empty = true;
    char title[128];
    for (int k = 0; k < b->row_count; k++) {
        const struct row *row = &b->rows[k];
        if (row->part != part) continue;
        if (empty) fprintf(out, "\n| %s | to the floor | to Bun | to ws | "
                           "to Deno |\n|---|--:|--:|--:|--:|--:|\n", head);
        empty = false;
        row_title(row, title);
        fprintf(out, "| %s | %s |", title,
                grouped(median(b, row, CHAT, column)));
        for (int s = FLOOR; s <= DENO; s++) {
            spread_print(out, spread_of(b, row, CHAT, s, column));
            fprintf(out, " |");
        }
        fprintf(out, "\n");
    }
    if (part == FANOUT && !empty)
        fprintf(out, "| *goal* | | 0.95 | 1, or 2.5 where all talk | | "
                "25 where all talk |\n");
    if (part == LATENCY && !empty)
        fprintf(out, "| *goal* | | at most 1.1 | | | |\n");
}

/* Two workers beside one process. */
static void summary_workers(FILE *out, const struct bench *b,
                            const struct row *row) {
    char title[128];
    double rate = median(b, row, WORKERS, RATE) / 2 /* clients */;
    double late = median(b, row, WORKERS, P50);
    row_title(row, title);
    fprintf(out, "- %s: ", title);
    if (row->part == MACHINE) {
        fprintf(out, "on two cores of this machine they do");
        spread_print(out, spread_of(b, row, WORKERS, CHAT, RATE));
        fprintf(out, " times the work of one alone.\n");
    } else if (row->part == CORES) {
        fprintf(out, "`-j 2` makes");
        spread_print(out, spread_of(b, row, WORKERS, CHAT, RATE));
        fprintf(out, " times the deliveries of one process,");
        spread_print(out, spread_of(b, row, WORKERS, CHAT, PER_CPU));
        fprintf(out, " times as many a CPU second; the workers had %.0f %% of "
                "two cores, the load %.0f %%. Goal: 1.8.\n",
                median(b, row, WORKERS, BUSY) / 2,
                median(b, row, WORKERS, LOAD) / 2);
    } else if (row->sc.rate > 0)
        fprintf(out, "latency %.0f µs (p50), %.0f more than within one "
                "process, %.0f µs (p99).\n", late,
                late - median(b, row, CHAT, P50),
                median(b, row, WORKERS, P99));
    else
        fprintf(out, "%s messages a second, %.0f a datagram.\n",
                grouped(rate), median(b, row, WORKERS, PACKED));
}

/* What is no table: one line each. */
static void summary_line(FILE *out, const struct bench *b,
                         const struct row *row) {
    char title[128];
    row_title(row, title);
    if (row->part == HTTP) {
        fprintf(out, "- %s: %s requests a CPU second;", title,
                grouped(median(b, row, CHAT, PER_CPU)));
        spread_print(out, spread_of(b, row, CHAT, NGINX, PER_CPU));
        fprintf(out, " of nginx, with `-d`");
        spread_print(out, spread_of(b, row, FILES, NGINX, PER_CPU));
        fprintf(out, ". Goal: 1.\n");
    }
    if (row->part >= MACHINE && row->part <= BUS)
        summary_workers(out, b, row);
    if (row->part == CHANNELS)
        fprintf(out, "- %s: latency in the small one %.1f ms (p50), %.1f ms "
                "(p99).\n", title, median(b, row, CHAT, P50) / 1000,
                median(b, row, CHAT, P99) / 1000);
    if (row->part == JOINING)
        fprintf(out, "- %s: %.0f bytes of memory each. Goal: 200.\n", title,
                median(b, row, CHAT, MEMORY));
}

/* From the least to the most clients. */
static void summary_growth(FILE *out, const struct bench *b) {
    const struct row *first = NULL, *last = NULL;
    for (int k = 0; k < b->row_count; k++) {
        if (b->rows[k].part != GROWTH) continue;
        first = first ? first : &b->rows[k];
        last = &b->rows[k];
    }
    if (!first) return;
    fprintf(out, "- From %d ", first->sc.clients);
    fprintf(out, "to %s clients in a channel: %.1f to %.1f µs of CPU a "
            "delivery (the floor: %.1f to %.1f), ", grouped(last->sc.clients),
            1e6 / median(b, first, CHAT, PER_CPU),
            1e6 / median(b, last, CHAT, PER_CPU),
            1e6 / median(b, first, FLOOR, PER_CPU),
            1e6 / median(b, last, FLOOR, PER_CPU));
    fprintf(out, "%.0f to %.0f bytes a client.\n",
            median(b, first, CHAT, MEMORY), median(b, last, CHAT, MEMORY));
}

/* "Intel(R) Xeon(R)", 2 cores, Linux 6.1, and so on. */
static void summary_machine(FILE *out, const struct bench *b) {
    char line[256], cpu[256] = "unknown CPU";
    char tcp[32];
    struct utsname kernel;
    time_t day = time(NULL);
    FILE *file = fopen("/proc/cpuinfo", "r");
    while (file && fgets(line, sizeof line, file))
        if (sscanf(line, "model name : %255[^\n]", cpu) == 1) break;
    if (file) fclose(file);
    file = fopen("/proc/sys/net/ipv4/tcp_congestion_control", "r");
    if (!file || fscanf(file, "%31s", tcp) != 1) strcpy(tcp, "?");
    if (file) fclose(file);
    uname(&kernel);
    strftime(line, sizeof line, "%Y-%m-%d", gmtime(&day));
    fprintf(out, "%s, %ld cores, Linux %s, TCP %s, %s; medians of %d runs.\n",
            cpu, sysconf(_SC_NPROCESSORS_ONLN), kernel.release, tcp, line,
            b->runs);
}

static void summary(FILE *out, const struct bench *b) {
    summary_machine(out, b);
    summary_part(out, b, FANOUT, PER_CPU,
                 "scenario | deliveries a CPU second");
    summary_part(out, b, LATENCY, P99, "at half of the most | p99, µs");
    summary_part(out, b, JOINING, JOINS, "handshakes | a CPU second");
    fprintf(out, "\n");
    for (int k = 0; k < b->row_count; k++) summary_line(out, b, &b->rows[k]);
    summary_growth(out, b);
}

/* ---- The plot -----------------------------------------------------------
 * Above: what each server does beside the floor. Below: what a client costs
 * while there are more and more of them.
 */
static const struct {
    const char *name, *color;
} plotted[] = {[CHAT] = {"chat", "#2f81f7"}, [FLOOR] = {"floor", "#8b949e"},
               [BUN] = {"Bun", "#e0742c"}, [WS] = {"ws", "#a371f7"},
               [DENO] = {"Deno", "#2da44e"}};
enum { PLOTTED = sizeof plotted / sizeof *plotted, BAR = 530 };

/* The bars of one row, from `y` on. Returns where they end. */
static double plot_row(FILE *out, const struct bench *b, const struct row *row,
                       double y) {
    char title[128], text[32];
    row_title(row, title);
    svg_text(out, 24, y + 12, "", "start", title);
    y += 18;
    for (int s = 0; s < PLOTTED; s++) {
        double ratio = spread_of(b, row, s, FLOOR, PER_CPU).median;
        if (s == FLOOR || ratio == 0) continue;
        snprintf(text, sizeof text, "%.*f", ratio < 0.1 ? 3 : 2, ratio);
        svg_text(out, 66, y + 10, "small", "end", plotted[s].name);
        double width = BAR * fmin(ratio, 1.2);
        svg_bar(out, 74, y, width, 11, plotted[s].color);
        svg_text(out, 80 + width, y + 10, "small", "start", text);
        y += 14;
    }
    return y + 8;
}

/* A server's column by the number of clients, as points. Returns how many. */
static int plot_points(const struct bench *b, int server, enum column column,
                       double at[SIZES][2]) {
    int count = 0;
    for (int k = 0; k < b->row_count && count < SIZES; k++) {
        const struct row *row = &b->rows[k];
        double value = median(b, row, server, column);
        if (row->part != GROWTH || value <= 0) continue;
        at[count][0] = row->sc.clients;
        at[count++][1] = column == PER_CPU ? 1e6 / value /* us */ : value;
    }
    return count;
}

/* A line for each server, with its name at the end; names keep apart. */
static void plot_growth(FILE *out, const struct bench *b, const struct axes *a,
                        enum column column) {
    double at[SIZES][2], name_y[BUN + 1], last = 0;
    for (int s = BUN; s >= CHAT; s--) { /* the chat on top */
        int count = plot_points(b, s, column, at);
        name_y[s] = 0;
        if (count < 2 || (s == FLOOR && column == MEMORY)) continue;
        axes_line(out, a, (const double (*)[2])at, count, plotted[s].color);
        name_y[s] = axes_y(a, at[count - 1][1]) + 4;
    }
    for (int left = BUN + 1; left > 0; left--) {
        int top = CHAT; /* of those that are left */
        for (int s = FLOOR; s <= BUN; s++)
            if (name_y[top] == 0 || (name_y[s] > 0 && name_y[s] < name_y[top]))
                top = s;
        if (name_y[top] == 0) return;
        last = fmax(name_y[top], last + 12);
        svg_text(out, a->left + a->width + 8, last, "small", "start",
                 plotted[top].name);
        name_y[top] = 0;
    }
}

static void plot_below(FILE *out, const struct bench *b, double y) {
    static const char *const sizes_text[] = {"100", "1,000"};
    struct axes cpu = {60, y + 40, 250, 170, 100, 19000, 0, 8, false};
    struct axes memory = {440, y + 40, 250, 170, 100, 19000, 10, 10000, true};
    char text[16];
    svg_text(out, 24, y + 12, "title", "start", "CPU a delivery, in µs");
    svg_text(out, 404, y + 12, "title", "start",
             "Memory a client, in bytes");
    for (int i = 0; i <= 8; i += 2) {
        snprintf(text, sizeof text, "%d", i);
        axes_y_mark(out, &cpu, i, text);
    }
    for (int i = 10; i <= 10000; i *= 10)
        axes_y_mark(out, &memory, i, grouped(i));
    for (int i = 0, x = 100; i < 2; i++, x *= 10) {
        axes_x_mark(out, &cpu, x, sizes_text[i]);
        axes_x_mark(out, &memory, x, sizes_text[i]);
    }
    axes_x_mark(out, &cpu, 19000, "19,000");
    axes_x_mark(out, &memory, 19000, "19,000");
    plot_growth(out, b, &cpu, PER_CPU);
    plot_growth(out, b, &memory, MEMORY);
    svg_text(out, 185, y + 246, "small", "middle", "clients in one channel");
    svg_text(out, 565, y + 246, "small", "middle", "clients in one channel");
}

static void plot(FILE *out, const struct bench *b) {
    int rows = 0, bars = 0;
    bool growth = false;
    for (int k = 0; k < b->row_count; k++) {
        growth |= b->rows[k].part == GROWTH;
        if (b->rows[k].part != FANOUT) continue;
        rows++;
        for (int s = 0; s < PLOTTED; s++)
            bars += s != FLOOR && b->rows[k].servers & BIT(s) ? 1 : 0;
    }
    double y = 46, above = rows ? y + 26 * rows + 14 * bars + 14 : 24;
    svg_begin(out, 760, (int)above + (growth ? 266 : 0),
              "What the chat does beside other servers");
    if (rows) {
        svg_text(out, 24, 30, "title", "start", "Deliveries a second of the "
                 "server's CPU, floor = 1");
        svg_line(out, "grid goal", 74 + BAR, 38, 74 + BAR, above - 18);
        svg_text(out, 74 + BAR, 30, "small", "middle", "floor");
    }
    for (int k = 0; k < b->row_count; k++)
        if (b->rows[k].part == FANOUT) y = plot_row(out, b, &b->rows[k], y);
    if (growth) plot_below(out, b, above);
    fprintf(out, "</svg>\n");
}

/* ---- Options and main ---------------------------------------------------- */
static struct scenario scenario_parse(const char *text) {
    struct scenario sc = {0};
    int n = sscanf(text, "%d,%d,%d,%d,%lf", &sc.clients, &sc.senders,
                   &sc.window, &sc.size, &sc.rate);
    if (n < 4 || sc.clients < 1 || sc.senders < 0 || sc.window < 1 ||
        sc.senders > sc.clients || sc.size < STAMP || sc.size > UINT16_MAX)
        fail("neither part nor scenario: %s", text);
    return sc;
}

static void bench_part(struct bench *b, const char *name) {
    static const struct {
        const char *name;
        void (*run)(struct bench *b);
    } parts[] = {{"fanout", part_fanout}, {"latency", part_latency},
                 {"joins", part_joins}, {"channels", part_channels},
                 {"http", part_http}, {"workers", part_workers},
                 {"growth", part_growth}};
    bool found = false;
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        if (!strcmp(name, parts[i].name) || !strcmp(name, "all")) {
            parts[i].run(b);
            found = true;
        }
    if (!found)
        bench_row(b, (struct row){GIVEN, .sc = scenario_parse(name),
            .measure = measure_chat, .servers = WEBSOCKETS});
}

static void bench_server(struct bench *b, int i, const char *name,
                         const char *command) {
    b->servers[i].name = name;
    b->servers[i].command = command;
    b->present |= BIT(i);
}

/* The chat, the floor and those peers that "make peers" has installed. */
static void bench_servers(struct bench *b) {
    static const struct {
        const char *name, *needs, *command;
    } peers[] = {
        [BUN] = {"bun", "build/peers/node_modules/.bin/bun",
                 "exec build/peers/node_modules/.bin/bun test/peers/bun.js"},
        [WS] = {"ws", "build/peers/node_modules/ws/package.json",
                "exec node test/peers/ws.js"},
        [DENO] = {"deno", "build/peers/node_modules/.bin/deno",
                  "exec build/peers/node_modules/.bin/deno run --no-config "
                  "--allow-net test/peers/deno.js"}};
    static char chat[1024], files[1100];
    snprintf(chat, sizeof chat, "exec %s -p 0 -q --metrics -b none",
             getenv("CHAT") ? getenv("CHAT") : "./chat");
    snprintf(files, sizeof files, "%s -d build/nginx/html", chat);
    bench_server(b, CHAT, "chat", chat);
    bench_server(b, FLOOR, "floor", NULL);
    bench_server(b, NGINX, "nginx", NULL); /* there if its part runs */
    bench_server(b, FILES, "chat -d", files);
    bench_server(b, WORKERS, "chat -j 2", NULL); /* the same */
    b->present &= ~(BIT(NGINX) | BIT(FILES) | BIT(WORKERS));
    for (int i = BUN; i <= DENO; i++) {
        bench_server(b, i, peers[i].name, peers[i].command);
        if (!access(peers[i].needs, F_OK)) continue;
        printf("skipped: %s: not installed, see make peers\n", peers[i].name);
        b->present &= ~BIT(i);
    }
}

/* Writes what a function prints into a file. */
static void write_to(const char *path, const struct bench *b,
                     void (*print)(FILE *out, const struct bench *b)) {
    FILE *file = path ? fopen(path, "w") : NULL;
    if (!path) return;
    if (!file) fail("%s: %s", path, strerror(errno));
    print(file, b);
    if (fclose(file)) fail("%s: %s", path, strerror(errno));
}

int main(int argc, char **argv) {
    static struct row rows[ROWS_MAX];
    struct bench b = {.runs = 4, .seconds = 2, .rows = rows};
    struct rlimit limit;
    const char *markdown = NULL, *svg = NULL;
    bench_servers(&b);
    for (int c, other = OTHER; (c = getopt(argc, argv, "ft:n:x:o:p:")) != -1;) {
        if (c == 'f') b.present &= ~(BIT(BUN) | BIT(WS) | BIT(DENO));
        if (c == 't') b.seconds = atof(optarg);
        if (c == 'n') b.runs = atoi(optarg);
        if (c == 'o') markdown = optarg;
        if (c == 'p') svg = optarg;
        if (c == 'x' && other < SERVERS_MAX && strchr(optarg, '=')) {
            const char *name = strtok(optarg, "=");
            bench_server(&b, other++, name, strtok(NULL, ""));
        }
        if (c == '?') return 2;
    }
    if (b.runs < 1 || b.runs > RUNS_MAX) b.runs = 1;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    pin(0, (int)sysconf(_SC_NPROCESSORS_ONLN) - 1);
    if (optind == argc) bench_part(&b, "fanout");
    for (int i = optind; i < argc; i++) bench_part(&b, argv[i]);
    printf("\n");
    summary(stdout, &b);
    write_to(markdown, &b, summary);
    write_to(svg, &b, plot);
    return 0;
}
