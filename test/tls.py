#!/usr/bin/python3
"""Tests https and wss against $BUILD/chat-tls, the program built with TLS:
by hand, with openssl s_client, with Python's websockets, and (tls.js) with
Node's ws and Chromium. Name cases to run only those.
"""
import asyncio
import contextlib
import ctypes
import os
import re
import selectors
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import traceback

HERE = os.path.dirname(os.path.abspath(__file__))
PLAIN = os.path.abspath(os.environ.get("CHAT", "./chat"))
CHAT = os.path.abspath(os.environ.get("BUILD", "build") + "/chat-tls")
SECONDS = 20  # what one wait may take
KIB, MIB = 1024, 1024 * 1024
PEER = r"chat: peer [0-9a-f]{16} (joined|left)"


class Failure(Exception):
    pass


def check(condition, text):
    if not condition:
        raise Failure(text)


def equal(got, expected, what):
    check(got == expected, f"{what}: expected {expected!r:.200}, "
                           f"got {got!r:.200}")


def until(what, ready, seconds=SECONDS):
    """Asks again and again; returns the first answer that is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        answer = ready()
        if answer:
            return answer
        time.sleep(0.02)
    raise Failure(f"{what}: not within {seconds} s")


# --- Certificates: of a root, an intermediate and two servers. -------------

def openssl(*arguments):
    done = subprocess.run(["openssl", *arguments], capture_output=True,
                          stdin=subprocess.DEVNULL, text=True)
    check(done.returncode == 0, f"openssl {arguments[0]}: {done.stderr}")


def certify(name, issuer=None, kind="ec", authority=False):
    """Writes NAME.key and NAME.pem."""
    new = ["-newkey", "rsa:2048"] if kind == "rsa" else [
        "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    signer = ["-CA", f"{issuer}.pem", "-CAkey", f"{issuer}.key"]
    openssl("req", "-x509", *new, "-noenc", "-days", "2", "-subj",
            f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.pem",
            "-addext", "subjectAltName=DNS:localhost",
            "-addext", "basicConstraints=critical,CA:" +
            ("TRUE" if authority else "FALSE"),
            *(signer if issuer else []))


def certificates():
    certify("root", authority=True)
    certify("middle", "root", authority=True)
    certify("one", "middle")
    certify("two", "middle")
    certify("rsa", "middle", "rsa")
    for name in ("one", "two", "rsa"):
        with open(f"{name}.pem", "a") as file:
            file.write(open("middle.pem").read())
    openssl("ec", "-in", "one.key", "-aes128", "-passout", "pass:secret",
            "-out", "locked.key")
    with open("garbage.pem", "w") as file:
        file.write("-----BEGIN CERTIFICATE-----\nnothing\n")


def install(name, key=None):
    """Puts files where the server looks for them."""
    for source, target in ((f"{name}.pem", "live.pem"),
                           (f"{key or name}.key", "live.key")):
        shutil.copy(source, target + ".new")
        os.rename(target + ".new", target)


def leaf(name):
    with open(f"{name}.pem") as file:
        return ssl.PEM_cert_to_DER_cert(
            file.read().partition("-----END CERTIFICATE-----")[0]
            + "-----END CERTIFICATE-----\n")


# --- The server. ------------------------------------------------------------

class Server:
    """`with` starts and ends it; its end must be clean."""

    def __init__(self, *options, expect=(), bus="none", env=None):
        self.options = ["-p", "0", "-q", "--metrics", "-b", bus, "--cert",
                        "live.pem", "--key", "live.key", *options]
        self.expect = ["chat: listening on https://localhost:[0-9]+/, bus .*",
                       *([PEER] if bus != "none" else []), *expect]
        self.env, self.connections, self.lines = env or {}, [], Lines()

    def __enter__(self):
        self.process = subprocess.Popen(
            [CHAT, *self.options], stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **self.env})
        self.reader = threading.Thread(
            target=lambda: self.lines.extend(
                line.rstrip("\n") for line in self.process.stderr))
        self.reader.start()
        try:
            self.port = int(self.line("listening on .*:([0-9]+)/")[1])
        except Failure:
            self.process.kill()
            raise
        return self

    def __exit__(self, kind, *_):
        for connection in self.connections:
            connection.close()
        try:
            self.stop()
        except Failure:
            if kind is None:
                raise

    def line(self, pattern):
        return until(f"a line /{pattern}/", lambda: next(
            filter(None, (re.search(pattern, x) for x in self.lines)), None))

    def stop(self):
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise Failure("no end after SIGTERM") from None
        finally:
            self.reader.join()
        odd = [x for x in self.lines
               if not any(re.fullmatch(e, x) for e in self.expect)]
        if odd:
            print("\n".join(odd), file=sys.stderr)
        equal(odd[:3], [], "stderr")
        equal(self.process.returncode, 0, "exit status")

    def hup(self):
        self.process.send_signal(signal.SIGHUP)

    def tcp(self, buffer=0):
        s = socket.socket()
        s.settimeout(SECONDS)
        if buffer:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        s.connect(("127.0.0.1", self.port))
        return s

    def connect(self, context=None, buffer=0, **options):
        """A TLS connection. An end without close_notify is an error."""
        s = (context or client()).wrap_socket(
            self.tcp(buffer), suppress_ragged_eofs=False, **options)
        self.connections.append(s)
        return s

    def get(self, path, context=None, **options):
        """Status and body of a request on a connection of its own."""
        with self.connect(context, **options) as s:
            s.sendall(f"GET {path} HTTP/1.0\r\nHost: x\r\n\r\n".encode())
            head, _, body = read_all(s).partition(b"\r\n\r\n")
        return int(head.split()[1]), body

    def page(self):
        equal(self.get("/messages")[0], 200, "a client that does it right")

    def metric(self, name):
        return int(re.search(rb"\nchat_%s (\d+)" % name.encode(),
                             self.get("/metrics")[1])[1])

    def memory(self, name="VmRSS"):
        with open(f"/proc/{self.process.pid}/status") as file:
            return int(re.search(rf"{name}:\s+(\d+) kB", file.read())[1]) * KIB


class Lines(list):
    """Grows by the line, where extend() of a list would wait for the end."""

    def extend(self, lines):
        for line in lines:
            self.append(line)


def client(*, lowest=None, highest=None, protocols=None, trust=None):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF  # Python's own choice
    context.check_hostname = trust is not None
    context.verify_mode = ssl.CERT_REQUIRED if trust else ssl.CERT_NONE
    if trust:
        context.load_verify_locations(trust)
    if highest and highest < ssl.TLSVersion.TLSv1_2:
        context.set_ciphers("DEFAULT:@SECLEVEL=0")
    with warnings_off():
        if lowest:
            context.minimum_version = lowest
        if highest:
            context.maximum_version = highest
    if protocols:
        context.set_alpn_protocols(protocols)
    return context


@contextlib.contextmanager
def warnings_off():
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def read_all(s):
    data = bytearray()
    while True:
        piece = s.recv(1 << 16)
        if not piece:
            return bytes(data)
        data += piece


V10, V11, V12, V13 = (ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1,
                      ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)


# --- WebSocket, by hand. ----------------------------------------------------

def frame(payload, opcode=1, mask=b"\x80"):
    """As a client sends it, with a key of zeros; as a server without mask."""
    m, n = mask[0], len(payload)
    if n < 126:
        head = bytes((0x80 | opcode, m | n))
    elif n < 65536:
        head = bytes((0x80 | opcode, m | 126)) + n.to_bytes(2, "big")
    else:
        head = bytes((0x80 | opcode, m | 127)) + n.to_bytes(8, "big")
    return head + (bytes(4) if m else b"") + payload


def served(payload, opcode=1):
    return frame(payload, opcode, b"\0")


UPGRADE = ("GET {} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: "
           "Upgrade\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
           "Sec-WebSocket-Version: 13\r\n\r\n")


class WebSocket:

    def __init__(self, server, path="/", **options):
        self.socket, self.rest = server.connect(**options), b""
        self.write(UPGRADE.format(path).encode())
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += self.read(1)
        check(head.startswith(b"HTTP/1.1 101 "), f"no WebSocket: {head!r}")

    def write(self, data):
        self.socket.sendall(data)

    def send(self, payload, opcode=1):
        self.write(frame(payload, opcode))

    def read(self, size):
        data = bytearray(self.rest[:size])
        self.rest = self.rest[size:]
        while len(data) < size:
            piece = self.socket.recv(size - len(data))
            check(piece, f"the end after {len(data)} of {size} bytes")
            data += piece
        return bytes(data)

    def expect(self, stream, what):
        """The next bytes must be these."""
        got = self.read(len(stream))
        if got != stream:
            at = next(i for i in range(len(got)) if got[i] != stream[i])
            raise Failure(f"{what}: differs at byte {at} of {len(stream)}: "
                          f"{got[at:at + 40]!r} for {stream[at:at + 40]!r}")

    def echo(self, payload=b"still here"):
        self.send(payload)
        self.expect(served(payload), "echo")

    def expect_close(self, code, what="close"):
        """A close frame, then close_notify."""
        self.expect(served(code.to_bytes(2, "big"), 8), what)
        equal(self.socket.recv(1), b"", f"{what}: what comes after it")
        self.socket.close()


def message(number, size):
    start = b"%d:" % number
    return (start * (size // len(start) + 1))[:size]


# --- Cases. -----------------------------------------------------------------

def options_are_checked():
    """Bad options and files: the exit status and one line."""
    def says(program, status, pattern, *options):
        done = subprocess.run(
            [program, "-p", "0", "-b", "none", *options], timeout=SECONDS,
            stdin=subprocess.DEVNULL, capture_output=True, text=True,
            start_new_session=True)
        check(done.returncode == status and
              re.fullmatch(f"chat: {pattern}\n", done.stderr),
              f"{options}: {status} and /{pattern}/ expected, got "
              f"{done.returncode} and {done.stderr!r}")
    both = ("--cert", "one.pem", "--key", "one.key")
    says(CHAT, 2, "cert: .*--key.*", "--cert", "one.pem")
    says(CHAT, 2, "key: .*--cert.*", "--key", "one.key")
    if b"SSL_CTX_new" not in open(PLAIN, "rb").read():
        says(PLAIN, 2, "cert: .*without TLS.*", *both)
    for cert, key in (("none", "one.key"), ("one.pem", "none"),
                      ("garbage.pem", "one.key"), ("one.pem", "garbage.pem"),
                      ("one.pem", "two.key"), ("one.pem", "rsa.key"),
                      ("rsa.pem", "one.key"), ("one.pem", "locked.key"),
                      ("/", "one.key"), ("/dev/null", "/dev/null")):
        says(CHAT, 1, f"{cert}, {key}: .+", "--cert", cert, "--key", key)


def page_and_send():
    """The page and /send, by a client that checks the whole chain."""
    with Server() as s:
        trust = client(trust="root.pem")
        status, body = s.get("/", trust, server_hostname="localhost")
        with open(f"{HERE}/../index.html", "rb") as page:
            check(status == 200 and body == page.read(), "not the page")
        equal(s.get("/send?message=hello"), (200, b"message sent"), "/send")
        with s.connect() as c:
            body = b"x" * 60000
            c.sendall(b"POST /send HTTP/1.1\r\nHost: x\r\nConnection: close"
                      b"\r\nContent-Length: 60000\r\n\r\n" + body)
            check(read_all(c).endswith(b"message sent"), "POST")
        equal(s.get("/messages")[1], b'["hello","%s"]' % body, "/messages")


def versions():
    """TLS 1.2 and 1.3 only, even where the system would allow older ones."""
    with open("lax.cnf", "w") as file:
        file.write("openssl_conf = a\n[a]\nssl_conf = b\n[b]\n"
                   "system_default = c\n[c]\nMinProtocol = TLSv1\n"
                   "CipherString = DEFAULT:@SECLEVEL=0\n")
    with Server(env={"OPENSSL_CONF": os.path.abspath("lax.cnf")}) as s:
        for version in (V12, V13):
            with s.connect(client(lowest=version, highest=version)) as c:
                equal(c.version(), str(version.name).replace("_", "."),
                      "version")
                c.sendall(b"GET /messages HTTP/1.0\r\n\r\n")
                check(read_all(c).startswith(b"HTTP/1.1 200 "), c.version())
        for version in (V10, V11):
            try:
                s.connect(client(lowest=version, highest=version)).close()
                raise Failure(f"{version.name} was accepted")
            except ssl.SSLError as error:
                equal(error.reason, "TLSV1_ALERT_PROTOCOL_VERSION",
                      version.name)


def protocols():
    """ALPN: http/1.1 is chosen, h2 alone refused, none is fine."""
    with Server() as s:
        for offer in (["h2", "http/1.1"], ["http/1.1"], None):
            with s.connect(client(protocols=offer)) as c:
                equal(c.selected_alpn_protocol(), offer and "http/1.1",
                      f"chosen of {offer}")
        try:
            s.connect(client(protocols=["h2"])).close()
            raise Failure("h2 alone was accepted")
        except ssl.SSLError as error:
            check("ALERT_NO_APPLICATION_PROTOCOL" in str(error) or
                  "alert no application protocol" in str(error),
                  f"h2 alone: {error}")


def resumption():
    """A ticket resumes a session."""
    with Server() as s:
        for version in (V12, V13):
            context, session = client(lowest=version, highest=version), None
            for resumed in (False, True, True):
                with s.connect(context, session=session) as c:
                    equal(c.session_reused, resumed, f"{c.version()} resumed")
                    c.sendall(b"GET /messages HTTP/1.0\r\n\r\n")
                    read_all(c)
                    session = c.session
                    check(session.has_ticket, f"{c.version()}: no ticket")


class Tool:
    """openssl s_client, which takes single letters as commands."""

    def __init__(self, server, *options):
        self.process = subprocess.Popen(
            ["openssl", "s_client", "-connect", f"127.0.0.1:{server.port}",
             *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT)
        self.output = bytearray()
        os.set_blocking(self.process.stdout.fileno(), False)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        with contextlib.suppress(BrokenPipeError):
            self.process.communicate()

    def write(self, data):
        try:
            self.process.stdin.write(data)
            self.process.stdin.flush()
        except BrokenPipeError:
            raise Failure(f"s_client is gone: {self.output[-300:]!r} "
                          f"{self.process.stdout.read()!r}") from None

    def wait(self, text):
        def arrived():
            self.output += self.process.stdout.read() or b""
            return text in self.output
        try:
            until(text, arrived)
        except Failure:
            raise Failure(f"s_client: no {text}: {self.output[-300:]!r}")
        del self.output[:self.output.index(text) + len(text)]


def key_updates():
    """openssl s_client: keys change in the middle of a conversation."""
    with Server() as s, Tool(s, "-tls1_3") as tool:
        tool.wait(b"Verify return code")
        tool.write(UPGRADE.format("/").encode())
        tool.wait(b"HTTP/1.1 101 ")
        tool.wait(b"\r\n\r\n")
        for number, letter in enumerate(b"KkKKk"):
            tool.write(bytes((letter, 10)))
            tool.wait(b"KEYUPDATE")
            tool.write(frame(b"number %d" % number))
            tool.wait(served(b"number %d" % number))
            s.page()


def renegotiation():
    """openssl s_client: refused, and the others do not notice."""
    with Server() as s:
        other = WebSocket(s)
        with Tool(s, "-tls1_2") as tool:
            tool.wait(b"Verify return code")
            tool.write(b"GET /send?message=a HTTP/1.1\r\nHost: x\r\n\r\n")
            tool.wait(b"message sent")
            tool.write(b"R\n")
            tool.wait(b"RENEGOTIATING")
            tool.wait(b"no renegotiation")
        other.expect(served(b"a"), "/send")
        other.echo()
        until("the end of it", lambda: s.metric("clients") == 1)


def key_update_flood():
    """Thousands of key updates at once, from one who is blocked within a
    record: meanwhile the others are served, and then he reads on."""
    lib, pointer, number = ctypes.CDLL("libssl.so.3"), ctypes.c_void_p, \
        ctypes.c_int
    text = ctypes.c_char_p

    def function(name, result, *arguments):
        f = getattr(lib, name)
        f.restype, f.argtypes = result, arguments
        return f
    with Server("-H", "8M") as s, s.tcp(buffer=4 * KIB) as raw:
        other = WebSocket(s)
        raw.settimeout(None)
        tls = function("SSL_new", pointer, pointer)(
            function("SSL_CTX_new", pointer, pointer)(
                function("TLS_client_method", pointer)()))
        function("SSL_set_fd", number, pointer, number)(tls, raw.fileno())
        write = function("SSL_write", number, pointer, text, number)
        update = function("SSL_key_update", number, pointer, number)
        step = function("SSL_do_handshake", number, pointer)
        function("SSL_set_connect_state", None, pointer)(tls)
        equal(step(tls), 1, "handshake")
        start = UPGRADE.format("/").encode()
        equal(write(tls, start, len(start)), len(start), "request")
        until("it to be there", lambda: s.metric("clients") == 2)
        stream = [message(i, 5000) for i in range(150)]
        for payload in stream:
            other.echo(payload)
        # All records are made first, and so come faster than they are read.
        # The last asks for the other side's keys to change as well. (Another
        # after that would be the end, openssl/openssl issue 13729.)
        memory = function("BIO_new", pointer, pointer)(
            function("BIO_s_mem", pointer)())
        function("SSL_set0_wbio", None, pointer, pointer)(tls, memory)
        for i in range(8000):
            check(update(tls, i == 7999) == 1 and step(tls) == 1, "no key update")
        end = frame(b"the end")
        write(tls, end, len(end))
        records = ctypes.create_string_buffer(MIB)
        size = function("BIO_read", number, pointer, text, number)(
            memory, records, MIB)
        check(size > 8000 * 20, f"{size} bytes of key updates")
        raw.sendall(records.raw[:size])
        for i in range(5):
            stream.append(b"meanwhile %d" % i)
            other.echo(stream[-1])
        stream.append(b"the end")
        other.expect(served(b"the end"), "after the key updates")
        read = function("SSL_read", number, pointer, text, number)
        due, got, n = b"".join(map(served, stream)), b"", 1
        while n > 0 and due[-20:] not in got:
            n = read(tls, records, MIB)
            got += records.raw[:max(n, 0)]
        check(got.endswith(b"\r\n\r\n" + due), f"the blocked one got "
              f"{len(got)} other bytes than {len(due)}: {got[-40:]!r}")
        function("SSL_free", None, pointer)(tls)


def strangers():
    """Plain HTTP, garbage and half hellos: an end, and nobody else minds."""
    with Server() as s:
        other = WebSocket(s)
        for data in (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\0" * 5000,
                     os.urandom(50000), b"\x16\x03\x01\xff\xff" + b"\0" * 70000,
                     b"\x16\x03\x01\0\0", b"\x15\x03\x03\0\2\2\x28",
                     b"\x80\x2e\x01\0\2" + b"\0" * 60, hello()[:-9] + b"\0" * 9,
                     hello() * 2):
            with s.tcp() as raw, contextlib.suppress(OSError):
                try:
                    raw.sendall(data)
                    raw.shutdown(socket.SHUT_WR)
                    answer = read_all(raw)
                except socket.timeout:
                    raise Failure(f"no end after {data[:30]!r}")
                check(b"HTTP" not in answer, f"{data[:30]!r}: {answer!r:.99}")
        other.echo()
        s.page()


def hello():
    """The first bytes that a client sends."""
    out = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        client().wrap_bio(ssl.MemoryBIO(), out).do_handshake()
    return out.read()


def long_chain():
    """A handshake larger than the send buffer goes on when it is read."""
    comment = "x" * 60000
    openssl("req", "-x509", "-newkey", "ec", "-pkeyopt",
            "ec_paramgen_curve:P-256", "-noenc", "-keyout", "long.key", "-out",
            "long.pem", "-subj", "/CN=long", "-addext", f"nsComment={comment}")
    with open("long.pem") as one, open("live.pem", "a") as all_of_them:
        all_of_them.write(one.read() * 12)
    with Server() as s, s.tcp(buffer=4 * KIB) as raw:
        raw.sendall(hello())
        raw.recv(1)

        def asleep():
            with open(f"/proc/{s.process.pid}/stat") as file:
                return file.read().rpartition(")")[2].split()[0] == "S"
        until("the server to wait", asleep)
        size = 0
        while size < 12 * len(comment):
            piece = raw.recv(1 << 16)
            check(piece, f"the end after {size} bytes")
            size += len(piece)


def stalls():
    """Who does not get on is cut off after 10 s."""
    first = hello()
    with Server() as s:
        begun = time.monotonic()
        half, mute, slow = s.tcp(), s.tcp(), s.tcp()
        half.sendall(first[:len(first) // 2])
        asks, begins = s.connect(), s.connect()
        begins.sendall(b"GET / HTTP/1.1\r\nHost: ")
        left = {"half a hello": half, "no byte": mute, "a byte a time": slow,
                "no request": asks, "half a request": begins}
        trickle, ends = iter(first), {}
        while left and time.monotonic() < begun + 30:
            with contextlib.suppress(OSError):
                if "a byte a time" in left:
                    slow.send(bytes((next(trickle),)))
            for name, connection in list(left.items()):
                connection.settimeout(0.05)
                try:
                    data = connection.recv(4096)
                except (TimeoutError, ssl.SSLWantReadError):
                    continue
                except OSError:
                    data = b""
                if name == "half a request":
                    check(data.startswith(b"HTTP/1.1 408 "), f"not 408: {data}")
                else:
                    equal(data, b"", name)
                ends[name] = time.monotonic() - begun
                del left[name]
        check(not left, f"not cut off: {list(left)}")
        for name, seconds in ends.items():
            check(9.5 < seconds < 20, f"{name}: cut off after {seconds:.1f} s")
        for connection in (half, mute, slow, asks, begins):
            connection.close()
        s.page()


def ends():
    """close_notify comes at the end, whoever closes first and how."""
    with Server() as s:
        with s.connect() as c:  # Connection: close
            c.sendall(b"GET / HTTP/1.0\r\n\r\n")
            read_all(c)
        ws = WebSocket(s)
        ws.send((1000).to_bytes(2, "big"), 8)
        ws.expect_close(1000)
        ws = WebSocket(s)
        ws.write(b"\xff\x80")
        ws.expect_close(1002)
        with s.connect() as c:  # the client is first
            c.sendall(b"GET /messages HTTP/1.1\r\nHost: x\r\n\r\n")
            check(c.recv(4096).startswith(b"HTTP/1.1 200 "), "no answer")
            c.unwrap().close()  # fails without close_notify
        rude = [WebSocket(s) for _ in range(3)]
        until("3 clients", lambda: s.metric("clients") == 3)
        for ws in rude:  # a client that just goes
            ws.socket.shutdown(socket.SHUT_WR)  # of TCP, without a word
        until("no client", lambda: s.metric("clients") == 0)
        s.page()
        idle, ws = s.connect(), WebSocket(s)
        s.page()
        s.process.terminate()
        ws.expect_close(1001, "SIGTERM")
        equal(idle.recv(1), b"", "SIGTERM, without a request")


def renewal():
    """SIGHUP: new files for new clients, with -d and a relative path after
    a listing; bad ones change nothing; who is there stays."""
    os.makedirs("files/deep", exist_ok=True)
    with Server("-d", "files", expect=["chat: live.pem, live.key: .+"]) as s:
        def shown():
            with s.connect() as c:
                return c.getpeercert(True)
        old = WebSocket(s)
        equal(shown(), leaf("one"), "the first certificate")
        check(b"deep/" in s.get("/")[1], "no listing")
        install("two")
        s.hup()
        until("the new one", lambda: shown() == leaf("two"))
        old.echo()
        bad = 0
        for name, key, reason in (
                ("one", "two", "key values mismatch"),
                ("garbage", "one", "PEM"), ("one", "rsa", "no certificate"),
                ("one", "locked", "decrypt"), (None, None, "No such file")):
            if name:
                if name == "garbage":
                    shutil.copy("garbage.pem", "live.pem")
                else:
                    install(name, key)
            else:
                os.unlink("live.key")
                os.unlink("live.pem")
            with s.tcp() as raw, contextlib.suppress(OSError):
                raw.sendall(b"garbage, whose error is no reason for ours")
                read_all(raw)
            s.hup()
            bad += 1
            until(f"{bad} lines", lambda: len(s.lines) == 1 + bad)
            check(reason in s.lines[-1], f"{name}, {key}: {s.lines[-1]}")
            equal(shown(), leaf("two"), f"after {name}, {key}")
            old.echo()
        install("one")
        s.hup()
        until("the third", lambda: shown() == leaf("one"))
        old.echo()
        equal(len(s.lines), 1 + bad, "lines on stderr")


def workers():
    """-j 2: all of them renew, one line where they cannot, and 1001."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        bus = f"239.255.80.80:{probe.getsockname()[1]}"
    with Server("-j", "2", bus=bus,
                expect=["chat: live.pem, live.key: .+"]) as s:
        def shown():
            with s.connect() as c:
                return c.getpeercert(True)
        until("both workers", lambda: sum(
            bool(re.fullmatch(PEER, x)) for x in s.lines) >= 2)
        clients = [WebSocket(s) for _ in range(16)]
        clients[0].send(b"to all")
        for ws in clients:
            ws.expect(served(b"to all"), "over the bus")
        install("two")
        s.hup()
        until("the new one", lambda: all(
            shown() == leaf("two") for _ in range(16)))
        install("one", "two")
        s.hup()
        s.line("live.key: ")
        for _ in range(16):
            equal(shown(), leaf("two"), "after a bad one")
        clients[3].send(b"again")
        for ws in clients:
            ws.expect(served(b"again"), "after SIGHUP")
        equal(sum("live.key" in x for x in s.lines), 1, "lines on stderr")
        s.process.terminate()
        for ws in clients:
            ws.expect_close(1001)


