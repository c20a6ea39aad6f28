/* SPDX-License-Identifier: MIT
 *
 * unit.c: the functions of main.c from within, where a test from outside would
 * not see what is wrong, or could not bring it about: a time of no progress,
 * each cut of the bus's stream, each call that may fail. It includes main.c.
 *
 *     make build/unit && build/unit
 */
#define _GNU_SOURCE
#include <err.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>

static int failed, fault_in; /* calls until one fails; 0: none does */
static bool of_memory;       /* that one was asked for memory */
static ssize_t unit_sendto(const void *datagram, size_t size);
static bool fault(bool memory);
#define sendto(fd, d, size, flags, to, n) ((void)(to), unit_sendto(d, size))
#define malloc(size)      (fault(1) ? NULL : malloc(size))
#define realloc(p, n)     (fault(1) ? NULL : realloc(p, n))
#define mmap(...)         (fault(1) ? MAP_FAILED : mmap(__VA_ARGS__))
#define memfd_create(...) (fault(0) ? -1 : memfd_create(__VA_ARGS__))
#define accept4(...)      (fault(0) ? -1 : accept4(__VA_ARGS__))
#define epoll_ctl(e, what, ...) \
    ((what) == EPOLL_CTL_ADD && fault(0) ? -1 : epoll_ctl(e, what, __VA_ARGS__))
#define err(status, ...) \
    (warn(__VA_ARGS__), raise(of_memory ? SIGKILL : SIGABRT))
#define main chat_main
#include "../main.c"
#undef main

#define HANDSHAKE \
    "Connection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version" \
    ": 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
#define COUNT(array) (sizeof(array) / sizeof *(array))

/* A case: its name, and what was seen. */
static void ok(bool good, const char *format, ...) {
    va_list list;
    va_start(list, format);
    printf(good ? "ok - " : "FAILED - ");
    vprintf(format, list);
    printf("\n");
    va_end(list);
    failed += !good;
}

static bool fault(bool memory) {
    errno = ENOMEM;
    if (fault_in > 0 && --fault_in == 0) return of_memory = memory, true;
    return false;
}

/* Of so many times 'a': the last block is filled up in each way. */
static void sha1_test(void) {
    static const char *const digests[] = {
        [55] = "c1c8bbdc22796e28c0e15163d20899b65621d65a",
        [56] = "c2db330f6083854c99d4b5bfb6e8f29f201be699",
        [64] = "0098ba824b5c16427bd7a1122a5a442a25ec644d",
    };
    char bytes[65] = "", hex[41];
    for (int n = 0; n < 65; bytes[n++] = 'a') {
        uint8_t digest[SHA1_SIZE];
        sha1(bytes, n, digest);
        for (int k = 0; k < 20; k++) sprintf(hex + 2 * k, "%02x", digest[k]);
        if (digests[n]) ok(!strcmp(hex, digests[n]), "SHA-1: %s", hex);
    }
}

/* ---- A server without a network ----------------------------------------- */

static int line[2];     /* what is sent to line[1], comes to the bus */
static char said[4000]; /* on stderr */
static struct kept sent[64]; /* by the bus, so many: */
static int sent_count;

static ssize_t unit_sendto(const void *datagram, size_t size) {
    struct kept *k = &sent[sent_count++ % 64];
    memcpy(&k->d, datagram, size);
    return k->size = size;
}

/* Begins anew, as instance `id` of the bus; 0: without one. */
static void start(uint64_t id) {
    for (int i = 0; i < PEERS_MAX; i++) buffer_clear(&bus.peers[i].in);
    memset(bus.kept, 0, min(bus.kept_end, KEPT) * sizeof *bus.kept);
    buffer_clear(&bus.out);
    memset(&bus, 0, (char *)bus.kept - (char *)&bus);
    memset(&bus.out, 0, (char *)(&bus + 1) - (char *)&bus.out);
    bus.peers[0] = (struct peer){ .id = id, .base = 1, .next = 1, .alive = 1 };
    bus.peers[0].message = bus.posted = bus.to_count = s.now = 1;
    bus.fd = id ? line[0] : 0;
    bus.kept_end = sent_count = 0;
    s.settled = true;
    for (struct channel *ch = s.channels; ch->log.ring; ch++) {
        ch->log.tail = ch->low = ch->log.head;
        ch->cut_at = ch->count = 0;
    }
    rewind(stderr);
    memset(said, 0, sizeof said);
}

