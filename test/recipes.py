#!/usr/bin/python3
"""Follows the recipes of README.md to the letter, each on machines of its own, and tries what comes of it.

    test/recipes.py [CASE...]       all cases, or those named (-l lists them)

The commands and files are taken out of the README; where something must differ from it, the case says what.
A machine is a network namespace and a root folder in memory, in which this machine's /usr is read-only: so
ports, paths and addresses are free to be the README's, and nothing is left behind. This needs root.
LONG=1 also waits until a proxy would have given an idle connection up, KEEP=1 shows what the programs said.
"""
import asyncio, base64, collections, hashlib, json, os, random, re, shutil, signal, socket, ssl, stat, struct, subprocess
import sys, tempfile, time

from bus import Failure, Skip, call, check, complain, fork_case, frame, libc, now, run, quiet_ipv6, succeeds
from bus import CLONE_NEWNET, PR_SET_PDEATHSIG

CHAT = os.path.abspath(os.environ.get("CHAT", "./chat"))
SOURCE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CLONE_NEWNS, MS_REC, MS_PRIVATE, NOBODY = 0x20000, 0x4000, 0x40000, 65534
LONG = os.environ.get("LONG") == "1"
with open(f"{SOURCE}/index.html", "rb") as file:
    PAGE = file.read()


# --- the README ---------------------------------------------------------------------------------------

class Recipe:
    """What stands under a heading: **Title.** or **Title** and so on, up to the next one. `code` are its blocks,
    in order: fenced ones by their language, indented ones without."""

    def __init__(self, title, text):
        self.title, self.text, self.code = title, text, []
        for fenced in re.finditer(r"^```(\w*)\n(.*?)^```$|(?:^(?: {4}[^\n]*)?\n)*^ {4}[^\n]*\n", text, re.M | re.S):
            language, block = fenced[1] or "", fenced[2]
            if block is None:
                block = re.sub(r"^ {4}", "", fenced[0].strip("\n") + "\n", flags=re.M)
            self.code.append((language, block))

    def block(self, language="", index=0):
        blocks = [text for name, text in self.code if name == language]
        check(index < len(blocks), f"the README has no block {index} of '{language}' under '{self.title}'")
        return blocks[index]

    def lines(self, index=0):
        """The commands of an indented block."""
        return [line for line in self.block("", index).splitlines() if line.strip()]


def recipes():
    with open(f"{SOURCE}/README.md") as file:
        chapter = re.search(r"^## Recipes\n(.*?)^## ", file.read(), re.M | re.S)[1]
    parts = re.split(r"^\*\*(.+?)\.?\*\*", chapter, flags=re.M)
    return {title: Recipe(title, text) for title, text in zip(parts[1::2], parts[2::2])}


def recipe(title):
    found = recipes()
    check(title in found, f"the README has no recipe '{title}'")
    return found[title]


# --- machines -----------------------------------------------------------------------------------------

def mount(*arguments):
    run("mount", *arguments)


class Machine:
    """Programs run in its folder /srv, as root unless told otherwise. `addresses` are those of its eth0."""

    def __init__(self, lab, addresses=()):
        self.lab, self.number, self.root = lab, len(lab.machines), lab.path(f"machine{len(lab.machines)}")
        self.programs = []
        lab.machines.append(self)
        call(libc.unshare, CLONE_NEWNET)
        self.space = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        quiet_ipv6()
        run("ip", "link", "set", "lo", "up")
        if addresses:
            self.plug_in(addresses)
        call(libc.setns, lab.switch, CLONE_NEWNET)
        self.make_root()

    def plug_in(self, addresses):
        """Like rented servers, they have one address each and reach all others by their eth0."""
        port = f"port{self.number}"
        run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", port, "netns",
            f"/proc/{os.getpid()}/fd/{self.lab.switch}")
        for address in addresses:
            run("ip", "address", "add", address, "dev", "eth0")
        run("ip", "link", "set", "eth0", "up")
        run("ip", "route", "add", "default", "dev", "eth0")
        call(libc.setns, self.lab.switch, CLONE_NEWNET)
        run("ip", "link", "set", port, "master", "bridge0", "up")
        call(libc.setns, self.space, CLONE_NEWNET)

    def make_root(self):
        os.mkdir(self.root)
        mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", self.root)
        for name in ("dev", "etc", "proc", "root", "run", "srv", "sys", "tmp", "usr", "var", "var/log", "var/lib"):
            os.mkdir(self.path(name))
        for name in ("dev", "run", "sys"):                  # else systemd would mount the real ones there
            mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", self.path(name))
        os.chmod(self.path("tmp"), 0o1777)
        for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
            if os.path.islink(f"/{name}"):
                os.symlink(os.readlink(f"/{name}"), self.path(name))
        mount("--bind", "-o", "ro", "/usr", self.path("usr"))
        mount("-t", "tmpfs", "tmpfs", self.path("usr/local"))
        mount("--bind", "-o", "ro", "/proc", self.path("proc"))
        for name in ("null", "zero", "full", "random", "urandom", "tty"):
            open(self.path(f"dev/{name}"), "w").close()
            mount("--bind", f"/dev/{name}", self.path(f"dev/{name}"))
        os.symlink("pts/ptmx", self.path("dev/ptmx"))
        for name in ("alternatives", "group", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "nsswitch.conf", "passwd",
                     "ssl/openssl.cnf"):
            self.copy(f"/etc/{name}", f"etc/{name}")
        self.write("etc/hosts", "127.0.0.1 localhost chat.example.org\n")
        for name in ("main.c", "index.html", "Makefile"):
            self.copy(f"{SOURCE}/{name}", f"srv/{name}")
        shutil.copyfile(CHAT, self.path("srv/chat"))       # the newest: make takes it as it is
        os.chmod(self.path("srv/chat"), 0o755)

    def path(self, name):
        return os.path.join(self.root, name.lstrip("/"))

    def copy(self, source, name):
        if os.path.isdir(source):
            shutil.copytree(source, self.path(name), symlinks=True)
        elif os.path.exists(source):
            os.makedirs(os.path.dirname(self.path(name)), exist_ok=True)
            shutil.copy2(source, self.path(name))

    def write(self, name, text):
        os.makedirs(os.path.dirname(self.path(name)), exist_ok=True)
        with open(self.path(name), "w") as file:
            file.write(text)

    def read(self, name):
        with open(self.path(name), errors="replace") as file:
            return file.read()

    def popen(self, command, root=None, user=None, environment=None, **more):
        def enter():
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            call(libc.setns, self.space, CLONE_NEWNET)
            os.chroot(root or self.root)
            os.chdir("/" if root else "/srv")
            if user:
                os.setgroups([])
                os.setgid(user)
                os.setuid(user)
        environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root",
                       **(environment or {})}
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=enter, env=environment, **more)

    def run(self, command, inside=(), **more):
        """A command that ends, as somebody types it; sudo is left out, as we are root. Returns what it says."""
        command = re.sub(r"\bsudo ", "", command)
        more = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **more}
        with self.popen((*inside, "sh", "-ec", command), **more) as program:
            said = program.communicate(timeout=60)[0].decode(errors="replace")
        check(program.returncode == 0, f"'{command}' ends with {program.returncode}: {said.strip()}")
        return said

    def start(self, command, **more):
        """A program that stays: a command line, or a list. Its errors go to a log."""
        if isinstance(command, str):
            command = ("sh", "-c", "exec " + command)
        name = self.lab.path(f"log{self.number}.{len(self.programs)}")
        with open(name, "wb") as log:
            program = self.popen(command, stdout=subprocess.DEVNULL, stderr=log, **more)
        program.log = name
        self.programs.append(program)
        return program

    def chat(self, command, **more):
        """Starts a chat and waits until it listens."""
        program = self.start(command, **more)
        program.is_chat, program.may_say = True, "^$"
        found = wait_for(program, r"chat: listening on https?://\S*?:(\d+)/", f"'{command}' does not start")
        program.port = int(found[1])
        return program

    def connect(self, port, address="127.0.0.1"):
        call(libc.setns, self.space, CLONE_NEWNET)
        try:
            link = socket.socket()
        finally:
            call(libc.setns, self.lab.switch, CLONE_NEWNET)
        link.settimeout(10)
        link.connect((address, port))
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return link


