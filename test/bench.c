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
 * senders first. What the chat does beyond that is seen in the ratios.
 *
 * In a closed loop a sender has `window` messages under way, and sends the
 * next when one of them comes back. In an open loop messages go out at a
 * fixed rate, come what may, and what is late counts from when it was due.
 * Each run is a new server with new clients; servers take turns, and the
 * median of the runs is shown, so that a busy machine does less harm.
 *
 * Every client has to get every message, and each sender's in their order:
 * else a line says FAILED, and the exit status is 1.
 *
 *   bench [-t SECONDS] [-n RUNS] [-l] [-x NAME=COMMAND]... [SCENARIO]...
 *
 *   -t  to measure each server in each scenario, all runs together (2)
 *   -n  runs (4)
 *   -l  the latency again, in an open loop at half of what all can do
 *   -x  another server: a command that prints http://HOST:PORT
 *   SCENARIO is CLIENTS,SENDERS,WINDOW,BYTES[,RATE]; RATE is of messages a
 *   second, all senders together, and makes it an open loop. No senders: the
 *   clients are idle, only joining and memory are measured.
 *
 * SPDX-License-Identifier: MIT
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
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
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define SECOND 1000000000LL   /* all times are nanoseconds */
#define PATIENCE (5 * SECOND) /* for a server to start, or to answer */
#define WARM_UP (SECOND / 5)
#define EVENTS 1024
#define READ_SIZE (256 * 1024)
#define OPEN_WINDOW 1024      /* under way a sender in an open loop */
#define RUNS_MAX 32
#define SERVERS_MAX 8
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

static void pin(int core) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(core, &set);
    sched_setaffinity(0, sizeof set, &set); /* best effort */
}

/* ---- Frames -------------------------------------------------------------
 * What load and floor share. Frames are short texts, all in one frame.
 */
static const char handshake[] =
    "GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
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
    int *place;             /* in `clients`, by descriptor */
    int count, talked;      /* in this round */
    uint8_t in[READ_SIZE], out[2 * READ_SIZE];
    size_t out_size;
};

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

static void floor_accept(struct floor *f, int listener, int epoll) {
    int fd = must(accept(listener, NULL, NULL), "accept");
    struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
    must((int)recv(fd, f->in, sizeof f->in, 0), "recv");
    must((int)send(fd, agreed, sizeof agreed - 1, MSG_NOSIGNAL), "send");
    must(epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event), "epoll_ctl");
    f->place[fd] = f->count;
    f->clients[f->count++].fd = fd;
}

