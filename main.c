/* mini-ws-chat: what one browser sends, every browser shows.
 *
 *   browser --WebSocket--> this instance ---> the channel's log ---> every
 *                               |             client of this instance
 *                               v
 *                          the bus (UDP) ---> every other instance, which
 *                                             does the same with it
 *
 * An instance is one running chat. A channel is one log: a ring of ready-made
 * WebSocket frames (a frame is a message with its size in front). A server's
 * frames are the same bytes for all clients, so a client is a cursor into the
 * log. To broadcast is one append, then one send() a client, from its cursor
 * to the log's head.
 *
 * A round is one turn of the event loop: wait, read, send. A message's way in
 * it: client_read, client_process, websocket_step, websocket_message,
 * server_post; from there into the log (channel_append) and onto the bus
 * (bus_post); at the round's end channel_flush and bus_flush. At the others:
 * bus_readable, bus_data_in, peer_take, peer_deliver, channel_deliver,
 * channel_append, channel_flush. (To follow it: 3, 5, 6, 8, 9, 14, 18, 19.)
 *
 *   1  Limits               8  Clients                15  HTTP: the request
 *   2  Tools                9  Channels               16  HTTP: the answers
 *   3  The log             10  The bus: its data      17  Files *
 *   4  Hashes *            11  The bus at work (last) 18  Conversations
 *   5  WebSocket frames    12  The bus: its start *   19  The event loop
 *   6  The data            13  NATS, another bus *    20  Options, the start
 *   7  TLS *               14  A message comes in         * skip at first
 *
 * Build and run:  cc main.c -o chat && ./chat      (Linux 5.6, for openat2)
 * SPDX-License-Identifier: MIT
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* ---- 1. Limits ----------------------------------------------------------
 * The limits of memory and of patience; those of the bus stand with it. The
 * first five may be set with -D.
 */
#ifndef MESSAGE_MAX
#define MESSAGE_MAX 64000 /* so that the bus's window holds one; see -b none */
#endif
#ifndef HISTORY
#define HISTORY (256 << 10) /* bytes a channel, four messages at least */
#endif
_Static_assert(HISTORY >= 4L * MESSAGE_MAX && HISTORY <= 256L << 20, "HISTORY");
#ifndef CHANNELS_MAX
#define CHANNELS_MAX 256 /* with and without clients */
#endif
#ifndef UNFINISHED_MAX
#define UNFINISHED_MAX (64 << 20) /* input and answers, of all clients */
#endif
#ifndef SECOND
#define SECOND 1000L /* times are ms since the start; tests shorten them */
#endif
#define READ_SIZE    (64 << 10)    /* bytes taken from a client at once */
#define SEND_BUFFER  (128 << 10)   /* what the kernel may hold for a client */
#define HEADER_MAX   8192          /* a request's line and headers */
#define CHANNEL_NAME 64            /* bytes */
#define REQUEST_TIME (10 * SECOND) /* for a request, with its wait for room */
#define PING_TIME    (20 * SECOND) /* of silence, then a ping ... */
#define IDLE_TIME    (60 * SECOND) /* ... and then the end */
#define SLOW_TIME    SECOND        /* that senders wait for a slow reader */
#define CLOSE_TIME   (4 * SECOND)  /* for the other side to close as well */

/* ---- 2. Tools: bytes and text -------------------------------------------
 * Growing buffers, numbers on the wire, escapes, UTF-8. Nothing here knows of
 * sockets. Where memory runs out in spite of all limits, the program ends.
 */
struct buffer { /* bytes on the heap, growing */
    char *bytes;
    uint32_t size, capacity;
};

/* What happened is one line on stderr: warnx() writes it; errx() and err(),
 * which adds the reason in errno, end the program with one of these. */
enum { FAILURE = 1, MISUSE };

/* For calls that must succeed: else the program ends. */
static int must(int result, const char *what) {
    if (result < 0) err(FAILURE, "%s", what);
    return result;
}

static int64_t min(int64_t a, int64_t b) {
    return a < b ? a : b;
}

static int64_t clock_us(clockid_t id) {
    struct timespec t;
    clock_gettime(id, &t); /* cannot fail, because both clocks exist */
    return t.tv_sec * INT64_C(1000000) + t.tv_nsec / 1000;
}

/* Makes room for `more` bytes and a NUL, and returns where it is. */
static char *buffer_reserve(struct buffer *b, size_t more) {
    if (b->capacity - b->size <= more) {
        b->capacity = (b->size + more + 1) * 2;
        b->bytes = realloc(b->bytes, b->capacity);
        must(b->bytes ? 0 : -1, "realloc");
    }
    return b->bytes + b->size;
}

static void buffer_add(struct buffer *b, const void *bytes, size_t size) {
    memcpy(buffer_reserve(b, size), bytes, size);
    b->size += size;
}

#define PRINTF __attribute__((format(printf, 2, 3)))

/* Leaves a NUL behind the bytes, so that they are a string. */
PRINTF static void buffer_print(struct buffer *b, const char *format, ...) {
    va_list list, again;
    va_start(list, format);
    va_copy(again, list);
    size_t size = vsnprintf(NULL, 0, format, list);
    vsnprintf(buffer_reserve(b, size), size + 1, format, again);
    b->size += size;
    va_end(again);
    va_end(list);
}

static void buffer_clear(struct buffer *b) {
    free(b->bytes);
    *b = (struct buffer){0};
}

/* What needs no escape. */
#define ALNUM "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
#define URL   ALNUM "-_"
#define LINE  ALNUM " !#$%&'()*+,-./:;<=>?@[]^_`{|}~"
#define UTF8  "\x80" /* stands for all bytes from 0x80 on */

/* Adds text with all else in a printf format, and so harmless in HTML
 * ("&#%d;"), JSON ("\\u%04x"), a URL ("%%%02X") or a line of the log. */
static void buffer_escape(struct buffer *b, const char *text, size_t size,
                          const char *safe, const char *format) {
    for (size_t i = 0; i < size; i++) {
        uint8_t c = text[i];
        char *at = buffer_reserve(b, 8);
        *at = c;
        b->size += c && strchr(safe, min(c, 0x80)) ? 1 : sprintf(at, format, c);
    }
}

static void buffer_json(struct buffer *b, const char *text, size_t size) {
    buffer_add(b, "\"", 1);
    buffer_escape(b, text, size, LINE UTF8, "\\u%04x");
    buffer_add(b, "\"", 1);
}

/* Numbers of n bytes in network order, the most significant byte first. */
static uint64_t get_number(const void *bytes, int n) {
    uint64_t value = 0;
    for (const uint8_t *at = bytes; n-- > 0; at++) value = value << 8 | *at;
    return value;
}

static void put_number(uint8_t *bytes, uint64_t value, int n) {
    for (; n-- > 0; value >>= 8) bytes[n] = value;
}

/* A decimal number of digits only, 18 at most; else -1. */
static int64_t parse_number(const char *text) {
    size_t n = strspn(text, "0123456789");
    return n == 0 || n > 18 || text[n] ? -1 : strtoll(text, NULL, 10);
}

/* Decodes %XX, and '+' if `query`, in place. False: a bad %XX, or a NUL. */
static bool url_decode(char *text, bool query) {
    char *out = text;
    for (char *in = text; *in; in++, out++) {
        *out = *in == '+' && query ? ' ' : *in;
        if (*in != '%') continue;
        char hex[] = {in[1], in[1] ? in[2] : 0, 0};
        *out = strtol(hex, NULL, 16);
        if (strspn(hex, "0123456789ABCDEFabcdef") != 2 || !*out) return false;
        in += 2;
    }
    *out = '\0';
    return true;
}

/* UTF-8 (RFC 3629): no form longer than needed, no surrogates (D800 to DFFF, so
 * 1B before the last 11 bits), nothing above 10FFFF. */
static bool utf8_valid(const void *bytes, size_t size) {
    static const uint32_t least[] = {0, 0x80, 0x800, 0x10000};
    const uint8_t *at = bytes, *end = at + size;
    while (at < end) {
        uint32_t c = *at++;
        int more = (c >= 0xC0) + (c >= 0xE0) + (c >= 0xF0);
        if ((c & 0xC0) == 0x80 || end - at < more) return false;
        c &= 0x7F >> more; /* the lead's own bits; F8 on becomes too large */
        for (int i = 0; i < more; i++, at++) {
            if ((*at & 0xC0) != 0x80) return false;
            c = c << 6 | (*at & 0x3F);
        }
        if (c < least[more] || c > 0x10FFFF || c >> 11 == 0x1B) return false;
    }
    return true;
}

/* ---- 3. The log ---------------------------------------------------------
 * A ring of frames, addressed by offsets that only grow. The same memory is
 * mapped twice, one copy behind the other, so that a frame that runs over the
 * ring's end is still one piece of memory.
 *
 *      tail: oldest whole frame            head: where the next one goes
 *        v                                   v
 *   ...  [frame][frame][frame][frame][frame] .   head - tail <= LOG_SIZE
 *
 *   memory:  |....[frame][fra|me]..[frame][fra|        the second copy is the
 *            ring            ring + LOG_SIZE           same bytes as the first
 */
struct log {
    uint8_t *ring;
    uint64_t tail, head;
};
#define LOG_SIZE ((HISTORY + 65535UL) / 65536 * 65536) /* whole pages */

/* The first mapping is twice as long as the file, and its second half has
 * nothing behind it yet: there the file is mapped once more. False: no
 * descriptor is left. */
static bool log_open(struct log *l) {
    int fd = memfd_create("log", MFD_CLOEXEC), use = PROT_READ | PROT_WRITE;
    if (fd < 0) return false;
    must(ftruncate(fd, LOG_SIZE), "log");
    l->ring = mmap(NULL, 2 * LOG_SIZE, use, MAP_SHARED, fd, 0);
    must(l->ring == MAP_FAILED ? -1 : 0, "log");
    void *copy = l->ring + LOG_SIZE;
    copy = mmap(copy, LOG_SIZE, use, MAP_SHARED | MAP_FIXED, fd, 0);
    must(copy == MAP_FAILED ? -1 : 0, "log");
    close(fd);
    return true;
}

static uint8_t *log_at(const struct log *l, uint64_t offset) {
    return l->ring + offset % LOG_SIZE;
}

/* The caller has made room: head + size - tail <= LOG_SIZE. */
static void log_append(struct log *l, const void *bytes, size_t size) {
    memcpy(log_at(l, l->head), bytes, size);
    l->head += size;
}

/* ---- 4. Hashes (skip at first) ------------------------------------------
 * SHA-1 (RFC 3174) for the WebSocket handshake, HMAC-SHA1 (RFC 2104) for the
 * bus, base64 (RFC 4648). SHA-1 is broken for signatures; in the handshake it
 * guards nothing, and HMAC does not rest on what is broken.
 */
#define SHA1_SIZE 20

#define ROTATE_LEFT(x, n) ((x) << (n) | (x) >> (32 - (n)))

/* Hashes blocks of 64 bytes: the bytes, 0x80, zeros, and in the last 8 the
 * number of bits. */
static void sha1(const void *bytes, size_t size, uint8_t digest[SHA1_SIZE]) {
    const uint32_t k[] = {0x5A827999, 0x6ED9EBA1, 0x8F1BBCDC, 0xCA62C1D6};
    uint32_t h[] = {0x67452301, 0xEFCDAB89, 0x98BADCFE, 0x10325476, 0xC3D2E1F0};
    uint32_t w[80], v[5]; /* v: the standard's A to E */
    for (size_t at = 0; at < size + 9; at += 64) {
        uint8_t block[64] = {0};
        size_t n = at < size ? min(size - at, 64) : 0;
        if (n > 0) memcpy(block, (const char *)bytes + at, n);
        if (n < 64 && at <= size) block[n] = 0x80;
        if (size + 9 <= at + 64) put_number(block + 56, size * 8, 8);
        memcpy(v, h, sizeof v);
        for (int i = 0; i < 80; i++) {
            uint32_t x = i < 16 ? get_number(block + 4 * i, 4)
                                : w[i - 3] ^ w[i - 8] ^ w[i - 14] ^ w[i - 16];
            w[i] = i < 16 ? x : ROTATE_LEFT(x, 1);
            uint32_t f = v[1] ^ v[2] ^ v[3];
            if (i < 20) f = (v[1] & v[2]) | (~v[1] & v[3]);
            if (i / 20 == 2) f = (v[1] & v[2]) | ((v[1] | v[2]) & v[3]);
            f += ROTATE_LEFT(v[0], 5) + v[4] + k[i / 20] + w[i];
            v[1] = ROTATE_LEFT(v[1], 30);
            for (int j = 4; j > 0; j--) v[j] = v[j - 1];
            v[0] = f;
        }
        for (int i = 0; i < 5; i++) h[i] += v[i];
    }
    for (int i = 0; i < 5; i++) put_number(digest + 4 * i, h[i], 4);
}

/* The key has 64 bytes; a shorter one is followed by zeros. What it signs are
 * datagrams, 1,200 bytes at most; the result has SHA1_SIZE bytes. */
static void hmac(const uint8_t *key, const void *in, size_t n, uint8_t *mac) {
    uint8_t inner[64 + 1200], outer[64 + SHA1_SIZE];
    for (int i = 0; i < 64; i++) {
        inner[i] = key[i] ^ 0x36;
        outer[i] = key[i] ^ 0x5C;
    }
    memcpy(inner + 64, in, n);
    sha1(inner, 64 + n, outer + 64);
    sha1(outer, sizeof outer, mac);
}

