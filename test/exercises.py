#!/usr/bin/python3
"""Tests the solutions of the README's exercises: applies each to a copy of main.c, builds and tries it.

    test/exercises.py [NAME...] all, or those named (-l lists them)
    test/exercises.py --renew   writes the patches anew, as they apply to main.c now

A patch may find its place a little off, for main.c moves on; one that finds none is a failure. So is one
with more than 30 changed lines, and one that changes other chapters of main.c than the README says.
"""
import contextlib, difflib, glob, http.client, json, os, re, select, shutil, signal, socket, subprocess, sys, tempfile, time
from concurrent.futures import ThreadPoolExecutor

sys.dont_write_bytecode = True
from bus import Failure, check, frame, now

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PATCHES = sorted(glob.glob(f"{ROOT}/test/exercises/*.patch"))
LINES_MAX = 30
PATIENCE = 20                                           # seconds, for whatever should come at once


def until(what, condition):
    """Waits until it is true."""
    end = now() + PATIENCE
    while not condition():
        check(now() < end, f"{what}: not within {PATIENCE} s")
        time.sleep(0.02)


# --- the program under test and its clients ----------------------------------------------------------

class Server:

    def __init__(self, chat, *options, bus="none", expected=""):
        self.expected = rf"chat: listening on .*|{expected}"
        self.output = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen([chat, "-a", "127.0.0.1", "-p", "0", "-b", bus, *options], text=True,
                                        stdout=self.output, stderr=subprocess.PIPE, bufsize=1)
        self.clients, self.said = [], ""
        end = now() + PATIENCE
        while "listening on" not in self.said:
            ready = select.select([self.process.stderr], [], [], max(0, end - now()))[0]
            line = self.process.stderr.readline() if ready else ""
            if not line:
                self.process.kill()
            check(line, f"it does not start: {self.said!r}, status {self.process.wait() if not line else 0}")
            self.said += line
        self.port = int(re.search(r"listening on http://127\.0\.0\.1:(\d+)/", self.said)[1])

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        for client in self.clients:
            client.socket.close()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.said += self.process.communicate(timeout=PATIENCE)[1]
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
        if kind is None:
            check(self.process.returncode == 0, f"status {self.process.returncode}, {self.said!r}")
            for line in self.said.splitlines():
                check(re.fullmatch(self.expected, line), f"it said {line!r}")
        self.output.seek(0)
        self.log = self.output.read()
        self.output.close()

    def get(self, path):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read().decode()
        connection.close()
        check(answer.status == 200, f"{path}: {answer.status} {body!r}")
        return body

    def messages(self, channel=""):
        return json.loads(self.get(f"/messages?channel={channel}"))

    @contextlib.contextmanager
    def paused(self):
        self.process.send_signal(signal.SIGSTOP)
        os.waitpid(self.process.pid, os.WUNTRACED)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def ask(self, query=""):
        """A client that has asked to join, and has no answer yet."""
        self.clients.append(Client(self.port, query))
        return self.clients[-1]

    def join(self, query=""):
        return self.ask(query).joined()


class Client:
    """Reads only when it is told to."""

    def __init__(self, port, query):
        self.socket, self.rest = socket.socket(), b""
        self.socket.settimeout(PATIENCE)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        self.socket.connect(("127.0.0.1", port))
        self.socket.sendall(f"GET /?{query} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                            "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode())

    def joined(self):
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += self.take(1)
        check(head.startswith(b"HTTP/1.1 101 "), f"no WebSocket: {head!r}")
        return self

    def take(self, size):
        while len(self.rest) < size:
            try:
                piece = self.socket.recv(1 << 16)
            except socket.timeout:
                raise Failure(f"nothing came within {PATIENCE} s") from None
            check(piece, "the server has closed the connection")
            self.rest += piece
        taken, self.rest = self.rest[:size], self.rest[size:]
        return taken

    def say(self, *messages):
        self.socket.sendall(b"".join(frame(message.encode()) for message in messages))

    def hear(self):
        """The next message."""
        start, size = self.take(2)
        if size > 125:
            size = int.from_bytes(self.take(2 if size == 126 else 8), "big")
        payload = self.take(size)
        check(start == 0x81, f"not a text message: {start:#x} {payload!r}")
        return payload.decode()

    def hears(self, *messages):
        for message in messages:
            heard = self.hear()
            check(heard == message, f"heard {heard[:80]!r} instead of {message[:80]!r}")


def refuses(chat, *options):
    done = subprocess.run([chat, "-p", "0", "-b", "none", *options], capture_output=True, timeout=PATIENCE)
    check(done.returncode == 2 and done.stderr.count(b"\n") == 1, f"{options}: {done}")


BULK = [f"{i} ".ljust(32768, ".") for i in range(64)]   # more than the kernel holds for one who does not read


def say_bulk(talker):
    for message in BULK:
        talker.say(message)
        talker.hears(message)


# --- what each exercise promises ---------------------------------------------------------------------