/* A client in a channel, and the far end of its connection. */
static struct client *member(struct channel *ch, int *far) {
    int pair[2];
    socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, pair);
    set_option(*pair, SOL_SOCKET, SO_SNDBUF, 1);
    struct client *c = client_add(pair[0], WEBSOCKET);
    c->cursor = c->boundary = ch->log.head;
    channel_insert(ch, c);
    *far = pair[1];
    return c;
}

static void leave(struct client *c, int far) {
    close(far);
    client_drop(c);
    server_reap();
}

/* ---- Channels ----------------------------------------------------------- */

/* Message i is 1,000 times the byte i. Reads what has come of them, from byte
 * *at on. False: it was something else. */
static bool drain(int fd, uint64_t *at) {
    uint8_t bytes[4096];
    bool good = true;
    for (ssize_t n; (n = recv(fd, bytes, sizeof bytes, 0)) > 0;)
        for (int i = 0; i < n; i++, ++*at) {
            const uint8_t head[] = { 0x82, 126, 1000 >> 8, 1000 & 255 };
            int k = *at % 1004;
            good &= bytes[i] == (k < 4 ? head[k] : *at / 1004 % 256);
        }
    return good;
}

/* One client reads all at once, another one nothing until the log is full; then
 * all that there is, or nothing. */
static void slow_test(bool reads) {
    int far[2];
    uint64_t at[2] = { 0 }, all = 0;
    bool good = true;
    start(0);
    struct channel *ch = channel_get("slow");
    member(ch, far);
    struct client *slow = member(ch, far + 1);
    for (; channel_room(ch, 1000); all += 1004) {
        char bytes[1000];
        memset(bytes, all / 1004, sizeof bytes);
        channel_append(ch, (struct message){ BINARY, bytes, sizeof bytes });
        channel_flush(ch);
        good &= drain(far[0], at) && at[0] == all + 1004;
        s.now += 10; /* more than SLOW_TIME in all, and nobody is cut off */
    }
    s.now += SLOW_TIME - 1;
    channel_flush(ch);
    ok(good && !slow->dead && all > LOG_SIZE - 1004 && !channel_room(ch, 1000),
       "a full log waits for a reader, for SLOW_TIME");
    while (reads && good && at[1] < all && !channel_room(ch, 1000)) {
        good = drain(far[1], at + 1) && !slow->dead;
        client_read(slow, EPOLLOUT);
        channel_flush(ch);
    }
    s.second_at = ++s.now + 9;
    int fd = slow->fd;
    server_flush();
    if (reads) good &= drain(far[1], at + 1) && at[1] == all;
    ok(good && !s.clients[fd] == !reads && channel_room(ch, 1000) &&
           !strstr(said, "slow client") == reads,
       "who has not read all in time is cut off, and nobody else");
    for (int i = 0; i < 2; i++) close(far[i]);
    while (ch->clients) client_drop(ch->clients);
    server_reap();
}

/* Who waits for room is tried again, also after 2^31 rounds. */
static void wait_test(void) {
    int far;
    start(0);
    struct channel *ch = channel_get("");
    struct client *c = member(ch, &far);
    ch->cut_at = 1000;
    if (send(far, "\x81\x81\0\0\0\0x", 7, 0) == 7) client_read(c, EPOLLIN);
    s.turn = 0x7FFFFFFF;
    for (int i = 0; i < 3; i++) {
        ok(c->waiting == (i < 2), "a talker waits for room, and goes on then");
        if (i) ch->cut_at = 0;
        server_tend();
    }
    leave(c, far);
}

