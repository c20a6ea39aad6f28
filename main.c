/* mini-ws-chat: what one browser sends, every browser shows.
 *
 *   browser --WebSocket--> this instance ---> the channel's log ---> every
 *                               |             client of this instance
 *                               v
 *                          the bus (UDP) ---> every other instance, which
 *                                             does the same with it
 *
 * A channel is one log: a ring of ready-made WebSocket frames. Frames from
 * a server carry no mask (RFC 6455 5.1), so all clients get the same bytes;
 * a client is a cursor into the log, and a broadcast is one append and then
 * one send() a client, from its cursor to the log's head. The bus is a log
 * too, of what this instance posts; the others keep cursors into that.
 *
 * One process, one thread, one epoll loop. The chapters, bottom-up:
 *
 *   1. Limits, options, counters     7. WebSocket: frames
 *   2. Tools: bytes, buffers, text   8. Clients: cursors into a log
 *   3. The log                       9. Channels
 *   4. Hashes (skip on first read)  10. The bus between instances
 *   5. HTTP: the request            11. HTTP: the answers
 *   6. Files                        12. WebSocket: conversations
 *                                   13. The event loop
 *                                   14. Options and main
 *
 * Build and run:   cc main.c -o chat && ./chat
 *
 * SPDX-License-Identifier: MIT
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* ---- 1. Limits, options, counters -------------------------------------
 * Every size that bounds memory and every time that bounds patience stands
 * here. The test builds shrink some (-DREAD_SIZE=...), so that the paths
 * for split and growing input run all the time.
 */
#define VERSION "1.0"
#define KIB 1024
#define MIB (1024 * 1024)
#define SECOND 1000 /* all times are milliseconds of the monotonic clock */

#ifndef READ_SIZE
#define READ_SIZE (64 * KIB) /* bytes taken from a client at once */
#endif
#ifndef SEND_BUFFER
#define SEND_BUFFER (128 * KIB) /* what the kernel may hold for a client */
#endif
#define HEADER_MAX (8 * KIB)      /* a request's line and headers */
#define CHANNELS_MAX 1024         /* with and without clients */
#define CHANNEL_NAME_MAX 64       /* bytes */
#define EVENTS_MAX 1024           /* taken from epoll at once */
#define REQUEST_TIME (10 * SECOND) /* from connect to the headers' end */
#define IDLE_TIME (60 * SECOND)   /* kept alive without a request */
#define PING_TIME (30 * SECOND)   /* of silence before a ping, then again */
#define SLOW_TIME (1 * SECOND)    /* that a log waits for its readers */
#define CLOSE_TIME (4 * SECOND)   /* for the other side to close as well */

struct options {
    const char *port, *address, *dir, *bus, *interface, *secret;
    const char *origins[16];
    int origin_count, ttl; /* ttl -1: what fits the interface */
    size_t max_message, history, max_clients;
    bool metrics, quiet;
};

/* The counters of /metrics; names and help stand in one table. */
enum metric {
    CLIENTS, CHANNELS, RECEIVED, SENT, BYTES_IN, BYTES_OUT, SLOW_CLIENTS,
    BUS_PEERS, BUS_IN, BUS_OUT, BUS_REPAIRS, BUS_LOST, BUS_ERRORS, METRICS
};

static const struct {
    const char *name, *type, *help;
} metric_table[METRICS] = {
    [CLIENTS] = {"clients", "gauge", "Connections open now"},
    [CHANNELS] = {"channels", "gauge", "Channels in memory"},
    [RECEIVED] = {"messages_received_total", "counter",
                  "Messages from clients"},
    [SENT] = {"messages_sent_total", "counter", "Deliveries to clients"},
    [BYTES_IN] = {"bytes_received_total", "counter", "Bytes from clients"},
    [BYTES_OUT] = {"bytes_sent_total", "counter", "Bytes to clients"},
    [SLOW_CLIENTS] = {"slow_clients_total", "counter",
                      "Clients cut off for reading too slowly"},
    [BUS_PEERS] = {"bus_peers", "gauge", "Other instances alive"},
    [BUS_IN] = {"bus_datagrams_received_total", "counter",
                "Datagrams from other instances"},
    [BUS_OUT] = {"bus_datagrams_sent_total", "counter", "Datagrams sent"},
    [BUS_REPAIRS] = {"bus_repairs_total", "counter",
                     "Datagrams sent to repair a loss"},
    [BUS_LOST] = {"bus_lost_messages_total", "counter",
                  "Messages of others missed for good"},
    [BUS_ERRORS] = {"bus_errors_total", "counter",
                    "Datagrams and messages refused"},
};

/* ---- 2. Tools: bytes, buffers, text -----------------------------------
 * Numbers on the wire, growing buffers, slices of text, percent-decoding
 * and UTF-8. Nothing here knows of sockets.
 */
static void die(const char *call, const char *reason)
{
    fprintf(stderr, "chat: %s: %s\n", call, reason);
    exit(1);
}

static int64_t clock_ms(clockid_t id)
{
    struct timespec t;
    clock_gettime(id, &t); /* cannot fail, because both clocks exist */
    return (int64_t)t.tv_sec * SECOND + t.tv_nsec / 1000000;
}

/* Numbers of n bytes in network order (most significant byte first). */
static uint64_t get_number(const uint8_t *bytes, int n)
{
    uint64_t value = 0;
    for (int i = 0; i < n; i++)
        value = value << 8 | bytes[i];
    return value;
}

static uint8_t *put_number(uint8_t *bytes, uint64_t value, int n)
{
    for (int i = 0; i < n; i++)
        bytes[i] = (uint8_t)(value >> (8 * (n - 1 - i)));
    return bytes + n;
}

/* Bytes on the heap, growing. Out of memory is remembered in `failed`, so
 * that a row of appends needs one check at its end. */
struct buffer {
    char *bytes;
    size_t size, capacity;
    bool failed;
};

static void buffer_append(struct buffer *b, const void *bytes, size_t size)
{
    if (b->failed || size == 0)
        return;
    if (size > b->capacity - b->size) {
        size_t capacity = (b->size + size) * 2;
        char *grown = realloc(b->bytes, capacity);
        if (grown == NULL) {
            b->failed = true;
            return;
        }
        b->bytes = grown;
        b->capacity = capacity;
    }
    memcpy(b->bytes + b->size, bytes, size);
    b->size += size;
}

__attribute__((format(printf, 2, 3)))
static void buffer_print(struct buffer *b, const char *format, ...)
{
    char line[1 * KIB]; /* longer text goes through buffer_append */
    va_list arguments;
    va_start(arguments, format);
    int size = vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    buffer_append(b, line, (size_t)size < sizeof line ? (size_t)size
                                                      : sizeof line - 1);
}

static void buffer_clear(struct buffer *b)
{
    free(b->bytes);
    *b = (struct buffer){0};
}

/* A slice of somebody else's bytes. */
struct text {
    const char *at;
    size_t size;
};

static bool text_is(struct text t, const char *word) /* case ignored */
{
    return t.size == strlen(word) && strncasecmp(t.at, word, t.size) == 0;
}

static struct text text_trim(struct text t)
{
    while (t.size > 0 && strchr(" \t", t.at[0]) != NULL)
        t.at++, t.size--;
    while (t.size > 0 && strchr(" \t", t.at[t.size - 1]) != NULL)
        t.size--;
    return t;
}

/* Takes what stands before the first `mark` (all, if there is none) off the
 * front of *rest, and the mark too. */
static struct text text_split(struct text *rest, char mark)
{
    const char *end = rest->size ? memchr(rest->at, mark, rest->size) : NULL;
    size_t size = end ? (size_t)(end - rest->at) : rest->size;
    struct text part = {rest->at, size};
    size += end != NULL;
    rest->at += size;
    rest->size -= size;
    return part;
}

/* A whole decimal number, digits only, at most INT64_MAX; else -1. */
static int64_t text_number(struct text t)
{
    int64_t value = 0;
    for (size_t i = 0; i < t.size; i++) {
        int digit = t.at[i] - '0';
        if (digit < 0 || digit > 9 || value > (INT64_MAX - digit) / 10)
            return -1;
        value = value * 10 + digit;
    }
    return t.size > 0 ? value : -1;
}