def said(program):
    with open(program.log, errors="replace") as log:
        return log.read()


def wait_for(program, pattern, what, seconds=10):
    """Waits until the program has said what matches."""
    deadline = now() + seconds
    while now() < deadline:
        ended = program.poll() is not None
        found = re.search(pattern, said(program))
        if found:
            return found
        check(not ended, f"{what}: it ends with {program.poll()}, {said(program)!r}")
        time.sleep(0.005)
    raise Failure(f"{what} within {seconds} s: {said(program)!r}")


def wait_until(condition, what, seconds=10):
    deadline = now() + seconds
    while not condition():
        check(now() < deadline, f"{what() if callable(what) else what} (within {seconds} s)")
        time.sleep(0.01)


def end(program, signal_number=signal.SIGTERM):
    program.send_signal(signal_number)
    try:
        return program.wait(6)
    except subprocess.TimeoutExpired:
        program.kill()
        program.wait()
        raise Failure(f"{program.args[-1]} does not end on signal {signal_number}")


class Lab:
    """All machines of a case, and the switch that joins them. The case runs in a process of its own."""

    def __init__(self):
        self.directory, self.machines = tempfile.mkdtemp(prefix="chat-recipes-"), []

    def path(self, name):
        return os.path.join(self.directory, name)

    def __enter__(self):
        call(libc.unshare, CLONE_NEWNS | CLONE_NEWNET)
        call(libc.mount, b"none", b"/", None, MS_REC | MS_PRIVATE, None)
        mount("-t", "tmpfs", "tmpfs", self.directory)
        self.switch = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        quiet_ipv6()
        run("ip", "link", "add", "bridge0", "type", "bridge", "mcast_snooping", "0")
        run("ip", "link", "set", "bridge0", "up")
        return self

    def __exit__(self, kind, error, trace):
        """Ends all programs; those who are a chat must end well, and may have said nothing unexpected."""
        problems = []
        programs = [program for machine in self.machines for program in machine.programs]
        for program in programs:
            try:
                if program.poll() is None:
                    end(program)
            except Failure as failure:
                problems.append(str(failure))
        for program in programs:
            if os.environ.get("KEEP"):
                sys.stderr.write("".join(f"  {program.args[-1]}: {line}\n" for line in said(program).splitlines()))
            if not hasattr(program, "is_chat"):
                continue
            if program.returncode != 0:
                problems.append(f"{program.args[-1]} ended with {program.returncode}")
            for line in said(program).splitlines():
                if not re.match(rf"chat: (listening on |peer \w{{16}} (joined|left))|{program.may_say}", line):
                    problems.append(f"{program.args[-1]} says: {line}")
        run("umount", "-l", self.directory)
        os.rmdir(self.directory)
        complain(problems, kind, error)


# --- a browser's doings -------------------------------------------------------------------------------

class Site:
    """Where a chat is to be found, and as what: `machine` asks `host` (a name and perhaps a port) for `prefix`."""

    def __init__(self, machine, port=8080, host=None, prefix="/", context=None):
        self.machine, self.port, self.prefix, self.context = machine, port, prefix, context
        self.host = host or f"localhost:{port}"
        self.origin = ("https://" if context else "http://") + self.host

    def connect(self):
        link = self.machine.connect(self.port)
        return self.context.wrap_socket(link, server_hostname=self.host) if self.context else link

    def get(self, path=None):
        """Status, headers and body."""
        with self.connect() as link:
            link.sendall(f"GET {path or self.prefix} HTTP/1.1\r\nHost: {self.host}\r\nConnection: close\r\n\r\n".encode())
            answer = b""
            while piece := link.recv(1 << 16):
                answer += piece
        head, _, body = answer.partition(b"\r\n\r\n")
        return int(head.split()[1]), head.decode().lower(), body

    def open(self, query="", origin="its own"):
        return WebSocket(self, query, self.origin if origin == "its own" else origin)


