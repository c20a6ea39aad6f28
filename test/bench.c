/* SPDX-License-Identifier: MIT
 *
 * bench.c: what the chat can do, beside other servers in the same run.
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
 * Servers take turns, A B C, C B A and so on, so that whatever else the
 * machine does hits all of them; ratios are taken a round at a time.
 *
 * The *floor* is the least that any server has to do: a fixed answer to the
 * handshake, masks off, new frames, one send() a client and round; no checks,
 * no history, no timeouts. The *peers* are what "make peers" installs.
 *
 *   bench [-n ROUNDS] [-t SECONDS] [-s NAME=COMMAND]... [-p FILE] [PART]...
 *
 * prints a table in Markdown, and on stderr how much the rounds differ. It does
 * 5 rounds of 0.5 s. -s: another chat, such as "old=/tmp/old/chat". -p: a plot
 * of the loads, as SVG, into this file. PART is loads, joins, bus or channels;
 * all of them if there is none. $CHAT is what it is all about (./chat).
 */
#pragma GCC diagnostic ignored "-Wunused-function" /* of what is in there */
#include "harness.h"
#include <err.h>
#include <sched.h>
#include <sys/epoll.h>

#define WARM_UP     0.2 /* seconds, as all times are */
#define PATIENCE    60  /* who needs more for a run hangs */
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
static const char agreed[] =
    "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n"
    "Connection: Upgrade\r\nSec-WebSocket-Accept: " WS_ACCEPT "\r\n\r\n";

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
static struct {
    int talked[1 << 16]; /* by descriptor: in which round; 0: it is no client */
    int end, round;      /* of the descriptors; the round that is now */
    uint8_t in[READ_SIZE], out[2 * READ_SIZE];
    size_t out_size;
} lobby = { .round = 2 };

/* Who talked is served first: so it can answer while the others get this
 * round's messages, and rounds are full. */
static void floor_flush(void) {
    for (int pass = 0; pass < 2 && lobby.out_size; pass++)
        for (int fd = 0; fd < lobby.end; fd++)
            if (lobby.talked[fd] && (lobby.talked[fd] < lobby.round) == pass)
                send_all(fd, lobby.out, lobby.out_size);
    lobby.out_size = 0;
    lobby.round++;
}

static void floor_read(int fd) {
    uint8_t *at = lobby.in;
    const uint8_t *end = at + receive(fd, at, sizeof lobby.in);
    if (*at == 'G') { /* of the handshake's GET */
        send_all(fd, agreed, sizeof agreed - 1);
        lobby.talked[fd] = 1; /* once */
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
    lobby.talked[fd] = lobby.round;
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
        for (int i = 0; i < n; i++) {
            if (events[i].data.fd != listener) {
                floor_read(events[i].data.fd);
                continue;
            }
            event.data.fd = must(accept(listener, NULL, NULL), "accept");
            epoll_ctl(epoll, EPOLL_CTL_ADD, event.data.fd, &event);
            lobby.end = event.data.fd + 1;
        }
    }
}

/* ---- A server: a process on one core that says where it is -------------- */
struct program {
    const char *name, *command; /* no command: the floor */
    bool chat;
    const char *color, *needs; /* without this file it does not take part */
};

