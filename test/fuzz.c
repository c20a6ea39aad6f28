/* SPDX-License-Identifier: MIT
 *
 * fuzz.c: targets for libFuzzer, one chosen with -DFUZZ=NAME:
 *
 *   request    the HTTP request parser; the same at every split
 *   query      percent-decoding, JSON, UTF-8 and the like, against plain ones
 *   path       the file that a request path opens beneath -d
 *   talk       connections on socket pairs: requests, frames, slow readers
 *   datagram   the bus behind a valid MAC: peers, streams, losses, time
 *
 * Build:  clang -D FUZZ=talk -fsanitize=fuzzer,address,undefined test/fuzz.c
 * Run:    make fuzz SECONDS=60
 * Begin:  with the inputs in test/corpus/NAME (those for `datagram` were
 *         recorded between two instances)
 *
 * Inputs of the last two are small programs, read byte by byte; where an
 * input ends, zeros follow.
 */
#define READ_SIZE 512 /* so that input grows and splits */
#define main server_main
#include "../main.c"
#undef main

#ifndef FUZZ
#define FUZZ request
#endif

/* Not assert(), because the targets turn stderr off. */
#define CHECK(condition) check(condition, #condition, __LINE__)

static void check(bool good, const char *condition, int line) {
    if (good) return;
    dprintf(STDERR_FILENO, "test/fuzz.c:%d: not so: %s\n", line, condition);
    abort();
}

/* ---- The input ---------------------------------------------------------- */

struct program {
    const uint8_t *at;
    size_t left;
};

static uint8_t take(struct program *p) {
    if (p->left == 0) return 0;
    p->left--;
    return *p->at++;
}

static size_t take_two(struct program *p) {
    size_t low = take(p);
    return low | (size_t)take(p) << 8;
}

static struct text take_text(struct program *p, size_t size) {
    if (size > p->left) size = p->left;
    struct text t = {(const char *)p->at, size};
    p->at += size;
    p->left -= size;
    return t;
}

/* A copy of exactly this size, so that ASan sees a byte read too many. */
static char *copy_of(const void *bytes, size_t size) {
    char *copy = malloc(size ? size : 1);
    CHECK(copy != NULL);
    if (size) memcpy(copy, bytes, size);
    return copy;
}

static char *string_of(const void *bytes, size_t size) {
    char *string = malloc(size + 1);
    CHECK(string != NULL);
    if (size) memcpy(string, bytes, size);
    string[size] = '\0';
    return string;
}

/* ---- A server without a network ----------------------------------------- */

static struct server server;

static void server_start(struct server *s) {
    *s = (struct server){.max_message = KIB, .history = 4 * KIB,
                         .max_clients = 64, .clients_size = KIB, .dir = -1,
                         .home = -1, .signals = -1};
    s->option['q'] = "";
    s->option['M'] = "";
    s->bus.fd = -1;
    s->now = 1;
    s->epoll = epoll_create1(EPOLL_CLOEXEC);
    s->listener = open("/dev/null", O_RDONLY | O_CLOEXEC);
    s->page = memfd_create("page", MFD_CLOEXEC);
    CHECK(write(s->page, index_html, index_html_size) > 0);
    s->clients = calloc(s->clients_size, sizeof *s->clients);
    s->input = malloc(sizeof *s->input + READ_SIZE);
    CHECK(s->epoll >= 0 && s->listener >= 0 && s->clients && s->input);
    *s->input = (struct input){.capacity = READ_SIZE};
    s->waiting_end = &s->waiting;
}

static void server_end(struct server *s) {
    if (!s->stopping) close(s->listener);
    server_close(s);
    CHECK(s->connections == 0 && s->counters[CLIENTS] == 0);
    CHECK(s->counters[CHANNELS] == 0);
}

/* What holds between two rounds. */
static void client_invariants(const struct server *s, const struct client *c) {
    CHECK(!c->dead && c->out_sent <= c->out.size);
    CHECK(c->in == NULL || (c->in->done <= c->in->next &&
                            c->in->next <= c->in->size &&
                            c->in->size <= c->in->capacity));
    CHECK(c->in == NULL || c->in->capacity <=
          4 * (HEADER_MAX + READ_SIZE + s->max_message));
    CHECK(!c->in || c->in->done <= s->max_message);
    CHECK(!c->channel || c->websocket);
    if (!c->channel) return;
    const struct log *log = &c->channel->log;
    CHECK(c->cursor >= log->tail && c->cursor >= c->channel->low);
    CHECK(c->cursor <= c->boundary && c->boundary <= log->head);
}

