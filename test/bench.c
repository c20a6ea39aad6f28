/* bench.c: what the chat can do, beside other servers in the same run.
 *
 *   load (this process, the last core)            server (the first core)
 *   N WebSocket clients, one epoll loop  <----->  chat, then the floor, ...
 *
 * A sender has `window` messages under way, and sends the next when one of
 * them comes back to it. A *delivery* is one message to one client. Each
 * client has to get every message, each sender's in their order, or there are
 * no figures. What counts is the CPU time of the server's process, in the
 * kernel, too: that is what one pays for, and a busy machine changes it less
 * than the time on the clock. Each run is a new server with new clients.
 * Servers take turns, A B C, C B A and so on, and the medians of all rounds
 * are compared: so whatever else the machine does hits all of them.
 *
 * The *floor* is the least that any server has to do: a fixed answer to the
 * handshake, masks off, new frames, one send() a client and round; no checks,
 * no history, no timeouts. The *peers* are what "make peers" installs.
 *
 *   bench [-n ROUNDS] [-t SECONDS] [-s NAME=COMMAND]... [-p FILE] [PART]...
 *
 * prints a table in Markdown, and on stderr how much the rounds differ.
 *   -n  rounds (5), and -t what a run lasts (0.5)
 *   -s  another chat, such as "old=/tmp/old/chat"
 *   -p  a plot of the loads, as SVG, into this file
 *   PART is loads, joins, bus or channels; all of them if there is none.
 *   $CHAT is the program that it is all about (./chat).
 *
 * SPDX-License-Identifier: MIT
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define SECOND      1000000000LL /* all times are nanoseconds */
#define WARM_UP     (SECOND / 5)
#define PATIENCE    60 /* seconds; who needs more for a run hangs */
#define EVENTS      1024
#define READ_SIZE   (256 * 1024)
#define FRAME_MAX   1024
#define STAMP       8 /* a message begins with its sender and number */
#define ROUNDS_MAX  64
#define SERVERS_MAX 12
#define VALUES      3 /* of one run, at most */

/* ---- Tools -------------------------------------------------------------- */
/* For calls that must succeed: else there are no figures. (What calloc()
 * returns is not checked: without memory a run crashes, and run() tells.) */
static int must(int64_t result, const char *call) {
    if (result < 0) err(1, "%s", call);
    return (int)result;
}

static int64_t clock_ns(clockid_t id) {
    struct timespec t;
    must(clock_gettime(id, &t), "clock_gettime");
    return t.tv_sec * SECOND + t.tv_nsec;
}
#define now() clock_ns(CLOCK_MONOTONIC)

/* Puts this process on the first core, or the last. Best effort. */
static void pin(bool last) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(last ? (size_t)sysconf(_SC_NPROCESSORS_ONLN) - 1 : 0, &set);
    sched_setaffinity(0, sizeof set, &set);
}

static int compare(const void *a, const void *b) {
    const double *x = a, *y = b;
    return (*x > *y) - (*x < *y);
}

/* ---- What load and floor share; a message is a frame --------------------- */
static const char handshake[] =
    "GET %s HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
    "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
static const char agreed[] =
    "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n"
    "Connection: Upgrade\r\n"
    "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";

/* `mask` is 0x80 for a frame with one. Returns the header's size without it. */
static size_t frame_header(uint8_t *out, size_t size, uint8_t mask) {
    out[0] = 0x81; /* the only frame of a text message */
    out[1] = (uint8_t)(size < 126 ? size : 126) | mask;
    if (size < 126) return 2;
    out[2] = (uint8_t)(size >> 8);
    out[3] = (uint8_t)size;
    return 4;
}

/* Sockets block, and what is under way always fits into the kernel's buffers:
 * so a send() takes all. */
static void send_all(int fd, const void *bytes, size_t size) {
    if (send(fd, bytes, size, MSG_NOSIGNAL) != (ssize_t)size) err(1, "send");
}

static size_t receive(int fd, void *bytes, size_t size) {
    ssize_t n = recv(fd, bytes, size, 0);
    if (n == 0) errx(1, "cut off");
    return (size_t)must(n, "recv");
}

/* ---- The floor ----------------------------------------------------------
 * It trusts everybody: what was sent with one send() comes with one recv(), a
 * client always reads, and nobody leaves.
 */
