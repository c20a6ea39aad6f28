"""What the tests in Python share: hosts and instances, WebSocket clients, HTTP, reports.

A test is `with Lab() as lab:` in a function case_NAME, whose docstring's first line is its title
and whose result, if any, are figures to print. main() runs the cases, each in a process of its own.
A case fails by check() or Failure. On each host of a lab runs one instance at a time ($CHAT);
clients are served while the lab waits for something (pump). A host is a network namespace with an
eth0 on a bridge, 10.80.0.1 and so on; with Lab(network=False) all are this machine. All is held by
descriptors of this process, so nothing is left at its end.

PATIENCE=SECONDS is what a wait of 5 s may take (others in proportion), KEEP=1 shows what the
instances said.
"""
import base64, bisect, ctypes, json, os, random, re, selectors, shutil, signal, socket, ssl, struct
import subprocess, sys, tempfile, time, traceback
from pathlib import Path

CHAT = os.path.abspath(os.environ.get("CHAT", "./chat"))
BUILD = os.path.abspath(os.environ.get("BUILD", "build"))
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWNET, PR_SET_PDEATHSIG = 0x20000, 0x10000000, 0x40000000, 1
libc = ctypes.CDLL(None, use_errno=True)
now = time.monotonic
BUSY = BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError

class Failure(Exception):
    """What a case found wrong."""

class Skip(Exception):
    """Why a case cannot run here."""

def check(condition, text):
    """Fails with `text` (or what it returns, if it is a function) unless the condition holds."""
    if not condition:
        raise Failure(text() if callable(text) else text)

def equal(got, expected, what):
    check(got == expected, f"{what}: expected {expected!r:.300}, got {got!r:.300}")

def call(function, *args):
    """A function of libc, which must not fail."""
    if function(*args) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

def run(*command, text=None):
    """Runs a command that must succeed, and returns what it prints."""
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout

def mentions(program, text):
    """Do these bytes stand in the program's file?"""
    return os.path.isfile(program) and text in Path(program).read_bytes()

SANITIZED = mentions(CHAT, b"__asan_")
SLOWER = max(1, float(os.environ.get("PATIENCE", 10 if SANITIZED else 5)) / 5)

# --- messages and clients ------------------------------------------------------------------------

MESSAGE = re.compile(rb"(\S+) (\d+) (\d+) ")

