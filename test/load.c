/* SPDX-License-Identifier: MIT
 *
 * load.c: the program under load, and where something runs out: descriptors,
 * patience, room, channels. Each case shows what it measured behind its name.
 * Times are told, not judged; what is judged is that the right ones are cut
 * off, that nobody else loses anything, that memory stays bounded, and that
 * nothing spins or hangs.
 *
 *   build/load [PART]...     all parts, or only these
 *   LONG=1                   the flood takes 30 s in place of 3
 */
#include "harness.h"
#include <sys/epoll.h>

#define COUNT(array) (sizeof(array) / sizeof *(array))

/* ---- What is measured -------------------------------------------------- */

/* Adds a figure to the name of the case that runs. */
__attribute__((format(printf, 1, 2))) static void measured(const char *format,
                                                           ...) {
    size_t n = strlen(test.name);
    va_list list;

    va_start(list, format);
    vsnprintf(test.name + n, sizeof test.name - n, format, list);
    va_end(list);
}

/* The processor time that a process has used, in seconds. */
static double cpu_time(pid_t pid) {
    struct timespec t = { 0 };
    clockid_t clock;

    if (clock_getcpuclockid(pid, &clock) == 0) clock_gettime(clock, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

/* What a process has in memory, in MiB. */
static double memory(pid_t pid) {
    char path[40];
    long pages = 0;
    FILE *file;

    snprintf(path, sizeof path, "/proc/%d/statm", (int)pid);
    file = fopen(path, "re");
    if (!file || fscanf(file, "%*d %ld", &pages) != 1) pages = 0;
    if (file) fclose(file);
    expect(pages > 0, "no memory in %s", path);
    return (double)pages * (double)sysconf(_SC_PAGESIZE) / (1 << 20);
}

/* Shows how much more the server has in memory than before, which may not be
 * more than `most` MiB. */
static void expect_memory(const struct server *s, double before, double most) {
    double grown = memory(s->pid) - before;

    measured(", memory %+.1f MiB", grown);
    expect(grown < most, "%.1f MiB became %.1f", before, before + grown);
}

/* Latencies, in memory that a process shares with those it forks. */
struct meter {
    size_t count;
    double at[1 << 20]; /* seconds; those beyond are not kept */
};

static void *shared_memory(size_t size) {
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE,
                        MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (memory == MAP_FAILED) {
        perror("mmap");
        exit(1);
    }
    return memory;
}

static void meter_add(struct meter *m, double seconds) {
    if (m->count < COUNT(m->at)) m->at[m->count++] = seconds;
}

static int compare(const void *a, const void *b) {
    const double *x = a, *y = b;

    return (*x > *y) - (*x < *y);
}

/* Shows a meter's percentiles under a name; returns the largest. */
static double measured_times(const char *name, struct meter *m) {
    size_t last = m->count - 1;

    if (!expect(m->count > 0, "nothing measured: %s", name)) return 0;
    qsort(m->at, m->count, sizeof *m->at, compare);
    measured(", %s p50 %.2g ms p99 %.3g ms max %.3g ms", name,
             m->at[last / 2] * 1000, m->at[last * 99 / 100] * 1000,
             m->at[last] * 1000);
    return m->at[last];
}

/* ---- Who talks and listens --------------------------------------------- */

/* What a message begins with, before its filling. */
struct message {
    uint16_t sender, last; /* who, and whether it is its last one */
    uint32_t number;       /* counts up from 0 */
    double time;           /* when it was sent */
};

enum { ORDINARY = 10, FLOOD, SENDERS }; /* and the members 0 to 9 */

/* One that takes part in a chat. */
struct member {
    struct peer *peer;
    uint32_t next[SENDERS]; /* the number that comes next, by sender */
    bool ended[SENDERS];    /* that was its last */
    uint32_t heard;         /* messages in all, but for a flood's */
};

static size_t message_encode(unsigned char *to, struct message m,
                             size_t filling) {
    char bytes[4096] = { 0 };

    m.time = now();
    memcpy(bytes, &m, sizeof m);
    return ws_encode(to, BINARY, true, 0, bytes, sizeof m + filling);
}

static void say(struct peer *p, struct message m, size_t filling) {
    unsigned char bytes[4096];

    expect(peer_send(p, bytes, message_encode(bytes, m, filling)),
           "message %u could not be sent", m.number);
}

/* One that talks more than may be taken at once. */
struct talker {
    unsigned char bytes[64 * 1100]; /* encoded, not sent yet: [start, end) */
    size_t start, end;
};

/* Has it room for another message of up to 1,000 bytes? Not as long as some
 * of the last ones are not sent. */
static bool talker_room(const struct talker *t) {
    return t->start == 0 && t->end + 1100 <= sizeof t->bytes;
}

static void talker_add(struct talker *t, struct message m, size_t filling) {
    t->end += message_encode(t->bytes + t->end, m, filling);
}

/* Sends what is taken without waiting. */
static void talker_send(struct talker *t, int fd) {
    ssize_t n = send(fd, t->bytes + t->start, t->end - t->start, MSG_NOSIGNAL);

    if (n > 0) t->start += (size_t)n;
    else expect(errno == EAGAIN, "send: %s", strerror(errno));
    if (t->start == t->end) t->start = t->end = 0;
}

/* Takes what has come: of no sender a message is missing, double or swapped.
 * All are timed but for a flood's. */
static void hear(struct member *m, struct meter *late) {
    struct message got;
    struct frame f;

    peer_take(m->peer);
    while (ws_take(m->peer, &f)) {
        if (f.first == PING) continue;
        if (!expect(f.first == BINARY && f.length >= sizeof got,
                    "frame %02x of %zu bytes", (unsigned)f.first, f.length))
            return;
        memcpy(&got, f.data, sizeof got);
        expect(got.sender < SENDERS && got.number == m->next[got.sender],
               "sender %u, number %u, expected %u", got.sender, got.number,
               m->next[got.sender % SENDERS]);
        m->next[got.sender % SENDERS] = got.number + 1;
        m->ended[got.sender % SENDERS] = got.last;
        if (got.sender == FLOOD) continue;
        m->heard++;
        if (late) meter_add(late, now() - got.time);
    }
    expect(!m->peer->ended, "one that reads was cut off after %u and %u",
           m->heard, m->next[FLOOD]);
}

/* Waits for what comes to any of them, at most so long. */
static void hear_all(struct member *m, int count, int wait_ms,
                     struct meter *late) {
    struct pollfd fds[64];

    for (int i = 0; i < count; i++)
        fds[i] = (struct pollfd){ .fd = m[i].peer->fd, .events = POLLIN };
    if (poll(fds, (nfds_t)count, wait_ms) > 0)
        for (int i = 0; i < count; i++)
            if (fds[i].revents) hear(&m[i], late);
}

/* Until all of them have heard so many. */
static void hear_until(struct member *m, int count, uint32_t number,
                       struct meter *late) {
    double until = deadline();

    for (int i = 0; i < count; i++)
        while (m[i].heard < number && now() < until && !test.why[0])
            hear_all(m, count, 100, late);
    for (int i = 0; i < count; i++)
        expect(m[i].heard == number, "member %d heard %u of %u", i, m[i].heard,
               number);
}

static void members_open(struct member *m, int count, int port,
                         const char *target) {
    memset(m, 0, (size_t)count * sizeof *m);
    for (int i = 0; i < count; i++) m[i].peer = ws_open(port, target);
}

static void members_close(struct member *m, int count) {
    for (int i = 0; i < count; i++) peer_close(m[i].peer);
}

/* A client that takes in as little as can be before it stops. */
static struct peer *open_narrow(int port) {
    struct sockaddr_in to = { .sin_family = AF_INET,
                              .sin_port = htons((uint16_t)port),
                              .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };

    return peer_connect(&to, sizeof to, 4096);
}

static int64_t descriptors_raise(void) {
    struct rlimit limit;

    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    return limit.rlim_cur > INT32_MAX ? INT32_MAX : (int64_t)limit.rlim_cur;
}

/* ---- Descriptors run out ----------------------------------------------- */

#define WAITING 20

/* Talks to the server for a second, while others wait to be let in: a server
 * that spins because of them uses a whole core. */
static void expect_calm(const struct server *s, struct peer *p) {
    struct meter *late = shared_memory(sizeof *late);
    double began = now(), before = cpu_time(s->pid), used, asked;

    while (now() < began + 1 && !test.why[0]) {
        asked = now();
        ws_text(p, "calm?");
        ws_expect_text(p, "calm?");
        meter_add(late, now() - asked);
        poll(NULL, 0, 20);
    }
    used = (cpu_time(s->pid) - before) / (now() - began);
    measured(": %.1f %% CPU", used * 100);
    measured_times("echo", late);
    expect(used < 0.1, "%.0f %% CPU", used * 100);
    munmap(late, sizeof *late);
}

static void ask_in(struct peer **waiting, int port) {
    for (int i = 0; i < WAITING; i++) {
        waiting[i] = peer_open(port);
        ws_ask(waiting[i], "/");
    }
}

/* The next one that waits comes in, and can talk. */
static void expect_in(struct peer *p) {
    ws_opened(p);
    ws_text(p, "in");
    ws_expect_text(p, "in");
}

/* As many clients as its limit at start allows: the others wait. */
static void full_at_start_test(void) {
    struct server s = { .descriptors = 64 };
    struct peer *p[32], *waiting[WAITING];
    double began;

    if (!START(&s, "-b", "none") || !server_answers(&s)) return;
    begin("64 descriptors: 32 clients in, %d wait", WAITING);
    for (int i = 0; i < 32; i++)
        p[i] = ws_open(s.port, i ? "/?channel=p" : "/");
    ask_in(waiting, s.port);
    expect_calm(&s, p[0]);
    for (int i = 0; i < WAITING; i++)
        expect(!wait_for(waiting[i]->fd, POLLIN, now()), "%d was let in", i);
    finish();
    begin("64 descriptors: as one leaves the next comes in");
    began = now();
    for (int i = 0; i < WAITING; i++) {
        peer_close(p[i]);
        expect_in(waiting[i]);
        peer_close(waiting[i]);
    }
    measured(", after %.1f ms", (now() - began) * 1000 / WAITING);
    for (int i = WAITING; i < 32; i++) peer_close(p[i]);
    finish();
    server_stop(&s, "64 descriptors");
}

static int descriptors_of(pid_t pid) {
    char path[64];
    int n = 0;

    for (struct stat st; n < 10000; n++) {
        snprintf(path, sizeof path, "/proc/%d/fd/%d", (int)pid, n);
        if (lstat(path, &st)) break;
    }
    return n;
}

static void set_descriptors(pid_t pid, rlim_t n) {
    struct rlimit limit;

    expect(!prlimit(pid, RLIMIT_NOFILE, NULL, &limit), "prlimit");
    limit.rlim_cur = n ? n : limit.rlim_max;
    expect(!prlimit(pid, RLIMIT_NOFILE, &limit, NULL), "prlimit");
}

static void expect_status(struct peer *p, const char *target, int status) {
    char request[200];
    struct response r;

    snprintf(request, sizeof request,
             "GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n", target);
    peer_text(p, request);
    read_response(p, false, &r);
    expect(r.status == status, "%s: status %d, expected %d", target, r.status,
           status);
}

/* The machine has fewer left than the server was promised: accept, open and
 * memfd_create fail. */
static void full_later_test(void) {
    struct server s = { 0 };
    struct peer *p, *leaver, *http, *waiting[WAITING];
    char folder[] = "/tmp/chat-load-XXXXXX", path[64];
    double began;
    int fd;

    if (!expect(mkdtemp(folder) != NULL, "mkdtemp")) return;
    snprintf(path, sizeof path, "%s/file", folder);
    fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
    expect(write(fd, "text", 4) == 4, "write");
    close(fd);
    if (!START(&s, "-b", "none", "-d", folder) || !server_answers(&s)) return;
    begin("no descriptor is left, %d wait", WAITING);
    p = ws_open(s.port, "/");
    http = peer_open(s.port);
    expect_status(http, "/file", 200);
    leaver = ws_open(s.port, "/?channel=other");
    set_descriptors(s.pid, (rlim_t)descriptors_of(s.pid));
    ask_in(waiting, s.port);
    expect_calm(&s, p);
    for (int i = 0; i < WAITING; i++)
        expect(!wait_for(waiting[i]->fd, POLLIN, now()), "%d was let in", i);
    finish();
    begin("no descriptor is left: files and new channels answer 503");
    expect_status(http, "/file", 503);
    expect_status(http, "/", 503);
    expect_status(http, "/send?channel=new&message=x", 503);
    expect_status(http, "/send?message=x", 200);
    ws_expect_text(p, "x");
    finish();
    begin("no descriptor is left: as one leaves the next comes in");
    began = now();
    peer_close(leaver);
    expect_in(waiting[0]);
    measured(", after %.0f ms", (now() - began) * 1000);
    expect(!wait_for(waiting[1]->fd, POLLIN, now()), "and another");
    expect_status(http, "/file", 503);
    finish();
    begin("descriptors come back: all come in, files are there");
    set_descriptors(s.pid, 0);
    began = now();
    for (int i = 1; i < WAITING; i++) ws_opened(waiting[i]);
    measured(", after %.0f ms", (now() - began) * 1000);
    expect_status(http, "/file", 200);
    expect_status(http, "/send?channel=new&message=x", 200);
    for (int i = 0; i < WAITING; i++) peer_close(waiting[i]);
    peer_close(http);
    peer_close(p);
    finish();
    server_stop(&s, "no descriptor is left");
    unlink(path);
    rmdir(folder);
}

static void descriptors_test(void) {
    full_at_start_test();
    full_later_test();
}

/* ---- Slow requests ----------------------------------------------------- */

/* One that sends a byte of its request now and then. */
struct slow {
    int fd; /* -1 when the server has closed it */
    double began, ended;
    char got[16]; /* the beginning of the answer */
    size_t length;
};

#define TRICKLE 2 /* seconds between two bytes */

static struct slow slow_open(int port) {
    struct sockaddr_in to = { .sin_family = AF_INET,
                              .sin_port = htons((uint16_t)port),
                              .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    struct slow one = { .began = now() };

    one.fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    expect(!connect(one.fd, (struct sockaddr *)&to, sizeof to) &&
               send(one.fd, "GET / HTTP/1.1\r\nX: ", 19, MSG_NOSIGNAL) == 19,
           "connect: %s", strerror(errno));
    fcntl(one.fd, F_SETFL, O_NONBLOCK);
    return one;
}

/* Takes what has come; closes at the end. */
static void slow_take(struct slow *one) {
    char bytes[1000];
    ssize_t n;

    while ((n = recv(one->fd, bytes, sizeof bytes, 0)) > 0)
        for (ssize_t i = 0; i < n && one->length < sizeof one->got - 1; i++)
            one->got[one->length++] = bytes[i];
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
    one->ended = now();
    close(one->fd);
    one->fd = -1;
}

/* Each sends a byte every TRICKLE seconds; returns who is next. */
static size_t trickle(struct slow *slow, size_t next, size_t count,
                      double seconds) {
    size_t n = (size_t)(seconds * (double)count / TRICKLE);

    for (; n > 0 && count > 0; n--, next++)
        if (slow[next % count].fd >= 0)
            send(slow[next % count].fd, "x", 1, MSG_NOSIGNAL);
    return next;
}

/* They connect, a few at a time, and trickle until they are closed, while the
 * members chat. Returns the number of messages. */
static uint32_t slow_and_chat(struct slow *slow, size_t count,
                              const struct server *s, struct meter *late) {
    struct member m[10];
    struct epoll_event events[256];
    int epoll = epoll_create1(EPOLL_CLOEXEC), n;
    size_t open = 0, ended = 0, next = 0;
    uint32_t number = 0;
    double until = now() + 20 + 2 * test.patience, trickled = now(), said = 0;
    double before = memory(s->pid), most = 0;

    members_open(m, 10, s->port, "/");
    while (ended < count && now() < until && !test.why[0]) {
        for (int i = 0; i < 50 && open < count; i++, open++) {
            struct epoll_event event = { EPOLLIN, { .u32 = (uint32_t)open } };

            slow[open] = slow_open(s->port);
            epoll_ctl(epoll, EPOLL_CTL_ADD, slow[open].fd, &event);
        }
        if (now() - said > 0.02) {
            struct message one = { .sender = number % 10,
                                   .number = number / 10 };

            say(m[number++ % 10].peer, one, 50);
            said = now();
        }
        if (now() - trickled > 0.1) {
            next = trickle(slow, next, open, now() - trickled);
            trickled = now();
            if (memory(s->pid) > most) most = memory(s->pid);
        }
        hear_all(m, 10, 2, late);
        n = epoll_wait(epoll, events, COUNT(events), 0);
        for (int i = 0; i < n; i++) {
            slow_take(&slow[events[i].data.u32]);
            ended += slow[events[i].data.u32].fd < 0;
        }
    }
    close(epoll);
    expect(ended == count, "%zu of %zu were closed in time", ended, count);
    hear_until(m, 10, number, late);
    members_close(m, 10);
    measured(", %.1f KiB each", (most - before) * 1024 / (double)count);
    expect(most - before < 60, "%.1f MiB became %.1f", before, most);
    return number;
}

static void slow_test(void) {
    static struct slow slow[5000];
    struct meter *late = shared_memory(sizeof *late);
    struct server s = { 0 };
    int64_t count = descriptors_raise() - 100;
    double first = 1e9, last = 0;
    uint32_t number;

    if (count > (int64_t)COUNT(slow)) count = COUNT(slow);
    if (!START(&s, "-b", "none") || !server_answers(&s)) return;
    begin("slow: %d requests that trickle%s", (int)count,
          count < (int64_t)COUNT(slow) ? " (RLIMIT_NOFILE allows no more)"
                                       : "");
    number = slow_and_chat(slow, (size_t)count, &s, late);
    measured("; meanwhile %u messages to 10 members", number);
    measured_times("latency", late);
    finish();
    begin("slow: each is answered 408 and closed");
    for (int64_t i = 0; i < count; i++) {
        double took = slow[i].ended - slow[i].began;

        expect(!strncmp(slow[i].got, "HTTP/1.1 408 ", 13), "%d got %s", (int)i,
               shown(slow[i].got, slow[i].length));
        if (took < first) first = took;
        if (took > last) last = took;
    }
    measured(", %.1f to %.1f s after it connected", first, last);
    expect(first > 9.5, "one after %.1f s", first);
    finish();
    server_stop(&s, "slow");
    munmap(late, sizeof *late);
}

/* ---- Readers that never read ------------------------------------------- */

#define DEAF 200 /* that never read, in each of two waves */

/* Ten members of a channel with deaf ones, and one elsewhere. */
struct chat {
    struct server server;
    struct member in[10], elsewhere;
    struct talker talker;
    uint32_t much, number; /* of messages so far ... */
    double much_due, due;  /* ... and when the next one's time has come */
    struct meter *late, *late_elsewhere;
};

static double slow_clients(const struct chat *c) {
    return metric(c->server.port, "chat_slow_clients_total");
}

/* Says what is due by time: 1,000 messages of 1 KiB a second (fewer if they
 * are not taken), and another member 100 small ones, as does the one
 * elsewhere. */
static void chat_turn(struct chat *c) {
    struct message much = { .sender = FLOOD }, next = { .sender = ORDINARY };

    for (; talker_room(&c->talker) && c->much_due <= now(); c->much++) {
        much.number = c->much;
        talker_add(&c->talker, much, 1000);
        c->much_due = now() > c->much_due + 1 ? now() : c->much_due + 0.001;
    }
    if (c->talker.end > 0) talker_send(&c->talker, c->in[0].peer->fd);
    for (; c->due <= now(); c->number++) {
        next.number = c->number;
        say(c->in[1].peer, next, 50);
        say(c->elsewhere.peer, next, 50);
        c->due = now() > c->due + 1 ? now() : c->due + 0.01;
    }
    hear_all(c->in, 10, 1, c->late);
    hear_all(&c->elsewhere, 1, 0, c->late_elsewhere);
}

/* Goes on until so many have been cut off in all; returns the seconds. */
static double chat_until(struct chat *c, double cut_off) {
    double began = now(), until = deadline() + 2, asked = began, cut = 0;

    while (cut < cut_off && now() < until && !test.why[0]) {
        chat_turn(c);
        if (now() < asked + 0.1) continue;
        asked = now();
        cut = slow_clients(c);
    }
    expect(cut == cut_off, "%g of %g were cut off", cut, cut_off);
    return now() - began;
}

/* Says no more, until all have heard all. */
static void chat_rest(struct chat *c) {
    double until = deadline();
    int left = 10;

    while (left > 0 && now() < until && !test.why[0]) {
        if (c->talker.end > 0) talker_send(&c->talker, c->in[0].peer->fd);
        hear_all(c->in, 10, 10, c->late);
        left = 0;
        for (int i = 0; i < 10; i++)
            left +=
                c->in[i].next[FLOOD] < c->much || c->in[i].heard < c->number;
    }
    expect(left == 0, "%d members did not hear all", left);
    hear_until(&c->elsewhere, 1, c->number, c->late_elsewhere);
    c->much_due = c->due = now();
}

static void deaf_open(struct peer **deaf, int port) {
    for (int i = 0; i < DEAF; i++) {
        deaf[i] = open_narrow(port);
        ws_ask(deaf[i], "/?channel=deaf");
        ws_opened(deaf[i]);
    }
}

/* Reads what one was sent before it was cut off; returns the bytes. */
static size_t deaf_end(struct peer *p) {
    size_t size = 0;
    double until = deadline();

    while (peer_more(p, until)) {
        size += p->end - p->start;
        p->start = p->end;
    }
    expect(p->ended, "not cut off");
    peer_close(p);
    return size;
}

static void deaf_waves(struct chat *c, struct peer **deaf) {
    double before = memory(c->server.pid), took = 0;
    size_t most = 0;

    for (int wave = 1; wave <= 2; wave++) {
        took += chat_until(c, wave * DEAF);
        /* Who reads is not to miss anything while we turn to the others. */
        chat_rest(c);
        for (int i = 0; i < DEAF; i++) {
            size_t size = deaf_end(deaf[i]);

            if (size > most) most = size;
        }
        if (wave == 1) deaf_open(deaf, c->server.port);
    }
    measured(" in %.1f s, each had %zu KiB at most", took, most >> 10);
    expect_memory(&c->server, before, 10);
    expect(slow_clients(c) == 2 * DEAF, "%g were counted", slow_clients(c));
}

static void deaf_test(void) {
    static struct chat c;
    struct peer *deaf[DEAF];
    double slowest;

    c.late = shared_memory(sizeof *c.late);
    c.late_elsewhere = shared_memory(sizeof *c.late);
    if (!START(&c.server, "-b", "none", "--metrics") ||
        !server_answers(&c.server))
        return;
    begin("deaf: who reads nothing stays as long as the log has it all");
    members_open(c.in, 10, c.server.port, "/?channel=deaf");
    members_open(&c.elsewhere, 1, c.server.port, "/?channel=elsewhere");
    deaf_open(deaf, c.server.port);
    c.much_due = c.due = now();
    while (c.much < 240) chat_turn(&c);
    chat_rest(&c);
    expect(slow_clients(&c) == 0, "cut off too soon");
    finish();
    begin("deaf: %d that never read, and as many again, are cut off", DEAF);
    deaf_waves(&c, deaf);
    finish();
    begin("deaf: 10 others hear %u messages, and %u from a third", c.much,
          c.number);
    slowest = measured_times("latency", c.late);
    expect(slowest < 1 + test.patience, "%.1f s", slowest);
    finish();
    begin("deaf: another channel's %u messages", c.number);
    slowest = measured_times("latency", c.late_elsewhere);
    expect(slowest < test.patience, "%.1f s", slowest);
    members_close(c.in, 10);
    members_close(&c.elsewhere, 1);
    finish();
    server_stop(&c.server, "deaf");
    munmap(c.late, sizeof *c.late);
    munmap(c.late_elsewhere, sizeof *c.late);
}

/* ---- A flood ----------------------------------------------------------- */

#define READERS 50
#define FILLING 84 /* so that a flood's message has 100 bytes */

/* What the processes of the flood tell each other. */
struct flood {
    int port;
    double seconds;
    char why[sizeof test.why]; /* the readers' or the flooder's failure */
    uint32_t flooded;          /* messages */
    double processor;          /* seconds that the readers used */
    struct meter late;         /* the ordinary sender's, at the readers */
};

static void flood_read(struct flood *f) {
    struct member m[READERS];
    double until = now() + f->seconds + 4 * test.patience;
    int left = READERS;

    members_open(m, READERS, f->port, "/");
    expect(write(1, "r", 1) == 1, "the readers could not report");
    while (left > 0 && now() < until && !test.why[0]) {
        hear_all(m, READERS, 100, &f->late);
        left = 0;
        for (int i = 0; i < READERS; i++)
            left += !m[i].ended[ORDINARY] || !m[i].ended[FLOOD];
    }
    expect(left == 0, "%d readers did not hear the end", left);
    f->processor = cpu_time(getpid());
}

static void flood_write(struct flood *f) {
    static struct talker t;
    struct member m;
    double begun, until;
    bool last = false;

    members_open(&m, 1, f->port, "/");
    expect(write(1, "r", 1) == 1, "the flooder could not report");
    begun = now();
    until = begun + f->seconds + 4 * test.patience;
    while (!m.ended[FLOOD] && now() < until && !test.why[0]) {
        struct pollfd fd = { .fd = m.peer->fd, .events = POLLIN };

        while (t.end < 64 * 100 && talker_room(&t) && !last) {
            last = now() > begun + f->seconds;
            talker_add(&t, (struct message){ FLOOD, last, f->flooded++, 0 },
                       FILLING);
        }
        if (t.end > 0) fd.events |= POLLOUT;
        poll(&fd, 1, 100);
        if (fd.revents & POLLOUT) talker_send(&t, fd.fd);
        if (fd.revents & ~POLLOUT) hear(&m, NULL);
    }
    expect(m.ended[FLOOD], "the flooder did not hear its end");
}

/* Runs one of the two in a process of its own, and waits until it is ready.
 * The descriptor returned ends when the process does. */
static int flood_begin(void (*run)(struct flood *), struct flood *f,
                       pid_t *pid) {
    int pipes[2];
    char ready;

    if (pipe2(pipes, O_CLOEXEC)) {
        perror("pipe");
        exit(1);
    }
    fflush(stdout);
    *pid = fork();
    if (*pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        dup2(pipes[1], 1);
        close(pipes[1]);
        run(f);
        if (test.why[0]) memcpy(f->why, test.why, sizeof f->why);
        _exit(0);
    }
    close(pipes[1]);
    expect(wait_for(pipes[0], POLLIN, deadline()) &&
               read(pipes[0], &ready, 1) == 1,
           "not ready: %s", f->why);
    return pipes[0];
}

static void flood_end(int fd, pid_t pid, double until) {
    expect(wait_for(fd, POLLIN, until), "still busy");
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
    close(fd);
}

/* The ordinary sender: a message each 10 ms, until the time is over. */
static void flood_chat(struct flood *f, struct member *m, struct meter *echo) {
    uint32_t number = 0;
    double began = now(), until = began + f->seconds + 4 * test.patience;
    bool last = false;

    while (!(m->ended[ORDINARY] && m->ended[FLOOD]) && now() < until &&
           !test.why[0]) {
        if (!last && now() > began + number * 0.01) {
            last = now() > began + f->seconds;
            say(m->peer, (struct message){ ORDINARY, last, number++, 0 }, 50);
        }
        hear_all(m, 1, last ? 100 : 5, echo);
    }
    expect(!f->why[0], "%s", f->why);
    expect(m->ended[ORDINARY] && m->ended[FLOOD], "the end was not heard");
}

static void flood_test(void) {
    struct flood *f = shared_memory(sizeof *f);
    struct meter *echo = shared_memory(sizeof *echo);
    struct server s = { 0 };
    struct member m;
    double before, began, used;
    pid_t readers, flooder;
    int read_end, write_end;

    if (!START(&s, "-b", "none", "--metrics") || !server_answers(&s)) return;
    *f = (struct flood){ .port = s.port, .seconds = getenv("LONG") ? 30 : 3 };
    begin("flood: %g s to %d readers", f->seconds, READERS);
    read_end = flood_begin(flood_read, f, &readers);
    members_open(&m, 1, s.port, "/");
    before = memory(s.pid);
    used = cpu_time(s.pid);
    began = now();
    write_end = flood_begin(flood_write, f, &flooder);
    flood_chat(f, &m, echo);
    began = now() - began;
    used = cpu_time(s.pid) - used;
    flood_end(read_end, readers, deadline() + test.patience);
    flood_end(write_end, flooder, deadline());
    expect(!f->why[0], "%s", f->why);
    members_close(&m, 1);
    measured(", %u messages (%.0f a second, %.0f %% CPU, readers %.0f %%)",
             f->flooded, f->flooded / began, 100 * used / began,
             100 * f->processor / began);
    expect_memory(&s, before, 10);
    expect(metric(s.port, "chat_slow_clients_total") == 0, "some were cut off");
    finish();
    begin("flood: another sender's %zu messages, to all of them",
          f->late.count / READERS);
    measured_times("latency", &f->late);
    finish();
    begin("flood: that sender's own %zu echoes", echo->count);
    measured_times("latency", echo);
    finish();
    server_stop(&s, "flood");
    munmap(f, sizeof *f);
    munmap(echo, sizeof *echo);
}

/* ---- Much of something ------------------------------------------------- */

/* A frame's header that announces so many bytes. */
static size_t announce(unsigned char *to, unsigned long long n) {
    memcpy(to, (unsigned char[]){ BINARY, 0x80 | 127 }, 2);
    for (int i = 0; i < 8; i++) to[2 + i] = (unsigned char)(n >> (56 - 8 * i));
    memcpy(to + 10, "mask", 4);
    return 14;
}

static void announced_test(int port, const struct server *s) {
    static const struct {
        unsigned long long size;
        const char *name;
        int code;
    } cases[] = { { (1ull << 63) - 1, "2^63 - 1", 1009 },
                  { 1ull << 63, "2^63", 1002 },
                  { ~0ull, "2^64 - 1", 1002 } };
    unsigned char bytes[20];
    struct frame f = { 0 };

    for (size_t k = 0; k < COUNT(cases); k++) {
        double before = memory(s->pid);

        begin("100 clients announce %s bytes: closed with %d", cases[k].name,
              cases[k].code);
        for (int i = 0; i < 100; i++) {
            struct peer *p = ws_open(port, "/");

            peer_send(p, bytes, announce(bytes, cases[k].size));
            if (expect(ws_next(p, &f), "no close frame"))
                expect(close_code(&f) == cases[k].code, "close code %d",
                       close_code(&f));
            expect_end(p);
            peer_close(p);
        }
        expect_memory(s, before, 4);
        finish();
    }
}

/* What is announced and allowed costs nothing until it comes. */
static void promised_test(void) {
    enum { MANY = 500 };
    struct peer *p[MANY];
    struct server s = { 0 };
    unsigned char bytes[20];
    double before;

    descriptors_raise();
    if (!START(&s, "-b", "none", "-m", "16M") || !server_answers(&s)) return;
    begin("%d clients announce 16 MiB, which is allowed, and send a byte",
          MANY);
    before = memory(s.pid);
    for (int i = 0; i < MANY; i++) {
        p[i] = ws_open(s.port, "/");
        peer_send(p[i], bytes, announce(bytes, 16 << 20) + 1);
        /* A second byte is read after the first one was dealt with. */
        peer_send(p[i], "x", 1);
    }
    for (int i = 0; i < 2; i++) {
        struct peer *fresh = ws_open(s.port, "/");

        ws_sync(fresh);
        peer_close(fresh);
    }
    expect_memory(&s, before, 10);
    for (int i = 0; i < MANY; i++) peer_close(p[i]);
    finish();
    server_stop(&s, "announced");
}

/* Sends all of it and meanwhile reads what comes. */
static void send_reading(struct peer *p, const unsigned char *bytes, size_t n) {
    double until = now() + 4 * test.patience;
    size_t at = 0;

    while (at < n && now() < until && !p->ended) {
        struct pollfd fd = { .fd = p->fd, .events = POLLIN | POLLOUT };
        ssize_t sent = 0;

        poll(&fd, 1, 100);
        if (fd.revents & ~POLLOUT) peer_take(p);
        if (fd.revents & POLLOUT) sent = send(p->fd, bytes + at, n - at, 0);
        if (sent > 0) at += (size_t)sent;
    }
    expect(at == n, "%zu of %zu bytes were taken", at, n);
}

static void fragments_test(int port, const struct server *s) {
    static const char letters[] = "\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80!";
    static unsigned char bytes[10000 * 7], whole[10000];
    double before = memory(s->pid), began = now();
    struct peer *p = ws_open(port, "/");
    size_t n = 0;

    begin("10,000 fragments of a byte make one message");
    for (int i = 0; i < 10000; i++) {
        whole[i] = (unsigned char)letters[i % 10];
        n += ws_encode(bytes + n, (i == 0 ? 1 : 0) | (i == 9999 ? 0x80 : 0),
                       true, 0, whole + i, 1);
    }
    send_reading(p, bytes, n);
    ws_expect(p, TEXT, whole, sizeof whole);
    measured(", in %.1f ms", (now() - began) * 1000);
    expect_memory(s, before, 4);
    finish();
    begin("10,000 empty fragments before the last byte");
    began = now();
    n = 0;
    for (int i = 0; i < 10000; i++)
        n += ws_encode(bytes + n, i == 0 ? 1 : 0, true, 0, "", 0);
    n += ws_encode(bytes + n, 0x80, true, 0, "x", 1);
    send_reading(p, bytes, n);
    ws_expect_text(p, "x");
    measured(", in %.1f ms", (now() - began) * 1000);
    expect_memory(s, before, 4);
    peer_close(p);
    finish();
}

#define PINGS 100000

/* Pings of `size` bytes that count up, encoded: PINGS of them. */
static unsigned char *pings_encode(size_t size, size_t *n) {
    unsigned char *bytes = malloc(PINGS * (size + 6));
    char payload[125] = { 0 };

    *n = 0;
    for (uint32_t i = 0; i < PINGS; i++) {
        memcpy(payload, &i, sizeof i);
        *n += ws_encode(bytes + *n, PING, true, 0, payload, size);
    }
    return bytes;
}

/* Reads pongs from number `from` to the last. */
static void expect_pongs(struct peer *p, uint32_t from) {
    struct frame f = { 0 };

    for (uint32_t i = from; i < PINGS && !test.why[0]; i++) {
        uint32_t number = 0;

        expect(ws_next(p, &f) && f.first == PONG && f.length >= 4, "no pong %u",
               i);
        if (test.why[0]) return;
        memcpy(&number, f.data, sizeof number);
        expect(number == i, "pong %u, expected %u", number, i);
    }
}

static void pings_test(int port, const struct server *s) {
    size_t n;
    unsigned char *bytes = pings_encode(4, &n);
    double before = memory(s->pid), began = now();
    struct peer *p = ws_open(port, "/");

    begin("100,000 pings are answered, in order");
    send_reading(p, bytes, n);
    expect_pongs(p, 0);
    measured(", in %.0f ms", (now() - began) * 1000);
    expect_memory(s, before, 4);
    peer_close(p);
    free(bytes);
    finish();
}

/* All send the same bytes, until none can send any more for a while. */
static void send_stuck(struct peer **p, size_t *sent, int count,
                       const unsigned char *bytes, size_t n) {
    struct pollfd fds[64];

    for (;;) {
        for (int i = 0; i < count; i++)
            fds[i] = (struct pollfd){ .fd = sent[i] < n ? p[i]->fd : -1,
                                      .events = POLLOUT };
        if (poll(fds, (nfds_t)count, 300) <= 0) return;
        for (int i = 0; i < count; i++) {
            ssize_t more = fds[i].revents ? send(p[i]->fd, bytes + sent[i],
                                                 n - sent[i], MSG_NOSIGNAL)
                                          : 0;

            if (more > 0) sent[i] += (size_t)more;
            if (!expect(more >= 0 || errno == EAGAIN, "send: %s",
                        strerror(errno)))
                return;
        }
    }
}

/* Pings without reading an answer: the server must stop reading, too. */
static void unread_pings_test(int port, const struct server *s) {
    enum { MANY = 20 };
    size_t n, sent[MANY] = { 0 }, all = 0;
    unsigned char *bytes = pings_encode(125, &n);
    struct peer *p[MANY], *other = ws_open(port, "/?channel=other");
    double before = memory(s->pid), began;

    begin("%d clients that send 100,000 pings and read nothing", MANY);
    for (int i = 0; i < MANY; i++) {
        p[i] = open_narrow(port);
        ws_ask(p[i], "/");
        ws_opened(p[i]);
    }
    send_stuck(p, sent, MANY, bytes, n);
    for (int i = 0; i < MANY; i++) {
        expect(sent[i] < n, "all %zu bytes were taken", n);
        all += sent[i];
    }
    measured(": stuck after %.1f MiB each", (double)all / MANY / (1 << 20));
    expect_memory(s, before, 10);
    began = now();
    ws_text(other, "undisturbed");
    ws_expect_text(other, "undisturbed");
    measured(", another's echo %.1f ms", (now() - began) * 1000);
    finish();
    begin("... and then read: all are answered, in order");
    send_reading(p[0], bytes + sent[0], n - sent[0]);
    expect_pongs(p[0], 0);
    for (int i = 0; i < MANY; i++) peer_close(p[i]);
    peer_close(other);
    free(bytes);
    finish();
}

/* A log's worth of JSON for each of many who do not read it: an answer is
 * memory of its own, so at some point there are no more. */
static void unread_answers_test(void) {
    enum { MANY = 500 };
    struct server s = { 0 };
    struct peer *p[MANY], *member;
    char body[60000];
    int busy = 0;
    struct response r;
    double before;

    if (!START(&s, "-b", "none", "-q") || !server_answers(&s)) return;
    begin("%d clients ask for /messages and read nothing", MANY);
    member = ws_open(s.port, "/");
    memset(body, '\1', sizeof body); /* six bytes each, as JSON */
    for (int i = 0; i < 4; i++) {
        ws_send(member, TEXT, body, sizeof body);
        ws_expect(member, TEXT, body, sizeof body);
    }
    before = memory(s.pid);
    for (int i = 0; i < MANY; i++) {
        p[i] = open_narrow(s.port);
        peer_text(p[i], "GET /messages HTTP/1.1\r\nHost: localhost\r\n\r\n");
    }
    for (int i = 0; i < MANY; i++) {
        if (!expect(wait_for(p[i]->fd, POLLIN, deadline() + 20), "no answer"))
            break;
        peer_take(p[i]);
        busy += p[i]->end > 12 && !memcmp(p[i]->in, "HTTP/1.1 503", 12);
    }
    measured(": %d are told to come back", busy);
    expect_memory(&s, before, 100);
    expect(busy > 0 && busy < MANY, "%d are told to come back", busy);
    finish();
    begin("... and then are gone: the next gets its answer");
    for (int i = 0; i < MANY; i++) peer_close(p[i]);
    ws_sync(member);
    ws_sync(member); /* by now they are gone */
    peer_close(http_get(s.port, "/messages", &r));
    expect(r.status == 200, "status %d", r.status);
    peer_close(member);
    finish();
    server_stop(&s, "unread answers");
}

static void much_test(void) {
    struct server s = { 0 };

    if (!START(&s, "-b", "none") || !server_answers(&s)) return;
    announced_test(s.port, &s);
    fragments_test(s.port, &s);
    pings_test(s.port, &s);
    unread_pings_test(s.port, &s);
    server_stop(&s, "much of something");
    promised_test();
    unread_answers_test();
}

/* ---- Channels ---------------------------------------------------------- */

#define CHANNELS 10000
#define KEPT     1024 /* that the server remembers: see the README */

/* Sends the channel's name to each channel from..to, 100 requests at once. */
static void fill_channels(struct peer *p, int from, int to) {
    char requests[100 * 100];
    struct response r;

    for (int first = from; first < to && !test.why[0]; first += 100) {
        int n = 0, count = to - first < 100 ? to - first : 100;

        for (int i = first; i < first + count; i++)
            n += sprintf(requests + n,
                         "GET /send?channel=c%d&message=c%d HTTP/1.1\r\n"
                         "Host: localhost\r\n\r\n",
                         i, i);
        peer_send(p, requests, (size_t)n);
        for (int i = 0; i < count; i++) {
            read_response(p, false, &r);
            expect(r.status == 200, "channel %d: status %d", first + i,
                   r.status);
        }
    }
}

/* Has channel `number` its message? */
static void expect_channel(struct peer *p, int number, bool there) {
    char request[200], body[40] = "[]";
    struct response r;

    snprintf(request, sizeof request,
             "GET /messages?channel=c%d HTTP/1.1\r\nHost: localhost\r\n\r\n",
             number);
    if (there) snprintf(body, sizeof body, "[\"c%d\"]", number);
    peer_text(p, request);
    read_response(p, false, &r);
    expect(r.length == strlen(body) && !memcmp(r.body, body, r.length),
           "channel %d: %s, expected %s", number, shown(r.body, r.length),
           body);
}

static void recycled_test(void) {
    struct server s = { 0 };
    struct peer *p, *member;
    double before, began;
    int oldest = CHANNELS - (KEPT - 1); /* one is the member's */

    if (!START(&s, "-b", "none", "--metrics", "-q") || !server_answers(&s))
        return;
    begin("10,000 channel names");
    before = memory(s.pid);
    member = ws_open(s.port, "/?channel=c0");
    p = peer_open(s.port);
    began = now();
    fill_channels(p, 0, CHANNELS);
    measured(" in %.2f s", now() - began);
    expect_memory(&s, before, 60);
    expect(metric(s.port, "chat_channels") == KEPT, "%g channels",
           metric(s.port, "chat_channels"));
    finish();
    begin("channels: the %d used last are there, those before are not", KEPT);
    for (int i = 1; i < oldest; i++) expect_channel(p, i, false);
    for (int i = oldest; i < CHANNELS; i++) expect_channel(p, i, true);
    finish();
    begin("channels: one with a client stays, used or not");
    ws_expect_text(member, "c0");
    expect_channel(p, 0, true);
    ws_text(member, "still here");
    ws_expect_text(member, "still here");
    finish();
    begin("channels: what was read lately stays, the next oldest goes");
    expect_channel(p, oldest, true);
    fill_channels(p, CHANNELS, CHANNELS + 1);
    expect_channel(p, oldest, true);
    expect_channel(p, oldest + 1, false);
    expect_channel(p, oldest + 2, true);
    peer_close(member);
    peer_close(p);
    finish();
    server_stop(&s, "channels");
}

/* Each of as many channels as there can be has a client. */
static void occupied_test(void) {
    static struct peer *p[KEPT];
    struct server s = { 0 };
    struct peer *one_more;
    struct response r;
    char target[40];
    double before, until;

    if (descriptors_raise() < 3 * KEPT) {
        skip("channels: each with a client", "RLIMIT_NOFILE is too small");
        return;
    }
    if (!START(&s, "-b", "none", "--metrics", "-q") || !server_answers(&s))
        return;
    begin("channels: %d with a client each, one more is refused", KEPT);
    before = memory(s.pid);
    for (int i = 0; i < KEPT; i++) {
        snprintf(target, sizeof target, "/?channel=o%d", i);
        p[i] = ws_open(s.port, target);
    }
    expect_memory(&s, before, 60);
    one_more = peer_open(s.port);
    ws_ask(one_more, "/?channel=more");
    read_response(one_more, false, &r);
    expect(r.status == 503, "status %d", r.status);
    expect_status(one_more, "/send?channel=more&message=x", 503);
    expect_status(one_more, "/send?channel=o7&message=x", 200);
    ws_expect_text(p[7], "x");
    finish();
    begin("channels: when one is left there is room");
    peer_close(p[0]);
    until = deadline();
    while (metric(s.port, "chat_clients") >= KEPT && now() < until)
        poll(NULL, 0, 5);
    ws_ask(one_more, "/?channel=more");
    ws_opened(one_more);
    for (int i = 1; i < KEPT; i++) peer_close(p[i]);
    peer_close(one_more);
    finish();
    server_stop(&s, "channels, occupied");
}

static void channels_test(void) {
    recycled_test();
    occupied_test();
}

/* ---- All of it --------------------------------------------------------- */

int main(int argc, char **argv) {
    static const struct part parts[] = {
        { "slow", slow_test, true },
        { "descriptors", descriptors_test, false },
        { "deaf", deaf_test, false },
        { "flood", flood_test, false },
        { "much", much_test, false },
        { "channels", channels_test, false },
    };

    harness_open();
    /* A sanitizer keeps what is freed for a while: no more than this, so that
     * memory can be compared. */
    setenv("ASAN_OPTIONS",
           "quarantine_size_mb=2:thread_local_quarantine_size_kb=64", 0);
    run_parts(parts, COUNT(parts), argc, argv);
    return harness_close();
}