def files():
    """Some MB, byte for byte, for readers slow and fast."""
    os.makedirs("files", exist_ok=True)
    data = os.urandom(5 * MIB + 12345)
    with open("files/big.bin", "wb") as file:
        file.write(data)
    with Server("-d", "files") as s:
        slow = s.connect(buffer=4 * KIB)
        slow.sendall(b"GET /big.bin HTTP/1.1\r\nHost: x\r\n\r\n" * 2)
        for version in (V12, V13):
            context = client(lowest=version, highest=version)
            status, body = s.get("/big.bin", context)
            check(status == 200 and body == data, f"{version.name}: differs")
        for turn in range(2):
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += slow.recv(1)
            equal(int(re.search(rb"Content-Length: (\d+)", head)[1]),
                  len(data), "Content-Length")
            at, piece = 0, b"-"
            while at < len(data) and piece:
                piece = slow.recv(min(1 + at * 7919 % 30011, len(data) - at))
                check(data.startswith(piece, at), f"{turn}: differs at {at}")
                at += len(piece)
        slow.close()


def big_messages():
    """1 MB and sizes about those of records, from and to two versions."""
    with Server("-m", "1M") as s:
        a = WebSocket(s, context=client(highest=V12))
        b = WebSocket(s, context=client(lowest=V13))
        for number, size in enumerate((16383, 16384, 16385, 32768, 65535,
                                       65536, 300000, MIB - 1, MIB)):
            payload = message(number, size)
            for sender in (a, b):
                sender.send(payload)
                a.expect(served(payload), f"{size} bytes over 1.2")
                b.expect(served(payload), f"{size} bytes over 1.3")
        b.write(frame(bytes(MIB + 1), 2)[:50])
        b.expect_close(1009)