static const char base64[] = ALNUM "+/=";

/* Three bytes make four digits. */
static void buffer_base64(struct buffer *b, const void *bytes, size_t size) {
    for (size_t i = 0; i < size; i += 3) {
        int n = min(3, size - i);
        uint32_t bits = get_number((const char *)bytes + i, n) << (24 - 8 * n);
        for (int j = 0; j < 4; j++)
            buffer_add(b, base64 + (j > n ? 64 : bits >> (18 - 6 * j) & 63), 1);
    }
}

/* ---- 5. WebSocket frames ------------------------------------------------
 * RFC 6455 5.2. From a client every frame is masked, from a server none.
 *
 *    0               1               2               3
 *   +-+-+-+-+-------+-+-------------+-------------------------------+
 *   |F|R|R|R|opcode |M| length      | longer length: 2 bytes if 126,|
 *   |I|S|S|S|       |A| 0..125, or  | 8 bytes if 127                |
 *   |N|V|V|V|       |S| 126 or 127  |                               |
 *   +-+-+-+-+-------+-+-------------+-------------------------------+
 *   | mask key: 4 bytes, if MASK    | payload, byte i XOR key[i % 4]|
 *   +-------------------------------+-------------------------------+
 */
enum { CONTINUATION, TEXT, BINARY, CLOSE = 8, PING, PONG };
#define FRAME_HEADER_MAX 10 /* of a server's frame */

struct message {
    int opcode;
    const char *bytes;
    size_t size;
};

struct frame {
    bool fin;
    uint8_t opcode, mask[4];
    uint64_t size; /* of the payload */
};

/* The bytes of the longer length, by the length. */
static const uint8_t longer_size[128] = {[126] = 2, [127] = 8};

/* Reads the header of a client's frame. Returns its size, 0 for "need more",
 * or minus a close code (RFC 6455 7.4.1). */
static int frame_parse(const uint8_t *bytes, size_t size, struct frame *f) {
    static const uint32_t least[] = {[2] = 126, [8] = 65536}; /* by longer */
    if (size < 2) return 0;
    *f = (struct frame){.fin = bytes[0] >> 7, .opcode = bytes[0] & 15};
    f->size = bytes[1] & 127;
    bool control = f->opcode >= CLOSE;
    if (bytes[0] & 0x70 || bytes[1] < 128 || f->opcode > PONG) return -1002;
    if (control ? !f->fin || f->size > 125 : f->opcode > BINARY) return -1002;
    size_t longer = longer_size[f->size];
    if (size < 2 + longer + 4) return 0;
    if (longer) f->size = get_number(bytes + 2, longer);
    if (f->size < least[longer] || f->size >> 63) return -1002;
    memcpy(f->mask, bytes + 2 + longer, 4);
    return 2 + longer + 4;
}

/* Writes the header of a server's frame; returns its size. */
static size_t frame_header(uint8_t *out, int opcode, size_t size) {
    uint8_t length = size < 126 ? size : 126 + (size > 65535);
    out[0] = 0x80 | opcode;
    out[1] = length;
    put_number(out + 2, size, longer_size[length]);
    return 2 + longer_size[length];
}

/* Reads a server's frame, as it stands in a log; returns its whole size (which
 * anything may be, if another instance sends nonsense). */
static size_t frame_read(const uint8_t *at, struct message *m) {
    int length = at[1] & 127, longer = longer_size[length];
    size_t size = longer ? get_number(at + 2, longer) : (size_t)length;
    *m = (struct message){at[0] & 15, (const char *)at + 2 + longer, size};
    return 2 + longer + size;
}

/* The code to answer a close frame with, 1005 where it has none (7.4). */
static int close_code(const char *payload, size_t size) {
    if (size == 0) return 1005;
    int code = size < 2 ? 0 : get_number(payload, 2);
    bool known = code >= 1000 && code <= 1014 && (code < 1004 || code > 1006);
    if (!known && (code < 3000 || code > 4999)) return 1002;
    return utf8_valid(payload + 2, size - 2) ? code : 1007;
}

/* ---- 6. The data --------------------------------------------------------
 * The server `s` has all clients and channels; a channel has a list of its
 * clients. Input of a client that we have not handled yet is in its `in`. Its
 * private bytes, which only it gets (an answer, a pong, a close), are in its
 * `out`. All else that it gets, it reads from its channel's log.
 *
 *   accept           101                  an answer, or a close frame
 *   ------> HTTP ----------> WEBSOCKET --+ that is the last that it gets
 *            +---------------------------+----> closing
 *                                                  | all of it is sent
 *            any error, time out:                  v
 *            client_drop --------> dead <------- shut, until the other side
 *                                   |            closes, too
 *                                   v
 *                                 freed by server_reap: nobody else frees
 */
enum protocol { HTTP, WEBSOCKET, NATS };

/* What we know of a connection: under 200 bytes, while nothing is under way. A
 * connection to a NATS server is one of these, too. What each round needs comes
 * first.
 *
 * fd          its socket
 * interest    what epoll watches for us; 0: it does not know this client yet
 * blocked     the kernel's send buffer is full
 * waiting     its message waits for room: it is tried again after each round
 * pinged      we have sent a ping, and nothing came since
 * joined      NATS has let us in
 * opcode      of the message that is not complete yet; 0: there is none
 * next        the next client of the channel; or the next dead one
 * cursor      how far it was sent the log, or its file
 * boundary    the log up to here goes out before any private bytes, as a frame
 *             of it has begun to go out; of a file, its end. boundary >= cursor
 * out, sent   private bytes; so many of them are sent
 * tls         NULL: plain TCP
 * held        the capacity of out and in, as counted in s.held
 * in          [0, done) the message so far, [read, size) not looked at yet
 * file        what is being sent to it; 0: none
 * since       when it began to hold something, or made progress with it: see
 *             server_bound
 * deadline    then client_late decides
 * link        what points to this client: the channel's list, or the `next` of
 *             the one before it
 */
struct client {
    int fd;
    uint32_t interest;
    bool closing, shut, dead, blocked, waiting, pinged, joined;
    uint8_t opcode;
    struct channel *channel;
    struct client *next;
    uint64_t cursor, boundary;
    struct buffer out;
    struct ssl_st *tls;
    enum protocol protocol;
    uint32_t sent, held, done, read;
    int file;
    struct buffer in;
    int64_t since, deadline;
    struct client **link;
};

/* A channel without a ring was never used, and so are all behind it.
 *
 * count       of the messages in the log
 * low         every client was sent at least up to here, and after a flush that
 *             is exact (else we wait once more than we must)
 * cut_at      not 0: the log is full, nobody may talk, and who is still behind
 *             then is cut off
 * dirty       the log has something new
 * used        when somebody last talked
 */
struct channel {
    struct client *clients;
    struct log log;
    uint64_t count, low;
    int64_t cut_at, used;
    bool dirty;
    char name[CHANNEL_NAME + 1];
};

/* option      by letter; NULL: not given
 * tls         for new clients; NULL: plain TCP
 * settled     the history is here: clients are let in
 * accept_due  somebody waits to be let in
 * waiting     some client waits for room; turn: the one that tries first
 * dirty       some channel is: so the next round comes at once
 * now         ms since the start; second_at: when what is done once a second is
 *             due
 * stop_at     0, or when we end at the latest
 * clients     by descriptor; none is at clients_end or behind it
 * held        bytes of input and answers, of all clients
 * answered    bytes to requests in this round: if many, more requests wait
 * input       what was just read, of whichever client
 */
static struct server {
    const char *option[128], *origins[16];
    int origin_count, epoll, listener;
    struct ssl_ctx_st *tls;
    bool settled, accept_due, waiting, dirty;
    int64_t now, second_at, stop_at;
    struct client *clients[1 << 20], *dead;
    int clients_end, connected;
    size_t held, turn, answered;
    struct channel channels[CHANNELS_MAX];
    struct buffer input;
} s;

/* What went wrong, in one line in ten seconds at most. */
static void tell(const char *who, const char *what) {
    static int64_t next, count;
    count++;
    if (s.now < next) return;
    next = s.now + 10 * SECOND;
    warnx("%s: %.200s (%jd so far)", who, what, count);
}

/* ---- 7. TLS (skip at first) ---------------------------------------------
 * For https and wss (make TLS=1), by OpenSSL. After EAGAIN, it must be given
 * the same bytes again (more may follow). It is, because a cursor only moves
 * past what was sent.
 */
#ifdef TLS
#include <openssl/err.h>
#include <openssl/ssl.h>

/* Loads certificate and key for clients to come. A bad one ends the program at
 * the start; later it changes nothing. */
static void tls_load(void) {
    const char *cert = s.option['C'], *key = s.option['K'];
    SSL_CTX *tls = SSL_CTX_new(TLS_server_method());
    must(tls ? 0 : -1, "SSL_CTX_new");
    SSL_CTX_set_min_proto_version(tls, TLS1_2_VERSION);
    SSL_CTX_set_options(tls, SSL_OP_NO_RENEGOTIATION);
    SSL_CTX_clear_mode(tls, SSL_MODE_AUTO_RETRY); /* a record at a time */
    SSL_CTX_set_mode(tls, SSL_MODE_ENABLE_PARTIAL_WRITE |
                              SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER |
                              SSL_MODE_RELEASE_BUFFERS);
    bool good = SSL_CTX_use_certificate_chain_file(tls, cert) == 1 &&
                SSL_CTX_use_PrivateKey_file(tls, key, SSL_FILETYPE_PEM) == 1 &&
                SSL_CTX_check_private_key(tls) == 1; /* also of another kind */
    const char *why = ERR_reason_error_string(ERR_get_error());
    if (!good && !s.tls) errx(FAILURE, "%s, %s: %s", cert, key, why);
    if (!good) warnx("%s, %s: %s", cert, key, why);
    SSL_CTX_free(good ? s.tls : tls);
    if (good) s.tls = tls;
}

static bool tls_open(struct client *c) {
    c->tls = SSL_new(s.tls);
    if (c->tls) SSL_set_accept_state(c->tls);
    return c->tls && SSL_set_fd(c->tls, c->fd);
}

/* As send() and recv(), but the end of the stream is an error, too. */
static int tls_move(struct client *c, bool send, void *at, int size) {
    ERR_clear_error();
    int n = send ? SSL_write(c->tls, at, size) : SSL_read(c->tls, at, size);
    if (n > 0) return n;
    int error = SSL_get_error(c->tls, n);
    bool write = error == SSL_ERROR_WANT_WRITE;
    c->blocked |= write; /* also when reading */
    /* To send never has to wait for half a record of the client's. */
    bool read = error == SSL_ERROR_WANT_READ && !send;
    errno = write || read ? EAGAIN : ECONNRESET;
    return -1;
}

#else
#define tls_load()              errx(MISUSE, "--cert: not made with TLS=1")
#define tls_open(c)             true
#define tls_move(c, send, p, n) (-1)
#define SSL_shutdown(tls)       ((void)(tls))
#define SSL_free(tls)           ((void)(tls))
#endif

/* ---- 8. Clients ---------------------------------------------------------
 * A socket is a descriptor whose other end is across the network. Ours never
 * wait: where recv() has nothing or send() finds no room, errno is EAGAIN, and
 * epoll tells when to try again (EPOLLIN: to read, EPOLLOUT: to send).
 *
 * What a client is sent, in this order: the rest of what has begun to go out of
 * the log, its private bytes, a file, the log.
 */
static void channel_remove(struct client *c) {
    if (!c->channel) return;
    *c->link = c->next;
    if (c->next) c->next->link = c->link;
    c->channel = NULL;
}

/* Puts a client in front of all others, also if it is in there already. */
static void channel_insert(struct channel *ch, struct client *c) {
    channel_remove(c);
    c->channel = ch;
    c->next = ch->clients;
    c->link = &ch->clients;
    if (c->next) c->next->link = &c->next;
    ch->clients = c;
}

/* It is gone for all but server_reap. */
static void client_drop(struct client *c) {
    if (c->dead) return;
    channel_remove(c);
    c->dead = true;
    c->next = s.dead;
    s.dead = c;
}

/* "127.0.0.1", also where IPv6 calls it ::ffff:127.0.0.1. */
static const char *client_address(const struct client *c) {
    static char text[NI_MAXHOST];
    struct sockaddr from[2]; /* as an IPv6 address takes two */
    socklen_t size = sizeof from;
    if (getpeername(c->fd, from, &size) ||
        getnameinfo(from, size, text, sizeof text, NULL, 0, NI_NUMERICHOST))
        return "-"; /* it has reset the connection */
    return strncmp(text, "::ffff:", 7) ? text : text + 7;
}

static void client_cut(struct client *c, const char *why) {
    warnx("%s client %s was cut off", why, client_address(c));
    client_drop(c);
}

/* Tells epoll what we want to hear of a client, notes that it waits, and counts
 * its memory. We read only when its private bytes are out, so that they cannot
 * pile up (what is for NATS may, up to NATS_UNSENT). epoll tells of errors in
 * any case; EPOLLERR only makes sure that `interest` is not 0, which means "not
 * added yet". */
static void client_watch(struct client *c) {
    int act = c->interest ? EPOLL_CTL_MOD : EPOLL_CTL_ADD;
    struct epoll_event event = {.events = EPOLLERR, .data.fd = c->fd};
    bool full = c->out.size > 0 && c->protocol != NATS;
    bool read = c->shut || !(full || c->closing || c->waiting);
    event.events |= (read ? EPOLLIN : 0) | (c->blocked ? EPOLLOUT : 0);
    s.waiting |= c->waiting;
    if (c->held == 0) c->since = s.now;
    s.held -= c->held;
    c->held = c->in.capacity + c->out.capacity;
    s.held += c->held;
    if (c->dead || event.events == c->interest) return;
    c->interest = event.events;
    if (epoll_ctl(s.epoll, act, c->fd, &event)) client_drop(c);
}

