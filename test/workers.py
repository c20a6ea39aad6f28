#!/usr/bin/python3
"""Tests -j: workers that share a port and meet on the bus, and the parent that looks after them.

    test/workers.py [CASE...]   all cases, or those named (-l lists them)

Which worker holds a connection, /proc tells: a new socket is among that process's files. The clients, and the messages that tell who sent them and which one it is, are those of test/bus.py; but here
all is on this machine's loopback, each case on a group of its own, so no namespace and no root is needed.
KEEP=1 shows what the servers said.
"""
import json, os, re, resource, selectors, signal, socket, subprocess, sys, tempfile, time, zlib

sys.dont_write_bytecode = True
import bus
from bus import CHAT, Failure, Skip, check, frame, message, now, percentiles, settle

REPLACED = r"|chat: worker \d+ died, replaced$"
GOING_AWAY = f"close frame {(1001).to_bytes(2, 'big')!r}"


def alive(pid):
    """Not ended: a zombie has closed all its files, so it has. (/proc/PID/stat: "pid (name) state ...")"""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Client(bus.Client):
    """Answers a close frame as a browser would, unless it is deaf."""
    answered = False

    def on_bytes(self, data):
        super().on_bytes(data)
        if GOING_AWAY in self.problems and not self.answered:
            self.answered = True
            self.send((1001).to_bytes(2, "big"), 8)

    def deafen(self):
        self.host.lab.selector.unregister(self.socket)

    def undeafen(self):
        self.host.lab.selector.register(self.socket, selectors.EVENT_READ, self)


class Raw(Client):
    """Keeps the messages themselves."""

    def on_message(self, payload):
        self.others.append(payload.decode())


class Counter(Client):
    """Of a flood of messages keeps only how many bytes came, and their checksum."""

    size = crc = 0

    def on_bytes(self, data):
        self.size, self.crc = self.size + len(data), zlib.crc32(data, self.crc)


class Probe:
    """One request on a connection of its own, without waiting: `took` is the time from connect to its answer."""

    def __init__(self, server, path="/messages"):
        self.host, self.closed, self.answer, self.took, self.begun = server, False, b"", None, now()
        self.request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        self.socket = socket.socket()
        self.socket.setblocking(False)
        self.socket.connect_ex(("127.0.0.1", server.port))
        server.lab.selector.register(self.socket, selectors.EVENT_WRITE, self)

    def write(self):
        try:
            self.socket.sendall(self.request)
            self.host.lab.selector.modify(self.socket, selectors.EVENT_READ, self)
        except OSError as error:
            self.end(error)

    def read(self):
        try:
            piece = self.socket.recv(1 << 20)
        except OSError as error:
            return self.end(error)
        self.answer += piece
        if not piece:
            if self.answer.startswith(b"HTTP/1.1 200 "):
                self.took = now() - self.begun
            self.end(f"closed by the server after {self.answer[:40]!r}")

    def end(self, why):
        if not self.closed:
            self.closed = why
            self.host.lab.selector.unregister(self.socket)
            self.socket.close()


class Server(bus.Host):
    """A parent and its workers."""

    def __init__(self, lab, number):
        self.lab, self.number, self.server, self.log, self.logs = lab, number, None, None, []
        self.seen = set()

    def __enter__(self):
        pass

    def __exit__(self, *_):
        pass

    def into(self):
        bus.libc.prctl(bus.PR_SET_PDEATHSIG, signal.SIGKILL)

    def start(self, *options, bus=None, **more):
        return super().start(*options, secret=None, bus=("-b", bus or self.lab.group), **more)

    def workers(self):
        """The process numbers of those that are alive."""
        parent = self.server.pid
        with open(f"/proc/{parent}/task/{parent}/children") as children:
            return [pid for pid in map(int, children.read().split()) if alive(pid)]

    def newest(self):
        """The worker that has taken the latest connection: it has a socket that nobody had at the last look."""
        found = []
        for pid in self.workers():
            try:
                for name in os.listdir(f"/proc/{pid}/fd"):
                    file = os.readlink(f"/proc/{pid}/fd/{name}")
                    if file.startswith("socket:") and file not in self.seen:
                        self.seen.add(file)
                        found.append(pid)
            except FileNotFoundError:
                pass                                    # closed, or the worker has just ended
        return found[0] if len(found) == 1 else None

    def connect(self):
        self.newest()
        return super().connect()

    def get_from(self, path):
        """Which worker answered, and what."""
        with self.connect() as link:
            link.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            answer, size = b"", None
            while size is None or len(answer) < size:
                piece = link.recv(1 << 20)
                check(piece, f"{path}: {answer!r}")
                answer += piece
                if size is None and b"\r\n\r\n" in answer:
                    head, _, answer = answer.partition(b"\r\n\r\n")
                    check(head.startswith(b"HTTP/1.1 200 "), f"{path}: {head!r}")
                    size = int(re.search(rb"(?i)content-length: (\d+)", head)[1])
            return self.newest(), answer

    def of_each(self, path):
        """The answers of all workers, by worker."""
        found, workers = {}, self.workers()
        for _ in range(40 * len(workers)):
            worker, answer = self.get_from(path)
            found[worker] = answer
            if set(workers) <= set(found):
                return {worker: found[worker] for worker in workers}
        raise Failure(f"of workers {workers} only {list(found)} answered")

    def histories(self, channel=""):
        return {worker: json.loads(answer) for worker, answer in self.of_each(f"/messages?channel={channel}").items()}

    def peers(self):
        return [int(re.search(rb"^chat_bus_peers (\d+)", answer, re.M)[1]) for answer in self.of_each("/metrics").values()]

    def metrics_of(self, worker):
        lines = [line.split() for line in self.of_each("/metrics")[worker].decode().splitlines()]
        return {line[0]: float(line[1]) for line in lines if len(line) == 2}

    def ended(self, seconds, workers):
        """The exit status of the parent, when it and these workers have gone; and the time it took."""
        begun = now()
        self.lab.pump(lambda: self.server.poll() is not None and not any(map(alive, workers)), seconds,
                      lambda: f"still there: {'parent ' if self.server.poll() is None else ''}{[*filter(alive, workers)]}")
        return self.server.returncode, now() - begun