static int hex_digit(char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    c |= 0x20;
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* Decodes %XX, and '+' as a space in a query. `out` has room for t.size
 * bytes (it may be t.at itself). Returns the size, or -1 for a bad %. */
static ssize_t percent_decode(struct text t, char *out, bool query)
{
    size_t n = 0;
    for (size_t i = 0; i < t.size; i++) {
        char c = t.at[i];
        if (c == '%') {
            int high = i + 2 < t.size + 0 ? hex_digit(t.at[i + 1]) : -1;
            int low = i + 2 < t.size + 0 ? hex_digit(t.at[i + 2]) : -1;
            if (high < 0 || low < 0)
                return -1;
            c = (char)(high << 4 | low);
            i += 2;
        } else if (c == '+' && query) {
            c = ' ';
        }
        out[n++] = c;
    }
    return (ssize_t)n;
}

/* Finds NAME=value in a query string; false if there is none. */
static bool query_find(struct text query, const char *name, struct text *value)
{
    while (query.size > 0) {
        struct text rest = text_split(&query, '&');
        struct text key = text_split(&rest, '=');
        if (key.size == strlen(name) && memcmp(key.at, name, key.size) == 0) {
            *value = rest;
            return true;
        }
    }
    return false;
}

/* UTF-8 (RFC 3629), checked as it arrives: `left` continuation bytes are
 * due, the next of them between `low` and `high`. All zero is the start. */
struct utf8 {
    uint8_t left, low, high;
};

static bool utf8_check(struct utf8 *u, const void *bytes, size_t size)
{
    const uint8_t *at = bytes, *end = at + size;
    while (at < end) {
        uint64_t word;
        if (u->left == 0 && end - at >= 8) { /* eight ASCII bytes at once */
            memcpy(&word, at, 8);
            if ((word & 0x8080808080808080) == 0) {
                at += 8;
                continue;
            }
        }
        uint8_t byte = *at++;
        if (u->left > 0) {
            if (byte < u->low || byte > u->high)
                return false;
            *u = (struct utf8){u->left - 1, 0x80, 0xBF};
        } else if (byte >= 0xC2 && byte <= 0xDF) {
            *u = (struct utf8){1, 0x80, 0xBF};
        } else if (byte >= 0xE0 && byte <= 0xEF) { /* no overlong, D800.. */
            *u = (struct utf8){2, byte == 0xE0 ? 0xA0 : 0x80,
                               byte == 0xED ? 0x9F : 0xBF};
        } else if (byte >= 0xF0 && byte <= 0xF4) { /* up to U+10FFFF */
            *u = (struct utf8){3, byte == 0xF0 ? 0x90 : 0x80,
                               byte == 0xF4 ? 0x8F : 0xBF};
        } else if (byte >= 0x80) {
            return false;
        }
    }
    return true;
}

static bool utf8_valid(const void *bytes, size_t size)
{
    struct utf8 u = {0};
    return utf8_check(&u, bytes, size) && u.left == 0;
}

/* Appends text as a JSON string (RFC 8259 7). */
static void buffer_json(struct buffer *b, const char *text, size_t size)
{
    buffer_append(b, "\"", 1);
    for (size_t i = 0; i < size; i++) {
        if (text[i] == '"' || text[i] == '\\')
            buffer_print(b, "\\%c", text[i]);
        else if ((unsigned char)text[i] < 0x20)
            buffer_print(b, "\\u%04x", text[i]);
        else
            buffer_append(b, &text[i], 1);
    }
    buffer_append(b, "\"", 1);
}

/* Appends text so that it is harmless in HTML, a URL or a log line: all but
 * `safe` and letters and digits becomes FORMAT of its byte. */
static void buffer_escape(struct buffer *b, struct text t, const char *safe,
                          const char *format)
{
    for (size_t i = 0; i < t.size; i++) {
        unsigned char c = (unsigned char)t.at[i];
        char code[16];
        if (c < 0x80 && (isalnum(c) || (c && strchr(safe, c))))
            buffer_append(b, &t.at[i], 1);
        else
            buffer_append(b, code,
                          (size_t)snprintf(code, sizeof code, format, c));
    }
}

/* ---- 3. The log --------------------------------------------------------
 * A ring of records, addressed by offsets that only grow. The same memory
 * is mapped twice, one copy behind the other, so that a record that runs
 * over the ring's end is still one piece of memory. What a record is (and
 * so where the next one starts) is its owner's business.
 *
 *      tail: oldest whole record        head: where the next one goes
 *        v                                v
 *   ...  [record][record][record][record] .      head - tail <= size
 */
struct log {
    uint8_t *ring;
    size_t size; /* a multiple of the page size */
    uint64_t tail, head;
};

static bool log_open(struct log *l, size_t size)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    size = (size + page - 1) / page * page;
    int fd = memfd_create("log", MFD_CLOEXEC);
    uint8_t *ring = mmap(NULL, 2 * size, PROT_NONE,
                         MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    bool good = fd >= 0 && ring != MAP_FAILED && !ftruncate(fd, (off_t)size);
    for (int i = 0; good && i < 2; i++)
        good = mmap(ring + (size_t)i * size, size, PROT_READ | PROT_WRITE,
                    MAP_SHARED | MAP_FIXED, fd, 0) != MAP_FAILED;
    if (fd >= 0)
        close(fd);
    if (!good && ring != MAP_FAILED)
        munmap(ring, 2 * size);
    if (good)
        *l = (struct log){.ring = ring, .size = size};
    return good;
}

static void log_close(struct log *l)
{
    munmap(l->ring, 2 * l->size);
}

static uint8_t *log_at(const struct log *l, uint64_t offset)
{
    return l->ring + offset % l->size;
}

/* The owner has made room: head + size - tail <= l->size. */
static void log_append(struct log *l, const void *bytes, size_t size)
{
    memcpy(log_at(l, l->head), bytes, size);
    l->head += size;
}

/* ---- 4. Hashes (skip on first reading) ---------------------------------
 * SHA-1 (RFC 3174) for the WebSocket handshake, HMAC-SHA1 (RFC 2104) for
 * the bus, base64 (RFC 4648). SHA-1 is broken for signatures; as a
 * handshake it guards nothing, and HMAC does not rest on what is broken.
 */
#define SHA1_SIZE 20

struct sha1 {
    uint32_t h[5];
    uint64_t size;     /* bytes so far */
    uint8_t block[64]; /* size % 64 of them wait here */
};

static void sha1_begin(struct sha1 *s)
{
    *s = (struct sha1){.h = {0x67452301, 0xEFCDAB89, 0x98BADCFE, 0x10325476,
                             0xC3D2E1F0}};
}

static uint32_t rotate_left(uint32_t x, int n)
{
    return x << n | x >> (32 - n);
}

static void sha1_block(uint32_t h[5], const uint8_t *block)
{
    uint32_t w[80], a = h[0], b = h[1], c = h[2], d = h[3], e = h[4];
    for (int i = 0; i < 16; i++)
        w[i] = (uint32_t)get_number(block + 4 * i, 4);
    for (int i = 16; i < 80; i++)
        w[i] = rotate_left(w[i - 3] ^ w[i - 8] ^ w[i - 14] ^ w[i - 16], 1);
    for (int i = 0; i < 80; i++) {
        uint32_t f, k;
        if (i < 20)
            f = (b & c) | (~b & d), k = 0x5A827999;
        else if (i < 40)
            f = b ^ c ^ d, k = 0x6ED9EBA1;
        else if (i < 60)
            f = (b & c) | (b & d) | (c & d), k = 0x8F1BBCDC;
        else
            f = b ^ c ^ d, k = 0xCA62C1D6;
        uint32_t next = rotate_left(a, 5) + f + e + k + w[i];
        e = d, d = c, c = rotate_left(b, 30), b = a, a = next;
    }
    h[0] += a, h[1] += b, h[2] += c, h[3] += d, h[4] += e;
}

static void sha1_add(struct sha1 *s, const void *bytes, size_t size)
{
    const uint8_t *at = bytes;
    while (size > 0) {
        size_t used = s->size % 64;
        size_t n = size < 64 - used ? size : 64 - used;
        memcpy(s->block + used, at, n);
        s->size += n, at += n, size -= n;
        if (used + n == 64)
            sha1_block(s->h, s->block);
    }
}

static void sha1_end(struct sha1 *s, uint8_t digest[SHA1_SIZE])
{
    uint8_t length[8];
    put_number(length, s->size * 8, 8);
    sha1_add(s, "\x80", 1);
    while (s->size % 64 != 56)
        sha1_add(s, "", 1);
    sha1_add(s, length, 8);
    for (int i = 0; i < 5; i++)
        put_number(digest + 4 * i, s->h[i], 4);
}

/* HMAC's two hashes, each with its padded key already taken in. */
struct hmac {
    struct sha1 inner, outer;
};

static void hmac_key(struct hmac *k, const void *key, size_t size)
{
    uint8_t block[64] = {0};
    sha1_begin(&k->inner);
    if (size > sizeof block) { /* a long key is hashed first */
        sha1_add(&k->inner, key, size);
        sha1_end(&k->inner, block);
        sha1_begin(&k->inner);
    } else if (size > 0) {
        memcpy(block, key, size);
    }
    for (size_t i = 0; i < sizeof block; i++)
        block[i] ^= 0x36;
    sha1_add(&k->inner, block, sizeof block);
    for (size_t i = 0; i < sizeof block; i++)
        block[i] ^= 0x36 ^ 0x5C;
    sha1_begin(&k->outer);
    sha1_add(&k->outer, block, sizeof block);
}

static void hmac_sign(const struct hmac *k, const void *bytes, size_t size,
                      uint8_t mac[SHA1_SIZE])
{
    struct hmac copy = *k;
    sha1_add(&copy.inner, bytes, size);
    sha1_end(&copy.inner, mac);
    sha1_add(&copy.outer, mac, SHA1_SIZE);
    sha1_end(&copy.outer, mac);
}

static void buffer_base64(struct buffer *b, const uint8_t *bytes, size_t size)
{
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
                                 "abcdefghijklmnopqrstuvwxyz0123456789+/";
    for (size_t i = 0; i < size; i += 3) {
        size_t n = size - i < 3 ? size - i : 3;
        uint32_t bits = (uint32_t)get_number(bytes + i, (int)n)
                        << (8 * (3 - n));
        char four[4];
        for (size_t j = 0; j < 4; j++)
            four[j] = j > n ? '=' : digits[bits >> (18 - 6 * j) & 63];
        buffer_append(b, four, 4);
    }
}

/* ---- 5. HTTP: the request ----------------------------------------------
 * RFC 9112. The parser is strict: what could be read in two ways (bare CR
 * or LF, folded lines, space before a colon, two lengths) is refused.
 *
 *   GET /send?message=hi HTTP/1.1 CRLF      method SP target SP version
 *   Host: localhost:8080 CRLF               name ":" value
 *   CRLF
 */
enum header {
    HOST, ORIGIN, LENGTH, SINCE, WS_KEY, WS_VERSION, HEADERS
};

static const char *const header_names[HEADERS] = {
    [HOST] = "Host", [ORIGIN] = "Origin", [LENGTH] = "Content-Length",
    [SINCE] = "If-Modified-Since", [WS_KEY] = "Sec-WebSocket-Key",
    [WS_VERSION] = "Sec-WebSocket-Version",
};

struct request {
    struct text line, method, path, query;
    struct text header[HEADERS]; /* .at is NULL where there is none */
    size_t size;                 /* of the line and the headers */
    int64_t length;              /* of the body */
    bool keep_alive, upgrade, websocket, expects;
};

/* Is `word` in a comma-separated list? */
static bool list_has(struct text list, const char *word)
{
    while (list.size > 0)
        if (text_is(text_trim(text_split(&list, ',')), word))
            return true;
    return false;
}

/* tchar of RFC 9110 5.6.2 */
static bool is_token(struct text t)
{
    for (size_t i = 0; i < t.size; i++) {
        unsigned char c = (unsigned char)t.at[i];
        if (c >= 0x80 || (!isalnum(c) && !strchr("!#$%&'*+-.^_`|~", c)))
            return false;
    }
    return t.size > 0;
}

/* Finds the empty line that ends the headers. Returns the size up to and
 * with it, 0 for "need more", or minus a status. */
static int request_scan(const char *bytes, size_t size)
{
    for (size_t i = 0; i < size && i < HEADER_MAX; i++) {
        unsigned char c = (unsigned char)bytes[i];
        if (c == '\n') {
            if (i == 0 || bytes[i - 1] != '\r')
                return -400;
            if (i >= 3 && bytes[i - 2] == '\n')
                return (int)i + 1;
        } else if (i > 0 && bytes[i - 1] == '\r') {
            return -400;
        } else if ((c < 0x20 && c != '\t' && c != '\r') || c == 0x7F) {
            return -400;
        }
    }
    return size < HEADER_MAX ? 0 : -431;
}

/* Splits the target into path and query; an absolute target (RFC 9112
 * 3.2.2) loses its scheme and host. */
static bool request_target(struct request *r, struct text target)
{
    static const char *const schemes[] = {"http://", "https://"};
    for (int i = 0; i < 2; i++) {
        size_t n = strlen(schemes[i]);
        if (target.size > n && strncasecmp(target.at, schemes[i], n) == 0) {
            target.at += n, target.size -= n;
            while (target.size > 0 && !strchr("/?", target.at[0]))
                target.at++, target.size--;
            if (target.size == 0)
                target = (struct text){"/", 1};
        }
    }
    r->query = target;
    r->path = text_split(&r->query, '?');
    if (r->path.size == 0 && r->query.size > 0)
        r->path = (struct text){"/", 1};
    return r->path.size > 0 && r->path.at[0] == '/';
}

static int request_line(struct request *r)
{
    struct text rest = r->line;
    r->method = text_split(&rest, ' ');
    struct text target = text_split(&rest, ' ');
    if (!is_token(r->method) || rest.size != 8 ||
        memcmp(rest.at, "HTTP/", 5) != 0 || !isdigit(rest.at[5]) ||
        rest.at[6] != '.' || !isdigit(rest.at[7]))
        return -400;
    if (rest.at[5] != '1')
        return -505;
    r->keep_alive = rest.at[7] != '0'; /* the default since HTTP/1.1 */
    return request_target(r, target) ? 0 : -400;
}

static int request_header(struct request *r, struct text line)
{
    const char *colon = memchr(line.at, ':', line.size);
    struct text name = text_split(&line, ':'), value = text_trim(line);
    if (colon == NULL || !is_token(name)) /* a folded line has no token */
        return -400;
    for (int h = 0; h < HEADERS; h++) {
        if (!text_is(name, header_names[h]))
            continue;
        if (r->header[h].at != NULL) /* each at most once */
            return -400;
        r->header[h] = value;
    }
    if (text_is(name, "Transfer-Encoding"))
        return -501;
    if (text_is(name, "Connection")) {
        r->upgrade |= list_has(value, "upgrade");
        if (list_has(value, "close") || list_has(value, "keep-alive"))
            r->keep_alive = !list_has(value, "close");
    } else if (text_is(name, "Upgrade")) {
        r->websocket |= list_has(value, "websocket");
    } else if (text_is(name, "Expect")) {
        r->expects = text_is(value, "100-continue");
    }
    return 0;
}

/* Returns the size of line and headers, 0 for "need more" or minus a
 * status. The request's texts point into `bytes`. */
static int request_parse(const char *bytes, size_t size, struct request *r)
{
    *r = (struct request){0};
    int end = request_scan(bytes, size);
    const char *cr = memchr(bytes, '\r', size);
    if (cr != NULL)
        r->line = (struct text){bytes, (size_t)(cr - bytes)};
    if (end <= 0)
        return end;
    r->size = (size_t)end;
    struct text rest = {bytes, r->size - 2};
    text_split(&rest, '\n');
    int error = request_line(r);
    bool old = r->keep_alive == false;
    while (error == 0 && rest.size > 0) {
        struct text line = text_split(&rest, '\n');
        line.size--; /* its CR */
        error = request_header(r, line);
    }
    if (error != 0)
        return error;
    if (r->header[LENGTH].at != NULL)
        r->length = text_number(r->header[LENGTH]);
    bool host = r->header[HOST].at != NULL;
    return r->length < 0 || (!host && !old) ? -400 : end;
}

/* ---- 6. WebSocket: frames ----------------------------------------------
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
enum opcode { CONTINUATION, TEXT, BINARY, CLOSE = 8, PING, PONG };

struct frame {
    bool fin;
    uint8_t opcode;
    uint8_t mask[4];
    uint64_t size; /* of the payload */
};

/* Returns the size of the header, 0 for "need more", or minus a close code
 * (RFC 6455 7.4.1). */
static int frame_parse(const uint8_t *bytes, size_t size, struct frame *f)
{
    if (size < 2)
        return 0;
    *f = (struct frame){.fin = bytes[0] >> 7, .opcode = bytes[0] & 15};
    f->size = bytes[1] & 127;
    bool control = f->opcode >= CLOSE;
    if ((bytes[0] & 0x70) != 0 || (bytes[1] & 0x80) == 0 ||
        f->opcode > PONG || (f->opcode > BINARY && !control) ||
        (control && (!f->fin || f->size > 125)))
        return -1002;
    int longer = f->size == 126 ? 2 : f->size == 127 ? 8 : 0;
    if (size < 2 + (size_t)longer + 4)
        return 0;
    if (longer > 0) {
        f->size = get_number(bytes + 2, longer);
        if (f->size < (longer == 2 ? 126 : 65536) || f->size > INT64_MAX)
            return -1002; /* a shorter form was due, or the top bit is set */
    }
    memcpy(f->mask, bytes + 2 + longer, 4);
    return 2 + longer + 4;
}

/* Writes the header of a server's frame; returns its size, 10 at most. */
static int frame_header(uint8_t *out, int opcode, uint64_t size)
{
    int longer = size < 126 ? 0 : size < 65536 ? 2 : 8;
    out[0] = (uint8_t)(0x80 | opcode);
    out[1] = longer == 0 ? (uint8_t)size : longer == 2 ? 126 : 127;
    put_number(out + 2, size, longer);
    return 2 + longer;
}

/* Reads a server's frame, as it stands in a log; returns its whole size. */
static size_t frame_read(const uint8_t *at, struct text *payload)
{
    int longer = at[1] == 126 ? 2 : at[1] == 127 ? 8 : 0;
    payload->size = longer ? (size_t)get_number(at + 2, longer) : at[1];
    payload->at = (const char *)at + 2 + longer;
    return 2 + (size_t)longer + payload->size;
}

/* Moves n bytes from `in` down to `out` (which may overlap in front), taking
 * the mask off eight at a time; leaves the mask turned for the next byte. */
static void unmask(uint8_t *out, const uint8_t *in, size_t n, uint8_t mask[4])
{
    uint8_t twice[8], turned[4];
    uint64_t key, word;
    memcpy(twice, mask, 4);
    memcpy(twice + 4, mask, 4);
    memcpy(&key, twice, 8);
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        memcpy(&word, in + i, 8);
        word ^= key;
        memcpy(out + i, &word, 8);
    }
    for (; i < n; i++)
        out[i] = in[i] ^ mask[i % 4];
    for (size_t j = 0; j < 4; j++)
        turned[j] = mask[(n + j) % 4];
    memcpy(mask, turned, 4);
}

/* The close code of a close frame's payload, 1005 where there is none, or
 * minus the code to fail with (RFC 6455 7.4). */
static int close_code(const uint8_t *payload, size_t size)
{
    if (size == 0)
        return 1005;
    int code = size > 1 ? (int)get_number(payload, 2) : 0;
    bool known = (code >= 1000 && code <= 1014 && code != 1004 &&
                  code != 1005 && code != 1006) ||
                 (code >= 3000 && code <= 4999);
    if (!known)
        return -1002;
    return utf8_valid(payload + 2, size - 2) ? code : -1007;
}

/* ---- 7. The data --------------------------------------------------------
 * Who holds what: the server owns clients and channels; a client in a
 * channel stands in its list; the bus owns its peers. What a client sent
 * and is not done with is in its `in`, what is for it alone in its `out`;
 * all else that it gets, it reads from its channel's log.
 */
struct input {
    size_t size, capacity;
    size_t done; /* [0, done): payload of the unfinished message, unmasked */
    size_t next; /* [next, size): bytes not looked at yet */
    uint64_t frame_left; /* payload of the current frame still to come */
    uint8_t mask[4];
    uint8_t opcode; /* of the unfinished message; 0 if there is none */
    bool in_frame, fin, complete;
    struct utf8 utf8;
    uint8_t bytes[];
};

/*   accept            101                close frame, or a response
 *   ------> HTTP ------------> WEBSOCKET ----+  with Connection: close
 *            |  client_request               |  client_finish
 *            +-----------------------------> closing
 *                                            |  all sent: client_flush
 *                                            v
 *          any error, time out: dead <---- shut (reads until the other
 *          client_kill      |              side closes too)
 *                           v
 *                  closed and freed by server_reap, after the round */
struct client {
    int fd;
    int file;              /* being sent, or -1 */
    struct in6_addr address;
    bool websocket, closing, shut, dead;
    bool blocked;          /* the kernel's send buffer is full */
    bool waiting;          /* for room for its message; in s->waiting */
    bool pinged;
    uint32_t interest;     /* what epoll watches for us */
    int64_t deadline;      /* see client_timeout */
    struct channel *channel;
    struct client *previous, *next; /* in the channel */
    uint64_t cursor;       /* what it has of the log (or of the file) */
    uint64_t boundary;     /* >= cursor, between two frames (file's end) */
    struct input *in;
    struct buffer out;
    size_t out_sent;
    struct client *next_waiting, *next_dead;
};

struct channel {
    struct channel *next;  /* in its bucket of s->channels */
    struct log log;        /* of frames */
    uint64_t low;          /* no client's cursor is below */
    uint64_t lap;          /* see channel_room: bytes before this offset */
    int64_t lap_time;      /* ... were in the log at this time */
    struct client *clients;
    size_t client_count;
    bool swept;            /* low is exact: nothing moved since */
    bool dirty;            /* in s->dirty */
    struct channel *next_dirty;
    int64_t used;
    uint8_t name_size;
    char name[CHANNEL_NAME_MAX];
};

#define BLOCK 1200         /* bytes of stream in a datagram at most */
#define WINDOW_BLOCKS 218  /* kept beyond what is contiguous: 256 KiB */
#define WINDOW ((uint64_t)BLOCK * WINDOW_BLOCKS)
#define PEERS_MAX 64