def records():
    """Many tiny records at once, and many frames in one record."""
    with Server() as s:
        def exchange(pieces, expected, what):
            """All pieces in records of their own, but in one send()."""
            raw, incoming, out = s.tcp(), ssl.MemoryBIO(), ssl.MemoryBIO()
            tls = client().wrap_bio(incoming, out)
            got = b""

            def step(function, *arguments):
                while True:
                    try:
                        return function(*arguments)
                    except ssl.SSLWantReadError:
                        raw.sendall(out.read())
                        data = raw.recv(1 << 16)
                        check(data, f"{what}: the end")
                        incoming.write(data)
            step(tls.do_handshake)
            for piece in pieces:
                tls.write(piece)
            raw.sendall(out.read())  # together with the handshake's end
            while expected not in got and len(got) < 2 * MIB:
                got += step(tls.read, 1 << 16)
            raw.close()
        talk = b"".join(frame(message(i, i)) for i in range(190))
        reply = b"".join(served(message(i, i)) for i in range(190))
        start = UPGRADE.format("/?channel=tiny").encode()
        exchange([bytes((b,)) for b in start + talk], reply, "1-byte records")
        # What begins within a message, and ends in the same record.
        exchange([start + talk[:5003], talk[5003:]], reply, "full records")
        exchange([start] + [frame(message(i, 9)) for i in range(3000)],
                 b"".join(served(message(i, 9)) for i in range(3000)),
                 "a frame a record")


