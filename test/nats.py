#!/usr/bin/python3
"""Tests the NATS bus against the real nats-server, alone and in a cluster, and against a fake one.

    test/nats.py [CASE...]      all cases, or those named (-l lists them)
    test/nats.py --bench        messages a second and latency across two instances, beside the UDP bus

Each server gets an address of its own in 127/8, so neither a NATS server of this machine nor other tests
are in the way. NATS_SERVER names the program, LONG=1 runs more, KEEP=1 shows what the instances said.
"""
import sys
sys.dont_write_bytecode = True                          # there is no place for a __pycache__ here
import json, os, random, re, selectors, shutil, signal, socket, subprocess, tempfile, time
from urllib.parse import quote
import bus
from bus import CHAT, Failure, Skip, check, frame, libc, message, now

NATS = os.environ.get("NATS_SERVER") or shutil.which("nats-server", path=os.environ["PATH"] + ":/usr/sbin:/usr/local/bin")
LONG = bool(os.environ.get("LONG"))
ERROR = r"|chat: message error on the bus: [ -~]* \(\d+ so far\)$"
TRYING = r"|chat: cannot reach nats://\S+, trying on$"


class Client(bus.Client):
    """One that is `lossy` allows gaps, and counts what they lack; but nothing may come twice. What was under way when a
    connection broke may come `late`: the NATS server reads the old connection and the new one side by side."""
    lossy, gaps, late = False, 0, 0

    def on_message(self, payload):
        start = bus.MESSAGE.match(payload)
        if self.lossy and start:
            sender, number = start[1], int(start[2])
            missing = self.__dict__.setdefault("missing", {}).setdefault(sender, set())
            due = self.next.get(sender, 0)
            if number in missing:                       # once only
                missing.remove(number)
                self.late, self.gaps = self.late + 1, self.gaps - 1
                return
            missing.update(range(due, number))
            self.gaps += max(number - due, 0)
            self.next[sender] = max(number, due)
        super().on_message(payload)


class Chat(bus.Host):
    """An instance of the program on this very host."""

    def __init__(self, lab, number):
        self.lab, self.number, self.server, self.logs = lab, number, None, []

    def into(self):
        libc.prctl(bus.PR_SET_PDEATHSIG, signal.SIGKILL)

    def begin(self, url, *options):
        self.log = self.lab.path(f"log{self.number}.{len(self.logs)}")
        self.logs.append(self.log)
        with open(self.log, "wb") as log:
            self.server = subprocess.Popen((CHAT, "-a", "127.0.0.1", "-p", "0", "-q", "--metrics", "-b", url, *options),
                                           stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=self.into)
        self.lab.servers.append((self, self.server, self.log))
        return self

    def start(self, url, *options, joins=1):
        self.begin(url, *options)
        self.port = int(self.says(r"chat: listening on http://\S*?:(\d+)/")[1])
        if joins:
            self.says(r"(?s)(chat: joined nats://\S+\n.*?){%d}" % joins)
        return self

    def says(self, pattern, seconds=15):
        """Waits for a line on its stderr."""
        found = []
        self.lab.pump(lambda: found.append(re.search(pattern, self.said())) or found[-1] or self.server.poll() is not None,
                      seconds, lambda: f"host {self.number} does not say {pattern!r} but {self.said()!r}", 0.01)
        if not found[-1]:
            found.append(re.search(pattern, self.said()))
        check(found[-1], f"host {self.number} ended with {self.server.poll()}: {self.said()!r}")
        return found[-1]

    def refuses(self, url, *options):
        """It must end with 1. Returns what it said after the line that says where it listens."""
        self.begin(url, *options)
        try:
            status = self.server.wait(15)
        except subprocess.TimeoutExpired:
            raise Failure(f"it does not end: {self.said()!r}")
        self.lab.servers.pop()
        check(status == 1, f"ended with {status}: {self.said()!r}")
        return re.sub(r"chat: listening on .*\n", "", self.said(), 1)

    def connect(self):
        link = socket.socket()
        link.settimeout(10)
        link.connect(("127.0.0.1", self.port))
        return link

    def request(self, text):
        """The status of the answer."""
        with self.connect() as link:
            link.sendall(text.replace("\n", "\r\n").encode("latin-1"))
            return int(link.recv(4096).split()[1])

    def history(self, channel=b""):
        return json.loads(self.get(f"/messages?channel={quote(channel, safe='')}"))

    def hears(self, expected, channel=b"", seconds=10):
        self.lab.pump(lambda: self.history(channel) == expected, seconds,
                      lambda: f"channel {channel!r} of host {self.number} has {str(self.history(channel))[:300]}, "
                              f"not {str(expected)[:300]}", 0.02)

    def counts(self, name, least, seconds=10):
        self.lab.pump(lambda: self.metrics()[name] >= least, seconds,
                      lambda: f"{name} of host {self.number} is {self.metrics()[name]:.0f}, not {least}", 0.02)


class Lab(bus.Lab):
    def __init__(self, hosts=2, expect="", secrets=()):
        self.directory = tempfile.mkdtemp(prefix=f"chat-nats-{os.getpid()}-")
        self.selector, self.timers, self.servers, self.turn = selectors.DefaultSelector(), [], [], 0
        self.expect, self.secrets, self.nats = expect, secrets, []
        self.hosts = [Chat(self, number + 1) for number in range(hosts)]

    def __exit__(self, kind, error, trace):
        """Ends all. Nothing unexpected may stand in the logs, and no secret; each instance must have ended well."""
        problems = []
        for host, server, log in self.servers:
            if server.poll() is None:
                server.terminate()
        self.hang_up()
        for host, server, log in self.servers:
            problems += bus.bad_end(host, server)
        for log in (log for host in self.hosts for log in host.logs):
            with open(log, errors="replace") as file:
                for line in file:
                    if os.environ.get("KEEP"):
                        print(f"  {os.path.basename(log)}: {line}", end="", file=sys.stderr)
                    if any(secret in line for secret in self.secrets):
                        problems.append(f"a secret was told: {line.strip()}")
                    if not re.match(r"chat: (listening on |(joined|left) nats://\S+$)" + self.expect, line):
                        problems.append(f"{os.path.basename(log)} says: {line.strip()}")
        for server in self.nats:
            server.kill()
        shutil.rmtree(self.directory, ignore_errors=True)
        bus.complain(problems, kind, error)


# --- the NATS server, and what stands in its place or between ---------------------------------------

def own_address():
    """An address of this machine's loopback that nobody else uses, and a free port of it."""
    address = f"127.{random.randrange(1, 255)}.{random.randrange(255)}.{random.randrange(1, 255)}"
    with socket.socket() as probe:
        probe.bind((address, 0))
        return probe.getsockname()