struct peer {
    uint64_t id;           /* random; 0: this place is free */
    int64_t heard;
    bool joined;           /* it proved to be alive now: see bus_status_in */
    bool alive;            /* joined, and heard in the last 5 s */
    uint64_t time;         /* of its latest STATUS, by its own clock */
    uint64_t acked;        /* what it has of our stream */
    /* its stream, as we receive it */
    uint64_t tail, head;   /* what it says that it has */
    uint64_t need;         /* everything before is consumed */
    uint64_t told;         /* the need that we last told it */
    uint64_t old;          /* its head when it joined: history before that */
    uint8_t *window;       /* of WINDOW bytes; the byte at offset o is at
                              o % WINDOW; NULL until one is needed */
    uint16_t filled[WINDOW_BLOCKS]; /* block b is there up to filled[b % n] */
    struct buffer record;  /* the one that is arriving */
    uint64_t sequence;     /* of the record expected next; 0: any */
};

struct bus {
    int fd;                /* -1: no bus */
    bool leaves;           /* the machine, so silence deserves a warning */
    struct sockaddr_in to[PEERS_MAX]; /* the group, or a list of peers */
    int to_count;
    struct hmac key;
    uint64_t id, sequence, time;
    struct log log;        /* of records: what we posted */
    uint64_t sent;         /* [sent, head) is still to go out */
    struct {
        int64_t at;
        uint64_t from;
    } block_sent[WINDOW_BLOCKS]; /* when a block went out, from which byte */
    struct peer peers[PEERS_MAX];
    int64_t status_at;     /* the latest STATUS */
    int64_t beat_at, beat_gap; /* the next one when all is quiet */
    int64_t ask_at;        /* the next STATUS because of a loss; 0: none */
    bool answer;           /* a STATUS is due at once */
    int64_t start, hello_end; /* others have until then to make known */
    int64_t catch_up_end;  /* history is gathered until then at most */
    struct buffer history; /* records gathered, see bus_catch_up */
    int64_t lonely_at;     /* warn if nobody was heard until then */
    int64_t error_log_at;
};

struct server {
    struct options options;
    int epoll, signals, listener, dir;
    bool accepting, catching_up, stopping;
    int64_t now, tick_at, accept_at, stop_at;
    struct client **clients; /* by descriptor */
    size_t clients_size;
    struct channel *channels[CHANNELS_MAX]; /* a hash table */
    struct channel *dirty;   /* channels with something to flush */
    struct client *waiting, *dead;
    struct bus bus;
    uint64_t counters[METRICS];
    struct buffer scratch;   /* for the answer being made */
    struct input *input;     /* the shared read buffer */
};

/* ---- 8. Clients: cursors into a log -------------------------------------
 * What a client is sent, in this order: the rest of a frame that went out
 * in part, its private bytes (responses, pong, close), a file, the log.
 */
static void client_kill(struct server *s, struct client *c)
{
    if (c->dead)
        return;
    c->dead = true;
    c->next_dead = s->dead;
    s->dead = c;
}

static void channel_leave(struct server *s, struct client *c)
{
    if (c->channel == NULL)
        return;
    if (c->next != NULL)
        c->next->previous = c->previous;
    if (c->previous != NULL)
        c->previous->next = c->next;
    else
        c->channel->clients = c->next;
    c->channel->client_count--;
    c->channel->used = s->now;
    c->channel = NULL;
}

/* Tells epoll what we want to hear of this client. It is read only when
 * its private bytes are out: who asks much and reads nothing waits. */
static void client_watch(struct server *s, struct client *c)
{
    bool busy = c->closing || c->waiting || c->out.size || c->file >= 0;
    uint32_t interest = (!busy || c->shut ? EPOLLIN : 0) |
                        (c->blocked ? EPOLLOUT : 0);
    if (c->dead || interest == c->interest)
        return;
    struct epoll_event event = {.events = interest, .data.fd = c->fd};
    epoll_ctl(s->epoll, EPOLL_CTL_MOD, c->fd, &event);
    c->interest = interest; /* MOD cannot fail: the fd was added */
}

/* Sends what the kernel takes; returns how much that was. */
static size_t client_send(struct server *s, struct client *c,
                          const void *bytes, size_t size)
{
    ssize_t n = send(c->fd, bytes, size, MSG_NOSIGNAL);
    if (n < 0 && errno != EAGAIN && errno != EINTR)
        client_kill(s, c);
    c->blocked = n < (ssize_t)size;
    if (n <= 0)
        return 0;
    s->counters[BYTES_OUT] += (size_t)n;
    if (!c->websocket && !c->closing)
        c->deadline = s->now + IDLE_TIME;
    return (size_t)n;
}

static void client_send_file(struct server *s, struct client *c)
{
    char chunk[READ_SIZE];
    uint64_t left = c->boundary - c->cursor;
    size_t size = left < READ_SIZE ? (size_t)left : READ_SIZE;
    ssize_t n = pread(c->file, chunk, size, (off_t)c->cursor);
    if (left > 0 && n <= 0)
        client_kill(s, c); /* it shrank: the promised length is not there */
    if (n > 0)
        c->cursor += client_send(s, c, chunk, (size_t)n);
    if (c->cursor == c->boundary) {
        close(c->file);
        c->file = -1;
    }
}

/* Sends all that is due, until it is out or the kernel's buffer is full. */
static void client_flush(struct server *s, struct client *c)
{
    struct log *log = c->channel != NULL ? &c->channel->log : NULL;
    while (!c->dead && !c->blocked) {
        if (log != NULL && c->cursor < c->boundary) {
            c->cursor += client_send(s, c, log_at(log, c->cursor),
                                     (size_t)(c->boundary - c->cursor));
        } else if (c->out.size > 0) {
            c->out_sent += client_send(s, c, c->out.bytes + c->out_sent,
                                       c->out.size - c->out_sent);
            if (c->out_sent == c->out.size) {
                buffer_clear(&c->out);
                c->out_sent = 0;
            }
        } else if (c->file >= 0) {
            client_send_file(s, c);
        } else if (log != NULL && !c->closing && c->cursor < log->head) {
            c->boundary = log->head;
        } else {
            break;
        }
    }
    if (c->closing && !c->shut && !c->blocked && !c->dead) {
        /* Close our half, read on until the other side closes its own: a
         * close() now would answer bytes still on their way with a reset,
         * and a reset can overtake what we sent. */
        channel_leave(s, c);
        shutdown(c->fd, SHUT_WR);
        c->shut = true;
    }
    client_watch(s, c);
}

/* Queues private bytes; client_flush sends them. */
static void client_queue(struct server *s, struct client *c,
                         const void *bytes, size_t size)
{
    buffer_append(&c->out, bytes, size);
    if (c->out.failed)
        client_kill(s, c);
}

/* No more input counts; what is queued goes out, then it is closed. */
static void client_finish(struct server *s, struct client *c)
{
    c->closing = true;
    c->deadline = s->now + CLOSE_TIME;
}

/* ---- 9. Channels --------------------------------------------------------
 * Found by name, made when first named. A message is encoded once, appended
 * to the log, and after the round each client gets all that is new with one
 * send(). Channels without clients are kept for their history, until the
 * place is needed for another.
 */
static struct channel **channel_bucket(struct server *s, struct text name)
{
    uint32_t hash = 2166136261; /* FNV-1a */
    for (size_t i = 0; i < name.size; i++)
        hash = (hash ^ (uint8_t)name.at[i]) * 16777619;
    return &s->channels[hash % CHANNELS_MAX];
}

/* Frees the channel without clients that was not used for longest. */
static bool channel_recycle(struct server *s)
{
    struct channel **oldest = NULL;
    for (int i = 0; i < CHANNELS_MAX; i++)
        for (struct channel **at = &s->channels[i]; *at; at = &(*at)->next)
            if ((*at)->client_count == 0 && !(*at)->dirty &&
                (oldest == NULL || (*at)->used < (*oldest)->used))
                oldest = at;
    if (oldest == NULL)
        return false;
    struct channel *ch = *oldest;
    *oldest = ch->next;
    log_close(&ch->log);
    free(ch);
    s->counters[CHANNELS]--;
    return true;
}

/* NULL when there is no room for another (every one has clients). */
static struct channel *channel_find(struct server *s, struct text name)
{
    struct channel **bucket = channel_bucket(s, name);
    for (struct channel *ch = *bucket; ch != NULL; ch = ch->next)
        if (ch->name_size == name.size &&
            memcmp(ch->name, name.at, name.size) == 0)
            return ch;
    if (s->counters[CHANNELS] >= CHANNELS_MAX && !channel_recycle(s))
        return NULL;
    struct channel *ch = calloc(1, sizeof *ch);
    if (ch == NULL || !log_open(&ch->log, s->options.history)) {
        free(ch);
        return NULL;
    }
    memcpy(ch->name, name.at, name.size);
    ch->name_size = (uint8_t)name.size;
    ch->used = s->now;
    ch->next = *bucket;
    *bucket = ch;
    s->counters[CHANNELS]++;
    return ch;
}

static void channel_insert(struct channel *ch, struct client *c)
{
    c->channel = ch;
    c->previous = NULL;
    c->next = ch->clients;
    if (ch->clients != NULL)
        ch->clients->previous = c;
    ch->clients = c;
    ch->client_count++;
}

/* Who talks is served first: while the others get the round's messages, it
 * has the time to answer, and the next round comes full. */
static void channel_to_front(struct server *s, struct client *c)
{
    struct channel *ch = c->channel;
    if (ch->clients == c)
        return;
    channel_leave(s, c);
    channel_insert(ch, c);
}

/* Puts a client into the channel, `offset` being its cursor. */
static void channel_join(struct server *s, struct channel *ch,
                         struct client *c, uint64_t offset)
{
    channel_insert(ch, c);
    ch->swept = false;
    c->cursor = c->boundary = offset;
    if (offset < ch->low)
        ch->low = offset;
    /* Who starts with old messages gets the time to read them: a new lap,
     * but not so often that joining could hold a channel up for long. */
    if (offset < ch->log.head && s->now - ch->lap_time >= 2 * SLOW_TIME) {
        ch->lap = ch->log.head;
        ch->lap_time = s->now;
    }
}

static void channel_flush(struct server *s, struct channel *ch)
{
    uint64_t low = ch->log.head;
    for (struct client *c = ch->clients, *next; c != NULL; c = next) {
        next = c->next; /* a client that has finished leaves */
        if (!c->blocked)
            client_flush(s, c);
        if (!c->dead && c->channel == ch && c->cursor < low)
            low = c->cursor;
    }
    ch->low = low;
    ch->swept = true;
}

/* Makes room for `size` bytes at the log's head. What clients were not sent
 * yet is sent first. If some client would still lose bytes, the answer is
 * false ("not now") as long as these bytes are in the log for less than a
 * second; then, or with `force`, such clients are cut off as too slow.
 *
 * How old bytes are is known a lap at a time: what is before `lap` was there
 * at lap_time. A lap is a whole log, so the channel moves at least its log's
 * size a second, whatever its readers do. */
static bool channel_room(struct server *s, struct channel *ch, size_t size,
                         bool force)
{
    struct log *log = &ch->log;
    struct text payload;
    uint64_t tail = log->tail;
    while (log->head + size - tail > log->size)
        tail += frame_read(log_at(log, tail), &payload);
    if (tail > ch->lap) {
        ch->lap = log->head;
        ch->lap_time = s->now;
    }
    if (ch->low < tail && !ch->swept)
        channel_flush(s, ch);
    if (ch->low < tail && !force && s->now - ch->lap_time < SLOW_TIME)
        return false;
    for (struct client *c = ch->clients; ch->low < tail && c; c = c->next)
        if (c->cursor < tail && !c->dead) {
            client_kill(s, c);
            s->counters[SLOW_CLIENTS]++;
        }
    if (ch->low < tail)
        ch->low = tail;
    log->tail = tail;
    return true;
}

/* Appends a message as a frame; channel_room has made the room. */
static void channel_append(struct server *s, struct channel *ch, int opcode,
                           struct text message)
{
    uint8_t header[10];
    int size = frame_header(header, opcode, message.size);
    log_append(&ch->log, header, (size_t)size);
    log_append(&ch->log, message.at, message.size);
    ch->used = s->now;
    s->counters[SENT] += ch->client_count;
    ch->swept = false;
    if (!ch->dirty) {
        ch->dirty = true;
        ch->next_dirty = s->dirty;
        s->dirty = ch;
    }
}

static size_t frame_size_for(size_t payload)
{
    uint8_t header[10];
    return (size_t)frame_header(header, TEXT, payload) + payload;
}

/* ---- 10. The bus between instances --------------------------------------
 * What an instance posts is appended to its own log of records, and the bus
 * carries that stream of bytes, as TCP does, but to many receivers at once:
 * by multicast, or by unicast to a list of peers. Small messages are so
 * packed, big ones cut and lost ones repaired without code of their own.
 * Every datagram begins with its HMAC-SHA1 (over all that follows):
 *
 *   mac 20 | kind 1 | sender 8 | ...
 *   DATA     offset 8 | head 8 | bytes of the stream, within one block
 *   STATUS   time 8 | tail 8 | head 8 | for each sender that is known:
 *            id 8 | echo 8 | need 8 | size 1 | bitmap of `size` bytes
 *   LEAVE    a STATUS, the sender's last
 *
 * offset, head, tail and need count bytes of the stream; a block is BLOCK
 * bytes of it; head is the end of what went out. need is the first byte that
 * the sender of the STATUS lacks; bit i of the bitmap says that it has the
 * whole i-th block behind the one that need is in. echo is the latest time
 * that it saw in a STATUS of that sender.
 *
 * A STATUS tells state, not events: so a lost one is made good by the next,
 * and one kind serves as heartbeat, request, receipt and membership. It goes
 * out when something is missing, some time after the last DATA (the only
 * cure for a lost last message), and every second.
 *
 * Promised: instances that live lose nothing, and each sender's messages
 * come in order. Not promised: one order between senders, delivery to who
 * is silent for longer than a log lasts (it is told how much it missed), and
 * secrecy (use a tunnel). A recording is no danger: DATA counts only from a
 * peer whose STATUS has echoed a recent time of ours, and never twice.
 */
enum { DATA = 1, STATUS, LEAVE };
#define DATAGRAM_MAX (8 * KIB) /* a STATUS that knows 64 peers and losses */
#define BITMAP_MAX ((WINDOW_BLOCKS + 7) / 8)
#define RECORD_HEADER 22
#define MESSAGE_MAX (16 * MIB)
#define ASK_TIME 10             /* between requests while bytes are missing */
#define ASK_JITTER 5            /* so that not all ask for the same bytes */
#define LINGER_TIME 4           /* a block on its way is not sent again */
#define BEAT_FIRST 20           /* after the last DATA, doubling ... */
#define BEAT_LAST SECOND        /* ... up to this */
#define RECEIPT_TIME 200        /* at most, from DATA to a STATUS */
#define REPAIRS_MAX 64          /* for one STATUS */
#define HELLO_TIME 100          /* at start, for others to make known */
#define CATCH_UP_TIME (2 * SECOND)
#define ECHO_TIME (10 * SECOND) /* a "recent time of ours" */
#define ALIVE_TIME (5 * SECOND) /* of silence, then nobody waits for it */
#define PEER_TIME (600 * SECOND) /* then it is forgotten */

/* One message in the stream: size of the payload 4 | sequence 8 | post time
 * 8 | opcode 1 | size of the channel's name 1 | name | payload. */
struct record {
    uint64_t sequence, time; /* ms since 1970, by the sender's clock */
    int opcode;
    struct text channel, payload;
};

/* Returns the record's whole size, which may be more than is there yet; 0
 * when the header is not there yet; -1 for what can be no record. */