def message(sender, number, size=0):
    """A message that says who sent it, which one it is, and whether it is whole."""
    start = b"%s %d %d " % (sender, number, size)
    return start if len(start) >= size else (start * (size // len(start) + 1))[:size]

def frame(payload, opcode=1):
    """A masked frame whose key is all zeros, so that the payload goes as it is."""
    size, start = len(payload), 0x80 | opcode
    if size < 126:
        return struct.pack(">BBI", start, 0x80 | size, 0) + payload
    if size < 65536:
        return struct.pack(">BBHI", start, 0xFE, size, 0) + payload
    return struct.pack(">BBQI", start, 0xFF, size, 0) + payload

def upgrade(path="/", headers=""):
    """The request of a WebSocket handshake. `headers`: further lines, each with its CRLF."""
    return (f"GET {path} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
            "Connection: Upgrade\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
            f"Sec-WebSocket-Version: 13\r\n{headers}\r\n").encode()

class Client:
    """A WebSocket client, served while the lab waits. Numbered messages (message()) are checked:
    each sender's must come whole, in order and once (`next`, `count`); all others are kept in
    `others`, str if text and bytes if binary. settle() looks at what was wrong (`problems`)."""

    def __init__(self, host, path="/", name=b"", headers="", wait=True):
        """`name`: as whom it posts; the host's number by default. `wait`: until it is let in."""
        self.host, self.name = host, name or b"%d" % host.number
        self.out, self.rest, self.others, self.problems = bytearray(), bytearray(), [], []
        self.next, self.count, self.sent_at, self.came_at = {}, 0, {}, {}
        self.closed, self.close_code, self.head, self.deaf = False, None, None, False
        self.socket = host.connect()
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.sendall(upgrade(path, headers))
        self.socket.setblocking(False)
        self.watch()
        if wait:
            host.lab.pump(lambda: self.head or self.closed, 10, "no answer to a handshake")
            check(self.head and self.head.startswith(b"HTTP/1.1 101 "),
                  lambda: f"no WebSocket: {self.head or self.rest!r}")

    def send(self, payload, opcode=1):
        """Sends a message: str or bytes, as text unless opcode says otherwise."""
        self.out += frame(payload.encode() if isinstance(payload, str) else payload, opcode)
        self.write()

    def post(self, number, size=0):
        """Sends its numbered message, as long as `size` if that is longer than its start."""
        self.sent_at[number] = now()
        self.send(message(self.name, number, size))

    def hear(self):
        """Waits for the next message that is not a numbered one, and returns it."""
        self.host.lab.pump(lambda: self.others or self.closed, 5, "no message came")
        check(self.others, f"the connection has ended: {self.closed}")
        return self.others.pop(0)

    def hears(self, *messages):
        for expected in messages:
            equal(self.hear(), expected, "the next message")

    def listen(self, does=True):
        """listen(False): it does not read any more."""
        self.deaf = not does
        self.watch()

    def watch(self):
        selector = self.host.lab.selector
        events = selectors.EVENT_READ * (not self.deaf) | selectors.EVENT_WRITE * bool(self.out)
        if self.socket in selector.get_map():
            selector.unregister(self.socket)
        if events and not self.closed:
            selector.register(self.socket, events, self)

    def write(self):
        try:
            while self.out:
                del self.out[:self.socket.send(self.out)]
        except BUSY:
            pass
        except OSError as error:
            return self.end(error)
        self.watch()

    def read(self):
        try:
            data = self.socket.recv(1 << 20)
            while getattr(self.socket, "pending", int)():   # TLS gives out one record at a time
                data += self.socket.recv(1 << 20)
        except BUSY:
            return
        except OSError as error:
            return self.end(error)
        if not data:
            return self.end("closed by the server")
        self.rest += data
        if not self.head:
            head, found, rest = bytes(self.rest).partition(b"\r\n\r\n")
            if not found:
                return
            self.head, self.rest = head, bytearray(rest)
        self.take_frames()

    def end(self, why="by the test"):
        """Closes the connection, without a close frame."""
        if not self.closed:
            self.closed = why
            self.watch()
            self.socket.close()

    def take_frames(self):
        rest, at, size = self.rest, 0, len(self.rest)
        while size - at >= 2 and not self.closed:
            length, start = rest[at + 1], at + 2
            if length >= 126:
                start += 2 if length == 126 else 8
                length = int.from_bytes(rest[at + 2:start], "big") if size >= start else size
            if start + length > size:
                break
            self.on_frame(rest[at], bytes(rest[start:start + length]))
            at = start + length
        del rest[:at]

    def on_frame(self, start, payload):
        if start in (0x81, 0x82):
            self.on_message(payload, start & 15)
        elif start == 0x89:
            self.send(payload, 10)
        elif start == 0x88:
            self.close_code = int.from_bytes(payload[:2], "big")
            self.send(payload[:2], 8)
        elif start != 0x8A:
            self.problems.append(f"frame starts with {start:#x}")

    def on_message(self, payload, opcode):
        start = MESSAGE.match(payload)
        if not start or payload != message(start[1], int(start[2]), int(start[3])):
            self.others.append(payload.decode() if opcode == 1 else payload)
            return
        sender, number = start[1], int(start[2])
        due = self.next.get(sender, 0)
        if number != due and len(self.problems) < 5:
            self.problems.append(f"{sender.decode()}'s message {number} where {due} was due")
        self.next[sender] = number + 1
        self.came_at[sender, number] = now()
        self.count += 1

def settle(clients):
    """None of the clients was cut off, and none has seen anything wrong."""
    for c in clients:
        check(not c.closed and c.close_code is None,
              f"a client of host {c.host.number} was cut off: {c.closed or c.close_code}")
        check(not c.problems, f"host {c.host.number}: {'; '.join(c.problems)}")

# --- programs and hosts --------------------------------------------------------------------------

class Program:
    """A process of the lab's, ended with it. What it says on stderr and stdout goes to files."""
    last_signal = signal.SIGKILL

    def __init__(self, lab, command, enter=lambda: None):
        """`enter` runs in the new process before the command does."""
        def prepare():
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            enter()
        self.lab, self.command = lab, command
        number = len(lab.programs)
        self.errors, self.output = lab.path(f"err.{number}"), lab.path(f"out.{number}")
        with open(self.errors, "wb") as errors, open(self.output, "wb") as output:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, preexec_fn=prepare)
        lab.programs.append(self)

    def said(self):
        return Path(self.errors).read_text(errors="replace")

    def printed(self):
        return Path(self.output).read_text(errors="replace")

    def says(self, pattern, seconds=10):
        """Waits until it has said what matches, and returns the match."""
        def look():
            return re.search(pattern, self.said(), re.M)
        self.lab.pump(lambda: look() or self.process.poll() is not None, seconds,
                      lambda: f"it says not {pattern!r}, but {self.said()!r}", 0.005)
        found = look()
        check(found, lambda: f"it ended with {self.process.poll()}: {self.said()!r}")
        return found

    def stop(self, signal_number=signal.SIGTERM):
        """Sends the signal and waits for its end; returns the status."""
        self.process.send_signal(signal_number)
        return self.wait()

    def wait(self):
        try:
            return self.process.wait(6 * SLOWER)
        except subprocess.TimeoutExpired:
            raise Failure(f"{self.command[0]} does not end: {self.said()!r}") from None

class Instance(Program):
    """A running chat. The lab checks its end: the status, and what it said; `expect` is allowed."""
    last_signal, expect, status = signal.SIGTERM, "", 0

class Host:
    """Where an instance runs. In a `with` of it, this process is in its network."""
    options, program, tls = ("-p", "0", "-q"), CHAT, None   # tls: the SSLContext of who connects

    def __init__(self, lab, number, space=None, address="127.0.0.1"):
        self.lab, self.number, self.space, self.address = lab, number, space, address
        self.chat, self.port, self.started = None, None, None

    def __enter__(self):
        if self.space is not None:
            call(libc.setns, self.space, CLONE_NEWNET)

    def __exit__(self, *_):
        if self.space is not None:
            call(libc.setns, self.lab.switch, CLONE_NEWNET)

    def begin(self, *options):
        """Starts an instance, and does not wait until it listens."""
        self.chat = Instance(self.lab, (self.program, *self.options, *options), self.__enter__)

    def start(self, *options, **more):
        """Starts an instance and waits until it listens."""
        self.begin(*options, **more)
        self.port = int(self.chat.says(r"^chat: listening on https?://\S*?:(\d+)/", 5)[1])
        self.started = now()
        return self

    def refuses(self, *options, status=1, **more):
        """An instance must end at once, with this status and one line, which it returns."""
        self.begin(*options, **more)
        self.chat.status, self.chat.expect = status, ".*"
        found, said = self.chat.wait(), self.chat.said()
        check(found == status and said.count("\n") == 1, f"{options}: status {found}, {said!r}")
        return said.strip()

    def stop(self, signal_number=signal.SIGTERM):
        """Ends its clients and then the instance; returns the status."""
        self.lab.hang_up(self)
        self.chat.status = -signal_number if signal_number == signal.SIGKILL else 0
        return self.chat.stop(signal_number)

    def send_signal(self, signal_number):
        self.chat.process.send_signal(signal_number)

    def said(self):
        return self.chat.said()

    def says(self, pattern, seconds=10):
        return self.chat.says(pattern, seconds)

    def peers(self):
        """How many other instances it counts, by what it says."""
        said = re.findall(r"^chat: peer \w{16} (joined|left)$", self.said(), re.M)
        return said.count("joined") - said.count("left")

    def connect(self):
        with self:
            link = socket.socket()
        link.settimeout(10 * SLOWER)
        link.connect(("127.0.0.1", self.port))
        return self.tls.wrap_socket(link, server_hostname="localhost") if self.tls else link

    def request(self, data):
        """Sends bytes; returns all of the answer."""
        with self.connect() as link:
            link.sendall(data)
            return b"".join(iter(lambda: link.recv(1 << 20), b""))

    def get(self, path="/", status=200, headers=""):
        """The body of the answer to a GET, which must have this status."""
        text = f"GET {path} HTTP/1.1\nHost: localhost\n{headers}\n".replace("\n", "\r\n")
        head, _, body = self.request(text.encode()).partition(b"\r\n\r\n")
        check(head.startswith(b"HTTP/1.1 %d " % status), f"{path}: not {status}, but {head!r}")
        return body

    def history(self, channel=""):
        """What the channel (percent-encoded) remembers."""
        return json.loads(self.get(f"/messages?channel={channel}"))

    def memory(self, key="VmRSS"):
        """MB, by /proc/PID/status."""
        status = Path(f"/proc/{self.chat.process.pid}/status").read_text()
        return int(re.search(rf"^{key}:\s+(\d+) kB", status, re.M)[1]) / 1024

    def cpu(self):
        """Seconds of CPU time that the instance has spent."""
        return int(Path(f"/proc/{self.chat.process.pid}/schedstat").read_text().split()[0]) / 1e9

# --- the lab -------------------------------------------------------------------------------------

def own_group():
    """GROUP:PORT on the loopback that hardly anybody else uses."""
    at = random.randrange
    return f"239.255.{at(1, 255)}.{at(1, 255)}:{at(20000, 30000)}"

class Lab:
    host_type = Host                                    # for tests whose hosts can do more

    def __init__(self, hosts=3, network=True, expect=""):
        """`expect`: what else instances may say, a regular expression that begins with |."""
        self.directory = tempfile.mkdtemp(prefix=f"chat-test-{os.getpid()}-")
        self.selector, self.timers, self.programs = selectors.DefaultSelector(), [], []
        self.expect, self.switch, self.network = expect, None, network
        for name in ("secret", "other"):
            self.write(name, base64.b64encode(os.urandom(32)).decode() + "\n", 0o600)
        if network:
            self.switch = self.new_space()
            run("ip", "link", "add", "bridge0", "type", "bridge", "mcast_snooping", "0")
            run("ip", "link", "set", "bridge0", "up")
        self.hosts = []
        for _ in range(hosts):
            self.add_host()

    def new_space(self):
        """A network namespace, which this process is in from now on."""
        call(libc.unshare, CLONE_NEWNET)
        return os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    def add_host(self):
        number = len(self.hosts) + 1
        own = (self.new_space(), f"10.80.0.{number}") if self.network else ()
        host = self.host_type(self, number, *own)
        if own:
            call(libc.setns, self.switch, CLONE_NEWNET)
            self.plug_in(host)
        self.hosts.append(host)
        return host

    def plug_in(self, host):
        """Gives the host its eth0, on the bridge as portN."""
        port = f"port{host.number}"
        run("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0",
            "netns", f"/proc/{os.getpid()}/fd/{host.space}")
        run("ip", "link", "set", port, "master", "bridge0", "up")
        with host:
            run("ip", "link", "set", "lo", "up")
            run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
            run("ip", "link", "set", "eth0", "up")

    def path(self, name):
        """A file of the lab's own, which goes with it. Two secrets are there: secret, other."""
        return os.path.join(self.directory, name)

    def write(self, name, text, mode=0o644):
        Path(self.path(name)).write_text(text)
        os.chmod(self.path(name), mode)
        return self.path(name)

    def spawn(self, *command, **more):
        """Starts another program than the chat; it is killed at the end."""
        return Program(self, command, **more)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        """Ends all. Nothing unexpected may have been said, each instance must have ended well."""
        problems = []
        self.hang_up()
        for program in self.programs:
            if program.process.poll() is None:
                program.process.send_signal(signal.SIGCONT)
                program.process.send_signal(program.last_signal)
        for number, program in enumerate(self.programs):
            try:
                program.process.wait(8 * SLOWER)
            except subprocess.TimeoutExpired:
                program.stop(signal.SIGKILL)
            if os.environ.get("KEEP"):
                sys.stderr.writelines(f"  {number}: {x}\n" for x in program.said().splitlines())
            if isinstance(program, Instance):
                problems += self.examine(number, program)
        shutil.rmtree(self.directory, ignore_errors=True)
        for file in (self.switch, *(host.space for host in self.hosts)):
            if file is not None:
                os.close(file)
        if problems and kind in (None, Failure):        # also beside a failure
            raise Failure("; ".join([str(error)] * (kind is Failure) + problems[:5])) from None

    def examine(self, number, program):
        """What is wrong with an instance's end and what it said; a subclass may look for more."""
        usual = rf"chat: (listening on |peer \w{{16}} (joined|left)$){self.expect}"
        usual += f"|{program.expect}" * bool(program.expect)
        if program.process.returncode != program.status:
            yield f"instance {number} ended with {program.process.returncode}"
        for line in program.said().splitlines():
            if not re.match(usual, line):
                yield f"instance {number} says: {line}"

    def start(self, *options, **more):
        """Starts an instance on each host, and waits until they have met."""
        for host in self.hosts:
            host.start(*options, **more)
        self.meet(self.hosts)

    def meet(self, hosts):
        """Waits until each of the hosts counts all the others."""
        self.pump(lambda: all(host.peers() == len(hosts) - 1 for host in hosts), 5,
                  lambda: f"the hosts count {[host.peers() for host in hosts]} peers", 0.01)

    def hang_up(self, host=None):
        """Closes the clients, all or those of one host."""
        for key in list(self.selector.get_map().values()):
            if host is None or key.data.host is host:
                key.data.end()

    def at(self, when, function):
        """While the lab waits, it will call this function at that time."""
        bisect.insort(self.timers, (when, function), key=lambda timer: timer[0])

    def talk(self, client, rate, until, size=0):
        """It posts `rate` messages a second at random moments, the first now, until that time."""
        def post(number, due):
            if client.closed:
                return
            client.post(number, size)
            due += random.expovariate(rate)
            if due < until:
                self.at(due, lambda: post(number + 1, due))
        post(len(client.sent_at), now())

    def pump(self, condition, seconds, what=None, pace=0.0):
        """Serves the clients until `condition`, looked at every `pace` seconds; returns whether it
        came true, or, given a text `what` (or a function that returns it), fails if not."""
        deadline, look = now() + seconds * (SLOWER if what else 1), 0
        while True:
            time_now = now()
            while self.timers and self.timers[0][0] <= time_now:
                self.timers.pop(0)[1]()
            if time_now >= look:
                if condition():
                    return True
                look = now() + pace
            if time_now >= deadline:
                check(not what, lambda: f"after {seconds} s {what() if callable(what) else what}")
                return False
            due = self.timers[0][0] if self.timers else deadline
            rest = min(deadline, now() + (pace or 0.02), due) - now()
            for key, events in self.selector.select(max(0, rest)):
                if events & selectors.EVENT_WRITE and not key.data.closed:
                    key.data.write()
                if events & selectors.EVENT_READ and not key.data.closed:
                    key.data.read()

    def wait(self, seconds):
        """Serves the clients for that long."""
        self.pump(lambda: False, seconds)

    def everything(self, clients, expected=None, seconds=5):
        """Waits until each client has each sender's numbered messages, as many as `expected` says
        by sender's name (by default all that they have posted), in order; returns the seconds."""
        expected = expected or {c.name: len(c.sent_at) for c in clients if c.sent_at}
        total, begun = sum(expected.values()), now()
        self.pump(lambda: all(c.count >= total or c.closed or c.problems for c in clients), seconds,
                  lambda: f"of {expected} they have {[c.next for c in clients]}")
        settle(clients)
        for c in clients:
            check(c.next == expected and c.count == total,
                  f"host {c.host.number}: got {c.next}, not {expected}")
        return now() - begun

# --- running -------------------------------------------------------------------------------------

def run_case(title, function):
    """Runs a case and prints its line. Returns whether it failed."""
    begun = now()
    try:
        figures = function()
        line = f"ok - {title} ({f'{figures}; ' if figures else ''}{now() - begun:.1f} s)"
    except Skip as reason:
        line = f"skipped: {title}: {reason}"
    except Failure as failure:
        line = f"FAILED - {title}: " + " ".join(str(failure).split("\n"))
    except Exception as error:
        traceback.print_exc()
        line = f"FAILED - {title}: {error!r}"
    os.write(1, line.encode() + b"\n")
    return line.startswith("FAILED")

def run_together(cases, at_once):
    """Runs each case, by title, in a process of its own; returns how many failed."""
    failed = 0
    for number, case in enumerate(cases.items()):
        failed += number >= at_once and os.wait()[1] != 0
        if os.fork() == 0:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            try:
                random.seed()
                os._exit(run_case(*case))
            finally:
                os._exit(1)
    return failed + sum(os.wait()[1] != 0 for _ in range(min(len(cases), at_once)))

def no_network():
    """Why no hosts can be made here, or None. Who is not root goes into a user namespace."""
    user = os.geteuid()
    try:
        call(libc.unshare, CLONE_NEWNET | CLONE_NEWUSER * (user != 0))
        if user:
            Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        run("ip", "link")
        run("nft", "list", "ruleset")
    except (OSError, RuntimeError) as error:
        return f"no hosts can be made here: {error}"

def main(part, cases, alone=(), at_once=4, missing=lambda: None):
    """The command line of a test, [-l] [CASE...]. Runs the functions `cases`, `at_once` of them
    side by side, then those in `alone` one by one. `missing` returns why nothing can run here."""
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    titles = {f.__name__.removeprefix("case_"): f.__doc__.splitlines()[0] for f in (*cases, *alone)}
    if "-l" in sys.argv:
        return print("\n".join(f"{name:12} {title}" for name, title in titles.items()))
    chosen = sys.argv[1:] or list(titles)
    if unknown := set(chosen) - set(titles):
        sys.exit(f"{sys.argv[0]}: no such case: {' '.join(unknown)} (-l lists them)")
    if reason := missing():
        return print("\n".join(f"skipped: {part} {name}: {reason}" for name in chosen))
    failed = 0
    for functions, many in (cases, at_once), (alone, 1):
        names = ((f.__name__.removeprefix("case_"), f) for f in functions)
        chosen_ones = {f"{part} {n}: {titles[n]}": f for n, f in names if n in chosen}
        failed += run_together(chosen_ones, many)
    sys.exit(failed > 0)