static void server_invariants(struct server *s) {
    size_t connections = 0, websockets = 0, channels = 0, members = 0;
    struct text payload;
    for (size_t fd = 0; fd < s->clients_size; fd++) {
        if (!s->clients[fd]) continue;
        connections++;
        websockets += s->clients[fd]->websocket;
        members += s->clients[fd]->channel != NULL;
        client_invariants(s, s->clients[fd]);
    }
    for (struct channel *ch = s->channels; ch; ch = ch->next, channels++) {
        uint64_t at = ch->log.tail;
        CHECK(ch->log.head - ch->log.tail <= ch->log.size);
        while (at < ch->log.head) at += frame_read(log_at(&ch->log, at), &payload);
        CHECK(at == ch->log.head);
        members -= ch->client_count;
    }
    for (struct client *c = s->waiting; c; c = c->next_waiting)
        CHECK(s->clients[c->fd] == c && c->waiting);
    CHECK(s->dead == NULL && members == 0);
    CHECK(connections == s->connections);
    CHECK(websockets == s->counters[CLIENTS]);
    CHECK(channels == s->counters[CHANNELS] && channels <= CHANNELS_MAX);
}

/* ---- request ------------------------------------------------------------ */

void fuzz_request(const uint8_t *data, size_t size);
void fuzz_request(const uint8_t *data, size_t size) {
    static struct request r, part;
    static const char *const names[] = {"channel", "message", "history"};
    char *whole = copy_of(data, size);
    int end = request_parse(whole, size, &r);
    size_t last = size < 300 ? size : 300;
    for (size_t n = 1; n < last; n++) {
        char *prefix = copy_of(data, n);
        int result = request_parse(prefix, n, &part);
        CHECK(end > 0 && n < (size_t)end ? result == 0
                                         : result == 0 || result == end);
        free(prefix);
    }
    CHECK(end <= (int)size && end <= HEADER_MAX && end > -600);
    if (end < 0) CHECK(end <= -400);
    CHECK(r.line.size <= size);
    if (end > 0) {
        CHECK(r.size == (size_t)end && r.body == whole + end);
        CHECK(*r.path == '/' || !strcmp(r.method, "OPTIONS"));
        CHECK(r.length >= 0 && *r.method);
        CHECK(r.header[HOST] || r.old);
        CHECK(r.channel.size <= CHANNEL_NAME_MAX);
        for (int i = 0; i < 3; i++) {
            char *out = malloc(strlen(r.query) + 1);
            ssize_t n = query_get(r.query, names[i], out);
            CHECK(n >= -2 && n <= (ssize_t)strlen(r.query));
            free(out);
        }
    }
    free(whole);
}

/* ---- query -------------------------------------------------------------- */

/* UTF-8 by the table in RFC 3629 4, one sequence at a time. */
static bool plain_utf8(const uint8_t *at, size_t size) {
    for (size_t i = 0, n; i < size; i += n) {
        uint32_t c = at[i];
        n = c < 0x80 ? 1 : c >> 5 == 6 ? 2 : c >> 4 == 14 ? 3 : 4;
        if ((n == 4 && c >> 3 != 30) || n > size - i) return false;
        c &= n == 1 ? 0x7F : 0x7FU >> n;
        for (size_t j = 1; j < n; j++) {
            if (at[i + j] >> 6 != 2) return false;
            c = c << 6 | (at[i + j] & 63);
        }
        if ((n == 2 && c < 0x80) || (n == 3 && c < 0x800) ||
            (n == 4 && (c < 0x10000 || c > 0x10FFFF)) || c >> 11 == 27)
            return false;
    }
    return true;
}

static void fuzz_utf8(const uint8_t *data, size_t size) {
    bool valid = plain_utf8(data, size);
    for (size_t split = 0; split <= size && split < 40; split++) {
        struct utf8 u = {0};
        bool good = utf8_check(&u, data, split) &&
                    utf8_check(&u, data + split, size - split);
        CHECK((good && u.left == 0) == valid);
    }
}

static void fuzz_json(const uint8_t *data, size_t size) {
    struct buffer b = {0};
    size_t at = 1;
    buffer_json(&b, (struct text){(const char *)data, size});
    for (size_t i = 0; i < size; i++, at++) {
        unsigned u = (unsigned char)b.bytes[at];
        CHECK(u >= ' ' && u != '"');
        if (u == '\\' && b.bytes[++at] == 'u') {
            char digits[5] = {0};
            memcpy(digits, b.bytes + at + 1, 4);
            u = (unsigned)strtoul(digits, NULL, 16);
            at += 4;
        } else if (u == '\\') {
            u = (unsigned char)b.bytes[at];
        }
        CHECK(u == data[i]);
    }
    CHECK(at == b.size - 1 && b.bytes[at] == '"' && *b.bytes == '"');
    buffer_clear(&b);
}

