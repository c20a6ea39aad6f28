/* SPDX-License-Identifier: MIT
 *
 * fuzz.c: a target for libFuzzer. An input's first byte says what it is for:
 *
 *   '0' a request      '1' texts: UTF-8, JSON, %XX, Range, frame headers
 *   '2' a path of -d   '3' a connection: HTTP, frames or NATS, whole and in two
 *   '4' a chat: clients that talk, stall and leave, and a bus with a good key
 *
 *     make fuzz SECONDS=60         begins with the inputs in test/corpus
 *     build/fuzz build/crash-...   does again what went wrong
 */
#define _GNU_SOURCE
#define MESSAGE_MAX    1000
#define HISTORY        65536
#define CHANNELS_MAX   4
#define UNFINISHED_MAX (128 << 10)
#include <sys/socket.h>
#include <time.h>
static ssize_t nowhere(size_t size, const void *d, const void *to);
#define sendto(fd, d, size, flags, to, n) nowhere(size, d, to)
#define time(where)                       ((time_t)0)
#define main                              chat_main
#include "../main.c"

/* Not assert(), because stderr is turned off. */
#define CHECK(good) \
    ((good) ? (void)0 : (dprintf(2, "%d: no: %s\n", __LINE__, #good), abort()))

static ssize_t nowhere(size_t size, const void *d, const void *to) {
    CHECK(d && to && size <= 1200);
    return size;
}

/* A copy of just this size, so that ASan sees a byte read too many. */
static char *copy_of(const void *bytes, size_t size) {
    char *copy = malloc(size ? size : 1);
    return size ? memcpy(copy, bytes, size) : copy;
}

/* What is good is so from its last byte on, what is bad may be so before. */
static void fuzz_request(const uint8_t *data, size_t size) {
    static struct request r, part;
    char *whole = copy_of(data, size);
    const char *status = request_parse(&r, whole, size);
    bool good = status && !*status;
    CHECK(good || !status || (atoi(status) >= 400 && atoi(status) < 500));
    CHECK(!good || (*r.path == '/' && *r.method && r.size <= HEADER_MAX &&
                    !memcmp(whole + r.size - 4, "\r\n\r\n", 4) &&
                    (field(&r, "Host") || r.old)));
    for (size_t n = 0; n < size && n < 300; n++) {
        char *prefix = copy_of(data, n);
        const char *early = request_parse(&part, prefix, n);
        if (good && n >= r.size + r.body_size) CHECK(early && !*early);
        else CHECK(!early || (!good && early == status));
        free(prefix);
    }
    free(whole);
}

/* By the table in RFC 3629 4. */
static bool plain_utf8(const void *bytes, size_t size) {
    const uint8_t *at = bytes;
    for (size_t i = 0, n; i < size; i += n) {
        uint8_t c = at[i], from = 0x80, to = 0xBF;
        n = c < 0x80 ? 1 : c < 0xE0 ? 2 : c < 0xF0 ? 3 : 4;
        if ((c >= 0x80 && c < 0xC2) || c > 0xF4 || n > size - i) return false;
        if (c == 0xE0 || c == 0xF0) from = c == 0xE0 ? 0xA0 : 0x90;
        if (c == 0xED || c == 0xF4) to = c == 0xED ? 0x9F : 0x8F;
        for (size_t j = 1; j < n; j++, from = 0x80, to = 0xBF)
            if (at[i + j] < from || at[i + j] > to) return false;
    }
    return true;
}

static void fuzz_text(const uint8_t *data, size_t size) {
    struct buffer b = {0};
    struct frame f;
    int64_t from, to;
    char *in = copy_of(data, size), *text = strndup(in, size);
    CHECK(utf8_valid(in, size) == plain_utf8(data, size));
    int header = frame_parse((uint8_t *)in, size, &f);
    CHECK(header == -1002 || (header >= 0 && header <= min(14, size)));
    CHECK(close_code(in, size) >= 1000 && close_code(in, size) < 5000);
    buffer_json(&b, in, size);
    buffer_add(&b, "", 1);
    for (size_t i = 0, at = 1; i < size; i++, at++) {
        unsigned c = (uint8_t)b.bytes[at];
        CHECK(c >= ' ' && c != '"' && at < b.size - 2);
        if (c == '\\' && sscanf(b.bytes + at, "\\u%4x", &c) == 1) at += 5;
        CHECK(c == data[i]);
    }
    b.size = 0;
    buffer_escape(&b, text, strlen(text), URL, "%%%02X");
    buffer_add(&b, "", 1);
    CHECK(url_decode(b.bytes, true) && !strcmp(b.bytes, text));
    url_decode(text, false);
    if (range_parse(text, 1000, &from, &to) == 1)
        CHECK(0 <= from && from < to && to <= 1000);
    buffer_clear(&b);
    free(text);
    free(in);
}

/* ---- A server without a network ----------------------------------------- */
static int ends[2]; /* what is sent to ends[1], it hears */

static void start(void) {
    for (int i = 0; i < CHANNELS_MAX && s.channels[i].log.ring; i++)
        munmap(s.channels[i].log.ring, 2 * LOG_SIZE);
    memset(s.channels, 0, sizeof s.channels);
    for (int i = 0; i < PEERS_MAX; i++) buffer_clear(&bus.peers[i].in);
    memset(bus.kept, 0, min(bus.kept_end, KEPT) * sizeof *bus.kept);
    memset(bus.peers, 0, sizeof bus.peers);
    bus.fd = ends[0];
    bus.peers[0] = (struct peer){.id = 100, .base = 1, .next = 1, .alive = 1};
    bus.peers[0].message = bus.posted = bus.to_count = 1;
    bus.kept_end = bus.status_at = bus.ask_at = s.second_at = 0;
    s.settled = s.now = 1;
}

/* What holds between two rounds. */
static void invariants(void) {
    size_t held = 0;
    struct message m;
    for (int fd = 0; fd < s.clients_end; fd++) {
        struct client *c = s.clients[fd];
        struct log *log = c && c->channel ? &c->channel->log : NULL;
        if (!c) continue;
        held += c->in.capacity + c->out.capacity;
        CHECK(c->fd == fd && !c->dead && c->sent <= c->out.size);
        CHECK(c->done <= MESSAGE_MAX && c->read <= c->in.size);
        CHECK(!log || (c->channel->low <= c->cursor && log->tail <= c->cursor &&
                       c->cursor <= c->boundary && c->boundary <= log->head));
    }
    CHECK(held == s.held && (held <= UNFINISHED_MAX || nats.client));
    for (int i = 0; i < CHANNELS_MAX && s.channels[i].log.ring; i++) {
        struct log *log = &s.channels[i].log;
        uint64_t at = log->tail, count = 0;
        for (; at < log->head; count++) {
            at += frame_read(log_at(log, at), &m);
            CHECK(m.opcode == BINARY || plain_utf8(m.bytes, m.size));
            CHECK(m.size <= MESSAGE_MAX);
        }
        CHECK(at == log->head && count == s.channels[i].count);
        CHECK(log->head - log->tail <= LOG_SIZE);
    }
    for (struct peer *p = bus.peers; p < bus.peers + PEERS_MAX; p++)
        CHECK(p->base <= p->next && p->in.size < 64 * sizeof(struct datagram));
}

static void rounds(int n) {
    struct epoll_event events[16];
    for (; n > 0; n--) {
        int count = epoll_wait(s.epoll, events, 16, 0);
        for (int i = 0; i < count; i++) {
            struct client *c = s.clients[events[i].data.fd];
            if (c) client_read(c, events[i].events);
            server_bound();
        }
        CHECK(server_flush() >= s.now);
        server_bound();
        invariants();
    }
}

/* A client, and its far end. */
static int client_make(enum protocol protocol, int room) {
    int pair[2], type = SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC;
    CHECK(!socketpair(AF_UNIX, type, 0, pair));
    if (room) set_option(pair[0], SOL_SOCKET, SO_SNDBUF, room);
    struct client *c = client_add(pair[0], protocol);
    if (protocol == WEBSOCKET) channel_insert(channel_get(""), c);
    if (c->channel) c->cursor = c->boundary = c->channel->log.head;
    if (protocol == NATS) nats.client = c;
    return pair[1];
}

/* ---- A path, with -d ---------------------------------------------------- */
/* All that must not be found holds "SECRET", or is named so. */
static const char tree[] =
    "rm -rf build/tree; mkdir -p build/tree/www/sub/list; cd build/tree/www;"
    "mkdir .git .well-known; mkfifo fifo; ln -s .. up; ln -s sub/list in;"
    "ln -s ../out out; ln -s /proc/self/root magic; echo SECRET | tee ../out "
    ".hid .git/x sub/list/.hid sub/.SECRET .well-known/.x >.SECRET;"
    "echo a | tee a.txt index.html sub/x.js >'sub/b c&<.txt'";

static void fuzz_path(const uint8_t *data, size_t size) {
    static struct request r;
    struct buffer b = {0};
    struct client c = {.fd = -1, .protocol = HTTP};
    char text[100] = "";
    s.option['d'] = "build/tree/www";
    int lowest = dup(0);
    buffer_print(&b, "GET /%.*s HTTP/1.0\r\n\r\n", (int)size, data);
    const char *status = request_parse(&r, b.bytes, b.size);
    r.client = &c;
    if (status && !*status && strcmp(r.path, "/send") != 0) client_answer(&r);
    if (c.file > 0) CHECK(pread(c.file, text, 99, 0) > 0 && !close(c.file));
    buffer_add(&c.out, "", 1);
    bool moved = !strncmp(c.out.bytes, "HTTP/1.1 301", 12); /* repeats it */
    CHECK(!strstr(text, "SECRET") && (moved || !strstr(c.out.bytes, "SECRET")));
    CHECK(!close(lowest) && dup(0) == lowest && !close(lowest));
    s.option['d'] = NULL;
    buffer_clear(&c.out);
    buffer_clear(&b);
}

/* ---- A connection ------------------------------------------------------- */
/* What is in the logs when the bytes have come in two pieces; returns how much
 * was answered. (Not of NATS: if something is wrong, that may be nothing.) */
static ssize_t converse(const uint8_t *bytes, size_t size, size_t cut,
                        enum protocol protocol, struct buffer *logs) {
    static char all[1 << 20];
    start();
    bus.fd = 0;  /* so that no datagram has to be signed */
    int far = client_make(protocol, 0);
    for (int i = 0; i < 2; i++, bytes += cut, cut = size - cut) {
        if (cut) send(far, bytes, cut, MSG_NOSIGNAL);
        rounds(2);
    }
    ssize_t n = recv(far, all, sizeof all, 0);
    if (n > 25 && !memcmp(all, "HTTP/1.1 100 Continue\r\n\r\n", 25)) n -= 25;
    for (int i = 0; i < CHANNELS_MAX && s.channels[i].log.head; i++)
        buffer_add(logs, s.channels[i].log.ring, s.channels[i].log.head);
    close(far);
    while (s.connected || nats.client) rounds(1);
    return protocol == NATS ? 0 : n;
}

static void fuzz_connection(const uint8_t *data, size_t size) {
    struct buffer a = {0}, b = {0};
    if (size < 2) return;
    size_t n = size - 2, cut = data[1] * n / 256;
    CHECK(converse(data + 2, n, 0, data[0] % 3, &a) ==
          converse(data + 2, n, cut, data[0] % 3, &b));
    CHECK(a.size == b.size && (!b.size || !memcmp(a.bytes, b.bytes, b.size)));
    buffer_clear(&a);
    buffer_clear(&b);
}

/* ---- A chat: its input is a small program ------------------------------- */
static const uint8_t *input, *input_end;

static unsigned take(void) {
    return input < input_end ? *input++ : 0;
}

static void datagram(void) {
    struct datagram d = {.kind = DATA + take() % 2, .flags = take()};
    size_t n = take(), size = DATA_HEADER + n * 4;
    d.sender = 101 + take() % 3;
    d.number = take();
    d.message = take();
    for (size_t i = 0; d.kind == DATA && i < n * 4; i++) d.bytes[i] = take();
    for (size_t i = 0; d.kind != DATA && i < n % 8 * 4; i++)
        (&d.known->id)[i] = take() + (i % 4 ? 0 : 100);
    if (d.kind != DATA) size = STATUS_HEADER + n % 8 * sizeof *d.known;
    hmac(bus.key, &d.kind, size - SHA1_SIZE, d.mac);
    if (send(ends[1], &d, size, 0) >= 0) bus_readable();
}

static void fuzz_chat(const uint8_t *data, size_t size) {
    static uint8_t frame[1000] = "\x82\xFE", got[2048];
    int fds[3] = {-1, -1, -1};
    start();
    input = data;
    input_end = data + size;
    while (input < input_end) {
        unsigned op = take(), n = take(), what = op % 16;
        int *far = &fds[op / 16 % 3];
        if (what == 2) n = min(n, (size_t)(input_end - input));
        if (what < 2 && *far < 0) *far = client_make(what, 1);
        if (what == 2) send(*far, (input += n) - n, n, MSG_NOSIGNAL);
        if (what == 3) recv(*far, got, 8 * n, 0);
        if (what == 4) s.now += n * n;
        if (what == 5) datagram();
        if (what == 6) *far = close(*far) | -1;
        put_number(frame + 2, n * 3, 2);
        for (int i = 0; i < 12 && what > 6; i++)
            send(*far, frame, 8 + n * 3, MSG_NOSIGNAL);
        rounds(1);
    }
    for (int i = 0; i < 3; i++) close(fds[i]);
    while (s.connected) rounds(1);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (!s.epoll) {
        CHECK(!system(tree));
        stderr = fopen("/dev/null", "w"); /* "peer joined", a million times */
        signal(SIGPIPE, SIG_IGN);
        s.epoll = epoll_create1(EPOLL_CLOEXEC);
        socketpair(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends);
        s.option['i'] = s.option['q'] = "lo";
        buffer_print(&nats.login, "CONNECT\r\n");
    }
    if (size == 0) return 0;
    switch (*data % 5) {
    case '0' % 5: fuzz_request(data + 1, size - 1); break;
    case '1' % 5: fuzz_text(data + 1, size - 1); break;
    case '2' % 5: fuzz_path(data + 1, size - 1); break;
    case '3' % 5: fuzz_connection(data + 1, size - 1); break;
    default: fuzz_chat(data + 1, size - 1);
    }
    return 0;
}