class Server:
    def __init__(self, lab, config="", at=None, start=True):
        self.lab, self.at, self.process = lab, at or own_address(), None
        self.name = lab.path(f"nats{len(lab.nats)}")
        lab.nats.append(self)
        self.config = config
        if start:
            self.start()

    def start(self, config=None):
        self.config = self.config if config is None else config
        with open(self.name + ".conf", "w") as file:
            file.write(f'listen: "{self.at[0]}:{self.at[1]}"\nserver_name: "{os.path.basename(self.name)}"\n{self.config}\n')
        with open(self.name + ".log", "ab") as log:
            self.process = subprocess.Popen((NATS, "-c", self.name + ".conf"), stdin=subprocess.DEVNULL, stdout=log,
                                            stderr=log, preexec_fn=lambda: libc.prctl(bus.PR_SET_PDEATHSIG, signal.SIGKILL))
        deadline = now() + 15
        while now() < deadline and self.process.poll() is None:
            try:
                with socket.create_connection(self.at, 5) as link:
                    if link.recv(5) == b"INFO ":
                        return
            except OSError:
                time.sleep(0.01)
        with open(self.name + ".log") as log:
            raise Failure(f"nats-server does not start: {log.read()[-500:]}")

    def kill(self):
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def url(self, user=""):
        return f"nats://{user}{self.at[0]}:{self.at[1]}"


class Raw:
    """A NATS client that is no chat, as `nats pub` and `nats sub` are."""

    def __init__(self, server, *subjects, **connect):
        self.rest = b""
        self.socket = socket.create_connection(server.at, 10)
        check(self.line().startswith(b"INFO "), "no INFO")
        self.say("CONNECT " + json.dumps({"verbose": False, "headers": True, "protocol": 1, **connect}))
        for number, subject in enumerate(subjects):
            self.say(f"SUB {subject} {number}")
        self.sync()

    def say(self, line, payload=None):
        self.socket.sendall((line.encode() if isinstance(line, str) else line) + b"\r\n")
        if payload is not None:
            self.socket.sendall(payload + b"\r\n")

    def publish(self, subject, payload, reply=""):
        self.say((subject if isinstance(subject, bytes) else subject.encode()).join((b"PUB ", b" %s%d" % (reply.encode(), len(payload)))), payload)

    def sync(self):
        """The server has taken in all that was said before."""
        self.say("PING")
        check(self.line() == b"PONG", "no PONG")

    def take(self, enough):
        while not enough():
            piece = self.socket.recv(65536)
            check(piece, f"the NATS server hangs up: {self.rest!r}")
            self.rest += piece

    def line(self):
        self.take(lambda: b"\r\n" in self.rest)
        line, _, self.rest = self.rest.partition(b"\r\n")
        if line == b"PING":
            self.say("PONG")
            return self.line()
        return line

    def next(self):
        """The next message: its subject and payload."""
        words = self.line().split(b" ")
        check(words[0] == b"MSG", f"not a message: {words}")
        size = int(words[-1])
        self.take(lambda: len(self.rest) >= size + 2)
        payload, self.rest = self.rest[:size], self.rest[size + 2:]
        return words[1].decode(), payload


class Link:
    """A connection that the lab's selector reads; `on_bytes` and `on_end` are its owner's."""
    host, closed = None, None

    def __init__(self, lab, link, on_bytes, on_end=lambda: None):
        self.lab, self.socket, self.on_bytes, self.on_end = lab, link, on_bytes, on_end
        link.settimeout(10)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        lab.selector.register(link, selectors.EVENT_READ, self)

    def read(self):
        try:
            data = self.socket.recv(65536)
        except OSError:
            data = b""
        if data:
            return self.on_bytes(data)
        self.end("by the other side")
        self.on_end()

    def send(self, data):
        try:
            self.socket.sendall(data)
        except OSError:
            pass                                        # it is gone: reading will tell

    def end(self, why):
        if not self.closed:
            self.closed = why
            self.lab.selector.unregister(self.socket)
            self.socket.close()


class Listener:
    host, closed = None, None

    def __init__(self, lab, on_link):
        self.lab, self.on_link, self.at = lab, on_link, own_address()
        self.open()

    def open(self):
        self.closed, self.socket = None, socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.at)
        self.socket.listen()
        self.lab.selector.register(self.socket, selectors.EVENT_READ, self)

    def read(self):
        self.on_link(self.socket.accept()[0])

    def end(self, why):
        if not self.closed:
            self.closed = why
            self.lab.selector.unregister(self.socket)
            self.socket.close()

    def url(self, user=""):
        return f"nats://{user}{self.at[0]}:{self.at[1]}"


class Between(Listener):
    """Stands between an instance and a server. It hands on `step` bytes at a time, can cut, and cuts by itself
    after `quota` bytes from the instance."""

    def __init__(self, lab, server, step=None, quota=None):
        self.server, self.step, self.quota, self.links, self.cuts = server, step, quota, [], 0
        super().__init__(lab, self.join)

    def join(self, link):
        left = [self.quota() if self.quota else 1 << 60]

        def pass_on(to, counted, data):
            if counted:
                data, left[0] = data[:left[0]], left[0] - len(data)
            for at in range(0, len(data), self.step or len(data)):
                to.send(data[at:at + (self.step or len(data))])
            if left[0] <= 0:
                self.cuts += 1
                end()

        def end():
            for each in pair:
                each.end("cut")
        near = Link(self.lab, link, lambda data: pass_on(far, True, data), lambda: end())
        far = Link(self.lab, socket.create_connection(self.server.at, 10), lambda data: pass_on(near, False, data), lambda: end())
        pair = near, far
        self.links += pair

    def cut(self):
        """From here on nobody comes through, until open()."""
        self.end("cut")
        for link in self.links:
            link.end("cut")


INFO = b'INFO {"server_id":"FAKE","version":"2.9.10","proto":1,"max_payload":1048576}\r\n'


class Fake(Listener):
    """A server that greets as it should, and then does what a case wants. It keeps what it was told."""

    def __init__(self, lab, info=INFO, pong=True):
        self.link, self.got, self.count, self.info, self.pong = None, bytearray(), 0, info, pong
        super().__init__(lab, self.join)

    def join(self, link):
        self.got.clear()
        self.count += 1
        self.link = Link(self.lab, link, self.take)
        self.link.send(self.info)

    def take(self, data):
        before = len(self.got)
        self.got += data
        if self.pong:
            for _ in range(self.got.count(b"PING\r\n", max(0, before - 5))):
                self.link.send(b"PONG\r\n")


# --- the cases: each returns the figures to print ---------------------------------------------------

def exchange(lab, urls, each, *options, size=lambda number: 0):
    """Every host's sender posts `each` messages, all at once. Everybody must get them in each sender's order."""
    # A log that holds it all: on a machine so busy that these readers are not served for 250 ms, they are not cut off.
    for host, url in zip(lab.hosts, urls):
        host.start(url, "-H", "32M", *options)
    clients = [Client(host) for host in lab.hosts]
    begun = now()
    for number in range(each):
        for c in clients:
            c.out += frame(message(c.name, number, size(number)))
    for c in clients:
        c.write()
    lab.everything(clients, {c.name: each for c in clients}, 60)
    took = now() - begun
    for host in lab.hosts:
        check(host.metrics()["chat_bus_errors_total"] == host.metrics()["chat_bus_lost_messages_total"] == 0, "errors were counted")
    return f"{each * len(clients)} messages in {took:.1f} s, RSS {', '.join('%.0f' % host.status('VmHWM') for host in lab.hosts)} MB at most"


def case_two():
    """two instances, 10,000 messages each way"""
    with Lab(2) as lab:
        return exchange(lab, [Server(lab).url()] * 2, 10000, size=lambda n: 60000 if n % 100 == 99 else 0)