static struct client *client_add(int fd, enum protocol protocol) {
    struct client *c = malloc(sizeof *c);
    must(c ? 0 : -1, "malloc");
    *c = (struct client){.fd = fd, .protocol = protocol};
    c->deadline = s.now + REQUEST_TIME;
    s.clients[fd] = c;
    if (fd >= s.clients_end) s.clients_end = fd + 1;
    s.connected += protocol != NATS;
    if (s.tls && protocol != NATS && !tls_open(c)) client_drop(c);
    client_watch(c);
    return c;
}

/* Returns how many bytes went out; if none, the client is blocked. */
static size_t client_send(struct client *c, void *at, size_t size) {
    ssize_t n = c->tls ? tls_move(c, true, at, size) : send(c->fd, at, size, 0);
    if (n <= 0 && errno != EAGAIN) client_drop(c);
    c->blocked = n <= 0;
    if (n > 0 && c->closing) c->deadline = s.now + IDLE_TIME;
    return n > 0 ? n : 0;
}

/* Sends all that is due, until it is out or the kernel's buffer is full. A
 * client that is closing is shut then: we close our half, and read on until it
 * closes its own. A close() at once would answer bytes that are on their way to
 * us with a reset, which could destroy what the client has not read yet.
 *
 * Each turn does the first that applies, in the order in which things go out.
 * boundary == cursor: no frame has begun to go out, so private bytes may. At
 * last the boundary moves to the log's head; the next turn sends all that. For
 * example, both are 100 and the head is 300: the boundary becomes 300. If the
 * kernel takes 50 bytes, the cursor is 150, and a pong waits until it is 300.
 * Of a file, a round sends one piece, since there may always be room for it. */
static void client_flush(struct client *c) {
    struct log *log = c->channel ? &c->channel->log : NULL;
    while (!c->dead && !c->blocked && !c->shut) {
        size_t size = c->boundary - c->cursor;
        if (log && size > 0) {
            c->cursor += client_send(c, log_at(log, c->cursor), size);
        } else if (c->sent < c->out.size) {
            char *rest = c->out.bytes + c->sent;
            c->sent += client_send(c, rest, c->out.size - c->sent);
        } else if (c->out.size > 0) {
            buffer_clear(&c->out);
            c->sent = 0;
            c->since = s.now;
            c->blocked = c->file && size > READ_SIZE; /* others first */
        } else if (c->file && size > 0) {
            size = min(size, READ_SIZE);
            char *room = buffer_reserve(&c->out, size);
            ssize_t n = pread(c->file, room, size, c->cursor);
            if (n <= 0) client_drop(c); /* the file has become shorter */
            c->out.size = n > 0 ? n : 0;
            c->cursor += c->out.size;
        } else if (c->closing) {
            channel_remove(c);
            if (c->tls) SSL_shutdown(c->tls);
            shutdown(c->fd, SHUT_WR);
            c->shut = true;
            c->deadline = s.now + CLOSE_TIME;
        } else if (log && c->cursor < log->head) c->boundary = log->head;
        else break;
    }
    client_watch(c);
}

/* ---- 9. Channels --------------------------------------------------------
 * Made when first named. A message is appended to the log once, and after the
 * round each client gets all that is new with one send().
 *
 * Slow readers: when a new message would overwrite what some client was not
 * sent yet, the log is full. Then those who talk in this channel wait: we do
 * not read from them, so TCP slows them down. They go on once every client was
 * sent all of the log (with room for one message, they would stop again). A
 * client that was not within SLOW_TIME is cut off.
 */

/* Finds a channel. What nobody has made is empty, and has no ring. (Places that
 * were never used have no name, either, but "" was made first.) */
static struct channel *channel_find(const char *name) {
    static struct channel none;
    struct channel *ch = s.channels, *end = ch + CHANNELS_MAX;
    while (ch < end && strcmp(ch->name, name) != 0) ch++;
    return ch < end ? ch : &none;
}

/* Finds or makes a channel: in the place of one without clients, and of these
 * the one in which nobody has talked for longest. NULL: there is none. */
static struct channel *channel_get(const char *name) {
    struct channel *ch = channel_find(name), *place = NULL;
    if (ch->log.ring) return ch;
    for (ch = s.channels; ch < s.channels + CHANNELS_MAX; ch++)
        if (!ch->clients && (!place || ch->used < place->used)) place = ch;
    if (!place || (!place->log.ring && !log_open(&place->log))) return NULL;
    /* Not 0, so that what was never used comes first. */
    *place = (struct channel){.log.ring = place->log.ring, .used = s.now + 1};
    strcpy(place->name, name);
    return place;
}

/* Sends what is new to all clients, and finds out how far they have come. */
static void channel_flush(struct channel *ch) {
    bool late = ch->cut_at && s.now >= ch->cut_at;
    uint64_t head = ch->log.head;
    ch->low = head;
    ch->dirty = false;
    for (struct client *c = ch->clients, *next; c; c = next) {
        next = c->next;
        if (!c->blocked) client_flush(c);
        if (!c->channel) continue; /* it has left */
        if (late && c->cursor < head) client_cut(c, "slow");
        else ch->low = min(ch->low, c->cursor);
    }
    if (ch->low == head) ch->cut_at = 0;
}

/* Makes room for a message at the log's head, where the oldest messages go. If
 * that must not be, the answer is false ("not now"), and no message went. */
static bool channel_room(struct channel *ch, size_t size) {
    struct log log = ch->log;
    uint64_t count = ch->count;
    struct message m;
    if (ch->cut_at) return false; /* until channel_flush finds all up to date */
    for (; log.head + FRAME_HEADER_MAX + size - log.tail > LOG_SIZE; count--)
        log.tail += frame_read(log_at(&log, log.tail), &m);
    if (ch->low < log.tail) ch->cut_at = s.now + SLOW_TIME;
    if (ch->cut_at) return false;
    ch->log = log;
    ch->count = count;
    return true;
}

/* Appends a message as a frame; channel_room has made the room. */
static void channel_append(struct channel *ch, struct message m) {
    uint8_t header[FRAME_HEADER_MAX];
    log_append(&ch->log, header, frame_header(header, m.opcode, m.size));
    log_append(&ch->log, m.bytes, m.size);
    ch->count++;
    ch->used = s.now;
    ch->dirty = s.dirty = true;
}

/* Gives a message from another instance to our clients; one that is not right
 * is dropped. False: "not now". */
static bool channel_deliver(const char *name, struct message m) {
    size_t n = strnlen(name, CHANNEL_NAME + 1);
    bool good = m.size <= MESSAGE_MAX && n <= CHANNEL_NAME &&
                utf8_valid(name, n) &&
                (m.opcode == BINARY ||
                 (m.opcode == TEXT && utf8_valid(m.bytes, m.size)));
    struct channel *ch = good ? channel_get(name) : NULL;
    if (!ch) tell("bus", good ? "too many channels" : "not a message of ours");
    if (ch && !channel_room(ch, m.size)) return false;
    if (ch) channel_append(ch, m);
    return true;
}

/* ---- 10. The bus: its data -----------------------------------------------
 * UDP: datagrams get lost, come twice or in another order. DATA carries our
 * stream of messages, STATUS tells what we have of whom.
 *
 *        sender                         receiver
 *          | --- DATA 7 [hi!] ---------> |  delivers it
 *          | --- DATA 8 [how are you?] > X  lost
 *          | --- DATA 9 [well?] -------> |  keeps it: 8 must come first
 *          | <-- STATUS next 8, gap 9 -- |  "I have all before 8, lack 8"
 *          | --- DATA 8 [how are you?] > |  delivers both
 *
 * What went out or came in is kept in one ring of datagrams, in that order.
 * Repair and history are one act, to send some of them again.
 */

/* What instances send each other, in little-endian order. A DATA carries whole
 * messages, or a piece of one that is too large for one datagram; its pieces
 * follow each other. A message: the channel's name, a NUL, and the frame as it
 * stands in a log.
 *
 *   0    mac: of all that follows     DATA:   40  message: number of the first;
 *   20   kind, 21 flags                           0: a piece, not the first
 *   22   0                                    48  the messages
 *   24   sender                       STATUS: 40  an entry for each sender that
 *   32   number: a sender counts its              it knows, itself first
 *        DATA from 1; apart from
 *        them, its STATUS
 *
 * SETTLED: I am not new. LACKS: send me what I lack. WAITS: tell me what you
 * have of mine. LEAVES: this is my last one.
 */
enum { DATA = 4, STATUS }; /* other versions have other numbers */
enum { SETTLED = 1, LACKS = 2, WAITS = 4, LEAVES = 8 };
#define DATA_MAX  1152 /* so that an MTU of 1,280 never cuts it in two */
#define WINDOW    64   /* if more than that is not acknowledged, talkers wait */
#define KEPT      8192 /* datagrams kept, of all senders */
#define PEERS_MAX 36   /* senders known, also dead ones, and ourselves */

/* What the sender of a STATUS has of sender `id`: it keeps datagrams [base,
 * next), all of them, has taken in all before next, and lacks [next, gap): only
 * the first hole, WINDOW long at most. */
struct entry {
    uint64_t id, base, next, gap;
};

struct datagram {
    uint8_t mac[SHA1_SIZE], kind, flags, zero[2];
    uint64_t sender, number;
    union {
        struct {
            uint64_t message;
            uint8_t bytes[DATA_MAX];
        };
        struct entry known[PEERS_MAX];
    };
};
#define STATUS_HEADER 40
#define DATA_HEADER   48
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "see above");

struct kept {
    int64_t sent; /* when it was last seen on the network */
    size_t size;
    struct datagram d;
};

/* An instance that we know of, perhaps a dead one. Its stream is all DATA that
 * it ever sent, numbered. peers[0] is this instance. Where id is 0, this place
 * and all behind it were never used.
 *
 * id          the older, the smaller
 * base, next  as in struct entry: what we have of its stream. base 0: no STATUS
 *             that we trust has told where it begins, so its DATA is ignored
 * head        the end of its stream, as far as we have heard
 * acked       it has all of our stream before this
 * message     the number of its message that comes next; 0: we do not know
 * status      the number of its latest STATUS
 * heard       when it last said something, ...
 * acked_at    ... got on with our stream, or had all of it, ...
 * next_at     ... and when something of its stream came, or we had all of it
 * alive       it was heard within ALIVE_TIME; only peer_tick changes it. We are
 *             from the start, so nobody is put into our place
 * settled     it is alive, and no newcomer any more
 * near        we wait for it: once settled, it came within a window of our
 *             stream's end, and has not stopped since
 * in          messages that wait for room, or the first pieces of one
 */
struct peer {
    uint64_t id, base, next, head, acked, message, status;
    int64_t heard, acked_at, next_at;
    bool alive, settled, near;
    struct buffer in;
};

/* fd          0: no UDP bus
 * to          the group, or a list of peers
 * far         its datagrams leave this machine
 * interface   its index, 0 if it is gone; one that is made anew has another
 * kept        a ring, in the order of coming and going; kept_end were put there
 * place       where in it, by peer and number % KEPT: see peer_kept
 * out         messages to be sent at the end of the round, in one datagram; or
 *             a single one that is too large for that
 * posted      the number of the message that is posted next
 *
 * A STATUS is sent at two times, of which the first wakes us:
 * status_at   a receipt is due: after a second, or since somebody needs it
 * ask_at      it is time to ask for what we lack, or to tell how far our DATA
 *             went. Then it is time again after `pause`, which doubles
 * flags       what the next one asks for: LACKS and WAITS, or nothing
 */
static struct bus {
    int fd, to_count;
    struct sockaddr_in to[PEERS_MAX];
    bool group, far;
    unsigned interface;
    uint8_t key[64];
    struct peer peers[PEERS_MAX];
    struct kept kept[KEPT];
    uint64_t kept_end;
    uint16_t place[PEERS_MAX][KEPT];
    struct buffer out;
    uint64_t posted;
    uint8_t flags;
    int64_t status_at, ask_at, pause;
} bus;

/* ---- 11. The bus at work (read it last) ---------------------------------
 * - A sender sends again what others lack of its own; what a dead one said, all
 *   who have it do. What nobody sends within GIVE_UP is lost.
 * - Who is new says so (it is not SETTLED). The eldest then sends it all that
 *   it keeps, in that order. So the newcomer, if nothing is lost or new on the
 *   way, has a history that somebody really saw, words of the dead included.
 * - A message is taken from a client only if all live peers have our stream but
 *   for the last WINDOW datagrams. Nobody waits for a peer that is new, or that
 *   makes no progress for ALIVE_TIME, until it has caught up.
 *
 * An HMAC guards each datagram, if there is a secret. A recording is no danger:
 * DATA is taken once, by number, and a STATUS only if its number is higher than
 * the last one's. The first one has to name us, so it cannot be older than we
 * are. This is how two meet; clocks do not matter:
 *
 *         9, a newcomer                  7
 *          | --- STATUS of 9 ----------> |  may be a recording: it only answers
 *          | <-- STATUS of 7 and 9 ----- |
 *   trusts | --- STATUS of 9 and 7 ----> |  trusts 9
 *        7 | <-- DATA, the history ----- |
 */