static ssize_t record_parse(const void *from, size_t size, struct record *r)
{
    const uint8_t *bytes = from;
    if (size < RECORD_HEADER)
        return 0;
    r->payload.size = (size_t)get_number(bytes, 4);
    r->sequence = get_number(bytes + 4, 8);
    r->time = get_number(bytes + 12, 8);
    r->opcode = bytes[20];
    r->channel = (struct text){(const char *)bytes + RECORD_HEADER, bytes[21]};
    r->payload.at = r->channel.at + r->channel.size;
    if (r->payload.size > MESSAGE_MAX || r->channel.size > CHANNEL_NAME_MAX ||
        (r->opcode != TEXT && r->opcode != BINARY))
        return -1;
    return (ssize_t)(RECORD_HEADER + r->channel.size + r->payload.size);
}

struct datagram {
    int kind;
    uint64_t sender, offset, time, tail, head;
    const uint8_t *bytes; /* of the stream, or the entries of a STATUS */
    size_t size;
};

struct entry {
    uint64_t id, echo, need;
    const uint8_t *bitmap;
    size_t bitmap_size; /* bytes */
};

/* False for what is no datagram of ours. The MAC is checked elsewhere. */
static bool datagram_parse(const uint8_t *bytes, size_t size,
                           struct datagram *d)
{
    if (size < SHA1_SIZE + 9 + 16)
        return false;
    const uint8_t *at = bytes + SHA1_SIZE, *end = bytes + size;
    *d = (struct datagram){.kind = at[0], .sender = get_number(at + 1, 8)};
    at += 9;
    if (d->kind == DATA) {
        d->offset = get_number(at, 8);
        d->head = get_number(at + 8, 8);
        at += 16;
    } else if ((d->kind == STATUS || d->kind == LEAVE) && end - at >= 24) {
        d->time = get_number(at, 8);
        d->tail = get_number(at + 8, 8);
        d->head = get_number(at + 16, 8);
        at += 24;
    } else {
        return false;
    }
    d->bytes = at;
    d->size = (size_t)(end - at);
    bool piece = d->size > 0 && d->offset % BLOCK + d->size <= BLOCK;
    return d->sender != 0 && d->head <= INT64_MAX && d->tail <= d->head &&
           d->offset <= INT64_MAX && (d->kind != DATA || piece);
}

/* Takes the next entry off a STATUS; false at the end or if it is cut. */
static bool datagram_entry(struct datagram *d, struct entry *e)
{
    if (d->size < 25 || d->size < 25 + (size_t)d->bytes[24])
        return false;
    *e = (struct entry){get_number(d->bytes, 8), get_number(d->bytes + 8, 8),
                        get_number(d->bytes + 16, 8), d->bytes + 25,
                        d->bytes[24]};
    d->bytes += 25 + e->bitmap_size;
    d->size -= 25 + e->bitmap_size;
    return true;
}

/* A message error: counted, told once in a while, never fatal. */
static void bus_error(struct server *s, const char *what)
{
    uint64_t count = ++s->counters[BUS_ERRORS];
    if (s->now < s->bus.error_log_at)
        return;
    s->bus.error_log_at = s->now + 10 * SECOND;
    fprintf(stderr, "chat: message error on the bus: %s (%llu so far)\n",
            what, (unsigned long long)count);
}

/* Signs and sends a datagram, SHA1_SIZE bytes being free at its front. Best
 * effort: what the kernel does not take is lost like any other, and mended
 * like it. */
static void bus_send(struct server *s, uint8_t *datagram, size_t size)
{
    struct bus *b = &s->bus;
    hmac_sign(&b->key, datagram + SHA1_SIZE, size - SHA1_SIZE, datagram);
    for (int i = 0; i < b->to_count; i++)
        sendto(b->fd, datagram, size, 0, (struct sockaddr *)&b->to[i],
               sizeof b->to[i]);
    s->counters[BUS_OUT]++;
}

static uint8_t *bus_begin(struct bus *b, uint8_t *datagram, int kind)
{
    uint8_t *at = put_number(datagram + SHA1_SIZE, (uint64_t)kind, 1);
    return put_number(at, b->id, 8);
}

/* Sends a piece of our stream that crosses no block border. */
static void bus_send_data(struct server *s, uint64_t from, uint64_t to)
{
    struct bus *b = &s->bus;
    uint8_t datagram[SHA1_SIZE + 9 + 16 + BLOCK];
    uint8_t *at = bus_begin(b, datagram, DATA);
    at = put_number(put_number(at, from, 8), b->sent, 8);
    memcpy(at, log_at(&b->log, from), (size_t)(to - from));
    bus_send(s, datagram, (size_t)(at - datagram) + (size_t)(to - from));
    uint64_t slot = from / BLOCK % WINDOW_BLOCKS;
    b->block_sent[slot].at = s->now;
    b->block_sent[slot].from = from;
}

/* Writes what we have of a peer's stream as an entry of a STATUS. */
static uint8_t *bus_put_entry(uint8_t *at, struct peer *p)
{
    at = put_number(put_number(at, p->id, 8), p->time, 8);
    at = put_number(at, p->need, 8);
    uint8_t *size = at++;
    *size = 0;
    memset(at, 0, BITMAP_MAX);
    uint64_t first = p->need / BLOCK + 1;
    for (uint64_t i = 0; i < WINDOW_BLOCKS - 1; i++)
        if (p->filled[(first + i) % WINDOW_BLOCKS] == BLOCK) {
            at[i / 8] |= (uint8_t)(1 << i % 8);
            *size = (uint8_t)(i / 8 + 1);
        }
    p->told = p->need;
    return at + *size;
}

static void bus_send_status(struct server *s, int kind)
{
    struct bus *b = &s->bus;
    uint8_t datagram[DATAGRAM_MAX];
    uint8_t *at = bus_begin(b, datagram, kind);
    b->time = b->time < (uint64_t)s->now ? (uint64_t)s->now : b->time + 1;
    at = put_number(put_number(at, b->time, 8), b->log.tail, 8);
    at = put_number(at, b->sent, 8);
    for (struct peer *p = b->peers; p < b->peers + PEERS_MAX; p++)
        if (p->id != 0)
            at = bus_put_entry(at, p);
    b->status_at = s->now;
    bus_send(s, datagram, (size_t)(at - datagram));
}

/* Wants a STATUS to go out within `delay`. */
static void bus_ask(struct server *s, int64_t delay)
{
    if (s->bus.ask_at == 0 || s->bus.ask_at > s->now + delay)
        s->bus.ask_at = s->now + delay;
}

/* Has the log room for another record? Not while it would overwrite what a
 * live peer needs. */
static bool bus_room(struct server *s, size_t size)
{
    struct bus *b = &s->bus;
    struct record r;
    if (b->fd < 0)
        return true;
    uint64_t tail = b->log.tail;
    size += RECORD_HEADER + CHANNEL_NAME_MAX;
    while (b->log.head + size - tail > b->log.size)
        tail += (uint64_t)record_parse(log_at(&b->log, tail), SIZE_MAX, &r);
    for (struct peer *p = b->peers; p < b->peers + PEERS_MAX; p++)
        if (p->alive && p->acked >= b->log.tail && p->acked < tail)
            return false;
    b->log.tail = tail;
    return true;
}

/* Posts a message; bus_room has made the room. It goes out with all others
 * of this round, see bus_flush. */
static void bus_post(struct server *s, struct channel *ch, int opcode,
                     struct text message)
{
    struct bus *b = &s->bus;
    uint8_t header[RECORD_HEADER];
    if (b->fd < 0)
        return;
    uint8_t *at = put_number(header, message.size, 4);
    at = put_number(at, ++b->sequence, 8);
    at = put_number(at, (uint64_t)clock_ms(CLOCK_REALTIME), 8);
    at = put_number(at, (uint64_t)opcode, 1);
    put_number(at, ch->name_size, 1);
    log_append(&b->log, header, sizeof header);
    log_append(&b->log, ch->name, ch->name_size);
    log_append(&b->log, message.at, message.size);
}

/* Sends what is new, but not beyond the window of the slowest peer. (One
 * that missed a heartbeat holds nobody up; it will ask.) */
static void bus_flush(struct server *s)
{
    struct bus *b = &s->bus;
    if (b->fd < 0 || b->sent == b->log.head)
        return;
    bool alone = true;
    uint64_t from = b->sent, limit = b->log.head;
    for (struct peer *p = b->peers; p < b->peers + PEERS_MAX; p++) {
        uint64_t end = (p->acked / BLOCK + WINDOW_BLOCKS) * BLOCK;
        if (!p->alive)
            continue;
        alone = false;
        if (s->now - p->heard < BEAT_LAST * 3 / 2 && end < limit)
            limit = end;
    }
    if (limit <= from)
        return;
    b->sent = limit;
    while (!alone && from < limit) {
        uint64_t border = (from / BLOCK + 1) * BLOCK;
        uint64_t to = border < limit ? border : limit;
        bus_send_data(s, from, to);
        from = to;
    }
    b->beat_gap = BEAT_FIRST;
    b->beat_at = s->now + BEAT_FIRST;
    if (b->beat_at > b->status_at + BEAT_LAST) /* also while DATA flows */
        b->beat_at = b->status_at + BEAT_LAST;
}

/* Sends again what a peer lacks: the rest of each block that is not whole. */
static void bus_repair(struct server *s, const struct entry *e)
{
    struct bus *b = &s->bus;
    int count = 0;
    for (uint64_t i = 0; i < WINDOW_BLOCKS && count < REPAIRS_MAX; i++) {
        uint64_t block = e->need / BLOCK + i, border = (block + 1) * BLOCK;
        uint64_t from = i == 0 ? e->need : block * BLOCK;
        uint64_t to = border < b->sent ? border : b->sent, bit = i - 1;
        if (from >= b->sent)
            break;
        if (from < b->log.tail || (i > 0 && bit / 8 < e->bitmap_size &&
                                   e->bitmap[bit / 8] >> bit % 8 & 1))
            continue;
        uint64_t slot = block % WINDOW_BLOCKS;
        if (b->block_sent[slot].from <= from &&
            s->now - b->block_sent[slot].at < LINGER_TIME)
            continue;
        bus_send_data(s, from, to);
        s->counters[BUS_REPAIRS]++;
        count++;
    }
}

/* Gives a message from the bus to our clients. */
static void bus_deliver(struct server *s, const struct record *r)
{
    size_t size = frame_size_for(r->payload.size);
    if (r->payload.size > s->options.max_message ||
        !utf8_valid(r->channel.at, r->channel.size) ||
        (r->opcode == TEXT && !utf8_valid(r->payload.at, r->payload.size))) {
        bus_error(s, "a message too big or not UTF-8");
        return;
    }
    struct channel *ch = channel_find(s, r->channel);
    if (ch == NULL)
        return; /* no room for its history, and no client to miss it */
    channel_room(s, ch, size, true); /* cannot fail, because of `force` */
    channel_append(s, ch, r->opcode, r->payload);
}

/* While instances meet, records are gathered, to be shown in order of post
 * time and not sender by sender. */
static bool bus_catching_up(const struct server *s)
{
    const struct bus *b = &s->bus;
    if (b->fd < 0 || s->now >= b->catch_up_end)
        return false;
    for (const struct peer *p = b->peers; p < b->peers + PEERS_MAX; p++)
        if (p->id != 0 && s->now - p->heard < SECOND &&
            (!p->joined || p->need < p->old))
            return true;
    return s->now < b->hello_end;
}

struct moment {
    uint64_t time;
    size_t offset; /* of the record in the history */
};

static int moment_compare(const void *one, const void *other)
{
    const struct moment *a = one, *b = other;
    if (a->time != b->time)
        return a->time < b->time ? -1 : 1;
    return a->offset < b->offset ? -1 : 1; /* as it came, if equal */
}

/* Delivers the history gathered, oldest first. */
static void bus_catch_up(struct server *s)
{
    struct buffer *history = &s->bus.history, moments = {0};
    struct record r;
    for (size_t offset = 0; offset < history->size;) {
        ssize_t size = record_parse(history->bytes + offset,
                                    history->size - offset, &r);
        struct moment moment = {r.time, offset};
        buffer_append(&moments, &moment, sizeof moment);
        offset += (size_t)size;
    }
    struct moment *m = (struct moment *)(void *)moments.bytes;
    size_t count = moments.size / sizeof *m;
    if (count > 0)
        qsort(m, count, sizeof *m, moment_compare);
    for (size_t i = 0; i < count; i++) {
        record_parse(history->bytes + m[i].offset, SIZE_MAX, &r);
        bus_deliver(s, &r);
    }
    buffer_clear(&moments);
    buffer_clear(history);
}

/* A whole record has come. A gap in the sequence is what was skipped. */
static void peer_record(struct server *s, struct peer *p)
{
    struct bus *b = &s->bus;
    struct record r;
    record_parse(p->record.bytes, p->record.size, &r);
    if (p->sequence != 0 && r.sequence > p->sequence) {
        uint64_t lost = r.sequence - p->sequence;
        s->counters[BUS_LOST] += lost;
        fprintf(stderr, "chat: lost %llu messages from peer %016llx\n",
                (unsigned long long)lost, (unsigned long long)p->id);
    }
    p->sequence = r.sequence + 1;
    /* Who forgot a peer after PEER_TIME and meets it again knows what it
     * posted before; shown again it would be a repetition. */
    bool known = p->need <= p->old && s->now - b->start > PEER_TIME &&
                 (int64_t)r.time < clock_ms(CLOCK_REALTIME) - PEER_TIME;
    if (known)
        return;
    if (bus_catching_up(s) && !b->history.failed)
        buffer_append(&b->history, p->record.bytes, p->record.size);
    else
        bus_deliver(s, &r);
}

/* Goes on at `offset`, which is between two records. */
static void peer_skip(struct peer *p, uint64_t offset)
{
    p->need = p->told = offset;
    memset(p->filled, 0, sizeof p->filled);
    p->filled[offset / BLOCK % WINDOW_BLOCKS] = offset % BLOCK;
    buffer_clear(&p->record);
}

/* Takes in the next bytes of the stream; false if they make no record. */
static bool peer_take(struct server *s, struct peer *p, const uint8_t *bytes,
                      size_t size)
{
    struct buffer *record = &p->record;
    struct record r;
    while (size > 0) {
        ssize_t whole = record_parse(record->bytes, record->size, &r);
        size_t goal = whole > 0 ? (size_t)whole : RECORD_HEADER;
        size_t n = goal - record->size < size ? goal - record->size : size;
        buffer_append(record, bytes, n);
        bytes += n;
        size -= n;
        whole = record_parse(record->bytes, record->size, &r);
        if (whole < 0 || record->failed)
            return false;
        if (whole == 0 || record->size < (size_t)whole)
            continue;
        peer_record(s, p);
        record->size = 0;
        if (record->capacity > WINDOW)
            buffer_clear(record);
    }
    return true;
}

/* Consumes what is contiguous now. */
static void peer_advance(struct server *s, struct peer *p)
{
    for (;;) {
        uint16_t *filled = &p->filled[p->need / BLOCK % WINDOW_BLOCKS];
        uint64_t from = p->need, size = *filled - from % BLOCK;
        if (*filled <= from % BLOCK)
            return;
        p->need += size;
        if (*filled == BLOCK)
            *filled = 0; /* for the block a window further on */
        if (!peer_take(s, p, p->window + from % WINDOW, (size_t)size)) {
            bus_error(s, "a stream without sense, skipped");
            peer_skip(p, p->head); /* always between two records */
        }
    }
}