static struct server program_start(const struct program *p, const char *bus,
                                   bool last_core) {
    struct server s = { 0 };
    int pipes[2];
    char line[1024], command[1024];
    snprintf(command, sizeof command, "exec %s%s%s", p->command,
             p->chat ? " -p 0 -q -b " : "", p->chat ? bus : "");
    must(pipe(pipes), "pipe");
    s.pid = must(fork(), "fork");
    if (s.pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        pin(last_core);
        dup2(pipes[1], 1);
        dup2(pipes[1], 2);
        if (!p->command) floor_run();
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
    return s;
}

/* The bytes of memory that are its own, without those of files. */
static double own_memory(const struct server *s) {
    char path[64];
    long all = 0, files = 0;
    snprintf(path, sizeof path, "/proc/%d/statm", s->pid);
    FILE *file = fopen(path, "r");
    if (!file || fscanf(file, "%*d %ld %ld", &all, &files) != 2) err(1, path);
    fclose(file);
    return (double)((all - files) * getpagesize());
}

/* ---- The load ----------------------------------------------------------- */
struct scenario {
    int clients, senders;
    uint32_t window;
    size_t size; /* of a message */
    const char *path;
    double rate; /* if not 0, the only sender does not wait for what comes
                  * back: its message k is due k / rate after the start */
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
    double start;
    uint64_t sent, delivered; /* messages; to one client each */
    double *late;             /* each delivery; NULL: that does not matter */
};

/* Sends what a sender's window has room for, with one call. The stamp is
 * sender and number, six bits to a letter, since a message is text. */
static void client_send(struct load *l, int i) {
    static uint8_t frames[READ_SIZE];
    struct client *c = &l->clients[i];
    uint8_t *at = frames;
    for (; c->next - c->back < l->sc.window; at += l->our_size, l->sent++) {
        uint64_t stamp = (uint64_t)i << 30 | c->next++;
        memcpy(at, l->ours, l->our_size);
        for (int j = STAMP; j-- > 0; stamp >>= 6)
            at[l->our_size - l->sc.size + j] = '0' + (stamp & 63);
    }
    if (at > frames) send_all(c->fd, frames, (size_t)(at - frames));
}

/* When the first sender's message n is due, at a rate. */
static double load_due(const struct load *l, uint32_t n) {
    return l->start + n / l->sc.rate;
}

/* Reads once. Are these the right messages, and how late are they? */
static void client_read(struct load *l, int i) {
    static uint8_t in[READ_SIZE];
    struct client *c = &l->clients[i];
    uint8_t *at = in;
    size_t left = c->rest_size, size = l->their_size;
    memcpy(in, c->rest, left);
    left += receive(c->fd, in + left, sizeof in - left);
    for (double time = now(); left >= size; at += size, left -= size) {
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
        if (l->late) l->late[l->delivered] = time - load_due(l, n);
        l->delivered++;
        if (i == sender && l->sc.rate == 0) c->back++;
    }
    memcpy(c->rest, at, left);
    c->rest_size = left;
    if (i < l->sc.senders && l->sending) client_send(l, i);
}

/* Sends for so long, and then waits until every client has everything. */
static void load_talk(struct load *l, double time) {
    struct epoll_event events[EVENTS];
    uint64_t all = (uint64_t)l->sc.clients;
    l->start = now();
    l->sending = true;
    for (int i = 0; i < l->sc.senders; i++) client_send(l, i);
    while (l->sending || l->delivered < l->sent * all) {
        double wait = 0.001;
        while (l->sending && l->sc.rate > 0) {
            wait = load_due(l, l->clients[0].next) - now();
            if (wait > 0) break;
            l->clients[0].back++;
            client_send(l, 0);
        }
        struct timespec timeout = { 0, (long)(wait * 1e9) };
        int n = epoll_pwait2(l->epoll, events, EVENTS, &timeout, NULL);
        for (int i = 0; i < n; i++) client_read(l, (int)events[i].data.u32);
        l->sending = now() < l->start + time;
    }
}

/* Opens all connections, 64 at a time, and shakes hands. The first is to
 * another port. */
static struct load *load_connect(struct scenario sc, int first, int port) {
    struct load *l = calloc(1, sizeof *l);
    struct peer *links[64];
    l->sc = sc;
    l->clients = calloc((size_t)sc.clients, sizeof *l->clients);
    l->our_size = frame_header(l->ours, sc.size, 0x80) + 4 + sc.size;
    l->their_size = frame_header(l->theirs, sc.size, 0) + sc.size;
    memset(l->ours + l->our_size - sc.size + STAMP, 'x', sc.size - STAMP);
    memset(l->theirs + l->their_size - sc.size + STAMP, 'x', sc.size - STAMP);
    l->epoll = must(epoll_create1(0), "epoll_create1");
    for (int i = 0, done = 0; i < sc.clients; i++) {
        struct client *c = &l->clients[i];
        struct epoll_event event = { EPOLLIN, { .u32 = (uint32_t)i } };
        links[i % 64] = peer_open(i == 0 ? first : port);
        ws_ask(links[i % 64], sc.path);
        c->expected = calloc((size_t)sc.senders, sizeof(uint32_t));
        c->fd = links[i % 64]->fd;
        must(fcntl(c->fd, F_SETFL, 0 /* it blocks */), "fcntl");
        must(epoll_ctl(l->epoll, EPOLL_CTL_ADD, c->fd, &event), "epoll_ctl");
        for (; done <= i && (i % 64 == 63 || i == sc.clients - 1); done++) {
            ws_opened(links[done % 64]);
            free(links[done % 64]->in);
        }
    }
    if (test.why[0]) errx(1, "%s", test.why);
    return l;
}

/* ---- Measuring: a run each, a new server and its clients ---------------- */
static double run_time = 0.5;

/* Deliveries a second of the server's CPU. */
static void measure_load(struct server *s, struct scenario sc, double *v) {
    struct load *l = load_connect(sc, s->port, s->port);
    load_talk(l, WARM_UP);
    uint64_t before = l->delivered;
    double cpu = server_cpu(s);
    load_talk(l, run_time);
    v[0] = (double)(l->delivered - before) / (server_cpu(s) - cpu);
}

/* Handshakes a second of CPU, bytes of memory that an idle client takes, and
 * megabytes that the idle process took before. */
static void measure_joins(struct server *s, struct scenario sc, double *v) {
    v[2] = server_memory(s);
    double memory = own_memory(s), cpu = server_cpu(s);
    load_connect(sc, s->port, s->port);
    v[0] = sc.clients / (server_cpu(s) - cpu);
    v[1] = (own_memory(s) - memory) / sc.clients;
}

/* Messages a second, on the clock, of a client of one instance and one of
 * another, to both. */
static void measure_bus(struct server *s, struct scenario sc, double *v) {
    struct load *l = load_connect(sc, s[0].port, s[1].port);
    load_talk(l, WARM_UP);
    uint64_t before = l->sent;
    load_talk(l, run_time);
    v[0] = (double)(l->sent - before) / (now() - l->start);
}

/* Milliseconds until ten clients in a channel of their own have a message, in
 * 99 % of all cases, while the scenario's are busy in theirs.
 * Each load is a process; the small one goes first when it has to do. */
static void measure_channels(struct server *s, struct scenario sc, double *v) {
    struct scenario small = { 10, 1, 1, 32, "/?channel=small", 200 };
    struct sched_param first = { 1 };
    struct load *l = load_connect(sc, s->port, s->port);
    int status;
    pid_t pid = must(fork(), "fork");
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        load_talk(l, PATIENCE);
    }
    sched_setscheduler(0, SCHED_FIFO, &first); /* best effort */
    prctl(PR_SET_TIMERSLACK, 1);               /* wake when told */
    l = load_connect(small, s->port, s->port);
    double time = run_time + 2; /* p99 needs many */
    l->late = calloc((size_t)(time + 1) * 200 * 10, sizeof(double));
    load_talk(l, time);
    kill(pid, SIGKILL);
    waitpid(pid, &status, 0);
    if (WIFEXITED(status)) exit(1); /* it said why */
    qsort(l->late, l->delivered, sizeof(double), compare);
    v[0] = l->late[l->delivered * 99 / 100] * 1e3;
}