def case_three():
    """three instances, 10,000 messages each"""
    with Lab(3) as lab:
        return exchange(lab, [Server(lab).url()] * 3, 10000)


def case_cluster():
    """a cluster of two servers, an instance on each"""
    with Lab(2) as lab:
        routes = [own_address() for _ in range(2)]
        config = 'cluster {{ name: "chat", listen: "%s:%d", routes: ["nats://%s:%d"] }}'.replace("{{", "{").replace("}}", "}")
        servers = [Server(lab, config % (*routes[i], *routes[1 - i])) for i in range(2)]
        spy, other = Raw(servers[0], "meet"), Raw(servers[1])
        spy.socket.setblocking(False)

        def met():
            other.publish("meet", b"")
            try:
                return spy.socket.recv(100)
            except BlockingIOError:
                return None
        lab.pump(met, 15, "the two servers do not meet", 0.05)
        spy.socket.settimeout(10)
        for host, server in zip(lab.hosts, servers):    # who subscribes is known to the other server a moment later
            host.start(server.url(), "-H", "4M")
        hellos = [0]

        def known():
            hellos[0] += 1
            for host in lab.hosts:
                host.get(f"/send?channel=hello&message={host.number}.{hellos[0]}")
            return all(len({line[0] for line in host.history(b"hello")}) == 2 for host in lab.hosts)
        lab.pump(known, 15, "the two instances do not meet", 0.05)
        clients = [Client(host) for host in lab.hosts]
        for number in range(10000):
            for c in clients:
                c.out += frame(message(c.name, number))
        for c in clients:
            c.write()
        lab.everything(clients, {c.name: 10000 for c in clients}, 60)
        return f"{len(hellos)} way each, 10000 messages"


def case_payloads():
    """text and binary, of all sizes around those where a frame's header changes"""
    with Lab(2) as lab:
        a, b = (host.start(url, "-H", "4M") for url in (Server(lab).url(),) for host in lab.hosts)
        sizes = (0, 1, 2, 125, 126, 127, 4095, 4096, 65534, 65535, 65536)
        texts = [("ü\r\n" * size).encode()[:size] for size in sizes]
        texts = [text if text.decode(errors="ignore").encode() == text else text[:-1] + b"." for text in texts]
        binaries = [random.randbytes(size) for size in sizes] + [b"\r\nPUB chat.text 3\r\nbad\r\n"]
        client, other = Client(a), Client(b)
        for payload in texts:
            client.send(payload)
        for payload in binaries:
            client.send(payload, 2)
        lab.pump(lambda: len(other.others) == len(texts + binaries), 10, lambda: f"{len(other.others)} of {len(texts + binaries)} arrived")
        check(other.others == texts + binaries, "they arrived, but not as they were sent")
        kinds = [isinstance(m, str) for m in b.history()]
        check(kinds == [True] * len(texts) + [False] * len(binaries), f"text became binary, or the other way round: {kinds}")
        bus.settle([client, other])
        return f"{len(texts + binaries)} messages"


NAMES = (b"", b" ", b"a b", b"\r\n", b"x\r\nPUB chat.text 1\r\nx", b"*", b">", b".", b"..", b"a.b", b".a", b"$SYS", b"$SYS.>", b"%", b"%41", b"%2E",
         b"/", b"//", b"_INBOX.x", b"\t", b"\0", b"a\0b", b"\x7f", b"\"{}\\", b"text", b"binary", b"A-Za_z0", "über".encode(), "\u2028".encode(),
         "\U0001f600".encode() * 16, b"x" * 64, b"%" * 64, b"." * 64, b"\xc3\xbc" * 32, b"+", b"&=?#")


def subject(kind, name):
    """By main.c's chapter 11."""
    escaped = "".join(chr(c) if chr(c).isalnum() and c < 128 or c in b"-_" else f"%{c:02X}" for c in name)
    return f"chat.{kind}" + ("." + escaped if name else "")


def case_names():
    """odd channel names: none leaks into another, none says a line of its own"""
    with Lab(2) as lab:
        server = Server(lab)
        a, b = (host.start(server.url()) for host in lab.hosts)
        spy = Raw(server, ">")
        seen = []
        for name in NAMES:
            path = "/?channel=" + quote(name, safe="")
            one, two = Client(a, path), Client(b, path)
            one.send(b"1" + name)
            lab.pump(lambda: two.others, 10, f"nothing came through channel {name!r}")
            two.send(b"2" + name, 2)
            lab.pump(lambda: len(one.others) == 2, 10, f"nothing came back through channel {name!r}")
            check(one.others == two.others == [b"1" + name, b"2" + name], f"channel {name!r} has {one.others} and {two.others}")
            seen += (subject("text", name), b"1" + name), (subject("binary", name), b"2" + name)
            bus.settle([one, two])
            lab.hang_up()
        found = [spy.next() for _ in seen]
        check(found == seen, f"subjects: {[f for f in found if f not in seen][:3]}, not {[s for s in seen if s not in found][:3]}")
        spy.sync()
        for host in (a, b):
            check(host.metrics()["chat_channels"] == len(set(NAMES)), f"{host.metrics()['chat_channels']} channels of {len(NAMES)}")
        return f"{len(NAMES)} names"


def case_outside():
    """other programs: what they publish is delivered, what they hear is the message as it is, and errors are counted"""
    with Lab(1, expect=ERROR) as lab:
        server = Server(lab, "max_payload: 2MB")
        a = lab.hosts[0].start(server.url(), "-m", "1000")
        raw = Raw(server, "chat.text.>", "chat.text", "chat.binary.>")
        client = Client(a, "/?channel=earth")
        client.send("grüß \0 euch".encode())
        check(raw.next() == ("chat.text.earth", "grüß \0 euch".encode()), "a subscriber hears something else")
        client.send(b"\r\n", 2)
        check(raw.next() == ("chat.binary.earth", b"\r\n"), "a subscriber hears something else")
        bad = [("chat.text.earth", b"x" * 1001), ("chat.binary.earth", b"x" * 1001), ("chat.text.earth", b"x" * 1500000),
               ("chat.text.earth", b"\xff"), ("chat.text.earth", b"\xc3"), ("chat.text.earth", b"\xed\xa0\x80"),
               ("chat.text.earth%", b"x"), ("chat.text.earth%4", b"x"), ("chat.text.%GG", b"x"), ("chat.text.%%", b"x"),
               ("chat.text.%FF", b"x"), (b"chat.text.\xff", b"x"), ("chat.text." + "x" * 65, b"x"), ("chat.text." + "%41" * 65, b"x"),
               ("chat.other.earth", b"x"), ("chat.other", b"x"), ("chat.TEXT.earth", b"x"), ("chat.text." + "x" * 3000, b"x")]
        for name, payload in bad:
            raw.publish(name, payload)
        good = [("chat.text.earth", b"hi"), ("chat.text.%65%61rth", b"x" * 1000), ("chat.binary.earth", b"\xff"), ("chat.text.earth", b"")]
        for name, payload in good:
            raw.publish(name, payload, "_INBOX.reply ")
        raw.say("HPUB chat.text.earth 22 26", b"NATS/1.0\r\nBar: Baz\r\n\r\nwith")
        raw.publish("chat.text", b"nameless")
        raw.publish("chat.text.\u00fc.x", b"as it is")
        raw.publish("other", b"x")
        lab.pump(lambda: len(client.others) == 3 + len(good), 10, lambda: f"{client.others[2:]}, {a.said()}")
        check(client.others[2:] == [payload for _, payload in good] + [b"with"], f"{client.others[2:]}")
        a.hears(["nameless"])
        a.hears(["as it is"], "ü.x".encode())
        m = a.metrics()
        check(m["chat_bus_errors_total"] == len(bad), f"{m['chat_bus_errors_total']:.0f} errors were counted, not {len(bad)}")
        check(m["chat_channels"] == 3, f"{m['chat_channels']:.0f} channels, not 3")
        bus.settle([client])
        return f"{len(bad)} bad messages"