static void bus_data_in(struct server *s, struct peer *p, struct datagram *d)
{
    uint64_t block = d->offset / BLOCK, first = p->need / BLOCK;
    uint16_t *filled = &p->filled[block % WINDOW_BLOCKS];
    uint64_t start = d->offset % BLOCK, end = start + d->size;
    if (!p->joined)
        return;
    if (d->head > p->head)
        p->head = d->head;
    if (p->window == NULL)
        p->window = malloc(WINDOW); /* without memory: as if it were lost */
    if (p->window != NULL && block >= first && block - first < WINDOW_BLOCKS &&
        start <= *filled && end > *filled) {
        memcpy(p->window + d->offset % WINDOW, d->bytes, d->size);
        *filled = (uint16_t)end;
        peer_advance(s, p);
    }
    if (p->need < p->head)
        bus_ask(s, random() % ASK_JITTER);
    if (p->need - p->told >= WINDOW / 4) {
        s->bus.answer = true;
        bus_ask(s, 0);
    } else if (s->bus.beat_at > s->now + RECEIPT_TIME) {
        s->bus.beat_at = s->now + RECEIPT_TIME;
    }
}

/* Its STATUS has echoed a recent time of ours, so it is no recording. */
static void peer_join(struct server *s, struct peer *p)
{
    p->joined = true;
    p->acked = s->bus.log.tail;
    p->sequence = 0;
    p->old = p->head;
    peer_skip(p, p->tail);
    if (p->need < p->old)
        s->bus.catch_up_end = s->now + CATCH_UP_TIME;
}

static void peer_alive(struct server *s, struct peer *p, bool alive)
{
    if (p->alive == alive)
        return;
    p->alive = alive;
    s->counters[BUS_PEERS] += alive ? 1 : (uint64_t)-1;
    fprintf(stderr, "chat: peer %016llx %s\n", (unsigned long long)p->id,
            alive ? "joined" : "left");
    if (!alive) { /* what was out of order will be sent again */
        free(p->window);
        p->window = NULL;
        uint64_t slot = p->need / BLOCK % WINDOW_BLOCKS;
        memset(p->filled, 0, sizeof p->filled);
        p->filled[slot] = p->need % BLOCK;
    }
}

static void bus_status_in(struct server *s, struct peer *p, struct datagram *d)
{
    struct bus *b = &s->bus;
    struct entry e;
    bool fresh = false;
    if (d->time <= p->time)
        return; /* overtaken by a newer one, or a recording */
    p->time = d->time;
    p->tail = d->tail;
    if (d->head > p->head)
        p->head = d->head;
    while (datagram_entry(d, &e)) {
        int64_t age = s->now - (int64_t)e.echo;
        if (e.id != b->id || e.need > b->log.head)
            continue;
        fresh = age < ECHO_TIME && age > -SECOND;
        if (!p->joined && fresh)
            peer_join(s, p);
        if (p->joined && e.need > p->acked)
            p->acked = e.need;
        if (p->joined)
            bus_repair(s, &e);
        if (e.need < b->log.tail)
            b->answer = true; /* so that it learns of the new tail */
    }
    if (fresh || !p->joined)
        p->heard = s->now;
    if (fresh)
        peer_alive(s, p, d->kind != LEAVE);
    if (!p->joined)
        b->answer = true;
    else if (p->need < p->tail)
        peer_skip(p, p->tail); /* peer_record counts what that was */
    if (b->answer || p->need < p->head)
        bus_ask(s, random() % ASK_JITTER);
}

static void peer_forget(struct server *s, struct peer *p)
{
    peer_alive(s, p, false);
    buffer_clear(&p->record);
    *p = (struct peer){0};
}

/* Finds a peer by id. One that is new (and may be) takes a free place, or
 * that of the dead peer silent for longest; NULL if all are alive. */
static struct peer *bus_peer(struct server *s, uint64_t id, bool make)
{
    struct peer *place = NULL;
    for (struct peer *p = s->bus.peers; p < s->bus.peers + PEERS_MAX; p++) {
        if (p->id == id)
            return p;
        if (!p->alive && (place == NULL || p->heard < place->heard))
            place = p;
    }
    if (place == NULL || !make)
        return NULL;
    peer_forget(s, place);
    place->id = id;
    return place;
}

static void bus_datagram_in(struct server *s, const uint8_t *bytes,
                            size_t size)
{
    struct bus *b = &s->bus;
    struct datagram d;
    uint8_t mac[SHA1_SIZE], difference = 0;
    if (!datagram_parse(bytes, size, &d)) {
        bus_error(s, "not a datagram of ours");
        return;
    }
    if (d.sender == b->id)
        return;
    s->counters[BUS_IN]++;
    hmac_sign(&b->key, bytes + SHA1_SIZE, size - SHA1_SIZE, mac);
    for (int i = 0; i < SHA1_SIZE; i++) /* in constant time */
        difference |= mac[i] ^ bytes[i];
    if (difference != 0) {
        bus_error(s, "wrong secret");
        return;
    }
    struct peer *p = bus_peer(s, d.sender, d.kind == STATUS);
    if (p != NULL && d.kind == DATA)
        bus_data_in(s, p, &d);
    else if (p != NULL)
        bus_status_in(s, p, &d);
}

static void bus_readable(struct server *s)
{
    uint8_t datagram[DATAGRAM_MAX];
    for (int i = 0; i < 256; i++) { /* then the clients' turn */
        ssize_t n = recv(s->bus.fd, datagram, sizeof datagram, MSG_DONTWAIT);
        if (n < 0)
            return;
        bus_datagram_in(s, datagram, (size_t)n);
    }
}

static bool bus_missing(const struct server *s)
{
    const struct bus *b = &s->bus;
    for (const struct peer *p = b->peers; p < b->peers + PEERS_MAX; p++)
        if (p->alive && p->need < p->head)
            return true;
    return false;
}

/* What is due by time. Returns when the next thing is. */
static int64_t bus_tick(struct server *s)
{
    struct bus *b = &s->bus;
    if (b->fd < 0)
        return INT64_MAX;
    if (b->ask_at != 0 && s->now >= b->ask_at) {
        b->ask_at = 0;
        bool missing = bus_missing(s);
        if (b->answer || missing)
            bus_send_status(s, STATUS);
        b->answer = false;
        if (missing)
            bus_ask(s, ASK_TIME - 2 + random() % ASK_JITTER);
    }
    if (s->now >= b->beat_at) {
        bus_send_status(s, STATUS);
        b->beat_gap = b->beat_gap < BEAT_LAST / 2 ? b->beat_gap * 2 : BEAT_LAST;
        b->beat_at = s->now + b->beat_gap;
    }
    for (struct peer *p = b->peers; p < b->peers + PEERS_MAX; p++) {
        if (p->id != 0 && s->now - p->heard >= ALIVE_TIME)
            peer_alive(s, p, false);
        if (p->id != 0 && s->now - p->heard >= PEER_TIME)
            peer_forget(s, p);
    }
    if (b->history.size > 0 && !bus_catching_up(s))
        bus_catch_up(s);
    if (s->counters[BUS_PEERS] > 0)
        b->lonely_at = s->now + 10 * SECOND;
    if (b->leaves && s->now >= b->lonely_at) {
        fprintf(stderr, "chat: no peer heard on the bus for 10 s\n");
        b->lonely_at = INT64_MAX;
    }
    return b->ask_at != 0 && b->ask_at < b->beat_at ? b->ask_at : b->beat_at;
}

/* Is this an address that never leaves the machine? */
static bool address_is_local(const struct sockaddr_in *a)
{
    return ntohl(a->sin_addr.s_addr) >> 24 == 127;
}

/* Resolves the next HOST:PORT of a list; the options have checked its form.
 * Returns false at the end. */
static bool bus_next_address(struct text *list, struct sockaddr_in *address)
{
    if (list->size == 0)
        return false;
    char host[256];
    struct text item = text_split(list, ',');
    snprintf(host, sizeof host, "%.*s", (int)item.size, item.at);
    char *colon = strrchr(host, ':');
    *colon = '\0';
    struct addrinfo hints = {.ai_family = AF_INET, .ai_socktype = SOCK_DGRAM};
    struct addrinfo *found;
    int error = getaddrinfo(host, colon + 1, &hints, &found);
    if (error != 0)
        die(host, gai_strerror(error));
    memcpy(address, found->ai_addr, sizeof *address);
    freeaddrinfo(found);
    return true;
}