def blocked_reader():
    """Blocked within a record, it goes on later, exactly where it was, also
    where pongs are due between frames."""
    with Server("-H", "8M") as s:
        sender = WebSocket(s)
        for version, buffer in ((V12, 2 * KIB), (V13, 2 * KIB), (V13, 30000)):
            context = client(lowest=version, highest=version)
            slow = WebSocket(s, context=context, buffer=buffer)
            stream = b""
            for number in range(600):
                payload = message(number, number * number % 9001)
                sender.send(payload)
                sender.expect(served(payload), "the fast one")
                stream += served(payload)
                if number == 400:
                    slow.send(b"in between", 9)
            pong, got, at = served(b"in between", 10), b"", 0
            while len(got) < len(stream) + len(pong):
                at += 1
                piece = slow.socket.recv(1 + at * 977 % 5003)
                check(piece, "the end")
                got += piece
            place = got.find(pong)
            check(place >= 0, "no pong")
            equal(hash(got[:place] + got[place + len(pong):]), hash(stream),
                  f"{version.name}: the stream without its pong")
            slow.socket.close()


def flood():
    """A flood with one who never reads: all others get everything, in order,
    he is cut off, and the memory stays bounded."""
    count, size, readers = 2000, 5000, 12
    sent = b"".join(frame(message(i, size)) for i in range(count))
    due = memoryview(b"".join(served(message(i, size)) for i in range(count)))
    with Server() as s:
        slow = WebSocket(s, buffer=4 * KIB)
        selector, places, out = selectors.DefaultSelector(), {}, 0
        before = s.memory("VmHWM")
        for i in range(readers):
            ws = WebSocket(s)
            ws.socket.setblocking(False)
            both = selectors.EVENT_READ | selectors.EVENT_WRITE
            selector.register(ws.socket, both if i == 0 else 1, i)
            places[i] = 0
        end = time.monotonic() + 60
        while min(places.values()) < len(due):
            check(time.monotonic() < end, f"stands still: {places}, {out}")
            for key, _ in selector.select(1):
                c, i = key.fileobj, key.data
                with contextlib.suppress(ssl.SSLWantReadError,
                                         ssl.SSLWantWriteError):
                    while True:
                        piece = c.recv(1 << 16)
                        check(piece, f"{i}: cut off at {places[i]}")
                        at = places[i]
                        check(due[at:at + len(piece)] == piece,
                              f"{i}: differs after {at} bytes")
                        places[i] += len(piece)
                if i == 0 and out < len(sent):
                    with contextlib.suppress(ssl.SSLWantReadError,
                                             ssl.SSLWantWriteError):
                        out += c.send(sent[out:out + 16384])
                elif i == 0:
                    selector.modify(c, selectors.EVENT_READ, 0)
        grown = s.memory("VmHWM") - before
        for key in list(selector.get_map().values()):
            key.fileobj.close()
        equal(s.metric("slow_clients_total"), 1, "cut off as slow")
        place = 0
        try:
            while True:
                piece = slow.socket.recv(1 << 16)
                check(piece, "cut off within a record, but close_notify came")
                check(due[place:place + len(piece)] == piece,
                      f"the slow one's stream differs after {place} bytes")
                place += len(piece)
        except (ssl.SSLError, ConnectionError):
            pass
        check(0 < place < len(due), f"the slow one got {place} bytes")
        if not sanitized():
            check(grown < 4 * MIB, f"grew by {grown // KIB} KiB")
    return f"grew by {grown // KIB} KiB, slow one cut at {place // KIB} KiB"