def case_auth():
    """user and password, token, and how they are percent-encoded; a wrong one ends it, and none is ever told"""
    odd = "p@s:s%w/ü\"\\#?"
    secrets = "hunter-two", "wrong-secret", odd, quote(odd, safe=""), "tok:en-x", "tok%3Aen"
    with Lab(1, expect=r"|chat: nats://", secrets=secrets) as lab:
        a = lab.hosts[0]

        def accepts(server, credentials):
            a.start(server.url(credentials + "@"))
            check(a.stop() == 0, f"it did not end well: {a.said()}")

        def refuses(server, credentials, *options):
            said = a.refuses(server.url(credentials), *options)
            lines = set(re.sub(r"chat: (joined|left) .*\n", "", said).splitlines())
            check(len(lines) == 1 and "Authorization" in said, f"not one clear line: {said!r}")
        passwords = Server(lab, 'authorization { users: [ {user: "ann", password: "hunter-two"}, {user: "a:n n", password: %s} ] }'
                           % json.dumps(odd, ensure_ascii=False))
        accepts(passwords, "ann:hunter-two")
        a.start(passwords.url("ann:hunter-two@"))
        with open(f"/proc/{a.server.pid}/cmdline") as file:
            check("hunter-two" not in file.read(), "the password stands in the list of processes")
        check(a.stop() == 0, "it did not end well")
        accepts(passwords, f"{quote('a:n n')}:{quote(odd, safe='')}")
        tokens = Server(lab, 'authorization { token: "tok:en-x" }')
        accepts(tokens, "tok%3Aen-x")
        refuses(passwords, "ann:wrong-secret@")
        refuses(passwords, "ann:wrong-secret@", "-j", "2")
        refuses(passwords, "wrong-secret@")
        refuses(passwords, "")
        refuses(tokens, "wrong-secret@")
        for wrong in ("nats://", "nats://a%4@host", "nats://ann:hunter-two@", "nats://ann:hunter-two@host:x", "nats://ann:hunter-two@host:0",
                      "nats://ann:hunter-two@host:65536", "nats://ann:hunter-two@host:4222/x"):
            a.begin(wrong)
            lab.servers.pop()
            check(a.server.wait(10) == 2 and a.said().count("\n") == 1, f"{wrong}: {a.server.wait()} {a.said()!r}")
            check(not any(secret in a.said() for secret in secrets), f"{wrong}: {a.said()!r}")
            os.unlink(a.logs.pop())
        mute = Server(lab, 'authorization { users: [ {user: "ann", password: "hunter-two", permissions: { subscribe: { deny: ">" } } } ] }')
        said = a.refuses(mute.url("ann:hunter-two@"))
        check(said.count("\n") == 1 and "Permissions" in said, f"who may not subscribe is told {said!r}")


def case_later():
    """a password changed while it runs: it tries on, and is let in again"""
    with Lab(1, expect=ERROR + TRYING, secrets=("hunter-two",)) as lab:
        config = 'authorization { user: "ann", password: "%s" }'
        server = Server(lab, config % "hunter-two")
        a = lab.hosts[0].start(server.url("ann:hunter-two@"))
        client = Client(a)
        server.kill()
        server.start(config % "another")
        a.says("Authorization")
        client.post(0)
        lab.everything([client], {b"1": 1}, 5)
        server.kill()
        server.start(config % "hunter-two")
        a.says("(?s)joined.*joined", 20)


def case_tls():
    """a server that demands TLS: exit 1"""
    with Lab(1, expect=r"|chat: nats://") as lab:
        pem = lab.path("key"), lab.path("cert")
        done = subprocess.run(("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj",
                               "/CN=localhost", "-days", "2", "-keyout", pem[0], "-out", pem[1]), capture_output=True)
        check(done.returncode == 0, f"openssl: {done.stderr[-200:]}")
        server = Server(lab, 'tls { key_file: "%s", cert_file: "%s" }' % pem)
        for options in (), ("-j", "2"):
            said = set(lab.hosts[0].refuses(server.url("ann:hunter-two@"), *options).splitlines())
            check(len(said) == 1 and "TLS" in str(said), f"not one clear line: {said}")


def case_late():
    """no server at the start: the chat works alone, and joins when there is one"""
    with Lab(2, expect=TRYING) as lab:
        server = Server(lab, start=False)
        for host in lab.hosts:
            host.start(server.url(), joins=0)
        begun = now()
        clients = [Client(host) for host in lab.hosts]
        alone = now() - begun
        for c in clients:
            c.lossy = True                              # who joins first is not heard by the other
            c.post(0)
        lab.pump(lambda: all(c.next.get(c.name) for c in clients), 5, "the chat does not work without a server")
        for host in lab.hosts:
            host.says("trying on")
            check(host.metrics()["chat_bus_peers"] == 0, "it claims to be joined")
        server.start()
        for host in lab.hosts:
            host.says("joined", 20)
        for c in clients:
            c.post(1)
        lab.pump(lambda: all(c.next == {b"1": 2, b"2": 2} for c in clients), 10, "they do not meet")
        bus.settle(clients)
        return f"clients waited {alone:.1f} s at the start"


def case_addresses():
    """a name with two addresses: each is tried"""
    if libc.unshare(0x20000):                           # CLONE_NEWNS, for hosts of our own
        raise Skip("mount namespaces are not allowed here")
    with Lab(1, expect=TRYING) as lab:
        first = own_address()
        second = own_address()[0], first[1]
        with open(lab.path("hosts"), "w") as file:
            file.write(f"{first[0]} two.test\n{second[0]} two.test\n")
        bus.run("mount", "--make-rprivate", "/")
        bus.run("mount", "--bind", lab.path("hosts"), "/etc/hosts")
        try:
            found = {address[0] for *_, address in socket.getaddrinfo("two.test", None)}
            check(found == {first[0], second[0]}, f"two.test is {found}")
            one, two = (Server(lab, at=at, start=False) for at in (first, second))
            one.start()
            a = lab.hosts[0].start(f"nats://two.test:{first[1]}")
            one.kill()
            two.start()
            a.says("(?s)joined.*joined", 20)
            two.kill()
            one.start()
            a.says("(?s)joined.*joined.*joined", 20)
        finally:
            bus.run("umount", "/etc/hosts")


def case_workers():
    """-j 2: the workers meet at the server, too"""
    with Lab(2) as lab:
        server = Server(lab)
        lab.hosts[0].start(server.url(), "-j", "2", "-H", "4M", joins=2)
        lab.hosts[1].start(server.url(), "-H", "4M")
        clients = [Client(lab.hosts[0], name=b"%d" % n) for n in range(8)] + [Client(lab.hosts[1], name=b"8")]
        for number in range(500):
            for c in clients:
                c.out += frame(message(c.name, number))
        for c in clients:
            c.write()
        lab.everything(clients, {c.name: 500 for c in clients}, 30)