#define ALIVE_TIME  5000  /* of silence, or without progress */
#define RECENT      1100  /* who lives has said something since then */
#define GIVE_UP     20000 /* then what is missing is lost */
#define HELLO_TIME  300  /* that a newcomer listens, then lets clients in ... */
#define CATCH_UP    2000 /* ... or, as long as it lacks something, by then */
#define BEAT_FIRST  20   /* after the last DATA, doubling to a second */
#define ASK_MAX     400  /* the longest pause while we lack something */
#define RESEND_TIME 4    /* between two of the same DATA, at least */

static struct peer *const self = bus.peers;
static struct peer *const peers_end = bus.peers + PEERS_MAX;

/* Finds a sender, or makes one: in a free place, or that of who is dead for
 * longest. What it says is ignored as long as its base is 0. */
static struct peer *peer_get(uint64_t id, bool make) {
    struct peer *p = self, *place = NULL;
    for (; p < peers_end && p->id && p->id != id; p++)
        if (!p->alive && (!place || p->heard < place->heard)) place = p;
    if (p < peers_end && p->id == id) return p;
    if (p < peers_end) place = p;
    if (make && !place) tell("bus", "too many instances");
    if (!make || !place) return NULL;
    buffer_clear(&place->in);
    /* Only a STATUS of its own shows that it is alive. */
    *place = (struct peer){.id = id, .heard = s.now - ALIVE_TIME};
    return place;
}

/* To all other instances; what comes of it, their STATUS tells. */
static void bus_transmit(const struct datagram *d, size_t size) {
    for (int i = 0; i < bus.to_count; i++) {
        const void *to = &bus.to[i];
        ssize_t n = sendto(bus.fd, d, size, 0, to, sizeof *bus.to);
        if (n < 0 && errno != EAGAIN) tell("bus", strerror(errno));
    }
}

/* Puts a datagram of a sender into the ring, in the place of the oldest. */
static void bus_keep(struct peer *p, const struct datagram *d, size_t size) {
    size_t place = bus.kept_end++ % KEPT;
    struct kept *k = &bus.kept[place];
    struct peer *old = peer_get(k->d.sender, false);
    if (old && k->d.number >= old->base && k->d.number < old->next)
        old->base = k->d.number + 1; /* so there is no hole in [base, next) */
    bus.place[p - self][d->number % KEPT] = place;
    k->sent = s.now;
    k->size = size;
    memcpy(&k->d, d, size);
}

/* Datagram `number` of a sender, NULL if it is not in the ring. */
static struct kept *peer_kept(const struct peer *p, uint64_t number) {
    struct kept *k = &bus.kept[bus.place[p - self][number % KEPT]];
    return k->d.sender == p->id && k->d.number == number ? k : NULL;
}

/* Signs and sends a datagram of ours, and keeps a DATA. */
static void bus_send(struct datagram *d, size_t size) {
    d->sender = self->id;
    hmac(bus.key, &d->kind, size - SHA1_SIZE, d->mac);
    if (d->kind == DATA) bus_keep(self, d, size);
    bus_transmit(d, size);
}

/* Sends what was posted: after each round, or when a datagram is full. */
static void bus_flush(void) {
    struct datagram d = {.kind = DATA, .message = self->message};
    for (size_t at = 0, n; at < bus.out.size; at += n) {
        n = min(bus.out.size - at, DATA_MAX);
        memcpy(d.bytes, bus.out.bytes + at, n);
        d.number = self->next++;
        bus_send(&d, DATA_HEADER + n);
        d.message = 0;           /* if there are more, they are pieces */
        if (bus.flags) continue; /* a STATUS is due soon anyway */
        /* Else one tells the end of our stream, in case just this is lost. */
        bus.pause = BEAT_FIRST;
        bus.ask_at = s.now + BEAT_FIRST;
    }
    self->message = bus.posted;
    bus.out.size = 0;
}

/* Takes a message from one of our clients. If it does not fit into the datagram
 * that is being filled, that one is sent first. */
static void bus_post(const char *name, struct message m) {
    uint8_t header[FRAME_HEADER_MAX];
    size_t size = frame_header(header, m.opcode, m.size), n = strlen(name) + 1;
    if (bus.out.size + n + size + m.size > DATA_MAX) bus_flush();
    buffer_add(&bus.out, name, n);
    buffer_add(&bus.out, header, size);
    buffer_add(&bus.out, m.bytes, m.size);
    bus.posted++;
}

/* Has every peer that we wait for all of our stream, but for the last `window`
 * datagrams? */
static bool bus_room(uint64_t window) {
    for (struct peer *p = self + 1; p < peers_end; p++)
        if (p->near && p->acked + window < self->next) return false;
    return true;
}

/* The end of what we lack next of a sender's stream. */
static uint64_t peer_gap(const struct peer *p) {
    uint64_t gap = p->next;
    while (gap < p->head && gap < p->next + WINDOW && !peer_kept(p, gap)) gap++;
    return gap;
}

static void bus_send_status(uint8_t flags) {
    struct datagram d = {.kind = STATUS, .number = ++self->status};
    struct entry *e = d.known;
    d.flags = s.settled ? flags | SETTLED : flags;
    for (struct peer *p = self; p < peers_end && p->id; p++)
        *e++ = (struct entry){p->id, p->base, p->next, peer_gap(p)};
    bus_send(&d, (char *)e - (char *)&d);
}

/* Goes on at `next`: what is missing before is given up, or we begin there. */
static void peer_skip(struct peer *p, uint64_t next) {
    /* A dead one's next gap has waited as long, but was not asked for yet: it
     * has CATCH_UP. For others, GIVE_UP begins again. */
    p->next_at = s.now - (p->alive || !p->base ? 0 : GIVE_UP - CATCH_UP);
    p->base = p->next = next;
    bus.pause = 2 + random() % 4; /* so ask soon */
    p->in.size = 0; /* pieces of what is lost, or what waits for room */
}

/* Delivers the whole messages that are here. False: a channel has no room. */
static bool peer_deliver(struct peer *p) {
    struct message m;
    while (p->in.size > 0) {
        /* Of a broken message we may look at so much behind p->in.size. */
        buffer_reserve(&p->in, CHANNEL_NAME + FRAME_HEADER_MAX);
        const char *name = p->in.bytes;
        size_t size = strnlen(name, min(p->in.size, CHANNEL_NAME + 1)) + 1;
        size += frame_read((const uint8_t *)name + size, &m);
        if (m.size > MESSAGE_MAX) size = p->in.size; /* that is none of ours */
        if (size > p->in.size) break; /* its next piece has to come */
        if (!channel_deliver(name, m)) return false;
        p->in.size -= size;
        memmove(p->in.bytes, p->in.bytes + size, p->in.size);
        p->message++;
    }
    return true;
}

/* Delivers what waits, then takes what comes next of a sender's stream, as long
 * as it is here. False: a channel has no room, and the rest stays in the ring
 * until it has. */
static bool peer_take(struct peer *p) {
    while (peer_deliver(p)) {
        const struct kept *k = peer_kept(p, p->next);
        if (!k) return true;
        uint64_t message = k->d.message, known = p->message;
        if (known && message > known)
            warnx("lost %ju messages of peer %016jx", message - known, p->id);
        if (message) p->in.size = 0; /* what it has begun, it does not end */
        if (message) p->message = message;
        /* A piece whose first one is lost is good for nothing. */
        if (message || p->in.size > 0)
            buffer_add(&p->in, k->d.bytes, k->size - DATA_HEADER);
        /* The sender waits for our receipt at the end of its window. */
        if (++p->next % (WINDOW / 4) == 0) bus.status_at = s.now;
    }
    return false;
}

static void bus_data_in(struct peer *p, const struct datagram *d, size_t size) {
    struct kept *k = peer_kept(p, d->number);
    if (d->number >= p->head) p->head = d->number + 1;
    if (k) k->sent = s.now; /* somebody has sent it again */
    if (k || d->number < p->next || d->number >= p->next + WINDOW) return;
    bus_keep(p, d, size);
    p->next_at = s.now;
    if (s.now - p->heard < ALIVE_TIME) p->heard = s.now;
    peer_take(p);
    /* It gets on, so ask soon; at random, so that not all ask at once. */
    if (p->next < p->head) bus.pause = 2 + random() % 4;
}

static void bus_resend(struct kept *k) {
    if (!k || s.now - k->sent < RESEND_TIME) return;
    bus_transmit(&k->d, k->size);
    k->sent = s.now;
}

/* Sends again what a peer lacks of ours, and of what the dead said. */
static void bus_repair(const struct entry *e, const struct entry *end) {
    for (; e < end; e++) {
        struct peer *p = peer_get(e->id, false);
        if (!p || (p != self && p->alive)) continue;
        /* If we keep that no more, we say so. */
        if (e->next < p->base) bus.status_at = s.now;
        for (uint64_t n = e->next; n < e->gap && n < e->next + WINDOW; n++)
            bus_resend(peer_kept(p, n));
    }
}

/* The eldest that has said something just now sends a newcomer the next part of
 * all that is in the ring, the oldest first, but for what it `has`. */
static void bus_send_history(const struct entry *has, const struct entry *end) {
    for (struct peer *p = self + 1; p < peers_end; p++)
        if (p->settled && p->id < self->id && s.now - p->heard < RECENT) return;
    for (int i = 0, count = 0; i < KEPT && count < WINDOW; i++) {
        struct kept *k = &bus.kept[(bus.kept_end + i) % KEPT];
        const struct entry *e = has;
        while (e < end && e->id != k->d.sender) e++;
        /* It has that (below `next`, the difference is huge), or this is too
         * far ahead for it. */
        if (e == end || k->d.number - e->next >= WINDOW) continue;
        bus_resend(k);
        count++;
    }
}

/* A peer tells how far the streams go that it knows. We believe a sender about
 * itself, and anybody about the dead; as newcomers, who cannot tell yet who is
 * dead, we believe all of it. */
static void bus_heads_in(const struct peer *from, const struct entry *e,
                         const struct entry *end) {
    for (; e < end; e++) {
        bool believe = e->id == from->id || !s.settled;
        struct peer *p = e->base ? peer_get(e->id, believe) : NULL;
        /* Else it has to be one of the dead, and one that we know. */
        if (!p || p == self || (!believe && (p->alive || !p->base))) continue;
        if (e->next > p->head) bus.pause = 2 + random() % 4; /* there is more */
        if (e->next > p->head) p->head = e->next;
        if (e->base > p->next) peer_skip(p, e->base);
    }
}

/* What a peer has of whom: of itself first, `ours` of us. */
static void bus_status_in(const struct datagram *d, size_t size) {
    const struct entry *known = d->known, *ours = known;
    const struct entry *end = known + (size - STATUS_HEADER) / sizeof *known;
    struct peer *from = peer_get(d->sender, true);
    while (ours < end && ours->id != self->id) ours++;
    if (known == end || known->id != d->sender || known->base == 0) return;
    /* Its first STATUS cannot name us; we answer, then it does. */
    if (ours == end) bus.status_at = min(bus.status_at, s.now + BEAT_FIRST);
    if (d->flags & WAITS) bus.status_at = s.now;
    /* One that names us is surely not from before our start. */
    if (!from || d->number <= from->status) return;
    if (ours == end && !from->status) return;
    from->status = d->number;
    from->heard = d->flags & LEAVES ? s.now - ALIVE_TIME : s.now;
    from->settled = d->flags & SETTLED;
    if (ours < end && ours->next > from->acked && ours->next <= self->next) {
        from->acked = ours->next;
        from->acked_at = s.now;
    }
    bus_heads_in(from, known, end);
    if (d->flags & LACKS && from->settled) bus_repair(known, end);
    else if (d->flags & LACKS && s.settled) bus_send_history(known, end);
}

/* Takes what has come, but not too much: then it is the clients' turn. */
static void bus_readable(void) {
    struct datagram d = {0};
    /* Ours first, so that the ring has the order that our clients saw. */
    bus_flush();
    for (int i = 0; i < 4 * WINDOW; i++) {
        int size = recv(bus.fd, &d, sizeof d, MSG_TRUNC);
        if (size < 0) return;
        struct peer *p = peer_get(d.sender, false);
        if (p == self) continue; /* that is us */
        uint8_t mac[SHA1_SIZE] = {0};
        bool wrong = size < DATA_HEADER || size > (int)sizeof d || !d.sender;
        if (!wrong) hmac(bus.key, &d.kind, size - SHA1_SIZE, mac);
        for (int j = 0; j < SHA1_SIZE; j++) wrong |= mac[j] != d.mac[j];
        if (wrong) tell("bus", "a datagram not of ours, or of another secret");
        else if (d.kind == STATUS) bus_status_in(&d, size);
        else if (d.kind == DATA && p && p->base) bus_data_in(p, &d, size);
    }
    /* So much for this round. There is more, and in it may be what we lack. */
    bus.ask_at = s.now + bus.pause;
}

/* Finds out if a peer lives and gets on with our stream, and gives up what
 * nobody sends us of its own. Returns whether something of it is missing. */
static bool peer_tick(struct peer *p) {
    bool alive = s.now - p->heard < ALIVE_TIME, same = alive == p->alive;
    if (!same) warnx("peer %016jx %s", p->id, alive ? "joined" : "left");
    p->alive = alive;
    p->settled &= alive;
    /* Do we get on with its stream? */
    bool missing = p->next < p->head && !peer_kept(p, p->next);
    if (!missing || !same) p->next_at = s.now;
    if (s.now - p->next_at >= GIVE_UP) peer_skip(p, peer_gap(p));
    /* Does it get on with ours? */
    uint64_t lacks = self->next - p->acked;
    if (lacks == 0) p->acked_at = s.now;
    bool late = s.now - p->acked_at >= ALIVE_TIME;
    if (late && p->near && s.now - p->heard < RECENT) /* else it leaves */
        warnx("peer %016jx makes no progress", p->id);
    if (lacks <= WINDOW && p->acked_at == s.now) p->near = p->settled;
    if (late || !alive) p->near = false;
    return missing;
}