class Lab(bus.Lab):
    """Servers on this machine, on a group that nobody else uses."""

    def __init__(self, expect=""):
        self.directory = tempfile.mkdtemp(prefix=f"chat-workers-{os.getpid()}-")
        self.selector, self.timers, self.servers, self.hosts = selectors.DefaultSelector(), [], [], []
        self.relay, self.expect, self.turn, self.named = None, expect, 0, 0
        self.held = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.held.bind(("127.0.0.1", 0))                # while it is ours, nobody else takes this port
        self.group = f"{bus.GROUP}:{self.held.getsockname()[1]}"
        self.switch = os.open(os.devnull, os.O_RDONLY)  # no namespace to come back to

    def __exit__(self, *ending):
        with self.held:
            super().__exit__(*ending)

    def server(self, *options, **more):
        """One that is up, all of its workers peers of each other."""
        server = Server(self, len(self.servers) + 1).start(*options, **more)
        self.gather(server, int(options[options.index("-j") + 1]))
        return server

    def gather(self, server, count):
        """Waits until so many workers are there and have met."""
        self.pump(lambda: len(server.workers()) == count, 5, lambda: f"workers {server.workers()}, not {count}", 0.01)
        self.pump(lambda: set(server.peers()) == {count - 1}, 10, lambda: f"the workers count {server.peers()} peers", 0.05)

    def client(self, server, kind=Client, path="/"):
        self.named += 1
        client = kind(server, path, b"c%d" % self.named)
        client.worker = server.newest()
        return client

    def client_of(self, server, worker, kind=Client, path="/"):
        """A client of this worker: connects until the kernel chooses it."""
        for _ in range(200):
            client = self.client(server, kind, path)
            if client.worker == worker:
                return client
            client.end("of another worker")
        raise Failure(f"worker {worker} gets no connection")

    def spread(self, server, each):
        """As many clients on each worker, in no order."""
        return [self.client_of(server, worker) for _ in range(each) for worker in server.workers()]


def by_sender(history):
    """{sender: numbers}, each in the order in which they came."""
    found = {}
    for text in history:
        sender, number, _ = text.split(" ", 2)
        found.setdefault(sender, []).append(int(number))
    return found


def agree(lab, server, seconds):
    """Waits until all workers remember the same of each sender, in the same order. Returns that."""
    found = []

    def same():
        found[:] = map(by_sender, server.histories().values())
        return all(history == found[0] for history in found)
    lab.pump(same, seconds, lambda: "the workers do not remember the same: "
             f"{[{s: (len(n), n[:1], n[-1:]) for s, n in history.items()} for history in found]}"[:600], 0.05)
    return found[0]


def latencies(clients):
    """Fills in as messages come: ([on the sender's own worker], [across to another])."""
    found, names = ([], []), {c.name: c for c in clients}

    def arrival(c, sender, number):
        if sender in names:
            found[names[sender].worker != c.worker].append(now() - names[sender].sent_at[number])
    for c in clients:
        c.arrival = arrival
    return found


def kill(lab, server, worker):
    """kill -9. Returns when the process has closed all its files."""
    os.kill(worker, signal.SIGKILL)
    deadline = now() + 5
    while alive(worker):
        check(now() < deadline, f"worker {worker} survives kill -9")
        time.sleep(0.001)