def case_restart():
    """the server is killed and restarted under traffic: order kept, nothing twice, and all flows again"""
    with Lab(3, expect=TRYING) as lab:
        server = Server(lab)
        for host in lab.hosts:
            host.start(server.url(), "-H", "4M")
        clients, times = [Client(host) for host in lab.hosts], 4 if LONG else 2
        until = [now() + 3600]

        def post(c):
            c.post(len(c.sent_at), random.choice((0, 0, 0, 3000)))
            if now() < until[0]:
                lab.at(now() + random.expovariate(200), lambda: post(c))
        for c in clients:
            c.lossy = True
            post(c)
        for time_ in range(1, times + 1):
            lab.wait(0.5)
            server.kill()
            lab.wait(0.3)
            server.start()
            for host in lab.hosts:
                host.says("(?s)(joined.*){%d}" % (time_ + 1), 30)
        until[0] = now() + 0.5
        lab.pump(lambda: not lab.timers, 20, "the timers do not end")
        marks = {c.name: len(c.sent_at) for c in clients}
        for c in clients:
            c.post(len(c.sent_at))
        lab.pump(lambda: all(c.next.get(x.name) == marks[x.name] + 1 for c in clients for x in clients), 10,
                 lambda: f"the last messages are missing: {[c.next for c in clients]}, not {marks}")
        bus.settle(clients)
        for c in clients:
            check(c.next[c.name] == marks[c.name] + 1, "its own echo has gaps")
        return f"{times} times; of {sum(marks.values())} messages {sum(c.gaps for c in clients)} did not reach one of the two others"


def away(lab, post, options=()):
    """A loses its connection, `post` posts messages through A, and A comes back. B is connected all the time."""
    a, b = lab.hosts
    server = Server(lab)
    between = Between(lab, server)
    a.start(between.url(), "-H", "4M", *options)
    b.start(server.url(), "-H", "4M", *options)
    one, two = Client(a), Client(b)
    for number in range(10):
        one.post(number)
    lab.everything([one, two], {b"1": 10}, 10)
    between.cut()
    a.says("left")
    two.post(0)
    post(one, two)
    between.open()
    a.says("(?s)joined.*joined", 20)
    return a, b, one, two


def case_away():
    """a connection lost for a while: all that was posted meanwhile arrives, in order"""
    def post(one, two):
        for number in range(10, 1010):
            one.post(number, random.choice((0, 0, 100, 5000)))
        one.host.lab.pump(lambda: one.next[b"1"] == 1010, 10, "the local chat stands still")
    with Lab(2, expect=TRYING) as lab:
        a, b, one, two = away(lab, post)
        lab.everything([two], {b"1": 1010, b"2": 1}, 10)
        one.post(1010)
        lab.everything([two], {b"1": 1011, b"2": 1}, 10)
        bus.settle([one, two])
        check(a.metrics()["chat_bus_lost_messages_total"] == 0, "losses were counted")


def case_overrun():
    """a connection lost for longer than the log lasts: senders pause, then what is lost is counted, and the rest arrives"""
    many, size, paused = 400, 30000, [0]

    def post(one, two):
        two.lossy, begun = True, now()
        last = begun
        for number in range(10, 10 + many):
            one.post(number, size)
        while one.next[b"1"] < 10 + many:
            before = one.next[b"1"]
            one.host.lab.pump(lambda: one.next[b"1"] > before, 15, "the local chat stands still")
            paused[0] = max(paused[0], now() - last)
            last = now()
        paused.append(now() - begun)
        one.host.lab.talk(one, 100, now() + 3600, size)  # and they go on, so the log is full when the server is back
    with Lab(2, expect=TRYING + ERROR) as lab:
        a, b, one, two = away(lab, post)
        lab.wait(0.5)
        lab.timers.clear()
        last = len(one.sent_at)
        one.post(last)
        lab.pump(lambda: two.next[b"1"] == last + 1, 10, lambda: f"the rest does not arrive: {two.next}")
        bus.settle([one, two])
        check(len(re.findall("joined", a.said())) == 2, f"more than one connection was needed: {a.said()!r}")
        lost = a.metrics()["chat_bus_lost_messages_total"]
        check(two.gaps == lost > 0, f"{two.gaps} messages are missing, {lost:.0f} were counted as lost")
        check("messages are lost" in a.said(), f"nothing was logged: {a.said()!r}")
        check(3 < paused[0] < 12, f"senders paused for {paused[0]:.1f} s")
        return f"{lost:.0f} of {last} given up, senders paused for {paused[0]:.1f} s once, {paused[1]:.1f} s in all"


def case_cuts():
    """the connection breaks again and again amid commands: nothing twice, order kept but for what was under way"""
    with Lab(2, expect=TRYING + ERROR) as lab:
        server = Server(lab)
        between = Between(lab, server, quota=lambda: random.randrange(300, 60000))
        a, b = lab.hosts[0].start(between.url(), "-H", "4M"), lab.hosts[1].start(server.url(), "-H", "4M")
        one, two = Client(a), Client(b)
        two.lossy, total = True, 3000 if LONG else 1500
        for number in range(total):
            lab.at(now() + number * 0.002, lambda number=number: one.post(number, random.choice((0, 10, 1000))))
        lab.pump(lambda: len(one.sent_at) == total and not lab.timers, 60, "the timers do not end")
        between.quota = None
        lab.pump(lambda: one.next[b"1"] == total, 10, "its own echo is missing")
        number = [total]

        def last():
            one.post(number[0])
            number[0] += 1
            lab.wait(0.2)
            return two.next.get(b"1", 0) > total
        lab.pump(last, 30, lambda: f"it does not flow again: {two.next}")
        bus.settle([one, two])
        check(between.cuts > 5, f"only {between.cuts} cuts")
        return f"{between.cuts} cuts, {two.gaps} of {total} messages were under way and lost, {two.late} came late"


def case_bytes():
    """a link that hands on single bytes, both ways"""
    with Lab(2) as lab:
        between = Between(lab, Server(lab), step=1)
        return exchange(lab, [between.url()] * 2, 50, size=lambda n: n * 7)


