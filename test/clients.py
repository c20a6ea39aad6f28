#!/usr/bin/python3
"""Clients that nobody here wrote: proves that curl, Python's websockets and Node's ws and fetch
(clients.js) work with the chat.

    test/clients.py [-l] [CASE...]      all cases, or those named (-l lists them)
"""
import sys
sys.dont_write_bytecode = True
import asyncio, os, re, shlex, shutil, subprocess
from pathlib import Path
from harness import ROOT, SLOWER, Lab, Skip, check, equal, main, own_group

# --- curl ----------------------------------------------------------------------------------------

# What curl is asked; what it prints with -w '%{http_code}', a pattern; its standard input. {url}
# serves the built-in page, {files} curl's own folder: `fits` holds 64,000 bytes, `mega` 1 MiB and
# one, `page.html` the page, `half` the beginning of that.
MEGA = (1 << 20) + 1                                    # from here on, curl says Expect
CURL = (
    ("{url}/send?message=hello", "message sent200"),
    ("{url}/send -d message=a+b%20c", "message sent200"),
    ("{url}/send --data-binary @-", "message sent200", "two\nlines \"q\"\t\\"),
    ("-G {url}/send --data-urlencode 'message=grüße & 100% + <b> ☃'", "message sent200"),
    ("-X POST -T - {url}/send", ".*Content-Length.*411", "chunked"),
    ("-T fits {url}/send", ".*405"), ("-T - {url}/send", ".*4(05|11)", "a PUT"),
    ("--data-binary @fits {url}/send?channel=large", "message sent200"),
    ("-v -H 'Expect: 100-continue' --data-binary @fits {url}/send?channel=large",
     ".*HTTP/1.1 100 Continue.*message sent200"),
    ("{url}/messages?channel=large", '\\["(x{64000})","\\1"\\]200'),
    ("-H Expect: --data-binary @mega {url}/send", ".*413"),
    ("-v --data-binary @mega {url}/send", "(?!.* 100 Cont).*> Expect: 100-continue.*413"),
    ("-0 {url}/ -o got", "200"), ("--compressed {url}/ -o got", "200"),
    ("--http2 {url}/ -o got", "200"),
    ("-I {url}/", "HTTP/1.1 200 .*Content-Length: [0-9]+\r\n.*-Options: nosniff\r\n.*200"),
    ("{files}/mega -o mega.got", "200"), ("-C - -o half {files}/page.html", "206"),
    ("-C - -o got {files}/page.html", ".*416"), ("-r 0-4 {files}/page.html", "<!doc206"),
    ("--etag-save etag {files}/page.html -o got", "200"),
    ("--etag-compare etag {files}/page.html", "304"),
    ("-L {files}/sub -w '%{{url}}'", ".*a%20%26%20b.*/sub/?"),
    ("--path-as-is {files}/sub/../../secret", ".*40[04]"),
    ("--no-progress-meter -Z {url}/send?channel=row&message=[1-300]", "(message sent|200){600}"),
    ("{url6}/messages?channel=none", r"\[\]200"), ("{name}/messages?channel=none", r"\[\]200"),
)

def case_curl():
    """curl: each request of a table, and what it prints"""
    if not shutil.which("curl"):
        raise Skip("curl is not installed")
    with Lab(1, network=False) as lab:
        host, wrong = lab.hosts[0].start("-b", "none"), []
        page = host.get("/")
        os.mkdir(lab.path("sub"))
        for name, data in (("fits", b"x" * 64000), ("mega", bytes(MEGA)), ("page.html", page),
                           ("half", page[:5000]), ("sub/a & b", b"")):
            Path(lab.path(name)).write_bytes(data)
        files = lab.add_host().start("-b", "none", "-d", lab.directory)
        urls = {kind: f"http://{name}:{port}" for kind, name, port in
                (("url", "127.0.0.1", host.port), ("url6", "[::1]", host.port),
                 ("name", "localhost", host.port), ("files", "127.0.0.1", files.port))}
        for words, expected, *stdin in CURL:
            done = subprocess.run(
                ("curl", "-q", "-sS", "--noproxy", "*", "-m", str(20 * SLOWER),
                 "-w", "%{http_code}", *(word.format(**urls) for word in shlex.split(words))),
                cwd=lab.directory, input="".join(stdin).encode(), stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT)
            if not re.fullmatch(expected, done.stdout.decode(), re.S):
                wrong.append(f"curl {words:.90}: {done.stdout[-200:]!r}, not {expected}")
        for name, data in ("half", page), ("got", page), ("mega.got", bytes(MEGA)):
            if Path(lab.path(name)).read_bytes() != data:
                wrong.append(f"{name} is not what it should be")
        check(not wrong, "; ".join(wrong))
        equal(sorted(map(int, host.history("row"))), [*range(1, 301)], "the row")
        equal(host.history(), ["hello", "message=a+b%20c", "two\nlines \"q\"\t\\",
                               "grüße & 100% + <b> ☃"], "what was sent")
        return f"{len(CURL)} requests"

# --- Python's websockets, Node's ws and fetch -----------------------------------------------------

async def talk(url):
    from websockets import connect
    a, b = await connect(url), await connect(url)
    equal(a.extensions, [], "the compression that is agreed on")

    async def heard(expected, *clients):
        for c in clients:
            equal(await c.recv(), expected, "received")
    for data in ("", "grüße ☃ 😀\0", b"", b"\0\xff", "x" * 125, "x" * 126, b"y" * 64000):
        await a.send(data)
        await heard(data, a, b)
    await a.send(["one ", "", "twö ", "three"])
    await heard("one twö three", a, b)
    for data in b"", bytes(125):
        await (await a.ping(data))
    await a.pong(b"nobody asked")
    await a.close(4999, "bye")
    await b.send("x" * 64001)
    for c, code in (a, 4999), (b, 1009):
        await c.wait_closed()
        equal(c.close_code, code, "close code")

def case_websockets():
    """Python's websockets"""
    try:
        import websockets
    except ImportError:
        raise Skip("python3-websockets is not installed") from None
    with Lab(1, network=False) as lab:
        port = lab.hosts[0].start("-b", "none").port
        asyncio.run(asyncio.wait_for(talk(f"ws://localhost:{port}"), 20 * SLOWER))

def node(one, two, **environment):
    """Runs clients.js, which says on stderr what is wrong."""
    if not shutil.which("node") or not os.path.isdir(ROOT + "/test/node_modules/ws"):
        raise Skip("needs node and its packages ('npm ci' in test/)")
    done = subprocess.run(("node", ROOT + "/test/clients.js", one, two),
                          env={**os.environ, **environment, "SLOWER": str(SLOWER)})
    equal(done.returncode, 0, "status of clients.js")

def case_node():
    """Node's ws and fetch, on two instances"""
    with Lab(2, network=False) as lab:
        lab.start("-b", own_group())
        node(*(f"http://localhost:{host.port}" for host in lab.hosts))

if __name__ == "__main__":
    main("clients", (case_node, case_curl, case_websockets))