class WebSocket:
    KEY = base64.b64encode(b"0123456789abcdef")
    ACCEPT = base64.b64encode(hashlib.sha1(KEY + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())

    def __init__(self, site, query, origin):
        self.link, self.rest, self.pings = site.connect(), b"", 0
        head = (f"GET {site.prefix}{query} HTTP/1.1\r\nHost: {site.host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {self.KEY.decode()}\r\n")
        self.link.sendall((head + (f"Origin: {origin}\r\n" if origin else "") + "\r\n").encode())
        while b"\r\n\r\n" not in self.rest:
            self.fill()
        head, _, self.rest = self.rest.partition(b"\r\n\r\n")
        self.status = int(head.split()[1])
        if self.status == 101:
            check(b"sec-websocket-accept: " + self.ACCEPT.lower() in head.lower(), f"wrong accept: {head!r}")

    def fill(self):
        piece = self.link.recv(1 << 16)
        check(piece, f"the connection was closed after {self.rest!r}")
        self.rest += piece

    def send(self, text, opcode=1):
        self.link.sendall(frame(text.encode(), opcode))

    def receive(self, seconds=10):
        """The next text message, or None; pings are answered."""
        deadline = now() + seconds
        while True:
            while len(self.rest) < 2 or len(self.rest) < 2 + (self.rest[1] & 127):
                self.link.settimeout(max(0.001, deadline - now()))
                try:
                    self.fill()
                except socket.timeout:
                    return None
            size, opcode = self.rest[1], self.rest[0] & 15
            check(size < 126, "a longer message than was sent")
            payload, self.rest = self.rest[2:2 + size], self.rest[2 + size:]
            if opcode == 1:
                return payload.decode()
            check(opcode == 9, f"a frame with opcode {opcode}: {payload!r}")
            self.pings += 1
            self.link.sendall(frame(payload, 10))

    def expect(self, text):
        got = self.receive()
        check(got == text, f"{text!r} was due, not {got!r}")

    def close(self):
        self.link.close()


def try_chat(site):
    """The page comes whole, what one says the other hears, and other sites' pages are kept out."""
    status, head, body = site.get()
    check(status == 200 and body == PAGE, f"no page: {status}, {len(body)} bytes")
    check("content-security-policy: " in head, f"no policy: {head!r}")
    channel = f"?channel=try{random.getrandbits(32)}"
    a, b, program = site.open(channel), site.open(channel), site.open(channel, origin=None)
    for x in (a, b, program):
        check(x.status == 101, f"no WebSocket: {x.status}")
    a.send("hello")
    for x in (a, b, program):
        x.expect("hello")
    for stranger in ("https://evil.example", site.origin + ".evil.example"):
        check(site.open(origin=stranger).status == 403, f"a page from {stranger} may connect")
    later = site.open(channel + "&history=9")
    later.expect('{"history":1}')
    later.expect("hello")
    for x in (a, b, program, later):
        x.close()


def try_bus(sites):
    """What is said at one is heard at all."""
    clients = [site.open() for site in sites]
    for number, client in enumerate(clients):
        client.send(f"from {number}")
        for other in clients:
            other.expect(f"from {number}")
    for client in clients:
        client.close()


def try_idle(site):
    """A connection on which nothing is said outlives the minute that proxies wait; the server's pings keep it."""
    client, seconds = site.open(), 70
    check(client.status == 101, f"no WebSocket: {client.status}")
    check(client.receive(seconds) is None, "a message out of nowhere")
    check(client.pings >= 2, f"{client.pings} pings in {seconds} s")
    client.send("still here")
    client.expect("still here")
    return f"{client.pings} pings in {seconds} s"


# --- the cases: building ------------------------------------------------------------------------------

def make_static(machine):
    need("musl-gcc")
    check("make static" in recipe("A container with nothing in it").block(), "the recipe has no make static")
    os.remove(machine.path("srv/chat"))
    machine.run("make static")
    with open(machine.path("srv/chat"), "rb") as file:
        program = file.read()
    start, size, count = struct.unpack_from("<32xQ14xHH", program)
    kinds = [struct.unpack_from("<I", program, start + size * i)[0] for i in range(count)]
    check(3 not in kinds and 2 not in kinds, "the program names an interpreter or libraries")     # PT_INTERP, PT_DYNAMIC
    return len(program)


def case_static():
    """make static gives one file that runs in an empty root, as an unprivileged user, too"""
    with Lab() as lab:
        machine = Machine(lab)
        size = make_static(machine)
        empty = machine.path("tmp/empty")
        os.mkdir(empty, 0o755)
        shutil.copy2(machine.path("srv/chat"), empty)
        for user in (None, NOBODY):
            server = machine.chat(("/chat", "-p", "0"), root=empty, user=user)
            check(os.listdir(empty) == ["chat"], f"the root is not empty: {os.listdir(empty)}")
            try_chat(Site(machine, server.port))
            end(server)
        # Here a plain user makes the root: in a user namespace it is allowed to.
        alone = ("unshare", "--user", "--map-root-user", "chroot", empty, "/chat", "-p", "0")
        server = machine.chat(alone, root="/", user=NOBODY)
        try_chat(Site(machine, server.port))
        return f"{size // 1024} KB"


def case_install():
    """make install, with PREFIX and DESTDIR and without"""
    with Lab() as lab:
        machine = Machine(lab)
        machine.run("make install DESTDIR=/tmp/stage PREFIX=/opt/chat")
        found = [os.path.join(at, name) for at, _, names in os.walk(machine.path("tmp/stage")) for name in names]
        check(found == [machine.path("tmp/stage/opt/chat/bin/chat")], f"installed: {found}")
        check(stat.S_IMODE(os.stat(found[0]).st_mode) == 0o755, "not executable by all")
        machine.run("make install")
        machine.run("cmp chat /usr/local/bin/chat")
        machine.run("cmp chat /tmp/stage/opt/chat/bin/chat")
        try_chat(Site(machine, machine.chat("chat -p 0", user=NOBODY).port))


# --- the cases: several instances ---------------------------------------------------------------------

def meet(programs):
    for program in programs:
        wait_for(program, r"(?s)" + r" joined.*" * (len(programs) - 1), "not all peers join")


def case_two():
    """two on one machine"""
    first, second = recipe("Two on one machine").lines()
    with Lab() as lab:
        machine = Machine(lab)
        meet([machine.chat(first), machine.chat(second)])
        try_chat(Site(machine))
        try_bus([Site(machine), Site(machine, 8082)])


def case_lan():
    """a local network, by multicast on eth0"""
    secret, command = recipe("A local network").lines()
    with Lab() as lab:
        machines = [Machine(lab, [f"192.168.1.{n}/24"]) for n in (2, 3, 4)]
        machines[0].run(secret)
        for machine in machines[1:]:
            machine.copy(machines[0].path("srv/secret"), "srv/secret")
        meet([machine.chat(command) for machine in machines])
        try_bus([Site(machine) for machine in machines])


def case_rented():
    """a few rented servers, by unicast, under the addresses of the README"""
    command, = recipe("A few rented servers").lines()
    secret = recipe("A local network").lines()[0]
    addresses = re.findall(r"([\d.]+):8081", command)
    with Lab() as lab:
        machines = [Machine(lab, [f"{address}/32"]) for address in addresses]
        machines[0].run(secret)
        for machine in machines[1:]:
            machine.copy(machines[0].path("srv/secret"), "srv/secret")
        meet([machine.chat(command) for machine in machines])
        try_bus([Site(machine) for machine in machines])
        return f"{len(machines)} machines"


def case_nats():
    """two machines that meet at a NATS server, under the name of the README"""
    need("nats-server")
    command, = recipe("NATS").lines()
    user, password, host = re.search(r"nats://(\w+):(\w+)@(\S+)", command).groups()
    with Lab() as lab:
        hub, *machines = [Machine(lab, [f"192.0.2.{number}/24"]) for number in (1, 2, 3)]
        server = hub.start(f"nats-server --user {user} --pass {password}")
        wait_for(server, "Server is ready", "the NATS server does not start")
        for machine in machines:
            machine.write("etc/hosts", f"127.0.0.1 localhost\n192.0.2.1 {host}\n")
        programs = [machine.chat(command) for machine in machines]
        for program in programs:
            program.may_say = f"chat: (joined|left) nats://{host}$"
            wait_for(program, "joined nats", "it does not join")
        try_bus([Site(machine) for machine in machines])


# --- the cases: systemd -------------------------------------------------------------------------------

SCORE = 1.5             # "OK" ends at 2; 0 is a program that can do nothing
UNIT = "etc/systemd/system/chat.service"

# So that the test can read what it says. (A sanitizer's leak check would have to trace the process.)
TEST_CONF = """[Service]
StandardError=append:/var/log/chat
Environment=ASAN_OPTIONS=detect_leaks=0
"""


def unit_of(variant):
    """The unit, either as it stands there or with the commented lines in place of the one above them."""
    unit = recipe("systemd").block("ini")
    if variant == "bus":
        unit, count = re.subn(r"^ExecStart=.*\n# .*\n((?:#\w.*\n)+)", lambda m: m[1].replace("#", ""), unit, flags=re.M)
        check(count == 1, "the unit has no lines for a bus with a secret")
    return unit


def install_unit(machine, variant):
    """Returns the command that then starts it."""
    install, enable = re.search(r"`(sudo make install)`.*`(sudo systemctl [^`]*)`", recipe("systemd").text, re.S).groups()
    machine.run(install)
    machine.write(UNIT, unit_of(variant))
    machine.write("etc/machine-id", "")
    return enable


def case_unit():
    """systemd finds nothing wrong with the unit, and little that it could do"""
    need("systemd-analyze")
    scores = []
    for variant in ("proxy", "bus"):
        with Lab() as lab:
            machine = Machine(lab)
            install_unit(machine, variant)
            said = machine.run(f"SYSTEMD_LOG_LEVEL=warning systemd-analyze verify --man=no /{UNIT}")
            check(not said.strip(), f"verify says: {said.strip()}")
            said = machine.run(f"systemd-analyze security --offline=yes --no-pager --threshold={SCORE * 10:.0f} /{UNIT}")
            scores.append(re.search(r"exposure level.*: ([\d.]+)", said)[1])
            if os.environ.get("KEEP"):
                sys.stderr.write(said)
    return f"exposure {scores[0]}, with a bus {scores[1]}; at most {SCORE}"


class Systemd:
    """Boots the machine: its systemd is the first process of a PID namespace, sees no other root than the machine's,
    and has no units but ours and the targets that these name."""
    SCRIPT = """set -e
cd "$1"
echo $$ > "$2/cgroup.procs"
exec unshare --mount --pid --fork --kill-child --uts --ipc --cgroup setpriv --bounding-set \
    -sys_module,-sys_boot,-sys_time,-sys_rawio sh -ec '
umount proc
mount -t proc proc proc
mount --bind -o ro proc/sys proc/sys
mkdir -p sys/fs/cgroup old
mount -t cgroup2 cgroup2 sys/fs/cgroup
pivot_root . old
umount -l /old
mount --make-rshared /
exec env -i PATH="$PATH" container=test /lib/systemd/systemd --log-target=console --log-color=no --show-status=no'
"""

    def __init__(self, machine):
        self.machine, self.all = machine, machine.lab.path("cgroup")
        for hidden in ("system", "system-generators", "system-environment-generators"):
            mount("-t", "tmpfs", "tmpfs", machine.path(f"usr/lib/systemd/{hidden}"))
        for target in ("sysinit", "basic", "multi-user", "network-online"):
            machine.write(f"usr/lib/systemd/system/{target}.target", f"[Unit]\nDescription={target}\n")
        os.symlink("multi-user.target", machine.path("usr/lib/systemd/system/default.target"))
        os.mkdir(self.all)
        try:
            mount("-t", "cgroup2", "cgroup2", self.all)
            self.group = f"{self.all}/chat-recipes-{os.getpid()}-{machine.number}"
            os.mkdir(self.group)
        except (OSError, RuntimeError) as error:
            raise Skip(f"no cgroups here: {error}")

    def __enter__(self):
        self.console, self.terminal = os.openpty()
        os.set_blocking(self.console, False)
        self.log = ""
        console = self.machine.path("dev/console")
        open(console, "w").close()
        mount("--bind", os.ttyname(self.terminal), console)
        self.program = self.machine.start(("sh", "-c", self.SCRIPT, "boot", self.machine.root, self.group), root="/")
        return self

    def __exit__(self, *_):
        if self.program.poll() is None:
            end(self.program, signal.SIGKILL)
        for attempt in range(500):                          # its processes die with it, in a moment
            for at, _, _ in os.walk(self.group, topdown=False):
                try:
                    os.rmdir(at)
                except OSError:
                    time.sleep(0.01)
            if not os.path.exists(self.group):
                break

    def said(self):
        """Also makes room for more: when the console is full, systemd waits."""
        try:
            self.log += os.read(self.console, 1 << 16).decode(errors="replace")
        except BlockingIOError:
            pass
        return self.log

    def expect(self, condition, what):
        wait_until(lambda: self.said() and condition() or self.program.poll() is not None,
                   lambda: f"{what}: {self.machine.read('var/log/chat')} {self.said()}")
        check(self.program.poll() is None, f"systemd has ended: {said(self.program)} {self.said()}")

    def run(self, command):
        with open(f"/proc/{self.program.pid}/task/{self.program.pid}/children") as file:
            first = file.read().strip()
        return self.machine.run(command, ("nsenter", "--all", "--target", first), root="/")

    def chat(self):
        """The process of the service, 0 if there is none."""
        for at, _, names in os.walk(f"{self.group}/system.slice/chat.service"):
            with open(f"{at}/cgroup.procs") as file:
                for pid in file.read().split():
                    return int(pid)
        return 0


def try_service(variant):
    """Boots a machine with the unit, and tries what runs then; with a bus, together with a second machine."""
    need("systemctl", "setpriv", "nsenter")
    with Lab() as lab:
        machine, other = [Machine(lab, [f"192.168.1.{n}/24"]) for n in (2, 3)]
        enable = install_unit(machine, variant)
        machine.write(f"{UNIT}.d/test.conf", TEST_CONF)
        machine.write("var/log/chat", "")
        machine.run("umask 077; echo secret > /etc/chat-secret")
        other.run("umask 077; echo secret > secret")
        with Systemd(machine) as systemd:
            def heard(times):
                return machine.read("var/log/chat").count("listening on") >= times
            systemd.expect(lambda: "Startup finished" in systemd.said(), "systemd does not start")
            systemd.run(enable)
            systemd.expect(lambda: heard(1), "the service does not start")
            try_chat(Site(machine))
            if variant == "bus":
                meet([other.chat("./chat -i eth0 -s secret")])
                try_bus([Site(machine), Site(other)])
            with open(f"/proc/{systemd.chat()}/status") as file:
                status = dict(re.findall(r"(\w+):\t(.*)", file.read()))
            check("0" not in status["Uid"].split(), f"it runs as root: {status['Uid']}")
            for field, value in (("CapPrm", "0" * 16), ("CapBnd", "0" * 16), ("NoNewPrivs", "1"), ("Seccomp", "2")):
                check(status[field] == value, f"{field} is {status[field]}")
            os.kill(systemd.chat(), signal.SIGKILL)
            systemd.expect(lambda: heard(2), "it does not come back")
            try_chat(Site(machine))
            systemd.run("systemctl stop chat")
            check(not systemd.chat(), "it does not end")
            result = systemd.run("systemctl show -P Result -P ExecMainStatus chat").split()
            check(result == ["success", "0"] or result == ["0", "success"], f"it ended with {result}")
            for line in machine.read("var/log/chat").splitlines():
                check(re.match(r"chat: (listening on |peer \w{16} (joined|left))", line), f"it says: {line}")


def case_service_restart():
    """a restart without a gap under systemd: two of one unit change over"""
    text = " ".join(recipe("A restart without a gap").text.split())
    name, options, user, start, stop = re.search(
        r"name the unit `([^`]*)` and add `([^`]*)` to its command and `([^`]*)`.*"
        r"`(sudo systemctl start [^`]*)` and then `(sudo systemctl stop [^`]*)`", text).groups()
    with Lab() as lab:
        machine = Machine(lab)
        install_unit(machine, "proxy")
        unit, count = re.subn(r"^(ExecStart=.*)$", rf"\1 {options}\n{user}", unit_of("proxy"), flags=re.M)
        os.remove(machine.path(UNIT))
        machine.write(f"etc/systemd/system/{name}", unit)
        machine.write(f"etc/systemd/system/{name}.d/test.conf", TEST_CONF)
        machine.write("var/log/chat", "")
        with Systemd(machine) as systemd:
            def heard(times):
                return machine.read("var/log/chat").count("listening on") == times
            systemd.expect(lambda: "Startup finished" in systemd.said(), "systemd does not start")
            systemd.run(stop.replace("stop", "start"))
            systemd.expect(lambda: heard(1), "the first does not start")
            client = Site(machine).open()
            client.send("before")
            client.expect("before")
            client.close()
            systemd.run(start)
            systemd.expect(lambda: heard(2), "the second does not start")
            systemd.run(stop)
            history = json.loads(Site(machine).get("/messages")[2])
            check(history == ["before"], f"the second knows {history}: {machine.read('var/log/chat')}")
            try_chat(Site(machine))


def case_service():
    """the unit under systemd itself: the chat works within all these bounds, and comes back if it dies"""
    try_service("proxy")


def case_service_bus():
    """the same with a bus and its secret, beside an instance on another machine"""
    try_service("bus")


# --- the cases: proxies -------------------------------------------------------------------------------

def behind_nginx(lab, path=None):
    """Debian's nginx as it comes, with the recipe in the server block of its default site, in the place of the
    'location /' there. And the chat that the recipe's port belongs to."""
    need("nginx")
    machine, text = Machine(lab), recipe("Behind nginx").block("nginx")
    if path:
        start, finish = re.search(r"write `(location [^`]*)`\s+and\s+end\s+the\s+`proxy_pass`\s+line\s+in\s+`([^`]*)`",
                                  recipe("Behind nginx").text).groups()
        check(start == f"location {path}", f"the README puts it under {start}")
        text, count = re.subn(r":8080;", finish, text.replace("location /", start, 1))
        check(count == 1, "no proxy_pass")
    machine.copy("/etc/nginx", "etc/nginx")
    site = machine.read("etc/nginx/sites-available/default")
    site, count = re.subn(r"^\tlocation / \{.*?^\t\}\n", lambda _: text, site, count=1, flags=re.M | re.S)
    check(count == 1, "nginx has no default site")
    machine.write("etc/nginx/sites-available/default", site)
    for name in ("var/log/nginx", "var/lib/nginx"):
        os.mkdir(machine.path(name))
    chat = machine.chat("./chat -a 127.0.0.1")
    nginx = machine.start("nginx -g 'daemon off;'")
    site = Site(machine, 80, "localhost", path or "/")
    wait_until(lambda: listens(machine, 80) or nginx.poll() is not None, "nginx does not listen")
    check(nginx.poll() is None, f"nginx: {said(nginx)}")
    return site


def listens(machine, port):
    try:
        machine.connect(port).close()
        return True
    except ConnectionRefusedError:
        return False


def case_nginx():
    """behind nginx, as Debian sets it up"""
    with Lab() as lab:
        site = behind_nginx(lab)
        try_chat(site)
        check(site.get("/send?message=x")[2].startswith(b"message sent"), "nothing sent")
        if LONG:
            return try_idle(site)


def case_nginx_path():
    """behind nginx, under a path"""
    with Lab() as lab:
        site = behind_nginx(lab, "/chat/")
        try_chat(site)
        check(site.get("/chat/send?message=x")[2].startswith(b"message sent"), "nothing sent")
        check(site.get("/")[0] == 404, "it is not under the path alone")
        status, head, _ = site.get("/chat")
        check(status == 301 and "/chat/\r\n" in head, f"without the slash: {status}")


def behind_caddy(lab):
    """The README's whole Caddyfile, only that the certificate is one of Caddy's own making: it asks nobody else."""
    need("caddy")
    machine = Machine(lab)
    machine.write("srv/Caddyfile", "{\n\tlocal_certs\n\tskip_install_trust\n}\n" + recipe("Behind Caddy").block("caddy"))
    machine.chat("./chat -a 127.0.0.1")
    caddy = machine.start("caddy run")
    wait_for(caddy, "certificate obtained successfully", "Caddy has no certificate", 20)
    wait_until(lambda: listens(machine, 443) or caddy.poll() is not None, lambda: f"Caddy does not listen: {said(caddy)}")
    authority = machine.path("root/.local/share/caddy/pki/authorities/local/root.crt")
    site = Site(machine, 443, "chat.example.org", context=ssl.create_default_context(cafile=authority))
    wait_until(lambda: trusted(site), "Caddy does not use its certificate")     # it says so before it does
    return site


def case_caddy():
    """behind Caddy, with https"""
    with Lab() as lab:
        site = behind_caddy(lab)
        try_chat(site)
        check(Site(site.machine, 80, site.host).get()[0] == 308, "http is not sent to https")
        if LONG:
            return try_idle(site)


def make_certificate(machine, name):
    """A certificate for localhost, where the recipe wants it. Returns what a client needs to trust it alone."""
    machine.run(f"mkdir -p /etc/chat; openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 "
                f"-subj /CN={name} -addext subjectAltName=DNS:localhost "
                "-keyout /etc/chat/privkey.pem -out /etc/chat/fullchain.pem")
    return ssl.create_default_context(cadata=machine.read("etc/chat/fullchain.pem"))


def case_tls():
    """https and wss without a proxy, and renewed files on SIGHUP"""
    need("openssl")
    if not os.path.exists("/usr/include/openssl/ssl.h"):
        raise Skip("libssl-dev is not installed")
    this = recipe("https and wss without a proxy")
    make, = re.findall(r"`(make [^`]*)`", this.text)
    command, = this.lines()
    with Lab() as lab:
        machine = Machine(lab)
        machine.run(make)                               # also where there is a chat without TLS
        site = Site(machine, 443, "localhost", context=make_certificate(machine, "first"))
        server = machine.chat(command)
        try_chat(site)
        stays = site.open("?channel=stays")
        renewed = make_certificate(machine, "second")
        server.send_signal(signal.SIGHUP)
        site.context = renewed                          # knows the new one only
        wait_until(lambda: trusted(site), "the new certificate is not in use")
        try_chat(site)
        for file in ("fullchain", "privkey"):
            machine.write(f"etc/chat/{file}.pem", "nonsense\n")
        server.may_say = r"chat: \S*fullchain\.pem, "
        server.send_signal(signal.SIGHUP)
        wait_for(server, server.may_say, "nothing is said about a bad file")
        try_chat(site)
        stays.send("still here")
        stays.expect("still here")


def trusted(site):
    """Is its certificate there, and trusted?"""
    try:
        site.connect().close()
        return True
    except ssl.SSLError:
        return False


def try_page(site):
    """A browser shows what was said. (It is asked for what it shows after some while of its own clock, which it lets
    jump when it has nothing to do: now and then it so looks too early.)"""
    client = site.open()
    check(client.status == 101, f"no WebSocket: {client.status}")
    client.send("ann: salut")
    client.expect("ann: salut")
    client.close()
    for attempt in range(10):
        folder = site.machine.lab.path(f"browser{attempt}")
        browser = site.machine.popen((
            "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={folder}", "--ignore-certificate-errors",
            "--host-resolver-rules=MAP * 127.0.0.1", "--virtual-time-budget=10000", "--dump-dom",
            site.origin + site.prefix), root="/", environment={"HOME": folder}, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL)
        with browser:
            page = browser.communicate(timeout=60)[0].decode(errors="replace")
        if "salut" in page:             # nowhere else than in the message
            return
    raise Failure(f"the page does not show it: {page[-2000:]!r}")


def case_page():
    """the page in a browser, behind nginx under a path and behind Caddy"""
    need("chromium")
    with Lab() as lab:
        try_page(behind_nginx(lab, "/chat/"))
    with Lab() as lab:
        try_page(behind_caddy(lab))


# --- the cases: a container ---------------------------------------------------------------------------

def docker_build(machine, dockerfile, image):
    """The few words of a Dockerfile that the recipe needs. Returns how to start the program."""
    start = {}
    os.mkdir(image)
    for line in dockerfile.splitlines():
        word, rest = line.split(None, 1)
        if word == "COPY":
            source, target = rest.split()
            shutil.copy2(machine.path(f"srv/{source}"), image + target)
        elif word == "USER":
            start["user"], group = map(int, rest.split(":"))
            check(start["user"] == group == NOBODY, f"USER {rest}")
        elif word == "ENTRYPOINT":
            start["command"] = json.loads(rest)
        else:
            check(line == "FROM scratch", f"the test cannot do '{line}'")
    return start


def case_container():
    """the container's program in a root with nothing else, as its user; two of them joined by unicast"""
    with Lab() as lab:
        addresses = ("172.17.0.2", "172.17.0.3")
        machines = [Machine(lab, [f"{address}/16"]) for address in addresses]
        make_static(machines[0])
        image = machines[0].path("tmp/image")
        start = docker_build(machines[0], recipe("A container with nothing in it").block("dockerfile"), image)
        command, user = start["command"], start["user"]
        server = machines[0].chat(command, root=image, user=user)
        check(os.listdir(image) == [command[0].strip("/")], f"the root holds {os.listdir(image)}")
        try_chat(Site(machines[0]))
        end(server)
        bus = [*command, "-b", ",".join(f"{address}:8081" for address in addresses)]
        meet([machine.chat(bus, root=image, user=user, environment={"CHAT_SECRET": "secret"}) for machine in machines])
        try_bus([Site(machine) for machine in machines])


# --- the cases: workers, and a restart without a gap --------------------------------------------------

def case_workers():
    """one process for each core"""
    command, = recipe("All cores").lines()
    with Lab() as lab:
        machine = Machine(lab)
        count = int(machine.run("nproc"))
        chat = machine.chat(command)
        wait_for(chat, "(?s)" + "joined.*" * count * (count - 1), "not all workers join")
        with open(f"/proc/{chat.pid}/task/{chat.pid}/children") as file:
            workers = len(file.read().split())
        check(workers == (count if count > 1 else 0), f"{workers} workers on {count} cores")
        try_chat(Site(machine))
        try_bus([Site(machine)] * 16)
        return f"{count} cores"


class Page:
    """Does what the page does: connects with &history=N; connects again, later and later and at a random moment, when
    the connection is lost; sends again what did not come back; shows nothing twice. Its messages tell who and which."""

    def __init__(self, crowd, name):
        self.crowd, self.name, self.number, self.tries = crowd, name, 0, 0
        self.seen, self.outbox, self.ready = set(), {}, False
        asyncio.ensure_future(self.run())

    def say(self):
        text = b"%d: %d" % (self.name, self.number)
        self.number += 1
        self.outbox[text] = True
        if self.ready:
            self.writer.write(frame(text))

    async def run(self):
        while not self.crowd.over:
            try:
                await self.talk()
            except (OSError, asyncio.IncompleteReadError) as error:
                self.crowd.ends[type(error).__name__] += 1
            except Failure as failure:
                self.crowd.ends[str(failure)] += 1
            if self.ready:
                self.crowd.ready -= 1
            self.ready = False
            await asyncio.sleep(min(0.5 * 2 ** self.tries, 30) * (1 + random.random()) / 2)
            self.tries += 1

    async def talk(self):
        reader, self.writer = await asyncio.open_connection("127.0.0.1", 8080)
        try:
            self.writer.write(b"GET /?history=1000 HTTP/1.1\r\nHost: localhost:8080\r\nUpgrade: websocket\r\n"
                              b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
                              b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n")
            head = await reader.readuntil(b"\r\n\r\n")
            check(head.startswith(b"HTTP/1.1 101 "), f"no WebSocket: {head!r}")
            awaited = json.loads(await self.message(reader))["history"]
            for _ in range(awaited):
                self.show(await self.message(reader))
            for text in self.outbox:
                self.writer.write(frame(text))
            self.ready, self.tries = True, 0
            self.crowd.ready += 1
            while True:
                self.show(await self.message(reader))
        finally:
            self.writer.close()

    async def message(self, reader):
        while True:
            opcode, size = await reader.readexactly(2)
            payload = await reader.readexactly(size)
            if opcode == 0x81:
                return payload
            if opcode == 0x89:
                self.writer.write(frame(payload, 10))
            elif opcode == 0x88:
                self.crowd.ends[int.from_bytes(payload[:2], "big")] += 1
                self.writer.write(frame(payload[:2], 8))
            else:
                raise Failure(f"a frame that begins with {opcode:#x}")

    def show(self, text):
        self.seen.add(text)
        self.outbox.pop(text, None)


class Crowd:
    """Pages, of which some talk all the time, while one chat takes over from the other."""

    def __init__(self, machine, size, talkers):
        self.machine, self.talkers, self.ready, self.over, self.ends = machine, talkers, 0, False, collections.Counter()
        self.probes, self.pages = collections.Counter(), [Page(self, name) for name in range(size)]

    async def until(self, condition, what, seconds=30):
        deadline = now() + seconds
        while not condition():
            check(now() < deadline, f"{what() if callable(what) else what} (within {seconds} s)")
            await asyncio.sleep(0.01)

    async def talk(self, rate):
        while not self.over:
            random.choice(self.pages[:self.talkers]).say()
            await asyncio.sleep(random.expovariate(rate))

    async def probe(self):
        """Is there somebody who listens, at every moment?"""
        while not self.over:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", 8080)
                writer.write(b"GET / HTTP/1.1\r\nHost: localhost:8080\r\nConnection: close\r\n\r\n")
                self.probes["answered" if PAGE in await reader.read() else "cut off"] += 1
                writer.close()
            except ConnectionRefusedError:
                self.probes["refused"] += 1
            except OSError:
                self.probes["cut off"] += 1
            await asyncio.sleep(0.005)

    async def said(self, count):
        """Waits until so many messages more have been said, and everyone is connected."""
        total = sum(page.number for page in self.pages) + count
        await self.until(lambda: sum(page.number for page in self.pages) >= total and self.ready == len(self.pages),
                         lambda: f"{self.ready} of {len(self.pages)} pages are connected")

    async def restart(self, command, old):
        new = self.machine.chat(command)
        for last_words in range(6):
            for page in self.pages[:self.talkers]:
                page.say()
            await asyncio.sleep(0)
            if last_words == 3:
                old.terminate()
        await self.until(lambda: old.poll() is not None, "the old one does not end", 10)
        await self.said(50)
        return new

    async def live(self, command, restarts):
        chat = self.machine.chat(command)
        jobs = [asyncio.ensure_future(job) for job in (self.talk(50), self.probe())]
        await self.said(50)
        for _ in range(restarts):
            chat = await self.restart(command, chat)
        self.over = True
        await asyncio.gather(*jobs)
        all_said = {b"%d: %d" % (page.name, number) for page in self.pages for number in range(page.number)}
        await self.until(lambda: all(page.seen >= all_said for page in self.pages), lambda: "; ".join(
            f"page {page.name} misses {len(all_said - page.seen)}, such as {min(all_said - page.seen)}"
            for page in [page for page in self.pages if page.seen < all_said][:3]))
        check(not self.probes["refused"], f"nobody listened: {self.probes}")
        check(set(self.ends) <= {1001, "IncompleteReadError", "ConnectionResetError", "BrokenPipeError"}, f"{self.ends}")
        check(self.ends[1001] >= restarts * len(self.pages) / 2, f"few were told: {self.ends}")
        return len(all_said)


def roll(command, pages, restarts):
    with Lab() as lab:
        machine = Machine(lab)
        call(libc.setns, machine.space, CLONE_NEWNET)
        async def live():
            crowd = Crowd(machine, pages, max(1, pages // 10))
            count = await crowd.live(command, restarts)
            return crowd, count
        crowd, count = asyncio.run(live())
        call(libc.setns, lab.switch, CLONE_NEWNET)
        probes, reset = crowd.probes, crowd.ends["ConnectionResetError"]
        return (f"{restarts} restarts, {count} messages, {pages} pages: all seen by all; {crowd.ends[1001]} were told, "
                f"{reset} reset; of {sum(probes.values())} requests {probes['cut off']} cut off")


def case_restart():
    """one chat takes over from the other: no message is lost, and there is no moment at which nobody listens"""
    old, new = [line.split("#")[0].strip() for line in recipe("A restart without a gap").lines()]
    check(old == new, f"{old} is to be replaced by {new}")
    return roll(old, 200, 3)


def case_restart_history():
    """whoever comes after many restarts in a row finds what was said before; nobody else was there"""
    command, restarts = recipe("A restart without a gap").lines()[0], 20
    with Lab() as lab:
        machine = Machine(lab)
        chat, site = machine.chat(command), Site(machine)
        client = site.open()
        client.send("before")
        client.expect("before")
        client.close()
        for number in range(restarts):
            old, chat = chat, machine.chat(command)
            end(old)
            history = json.loads(site.get("/messages")[2])
            check(history == ["before"], f"after restart {number + 1} the history is {history}: {said(chat)}")
        return f"{restarts} restarts"


def case_restart_list():
    """the same with a list of machines, on which each stands twice"""
    return roll("./chat -j 1 -b 127.0.0.1:8081,127.0.0.1:8082", 20, 2)


# --- running ------------------------------------------------------------------------------------------

# Each recipe of the README and the cases that try it.
TRIED = {
    "Two on one machine": "two", "A local network": "lan", "A few rented servers": "rented",
    "systemd": "unit service service_bus", "Behind nginx": "nginx nginx_path page", "Behind Caddy": "caddy page",
    "https and wss without a proxy": "tls", "NATS": "nats",
    "A container with nothing in it": "container", "All cores": "workers",
    "A restart without a gap": "restart restart_list restart_history service_restart",
}
# In the order in which they begin, a few at a time: first those that wait for long.
CASES = ("nginx", "caddy", "restart", "static", "service", "service_bus", "service_restart", "page", "container", "tls",
         "install", "two", "lan", "rented", "nats", "unit", "nginx_path", "workers", "restart_list", "restart_history", "all")
TOGETHER = 4


def case_all():
    """each recipe of the README is tried here"""
    check(set(recipes()) == set(TRIED), f"not the same: {set(recipes()) ^ set(TRIED)}")
    for name in " ".join(TRIED.values()).split():
        check(name in CASES, f"there is no case '{name}'")


def need(*programs):
    for program in programs:
        if not shutil.which(program):
            raise Skip(f"{program} is not installed")


def run_cases(names):
    """Runs them in processes of their own. Returns how many failed."""
    running, failed = 0, 0
    for name in (*names, *[None] * TOGETHER):
        if running == TOGETHER or name is None and running:
            failed += os.wait()[1] != 0
            running -= 1
        if name is None:
            continue
        running += 1
        fork_case("recipes", globals()[f"case_{name}"])
    return failed


def what_is_missing():
    """Why no machine can be made here; None if they can."""
    if os.geteuid():
        return "needs root, to make machines"
    for tool in ("ip", "mount", "unshare"):
        if not shutil.which(tool):
            return f"no {tool} here"
    return None if succeeds(make_lab) else "namespaces are not allowed here"


def make_lab():
    with Lab() as lab:
        Machine(lab, ["192.168.1.2/24"])


def main():
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    chosen = sys.argv[1:] or CASES
    if "-l" in chosen:
        return print("\n".join(f"{name:10} {globals()['case_' + name].__doc__}" for name in CASES))
    if unknown := set(chosen) - set(CASES):
        sys.exit(f"recipes.py: no such case: {' '.join(unknown)} (-l lists them)")
    if not os.access(CHAT, os.X_OK):
        sys.exit(f"recipes.py: {CHAT} is not there: run make first, or set CHAT")
    reason = what_is_missing()
    if reason:
        for name in chosen:
            print(f"skipped: recipes {name}: {reason}")
        return
    sys.exit(run_cases(chosen) > 0)


if __name__ == "__main__":
    main()