/* What is due by time. Returns when it is again. */
static int64_t bus_tick(void) {
    bool missing = false;
    for (struct peer *p = self + 1; p < peers_end && p->id; p++) {
        if (!peer_take(p)) s.waiting = true;
        missing |= peer_tick(p);
    }
    /* Have we the history? Our next STATUS tells that we are settled. */
    s.settled |= s.now >= (missing ? CATCH_UP : HELLO_TIME);
    /* Have we to ask for something? */
    bus.flags = missing ? LACKS : 0;
    if (!bus_room(s.stop_at ? 0 : WINDOW)) bus.flags |= WAITS;
    if (bus.flags) bus.ask_at = min(bus.ask_at, s.now + bus.pause);
    /* Is a STATUS due? At status_at it is a receipt, and asks for nothing. It
     * asks at ask_at, ever more rarely; where there is hope, soon again. (The
     * pause begins at 0, which would stay 0 if it only doubled.) */
    bool again = s.now >= bus.ask_at;
    if (!again && s.now < bus.status_at) return min(bus.ask_at, bus.status_at);
    bus_send_status(again ? bus.flags : 0);
    if (again) bus.pause = min(bus.pause * 2 + 1, bus.flags ? ASK_MAX : SECOND);
    if (again) bus.ask_at = s.now + bus.pause;
    bus.status_at = s.now + SECOND;
    return s.now; /* the next round finds out what is due then */
}

/* ---- 12. The bus: its start (skip at first) -----------------------------
 * A socket for datagrams, to a multicast group or to a list of peers, and the
 * secret. Left out: IPv6, and finding peers beyond one network.
 */

/* Joins the group by the interface's name: made anew, it is another one. (To
 * ask for it takes a descriptor. Without one, it may be there all the same.) */
static void bus_join(void) {
    unsigned interface = bus.group ? if_nametoindex(s.option['i']) : 0;
    if (interface == bus.interface || (!interface && errno != ENODEV)) return;
    struct ip_mreqn member = {bus.to->sin_addr, {0}, bus.interface};
    if (s.now > 0) /* not at the start */
        warnx("bus: %s is %s", s.option['i'], interface ? "back" : "gone");
    setsockopt(bus.fd, IPPROTO_IP, IP_DROP_MEMBERSHIP, &member, sizeof member);
    bus.interface = member.imr_ifindex = interface;
    setsockopt(bus.fd, IPPROTO_IP, IP_ADD_MEMBERSHIP, &member, sizeof member);
    setsockopt(bus.fd, IPPROTO_IP, IP_MULTICAST_IF, &member, sizeof member);
}

static struct addrinfo *resolve(const char *host, const char *port, int kind) {
    struct addrinfo hints = {.ai_flags = AI_PASSIVE | AI_NUMERICSERV}, *found;
    hints.ai_family = kind;
    hints.ai_socktype = SOCK_STREAM; /* for UDP, addresses look the same */
    int error = getaddrinfo(host, port, &hints, &found);
    if (parse_number(port) < 0 || parse_number(port) > 65535)
        errx(MISUSE, "--port, --bus: not a port: %s", port);
    if (error) errx(FAILURE, "%s: %s", host, gai_strerror(error));
    return found;
}

static void set_option(int fd, int level, int name, int value) {
    setsockopt(fd, level, name, &value, sizeof value);
}

static void bus_secret(const char *name) {
    char secret[1025];
    struct stat st;
    FILE *file = fopen(name, "r");
    must(file ? fstat(fileno(file), &st) : -1, name);
    if (st.st_mode & 077) errx(FAILURE, "%s: others may read it", name);
    if (fscanf(file, "%1024[^\r\n]", secret) != 1)
        errx(FAILURE, "%s: the secret is empty", name);
    fclose(file);
    sha1(secret, strlen(secret), bus.key);
}

/* HOST:PORT: a multicast group; or a list of peers, one of them us. */
static void bus_addresses(void) {
    char *list = strdup(s.option['b']), *host = strsep(&list, ","), *port;
    for (; host; host = strsep(&list, ",")) {
        port = strrchr(host, ':');
        if (!port || port == host || parse_number(port + 1) <= 0 ||
            bus.to_count == PEERS_MAX - 1)
            errx(MISUSE, "--bus: not HOST:PORT,...: %s", s.option['b']);
        *port++ = '\0';
        struct sockaddr_in *to = &bus.to[bus.to_count++];
        memcpy(to, resolve(host, port, AF_INET)->ai_addr, sizeof *to);
        int first = ntohl(to->sin_addr.s_addr) >> 24;
        bus.group |= first >= 224 && first < 240;
        bus.far |= bus.group ? strcmp(s.option['i'], "lo") != 0 : first != 127;
        if (bus.group && bus.to_count > 1) errx(MISUSE, "--bus: two, a group");
    }
}

/* Binds to the group, or to the first of the list that is an address of ours.
 * If none is (behind NAT), to the first one's port. The key is the first line
 * of the secret's file, hashed. */
static void bus_open(void) {
    const char *secret = s.option['s'];
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    bus.fd = must(fd, "socket");
    bus_addresses();
    if (!secret && bus.far)
        errx(MISUSE,
             "the bus leaves this machine and needs -s FILE: (umask 077; "
             "head -c 32 /dev/urandom | base64 > FILE)");
    if (secret && strcmp(secret, "none")) bus_secret(secret);
    set_option(fd, SOL_SOCKET, SO_RCVBUF, 4 << 20);
    if (bus.group) {
        must(if_nametoindex(s.option['i']) ? 0 : -1, s.option['i']);
        set_option(fd, SOL_SOCKET, SO_REUSEADDR, 1);
        set_option(fd, IPPROTO_IP, IP_MULTICAST_ALL, 0);
        set_option(fd, IPPROTO_IP, IP_MULTICAST_TTL, bus.far);
        bus_join();
    }
    struct sockaddr_in *to = bus.to, *any = to + bus.to_count;
    *any = *to;
    any->sin_addr.s_addr = INADDR_ANY;
    while (bind(fd, (struct sockaddr *)to, sizeof *to))
        if (to++ == any) must(-1, s.option['b']);
    self->id = clock_us(CLOCK_REALTIME) << 8 | getpid() % 256;
    self->base = self->next = self->message = bus.posted = self->alive = 1;
    srandom(self->id);
}

/* ---- 13. NATS, another bus (skip at first) ------------------------------
 * For those who outgrow one network: the instances meet at a NATS server. The
 * connection is a client of ours that speaks its protocol, in lines:
 *
 *   it   INFO {...}                          we   CONNECT {...}
 *   it   PONG                                we   SUB chat.> 1, PING
 *   it   MSG chat.text.NAME 1 SIZE, payload  we   PUB chat.text.NAME SIZE, ...
 *
 * What the server does not take at once is dropped and counted. A newcomer
 * gets no history.
 */
#define NATS_MAX    (1 << 20) /* of a line, and of what is behind it */
#define NATS_UNSENT (4 << 20) /* then posts are dropped until it is out */

/* client      the connection to the NATS server, NULL: there is none
 * addresses   of the server, NULL: NATS is not our bus; at: the next to try
 * login       what we say to it first
 */
static struct nats {
    struct client *client;
    struct addrinfo *addresses, *at;
    struct buffer login;
} nats;

/* nats://[USER:PASSWORD@]HOST[:PORT], %XX in user and password is decoded. What
 * we say first is made here, so that neither has to be kept. */
static void nats_open(char *url) {
    struct buffer *out = &nats.login, shown = {0};
    char *user = strdup(url + 7), *at = strrchr(user, '@');
    char *host = strdup(at ? at + 1 : user), *port = strrchr(host, ':');
    buffer_print(&shown, "nats://%s", host);
    s.option['b'] = shown.bytes;
    memset(url, '*', strlen(url)); /* ps shows no password */
    user[at ? at - user : 0] = '\0';
    char *password = user + strcspn(user, ":");
    if (*password) *password++ = '\0';
    if (!url_decode(user, false) || !url_decode(password, false))
        errx(MISUSE, "--bus: a bad %%XX");
    if (port) *port++ = '\0';
    nats.addresses = resolve(host, port ? port : "4222", AF_UNSPEC);
    buffer_print(out, "CONNECT {\"user\":");
    buffer_json(out, user, strlen(user));
    buffer_print(out, ",\"pass\":");
    buffer_json(out, password, strlen(password));
    buffer_print(out, ",\"name\":\"chat\",\"verbose\":false,\"pedantic\":false,"
                      "\"echo\":false}\r\nSUB chat.> 1\r\nPING\r\n");
}

/* Tries the next of the server's addresses. */
static void nats_connect(void) {
    struct addrinfo *to = nats.at ? nats.at : nats.addresses;
    int type = SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC;
    int fd = socket(to->ai_family, type, 0);
    if (fd < 0) return;
    set_option(fd, IPPROTO_TCP, TCP_NODELAY, 1);
    (void)connect(fd, to->ai_addr, to->ai_addrlen); /* epoll tells the rest */
    nats.at = to->ai_next;
    nats.client = client_add(fd, NATS);
    nats.client->pinged = true; /* it has REQUEST_TIME to say something */
}

static void nats_post(const char *name, struct message m) {
    struct client *c = nats.client;
    bool ready = c && !c->dead && c->joined && c->out.size <= NATS_UNSENT;
    if (!ready) tell("bus", "NATS does not take it, a message is dropped");
    if (!ready) return;
    buffer_print(&c->out, "PUB chat.%s", m.opcode == TEXT ? "text" : "binary");
    if (*name) buffer_add(&c->out, ".", 1);
    buffer_escape(&c->out, name, strlen(name), URL, "%%%02X");
    buffer_print(&c->out, " %zu\r\n", m.size);
    buffer_add(&c->out, m.bytes, m.size);
    buffer_add(&c->out, "\r\n", 2);
}

static void nats_line(struct client *c, char *line) {
    if (!strncmp(line, "INFO ", 5) && !c->joined)
        buffer_add(&c->out, nats.login.bytes, nats.login.size);
    else if (!strcmp(line, "PING")) buffer_print(&c->out, "PONG\r\n");
    else if (!strcmp(line, "PONG") && !c->joined) {
        warnx("joined %s", s.option['b']);
        c->joined = s.settled = true;
    } else if (*line == '-') { /* an error, up to what could rule a terminal */
        line[strspn(line, LINE "\"\\")] = '\0';
        tell("bus", line);
    }
}

/* Handles one line, and what a MSG has behind it: "MSG chat.text.NAME 1 [REPLY]
 * SIZE". Returns whether to go on. */
static bool nats_step(struct client *c, struct buffer *in) {
    char *line = in->bytes + c->read, kind[8] = "", name[256] = "";
    size_t left = in->size - c->read;
    char *end = memchr(line, '\n', left);
    if ((!end && left > NATS_MAX) || end == line) client_drop(c);
    if (!end || c->dead) return false;
    end[-1] = '\0'; /* where the CR was; so, too, when the line is read again */
    struct message m = {0, end + 1, 0};
    size_t whole = m.bytes - line;
    if (!strncmp(line, "MSG ", 4)) {
        m.size = parse_number(strrchr(line, ' ') + 1); /* -1 is a large one */
        if (m.size > NATS_MAX) client_drop(c);
        whole += m.size + 2;
        if (c->dead || whole > left) return false;
        sscanf(line, "MSG chat.%7[^. ].%255[^ ]", kind, name);
        if (!strcmp(kind, "text")) m.opcode = TEXT;
        if (!strcmp(kind, "binary")) m.opcode = BINARY;
        if (!url_decode(name, false)) m.opcode = 0;
        c->waiting = !channel_deliver(name, m);
        if (c->waiting) return false;
    } else nats_line(c, line);
    c->read += whole;
    return true;
}

/* ---- 14. A message comes in ---------------------------------------------
 * The heart of it: what a client says goes to all clients of its channel, here
 * and at the other instances. First there has to be room.
 */
static bool server_room(struct channel *ch, size_t size) {
    return (!bus.fd || bus_room(WINDOW)) && channel_room(ch, size);
}

static void server_post(struct channel *ch, struct message m) {
    channel_append(ch, m);
    if (bus.fd) bus_post(ch->name, m);
    if (nats.addresses) nats_post(ch->name, m);
}

/* ---- 15. HTTP: the request ----------------------------------------------
 * RFC 9112. One request a connection, read strictly: what could be understood
 * in two ways is refused, and at once where it can never become right. Left
 * out: trailers, chunks (411 says what to send instead), keep-alive.
 */
#define TOKEN      ALNUM "!#$%&'*+-.^_`|~"
#define FIELDS_MAX 100
#define ONCE \
    "Host Origin Content-Length Sec-WebSocket-Key Sec-WebSocket-Version"
#define BAD  "400 Bad Request"
#define BUSY "503 Service Unavailable"

/* A header, or a parameter of the query. */
struct field {
    bool query;
    char *name, *value;
};

/* raw         what has come so far: the head, then the body
 * size        of the head; 0: not all of it is here
 * path        decoded, without the query; it, the method and the fields point
 *             into `copy`
 * head, old   the method is HEAD; the version is HTTP/1.0
 * type        of the answer, up to a space; NULL: it is not the last one
 * headers     what the answer has besides those of every answer
 */