/* Joins the multicast group on the interface. */
static void bus_join_group(struct server *s, int interface)
{
    struct bus *b = &s->bus;
    int on = 1, off = 0, ttl = s->options.ttl;
    struct ip_mreqn member = {.imr_multiaddr = b->to[0].sin_addr,
                              .imr_ifindex = interface};
    if (ttl < 0)
        ttl = b->leaves ? 1 : 0;
    /* Several instances on one machine share the port; ... */
    setsockopt(b->fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    /* ... bound to the group's address, no other datagram comes in, ... */
    if (bind(b->fd, (struct sockaddr *)&b->to[0], sizeof b->to[0]) != 0)
        die("bus: bind", strerror(errno));
    /* ... nor one that another program's membership brings here. */
    setsockopt(b->fd, IPPROTO_IP, IP_MULTICAST_ALL, &off, sizeof off);
    if (setsockopt(b->fd, IPPROTO_IP, IP_ADD_MEMBERSHIP, &member,
                   sizeof member) != 0)
        die("bus: joining the group", strerror(errno));
    /* What we send goes out by the interface, whatever the routes say, ... */
    setsockopt(b->fd, IPPROTO_IP, IP_MULTICAST_IF, &member, sizeof member);
    /* ... so many hops far (0 stays on this machine), ... */
    setsockopt(b->fd, IPPROTO_IP, IP_MULTICAST_TTL, &ttl, sizeof ttl);
    /* ... and also to the other instances here. */
    setsockopt(b->fd, IPPROTO_IP, IP_MULTICAST_LOOP, &on, sizeof on);
}

/* The list of peers may be the same on every machine, so we are the one
 * whose address can be bound; where none can (the address belongs to a
 * gateway in front of us), the first one's port on all addresses. */
static void bus_bind_peer(struct bus *b)
{
    for (int i = 0; i < b->to_count; i++)
        if (bind(b->fd, (struct sockaddr *)&b->to[i], sizeof b->to[i]) == 0)
            return;
    struct sockaddr_in any = b->to[0];
    any.sin_addr.s_addr = htonl(INADDR_ANY);
    if (bind(b->fd, (struct sockaddr *)&any, sizeof any) != 0)
        die("bus: bind", strerror(errno));
}

/* Reads the shared secret: from the file, or else from the environment.
 * Returns its size; 0 is an open "none". Exits where one is due. */
static size_t bus_secret(struct server *s, char *secret, size_t capacity)
{
    const char *file = s->options.secret, *env = getenv("CHAT_SECRET");
    struct stat status;
    size_t size;
    if (file != NULL && strcmp(file, "none") == 0)
        return 0;
    if (file == NULL && (env == NULL || *env == '\0')) {
        if (s->bus.leaves)
            die("the bus leaves this machine and needs a secret",
                "head -c 32 /dev/urandom | base64 > secret; chmod 600 secret;"
                " chat -s secret (or -s none)");
        return 0;
    }
    if (file == NULL) {
        size = (size_t)snprintf(secret, capacity, "%s", env);
        return size < capacity ? size : capacity - 1;
    }
    int fd = open(file, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd >= 0 ? read(fd, secret, capacity) : -1;
    if (n < 0 || fstat(fd, &status) != 0)
        die(file, strerror(errno));
    close(fd);
    if (status.st_mode & S_IROTH)
        die(file, "others can read this secret; chmod 600 it");
    while (n > 0 && strchr("\r\n", secret[n - 1]) != NULL)
        n--;
    if (n == 0)
        die(file, "the secret is empty");
    return (size_t)n;
}

static void bus_open(struct server *s)
{
    struct bus *b = &s->bus;
    struct text list = {s->options.bus, strlen(s->options.bus)};
    b->fd = -1;
    if (strcmp(s->options.bus, "none") == 0)
        return;
    struct sockaddr_in address;
    while (b->to_count < PEERS_MAX && bus_next_address(&list, &address)) {
        b->leaves |= !address_is_local(&address);
        b->to[b->to_count++] = address;
    }
    bool group = IN_MULTICAST(ntohl(b->to[0].sin_addr.s_addr));
    int interface = (int)if_nametoindex(s->options.interface);
    if (group && interface == 0)
        die(s->options.interface, "no such interface");
    if (group)
        b->leaves = strcmp(s->options.interface, "lo") != 0;
    char secret[4 * KIB];
    hmac_key(&b->key, secret, bus_secret(s, secret, sizeof secret));
    explicit_bzero(secret, sizeof secret);
    b->fd = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (b->fd < 0)
        die("bus: socket", strerror(errno));
    int size = 4 * MIB; /* so that a burst finds room; best effort */
    if (setsockopt(b->fd, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof size))
        setsockopt(b->fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof size);
    if (group)
        bus_join_group(s, interface);
    else
        bus_bind_peer(b);
    size_t log = s->options.history > MIB ? s->options.history : MIB;
    if (!log_open(&b->log, 4 * log) ||
        getrandom(&b->id, sizeof b->id, 0) != sizeof b->id)
        die("bus", strerror(errno));
    srandom((unsigned)b->id);
    b->start = b->beat_at = s->now;
    b->beat_gap = BEAT_FIRST;
    b->hello_end = s->now + HELLO_TIME;
    b->catch_up_end = s->now + CATCH_UP_TIME;
    b->lonely_at = s->now + 10 * SECOND;
}

/* Do all live peers have all that we posted? */
static bool bus_drained(const struct server *s)
{
    const struct bus *b = &s->bus;
    for (const struct peer *p = b->peers; p < b->peers + PEERS_MAX; p++)
        if (p->alive && p->acked < b->log.head)
            return false;
    return true;
}

static void bus_close(struct server *s)
{
    struct bus *b = &s->bus;
    if (b->fd < 0)
        return;
    bus_send_status(s, LEAVE);
    for (struct peer *p = b->peers; p < b->peers + PEERS_MAX; p++) {
        free(p->window);
        buffer_clear(&p->record);
    }
    buffer_clear(&b->history);
    log_close(&b->log);
    close(b->fd);
}

/* A message from one of our clients (or from /send), on its way to all.
 * False means "not now": see channel_room and bus_room. */
static bool server_post(struct server *s, struct channel *ch, int opcode,
                        struct text message)
{
    if (!bus_room(s, message.size) ||
        !channel_room(s, ch, frame_size_for(message.size), false))
        return false;
    channel_append(s, ch, opcode, message);
    bus_post(s, ch, opcode, message);
    s->counters[RECEIVED]++;
    return true;
}

/* Its message has to wait: tried again at the end of each round. */
static void client_wait(struct server *s, struct client *c)
{
    c->waiting = true;
    c->next_waiting = s->waiting;
    s->waiting = c;
}

/* ---- 11. HTTP: the answers ----------------------------------------------
 * The page, /send, /messages, /metrics, and with -d the files beneath DIR.
 */
__asm__(".section .rodata\n"
        "page_start: .incbin \"index.html\"\n"
        "page_end: .byte 0\n"
        ".previous\n");
extern const char page_start[], page_end[];

#define PAGE_POLICY                                                     \
    "Content-Security-Policy: default-src 'none'; connect-src 'self'; " \
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'; "           \
    "img-src data:; base-uri 'none'; form-action 'none'; "              \
    "frame-ancestors 'none'\r\n"

struct response {
    int status;
    const char *type;    /* NULL: text/plain */
    const char *headers; /* more of them, each with CRLF; or NULL */
    struct text body;    /* .at NULL: it follows by another way */
};

static const char *status_text(int status)
{
    switch (status) {
    case 101: return "Switching Protocols";
    case 200: return "OK";
    case 301: return "Moved Permanently";
    case 304: return "Not Modified";
    case 400: return "Bad Request";
    case 403: return "Forbidden";
    case 404: return "Not Found";
    case 405: return "Method Not Allowed";
    case 408: return "Request Timeout";
    case 413: return "Content Too Large";
    case 426: return "Upgrade Required";
    case 431: return "Request Header Fields Too Large";
    case 501: return "Not Implemented";
    case 503: return "Service Unavailable";
    default: return "HTTP Version Not Supported"; /* 505 */
    }
}

static struct text text_of(const char *string)
{
    return (struct text){string, strlen(string)};
}

/* One line in the Common Log Format. */
static void log_request(struct server *s, struct client *c,
                        struct text line, struct response a)
{
    char host[INET6_ADDRSTRLEN], date[40];
    struct buffer safe = {0};
    time_t now = time(NULL);
    if (s->options.quiet)
        return;
    bool v4 = IN6_IS_ADDR_V4MAPPED(&c->address);
    inet_ntop(v4 ? AF_INET : AF_INET6, c->address.s6_addr + (v4 ? 12 : 0),
              host, sizeof host);
    strftime(date, sizeof date, "%d/%b/%Y:%H:%M:%S %z", localtime(&now));
    buffer_escape(&safe, line, " !#$%&'()*+,-./:;<=>?@[]^_`{|}~", "\\x%02x");
    printf("%s - - [%s] \"%.*s\" %d %zu\n", host, date, (int)safe.size,
           safe.bytes != NULL ? safe.bytes : "", a.status, a.body.size);
    buffer_clear(&safe);
}

static void http_date(char date[40], time_t time)
{
    struct tm broken;
    date[0] = '\0'; /* for a time that no calendar has */
    if (gmtime_r(&time, &broken) != NULL)
        strftime(date, 40, "%a, %d %b %Y %H:%M:%S GMT", &broken);
}

/* Queues an answer, and logs it. An error closes the connection when the
 * rest of the request cannot be trusted: then r->keep_alive is false. */
static void respond(struct server *s, struct client *c, struct request *r,
                    struct response a)
{
    char date[40];
    struct buffer *b = &c->out;
    bool head = text_is(r->method, "HEAD");
    http_date(date, time(NULL));
    buffer_print(b, "HTTP/1.1 %d %s\r\nDate: %s\r\n", a.status,
                 status_text(a.status), date);
    if (a.headers != NULL)
        buffer_append(b, a.headers, strlen(a.headers));
    if (a.status != 101 && a.status != 304)
        buffer_print(b, "Content-Type: %s\r\nContent-Length: %zu\r\n",
                     a.type ? a.type : "text/plain; charset=utf-8",
                     a.body.size);
    if (a.status != 101)
        buffer_print(b, "X-Content-Type-Options: nosniff\r\nConnection: %s"
                     "\r\n", r->keep_alive ? "keep-alive" : "close");
    buffer_append(b, "\r\n", 2);
    if (a.body.at != NULL && !head)
        client_queue(s, c, a.body.at, a.body.size);
    if (b->failed)
        client_kill(s, c);
    log_request(s, c, r->line, a);
    if (!r->keep_alive && a.body.at != NULL)
        client_finish(s, c);
}

static void respond_text(struct server *s, struct client *c,
                         struct request *r, int status, const char *text)
{
    respond(s, c, r, (struct response){status, NULL, NULL, text_of(text)});
}

/* What cannot be read any further: answer and close. */
static void respond_and_close(struct server *s, struct client *c,
                              struct request *r, int status)
{
    r->keep_alive = false;
    respond_text(s, c, r, status, status_text(status));
}

/* Answers with what is in s->scratch. */
static void respond_scratch(struct server *s, struct client *c,
                            struct request *r, const char *type)
{
    struct text body = {s->scratch.bytes, s->scratch.size};
    if (s->scratch.failed)
        respond_text(s, c, r, 503, "out of memory");
    else
        respond(s, c, r, (struct response){200, type, NULL, body});
    buffer_clear(&s->scratch);
}

/* Decodes the channel's name into `name`; -1 for one that is not UTF-8 or
 * too long. Without one it is the empty name. */
static ssize_t request_channel(struct request *r, char *name)
{
    struct text raw;
    if (!query_find(r->query, "channel", &raw))
        return 0;
    if (raw.size > 3 * CHANNEL_NAME_MAX)
        return -1;
    ssize_t size = percent_decode(raw, name, true);
    if (size > CHANNEL_NAME_MAX || (size > 0 && !utf8_valid(name, (size_t)size)))
        return -1;
    return size;
}

/* The channel that a request names. NULL: the answer was given. */
static struct channel *request_find_channel(struct server *s,
                                            struct client *c,
                                            struct request *r)
{
    char name[3 * CHANNEL_NAME_MAX];
    ssize_t size = request_channel(r, name);
    if (size < 0) {
        respond_text(s, c, r, 400, "?channel is no UTF-8 of 64 bytes at most");
        return NULL;
    }
    struct channel *ch = channel_find(s, (struct text){name, (size_t)size});
    if (ch == NULL)
        respond_text(s, c, r, 503, "too many channels");
    return ch;
}

/* May a page from there talk to us? Its host must be ours, or allowed. */
static bool origin_allowed(struct server *s, struct request *r)
{
    struct text origin = r->header[ORIGIN], host = r->header[HOST];
    if (origin.at == NULL)
        return true; /* no browser, so nobody's cookies or network */
    for (int i = 0; i < s->options.origin_count; i++)
        if (strcmp(s->options.origins[i], "*") == 0 ||
            text_is(origin, s->options.origins[i]))
            return true;
    const char *slashes = memmem(origin.at, origin.size, "://", 3);
    if (slashes == NULL || host.at == NULL)
        return false;
    origin.size -= (size_t)(slashes + 3 - origin.at);
    return origin.size == host.size &&
           strncasecmp(slashes + 3, host.at, host.size) == 0;
}

/* Answers /send. False if the message has to wait for room. */
static bool answer_send(struct server *s, struct client *c, struct request *r)
{
    struct text raw, message = {r->line.at + r->size, (size_t)r->length};
    char decoded[HEADER_MAX];
    if (!origin_allowed(s, r)) {
        respond_text(s, c, r, 403, "this origin may not send");
        return true;
    }
    if (!text_is(r->method, "POST")) {
        if (!query_find(r->query, "message", &raw)) {
            respond_text(s, c, r, 400, "?message not provided");
            return true;
        }
        ssize_t size = percent_decode(raw, decoded, true);
        message = (struct text){decoded, size > 0 ? (size_t)size : 0};
        if (size < 0)
            message = (struct text){"\xFF", 1}; /* refused just below */
    }
    if (!utf8_valid(message.at, message.size) ||
        message.size > s->options.max_message) {
        respond_text(s, c, r, 400, "message is no UTF-8, or too big");
        return true;
    }
    struct channel *ch = request_find_channel(s, c, r);
    if (ch == NULL)
        return true;
    if (!text_is(r->method, "HEAD") && !server_post(s, ch, TEXT, message))
        return false;
    respond_text(s, c, r, 200, "message sent");
    return true;
}

static void answer_messages(struct server *s, struct client *c,
                            struct request *r)
{
    struct buffer *b = &s->scratch;
    struct channel *ch = request_find_channel(s, c, r);
    if (ch == NULL)
        return;
    buffer_append(b, "[", 1);
    for (uint64_t at = ch->log.tail; at < ch->log.head;) {
        struct text payload;
        const uint8_t *frame = log_at(&ch->log, at);
        if (at > ch->log.tail)
            buffer_append(b, ",", 1);
        at += frame_read(frame, &payload);
        if ((frame[0] & 15) == TEXT) {
            buffer_json(b, payload.at, payload.size);
        } else {
            buffer_print(b, "{\"base64\":\"");
            buffer_base64(b, (const uint8_t *)payload.at, payload.size);
            buffer_print(b, "\"}");
        }
    }
    buffer_append(b, "]", 1);
    respond_scratch(s, c, r, "application/json");
}

static void answer_metrics(struct server *s, struct client *c,
                           struct request *r)
{
    for (int i = 0; i < METRICS; i++) {
        const char *name = metric_table[i].name;
        buffer_print(&s->scratch,
                     "# HELP chat_%s %s\n# TYPE chat_%s %s\nchat_%s %llu\n",
                     name, metric_table[i].help, name, metric_table[i].type,
                     name, (unsigned long long)s->counters[i]);
    }
    respond_scratch(s, c, r, "text/plain; version=0.0.4; charset=utf-8");
}

static void answer_page(struct server *s, struct client *c, struct request *r)
{
    struct text page = {page_start, (size_t)(page_end - page_start)};
    respond(s, c, r, (struct response){200, "text/html; charset=utf-8",
                                       PAGE_POLICY, page});
}

/* Opens a file beneath DIR; the kernel sees to it that neither ".." nor a
 * link leads out (openat2(2), Linux 5.6). O_NONBLOCK: a FIFO must not hold
 * us up. Returns -1 and errno like open(). */
static int open_beneath(int dir, const char *path)
{
    struct { /* struct open_how, which musl's headers lack */
        uint64_t flags, mode, resolve;
    } how = {O_RDONLY | O_NONBLOCK | O_CLOEXEC | O_NOCTTY, 0, 0x08 | 0x02};
    /* RESOLVE_BENEATH 0x08, RESOLVE_NO_MAGICLINKS 0x02 */
    return (int)syscall(SYS_openat2, dir, path, &how, sizeof how);
}

static const char *mime_type(const char *path)
{
    static const char *const types[][2] = {
        {".html", "text/html; charset=utf-8"},
        {".htm", "text/html; charset=utf-8"},
        {".css", "text/css; charset=utf-8"},
        {".js", "text/javascript; charset=utf-8"},
        {".mjs", "text/javascript; charset=utf-8"},
        {".json", "application/json"},
        {".txt", "text/plain; charset=utf-8"},
        {".md", "text/plain; charset=utf-8"},
        {".svg", "image/svg+xml"},
        {".png", "image/png"},
        {".jpg", "image/jpeg"},
        {".jpeg", "image/jpeg"},
        {".gif", "image/gif"},
        {".webp", "image/webp"},
        {".ico", "image/vnd.microsoft.icon"},
        {".woff2", "font/woff2"},
        {".wasm", "application/wasm"},
        {".pdf", "application/pdf"},
        {".mp3", "audio/mpeg"},
        {".mp4", "video/mp4"},
    };
    const char *dot = strrchr(path, '.');
    for (size_t i = 0; dot != NULL && i < sizeof types / sizeof *types; i++)
        if (strcasecmp(dot, types[i][0]) == 0)
            return types[i][1];
    return "application/octet-stream";
}

static int is_visible(const struct dirent *entry)
{
    return entry->d_name[0] != '.';
}

/* Lists a directory. scandir() takes a path, and the one safe path is "."
 * of a directory held open; nothing else here uses the working directory. */
static void answer_listing(struct server *s, struct client *c,
                           struct request *r, int dir)
{
    struct dirent **entries;
    struct buffer *b = &s->scratch;
    int count = fchdir(dir) == 0 ? scandir(".", &entries, is_visible,
                                           alphasort) : -1;
    if (count < 0) {
        respond_text(s, c, r, 404, "not found");
        return;
    }
    buffer_print(b, "<!doctype html><meta charset=utf-8><title>");
    buffer_escape(b, r->path, "/._- ", "&#%d;");
    buffer_print(b, "</title>\n<ul>\n<li><a href=\"../\">..</a>\n");
    for (int i = 0; i < count; i++) {
        const char *slash = entries[i]->d_type == DT_DIR ? "/" : "";
        struct text name = text_of(entries[i]->d_name);
        buffer_print(b, "<li><a href=\"./");
        buffer_escape(b, name, "._-", "%%%02X");
        buffer_print(b, "%s\">", slash);
        for (size_t j = 0; j < name.size; j++) { /* UTF-8 as it is */
            struct text byte = {name.at + j, 1};
            if ((unsigned char)*byte.at >= 0x80)
                buffer_append(b, byte.at, 1);
            else
                buffer_escape(b, byte, "._- ", "&#%d;");
        }
        buffer_print(b, "%s</a>\n", slash);
        free(entries[i]);
    }
    free(entries);
    buffer_print(b, "</ul>\n");
    respond_scratch(s, c, r, "text/html; charset=utf-8");
}

/* Answers with an open regular file, which from here on is the client's. */
static void answer_open_file(struct server *s, struct client *c,
                             struct request *r, struct response a)
{
    struct stat status;
    struct tm since = {0};
    char date[40], headers[80] = "", text[40] = "";
    fstat(c->file, &status); /* cannot fail, because it is open */
    http_date(date, status.st_mtime);
    if (date[0] != '\0')
        snprintf(headers, sizeof headers, "Last-Modified: %s\r\n", date);
    struct text raw = r->header[SINCE];
    snprintf(text, sizeof text, "%.*s", (int)raw.size, raw.at ? raw.at : "");
    const char *end = strptime(text, "%a, %d %b %Y %H:%M:%S GMT", &since);
    bool unmodified = end && !*end && timegm(&since) >= status.st_mtime;
    a.headers = headers;
    a.status = unmodified ? 304 : 200;
    a.body.size = unmodified ? 0 : (size_t)status.st_size;
    respond(s, c, r, a);
    c->cursor = 0;
    c->boundary = text_is(r->method, "HEAD") ? 0 : a.body.size;
    if (!r->keep_alive)
        client_finish(s, c); /* once the file is out, see client_flush */
}

/* A directory's address ends with a slash, so that the links in its page
 * lead into it. ("//host" would lead elsewhere: one slash in front.) */
static void answer_redirect(struct server *s, struct client *c,
                            struct request *r)
{
    struct buffer headers = {0};
    struct text path = r->path;
    while (path.size > 1 && path.at[1] == '/')
        path.at++, path.size--;
    buffer_append(&headers, "Location: ", 10);
    buffer_append(&headers, path.at, path.size);
    buffer_append(&headers, "/\r\n", 4); /* with its NUL */
    if (!headers.failed)
        respond(s, c, r, (struct response){301, NULL, headers.bytes,
                                           text_of("see Location")});
    buffer_clear(&headers);
}

/* Turns a request's path into one relative to DIR, decoded once. False for
 * NUL bytes and for names that begin with a dot ("..", hidden files). */
static bool path_resolve(struct text path, char *out)
{
    ssize_t size = percent_decode(path, out, false);
    if (size < 0 || memchr(out, '\0', (size_t)size) != NULL)
        return false;
    for (ssize_t i = 1; i < size; i++)
        if (out[i] == '.' && out[i - 1] == '/')
            return false;
    ssize_t start = 0;
    while (start < size && out[start] == '/')
        start++;
    memmove(out, out + start, (size_t)(size - start));
    out[size - start] = '\0';
    return true;
}

static void answer_file(struct server *s, struct client *c, struct request *r)
{
    char path[HEADER_MAX + 16];
    struct stat status;
    int fd = path_resolve(r->path, path)
                 ? open_beneath(s->dir, *path ? path : ".") : -1;
    if (fd < 0 && (errno == EMFILE || errno == ENFILE)) {
        respond_text(s, c, r, 503, "too many open files");
        return;
    }
    bool there = fd >= 0 && fstat(fd, &status) == 0;
    if (there && S_ISDIR(status.st_mode)) {
        if (r->path.at[r->path.size - 1] != '/') {
            answer_redirect(s, c, r);
            close(fd);
            return;
        }
        int index = open_beneath(fd, "index.html");
        if (index < 0)
            answer_listing(s, c, r, fd);
        close(fd);
        if (index < 0)
            return;
        fd = index;
        strcpy(path, "index.html");
        there = fstat(fd, &status) == 0;
    }
    if (there && S_ISREG(status.st_mode)) {
        c->file = fd;
        answer_open_file(s, c, r, (struct response){.type = mime_type(path)});
        return;
    }
    if (fd >= 0)
        close(fd);
    respond_text(s, c, r, 404, "not found");
}

/* ---- 12. WebSocket: conversations ---------------------------------------
 * RFC 6455: the opening handshake (4.2), messages in and out, control
 * frames between their fragments, and the closing handshake (7).
 */

/* Finds where the last `wanted` messages begin; returns how many there are. */
static uint64_t history_find(const struct log *log, uint64_t wanted,
                             uint64_t *offset)
{
    struct text payload;
    uint64_t count = 0;
    for (uint64_t at = log->tail; at < log->head; count++)
        at += frame_read(log_at(log, at), &payload);
    uint64_t skip = count > wanted ? count - wanted : 0;
    *offset = log->tail;
    for (uint64_t i = 0; i < skip; i++)
        *offset += frame_read(log_at(log, *offset), &payload);
    return count - skip;
}

/* Puts an upgraded client into its channel, with the history asked for. */
static void websocket_begin(struct server *s, struct client *c,
                            struct channel *ch, struct text history)
{
    uint64_t offset = ch->log.head;
    if (history.at != NULL) {
        char text[40];
        uint8_t header[10];
        uint64_t wanted = (uint64_t)text_number(history); /* checked */
        int size = snprintf(text, sizeof text, "{\"history\":%llu}",
            (unsigned long long)history_find(&ch->log, wanted, &offset));
        int n = frame_header(header, TEXT, (uint64_t)size);
        client_queue(s, c, header, (size_t)n);
        client_queue(s, c, text, (size_t)size);
    }
    c->websocket = true;
    c->deadline = s->now + PING_TIME;
    channel_join(s, ch, c, offset);
}

/* A key is the base64 of 16 bytes (RFC 6455 4.1). */
static bool key_valid(struct text key)
{
    if (key.size != 24 || memcmp(key.at + 22, "==", 2) != 0)
        return false;
    for (int i = 0; i < 22; i++)
        if (!isalnum((unsigned char)key.at[i]) && !strchr("+/", key.at[i]))
            return false;
    return true;
}

static void websocket_open(struct server *s, struct client *c,
                           struct request *r)
{
    struct text key = r->header[WS_KEY], history = {0};
    query_find(r->query, "history", &history);
    if (!text_is(r->header[WS_VERSION], "13")) {
        respond(s, c, r, (struct response){426, NULL,
            "Sec-WebSocket-Version: 13\r\nUpgrade: websocket\r\n",
            text_of("this server speaks version 13")});
        return;
    }
    if (!r->upgrade || !key_valid(key) || r->header[HOST].at == NULL ||
        (history.at != NULL && text_number(history) < 0)) {
        respond_text(s, c, r, 400, "not a WebSocket handshake");
        return;
    }
    if (!origin_allowed(s, r)) {
        respond_text(s, c, r, 403, "this origin may not connect");
        return;
    }
    struct channel *ch = request_find_channel(s, c, r);
    if (ch == NULL)
        return;
    struct sha1 hash;
    uint8_t digest[SHA1_SIZE];
    sha1_begin(&hash);
    sha1_add(&hash, key.at, key.size);
    sha1_add(&hash, "258EAFA5-E914-47DA-95CA-C5AB0DC85B11", 36);
    sha1_end(&hash, digest);
    struct buffer headers = {0};
    buffer_print(&headers, "Upgrade: websocket\r\nConnection: Upgrade\r\n"
                           "Sec-WebSocket-Accept: ");
    buffer_base64(&headers, digest, sizeof digest);
    buffer_append(&headers, "\r\n", 3); /* with its NUL */
    if (headers.failed)
        client_kill(s, c);
    else
        respond(s, c, r, (struct response){.status = 101,
                                           .headers = headers.bytes});
    buffer_clear(&headers);
    websocket_begin(s, c, ch, history);
}

static void websocket_send(struct server *s, struct client *c, int opcode,
                           struct text payload)
{
    uint8_t header[10];
    int size = frame_header(header, opcode, payload.size);
    client_queue(s, c, header, (size_t)size);
    client_queue(s, c, payload.at, payload.size);
}

/* Sends all messages so far, then a close frame. 1005: one without a code. */
static void websocket_close(struct server *s, struct client *c, int code)
{
    uint8_t payload[2];
    put_number(payload, (uint64_t)code, 2);
    c->boundary = c->channel->log.head;
    websocket_send(s, c, CLOSE,
                   (struct text){(char *)payload, code == 1005 ? 0 : 2});
    client_finish(s, c);
}

static void websocket_control(struct server *s, struct client *c, int opcode,
                              struct text payload)
{
    if (opcode == PING)
        websocket_send(s, c, PONG, payload);
    if (opcode != CLOSE)
        return; /* a pong has done its work by coming */
    int code = close_code((const uint8_t *)payload.at, payload.size);
    websocket_close(s, c, code < 0 ? -code : code);
}

/* Begins a frame whose header is there. False if its payload is needed
 * first, or if it closed the connection. */
static bool websocket_frame(struct server *s, struct client *c,
                            struct input *in)
{
    struct frame f;
    uint8_t *at = in->bytes + in->next;
    size_t left = in->size - in->next;
    int header = frame_parse(at, left, &f);
    if (header < 0)
        websocket_close(s, c, -header);
    if (header <= 0)
        return false;
    if (f.opcode >= CLOSE) {
        if (left < (size_t)header + f.size)
            return false;
        unmask(at + header, at + header, (size_t)f.size, f.mask);
        in->next += (size_t)header + (size_t)f.size;
        websocket_control(s, c, f.opcode, (struct text){(char *)at + header,
                                                        (size_t)f.size});
        return true;
    }
    if ((f.opcode == CONTINUATION) != (in->opcode != 0)) {
        websocket_close(s, c, 1002); /* 5.4: a message in another, or none */
        return false;
    }
    if (f.size > s->options.max_message - in->done) {
        websocket_close(s, c, 1009);
        return false;
    }
    if (f.opcode != CONTINUATION)
        in->opcode = f.opcode;
    in->next += (size_t)header;
    in->in_frame = true;
    in->fin = f.fin;
    in->frame_left = f.size;
    memcpy(in->mask, f.mask, sizeof f.mask);
    return true;
}

/* Takes what is there of a frame's payload. False if that is nothing. */
static bool websocket_payload(struct server *s, struct client *c,
                              struct input *in)
{
    size_t n = in->size - in->next;
    uint8_t *end = in->bytes + in->done;
    if (n > in->frame_left)
        n = (size_t)in->frame_left;
    unmask(end, in->bytes + in->next, n, in->mask);
    in->done += n;
    in->next += n;
    in->frame_left -= n;
    bool whole = in->frame_left == 0;
    in->in_frame = !whole;
    in->complete = whole && in->fin;
    if (in->opcode == TEXT &&
        (!utf8_check(&in->utf8, end, n) ||
         (in->complete && in->utf8.left > 0))) {
        websocket_close(s, c, 1007);
        return false;
    }
    return whole || n > 0;
}

/* One step on: a message posted, a frame begun, a payload taken in. False
 * when there is nothing to go on with. */
static bool websocket_step(struct server *s, struct client *c,
                           struct input *in)
{
    if (in->in_frame)
        return websocket_payload(s, c, in);
    if (!in->complete)
        return websocket_frame(s, c, in);
    struct text message = {(char *)in->bytes, in->done};
    if (!server_post(s, c->channel, in->opcode, message)) {
        client_wait(s, c);
        return false;
    }
    channel_to_front(s, c);
    in->done = 0;
    in->opcode = 0;
    in->complete = false;
    in->utf8 = (struct utf8){0};
    return true;
}

/* ---- 13. The event loop --------------------------------------------------
 * A round: wait, read who has something to say, then let out what came of
 * it. Handlers only mark a client dead; server_reap frees, when no event of
 * the round can name it any more.
 */

/* Handles one request. False when there is nothing to go on with. */
static bool client_request(struct server *s, struct client *c,
                           struct input *in)
{
    struct request r;
    const char *bytes = (const char *)in->bytes + in->next;
    size_t left = in->size - in->next;
    if (left >= 2 && memcmp(bytes, "\r\n", 2) == 0) { /* RFC 9112 2.2 */
        in->next += 2;
        return true;
    }
    int header = left > 0 ? request_parse(bytes, left, &r) : 0;
    if (header == 0)
        return false;
    if (header < 0 || r.length > (int64_t)s->options.max_message) {
        respond_and_close(s, c, &r, header < 0 ? -header : 413);
        return false;
    }
    if (left - r.size < (size_t)r.length) {
        c->deadline = s->now + REQUEST_TIME;
        if (r.expects && left == r.size)
            client_queue(s, c, "HTTP/1.1 100 Continue\r\n\r\n", 25);
        return false;
    }
    if (s->stopping)
        r.keep_alive = false;
    bool get = text_is(r.method, "GET") || text_is(r.method, "HEAD");
    bool send = text_is(r.path, "/send");
    if (!get && !(send && text_is(r.method, "POST")))
        respond(s, c, &r, (struct response){405, NULL,
            send ? "Allow: GET, HEAD, POST\r\n" : "Allow: GET, HEAD\r\n",
            text_of("method not allowed")});
    else if (r.websocket && text_is(r.method, "GET"))
        websocket_open(s, c, &r);
    else if (send && !answer_send(s, c, &r))
        client_wait(s, c);
    else if (send)
        ;
    else if (text_is(r.path, "/messages"))
        answer_messages(s, c, &r);
    else if (text_is(r.path, "/metrics") && s->options.metrics)
        answer_metrics(s, c, &r);
    else if (s->dir >= 0)
        answer_file(s, c, &r);
    else if (text_is(r.path, "/"))
        answer_page(s, c, &r);
    else
        respond_text(s, c, &r, 404, "not found");
    if (c->waiting)
        return false;
    in->next += r.size + (size_t)r.length;
    return true;
}

/* No further input is looked at until what is due has gone out. */
static bool client_busy(const struct client *c)
{
    return c->dead || c->closing || c->waiting || c->file >= 0 ||
           c->out.size >= READ_SIZE;
}

/* Keeps what is unfinished for the next time, and no memory where nothing
 * is: most clients own none. */
static void client_keep(struct server *s, struct client *c, struct input *in)
{
    size_t left = in->size - in->next;
    memmove(in->bytes + in->done, in->bytes + in->next, left);
    in->next = in->done;
    in->size = in->done + left;
    bool empty = c->closing || (in->size == 0 && in->opcode == 0);
    if (in != c->in && !empty) {
        size_t capacity = in->size * 2 + 256;
        c->in = malloc(sizeof *in + capacity);
        if (c->in == NULL) {
            client_kill(s, c);
            return;
        }
        memcpy(c->in, in, sizeof *in + in->size);
        c->in->capacity = capacity;
    } else if (in == c->in && empty) {
        free(c->in);
        c->in = NULL;
    }
}

/* Goes through the input as far as it goes. */
static void client_process(struct server *s, struct client *c,
                           struct input *in)
{
    bool again = true;
    while (again) {
        bool more = true;
        while (more && !client_busy(c))
            more = c->websocket ? websocket_step(s, c, in)
                                : client_request(s, c, in);
        client_flush(s, c);
        again = more && !client_busy(c);
    }
    if (!c->dead)
        client_keep(s, c, in);
    client_watch(s, c);
}

/* The unfinished input of a client, or the shared buffer, empty. */
static struct input *client_input(struct server *s, struct client *c)
{
    if (c->in != NULL)
        return c->in;
    size_t capacity = s->input->capacity;
    *s->input = (struct input){.capacity = capacity};
    return s->input;
}

static void client_read(struct server *s, struct client *c)
{
    struct input *in = client_input(s, c);
    if (in->size == in->capacity) { /* only ever its own */
        size_t capacity = in->capacity * 2;
        in = realloc(in, sizeof *in + capacity);
        if (in == NULL) {
            client_kill(s, c);
            return;
        }
        in->capacity = capacity;
        c->in = in;
    }
    ssize_t n = recv(c->fd, in->bytes + in->size, in->capacity - in->size, 0);
    if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR))
        client_kill(s, c);
    if (n <= 0 || c->shut) /* what comes after the end does not count */
        return;
    s->counters[BYTES_IN] += (uint64_t)n;
    in->size += (size_t)n;
    int64_t deadline = s->now + (c->websocket ? PING_TIME : REQUEST_TIME);
    if (c->websocket || (c->in == NULL && deadline < c->deadline))
        c->deadline = deadline;
    c->pinged = false;
    client_process(s, c, in);
}