def case_max():
    """max_payload: what is larger is refused to its sender, also after the server has lowered it"""
    with Lab(2, expect=TRYING + ERROR) as lab:
        server = Server(lab, "max_payload: 1000")
        between = Between(lab, server)
        a, b = lab.hosts[0].start(between.url(), "-H", "4M"), lab.hosts[1].start(server.url(), "-H", "4M")

        def limit(host, most):
            get = "GET /send?message=%s HTTP/1.1\nHost: x\n\n"
            post = "POST /send HTTP/1.1\nHost: x\nContent-Length: %d\n\n%s"
            for size, expected in ((most, (200,)), (most + 1, (400, 413))):
                if size < 8000:
                    check(host.request(get % ("x" * size)) in expected, f"GET /send of {size} bytes, {most} allowed")
                check(host.request(post % (size, "x" * size)) in expected, f"POST /send of {size} bytes, {most} allowed")
            client, large = Client(host), Client(host)
            client.send(b"x" * most)
            large.send(b"x" * (most + 1))
            lab.pump(lambda: large.closed, 10, f"{most + 1} bytes are not refused")
            check(any("\\x03\\xf1" in p for p in large.problems), f"not 1009 but {large.problems}")
            lab.pump(lambda: client.others, 10, f"{most} bytes do not come back")
            check(b"x" * (most + 1) not in client.others, "the large one was delivered")
            bus.settle([client])
        limit(a, 1000)
        lab.hang_up(b)
        b.hears(["x" * 1000] * 3)
        one, two = Client(a), Client(b)
        two.lossy = True
        server.kill()
        server.start("max_payload: 100000")
        for host in (a, b):
            host.says("(?s)joined.*joined", 20)
        limit(a, 65536)
        b.hears(["x" * 1000] * 3 + ["x" * 65536] * 2)
        between.cut()                                   # posted while 65536 bytes are allowed, sent when 2000 are
        a.says("(?s)joined.*left.*joined.*left", 20)
        sizes = [3000, 0, 1900, 2001, 65000, 0, 65000] + [0] * 50
        for number, size in enumerate(sizes):
            one.post(number, size)
        lab.pump(lambda: one.next.get(b"1") == len(sizes), 10, "its own echo is missing")
        server.kill()
        server.start("max_payload: 2000")
        b.says("(?s)joined.*joined.*joined", 20)
        between.open()
        a.says("(?s)joined.*joined.*joined", 20)
        lab.pump(lambda: two.next.get(b"1") == len(sizes), 30, lambda: f"the rest does not arrive: {two.next} {two.gaps} {a.said()}")
        bus.settle([two])
        lost, due = a.metrics()["chat_bus_lost_messages_total"], sum(size > 2000 for size in sizes)
        check(two.gaps == lost == due, f"{two.gaps} messages are missing, {lost:.0f} counted as lost, {due} were too large")
        limit(a, 2000)
        return f"{due} too large for the new limit, counted as lost; the others arrived"


def case_stop():
    """who stops first sends what its clients have said"""
    with Lab(2) as lab:
        server, slowest = Server(lab), 0
        b = lab.hosts[1].start(server.url(), "-H", "4M")
        two = Client(b)
        for turn in range(3):
            a = lab.hosts[0].start(server.url(), "-H", "4M")
            one = Client(a, name=b"%d" % (10 + turn))
            for number in range(2000):
                one.out += frame(message(one.name, number))
            one.write()
            lab.pump(lambda: one.next.get(one.name) == 2000, 20, "its own echo is missing")
            begun = now()
            check(a.stop() == 0, f"it did not end well: {a.said()}")
            slowest = max(slowest, now() - begun)
            lab.pump(lambda: two.next.get(one.name) == 2000, 10, lambda: f"of the last messages only {two.next} arrived")
            bus.settle([two])
        return f"stopped within {slowest:.2f} s"


def case_alone():
    """it stops at once without a server, and does not spin; -c counts clients alone"""
    with Lab(1, expect=TRYING) as lab:
        server = Server(lab)
        a = lab.hosts[0].start(server.url(), "-c", "1")
        client = Client(a)
        client.post(0)
        lab.everything([client], {b"1": 1}, 5)
        server.kill()
        a.says("(?s)left.*trying on", 20)
        before = a.spent()
        lab.wait(1)
        idle = a.spent() - before
        check(idle < 0.5, f"it took {idle:.2f} s of CPU time in a second without a server")
        before = a.spent()                              # its client does not answer the close, so stopping takes 4 s
        a.server.terminate()
        time.sleep(2)
        busy = a.spent() - before
        check(a.server.wait(10) == 0, f"it did not end well: {a.said()}")
        check(busy < 0.5, f"it took {busy:.2f} s of CPU time in 2 s of stopping")
        return f"{idle * 1000:.0f} ms of CPU time in a second without a server, {busy * 1000:.0f} ms in two of stopping"


def case_slow():
    """one who reads nothing is cut off, and holds up no other channel of another instance"""
    with Lab(2) as lab:
        server = Server(lab)
        a, b = (host.start(server.url()) for host in lab.hosts)
        sender, one, two = Client(a, "/?channel=busy", name=b"busy"), Client(a), Client(b)
        lazy = b.connect()
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.sendall(b"GET /?channel=busy HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                     b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n")
        check(lazy.recv(4096).startswith(b"HTTP/1.1 101 "), "no WebSocket")
        for number in range(300):
            sender.post(number, 60000)
        begun, found = now(), bus.watch(lab, [one, two])
        lab.talk(one, 50, now() + 3)
        lab.pump(lambda: not lab.timers, 20, "the timers do not end")
        total = len(one.sent_at)
        lab.everything([one, two], {b"1": total}, 10)
        b.counts("chat_slow_clients_total", 1, 20)
        lab.pump(lambda: sender.next.get(b"busy") == 300, 20, "the busy channel's sender has no echo")
        lazy.close()
        bus.settle([one, two, sender])
        return f"{total} messages through another channel, {bus.latency_text(found[1, 2])}"


# What a server may say to an instance that it has let in; each entry is one connection. {channel: lines} are
# the messages that must arrive, and the number of errors that must be counted (None: any).
CHANNEL = b"MSG chat.text.%s 1 "
HOSTILE = (
    ("a message", b"MSG chat.text.h0 1 5\r\nhello\r\n", {b"h0": ["hello"]}, 0),
    ("a message with a reply subject", b"MSG chat.text.h1 1 _INBOX.a.b 5\r\nhello\r\n", {b"h1": ["hello"]}, 0),
    ("an empty message", b"MSG chat.text.h2 1 0\r\n\r\n", {b"h2": [""]}, 0),
    ("half a line", b"MSG chat.te", {}, None),
    ("half a message", b"MSG chat.text.h3 1 5\r\nhel", {}, None),
    ("a message without its end", b"MSG chat.text.h4 1 5\r\nhello", {}, None),
    ("a payload that does not end", b"MSG chat.text.h5 1 5\r\nhelloXXMSG chat.text.h5 1 1\r\nx\r\n", {}, None),
    ("an endless line", b"A" * 300000, {}, 1),
    ("an endless MSG line", b"MSG " + b"A" * 300000, {}, 1),
    ("a long line", b"+OK " + b"A" * 20000 + b"\r\n", {}, 1),
    ("a size too large", b"MSG chat.text 1 99999999\r\n", {}, 1),
    ("a size beyond 64 bits", b"MSG chat.text 1 99999999999999999999\r\n", {}, 1),
    ("a negative size", b"MSG chat.text 1 -1\r\n", {}, 1),
    ("no size", b"MSG chat.text 1 \r\n", {}, 1),
    ("a hexadecimal size", b"MSG chat.text 1 0x10\r\n", {}, 1),
    ("a size alone", b"MSG 5\r\nhello\r\n", {}, 1),
    ("no subject at all", b"MSG \r\n", {}, 1),
    ("a size and spaces", b"MSG   5\r\nhello\r\n", {}, 1),
    ("another subject", b"MSG other.text.h6 1 5\r\nhello\r\n", {}, None),
    ("a subject that ends early", b"MSG chat 1 5\r\nhello\r\n", {}, 1),
    ("a NUL in the line", b"MSG chat.text.h7\0 1 5\r\nhello\r\n", {}, None),
    ("a message in small letters", b"msg chat.text.h8 1 5\r\nhello\r\n", {}, None),
    ("control characters", b"-ERR '\x1b[31m\x00\x07\x7f\x9b\xff\n\rchat: joined nats://evil\n'\r\n", {}, 1),
    ("a long error", b"-ERR '" + b"long " * 6000 + b"'\r\n", {}, 1),
    ("empty lines", b"\r\n" * 1000, {}, 1000),
    ("other words", b"HELLO\r\nPUB a 1\r\nx\r\n+OK\r\n", {}, 3),
    ("many INFOs", INFO * 1000, {}, 0),
    ("an empty INFO", b"INFO \r\nINFO {}\r\nINFO {\"max_payload\":\r\nINFO {\"max_payload\":99999999999999999999}\r\n", {}, 0),
    ("PONGs", b"PONG\r\n" * 1000, {}, 0),
    ("a close", b"", {}, 0),
)