void fuzz_query(const uint8_t *data, size_t size);
void fuzz_query(const uint8_t *data, size_t size) {
    char *query = string_of(data, size), *out = malloc(size + 1);
    size_t length = strlen(query);
    ssize_t n = query_get(query, "a", out);
    CHECK(out && n >= -2 && n <= (ssize_t)length);
    for (int plus = 0; plus < 2; plus++) {
        n = percent_decode(query, length, out, plus);
        CHECK(n >= -1 && n <= (ssize_t)length && out[n < 0 ? 0 : n] == '\0');
        if (n >= 0 && !strchr(query, '%')) CHECK((size_t)n == length);
    }
    struct buffer b = {0};
    buffer_escape(&b, text_of(query), "-_.", "%%%02X");
    if (b.size > 0) {
        char *back = malloc(b.size + 1);
        CHECK(percent_decode(b.bytes, b.size, back, true) == (ssize_t)length);
        CHECK(!memcmp(back, query, length));
        free(back);
    }
    buffer_clear(&b);
    CHECK(parse_number(query) >= -1);
    list_has(query, "a");
    if (key_valid(query)) CHECK(length == 24);
    int code = close_code(data, size);
    CHECK(code == 1005 ? size == 0 : code >= 1000 && code <= 4999);
    fuzz_utf8(data, size);
    fuzz_json(data, size);
    free(query);
    free(out);
}

/* ---- path --------------------------------------------------------------- */

static char root[] = "/tmp/fuzz-path-XXXXXX";

static void root_write(const char *name) {
    int fd = open(name, O_CREAT | O_WRONLY | O_CLOEXEC, 0644);
    CHECK(fd >= 0 && write(fd, name, strlen(name)) > 0 && close(fd) == 0);
}

static void root_remove(void) {
    char command[80];
    snprintf(command, sizeof command, "rm -rf %s", root);
    CHECK(system(command) == 0);
}

/* A folder with what must not be found: links out of it, hidden names, a
 * FIFO. Returns it, open. */
static int root_make(int home) {
    CHECK(mkdtemp(root) != NULL && chdir(root) == 0);
    atexit(root_remove);
    CHECK(!mkdir("web", 0755) && !mkdir("web/sub", 0755) &&
          !mkdir("web/list", 0755) && !mkdir("web/.git", 0755));
    root_write("outside.txt");
    root_write("web/index.html");
    root_write("web/a.txt");
    root_write("web/.hidden");
    root_write("web/.git/config");
    root_write("web/sub/index.html");
    root_write("web/list/b c&<.txt");
    root_write("web/list/.hidden");
    CHECK(!symlink("a.txt", "web/in") && !symlink("..", "web/sub/up") &&
          !symlink("../outside.txt", "web/out") && !symlink("..", "web/top") &&
          !symlink("/etc/passwd", "web/passwd") &&
          !symlink("/proc/self/root", "web/list/magic") &&
          !mkfifo("web/fifo", 0644));
    int dir = open("web", O_PATH | O_DIRECTORY | O_CLOEXEC);
    CHECK(dir >= 0 && fchdir(home) == 0);
    return dir;
}

/* What is open must lie in the folder and be a file that may be seen. */
static void path_check(const struct client *c) {
    char link[40], path[4096];
    struct stat status;
    snprintf(link, sizeof link, "/proc/self/fd/%d", c->file);
    ssize_t n = readlink(link, path, sizeof path - 1);
    size_t prefix = strlen(root) + strlen("/web/");
    CHECK(n > (ssize_t)prefix);
    path[n] = '\0';
    CHECK(!strncmp(path, root, strlen(root)));
    CHECK(!strncmp(path + strlen(root), "/web/", 5));
    CHECK(!strstr(path, "/."));
    CHECK(!fstat(c->file, &status) && S_ISREG(status.st_mode));
}