/* ---- What is measured, and the table ------------------------------------ */
static const struct measure {
    const char *part;
    void (*run)(struct server *s, struct scenario sc, double *v);
    int chats; /* how many run at once; 0: not of chats alone, and one */
    struct scenario sc;
    const char *titles[VALUES]; /* of the values */
} measures[] = {
    { "loads", measure_load, 0, { 1000, 1, 1, 32, "/", 0 },
      { "1,000 clients, 1 sender, window 1, 32 bytes" } },
    { "loads", measure_load, 0, { 1000, 1, 64, 32, "/", 0 },
      { "1,000 clients, 1 sender, window 64, 32 bytes" } },
    { "loads", measure_load, 0, { 200, 200, 1, 32, "/", 0 },
      { "200 clients, 200 senders, window 1, 32 bytes" } },
    { "loads", measure_load, 0, { 200, 20, 1, 512, "/", 0 },
      { "200 clients, 20 senders, window 1, 512 bytes" } },
    { "joins", measure_joins, 0, { 2000, 0, 1, 32, "/", 0 },
      { "handshakes a CPU second", "an idle client, bytes of memory",
        "the idle process, MiB of memory" } },
    { "bus", measure_bus, 2, { 2, 2, 1024, 32, "/", 0 },
      { "messages a second between two instances" } },
    { "channels", measure_channels, 1, { 10000, 1, 4, 32, "/?channel=big", 0 },
      { "a small channel beside 10,000 in motion: p99, ms" } },
};
enum { LOADS = 4, FLOOR = 1 };