def sanitized():
    with open(CHAT, "rb") as file:
        return b"__asan_init" in file.read()


def idle_clients():
    """Many that say nothing: what each costs, and all get a message."""
    count = 200 if sanitized() else 1000
    with Server() as s:
        context = client()
        WebSocket(s, context=context).echo(b"first")
        before, clients = s.memory(), []
        for _ in range(count):
            clients.append(WebSocket(s, "/?channel=many", context=context))
        each = (s.memory() - before) / count / KIB
        clients[0].send(b"to all")
        for ws in clients:
            ws.expect(served(b"to all"), "to all")
        after = (s.memory() - before) / count / KIB
        for ws in clients:
            ws.socket.close()
        if not sanitized():
            check(each < 60 and after < 60, f"{each:.1f} KiB each, after a "
                                            f"message {after:.1f} KiB")
    return f"{count} clients, {each:.1f} KiB each, {after:.1f} after a message"


def websockets_library():
    """Python's websockets."""
    try:
        import websockets
    except ImportError:
        return "skip: python3-websockets is not installed"

    async def talk(port):
        url = f"wss://127.0.0.1:{port}/?channel=python"
        async with websockets.connect(url, ssl=client(), max_size=None) as a, \
                websockets.connect(url, ssl=client(), max_size=None) as b:
            for data in ("hello", "grüße ☃ 😀", b"\0\xff", "x" * 65536):
                await a.send(data)
                equal(await a.recv(), data, "echo")
                equal(await b.recv(), data, "to the other")
            await (await b.ping())
            await a.close()
            equal(a.close_code, 1000, "close")

    with Server() as s:
        asyncio.run(asyncio.wait_for(talk(s.port), SECONDS))