void fuzz_path(const uint8_t *data, size_t size);
void fuzz_path(const uint8_t *data, size_t size) {
    static int home = -1, dir = -1;
    static struct request r;
    struct buffer line = {0};
    struct client c = {.fd = -1, .file = -1};
    if (home < 0) {
        home = open(".", O_PATH | O_DIRECTORY | O_CLOEXEC);
        dir = root_make(home);
    }
    server_start(&server);
    server.dir = fcntl(dir, F_DUPFD_CLOEXEC, 0); /* it closes its own */
    server.home = fcntl(home, F_DUPFD_CLOEXEC, 0);
    buffer_print(&line, "%s /", size > 0 && *data & 1 ? "HEAD" : "GET");
    if (size > 1) buffer_add(&line, data + 1, size - 1);
    buffer_print(&line, " HTTP/1.1\r\nHost: x\r\n\r\n");
    if (request_parse(line.bytes, line.size, &r) > 0) {
        r.client = &c;
        client_answer(&server, &r);
        /* Hidden names are not listed. (A redirect repeats the query.) */
        bool moved = c.out.size && !strncmp(c.out.bytes, "HTTP/1.1 301", 12);
        CHECK(!c.out.size || moved ||
              !memmem(c.out.bytes, c.out.size, ">.hid", 5));
        if (c.file >= 0) path_check(&c);
        if (c.file >= 0) close(c.file);
    }
    CHECK(fchdir(home) == 0);
    buffer_clear(&c.out);
    buffer_clear(&line);
    server_end(&server);
}

/* ---- talk --------------------------------------------------------------- */

#define USERS 3

struct user { /* the far end of a connection */
    int fd; /* -1: none */
    bool websocket, first, closed;
    struct buffer got; /* what is not checked yet */
};

static void user_close(struct user *u) {
    if (u->fd >= 0) close(u->fd);
    buffer_clear(&u->got);
    u->fd = -1;
}

static void user_connect(struct server *s, struct user *u) {
    int pair[2], size = 2048;
    if (u->fd >= 0) return;
    CHECK(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0,
                      pair));
    setsockopt(pair[0], SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
    *u = (struct user){.fd = pair[1], .first = true};
    client_add(s, pair[0], NULL);
}

static void user_send(struct user *u, const void *bytes, size_t size) {
    if (u->fd >= 0 && size)
        send(u->fd, bytes, size, MSG_NOSIGNAL | MSG_DONTWAIT); /* or not */
}

/* Checks the server's frames as a strict client does. */
static void user_frames(struct user *u) {
    size_t at = 0;
    while (u->got.size - at >= 2) {
        const uint8_t *f = (uint8_t *)u->got.bytes + at;
        size_t left = u->got.size - at, longer = f[1] == 126 ? 2 : 0;
        struct text payload;
        if (f[1] == 127) longer = 8;
        if (left < 2 + longer) break;
        size_t size = frame_read(f, &payload);
        CHECK(!u->closed && (f[0] & 0xF0) == 0x80 && f[1] < 128);
        CHECK(longer != 2 || payload.size > 125);
        CHECK(longer != 8 && payload.size <= KIB);
        if (left < size) break;
        int opcode = f[0] & 15;
        CHECK(opcode == TEXT || opcode == BINARY || opcode >= CLOSE);
        CHECK(opcode < CLOSE || payload.size <= 125);
        CHECK(opcode != TEXT || plain_utf8((const uint8_t *)payload.at,
                                           payload.size));
        u->closed = opcode == CLOSE;
        at += size;
    }
    if (at == 0) return;
    memmove(u->got.bytes, u->got.bytes + at, u->got.size - at);
    u->got.size -= at;
}

static void user_read(struct user *u, size_t most) {
    static const char upgraded[] = "HTTP/1.1 101 ";
    char bytes[4096];
    if (most > sizeof bytes) most = sizeof bytes;
    ssize_t n = u->fd < 0 ? 0 : recv(u->fd, bytes, most, MSG_DONTWAIT);
    if (n <= 0) return;
    if (u->websocket || u->first) buffer_add(&u->got, bytes, (size_t)n);
    if (u->first && u->got.size >= sizeof upgraded) {
        char *end = memmem(u->got.bytes, u->got.size, "\r\n\r\n", 4);
        u->websocket = !memcmp(u->got.bytes, upgraded, sizeof upgraded - 1);
        CHECK(!memcmp(u->got.bytes, "HTTP/1.1 ", 9));
        if (u->websocket && !end) return;
        u->first = false;
        if (!u->websocket) return;
        u->got.size -= (size_t)(end + 4 - u->got.bytes);
        memmove(u->got.bytes, end + 4, u->got.size);
    }
    if (u->websocket) user_frames(u);
}