/* Who joins with history waits for a full log, and then is waited for. */
static void join_test(void) {
    static const char ask[] =
        "GET /?history=999 HTTP/1.1\r\nHost: h\r\n" HANDSHAKE;
    char bytes[1000] = "";
    int far;
    start(0);
    struct channel *ch = channel_get("");
    struct client *c = member(ch, &far);
    channel_remove(c);
    c->protocol = HTTP;
    s.option['q'] = "";
    for (size_t i = 0; i < LOG_SIZE; i += 1000, channel_room(ch, 1000))
        channel_append(ch, (struct message){ BINARY, bytes, 1000 });
    channel_flush(ch);
    ch->cut_at = s.now + 1;
    if (send(far, ask, sizeof ask - 1, 0) > 0) client_read(c, EPOLLIN);
    ok(c->waiting && !c->channel && !c->closing, "a newcomer waits");
    ch->cut_at = 0;
    server_tend();
    ok(c->channel == ch && !channel_room(ch, 1000), "a newcomer is waited for");
    leave(c, far);
}

/* A file goes out a piece a round, whatever the kernel has room for. */
static void file_test(void) {
    int far, size = 9 * READ_SIZE;
    struct client *c = member(channel_get(""), &far);
    channel_remove(c);
    set_option(c->fd, SOL_SOCKET, SO_SNDBUF, size);
    c->file = memfd_create("file", 0);
    c->cursor = ftruncate(c->file, c->boundary = size);
    client_flush(c);
    ok(c->cursor == READ_SIZE && c->interest & EPOLLOUT, "others come between");
    leave(c, far);
}

/* Of long answers, too, each round has its share. */
static void answers_test(void) {
    char bytes[1000];
    int far[2];
    start(0);
    struct channel *ch = channel_get("");
    struct client *c[] = { member(ch, far), member(ch, far + 1) };
    memset(bytes, 1, sizeof bytes); /* that is \u0001 */
    for (int i = 0; i < 99; i++)
        channel_append(ch, (struct message){ TEXT, bytes, sizeof bytes });
    for (int i = 0; i < 2; i++) {
        channel_remove(c[i]);
        c[i]->protocol = HTTP;
        send(far[i], "GET /messages HTTP/1.0\r\n\r\n", 26, 0);
        client_read(c[i], EPOLLIN);
    }
    bool waits = c[1]->waiting;
    server_flush();
    ok(c[0]->closing && waits && c[1]->closing, "it has its turn, not at once");
    for (int i = 0; i < 2; i++) leave(c[i], far[i]);
}

/* A good-bye comes behind all that was said, also to a slow reader. */
static void goodbye_test(void) {
    char bytes[1000] = "";
    int far, n = 0;
    start(0);
    struct channel *ch = channel_get("");
    struct client *c = member(ch, &far);
    for (int i = 0; i < 100; i++) {
        channel_append(ch, (struct message){ BINARY, bytes, sizeof bytes });
        if (i == 50) channel_flush(ch);
    }
    websocket_close(c, 1001);
    for (ssize_t got = 1; got > 0; n += got > 0 ? got : 0) {
        client_read(c, EPOLLOUT);
        got = recv(far, bytes, sizeof bytes, 0);
    }
    ok(n == 100 * 1004 + 4, "a good-bye comes last: %d bytes", n);
    leave(c, far);
}

/* Of two with half a message each, the first goes, also if it adds a byte. */
static void bound_test(void) {
    int far[2];
    start(0);
    struct channel *ch = channel_get("");
    struct client *c[] = { member(ch, far), member(ch, far + 1) };
    for (int i = 0; i < 3; i++, s.now++)
        if (send(far[i % 2], "\x81\xFE", 2 - i / 2, 0) > 0)
            client_read(c[i % 2], EPOLLIN);
    s.held += UNFINISHED_MAX - c[1]->held;
    server_bound();
    ok(ch->clients == c[1] && !c[1]->next, "who began first goes");
    close(far[0]);
    leave(c[1], far[1]);
    s.held = 0;
}

/* ---- The bus ------------------------------------------------------------ */

/* The first letters of what the channel "" has; '-' if there is none. */
static const char *heard(void) {
    static char text[300];
    struct log *log = &channel_get("")->log;
    char *at = text;
    struct message m;
    for (uint64_t i = log->tail; i < log->head; *at++ = m.size ? *m.bytes : '-')
        i += frame_read(log_at(log, i), &m);
    *at = '\0';
    return text;
}