def browser_and_node():
    """tls.js: its own lines tell."""
    if not shutil.which("node") or not os.path.isdir(f"{HERE}/node_modules"):
        return "skip: needs node and its packages ('npm ci' in test/)"
    with Server() as s:
        done = subprocess.run(["node", f"{HERE}/tls.js", str(s.port)],
                              stdout=subprocess.PIPE, text=True, timeout=90)
        print(done.stdout, end="")
        check(done.returncode == 0, f"tls.js: status {done.returncode}")


CASES = (options_are_checked, page_and_send, versions, protocols, resumption,
         key_updates, renegotiation, key_update_flood, strangers, long_chain,
         stalls, ends, renewal, workers, files, big_messages, records,
         blocked_reader, flood, idle_clients, websockets_library,
         browser_and_node)


def main():
    missing = ("libssl-dev was not there when it was built"
               if not os.path.exists(CHAT) else
               "openssl is not installed" if not shutil.which("openssl") else
               None)
    if missing:
        print(f"skipped: tls: {missing}")
        return 0
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        certificates()
        for case in CASES:
            name = case.__name__.replace("_", " ")
            if sys.argv[1:] and case.__name__ not in sys.argv[1:]:
                continue
            install("one")
            begun = time.monotonic()
            try:
                more = case() or ""
                if more.startswith("skip: "):
                    print(f"skipped: tls: {name}: {more[6:]}", flush=True)
                    continue
                more += f"{', ' if more else ''}{time.monotonic() - begun:.1f} s"
                print(f"ok - tls: {name} ({more})", flush=True)
            except Exception as error:
                failed += 1
                if not isinstance(error, Failure):
                    traceback.print_exc()
                print(f"FAILED - tls: {name}: {type(error).__name__}: {error}",
                      flush=True)
    return 1 if failed else 0


sys.exit(main())