#define PEERS "build/peers/node_modules/"
static const struct program known[] = {
    { "chat", "./chat", true, "#2f81f7", NULL },
    { "floor", NULL, false, NULL, NULL },
    { "Bun", PEERS ".bin/bun test/peers/bun.js", false, "#e0742c", PEERS "bun" },
    { "ws", "node test/peers/ws.js", false, "#a371f7", PEERS "ws" },
    { "Deno", PEERS ".bin/deno run --no-config --allow-net test/peers/deno.js",
      false, "#2da44e", PEERS "deno" },
};
static struct program servers[SERVERS_MAX]; /* the first two are as there */
static int server_count, rounds = 5;
static double (*figures)[VALUES][SERVERS_MAX][ROUNDS_MAX]; /* by measure */

static void server_add(struct program p) {
    if (server_count == SERVERS_MAX) errx(2, "too many servers");
    if (!p.needs || !access(p.needs, F_OK)) servers[server_count++] = p;
    else warnx("skipped: %s: see make peers", p.name);
}

/* One run, in a process of its own that leaves nothing behind. */
static void run(const struct measure *m, int server, int round) {
    int status;
    pid_t pid = must(fork(), "fork");
    if (pid == 0) {
        struct server s[2];
        double values[VALUES] = { 0 };
        char bus[64] = "none";
        if (m->chats > 1) /* one that nobody else uses */
            sprintf(bus, "239.255.80.80:%d", 10000 + getpid() % 20000);
        alarm(PATIENCE);
        pin(true);
        for (int i = 0; i < 1 || i < m->chats; i++)
            s[i] = program_start(&servers[server], bus, i > 0);
        m->run(s, m->sc, values);
        for (int v = 0; v < VALUES; v++)
            figures[m - measures][v][server][round] = values[v];
        for (int i = 0; i < 1 || i < m->chats; i++) kill(s[i].pid, SIGKILL);
        while (wait(NULL) > 0) {}
        _exit(0);
    }
    waitpid(pid, &status, 0);
    if (status) errx(1, "FAILED: %s: %s", servers[server].name, m->titles[0]);
}

/* Of a server's figures in all rounds; `by`: of the chat's divided by them, a
 * round at a time, since within one the machine changes least. */
static double median(int measure, int value, int server, bool by) {
    double(*of)[ROUNDS_MAX] = figures[measure][value], all[ROUNDS_MAX];
    for (int i = 0; i < rounds; i++)
        all[i] = by ? of[0][i] / of[server][i] : of[server][i];
    qsort(all, (size_t)rounds, sizeof *all, compare);
    return (all[(rounds - 1) / 2] + all[rounds / 2]) / 2;
}

/* Three digits of a number, or so: 1.25, 170, 359k, 24.5M. */
static const char *human(double value) {
    char *text; /* not freed: there are few */
    const char *unit = value >= 1e6 ? "M" : value >= 1e3 ? "k" : "";
    if (*unit) value /= *unit == 'M' ? 1e6 : 1e3;
    int digits = value < 10 ? 2 : value < 100 ? 1 : 0;
    must(asprintf(&text, "%.*f%s", digits, value, unit), "asprintf");
    return text;
}

/* A line of the table for each value; the rounds' range goes to stderr. */
static void table_lines(int k) {
    for (int v = 0; v < VALUES && measures[k].titles[v]; v++) {
        printf("| %s |", measures[k].titles[v]);
        for (int s = 0; s < server_count; s++) {
            double other = median(k, v, s, false);
            if (other == 0) { /* it did not take part */
                printf(" - |");
                continue;
            }
            printf(s ? " %s (%s) |" : " %s |", human(other),
                   human(median(k, v, s, true)));
            fprintf(stderr, "%s ", servers[s].name);
            for (int i = 0; i < rounds; i++)
                fprintf(stderr, "%s ", human(figures[k][v][s][i]));
        }
        printf("\n");
    }
}