enum { NOBODY, ACCEPTED, SILENT, TALKED };
static struct {
    int guests[1 << 16];     /* by descriptor: one of these */
    int end;                 /* of those in use */
    uint8_t in[READ_SIZE], out[2 * READ_SIZE];
    size_t out_size;
} lobby;

/* Who talked is served first: so it can answer while the others get this
 * round's messages, and rounds are full. */
static void floor_flush(void) {
    for (int pass = TALKED; pass >= SILENT && lobby.out_size; pass--)
        for (int fd = 0; fd < lobby.end; fd++)
            if (lobby.guests[fd] == pass)
                send_all(fd, lobby.out, lobby.out_size);
    for (int fd = 0; fd < lobby.end && lobby.out_size; fd++)
        if (lobby.guests[fd] == TALKED) lobby.guests[fd] = SILENT;
    lobby.out_size = 0;
}

static void floor_read(int fd) {
    uint8_t *at = lobby.in;
    const uint8_t *end = at + receive(fd, at, sizeof lobby.in);
    if (lobby.guests[fd] == ACCEPTED) {
        send_all(fd, agreed, sizeof agreed - 1);
        lobby.guests[fd] = SILENT;
        return;
    }
    if (lobby.out_size > READ_SIZE) floor_flush();
    while (at < end) {
        size_t size = at[1] & 127, longer = size == 126 ? 2 : 0;
        if (longer) size = (size_t)at[2] << 8 | at[3];
        const uint8_t *mask = at + 2 + longer;
        uint8_t *out = lobby.out + lobby.out_size;
        out += frame_header(out, size, 0);
        for (size_t i = 0; i < size; i++) out[i] = mask[4 + i] ^ mask[i % 4];
        lobby.out_size = (size_t)(out + size - lobby.out);
        at += 2 + longer + 4 + size;
    }
    if (at > end) errx(1, "the floor was sent half a frame");
    lobby.guests[fd] = TALKED;
}