/* A datagram comes in, signed. */
static void hear(struct datagram *d, size_t size) {
    hmac(bus.key, &d->kind, size - SHA1_SIZE, d->mac);
    if (send(line[1], d, size, 0) >= 0) bus_readable();
}

/* A DATA, in which each letter is a message. */
static void data(uint64_t sender, uint64_t number, const char *letters) {
    struct datagram d = { .kind = DATA, .sender = sender, .number = number };
    size_t size = 0;
    d.message = number;
    for (; *letters; letters++, size += 4)
        memcpy(d.bytes + size, (uint8_t[]){ 0, 0x81, 1, *letters }, 4);
    hear(&d, DATA_HEADER + size);
}

/* A STATUS of the first that it knows; the list ends with id 0. */
static void status(int flags, uint64_t number, const struct entry *known) {
    struct datagram d = { .kind = STATUS, .flags = flags, .number = number };
    struct entry *e = d.known;
    d.sender = known->id;
    while (known->id) *e++ = *known++;
    hear(&d, (char *)e - (char *)&d);
}
#define KNOWN(...) (const struct entry[]){ __VA_ARGS__, { 0 } }
#define SAYS(...)  status(SETTLED, __VA_ARGS__)
#define LACKS_IT   SETTLED | LACKS

/* What instance 7 posts, instance 9 hears: backwards, twice, and with one
 * datagram lost for good, or (-1) none. What was in that one is lost and
 * counted, all else comes. The first message fills a datagram or nearly so. */
static bool bus_stream(int first, int lost, int *n) {
    static const int sizes[] = { 0, 1, 3, 1500, 2, 900, 1, 3000 };
    static struct kept way[64];
    char bytes[3000], want[9] = "", *letter = want, text[60] = "";
    int missing = 0, after = 0;
    start(7);
    for (int i = 0; i < 8; i++) {
        memset(bytes, 'a' + i, sizeof bytes);
        bus_post("", (struct message){ TEXT, bytes, i ? sizes[i] : first });
    }
    bus_flush();
    *n = sent_count;
    memcpy(way, sent, sizeof way);
    for (int i = 0; i < 8; i++) {
        struct kept *k = &way[lost < 0 ? 0 : lost];
        size_t size = k->size - DATA_HEADER;
        bool touched = lost >= 0 && memchr(k->d.bytes, 'a' + i, size);
        if (!touched) *letter++ = 'a' + i;
        missing += touched;
        after += missing && !touched;
    }
    start(9);
    SAYS(1, KNOWN({ 7, 1, 1, 1 }, { 9, 1, 1, 1 }));
    for (int i = 2 * *n - 1; i >= 0; i--)
        if (i % *n != lost) hear(&way[i % *n].d, way[i % *n].size);
    SAYS(2, KNOWN({ 7, lost + 2, *n + 1, *n + 1 }, { 9, 1, 1, 1 }));
    bus_tick();
    if (lost > 0 && after)
        sprintf(text, "lost %d messages of peer 0000000000000007\n", missing);
    return !strcmp(heard(), want) && strstr(said, text);
}