static void client_event(struct server *s, struct client *c, uint32_t events)
{
    if (events & EPOLLOUT) {
        c->blocked = false;
        if (c->channel != NULL)
            c->channel->swept = false;
    }
    if (c->dead)
        return;
    if (events & EPOLLOUT)
        client_process(s, c, client_input(s, c));
    if (!c->dead && events & EPOLLIN && c->interest & EPOLLIN)
        client_read(s, c);
    else if (events & (EPOLLHUP | EPOLLERR))
        client_kill(s, c);
}

/* Its deadline has come. */
static void client_timeout(struct server *s, struct client *c)
{
    if (c->websocket && !c->closing && !c->pinged) {
        websocket_send(s, c, PING, (struct text){"", 0});
        c->pinged = true;
        c->deadline = s->now + PING_TIME;
        client_flush(s, c);
    } else if (!c->websocket && !c->closing && c->in != NULL &&
               c->out.size == 0 && c->file < 0) {
        struct request r = {0};
        respond_and_close(s, c, &r, 408);
        client_flush(s, c);
    } else {
        client_kill(s, c);
    }
}

static void server_add(struct server *s, int fd, struct sockaddr_in6 *from)
{
    struct client *c = NULL;
    if ((size_t)fd < s->clients_size)
        c = calloc(1, sizeof *c);
    struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
    if (c == NULL || epoll_ctl(s->epoll, EPOLL_CTL_ADD, fd, &event) != 0) {
        free(c);
        close(fd);
        return;
    }
    c->fd = fd;
    c->file = -1;
    c->interest = EPOLLIN;
    c->address = from->sin6_addr;
    if (from->sin6_family == AF_INET) { /* as IPv6 has it: ::ffff:1.2.3.4 */
        struct sockaddr_in *v4 = (struct sockaddr_in *)(void *)from;
        c->address = (struct in6_addr){.s6_addr = {[10] = 0xFF, 0xFF}};
        memcpy(c->address.s6_addr + 12, &v4->sin_addr, 4);
    }
    c->deadline = s->now + REQUEST_TIME;
    s->clients[fd] = c;
    s->counters[CLIENTS]++;
}

static void server_accept(struct server *s)
{
    for (int i = 0; i < 64 && s->counters[CLIENTS] < s->options.max_clients;
         i++) {
        struct sockaddr_in6 from;
        socklen_t size = sizeof from;
        int fd = accept4(s->listener, (struct sockaddr *)&from, &size,
                         SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd >= 0)
            server_add(s, fd, &from);
        else if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS ||
                 errno == ENOMEM)
            s->accept_at = s->now + SECOND; /* or the loop would spin */
        if (fd < 0)
            return;
    }
}