static void user_handshake(struct user *u, uint8_t how) {
    char text[300];
    static const char *const query[] = {"/", "/?history=9", "/?channel=b",
                                        "/?channel=b&history=1"};
    int n = snprintf(text, sizeof text,
                     "GET %s HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\n"
                     "Connection: upgrade\r\nSec-WebSocket-Version: 13\r\n"
                     "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n",
                     query[how % 4]);
    user_send(u, text, (size_t)n);
}

/* A frame with fuzzed header and payload, but a length that is right. */
static void user_frame(struct user *u, struct program *p) {
    uint8_t frame[14 + 1300] = {take(p)}, mask[4];
    size_t size = take_two(p) % 1200, n = 2;
    frame[1] = (uint8_t)(0x80 | (size < 126 ? size : 126));
    if (size >= 126) put_number(frame + n, size, 2), n += 2;
    for (int i = 0; i < 4; i++) frame[n++] = mask[i] = take(p);
    struct text payload = take_text(p, size);
    for (size_t i = 0; i < size; i++)
        frame[n + i] = (i < payload.size ? (uint8_t)payload.at[i] : 'x') ^
                       mask[i % 4];
    user_send(u, frame, n + size);
}

static void user_post(struct user *u, struct program *p) {
    char text[1700];
    size_t size = take_two(p) % 1100;
    int n = snprintf(text, sizeof text, "POST /send HTTP/1.1\r\nHost: h\r\n"
                     "Content-Length: %zu\r\n\r\n", size);
    memset(text + n, 'p', size);
    user_send(u, text, (size_t)n + size);
}

/* A message of another instance, as it stands in its peer's window after the
 * datagrams came: delivered at the end of the round, it waits for nobody. */
static void record_message(struct server *s, struct program *p) {
    static uint8_t bytes[sizeof(struct record) + KIB];
    struct peer *peer = s->bus.self.next;
    struct record r = {0, 1, (uint32_t)(take_two(p) % KIB), TEXT, 0};
    size_t size = sizeof r + r.size;
    memset(bytes, 'b', sizeof bytes);
    memcpy(bytes, &r, sizeof r);
    if (!peer || peer->head + size > peer->log.head + WINDOW - BLOCK) return;
    for (size_t i = 0; i < size; i++, peer->head++) {
        *log_at(&peer->log, peer->head) = bytes[i];
        peer->filled[peer->head / BLOCK % WINDOW_BLOCKS]++;
    }
}

/* A bus with nobody to send to. */
static void bus_start(struct server *s) {
    hmac_key(&s->bus.key, "", 0);
    s->bus.fd = open("/dev/null", O_WRONLY | O_CLOEXEC);
    s->bus.self.id = 1;
    s->bus.beat_gap = BEAT_FIRST;
    CHECK(s->bus.fd >= 0 && log_open(&s->bus.self.log, 16 * KIB));
}

static void server_round(struct server *s) {
    struct epoll_event events[16];
    int n = epoll_wait(s->epoll, events, 16, 0);
    for (int i = 0; i < n; i++) server_event(s, &events[i]);
    CHECK(server_round_end(s) >= 0);
    server_invariants(s);
}

static void talk_step(struct server *s, struct user *u, struct program *p) {
    uint8_t op = take(p);
    u += (op >> 4) % USERS;
    switch (op & 15) {
    case 0: case 1: case 2: {
        struct text bytes = take_text(p, op & 1 ? take(p) : take_two(p) % 2048);
        user_connect(s, u);
        user_send(u, bytes.at, bytes.size);
        break;
    }
    case 3: case 4: case 5: user_frame(u, p); break;
    case 6: user_connect(s, u), user_handshake(u, take(p)); break;
    case 7: user_connect(s, u), user_post(u, p); break;
    case 8: user_read(u, take_two(p)); break;
    case 9: record_message(s, p); break;
    case 10: user_close(u); break;
    case 11: if (u->fd >= 0) shutdown(u->fd, SHUT_WR); break;
    case 12: s->now += take(p) * 8; break;
    case 13: s->now += take(p) * SECOND; break;
    case 14: if (take(p) == 1) server_stop(s); break;
    default: record_message(s, p); return; /* more in the same round */
    }
    server_round(s);
}