def log_channel(chat):
    with Server(chat) as server:
        server.get("/messages?channel=earth")
        server.get("/messages?channel=a%22%0Ab")
        server.get("/messages")
    ends = [line.rpartition(" ")[2] for line in server.log.splitlines()]
    check(ends == ['"earth"', r'"a\x22\x0ab"', '""'], f"the log: {server.log!r}")


def uptime(chat):
    begun = now()
    with Server(chat) as server:
        first = int(server.get("/uptime"))
        until("it grows", lambda: int(server.get("/uptime")) > first)
        last = int(server.get("/uptime"))
        check(0 <= first < last <= now() - begun, f"{first}, then {last}, after {now() - begun:.1f} s")


def greeting(chat):
    text = 'Grüß "dich"'
    with Server(chat, "--greeting", text) as server:
        one, two = server.join(), server.join("history=5")
        one.hears(text)
        two.hears('{"history":0}', text)
        one.say("hi")
        one.hears("hi")                                 # and not what greeted the other
        two.hears("hi")
        server.join("history=5").hears('{"history":1}', text, "hi")
        check(server.messages() == ["hi"], "the greeting is in the history")
    refuses(chat, "--greeting", b"\xFF")


def channels(chat):
    with Server(chat) as server:
        check(server.get("/channels") == "{}", "not empty")
        server.join("channel=earth")
        server.join("channel=earth")
        odd = server.join("channel=%22%0A")
        count = json.loads(server.get("/channels"))
        check(count == {"earth": 2, '"\n': 1}, f"{count}")
        odd.socket.close()
        until("who leaves is not counted", lambda: json.loads(server.get("/channels")) == {"earth": 2, '"\n': 0})


def lag(chat):
    def measured():
        return int(re.search(r"^chat_lag_bytes (\d+)$", server.get("/metrics"), re.M)[1])
    with Server(chat, "--metrics", "-H", "8M") as server:
        deaf, talker = server.join(), server.join()
        check(measured() == 0, "not 0 at first")
        say_bulk(talker)
        before = measured()
        check(1 << 16 < before < sum(map(len, BULK)) + (1 << 16), f"{before} bytes for one who does not read")
        deaf.hears(*BULK)
        until("0 when all is read", lambda: measured() == 0)


def notices(chat):
    with Server(chat) as server:
        one = server.join("channel=earth")
        one.hears('{"clients":1}')
        two = server.join("channel=earth")
        two.hears('{"clients":2}')
        server.join().hears('{"clients":1}')            # elsewhere
        two.socket.close()
        one.hears('{"clients":2}', '{"clients":1}')
        with server.paused():                           # so that all come in one round
            crowd = [server.ask("channel=earth") for _ in range(9)]
        one.hears('{"clients":10}')
        for client in crowd:
            client.joined().hears('{"clients":10}')


def rate(chat):
    fast = [f"fast {i}" for i in range(25)]
    with Server(chat) as server:
        one, two = server.join(), server.join()
        begun = now()
        one.say(*fast)
        two.hears(*fast[:10])
        two.say("slow")
        rest = [two.hear() for _ in range(16)]
        took = now() - begun
        check([text for text in rest if text != "slow"] == fast[10:], f"not all in order: {rest}")
        check(rest[-1] != "slow", "another client had to wait, too")
        check(took > 1.9, f"25 messages in {took:.1f} s")


def echo(chat):
    with Server(chat) as server:
        one, two = server.join(), server.join("echo=0")
        two.say("a", "b", "c")
        one.hears("a", "b", "c")
        one.say("d")
        one.hears("d")
        two.hears("d")
        two.say("e")
        one.hears("e")
        one.say("f")
        one.hears("f")
        two.hears("f")
        with server.paused():                           # so that both come in one round
            one.say("g")
            two.say("h")
        one.hears("g", "h")
        one.say("i")
        two.hears("g", "i")
        check(server.messages() == list("abcdefghi"), "the history is not whole")


def forget(chat):
    with Server(chat, "--forget", "1", "-H", "8M") as server:
        deaf, talker, other = server.join(), server.join(), server.join("channel=other")
        say_bulk(talker)
        other.say("short-lived")
        other.hears("short-lived")
        until("it forgets", lambda: server.messages("other") == [])
        check(len(server.messages()) > 1, "it forgets what is still to be sent")
        deaf.hears(*BULK)
        until("it forgets what was read late", lambda: server.messages() == [])
        talker.say("new")
        deaf.hears("new")
    refuses(chat, "--forget", "0")


def unix_bus(chat):
    def start():
        return Server(chat, bus=f"unix:exercise {os.getpid()}", expected=r"chat: peer [0-9a-f]{16} (joined|left)")
    many = [f"{i} ".ljust(2000, ".") for i in range(100)]
    with start() as one:
        with start() as two:
            here, there = one.join(), two.join()
            here.say("from one")
            there.hears("from one")
            there.say("from two", *many)                # not more than the kernels' buffers hold
            there.hears("from two", *many)
            here.hears("from one", "from two", *many)
            with start() as three:
                check(three.messages()[-2:] == many[-2:], "a third one does not catch up")
        with start() as again:                          # two's name is free once more
            there = again.join()
            here.say("once more")
            there.hears("once more")