/* Watches the listener or not: who finds no place waits in its backlog. */
static void server_watch_listener(struct server *s)
{
    bool accept = !s->stopping && !s->catching_up && s->now >= s->accept_at &&
                  s->counters[CLIENTS] < s->options.max_clients;
    if (accept == s->accepting)
        return;
    struct epoll_event event = {.events = accept ? EPOLLIN : 0,
                                .data.fd = s->listener};
    epoll_ctl(s->epoll, EPOLL_CTL_MOD, s->listener, &event);
    s->accepting = accept;
}

static void server_stop(struct server *s)
{
    if (s->stopping)
        return;
    s->stopping = true;
    s->stop_at = s->now + CLOSE_TIME;
    s->accepting = false;
    close(s->listener);
    for (size_t fd = 0; fd < s->clients_size; fd++) {
        struct client *c = s->clients[fd];
        if (c == NULL || c->closing || c->dead)
            continue;
        if (c->websocket)
            websocket_close(s, c, 1001);
        else if (c->in == NULL && c->out.size == 0 && c->file < 0)
            client_kill(s, c);
        if (!c->dead)
            client_flush(s, c);
    }
}

/* The one place where clients end. */
static void server_reap(struct server *s)
{
    while (s->dead != NULL) {
        struct client *c = s->dead;
        s->dead = c->next_dead;
        channel_leave(s, c);
        s->clients[c->fd] = NULL;
        close(c->fd);
        if (c->file >= 0)
            close(c->file);
        buffer_clear(&c->out);
        free(c->in);
        free(c);
        s->counters[CLIENTS]--;
    }
}

/* Lets out what came of this round. */
static void server_round_end(struct server *s)
{
    struct client *waiting = s->waiting;
    s->waiting = NULL;
    while (waiting != NULL) {
        struct client *c = waiting;
        waiting = c->next_waiting;
        c->waiting = false;
        if (!c->dead)
            client_process(s, c, client_input(s, c));
    }
    while (s->dirty != NULL) {
        struct channel *ch = s->dirty;
        s->dirty = ch->next_dirty;
        ch->dirty = false;
        channel_flush(s, ch);
    }
    bus_flush(s);
    server_reap(s);
    fflush(stdout);
}

/* What is due by time. Returns how long epoll may wait. */
static int server_tick(struct server *s)
{
    int64_t next = bus_tick(s);
    if (s->now >= s->tick_at) {
        s->tick_at = s->now + SECOND;
        for (size_t fd = 0; fd < s->clients_size; fd++)
            if (s->clients[fd] != NULL && !s->clients[fd]->dead &&
                s->now >= s->clients[fd]->deadline)
                client_timeout(s, s->clients[fd]);
    }
    if (s->catching_up && !bus_catching_up(s))
        s->catching_up = false;
    server_watch_listener(s);
    if (s->tick_at < next)
        next = s->tick_at;
    if (s->waiting != NULL && next > s->now + 100)
        next = s->now + 100; /* a lap may end, see channel_room */
    return s->dirty != NULL || s->dead != NULL || next <= s->now
               ? 0 : (int)(next - s->now);
}

static void server_event(struct server *s, const struct epoll_event *event)
{
    struct signalfd_siginfo signal;
    int fd = event->data.fd;
    if (fd == s->listener && !s->stopping)
        server_accept(s);
    else if (fd == s->bus.fd)
        bus_readable(s);
    else if (fd == s->signals && read(fd, &signal, sizeof signal) > 0)
        server_stop(s);
    else if (s->clients[fd] != NULL)
        client_event(s, s->clients[fd], event->events);
}

static void server_run(struct server *s)
{
    static struct epoll_event events[EVENTS_MAX];
    bool busy = true;
    while (busy) {
        int timeout = server_tick(s);
        int n = epoll_wait(s->epoll, events, EVENTS_MAX, timeout);
        s->now = clock_ms(CLOCK_MONOTONIC);
        for (int i = 0; i < n; i++)
            server_event(s, &events[i]);
        server_round_end(s);
        busy = !s->stopping || (s->now < s->stop_at &&
               (s->counters[CLIENTS] > 0 || !bus_drained(s)));
    }
}

/* ---- 14. Options and main ------------------------------------------------
 * One table makes the options, their defaults and the text of -h.
 */
static const struct {
    struct option option; /* as getopt_long wants it */
    const char *argument, *value, *help;
} option_table[] = {
    {{"port", 1, NULL, 'p'}, "PORT", "8080", "0 takes a free port"},
    {{"address", 1, NULL, 'a'}, "ADDR", NULL, "all, IPv6 and IPv4"},
    {{"dir", 1, NULL, 'd'}, "DIR", NULL,
     "serve the files beneath DIR, not the built-in page"},
    {{"bus", 1, NULL, 'b'}, "BUS", "239.255.80.80:8081",
     "a multicast group, HOST:PORT,... or none"},
    {{"interface", 1, NULL, 'i'}, "NAME", "lo", "the group is joined there"},
    {{"ttl", 1, NULL, 't'}, "N", NULL, "hops on the bus; 0 on lo, else 1"},
    {{"secret", 1, NULL, 's'}, "FILE", NULL,
     "of the bus; or CHAT_SECRET; \"none\" for none"},
    {{"max-message", 1, NULL, 'm'}, "SIZE", "64K", "to 16M"},
    {{"history", 1, NULL, 'H'}, "SIZE", "256K",
     "of log a channel; at least 4 x max-message"},
    {{"max-clients", 1, NULL, 'c'}, "N", NULL, "what RLIMIT_NOFILE allows"},
    {{"origin", 1, NULL, 'o'}, "ORIGIN", NULL,
     "of allowed pages, may be repeated; * for all"},
    {{"metrics", 0, NULL, 'M'}, "", NULL, "serve /metrics"},
    {{"quiet", 0, NULL, 'q'}, "", NULL, "no request log"},
    {{"help", 0, NULL, 'h'}, "", NULL, "this text"},
    {{"version", 0, NULL, 'V'}, "", NULL, "the version"},
};
enum { OPTIONS = sizeof option_table / sizeof *option_table };

static void usage(void)
{
    printf("Usage: chat [OPTION]...\n"
           "A broadcast chat: what one browser sends, every browser shows.\n"
           "\n");
    for (int i = 0; i < OPTIONS; i++) {
        const struct option *o = &option_table[i].option;
        bool only_long = o->val == 't' || o->val == 'M';
        char name[40], letter[5] = "    ";
        if (!only_long)
            snprintf(letter, sizeof letter, "-%c, ", o->val);
        snprintf(name, sizeof name, "--%s %s", o->name,
                 option_table[i].argument);
        printf("  %s%-20s %s%s%s\n", letter, name,
               option_table[i].value ? option_table[i].value : "",
               option_table[i].value ? "; " : "", option_table[i].help);
    }
    printf("\nSizes take K and M.\n");
}

__attribute__((noreturn))
static void option_error(const char *name, const char *value)
{
    fprintf(stderr, "chat: bad value for --%s: %s\n", name, value);
    exit(2);
}

/* A number from low to high, with K or M behind it if `size`. */
static size_t option_number(const char *name, const char *value, int64_t low,
                            int64_t high)
{
    struct text digits = text_of(value);
    int64_t unit = 1;
    char last = digits.size > 0 ? digits.at[digits.size - 1] : '\0';
    if (last == 'K' || last == 'M') {
        unit = last == 'K' ? KIB : MIB;
        digits.size--;
    }
    int64_t number = text_number(digits);
    if (number < 0 || number > high / unit || number * unit < low)
        option_error(name, value);
    return (size_t)(number * unit);
}

/* none, or a list of HOST:PORT */
static const char *option_bus(const char *value)
{
    struct text list = text_of(value);
    if (strcmp(value, "none") == 0)
        return value;
    do {
        struct text item = text_split(&list, ',');
        const char *colon = memrchr(item.at, ':', item.size);
        struct text port = {colon ? colon + 1 : "", 0};
        port.size = colon ? (size_t)(item.at + item.size - port.at) : 0;
        if (colon == item.at || item.size > 255 || text_number(port) < 1 ||
            text_number(port) > 65535)
            option_error("bus", value);
    } while (list.size > 0);
    return value;
}

static void option_set(struct options *o, int letter, const char *name,
                       const char *value)
{
    switch (letter) {
    case 'p': option_number(name, value, 0, 65535); o->port = value; break;
    case 'a': o->address = value; break;
    case 'd': o->dir = value; break;
    case 'b': o->bus = option_bus(value); break;
    case 'i': o->interface = value; break;
    case 't': o->ttl = (int)option_number(name, value, 0, 255); break;
    case 's': o->secret = value; break;
    case 'm': o->max_message = option_number(name, value, 1, 16 * MIB); break;
    case 'H': o->history = option_number(name, value, 1, 1024 * MIB); break;
    case 'c': o->max_clients = option_number(name, value, 1, 1 << 20); break;
    case 'o':
        if (o->origin_count == sizeof o->origins / sizeof *o->origins)
            option_error(name, value);
        o->origins[o->origin_count++] = value;
        break;
    case 'M': o->metrics = true; break;
    case 'q': o->quiet = true; break;
    case 'h': usage(); exit(0);
    case 'V': printf("chat " VERSION "\n"); exit(0);
    }
}

static void options_parse(struct options *o, int argc, char **argv)
{
    struct option table[OPTIONS + 1] = {0};
    char letters[2 * OPTIONS + 2] = ":", *letter = letters + 1;
    o->ttl = -1;
    for (int i = 0; i < OPTIONS; i++) {
        table[i] = option_table[i].option;
        if (table[i].val != 't' && table[i].val != 'M')
            *letter++ = (char)table[i].val;
        if (table[i].val != 't' && table[i].has_arg)
            *letter++ = ':';
        if (option_table[i].value != NULL)
            option_set(o, table[i].val, table[i].name, option_table[i].value);
    }
    int found, index = -1;
    while ((found = getopt_long(argc, argv, letters, table, &index)) != -1) {
        if (found == '?' || found == ':') {
            fprintf(stderr, "chat: %s: %s (see chat -h)\n", argv[optind - 1],
                    found == '?' ? "no such option" : "needs a value");
            exit(2);
        }
        for (int i = 0; i < OPTIONS; i++)
            if (table[i].val == found)
                option_set(o, found, table[i].name, optarg);
    }
    if (optind < argc) {
        fprintf(stderr, "chat: %s: not an option (see chat -h)\n",
                argv[optind]);
        exit(2);
    }
    if (o->history < 4 * o->max_message)
        o->history = 4 * o->max_message;
}

/* Listens on the address given, else on all of IPv6 and IPv4. */
static void server_listen(struct server *s)
{
    struct addrinfo hints = {.ai_flags = AI_PASSIVE | AI_ADDRCONFIG,
                             .ai_socktype = SOCK_STREAM}, *found;
    const char *address = s->options.address;
    int on = 1, off = 0, size = SEND_BUFFER;
    if (address == NULL)
        hints.ai_family = AF_INET6, hints.ai_flags = AI_PASSIVE;
    int error = getaddrinfo(address, s->options.port, &hints, &found);
    if (error != 0)
        die(address ? address : "listen", gai_strerror(error));
    int fd = socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 && address == NULL) { /* a machine without IPv6 */
        freeaddrinfo(found);
        s->options.address = "0.0.0.0";
        server_listen(s);
        return;
    }
    /* What is set here, the accepted connections inherit. */
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (found->ai_family == AF_INET6)
        setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
    if (fd < 0 || bind(fd, found->ai_addr, found->ai_addrlen) != 0)
        die("bind", strerror(errno));
    if (listen(fd, SOMAXCONN) != 0 ||
        fcntl(fd, F_SETFL, O_NONBLOCK) != 0)
        die("listen", strerror(errno));
    freeaddrinfo(found);
    s->listener = fd;
}

/* The line that says where we are, for people and for tests. */
static void server_announce(struct server *s)
{
    struct sockaddr_in6 at = {0};
    socklen_t size = sizeof at;
    const char *address = s->options.address, *bus = s->options.bus;
    getsockname(s->listener, (struct sockaddr *)&at, &size);
    bool group = s->bus.fd >= 0 && s->bus.to_count == 1 &&
                 IN_MULTICAST(ntohl(s->bus.to[0].sin_addr.s_addr));
    bool v6 = address != NULL && strchr(address, ':') != NULL;
    fprintf(stderr, "chat: listening on http://%s%s%s:%d/, bus %s%s%s\n",
            v6 ? "[" : "", address ? address : "localhost", v6 ? "]" : "",
            ntohs(at.sin6_port), bus, group ? " on " : "",
            group ? s->options.interface : "");
}

/* As many descriptors as the machine allows, less what is not a client. */
static void server_limits(struct server *s)
{
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit); /* cannot fail */
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    getrlimit(RLIMIT_NOFILE, &limit);
    if (limit.rlim_cur > 1 << 20)
        limit.rlim_cur = 1 << 20;
    s->clients_size = (size_t)limit.rlim_cur;
    size_t most = s->clients_size > 64 ? s->clients_size - 32 : 32;
    if (s->options.max_clients == 0 || s->options.max_clients > most)
        s->options.max_clients = most;
    s->clients = calloc(s->clients_size, sizeof *s->clients);
    s->input = malloc(sizeof *s->input + READ_SIZE);
    if (s->clients == NULL || s->input == NULL)
        die("start", "out of memory");
    *s->input = (struct input){.capacity = READ_SIZE};
}

static void server_watch(struct server *s, int fd)
{
    struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
    if (fd >= 0 && epoll_ctl(s->epoll, EPOLL_CTL_ADD, fd, &event) != 0)
        die("epoll_ctl", strerror(errno));
}

static void server_open(struct server *s)
{
    sigset_t signals;
    s->now = clock_ms(CLOCK_MONOTONIC);
    s->tick_at = s->now + SECOND;
    signal(SIGPIPE, SIG_IGN);
    sigemptyset(&signals);
    sigaddset(&signals, SIGINT);
    sigaddset(&signals, SIGTERM);
    sigprocmask(SIG_BLOCK, &signals, NULL); /* they come as events */
    s->signals = signalfd(-1, &signals, SFD_NONBLOCK | SFD_CLOEXEC);
    s->epoll = epoll_create1(EPOLL_CLOEXEC);
    if (s->signals < 0 || s->epoll < 0)
        die("start", strerror(errno));
    s->dir = -1;
    if (s->options.dir != NULL)
        s->dir = open(s->options.dir, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (s->options.dir != NULL && s->dir < 0)
        die(s->options.dir, strerror(errno));
    server_limits(s);
    bus_open(s);
    server_listen(s);
    server_watch(s, s->signals);
    server_watch(s, s->bus.fd);
    server_watch(s, s->listener);
    s->accepting = true;
    s->catching_up = s->bus.fd >= 0; /* the first clients find a history */
    server_announce(s);
}

static void server_close(struct server *s)
{
    for (size_t fd = 0; fd < s->clients_size; fd++)
        if (s->clients[fd] != NULL)
            client_kill(s, s->clients[fd]);
    server_reap(s);
    bus_close(s);
    while (channel_recycle(s))
        ;
    buffer_clear(&s->scratch);
    free(s->clients);
    free(s->input);
}

int main(int argc, char **argv)
{
    static struct server server;
    options_parse(&server.options, argc, argv);
    server_open(&server);
    server_run(&server);
    server_close(&server);
    return 0;
}