def was_replaced(lab, server, workers, count):
    """Waits for the line about each of `workers`, and for `count` workers that have met."""
    lab.pump(lambda: all(f"chat: worker {worker} died, replaced\n" in server.said() for worker in workers), 5,
             lambda: f"worker {workers}: no line says so: {server.said()!r}", 0.01)
    lab.gather(server, count)
    check(server.said().count("died, replaced") == len(workers), f"replaced more than {workers}: {server.said()!r}")


def starts_not(what, status, *options, environment=None, text=""):
    """It must end by itself with this status and one line, which holds `text`."""
    environment = {**os.environ, **(environment or {})}
    environment.pop("CHAT_SECRET", None)
    try:
        done = subprocess.run((CHAT, "-q", *options), capture_output=True, text=True, timeout=5, env=environment)
    except subprocess.TimeoutExpired:
        raise Failure(f"{what}: it starts")
    check(done.returncode == status and done.stderr.count("\n") == 1 and done.stderr.startswith("chat: ")
          and text in done.stderr and not done.stdout,
          f"{what}: exit {done.returncode}, not {status}: {done.stderr!r} {done.stdout!r}")


# --- the cases: each returns the figures to print ---------------------------------------------------

def case_all():
    """every client of every worker gets each message once and in order, also from /send"""
    with Lab() as lab:
        server = lab.server("-j", "3", "-H", "4M")
        clients = lab.spread(server, 4)
        each, posts = 150, 100
        for number in range(each):
            for c in clients:
                c.post(number, 3000 if number % 50 == 7 else 0)
        with server.connect() as link:                  # one connection, so one order
            for number in range(posts):
                body = message(b"http", number)
                link.sendall(b"POST /send HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
            expected = {**{c.name: each for c in clients}, b"http": posts}
            lab.everything(clients, expected, 20)
        remembered = agree(lab, server, 3)
        check(remembered == {s.decode(): list(range(n)) for s, n in expected.items()}, "the history lacks or repeats messages")
        for worker, history in server.histories().items():
            late = lab.client_of(server, worker, Raw, "/?history=50")
            lab.pump(lambda: len(late.others) >= 51, 5, lambda: f"only {len(late.others)} of history=50 came")
            check(late.others == ['{"history":50}', *history[-50:]], f"history=50 is not the end of /messages: {late.others}")
        settle(clients)
        return f"{sum(expected.values())} messages to {len(clients)} clients of 3 workers"


def case_many():
    """eight workers meet; what is said on one is heard on all"""
    with Lab() as lab:
        server = lab.server("-j", "8")
        clients = lab.spread(server, 1)
        for number in range(20):
            for c in clients:
                c.post(number)
        lab.everything(clients, {c.name: 20 for c in clients}, 15)
        return f"{len(clients)} clients"


def case_kill():
    """kill -9 of a worker: the others go on, nobody is refused, the new one has the history"""
    with Lab(expect=REPLACED) as lab:
        server = lab.server("-j", "3", "-H", "4M")
        clients, begun = lab.spread(server, 3), now()
        victim = clients[0].worker
        rest = [c for c in clients if c.worker != victim]
        found, probes = latencies(rest), []
        for c in clients:
            lab.talk(c, 40, begun + 3, 100)
        lab.wait(1)
        before = percentiles(found[1])
        found[0].clear(), found[1].clear()
        kill(lab, server, victim)
        died = now()

        def probe():
            probes.append(Probe(server))
            if now() < died + 1:
                lab.at(now() + 0.01, probe)
        probe()
        for c in clients:
            if c not in rest:
                c.post = lambda number, size=0: None
        lab.pump(lambda: not lab.timers, 5)
        lab.pump(lambda: all(p.closed for p in probes), 5, lambda: f"{sum(not p.closed for p in probes)} have no answer")
        refused = [p.closed for p in probes if p.took is None]
        check(not refused, f"{len(refused)} of {len(probes)} connections were refused or broken: {refused[:3]}")
        gone = [c for c in clients if c not in rest]
        check(all(c.closed for c in gone), "a client of the dead worker still has its connection")
        lab.pump(lambda: all(c.next.get(s.name, 0) == len(s.sent_at) for c in rest for s in rest), 10,
                 lambda: f"missing: {[c.next for c in rest]}")
        settle(rest)
        check(max(max(found[0]), max(found[1])) < 1, f"the others waited for {max(map(max, found)):.2f} s")
        was_replaced(lab, server, [victim], 3)
        remembered = agree(lab, server, 3)
        for c in rest:
            check(remembered[c.name.decode()] == [*range(len(c.sent_at))], f"the history lacks messages of {c.name}")
            c.arrival = None
        fresh = [lab.client_of(server, worker) for worker in server.workers()]
        total = sum(c.count for c in rest)
        for c in fresh:
            c.post(0)
        lab.pump(lambda: all(c.count >= len(fresh) for c in fresh), 5, "the new worker's clients hear nothing")
        lab.pump(lambda: sum(c.count for c in rest) == total + len(rest) * len(fresh), 5, "the new worker is not heard")
        settle(rest + fresh)
        waits = percentiles([p.took for p in probes])
        return (f"across %.1f, %.0f, %.0f ms (p50, p99, max), before %.1f, %.0f, %.0f; " % (*percentiles(found[1]), *before) +
                f"{len(probes)} new connections answered in %.1f, %.0f, %.0f ms" % waits)


def case_flood():
    """kill -9 of a worker while another's client sends flat out: it goes on, and nothing is missing"""
    size, many = 1000, 100
    with Lab(expect=REPLACED) as lab:
        server = lab.server("-j", "3")
        victim, sender, hearer = (lab.client_of(server, worker, Counter) for worker in server.workers())
        piece, sent, begun, arrivals = frame(b"x" * size) * many, 0, now(), [(now(), 0)]

        def pour():
            nonlocal sent
            if len(sender.out) < 10 * len(piece) and not sender.closed:
                sender.out += piece
                sent += many
                if not sender.writing:
                    sender.write()
            if hearer.size > arrivals[-1][1]:
                arrivals.append((now(), hearer.size))
            if now() < begun + 3:
                lab.at(now() + 0.001, pour)
        pour()
        lab.wait(1)
        kill(lab, server, victim.worker)
        died = now()
        lab.pump(lambda: not lab.timers, 10)
        due = lambda: sent * (size + 4)
        lab.pump(lambda: min(hearer.size, sender.size) >= due() or hearer.closed or sender.closed, 10,
                 lambda: f"of {due()} bytes {hearer.size} came across, {sender.size} to the sender")
        arrivals.append((now(), hearer.size))
        settle([sender, hearer])
        check(hearer.size == sender.size == due() and hearer.crc == sender.crc, "not the same stream")
        silence, since = max((b[0] - a[0], a[0]) for a, b in zip(arrivals, arrivals[1:]))
        check(silence < 8, f"nothing came across for {silence:.2f} s")
        was_replaced(lab, server, [victim.worker], 3)
        return (f"{arrivals[-1][1] / 1e6 / (arrivals[-1][0] - begun):.0f} MB/s; the longest silence took {silence * 1e3:.0f} ms, "
                f"from {(since - died) * 1e3:+.0f} ms after the kill")


def case_stale():
    """two workers die at once: what one left in the other's socket does not hide its history"""
    with Lab(expect=REPLACED) as lab:
        server = lab.server("-j", "3", "-H", "4M")
        frozen, speaker, other = server.workers()
        talker, hearer = lab.client_of(server, speaker), lab.client_of(server, other)
        os.kill(frozen, signal.SIGSTOP)
        for number in range(100):
            talker.post(number)
        lab.pump(lambda: hearer.count == 100, 5, lambda: f"only {hearer.count} of 100 came")
        lab.wait(0.2)                                   # its STATUS lies in the frozen one's socket
        kill(lab, server, speaker)
        kill(lab, server, frozen)
        was_replaced(lab, server, [speaker, frozen], 3)
        remembered = agree(lab, server, 4)
        check(remembered == {talker.name.decode(): [*range(100)]}, f"the history is {remembered}")
        settle([hearer])


def case_everybody():
    """kill -9 of all workers at once: new ones serve, and nobody is refused"""
    with Lab(expect=REPLACED) as lab:
        server = lab.server("-j", "4")
        workers, begun = server.workers(), now()
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        lab.pump(lambda: not any(map(alive, workers)), 5, "workers survive kill -9", 0.001)
        probes = [Probe(server) for _ in range(20)]
        lab.pump(lambda: all(p.closed for p in probes), 8, lambda: f"{sum(not p.closed for p in probes)} have no answer")
        check(all(p.took for p in probes), f"refused: {[p.closed for p in probes if not p.took][:3]}")
        was_replaced(lab, server, workers, 4)
        return f"answers after {min(p.took for p in probes) * 1e3:.0f} to {max(p.took for p in probes) * 1e3:.0f} ms"


def case_again():
    """a worker that dies again and again is tried again, without haste; the others serve; then it is back"""
    with Lab(expect=REPLACED + r"|chat: \w+: Too many open files$") as lab:
        sanitizer = os.environ.get("ASAN_OPTIONS", "") + ":detect_leaks=0"  # that needs a file, too
        server = lab.server("-j", "2", environment={"ASAN_OPTIONS": sanitizer})
        victim, other = server.workers()
        clients = [lab.client_of(server, other) for _ in range(2)]

        def spent():
            with open(f"/proc/{server.server.pid}/stat") as stat:
                return sum(map(int, stat.read().rpartition(")")[2].split()[11:15])) / os.sysconf("SC_CLK_TCK")
        soft, hard = resource.prlimit(server.server.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(server.server.pid, resource.RLIMIT_NOFILE, (3, hard))
        before = spent()                                # no new file: no new worker can start
        kill(lab, server, victim)
        seconds, begun = 2, now()
        for c in clients:
            lab.talk(c, 50, begun + seconds, 0)
        lab.wait(seconds)
        deaths, took = server.said().count("died, replaced"), spent() - before
        waiting = [Probe(server) for _ in range(10)]
        lab.wait(0.2)
        resource.prlimit(server.server.pid, resource.RLIMIT_NOFILE, (soft, hard))
        lab.pump(lambda: all(p.took for p in waiting), 5, "connections that waited for the worker have no answer")
        lab.gather(server, 2)
        lab.everything(clients, {c.name: len(c.sent_at) for c in clients}, 5)
        lab.client_of(server, next(worker for worker in server.workers() if worker != other))
        check(3 <= deaths <= 25 * seconds, f"{deaths} deaths in {seconds} s")
        check("Too many open files" in server.said(), "the test does not make workers die any more")
        return f"{deaths / seconds:.0f} tries a second, {took / seconds * 1e3:.0f} ms of CPU time a second"


def ends(how, deaf=False):
    """`how` makes it end. Clients are told, the status is 0, no process is left, the port is free."""
    with Lab() as lab:
        server = lab.server("-j", "3")
        clients, workers = lab.spread(server, 2), server.workers()
        for number in range(50):
            clients[0].post(number)
        for c in clients if deaf else ():
            c.deafen()
        how(server)
        status, took = server.ended(5.5, workers)
        for c in clients if deaf else ():
            c.undeafen()
        check(status == 0, f"exit status {status}")
        lab.pump(lambda: all(c.closed for c in clients), 1, "a client still has its connection")
        for c in clients:
            check(c.problems == [GOING_AWAY], f"a client was told {c.problems}")
        check("died" not in server.said(), f"it says {server.said()!r}")
        Server(lab, 9).start("-p", str(server.port), bus="none").stop()
        return took


def case_stop():
    """SIGTERM, SIGINT and Ctrl-C: clients get 1001, all end with status 0, the port is free"""
    took = [ends(lambda server: server.server.send_signal(number)) for number in (signal.SIGTERM, signal.SIGINT)]

    def control_c(server):                              # the terminal tells all of the group
        for pid in (*server.workers(), server.server.pid):
            os.kill(pid, signal.SIGINT)
    took.append(ends(control_c))
    return "%.0f, %.0f and %.0f ms" % tuple(t * 1e3 for t in took)


def case_deaf():
    """SIGTERM while clients do not answer the close: all end within 5 s, status 0"""
    return f"{ends(lambda server: server.server.terminate(), deaf=True):.1f} s"


def case_orphans():
    """kill -9 of the parent: its workers tell their clients and leave"""
    with Lab() as lab:
        server = lab.server("-j", "3")
        clients, workers = lab.spread(server, 2), server.workers()
        server.server.kill()
        status, took = server.ended(5.5, workers)
        check(status == -signal.SIGKILL, f"exit status {status}")
        lab.pump(lambda: all(c.closed for c in clients), 1, "a client still has its connection")
        for c in clients:
            check(c.problems == [GOING_AWAY], f"a client was told {c.problems}")
        Server(lab, 9).start("-p", str(server.port), bus="none").stop()
        return f"{took * 1e3:.0f} ms"


def case_one():
    """SIGTERM to one worker: its clients are told, it is replaced, it does not spin meanwhile"""
    with Lab(expect=REPLACED) as lab:
        server = lab.server("-j", "2")
        worker, other = server.workers()
        leaving, staying = lab.client_of(server, worker), lab.client_of(server, other)
        leaving.deafen()                                # so that it has to wait
        os.kill(worker, signal.SIGTERM)
        lab.wait(0.1)
        probes = [Probe(server) for _ in range(10)]
        with open(f"/proc/{worker}/schedstat") as stat:
            before = int(stat.read().split()[0])
        lab.wait(1.5)
        with open(f"/proc/{worker}/schedstat") as stat:
            spent = (int(stat.read().split()[0]) - before) / 1e9
        lab.pump(lambda: all(p.took for p in probes), 8, lambda: f"no answer: {[p.closed for p in probes if not p.took]}")
        leaving.undeafen()
        lab.pump(lambda: leaving.closed, 1, "its client still has its connection")
        check(leaving.problems == [GOING_AWAY], f"its client was told {leaving.problems}")
        was_replaced(lab, server, [worker], 2)
        settle([staying])
        check(spent < 0.5, f"it took {spent:.2f} s of CPU time in 1.5 s of waiting")
        return f"{spent * 1e3:.0f} ms of CPU time in 1.5 s; waiting connections answered after {max(p.took for p in probes):.1f} s"


def case_strangers():
    """a child that is no worker ends, or SIGCHLD came ignored: with and without -j that changes nothing"""
    for options in (("-b", "none"), ("-j", "2")):
        with Lab(expect=REPLACED) as lab:
            server = Server(lab, 1)
            into = server.into

            def with_child():                           # what a shell leaves to the program it turns into
                into()
                if os.fork() == 0:
                    os.execvp("sleep", ("sleep", "0.3"))
            server.into = with_child
            server.start(*options)
            lab.pump(lambda: "sleep" not in children_of(server.server.pid), 5, "the child does not end", 0.05)
            lab.wait(0.3)
            check(server.server.poll() is None, f"{options}: ended with {server.server.poll()}: {server.said()!r}")
            lab.client(server)
            check(server.stop() == 0 and "died" not in server.said(), f"{options}: {server.said()!r}")
    with Lab(expect=REPLACED) as lab:
        server = Server(lab, 1)
        server.into = lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        server.start("-j", "2")
        lab.gather(server, 2)
        workers = server.workers()
        kill(lab, server, workers[0])
        was_replaced(lab, server, workers[:1], 2)
        check(server.stop() == 0, f"SIGCHLD ignored: exit status {server.server.returncode}")


def children_of(parent):
    """The names of its children that are alive."""
    names = []
    with open(f"/proc/{parent}/task/{parent}/children") as children:
        for pid in children.read().split():
            if alive(int(pid)):
                with open(f"/proc/{pid}/comm") as name:
                    names.append(name.read().strip())
    return names


def case_options():
    """bad values of -j: exit 2 and one line that names it"""
    for value in ("0", "65", "-1", "x", "", "2x", "1K", "4294967298", "18446744073709551617"):
        starts_not(f"-j {value!r}", 2, "-p", "0", "-b", "none", "-j", value, text="workers")
    starts_not("-j 2 -b none", 2, "-p", "0", "-j", "2", "-b", "none", text="workers")
    starts_not("--workers 2 -b none", 2, "-p", "0", "--workers", "2", "-b", "none", text="workers")
    with Lab() as lab:
        server = Server(lab, 1).start("-j", "1", bus="none")
        check(not server.workers(), "-j 1 has children")


def case_failures():
    """what cannot start says so in one line, exit 1, with -j 3 as without"""
    with Lab() as lab:
        alone = Server(lab, 1).start(bus="none")
        unreadable, public = lab.path("none"), lab.path("public")
        with open(public, "w") as file:
            file.write("c2VjcmV0\n")
        os.chmod(public, 0o644)
        address, port = lab.group.split(":")
        for what, text, *options in (
                ("the port of one without -j", "in use", "-p", str(alone.port), "-b", lab.group),
                ("no such interface", "nowhere", "-p", "0", "-i", "nowhere", "-s", "none", "-b", lab.group),
                ("no secret off the loopback", "secret", "-p", "0", "-b", f"192.0.2.1:{port}"),
                ("an unreadable secret", unreadable, "-p", "0", "-b", lab.group, "-s", unreadable),
                ("a secret that all can read", public, "-p", "0", "-b", lab.group, "-s", public),
                ("an address of another machine", "bind", "-p", "0", "-a", "192.0.2.1", "-b", lab.group),
                ("no such directory", unreadable, "-p", "0", "-b", lab.group, "-d", unreadable)):
            starts_not(what, 1, "-j", "3", *options, text=text)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
            taken.bind(("127.0.0.1", 0))
            third = taken.getsockname()[1]
            starts_not("the bus port of the third worker in use", 1, "-j", "3", "-p", "0", "-b", f"127.0.0.1:{third - 2}",
                       text="bus: bind")
        starts_not("ports beyond 65535", 2, "-j", "3", "-p", "0", "-b", "127.0.0.1:65534", text="bus")
        check(alone.server.poll() is None, "the other one has ended")


def case_share():
    """chats with -j share a port; one without -j neither lets in nor comes in"""
    with Lab() as lab:
        first = Server(lab, 1).start("-j", "1")
        port = str(first.port)
        second = Server(lab, 2).start("-j", "1", "-p", port)
        check(second.port == first.port, f"ports {first.port} and {second.port}")
        starts_not("without -j on their port", 1, "-p", port, "-b", "none", text="in use")
        third = Server(lab, 3).start("-j", "2", "-p", port)
        lab.pump(lambda: len(third.workers()) == 2, 5, "no two workers")
        everyone, clients = {first.server.pid, second.server.pid, *third.workers()}, {}
        first.workers = lambda: everyone                # so that it finds them among all
        for pid in everyone:
            clients[pid] = lab.client_of(first, pid)
        lab.pump(lambda: set(first.peers()) == {3}, 5, lambda: f"they count {first.peers()} peers", 0.05)
        for number in range(50):
            for c in clients.values():
                c.post(number)
        lab.everything(clients.values(), {c.name: 50 for c in clients.values()}, 10)
        del first.workers
        clients[second.server.pid].end("by the test")
        check(second.stop() == 0, f"exit status {second.server.returncode}")
        rest = [c for pid, c in clients.items() if pid != second.server.pid]
        lab.wait(0.05)
        for number in range(50, 100):
            for c in rest:
                c.post(number)
        lab.pump(lambda: all(c.next[s.name] == 100 for c in rest for s in rest), 10, "messages are missing after one left")
        probes = [Probe(first) for _ in range(30)]
        lab.pump(lambda: all(p.closed for p in probes), 5, "no answer")
        check(all(p.took for p in probes), f"connections went to the one that left: {[p.closed for p in probes if not p.took][:3]}")
        check(lab.pump(lambda: True, 1) and not any(c.closed for c in rest), "a client of another was cut off")
        for c in rest:
            check(not c.problems, f"{c.problems}")


def case_zero():
    """-p 0 takes one free port for all workers, and several chats take different ones"""
    with Lab() as lab:
        servers = [Server(lab, number).start("-j", "3") for number in range(4)]
        for server in servers:
            check(server.said().count("listening on") == 1, f"says {server.said()!r}")
            listeners = set()
            for name in ("tcp", "tcp6"):
                with open(f"/proc/net/{name}") as table:
                    for line in table:
                        _, local, _, state, *rest = line.split()
                        if local.endswith(f":{server.port:04X}") and state == "0A":
                            listeners.add(rest[5])
            check(len(listeners) == 3, f"port {server.port} has {len(listeners)} listeners")
        ports = {server.port for server in servers}
        check(len(ports) == len(servers), f"ports {ports}")


def case_files():
    """-d and -j together: each worker serves the files, whole"""
    with Lab() as lab:
        os.mkdir(lab.path("www"))
        data = os.urandom(3 << 20)
        for name, content in (("index.html", b"<p>here"), ("big.bin", data)):
            with open(lab.path(f"www/{name}"), "wb") as file:
                file.write(content)
        server = lab.server("-j", "3", "-d", lab.path("www"))
        for path, content in (("/", b"<p>here"), ("/big.bin", data)):
            answers = server.of_each(path)
            check(len(answers) == 3 and set(answers.values()) == {content}, f"{path}: {[len(a) for a in answers.values()]}")


def case_peers():
    """a list of unicast peers with -j 3: the workers take the ports from PORT on"""
    with Lab(expect=REPLACED) as lab:
        for _ in range(50):                             # three free ports in a row
            held = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(3)]
            try:
                held[0].bind(("127.0.0.1", 0))
                port = held[0].getsockname()[1]
                for i in (1, 2):
                    held[i].bind(("127.0.0.1", port + i))
                break
            except (OSError, OverflowError):
                pass
            finally:
                for one in held:
                    one.close()
        server = lab.server("-j", "3", "-H", "4M", bus=f"127.0.0.1:{port}")
        clients = lab.spread(server, 2)
        for number in range(100):
            for c in clients:
                c.post(number, 2000 if number == 50 else 0)
        lab.everything(clients, {c.name: 100 for c in clients}, 10)
        victim = clients[0].worker
        kill(lab, server, victim)
        was_replaced(lab, server, [victim], 3)
        check(agree(lab, server, 4) == {c.name.decode(): [*range(100)] for c in clients}, "the history lacks messages")


LINE = re.compile(r'127\.0\.0\.1 - - \[[^\]]+\] "GET /(\d+)/x* HTTP/1\.1" 404 \d+')


def case_log():
    """the request log of several workers: no line is torn"""
    with Lab() as lab, open(lab.path("access"), "wb") as log:
        server = Server(lab, 1)
        popen = subprocess.Popen

        def start(command, stdout=None, **more):        # not quiet, and into a file
            return popen([word for word in command if word != "-q"], stdout=log, **more)
        subprocess.Popen = start
        try:
            server.start("-j", "3")
        finally:
            subprocess.Popen = popen
        lab.gather(server, 3)
        size = os.path.getsize(lab.path("access"))
        links, each = [server.connect() for _ in range(24)], 400
        for start in range(0, each, 100):
            for i, link in enumerate(links):
                link.sendall(b"".join(b"GET /%d/%s HTTP/1.1\r\nHost: x\r\n\r\n" % (i * each + n, b"x" * (n % 97))
                                      for n in range(start, start + 100)))
        for link in links:
            answer = b""
            while answer.count(b"HTTP/1.1 404 ") < each:
                piece = link.recv(1 << 20)
                check(piece, "a connection was cut off")
                answer += piece
            link.close()
        check(server.stop() == 0, f"exit status {server.server.returncode}")
        with open(lab.path("access")) as file:
            file.seek(size)
            lines = file.read().splitlines()
        torn = [line for line in lines if not LINE.fullmatch(line)]
        check(not torn, f"{len(torn)} of {len(lines)} lines are torn: {torn[:2]}")
        check(sorted(int(LINE.fullmatch(line)[1]) for line in lines) == [*range(len(links) * each)], "lines are missing")
        return f"{len(lines)} lines"


def case_latency():
    """200 messages/s: what the way to another worker adds"""
    with Lab() as lab:
        server = lab.server("-j", "2")
        here, there = server.workers()
        clients = [lab.client_of(server, worker) for worker in (here, here, there)]
        own, cross = found = latencies(clients)
        clients[0].post(0)
        lab.everything(clients, {clients[0].name: 1}, 5)
        own.clear(), cross.clear()
        lab.talk(clients[0], 200, now() + (10 if os.environ.get("LONG") else 4), 80)
        lab.pump(lambda: not lab.timers, 15)
        lab.everything(clients, {clients[0].name: len(clients[0].sent_at)}, 5)
        return "same worker p50 %.2f, p99 %.2f ms; across p50 %.2f, p99 %.2f ms" % (*percentiles(own)[:2], *percentiles(cross)[:2])


def case_speed():
    """small messages flat out from one worker's client to another's: none is lost"""
    with Lab() as lab:
        server = lab.server("-j", "2", "-c", "100")
        here, there = server.workers()
        sender, near, far = (lab.client_of(server, worker, Counter) for worker in (here, here, there))
        many = 400000 if os.environ.get("LONG") else 100000
        payloads = [b"number %8d" % number for number in range(many)]
        expected = b"".join(b"\x81%c%s" % (len(payload), payload) for payload in payloads)
        before, begun, done = server.metrics_of(here)["chat_bus_datagrams_sent_total"], now(), {}
        sender.out += b"".join(frame(payload) for payload in payloads)
        sender.write()

        def all_there():
            for c in (sender, near, far):
                if c.size >= len(expected) and c not in done:
                    done[c] = now() - begun
            return len(done) == 3 or any(c.closed for c in (sender, near, far))
        lab.pump(all_there, 30, lambda: f"of {len(expected)} bytes came {[c.size for c in (sender, near, far)]}")
        settle([sender, near, far])
        for c in (sender, near, far):
            check(c.size == len(expected) and c.crc == zlib.crc32(expected), "not the messages that were sent, in order")
        datagrams = server.metrics_of(here)["chat_bus_datagrams_sent_total"] - before
        return (f"{many / done[far]:.0f} messages/s across, {many / done[near]:.0f} on the same worker; "
                f"{datagrams / many:.3f} datagrams a message")


# --- running ----------------------------------------------------------------------------------------

# What stands in one line runs at the same time; the last ones measure, so they run alone.
CASES = (("all", "options", "failures", "deaf"), ("kill",), ("flood",), ("stale", "everybody", "again", "one"),
         ("stop", "orphans", "strangers"), ("many", "share", "zero"), ("files", "peers", "log"),
         ("latency",), ("speed",))


def main():
    arguments, names = sys.argv[1:], [name for group in CASES for name in group]
    if "-l" in arguments:
        return print("\n".join(f"{name:10} {globals()['case_' + name].__doc__}" for name in names))
    if unknown := set(arguments) - set(names):
        sys.exit(f"workers.py: no such case: {' '.join(unknown)} (-l lists them)")
    if not os.access(CHAT, os.X_OK):
        sys.exit(f"workers.py: {CHAT} is not there: run make first, or set CHAT")
    if not os.path.exists(f"/proc/self/task/{os.getpid()}/children"):
        for name in arguments or names:
            print(f"skipped: workers {name}: this kernel's /proc does not list children")
        return
    chosen = [[globals()[f"case_{name}"] for name in group if name in (arguments or names)] for group in CASES]
    sys.exit(sum(bus.run_together("workers", group) for group in chosen) > 0)


if __name__ == "__main__":
    main()