static void bus_rules(void) {
    start(9);
    data(7, 1, "x");
    SAYS(5, KNOWN({ 7, 1, 1, 1 }));
    data(7, 1, "x");
    ok(!*heard() && !*said, "a sender counts when it has named us");
    SAYS(6, KNOWN({ 7, 1, 1, 1 }, { 9, 1, 1, 1 }));
    status(LEAVES, 6, KNOWN({ 7, 1, 1, 1 }, { 9, 1, 1, 1 }));
    for (int i = 0; i < 2; i++) data(7, 1, "a"), data(7, 3, "d");
    data(7, 1 + WINDOW + 1, "x"); /* too far ahead */
    sent_count = 0;
    bus_tick();
    ok(!strcmp(heard(), "a") && bus.peers[1].alive && bus.kept_end == 2,
       "recordings do nothing");
    ok(sent_count == 1 && sent->d.flags & LACKS && sent->d.known[1].next == 2 &&
           sent->d.known[1].gap == 3,
       "a STATUS tells what is lacking");
    data(7, 2, "bc");
    ok(!strcmp(heard(), "abcd"), "then all comes in order: %s", heard());
    for (int i = 0; i < 2 * WINDOW; i++, i % 2 ? (void)0 : bus_flush())
        bus_post("", (struct message){ TEXT, "y", 1 }); /* two share one */
    ok(bus_room(WINDOW) && !bus_room(WINDOW - 1), "nobody is further ahead");
    sent_count = 0;
    status(LACKS_IT, 7, KNOWN({ 7, 1, 4, 4 }, { 9, 1, 2, 4 }));
    s.now += RESEND_TIME;
    SAYS(8, KNOWN({ 7, 1, 4, 4 }, { 9, 1, 2, 4 }));
    status(LACKS_IT, 8, KNOWN({ 7, 1, 4, 4 }, { 9, 1, 1, 9 }));
    ok(!sent_count, "nothing is repaired at once, unasked, or for a recording");
    status(LACKS_IT, 9, KNOWN({ 7, 1, 4, 4 }, { 9, 1, 2, 4 }));
    ok(sent_count == 2 && sent[0].d.number == 2 && sent[1].d.number == 3,
       "what is lacking is repaired");
    channel_get("")->cut_at = s.now + 1;
    data(7, 4, "e");
    ok(!strcmp(heard(), "abcd"), "there is no room in a channel");
    channel_get("")->cut_at = 0;
    bus_tick();
    ok(!strcmp(heard(), "abcde"), "there is room again");
    struct datagram large = { .kind = DATA, .sender = 7, .number = 5 };
    large.message = 5;
    memcpy(large.bytes, "\0\x82\x7F\1\0\0\0\0\0\0\0", 11);
    hear(&large, DATA_HEADER + 11);
    bool dropped = bus.peers[1].in.size == 0; /* no piece more is waited for */
    data(7, 6, "f"), data(7, 8, "h");
    for (int i = 0; i < 3; i++, s.now += i == 2 ? 1 : GIVE_UP - 1) {
        ok(dropped && !strcmp(heard(), "abcdef"),
           "one too large is dropped, 7 waited for");
        SAYS(10 + i, KNOWN({ 7, 1, 9, 9 }, { 9, 1, self->next, self->next }));
        bus_tick();
    }
    bus_tick();
    ok(!strcmp(heard(), "abcdefh"), "but not for ever: %s", heard());
}

static void bus_newcomers(void) {
    start(9);
    s.settled = false;
    SAYS(1, KNOWN({ 7, 1, 2, 2 }, { 9, 1, 1, 1 }, { 3, 4, 6, 6 }));
    data(3, 4, "a"), data(7, 1, "b"), data(3, 5, "c");
    s.now = HELLO_TIME;
    bus_tick();
    ok(!strcmp(heard(), "abc") && s.settled, "a newcomer hears the dead");
    start(2);
    SAYS(1, KNOWN({ 7, 1, 1, 1 }, { 2, 1, 1, 1 }, { 3, 4, 6, 6 }));
    data(3, 4, "x");
    ok(!*heard(), "others do not, but of those whom they know");
    data(7, 1, "a");
    bus_post("", (struct message){ TEXT, "b", 1 });
    bus_flush();
    data(7, 2, "c");
    s.now += RESEND_TIME;
    sent_count = 0;
    status(LACKS, 1,
           KNOWN({ 11, 1, 1, 1 }, { 2, 1, 1, 1 }, { 7, 1, 2, 2 }));
    ok(sent_count == 2 && sent[0].d.sender == 2 && sent[1].d.number == 2,
       "the eldest tells a newcomer what it has not, in that order");
    s.now += RESEND_TIME;
    SAYS(1, KNOWN({ 1, 1, 1, 1 }, { 2, 1, 1, 1 }));
    bus_tick();
    sent_count = 0;
    status(LACKS, 9, KNOWN({ 11, 1, 1, 1 }, { 2, 1, 1, 1 }));
    ok(sent_count == 0, "who is not the eldest does not");
    start(9);
    s.now = 999 * SECOND; /* it has not told for long */
    for (uint64_t id = 20; id < 20 + PEERS_MAX; id++, bus_tick())
        SAYS(1, KNOWN({ id, 1, 1, 1 }, { 9, 1, 1, 1 }));
    ok(strstr(said, "peer 0000000000000036 joined\n" /* 54 */) &&
           strstr(said, "too many instances"), "one too many is told of");
}