def case_hostile():
    """a server that sends garbage, half and endless lines, absurd sizes and clever errors: the chat goes on"""
    with Lab(1, expect=ERROR + TRYING) as lab:
        fake = Fake(lab)
        a = lab.hosts[0].start(fake.url())
        client, before, number = Client(a), a.status("VmRSS"), 0

        def joined():
            lab.pump(lambda: a.metrics()["chat_bus_peers"] == 1 and b"PING\r\n" in fake.got, 15, lambda: f"does not come back: {a.said()[-500:]}", 0.01)

        def alive():
            nonlocal number
            client.post(number)
            number += 1
            lab.everything([client], {b"1": number}, 5)

        def abuse(data, expected, errors, step, what):
            joined()
            counted, count = a.metrics()["chat_bus_errors_total"], fake.count
            for at in range(0, len(data), step):
                fake.link.send(data[at:at + step])
            for channel, lines in expected.items():
                a.hears(lines, channel)
            if errors:
                a.counts("chat_bus_errors_total", counted + errors, 5)
            alive()
            fake.link.end("by the case")
            lab.pump(lambda: fake.count > count, 15, lambda: f"does not connect again: {a.said()[-500:]}", 0.01)
            joined()
            found = a.metrics()["chat_bus_errors_total"] - counted
            check(errors is None or found == errors, f"{what}: {found:.0f} errors were counted, not {errors}")
        for what, data, expected, errors in HOSTILE:
            abuse(data, expected, errors, len(data) + 1, what)
        abuse(b"MSG chat.text.single 1 5\r\nhello\r\nPING\r\n", {b"single": ["hello"]}, 0, 1, "single bytes")
        generator = random.Random(1)
        for turn in range(60 if LONG else 20):
            data = b"".join(generator.choice((generator.randbytes(generator.randrange(200)), b"\r\n", b"MSG chat.text.r 1 3\r\n", b"abc\r\n",
                                              b"MSG ", b"PING\r\n", b"-ERR '", b" 1 ", b"chat.", b"text", b"INFO {", b"99")) for _ in range(40))
            abuse(data, {}, None, generator.choice((1 << 20, 7)), "random")
        joined()
        fake.link.send(b"PING\r\n" * 20000)
        lab.pump(lambda: fake.got.count(b"PONG\r\n") == 20000, 10, lambda: f"{fake.got.count(b'PONG')} PONGs for 20000 PINGs")
        fake.link.send(INFO.replace(b"1048576", b"100"))
        lab.pump(lambda: a.request("POST /send HTTP/1.1\nHost: x\nContent-Length: 101\n\n" + "x" * 101) == 413, 5, "the new limit does not count", 0.02)
        fake.link.send(INFO)
        lab.pump(lambda: a.request("POST /send HTTP/1.1\nHost: x\nContent-Length: 101\n\n" + "x" * 101) == 200, 5, "the old limit still counts", 0.02)
        client.others.clear()
        fake.link.send(b"MSG chat.text.h9 1 33554432\r\n" + b"\xff" * 33554432 + b"\r\nMSG chat.text.h9 1 1\r\nx\r\n")
        a.hears(["x"], b"h9", 20)
        alive()
        lines = [line for line in a.said().splitlines() if len(line) > 400]
        check(not lines, f"a log line of {lines and len(lines[0])} characters: {lines[:1]}")
        grown = a.status("VmHWM") - before
        check(grown < (150 if "sanitize" in CHAT else 110), f"memory grew by {grown:.0f} MB")
        return f"{fake.count} connections, {a.metrics()['chat_bus_errors_total']:.0f} errors counted, memory grew by {grown:.0f} MB for a message of 32 MB"


def case_own():
    """its own words, from a connection that it has no more, come back: they are not said twice"""
    with Lab(1) as lab:
        fake = Fake(lab)
        client = Client(lab.hosts[0].start(fake.url()))
        client.post(0)
        lab.pump(lambda: re.search(rb"PUB chat\.text \w+ \d+\r\n.*\r\n", fake.got), 5, "it posts nothing")
        own = re.search(rb"PUB chat\.text (\w+) ", fake.got)[1]
        for number, reply in ((0, own + b" "), (1, b"0" * 16 + b" "), (2, own[:8] + b" "), (3, b"")):
            payload = message(b"x", number)
            fake.link.send(b"MSG chat.text 1 %s%d\r\n%s\r\n" % (reply, len(payload), payload))
        client.next[b"x"] = 1                           # the first is its own
        lab.pump(lambda: client.next[b"x"] == 4, 5, lambda: f"others' words do not come: {client.next}")
        bus.settle([client])


def case_strange():
    """a server that greets strangely: with a PONG first, in pieces, twice, or that demands TLS later"""
    with Lab(1, expect=ERROR + TRYING) as lab:
        fake = Fake(lab, b"PONG\r\nPONG\r\n")
        a = lab.hosts[0].start(fake.url(), joins=0)
        client = Client(a)                              # the start waits 2 s for the server, so this has been read
        client.post(0)
        lab.everything([client], {b"1": 1}, 5)
        check(a.metrics()["chat_bus_peers"] == 0 and b"PUB" not in fake.got, f"it joined without a greeting: {bytes(fake.got)!r}")
        fake.link.send(INFO[:20])
        fake.link.send(INFO[20:] + INFO)
        a.says("joined")
        lab.pump(lambda: b"PUB" in fake.got, 5, "it posts nothing")
        check(fake.got.count(b"CONNECT") == 1 and fake.got.index(b"CONNECT") < fake.got.index(b"SUB") < fake.got.index(b"PUB"), bytes(fake.got))
        fake.info = INFO.replace(b"}", b',"tls_required":true}')
        fake.link.end("by the case")
        a.says("demands TLS")
        lab.pump(lambda: fake.link.closed, 5, "it stays with a server that demands TLS")
        check(b"CONNECT" not in fake.got, "it told its credentials in the clear")
        fake.info = INFO
        a.says("(?s)joined.*joined", 20)