void fuzz_talk(const uint8_t *data, size_t size);
void fuzz_talk(const uint8_t *data, size_t size) {
    struct program p = {data, size};
    struct user users[USERS] = {{.fd = -1}, {.fd = -1}, {.fd = -1}};
    server_start(&server);
    bus_start(&server);
    server.now = HELLO_TIME;
    bus_peer(&server, 2, true)->joined = true;
    server.bus.self.next->heard = INT64_MAX / 2; /* it is never forgotten */
    while (p.left > 0) talk_step(&server, users, &p);
    for (int i = 0; i < USERS; i++) {
        for (int j = 0; j < 4; j++) {
            user_read(&users[i], 4096);
            server_round(&server);
        }
        user_close(&users[i]);
    }
    server_round(&server);
    server_end(&server);
}

/* ---- datagram ----------------------------------------------------------- */

static void bus_invariants(const struct server *s) {
    const struct bus *b = &s->bus;
    size_t alive = 0, count = 0;
    const struct log *own = &b->self.log;
    CHECK(own->tail <= own->head && b->self.head <= own->head);
    CHECK(own->head - own->tail <= own->size);
    for (const struct peer *p = b->self.next; p; p = p->next, count++) {
        size_t in_block = p->log.head % BLOCK;
        alive += p->alive;
        CHECK(p->id != b->self.id);
        CHECK(!p->alive || p->joined);
        CHECK(p->log.tail <= p->start && p->start <= p->log.head);
        CHECK(p->log.head + WINDOW - p->start <= p->log.size);
        CHECK(p->acked <= own->head);
        CHECK(p->filled[p->log.head / BLOCK % WINDOW_BLOCKS] >= in_block);
        for (int i = 0; i < WINDOW_BLOCKS; i++) CHECK(p->filled[i] <= BLOCK);
    }
    CHECK(count <= PEERS_MAX && alive == s->counters[BUS_PEERS]);
}

/* A datagram of the input from "kind" on, signed. With bits of `how` it is
 * made such that it is more likely to count: 8: it greets us, with an echo
 * of a time of ours; 16: it is later than the last. */
static void datagram_step(struct server *s, struct program *p, uint8_t how) {
    struct text bytes = take_text(p, take_two(p) % sizeof(struct datagram));
    size_t size = SHA1_SIZE + bytes.size;
    struct datagram *d = calloc(1, size);
    CHECK(d != NULL);
    if (bytes.size) memcpy(&d->kind, bytes.at, bytes.size);
    if (size >= DATAGRAM_HEADER + sizeof(struct entry) && how & 8) {
        d->known[0].id = s->bus.self.id;
        d->known[0].echo = s->bus.self.time;
        d->known[0].need %= s->bus.self.log.head + 1;
    }
    if (size >= DATAGRAM_HEADER && how & 16) {
        struct peer *peer = bus_peer(s, d->sender, false);
        if (d->kind != DATA) d->time = peer ? peer->time + 1 : 1;
    }
    if (size > SHA1_SIZE)
        hmac_sign(&s->bus.key, &d->kind, size - SHA1_SIZE, d->mac);
    bus_datagram_in(s, d, size);
    free(d);
}

static void bus_step(struct server *s, struct program *p) {
    static char bytes[KIB];
    uint8_t op = take(p);
    struct text message = {bytes, 0};
    switch (op & 7) {
    case 0: case 1: case 2: case 3: datagram_step(s, p, op); break;
    case 4: s->now += take(p); break;
    case 5: s->now += take(p) * SECOND; break;
    case 6: {
        message.size = take_two(p) % sizeof bytes;
        struct channel *ch = channel_get(s, (struct text){"", 0});
        if (ch) server_post(s, ch, BINARY, message);
        break;
    }
    default: break;
    }
    bus_invariants(s);
    if (op & 32) return; /* more datagrams come in the same round */
    CHECK(server_round_end(s) >= 0);
    bus_invariants(s);
    server_invariants(s);
}

void fuzz_datagram(const uint8_t *data, size_t size);
void fuzz_datagram(const uint8_t *data, size_t size) {
    struct program p = {data, size};
    server_start(&server);
    bus_start(&server);
    server.bus.catch_up_end = CATCH_UP_TIME;
    while (p.left > 0) bus_step(&server, &p);
    server_end(&server);
}

/* ---- The one that was chosen -------------------------------------------- */

#define NAME_OF(name) fuzz_##name
#define TARGET(name) NAME_OF(name)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static FILE *nowhere;
    if (!nowhere) {
        nowhere = fopen("/dev/null", "w");
        if (nowhere) stderr = nowhere; /* "peer joined", a million times */
        signal(SIGPIPE, SIG_IGN); /* as server_configure does */
    }
    TARGET(FUZZ)(data, size);
    return 0;
}