static void floor_run(int most) {
    struct floor *f = reserve(1, sizeof *f);
    struct sockaddr_in at = {.sin_family = AF_INET,
                             .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct epoll_event events[EVENTS] = {{.events = EPOLLIN}};
    socklen_t size = sizeof at;
    int on = 1, epoll = epoll_create1(0);
    int listener = must(socket(AF_INET, SOCK_STREAM, 0), "socket");
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
            if (events[i].data.fd != listener) floor_read(f, events[i].data.fd);
            else floor_accept(f, listener, epoll);
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
        pin(0);
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

/* In nanoseconds, exact. */
static int64_t server_cpu(const struct server *s) {
    struct timespec t;
    if (clock_gettime(s->clock, &t)) fail("the server has gone");
    return t.tv_sec * SECOND + t.tv_nsec;
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
    double rate; /* messages a second; 0: a closed loop */
};

struct client {
    struct stream stream;
    uint32_t *expected; /* by sender: the number of its next message */
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
    struct histogram own, others;
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

/* Open loop: sends what is due, each sender in its turn. */
static void load_send_due(struct load *l, int64_t time) {
    double rate = l->scenario.rate;
    while (l->sending && rate > 0) {
        int i = (int)(l->scheduled % (uint64_t)l->scenario.senders);
        struct sender *s = &l->senders[i];
        double passed = (double)l->scheduled * (double)SECOND / rate;
        int64_t due = l->start + (int64_t)passed;
        if (due > time || s->next - s->back >= l->window) return;
        sender_add(l, i, due);
        sender_flush(l, i);
        l->scheduled++;
    }
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
    if (sender == (uint32_t)i) l->senders[i].back++;
    if (l->measuring)
        histogram_add(sender == (uint32_t)i ? &l->own : &l->others,
                      time - l->senders[sender].due[n % l->ring]);
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
    if (i < l->scenario.senders && l->scenario.rate == 0)
        sender_refill(l, i, time);
}

/* Runs until that time, or until every client has everything. */
static void load_run(struct load *l, int64_t until) {
    struct epoll_event events[EVENTS];
    bool open = l->sending && l->scenario.rate > 0; /* then: no sleep */
    uint64_t all = (uint64_t)l->scenario.clients;
    for (int64_t time = now(); time < until; time = now()) {
        if (!l->sending && l->delivered == l->sent * all) return;
        int n = epoll_wait(l->epoll, events, EVENTS, open ? 0 : 10);
        load_send_due(l, time);
        for (int i = 0; i < n; i++) {
            int client = (int)events[i].data.u32;
            if (events[i].events & EPOLLOUT) sender_flush(l, client);
            if (events[i].events & ~(uint32_t)EPOLLOUT) client_read(l, client);
            if (open) load_send_due(l, now());
        }
    }
}

/* Opens all connections, 64 at a time, and shakes hands. */
static void load_connect(struct load *l, int port) {
    struct sockaddr_in to = {.sin_family = AF_INET,
                             .sin_port = htons((uint16_t)port),
                             .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct linger reset = {1, 0}; /* no port has to wait at the end */
    struct timeval patience = {PATIENCE / SECOND, 0};
    int on = 1, count = l->scenario.clients;
    for (int first = 0; first < count; first += 64) {
        int last = first + 64 < count ? first + 64 : count;
        for (int i = first; i < last; i++) {
            int fd = must(socket(AF_INET, SOCK_STREAM, 0), "socket");
            setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
            setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
            setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
            must(connect(fd, (struct sockaddr *)&to, sizeof to), "connect");
            must((int)send(fd, handshake, sizeof handshake - 1, MSG_NOSIGNAL),
                 "send");
            l->clients[i].stream.fd = fd;
        }
        for (int i = first; i < last; i++) {
            char answer[2048] = "";
            struct epoll_event event = {EPOLLIN, {.u32 = (uint32_t)i}};
            for (size_t size = 0; !strstr(answer, "\r\n\r\n");) {
                ssize_t n = recv(l->clients[i].stream.fd, answer + size,
                                 sizeof answer - 1 - size, 0);
                if (n <= 0) fail("no answer to the handshake");
                size += (size_t)n;
            }
            if (strncmp(answer, "HTTP/1.1 101", 12)) fail("%s", answer);
            epoll_ctl(l->epoll, EPOLL_CTL_ADD, l->clients[i].stream.fd, &event);
        }
    }
}

static struct load *load_open(struct scenario sc) {
    struct load *l = reserve(1, sizeof *l);
    size_t senders = (size_t)sc.senders, size = (size_t)sc.size;
    l->scenario = sc;
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
    return l;
}

/* ---- Measuring ---------------------------------------------------------- */
enum {
    RATE, PER_CPU, BUSY, OWN, OTHERS = OWN + 3, JOINS = OTHERS + 3, MEMORY,
    COLUMNS
};
static const struct {
    const char *name;
    int width;
} columns[COLUMNS] = {
    {"deliv/s", 10}, {"/cpu s", 10}, {"busy %", 7}, {"own p50", 9},
    {"p99", 8}, {"p99.9", 8}, {"other p50", 10}, {"p99", 8}, {"p99.9", 8},
    {"joins/cpu s", 12}, {"B/client", 9}};

struct result {
    double of[COLUMNS];
};

static struct result measure(const char *command, struct scenario sc,
                             int64_t time) {
    static const double parts[] = {0.5, 0.99, 0.999};
    struct result r = {0};
    struct server server = server_start(command, sc.clients + 64);
    struct load *l = load_open(sc);
    double memory = server_memory(&server), count = sc.clients;
    int64_t cpu = server_cpu(&server);
    load_connect(l, server.port);
    r.of[JOINS] = count * (double)SECOND / (double)(server_cpu(&server) - cpu);
    r.of[MEMORY] = (server_memory(&server) - memory) / count;
    if (sc.senders > 0) {
        l->sending = true;
        l->start = now();
        for (int i = 0; sc.rate == 0 && i < sc.senders; i++)
            sender_refill(l, i, l->start);
        load_run(l, l->start + WARM_UP);
        l->measuring = true;
        int64_t from = now(), before = (int64_t)l->delivered;
        cpu = server_cpu(&server);
        load_run(l, from + time);
        double passed = (double)(now() - from);
        double used = (double)(server_cpu(&server) - cpu);
        double delivered = (double)((int64_t)l->delivered - before);
        l->measuring = l->sending = false;
        load_run(l, now() + PATIENCE);
        if (l->delivered != l->sent * (uint64_t)sc.clients)
            fail("%llu of %llu deliveries came", (unsigned long long)
                 l->delivered, (unsigned long long)l->sent *
                 (unsigned long long)sc.clients);
        r.of[RATE] = delivered * (double)SECOND / passed;
        r.of[PER_CPU] = delivered * (double)SECOND / used;
        r.of[BUSY] = 100 * used / passed;
        for (int i = 0; i < 3; i++) {
            r.of[OWN + i] = histogram_at(&l->own, parts[i]);
            r.of[OTHERS + i] = histogram_at(&l->others, parts[i]);
        }
    }
    kill(server.pid, SIGKILL);
    waitpid(server.pid, NULL, 0);
    return r;
}

/* One run, in a process of its own that leaves nothing behind. */
static struct result run(const char *command, struct scenario sc,
                         int64_t time) {
    struct result r;
    int pipes[2];
    must(pipe(pipes), "pipe");
    pid_t pid = must(fork(), "fork");
    if (pid == 0) {
        r = measure(command, sc, time);
        _exit(write(pipes[1], &r, sizeof r) != sizeof r);
    }
    close(pipes[1]);
    if (read(pipes[0], &r, sizeof r) != sizeof r) exit(1); /* it said why */
    close(pipes[0]);
    waitpid(pid, NULL, 0);
    return r;
}

static int compare(const void *a, const void *b) {
    const double *x = a, *y = b;
    return (*x > *y) - (*x < *y);
}

/* The median of a column over the runs of `a`; with `b`, of the ratios. */
static double median(const struct result *a, const struct result *b, int runs,
                     int column) {
    double all[RUNS_MAX];
    for (int i = 0; i < runs; i++) {
        all[i] = a[i].of[column];
        if (b) all[i] = b[i].of[column] > 0 ? all[i] / b[i].of[column] : 0;
    }
    qsort(all, (size_t)runs, sizeof *all, compare);
    return (all[(runs - 1) / 2] + all[runs / 2]) / 2;
}

static void row(const char *name, const struct result *a,
                const struct result *b, int runs) {
    printf("%-12s", name);
    for (int i = 0; i < COLUMNS; i++) {
        double value = median(a, b, runs, i);
        if (value > 0) printf("%*.*f", columns[i].width, b ? 3 : 0, value);
        else printf("%*s", columns[i].width, "-");
    }
    printf("\n");
}

struct bench {
    struct {
        const char *name, *command; /* NULL: the floor */
    } servers[SERVERS_MAX];
    int count, runs;
    double seconds;
};

/* Measures all servers in turn and prints a table. Returns the messages a
 * second that every server can do. */
static double bench_scenario(const struct bench *b, struct scenario sc) {
    struct result results[SERVERS_MAX][RUNS_MAX];
    int64_t time = (int64_t)(b->seconds / b->runs * (double)SECOND);
    double least = 0;
    char name[64];
    printf("\n%d clients, %d senders, ", sc.clients, sc.senders);
    if (sc.rate > 0) printf("%.0f messages/s", sc.rate);
    else printf("window %d", sc.window);
    printf(", %d bytes (latencies in us)\n%-12s", sc.size, "");
    for (int i = 0; i < COLUMNS; i++)
        printf("%*s", columns[i].width, columns[i].name);
    printf("\n");
    fflush(stdout); /* before a fork */
    for (int turn = 0; turn < b->runs; turn++)
        for (int i = 0; i < b->count; i++)
            results[i][turn] = run(b->servers[i].command, sc, time);
    for (int i = 0; i < b->count; i++) {
        double rate = median(results[i], NULL, b->runs, RATE);
        row(b->servers[i].name, results[i], NULL, b->runs);
        if (i == 0 || rate < least) least = rate;
    }
    for (int i = 1; i < b->count; i++) {
        snprintf(name, sizeof name, "chat/%s", b->servers[i].name);
        row(name, results[0], results[i], b->runs);
    }
    return least / sc.clients;
}

static struct scenario scenario_parse(const char *text) {
    struct scenario sc = {0};
    int n = sscanf(text, "%d,%d,%d,%d,%lf", &sc.clients, &sc.senders,
                   &sc.window, &sc.size, &sc.rate);
    if (n < 4 || sc.clients < 1 || sc.senders < 0 || sc.window < 1 ||
        sc.senders > sc.clients || sc.size < STAMP || sc.size > UINT16_MAX)
        fail("not a scenario: %s", text);
    return sc;
}

int main(int argc, char **argv) {
    static char chat[1024], *usual[] = {
        "1000,1,1,32", "1000,1,64,32", "200,200,1,32", "200,20,1,512", NULL};
    struct bench b = {.count = 2, .runs = 4, .seconds = 2};
    struct rlimit limit;
    bool latency = false;
    snprintf(chat, sizeof chat, "exec %s -p 0 -q -b none",
             getenv("CHAT") ? getenv("CHAT") : "./chat");
    b.servers[0].name = "chat";
    b.servers[0].command = chat;
    b.servers[1].name = "floor";
    for (int c; (c = getopt(argc, argv, "t:n:lx:")) != -1;) {
        if (c == 't') b.seconds = atof(optarg);
        if (c == 'n') b.runs = atoi(optarg);
        if (c == 'l') latency = true;
        if (c == 'x' && b.count < SERVERS_MAX && strchr(optarg, '=')) {
            b.servers[b.count].name = strtok(optarg, "=");
            b.servers[b.count++].command = strtok(NULL, "");
        }
        if (c == '?') return 2;
    }
    if (b.runs < 1 || b.runs > RUNS_MAX) b.runs = 1;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    pin((int)sysconf(_SC_NPROCESSORS_ONLN) - 1);
    for (char **at = optind < argc ? argv + optind : usual; *at; at++) {
        struct scenario sc = scenario_parse(*at);
        double most = bench_scenario(&b, sc);
        if (!latency || sc.rate > 0 || sc.senders == 0) continue;
        sc.rate = most / 2;
        bench_scenario(&b, sc);
    }
    return 0;
}