/* 9 hears 7, both settled; then it posts so many datagrams. */
static struct peer *bus_pair(int posts) {
    start(9);
    SAYS(1, KNOWN({ 7, 1, 1, 1 }, { 9, 1, 1, 1 }));
    bus_tick();
    for (; posts > 0; posts--, bus_flush())
        bus_post("", (struct message){ TEXT, "y", 1 });
    return bus.peers + 1;
}

/* What is kept of a stream has no hole: of 7's, 3 was there first. */
static void bus_holes(void) {
    struct peer *p = bus_pair(0);
    data(7, 3, "c"), data(7, 1, "a"), data(7, 2, "b"), data(7, 4, "d");
    ok(!strcmp(heard(), "abcd") && p->base == 1, "all of it is kept");
    while (bus.kept_end <= KEPT)
        bus_post("", (struct message){ TEXT, "y", 1 }), bus_flush();
    ok(p->base == 4 && self->base == 1, "but from behind a hole on");
    SAYS(2, KNOWN({ 7, 5, 90, 90 }, { 9, 1, 9, 9 }));
    bus.pause = ASK_MAX;
    SAYS(3, KNOWN({ 7, 60, 90, 90 }, { 9, 1, 9, 9 }));
    ok(p->next == 60 && p->base == 60 && bus.pause < 5,
       "what is gone is skipped, and the next asked for soon");
    bus.status_at = s.now + SECOND;
    self->base = 20; /* as if */
    status(LACKS_IT, 4, KNOWN({ 7, 60, 90, 90 }, { 9, 1, 9, 30 }));
    ok(bus.status_at == s.now, "who asks for what is gone is told at once");
    while (bus.kept_end < KEPT + 100)
        bus_post("", (struct message){ TEXT, "y", 1 }), bus_flush();
    s.now += RECENT;
    for (uint64_t i = 0, next = self->base; i < 2; i++, next -= WINDOW) {
        sent_count = 0;
        status(LACKS, 1 + i, KNOWN({ 11, 1, 1, 1 }, { 9, 1, next, 0 }));
        s.now += RESEND_TIME;
        ok(sent_count == (i ? 0 : WINDOW), "a newcomer gets what it can take");
    }
}

/* When does a peer hold talkers up? It has of our 200 what `has` says. */
static void bus_waits(void) {
    static const struct {
        uint64_t has;
        bool settled, waits;
    } cases[] = { { 201, false, false }, { 201, true, true },
                  { 137, true, true }, { 136, true, false } };
    for (size_t i = 0; i < COUNT(cases); i++) {
        struct peer *p = bus_pair(200);
        p->near = false; /* it was away */
        status(cases[i].settled, 2,
               KNOWN({ 7, 1, 1, 1 }, { 9, 1, cases[i].has, cases[i].has }));
        bus_tick();
        ok(p->near == cases[i].waits, "is who is %d behind waited for",
           201 - (int)cases[i].has);
        bus_tick();
        s.now++;
        bus_tick();
        ok(p->near == cases[i].waits, "still so");
    }
    struct peer *p = bus_pair(200);
    SAYS(2, KNOWN({ 7, 1, 1, 1 }, { 9, 1, 200, 200 }));
    bus_tick();
    s.now += ALIVE_TIME - 1;
    p->heard = s.now - RECENT; /* its old words are repeated by others */
    bus_tick();
    bool waits = p->near;
    s.now++;
    bus_tick();
    p->heard = s.now; /* it is not told of late */
    bus_tick();
    ok(waits && !p->near && p->alive && !strstr(said, "no progress"),
       "who makes no progress is waited for 5 s, and not until it is dead");
}

/* Of a dead one's words, what nobody has is given up: the first gap after 20 s,
 * the next ones after 2 s each, as they were not asked for before. */