def case_mute():
    """a server that never says INFO, and one that never answers: given up after a while, tried again"""
    with Lab(2, expect=ERROR + TRYING) as lab:
        fakes = Fake(lab, b""), Fake(lab, pong=False)
        for host, fake in zip(lab.hosts, fakes):
            host.start(fake.url(), joins=0)
        for host in lab.hosts:
            client = Client(host)
            client.post(0)
            lab.everything([client], {client.name: 1}, 5)
        begun = now()
        lab.pump(lambda: all(fake.count > 1 for fake in fakes), 40, lambda: f"not tried again: {[fake.count for fake in fakes]}")
        for fake in fakes:
            fake.info, fake.pong = INFO, True
        for host in lab.hosts:
            host.says("joined", 40)
        return f"tried again within {now() - begun:.0f} s"


def case_deaf():
    """a server that freezes, and thaws: senders pause, then messages are given up and counted; the local chat goes on"""
    with Lab(2, expect=ERROR + TRYING) as lab:
        server, many, size = Server(lab), 800, 60000
        a, b = (host.start(server.url(), "-H", "4M") for host in lab.hosts)
        one, two = Client(a), Client(b)
        two.lossy = True
        one.post(0)
        lab.everything([one, two], {b"1": 1}, 10)
        server.process.send_signal(signal.SIGSTOP)
        for number in range(1, many):
            one.post(number, size)
        last, paused = now(), 0
        while one.next[b"1"] < many:
            before = one.next[b"1"]
            lab.pump(lambda: one.next[b"1"] > before, 20, lambda: f"the local chat stands still at {before}: {a.metrics()}")
            paused, last = max(paused, now() - last), now()
        lost = a.metrics()["chat_bus_lost_messages_total"]
        check(lost > 0, "nothing was counted as lost")
        check(2 < paused < 15, f"senders paused for {paused:.1f} s")
        rss = max(host.status("VmHWM") for host in lab.hosts)
        check(rss < (300 if "sanitize" in CHAT else 40), f"memory of {rss:.0f} MB")
        server.process.send_signal(signal.SIGCONT)
        a.says("(?s)joined.*joined", 30)
        one.post(many)
        lab.pump(lambda: two.next[b"1"] == many + 1, 20, lambda: f"it does not flow again: {two.next} {a.said()} {b.said()}")
        bus.settle([one, two])
        check(two.gaps >= lost, f"{two.gaps} messages are missing, {lost:.0f} were counted as lost")
        return f"{lost:.0f} of {many} given up and counted, {two.gaps} missing, senders paused for {paused:.1f} s at most, RSS {rss:.0f} MB"


def case_partition():
    """a network that drops everything: it is noticed, and what is posted later arrives when it is back"""
    if not shutil.which("nft"):
        raise Skip("no nft here")
    if libc.unshare(bus.CLONE_NEWNET):
        raise Skip("network namespaces are not allowed here")
    bus.run("ip", "link", "set", "lo", "up")
    with Lab(2, expect=ERROR + TRYING) as lab:
        server = Server(lab)
        ways = Between(lab, server), server
        a, b = (host.start(way.url(), "-H", "4M") for host, way in zip(lab.hosts, ways))
        one, two = Client(a), Client(b)
        two.lossy = True
        one.post(0)
        lab.everything([one, two], {b"1": 1}, 10)
        bus.run("nft", "-f", "-", text=f"table ip cut {{ chain in {{ type filter hook input priority 0; policy accept; tcp sport {ways[0].at[1]} drop; "
                f"tcp dport {ways[0].at[1]} drop\n}}\n}}\n")
        begun = now()
        lab.talk(one, 20, begun + 60)
        lab.pump(lambda: "left" in a.said(), 90, "it does not notice", 0.1)
        took, lost = now() - begun, len(one.sent_at)
        lab.timers.clear()
        bus.run("nft", "delete", "table", "ip", "cut")
        a.says("(?s)joined.*joined", 30)
        last = len(one.sent_at)
        one.post(last)
        lab.pump(lambda: two.next[b"1"] == last + 1, 10, lambda: f"the last message does not arrive: {two.next}")
        bus.settle([one, two])
        check(two.gaps <= lost, f"{two.gaps} messages are missing, {lost} were posted before it was noticed")
        check(took < 40, f"it took {took:.0f} s to notice")
        return f"noticed after {took:.0f} s, {two.gaps} of {last} messages lost"


# --- figures beside the UDP bus ---------------------------------------------------------------------

def bench():
    def measure(name, url, *options):
        with Lab(2, expect=r"|chat: peer \w{16} (joined|left)") as lab:
            url = url or Server(lab).url()
            for host in lab.hosts:
                host.start(url, "-H", "4M", *options, joins=int(url.startswith("nats://")))
            clients = [Client(host) for host in lab.hosts]
            lab.pump(lambda: all(host.metrics()["chat_bus_peers"] == 1 for host in lab.hosts), 10, "they do not meet", 0.02)
            found = bus.watch(lab, clients)
            lab.talk(clients[0], 200, now() + 10, 84)
            lab.pump(lambda: not lab.timers, 20)
            lab.everything(clients, {b"1": len(clients[0].sent_at)}, 10)
            p50, p99, _ = bus.percentiles(found[1, 2])
            own50, own99, _ = bus.percentiles(found[1, 1])
            rates = []
            for c in clients:
                c.arrival = None
            for turn in range(3):
                start, many, begun, spent = clients[1].next[b"1"], 50000, now(), [host.spent() for host in lab.hosts]
                clients[0].out += b"".join(frame(message(b"1", start + n, 84)) for n in range(many))
                clients[0].write()
                lab.everything(clients, {b"1": start + many}, 120)
                rates.append((many / (now() - begun), [(host.spent() - s) / many * 1e6 for host, s in zip(lab.hosts, spent)]))
            rate, (post, take) = sorted(rates)[1]
            print(f"{name:6} {p50:12.2f} {p99:9.2f} {own50:12.2f} {own99:9.2f} {rate:18.0f} {post:13.1f} {take:9.1f}", flush=True)
    print("       200 messages/s, ms:  own clients, ms:                   flat out:    us of CPU a message\n"
          "bus             p50       p99          p50       p99         messages/s        posting   taking")
    measure("UDP", f"239.255.81.{random.randrange(1, 255)}:{random.randrange(20000, 30000)}")
    measure("NATS", None)


# --- running ----------------------------------------------------------------------------------------

# What stands in one line runs at the same time: the first ones need the machine, the others mostly wait.
CASES = (("two",), ("three",), ("cluster", "names", "outside"), ("payloads", "workers", "restart", "tls"),
         ("away", "overrun", "deaf", "mute", "partition", "auth"), ("cuts", "late", "addresses", "later", "alone", "strange",
          "own"),
         ("bytes", "max", "stop", "slow"), ("hostile",))


def main():
    arguments, names = sys.argv[1:], [name for group in CASES for name in group]
    if "-l" in arguments:
        return print("\n".join(f"{name:10} {globals()['case_' + name].__doc__}" for name in names))
    chosen = [name for name in arguments if name != "--bench"] or names
    if unknown := set(chosen) - set(names):
        sys.exit(f"nats.py: no such case: {' '.join(unknown)} (-l lists them)")
    if not os.access(CHAT, os.X_OK):
        sys.exit(f"nats.py: {CHAT} is not there: run make first, or set CHAT")
    if not NATS:
        for name in chosen:
            print(f"skipped: nats {name}: no nats-server here")
        return
    if "--bench" in arguments:
        return bench()
    failed = sum(bus.run_together("nats", [globals()[f"case_{name}"] for name in group if name in chosen]) for group in CASES)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
