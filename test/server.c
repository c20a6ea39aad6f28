/* SPDX-License-Identifier: MIT
 *
 * server.c: a black-box test of the whole program. It starts the real binary
 * and looks at everything that a user can see: HTTP, static files, WebSocket,
 * the chat, the process, the bus. Where it can it is a table, one line a case.
 *
 *     cc -O2 test/server.c -o server && CHAT=./chat ./server [PART...]
 *
 * The parts are listed above main, at the end; without a name all of them run.
 */
#include "harness.h"

#include <ftw.h>
#include <sys/sysmacros.h>
#include <sys/un.h>

#define COUNT(array) (sizeof(array) / sizeof *(array))
#define BYTES(text)  text, sizeof(text) - 1 /* may hold NUL bytes */

static char folder[64]; /* a temporary one, removed at the end */

/* ---- HTTP exchanges ---------------------------------------------------- */

/* One request and what has to come back. */
struct exchange {
    const char *name;
    const char *request;
    size_t length;
    int status, or_status; /* the second is as good as the first, if not 0 */
    const char *field;     /* "Name: value", "Name" alone, or "!Name": absent */
    const char *body;      /* the whole of it, if not NULL */
    enum { EITHER, KEEPS, CLOSES } after; /* the connection */
};

#define HOST             "Host: localhost:8080\r\n"
#define GET(target)      "GET " target " HTTP/1.1\r\n" HOST "\r\n"
#define GET_WITH(fields) "GET / HTTP/1.1\r\n" HOST fields "\r\n"
#define POST(target, length, body)                                \
    "POST " target " HTTP/1.1\r\n" HOST "Content-Length: " length \
    "\r\n\r\n" body

/* The usual ends of a row. */
#define REFUSED(status)           status, 0, NULL, NULL, CLOSES
#define REFUSED_OR(status, other) status, other, NULL, NULL, CLOSES
#define ANSWER(status)            status, 0, NULL, NULL, EITHER
#define ANSWER_OR(status, other)  status, other, NULL, NULL, EITHER
#define LAST(status)              status, 0, NULL, NULL, CLOSES
#define FINE                      200, 0, NULL, NULL, KEEPS
#define SAYS(status, body)        status, 0, NULL, body, KEEPS
#define HAS(status, field)        status, 0, field, NULL, KEEPS

static void expect_field(const struct response *r, const char *field) {
    const char *colon = strchr(field, ':'), *value;
    char name[80];

    snprintf(name, sizeof name, "%.*s",
             (int)(colon ? (size_t)(colon - field) : strlen(field)), field);
    value = header(r, name + (name[0] == '!'));
    if (name[0] == '!') expect(!value, "%s: %s", name + 1, value ? value : "");
    else
        expect(value && (!colon || !strcmp(value, colon + 2)),
               "%s: %s, expected %s", name, value ? value : "(none)", field);
}

static void expect_exchange(struct peer *p, const struct exchange *e) {
    struct response r;

    read_response(p, !strncmp(e->request, "HEAD ", 5), &r);
    expect(r.status == e->status || (e->or_status && r.status == e->or_status),
           "status %d, expected %d", r.status, e->status);
    if (e->field && r.status == e->status) expect_field(&r, e->field);
    if (e->body && r.status == e->status) expect_body(&r, e->body);
    expect(!r.body || !memmem(r.body, r.length, "SECRET", 6), "a secret");
    if (e->after == KEEPS) {
        peer_text(p, GET("/messages?channel=nobody"));
        read_response(p, false, &r);
        expect(r.status == 200, "the next request: status %d", r.status);
        expect_body(&r, "[]");
    } else if (e->after == CLOSES) {
        expect_end(p);
    }
}

/* Runs a table: each request in one piece, and again byte by byte. */
static void run_exchanges(int port, const struct exchange *e, size_t count) {
    struct peer *clock = ws_open(port, "/?channel=clock"), *p;

    for (size_t i = 0; i < 2 * count; i++, e += i % 2 == 0) {
        begin("%s%s", e->name, i % 2 ? ", byte by byte" : "");
        p = peer_open(port);
        if (i % 2) send_chopped(p, clock, e->request, e->length);
        else peer_send(p, e->request, e->length);
        expect_exchange(p, e);
        peer_close(p);
        finish();
    }
    peer_close(clock);
}

/* ---- JSON -------------------------------------------------------------- */

struct json {
    const char *at, *end;
};

/* Takes this character, after white space: false if it is not there. */
static bool json_take(struct json *j, char c) {
    while (j->at < j->end && strchr(" \t\r\n", *j->at)) j->at++;
    if (j->at == j->end || *j->at != c) return false;
    j->at++;
    return true;
}

/* Takes a string, decoded, as shown() writes it. */
static bool json_string(struct json *j, char *out, size_t size) {
    static const char plain[] = "\"\\/bfnrt", meant[] = "\"\\/\b\f\n\r\t";
    static char text[70000];
    size_t n = 0;

    if (!json_take(j, '"')) return false;
    for (; j->at < j->end && *j->at != '"' && n < sizeof text; j->at++) {
        unsigned code;

        if ((unsigned char)*j->at < ' ')
            return false; /* a raw control character */
        if (*j->at != '\\') {
            text[n++] = *j->at;
        } else if (*++j->at == 'u' && j->end - j->at > 4 &&
                   sscanf(j->at + 1, "%4x", &code) == 1 && code < 0x80) {
            text[n++] = (char)code;
            j->at += 4;
        } else if (*j->at && strchr(plain, *j->at)) {
            text[n++] = meant[strchr(plain, *j->at) - plain];
        } else {
            return false;
        }
    }
    snprintf(out, size, "%s", shown(text, n));
    return json_take(j, '"');
}

/* Writes /messages as one line: its items with " | " between, the binary ones
 * with "base64:" before. */
static bool json_items(const struct response *r, char *out, size_t size) {
    struct json j = { (const char *)r->body,
                      (const char *)r->body + r->length };
    char item[500];
    size_t n = 0;

    out[0] = '\0';
    if (!json_take(&j, '[')) return false;
    if (json_take(&j, ']')) return j.at == j.end;
    do {
        bool object = json_take(&j, '{');

        if (object && !(json_string(&j, item, sizeof item) &&
                        !strcmp(item, "base64") && json_take(&j, ':')))
            return false;
        if (!json_string(&j, item, sizeof item)) return false;
        if (object && !json_take(&j, '}')) return false;
        n += (size_t)snprintf(out + n, n < size ? size - n : 0, "%s%s%s",
                              n ? " | " : "", object ? "base64:" : "", item);
    } while (n < size && json_take(&j, ','));
    return json_take(&j, ']');
}

/* /messages of a target holds these items. */
static void expect_messages(int port, const char *target, const char *items) {
    struct response r;
    struct peer *p = http_get(port, target, &r);
    char got[4000];

    expect(r.status == 200, "%s: status %d", target, r.status);
    expect_field(&r, "Content-Type: application/json");
    expect(r.body && json_items(&r, got, sizeof got), "not the JSON meant: %s",
           shown(r.body, r.length));
    expect(!r.body || !strcmp(got, items), "items %s, expected %s", got, items);
    peer_close(p);
}

/* ---- HTTP -------------------------------------------------------------- */

#define NOT_PROVIDED "?message not provided"