static void bus_dead(void) {
    bus_pair(0);
    for (int i = 1; i < 12; i += 2) data(7, i, (char[]){ 'a' + i, 0 });
    status(LEAVES, 2, KNOWN({ 7, 1, 14, 14 }, { 9, 1, 1, 1 }));
    data(7, 13, "n"); /* was overtaken, and is no sign of life */
    bus_tick();
    s.now += GIVE_UP - 1;
    bus_tick();
    ok(!strcmp(heard(), "b") && !bus.peers[1].alive, "it may still come");
    s.now++;
    for (int i = 0; i < 9; i++) bus_tick();
    ok(!strcmp(heard(), "bd"), "the next gap is asked for: %s", heard());
    for (int i = 0; i < 5; i++, bus_tick(), bus_tick()) s.now += CATCH_UP;
    ok(!strcmp(heard(), "bdfhjln"), "but for 2 s: %s", heard());
}

/* ---- Faults ------------------------------------------------------------- */

static void rounds(void) {
    struct epoll_event events[8];
    for (int i = 0; i < 3; i++) {
        s.accept_due = true;
        s.now += 100;
        server_flush();
        int count = epoll_wait(s.epoll, events, 8, 0);
        for (int k = 0; k < count; k++)
            client_read(s.clients[events[k].data.fd], events[k].events);
    }
    server_flush();
}

/* Conversations with a server whose Nth call for memory or a descriptor fails:
 * at most who is served is lost. Exit 0: so it was; 2: another client was lost,
 * too; 3: N was too large. Killed: out of memory, where main.c may end. */
static void faulty(int n) {
    static const char *const asks[] = {
        "GET / HTTP/1.0\r\n\r\n", "GET /test/ HTTP/1.0\r\n\r\n",
        "GET /send?message=x HTTP/1.0\r\n\r\n",
        "GET /messages HTTP/1.0\r\n\r\n",
        "GET /?channel=new HTTP/1.1\r\nHost: h\r\n" HANDSHAKE "\x81",
    };
    struct sockaddr_un name = { .sun_family = AF_UNIX };
    char bytes[3] = "";
    int far;
    start(0);
    s.option['d'] = s.option['q'] = ".";
    s.listener = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0);
    snprintf(name.sun_path + 1, 90, "chat-unit-%d", getpid());
    bind(s.listener, (void *)&name, sizeof name);
    listen(s.listener, 9);
    member(channel_get("watched"), &far);
    fault_in = n;
    for (size_t i = 0; i < COUNT(asks); i++) {
        int fd = socket(AF_UNIX, SOCK_STREAM, 0);
        if (connect(fd, (void *)&name, sizeof name) == 0)
            send(fd, asks[i], strlen(asks[i]), 0);
        rounds();
        close(fd);
    }
    if (fault_in) exit(3);
    send(far, "\x81\x81\0\0\0\0w", 7, 0);
    rounds();
    exit(recv(far, bytes, 3, 0) == 3 && !memcmp(bytes, "\x81\1w", 3) ? 0 : 2);
}

int main(void) {
    s.epoll = epoll_create1(EPOLL_CLOEXEC);
    s.option['i'] = "lo";
    socketpair(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK, 0, line);
    stderr = fmemopen(said, sizeof said, "w");
    setbuf(stderr, NULL);
    sha1_test();
    slow_test(true);
    slow_test(false);
    wait_test();
    join_test();
    goodbye_test();
    file_test();
    answers_test();
    bound_test();
    int n = 4, wrong = 0, code = 0, lost = 0, ended = 0;
    for (int size = DATA_MAX - 20; size < DATA_MAX + 5; size++)
        for (int i = -1; i < n; i++) wrong += !bus_stream(size, i, &n);
    ok(!wrong, "a stream in datagrams, one of them lost: %d wrong", wrong);
    bus_rules();
    bus_newcomers();
    bus_holes();
    bus_waits();
    bus_dead();
    fflush(stdout);
    for (n = 0; code != 3 << 8 && n < 500; n++) {
        if (fork() == 0) faulty(n + 1);
        wait(&code);
        ended += code == SIGKILL;
        lost += code != 0 && code != SIGKILL && code != 3 << 8;
    }
    ok(!lost && n > 20 && n < 500, "of %d calls each failed once: the program "
       "ended %d times, and %d times others were lost", n, ended, lost);
    return failed > 0;
}