struct request {
    struct client *client;
    const char *raw, *type;
    size_t raw_size, size, body_size;
    char *method, *path;
    bool head, old;
    int count;
    struct field fields[FIELDS_MAX];
    struct buffer headers;
    char copy[HEADER_MAX + 1];
};

/* The value of a header, or of "?NAME" in the query; NULL: there is none. */
static char *field(struct request *r, const char *name) {
    bool query = *name == '?';
    for (const struct field *f = r->fields; f < r->fields + r->count; f++)
        if (f->query == query && !strcasecmp(f->name, name + query))
            return f->value;
    return NULL;
}

/* Is `word` in the list that all headers of this name make together? */
static bool header_has(struct request *r, const char *name, const char *word) {
    size_t size = strlen(word);
    for (const struct field *f = r->fields; f < r->fields + r->count; f++) {
        const char *at = f->query || strcasecmp(f->name, name) ? "" : f->value;
        for (; *at; at += strcspn(at, ",")) {
            at += strspn(at, ", \t");
            if (strncasecmp(at, word, size) != 0) continue;
            if (strchr(",", at[size + strspn(at + size, " \t")])) return true;
        }
    }
    return false;
}

/* "METHOD /path?query HTTP/1.x". False: it is none. */
static bool request_line(struct request *r, char *line) {
    r->method = strsep(&line, " ");
    char *target = strsep(&line, " "); /* what is left is the version */
    r->head = !strcmp(r->method, "HEAD");
    r->old = line && !strcmp(line, "HTTP/1.0");
    if (!line || (!r->old && strcmp(line, "HTTP/1.1") != 0) || !*r->method ||
        r->method[strspn(r->method, TOKEN)] || strpbrk(target, "#\t"))
        return false;
    if (!strncasecmp(target, "http://", 7)) /* as sent to a proxy */
        target += 7 + strcspn(target + 7, "/?");
    r->path = strsep(&target, "?");
    while (target && r->count < FIELDS_MAX) { /* or the first header fails */
        char *value = strsep(&target, "&"), *name = strsep(&value, "=");
        if (!value) value = strchr(name, '\0');
        if (!url_decode(name, true) || !url_decode(value, true)) return false;
        r->fields[r->count++] = (struct field){true, name, value};
    }
    return *r->path == '/' && url_decode(r->path, false);
}

/* Cuts off the scheme's default port: "https://a:443" is "https://a". Done once
 * to all origins, where they come in, so that they can be compared. */
static void origin_trim(char *origin) {
    const char *port = strncasecmp(origin, "https:", 6) ? ":80" : ":443";
    char *end = strrchr(origin, ':');
    if (end && !strcmp(end, port)) *end = '\0';
}

/* "Name: value". Some may be there only once (and, as ONCE is searched as text,
 * names such as "Length", which nobody sends). */
static bool request_header(struct request *r, char *line) {
    char *value = line + strspn(line, TOKEN), *end = strchr(line, '\0');
    if (value == line || *value != ':' || r->count == FIELDS_MAX) return false;
    *value++ = '\0';
    value += strspn(value, " \t");
    while (end > value && strchr(" \t", end[-1])) *--end = '\0';
    if (strcasestr(ONCE, line) && field(r, line)) return false;
    if (!strcasecmp(line, "Origin")) origin_trim(value);
    r->fields[r->count++] = (struct field){false, line, value};
    return true;
}

/* What is wrong with a request, as a status; "": nothing, it is all here; NULL:
 * more of it is needed. */
static const char *request_parse(struct request *r, const char *in, size_t n) {
    *r = (struct request){.raw = in, .raw_size = n, .type = "text/plain"};
    char *line = r->copy, *end = line + min(n, HEADER_MAX), *stop;
    memcpy(line, in, end - line);
    for (;; line = stop + 2) {
        stop = line + strcspn(line, "\r\n");
        if (stop == end || (*stop == '\r' && stop + 1 == end))
            return n < HEADER_MAX ? NULL : "431 Headers Too Large";
        if (stop[0] != '\r' || stop[1] != '\n') return BAD; /* or a NUL */
        *stop = '\0';
        if (r->method && stop == line) break;
        if (!(r->method ? request_header(r, line) : request_line(r, line)))
            return BAD;
    }
    r->size = stop + 2 - r->copy;
    const char *length = field(r, "Content-Length"), *host = field(r, "Host");
    r->body_size = length ? parse_number(length) : 0;
    if (r->body_size == SIZE_MAX || (!host && !r->old)) return BAD;
    /* RFC 3986 3.2.2, and a port. */
    if (host && host[strspn(host, ALNUM "!$%&'()*+,-.:;=[]_~")]) return BAD;
    if (field(r, "Transfer-Encoding")) return "411 Send Content-Length";
    if (r->body_size > MESSAGE_MAX) return "413 Content Too Large";
    return n - r->size < r->body_size ? NULL : "";
}

/* ---- 16. HTTP: the answers ----------------------------------------------
 * The page is in the program: .incbin puts the file there as it is, and the
 * zero behind it makes it a string.
 */
__asm__(".section .rodata\nindex_html: .incbin \"index.html\"\n.byte 0\n"
        ".previous\n");
extern const char index_html[];

#define POLICY                                                               \
    "Content-Security-Policy: default-src 'none'; connect-src 'self'; "      \
    "img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; " \
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'\r\n"

/* May a page of this origin talk to us: is it the host that was asked, or one
 * that -o allows? */
static bool origin_allowed(struct request *r, const char *origin) {
    char own[HEADER_MAX + 9];
    const char *host = field(r, "Host"), *scheme = "http";
    if (!strncasecmp(origin, "https:", 6)) scheme = "https";
    snprintf(own, sizeof own, "%s://%s", scheme, host ? host : "");
    origin_trim(own);
    bool allowed = !strcasecmp(own, origin);
    for (int i = 0; i < s.origin_count; i++)
        allowed |= *s.origins[i] == '*' || !strcasecmp(s.origins[i], origin);
    return allowed;
}

/* Queues an answer, the client's last but for 101, and logs it as
 *     127.0.0.1 "GET / HTTP/1.1" 200 15053
 * `body` is a string; NULL: what is to be sent of the client's file follows. */
static void respond(struct request *r, const char *status, const char *body) {
    struct client *c = r->client;
    struct buffer *out = &c->out, line = {0};
    const char *origin = field(r, "Origin");
    size_t n = 0, size = body ? strlen(body) : c->boundary - c->cursor;
    char date[48];
    time_t now = time(NULL);
    strftime(date, sizeof date, "Date: %a, %d %b %Y %T GMT\r\n", gmtime(&now));
    c->closing = r->type != NULL;
    buffer_print(out, "HTTP/1.1 %s\r\n%sVary: Origin\r\n", status, date);
    if (origin && origin_allowed(r, origin))
        buffer_print(out, "Access-Control-Allow-Origin: %s\r\n", origin);
    if (r->type)
        buffer_print(out,
                     "Connection: close\r\nContent-Length: %zu\r\n"
                     "Content-Type: %.*s%s\r\n",
                     size, (int)strcspn(r->type, " "), r->type,
                     strncmp(r->type, "text/", 5) ? "" : "; charset=utf-8");
    buffer_print(out, "X-Content-Type-Options: nosniff\r\n%.*s\r\n",
                 (int)r->headers.size, r->headers.bytes);
    buffer_clear(&r->headers);
    if (r->head || !r->type) size = 0;
    if (body) buffer_add(out, body, size);
    if (s.option['q']) return;
    while (n < 200 && n < r->raw_size && !strchr("\r\n", r->raw[n])) n++;
    buffer_escape(&line, r->raw, n, LINE, "\\x%02x");
    printf("%s \"%.*s\" %.3s %zu\n", client_address(c), (int)line.size,
           line.bytes, status, size);
    buffer_clear(&line);
}

/* The channel of a request; NULL: it was answered. To talk, a page must come
 * from here, or from where -o allows. (What pages only embed, an image for
 * example, browsers fetch with Sec-Fetch-Site in place of Origin; programs send
 * neither.) */
static struct channel *request_channel(struct request *r, bool talks) {
    const char *origin = field(r, "Origin"), *name = field(r, "?channel");
    const char *site = field(r, "Sec-Fetch-Site");
    bool own = !site || !strcmp(site, "same-origin") || !strcmp(site, "none");
    if (origin) own = origin_allowed(r, origin);
    if (!name) name = "";
    bool good = strlen(name) <= CHANNEL_NAME && utf8_valid(name, strlen(name));
    struct channel *ch = good && !talks ? channel_find(name) : NULL;
    if (good && talks && own) ch = channel_get(name); /* to read makes none */
    if (talks && !own) respond(r, "403 Forbidden", "origin not allowed\n");
    else if (!good) respond(r, BAD, "a channel is UTF-8, 64 bytes at most\n");
    else if (!ch) respond(r, BUSY, "too many channels\n");
    return ch;
}

/* Posts a message. HEAD only checks whether it is one. */
static void answer_send(struct request *r) {
    const char *query = field(r, "?message"), *wrong = NULL;
    struct message m = {TEXT, r->raw + r->size, r->body_size};
    if (query) m = (struct message){TEXT, query, strlen(query)};
    if (!query && m.size == 0) wrong = "?message not provided";
    if (m.size > MESSAGE_MAX || !utf8_valid(m.bytes, m.size))
        wrong = "not UTF-8, or too long\n";
    if (wrong) respond(r, BAD, wrong);
    /* To make the channel may cost an old one, so that comes last. */
    struct channel *ch = wrong ? NULL : request_channel(r, !r->head);
    if (!ch) return;
    if (r->head || server_room(ch, m.size)) {
        if (!r->head) server_post(ch, m);
        respond(r, "200 OK", "message sent");
    } else r->client->waiting = true;
}

/* What the channel remembers: ["text",{"base64":"..."}] */
static void answer_messages(struct request *r) {
    struct buffer b = {0};
    struct message m;
    struct channel *ch = request_channel(r, false);
    if (!ch) return;
    for (uint64_t at = ch->log.tail; at < ch->log.head;) {
        buffer_add(&b, b.size ? "," : "[", 1);
        at += frame_read(log_at(&ch->log, at), &m);
        if (m.opcode == TEXT) buffer_json(&b, m.bytes, m.size);
        else {
            buffer_print(&b, "{\"base64\":\"");
            buffer_base64(&b, m.bytes, m.size);
            buffer_print(&b, "\"}");
        }
    }
    buffer_print(&b, b.size ? "]" : "[]");
    r->type = "application/json";
    respond(r, "200 OK", b.bytes);
    buffer_clear(&b);
}

/* ---- 17. Files (skip at first) ------------------------------------------
 * With -d. Files are read a piece at a time, so that any size needs the same
 * memory. Left out: several ranges, compression, dates as versions.
 */

/* Opens a file beneath DIR, which is looked up each time. Neither ".." nor a
 * link leads out of it, and what begins with a dot is not there, except for
 * "/.well-known/". */