/* clang-format off */
static const struct exchange http_cases[] = {
    /* resources */
    {"the page", BYTES(GET("/")), HAS(200, "Content-Type: text/html; charset=utf-8")},
    {"the page has a CSP", BYTES(GET("/")), HAS(200, "Content-Security-Policy")},
    {"the page with a query", BYTES(GET("/?channel=earth&x")), FINE},
    {"not found", BYTES(GET("/nothing")), 404, 0, "Content-Type: text/plain; charset=utf-8", "not found",
     KEEPS},
    {"/send/ is not /send", BYTES(GET("/send/?message=x")), SAYS(404, "not found")},
    {"/sendx is not /send", BYTES(GET("/sendx?message=x")), SAYS(404, "not found")},
    {"/SEND is not /send", BYTES(GET("/SEND?message=x")), SAYS(404, "not found")},
    {"no /metrics unless asked for", BYTES(GET("/metrics")), SAYS(404, "not found")},
    {"no file of the machine", BYTES(GET("/etc/passwd")), ANSWER(404)},
    {"/ as %2f is not a file", BYTES(GET("/%2fetc%2fpasswd")), ANSWER_OR(404, 400)},
    {"an encoded path is the path", BYTES(GET("/%73end?message=encoded")), SAYS(200, "message sent")},

    /* methods */
    {"POST /: 405", BYTES(POST("/", "0", "")), HAS(405, "Allow: GET, HEAD")},
    {"PUT /: 405", BYTES("PUT / HTTP/1.1\r\n" HOST "\r\n"), HAS(405, "Allow: GET, HEAD")},
    {"DELETE /messages: 405", BYTES("DELETE /messages HTTP/1.1\r\n" HOST "\r\n"),
     HAS(405, "Allow: GET, HEAD")},
    {"POST /messages: 405", BYTES(POST("/messages", "1", "x")), HAS(405, "Allow: GET, HEAD")},
    {"PUT /send: 405", BYTES("PUT /send?message=x HTTP/1.1\r\n" HOST "\r\n"),
     HAS(405, "Allow: GET, HEAD, POST")},
    {"OPTIONS *: 405", BYTES("OPTIONS * HTTP/1.1\r\n" HOST "\r\n"), HAS(405, "Allow: GET, HEAD")},
    {"OPTIONS /send: 405", BYTES("OPTIONS /send HTTP/1.1\r\n" HOST "\r\n"), HAS(405, "Allow: GET, HEAD, POST")},
    {"PATCH with a body: 405, the body is read", BYTES("PATCH / HTTP/1.1\r\n" HOST "Content-Length: 5\r\n\r\nGET /"),
     HAS(405, "Allow: GET, HEAD")},
    {"POST of an unknown path: 405", BYTES(POST("/nothing", "1", "x")), HAS(405, "Allow: GET, HEAD")},
    {"GET *", BYTES("GET * HTTP/1.1\r\n" HOST "\r\n"), REFUSED(400)},
    {"a method of one letter", BYTES("X / HTTP/1.1\r\n" HOST "\r\n"), HAS(405, "Allow")},
    {"a method of 200 letters", BYTES("GETGETGETGETGETGETGETGETGETGETGETGETGETGETGETGETGETGETGETGETGETGETGETGETGETGET"
     "GETGETGETGETGETGETGETGETGETGETGETGETGETGETGETGETGETGETGETGETGETGETGETGETGET / HTTP/1.1\r\n" HOST "\r\n"),
     HAS(405, "Allow")},
    {"head is not HEAD", BYTES("head / HTTP/1.1\r\n" HOST "\r\n"), HAS(405, "Allow")},
    {"CONNECT: 405", BYTES("CONNECT localhost:80 HTTP/1.1\r\n" HOST "\r\n"), ANSWER_OR(405, 400)},
    {"TRACE: 405", BYTES("TRACE / HTTP/1.1\r\n" HOST "\r\n"), ANSWER(405)},
    {"methods are case-sensitive", BYTES("get / HTTP/1.1\r\n" HOST "\r\n"), ANSWER_OR(405, 400)},
    {"a method that only begins with GET", BYTES("GETX / HTTP/1.1\r\n" HOST "\r\n"), ANSWER_OR(405, 400)},

    /* persistence */
    {"HTTP/1.1 stays open", BYTES(GET("/")), FINE},
    {"Connection: close", BYTES(GET_WITH("Connection: close\r\n")), 200, 0, "Connection: close", NULL,
     CLOSES},
    {"Connection: Close in a list", BYTES(GET_WITH("Connection: x, Close\r\n")), 200, 0, "Connection: close",
     NULL, CLOSES},
    {"Connection: closet is no close", BYTES(GET_WITH("Connection: closet\r\n")), FINE},
    {"HTTP/1.0 closes", BYTES("GET / HTTP/1.0\r\n" HOST "\r\n"), LAST(200)},
    {"HTTP/1.0 needs no Host", BYTES("GET / HTTP/1.0\r\n\r\n"), LAST(200)},
    {"404 stays open", BYTES(GET("/a/b/c")), 404, 0, NULL, NULL, KEEPS},
    {"an empty line before the request", BYTES("\r\n" GET("/")), FINE},
    {"HEAD", BYTES("HEAD / HTTP/1.1\r\n" HOST "\r\n"), FINE},
    {"a GET with a body: the body is read", BYTES("GET / HTTP/1.1\r\n" HOST
     "Content-Length: 24\r\n\r\nGET /smuggled HTTP/1.1\r\n"), FINE},
    {"HTTP/1.0 with keep-alive stays", BYTES("GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"),
     HAS(200, "Connection: keep-alive")},
    {"HTTP/1.0 with Keep-Alive in a list stays", BYTES("GET / HTTP/1.0\r\nConnection: x, Keep-Alive\r\n\r\n"), FINE},
    {"HTTP/1.0 with close and keep-alive closes",
     BYTES("GET / HTTP/1.0\r\nConnection: close, keep-alive\r\n\r\n"), LAST(200)},
    {"HTTP/1.0: the next request is not answered", BYTES("GET / HTTP/1.0\r\n\r\n" GET("/")), LAST(200)},
    {"HTTP/1.2 is HTTP/1.1", BYTES("GET / HTTP/1.2\r\n" HOST "\r\n"), FINE},
    {"close, then keep-alive", BYTES(GET_WITH("Connection: close\r\nConnection: keep-alive\r\n")), LAST(200)},
    {"keep-alive, then close", BYTES(GET_WITH("Connection: keep-alive\r\nConnection: close\r\n")), LAST(200)},
    {"close in capitals", BYTES(GET_WITH("CONNECTION: CLOSE\r\n")), LAST(200)},
    {"close: the next request is not answered", BYTES(GET_WITH("Connection: close\r\n") GET("/")), LAST(200)},
    {"close on a 404", BYTES("GET /x HTTP/1.1\r\n" HOST "Connection: close\r\n\r\n"), LAST(404)},
    {"close on a 405", BYTES("PUT / HTTP/1.1\r\n" HOST "Connection: close\r\n\r\n"), LAST(405)},
    {"close on a POST", BYTES("POST /send HTTP/1.1\r\n" HOST "Connection: close\r\nContent-Length: 1\r\n\r\nx"),
     200, 0, NULL, "message sent", CLOSES},
    {"Connection: not close is no close", BYTES(GET_WITH("Connection: not close\r\n")), FINE},
    {"Connection: empty", BYTES(GET_WITH("Connection:\r\n")), FINE},
    {"Connection: Upgrade without an Upgrade", BYTES(GET_WITH("Connection: Upgrade\r\n")), FINE},
    {"Upgrade: h2c is passed over", BYTES(GET_WITH("Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\n"
     "HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n")), FINE},
    {"four empty lines before the request", BYTES("\r\n\r\n\r\n\r\n" GET("/")), FINE},
    {"empty lines between requests", BYTES(GET("/nothing") "\r\n\r\n"), 404, 0, NULL, NULL, KEEPS},
    {"a line feed before the request", BYTES("\n" GET("/")), REFUSED(400)},
    {"a carriage return before the request", BYTES("\r" GET("/")), REFUSED(400)},
    {"a Date in a 200", BYTES(GET("/")), HAS(200, "Date")},
    {"a Date in a 404", BYTES(GET("/x")), HAS(404, "Date")},
    {"HEAD of nothing", BYTES("HEAD /nothing HTTP/1.1\r\n" HOST "\r\n"), HAS(404, "Content-Length: 9")},
    {"HEAD with close", BYTES("HEAD / HTTP/1.1\r\n" HOST "Connection: close\r\n\r\n"), LAST(200)},
    {"HEAD in HTTP/1.0", BYTES("HEAD / HTTP/1.0\r\n\r\n"), LAST(200)},
    {"HEAD without a Host: no body", BYTES("HEAD / HTTP/1.1\r\n\r\n"), REFUSED(400)},
    {"HEAD with a NUL: no body", BYTES("HEAD / HTTP/1.1\r\n" HOST "X: \0\r\n\r\n"), REFUSED(400)},
    {"HEAD with Transfer-Encoding: no body", BYTES("HEAD / HTTP/1.1\r\n" HOST "Transfer-Encoding: x\r\n\r\n"),
     REFUSED(501)},
    {"HEAD of HTTP/3.0: no body", BYTES("HEAD / HTTP/3.0\r\n" HOST "\r\n"), REFUSED(505)},
    {"HEAD with a body too big: no body", BYTES("HEAD / HTTP/1.1\r\n" HOST "Content-Length: 65537\r\n\r\n"),
     REFUSED(413)},
    {"HEAD with a body: the body is read", BYTES("HEAD / HTTP/1.1\r\n" HOST "Content-Length: 3\r\n\r\nabc"), FINE},
    {"an If-Modified-Since for the page", BYTES(GET_WITH("If-Modified-Since: Sun, 06 Nov 1994 08:49:37 GMT\r\n")),
     FINE},
    {"a Range for the page: all of it", BYTES(GET_WITH("Range: bytes=0-1\r\n")), FINE},

    /* targets */
    {"absolute form", BYTES("GET http://localhost:8080/messages?channel=nobody HTTP/1.1\r\n" HOST "\r\n"),
     SAYS(200, "[]")},
    {"absolute form without a path", BYTES("GET http://localhost:8080 HTTP/1.1\r\n" HOST "\r\n"), FINE},
    {"absolute form, query without a path", BYTES("GET http://localhost:8080?channel=x HTTP/1.1\r\n" HOST
     "\r\n"), FINE},
    {"a relative target", BYTES("GET messages HTTP/1.1\r\n" HOST "\r\n"), REFUSED(400)},
    {"no target", BYTES("GET  HTTP/1.1\r\n" HOST "\r\n"), REFUSED(400)},
    {"a blank in the target", BYTES("GET /a b HTTP/1.1\r\n" HOST "\r\n"), REFUSED(400)},
    {"a tab in the target", BYTES("GET /a\tb HTTP/1.1\r\n" HOST "\r\n"), REFUSED(400)},
    {"a tab in the query", BYTES("GET /?a\tb HTTP/1.1\r\n" HOST "\r\n"), REFUSED(400)},
    {"a tab in the method", BYTES("GE\tT / HTTP/1.1\r\n" HOST "\r\n"), REFUSED(400)},
    {"a control character in the target", BYTES("GET /a\033[1mb HTTP/1.1\r\n" HOST "\r\n"), REFUSED(400)},
    {"a NUL in the target", BYTES("GET /\0 HTTP/1.1\r\n" HOST "\r\n"), REFUSED(400)},
    {"an encoded NUL in the path", BYTES(GET("/%00")), ANSWER_OR(404, 400)},
    {"absolute form in capitals", BYTES("GET HTTP://LOCALHOST/messages?channel=nobody HTTP/1.1\r\n" HOST "\r\n"),
     SAYS(200, "[]")},
    {"absolute form, an IPv6 address", BYTES("GET http://[::1]:80/ HTTP/1.1\r\n" HOST "\r\n"), FINE},
    {"absolute form without a Host", BYTES("GET http://localhost/ HTTP/1.1\r\n\r\n"), REFUSED(400)},
    {"absolute form with a bad Host", BYTES("GET http://localhost/ HTTP/1.1\r\nHost: a b\r\n\r\n"), REFUSED(400)},
    {"absolute form of no host", BYTES("GET http:///messages HTTP/1.1\r\n" HOST "\r\n"), REFUSED(400)},
    {"absolute form of no host but a port", BYTES("GET http://?x HTTP/1.1\r\n" HOST "\r\n"), REFUSED(400)},
    {"absolute form with a user", BYTES("GET http://user@localhost/ HTTP/1.1\r\n" HOST "\r\n"), REFUSED(400)},
    {"absolute form with a bad port", BYTES("GET http://localhost:x/ HTTP/1.1\r\n" HOST "\r\n"), REFUSED(400)},
    {"absolute form of another scheme", BYTES("GET ftp://localhost/ HTTP/1.1\r\n" HOST "\r\n"), REFUSED(400)},
    {"absolute form of a file", BYTES("GET file:///etc/passwd HTTP/1.1\r\n" HOST "\r\n"), REFUSED(400)},
    {"absolute form with one slash", BYTES("GET http:/localhost/ HTTP/1.1\r\n" HOST "\r\n"), REFUSED(400)},
    {"absolute form, HTTP/1.0", BYTES("GET http://localhost/ HTTP/1.0\r\n\r\n"), LAST(200)},
    {"authority form", BYTES("GET localhost:8080 HTTP/1.1\r\n" HOST "\r\n"), REFUSED(400)},
    {"%2F is no slash to begin with", BYTES("GET %2F HTTP/1.1\r\n" HOST "\r\n"), REFUSED(400)},
    {"a target of a query alone", BYTES("GET ?message=x HTTP/1.1\r\n" HOST "\r\n"), REFUSED(400)},
    {"a path is decoded once", BYTES(GET("/%2573end?message=x")), SAYS(404, "not found")},
    {"a ? in the path, encoded, begins no query", BYTES(GET("/send%3Fmessage=x")), SAYS(404, "not found")},
    {"a plus in the path is a plus", BYTES(GET("/se+nd")), SAYS(404, "not found")},
    {"a NUL cuts no path", BYTES(GET("/send%00?message=x")), ANSWER_OR(404, 400)},
    {"a bad escape in the path", BYTES(GET("/%zz")), ANSWER_OR(400, 404)},
    {"a cut escape in the path", BYTES(GET("/%2")), ANSWER_OR(400, 404)},
    {"a lone % in the path", BYTES(GET("/%")), ANSWER_OR(400, 404)},
    {"%u escapes are none", BYTES(GET("/%u0073end?message=x")), ANSWER_OR(400, 404)},
    {"bytes beyond ASCII in the path", BYTES(GET("/\303\251\377")), ANSWER_OR(404, 400)},
    {"a CRLF in the path, encoded, stays there", BYTES(GET("/%0d%0aX-Injected:%20y")), HAS(404, "!X-Injected")},
    {"an odd query harms nobody", BYTES(GET("/?&&==&%&%zz=%&a=%00&\377=\303")), FINE},

    /* the request line */
    {"no version", BYTES("GET /\r\n" HOST "\r\n"), REFUSED(400)},
    {"two blanks", BYTES("GET  / HTTP/1.1\r\n" HOST "\r\n"), REFUSED(400)},
    {"a tab for a blank", BYTES("GET\t/ HTTP/1.1\r\n" HOST "\r\n"), REFUSED(400)},
    {"a blank before the method", BYTES(" GET / HTTP/1.1\r\n" HOST "\r\n"), REFUSED(400)},
    {"a blank after the version", BYTES("GET / HTTP/1.1 \r\n" HOST "\r\n"), REFUSED(400)},
    {"http/1.1 in small letters", BYTES("GET / http/1.1\r\n" HOST "\r\n"), REFUSED_OR(400, 505)},
    {"HTTP/1.10", BYTES("GET / HTTP/1.10\r\n" HOST "\r\n"), REFUSED_OR(400, 505)},
    {"HTTP/2.0", BYTES("GET / HTTP/2.0\r\n" HOST "\r\n"), REFUSED_OR(505, 400)},
    {"HTTP/0.9", BYTES("GET / HTTP/0.9\r\n" HOST "\r\n"), REFUSED_OR(505, 400)},
    {"HTTP/3.0", BYTES("GET / HTTP/3.0\r\n" HOST "\r\n"), REFUSED(505)},
    {"HTTP/1", BYTES("GET / HTTP/1\r\n" HOST "\r\n"), REFUSED(400)},
    {"HTTP/1.", BYTES("GET / HTTP/1.\r\n" HOST "\r\n"), REFUSED(400)},
    {"HTTP/.1", BYTES("GET / HTTP/.1\r\n" HOST "\r\n"), REFUSED(400)},
    {"HTTP/11", BYTES("GET / HTTP/11\r\n" HOST "\r\n"), REFUSED(400)},
    {"HTTP/+1.1", BYTES("GET / HTTP/+1.1\r\n" HOST "\r\n"), REFUSED(400)},
    {"HTTP/1.1.1", BYTES("GET / HTTP/1.1.1\r\n" HOST "\r\n"), REFUSED(400)},
    {"HTTP /1.1", BYTES("GET / HTTP /1.1\r\n" HOST "\r\n"), REFUSED(400)},
    {"HTTPS/1.1", BYTES("GET / HTTPS/1.1\r\n" HOST "\r\n"), REFUSED(400)},
    {"HTTP/1.1 and a tab", BYTES("GET / HTTP/1.1\t\r\n" HOST "\r\n"), REFUSED(400)},
    {"HTTP/0.9 without a version", BYTES("GET /\r\n\r\n"), REFUSED(400)},
    {"no method", BYTES("/ HTTP/1.1\r\n" HOST "\r\n"), REFUSED(400)},
    {"a method with a colon", BYTES("GET: / HTTP/1.1\r\n" HOST "\r\n"), REFUSED(400)},
    {"a method that is no ASCII", BYTES("G\303\211T / HTTP/1.1\r\n" HOST "\r\n"), REFUSED(400)},
    {"a method in quotes", BYTES("\"GET\" / HTTP/1.1\r\n" HOST "\r\n"), REFUSED(400)},
    {"a vertical tab for a blank", BYTES("GET\013/ HTTP/1.1\r\n" HOST "\r\n"), REFUSED(400)},
    {"a form feed for a blank", BYTES("GET /\014HTTP/1.1\r\n" HOST "\r\n"), REFUSED(400)},
    {"a CR for a blank", BYTES("GET\r/ HTTP/1.1\r\n" HOST "\r\n"), REFUSED(400)},
    {"CR CR LF after the line", BYTES("GET / HTTP/1.1\r\r\n" HOST "\r\n"), REFUSED(400)},
    {"LF CR after the line", BYTES("GET / HTTP/1.1\n\r" HOST "\r\n"), REFUSED(400)},
    {"only line feeds", BYTES("GET / HTTP/1.1\nHost: a\n\n"), REFUSED(400)},
    {"DEL in the line", BYTES("GET /\177 HTTP/1.1\r\n" HOST "\r\n"), REFUSED(400)},
    {"a response for a request", BYTES("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"), REFUSED(400)},
    {"an SSH client", BYTES("SSH-2.0-OpenSSH_9.2\r\n\r\n"), REFUSED(400)},
    {"the PROXY protocol", BYTES("PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n" GET("/")), REFUSED(400)},
    {"SOCKS", BYTES("\005\001\000"), REFUSED(400)},
    {"a refused request: the next is not answered", BYTES("GET\r\n\r\n" GET("/")), REFUSED(400)},
    {"the preface of HTTP/2", BYTES("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), REFUSED_OR(400, 505)},
    {"a TLS hello", BYTES("\026\003\001\002\0\001\0\001\374\003\003\r\n\r\n"), REFUSED(400)},
    {"only blank lines and rubbish", BYTES("\r\nrubbish\r\n\r\n"), REFUSED(400)},

    /* Host */
    {"no Host", BYTES("GET / HTTP/1.1\r\n\r\n"), REFUSED(400)},
    {"two Hosts", BYTES(GET_WITH(HOST)), REFUSED(400)},
    {"two different Hosts", BYTES(GET_WITH("Host: other\r\n")), REFUSED(400)},
    {"Host in small letters counts too", BYTES(GET_WITH("host: other\r\n")), REFUSED(400)},
    {"a Host with a blank in it", BYTES("GET / HTTP/1.1\r\nHost: a b\r\n\r\n"), REFUSED(400)},
    {"X-Host is no Host", BYTES("GET / HTTP/1.1\r\nX-Host: a\r\n\r\n"), REFUSED(400)},
    {"an empty Host is fine", BYTES("GET / HTTP/1.1\r\nHost:\r\n\r\n"), FINE},
    {"a Host without a port", BYTES("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"), FINE},
    {"a Host with an empty port", BYTES("GET / HTTP/1.1\r\nHost: localhost:\r\n\r\n"), FINE},
    {"a Host of IPv6", BYTES("GET / HTTP/1.1\r\nHost: [2001:db8::1]\r\n\r\n"), FINE},
    {"a Host of IPv6 with a port", BYTES("GET / HTTP/1.1\r\nHost: [::1]:8080\r\n\r\n"), FINE},
    {"a Host with white space around", BYTES("GET / HTTP/1.1\r\nHost: \t localhost \t\r\n\r\n"), FINE},
    {"a Host of IPv6 without brackets", BYTES("GET / HTTP/1.1\r\nHost: ::1\r\n\r\n"), REFUSED(400)},
    {"a Host with one bracket", BYTES("GET / HTTP/1.1\r\nHost: [::1\r\n\r\n"), REFUSED(400)},
    {"a Host with a bad port", BYTES("GET / HTTP/1.1\r\nHost: localhost:x\r\n\r\n"), REFUSED(400)},
    {"a Host with two ports", BYTES("GET / HTTP/1.1\r\nHost: localhost:80:80\r\n\r\n"), REFUSED(400)},
    {"a Host with a path", BYTES("GET / HTTP/1.1\r\nHost: localhost/x\r\n\r\n"), REFUSED(400)},
    {"a Host with a query", BYTES("GET / HTTP/1.1\r\nHost: localhost?x\r\n\r\n"), REFUSED(400)},
    {"a Host with a fragment", BYTES("GET / HTTP/1.1\r\nHost: localhost#x\r\n\r\n"), REFUSED(400)},
    {"a Host with a user", BYTES("GET / HTTP/1.1\r\nHost: user@localhost\r\n\r\n"), REFUSED(400)},
    {"a Host with a backslash", BYTES("GET / HTTP/1.1\r\nHost: a\\b\r\n\r\n"), REFUSED(400)},
    {"a Host with a quote", BYTES("GET / HTTP/1.1\r\nHost: \"a\"\r\n\r\n"), REFUSED(400)},
    {"a Host with a scheme", BYTES("GET / HTTP/1.1\r\nHost: http://a\r\n\r\n"), REFUSED(400)},
    {"a Host that is a list", BYTES("GET / HTTP/1.1\r\nHost: a, b\r\n\r\n"), REFUSED(400)},
    {"a Host that is no ASCII", BYTES("GET / HTTP/1.1\r\nHost: \303\251\r\n\r\n"), REFUSED(400)},
    {"a bad Host in HTTP/1.0", BYTES("GET / HTTP/1.0\r\nHost: a b\r\n\r\n"), REFUSED(400)},
    {"two Hosts in HTTP/1.0", BYTES("GET / HTTP/1.0\r\n" HOST HOST "\r\n"), REFUSED(400)},

    /* header fields */
    {"a blank before the colon", BYTES(GET_WITH("X : y\r\n")), REFUSED(400)},
    {"a tab before the colon", BYTES(GET_WITH("X\t: y\r\n")), REFUSED(400)},
    {"a blank inside a name", BYTES(GET_WITH("X Y: z\r\n")), REFUSED(400)},
    {"a folded line", BYTES(GET_WITH("X: y\r\n z\r\n")), REFUSED(400)},
    {"a line folded by a tab", BYTES(GET_WITH("X: y\r\n\tz\r\n")), REFUSED(400)},
    {"a fold before the first field", BYTES("GET / HTTP/1.1\r\n X: y\r\n" HOST "\r\n"), REFUSED(400)},
    {"no colon", BYTES(GET_WITH("Rubbish\r\n")), REFUSED(400)},
    {"no name", BYTES(GET_WITH(": y\r\n")), REFUSED(400)},
    {"a name with a bracket", BYTES(GET_WITH("X(y): z\r\n")), REFUSED(400)},
    {"a name that is no ASCII", BYTES(GET_WITH("X\303\251: z\r\n")), REFUSED(400)},
    {"a bare CR in a value", BYTES(GET_WITH("X: a\rb\r\n")), REFUSED(400)},
    {"a bare CR that hides a field", BYTES(GET_WITH("X: a\rTransfer-Encoding: chunked\r\n")), REFUSED(400)},
    {"a bare CR in the request line", BYTES("GET / HTTP/1.1\rX: y\r\n" HOST "\r\n"), REFUSED(400)},
    {"a bare LF ends no line", BYTES("GET / HTTP/1.1\r\nX: a\nHost: b\r\n\r\n"), REFUSED(400)},
    {"a bare LF ends no header", BYTES("GET / HTTP/1.1\r\nHost: b\r\n\n"), REFUSED(400)},
    {"a NUL in a value", BYTES(GET_WITH("X: a\0b\r\n")), REFUSED(400)},
    {"a NUL in a name", BYTES(GET_WITH("X\0: b\r\n")), REFUSED(400)},
    {"a control character in a value", BYTES(GET_WITH("X: a\001b\r\n")), REFUSED(400)},
    {"DEL in a value", BYTES(GET_WITH("X: a\177b\r\n")), REFUSED(400)},
    {"a tab in a value is fine", BYTES(GET_WITH("X: a\tb\r\n")), FINE},
    {"an empty value is fine", BYTES(GET_WITH("X:\r\n")), FINE},
    {"no blank after the colon is fine", BYTES(GET_WITH("X:y\r\n")), FINE},
    {"bytes beyond ASCII in a value are fine", BYTES(GET_WITH("X: \303\251\r\n")), FINE},
    {"every letter of a token in a name", BYTES(GET_WITH("!#$%&'*+-.^_`|~aZ09: x\r\n")), FINE},
    {"a value of blanks is fine", BYTES(GET_WITH("X: \t \r\n")), FINE},
    {"colons in a value are fine", BYTES(GET_WITH("X:: y:z\r\n")), FINE},
    {"any byte from 80 in a value is fine", BYTES(GET_WITH("X: \200\201\277\300\376\377\r\n")), FINE},
    {"the same field many times is fine", BYTES(GET_WITH("X: 1\r\nX: 2\r\nX: 3\r\nx: 4\r\n")), FINE},
    {"Cookie and Authorization are passed over", BYTES(GET_WITH("Cookie: a=b; c\r\nAuthorization: Basic eDp5\r\n")),
     FINE},
    {"a fold with nothing in it", BYTES(GET_WITH("X: y\r\n \r\n")), REFUSED(400)},
    {"a fold that hides a field", BYTES(GET_WITH("X: y\r\n Content-Length: 5\r\n")), REFUSED(400)},
    {"a fold of Host", BYTES("GET / HTTP/1.1\r\nHost:\r\n localhost\r\n\r\n"), REFUSED(400)},
    {"a fold of Content-Length", BYTES(POST("/send", "1\r\n 0", "x")), REFUSED(400)},
    {"a fold of Transfer-Encoding", BYTES(GET_WITH("Transfer-Encoding:\r\n chunked\r\n")), REFUSED_OR(501, 400)},
    {"a blank before Host's colon", BYTES("GET / HTTP/1.1\r\nHost : a\r\n\r\n"), REFUSED(400)},
    {"a name with a slash", BYTES(GET_WITH("X/Y: z\r\n")), REFUSED(400)},
    {"a name with an @", BYTES(GET_WITH("X@Y: z\r\n")), REFUSED(400)},
    {"a name with a comma", BYTES(GET_WITH("X,Y: z\r\n")), REFUSED(400)},
    {"a name with a semicolon", BYTES(GET_WITH("X;Y: z\r\n")), REFUSED(400)},
    {"a name with an equals sign", BYTES(GET_WITH("X=Y: z\r\n")), REFUSED(400)},
    {"a name in quotes", BYTES(GET_WITH("\"X\": z\r\n")), REFUSED(400)},
    {"a name in braces", BYTES(GET_WITH("{X}: z\r\n")), REFUSED(400)},
    {"a name with a backslash", BYTES(GET_WITH("X\\Y: z\r\n")), REFUSED(400)},
    {"a name that begins with DEL", BYTES(GET_WITH("\177X: z\r\n")), REFUSED(400)},
    {"a name that begins with a CR", BYTES(GET_WITH("\rX: z\r\n")), REFUSED(400)},
    {"a vertical tab in a value", BYTES(GET_WITH("X: a\013b\r\n")), REFUSED(400)},
    {"a form feed in a value", BYTES(GET_WITH("X: a\014b\r\n")), REFUSED(400)},
    {"a backspace in a value", BYTES(GET_WITH("X: a\bb\r\n")), REFUSED(400)},
    {"an escape in a value", BYTES(GET_WITH("X: a\033[2Jb\r\n")), REFUSED(400)},
    {"US, the last control, in a value", BYTES(GET_WITH("X: a\037b\r\n")), REFUSED(400)},
    {"CR CR LF after a field", BYTES(GET_WITH("X: a\r\r\n")), REFUSED(400)},
    {"LF CR after a field", BYTES(GET_WITH("X: a\n\rY: b\r\n")), REFUSED(400)},
    {"a bare LF that hides a field", BYTES(GET_WITH("X: a\nTransfer-Encoding: chunked\r\n")), REFUSED_OR(400, 501)},
    {"a bare CR at the header's end", BYTES("GET / HTTP/1.1\r\n" HOST "\rGET"), REFUSED(400)},
    {"a bare CR before the empty line", BYTES("GET / HTTP/1.1\r\n" HOST "\r\r\n"), REFUSED(400)},
    {"a NUL for the end of a line", BYTES("GET / HTTP/1.1\0\n" HOST "\r\n"), REFUSED(400)},
    {"a bad field: the next request is not answered", BYTES(GET_WITH("X : y\r\n") GET("/")), REFUSED(400)},

    /* message length */
    {"Transfer-Encoding: chunked", BYTES("POST /send HTTP/1.1\r\n" HOST
     "Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n"), REFUSED(501)},
    {"Transfer-Encoding with GET", BYTES(GET_WITH("Transfer-Encoding: chunked\r\n")), REFUSED(501)},
    {"Transfer-Encoding: identity", BYTES(GET_WITH("Transfer-Encoding: identity\r\n")), REFUSED(501)},
    {"transfer-encoding in small letters", BYTES(GET_WITH("transfer-encoding:x\r\n")), REFUSED(501)},
    {"Transfer-Encoding before Content-Length", BYTES("POST /send HTTP/1.1\r\n" HOST
     "Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\nabc"), REFUSED_OR(501, 400)},
    {"Content-Length before Transfer-Encoding", BYTES("POST /send HTTP/1.1\r\n" HOST
     "Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\nabc"), REFUSED_OR(501, 400)},
    {"Transfer-Encoding in HTTP/1.0", BYTES("POST /send HTTP/1.0\r\n" HOST
     "Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n"), REFUSED_OR(501, 400)},
    {"Transfer-Encoding: empty", BYTES(GET_WITH("Transfer-Encoding:\r\n")), REFUSED_OR(501, 400)},
    {"Transfer-Encoding: xchunked", BYTES(GET_WITH("Transfer-Encoding: xchunked\r\n")), REFUSED(501)},
    {"Transfer-Encoding: gzip, chunked", BYTES(GET_WITH("Transfer-Encoding: gzip, chunked\r\n")), REFUSED(501)},
    {"Transfer-Encoding: chunked, identity", BYTES(GET_WITH("Transfer-Encoding: chunked, identity\r\n")),
     REFUSED(501)},
    {"Transfer-Encoding: chunked;q=1", BYTES(GET_WITH("Transfer-Encoding: chunked;q=1\r\n")), REFUSED(501)},
    {"Transfer-Encoding: a tab, then chunked", BYTES(GET_WITH("Transfer-Encoding:\tchunked\r\n")), REFUSED(501)},
    {"Transfer-Encoding: quoted", BYTES(GET_WITH("Transfer-Encoding: \"chunked\"\r\n")), REFUSED(501)},
    {"Transfer-Encoding twice", BYTES(GET_WITH("Transfer-Encoding: x\r\nTransfer-Encoding: chunked\r\n")),
     REFUSED(501)},
    {"tRANSFER-eNCODING", BYTES(GET_WITH("tRANSFER-eNCODING: Chunked\r\n")), REFUSED(501)},
    {"Transfer-Encoding with a blank before the colon", BYTES(GET_WITH("Transfer-Encoding : chunked\r\n")),
     REFUSED(400)},
    {"Transfer-Encoding with a NUL", BYTES(GET_WITH("Transfer-Encoding\0: chunked\r\n")), REFUSED(400)},
    {"Transfer-Encoding with a vertical tab", BYTES(GET_WITH("Transfer-Encoding:\013chunked\r\n")), REFUSED(400)},
    {"Transfer-Encoding behind a blank", BYTES(GET_WITH(" Transfer-Encoding: chunked\r\n")), REFUSED(400)},
    {"Transfer Encoding", BYTES(GET_WITH("Transfer Encoding: chunked\r\n")), REFUSED(400)},
    {"X-Transfer-Encoding is another field", BYTES(GET_WITH("X-Transfer-Encoding: chunked\r\n")), FINE},
    {"Transfer-Encoding: the chunks are no request", BYTES("POST /send HTTP/1.1\r\n" HOST
     "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" GET("/")), REFUSED(501)},
    {"TE and Trailer are passed over", BYTES(GET_WITH("TE: trailers\r\nTrailer: X\r\n")), FINE},
    {"two different Content-Lengths", BYTES("POST /send HTTP/1.1\r\n" HOST
     "Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd"), REFUSED(400)},
    {"two equal Content-Lengths", BYTES("POST /send HTTP/1.1\r\n" HOST
     "Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc"), REFUSED(400)},
    {"a list for a Content-Length", BYTES(POST("/send", "3, 3", "abc")), REFUSED(400)},
    {"Content-Length +3", BYTES(POST("/send", "+3", "abc")), REFUSED(400)},
    {"Content-Length -1", BYTES(POST("/send", "-1", "abc")), REFUSED(400)},
    {"Content-Length 0x3", BYTES(POST("/send", "0x3", "abc")), REFUSED(400)},
    {"Content-Length 3a", BYTES(POST("/send", "3a", "abc")), REFUSED(400)},
    {"Content-Length 3 3", BYTES(POST("/send", "3 3", "abc")), REFUSED(400)},
    {"Content-Length 3.0", BYTES(POST("/send", "3.0", "abc")), REFUSED(400)},
    {"an empty Content-Length", BYTES(POST("/send", "", "abc")), REFUSED(400)},
    {"Content-Length 2^64 + 3", BYTES(POST("/send", "18446744073709551619", "abc")), REFUSED_OR(400, 413)},
    {"Content-Length 2^32 + 3", BYTES(POST("/send", "4294967299", "abc")), REFUSED(413)},
    {"Content-Length of thirty digits", BYTES(POST("/send", "999999999999999999999999999999", "abc")),
     REFUSED_OR(400, 413)},
    {"Content-Length 003", BYTES(POST("/send", "003", "abc")), 200, 400, NULL, "message sent", EITHER},
    {"Content-Length with white space around", BYTES(POST("/send", "\t 3 \t", "abc")), SAYS(200, "message sent")},
    {"Content-Length 0 with GET", BYTES(GET_WITH("Content-Length: 0\r\n")), FINE},
    {"Content-Length 3;", BYTES(POST("/send", "3;", "abc")), REFUSED(400)},
    {"Content-Length 3,", BYTES(POST("/send", "3,", "abc")), REFUSED(400)},
    {"Content-Length 3, 4", BYTES(POST("/send", "3, 4", "abc")), REFUSED(400)},
    {"Content-Length \"3\"", BYTES(POST("/send", "\"3\"", "abc")), REFUSED(400)},
    {"Content-Length 1e1", BYTES(POST("/send", "1e1", "abc")), REFUSED(400)},
    {"Content-Length --3", BYTES(POST("/send", "--3", "abc")), REFUSED(400)},
    {"Content-Length -0", BYTES(POST("/send", "-0", "")), REFUSED(400)},
    {"Content-Length 3 in other digits", BYTES(POST("/send", "\331\243", "abc")), REFUSED(400)},
    {"Content-Length 3 and a vertical tab", BYTES(POST("/send", "3\013", "abc")), REFUSED(400)},
    {"Content-Length 3 and a NUL", BYTES("POST /send HTTP/1.1\r\n" HOST "Content-Length: 3\0\r\n\r\nabc"),
     REFUSED(400)},
    {"Content-Length of blanks", BYTES(POST("/send", " \t ", "abc")), REFUSED(400)},
    {"Content-Length 2^31", BYTES(POST("/send", "2147483648", "abc")), REFUSED(413)},
    {"Content-Length 2^63 - 1", BYTES(POST("/send", "9223372036854775807", "abc")), REFUSED_OR(413, 400)},
    {"Content-Length 2^63", BYTES(POST("/send", "9223372036854775808", "abc")), REFUSED_OR(413, 400)},
    {"Content-Length 2^64 - 1", BYTES(POST("/send", "18446744073709551615", "abc")), REFUSED_OR(413, 400)},
    {"Content-Length 2^64", BYTES(POST("/send", "18446744073709551616", "abc")), REFUSED_OR(413, 400)},
    {"Content-Lengths in different case", BYTES("POST /send HTTP/1.1\r\n" HOST
     "Content-Length: 3\r\ncONTENT-lENGTH: 4\r\n\r\nabcd"), REFUSED(400)},
    {"two Content-Lengths with GET", BYTES(GET_WITH("Content-Length: 0\r\nContent-Length: 0\r\n")), REFUSED(400)},
    {"Content-Length with a blank before the colon", BYTES("POST /send HTTP/1.1\r\n" HOST
     "Content-Length : 3\r\n\r\nabc"), REFUSED(400)},
    {"Content_Length is another field", BYTES(GET_WITH("Content_Length: 3\r\n")), FINE},
    {"X-Content-Length is another field", BYTES(GET_WITH("X-Content-Length: 3\r\n")), FINE},
    {"a bad Content-Length with GET", BYTES(GET_WITH("Content-Length: x\r\n")), REFUSED(400)},
    {"a bad Content-Length in HTTP/1.0", BYTES("GET / HTTP/1.0\r\nContent-Length: x\r\n\r\n"), REFUSED(400)},
    {"Content-Length of a GET that is too big", BYTES(GET_WITH("Content-Length: 65537\r\n")), REFUSED(413)},
    {"a body that looks like a request is a body", BYTES(POST("/send?channel=body", "29",
     "GET /send HTTP/1.1\r\nHost: a\r\n")), SAYS(200, "message sent")},
    {"Expect of something else", BYTES(GET_WITH("Expect: coffee\r\n")), 200, 417, NULL, NULL, EITHER},
    {"Expect: 100-continue without a body", BYTES(GET_WITH("Expect: 100-continue\r\n")), FINE},
    {"Expect: 100-continue with an empty body", BYTES(GET_WITH("Content-Length: 0\r\nExpect: 100-continue\r\n")),
     FINE},
    {"Expect: 100-continue with Transfer-Encoding: no 100", BYTES("POST /send HTTP/1.1\r\n" HOST
     "Transfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n"), REFUSED(501)},
    {"no 100 for HTTP/1.0",
     BYTES("POST /send HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\nabc"), 200, 0, NULL,
     "message sent", CLOSES},
    {"a body of max-message + 1", BYTES(POST("/send", "65537", "")), REFUSED(413)},
    {"a body too big with Expect: no 100", BYTES("POST /send HTTP/1.1\r\n" HOST
     "Content-Length: 65537\r\nExpect: 100-continue\r\n\r\n"), REFUSED(413)},

    /* /send: the message */
    {"send", BYTES(GET("/send?message=send")), 200, 0, "Content-Type: text/plain; charset=utf-8",
     "message sent", KEEPS},
    {"send an empty message", BYTES(GET("/send?message=")), SAYS(200, "message sent")},
    {"send: later parameters", BYTES(GET("/send?a=b&&c&message=later&d=")), SAYS(200, "message sent")},
    {"send: the name is decoded too", BYTES(GET("/send?m%65ssage=decoded")), SAYS(200, "message sent")},
    {"send: no query", BYTES(GET("/send")), SAYS(400, NOT_PROVIDED)},
    {"send: an empty query", BYTES(GET("/send?")), SAYS(400, NOT_PROVIDED)},
    {"send: another parameter", BYTES(GET("/send?messages=x&amessage=y")), SAYS(400, NOT_PROVIDED)},
    {"send: Message is another name", BYTES(GET("/send?Message=x")), SAYS(400, NOT_PROVIDED)},
    {"send: a NUL cuts no name", BYTES(GET("/send?message%00x=y")), SAYS(400, NOT_PROVIDED)},
    {"send: the name is decoded once", BYTES(GET("/send?m%2565ssage=x")), SAYS(400, NOT_PROVIDED)},
    {"send: a semicolon parts nothing", BYTES(GET("/send?a=b;message=x")), SAYS(400, NOT_PROVIDED)},
    {"send: a bad escape in the message", BYTES(GET("/send?message=%zz")), ANSWER(400)},
    {"send: a cut escape in the message", BYTES(GET("/send?message=%e")), ANSWER(400)},
    {"send: a bad escape elsewhere", BYTES(GET("/send?x=%zz&message=y")), SAYS(200, "message sent")},
    {"send: a bad escape in the channel", BYTES(GET("/send?message=x&channel=%g0")), ANSWER(400)},
    {"send: HEAD", BYTES("HEAD /send HTTP/1.1\r\n" HOST "\r\n"), ANSWER(400)},
    {"send: HEAD with a message", BYTES("HEAD /send?message=x&channel=head HTTP/1.1\r\n" HOST "\r\n"), FINE},
    {"send: HEAD sends nothing", BYTES(GET("/messages?channel=head")), SAYS(200, "[]")},
    {"send: a byte that is no UTF-8", BYTES(GET("/send?message=a%ff")), ANSWER(400)},
    {"send: a surrogate", BYTES(GET("/send?message=%ed%a0%80")), ANSWER(400)},
    {"send: an overlong slash", BYTES(GET("/send?message=%c0%af")), ANSWER(400)},
    {"send: cut UTF-8", BYTES(GET("/send?message=%e2%82")), ANSWER(400)},
    {"send: POST", BYTES(POST("/send", "4", "post")), SAYS(200, "message sent")},
    {"send: POST with a parameter", BYTES(POST("/send?message=query", "0", "")), SAYS(200, "message sent")},
    {"send: POST without a length has no body", BYTES("POST /send HTTP/1.1\r\n" HOST "\r\n"),
     ANSWER_OR(400, 200)},
    {"send: POST of bytes that are no UTF-8", BYTES(POST("/send", "2", "a\377")), ANSWER(400)},
    {"send: channel of 64 bytes",
     BYTES(GET("/send?message=x&channel=0123456789012345678901234567890123456789012345678901234567890123")),
     SAYS(200, "message sent")},
    {"send: channel of 65 bytes",
     BYTES(GET("/send?message=x&channel=01234567890123456789012345678901234567890123456789012345678901234")),
     ANSWER(400)},
    {"send: channel that is no UTF-8", BYTES(GET("/send?message=x&channel=%80")), ANSWER(400)},
    {"messages: channel that is no UTF-8", BYTES(GET("/messages?channel=%fe")), ANSWER(400)},
    {"messages: nothing yet", BYTES(GET("/messages?channel=nothing")), 200, 0,
     "Content-Type: application/json", "[]", KEEPS},
};
/* clang-format on */

/* clang-format off */
/* What is sent, and what /messages of its own channel shows then. */
static const struct {
    const char *name, *request;
    size_t length;
    const char *channel, *items;
} send_cases[] = {
    {"a word", BYTES(GET("/send?message=hello&channel=s1")), "s1", "hello"},
    {"a percent sign is decoded once", BYTES(GET("/send?message=%2541%25&channel=s2")), "s2", "%41%"},
    {"plus is a blank, %2b a plus", BYTES(GET("/send?message=a+b%2Bc&channel=s3")), "s3", "a b+c"},
    {"& and = and # encoded", BYTES(GET("/send?message=%26%3d%23&channel=s4")), "s4", "&=#"},
    {"= in the value", BYTES(GET("/send?message=a=b==&channel=s5")), "s5", "a=b=="},
    {"? in the value", BYTES(GET("/send?message=a?b/c&channel=s6")), "s6", "a?b/c"},
    {"small and capital hexadecimal", BYTES(GET("/send?message=%c3%A9%C3%a9&channel=s7")), "s7",
     "\\xc3\\xa9\\xc3\\xa9"},
    {"UTF-8 as it is", BYTES(GET("/send?message=\303\251&channel=s8")), "s8", "\\xc3\\xa9"},
    {"controls in JSON", BYTES(GET("/send?message=%00%01%08%09%0a%0c%0d%1f%7f&channel=s9")), "s9",
     "\\x00\\x01\\x08\\x09\\x0a\\x0c\\x0d\\x1f\\x7f"},
    {"quotes and backslashes in JSON", BYTES(GET("/send?message=%22%5c%22/%3C&channel=s10")), "s10",
     "\"\\x5c\"/<"},
    {"an empty message", BYTES(GET("/send?message=&channel=s11")), "s11", ""},
    {"POST: as it is", BYTES(POST("/send?channel=s13", "9", "a+b%41&=\n")), "s13", "a+b%41&=\\x0a"},
    {"POST: a NUL", BYTES(POST("/send?channel=s14", "3", "a\0b")), "s14", "a\\x00b"},
    {"POST: an empty body", BYTES(POST("/send?channel=s15", "0", "")), "s15", ""},
    {"POST: the parameter if there is no body", BYTES(POST("/send?message=query&channel=s19", "0", "")),
     "s19", "query"},
    {"a channel with an odd name", BYTES(GET("/send?message=x&channel=%26%2f+%c3%a9%25")), "%26%2f+%c3%a9%25",
     "x"},
    {"the first channel counts", BYTES(GET("/send?channel=s16&message=x&channelx=s17")), "s16", "x"},
    {"an emoji", BYTES(GET("/send?message=%f0%9f%98%80&channel=s18")), "s18", "\\xf0\\x9f\\x98\\x80"},
};
/* clang-format on */

static void send_test(int port) {
    for (size_t i = 0; i < COUNT(send_cases); i++) {
        struct peer *p = peer_open(port);
        struct response r;
        char target[200];

        begin("send and messages: %s", send_cases[i].name);
        peer_send(p, send_cases[i].request, send_cases[i].length);
        read_response(p, false, &r);
        expect(r.status == 200, "status %d", r.status);
        snprintf(target, sizeof target, "/messages?channel=%s",
                 send_cases[i].channel);
        expect_messages(port, target, send_cases[i].items);
        peer_close(p);
        finish();
    }
}

/* The header without what may differ from one second to the next. */
static void drop_date(char *head) {
    char *date = strcasestr(head, "\r\nDate:");

    if (date) {
        char *next = strstr(date + 2, "\r\n");

        memmove(date, next, strlen(next) + 1);
    }
}

/* HEAD gives what GET gives, without the body, and the connection goes on. */
static void head_test(int port, const char *target) {
    struct response get, head;
    struct peer *p = http_get(port, target, &get);
    char request[300];

    begin("HEAD is GET without the body: %s", target);
    snprintf(request, sizeof request, "HEAD %s HTTP/1.1\r\n" HOST "\r\n",
             target);
    peer_text(p, request);
    read_response(p, true, &head);
    drop_date(get.head);
    drop_date(head.head);
    expect(!strcmp(get.head, head.head), "GET %s HEAD %s",
           shown(get.head, strlen(get.head)),
           shown(head.head, strlen(head.head)));
    peer_text(p, GET("/messages?channel=nobody"));
    read_response(p, false, &get);
    expect_body(&get, "[]");
    peer_close(p);
    finish();
}

static void pipelining_test(int port) {
    static const char *const requests[] = {
        GET("/nothing"),
        GET("/send?message=1&channel=pipe"),
        POST("/send?channel=pipe", "1", "2"),
        "HEAD / HTTP/1.1\r\n" HOST "\r\n",
        GET("/messages?channel=pipe"),
        GET("/send"),
        "GET /send?message=3&channel=pipe HTTP/1.0\r\n\r\n",
        GET("/send?message=4&channel=pipe"),
    };
    struct peer *p = peer_open(port);
    struct response r;
    char *many = calloc(200, 120);
    size_t n = 0;

    begin("pipelining: different requests in one write, answered in order");
    for (size_t i = 0; i < COUNT(requests); i++) strcat(many, requests[i]);
    peer_text(p, many);
    read_response(p, false, &r);
    expect_body(&r, "not found");
    read_response(p, false, &r);
    expect_body(&r, "message sent");
    read_response(p, false, &r);
    expect_body(&r, "message sent");
    read_response(p, true, &r);
    expect(r.status == 200, "HEAD: status %d", r.status);
    read_response(p, false, &r);
    expect_body(&r, "[\"1\",\"2\"]");
    read_response(p, false, &r);
    expect_body(&r, NOT_PROVIDED);
    read_response(p, false, &r);
    expect_body(&r, "message sent");
    expect_end(p);
    expect_messages(port, "/messages?channel=pipe", "1 | 2 | 3");
    peer_close(p);
    finish();

    begin("pipelining: 200 requests before the first answer is read");
    p = peer_open(port);
    for (int i = 0; i < 200; i++)
        n += (size_t)sprintf(many + n,
                             "GET /send?message=%d&channel=many "
                             "HTTP/1.1\r\n" HOST "\r\n",
                             i);
    peer_send(p, many, n);
    for (int i = 0; i < 200; i++) {
        read_response(p, false, &r);
        expect_body(&r, "message sent");
    }
    peer_close(p);
    finish();
    free(many);
}

#define REST " HTTP/1.1\r\n" HOST "\r\n"

static void size_test(int port) {
    static const struct {
        const char *name, *begin;
        int size; /* filled up to this, then comes the end */
        const char *end;
        int status;
    } lines[] = {
        { "a line of 8,000 bytes", "GET /", 7989, REST, 404 },
        { "a target of 9,000 bytes", "GET /", 9000, REST, 414 },
        { "a target of 9,000 bytes, HEAD", "HEAD /", 9000, REST, 414 },
        { "a query of 9,000 bytes", "GET /?", 9000, REST, 414 },
        { "a line that never ends", "GET /", 130000, "", 414 },
        { "a method of 8,000 bytes", "", 8000, " /" REST, 405 },
        { "fields of 9,000 bytes, HEAD", "HEAD / HTTP/1.1\r\n" HOST "X: ", 9000,
          "\r\n\r\n", 431 },
        { "a name of 9,000 bytes", "GET / HTTP/1.1\r\n" HOST, 9000,
          ": y\r\n\r\n", 431 },
    };
    struct peer *p;
    struct response r;
    char *big = malloc(140000);
    int n;

    begin("the page: Content-Length is exact, the page is whole");
    p = http_get(port, "/", &r);
    expect(r.length > 500 &&
               !strncasecmp((const char *)r.body, "<!doctype html>", 15) &&
               memmem(r.body, r.length, "<input", 6) &&
               memmem(r.body, r.length, "WebSocket", 9),
           "%zu bytes", r.length);
    peer_text(p, GET("/messages?channel=nobody"));
    read_response(p, false, &r);
    expect_body(&r, "[]");
    peer_close(p);
    finish();

    for (int size = 8000; size <= 8400; size += 400) {
        begin("a header of %d bytes: %d", size, size > 8192 ? 431 : 200);
        p = peer_open(port);
        n = sprintf(big, "GET / HTTP/1.1\r\n" HOST "X: ");
        memset(big + n, 'x', (size_t)(size - n));
        memcpy(big + size - 4, "\r\n\r\n", 4);
        peer_send(p, big, (size_t)size);
        read_response(p, false, &r);
        expect(r.status == (size > 8192 ? 431 : 200), "status %d", r.status);
        if (size > 8192) expect_end(p);
        peer_close(p);
        finish();
    }

    begin("a header that never ends: 431");
    p = peer_open(port);
    n = sprintf(big, "GET / HTTP/1.1\r\n" HOST "X: ");
    memset(big + n, 'x', 130000);
    peer_send(p, big, 130000);
    read_response(p, false, &r);
    expect(r.status == 431, "status %d", r.status);
    expect_end(p);
    peer_close(p);
    finish();

    for (size_t i = 0; i < COUNT(lines); i++) {
        begin("%s: %d", lines[i].name, lines[i].status);
        p = peer_open(port);
        n = sprintf(big, "%s", lines[i].begin);
        memset(big + n, 'x', (size_t)(lines[i].size - n));
        peer_send(p, big, (size_t)lines[i].size);
        peer_text(p, lines[i].end);
        read_response(p, !strncmp(big, "HEAD", 4), &r);
        expect(r.status == lines[i].status, "status %d", r.status);
        if (r.status != 404 && r.status != 405) expect_end(p);
        peer_close(p);
        finish();
    }

    begin("many small fields beyond 8 KiB: 431");
    p = peer_open(port);
    n = sprintf(big, "GET / HTTP/1.1\r\n" HOST);
    while (n < 9000) n += sprintf(big + n, "X: y\r\n");
    peer_send(p, big, (size_t)n);
    read_response(p, false, &r);
    expect(r.status == 431, "status %d", r.status);
    expect_end(p);
    peer_close(p);
    finish();

    for (int size = 65535; size <= 65537; size++) {
        begin("a body of %d bytes: %d", size, size > 65536 ? 413 : 200);
        p = peer_open(port);
        n = sprintf(big,
                    "POST /send?channel=body%d HTTP/1.1\r\n" HOST
                    "Content-Length: %d\r\n\r\n",
                    size, size);
        memset(big + n, 'x', (size_t)size);
        peer_send(p, big, (size_t)(n + size));
        read_response(p, false, &r);
        expect(r.status == (size > 65536 ? 413 : 200), "status %d", r.status);
        if (size > 65536) expect_end(p);
        peer_close(p);
        if (size <= 65536) {
            snprintf(big, 100, "/messages?channel=body%d", size);
            p = http_get(port, big, &r);
            expect(r.length == (size_t)size + 4, "%zu bytes come back",
                   r.length);
            peer_close(p);
        }
        finish();
    }
    free(big);
}

static void continue_test(int port) {
    struct peer *p = peer_open(port);
    struct response r;

    begin("Expect: 100-continue is answered before the body");
    peer_text(p, "POST /send?channel=expect HTTP/1.1\r\n" HOST
                 "Content-Length: 4\r\nExpect: 100-continue\r\n\r\n");
    read_response(p, false, &r);
    expect(r.status == 100, "status %d", r.status);
    expect(p->start == p->end, "more than 100 before the body");
    peer_text(p, "body");
    read_response(p, false, &r);
    expect_body(&r, "message sent");
    expect_messages(port, "/messages?channel=expect", "body");
    peer_close(p);
    finish();
}

static const char *const metric_names[] = {
    "chat_clients",
    "chat_channels",
    "chat_messages_received_total",
    "chat_messages_sent_total",
    "chat_bytes_received_total",
    "chat_bytes_sent_total",
    "chat_slow_clients_total",
    "chat_bus_peers",
    "chat_bus_datagrams_received_total",
    "chat_bus_datagrams_sent_total",
    "chat_bus_repairs_total",
    "chat_bus_lost_messages_total",
    "chat_bus_errors_total",
};

static void metrics_test(void) {
    struct server s = { 0 };
    struct response r;
    struct peer *p, *q;
    regex_t form;
    double in, out, channels;

    if (!START(&s, "-b", "none", "--metrics")) return;
    begin("metrics: in Prometheus' text form");
    p = http_get(s.port, "/metrics", &r);
    expect(r.status == 200, "status %d", r.status);
    expect(header(&r, "Content-Type") &&
               !strncmp(header(&r, "Content-Type"), "text/plain", 10),
           "Content-Type: %s", header(&r, "Content-Type"));
    regcomp(&form,
            "^(# (HELP|TYPE) chat_[a-z_]+ .+|chat_[a-z_]+(\\{[^}]*\\})? "
            "[0-9.e+]+)$",
            REG_EXTENDED | REG_NOSUB);
    if (r.length) {
        char *text = strndup((const char *)r.body, r.length), *rest = text;

        expect(text[r.length - 1] == '\n', "no newline at the end");
        for (char *line; (line = strsep(&rest, "\n")) && rest;)
            expect(regexec(&form, line, 0, NULL, 0) == 0, "line: %s", line);
        free(text);
    }
    regfree(&form);
    peer_close(p);
    finish();
    for (size_t i = 0; i < COUNT(metric_names); i++) {
        begin("metrics: %s", metric_names[i]);
        expect(metric(s.port, metric_names[i]) >= 0, "not there");
        finish();
    }
    head_test(s.port, "/metrics");

    begin("metrics: one message to two clients counts 1 and 2");
    channels = metric(s.port, "chat_channels");
    p = ws_open(s.port, "/?channel=m");
    q = ws_open(s.port, "/?channel=m");
    in = metric(s.port, "chat_messages_received_total");
    out = metric(s.port, "chat_messages_sent_total");
    expect_metric(s.port, "chat_clients", 2);
    channels = metric(s.port, "chat_channels") - channels;
    expect(channels == 1, "%g new channels", channels);
    ws_text(p, "counted");
    ws_expect_text(p, "counted");
    ws_expect_text(q, "counted");
    in = metric(s.port, "chat_messages_received_total") - in;
    out = metric(s.port, "chat_messages_sent_total") - out;
    expect(in == 1 && out == 2, "received %g, sent %g", in, out);
    expect(metric(s.port, "chat_bytes_sent_total") >= 18, "bytes sent: %g",
           metric(s.port, "chat_bytes_sent_total"));
    peer_close(p);
    peer_close(q);
    finish();
    server_stop(&s, "metrics");
}

static void http_test(void) {
    struct server s = { 0 };

    if (!START(&s, "-b", "none")) return;
    run_exchanges(s.port, http_cases, COUNT(http_cases));
    send_test(s.port);
    head_test(s.port, "/");
    head_test(s.port, "/nothing");
    head_test(s.port, "/messages?channel=s9");
    head_test(s.port, "/send");
    pipelining_test(s.port);
    size_test(s.port);
    continue_test(s.port);
    server_stop(&s, "HTTP");
    metrics_test();
}

/* ---- Static files ------------------------------------------------------ */

static void make_file(const char *name, const void *bytes, size_t n) {
    char path[600];
    FILE *file;

    snprintf(path, sizeof path, "%s/%s", folder, name);
    file = fopen(path, "wb");
    if (!file || fwrite(bytes, 1, n, file) != n || fclose(file)) {
        perror(path);
        exit(1);
    }
}

static void make_link(const char *to, const char *name) {
    char path[600];

    snprintf(path, sizeof path, "%s/%s", folder, name);
    if (symlink(to, path) < 0) perror(path);
}

static void make_dir(const char *name) {
    char path[600];

    snprintf(path, sizeof path, "%s/%s", folder, name);
    if (mkdir(path, 0755) < 0) perror(path);
}

static const char *in_folder(const char *name) {
    static char paths[4][600];
    static unsigned turn;

    snprintf(paths[++turn % 4], sizeof paths[0], "%s/%s", folder, name);
    return paths[turn % 4];
}

/* In `folder`: secret beside the served www, and what tries to reach it. */
static const char *const odd_names[] = {
    "<b>markup<i>",
    "a&amp;\"b'c",
    "100%41",
    "a b+c",
    "q?x#y",
    "javascript:x",
    "\303\251t\303\251",
    "\377\376odd",
    "tab\there",
    "new\nline",
    "back\\slash",
    "&lt;",
    "c:d;e=f",
    "~tilde",
    "*star*",
};

#define TEN       "nnnnnnnnnn"
#define FIFTY     TEN TEN TEN TEN TEN
#define LONG_NAME FIFTY FIFTY FIFTY FIFTY FIFTY "nnnnn" /* 255 letters */

static void make_socket(const char *name) {
    struct sockaddr_un at = { .sun_family = AF_UNIX };
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    snprintf(at.sun_path, sizeof at.sun_path, "%s", in_folder(name));
    if (bind(fd, (struct sockaddr *)&at, sizeof at) < 0) perror(name);
    close(fd);
}

static void make_tree(void) {
    char name[300];

    make_file("secret", BYTES("SECRET"));
    make_dir("www");
    make_dir("outside");
    make_file("outside/secret", BYTES("SECRET"));
    make_file("www/index.html", BYTES("<!doctype html><p>home</p>\n"));
    make_file("www/a.txt", BYTES("text of a\n"));
    make_file("www/empty.txt", BYTES(""));
    make_file("www/style.css", BYTES("p{}\n"));
    make_file("www/code.js", BYTES("1\n"));
    make_file("www/data.json", BYTES("{}\n"));
    make_file("www/image.png", BYTES("\211PNG\r\n\032\n\0"));
    make_file("www/image.svg",
              BYTES("<svg xmlns='http://www.w3.org/2000/svg'/>"));
    make_file("www/photo.jpg", BYTES("\377\330\377"));
    make_file("www/unknown.xyz", BYTES("\0\1\2"));
    make_file("www/noextension", BYTES("\0\1\2"));
    make_file("www/send", BYTES("a file, not the route"));
    make_file("www/.hidden", BYTES("SECRET"));
    make_file("www/a%41.txt", BYTES("percent"));
    make_file("www/back\\slash.txt", BYTES("backslash"));
    make_file("www/locked.txt", BYTES("SECRET"));
    chmod(in_folder("www/locked.txt"), 0);
    make_dir("www/.git");
    make_file("www/.git/config", BYTES("SECRET"));
    make_dir("www/sub");
    make_file("www/sub/b.txt", BYTES("text of b\n"));
    make_dir("www/sub/deep");
    make_file("www/sub/deep/c.txt", BYTES("text of c\n"));
    make_dir("www/home");
    make_file("www/home/index.html", BYTES("<!doctype html><p>inner</p>\n"));
    make_dir("www/lockeddir");
    make_file("www/lockeddir/x", BYTES("SECRET"));
    chmod(in_folder("www/lockeddir"), 0);
    make_dir("www/odd");
    for (size_t i = 0; i < COUNT(odd_names); i++) {
        snprintf(name, sizeof name, "www/odd/%s", odd_names[i]);
        make_file(name, odd_names[i], strlen(odd_names[i]));
    }
    make_file("www/odd/.dot", BYTES("SECRET"));
    make_dir("www/void");
    make_link("a.txt", "www/inside.txt");
    make_link("../a.txt", "www/sub/up.txt");
    make_link("sub", "www/insidedir");
    make_link("../secret", "www/outside.txt");
    make_link("../outside", "www/outsidedir");
    make_link("/etc", "www/etc");
    make_link("/etc/passwd", "www/passwd.txt");
    make_link(in_folder("www/a.txt"), "www/absolute.txt");
    make_link("loop", "www/loop");
    make_link("nowhere", "www/dangling");
    mkfifo(in_folder("www/fifo"), 0644);
    mkfifo(in_folder("www/void/fifo"), 0644);
    make_file("www/sub/.hidden", BYTES("SECRET"));
    make_file("www/sub/deep/.hidden", BYTES("SECRET"));
    make_file("www/..odd", BYTES("SECRET"));
    make_file("www/...", BYTES("SECRET"));
    make_link("inside.txt", "www/twice.txt");
    make_link("../../sub/b.txt", "www/sub/deep/far.txt");
    make_link("outsidedir/secret", "www/hop.txt");
    make_link("../www/a.txt", "www/outandin.txt");
    make_link("insidedir", "www/seconddir");
    make_link("..", "www/updir");
    make_link("/proc/self/root", "www/root");
    make_dir("www/linkhome");
    make_link("../home/index.html", "www/linkhome/index.html");
    make_dir("www/outhome");
    make_link("../../secret", "www/outhome/index.html");
    make_dir("www/dirhome");
    make_dir("www/dirhome/index.html");
    make_dir("www/fifohome");
    mkfifo(in_folder("www/fifohome/index.html"), 0644);
    make_dir("www/cr\r\nX-Injected: y");
    make_dir("www/a?b#c\"d<e");
    make_file("www/" LONG_NAME, BYTES("long"));
    make_socket("www/socket");
    /* best effort: only root may, and without it the rows say 404 as well */
    mknod(in_folder("www/device"), S_IFCHR | 0644, makedev(1, 5));
}

#define HTML   "Content-Type: text/html; charset=utf-8"
#define PLAIN  "Content-Type: text/plain; charset=utf-8"
#define HIDDEN 404, 400, NULL, NULL, EITHER /* never a file */
#define SINCE(date) \
    "GET /old.txt HTTP/1.1\r\n" HOST "If-Modified-Since: " date "\r\n\r\n"

/* clang-format off */
static const struct exchange file_cases[] = {
    {"file: / is index.html", BYTES(GET("/")), 200, 0, HTML, "<!doctype html><p>home</p>\n", KEEPS},
    {"file: text", BYTES(GET("/a.txt")), 200, 0, PLAIN, "text of a\n", KEEPS},
    {"file: its length", BYTES(GET("/a.txt")), HAS(200, "Content-Length: 10")},
    {"file: Last-Modified", BYTES(GET("/a.txt")), HAS(200, "Last-Modified")},
    {"file: a query is not part of the name", BYTES(GET("/a.txt?v=1")), SAYS(200, "text of a\n")},
    {"file: an encoded name", BYTES(GET("/%61%2etxt")), SAYS(200, "text of a\n")},
    {"file: decoded once", BYTES(GET("/a%2541.txt")), SAYS(200, "percent")},
    {"file: not decoded twice", BYTES(GET("/%2561.txt")), 404, 0, NULL, NULL, KEEPS},
    {"file: a backslash is a letter", BYTES(GET("/back%5cslash.txt")), SAYS(200, "backslash")},
    {"file: empty", BYTES(GET("/empty.txt")), 200, 0, "Content-Length: 0", "", KEEPS},
    {"file: CSS", BYTES(GET("/style.css")), HAS(200, "Content-Type: text/css; charset=utf-8")},
    {"file: JavaScript", BYTES(GET("/code.js")), HAS(200, "Content-Type: text/javascript; charset=utf-8")},
    {"file: JSON", BYTES(GET("/data.json")), HAS(200, "Content-Type: application/json")},
    {"file: PNG", BYTES(GET("/image.png")), HAS(200, "Content-Type: image/png")},
    {"file: SVG", BYTES(GET("/image.svg")), HAS(200, "Content-Type: image/svg+xml")},
    {"file: JPEG", BYTES(GET("/photo.jpg")), HAS(200, "Content-Type: image/jpeg")},
    {"file: unknown", BYTES(GET("/unknown.xyz")), HAS(200, "Content-Type: application/octet-stream")},
    {"file: no extension", BYTES(GET("/noextension")), HAS(200, "Content-Type: application/octet-stream")},
    {"file: not there", BYTES(GET("/b.txt")), SAYS(404, "not found")},
    {"file: a file is no folder", BYTES(GET("/a.txt/")), 404, 0, NULL, NULL, KEEPS},
    {"file: nothing beneath a file", BYTES(GET("/a.txt/x")), 404, 0, NULL, NULL, KEEPS},
    {"file: routes come first", BYTES(GET("/send?message=x")), SAYS(200, "message sent")},
    {"file: POST", BYTES(POST("/a.txt", "0", "")), HAS(405, "Allow: GET, HEAD")},
    {"file: in a folder", BYTES(GET("/sub/b.txt")), SAYS(200, "text of b\n")},
    {"file: deeper", BYTES(GET("/sub/deep/c.txt")), SAYS(200, "text of c\n")},
    {"folder without a slash", BYTES(GET("/sub")), 301, 308, "Location: /sub/", NULL, KEEPS},
    {"folder without a slash keeps the query", BYTES(GET("/home?a=b")), 301, 308, "Location: /home/?a=b",
     NULL, KEEPS},
    {"folder with a slash: a listing", BYTES(GET("/sub/")), HAS(200, HTML)},
    {"folder with an index.html", BYTES(GET("/home/")), 200, 0, HTML, "<!doctype html><p>inner</p>\n", KEEPS},
    {"index.html is a link up a folder", BYTES(GET("/linkhome/")), 200, 0, HTML, "<!doctype html><p>inner</p>\n",
     KEEPS},
    {"index.html is a link out", BYTES(GET("/outhome/")), ANSWER_OR(200, 404)},
    {"index.html is a folder", BYTES(GET("/dirhome/")), ANSWER_OR(404, 200)},
    {"index.html is a FIFO", BYTES(GET("/fifohome/")), ANSWER_OR(404, 200)},
    {"folder without a slash, HEAD", BYTES("HEAD /sub HTTP/1.1\r\n" HOST "\r\n"), 301, 308, "Location: /sub/",
     NULL, KEEPS},
    {"a redirect splits no header", BYTES(GET("/cr%0d%0aX-Injected:%20y")), 301, 308, "!X-Injected", NULL, KEEPS},
    {"a redirect is encoded", BYTES(GET("/a%3fb%23c%22d%3Ce")), 301, 308, "Location: /a%3Fb%23c%22d%3Ce/", NULL,
     KEEPS},
    {"a redirect of a link to a folder", BYTES(GET("/seconddir")), 301, 308, "Location: /seconddir/", NULL, KEEPS},
    {"two slashes inside", BYTES(GET("/sub//b.txt")), ANSWER_OR(200, 404)},
    {"two slashes at the end", BYTES(GET("/sub//")), ANSWER_OR(200, 404)},
    {"two slashes before a file", BYTES(GET("//a.txt")), ANSWER_OR(200, 404)},
    {"a name of 255 bytes", BYTES(GET("/" LONG_NAME)), SAYS(200, "long")},
    {"a name of 256 bytes", BYTES(GET("/n" LONG_NAME)), SAYS(404, "not found")},
    {"capitals are other letters", BYTES(GET("/A.TXT")), SAYS(404, "not found")},
    {"a blank at the end is part of the name", BYTES(GET("/a.txt%20")), SAYS(404, "not found")},
    {"a dot at the end is part of the name", BYTES(GET("/a.txt.")), SAYS(404, "not found")},
    {"a newline at the end is part of the name", BYTES(GET("/a.txt%0a")), SAYS(404, "not found")},
    {"a stream's name is part of the name", BYTES(GET("/a.txt::$DATA")), SAYS(404, "not found")},
    {"a glob is a name", BYTES(GET("/*.txt")), SAYS(404, "not found")},
    {"a tilde is a name", BYTES(GET("/~root/")), SAYS(404, "not found")},
    {"a drive is a name", BYTES(GET("/C:/a.txt")), SAYS(404, "not found")},
    {"a link to a link", BYTES(GET("/twice.txt")), SAYS(200, "text of a\n")},
    {"a link two folders up", BYTES(GET("/sub/deep/far.txt")), SAYS(200, "text of b\n")},
    {"a link to a link to a folder", BYTES(GET("/seconddir/b.txt")), SAYS(200, "text of b\n")},
    {"a link through a link out", BYTES(GET("/hop.txt")), HIDDEN},
    {"a link out and in again", BYTES(GET("/outandin.txt")), HIDDEN},
    {"a link to the folder above", BYTES(GET("/updir/")), HIDDEN},
    {"a link to the folder above, a file", BYTES(GET("/updir/secret")), HIDDEN},
    {"a magic link", BYTES(GET("/root/etc/passwd")), HIDDEN},
    {"a dotfile in a folder", BYTES(GET("/sub/.hidden")), HIDDEN},
    {"a dotfile deeper", BYTES(GET("/sub/deep/.hidden")), HIDDEN},
    {"a dotfile behind a link", BYTES(GET("/insidedir/.hidden")), HIDDEN},
    {"a dotfile behind two slashes", BYTES(GET("/sub//.hidden")), HIDDEN},
    {"a dotfile behind %2f", BYTES(GET("/sub%2f.hidden")), HIDDEN},
    {"a dotfile behind %2f%2e", BYTES(GET("/sub%2F%2Ehidden")), HIDDEN},
    {"a name of two dots and more", BYTES(GET("/..odd")), HIDDEN},
    {"a name of three dots", BYTES(GET("/...")), HIDDEN},
    {"a dot folder without a slash", BYTES(GET("/.git")), HIDDEN},
    {"a dot folder, encoded", BYTES(GET("/%2egit/config")), HIDDEN},
    {"one dot", BYTES(GET("/.")), HIDDEN},
    {"one dot before a file", BYTES(GET("/./a.txt")), HIDDEN},
    {"one dot after a folder", BYTES(GET("/sub/.")), HIDDEN},
    {".. inside", BYTES(GET("/sub/../a.txt")), HIDDEN},
    {".. at the end", BYTES(GET("/sub/..")), HIDDEN},
    {".. alone", BYTES(GET("/..")), HIDDEN},
    {".. beneath a file", BYTES(GET("/a.txt/../../secret")), HIDDEN},
    {".. beneath a link", BYTES(GET("/insidedir/../../secret")), HIDDEN},
    {".. beneath a link out", BYTES(GET("/outsidedir/../secret")), HIDDEN},
    {".. beneath nothing", BYTES(GET("/nothing/../../secret")), HIDDEN},
    {".. behind two slashes", BYTES(GET("//../secret")), HIDDEN},
    {".. between slashes", BYTES(GET("/sub//..//..//secret")), HIDDEN},
    {".. in a query is no path", BYTES(GET("/a.txt?/../secret")), SAYS(200, "text of a\n")},
    {"....//", BYTES(GET("/....//secret")), HIDDEN},
    {"..././", BYTES(GET("/..././secret")), HIDDEN},
    {"%2e", BYTES(GET("/%2e/a.txt")), HIDDEN},
    {"%2e%2e at the end", BYTES(GET("/sub/%2e%2e")), HIDDEN},
    {"%2E. mixed", BYTES(GET("/sub/%2E./../secret")), HIDDEN},
    {"%2e%2e%5c", BYTES(GET("/%2e%2e%5csecret")), HIDDEN},
    {"..%252f", BYTES(GET("/..%252fsecret")), HIDDEN},
    {"..%255c", BYTES(GET("/..%255csecret")), HIDDEN},
    {"..%c0%af", BYTES(GET("/..%c0%afsecret")), HIDDEN},
    {"..%e0%80%af", BYTES(GET("/..%e0%80%afsecret")), HIDDEN},
    {"..%u2215", BYTES(GET("/..%u2215secret")), HIDDEN},
    {"..%ef%bc%8f", BYTES(GET("/..%ef%bc%8fsecret")), HIDDEN},
    {"..%00/", BYTES(GET("/..%00/secret")), HIDDEN},
    {"..%0d/", BYTES(GET("/..%0d/secret")), HIDDEN},
    {"sub%2f..%2f..", BYTES(GET("/sub%2f..%2f..%2fsecret")), HIDDEN},
    {"\\..\\", BYTES(GET("/\\..\\secret")), HIDDEN},
    {"sub\\..\\..", BYTES(GET("/sub\\..\\..\\secret")), HIDDEN},
    {"absolute form with %2e%2e", BYTES("GET http://a/%2e%2e/secret HTTP/1.1\r\n" HOST "\r\n"), HIDDEN},
    {"an absolute path", BYTES(GET("//proc/self/environ")), HIDDEN},
    {"an absolute path, encoded", BYTES(GET("/%2fproc%2fself%2fenviron")), HIDDEN},
    {"a socket", BYTES(GET("/socket")), ANSWER_OR(404, 403)},
    {"a device", BYTES(GET("/device")), ANSWER_OR(404, 403)},
    {"a FIFO as a folder", BYTES(GET("/fifo/")), ANSWER_OR(404, 403)},
    {"a FIFO, HEAD", BYTES("HEAD /fifo HTTP/1.1\r\n" HOST "\r\n"), ANSWER_OR(404, 403)},
    {"a file that it may not read, HEAD", BYTES("HEAD /locked.txt HTTP/1.1\r\n" HOST "\r\n"), ANSWER_OR(404, 403)},
    {"in a folder that it may not read", BYTES(GET("/lockeddir/x")), ANSWER_OR(404, 403)},
    {"PUT of a file", BYTES("PUT /a.txt HTTP/1.1\r\n" HOST "Content-Length: 1\r\n\r\nx"),
     HAS(405, "Allow: GET, HEAD")},
    {"DELETE of a file", BYTES("DELETE /a.txt HTTP/1.1\r\n" HOST "\r\n"), HAS(405, "Allow: GET, HEAD")},
    {"the file is still there", BYTES(GET("/a.txt")), SAYS(200, "text of a\n")},
    {"a Range: all of it", BYTES("GET /a.txt HTTP/1.1\r\n" HOST "Range: bytes=0-3\r\n\r\n"), SAYS(200, "text of a\n")},
    {"no open redirect by //", BYTES(GET("//sub")), 301, 404, "Location: /sub/", NULL, EITHER},
    {"no open redirect by ///", BYTES(GET("///sub")), 301, 404, "Location: /sub/", NULL, EITHER},
    {"no open redirect by a backslash", BYTES(GET("/%5csub")), 404, 400, "!Location", NULL, EITHER},
    {"link inside", BYTES(GET("/inside.txt")), SAYS(200, "text of a\n")},
    {"link inside, up a folder", BYTES(GET("/sub/up.txt")), SAYS(200, "text of a\n")},
    {"link to a folder inside", BYTES(GET("/insidedir/b.txt")), SAYS(200, "text of b\n")},
    {"link out", BYTES(GET("/outside.txt")), HIDDEN},
    {"link to a folder outside", BYTES(GET("/outsidedir/secret")), HIDDEN},
    {"link to a folder outside, itself", BYTES(GET("/outsidedir/")), HIDDEN},
    {"link to a folder outside, no slash", BYTES(GET("/outsidedir")), HIDDEN},
    {"absolute link", BYTES(GET("/passwd.txt")), HIDDEN},
    {"absolute link to a folder", BYTES(GET("/etc/passwd")), HIDDEN},
    {"absolute link to the inside", BYTES(GET("/absolute.txt")), HIDDEN},
    {"link to itself", BYTES(GET("/loop")), HIDDEN},
    {"link to nowhere", BYTES(GET("/dangling")), HIDDEN},
    {"dotfile", BYTES(GET("/.hidden")), HIDDEN},
    {"dotfile, encoded", BYTES(GET("/%2ehidden")), HIDDEN},
    {"beneath a dot folder", BYTES(GET("/.git/config")), HIDDEN},
    {"a dot folder", BYTES(GET("/.git/")), HIDDEN},
    {"..", BYTES(GET("/../secret")), HIDDEN},
    {".. deeper", BYTES(GET("/sub/../../secret")), HIDDEN},
    {".. many", BYTES(GET("/../../../../../../../../etc/passwd")), HIDDEN},
    {"%2e%2e", BYTES(GET("/%2e%2e/secret")), HIDDEN},
    {".%2E", BYTES(GET("/.%2E/secret")), HIDDEN},
    {"..%2f", BYTES(GET("/..%2fsecret")), HIDDEN},
    {"%2e%2e%2f", BYTES(GET("/%2e%2e%2fsecret")), HIDDEN},
    {"%252e%252e", BYTES(GET("/%252e%252e/secret")), HIDDEN},
    {"overlong dots", BYTES(GET("/%c0%ae%c0%ae/secret")), HIDDEN},
    {"..\\", BYTES(GET("/..\\secret")), HIDDEN},
    {"..%5c", BYTES(GET("/..%5csecret")), HIDDEN},
    {"..;", BYTES(GET("/..;/secret")), HIDDEN},
    {"//", BYTES(GET("//etc/passwd")), HIDDEN},
    {"/ inside %2f", BYTES(GET("/%2fetc/passwd")), HIDDEN},
    {"a folder's dot", BYTES(GET("/sub/./../../secret")), HIDDEN},
    {"absolute form with ..", BYTES("GET http://localhost:8080/../secret HTTP/1.1\r\n" HOST "\r\n"), HIDDEN},
    {"absolute form that begins with ..", BYTES("GET http://../secret HTTP/1.1\r\n" HOST "\r\n"), HIDDEN},
    {"NUL cuts no name", BYTES(GET("/a.txt%00.html")), HIDDEN},
    {"NUL before ..", BYTES(GET("/%00/../secret")), HIDDEN},
    {"a bad escape", BYTES(GET("/%zz")), HIDDEN},
    {"a cut escape", BYTES(GET("/%2")), HIDDEN},
    {"a FIFO", BYTES(GET("/fifo")), ANSWER_OR(404, 403)},
    {"a file that it may not read", BYTES(GET("/locked.txt")), ANSWER_OR(404, 403)},
    {"a folder that it may not read", BYTES(GET("/lockeddir/")), ANSWER_OR(404, 403)},
    {"304: not modified", BYTES("GET /old.txt HTTP/1.1\r\n" HOST
     "If-Modified-Since: Sun, 06 Nov 1994 08:49:37 GMT\r\n\r\n"), HAS(304,
     "Last-Modified: Sun, 06 Nov 1994 08:49:37 GMT")},
    {"304: since later", BYTES("GET /old.txt HTTP/1.1\r\n" HOST
     "If-Modified-Since: Mon, 07 Nov 1994 00:00:00 GMT\r\n\r\n"), 304, 0, NULL, NULL, KEEPS},
    {"304: HEAD too", BYTES("HEAD /old.txt HTTP/1.1\r\n" HOST
     "If-Modified-Since: Sun, 06 Nov 1994 08:49:37 GMT\r\n\r\n"), 304, 0, NULL, NULL, KEEPS},
    {"modified since: 200", BYTES("GET /old.txt HTTP/1.1\r\n" HOST
     "If-Modified-Since: Sun, 06 Nov 1994 08:49:36 GMT\r\n\r\n"), 200, 0,
     "Last-Modified: Sun, 06 Nov 1994 08:49:37 GMT", "old", KEEPS},
    {"a date that is none: 200", BYTES("GET /old.txt HTTP/1.1\r\n" HOST
     "If-Modified-Since: yesterday\r\n\r\n"), SAYS(200, "old")},
    {"304: a date as of RFC 850", BYTES(SINCE("Sunday, 06-Nov-94 08:49:37 GMT")), 304, 0, NULL, NULL, KEEPS},
    {"304: a date as of asctime()", BYTES(SINCE("Sun Nov  6 08:49:37 1994")), 304, 0, NULL, NULL, KEEPS},
    {"a date as of RFC 850, a second before", BYTES(SINCE("Sunday, 06-Nov-94 08:49:36 GMT")), SAYS(200, "old")},
    {"a date as of asctime(), a second before", BYTES(SINCE("Sun Nov  6 08:49:36 1994")), SAYS(200, "old")},
    {"304 has a Date", BYTES(SINCE("Sun, 06 Nov 1994 08:49:37 GMT")), HAS(304, "Date")},
    {"304 has no Content-Type", BYTES(SINCE("Sun, 06 Nov 1994 08:49:37 GMT")), HAS(304, "!Content-Type")},
    {"304 with close", BYTES("GET /old.txt HTTP/1.1\r\n" HOST "Connection: close\r\n"
     "If-Modified-Since: Sun, 06 Nov 1994 08:49:37 GMT\r\n\r\n"), LAST(304)},
    {"304 in HTTP/1.0", BYTES("GET /old.txt HTTP/1.0\r\nIf-Modified-Since: Sun, 06 Nov 1994 08:49:37 GMT\r\n\r\n"),
     LAST(304)},
    {"since before 1970", BYTES(SINCE("Sat, 01 Jan 1960 00:00:00 GMT")), SAYS(200, "old")},
    {"a date of another zone is none", BYTES(SINCE("Sun, 06 Nov 1994 08:49:37 PST")), SAYS(200, "old")},
    {"a date without a zone is none", BYTES(SINCE("Sun, 06 Nov 1994 08:49:37")), SAYS(200, "old")},
    {"a date with more behind it is none", BYTES(SINCE("Sun, 06 Nov 1994 08:49:37 GMT; x")), SAYS(200, "old")},
    {"a date of ISO 8601 is none", BYTES(SINCE("1994-11-06T08:49:37Z")), SAYS(200, "old")},
    {"an empty date is none", BYTES(SINCE("")), SAYS(200, "old")},
    {"a date in seconds is none", BYTES(SINCE("784111777")), SAYS(200, "old")},
    {"If-None-Match comes before If-Modified-Since", BYTES("GET /old.txt HTTP/1.1\r\n" HOST
     "If-Modified-Since: Sun, 06 Nov 1994 08:49:37 GMT\r\nIf-None-Match: \"x\"\r\n\r\n"), SAYS(200, "old")},
    {"since, of a listing", BYTES("GET /sub/ HTTP/1.1\r\n" HOST
     "If-Modified-Since: Sun, 06 Nov 1994 08:49:37 GMT\r\n\r\n"), ANSWER(200)},
    {"since, of nothing", BYTES("GET /nothing HTTP/1.1\r\n" HOST
     "If-Modified-Since: Sun, 06 Nov 1994 08:49:37 GMT\r\n\r\n"), ANSWER(404)},
    {"since, of /send: it is sent", BYTES("GET /send?message=x HTTP/1.1\r\n" HOST
     "If-Modified-Since: Sun, 06 Nov 1994 08:49:37 GMT\r\n\r\n"), SAYS(200, "message sent")},
    {"no date for a file before 1970", BYTES(GET("/past.txt")), HAS(200, "!Last-Modified")},
    {"no date for a file before the year 0", BYTES(GET("/ancient.txt")), SAYS(200, "ancient")},
    {"a date in the year 99999", BYTES(GET("/future.txt")), SAYS(200, "future")},
    {"a date before 1970", BYTES(GET("/past.txt")), SAYS(200, "past")},
};
/* clang-format on */

static void set_time(const char *name, long long seconds) {
    struct timespec times[2] = { { .tv_sec = seconds }, { .tv_sec = seconds } };

    utimensat(AT_FDCWD, in_folder(name), times, 0);
}

/* Undoes what HTML and percent escapes do to a link. */
static void decode_link(char *text) {
    static const struct {
        const char *name;
        char c;
    } entities[] = {
        { "&amp;", '&' },   { "&lt;", '<' },    { "&gt;", '>' },
        { "&quot;", '"' },  { "&#39;", '\'' },  { "&#34;", '"' },
        { "&apos;", '\'' }, { "&#x27;", '\'' },
    };
    char *out = text;

    for (char *in = text; *in; in++) {
        *out = *in;
        for (size_t i = 0; *in == '&' && i < COUNT(entities); i++)
            if (!strncmp(in, entities[i].name, strlen(entities[i].name))) {
                *out = entities[i].c;
                in += strlen(entities[i].name) - 1;
            }
        out++;
    }
    *out = '\0';
}

/* Every name of the folder is a link that leads to the file; nothing in a
 * name is taken for markup or for a scheme. */
static void listing_test(int port) {
    struct response r, file;
    struct peer *p, *q;
    bool seen[COUNT(odd_names)] = { false };
    char *text;

    begin("listing: odd names are escaped, each link leads to its file");
    p = http_get(port, "/odd/", &r);
    text = strndup(r.body ? (const char *)r.body : "", r.length);
    peer_close(p);
    expect(!strstr(text, "<b>"), "markup from a name");
    expect(!strstr(text, ".dot"), "a dotfile");
    for (const char *c = text; *c; c++)
        expect((unsigned char)*c >= ' ' || *c == '\n',
               "a raw control "
               "character %d",
               *c);
    for (char *at = text; (at = strstr(at, "href=")) != NULL;) {
        char link[400], target[500];
        size_t n;

        at += 6;
        n = strcspn(at, at[-1] == '"' ? "\"" : "'");
        snprintf(link, sizeof link, "%.*s", (int)n, at);
        decode_link(link);
        if (!strcmp(link, "../") || !strcmp(link, "..") || link[0] == '/')
            continue;
        n = strcspn(link, ":/");
        expect(link[n] != ':', "link with a scheme: %s", link);
        expect(!strpbrk(link, " <>\"\\^`{|}?#"), "link not encoded: %s", link);
        snprintf(target, sizeof target, "/odd/%s",
                 link + (strncmp(link, "./", 2) ? 0 : 2));
        q = http_get(port, target, &file);
        for (size_t i = 0; i < COUNT(odd_names); i++)
            seen[i] |= file.status == 200 && file.body &&
                       file.length == strlen(odd_names[i]) &&
                       !memcmp(file.body, odd_names[i], file.length);
        peer_close(q);
    }
    for (size_t i = 0; i < COUNT(odd_names); i++)
        expect(seen[i], "no link leads to %s",
               shown(odd_names[i], strlen(odd_names[i])));
    free(text);
    finish();

    begin("listing: folders and files, sorted for the reader");
    p = http_get(port, "/sub/", &r);
    text = strndup(r.body ? (const char *)r.body : "", r.length);
    expect(strstr(text, "deep/") && strstr(text, "b.txt"), "got %s",
           shown(text, strlen(text)));
    expect(!strstr(text, ".git"), "a dot folder");
    free(text);
    peer_close(p);
    finish();

    begin("listing: an empty folder, but for a FIFO");
    p = http_get(port, "/void/", &r);
    expect(r.status == 200, "status %d", r.status);
    peer_close(p);
    finish();
}

/* A big file, whole, with another request behind it on the connection. */
static void big_file_test(int port) {
    size_t size = 20 << 20;
    unsigned char *bytes = malloc(size);
    struct response r;
    struct peer *p;
    unsigned x = 1;

    for (size_t i = 0; i < size; i++) {
        x = x * 1664525 + 1013904223;
        bytes[i] = (unsigned char)(x >> 24);
    }
    make_file("www/big.bin", bytes, size);
    begin("a file of 20 MB comes intact, and the next request after it");
    p = peer_open(port);
    peer_text(p, GET("/big.bin") GET("/a.txt"));
    read_response(p, false, &r);
    expect(r.status == 200 && r.length == size, "status %d, %zu bytes",
           r.status, r.length);
    expect(r.length != size || !memcmp(r.body, bytes, size), "other bytes");
    read_response(p, false, &r);
    expect_body(&r, "text of a\n");
    peer_close(p);
    finish();

    begin("a client that closes its half still gets all of the file");
    p = peer_open(port);
    peer_text(p, GET("/big.bin"));
    shutdown(p->fd, SHUT_WR);
    read_response(p, false, &r);
    expect(r.length == size && !memcmp(r.body, bytes, size), "%zu bytes",
           r.length);
    expect_end(p);
    peer_close(p);
    finish();

    begin("HEAD of a file of 20 MB");
    p = peer_open(port);
    peer_text(p, "HEAD /big.bin HTTP/1.1\r\n" HOST "\r\n" GET("/a.txt"));
    read_response(p, true, &r);
    expect_field(&r, "Content-Length: 20971520");
    read_response(p, false, &r);
    expect_body(&r, "text of a\n");
    peer_close(p);
    finish();

    begin("a reader that leaves in the middle of a file");
    for (int i = 0; i < 20; i++) {
        p = peer_open(port);
        peer_text(p, GET("/big.bin"));
        peer_more(p, deadline());
        peer_close(p);
    }
    p = http_get(port, "/a.txt", &r);
    expect_body(&r, "text of a\n");
    peer_close(p);
    finish();

    begin("a file that shrinks while it is sent: the connection ends");
    make_file("www/shrinks.bin", bytes, size);
    p = peer_open(port);
    peer_text(p, GET("/shrinks.bin"));
    peer_more(p, deadline());
    expect(truncate(in_folder("www/shrinks.bin"), 1000) == 0, "truncate");
    while (peer_more(p, deadline()))
        ;
    expect(p->ended, "the connection hangs");
    expect(p->end - p->start < size, "more than there was");
    peer_close(p);
    p = http_get(port, "/shrinks.bin", &r);
    expect(r.length == 1000, "%zu bytes afterwards", r.length);
    peer_close(p);
    finish();
    free(bytes);
}

/* A file that grows while it is sent comes as long as announced. */
static void growing_test(int port) {
    size_t size = 8 << 20;
    struct response r;
    struct peer *p = peer_open(port);

    begin("a file that grows while it is sent: as long as announced");
    make_file("www/grows.bin", BYTES(""));
    expect(truncate(in_folder("www/grows.bin"), (off_t)size) == 0, "truncate");
    peer_text(p, GET("/grows.bin") GET("/a.txt"));
    peer_more(p, deadline());
    expect(truncate(in_folder("www/grows.bin"), 2 * (off_t)size) == 0, "grow");
    read_response(p, false, &r);
    expect(r.length == size, "%zu bytes", r.length);
    read_response(p, false, &r);
    expect_body(&r, "text of a\n");
    peer_close(p);
    finish();
}

/* Starts a process that exchanges two names over and over; `one` may be
 * renamed to a `two` that is not there. End it with end_child(). */
static pid_t begin_renaming(const char *one, const char *two, unsigned flags) {
    pid_t child;

    one = in_folder(one), two = in_folder(two);
    fflush(stdout);
    child = fork();
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        for (;;)
            if (renameat2(AT_FDCWD, one, AT_FDCWD, two, flags) ||
                renameat2(AT_FDCWD, two, AT_FDCWD, one, flags)) {
                perror("renameat2");
                _exit(1);
            }
    }
    return child;
}

/* It must have gone on until now. */
static void end_child(pid_t child) {
    int status;

    expect(waitpid(child, &status, WNOHANG) == 0, "nothing was renamed");
    kill(child, SIGKILL);
    waitpid(child, &status, 0);
}

/* A name is swapped for a link out while it is served: what is inside comes,
 * or a 404, and never a byte of what is outside. */
static void swap_test(int port, const char *target, const char *inside,
                      const char *one, const char *two) {
    pid_t child;
    int good = 0, missing = 0;
    double until = now() + 4 * test.patience;
    struct peer *p = peer_open(port);
    char request[200];
    struct response r;

    begin("swapped for a link out while it is served: %s", target);
    snprintf(request, sizeof request, "GET %s HTTP/1.1\r\n" HOST "\r\n",
             target);
    child = begin_renaming(one, two, RENAME_EXCHANGE);
    for (int i = 0; (i < 5000 || good < 50 || missing < 50) && !test.why[0];
         i++) {
        if (!expect(now() < until, "%d times inside, %d times not", good,
                    missing))
            break;
        peer_text(p, request);
        read_response(p, false, &r);
        good += r.status == 200 || r.status == 301;
        missing += r.status == 404;
        expect(r.status == 404 || r.status == 200 || r.status == 301,
               "status %d", r.status);
        expect(r.status != 200 ||
                   (r.body && memmem(r.body, r.length, inside, strlen(inside))),
               "not what is inside: %s", shown(r.body, r.length));
        expect(!r.body || !memmem(r.body, r.length, "SECRET", 6), "a secret");
    }
    end_child(child);
    peer_close(p);
    finish();
    printf("# %s: %d times what is inside, %d times a 404\n", target, good,
           missing);
}

static void swaps_test(int port) {
    make_dir("www/swap");
    make_file("www/swap/secret", BYTES("inside"));
    make_dir("www/swap/within");
    make_file("www/swap/within/secret", BYTES("inside"));
    make_file("outside/SECRET.txt", BYTES("SECRET"));
    make_dir("outside/within");
    make_file("outside/within/secret", BYTES("SECRET"));
    make_link("../outside", "www/swapped");
    swap_test(port, "/swap/secret", "inside", "www/swap", "www/swapped");
    swap_test(port, "/swap/within/secret", "inside", "www/swap", "www/swapped");
    swap_test(port, "/swap/", "within/", "www/swap", "www/swapped");
    swap_test(port, "/swap", "", "www/swap", "www/swapped");
    make_file("www/swapfile", BYTES("inside"));
    make_link("../secret", "www/swappedfile");
    swap_test(port, "/swapfile", "inside", "www/swapfile", "www/swappedfile");
}

/* Following "..", the kernel gives up when anything at all is renamed. */
static void renaming_test(int port) {
    struct peer *p = peer_open(port);
    struct response r;
    pid_t child;

    begin("a link with .. is there while other files are renamed");
    make_file("outside/renamed", BYTES(""));
    child = begin_renaming("outside/renamed", "outside/again", 0);
    for (int i = 0; i < 10000 && !test.why[0]; i++) {
        peer_text(p, GET("/sub/up.txt"));
        read_response(p, false, &r);
        expect(r.status == 200, "status %d after %d", r.status, i);
    }
    end_child(child);
    peer_close(p);
    finish();
}

/* Longer than the kernel takes. */
static void long_path_test(int port) {
    char target[5000];
    struct response r;

    begin("a path of 5,000 bytes");
    for (size_t i = 0; i < sizeof target; i++) target[i] = "/n"[i % 2];
    target[sizeof target - 1] = '\0';
    peer_close(http_get(port, target, &r));
    expect(r.status == 404, "status %d", r.status);
    finish();
}

/* Last-Modified is never later than Date (RFC 9110 8.8.2.1). */
static void future_test(int port) {
    struct response r;
    struct peer *p = http_get(port, "/future.txt", &r);
    const char *modified = header(&r, "Last-Modified");
    const char *date = header(&r, "Date");
    struct tm a = { 0 }, b = { 0 };

    begin("a file from the year 99999 is not newer than now");
    expect(modified && date, "no dates");
    if (modified && date) {
        strptime(modified, "%a, %d %b %Y %H:%M:%S GMT", &a);
        strptime(date, "%a, %d %b %Y %H:%M:%S GMT", &b);
        expect(timegm(&a) <= timegm(&b), "modified %s, now %s", modified, date);
    }
    peer_close(p);
    finish();
}

static void file_test(void) {
    struct server s = { .without_rights = true };
    struct response r;
    struct peer *p;

    make_tree();
    make_file("www/old.txt", BYTES("old"));
    make_file("www/future.txt", BYTES("future"));
    make_file("www/past.txt", BYTES("past"));
    set_time("www/old.txt", 784111777);
    set_time("www/future.txt", 3093527980799);
    set_time("www/past.txt", -100000);
    make_file("www/ancient.txt", BYTES("ancient"));
    set_time("www/ancient.txt", -99999999999);
    if (!START(&s, "-b", "none", "-d", in_folder("www"))) return;
    run_exchanges(s.port, file_cases, COUNT(file_cases));
    listing_test(s.port);
    big_file_test(s.port);
    growing_test(s.port);
    swaps_test(s.port);
    renaming_test(s.port);
    future_test(s.port);
    long_path_test(s.port);
    head_test(s.port, "/a.txt");
    head_test(s.port, "/empty.txt");
    head_test(s.port, "/sub/");
    head_test(s.port, "/sub");

    begin("a new file shows at once, a new version too");
    make_file("www/new.txt", BYTES("one"));
    p = http_get(s.port, "/new.txt", &r);
    expect_body(&r, "one");
    peer_close(p);
    make_file("www/new.txt", BYTES("three"));
    p = http_get(s.port, "/new.txt", &r);
    expect_body(&r, "three");
    peer_close(p);
    finish();

    begin("no index.html: / is a listing");
    unlink(in_folder("www/index.html"));
    p = http_get(s.port, "/", &r);
    expect(r.status == 200 && r.body && memmem(r.body, r.length, "a.txt", 5),
           "status %d", r.status);
    expect(!r.body || !memmem(r.body, r.length, "hidden", 6), "a dotfile");
    peer_close(p);
    finish();

    begin("with -d, WebSocket goes on");
    p = ws_open(s.port, "/?channel=d");
    ws_text(p, "x");
    ws_expect_text(p, "x");
    peer_close(p);
    finish();
    chmod(in_folder("www/lockeddir"), 0755);
    server_stop(&s, "static files");
}

/* ---- The opening handshake --------------------------------------------- */

#define KEY          "Sec-WebSocket-Key: " WS_KEY "\r\n"
#define VERSION      "Sec-WebSocket-Version: 13\r\n"
#define ASK(fields)  "GET / HTTP/1.1\r\n" HOST fields "\r\n"
#define OPEN(fields) ASK(WS_HEADERS fields)
#define OPENS(field) 101, 0, field, NULL, EITHER
#define ACCEPTED     101, 0, "Sec-WebSocket-Accept: " WS_ACCEPT, NULL, EITHER
#define NOT_OPENED   400, 200, NULL, NULL, EITHER

/* clang-format off */
static const struct exchange open_cases[] = {
    {"open: the key of RFC 6455", BYTES(OPEN("")), ACCEPTED},
    {"open: Upgrade in the response", BYTES(OPEN("")), OPENS("Upgrade: websocket")},
    {"open: Connection in the response", BYTES(OPEN("")), OPENS("Connection: Upgrade")},
    {"open: another key",
     BYTES(ASK("Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: x3JJHMbDL1EzLkh9GBhXDw==\r\n"
     VERSION)), OPENS("Sec-WebSocket-Accept: HSmrc0sMlYUkAGmm5OPpG2HaGWk=")},
    {"open: any path", BYTES("GET /some/where%20else HTTP/1.1\r\n" HOST WS_HEADERS "\r\n"), ACCEPTED},
    {"open: absolute form", BYTES("GET http://localhost:8080/?channel=a HTTP/1.1\r\n" HOST WS_HEADERS "\r\n"),
     ACCEPTED},
    {"open: names in small letters", BYTES("GET / HTTP/1.1\r\nhost: a\r\n"
     "upgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-key: " WS_KEY
     "\r\nsec-websocket-version: 13\r\n\r\n"), ACCEPTED},
    {"open: names in capitals",
     BYTES("GET / HTTP/1.1\r\nHOST: a\r\nUPGRADE: WEBSOCKET\r\nCONNECTION: UPGRADE\r\nSEC-WEBSOCKET-KEY: "
     WS_KEY "\r\n" "SEC-WEBSOCKET-VERSION: 13\r\n\r\n"), ACCEPTED},
    {"open: Connection as a list", BYTES(ASK("Upgrade: websocket\r\n" "Connection: keep-alive, Upgrade\r\n"
     KEY VERSION)), ACCEPTED},
    {"open: Connection as an odd list", BYTES(ASK("Upgrade: websocket\r\n"
     "Connection: ,, keep-alive\t,\tupgrade ,\r\n" KEY VERSION)), ACCEPTED},
    {"open: several Connection lines", BYTES(ASK("Upgrade: websocket\r\n"
     "Connection: keep-alive\r\nConnection: Upgrade\r\n" KEY VERSION)), ACCEPTED},
    {"open: Upgrade as a list", BYTES(ASK("Upgrade: h2c, websocket\r\n" "Connection: Upgrade\r\n" KEY
     VERSION)), ACCEPTED},
    {"open: white space around values", BYTES(ASK("Upgrade: \t websocket \t\r\n"
     "Connection:Upgrade  \r\nSec-WebSocket-Key:   " WS_KEY "  \r\n" "Sec-WebSocket-Version:13 \r\n")),
     ACCEPTED},
    {"open: no extension is accepted",
     BYTES(OPEN("Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n")), OPENS("!Sec-WebSocket-Extensions")},
    {"open: no subprotocol is accepted", BYTES(OPEN("Sec-WebSocket-Protocol: chat, superchat\r\n")), OPENS("!Sec-WebSocket-Protocol")},
    {"open: no Upgrade", BYTES(ASK("Connection: Upgrade\r\n" KEY VERSION)), NOT_OPENED},
    {"open: Upgrade: websockets", BYTES(ASK("Upgrade: websockets\r\n" "Connection: Upgrade\r\n" KEY VERSION)),
     NOT_OPENED},
    {"open: Upgrade: web socket", BYTES(ASK("Upgrade: web socket\r\n" "Connection: Upgrade\r\n" KEY VERSION)),
     NOT_OPENED},
    {"open: no Connection", BYTES(ASK("Upgrade: websocket\r\n" KEY VERSION)), NOT_OPENED},
    {"open: Connection: Upgrades", BYTES(ASK("Upgrade: websocket\r\n" "Connection: Upgrades, NoUpgrade\r\n"
     KEY VERSION)), NOT_OPENED},
    {"open: no key", BYTES(ASK("Upgrade: websocket\r\nConnection: Upgrade\r\n" VERSION)), ANSWER(400)},
    {"open: an empty key", BYTES(ASK("Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key:\r\n"
     VERSION)), ANSWER(400)},
    {"open: a key of 15 bytes",
     BYTES(ASK("Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25j\r\n"
     VERSION)), ANSWER(400)},
    {"open: a key of 17 bytes",
     BYTES(ASK("Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZSE=\r\n"
     VERSION)), ANSWER(400)},
    {"open: a key of 18 bytes",
     BYTES(ASK("Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZSEh\r\n"
     VERSION)), ANSWER(400)},
    {"open: a key without padding", BYTES(ASK("Upgrade: websocket\r\n"
     "Connection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ\r\n" VERSION)), ANSWER(400)},
    {"open: a key that is no base64", BYTES(ASK("Upgrade: websocket\r\n"
     "Connection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSB-b25jZQ==\r\n" VERSION)), ANSWER(400)},
    {"open: two keys", BYTES(OPEN(KEY)), ANSWER(400)},
    {"open: two different keys", BYTES(OPEN("Sec-WebSocket-Key: x3JJHMbDL1EzLkh9GBhXDw==\r\n")), ANSWER(400)},
    {"open: a list of keys", BYTES(ASK("Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: "
     WS_KEY ", " WS_KEY "\r\n" VERSION)), ANSWER(400)},
    {"open: a key of no bytes", BYTES(ASK("Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: ==\r\n"
     VERSION)), ANSWER(400)},
    {"open: a key of 24 bytes, not 16", BYTES(ASK("Upgrade: websocket\r\nConnection: Upgrade\r\n"
     "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZSEhISEhISEh\r\n" VERSION)), ANSWER(400)},
    {"open: a key with a blank in it", BYTES(ASK("Upgrade: websocket\r\nConnection: Upgrade\r\n"
     "Sec-WebSocket-Key: dGhlIHNhbXBs ZSBub25jZQ==\r\n" VERSION)), ANSWER(400)},
    {"open: a key in quotes", BYTES(ASK("Upgrade: websocket\r\nConnection: Upgrade\r\n"
     "Sec-WebSocket-Key: \"" WS_KEY "\"\r\n" VERSION)), ANSWER(400)},
    {"open: a key with one = more", BYTES(ASK("Upgrade: websocket\r\nConnection: Upgrade\r\n"
     "Sec-WebSocket-Key: " WS_KEY "=\r\n" VERSION)), ANSWER(400)},
    {"open: a key with one = less", BYTES(ASK("Upgrade: websocket\r\nConnection: Upgrade\r\n"
     "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=\r\n" VERSION)), ANSWER(400)},
    {"open: a key with = in the middle", BYTES(ASK("Upgrade: websocket\r\nConnection: Upgrade\r\n"
     "Sec-WebSocket-Key: dGhlIHNhbXB=ZSBub25jZQ==\r\n" VERSION)), ANSWER(400)},
    {"open: a key in the alphabet for URLs", BYTES(ASK("Upgrade: websocket\r\nConnection: Upgrade\r\n"
     "Sec-WebSocket-Key: dGhlIHNhbXBs_SBub25jZQ==\r\n" VERSION)), ANSWER(400)},
    {"open: a key of zeros", BYTES(ASK("Upgrade: websocket\r\nConnection: Upgrade\r\n"
     "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n" VERSION)),
     OPENS("Sec-WebSocket-Accept: ICX+Yqv66kxgM0FcWaLWlFLwTAI=")},
    {"open: the case of a key counts", BYTES(ASK("Upgrade: websocket\r\nConnection: Upgrade\r\n"
     "Sec-WebSocket-Key: DGHLIHNHBXBSZSBUB25JZQ==\r\n" VERSION)),
     OPENS("Sec-WebSocket-Accept: bTDy/mAkJp3FWz34b2rLauQ1T6E=")},
    {"open: two versions", BYTES(OPEN(VERSION)), ANSWER_OR(400, 426)},
    {"open: two different versions", BYTES(OPEN("Sec-WebSocket-Version: 8\r\n")), ANSWER_OR(400, 426)},
    {"open: a list of versions", BYTES(ASK("Upgrade: websocket\r\nConnection: Upgrade\r\n" KEY
     "Sec-WebSocket-Version: 13, 8\r\n")), ANSWER_OR(426, 400)},
    {"open: an empty version", BYTES(ASK("Upgrade: websocket\r\nConnection: Upgrade\r\n" KEY
     "Sec-WebSocket-Version:\r\n")), ANSWER_OR(426, 400)},
    {"open: version 013", BYTES(ASK("Upgrade: websocket\r\nConnection: Upgrade\r\n" KEY
     "Sec-WebSocket-Version: 013\r\n")), ANSWER_OR(426, 400)},
    {"open: version +13", BYTES(ASK("Upgrade: websocket\r\nConnection: Upgrade\r\n" KEY
     "Sec-WebSocket-Version: +13\r\n")), ANSWER_OR(426, 400)},
    {"open: version 13.0", BYTES(ASK("Upgrade: websocket\r\nConnection: Upgrade\r\n" KEY
     "Sec-WebSocket-Version: 13.0\r\n")), ANSWER_OR(426, 400)},
    {"open: version 14", BYTES(ASK("Upgrade: websocket\r\nConnection: Upgrade\r\n" KEY
     "Sec-WebSocket-Version: 14\r\n")), HAS(426, "Sec-WebSocket-Version: 13")},
    {"open: version 0", BYTES(ASK("Upgrade: websocket\r\nConnection: Upgrade\r\n" KEY
     "Sec-WebSocket-Version: 0\r\n")), HAS(426, "Sec-WebSocket-Version: 13")},
    {"open: version 256 + 13", BYTES(ASK("Upgrade: websocket\r\nConnection: Upgrade\r\n" KEY
     "Sec-WebSocket-Version: 269\r\n")), HAS(426, "Sec-WebSocket-Version: 13")},
    {"open: a 426 has an Upgrade", BYTES(ASK("Upgrade: websocket\r\nConnection: Upgrade\r\n" KEY
     "Sec-WebSocket-Version: 8\r\n")), HAS(426, "Upgrade: websocket")},
    {"open: a 426 has it in Connection", BYTES(ASK("Upgrade: websocket\r\nConnection: Upgrade\r\n" KEY
     "Sec-WebSocket-Version: 8\r\n")), HAS(426, "Connection: Upgrade")},
    {"open: several Upgrade lines", BYTES(ASK("Upgrade: h2c\r\nUpgrade: WebSocket\r\nConnection: Upgrade\r\n" KEY
     VERSION)), ACCEPTED},
    {"open: Upgrade: websocket twice in a list", BYTES(ASK("Upgrade: websocket,websocket\r\n"
     "Connection: Upgrade,upgrade\r\n" KEY VERSION)), ACCEPTED},
    {"open: Upgrade: websocket/13", BYTES(ASK("Upgrade: websocket/13\r\nConnection: Upgrade\r\n" KEY VERSION)),
     NOT_OPENED},
    {"open: Upgrade: a websocket", BYTES(ASK("Upgrade: a websocket\r\nConnection: Upgrade\r\n" KEY VERSION)),
     NOT_OPENED},
    {"open: Upgrade: \"websocket\"", BYTES(ASK("Upgrade: \"websocket\"\r\nConnection: Upgrade\r\n" KEY VERSION)),
     NOT_OPENED},
    {"open: Upgrade: empty", BYTES(ASK("Upgrade:\r\nConnection: Upgrade\r\n" KEY VERSION)), NOT_OPENED},
    {"open: X-Upgrade is another field", BYTES(ASK("X-Upgrade: websocket\r\nConnection: Upgrade\r\n" KEY VERSION)),
     NOT_OPENED},
    {"open: Connection: no upgrade", BYTES(ASK("Upgrade: websocket\r\nConnection: no upgrade\r\n" KEY VERSION)),
     NOT_OPENED},
    {"open: Connection: upgrade;q=1", BYTES(ASK("Upgrade: websocket\r\nConnection: upgrade;q=1\r\n" KEY VERSION)),
     NOT_OPENED},
    {"open: Connection: close alone", BYTES(ASK("Upgrade: websocket\r\nConnection: close\r\n" KEY VERSION)),
     NOT_OPENED},
    {"open: Proxy-Connection is another field", BYTES(ASK("Upgrade: websocket\r\nProxy-Connection: Upgrade\r\n" KEY
     VERSION)), NOT_OPENED},
    {"open: HTTP/1.2", BYTES("GET / HTTP/1.2\r\n" HOST WS_HEADERS "\r\n"), ACCEPTED},
    {"open: HTTP/1.0 with keep-alive", BYTES("GET / HTTP/1.0\r\n" HOST "Upgrade: websocket\r\n"
     "Connection: keep-alive, Upgrade\r\n" KEY VERSION "\r\n"), NOT_OPENED},
    {"open: HTTP/2.0", BYTES("GET / HTTP/2.0\r\n" HOST WS_HEADERS "\r\n"), REFUSED(505)},
    {"open: PUT", BYTES("PUT / HTTP/1.1\r\n" HOST WS_HEADERS "\r\n"), ANSWER_OR(405, 400)},
    {"open: get in small letters", BYTES("get / HTTP/1.1\r\n" HOST WS_HEADERS "\r\n"), ANSWER_OR(405, 400)},
    {"open: CONNECT, as in HTTP/2", BYTES("CONNECT / HTTP/1.1\r\n" HOST WS_HEADERS "\r\n"), ANSWER_OR(405, 400)},
    {"open: a bad Host", BYTES("GET / HTTP/1.1\r\nHost: a b\r\n" WS_HEADERS "\r\n"), REFUSED(400)},
    {"open: two Hosts", BYTES("GET / HTTP/1.1\r\n" HOST HOST WS_HEADERS "\r\n"), REFUSED(400)},
    {"open: an empty Host", BYTES("GET / HTTP/1.1\r\nHost:\r\n" WS_HEADERS "\r\n"), ACCEPTED},
    {"open: a body is read first", BYTES(OPEN("Content-Length: 5\r\n") "hello"), ACCEPTED},
    {"open: a body too big", BYTES(OPEN("Content-Length: 65537\r\n")), REFUSED(413)},
    {"open: unknown fields are passed over", BYTES(OPEN("Cookie: a=b\r\nDNT: 1\r\nSec-Fetch-Mode: websocket\r\n"
     "Sec-WebSocket-Protocol: a\r\nSec-WebSocket-Protocol: b\r\nSec-WebSocket-Extensions: x-unknown; a=\"b,c\"\r\n"
     "Sec-WebSocket-Extensions: permessage-deflate\r\n")), OPENS("!Sec-WebSocket-Extensions")},
    {"open: no Content-Length in a 101", BYTES(OPEN("")), OPENS("!Content-Length")},
    {"open: no Transfer-Encoding in a 101", BYTES(OPEN("")), OPENS("!Transfer-Encoding")},
    {"open: a query that is odd", BYTES("GET /?&&=%zz HTTP/1.1\r\n" HOST WS_HEADERS "\r\n"), ACCEPTED},
    {"open: a path that is odd", BYTES("GET /..%2f..//%00 HTTP/1.1\r\n" HOST WS_HEADERS "\r\n"), ANSWER_OR(400, 101)},
    {"open: history without a number", BYTES("GET /?history= HTTP/1.1\r\n" HOST WS_HEADERS "\r\n"), ANSWER(400)},
    {"open: history of a word", BYTES("GET /?history=all HTTP/1.1\r\n" HOST WS_HEADERS "\r\n"), ANSWER(400)},
    {"open: history of -1", BYTES("GET /?history=-1 HTTP/1.1\r\n" HOST WS_HEADERS "\r\n"), ANSWER(400)},
    {"open: history of thirty digits", BYTES("GET /?history=999999999999999999999999999999 HTTP/1.1\r\n" HOST
     WS_HEADERS "\r\n"), ANSWER(400)},
    {"open: history of 1 and a NUL", BYTES("GET /?history=1%00x HTTP/1.1\r\n" HOST WS_HEADERS "\r\n"), ANSWER(400)},
    {"open: history with a bad escape", BYTES("GET /?history=%zz HTTP/1.1\r\n" HOST WS_HEADERS "\r\n"), ANSWER(400)},
    {"open: channel with a bad escape", BYTES("GET /?channel=%zz HTTP/1.1\r\n" HOST WS_HEADERS "\r\n"), ANSWER(400)},
    {"open: no version", BYTES(ASK("Upgrade: websocket\r\nConnection: Upgrade\r\n" KEY)), 426, 400,
     "Sec-WebSocket-Version: 13", NULL, EITHER},
    {"open: version 12", BYTES(ASK("Upgrade: websocket\r\nConnection: Upgrade\r\n" KEY
     "Sec-WebSocket-Version: 12\r\n")), HAS(426, "Sec-WebSocket-Version: 13")},
    {"open: version 8", BYTES(ASK("Upgrade: websocket\r\nConnection: Upgrade\r\n" KEY
     "Sec-WebSocket-Version: 8\r\n")), HAS(426, "Sec-WebSocket-Version: 13")},
    {"open: version 130", BYTES(ASK("Upgrade: websocket\r\nConnection: Upgrade\r\n" KEY
     "Sec-WebSocket-Version: 130\r\n")), ANSWER(426)},
    {"open: version 1", BYTES(ASK("Upgrade: websocket\r\nConnection: Upgrade\r\n" KEY
     "Sec-WebSocket-Version: 1\r\n")), ANSWER(426)},
    {"open: version thirteen", BYTES(ASK("Upgrade: websocket\r\nConnection: Upgrade\r\n" KEY
     "Sec-WebSocket-Version: thirteen\r\n")), ANSWER_OR(426, 400)},
    {"open: POST", BYTES("POST / HTTP/1.1\r\n" HOST WS_HEADERS "Content-Length: 0\r\n\r\n"), ANSWER_OR(405,
     400)},
    {"open: HEAD", BYTES("HEAD / HTTP/1.1\r\n" HOST WS_HEADERS "\r\n"), ANSWER_OR(200, 400)},
    {"open: HTTP/1.0", BYTES("GET / HTTP/1.0\r\n" HOST WS_HEADERS "\r\n"), NOT_OPENED},
    {"open: no Host", BYTES("GET / HTTP/1.1\r\n" WS_HEADERS "\r\n"), REFUSED(400)},
    {"open: Transfer-Encoding", BYTES(OPEN("Transfer-Encoding: chunked\r\n")), REFUSED_OR(501, 400)},
    {"open: a folded field", BYTES(OPEN("X: y\r\n z\r\n")), REFUSED(400)},
    {"open: channel of 64 bytes, encoded",
     BYTES("GET /?channel=%30%31%32%33%34%35%36%37%38%390123456789012345678901234567890123456789%c3%a9%c3%a9%c3%a9%c3%a9%c3%a9%c3%a9%c3%a9 HTTP/1.1\r\n"
     HOST WS_HEADERS "\r\n"), ACCEPTED},
    {"open: channel of 65 bytes",
     BYTES("GET /?channel=01234567890123456789012345678901234567890123456789012345678901234 HTTP/1.1\r\n" HOST
     WS_HEADERS "\r\n"), ANSWER(400)},
    {"open: channel that is no UTF-8", BYTES("GET /?channel=%c3 HTTP/1.1\r\n" HOST WS_HEADERS "\r\n"),
     ANSWER(400)},

    /* Origin */
    {"origin: the same", BYTES(OPEN("Origin: http://localhost:8080\r\n")), ACCEPTED},
    {"origin: the same host, another scheme", BYTES(OPEN("Origin: https://localhost:8080\r\n")), ACCEPTED},
    {"origin: the same in other case", BYTES(OPEN("Origin: http://LocalHost:8080\r\n")), ACCEPTED},
    {"origin: another host", BYTES(OPEN("Origin: http://evil.example\r\n")), ANSWER(403)},
    {"origin: another host, the same port", BYTES(OPEN("Origin: http://evil.example:8080\r\n")), ANSWER(403)},
    {"origin: another port", BYTES(OPEN("Origin: http://localhost:8081\r\n")), ANSWER(403)},
    {"origin: no port", BYTES(OPEN("Origin: http://localhost\r\n")), ANSWER(403)},
    {"origin: the host as a prefix", BYTES(OPEN("Origin: http://localhost:8080.evil.example\r\n")),
     ANSWER(403)},
    {"origin: the port as a prefix", BYTES(OPEN("Origin: http://localhost:80801\r\n")), ANSWER(403)},
    {"origin: the host as a suffix", BYTES(OPEN("Origin: http://evillocalhost:8080\r\n")), ANSWER(403)},
    {"origin: the host as a user", BYTES(OPEN("Origin: http://localhost:8080@evil.example\r\n")),
     ANSWER(403)},
    {"origin: the host as a path", BYTES(OPEN("Origin: http://evil.example/localhost:8080\r\n")),
     ANSWER(403)},
    {"origin: null", BYTES(OPEN("Origin: null\r\n")), ANSWER(403)},
    {"origin: empty", BYTES(OPEN("Origin:\r\n")), ANSWER_OR(403, 400)},
    {"origin: no scheme", BYTES(OPEN("Origin: localhost:8080\r\n")), ANSWER(403)},
    {"origin: with a path", BYTES(OPEN("Origin: http://localhost:8080/\r\n")), ANSWER(403)},
    {"origin: a list", BYTES(OPEN("Origin: http://evil.example http://localhost:8080\r\n")), ANSWER(403)},
    {"origin: a list with commas", BYTES(OPEN("Origin: http://localhost:8080, http://evil.example\r\n")),
     ANSWER(403)},
    {"origin: the host as a password", BYTES(OPEN("Origin: http://x:localhost:8080@evil.example\r\n")), ANSWER(403)},
    {"origin: the host behind another", BYTES(OPEN("Origin: http://evil.example://localhost:8080\r\n")), ANSWER(403)},
    {"origin: a star", BYTES(OPEN("Origin: *\r\n")), ANSWER(403)},
    {"origin: the absolute target's host", BYTES("GET http://a.example/ HTTP/1.1\r\n" HOST
     "Origin: http://a.example\r\n" WS_HEADERS "\r\n"), ACCEPTED},
    {"origin: not the Host, with an absolute target", BYTES("GET http://a.example/ HTTP/1.1\r\n" HOST
     "Origin: http://localhost:8080\r\n" WS_HEADERS "\r\n"), ANSWER(403)},
    {"origin: no Host, HTTP/1.0", BYTES("GET /send?message=x HTTP/1.0\r\nOrigin: http://localhost\r\n\r\n"),
     ANSWER(403)},
    {"origin: two", BYTES(OPEN("Origin: http://localhost:8080\r\nOrigin: http://evil.example\r\n")),
     ANSWER_OR(400, 403)},
    {"origin: /send from the page", BYTES("GET /send?message=x HTTP/1.1\r\n" HOST
     "Origin: http://localhost:8080\r\n\r\n"), SAYS(200, "message sent")},
    {"origin: /send from elsewhere", BYTES("GET /send?message=x&channel=evil HTTP/1.1\r\n" HOST
     "Origin: http://evil.example\r\n\r\n"), ANSWER(403)},
    {"origin: /send from an image on another site", BYTES("GET /send?message=x HTTP/1.1\r\nHost: localhost:8080\r\n"
     "Sec-Fetch-Site: cross-site\r\n\r\n"), ANSWER(403)},
    {"origin: /send from an image on another host of the site", BYTES("GET /send?message=x HTTP/1.1\r\nHost: localhost:8080\r\n"
     "Sec-Fetch-Site: same-site\r\n\r\n"), ANSWER(403)},
    {"origin: /send from an image on our page", BYTES("GET /send?message=x HTTP/1.1\r\nHost: localhost:8080\r\n"
     "Sec-Fetch-Site: same-origin\r\n\r\n"), SAYS(200, "message sent")},
    {"origin: /send typed into the address bar", BYTES("GET /send?message=x HTTP/1.1\r\nHost: localhost:8080\r\n"
     "Sec-Fetch-Site: none\r\n\r\n"), SAYS(200, "message sent")},
    {"origin: the page linked to from another site", BYTES("GET / HTTP/1.1\r\nHost: localhost:8080\r\n"
     "Sec-Fetch-Site: cross-site\r\n\r\n"), ANSWER(200)},
    {"origin: POST /send from elsewhere", BYTES("POST /send?channel=evil HTTP/1.1\r\n" HOST
     "Origin: http://evil.example\r\nContent-Length: 1\r\n" "\r\nx"), ANSWER(403)},
    {"origin: nothing was sent", BYTES(GET("/messages?channel=evil")), SAYS(200, "[]")},
    {"origin: the page may be read from elsewhere", BYTES(GET_WITH("Origin: http://evil.example\r\n")),
     HAS(200, "!Access-Control-Allow-Origin")},
};
/* clang-format on */

/* clang-format off */
static const struct exchange allowed_cases[] = {
    {"-o: the first", BYTES(OPEN("Origin: https://one.example\r\n")), ACCEPTED},
    {"-o: the second", BYTES(OPEN("Origin: http://two.example:81\r\n")), ACCEPTED},
    {"-o: the same host still", BYTES(OPEN("Origin: http://localhost:8080\r\n")), ACCEPTED},
    {"-o: another port", BYTES(OPEN("Origin: http://two.example\r\n")), ANSWER(403)},
    {"-o: a longer host", BYTES(OPEN("Origin: https://one.example.org\r\n")), ANSWER(403)},
    {"-o: a subdomain", BYTES(OPEN("Origin: https://a.one.example\r\n")), ANSWER(403)},
    {"-o: /send", BYTES("GET /send?message=x HTTP/1.1\r\n" HOST "Origin: https://one.example\r\n\r\n"),
     SAYS(200, "message sent")},
    {"-o: /send from elsewhere", BYTES("GET /send?message=x HTTP/1.1\r\n" HOST
     "Origin: https://three.example\r\n\r\n"), ANSWER(403)},
};
/* clang-format on */

/* clang-format off */
static const struct exchange any_origin_cases[] = {
    {"-o '*': any", BYTES(OPEN("Origin: http://evil.example\r\n")), ACCEPTED},
    {"-o '*': null", BYTES(OPEN("Origin: null\r\n")), ACCEPTED},
    {"-o '*': /send", BYTES("GET /send?message=x HTTP/1.1\r\n" HOST "Origin: http://evil.example\r\n\r\n"),
     SAYS(200, "message sent")},
};
/* clang-format on */

static void open_test(void) {
    struct server s = { 0 };
    struct peer *p;
    unsigned char bytes[600];
    size_t n;

    if (!START(&s, "-b", "none")) return;
    run_exchanges(s.port, open_cases, COUNT(open_cases));

    begin("open: frames in the same write as the request");
    p = peer_open(s.port);
    n = (size_t)sprintf((char *)bytes, "%s", OPEN(""));
    n += ws_encode(bytes + n, TEXT, true, 0, "early", 5);
    n += ws_encode(bytes + n, PING, true, 0, "p", 1);
    n += ws_encode(bytes + n, CLOSE, true, 0, "\3\350", 2);
    peer_send(p, bytes, n);
    ws_opened(p);
    for (bool pong = false, text = false; !pong || !text;) {
        struct frame f;

        if (!expect(ws_next(p, &f) && f.first != CLOSE, "text %d, pong %d",
                    text, pong))
            break;
        text |= f.first == TEXT && f.length == 5;
        pong |= f.first == PONG && f.length == 1;
    }
    ws_expect(p, CLOSE, "\3\350", 2);
    expect_end(p);
    peer_close(p);
    finish();

    begin("open: a 426, then version 13 on the same connection");
    p = peer_open(s.port);
    peer_text(p, ASK("Upgrade: websocket\r\nConnection: Upgrade\r\n" KEY
                     "Sec-WebSocket-Version: 8\r\n"));
    {
        struct response r;

        read_response(p, false, &r);
        expect(r.status == 426, "status %d", r.status);
    }
    peer_text(p, OPEN(""));
    ws_opened(p);
    ws_text(p, "agreed");
    ws_expect_text(p, "agreed");
    peer_close(p);
    finish();

    begin("open: after other requests on the same connection");
    p = peer_open(s.port);
    peer_text(p, GET("/nothing") OPEN(""));
    {
        struct response r;

        read_response(p, false, &r);
        expect_body(&r, "not found");
    }
    ws_opened(p);
    ws_text(p, "later");
    ws_expect_text(p, "later");
    peer_close(p);
    finish();
    server_stop(&s, "opening");

    if (!START(&s, "-b", "none", "-o", "https://one.example", "--origin",
               "http://two.example:81"))
        return;
    run_exchanges(s.port, allowed_cases, COUNT(allowed_cases));
    server_stop(&s, "-o");
    if (!START(&s, "-b", "none", "-o", "*")) return;
    run_exchanges(s.port, any_origin_cases, COUNT(any_origin_cases));
    server_stop(&s, "-o '*'");
}

/* ---- WebSocket frames -------------------------------------------------- */

/* A piece of what a client sends, or a frame that it expects. */
struct piece {
    enum { NOTHING, FRAME, RAW, CLOSED } kind;
    int first;        /* FIN, RSV, opcode; for CLOSED the code */
    const char *text; /* the payload, or the raw bytes */
    size_t length;    /* of the text */
    size_t repeat;    /* the payload is the text so many times (0 is 1) */
    size_t times;     /* the frame is sent so many times (0 is 1) */
    int form;         /* bits of the length: 7, 16, 64; 0 for the shortest */
    bool bare;        /* not masked */
    int or_code;      /* CLOSED: this code is as good */
};

#define LIT(s) .text = (s), .length = sizeof(s) - 1
#define F(first_, s) \
    { .kind = FRAME, .first = (first_), LIT(s) }
#define BIG(first_, s, n) \
    { .kind = FRAME, .first = (first_), LIT(s), .repeat = n }
#define MANY(first_, s, n) \
    { .kind = FRAME, .first = (first_), LIT(s), .times = n }
#define FORM(bits, first_, s, n) \
    { .kind = FRAME, .first = (first_), LIT(s), .repeat = n, .form = bits }
#define BARE(first_, s) \
    { .kind = FRAME, .first = (first_), LIT(s), .bare = true }
#define RAWS(s) \
    { .kind = RAW, LIT(s) }
#define END(code) \
    { .kind = CLOSED, .first = (code) }
#define END_OR(code, or_) \
    { .kind = CLOSED, .first = (code), .or_code = (or_) }

/* What a client sends and what it gets. Data frames are what every client of
 * the channel gets; pongs and the close go to this one alone. A case without
 * a close at its end must leave the connection usable. */
struct framing {
    const char *name;
    struct piece sends[9];
    struct piece gets[8];
};

/* clang-format off */
static const struct framing framing_cases[] = {
    /* 5.2, 5.6: lengths and forms */
    {"text of 0 bytes", {F(TEXT, "")}, {F(TEXT, "")}},
    {"text of 1 byte", {F(TEXT, "a")}, {F(TEXT, "a")}},
    {"text of 125 bytes", {BIG(TEXT, "a", 125)}, {BIG(TEXT, "a", 125)}},
    {"text of 126 bytes", {BIG(TEXT, "a", 126)}, {BIG(TEXT, "a", 126)}},
    {"text of 127 bytes", {BIG(TEXT, "a", 127)}, {BIG(TEXT, "a", 127)}},
    {"text of 128 bytes", {BIG(TEXT, "a", 128)}, {BIG(TEXT, "a", 128)}},
    {"text of 65535 bytes", {BIG(TEXT, "a", 65535)}, {BIG(TEXT, "a", 65535)}},
    {"text of 65536 bytes", {BIG(TEXT, "a", 65536)}, {BIG(TEXT, "a", 65536)}},
    {"binary of 0 bytes", {F(BINARY, "")}, {F(BINARY, "")}},
    {"binary of 1 byte", {F(BINARY, "\0")}, {F(BINARY, "\0")}},
    {"binary of 125 bytes", {BIG(BINARY, "\376", 125)}, {BIG(BINARY, "\376", 125)}},
    {"binary of 126 bytes", {BIG(BINARY, "\376", 126)}, {BIG(BINARY, "\376", 126)}},
    {"binary of 127 bytes", {BIG(BINARY, "\376", 127)}, {BIG(BINARY, "\376", 127)}},
    {"binary of 65535 bytes", {BIG(BINARY, "\376", 65535)}, {BIG(BINARY, "\376", 65535)}},
    {"binary of 65536 bytes", {BIG(BINARY, "\376", 65536)}, {BIG(BINARY, "\376", 65536)}},
    {"binary may be what text may not", {F(BINARY, "\xc0\xaf\xff\0")}, {F(BINARY, "\xc0\xaf\xff\0")}},
    {"text with a NUL", {F(TEXT, "a\0b")}, {F(TEXT, "a\0b")}},
    {"text that looks like a frame", {F(TEXT, "\x01\x05Hello")}, {F(TEXT, "\x01\x05Hello")}},
    {"three messages in one write", {F(TEXT, "a"), F(BINARY, "b"), F(TEXT, "c")}, {F(TEXT, "a"), F(BINARY, "b"), F(TEXT, "c")}},
    {"1,000 messages in one write, kept apart", {MANY(TEXT, "", 1000), F(TEXT, "end")}, {MANY(TEXT, "", 1000), F(TEXT, "end")}},
    {"0 bytes in 16 bits of length", {FORM(16, TEXT, "", 1)}, {END(1002)}},
    {"5 bytes in 16 bits of length", {FORM(16, TEXT, "a", 5)}, {END(1002)}},
    {"125 bytes in 16 bits of length", {FORM(16, TEXT, "a", 125)}, {END(1002)}},
    {"126 bytes in 16 bits of length", {FORM(16, TEXT, "a", 126)}, {BIG(TEXT, "a", 126)}},
    {"5 bytes in 64 bits of length", {FORM(64, TEXT, "a", 5)}, {END(1002)}},
    {"125 bytes in 64 bits of length", {FORM(64, BINARY, "a", 125)}, {END(1002)}},
    {"126 bytes in 64 bits of length", {FORM(64, TEXT, "a", 126)}, {END(1002)}},
    {"65535 bytes in 64 bits of length", {FORM(64, TEXT, "a", 65535)}, {END(1002)}},
    {"65536 bytes in 64 bits of length", {FORM(64, TEXT, "a", 65536)}, {BIG(TEXT, "a", 65536)}},
    {"a fragment in too many bits of length", {F(0x01, "a"), FORM(16, 0x80, "b", 1)}, {END(1002)}},
    {"a ping in 16 bits of length", {FORM(16, PING, "a", 5)}, {END(1002)}},
    {"text of 124 bytes", {BIG(TEXT, "a", 124)}, {BIG(TEXT, "a", 124)}},
    {"text of 255 bytes", {BIG(TEXT, "a", 255)}, {BIG(TEXT, "a", 255)}},
    {"text of 256 bytes", {BIG(TEXT, "a", 256)}, {BIG(TEXT, "a", 256)}},
    {"text of 257 bytes", {BIG(TEXT, "a", 257)}, {BIG(TEXT, "a", 257)}},
    {"binary of 128 bytes", {BIG(BINARY, "\200", 128)}, {BIG(BINARY, "\200", 128)}},
    {"binary of 32767 bytes", {BIG(BINARY, "a", 32767)}, {BIG(BINARY, "a", 32767)}},
    {"binary of 32768 bytes", {BIG(BINARY, "a", 32768)}, {BIG(BINARY, "a", 32768)}},
    {"text of 65534 bytes", {BIG(TEXT, "a", 65534)}, {BIG(TEXT, "a", 65534)}},
    {"127 bytes in 16 bits of length", {FORM(16, BINARY, "a", 127)}, {BIG(BINARY, "a", 127)}},
    {"124 bytes in 16 bits of length", {FORM(16, BINARY, "a", 124)}, {END(1002)}},
    {"0 bytes in 64 bits of length", {FORM(64, TEXT, "", 1)}, {END(1002)}},
    {"256 bytes in 64 bits of length", {FORM(64, TEXT, "a", 256)}, {END(1002)}},
    {"65534 bytes in 64 bits of length", {FORM(64, BINARY, "a", 65534)}, {END(1002)}},
    {"a first fragment in too many bits", {FORM(16, 0x01, "a", 3)}, {END(1002)}},
    {"a first fragment of 126 bytes", {FORM(16, 0x01, "a", 126), F(0x80, "b")}, {FORM(16, 0x81, "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaab", 1)}},
    {"a continuation of 126 bytes", {F(0x02, ""), FORM(16, 0x80, "a", 126)}, {BIG(BINARY, "a", 126)}},
    {"a continuation of 65536 bytes", {F(0x02, ""), FORM(64, 0x80, "a", 65536)}, {BIG(BINARY, "a", 65536)}},
    {"a ping in 64 bits of length", {FORM(64, PING, "a", 5)}, {END(1002)}},
    {"a pong in 16 bits of length", {FORM(16, PONG, "", 1)}, {END(1002)}},
    {"a close in 16 bits of length", {FORM(16, CLOSE, "\3\350", 1)}, {END(1002)}},
    {"a close in 64 bits of length", {FORM(64, CLOSE, "\3\350", 1)}, {END(1002)}},
    {"too many bits of length, no payload yet", {RAWS("\x81\xfe\0\5mask")}, {END(1002)}},
    {"far too many bits of length, no payload yet", {RAWS("\x81\xff\0\0\0\0\0\0\0\5mask")}, {END(1002)}},
    {"a message behind a binary of its bytes", {F(BINARY, "\x81\x80\0\0\0\0"), F(TEXT, "a")}, {F(BINARY, "\x81\x80\0\0\0\0"), F(TEXT, "a")}},

    /* too big: 7.4.1 */
    {"65537 bytes", {BIG(TEXT, "a", 65537)}, {END(1009)}},
    {"65537 bytes of binary", {BIG(BINARY, "a", 65537)}, {END(1009)}},
    {"65537 bytes announced, none sent", {RAWS("\x81\xff\0\0\0\0\0\1\0\1mask")}, {END(1009)}},
    {"2^32 bytes announced", {RAWS("\x82\xff\0\0\0\1\0\0\0\0mask")}, {END(1009)}},
    {"2^63 - 1 bytes announced", {RAWS("\x82\xff\x7f\xff\xff\xff\xff\xff\xff\xff" "mask")}, {END(1009)}},
    {"2^63 bytes announced", {RAWS("\x82\xff\x80\0\0\0\0\0\0\0mask")}, {END_OR(1002, 1009)}},
    {"2^64 - 1 bytes announced", {RAWS("\x82\xff\xff\xff\xff\xff\xff\xff\xff\xff" "mask")}, {END_OR(1002, 1009)}},
    {"2^64 - 1 bytes announced in a fragment", {F(0x02, "a"), RAWS("\x80\xff\xff\xff\xff\xff\xff\xff\xff\xff" "mask")}, {END_OR(1002, 1009)}},
    {"2^63 - 1 bytes announced in a fragment", {F(0x02, "a"), RAWS("\x80\xff\x7f\xff\xff\xff\xff\xff\xff\xff" "mask")}, {END(1009)}},
    {"fragments of 65536 bytes together", {BIG(0x01, "a", 65000), BIG(0x80, "a", 536)}, {BIG(TEXT, "a", 65536)}},
    {"fragments of 65537 bytes together", {BIG(0x01, "a", 65000), BIG(0x80, "a", 537)}, {END(1009)}},
    {"fragments without an end beyond the limit", {BIG(0x01, "a", 65000), BIG(0x00, "a", 537)}, {END(1009)}},
    {"control frames do not count", {BIG(0x01, "a", 65000), BIG(PING, "p", 125), BIG(0x80, "a", 536)}, {BIG(PONG, "p", 125), BIG(TEXT, "a", 65536)}},
    {"a new message counts anew", {BIG(TEXT, "a", 65536), BIG(TEXT, "b", 65536)}, {BIG(TEXT, "a", 65536), BIG(TEXT, "b", 65536)}},
    {"empty fragments without an end are no size", {F(0x01, ""), MANY(0x00, "", 3000), F(0x80, "a")}, {F(TEXT, "a")}},
    {"a message before the one that is too big", {F(TEXT, "a"), BIG(TEXT, "a", 65537)}, {F(TEXT, "a"), END(1009)}},
    {"65537 bytes announced in a first fragment", {RAWS("\x01\xff\0\0\0\0\0\1\0\1mask")}, {END(1009)}},
    {"65536 bytes announced in a second fragment", {F(0x01, "a"), RAWS("\x80\xff\0\0\0\0\0\1\0\0mask")}, {END(1009)}},
    {"2^31 bytes announced", {RAWS("\x82\xff\0\0\0\0\x80\0\0\0mask")}, {END(1009)}},
    {"2^32 - 1 bytes announced", {RAWS("\x82\xff\0\0\0\0\xff\xff\xff\xffmask")}, {END(1009)}},
    {"2^32 + 5 bytes announced", {RAWS("\x82\xff\0\0\0\1\0\0\0\5mask")}, {END(1009)}},
    {"2^63 + 5 bytes announced", {RAWS("\x82\xff\x80\0\0\0\0\0\0\5mask")}, {END_OR(1002, 1009)}},
    {"too big is seen before the text is read", {RAWS("\x81\xff\0\0\0\0\0\1\0\1\0\0\0\0\xff")}, {END_OR(1009, 1007)}},

    /* 5.2: RSV */
    {"RSV1 in text", {F(0xc1, "a")}, {END(1002)}},
    {"RSV2 in text", {F(0xa1, "a")}, {END(1002)}},
    {"RSV3 in text", {F(0x91, "a")}, {END(1002)}},
    {"all RSV in binary", {F(0xf2, "a")}, {END(1002)}},
    {"RSV1 in a ping", {F(0xc9, "")}, {END(1002)}},
    {"RSV2 in a pong", {F(0xaa, "")}, {END(1002)}},
    {"RSV3 in a close", {F(0x98, "\3\350")}, {END(1002)}},
    {"RSV1 in a continuation", {F(0x01, "a"), F(0xc0, "b")}, {END(1002)}},
    {"RSV1 in a first fragment", {F(0x41, "a")}, {END(1002)}},
    {"RSV1 after a message", {F(TEXT, "a"), F(0xc1, "b")}, {F(TEXT, "a"), END(1002)}},
    {"RSV1 is seen before the length", {RAWS("\xc1\xff")}, {END(1002)}},
    {"RSV1 in binary", {F(0xc2, "a")}, {END(1002)}},
    {"RSV2 in binary", {F(0xa2, "a")}, {END(1002)}},
    {"RSV3 in binary", {F(0x92, "a")}, {END(1002)}},
    {"RSV2 in a ping", {F(0xa9, "")}, {END(1002)}},
    {"RSV3 in a ping", {F(0x99, "")}, {END(1002)}},
    {"RSV1 in a pong", {F(0xca, "")}, {END(1002)}},
    {"RSV3 in a pong", {F(0x9a, "")}, {END(1002)}},
    {"RSV1 in a close", {F(0xc8, "\3\350")}, {END(1002)}},
    {"RSV2 in a close", {F(0xa8, "")}, {END(1002)}},
    {"RSV2 in a continuation", {F(0x01, "a"), F(0xa0, "b")}, {END(1002)}},
    {"RSV3 in a continuation", {F(0x01, "a"), F(0x10, "b")}, {END(1002)}},
    {"RSV2 in a first fragment", {F(0x22, "a")}, {END(1002)}},
    {"RSV1 in an empty text", {F(0xc1, "")}, {END(1002)}},
    {"RSV1 in a ping between fragments", {F(0x01, "a"), F(0xc9, ""), F(0x80, "b")}, {END(1002)}},
    {"RSV1 and a reserved opcode", {F(0xc3, "a")}, {END(1002)}},
    {"a message deflated unasked", {F(0xc1, "\xf2\x48\xcd\xc9\xc9\x07\x00")}, {END(1002)}},

    /* 5.2: reserved opcodes */
    {"opcode 3", {F(0x83, "a")}, {END(1002)}},
    {"opcode 4", {F(0x84, "a")}, {END(1002)}},
    {"opcode 5", {F(0x85, "")}, {END(1002)}},
    {"opcode 6", {F(0x86, "a")}, {END(1002)}},
    {"opcode 7", {F(0x87, "a")}, {END(1002)}},
    {"opcode 11", {F(0x8b, "a")}, {END(1002)}},
    {"opcode 12", {F(0x8c, "")}, {END(1002)}},
    {"opcode 13", {F(0x8d, "a")}, {END(1002)}},
    {"opcode 14", {F(0x8e, "a")}, {END(1002)}},
    {"opcode 15", {F(0x8f, "a")}, {END(1002)}},
    {"opcode 3 without FIN", {F(0x03, "a")}, {END(1002)}},
    {"opcode 11 between fragments", {F(0x01, "a"), F(0x8b, ""), F(0x80, "b")}, {END(1002)}},
    {"opcode 3 between fragments", {F(0x01, "a"), F(0x83, ""), F(0x80, "b")}, {END(1002)}},
    {"opcode 4 without FIN", {F(0x04, "a")}, {END(1002)}},
    {"opcode 5 without FIN", {F(0x05, "a")}, {END(1002)}},
    {"opcode 6 without FIN", {F(0x06, "a")}, {END(1002)}},
    {"opcode 7 without FIN", {F(0x07, "a")}, {END(1002)}},
    {"opcode 11 without FIN", {F(0x0b, "")}, {END(1002)}},
    {"opcode 15 without FIN", {F(0x0f, "")}, {END(1002)}},
    {"opcode 4 between fragments", {F(0x01, "a"), F(0x84, ""), F(0x80, "b")}, {END(1002)}},
    {"opcode 7 between fragments", {F(0x02, "a"), F(0x87, ""), F(0x80, "b")}, {END(1002)}},
    {"opcode 15 between fragments", {F(0x01, "a"), F(0x8f, ""), F(0x80, "b")}, {END(1002)}},
    {"opcode 3 after a message", {F(TEXT, "a"), F(0x83, "b")}, {F(TEXT, "a"), END(1002)}},
    {"opcode 11 after a ping", {F(PING, "a"), F(0x8b, "b")}, {F(PONG, "a"), END(1002)}},
    {"opcode 3 of 65536 bytes, none sent", {RAWS("\x83\xff\0\0\0\0\0\1\0\0mask")}, {END(1002)}},
    {"opcode 13 of 126 bytes, none sent", {RAWS("\x8d\xfe\0\x7emask")}, {END(1002)}},

    /* 5.1, 5.3: masks */
    {"text not masked", {BARE(TEXT, "a")}, {END(1002)}},
    {"an empty text not masked", {BARE(TEXT, "")}, {END(1002)}},
    {"binary not masked", {BARE(BINARY, "a")}, {END(1002)}},
    {"ping not masked", {BARE(PING, "")}, {END(1002)}},
    {"close not masked", {BARE(CLOSE, "\3\350")}, {END(1002)}},
    {"second fragment not masked", {F(0x01, "a"), BARE(0x80, "b")}, {END(1002)}},
    {"pong not masked", {BARE(PONG, "")}, {END(1002)}},
    {"first fragment not masked", {BARE(0x01, "a")}, {END(1002)}},
    {"text of 126 bytes not masked, none sent", {RAWS("\x81\x7e\0\x7e")}, {END(1002)}},
    {"text of 65536 bytes not masked, none sent", {RAWS("\x81\x7f\0\0\0\0\0\1\0\0")}, {END(1002)}},
    {"a message masked, the next not", {F(TEXT, "a"), BARE(TEXT, "b")}, {F(TEXT, "a"), END(1002)}},
    {"ping between fragments not masked", {F(0x01, "a"), BARE(PING, ""), F(0x80, "b")}, {END(1002)}},
    {"masked 2 bytes", {F(TEXT, "ab")}, {F(TEXT, "ab")}},
    {"masked 3 bytes", {F(TEXT, "abc")}, {F(TEXT, "abc")}},
    {"masked 4 bytes", {F(TEXT, "abcd")}, {F(TEXT, "abcd")}},
    {"masked 5 bytes", {F(TEXT, "abcde")}, {F(TEXT, "abcde")}},
    {"masked 7 bytes", {F(TEXT, "abcdefg")}, {F(TEXT, "abcdefg")}},
    {"masked 8 bytes", {F(TEXT, "abcdefgh")}, {F(TEXT, "abcdefgh")}},
    {"masked 9 bytes", {F(TEXT, "abcdefghi")}, {F(TEXT, "abcdefghi")}},
    {"masked 17 bytes", {F(TEXT, "abcdefghijklmnopq")}, {F(TEXT, "abcdefghijklmnopq")}},
    {"masked, in fragments of odd sizes", {F(0x01, "abcde"), F(0x00, "fgh"), F(0x00, "ijklmnopqrs"), F(0x80, "t")}, {F(TEXT, "abcdefghijklmnopqrst")}},
    {"a ping's mask is its own", {RAWS("\x01\x81\1\2\3\4\x60\x89\x82\x10\x20\x30\x40\x60\x50\x80\x81\5\6\7\x08\x67")}, {F(PONG, "pp"), F(TEXT, "ab")}},
    {"a mask of zeros", {RAWS("\x81\x82\0\0\0\0ab")}, {F(TEXT, "ab")}},
    {"a mask of ones", {RAWS("\x81\x82\xff\xff\xff\xff\x9e\x9d")}, {F(TEXT, "ab")}},
    {"each frame has its mask", {RAWS("\x01\x83\0\0\0\0abc\x80\x81\xff\xff\xff\xff\x9b")}, {F(TEXT, "abcd")}},

    /* 5.4: fragmentation */
    {"two fragments", {F(0x01, "ab"), F(0x80, "cd")}, {F(TEXT, "abcd")}},
    {"three fragments", {F(0x01, "a"), F(0x00, "b"), F(0x80, "c")}, {F(TEXT, "abc")}},
    {"binary fragments", {F(0x02, "\xff"), F(0x00, "\xfe"), F(0x80, "\0")}, {F(BINARY, "\xff\xfe\0")}},
    {"empty fragments", {F(0x01, ""), F(0x00, ""), F(0x80, "")}, {F(TEXT, "")}},
    {"empty binary fragments", {F(0x02, ""), F(0x80, "")}, {F(BINARY, "")}},
    {"empty first and last fragment", {F(0x01, ""), F(0x00, "a"), F(0x80, "")}, {F(TEXT, "a")}},
    {"1,000 fragments of a byte", {F(0x01, "a"), MANY(0x00, "a", 998), F(0x80, "a")}, {BIG(TEXT, "a", 1000)}},
    {"10,000 fragments of a byte", {F(0x02, "a"), MANY(0x00, "a", 9998), F(0x80, "a")}, {BIG(BINARY, "a", 10000)}},
    {"fragments that change the form of the length", {BIG(0x01, "a", 100), BIG(0x00, "a", 200), BIG(0x80, "a", 100)}, {BIG(TEXT, "a", 400)}},
    {"big fragments", {BIG(0x02, "ab", 10000), BIG(0x00, "ab", 10000), BIG(0x80, "ab", 10000)}, {BIG(BINARY, "ab", 30000)}},
    {"two fragmented messages", {F(0x01, "a"), F(0x80, "b"), F(0x02, "c"), F(0x80, "d")}, {F(TEXT, "ab"), F(BINARY, "cd")}},
    {"a message after a fragmented one", {F(0x01, "a"), F(0x80, "b"), F(TEXT, "c")}, {F(TEXT, "ab"), F(TEXT, "c")}},
    {"continuation of nothing", {F(0x80, "a")}, {END(1002)}},
    {"continuation of nothing, without FIN", {F(0x00, "a")}, {END(1002)}},
    {"an empty continuation of nothing", {F(0x80, "")}, {END(1002)}},
    {"continuation after a whole message", {F(TEXT, "a"), F(0x80, "b")}, {F(TEXT, "a"), END(1002)}},
    {"continuation after the last fragment", {F(0x01, "a"), F(0x80, "b"), F(0x80, "c")}, {F(TEXT, "ab"), END(1002)}},
    {"text inside a fragmented text", {F(0x01, "a"), F(TEXT, "b")}, {END(1002)}},
    {"a first fragment inside a fragmented text", {F(0x01, "a"), F(0x01, "b")}, {END(1002)}},
    {"binary inside a fragmented text", {F(0x01, "a"), F(BINARY, "b")}, {END(1002)}},
    {"text inside a fragmented binary", {F(0x02, "a"), F(0x00, "b"), F(TEXT, "c")}, {END(1002)}},
    {"text after empty first fragment", {F(0x01, ""), F(TEXT, "b")}, {END(1002)}},
    {"binary inside a fragmented binary", {F(0x02, "a"), F(BINARY, "b")}, {END(1002)}},
    {"a first binary fragment inside a fragmented binary", {F(0x02, "a"), F(0x02, "b")}, {END(1002)}},
    {"a first binary fragment inside a fragmented text", {F(0x01, "a"), F(0x02, "b")}, {END(1002)}},
    {"an empty text inside a fragmented text", {F(0x01, "a"), F(TEXT, "")}, {END(1002)}},
    {"text inside a fragmented text, after a ping", {F(0x01, "a"), F(PING, "p"), F(TEXT, "b")}, {F(PONG, "p"), END(1002)}},
    {"text inside a fragmented text, nothing of it sent", {F(0x01, "a"), RAWS("\x81\xfd" "mask")}, {END(1002)}},
    {"continuation of nothing, nothing of it sent", {RAWS("\x80\xfd" "mask")}, {END(1002)}},
    {"continuation of nothing, after a ping", {F(PING, "p"), F(0x80, "a")}, {F(PONG, "p"), END(1002)}},
    {"continuation of nothing, after a fragmented message", {F(0x02, "a"), F(0x80, "b"), F(0x00, "c")}, {F(BINARY, "ab"), END(1002)}},
    {"continuation after an empty message", {F(TEXT, ""), F(0x80, "")}, {F(TEXT, ""), END(1002)}},
    {"control frames alone make no message", {F(PING, "a"), F(PONG, "b"), F(TEXT, "c")}, {F(PONG, "a"), F(TEXT, "c")}},
    {"fragments with their FIN in an empty frame", {F(0x01, "a"), F(0x00, "b"), F(0x80, "")}, {F(TEXT, "ab")}},
    {"a fragment of 65536 bytes, then an empty one", {BIG(0x02, "a", 65536), F(0x80, "")}, {BIG(BINARY, "a", 65536)}},
    {"a fragment of 65536 bytes, then one of 1", {BIG(0x02, "a", 65536), F(0x80, "b")}, {END(1009)}},
    {"3,000 pings between fragments", {F(0x01, "a"), MANY(PING, "", 3000), F(0x80, "b")}, {MANY(PONG, "", 3000), F(TEXT, "ab")}},

    /* 5.5: control frames */
    {"ping of 0 bytes", {F(PING, "")}, {F(PONG, "")}},
    {"ping of 1 byte", {F(PING, "\xff")}, {F(PONG, "\xff")}},
    {"ping of bytes that are no UTF-8", {F(PING, "\0\xff\xfe\xc0")}, {F(PONG, "\0\xff\xfe\xc0")}},
    {"ping of 124 bytes", {BIG(PING, "p", 124)}, {BIG(PONG, "p", 124)}},
    {"ping of 125 bytes", {BIG(PING, "p", 125)}, {BIG(PONG, "p", 125)}},
    {"ping of 126 bytes", {BIG(PING, "p", 126)}, {END(1002)}},
    {"ping of 65536 bytes", {BIG(PING, "p", 65536)}, {END(1002)}},
    {"pong of 125 bytes, not asked for", {BIG(PONG, "p", 125)}, {{0}}},
    {"pong of 126 bytes", {BIG(PONG, "p", 126)}, {END(1002)}},
    {"pong of 0 bytes, not asked for", {F(PONG, "")}, {{0}}},
    {"a pong of each kind, then text", {F(PONG, ""), F(PONG, "x"), F(TEXT, "a")}, {F(TEXT, "a")}},
    {"ten pings in one write", {MANY(PING, "x", 10)}, {MANY(PONG, "x", 10)}},
    {"ping without FIN", {F(0x09, "")}, {END(1002)}},
    {"pong without FIN", {F(0x0a, "")}, {END(1002)}},
    {"close without FIN", {F(0x08, "\3\350")}, {END(1002)}},
    {"ping between fragments", {F(0x01, "ab"), F(PING, "x"), F(0x80, "cd")}, {F(PONG, "x"), F(TEXT, "abcd")}},
    {"pings between fragments", {F(0x01, "a"), F(PING, "x"), F(0x00, "b"), F(PING, "y"), F(0x80, "c")}, {F(PONG, "x"), F(PONG, "y"), F(TEXT, "abc")}},
    {"ping of 125 bytes between fragments", {F(0x02, "ab"), BIG(PING, "p", 125), F(0x80, "cd")}, {BIG(PONG, "p", 125), F(BINARY, "abcd")}},
    {"pong between fragments", {F(0x01, "a"), F(PONG, "x"), F(0x80, "b")}, {F(TEXT, "ab")}},
    {"close between fragments", {F(0x01, "a"), F(CLOSE, "\3\350")}, {END(1000)}},
    {"fragmented ping", {F(0x09, "a"), F(0x80, "b")}, {END(1002)}},
    {"ping before any message, then text", {F(PING, "x"), F(TEXT, "a")}, {F(PONG, "x"), F(TEXT, "a")}},
    {"ping of 125 zeros", {BIG(PING, "\0", 125)}, {BIG(PONG, "\0", 125)}},
    {"ping of 127 bytes", {BIG(PING, "p", 127)}, {END(1002)}},
    {"ping of 126 bytes, none sent", {RAWS("\x89\xfe")}, {END(1002)}},
    {"ping of 127 in 7 bits, none sent", {RAWS("\x89\xff")}, {END(1002)}},
    {"pong of 126 bytes, none sent", {RAWS("\x8a\xfe")}, {END(1002)}},
    {"close of 126 bytes, none sent", {RAWS("\x88\xfe")}, {END(1002)}},
    {"ping without FIN, none of it sent", {RAWS("\x09\x85")}, {END(1002)}},
    {"close without FIN, none of it sent", {RAWS("\x08\x82")}, {END(1002)}},
    {"ping without FIN between fragments", {F(0x01, "a"), F(0x09, ""), F(0x80, "b")}, {END(1002)}},
    {"pings are answered in their order", {F(PING, "1"), F(PING, "2"), F(PING, "3"), F(PING, "")}, {F(PONG, "1"), F(PONG, "2"), F(PONG, "3"), F(PONG, "")}},
    {"a ping with the payload of a close", {F(PING, "\3\350")}, {F(PONG, "\3\350")}},
    {"a ping with a frame in it", {F(PING, "\x88\x82\0\0\0\0\3\350")}, {F(PONG, "\x88\x82\0\0\0\0\3\350")}},
    {"a ping with the bytes of a bad text", {F(0x01, "\xe2\x82"), F(PING, "\xff\xff"), F(0x80, "\xac")}, {F(PONG, "\xff\xff"), F(TEXT, "\xe2\x82\xac")}},
    {"close between fragments, the rest comes after", {F(0x01, "a"), F(CLOSE, "\3\350"), F(0x80, "b")}, {END(1000)}},
    {"close without a code between fragments", {F(0x02, "a"), F(CLOSE, "")}, {END(0)}},
    {"pong of 125 bytes between fragments", {F(0x01, "a"), BIG(PONG, "p", 125), F(0x80, "b")}, {F(TEXT, "ab")}},
    {"1,000 pongs, not asked for", {MANY(PONG, "x", 1000), F(TEXT, "a")}, {F(TEXT, "a")}},

    /* 8.1: UTF-8, valid */
    {"UTF-8: U+007F", {F(TEXT, "\x7f")}, {F(TEXT, "\x7f")}},
    {"UTF-8: U+0080", {F(TEXT, "\xc2\x80")}, {F(TEXT, "\xc2\x80")}},
    {"UTF-8: U+07FF", {F(TEXT, "\xdf\xbf")}, {F(TEXT, "\xdf\xbf")}},
    {"UTF-8: U+0800", {F(TEXT, "\xe0\xa0\x80")}, {F(TEXT, "\xe0\xa0\x80")}},
    {"UTF-8: U+0FFF and U+1000", {F(TEXT, "\xe0\xbf\xbf\xe1\x80\x80")}, {F(TEXT, "\xe0\xbf\xbf\xe1\x80\x80")}},
    {"UTF-8: U+D7FF", {F(TEXT, "\xed\x9f\xbf")}, {F(TEXT, "\xed\x9f\xbf")}},
    {"UTF-8: U+E000", {F(TEXT, "\xee\x80\x80")}, {F(TEXT, "\xee\x80\x80")}},
    {"UTF-8: U+FEFF first", {F(TEXT, "\xef\xbb\xbf" "a")}, {F(TEXT, "\xef\xbb\xbf" "a")}},
    {"UTF-8: U+FFFD", {F(TEXT, "\xef\xbf\xbd")}, {F(TEXT, "\xef\xbf\xbd")}},
    {"UTF-8: U+FFFE and U+FFFF", {F(TEXT, "\xef\xbf\xbe\xef\xbf\xbf")}, {F(TEXT, "\xef\xbf\xbe\xef\xbf\xbf")}},
    {"UTF-8: U+10000", {F(TEXT, "\xf0\x90\x80\x80")}, {F(TEXT, "\xf0\x90\x80\x80")}},
    {"UTF-8: U+3FFFF and U+40000", {F(TEXT, "\xf0\xbf\xbf\xbf\xf1\x80\x80\x80")}, {F(TEXT, "\xf0\xbf\xbf\xbf\xf1\x80\x80\x80")}},
    {"UTF-8: U+10FFFF", {F(TEXT, "\xf4\x8f\xbf\xbf")}, {F(TEXT, "\xf4\x8f\xbf\xbf")}},
    {"UTF-8: Greek", {F(TEXT, "\xce\xba\xe1\xbd\xb9\xcf\x83\xce\xbc\xce\xb5")}, {F(TEXT, "\xce\xba\xe1\xbd\xb9\xcf\x83\xce\xbc\xce\xb5")}},
    {"UTF-8: 2 bytes cut by fragments", {F(0x01, "a\xc3"), F(0x80, "\xa9z")}, {F(TEXT, "a\xc3\xa9z")}},
    {"UTF-8: 3 bytes cut after 1", {F(0x01, "\xe2"), F(0x80, "\x82\xac")}, {F(TEXT, "\xe2\x82\xac")}},
    {"UTF-8: 3 bytes cut after 2", {F(0x01, "\xe2\x82"), F(0x80, "\xac")}, {F(TEXT, "\xe2\x82\xac")}},
    {"UTF-8: 4 bytes in 4 fragments", {F(0x01, "\xf0"), F(0x00, "\x9f"), F(0x00, "\x98"), F(0x80, "\x80")}, {F(TEXT, "\xf0\x9f\x98\x80")}},
    {"UTF-8: cut, with empty fragments", {F(0x01, "\xf0\x9f"), F(0x00, ""), F(0x00, "\x98\x80"), F(0x80, "")}, {F(TEXT, "\xf0\x9f\x98\x80")}},
    {"UTF-8: cut, with a ping between", {F(0x01, "\xe2\x82"), F(PING, "\xff"), F(0x80, "\xac")}, {F(PONG, "\xff"), F(TEXT, "\xe2\x82\xac")}},
    {"UTF-8: 65536 bytes of 4-byte characters", {BIG(TEXT, "\xf0\x9f\x98\x80", 16384)}, {BIG(TEXT, "\xf0\x9f\x98\x80", 16384)}},

    /* 8.1: UTF-8, not valid */
    {"not UTF-8: 80", {F(TEXT, "\x80")}, {END(1007)}},
    {"not UTF-8: BF", {F(TEXT, "\xbf")}, {END(1007)}},
    {"not UTF-8: a lone 80 after text", {F(TEXT, "abc\x80" "def")}, {END(1007)}},
    {"not UTF-8: C0 80", {F(TEXT, "\xc0\x80")}, {END(1007)}},
    {"not UTF-8: C0 AF", {F(TEXT, "\xc0\xaf")}, {END(1007)}},
    {"not UTF-8: C1 BF", {F(TEXT, "\xc1\xbf")}, {END(1007)}},
    {"not UTF-8: E0 80 80", {F(TEXT, "\xe0\x80\x80")}, {END(1007)}},
    {"not UTF-8: E0 9F BF", {F(TEXT, "\xe0\x9f\xbf")}, {END(1007)}},
    {"not UTF-8: ED A0 80", {F(TEXT, "\xed\xa0\x80")}, {END(1007)}},
    {"not UTF-8: ED AF BF ED BF BF", {F(TEXT, "\xed\xaf\xbf\xed\xbf\xbf")}, {END(1007)}},
    {"not UTF-8: ED BF BF", {F(TEXT, "\xed\xbf\xbf")}, {END(1007)}},
    {"not UTF-8: F0 80 80 80", {F(TEXT, "\xf0\x80\x80\x80")}, {END(1007)}},
    {"not UTF-8: F0 8F BF BF", {F(TEXT, "\xf0\x8f\xbf\xbf")}, {END(1007)}},
    {"not UTF-8: F4 90 80 80", {F(TEXT, "\xf4\x90\x80\x80")}, {END(1007)}},
    {"not UTF-8: F5 80 80 80", {F(TEXT, "\xf5\x80\x80\x80")}, {END(1007)}},
    {"not UTF-8: F7 BF BF BF", {F(TEXT, "\xf7\xbf\xbf\xbf")}, {END(1007)}},
    {"not UTF-8: F8 88 80 80 80", {F(TEXT, "\xf8\x88\x80\x80\x80")}, {END(1007)}},
    {"not UTF-8: FC 84 80 80 80 80", {F(TEXT, "\xfc\x84\x80\x80\x80\x80")}, {END(1007)}},
    {"not UTF-8: FE", {F(TEXT, "\xfe")}, {END(1007)}},
    {"not UTF-8: FF", {F(TEXT, "\xff")}, {END(1007)}},
    {"not UTF-8: C3 at the end", {F(TEXT, "a\xc3")}, {END(1007)}},
    {"not UTF-8: E2 82 at the end", {F(TEXT, "a\xe2\x82")}, {END(1007)}},
    {"not UTF-8: F0 9F 98 at the end", {F(TEXT, "a\xf0\x9f\x98")}, {END(1007)}},
    {"not UTF-8: C3 28", {F(TEXT, "\xc3(")}, {END(1007)}},
    {"not UTF-8: C3 C3 A9", {F(TEXT, "\xc3\xc3\xa9")}, {END(1007)}},
    {"not UTF-8: E2 28 A1", {F(TEXT, "\xe2(\xa1")}, {END(1007)}},
    {"not UTF-8: E2 82 28", {F(TEXT, "\xe2\x82(")}, {END(1007)}},
    {"not UTF-8: F0 9F 98 28", {F(TEXT, "\xf0\x9f\x98(")}, {END(1007)}},
    {"not UTF-8: C3 A9 A9", {F(TEXT, "\xc3\xa9\xa9")}, {END(1007)}},
    {"not UTF-8: the last byte of 65536", {BIG(TEXT, "a", 65533), F(0x01, "a"), F(0x80, "\xff")}, {BIG(TEXT, "a", 65533), END(1007)}},
    {"not UTF-8: a cut character at the last fragment", {F(0x01, "\xe2"), F(0x80, "\x82")}, {END(1007)}},
    {"not UTF-8: a cut character, then an empty end", {F(0x01, "\xe2\x82"), F(0x80, "")}, {END(1007)}},
    {"not UTF-8: fragments that do not join", {F(0x01, "\xe2\x82"), F(0x80, "(")}, {END(1007)}},
    {"not UTF-8: a message is not joined to the next", {F(TEXT, "\xe2\x82"), F(TEXT, "\xac")}, {END(1007)}},
    {"a new text begins anew after a binary", {F(BINARY, "\xe2\x82"), F(TEXT, "\xc2\xa9")}, {F(BINARY, "\xe2\x82"), F(TEXT, "\xc2\xa9")}},

    /* 8.1: at once, the message is not finished */
    {"fail fast: FF in a first fragment", {F(0x01, "ab\xff")}, {END(1007)}},
    {"fail fast: ED A0 in a first fragment", {F(0x01, "\xed\xa0")}, {END(1007)}},
    {"fail fast: F4 90 in a first fragment", {F(0x01, "\xf4\x90")}, {END(1007)}},
    {"fail fast: E0 80 in a first fragment", {F(0x01, "\xe0\x80")}, {END(1007)}},
    {"fail fast: F0 80 in a first fragment", {F(0x01, "\xf0\x80")}, {END(1007)}},
    {"fail fast: C0 in a first fragment", {F(0x01, "\xc0")}, {END(1007)}},
    {"fail fast: in a second fragment", {F(0x01, "ab"), F(0x00, "\x80")}, {END(1007)}},
    {"fail fast: at the border of fragments", {F(0x01, "\xf4"), F(0x00, "\x90")}, {END(1007)}},
    {"fail fast: FF in an unfinished frame", {RAWS("\x81\xe4\0\0\0\0ab\xff")}, {END(1007)}},
    {"fail fast: ED A0 in an unfinished frame", {RAWS("\x81\xe4\0\0\0\0\xed\xa0")}, {END(1007)}},
    {"fail fast: masked, in an unfinished frame", {RAWS("\x81\xe4\1\2\3\4\xfe")}, {END(1007)}},
    {"fail fast: in an unfinished big frame", {RAWS("\x81\xfe\xff\xff\0\0\0\0abcdefgh\xc1")}, {END(1007)}},
    {"fail fast: in an unfinished continuation", {F(0x01, "a"), RAWS("\x80\xe4\0\0\0\0\xf5")}, {END(1007)}},

    /* 5.5.1, 7.4: close */
    {"close without a code", {F(CLOSE, "")}, {END(0)}},
    {"close of 1 byte", {F(CLOSE, "\3")}, {END(1002)}},
    {"close 1000", {F(CLOSE, "\3\350")}, {END(1000)}},
    {"close 1000 with a reason", {F(CLOSE, "\3\350bye")}, {END(1000)}},
    {"close 1000 with a reason in Greek", {F(CLOSE, "\3\350\xce\xba\xe1\xbd\xb9")}, {END(1000)}},
    {"close with a reason of 123 bytes", {F(CLOSE, "\3\350" "123456789a123456789b123456789c123456789d123456789e123456789f123456789g123456789h123456789i123456789j123456789k123456789l123")}, {END(1000)}},
    {"close of 126 bytes", {BIG(CLOSE, "\3\350", 63)}, {END(1002)}},
    {"close 1001", {F(CLOSE, "\3\351")}, {END(1001)}},
    {"close 1002", {F(CLOSE, "\3\352")}, {END(1002)}},
    {"close 1003", {F(CLOSE, "\3\353")}, {END(1003)}},
    {"close 1007", {F(CLOSE, "\3\357")}, {END(1007)}},
    {"close 1008", {F(CLOSE, "\3\360")}, {END(1008)}},
    {"close 1009", {F(CLOSE, "\3\361")}, {END(1009)}},
    {"close 1010", {F(CLOSE, "\3\362")}, {END(1010)}},
    {"close 1011", {F(CLOSE, "\3\363")}, {END(1011)}},
    {"close 1012, registered later", {F(CLOSE, "\3\364")}, {END_OR(1012, 1002)}},
    {"close 1014, registered later", {F(CLOSE, "\3\366")}, {END_OR(1014, 1002)}},
    {"close 3000", {F(CLOSE, "\x0b\xb8")}, {END(3000)}},
    {"close 3999", {F(CLOSE, "\x0f\x9f")}, {END(3999)}},
    {"close 4000", {F(CLOSE, "\x0f\xa0")}, {END(4000)}},
    {"close 4999", {F(CLOSE, "\x13\x87")}, {END(4999)}},
    {"close 0", {F(CLOSE, "\0\0")}, {END(1002)}},
    {"close 1", {F(CLOSE, "\0\1")}, {END(1002)}},
    {"close 999", {F(CLOSE, "\3\347")}, {END(1002)}},
    {"close 1004", {F(CLOSE, "\3\354")}, {END(1002)}},
    {"close 1005", {F(CLOSE, "\3\355")}, {END(1002)}},
    {"close 1006", {F(CLOSE, "\3\356")}, {END(1002)}},
    {"close 1015", {F(CLOSE, "\3\367")}, {END(1002)}},
    {"close 1016", {F(CLOSE, "\3\370")}, {END(1002)}},
    {"close 1100", {F(CLOSE, "\4\114")}, {END(1002)}},
    {"close 2000", {F(CLOSE, "\7\320")}, {END(1002)}},
    {"close 2999", {F(CLOSE, "\x0b\xb7")}, {END(1002)}},
    {"close 5000", {F(CLOSE, "\x13\x88")}, {END(1002)}},
    {"close 65535", {F(CLOSE, "\xff\xff")}, {END(1002)}},
    {"close with a reason that is no UTF-8", {F(CLOSE, "\3\350\xce\xba\xff")}, {END_OR(1007, 1002)}},
    {"close with a reason cut in a character", {F(CLOSE, "\3\350\xe2\x82")}, {END_OR(1007, 1002)}},
    {"close 1013, registered later", {F(CLOSE, "\3\365")}, {END_OR(1013, 1002)}},
    {"close 1 in the high byte alone", {F(CLOSE, "\1\0")}, {END(1002)}},
    {"close 500", {F(CLOSE, "\1\364")}, {END(1002)}},
    {"close 998", {F(CLOSE, "\3\346")}, {END(1002)}},
    {"close 1017", {F(CLOSE, "\3\371")}, {END(1002)}},
    {"close 1099", {F(CLOSE, "\4\113")}, {END(1002)}},
    {"close 1999", {F(CLOSE, "\7\317")}, {END(1002)}},
    {"close 2500", {F(CLOSE, "\x09\xc4")}, {END(1002)}},
    {"close 3001", {F(CLOSE, "\x0b\xb9")}, {END(3001)}},
    {"close 3500", {F(CLOSE, "\x0d\xac")}, {END(3500)}},
    {"close 4001", {F(CLOSE, "\x0f\xa1")}, {END(4001)}},
    {"close 4500", {F(CLOSE, "\x11\x94")}, {END(4500)}},
    {"close 5001", {F(CLOSE, "\x13\x89")}, {END(1002)}},
    {"close 9999", {F(CLOSE, "\x27\x0f")}, {END(1002)}},
    {"close 32768", {F(CLOSE, "\x80\0")}, {END(1002)}},
    {"close 59395, 1000 with its bytes swapped", {F(CLOSE, "\350\3")}, {END(1002)}},
    {"close of 1 byte, 0", {F(CLOSE, "\0")}, {END(1002)}},
    {"close of 1 byte, FF", {F(CLOSE, "\xff")}, {END(1002)}},
    {"close of 1 byte between fragments", {F(0x01, "a"), F(CLOSE, "\3")}, {END(1002)}},
    {"close 1005 with a reason", {F(CLOSE, "\3\355none")}, {END(1002)}},
    {"close 3000 with a reason", {F(CLOSE, "\x0b\xb8why")}, {END(3000)}},
    {"close with a NUL in the reason", {F(CLOSE, "\3\350a\0b")}, {END(1000)}},
    {"close with U+10FFFF in the reason", {F(CLOSE, "\3\350\xf4\x8f\xbf\xbf")}, {END(1000)}},
    {"close with an overlong reason", {F(CLOSE, "\3\350\xc0\xaf")}, {END_OR(1007, 1002)}},
    {"close with a surrogate in the reason", {F(CLOSE, "\3\350\xed\xa0\x80")}, {END_OR(1007, 1002)}},
    {"close with a reason beyond U+10FFFF", {F(CLOSE, "\3\350\xf4\x90\x80\x80")}, {END_OR(1007, 1002)}},
    {"close with FF for a reason", {F(CLOSE, "\3\350\xff")}, {END_OR(1007, 1002)}},
    {"close with a reason that ends in F0 9F 98", {F(CLOSE, "\3\350ok \xf0\x9f\x98")}, {END_OR(1007, 1002)}},
    {"close with a bad code and a bad reason", {F(CLOSE, "\3\354\xff")}, {END_OR(1002, 1007)}},
    {"close with a reason cut after 123 bytes", {F(CLOSE, "\3\350" "123456789a123456789b123456789c123456789d123456789e123456789f123456789g123456789h123456789i123456789j123456789k123456789l12\xc3")}, {END_OR(1007, 1002)}},
    {"the reason's UTF-8 is not the message's", {F(0x01, "\xe2\x82"), F(CLOSE, "\3\350\xac")}, {END_OR(1007, 1002)}},
    {"a close is not the end of a bad text", {F(0x01, "\xe2\x82"), F(CLOSE, "\3\350")}, {END(1000)}},
    {"half a frame after a close", {F(CLOSE, "\3\350"), RAWS("\x81\xfe")}, {END(1000)}},
    {"a bad frame after a close", {F(CLOSE, "\3\350"), F(0xf3, "a")}, {END(1000)}},
    {"too big after a close", {F(CLOSE, "\3\350"), RAWS("\x82\xff\x7f\xff\xff\xff\xff\xff\xff\xff" "mask")}, {END(1000)}},
    {"1,000 pings after a close", {F(CLOSE, "\3\350"), MANY(PING, "x", 1000)}, {END(1000)}},
    {"three closes", {MANY(CLOSE, "\3\350", 3)}, {END(1000)}},
    {"a close after an error is not answered", {F(0x83, ""), F(CLOSE, "\3\350")}, {END(1002)}},
    {"a close in the payload is none", {F(BINARY, "\x88\x82\0\0\0\0\3\350"), F(CLOSE, "")}, {F(BINARY, "\x88\x82\0\0\0\0\3\350"), END(0)}},
    {"fragments, messages, pings, then a close", {F(0x01, "a"), F(PING, "p"), F(0x80, "b"), F(BINARY, "c"), F(PONG, ""), F(PING, "q"), F(TEXT, "d"), F(CLOSE, "\x0f\xa0")}, {F(PONG, "p"), F(TEXT, "ab"), F(BINARY, "c"), F(PONG, "q"), F(TEXT, "d"), END(4000)}},
    {"a second request instead of frames", {RAWS("\r\n\r\n")}, {END(1002)}},
    {"a TLS hello instead of frames", {RAWS("\026\003\001\002\0\001\0\001\374\003\003")}, {END(1002)}},
    {"nothing is answered after a close: ping", {F(CLOSE, "\3\350"), F(PING, "x")}, {END(1000)}},
    {"nothing is taken after a close: text", {F(CLOSE, "\3\350"), F(TEXT, "x")}, {END(1000)}},
    {"a second close is not answered", {F(CLOSE, "\3\350"), F(CLOSE, "\3\351")}, {END(1000)}},
    {"rubbish after a close", {F(CLOSE, "\3\350"), RAWS("\xff\xff\xff\xff\xff")}, {END(1000)}},
    {"nothing is taken after an error", {F(0x83, "a"), F(TEXT, "b"), F(PING, "c")}, {END(1002)}},
    {"only the first of two errors is answered", {F(TEXT, "\xff"), F(0x83, "a")}, {END(1007)}},
    {"a message, then a close", {F(TEXT, "a"), F(CLOSE, "\3\350")}, {F(TEXT, "a"), END(1000)}},
    {"a ping, then a close", {F(PING, "x"), F(CLOSE, "\3\350")}, {F(PONG, "x"), END(1000)}},
    {"HTTP instead of frames", {RAWS("GET / HTTP/1.1\r\nHost: a\r\n\r\n")}, {END(1002)}},
};
/* clang-format on */

/* The frame's payload, to free. */
static unsigned char *piece_payload(const struct piece *piece, size_t *n) {
    size_t repeat = piece->repeat ? piece->repeat : 1;
    unsigned char *bytes = malloc(repeat * piece->length + 1);

    *n = repeat * piece->length;
    for (size_t i = 0; i < repeat; i++)
        memcpy(bytes + i * piece->length, piece->text, piece->length);
    return bytes;
}

/* What the client sends, to free. */
static unsigned char *pieces_bytes(const struct piece *piece, size_t *n) {
    unsigned char *bytes = NULL;

    *n = 0;
    for (; piece->kind; piece++) {
        size_t length, times = piece->times ? piece->times : 1;
        unsigned char *payload = piece_payload(piece, &length);

        bytes = realloc(bytes, *n + times * (length + 14));
        if (piece->kind == RAW) memcpy(bytes + *n, payload, length);
        *n += piece->kind == RAW ? length : 0;
        for (size_t i = 0; piece->kind == FRAME && i < times; i++)
            *n += ws_encode(bytes + *n, piece->first, !piece->bare, piece->form,
                            payload, length);
        free(payload);
    }
    return bytes;
}

/* How far a reader has come in the frames that it expects. */
struct progress {
    const struct piece *at;
    size_t times;
};

/* The next expected frame of a kind: data, or control. */
static const struct piece *progress_next(struct progress *p, bool control) {
    size_t times = p->at->times ? p->at->times : 1;

    if (p->at->kind && p->times == times) {
        p->at++;
        p->times = 0;
    }
    while (p->at->kind &&
           (p->at->kind == CLOSED || (p->at->first & 8) != 0) != control)
        p->at++;
    p->times++;
    return p->at;
}

static void expect_piece(const struct piece *piece, const struct frame *f) {
    size_t n;
    unsigned char *payload;

    if (!piece->kind || piece->kind == CLOSED) {
        expect(false, "frame %02x %s, expected %s", (unsigned)f->first,
               shown(f->data, f->length), piece->kind ? "a close" : "none");
        return;
    }
    payload = piece_payload(piece, &n);
    expect(f->first == piece->first && f->length == n &&
               !memcmp(f->data, payload, n),
           "frame %02x %s, expected %02x %s", (unsigned)f->first,
           shown(f->data, f->length), (unsigned)piece->first,
           shown(payload, n));
    free(payload);
}

/* The client's close is due or has come: it is the last thing to come. */
static void expect_closed(struct peer *p, const struct piece *piece,
                          struct frame *f) {
    int code = close_code(f);

    expect(piece->kind == CLOSED, "close %d, expected %s", code,
           piece->kind ? "a pong" : "no close");
    expect(code == piece->first || (piece->or_code && code == piece->or_code),
           "close %d, expected %d", code, piece->first);
    ws_send(p, CLOSE, f->data, f->length); /* the answer; it may be late */
    expect_end(p);
}

/* The client reads until the close, or the pong to a last ping of its own. */
static void expect_at_client(struct peer *p, const struct framing *c) {
    struct progress data = { c->gets, 0 }, control = { c->gets, 0 };
    bool closes = false;
    struct frame f;

    for (const struct piece *piece = c->gets; piece->kind; piece++)
        closes |= piece->kind == CLOSED;
    if (!closes) ws_send(p, PING, "the last", 8);
    for (;;) {
        if (!ws_next(p, &f)) {
            expect(false, p->ended ? "closed without a close frame"
                                   : "no close or pong in time");
            return;
        }
        if (f.first == CLOSE) {
            expect_closed(p, progress_next(&control, true), &f);
            return;
        }
        if (!closes && f.first == PONG && f.length == 8 &&
            !memcmp(f.data, "the last", 8))
            break;
        if (f.first & 8) expect_piece(progress_next(&control, true), &f);
        else expect_piece(progress_next(&data, false), &f);
    }
    expect(!progress_next(&control, true)->kind, "a pong is missing");
    /* Its messages may come behind the pong. */
    for (const struct piece *piece = progress_next(&data, false); piece->kind;
         piece = progress_next(&data, false)) {
        if (!expect(ws_next(p, &f), "a message is missing")) return;
        expect_piece(piece, &f);
    }
}

/* Another client of the channel gets the messages and nothing else. */
static void expect_at_observer(struct peer *observer, const struct framing *c) {
    struct progress data = { c->gets, 0 };
    struct frame f;

    ws_text(observer, "end of the case");
    for (;;) {
        if (!expect(ws_next(observer, &f), "the observer is cut off")) return;
        if (f.length == 15 && !memcmp(f.data, "end of the case", 15)) break;
        expect_piece(progress_next(&data, false), &f);
    }
    expect(!progress_next(&data, false)->kind,
           "a message did not reach the observer");
}

static void framing_case(int port, const struct framing *c, bool chopped) {
    struct peer *observer, *p, *clock = NULL;
    size_t n;
    unsigned char *bytes = pieces_bytes(c->sends, &n);

    begin("frames: %s%s", c->name, chopped ? ", byte by byte" : "");
    observer = ws_open(port, "/?channel=frames");
    p = ws_open(port, "/?channel=frames");
    if (chopped) {
        clock = ws_open(port, "/?channel=clock");
        send_chopped(p, clock, bytes, n);
        peer_close(clock);
    } else {
        peer_send(p, bytes, n);
    }
    expect_at_client(p, c);
    expect_at_observer(observer, c);
    peer_close(p);
    peer_close(observer);
    finish();
    free(bytes);
}

/* Texts, and after how many of their bytes it is certain that they are not
 * UTF-8: 0 for a good one, CUT where the last character is not complete. */
#define CUT 100

/* clang-format off */
static const struct text_case {
    const char *text;
    size_t n, bad;
} utf8_cases[] = {
    /* the first and last of each length, and of each row of the table in
     * RFC 3629 4 */
    {BYTES("\x00"), 0},
    {BYTES("\x7f"), 0},
    {BYTES("\xc2\x80"), 0},
    {BYTES("\xdf\xbf"), 0},
    {BYTES("\xe0\xa0\x80"), 0},
    {BYTES("\xe0\xbf\xbf"), 0},
    {BYTES("\xe1\x80\x80"), 0},
    {BYTES("\xec\xbf\xbf"), 0},
    {BYTES("\xed\x80\x80"), 0},
    {BYTES("\xed\x9f\xbf"), 0},
    {BYTES("\xee\x80\x80"), 0},
    {BYTES("\xef\xbb\xbf"), 0},
    {BYTES("\xef\xbf\xbd"), 0},
    {BYTES("\xef\xbf\xbf"), 0},
    {BYTES("\xf0\x90\x80\x80"), 0},
    {BYTES("\xf0\xbf\xbf\xbf"), 0},
    {BYTES("\xf1\x80\x80\x80"), 0},
    {BYTES("\xf3\xbf\xbf\xbf"), 0},
    {BYTES("\xf4\x80\x80\x80"), 0},
    {BYTES("\xf4\x8f\xbf\xbf"), 0},
    {BYTES("\xc2\x80\xe0\xa0\x80\xf0\x90\x80\x80\x7f"), 0},
    /* no first byte */
    {BYTES("\x80"), 1},
    {BYTES("\x8f"), 1},
    {BYTES("\x90"), 1},
    {BYTES("\x9f"), 1},
    {BYTES("\xa0"), 1},
    {BYTES("\xbf"), 1},
    {BYTES("\xc0"), 1},
    {BYTES("\xc1"), 1},
    {BYTES("\xf5"), 1},
    {BYTES("\xf7"), 1},
    {BYTES("\xf8"), 1},
    {BYTES("\xfb"), 1},
    {BYTES("\xfc"), 1},
    {BYTES("\xfd"), 1},
    {BYTES("\xfe"), 1},
    {BYTES("\xff"), 1},
    /* no second byte: too small, too big, overlong, surrogate, > U+10FFFF */
    {BYTES("\xc2\x00"), 2},
    {BYTES("\xc2\x7f"), 2},
    {BYTES("\xc2\xc0"), 2},
    {BYTES("\xdf\x7f"), 2},
    {BYTES("\xdf\xc0"), 2},
    {BYTES("\xdf\xff"), 2},
    {BYTES("\xe0\x7f"), 2},
    {BYTES("\xe0\x80"), 2},
    {BYTES("\xe0\x9f"), 2},
    {BYTES("\xe0\xc0"), 2},
    {BYTES("\xe1\x7f"), 2},
    {BYTES("\xe1\xc0"), 2},
    {BYTES("\xec\x7f"), 2},
    {BYTES("\xec\xc0"), 2},
    {BYTES("\xed\x7f"), 2},
    {BYTES("\xed\xa0"), 2},
    {BYTES("\xed\xbf"), 2},
    {BYTES("\xed\xc0"), 2},
    {BYTES("\xee\x7f"), 2},
    {BYTES("\xee\xc0"), 2},
    {BYTES("\xef\x7f"), 2},
    {BYTES("\xef\xc0"), 2},
    {BYTES("\xf0\x7f"), 2},
    {BYTES("\xf0\x80"), 2},
    {BYTES("\xf0\x8f"), 2},
    {BYTES("\xf0\xc0"), 2},
    {BYTES("\xf1\x7f"), 2},
    {BYTES("\xf1\xc0"), 2},
    {BYTES("\xf3\x7f"), 2},
    {BYTES("\xf3\xc0"), 2},
    {BYTES("\xf4\x7f"), 2},
    {BYTES("\xf4\x90"), 2},
    {BYTES("\xf4\xbf"), 2},
    {BYTES("\xf4\xc0"), 2},
    /* no third byte */
    {BYTES("\xe0\xa0\x7f"), 3},
    {BYTES("\xe0\xa0\xc0"), 3},
    {BYTES("\xe1\x80\x7f"), 3},
    {BYTES("\xe1\xbf\xc0"), 3},
    {BYTES("\xed\x9f\x7f"), 3},
    {BYTES("\xed\x9f\xc0"), 3},
    {BYTES("\xef\xbf\x7f"), 3},
    {BYTES("\xef\xbf\xc0"), 3},
    {BYTES("\xf0\x90\x7f"), 3},
    {BYTES("\xf0\x90\xc0"), 3},
    {BYTES("\xf1\x80\x7f"), 3},
    {BYTES("\xf3\xbf\xc0"), 3},
    {BYTES("\xf4\x8f\x7f"), 3},
    {BYTES("\xf4\x8f\xc0"), 3},
    /* no fourth byte */
    {BYTES("\xf0\x90\x80\x7f"), 4},
    {BYTES("\xf0\x90\x80\xc0"), 4},
    {BYTES("\xf1\x80\x80\x7f"), 4},
    {BYTES("\xf3\xbf\xbf\xc0"), 4},
    {BYTES("\xf4\x8f\xbf\x7f"), 4},
    {BYTES("\xf4\x8f\xbf\xc0"), 4},
    /* behind eight bytes of ASCII, and in the middle of them */
    {BYTES("12345678" "\xff" "12345678"), 9},
    {BYTES("1234567" "\xc0"), 8},
    {BYTES("1234" "\xed\xa0" "12"), 6},
    {BYTES("1234567" "\xf4\x8f\xbf\xbf" "12345678"), 0},
    {BYTES("\xe2\x82\xac" "123456" "\xe2\x82" "1"), 12},
    {BYTES("12345678" "\xe2\x82"), CUT},
    /* one byte too few, or more */
    {BYTES("\xc2"), CUT},
    {BYTES("\xdf"), CUT},
    {BYTES("\xe0"), CUT},
    {BYTES("\xe0\xa0"), CUT},
    {BYTES("\xe1"), CUT},
    {BYTES("\xed"), CUT},
    {BYTES("\xed\x9f"), CUT},
    {BYTES("\xef"), CUT},
    {BYTES("\xef\xbf"), CUT},
    {BYTES("\xf0"), CUT},
    {BYTES("\xf0\x90"), CUT},
    {BYTES("\xf0\x90\x80"), CUT},
    {BYTES("\xf1"), CUT},
    {BYTES("\xf1\x80\x80"), CUT},
    {BYTES("\xf4"), CUT},
    {BYTES("\xf4\x8f"), CUT},
    {BYTES("\xf4\x8f\xbf"), CUT},
};
/* clang-format on */

/* The server has had enough: 1007, and nothing after it. */
static void expect_1007(struct peer *p) {
    struct frame f = { 0 };

    if (!expect(ws_next(p, &f), "no close frame")) return;
    expect(close_code(&f) == 1007, "frame %02x, close %d", (unsigned)f.first,
           close_code(&f));
    ws_send(p, CLOSE, f.data, f.length);
    expect_end(p);
}

/* All of the text has been sent. */
static void expect_verdict(struct peer *p, const struct text_case *c) {
    if (c->bad) expect_1007(p);
    else ws_expect(p, TEXT, c->text, c->n);
}

/* In two fragments, cut after `cut` bytes: the bad byte is answered at once,
 * in the first of them too, and not before it has come. */
static void utf8_cut(int port, const struct text_case *c, size_t cut) {
    struct peer *p = ws_open(port, "/?channel=utf8");

    ws_send(p, 0x01, c->text, cut);
    if (c->bad && c->bad <= cut) {
        expect_1007(p);
    } else {
        ws_sync(p);
        ws_send(p, 0x80, c->text + cut, c->n - cut);
        expect_verdict(p, c);
    }
    peer_close(p);
}

/* In a frame of which more bytes are announced than come. */
static void utf8_unfinished(int port, struct peer *clock,
                            const struct text_case *c) {
    struct peer *p = ws_open(port, "/?channel=utf8");
    size_t good = c->bad && c->bad != CUT ? c->bad - 1 : c->n;

    peer_send(p, "\x81\xe4\0\0\0\0", 6); /* 100 bytes */
    send_chopped(p, clock, c->text, good);
    peer_take(p);
    expect(p->start == p->end && !p->ended, "closed too early: %s",
           shown(p->in + p->start, p->end - p->start));
    if (good < c->n) {
        peer_send(p, c->text + good, 1);
        expect_1007(p);
    } else {
        char rest[100];

        memset(rest, 'x', sizeof rest);
        peer_send(p, rest, c->bad ? 1 : sizeof rest - good);
        if (c->bad) {
            expect_1007(p); /* an x in the middle of a character */
        } else {
            memmove(rest + good, rest, sizeof rest - good);
            memcpy(rest, c->text, good);
            ws_expect(p, TEXT, rest, sizeof rest);
        }
    }
    peer_close(p);
}

static void utf8_test(int port) {
    struct peer *clock = ws_open(port, "/?channel=clock"), *p;
    unsigned char bytes[100];

    for (size_t i = 0; i < COUNT(utf8_cases); i++) {
        const struct text_case *c = &utf8_cases[i];
        const char *kind = !c->bad         ? "UTF-8"
                           : c->bad == CUT ? "cut UTF-8"
                                           : "not UTF-8";
        char name[80];

        snprintf(name, sizeof name, "%s: %s", kind, shown(c->text, c->n));
        begin("%s, whole", name);
        p = ws_open(port, "/?channel=utf8");
        ws_send(p, TEXT, c->text, c->n);
        expect_verdict(p, c);
        peer_close(p);
        finish();

        begin("%s, byte by byte", name);
        p = ws_open(port, "/?channel=utf8");
        send_chopped(p, clock, bytes,
                     ws_encode(bytes, TEXT, true, 0, c->text, c->n));
        expect_verdict(p, c);
        peer_close(p);
        finish();

        begin("%s, in fragments cut at each byte", name);
        for (size_t cut = 0; cut <= c->n; cut++) utf8_cut(port, c, cut);
        finish();

        begin("%s, in an unfinished frame", name);
        utf8_unfinished(port, clock, c);
        finish();
    }
    peer_close(clock);
}

/* A close that the client begins: the connection ends, the chat goes on. An
 * end without one is not answered. */
static void ending_test(int port) {
    struct peer *p, *observer = ws_open(port, "/?channel=ending");
    static const struct {
        const char *name, *bytes;
        size_t n;
    } cases[] = {
        { "at once", BYTES("") },
        { "after half a header", BYTES("\x81") },
        { "after a header", BYTES("\x81\x85\1\2\3\4") },
        { "in the middle of a payload", BYTES("\x81\x85\0\0\0\0he") },
        { "between fragments", BYTES("\x01\x81\0\0\0\0h") },
        { "in the middle of a ping", BYTES("\x89\x85\0\0\0\0he") },
        { "in the middle of a close", BYTES("\x88\x82\0\0\0\0\3") },
    };

    for (size_t i = 0; i < COUNT(cases); i++) {
        begin("an end without a close, %s", cases[i].name);
        p = ws_open(port, "/?channel=ending");
        peer_send(p, cases[i].bytes, cases[i].n);
        shutdown(p->fd, SHUT_WR);
        expect_end(p);
        ws_text(observer, "go on");
        ws_expect_text(observer, "go on");
        peer_close(p);
        finish();
    }
    peer_close(observer);
}

static void framing_test(void) {
    struct server s = { 0 };

    if (!START(&s, "-b", "none")) return;
    for (size_t i = 0; i < COUNT(framing_cases); i++) {
        const struct framing *c = &framing_cases[i];
        size_t n;

        framing_case(s.port, c, false);
        free(pieces_bytes(c->sends, &n));
        if (n < 700) framing_case(s.port, c, true);
    }
    utf8_test(s.port);
    ending_test(s.port);
    server_stop(&s, "frames");
}

/* ---- The chat ---------------------------------------------------------- */

/* Clients that talk and listen at the same time. A message is a letter for
 * its sender, a number that counts up, and a filling; even numbers are text,
 * odd ones binary. Each listener checks that nobody's numbers have a gap, a
 * repeat or a swap. */
struct talker {
    struct peer *peer;
    char letter;    /* what it sends as; 0: it only listens */
    int sends;      /* so many messages */
    size_t filling; /* of so many bytes */
    bool at_once;   /* as fast as it can; else one at a time, echoed first */
    int sent;
    int next[128];      /* by letter: the number that comes next */
    int got;            /* in all */
    double slowest;     /* seconds from a message to its echo, with !at_once */
    double asked;       /* when the last one went out */
    unsigned char *out; /* encoded, not sent yet: out[start .. end) */
    size_t start, end;
};

#define BATCH 64 /* messages encoded at a time */

static void talker_check(struct talker *t, const struct frame *f) {
    int letter = f->length > 2 ? f->data[0] & 127 : 0, number;
    char text[24] = "";

    memcpy(text, f->data, f->length < 23 ? f->length : 23);
    number = letter ? atoi(text + 2) : -1;
    expect(f->first == (number % 2 ? BINARY : TEXT) &&
               number == t->next[letter],
           "%02x %s, expected number %d", (unsigned)f->first, text,
           t->next[letter]);
    t->next[letter] = number + 1;
    t->got++;
    if (letter == t->letter && !t->at_once && now() - t->asked > t->slowest)
        t->slowest = now() - t->asked;
}

/* Encodes the next messages if the last ones are out and it may go on. */
static void talker_write(struct talker *t) {
    char text[65536];
    int batch = t->at_once ? BATCH : 1;

    if (t->start < t->end || t->sent == t->sends ||
        (!t->at_once && t->next[(int)t->letter] < t->sent))
        return;
    if (!t->out) t->out = malloc(BATCH * (t->filling + 40));
    t->start = t->end = 0;
    t->asked = now();
    memset(text, '.', sizeof text);
    for (; batch > 0 && t->sent < t->sends; batch--, t->sent++) {
        int n = sprintf(text, "%c %d ", t->letter, t->sent);

        text[n] = '.';
        t->end += ws_encode(t->out + t->end, t->sent % 2 ? BINARY : TEXT, true,
                            0, text, (size_t)n + t->filling);
    }
}

static void talker_turn(struct talker *t, short events) {
    struct frame f;
    ssize_t n;

    if (events & POLLOUT) {
        n = send(t->peer->fd, t->out + t->start, t->end - t->start,
                 MSG_NOSIGNAL);
        if (n > 0) t->start += (size_t)n;
        else expect(errno == EAGAIN, "send: %s", strerror(errno));
    }
    if (events & (POLLIN | POLLHUP | POLLERR)) {
        peer_take(t->peer);
        while (ws_take(t->peer, &f)) {
            expect(f.first != CLOSE, "closed: %d", close_code(&f));
            if (f.first != PING) talker_check(t, &f);
        }
        expect(!t->peer->ended, "a listener was cut off after %d", t->got);
    }
}

/* Lets all talk until each has got `total` messages. */
static void talk(struct talker *talkers, int count, int total) {
    double until = now() + test.patience * 4;
    struct pollfd fds[64];
    int waiting = count;

    while (waiting && now() < until && !test.why[0]) {
        waiting = 0;
        for (int i = 0; i < count; i++) {
            struct talker *t = &talkers[i];

            if (t->letter) talker_write(t);
            fds[i].fd = t->peer->fd;
            fds[i].events = POLLIN;
            if (t->start < t->end) fds[i].events |= POLLOUT;
            waiting += t->got < total;
        }
        if (waiting && poll(fds, (nfds_t)count, 100) > 0)
            for (int i = 0; i < count; i++)
                talker_turn(&talkers[i], fds[i].revents);
    }
    for (int i = 0; i < count; i++) {
        expect(talkers[i].got == total, "listener %d got %d of %d", i,
               talkers[i].got, total);
        free(talkers[i].out);
        talkers[i].out = NULL;
    }
}

static void channel_test(int port) {
    struct peer *a, *b, *other, *none;

    begin("chat: everybody of the channel gets it, the sender too");
    a = ws_open(port, "/?channel=c1");
    b = ws_open(port, "/elsewhere?channel=c1");
    other = ws_open(port, "/?channel=c2");
    none = ws_open(port, "/");
    ws_text(a, "to c1");
    ws_expect_text(a, "to c1");
    ws_expect_text(b, "to c1");
    ws_send(b, BINARY, "\0\1\2", 3);
    ws_expect(a, BINARY, "\0\1\2", 3);
    ws_expect(b, BINARY, "\0\1\2", 3);
    finish();

    begin("chat: channels are apart");
    ws_text(other, "to c2");
    ws_expect_text(other, "to c2");
    ws_text(none, "to the nameless");
    ws_expect_text(none, "to the nameless");
    ws_text(a, "last");
    ws_expect_text(a, "last");
    ws_expect_text(b, "last");
    ws_sync(other);
    ws_sync(none);
    peer_close(other);
    peer_close(none);
    finish();

    begin("chat: the nameless channel is one, however it is written");
    other = ws_open(port, "/?channel=");
    none = ws_open(port, "/x?y=z");
    ws_text(other, "same");
    ws_expect_text(none, "same");
    peer_close(other);
    peer_close(none);
    finish();

    begin("chat: a channel's name is decoded");
    other = ws_open(port, "/?channel=%63%31");
    ws_text(other, "decoded");
    ws_expect_text(a, "decoded");
    ws_expect_text(b, "decoded");
    peer_close(other);
    finish();

    begin("chat: names that begin alike are apart");
    other = ws_open(port, "/?channel=c");
    none = ws_open(port, "/?channel=c1%00");
    ws_text(other, "c");
    ws_text(none, "c1 and NUL");
    ws_expect_text(other, "c");
    ws_expect_text(none, "c1 and NUL");
    ws_text(a, "c1");
    ws_expect_text(a, "c1");
    peer_close(other);
    peer_close(none);
    finish();

    begin("chat: /send reaches the clients");
    peer_close(b);
    b = peer_open(port);
    peer_text(b, GET("/send?channel=c1&message=by+HTTP%21"));
    ws_expect_text(a, "by HTTP!");
    peer_close(b);
    peer_close(a);
    finish();

    begin("chat: a client that leaves without a word harms nobody");
    a = ws_open(port, "/?channel=c3");
    for (int i = 0; i < 50; i++) {
        struct linger reset = { .l_onoff = 1 };

        b = ws_open(port, "/?channel=c3");
        ws_text(a, "x");
        if (i % 2)
            setsockopt(b->fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
        peer_close(b);
        ws_expect_text(a, "x");
    }
    peer_close(a);
    finish();

    begin("chat: half a message, then gone");
    a = ws_open(port, "/?channel=c4");
    b = ws_open(port, "/?channel=c4");
    peer_send(b, "\x01\x85\0\0\0\0hello\x80\xe0\0\0", 15);
    peer_close(b);
    ws_text(a, "only this");
    ws_expect_text(a, "only this");
    peer_close(a);
    finish();
}

static void history_test(int port) {
    static const struct {
        const char *query, *first;
        int from; /* the first of the five messages that comes */
    } cases[] = {
        { "&history=0", "{\"history\":0}", 5 },
        { "&history=1", "{\"history\":1}", 4 },
        { "&history=2", "{\"history\":2}", 3 },
        { "&history=5", "{\"history\":5}", 0 },
        { "&history=6", "{\"history\":5}", 0 },
        { "&history=1000000", "{\"history\":5}", 0 },
        { "", NULL, 5 },
    };
    static const struct {
        int first;
        const char *text;
        size_t n;
    } said[] = {
        { TEXT, BYTES("one") }, { BINARY, BYTES("\0two\377") },
        { TEXT, BYTES("") },    { TEXT, BYTES("f\303\274r") },
        { BINARY, BYTES("") },
    };
    struct peer *a, *b;

    a = ws_open(port, "/?channel=h");
    for (size_t i = 0; i < COUNT(said); i++) {
        ws_send(a, said[i].first, said[i].text, said[i].n);
        ws_expect(a, said[i].first, said[i].text, said[i].n);
    }
    for (size_t i = 0; i < COUNT(cases); i++) {
        char target[100];

        begin("history: '%s' of five", cases[i].query);
        snprintf(target, sizeof target, "/?channel=h%s", cases[i].query);
        b = ws_open(port, target);
        if (cases[i].first) ws_expect_text(b, cases[i].first);
        for (size_t k = (size_t)cases[i].from; k < COUNT(said); k++)
            ws_expect(b, said[k].first, said[k].text, said[k].n);
        ws_sync(b);
        expect(b->start == b->end, "more came");
        peer_close(b);
        finish();
    }
    peer_close(a);

    begin("history: then comes what is live");
    a = ws_open(port, "/?channel=live");
    ws_text(a, "before");
    ws_expect_text(a, "before");
    b = ws_open(port, "/?channel=live&history=10");
    ws_text(a, "after");
    ws_expect_text(b, "{\"history\":1}");
    ws_expect_text(b, "before");
    ws_expect_text(b, "after");
    peer_close(a);
    peer_close(b);
    finish();

    begin("history: of a new channel is empty, and its count comes still");
    a = ws_open(port, "/?channel=new&history=3");
    ws_expect_text(a, "{\"history\":0}");
    ws_text(a, "x");
    ws_expect_text(a, "x");
    peer_close(a);
    finish();

    begin("history: before the channel in the query");
    a = ws_open(port, "/?history=1&channel=live");
    ws_expect_text(a, "{\"history\":1}");
    ws_expect_text(a, "after");
    peer_close(a);
    finish();

    begin("history: not more than asked after the clients have gone");
    a = ws_open(port, "/?channel=h&history=3");
    ws_expect_text(a, "{\"history\":3}");
    peer_close(a);
    expect_messages(port, "/messages?channel=h",
                    "one | base64:AHR3b/8= |  | f\\xc3\\xbcr | base64:");
    finish();
}

/* Clients join in the middle of a flow of messages: what history gives and
 * what comes live fit together without a gap and without a repeat. */
static void join_test(int port, const char *what) {
    struct peer *a, *b = NULL;
    char text[100];
    struct frame f;
    int number = 0, got = 0, longest = 0;

    begin("history: no gap and no repeat while messages flow (%s)", what);
    a = ws_open(port, "/?channel=join");
    for (int round = 0; round < 100 && !test.why[0]; round++) {
        int end = number + 40, next = -1, count = -1;

        for (; number < end; number++) {
            snprintf(text, sizeof text, "%08d and some filling", number);
            ws_text(a, text);
            if (number == end - 20) {
                b = peer_open(port);
                ws_ask(b, "/?channel=join&history=15");
            }
        }
        ws_opened(b);
        expect(ws_next(b, &f) && f.length >= 12, "no count");
        if (!test.why[0]) count = atoi((const char *)f.data + 11);
        expect(count >= 0 && count <= 15, "history of %d", count);
        longest = count > longest ? count : longest;
        for (int i = 0; next < end && !test.why[0]; i++) {
            if (!expect(ws_next(b, &f) && f.length > 8, "nothing at %d", next))
                break;
            memcpy(text, f.data, 8);
            text[8] = '\0';
            expect(next < 0 || atoi(text) == next, "%s after %d", text,
                   next - 1);
            next = atoi(text) + 1;
        }
        for (; got < end && !test.why[0]; got++) {
            expect(ws_next(a, &f) && f.length > 8 &&
                       atoi((const char *)f.data) == got,
                   "the sender's own %d", got);
        }
        peer_close(b);
    }
    expect(longest == 15, "never a history of 15, only %d", longest);
    peer_close(a);
    finish();
}

static void order_test(int port) {
    struct talker t[6] = { { 0 } };
    int total = 0;

    begin("chat: 3 senders, 6 listeners, 3,000 messages each, all in order");
    for (int i = 0; i < 6; i++) {
        t[i].peer = ws_open(port, "/?channel=order");
        t[i].letter = i < 3 ? (char)('A' + i) : '\0';
        t[i].sends = i < 3 ? 3000 : 0;
        t[i].filling = i == 1 ? 200 : 10;
        t[i].at_once = true;
        total += t[i].sends;
    }
    talk(t, 6, total);
    for (int i = 0; i < 6; i++) peer_close(t[i].peer);
    finish();
}

static void mixed_sizes_test(int port) {
    struct talker t[3] = { { 0 } };

    begin("chat: messages of 64 KiB and of 1 byte mixed, all in order");
    for (int i = 0; i < 3; i++) {
        t[i].peer = ws_open(port, "/?channel=mixed");
        t[i].letter = (char)('A' + i);
        t[i].sends = i == 0 ? 200 : 1000;
        t[i].filling = i == 0 ? 65000 : (size_t)i;
        t[i].at_once = true;
    }
    talk(t, 3, 2200);
    for (int i = 0; i < 3; i++) peer_close(t[i].peer);
    finish();
}

/* A log of a few messages that turns over many times. */
static void small_log_test(void) {
    struct server s = { 0 };
    struct peer *a;
    char items[9000], *last;
    struct response r;
    int number;

    if (!START(&s, "-b", "none", "-m", "1K", "-H", "4K")) return;
    order_test(s.port);
    join_test(s.port, "a log of 4K");

    begin("small log: /messages is its end, without a gap");
    a = ws_open(s.port, "/?channel=small");
    for (int i = 0; i < 5000; i++) {
        char text[40];

        sprintf(text, "%d", 100000 + i);
        ws_text(a, text);
        ws_expect_text(a, text);
    }
    peer_close(a);
    a = http_get(s.port, "/messages?channel=small", &r);
    expect(r.body && json_items(&r, items, sizeof items), "not JSON");
    number = atoi(items);
    expect(number > 100000 && number < 104900, "the oldest is %d", number);
    for (last = items; last; last = strstr(last, " | "), number++) {
        last += *last == ' ' ? 3 : 0;
        expect(atoi(last) == number, "%d, expected %d", atoi(last), number);
    }
    expect(number == 105000, "the newest is %d", number - 1);
    peer_close(a);
    finish();

    begin("small log: max-message is 1K");
    a = ws_open(s.port, "/?channel=max");
    memset(items, 'x', 1025);
    ws_send(a, TEXT, items, 1024);
    ws_expect(a, TEXT, items, 1024);
    ws_send(a, TEXT, items, 1025);
    {
        struct frame f = { 0 };

        expect(ws_next(a, &f) && close_code(&f) == 1009, "close %d",
               close_code(&f));
    }
    peer_close(a);
    finish();
    server_stop(&s, "small log");
}

/* A client that takes nothing is cut off; a flood is slowed; the others get
 * every message, and a polite sender among them is heard promptly. */
static void slow_test(void) {
    struct server s = { 0 };
    struct talker t[6] = { { 0 } };
    struct peer *slow;
    struct sockaddr_in to = { .sin_family = AF_INET,
                              .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    int total = 30000 + 50;
    size_t limit = 30000ul * 1000;

    if (!START(&s, "-b", "none", "--metrics")) return;
    begin("slow: a flood of 30 MB past a client that never reads");
    to.sin_port = htons((uint16_t)s.port);
    slow = peer_connect(&to, sizeof to, 4096);
    ws_ask(slow, "/?channel=flood");
    ws_opened(slow);
    for (int i = 0; i < 6; i++) {
        t[i].peer = ws_open(s.port, "/?channel=flood");
        t[i].letter = i == 0 ? 'F' : i == 1 ? 'P' : '\0';
        t[i].sends = i == 0 ? 30000 : i == 1 ? 50 : 0;
        t[i].filling = i == 0 ? 1000 : 10;
        t[i].at_once = i == 0;
    }
    talk(t, 6, total);
    finish();
    begin("slow: an ordinary sender's echo in the flood");
    expect(t[1].slowest < 3, "took %.3f s", t[1].slowest);
    printf("# slowest echo in the flood: %.0f ms\n", t[1].slowest * 1000);
    finish();
    begin("slow: the one that never reads is cut off, counted, once");
    expect_metric(s.port, "chat_slow_clients_total", 1);
    expect(metric(s.port, "chat_slow_clients_total") == 1, "%g were cut off",
           metric(s.port, "chat_slow_clients_total"));
    while (peer_more(slow, deadline()))
        ;
    expect(slow->ended, "it is still connected");
    expect(slow->end - slow->start < limit / 3, "it got %zu bytes",
           slow->end - slow->start);
    peer_close(slow);
    finish();
    begin("slow: other channels go on meanwhile");
    for (int i = 0; i < 6; i++) peer_close(t[i].peer);
    memset(t, 0, sizeof t);
    slow = peer_connect(&to, sizeof to, 4096);
    ws_ask(slow, "/?channel=stuck");
    ws_opened(slow);
    t[0] = (struct talker){ .peer = ws_open(s.port, "/?channel=stuck"),
                            .letter = 'F',
                            .sends = 1 << 30,
                            .filling = 1000,
                            .at_once = true };
    t[1] = (struct talker){ .peer = ws_open(s.port, "/?channel=calm"),
                            .letter = 'C',
                            .sends = 500,
                            .filling = 10 };
    for (double until = deadline(); t[1].got < 500 && now() < until;) {
        struct pollfd fds[2] = { { .fd = t[0].peer->fd, .events = POLLIN },
                                 { .fd = t[1].peer->fd, .events = POLLIN } };

        for (int i = 0; i < 2; i++) {
            talker_write(&t[i]);
            fds[i].events |= t[i].start < t[i].end ? POLLOUT : 0;
        }
        if (poll(fds, 2, 100) > 0)
            for (int i = 0; i < 2; i++) talker_turn(&t[i], fds[i].revents);
    }
    expect(t[1].got == 500, "the calm channel got %d of 500", t[1].got);
    expect(t[1].slowest < 0.5, "an echo took %.3f s", t[1].slowest);
    for (int i = 0; i < 2; i++) {
        free(t[i].out);
        peer_close(t[i].peer);
    }
    peer_close(slow);
    finish();
    server_stop(&s, "slow");
}

/* One more client than allowed: it waits until there is room. */
static void max_clients_test(void) {
    struct server s = { 0 };
    struct peer *p[3], *fourth;

    if (!START(&s, "-b", "none", "-c", "3")) return;
    begin("-c 3: three go on while a fourth waits");
    for (int i = 0; i < 3; i++) p[i] = ws_open(s.port, "/");
    fourth = peer_open(s.port);
    ws_ask(fourth, "/");
    for (int k = 0; k < 100; k++) {
        ws_text(p[k % 3], "x");
        for (int i = 0; i < 3; i++) ws_expect_text(p[i], "x");
    }
    expect(!wait_for(fourth->fd, POLLIN, now()), "the fourth was let in");
    finish();
    begin("-c 3: when one leaves the fourth comes in");
    peer_close(p[2]);
    ws_opened(fourth);
    ws_text(fourth, "y");
    ws_expect_text(fourth, "y");
    ws_expect_text(p[0], "y");
    ws_expect_text(p[1], "y");
    peer_close(fourth);
    peer_close(p[0]);
    peer_close(p[1]);
    finish();
    server_stop(&s, "-c");
}

static void chat_test(void) {
    struct server s = { 0 };

    if (!START(&s, "-b", "none")) return;
    channel_test(s.port);
    history_test(s.port);
    join_test(s.port, "a log of 256K");
    order_test(s.port);
    mixed_sizes_test(s.port);
    server_stop(&s, "chat");
    small_log_test();
    slow_test();
    max_clients_test();
}

/* ---- The process ------------------------------------------------------- */

/* Command lines that must fail, and what their one line has to name; `|`
 * stands between alternatives. */
static const struct {
    const char *args[5];
    int status, or_status;
    const char *naming;
} refused[] = {
    { { "-p", "-1" }, 2, 0, "port" },
    { { "-p", "65536" }, 2, 0, "port" },
    { { "-p", "99999999999999999999" }, 2, 0, "port" },
    { { "-p", "x" }, 2, 0, "port" },
    { { "-p", "" }, 2, 0, "port" },
    { { "-p", "80x" }, 2, 0, "port" },
    { { "-p", "8K" }, 2, 0, "port" },
    { { "-p", "8.5" }, 2, 0, "port" },
    { { "--port=http" }, 2, 0, "port" },
    { { "-m", "0" }, 2, 0, "max-message" },
    { { "-m", "-5" }, 2, 0, "max-message" },
    { { "-m", "17M" }, 2, 0, "max-message" },
    { { "-m", "16777217" }, 2, 0, "max-message" },
    { { "-m", "64Q" }, 2, 0, "max-message" },
    { { "-m", "64KK" }, 2, 0, "max-message" },
    { { "-m", "K" }, 2, 0, "max-message" },
    { { "-m", "" }, 2, 0, "max-message" },
    { { "-m", "99999999999999999999K" }, 2, 0, "max-message" },
    { { "-m", "18014398509481985K" }, 2, 0, "max-message" },
    { { "-H", "x" }, 2, 0, "history" },
    { { "-H", "-1" }, 2, 0, "history" },
    { { "-H", "" }, 2, 0, "history" },
    { { "-H", "99999999999999999M" }, 2, 0, "history" },
    { { "-c", "0" }, 2, 0, "max-clients" },
    { { "-c", "-1" }, 2, 0, "max-clients" },
    { { "-c", "many" }, 2, 0, "max-clients" },
    { { "-c", "" }, 2, 0, "max-clients" },
    { { "--ttl", "-1" }, 2, 0, "ttl" },
    { { "--ttl", "256" }, 2, 0, "ttl" },
    { { "--ttl", "x" }, 2, 0, "ttl" },
    { { "-b", "" }, 2, 0, "bus" },
    { { "-b", "239.255.80.80" }, 2, 0, "bus" },
    { { "-b", "239.255.80.80:" }, 2, 0, "bus" },
    { { "-b", "239.255.80.80:0" }, 2, 0, "bus" },
    { { "-b", "239.255.80.80:99999" }, 2, 0, "bus" },
    { { "-b", "239.255.80.80:80x" }, 2, 0, "bus" },
    { { "-b", ":8081" }, 2, 0, "bus" },
    { { "-b", "127.0.0.1:8081," }, 2, 0, "bus" },
    { { "-b", "127.0.0.1:8081,127.0.0.1" }, 2, 0, "bus" },
    { { "-o", "" }, 2, 0, "origin" },
    { { "-Z" }, 2, 0, "Z" },
    { { "--nonsense" }, 2, 0, "nonsense" },
    { { "-p" }, 2, 0, "port|'p'|-p" },
    { { "--dir" }, 2, 0, "dir" },
    { { "--quiet=yes" }, 2, 0, "quiet" },
    { { "-b", "none", "extra" }, 2, 0, "extra" },
    { { "-b", "none", "--cert", "/nonexistent" }, 2, 1, "cert|key" },
    { { "-b", "none", "--key", "/nonexistent" }, 2, 1, "cert|key" },
    { { "-b", "none", "-d", "/nonexistent" }, 1, 0, "/nonexistent|dir" },
    { { "-b", "none", "-d", "/dev/null" }, 1, 0, "/dev/null|dir" },
    { { "-b", "none", "-d", "" }, 1, 2, "dir|open" },
    { { "-b", "none", "-a", "192.0.2.200" }, 1, 0, "bind|address" },
    { { "-b", "none", "-a", "not an address" }, 1, 2, "address" },
    { { "-i", "nosuch0", "-s", "none" }, 1, 2, "nosuch0" },
    { { "-s", "/nonexistent" }, 1, 2, "/nonexistent|secret" },
    { { "-b", "192.0.2.1:8081" }, 1, 2, "secret" },
};

/* Does the text hold one of the alternatives? */
static bool names(const char *text, const char *alternatives) {
    char copy[100], *rest = copy;

    snprintf(copy, sizeof copy, "%s", alternatives);
    for (char *one; (one = strsep(&rest, "|")) != NULL;)
        if (strstr(text, one)) return true;
    return false;
}

/* It must end by itself, with this status and one line that names what is
 * wrong; one that starts to serve is ended. */
static void expect_refused(const char *const *args, int status, int or_status,
                           const char *naming) {
    const char *all[24] = { "-p", "0" };
    struct server s = { 0 };
    int n = 2, got;
    char *out;

    while (*args && n < 23) all[n++] = *args++;
    server_spawn(&s, all);
    if (server_says(&s, 0, "\n") && strstr(s.said, "listening on"))
        kill(s.pid, SIGTERM);
    got = server_end(&s);
    out = server_output(&s);
    expect(got == status || (or_status && got == or_status),
           "exit status %d, expected %d: %s", got, status,
           shown(s.said, s.said_len));
    expect(s.said_len > 1 && strchr(s.said, '\n') == s.said + s.said_len - 1,
           "not one line: %s", shown(s.said, s.said_len));
    expect(names(s.said, naming), "%s does not name %s",
           shown(s.said, s.said_len), naming);
    expect(out[0] == '\0', "on stdout: %s", shown(out, strlen(out)));
    free(out);
    server_free(&s);
}

static void refused_test(void) {
    for (size_t i = 0; i < COUNT(refused); i++) {
        begin("refused: %s %s %s", refused[i].args[0],
              refused[i].args[1] ? refused[i].args[1] : "",
              refused[i].args[2] ? refused[i].args[2] : "");
        expect_refused(refused[i].args, refused[i].status, refused[i].or_status,
                       refused[i].naming);
        finish();
    }
}

/* What an option prints: exit 0, stdout, nothing on stderr. To free. */
static char *printed(const char *option) {
    struct server s = { 0 };
    int status;
    char *out;

    server_spawn(&s, (const char *[]){ option, NULL });
    status = server_end(&s);
    out = server_output(&s);
    expect(status == 0, "exit status %d", status);
    expect(s.said_len == 0, "stderr: %s", shown(s.said, s.said_len));
    server_free(&s);
    return out;
}

static void usage_test(void) {
    static const char *const options[] = {
        "-p",
        "--port",
        "8080",
        "-a",
        "--address",
        "-d",
        "--dir",
        "-b",
        "--bus",
        "239.255.80.80:8081",
        "-i",
        "--interface",
        "--ttl",
        "-s",
        "--secret",
        "-m",
        "--max-message",
        "64K",
        "-H",
        "--history",
        "256K",
        "-c",
        "--max-clients",
        "-o",
        "--origin",
        "--metrics",
        "-q",
        "--quiet",
    };
    char *out;

    for (int i = 0; i < 2; i++) {
        begin("usage: %s names every option and default", i ? "--help" : "-h");
        out = printed(i ? "--help" : "-h");
        for (size_t k = 0; k < COUNT(options); k++)
            expect(strstr(out, options[k]) != NULL, "no %s", options[k]);
        free(out);
        finish();
        begin("version: %s is one line", i ? "--version" : "-V");
        out = printed(i ? "--version" : "-V");
        expect(strpbrk(out, "0123456789") &&
                   strchr(out, '\n') == out + strlen(out) - 1,
               "%s", shown(out, strlen(out)));
        free(out);
        finish();
    }
}

/* Secrets that will not do, and a port that somebody has. */
static void start_failure_test(void) {
    struct server s = { 0 };
    char port[20], secret[4096];

    begin("a secret that others can read is refused");
    make_file("open.secret", BYTES("secret\n"));
    chmod(in_folder("open.secret"), 0644);
    expect_refused((const char *[]){ "-s", in_folder("open.secret"), NULL }, 1,
                   2, "secret");
    finish();
    begin("a secret too long to be taken whole is refused");
    memset(secret, 's', sizeof secret);
    make_file("long.secret", secret, sizeof secret);
    chmod(in_folder("long.secret"), 0600);
    expect_refused((const char *[]){ "-s", in_folder("long.secret"), NULL }, 1,
                   2, "secret");
    finish();
    if (!START(&s, "-b", "none")) return;
    begin("port in use: exit 1 and one line");
    snprintf(port, sizeof port, "%d", s.port);
    expect_refused((const char *[]){ "-b", "none", "-p", port, NULL }, 1, 0,
                   "bind");
    finish();
    server_stop(&s, "port in use");
}

/* SIGTERM or SIGINT: 1001 to everybody, the rest is let go, exit 0. With
 * `stuck`, some clients do not answer, and others wait for more. */
static void signal_test(int number, bool stuck) {
    struct server s = { 0 };
    struct peer *p[20], *idle, *half = NULL, *busy = NULL, *file = NULL;
    double began, limit = stuck ? 5 : 2;
    struct frame f = { 0 };
    int status;

    if (!START(&s, "-b", "none", "-d", in_folder("stuck"))) return;
    begin("%s: 1001 to all, exit 0%s", strsignal(number),
          stuck ? ", though some do not go" : "");
    for (int i = 0; i < 20; i++)
        p[i] = ws_open(s.port, i % 2 ? "/" : "/?channel=other");
    idle = peer_open(s.port);
    if (stuck) {
        half = peer_open(s.port);
        peer_text(half, "GET / HTTP/1.1\r\nHost:");
        busy = ws_open(s.port, "/");
        peer_send(busy, "\x01\x85\0\0\0\0hello\x80\xe0\0\0", 15);
        file = peer_open(s.port);
        peer_text(file, GET("/big"));
        peer_more(file, deadline());
    }
    ws_text(p[0], "the last word");
    for (int i = 0; i < 20; i += 2) ws_expect_text(p[i], "the last word");
    began = now();
    kill(s.pid, number);
    for (int i = 0; i < 20; i++) {
        int code = ws_next(p[i], &f) ? close_code(&f) : -1;
        expect(code == 1001, "client %d: close %d", i, code);
        expect_end(p[i]);
        if (!stuck || i % 3) ws_send(p[i], CLOSE, "\3\351", 2);
        if (!stuck) peer_close(p[i]);
    }
    if (stuck) {
        int code = ws_next(busy, &f) ? close_code(&f) : -1;
        expect(code == 1001, "in the middle of a message: close %d", code);
    }
    status = server_end(&s);
    expect(status == 0, "exit status %d", status);
    expect(now() - began < limit, "after %.1f s", now() - began);
    expect_quiet(&s);
    for (int i = 0; stuck && i < 20; i++) peer_close(p[i]);
    if (stuck) {
        peer_close(half);
        peer_close(busy);
        peer_close(file);
    }
    peer_close(idle);
    server_free(&s);
    finish();
}

static void listening_test(void) {
    struct server s = { 0 };
    char line[200];
    struct sockaddr_in6 six = { .sin6_family = AF_INET6,
                                .sin6_addr = IN6ADDR_LOOPBACK_INIT };
    struct peer *p;
    struct response r;
    int probe;

    if (!START(&s, "-b", "none")) return;
    begin("the line on stderr: listening on http, the bus");
    snprintf(line, sizeof line,
             "chat: listening on http://localhost:%d/, bus none\n", s.port);
    expect(!strcmp(s.said, line), "%s", shown(s.said, s.said_len));
    finish();
    probe = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (probe < 0 || bind(probe, (struct sockaddr *)&six, sizeof six) < 0) {
        skip("IPv6 too", "no IPv6 here");
    } else {
        begin("IPv6 too");
        six.sin6_port = htons((uint16_t)s.port);
        p = peer_connect(&six, sizeof six, 0);
        peer_text(p, GET("/"));
        read_response(p, false, &r);
        expect(r.status == 200, "status %d", r.status);
        peer_close(p);
        finish();
    }
    close(probe);
    server_stop(&s, "listening");

    if (!START(&s, "-b", "none", "-a", "127.0.0.1")) return;
    begin("-a 127.0.0.1: there and nowhere else");
    p = http_get(s.port, "/", &r);
    expect(r.status == 200, "status %d", r.status);
    peer_close(p);
    {
        struct sockaddr_in to = { .sin_family = AF_INET,
                                  .sin_port = htons((uint16_t)s.port),
                                  .sin_addr.s_addr = htonl(0x7f000002) };
        int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

        expect(connect(fd, (struct sockaddr *)&to, sizeof to) < 0,
               "127.0.0.2 answers too");
        close(fd);
    }
    finish();
    server_stop(&s, "-a");
}

/* The request log: what it says of some requests. */
static void log_test(void) {
    static const struct {
        const char *request;
        size_t length;
        const char *line; /* regex behind the date; NULL: only no raw bytes */
    } cases[] = {
        { BYTES(GET("/")), "\"GET / HTTP/1\\.1\" 200 [1-9][0-9]*" },
        { BYTES(GET("/nothing?a=b")),
          "\"GET /nothing\\?a=b HTTP/1\\.1\" 404 9" },
        { BYTES("HEAD / HTTP/1.1\r\n" HOST "\r\n"),
          "\"HEAD / HTTP/1\\.1\" 200 [-0-9]+" },
        { BYTES(GET("/send?message=log%0aged")),
          "\"GET /send\\?message=log%0aged HTTP/1\\.1\" 200 12" },
        { BYTES("GET / HTTP/1.0\r\n\r\n"),
          "\"GET / HTTP/1\\.0\" 200 [1-9][0-9]*" },
        { BYTES(OPEN("")), "\"GET / HTTP/1\\.1\" 101 [-0-9]+" },
        { BYTES("GET /\033[31m\001\177\200 HTTP/1.1\r\n" HOST "\r\n"),
          "\".*\" 400 .*" },
        { BYTES("GET /a\"b\\c HTTP/1.1\r\n" HOST "\r\n"),
          "\"GET /a(\\\\\"|\\\\x22)b(\\\\\\\\|\\\\x5c)c HTTP/1\\.1\" "
          "[0-9]+ [-0-9]+" },
        { BYTES("rubbish\r\n\r\n"), "\".*\" 400 [0-9]+" },
    };
    struct server s = { 0 };
    size_t lines = 0;
    struct response r;
    char *out, *rest, *line;

    if (!START(&s, "-b", "none")) return;
    begin("request log: one line a request in the Common Log Format");
    for (size_t i = 0; i < COUNT(cases); i++) {
        struct peer *p = peer_open(s.port);

        peer_send(p, cases[i].request, cases[i].length);
        read_response(p, !strncmp(cases[i].request, "HEAD", 4), &r);
        peer_close(p);
    }
    for (double until = deadline(); lines < COUNT(cases) && now() < until;) {
        lines = 0; /* they come while it runs, not only at its end */
        out = server_output(&s);
        for (char *c = out; *c; c++) lines += *c == '\n';
        free(out);
        if (lines < COUNT(cases)) poll(NULL, 0, 5);
    }
    expect(lines == COUNT(cases), "%zu lines while it runs", lines);
    kill(s.pid, SIGTERM);
    expect(server_end(&s) == 0, "did not stop");
    rest = out = server_output(&s);
    for (size_t i = 0; i < COUNT(cases); i++) {
        char form[300];
        regex_t regex;

        line = strsep(&rest, "\n");
        if (!expect(line && rest, "no line for request %zu", i + 1)) break;
        snprintf(form, sizeof form,
                 "^(::ffff:)?127\\.0\\.0\\.1 - - \\[[0-9]{2}"
                 "/[A-Z][a-z]{2}/[0-9]{4}(:[0-9]{2}){3} [-+][0-9]{4}\\] %s$",
                 cases[i].line);
        regcomp(&regex, form, REG_EXTENDED | REG_NOSUB);
        expect(regexec(&regex, line, 0, NULL, 0) == 0, "line: %s", line);
        regfree(&regex);
        expect(strncmp(line, "::", 2) != 0, "an IPv4 address as %s", line);
        for (char *c = line; *c; c++)
            expect(*c >= ' ' && *c < 0x7f, "a raw byte: %s",
                   shown(line, strlen(line)));
    }
    expect(rest && !*rest, "more lines: %s", rest ? rest : "");
    free(out);
    server_free(&s);
    finish();

    if (!START(&s, "-b", "none", "-q")) return;
    begin("request log: -q is silent");
    peer_close(http_get(s.port, "/", &r));
    kill(s.pid, SIGTERM);
    expect(server_end(&s) == 0, "did not stop");
    out = server_output(&s);
    expect(!*out, "stdout: %s", out);
    expect_quiet(&s);
    free(out);
    server_free(&s);
    finish();
}

/* Ten seconds for a header, however the bytes trickle, and for more of a
 * body. */
static void late_test(void) {
    static const struct {
        const char *name, *sent;
        bool trickles;
    } cases[] = {
        { "nothing at all", "", false },
        { "half a header", "GET / HTTP/1.1\r\nHost: a\r\n", false },
        { "a header that trickles", "GET / HTTP/1.1\r\nX: ", true },
        { "a header that trickles after a request", GET("/") "GET", true },
        { "a lone CR", "\r", false },
        { "a body that does not come", POST("/send", "10", ""), false },
        { "half a body", POST("/send", "10", "hello"), false },
    };
    struct server s = { 0 };
    struct peer *p[COUNT(cases)];
    double began, ended[COUNT(cases)] = { 0 };
    size_t open_count = COUNT(cases);
    struct response r;

    if (!START(&s, "-b", "none")) return;
    began = now();
    for (size_t i = 0; i < COUNT(cases); i++) {
        p[i] = peer_open(s.port);
        peer_text(p[i], cases[i].sent);
    }
    while (now() < began + 10 + test.patience && open_count > 0) {
        struct pollfd fds[COUNT(cases)];

        for (size_t i = 0; i < COUNT(cases); i++) {
            fds[i].fd = ended[i] > 0 ? -1 : p[i]->fd;
            fds[i].events = POLLIN;
            if (cases[i].trickles && ended[i] == 0)
                send(p[i]->fd, "x", 1, MSG_NOSIGNAL);
        }
        if (poll(fds, COUNT(cases), 200) > 0)
            for (size_t i = 0; i < COUNT(cases); i++)
                if (fds[i].fd >= 0 && fds[i].revents) {
                    while (peer_take(p[i]))
                        ;
                    if (p[i]->ended) {
                        ended[i] = now() - began;
                        open_count--;
                    }
                }
    }
    for (size_t i = 0; i < COUNT(cases); i++) {
        begin("10 s, then 408: %s", cases[i].name);
        expect(ended[i] > 0, "still open after %.1f s", now() - began);
        expect(ended[i] > 9.5 && ended[i] < 12.5, "ended after %.1f s",
               ended[i]);
        if (i == 3) read_response(p[i], false, &r);
        if (i > 0 || p[i]->end > p[i]->start) {
            read_response(p[i], false, &r);
            expect(r.status == 408, "status %d", r.status);
        }
        peer_close(p[i]);
        finish();
    }
    server_stop(&s, "408");
}

static void process_test(void) {
    refused_test();
    usage_test();
    start_failure_test();
    listening_test();
    make_dir("stuck");
    make_file("stuck/big", BYTES(""));
    if (truncate(in_folder("stuck/big"), 200 << 20) < 0) perror("truncate");
    signal_test(SIGTERM, true);
    signal_test(SIGINT, false);
    log_test();
}

/* ---- The bus ----------------------------------------------------------- */

#define BUS_LINES                              \
    "^chat: peer [0-9a-f]{16} (joined|left)$|" \
    "^chat: message error on the bus: .*\\([0-9]+ so far\\)$"

/* An instance on a bus; its log lines about peers are expected. */
static bool join_bus(struct server *s, const char *bus) {
    *s = (struct server){ .may_say = BUS_LINES };
    return START(s, "-b", bus, "--metrics");
}

/* A message goes from one instance to a client of another. */
static void expect_crossing(struct peer *from, struct peer *to, int opcode,
                            const char *text) {
    ws_send(from, opcode, text, strlen(text));
    ws_expect(from, opcode, text, strlen(text));
    ws_expect(to, opcode, text, strlen(text));
}

static void one_instance_test(const char *bus) {
    struct server s;
    char line[200];

    if (!join_bus(&s, bus)) return;
    begin("bus: named on stderr");
    snprintf(line, sizeof line,
             "chat: listening on http://localhost:%d/, bus %s on lo\n", s.port,
             bus);
    expect(!strcmp(s.said, line), "%s", shown(s.said, s.said_len));
    finish();
    server_stop(&s, "bus of one");
}

static void two_instances_test(const char *bus, const char *what) {
    struct server a, b;
    struct peer *pa, *pb, *oa, *ob, *http;
    struct response r;
    char big[60001];

    if (!join_bus(&a, bus) || !join_bus(&b, bus)) return;
    begin("bus, %s: messages cross both ways, opcode kept", what);
    pa = ws_open(a.port, "/?channel=x");
    pb = ws_open(b.port, "/?channel=x");
    oa = ws_open(a.port, "/?channel=other");
    ob = ws_open(b.port, "/?channel=other");
    expect_crossing(pa, pb, TEXT, "from a");
    expect_crossing(pb, pa, TEXT, "from b");
    expect_crossing(pa, pb, BINARY, "\377\376 from a");
    expect_crossing(pb, pa, BINARY, "\377\376 from b");
    expect_crossing(pa, pb, TEXT, "");
    finish();

    begin("bus, %s: channels stay apart", what);
    expect_crossing(oa, ob, TEXT, "to other");
    expect_crossing(pa, pb, TEXT, "to x");
    expect_crossing(ob, oa, TEXT, "back");
    finish();

    begin("bus, %s: a big message and many small ones", what);
    memset(big, 'b', 60000);
    big[60000] = '\0';
    expect_crossing(pa, pb, TEXT, big);
    for (int i = 0; i < 200; i++) {
        snprintf(big, 20, "%d", i);
        ws_text(pa, big);
    }
    for (int i = 0; i < 200; i++) {
        snprintf(big, 20, "%d", i);
        ws_expect_text(pb, big);
        ws_expect_text(pa, big);
    }
    finish();

    begin("bus, %s: /send and /messages cross too", what);
    http = http_get(b.port, "/send?channel=x&message=sent", &r);
    ws_expect_text(pa, "sent");
    ws_expect_text(pb, "sent");
    peer_close(http);
    http = http_get(a.port, "/send?channel=empty&message=kept", &r);
    peer_close(http);
    expect_crossing(oa, ob, TEXT, "kept has crossed");
    expect_messages(b.port, "/messages?channel=empty", "kept");
    finish();

    begin("bus, %s: each counts the other as a peer", what);
    expect_metric(a.port, "chat_bus_peers", 1);
    expect_metric(b.port, "chat_bus_peers", 1);
    expect(metric(a.port, "chat_bus_errors_total") == 0, "errors at a");
    expect(metric(b.port, "chat_bus_lost_messages_total") == 0, "lost at b");
    finish();

    begin("bus, %s: who leaves is gone at once", what);
    peer_close(pb);
    peer_close(ob);
    kill(b.pid, SIGTERM);
    expect(server_end(&b) == 0, "did not stop");
    expect_quiet(&b);
    expect(server_says(&a, 0, "left\n"), "no line about it: %s",
           shown(a.said, a.said_len));
    expect(metric(a.port, "chat_bus_peers") == 0, "still a peer");
    ws_text(pa, "alone");
    ws_expect_text(pa, "alone");
    peer_close(pa);
    peer_close(oa);
    finish();
    server_free(&b);
    server_stop(&a, "bus");
}

/* Three instances, a sender and a listener on each. */
static void three_instances_test(const char *bus, bool flat_out) {
    struct server s[3];
    struct talker t[6] = { { 0 } };

    for (int i = 0; i < 3; i++) {
        s[i] = (struct server){ .may_say = BUS_LINES };
        if (!START(&s[i], "-b", bus, "--metrics")) return;
    }
    begin("bus: 3 instances, 3 senders %s, everything everywhere in order",
          flat_out ? "flat out" : "paced by their echo");
    for (int i = 0; i < 3; i++) expect_metric(s[i].port, "chat_bus_peers", 2);
    for (int i = 0; i < 6; i++)
        t[i] = (struct talker){ .peer = ws_open(s[i % 3].port, "/?channel=o"),
                                .letter = i < 3 ? (char)('A' + i) : '\0',
                                .sends = i < 3 ? 2000 : 0,
                                .filling = i == 1 && flat_out ? 2000 : 20,
                                .at_once = flat_out };
    talk(t, 6, 6000);
    for (int i = 0; i < 6; i++) peer_close(t[i].peer);
    for (int i = 0; i < 3; i++)
        expect(metric(s[i].port, "chat_bus_lost_messages_total") == 0,
               "lost at %d", i);
    finish();
    for (int i = 0; i < 3; i++) server_stop(&s[i], "three instances");
}

/* Waits for a target's items, 2 s (more under a sanitizer). */
static void expect_soon(int port, const char *target, const char *items) {
    double until = now() + test.patience * 2 / 5;
    struct response r;
    char got[4000] = "";

    while (strcmp(got, items) && now() < until && !test.why[0]) {
        struct peer *p = http_get(port, target, &r);

        if (r.body) json_items(&r, got, sizeof got);
        peer_close(p);
        if (strcmp(got, items)) poll(NULL, 0, 5);
    }
    expect(!strcmp(got, items), "%s: %s, expected %s", target, got, items);
}

/* Who comes late, or again, has what the others said before. */
static void late_joiner_test(const char *bus) {
    struct server a, b, c;
    struct peer *pa, *pb, *pc;

    if (!join_bus(&a, bus) || !join_bus(&b, bus)) return;
    begin("bus: a conversation between two instances");
    pa = ws_open(a.port, "/?channel=late");
    pb = ws_open(b.port, "/?channel=late");
    expect_crossing(pa, pb, TEXT, "a1");
    expect_crossing(pb, pa, TEXT, "b1");
    expect_crossing(pb, pa, BINARY, "b2");
    expect_crossing(pa, pb, TEXT, "a2");
    expect_crossing(pb, pa, TEXT, "b3");
    expect_crossing(pa, pb, TEXT, "a3");
    expect_crossing(pa, pb, TEXT, "a4");
    expect_messages(a.port, "/messages?channel=late",
                    "a1 | b1 | base64:YjI= | a2 | b3 | a3 | a4");
    finish();

    if (!join_bus(&c, bus)) return;
    begin("bus: a late joiner has the history, in order of time");
    expect_soon(c.port, "/messages?channel=late",
                "a1 | b1 | base64:YjI= | a2 | b3 | a3 | a4");
    finish();

    begin("bus: the late joiner takes part, nothing comes twice");
    pc = ws_open(c.port, "/?channel=late");
    ws_text(pc, "c1");
    ws_expect_text(pc, "c1");
    ws_expect_text(pa, "c1");
    ws_expect_text(pb, "c1");
    ws_sync(pa);
    ws_sync(pb);
    expect(pa->start == pa->end && pb->start == pb->end, "more came");
    peer_close(pb);
    peer_close(pc);
    finish();
    server_stop(&b, "late joiner: the second");

    if (!join_bus(&b, bus)) return;
    begin("bus: a restarted instance has it all, also its own words");
    expect_soon(b.port, "/messages?channel=late",
                "a1 | b1 | base64:YjI= | a2 | b3 | a3 | a4 | c1");
    pb = ws_open(b.port, "/?channel=late");
    expect_crossing(pb, pa, TEXT, "b is back");
    ws_text(pa, "good");
    ws_expect_text(pb, "good");
    peer_close(pb);
    finish();
    begin("bus: one is killed, the others go on");
    kill(b.pid, SIGKILL);
    server_end(&b);
    server_free(&b);
    ws_expect_text(pa, "good");
    ws_text(pa, "go on");
    ws_expect_text(pa, "go on");
    finish();
    if (!join_bus(&b, bus)) return;
    begin("bus: killed and started again, it has it all");
    expect_soon(b.port, "/messages?channel=late",
                "a1 | b1 | base64:YjI= | a2 | b3 | a3 | a4 | c1 | b is back | "
                "good | go on");
    peer_close(pa);
    finish();
    server_stop(&a, "late joiner");
    server_stop(&b, "late joiner: restarted");
    server_stop(&c, "late joiner: the third");
}

/* Datagrams that mean nothing: counted, and the chat goes on. */
static void rubbish_test(int port, const char *bus) {
    struct server a, b;
    struct peer *pa, *pb;
    struct sockaddr_in to = { .sin_family = AF_INET,
                              .sin_port = htons((uint16_t)port) };
    struct in_addr loopback = { htonl(INADDR_LOOPBACK) };
    unsigned char bytes[2000];
    unsigned x = 7;
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

    inet_pton(AF_INET, "239.255.80.80", &to.sin_addr);
    setsockopt(fd, IPPROTO_IP, IP_MULTICAST_IF, &loopback, sizeof loopback);
    if (!join_bus(&a, bus) || !join_bus(&b, bus)) return;
    begin("bus: 300 datagrams of rubbish are counted, and do no harm");
    pa = ws_open(a.port, "/?channel=r");
    pb = ws_open(b.port, "/?channel=r");
    expect_crossing(pa, pb, TEXT, "before");
    expect(metric(a.port, "chat_bus_errors_total") == 0, "errors before");
    for (int i = 0; i < 300; i++) {
        size_t n = (size_t)(i % 10 == 0 ? i / 10 : i * 5);

        for (size_t k = 0; k < n; k++)
            bytes[k] = (unsigned char)((x = x * 1664525 + 1013904223) >> 24);
        expect(sendto(fd, bytes, n, 0, (struct sockaddr *)&to, sizeof to) ==
                   (ssize_t)n,
               "sendto: %s", strerror(errno));
        if (i % 20 == 19) /* leave them time: it is UDP */
            expect_metric(a.port, "chat_bus_errors_total", i + 1);
    }
    expect_metric(b.port, "chat_bus_errors_total", 1);
    expect_crossing(pa, pb, TEXT, "after");
    expect_crossing(pb, pa, TEXT, "and back");
    expect(server_says(&a, 0, "message error on the bus"), "no line about it");
    peer_close(pa);
    peer_close(pb);
    close(fd);
    finish();
    server_stop(&a, "rubbish");
    server_stop(&b, "rubbish");
}

static void secret_test(const char *bus) {
    struct server a = { .may_say = BUS_LINES }, b = a, c = a, d = a;
    struct peer *pa, *pb, *pc, *pd;

    make_file("one.secret", BYTES("correct horse\n"));
    make_file("two.secret", BYTES("battery staple\n"));
    chmod(in_folder("one.secret"), 0600);
    chmod(in_folder("two.secret"), 0600);
    setenv("CHAT_SECRET", "correct horse", 1);
    if (!START(&d, "-b", bus, "--metrics")) return;
    unsetenv("CHAT_SECRET");
    if (!START(&a, "-b", bus, "--metrics", "-s", in_folder("one.secret")) ||
        !START(&b, "-b", bus, "--metrics", "--secret",
               in_folder("one.secret")) ||
        !START(&c, "-b", bus, "--metrics", "-s", in_folder("two.secret")))
        return;
    begin("secret: the same one joins, by file and by environment");
    pa = ws_open(a.port, "/");
    pb = ws_open(b.port, "/");
    pc = ws_open(c.port, "/");
    pd = ws_open(d.port, "/");
    expect_crossing(pa, pb, TEXT, "secret");
    ws_expect_text(pd, "secret");
    finish();
    begin("secret: another one neither reads nor writes");
    ws_text(pc, "forged");
    ws_expect_text(pc, "forged"); /* the first it gets: not "secret" */
    expect_metric(a.port, "chat_bus_errors_total", 1);
    expect_metric(c.port, "chat_bus_errors_total", 1);
    expect_crossing(pb, pa, TEXT, "still secret");
    ws_sync(pa);
    expect(pa->start == pa->end, "more came");
    expect(metric(c.port, "chat_bus_peers") == 0, "c has a peer");
    peer_close(pa);
    peer_close(pb);
    peer_close(pc);
    peer_close(pd);
    finish();
    server_stop(&a, "secret");
    server_stop(&b, "secret");
    server_stop(&c, "secret: the wrong one");
    server_stop(&d, "secret: by environment");
}

/* No bus: two such instances know nothing of each other. */
static void no_bus_test(void) {
    struct server a = { 0 }, b = { 0 };
    struct peer *pa, *pb;

    if (!START(&a, "-b", "none") || !START(&b, "-b", "none")) return;
    begin("-b none: alone");
    pa = ws_open(a.port, "/");
    pb = ws_open(b.port, "/");
    ws_text(pa, "to myself");
    ws_expect_text(pa, "to myself");
    ws_text(pb, "me too");
    ws_expect_text(pb, "me too");
    peer_close(pa);
    peer_close(pb);
    finish();
    server_stop(&a, "-b none");
    server_stop(&b, "-b none");
}

static void bus_test(void) {
    char bus[64], list[64];
    int port = free_port(), one = free_port(), two = free_port();

    snprintf(bus, sizeof bus, "239.255.80.80:%d", port);
    snprintf(list, sizeof list, "127.0.0.1:%d,127.0.0.1:%d", one, two);
    one_instance_test(bus);
    two_instances_test(bus, "a group");
    two_instances_test(list, "a list");
    three_instances_test(bus, false);
    three_instances_test(bus, true);
    late_joiner_test(bus);
    rubbish_test(port, bus);
    secret_test(bus);
    no_bus_test();
}

/* ---- Limits ------------------------------------------------------------ */

/* More origins or peers than there is room for. */
static void too_many_test(void) {
    const char *origins[24] = { "-b", "none" };
    char peers[65 * 16] = "", *end = peers;

    begin("refused: seventeen origins");
    for (int i = 0; i < 17; i++) origins[2 + i] = "-ohttp://one";
    expect_refused(origins, 2, 0, "origin");
    finish();
    begin("refused: sixty-five peers");
    for (int i = 1; i <= 65; i++)
        end += sprintf(end, "%s127.0.0.1:%d", i > 1 ? "," : "", i);
    expect_refused((const char *[]){ "-b", peers, NULL }, 2, 0, "bus");
    finish();
}

/* A directory that may be read but not entered has no listing. */
static void sealed_test(void) {
    struct server s = { .without_rights = true };
    struct response r;

    make_dir("sealed");
    make_dir("sealed/dir");
    make_file("sealed/dir/file", BYTES("x"));
    chmod(in_folder("sealed/dir"), 0444);
    if (!START(&s, "-b", "none", "-d", in_folder("sealed"))) return;
    begin("a directory that may not be entered: 404");
    peer_close(http_get(s.port, "/dir/", &r));
    expect(r.status == 404, "status %d", r.status);
    finish();
    server_stop(&s, "sealed");
    chmod(in_folder("sealed/dir"), 0700);
}

/* Each of the 1,024 channels that there can be has a client. */
static void channels_test(void) {
    struct server s = { 0 };
    struct response r;
    struct peer *peers[1024] = { NULL }, *p;
    char target[40];

    if (!START(&s, "-b", "none", "-m", "1K", "-H", "4K")) return;
    begin("1,024 channels with clients: 503 for another, the others go on");
    for (int i = 0; i < 1024; i++) {
        snprintf(target, sizeof target, "/?channel=%d", i);
        peers[i] = ws_open(s.port, target);
    }
    p = peer_open(s.port);
    ws_ask(p, "/?channel=another");
    read_response(p, false, &r);
    expect(r.status == 503, "to a WebSocket: status %d", r.status);
    peer_close(p);
    peer_close(http_get(s.port, "/send?message=x&channel=another", &r));
    expect(r.status == 503, "to /send: status %d", r.status);
    peer_close(http_get(s.port, "/send?message=y&channel=0", &r));
    expect(r.status == 200, "to /send in an old one: status %d", r.status);
    ws_expect_text(peers[0], "y");
    for (int i = 0; i < 1024; i++) peer_close(peers[i]);
    finish();
    server_stop(&s, "1,024 channels");
}

/* /send waits like any other sender for a client that takes nothing. */
static void patient_send_test(void) {
    struct server s = { 0 };
    struct sockaddr_in to = { .sin_family = AF_INET,
                              .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    struct response r;
    struct peer *slow, *p;
    static char request[40100];
    double begun, longest = 0;

    if (!START(&s, "-b", "none", "--metrics")) return;
    begin("/send waits for a reader until that is cut off");
    to.sin_port = htons((uint16_t)s.port);
    slow = peer_connect(&to, sizeof to, 4096);
    ws_ask(slow, "/?channel=full");
    ws_opened(slow);
    p = peer_open(s.port);
    snprintf(request, sizeof request,
             "POST /send?channel=full HTTP/1.1\r\nHost: localhost\r\n"
             "Content-Length: 40000\r\n\r\n%040000d", 0);
    for (int i = 0; i < 40 && !test.why[0]; i++) {
        begun = now();
        peer_text(p, request);
        read_response(p, false, &r);
        expect(r.status == 200, "status %d", r.status);
        if (now() - begun > longest) longest = now() - begun;
    }
    expect_metric(s.port, "chat_slow_clients_total", 1);
    peer_close(slow);
    peer_close(p);
    finish();
    printf("# longest wait of a /send: %.0f ms\n", longest * 1000);
    server_stop(&s, "a patient /send");
}

static void limits_test(void) {
    too_many_test();
    sealed_test();
    channels_test();
    patient_send_test();
}

/* ---- All of it --------------------------------------------------------- */

static int remove_one(const char *path, const struct stat *st, int type,
                      struct FTW *at) {
    (void)st, (void)type, (void)at;
    return remove(path);
}

int main(int argc, char **argv) {
    static const struct part parts[] = {
        { "late", late_test, true },        { "http", http_test, false },
        { "files", file_test, false },      { "open", open_test, false },
        { "frames", framing_test, false },  { "chat", chat_test, false },
        { "process", process_test, false }, { "bus", bus_test, false },
        { "limits", limits_test, false },
    };
    int status;

    harness_open();
    strcpy(folder, "/tmp/chat-test-XXXXXX");
    if (!mkdtemp(folder)) {
        perror("mkdtemp");
        return 1;
    }
    run_parts(parts, COUNT(parts), argc, argv);
    status = harness_close();
    nftw(folder, remove_one, 20, FTW_DEPTH | FTW_PHYS);
    return status;
}