static void table_head(void) {
    must(system("echo $(sed -n '0,/^model name/s/^model name.*: //p' "
                "/proc/cpuinfo), $(nproc) cores, Linux $(uname -r),"
                " $(date +%F)."), "system");
    printf("Medians of %d rounds; in brackets, of the chat's figure divided by "
           "this one.\n\n| deliveries a CPU second, and other figures |",
           rounds);
    for (int s = 0; s < server_count; s++) printf(" %s |", servers[s].name);
    printf("\n|---|");
    for (int s = 0; s < server_count; s++) printf("--:|");
    printf("\n");
}

/* ---- The plot: bars, on a card that is light or dark, as the reader is --
 * They begin at x = 66, and the floor's would end at 546.
 */
static const char plot_head[] =
    "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"680\" height=\"%d\">\n"
    "<style>text { font: 12px sans-serif; fill: #1f2328 }\n"
    ".card { fill: #fff } @media (prefers-color-scheme: dark) {\n"
    "text { fill: #e6edf3 } .card { fill: #12161c } }</style>\n"
    "<rect class=\"card\" width=\"680\" height=\"%d\" rx=\"8\"/>\n"
    "<text x=\"16\" y=\"24\" style=\"font-weight:600\">Deliveries a second of "
    "the server's CPU</text>\n<text x=\"546\" y=\"24\" "
    "text-anchor=\"middle\">floor</text>\n"
    "<path stroke=\"#808890\" d=\"M546 32V%d\"/>\n";
static const char plot_bar[] =
    "<text x=\"58\" y=\"%d\" text-anchor=\"end\">%s</text>"
    "<rect x=\"66\" y=\"%d\" width=\"%d\" height=\"11\" rx=\"2\" "
    "fill=\"%s\"/><text x=\"%d\" y=\"%d\">%.*f</text>\n";

static void plot(FILE *out) {
    int y = 36, height = y + LOADS * (28 + 15 * (server_count - 1)) + 6;
    fprintf(out, plot_head, height, height, height - 10);
    for (int k = 0; k < LOADS; k++, y += 13) {
        y += 15;
        fprintf(out, "<text x=\"16\" y=\"%d\">%s</text>\n", y,
                measures[k].titles[0]);
        for (int s = 0; s < server_count; s++) {
            double ratio = median(k, 0, FLOOR, true) / median(k, 0, s, true);
            int width = ratio > 1.16 ? 560 : 1 + (int)(ratio * 480);
            if (s == FLOOR) continue;
            y += 15;
            fprintf(out, plot_bar, y, servers[s].name, y - 9, width,
                    servers[s].color, 72 + width, y, ratio < 0.1 ? 3 : 2,
                    ratio);
        }
    }
    fprintf(out, "</svg>\n");
}

int main(int argc, char **argv) {
    FILE *svg = NULL;
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    signal(SIGPIPE, SIG_IGN);
    test.patience = 10;
    for (size_t i = 0; i < COUNT(known); i++) server_add(known[i]);
    if (getenv("CHAT")) servers[0].command = getenv("CHAT");
    for (int c; (c = getopt(argc, argv, "n:t:s:p:")) != -1;) {
        const char *name = c == 's' ? strsep(&optarg, "=") : "";
        if (c == '?' || !optarg) return 2;
        if (c == 'n') rounds = atoi(optarg);
        if (c == 't') run_time = atof(optarg);
        if (c == 's')
            server_add((struct program){ name, optarg, true, "#8b949e", NULL });
        if (c == 'p' && !(svg = fopen(optarg, "w"))) err(1, "%s", optarg);
    }
    if (rounds < 1 || rounds > ROUNDS_MAX) errx(2, "-n: 1 to %d", ROUNDS_MAX);
    figures = mmap(NULL, COUNT(measures) * sizeof *figures,
                   PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    setvbuf(stdout, NULL, _IOLBF, 0);
    table_head();
    for (int k = 0; k < (int)COUNT(measures); k++) {
        const struct measure *m = &measures[k];
        bool asked = optind == argc;
        for (int i = optind; i < argc; i++) asked |= !strcmp(argv[i], m->part);
        if (!asked) continue;
        fprintf(stderr, "\n%s: ", m->titles[0]);
        for (int i = 0; i < rounds * server_count; i++) {
            int round = i / server_count, s = i % server_count;
            if (round % 2) s = server_count - 1 - s;
            if (servers[s].chat || !m->chats) run(m, s, round);
        }
        table_lines(k);
    }
    if (svg && median(0, 0, FLOOR, false) > 0) plot(svg);
    return 0;
}