static int file_open(const char *path) {
    /* struct open_how: flags, mode, RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS */
    uint64_t how[] = {O_RDONLY | O_NONBLOCK | O_CLOEXEC | O_NOCTTY, 0, 8 | 2};
    const char *name = path + strspn(path, "/");
    if (!strncmp(path, "/.well-known/", 13)) path += 12;
    if (strstr(path, "/.")) return -1;
    int dir = open(s.option['d'], O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (dir < 0) return -1;
    int fd = syscall(SYS_openat2, dir, *name ? name : ".", how, sizeof how);
    close(dir);
    return fd;
}

/* By the name's ending. A folder's is its index.html's. */
static const char *mime_type(const char *path) {
    static const char types[] =
        " /=text/html .html=text/html .htm=text/html .css=text/css"
        " .js=text/javascript .mjs=text/javascript .txt=text/plain"
        " .md=text/plain .log=text/plain .csv=text/csv .xml=text/xml"
        " .vtt=text/vtt .json=application/json .map=application/json"
        " .webmanifest=application/manifest+json .wasm=application/wasm"
        " .pdf=application/pdf .svg=image/svg+xml .png=image/png"
        " .jpg=image/jpeg .jpeg=image/jpeg .gif=image/gif .webp=image/webp"
        " .avif=image/avif .ico=image/x-icon .woff2=font/woff2 .mp3=audio/mpeg"
        " .ogg=audio/ogg .wav=audio/wav .mp4=video/mp4 .webm=video/webm ";
    char key[16];
    const char *slash = strrchr(path, '/'), *dot = strrchr(slash, '.');
    if (!dot && slash[1]) return "text/plain"; /* README, Makefile */
    snprintf(key, sizeof key, " %s=", dot ? dot : "/");
    const char *found = strcasestr(types, key);
    return found ? found + strlen(key) : "application/octet-stream";
}

/* A page of links to what is in a folder. */
static void answer_listing(struct request *r, int folder) {
    struct dirent **entries = NULL;
    struct buffer b = {0};
    char path[40];
    sprintf(path, "/proc/self/fd/%d", folder);
    int count = scandir(path, &entries, NULL, alphasort);
    buffer_print(&b,
                 "<!doctype html>\n<meta name='viewport' "
                 "content='width=device-width'>\n<p><a href='../'>..</a>\n");
    for (int i = 0; i < count; free(entries[i++])) {
        const char *name = entries[i]->d_name;
        const char *slash = entries[i]->d_type == DT_DIR ? "/" : "";
        if (*name == '.') continue;
        buffer_print(&b, "<p><a href=\"./");
        buffer_escape(&b, name, strlen(name), URL ".", "%%%02X");
        buffer_print(&b, "%s\">", slash);
        buffer_escape(&b, name, strlen(name), URL ". " UTF8, "&#%d;");
        buffer_print(&b, "%s</a>\n", slash);
    }
    free(entries);
    r->type = "text/html";
    respond(r, "200 OK", b.bytes);
    buffer_clear(&b);
}

/* "bytes=A-B", "A-" or "-N" (RFC 9110 14.2) as [*from, *to) of a file. 1: a
 * part of it; 0: all of it; -1: it has none of that. */
static int range_parse(char *range, int64_t size, int64_t *from, int64_t *to) {
    char *first = strsep(&range, "-"); /* `range` is what comes behind it */
    *from = 0;
    *to = size;
    if (!range || strncasecmp(first, "bytes=", 6) != 0) return 0;
    bool suffix = !first[6];
    int64_t a = parse_number(first + 6), b = parse_number(range);
    if (suffix ? b < 0 : a < 0 || (*range && b < a)) return 0;
    *from = suffix ? size - min(b, size) : a;
    if (!suffix && *range) *to = min(b + 1, size);
    return *from < *to ? 1 : -1;
}

/* Answers with an open file, which is the client's from here on if any of it
 * is to be sent. */
static void respond_file(struct request *r, int fd, const struct stat *st) {
    const char *version = field(r, "If-Range"), *known = "If-None-Match";
    int64_t from, to, size = st->st_size;
    int64_t v[] = {st->st_mtim.tv_sec, st->st_mtim.tv_nsec, size, st->st_ino};
    char weak[80], *tag = weak + 2;
    sprintf(weak, "W/\"%jx-%jx-%jx-%jx\"", v[0], v[1], v[2], v[3]);
    bool has = header_has(r, known, tag) || header_has(r, known, weak) ||
               header_has(r, known, "*");
    bool all = has || r->head || (version && strcmp(version, tag) != 0);
    int part = range_parse(all ? NULL : field(r, "Range"), size, &from, &to);
    buffer_print(&r->headers, "ETag: %s\r\nAccept-Ranges: bytes\r\n", tag);
    if (part < 0) {
        buffer_print(&r->headers, "Content-Range: bytes */%jd\r\n", size);
        respond(r, "416 Range Not Satisfiable", "the file has no such part\n");
        return;
    }
    if (part > 0)
        buffer_print(&r->headers, "Content-Range: bytes %jd-%jd/%jd\r\n", from,
                     to - 1, size);
    const char *status = part ? "206 Partial Content" : "200 OK";
    if (has) status = "304 Not Modified";
    r->head |= has; /* it gets what HEAD gets */
    r->type = mime_type(r->path);
    r->client->cursor = from;
    r->client->boundary = to;
    respond(r, status, NULL);
    if (!r->head && from < to) r->client->file = fd;
}

/* A name that ends with a slash is a folder's, so that the links in it work. */
static void answer_file(struct request *r) {
    const char *last = strrchr(r->path, '/') + 1;
    char name[HEADER_MAX + 12];
    bool folder = r->path[strlen(r->path) - 1] == '/';
    struct stat st = {0};
    snprintf(name, sizeof name, "%s%s", r->path, folder ? "index.html" : "");
    int fd = file_open(name);
    if (fd < 0 && folder) fd = file_open(r->path);
    if (fd >= 0) fstat(fd, &st);
    if (S_ISREG(st.st_mode)) respond_file(r, fd, &st);
    else if (S_ISDIR(st.st_mode) && folder) answer_listing(r, fd);
    else if (S_ISDIR(st.st_mode)) {
        const char *query = strpbrk(r->raw + strlen(r->method) + 1, "? ");
        buffer_print(&r->headers, "Location: ./");
        buffer_escape(&r->headers, last, strlen(last), URL ".~", "%%%02X");
        buffer_print(&r->headers, "/%.*s\r\n", (int)strcspn(query, " "), query);
        respond(r, "301 Moved Permanently", "it is a folder\n");
    } else respond(r, "404 Not Found", "not found\n");
    if (fd >= 0 && r->client->file != fd) close(fd);
}

/* ---- 18. Conversations --------------------------------------------------
 * RFC 6455: the handshake (4.2), then frames until a close. A message is looked
 * at when all of it is here. Left out: extensions, subprotocols. At the end,
 * how a request is answered, which may be by such a handshake.
 */
static void frame_queue(struct client *c, int opcode, const void *at, int n) {
    uint8_t header[FRAME_HEADER_MAX];
    buffer_add(&c->out, header, frame_header(header, opcode, n));
    buffer_add(&c->out, at, n);
}

/* Answers a handshake: the key, with a constant, hashed (4.2.2). */
static void websocket_accept(struct request *r, const char *key) {
    char text[64] = "", *guid = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";
    uint8_t digest[SHA1_SIZE];
    int size = sprintf(text, "%.24s%s", key, guid);
    sha1(text, size, digest);
    buffer_print(&r->headers, "Sec-WebSocket-Accept: ");
    buffer_base64(&r->headers, digest, sizeof digest);
    buffer_print(&r->headers, "\r\n");
    r->type = NULL;
    respond(r, "101 Switching Protocols", NULL);
    r->client->protocol = WEBSOCKET;
    r->client->read = r->size;
}

/* A handshake. The client then reads on in the log where the last ?history
 * messages begin. */
static void websocket_open(struct request *r) {
    struct client *c = r->client;
    const char *key = field(r, "Sec-WebSocket-Key");
    const char *version = field(r, "Sec-WebSocket-Version");
    const char *history = field(r, "?history");
    int64_t wanted = history ? parse_number(history) : 0;
    bool right = version && !strcmp(version, "13");
    bool good = right && header_has(r, "Connection", "upgrade") && !r->old &&
                r->body_size == 0 && wanted >= 0 && key &&
                strspn(key, base64) == 24 &&
                !strcmp(key + strcspn(key, "="), "==");
    struct channel *ch = good ? request_channel(r, true) : NULL;
    /* Who wants the history of a full log would be late from the start. */
    c->waiting = ch && history && ch->cut_at;
    if (good && (!ch || c->waiting)) return; /* without a channel: answered */
    buffer_print(&r->headers, "Upgrade: websocket\r\nConnection: Upgrade\r\n");
    if (!good) buffer_print(&r->headers, "Sec-WebSocket-Version: 13\r\n");
    if (!right) respond(r, "426 Upgrade Required", "version 13, please\n");
    else if (!good) respond(r, BAD, "not a WebSocket handshake\n");
    if (!good) return;
    websocket_accept(r, key);
    c->cursor = history ? ch->log.tail : ch->log.head;
    if (history) {
        struct message m;
        char text[40];
        wanted = min(wanted, ch->count);
        for (uint64_t skip = ch->count - wanted; skip > 0; skip--)
            c->cursor += frame_read(log_at(&ch->log, c->cursor), &m);
        int size = sprintf(text, "{\"history\":%jd}", wanted);
        frame_queue(c, TEXT, text, size);
    }
    c->boundary = c->cursor;
    ch->low = min(ch->low, c->cursor);
    channel_insert(ch, c);
}

/* Says good-bye, behind all that was said before. Returns false: no more. */
static bool websocket_close(struct client *c, int code) {
    uint8_t payload[] = {code >> 8, code};
    client_flush(c); /* which may drop it, so it may be in no channel */
    /* If nothing private waits, all of the log goes out before this. */
    if (c->channel && c->out.size == 0) c->boundary = c->channel->log.head;
    frame_queue(c, CLOSE, payload, code == 1005 ? 0 : 2);
    c->closing = true;
    client_flush(c);
    return false;
}

/* Handles what is complete: a control frame, or a message. Of a PONG it is
 * enough that it was read. */
static void websocket_message(struct client *c, struct message m) {
    bool text = m.opcode == TEXT;
    if (m.opcode == CLOSE) websocket_close(c, close_code(m.bytes, m.size));
    else if (m.opcode == PING) frame_queue(c, PONG, m.bytes, m.size);
    else if (text && !utf8_valid(m.bytes, m.size)) websocket_close(c, 1007);
    else if (m.opcode != PONG) {
        server_post(c->channel, m);
        /* The talker goes to the front of the list and is served first. So its
         * next message may come while the others are served, and the next round
         * has more to send at once (three times as much where all talk). */
        channel_insert(c->channel, c);
    }
}

/* Handles a frame, if all of it is here. Returns whether to go on.
 *
 *   in:  the message so far | handled | the frame, what is behind it |
 *        0                done      read                          size
 *
 * What is handled, client_process cuts out at the end.
 */
static bool websocket_step(struct client *c, struct buffer *in) {
    char *at = in->bytes + c->read, *out = in->bytes + c->done;
    size_t left = in->size - c->read;
    struct frame f;
    int header = frame_parse((uint8_t *)at, left, &f);
    if (header < 0) return websocket_close(c, -header);
    if (header == 0) return false;
    bool data = f.opcode < CLOSE;
    if (data && (f.opcode == CONTINUATION) != (c->opcode != 0))
        return websocket_close(c, 1002);
    if (data && f.size > MESSAGE_MAX - c->done) return websocket_close(c, 1009);
    if (left - header < f.size) return false;
    /* Nothing has changed so far, because this step may have to be repeated. */
    size_t size = c->done + f.size;
    c->waiting = data && f.fin && !server_room(c->channel, size);
    if (c->waiting) return false;
    if (!data) out = at; /* it may come between the pieces of a message */
    for (size_t i = 0; i < f.size; i++) out[i] = at[header + i] ^ f.mask[i % 4];
    struct message m = {f.opcode, out, f.size};
    c->read += header + f.size;
    if (data) {
        if (f.opcode != CONTINUATION) c->opcode = f.opcode;
        m = (struct message){c->opcode, in->bytes, size};
        c->done = f.fin ? 0 : size;
        if (f.fin) c->opcode = 0;
        if (f.fin) c->since = s.now; /* a piece alone is no progress */
    }
    if (f.fin) websocket_message(c, m);
    return true;
}

/* Which answer for which request. */
static void client_answer(struct request *r) {
    bool send = !strcmp(r->path, "/send"), get = !strcmp(r->method, "GET");
    const char *post = send ? ", POST" : "";
    if (!get && !r->head && !(send && !strcmp(r->method, "POST"))) {
        buffer_print(&r->headers, "Allow: GET, HEAD%s\r\n", post);
        respond(r, "405 Method Not Allowed", "method not allowed\n");
    } else if (get && header_has(r, "Upgrade", "websocket")) websocket_open(r);
    else if (send) answer_send(r);
    else if (!strcmp(r->path, "/messages")) answer_messages(r);
    else if (s.option['d']) answer_file(r);
    else if (strcmp(r->path, "/")) respond(r, "404 Not Found", "not found\n");
    else {
        r->type = "text/html";
        buffer_print(&r->headers, POLICY);
        respond(r, "200 OK", index_html);
    }
}

/* Handles a request once it is complete, or too late. Returns whether frames
 * follow. */
static bool client_request(struct client *c, struct buffer *in) {
    struct request r;
    /* NULL: more is to come; "": it is complete; else it is a status. */
    const char *error = request_parse(&r, in->bytes, in->size);
    bool late = s.now >= c->deadline, bare = !r.old && r.size == in->size;
    r.client = c;
    if (!error && late) error = "408 Request Timeout";
    else if (late && !*error) error = BUSY; /* it was waiting all the time */
    if (error && *error) respond(&r, error, error);
    else if (error) client_answer(&r);
    else if (r.body_size && bare && header_has(&r, "Expect", "100-continue"))
        buffer_print(&c->out, "HTTP/1.1 100 Continue\r\n\r\n");
    s.answered += c->out.size;
    return c->protocol == WEBSOCKET;
}

/* ---- 19. The event loop -------------------------------------------------
 * A round: wait until something happens (epoll_wait), read from all for whom it
 * did, then let out what came of it, and do what is due by time. So whatever
 * comes at once goes out at once, with one send() a client.
 */

/* Handles the input that is here, as far as it is complete. Keeps what is
 * unfinished, and no memory where nothing is. */
static void client_process(struct client *c) {
    struct buffer *in = c->in.size ? &c->in : &s.input;
    c->waiting = c->protocol == HTTP && s.answered > 8 * READ_SIZE;
    for (bool more = true; more && !c->closing && !c->waiting && !c->dead;) {
        if (c->protocol == NATS) more = nats_step(c, in);
        else if (c->protocol == WEBSOCKET) more = websocket_step(c, in);
        else more = client_request(c, in);
    }
    if (c->closing) in->size = c->read = c->done = 0;
    /* Cuts out what is handled, between done and read. What is left in the
     * server's buffer becomes the client's own. */
    size_t left = in->size - c->read;
    memmove(in->bytes + c->done, in->bytes + c->read, left);
    c->read = c->done;
    in->size = c->done + left;
    if (in->size == 0) buffer_clear(&c->in);
    else if (in == &s.input) buffer_add(&c->in, in->bytes, in->size);
    s.input.size = 0;
    if (c->out.size || c->closing) client_flush(c);
    client_watch(c);
}

/* A client's socket is ready: sends if it has room, reads if it has input. That
 * goes into the server's buffer; into the client's own only if that has
 * something already, or if it is not complete. */
static void client_read(struct client *c, uint32_t events) {
    if (events & EPOLLOUT) {
        c->blocked = false;
        client_flush(c);
    }
    bool wanted = c->interest & EPOLLIN;
    if (!wanted && events & (EPOLLHUP | EPOLLERR)) client_drop(c);
    if (!wanted || c->dead) return;
    char *room = buffer_reserve(&s.input, READ_SIZE);
    ssize_t n = c->tls && !c->shut ? tls_move(c, false, room, READ_SIZE)
                                   : recv(c->fd, room, READ_SIZE, 0);
    if (n == 0 || (n < 0 && errno != EAGAIN)) client_drop(c);
    s.input.size = n > 0 ? n : 0;
    if (c->in.size) buffer_add(&c->in, room, s.input.size);
    client_process(c);
    if (n <= 0 || c->protocol == HTTP || c->closing) return;
    c->pinged = false;
    c->deadline = s.now + PING_TIME;
}

/* The deadline has passed. HTTP: the request is not complete, or there was no
 * room for it, or the answer gets nowhere. Else: nothing was heard for
 * PING_TIME; or not even since the ping. */
static void client_late(struct client *c) {
    if (c->protocol == HTTP && c->in.size) client_process(c);
    else if (c->protocol == HTTP || c->closing || c->pinged) client_drop(c);
    else {
        c->pinged = true;
        c->deadline = s.now + IDLE_TIME - PING_TIME;
        if (c->protocol == NATS) buffer_print(&c->out, "PING\r\n");
        else frame_queue(c, PING, "", 0);
        client_flush(c);
    }
}

/* Looks after all clients: who waited for room tries again (another one first
 * each time), who is late hears of it, and when we stop all get a good-bye; who
 * has not asked yet has a second to do so. Then what is due once a second. */
static void server_tend(void) {
    s.waiting = false;
    s.turn++;
    for (int i = 0; i < s.clients_end; i++) {
        struct client *c = s.clients[(i + s.turn) % s.clients_end];
        if (!c || c->dead) continue;
        bool leave = s.stop_at && !c->closing;
        if (leave && c->protocol == WEBSOCKET) websocket_close(c, 1001);
        if (leave && c->protocol == HTTP)
            c->deadline = min(c->deadline, s.stop_at - CLOSE_TIME + SECOND);
        if (!c->waiting && s.now >= c->deadline) client_late(c);
        if (c->waiting) client_process(c);
    }
    if (s.now < s.second_at) return;
    s.second_at = s.now + SECOND;
    s.accept_due = true; /* there may be descriptors by now ... */
    if (nats.addresses && !nats.client && !s.stop_at) nats_connect();
    if (nats.addresses && s.now >= CATCH_UP) s.settled = true;
    bus_join(); /* ... or an interface */
}

/* Lets in those who wait. Without descriptors, we try again in a second. */
static void server_accept(void) {
    for (int fd = 0; fd >= 0 || errno == ECONNABORTED;) {
        fd = accept4(s.listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd >= 0) client_add(fd, HTTP);
    }
    if (errno != EAGAIN) tell("accept", strerror(errno));
    s.accept_due = false;
}

/* The one place that frees clients. */
static void server_reap(void) {
    while (s.dead) {
        struct client *c = s.dead;
        s.dead = c->next;
        s.held -= c->held;
        s.clients[c->fd] = NULL;
        s.connected -= c->protocol != NATS;
        if (c->joined) warnx("lost %s", s.option['b']);
        else if (c->protocol == NATS) tell("bus", "cannot join NATS");
        if (c->protocol == NATS) nats.client = NULL;
        SSL_free(c->tls);
        close(c->fd);
        if (c->file) close(c->file);
        buffer_clear(&c->out);
        buffer_clear(&c->in);
        free(c);
    }
}

/* Keeps unfinished input and unread answers within bounds: who has held some
 * for longest goes, not who comes last. */
static void server_bound(void) {
    while (s.held > UNFINISHED_MAX) {
        struct client *worst = NULL;
        for (int fd = 0; fd < s.clients_end; fd++) {
            struct client *c = s.clients[fd];
            if (!c || c->dead || c->held == 0 || c->protocol == NATS) continue;
            if (!worst || c->since < worst->since) worst = c;
        }
        if (!worst) return;
        client_cut(worst, "unfinished");
        server_reap();
    }
}

/* The end of a round: lets out what came of it. Returns when the next one has
 * to begin. */
static int64_t server_flush(void) {
    s.answered = s.dirty = 0;
    /* The latest channel first, as the oldest one is the largest in general. */
    for (struct channel *ch = s.channels + CHANNELS_MAX; ch-- > s.channels;)
        if (ch->dirty || ch->cut_at) channel_flush(ch);
    if (s.waiting || s.now >= s.second_at) server_tend();
    bus_flush();
    if (nats.client) client_flush(nats.client);
    int64_t next = bus.fd ? bus_tick() : s.second_at;
    server_reap();
    if (s.accept_due && s.settled && !s.stop_at) server_accept();
    fflush(stdout);
    return s.dirty ? s.now : min(next, s.waiting ? s.now + 20 : s.second_at);
}

static volatile sig_atomic_t signaled; /* which, the highest of several */

static void on_signal(int number) {
    if (number > signaled) signaled = number;
}

static void server_run(void) {
    static struct epoll_event events[1024]; /* as many as talk at once */
    /* The clock begins at 1 ms, as 0 means "never" or "not set". */
    int64_t start = clock_us(CLOCK_MONOTONIC) - 1000, next = 0;
    while (!s.stop_at || (s.now < s.stop_at && (s.connected || !bus_room(0)))) {
        int n = epoll_wait(s.epoll, events, 1024, next - s.now);
        int number = __atomic_exchange_n(&signaled, 0, __ATOMIC_RELAXED);
        s.now = (clock_us(CLOCK_MONOTONIC) - start) / 1000;
        if (number == SIGHUP && s.tls) tls_load();
        else if (number && !s.stop_at) {
            server_accept();
            close(s.listener);
            s.stop_at = s.now + CLOSE_TIME;
            s.second_at = s.now; /* the good-byes are due */
        }
        for (int i = 0; i < n; i++) {
            int fd = events[i].data.fd;
            if (s.clients[fd]) client_read(s.clients[fd], events[i].events);
            else if (fd == bus.fd) bus_readable();
            else s.accept_due = true;
            server_bound();
        }
        next = server_flush();
    }
}

/* ---- 20. Options and the start ------------------------------------------
 * What is wrong ends the start, in one line: status 2 for an option, 1 for what
 * the machine refuses. Left out: a config file, a daemon, users to change to;
 * systemd or a container has them.
 */
static const char usage[] =
    "Usage: chat [OPTION]...\nWhat one browser sends, every browser shows.\n\n"
    "  -p, --port       PORT    8080; 0 takes a free port\n"
    "  -a, --address    ADDR    all, IPv6 and IPv4\n"
    "  -d, --dir        DIR     serve the files beneath DIR, not the page\n"
    "  -b, --bus        BUS     239.255.80.80:8081; HOST:PORT,... | "
    "nats://[USER:PASSWORD@]HOST[:PORT] | none\n"
    "  -i, --interface  NAME    lo; where the bus is, if a group\n"
    "  -s, --secret     FILE    of the bus; \"none\" for none\n"
    "  -r, --reuse-port         share the port with other chats\n"
    "  -o, --origin     ORIGIN  may be repeated; '*' allows all\n"
    "  -C, --cert       FILE    https and wss, with --key (make TLS=1)\n"
    "  -K, --key        FILE    its private key; SIGHUP loads both again\n"
    "  -q, --quiet              no request log\n"
    "  -h, --help               this text\n"
    "  -V, --version            the version\n";

/* Beside the name: does it have an argument? The last one is empty. */
static const struct option options[14] = {
    {"port", 1, 0, 'p'},   {"address", 1, 0, 'a'},    {"dir", 1, 0, 'd'},
    {"bus", 1, 0, 'b'},    {"interface", 1, 0, 'i'},  {"secret", 1, 0, 's'},
    {"origin", 1, 0, 'o'}, {"reuse-port", 0, 0, 'r'}, {"cert", 1, 0, 'C'},
    {"key", 1, 0, 'K'},    {"quiet", 0, 0, 'q'},      {"help", 0, 0, 'h'},
    {"version", 0, 0, 'V'}};

/* What no browser would ever send, is refused. */
static void origin_add(char *origin) {
    int end = 0;
    sscanf(origin, "%*[A-Za-z0-9+.-]://%*[]A-Za-z0-9._:[-]%n", &end);
    bool good = end > 0 && !origin[end] && origin[end - 1] != ':' &&
                parse_number(strrchr(origin, ':') + 1) <= 65535;
    if (!good && strcmp(origin, "*") != 0 && strcmp(origin, "null") != 0)
        errx(MISUSE, "--origin: not SCHEME://HOST[:PORT]: %s", origin);
    if (s.origin_count == 16) errx(MISUSE, "--origin: too many");
    origin_trim(origin);
    s.origins[s.origin_count++] = origin;
}

static void options_parse(int argc, char **argv) {
    const char *letters = "p:a:d:b:i:s:ro:C:K:qhV";
    s.option['p'] = "8080";
    s.option['b'] = "239.255.80.80:8081";
    s.option['i'] = "lo";
    for (int c; (c = getopt_long(argc, argv, letters, options, NULL)) != -1;) {
        if (c == '?') exit(MISUSE); /* it has said why */
        s.option[c] = optarg ? optarg : "";
        if (c == 'o') origin_add(optarg);
    }
    const char *text = s.option['h'] ? usage : "chat 2.0\n";
    if (s.option['h'] || s.option['V']) exit(printf("%s", text) < 0);
    if (optind < argc) errx(MISUSE, "%s: not an option", argv[optind]);
    if (!s.option['C'] != !s.option['K']) errx(MISUSE, "--cert needs --key");
    if (s.option['r'] && !strcmp(s.option['b'], "none"))
        errx(MISUSE, "--reuse-port needs a bus, to be one with the others");
}

/* Listens: on ADDR, else on all that the machine has, IPv6 and IPv4. */
static void server_listen(void) {
    const char *name = s.option['a'], *port = s.option['p'];
    const char *host = name ? name : "localhost";
    int family = AF_INET6, type = SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC;
    if (name && !strchr(name, ':')) family = AF_INET;
    int fd = socket(family, type, 0);
    if (fd < 0 && !name) fd = socket(family = AF_INET, type, 0);
    s.listener = must(fd, "socket");
    struct addrinfo *at = resolve(name, port, family);
    set_option(fd, SOL_SOCKET, SO_REUSEADDR, 1);
    set_option(fd, SOL_SOCKET, SO_REUSEPORT, s.option['r'] != NULL);
    set_option(fd, SOL_SOCKET, SO_SNDBUF, SEND_BUFFER);
    set_option(fd, IPPROTO_TCP, TCP_NODELAY, 1);
    set_option(fd, IPPROTO_IPV6, IPV6_V6ONLY, 0);
    if (bind(fd, at->ai_addr, at->ai_addrlen) || listen(fd, SOMAXCONN))
        err(FAILURE, "listen: %s:%s", host, port);
    struct sockaddr_in6 bound; /* the port is where IPv4 has it, too */
    getsockname(fd, (struct sockaddr *)&bound, &(socklen_t){sizeof bound});
    bool ipv6 = strchr(host, ':'), group = bus.group;
    warnx("listening on http%s://%s%s%s:%d/, bus %s%s%s", s.tls ? "s" : "",
          ipv6 ? "[" : "", host, ipv6 ? "]" : "", ntohs(bound.sin6_port),
          s.option['b'], group ? " on " : "", group ? s.option['i'] : "");
}

/* Something to read there wakes us; EPOLLET: only when more has come, so that
 * who waits while no descriptor is left does not wake us again and again. */
static void server_watch(int fd, uint32_t events) {
    struct epoll_event event = {.events = events, .data.fd = fd};
    must(epoll_ctl(s.epoll, EPOLL_CTL_ADD, fd, &event), "epoll_ctl");
}

static void server_open(void) {
    char *where = (char *)s.option['b'];
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = min(limit.rlim_max, 1 << 20);
    setrlimit(RLIMIT_NOFILE, &limit);
    if (s.option['d']) close(must(file_open("/"), s.option['d']));
    if (s.option['C']) tls_load();
    signal(SIGPIPE, SIG_IGN);
    signal(SIGINT, on_signal);
    signal(SIGTERM, on_signal);
    /* What nohup has set stays, but with TLS this is no good-bye. */
    if (signal(SIGHUP, on_signal) == SIG_IGN && !s.tls) signal(SIGHUP, SIG_IGN);
    s.epoll = must(epoll_create1(EPOLL_CLOEXEC), "epoll_create1");
    if (!strncmp(where, "nats://", 7)) nats_open(where);
    else if (!strcmp(where, "none")) s.settled = true;
    else if (MESSAGE_MAX > 64000)
        errx(MISUSE, "--bus: messages of that size need -b none");
    else bus_open();
    server_listen();
    channel_get(""); /* needs a descriptor: later there may be none */
    server_watch(s.listener, EPOLLIN | EPOLLET);
    if (bus.fd) server_watch(bus.fd, EPOLLIN);
}

int main(int argc, char **argv) {
    program_invocation_short_name = "chat"; /* for what stderr gets */
    int fd = open("/dev/null", O_RDWR);
    while (fd >= 0 && fd <= 2) fd = dup(fd); /* what else would be 0 to 2? */
    close(fd);
    options_parse(argc, argv);
    server_open();
    server_run();
    if (bus.fd) bus_send_status(LEAVES);
    return 0;
}