WORKS = {"01-log-channel": log_channel, "02-uptime": uptime, "03-greeting": greeting, "04-channels": channels,
         "05-lag": lag, "06-notices": notices, "07-rate": rate, "08-echo": echo, "09-forget": forget,
         "10-unix-bus": unix_bus}


# --- applying and building ---------------------------------------------------------------------------

def apply(patch, folder):
    """Copies main.c with the patch applied into the folder. Returns both texts, in lines."""
    for file in ("main.c", "index.html", "Makefile"):
        shutil.copy(f"{ROOT}/{file}", folder)
    done = subprocess.run(["patch", "--batch", "--fuzz=1", "--no-backup-if-mismatch", "main.c", patch], cwd=folder,
                          capture_output=True, text=True)
    check(done.returncode == 0, f"does not apply to main.c any more: {done.stdout}{done.stderr}")
    with open(f"{ROOT}/main.c") as before, open(f"{folder}/main.c") as after:
        return before.readlines(), after.readlines()


def build(folder):
    """With the flags of the tests (those of make sanitize, say). Returns the program."""
    flags = [f"{name}={os.environ[name]}" for name in ("HARDEN", "TLS", "CC") if name in os.environ]
    calm = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(["make", "-s", "CHAT=./chat", f"CFLAGS={os.environ.get('CFLAGS', '-O1')} -Werror", *flags],
                          cwd=folder, env=calm, capture_output=True, text=True)
    check(done.returncode == 0, f"does not build: {done.stderr[:2000]}")
    return f"{folder}/chat"


def difference(before, after, context):
    return list(difflib.unified_diff(before, after, "a/main.c", "b/main.c", n=context))


def chapters(before, after):
    """The chapters of main.c that differ, but for the lines before the first (the #includes)."""
    touched, at = set(), 0
    banners = [(i + 1, int(found[1])) for i, line in enumerate(before) if (found := re.match(r"/\* ---- (\d+)\. ", line))]
    for line in difference(before, after, 0)[2:]:
        hunk = re.match(r"@@ -(\d+)", line)
        if hunk:
            at = int(hunk[1])
            touched |= {max((n for start, n in banners if start <= at), default=0)}
    return sorted(touched - {0})


def readme_chapters(name):
    with open(f"{ROOT}/README.md") as file:
        for item in re.split(r"\n(?=\d+\. |\n)", file.read()):
            if f"](test/exercises/{name}.patch)" in item:
                found = re.search(r"\(chapters? ([^;)]*)", item)
                return sorted(map(int, re.findall(r"\d+", found[1]))) if found else []
    raise Failure("is not in the README")


def exercise(patch):
    """Returns the line that says how it went."""
    name = os.path.basename(patch)[:-len(".patch")]
    try:
        check(name in WORKS, "has no test")
        with tempfile.TemporaryDirectory() as folder:
            before, after = apply(patch, folder)
            changed = sum(line[0] in "+-" for line in difference(before, after, 0)[2:])
            check(0 < changed <= LINES_MAX, f"changes {changed} lines, at most {LINES_MAX} are allowed")
            check(max(len(line) for line in after) <= 81, "has lines of more than 80 columns")
            told, touched = readme_chapters(name), chapters(before, after)
            check(told == touched, f"changes the chapters {touched}, the README says {told}")
            WORKS[name](build(folder))
        return f"ok - exercises: {name}, {changed} lines"
    except Exception as error:
        return f"FAILED - exercises: {name}: {type(error).__name__} {error}"


def renew(patch):
    with open(patch) as file:
        preface = file.read().partition("--- a/main.c")[0]
    with tempfile.TemporaryDirectory() as folder:
        lines = difference(*apply(patch, folder), 2)
    with open(patch, "w") as file:
        file.write(preface + "".join(lines))


def main():
    names = [name for name in sys.argv[1:] if not name.startswith("-")]
    patches = [patch for patch in PATCHES if not names or os.path.basename(patch)[:-len(".patch")] in names]
    if "-l" in sys.argv:
        print(*WORKS, sep="\n")
        return 0
    if "--renew" in sys.argv:
        for patch in patches:
            renew(patch)
        return 0
    for tool in ("patch", "make"):
        if not shutil.which(tool):
            print(f"skipped: exercises: {tool} is not installed")
            return 0
    missing = WORKS.keys() - {os.path.basename(patch)[:-len(".patch")] for patch in PATCHES}
    lines = [f"FAILED - exercises: {name}: has no patch" for name in sorted(missing)]
    with ThreadPoolExecutor(2) as pool:                 # one builds while another waits
        lines += pool.map(exercise, patches)
    print(*lines, sep="\n")
    return any(line.startswith("FAILED") for line in lines)


if __name__ == "__main__":
    sys.exit(main())