static void floor_run(void) {
    struct sockaddr_in at = { .sin_family = AF_INET,
                              .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    struct epoll_event events[EVENTS], event = { .events = EPOLLIN };
    socklen_t size = sizeof at;
    int on = 1, epoll = must(epoll_create1(0), "epoll_create1");
    int listener = must(socket(AF_INET, SOCK_STREAM, 0), "socket");
    setsockopt(listener, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    must(bind(listener, (struct sockaddr *)&at, size), "bind");
    must(listen(listener, SOMAXCONN), "listen");
    getsockname(listener, (struct sockaddr *)&at, &size);
    fprintf(stderr, "http://localhost:%d/\n", ntohs(at.sin_port));
    event.data.fd = listener;
    epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &event);
    for (;; floor_flush()) {
        int n = epoll_wait(epoll, events, EVENTS, -1);
        for (int i = 0; i < n; i++)
            if (events[i].data.fd != listener) {
                floor_read(events[i].data.fd);
            } else {
                int fd = must(accept(listener, NULL, NULL), "accept");
                event.data.fd = fd;
                epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
                lobby.guests[fd] = ACCEPTED;
                lobby.end = fd + 1;
            }
    }
}

/* ---- A server: a process on one core that says where it is -------------- */
struct program {
    const char *name;
    enum { CHAT, FLOOR, PEER } kind;
    const char *command, *color;
    const char *needs; /* without this file it does not take part */
};

struct server {
    pid_t pid;
    int port;
    clockid_t clock; /* the CPU time of all its threads */
};

static struct server server_start(const struct program *p, const char *bus,
                                  bool last_core) {
    struct server s = { 0 };
    int pipes[2];
    char line[1024], command[1024];
    snprintf(command, sizeof command, "exec %s%s%s", p->command,
             p->kind == CHAT ? " -p 0 -q -b " : "", p->kind == CHAT ? bus : "");
    must(pipe(pipes), "pipe");
    s.pid = must(fork(), "fork");
    if (s.pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        pin(last_core);
        dup2(pipes[1], 1);
        dup2(pipes[1], 2);
        if (p->kind == FLOOR) floor_run();
        execl("/bin/sh", "sh", "-c", command, NULL);
        err(1, "/bin/sh");
    }
    close(pipes[1]);
    FILE *said = fdopen(pipes[0], "r"); /* stays open, for what it may say */
    while (s.port == 0) {
        if (!fgets(line, sizeof line, said)) errx(1, "it did not start");
        char *address = strstr(line, "http://");
        if (address) sscanf(address, "http://%*[^:]:%d", &s.port);
        else fprintf(stderr, "%s: %s", p->name, line);
    }
    must(-clock_getcpuclockid(s.pid, &s.clock), "clock_getcpuclockid");
    return s;
}

static void server_stop(const struct server *s) {
    kill(s->pid, SIGKILL);
    waitpid(s->pid, NULL, 0);
}

/* A size from /proc/PID/status, in bytes. */
static double server_memory(const struct server *s, const char *name) {
    char path[64], line[256];
    double size = 0;
    snprintf(path, sizeof path, "/proc/%d/status", s->pid);
    FILE *file = fopen(path, "r");
    while (file && fgets(line, sizeof line, file))
        if (!strncmp(line, name, strlen(name)))
            size = strtod(line + strlen(name), NULL);
    if (file) fclose(file);
    return size * 1024;
}

/* ---- The load ----------------------------------------------------------- */
struct scenario {
    int clients, senders;
    uint32_t window;
    size_t size; /* of a message */
    const char *path;
    double rate; /* if not 0, the only sender does not wait for the window:
                  * its message k is due k / rate after the start */
};

struct load {
    struct scenario sc;
    struct client {
        int fd;
        uint8_t rest[FRAME_MAX]; /* of a frame: what the last read left */
        size_t rest_size;
        uint32_t next, back; /* its messages [back, next) are under way */
        uint32_t *expected;  /* by sender: the number of its next message */
    } *clients;              /* the first are the senders */
    uint8_t ours[FRAME_MAX], theirs[FRAME_MAX]; /* a frame, but its stamp */
    size_t our_size, their_size;
    int epoll;
    bool sending;
    int64_t start;
    uint64_t sent, delivered; /* messages; to one client each */
    double *late;             /* each delivery; NULL: that does not matter */
};

/* Sends so many messages with one call. The stamp is sender and number, six
 * bits to a letter, since a message is text. */
static void client_send(struct load *l, int i, uint32_t count) {
    static uint8_t frames[READ_SIZE];
    uint8_t *at = frames;
    for (uint32_t k = 0; k < count; k++, at += l->our_size) {
        uint64_t stamp = (uint64_t)i << 30 | l->clients[i].next++;
        memcpy(at, l->ours, l->our_size);
        for (int j = STAMP; j-- > 0; stamp >>= 6)
            at[l->our_size - l->sc.size + j] = '0' + (stamp & 63);
    }
    send_all(l->clients[i].fd, frames, (size_t)(at - frames));
    l->sent += count;
}

/* Fills up a sender's window. */
static void client_refill(struct load *l, int i) {
    const struct client *c = &l->clients[i];
    uint32_t room = l->sc.window - (c->next - c->back);
    if (i < l->sc.senders && l->sending && l->sc.rate == 0 && room > 0)
        client_send(l, i, room);
}

/* When the first sender's message n is due, at a rate. */
static int64_t load_due(const struct load *l, uint32_t n) {
    return l->start + (int64_t)(n * (double)SECOND / l->sc.rate);
}

/* Reads once. Are these the right messages, and how late are they? */
static void client_read(struct load *l, int i) {
    static uint8_t in[READ_SIZE];
    struct client *c = &l->clients[i];
    uint8_t *at = in;
    size_t left = c->rest_size, size = l->their_size;
    memcpy(in, c->rest, left);
    left += receive(c->fd, in + left, sizeof in - left);
    for (int64_t time = now(); left >= size; at += size, left -= size) {
        uint8_t *letters = at + size - l->sc.size;
        uint64_t stamp = 0;
        for (int j = 0; j < STAMP; j++)
            stamp = stamp << 6 | ((letters[j] - '0') & 63);
        uint32_t n = stamp & 0x3FFFFFFF;
        int sender = (int)(stamp >> 30);
        memset(letters, 0, STAMP); /* as in `theirs` */
        if (memcmp(at, l->theirs, size) != 0 || sender >= l->sc.senders ||
            n != c->expected[sender]++)
            errx(1, "client %d got message %u of sender %d", i, n, sender);
        if (l->late) l->late[l->delivered] = (double)(time - load_due(l, n));
        l->delivered++;
        if (i == sender) c->back++;
    }
    memcpy(c->rest, at, left);
    c->rest_size = left;
    client_refill(l, i);
}

/* Sends for so long, and then waits until every client has everything. */
static void load_talk(struct load *l, int64_t time) {
    struct epoll_event events[EVENTS];
    uint64_t all = (uint64_t)l->sc.clients;
    l->start = now();
    l->sending = true;
    for (int i = 0; i < l->sc.senders; i++) client_refill(l, i);
    while (l->sending || l->delivered < l->sent * all) {
        int64_t wait = SECOND / 1000;
        while (l->sending && l->sc.rate > 0) {
            wait = load_due(l, l->clients[0].next) - now();
            if (wait > 0) break;
            client_send(l, 0, 1);
        }
        struct timespec timeout = { 0, wait };
        int n = epoll_pwait2(l->epoll, events, EVENTS, &timeout, NULL);
        for (int i = 0; i < n; i++) client_read(l, (int)events[i].data.u32);
        l->sending = now() < l->start + time;
    }
}

/* A new connection, and a request on it. */
static int client_open(const char *path, int port) {
    struct sockaddr_in to = { .sin_family = AF_INET,
                              .sin_port = htons((uint16_t)port),
                              .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    struct linger reset = { 1, 0 }; /* no port has to wait at the end */
    int on = 1, fd = must(socket(AF_INET, SOCK_STREAM, 0), "socket");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
    must(connect(fd, (struct sockaddr *)&to, sizeof to), "connect");
    must(dprintf(fd, handshake, path), "send");
    return fd;
}

/* Waits for the answer to the handshake. */
static void client_agreed(int fd) {
    char answer[2048] = "";
    for (size_t size = 0; !strstr(answer, "\r\n\r\n");)
        size += receive(fd, answer + size, sizeof answer - 1 - size);
    if (strncmp(answer, "HTTP/1.1 101", 12) != 0) errx(1, "%s", answer);
}

/* Opens all connections, 64 at a time, and shakes hands. The first is to
 * another port. */
static struct load *load_connect(struct scenario sc, int first, int port) {
    struct load *l = calloc(1, sizeof *l);
    l->sc = sc;
    l->clients = calloc((size_t)sc.clients, sizeof *l->clients);
    size_t ours = frame_header(l->ours, sc.size, 0x80) + 4; /* mask: zeros */
    size_t theirs = frame_header(l->theirs, sc.size, 0);
    memset(l->ours + ours + STAMP, 'x', sc.size - STAMP);
    memset(l->theirs + theirs + STAMP, 'x', sc.size - STAMP);
    l->our_size = ours + sc.size;
    l->their_size = theirs + sc.size;
    l->epoll = must(epoll_create1(0), "epoll_create1");
    for (int i = 0, done = 0; i < sc.clients; i++) {
        struct client *c = &l->clients[i];
        struct epoll_event event = { EPOLLIN, { .u32 = (uint32_t)i } };
        c->expected = calloc((size_t)sc.senders, sizeof(uint32_t));
        c->fd = client_open(sc.path, i == 0 ? first : port);
        must(epoll_ctl(l->epoll, EPOLL_CTL_ADD, c->fd, &event), "epoll_ctl");
        while (done <= i && (i % 64 == 63 || i == sc.clients - 1))
            client_agreed(l->clients[done++].fd);
    }
    return l;
}

/* ---- Measuring: a run each, a new server and its clients ---------------- */
static int64_t run_time = SECOND / 2;

/* Deliveries a second of the server's CPU. */
static void measure_load(struct program *p, struct scenario sc, double *v) {
    struct server server = server_start(p, "none", false);
    struct load *l = load_connect(sc, server.port, server.port);
    load_talk(l, WARM_UP);
    uint64_t before = l->delivered;
    int64_t cpu = clock_ns(server.clock);
    load_talk(l, run_time);
    double used = (double)(clock_ns(server.clock) - cpu) / (double)SECOND;
    v[0] = (double)(l->delivered - before) / used;
    server_stop(&server);
}

/* Handshakes a second of CPU, bytes of memory that an idle client takes, and
 * megabytes that the idle process took before. */
static void measure_joins(struct program *p, struct scenario sc, double *v) {
    struct server server = server_start(p, "none", false);
    v[2] = server_memory(&server, "VmRSS:") / 1048576;
    double memory = server_memory(&server, "RssAnon:");
    int64_t cpu = clock_ns(server.clock);
    load_connect(sc, server.port, server.port);
    double used = (double)(clock_ns(server.clock) - cpu) / (double)SECOND;
    v[0] = sc.clients / used;
    v[1] = (server_memory(&server, "RssAnon:") - memory) / sc.clients;
    server_stop(&server);
}

/* Messages a second, on the clock, from a client of one instance to one of
 * another, over a bus of their own. */
static void measure_bus(struct program *p, struct scenario sc, double *v) {
    char bus[64];
    snprintf(bus, sizeof bus, "239.255.80.80:%d", 10000 + getpid() % 20000);
    struct server from = server_start(p, bus, false);
    struct server to = server_start(p, bus, true);
    struct load *l = load_connect(sc, from.port, to.port);
    load_talk(l, WARM_UP);
    uint64_t before = l->sent;
    load_talk(l, run_time);
    double passed = (double)(now() - l->start) / (double)SECOND;
    v[0] = (double)(l->sent - before) / passed;
    server_stop(&from);
    server_stop(&to);
}

/* Milliseconds until ten clients in a channel of their own have a message,
 * half of the times and 99 % of them, while the scenario's are busy in theirs.
 * Each load is a process; the small one goes first when it has to do. */
static void measure_channels(struct program *p, struct scenario sc, double *v) {
    struct scenario small = { 10, 1, 1, 32, "/?channel=small", 200 };
    struct server server = server_start(p, "none", false);
    struct sched_param first = { 1 };
    struct load *l = load_connect(sc, server.port, server.port);
    int status;
    pid_t pid = must(fork(), "fork");
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        load_talk(l, PATIENCE * SECOND);
    }
    sched_setscheduler(0, SCHED_FIFO, &first); /* best effort */
    prctl(PR_SET_TIMERSLACK, 1);               /* wake when told */
    l = load_connect(small, server.port, server.port);
    int64_t time = run_time + 2 * SECOND; /* p99 needs many */
    l->late = calloc((size_t)(time / SECOND + 1) * 200 * 10, sizeof(double));
    load_talk(l, time);
    kill(pid, SIGKILL);
    waitpid(pid, &status, 0);
    if (WIFEXITED(status)) exit(1); /* it said why */
    server_stop(&server);
    qsort(l->late, l->delivered, sizeof(double), compare);
    v[0] = l->late[l->delivered / 2] / 1e6;
    v[1] = l->late[l->delivered * 99 / 100] / 1e6;
}

/* ---- What is measured, and the table ------------------------------------ */
static const struct measure {
    const char *part;
    void (*run)(struct program *p, struct scenario sc, double *v);
    struct scenario sc;
    const char *titles[VALUES]; /* of the values */
    bool chats;                 /* others cannot do that */
} measures[] = {
    { "loads", measure_load, { 1000, 1, 1, 32, "/", 0 },
      { "1,000 clients, 1 sender, window 1, 32 bytes" }, false },
    { "loads", measure_load, { 1000, 1, 64, 32, "/", 0 },
      { "1,000 clients, 1 sender, window 64, 32 bytes" }, false },
    { "loads", measure_load, { 200, 200, 1, 32, "/", 0 },
      { "200 clients, 200 senders, window 1, 32 bytes" }, false },
    { "loads", measure_load, { 200, 20, 1, 512, "/", 0 },
      { "200 clients, 20 senders, window 1, 512 bytes" }, false },
    { "joins", measure_joins, { 2000, 0, 1, 32, "/", 0 },
      { "handshakes a CPU second", "an idle client, bytes of memory",
        "the idle process, MiB of memory" }, false },
    { "bus", measure_bus, { 2, 1, 1024, 32, "/", 0 },
      { "from instance to instance, messages a second" }, true },
    { "channels", measure_channels, { 10000, 1, 4, 32, "/?channel=big", 0 },
      { "a small channel beside 10,000 in motion: p50, ms",
        "the same: p99, ms" }, true },
};
enum { MEASURES = sizeof measures / sizeof *measures, LOADS = 4 };

#define PEERS "build/peers/node_modules/"
static struct program servers[SERVERS_MAX] = {
    { "chat", CHAT, "./chat", "#2f81f7", NULL },
    { "floor", FLOOR, NULL, NULL, NULL },
    { "Bun", PEER, PEERS ".bin/bun test/peers/bun.js", "#e0742c", PEERS "bun" },
    { "ws", PEER, "node test/peers/ws.js", "#a371f7", PEERS "ws" },
    { "Deno", PEER, PEERS ".bin/deno run --no-config --allow-net "
      "test/peers/deno.js", "#2da44e", PEERS "deno" },
};
static int server_count = 5, rounds = 5;
static char **parts; /* to measure, up to NULL; none: all */
static double (*figures)[VALUES][SERVERS_MAX][ROUNDS_MAX]; /* by measure */

static bool takes_part(int server, int measure) {
    const struct measure *m = &measures[measure];
    bool asked = !*parts;
    for (char **part = parts; *part; part++) asked |= !strcmp(*part, m->part);
    return asked && (servers[server].kind == CHAT || !m->chats);
}

/* One run, in a process of its own that leaves nothing behind. */
static void run(int measure, int server, int round) {
    const struct measure *m = &measures[measure];
    int status;
    pid_t pid = must(fork(), "fork");
    if (pid == 0) {
        double values[VALUES] = { 0 };
        alarm(PATIENCE);
        pin(true);
        m->run(&servers[server], m->sc, values);
        for (int v = 0; v < VALUES; v++)
            figures[measure][v][server][round] = values[v];
        _exit(0);
    }
    waitpid(pid, &status, 0);
    if (status) errx(1, "FAILED: %s: %s", servers[server].name, m->titles[0]);
}

static double median(int measure, int value, int server) {
    double *all = figures[measure][value][server];
    qsort(all, (size_t)rounds, sizeof *all, compare);
    return (all[(rounds - 1) / 2] + all[rounds / 2]) / 2;
}

/* Three digits of a number, or so: 1.25, 170, 359k, 24.5M. */
static const char *human(double value) {
    static char texts[4][32];
    static int turn;
    const char *unit = value >= 1e6 ? "M" : value >= 1e3 ? "k" : "";
    char *text = texts[turn++ % 4];
    if (*unit) value /= *unit == 'M' ? 1e6 : 1e3;
    snprintf(text, sizeof texts[0], "%.*f%s",
             value < 10 ? 2 : value < 100 ? 1 : 0, value, unit);
    return text;
}

/* A line of the table for each value; the rounds' range goes to stderr. */
static void table_lines(int k) {
    for (int v = 0; v < VALUES && measures[k].titles[v]; v++) {
        double ours = median(k, v, 0);
        printf("| %s |", measures[k].titles[v]);
        for (int s = 0; s < server_count; s++) {
            double other = median(k, v, s), *all = figures[k][v][s];
            if (!takes_part(s, k)) {
                printf(" - |");
                continue;
            }
            printf(s ? " %s (%s) |" : " %s |", human(other),
                   human(ours / other));
            fprintf(stderr, "%s %s to %s; ", servers[s].name, human(all[0]),
                    human(all[rounds - 1]));
        }
        printf("\n");
    }
}

static void table_head(void) {
    if (system("echo $(sed -n '0,/^model name/s/^model name.*: //p' "
               "/proc/cpuinfo), $(nproc) cores, Linux $(uname -r),"
               " $(date +%F)."))
        errx(1, "which machine is this?");
    printf("Medians of %d rounds; in brackets, the chat's figure divided by "
           "this one.\n\n| deliveries a CPU second, and other figures |",
           rounds);
    for (int s = 0; s < server_count; s++) printf(" %s |", servers[s].name);
    printf("\n|---|");
    for (int s = 0; s < server_count; s++) printf("--:|");
    printf("\n");
}

/* ---- The plot: bars, on a card that is light or dark, as the reader is -- */
enum { LEFT = 66, FULL = 480 /* the floor's bar */, BAR_MOST = 560 };
static const char plot_head[] =
    "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"680\" height=\"%d\">\n"
    "<style>text { font: 12px sans-serif; fill: #1f2328 }\n"
    ".card { fill: #fff } @media (prefers-color-scheme: dark) {\n"
    "text { fill: #e6edf3 } .card { fill: #12161c } }</style>\n"
    "<rect class=\"card\" width=\"680\" height=\"%d\" rx=\"8\"/>\n"
    "<text x=\"16\" y=\"24\" style=\"font-weight:600\">Deliveries a second of "
    "the server's CPU</text>\n<text x=\"%d\" y=\"24\" text-anchor=\"middle\">floor"
    "</text>\n<path stroke=\"#808890\" d=\"M%d 32V%d\"/>\n";
static const char plot_bar[] =
    "<text x=\"%d\" y=\"%d\" text-anchor=\"end\">%s</text>"
    "<rect x=\"%d\" y=\"%d\" width=\"%d\" height=\"11\" rx=\"2\" "
    "fill=\"%s\"/><text x=\"%d\" y=\"%d\">%.*f</text>\n";

static void plot(FILE *out) {
    int y = 36, height = y + LOADS * (28 + 15 * (server_count - 1)) + 6;
    fprintf(out, plot_head, height, height, LEFT + FULL, LEFT + FULL,
            height - 10);
    for (int k = 0; k < LOADS; k++, y += 13) {
        y += 15;
        fprintf(out, "<text x=\"16\" y=\"%d\">%s</text>\n", y,
                measures[k].titles[0]);
        for (int s = 0; s < server_count; s++) {
            double ratio = median(k, 0, s) / median(k, 0, 1 /* the floor */);
            int width = 1 + (int)(ratio * FULL);
            if (servers[s].kind == FLOOR) continue;
            if (width > BAR_MOST) width = BAR_MOST;
            y += 15;
            fprintf(out, plot_bar, LEFT - 8, y, servers[s].name, LEFT, y - 9,
                    width, servers[s].color, LEFT + width + 6, y,
                    ratio < 0.1 ? 3 : 2, ratio);
        }
    }
    fprintf(out, "</svg>\n");
}

/* ---- Options and main ---------------------------------------------------- */
/* Another chat: NAME=COMMAND. */
static void server_add(char *text) {
    char *command = strchr(text, '=');
    if (!command || server_count == SERVERS_MAX) errx(2, "-s %s", text);
    *command++ = '\0';
    servers[server_count++] =
        (struct program){ text, CHAT, command, "#8b949e", NULL };
}

/* Takes out those whose files are not there. */
static void servers_check(void) {
    for (int s = server_count; s-- > 0;) {
        if (!servers[s].needs || !access(servers[s].needs, F_OK)) continue;
        warnx("skipped: %s: see make peers", servers[s].name);
        memmove(&servers[s], &servers[s + 1],
                (size_t)(--server_count - s) * sizeof *servers);
    }
}

int main(int argc, char **argv) {
    struct rlimit files;
    FILE *svg = NULL;
    if (getenv("CHAT")) servers[0].command = getenv("CHAT");
    for (int c; (c = getopt(argc, argv, "n:t:s:p:")) != -1;) {
        if (c == '?') return 2;
        if (c == 'n') rounds = atoi(optarg);
        if (c == 't') run_time = (int64_t)(atof(optarg) * 1e9);
        if (c == 's') server_add(optarg);
        if (c == 'p') svg = fopen(optarg, "w");
        if (c == 'p' && !svg) err(1, "%s", optarg);
    }
    if (rounds < 1 || rounds > ROUNDS_MAX) errx(2, "-n: 1 to %d", ROUNDS_MAX);
    parts = argv + optind;
    for (char **part = parts; *part; part++)
        if (!strstr("loads joins bus channels", *part)) errx(2, "%s?", *part);
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    figures = mmap(NULL, MEASURES * sizeof *figures, PROT_READ | PROT_WRITE,
                   MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (figures == MAP_FAILED) err(1, "mmap");
    setvbuf(stdout, NULL, _IOLBF, 0);
    servers_check();
    table_head();
    for (int k = 0; k < MEASURES; k++) {
        if (!takes_part(0, k)) continue;
        fprintf(stderr, "\n%s: ", measures[k].titles[0]);
        if ((rlim_t)measures[k].sc.clients + 64 > files.rlim_cur)
            errx(1, "ulimit -n is %d", (int)files.rlim_cur);
        for (int i = 0; i < rounds * server_count; i++) {
            int round = i / server_count, s = i % server_count;
            if (round % 2) s = server_count - 1 - s;
            if (takes_part(s, k)) run(k, s, round);
        }
        table_lines(k);
    }
    if (svg && takes_part(0, 0)) plot(svg);
    return 0;
}
