#!/usr/bin/python3
"""Follows the recipes of README.md to the letter, on machines of their own, and tries the result.

    test/recipes.py [CASE...]       all cases, or those named (-l lists them)

Commands and files are taken out of the README; where a case differs, it says in what. A machine is
a network namespace and a root folder in memory, in which this machine's /usr is read-only: ports,
paths and addresses are the README's, and nothing is left behind. This needs root. What is not
installed (nginx, caddy, nats-server, systemd) is skipped. KEEP=1 shows what the programs said.
"""
import copy, functools, json, os, re, shutil, signal, ssl, subprocess
from pathlib import Path

import harness
from harness import CHAT, CLONE_NEWNS, ROOT, SLOWER, Client, Host, Instance, Program, Skip
from harness import call, check, equal, libc, now, run, settle

# --- the README -----------------------------------------------------------------------------------

def recipes():
    text = Path(f"{ROOT}/README.md").read_text()
    chapter = re.search(r"^## Recipes\n(.*?)^## ", text, re.M | re.S)[1]
    parts = re.split(r"^(?:- )?\*\*(.+?)\.?\*\*", chapter, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2]))

class Recipe:
    """What stands from **Title** to the next one: `spans` in backticks, `blocks` by language."""

    def __init__(self, title):
        check(title in recipes(), f"the README has no recipe '{title}'")
        fenced = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
        self.blocks = dict(fenced.findall(recipes()[title]))
        self.spans = re.findall(r"`([^`]+)`", " ".join(fenced.sub("", recipes()[title]).split()))

    def span(self, start):
        """The text in backticks that begins so."""
        found = [span for span in self.spans if span.startswith(start)]
        check(found, f"the README's recipe says no `{start}...`")
        return found[0]

# --- machines -------------------------------------------------------------------------------------

mount = functools.partial(run, "mount")

class Machine(Host):
    """Programs run in its folder /srv, as root unless told otherwise. Clients ask for localhost."""

    def __init__(self, lab, number, space, address):
        super().__init__(lab, number, space, address)
        self.root = f"{lab.roots}/{number}"
        for name in "", "dev", "run", "sys":        # else systemd would mount the real ones there
            os.makedirs(self.path(name))
            mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", self.path(name))
        for name in "proc root srv tmp usr var/lib var/log".split():
            os.makedirs(self.path(name))
        os.chmod(self.path("tmp"), 0o1777)
        for name in "usr", "proc":
            mount("--bind", "-o", "ro", f"/{name}", self.path(name))
        mount("-t", "tmpfs", "tmpfs", self.path("usr/local"))
        for name in "null zero full random urandom tty".split():
            self.write(f"dev/{name}", "")
            mount("--bind", f"/dev/{name}", self.path(f"dev/{name}"))
        os.symlink("pts/ptmx", self.path("dev/ptmx"))
        for name in ("bin sbin lib lib64 etc/alternatives etc/group etc/ld.so.cache etc/ld.so.conf "
                     "etc/ld.so.conf.d etc/passwd etc/nsswitch.conf etc/ssl/openssl.cnf").split():
            if os.path.exists(f"/{name}"):
                self.copy(f"/{name}", name)
        self.write("etc/hosts", "127.0.0.1 localhost\n")
        for name in "main.c", "index.html", "Makefile":
            self.copy(f"{ROOT}/{name}", f"srv/{name}")
        shutil.copy(CHAT, self.path("srv/chat"))    # the newest: make takes it as it is

    def path(self, name):
        return os.path.join(self.root, name.lstrip("/"))

    def copy(self, source, name):
        os.makedirs(os.path.dirname(self.path(name)), exist_ok=True)
        run("cp", "-a", source, self.path(name))

    def write(self, name, text):
        os.makedirs(os.path.dirname(self.path(name)), exist_ok=True)
        Path(self.path(name)).write_text(text)

    def read(self, name):
        return Path(self.path(name)).read_text(errors="replace")

    def enter(self):
        """What a new process does to be there."""
        self.__enter__()
        os.chroot(self.root)
        os.chdir("/srv")

    def run(self, command, inside=()):
        """A command that ends, as somebody types it (without sudo). Returns what it says."""
        command = (*inside, "sh", "-ec", re.sub(r"\bsudo ", "", command))
        done = subprocess.run(command, preexec_fn=self.enter, stdin=subprocess.DEVNULL, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              timeout=60 * SLOWER)
        check(not done.returncode, f"'{command[-1]}' ends with {done.returncode}: {done.stdout}")
        return done.stdout

    def serve(self, command, kind=Program):
        """A program that stays: a command line, or a list."""
        if isinstance(command, str):
            command = "sh", "-c", "exec " + re.sub(r"\bsudo ", "", command)
        return kind(self.lab, command, self.enter)

    def get(self, path="/", status=200, headers="Connection: close\n"):
        return super().get(path, status, headers)       # a proxy would keep it open

    def talk(self, command, expect=""):
        """Starts a chat and waits until it listens. `expect`: what it may say besides."""
        self.chat = self.serve(command, Instance)
        self.chat.expect = expect
        self.port = int(self.says(r"chat: listening on https?://\S*?:(\d+)/")[1])
        return self

class Lab(harness.Lab):
    """Machines that have these addresses on their eth0 and reach all others by it. `with` it, one
    gets the machines."""
    host_type, roots = Machine, "/media"    # nobody else sees what is mounted there

    def __init__(self, *addresses):
        self.addresses = addresses or ("192.168.1.2/24",)
        call(libc.unshare, CLONE_NEWNS)
        mount("--make-rprivate", "/")
        mount("-t", "tmpfs", "tmpfs", self.roots)
        super().__init__(len(self.addresses))

    def __enter__(self):
        return self.hosts

    def plug_in(self, machine):
        super().plug_in(machine)
        with machine:
            run("ip", "address", "add", self.addresses[machine.number - 1], "dev", "eth0")
            run("ip", "route", "add", "default", "dev", "eth0")

# --- trying what runs, and the cases with the chat alone ------------------------------------------

def try_chat(machine, path="/"):
    """The page comes whole, what one says the other hears, and other sites' pages are kept out."""
    page = machine.get(path)
    check(b"<script>" in page and b"</script>" in page, f"no page: {page!r:.100}")
    origin = f"Origin: http{'s' if machine.tls else ''}://localhost\r\n"
    channel = f"{path}?channel=try{os.urandom(4).hex()}"
    clients = [Client(machine, channel, headers=headers) for headers in (origin, "")]
    clients[0].send("hello")
    for client in clients:
        client.hears("hello")
    settle(clients)
    history = f"{path}messages{channel.removeprefix(path)}"     # another instance may be later
    machine.lab.pump(lambda: json.loads(machine.get(history)) == ["hello"], 5, "no history", 0.01)
    stranger = Client(machine, path, headers="Origin: https://evil.example\r\n", wait=False)
    machine.lab.pump(lambda: stranger.head, 5, "no answer to a stranger's page")
    check(b" 403 " in stranger.head, f"a stranger's page may connect: {stranger.head}")
    machine.lab.hang_up(machine)

def try_bus(machines, joined="peer .* joined"):
    """All say that they joined; then what is said at one is heard at all."""
    for machine in machines:
        machine.says("(?s)" + f"{joined}.*" * (len(machines) - 1))
    clients = [Client(machine, "/?channel=bus") for machine in machines]
    for number, client in enumerate(clients):
        client.send(f"from {number}")
        for other in clients:
            other.hears(f"from {number}")
    settle(clients)

def case_two():
    """two on one machine"""
    first, second = Recipe("Two on one machine").spans
    with Lab() as (one,):
        try_bus([one.talk(first), copy.copy(one).talk(second)])
        try_chat(one)

def case_secret():
    """a local network by multicast, and rented servers by unicast, with a copy of one secret"""
    local, rented = Recipe("A local network"), Recipe("A few rented servers").span("./chat")
    for command, addresses in ((local.span("./chat"), [f"192.168.1.{n}/24" for n in (2, 3, 4)]),
                               (rented, re.findall(r"([\d.]+):8081", rented))):
        with Lab(*addresses) as machines:
            machines[0].run(local.span("(umask 077"))
            for machine in machines[1:]:
                machine.copy(machines[0].path("srv/secret"), "srv/secret")
            try_bus([machine.talk(command) for machine in machines])

def case_nats():
    """two machines that meet at a NATS server, under the name of the README"""
    need("nats-server")
    command = Recipe("NATS").span("./chat")
    user, password, host = re.search(r"nats://(\w+):(\w+)@(\S+)", command).groups()
    with Lab(*(f"192.0.2.{n}/24" for n in (1, 2, 3))) as (hub, *machines):
        hub.serve(f"nats-server --user {user} --pass {password}").says("Server is ready")
        for machine in machines:
            machine.write("etc/hosts", f"127.0.0.1 localhost\n192.0.2.1 {host}\n")
            machine.talk(command, "chat: (joined|lost) nats://")
        try_bus(machines, "joined nats://")

def case_container():
    """the static program in a root with nothing else, as an unprivileged user; two meet by name"""
    need("musl-gcc")
    this = Recipe("A container with nothing in it")
    with Lab("172.17.0.2/16", "172.17.0.3/16") as (one, two):
        os.remove(one.path("srv/chat"))
        one.run(this.span("make static"))
        found = one.run("make install DESTDIR=/tmp/to PREFIX=/opt; find /tmp/to -type f -perm 755")
        equal(found.splitlines()[-1:], ["/tmp/to/opt/bin/chat"], "what make install puts there")
        source, target, user, command = re.fullmatch(
            r"FROM scratch\nCOPY (\S+) (\S+)\nUSER (65534:65534)\nENTRYPOINT (\[.*\])\n",
            this.blocks["dockerfile"]).groups()
        command = "chroot", "--groups=", f"--userspec={user}", "/tmp/image", *json.loads(command)
        one.run(f"mkdir /tmp/image; cp {source} /tmp/image{target}")
        try_chat(one.talk(command))
        one.stop()
        one.write("tmp/image/files/sub/a file.txt", "text")
        one.write("tmp/image/proc/self", "")            # as Docker does
        mount("--bind", "-o", "ro", "/proc", one.path("tmp/image/proc"))
        one.talk((*command, "-d", "/files"))
        check(b'sub/">' in one.get("/"), "it lists no folder")
        equal(one.get("/sub/a%20file.txt"), b"text", "a file")
        one.stop()
        run("umount", one.path("tmp/image/proc"))
        # The names that Docker would have in its own network
        one.write("tmp/image/etc/hosts", "172.17.0.2 chat0\n172.17.0.3 chat1\n")
        two.copy(one.path("tmp/image"), "tmp/image")
        bus = *command, "-b", "chat0:8081,chat1:8081", "-s", "none"
        try_bus([machine.talk(bus) for machine in (one, two)])

# --- systemd --------------------------------------------------------------------------------------

UNIT, LOG = "etc/systemd/system/chat@.service", "var/log/chat"

def install_unit(machine, local_network=False):
    """The recipe up to the commands that start the unit and restart it, which it returns."""
    this = Recipe("systemd")
    machine.run(this.span("sudo make install"))
    unit = this.blocks["ini"]
    if local_network:
        added = this.span("LoadCredential="), this.span("-i eth0")
        unit = re.sub("(?m)^ExecStart=.*$", r"{}\n\g<0> {}".format(*added), unit)
    equal(this.span("/etc/"), f"/{UNIT}", "the unit's file")
    machine.write(UNIT, unit)
    machine.write("etc/machine-id", "")
    machine.write(LOG, "")      # (A sanitizer's leak check would have to trace the process.)
    machine.write(f"{UNIT}.d/test.conf", f"[Service]\nStandardError=append:/{LOG}\n"
                                         "Environment=ASAN_OPTIONS=detect_leaks=0\n")
    return this.span("sudo systemctl enable"), this.span("for i in")

class Systemd:
    """Boots the machine: its systemd is the first process of a PID namespace, sees no other root
    than the machine's, and has no units but ours and the targets that these name."""
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
exec env -i PATH="$PATH" container=test /lib/systemd/systemd --log-target=null --show-status=no'
"""

    def __init__(self, machine):
        need("systemctl")
        self.machine, cgroups = machine, os.path.join(machine.lab.roots, "cgroup")
        self.group = f"{cgroups}/chat-recipes-{os.getpid()}"
        for hidden in ("system", "system-generators", "system-environment-generators"):
            mount("-t", "tmpfs", "tmpfs", machine.path(f"usr/lib/systemd/{hidden}"))
        for target in ("sysinit", "basic", "multi-user", "network-online"):
            machine.write(f"usr/lib/systemd/system/{target}.target", "[Unit]\nDescription=empty\n")
        os.symlink("multi-user.target", machine.path("usr/lib/systemd/system/default.target"))
        try:
            os.mkdir(cgroups)
            mount("-t", "cgroup2", "cgroup2", cgroups)
            os.mkdir(self.group)
        except (OSError, RuntimeError) as error:
            raise Skip(f"no cgroups here: {error}") from None

    def __enter__(self):
        script = "sh", "-c", self.SCRIPT, "boot", self.machine.root, self.group
        self.program = Program(self.machine.lab, script, self.machine.__enter__)
        booted = self.machine.path("run/systemd/private")
        self.machine.lab.pump(lambda: os.path.exists(booted), 10, self.program.said, 0.01)
        return self

    def __exit__(self, *_):
        self.program.stop(signal.SIGKILL)
        sweep = "find", self.group, "-type", "d", "-delete"
        self.machine.lab.pump(lambda: not subprocess.call(sweep, stderr=subprocess.DEVNULL), 5,
                              "processes are left", 0.01)

    def said(self, pattern, count):
        """Waits until the chats have said that so often."""
        self.machine.lab.pump(lambda: len(re.findall(pattern, self.machine.read(LOG))) >= count, 20,
                              lambda: f"no {pattern!r}: {self.machine.read(LOG)}", 0.01)

    def inside(self):
        """The start of a command line that runs something there."""
        pid = self.program.process.pid
        first = Path(f"/proc/{pid}/task/{pid}/children").read_text().strip()
        return "nsenter", "--all", "--target", first

    def run(self, command):
        return self.machine.run(command, self.inside())

    def status(self):
        """Of the process of chat@1, by /proc."""
        status = self.run("cat /proc/$(systemctl show --value -P MainPID chat@1)/status")
        return dict(re.findall(r"^(\w+):\t(.*)", status, re.M))

def case_service():
    """the unit under systemd: it may do little, ends well, and comes back after a SIGHUP"""
    with Lab() as (machine,):
        enable = install_unit(machine)[0]
        one = f"/{UNIT}".replace("@", "@1")
        said = machine.run(f"cp /{UNIT} {one}; systemd-analyze verify --man=no {one}; rm {one}")
        check("chat@" not in said, f"verify says: {said.strip()}")
        said = machine.run(f"systemd-analyze security --offline=yes --no-pager /{UNIT}")
        exposure = float(re.search(r"exposure level.*: ([\d.]+)", said)[1])
        check(exposure <= 2.5, f"exposure {exposure} of 10, 2.5 is allowed")
        with Systemd(machine) as systemd:
            systemd.run(enable)
            systemd.said(" joined", 2)
            machine.port = 8080
            for _ in range(4):
                try_chat(machine)
            status = systemd.status()
            check("0" not in status["Uid"].split(), "it runs as root")
            expected = {"CapPrm": "0" * 16, "CapBnd": "0" * 16, "NoNewPrivs": "1", "Seccomp": "2"}
            equal({field: status[field] for field in expected}, expected, "its rights")
            systemd.run("systemctl stop chat@2")
            client = Client(machine)
            systemd.run("systemctl kill -s HUP chat@1")
            machine.lab.pump(lambda: client.closed, 5, "it does not end on SIGHUP")
            equal(client.close_code, 1001, "the close code on SIGHUP")
            systemd.said("listening on", 3)
            try_chat(machine)
            systemd.run("systemctl stop chat@1")
            result = systemd.run("systemctl show -P Result -P ExecMainStatus chat@1 chat@2").split()
            equal(sorted(result), ["0", "0", "success", "success"], "the result")
            usual = r"chat: (listening on .*|peer \w{16} (joined|left))\n"
            equal(re.sub(usual, "", machine.read(LOG)), "", "what it says besides")
        return f"exposure {exposure}"

def case_service_network():
    """on a local network whose interface, or name, is not there yet: the unit tries on"""
    with Lab("192.168.1.2/24", "192.168.1.3/24") as (machine, other):
        install_unit(machine, True)
        machine.run("umask 077; echo secret > /etc/chat-secret")
        chat = "chat -q -p 8082 -b later.example:8082,192.168.1.3:8082 -s none"
        machine.write(f"{UNIT}.d/bus.conf".replace("@", "@named"),
                      f"[Service]\nExecStart=\nExecStart=/usr/local/bin/{chat}\n")
        other.run("umask 077; echo secret > secret")
        other.talk("./chat -i eth0 -s secret")
        named = copy.copy(other).talk("./" + chat.replace("later.example", "192.168.1.2"))
        with machine:
            run("ip", "link", "set", "eth0", "down", "name", "later0")
        with Systemd(machine) as systemd:
            systemd.run("systemctl start chat@1 chat@named")
            systemd.said("chat: .*eth0", 2)
            systemd.said("chat: .*later.example", 2)
            with machine:
                run("ip", "link", "set", "later0", "up", "name", "eth0")
            machine.write("etc/hosts", "127.0.0.1 localhost\n192.168.1.2 later.example\n")
            systemd.said(" joined", 2)
            for machine.port, peer in ((8080, other), (8082, named)):
                ours, theirs = Client(machine), Client(peer)
                ours.send("hello")
                theirs.hears("hello")

def case_restart():
    """a restart without a gap: two instances, one by one, lose no message and no request"""
    with Lab() as (machine,):
        enable, restart = install_unit(machine)
        with Systemd(machine) as systemd:
            systemd.run(enable)
            systemd.said(" joined", 2)
            machine.port = 8080
            lab, seen, told, said = machine.lab, [set() for _ in range(24)], [], set()
            join = functools.partial(Client, machine, "/?history=1000", wait=False)

            def look():
                """As the page does, who is cut off connects again. Are all let in?"""
                for number, client in enumerate(clients):
                    seen[number].update(client.others)
                    if client.closed:
                        told.append(client.close_code)
                        clients[number] = join()
                return all(client.head for client in clients)

            def say(number):        # a connection each, so that none may be refused
                machine.get(f"/send?message={number}")
                said.add(str(number))
                lab.at(now() + 0.02, lambda: say(number + 1))
            clients = [join() for _ in seen]
            lab.pump(look, 5, "the visitors are not let in")
            # What waits at the door of the first when it is told to end is answered, too.
            systemd.run("systemctl kill -s STOP chat@1")    # a stop wakes it up again
            queue = [machine.connect() for _ in range(12)]
            for link in queue:
                link.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            command = Program(lab, (*systemd.inside(), "sh", "-ec", restart.replace("sudo ", "")))
            for link in queue:
                answer = b"".join(iter(lambda: link.recv(1 << 20), b""))
                check(b"</script>" in answer, f"who had waited gets {answer!r:.100}")
                link.close()
            say(0)
            lab.pump(lambda: look() and command.process.poll() is not None, 30,
                     lambda: f"'{restart}' does not end: {command.said()}", 0.01)
            equal(command.process.poll(), 0, restart)
            lab.timers.clear()
            lab.pump(lambda: look() and all(said <= shown for shown in seen), 10,
                     lambda: f"visitors miss {[sorted(said - shown)[:3] for shown in seen]}", 0.01)
            lab.pump(lambda: all(said <= set(machine.history()) for _ in range(6)), 5,
                     "the history is not everywhere whole")
            check(told.count(1001) >= len(seen), f"when cut off they were told {told}")
            return f"{len(said)} messages, {len(told)} times told"

# --- https and proxies ----------------------------------------------------------------------------

def make_certificate(machine):
    """One for localhost, where certbot would put the recipe's. Returns a client's trust in it."""
    at = "/etc/letsencrypt/live/chat.example.org"
    machine.run(f"mkdir -p {at}; chmod 700 /etc/letsencrypt; openssl req -x509 -newkey ec -nodes "
                "-pkeyopt ec_paramgen_curve:P-256 -subj /CN=x -addext subjectAltName=DNS:localhost "
                f"-days 2 -keyout {at}/privkey.pem -out {at}/fullchain.pem")
    return ssl.create_default_context(cadata=machine.read(f"{at}/fullchain.pem"))

def case_tls():
    """https: certbot's files are shown, the unit has port 443, a restart takes new certificates"""
    need("openssl")
    need("/usr/include/openssl/ssl.h")
    this = Recipe("https and wss without a proxy")
    with Lab() as (machine,):
        folder = re.search(r"--webroot -w (\S+)", this.span("sudo certbot"))[1]
        token = "/.well-known/acme-challenge/token"
        machine.write(folder + token, "proof")
        machine.talk(this.span("sudo ./chat"))
        equal((machine.port, machine.get(token)), (80, b"proof"), "port 80")
        machine.run(this.span("make TLS=1"))            # also where there is a chat without TLS
        enable, restart = install_unit(machine)
        machine.write(this.span("/etc/systemd/"), this.blocks["ini"])
        machine.tls, machine.port = make_certificate(machine), 443
        with Systemd(machine) as systemd:
            systemd.run(enable)
            systemd.said(r"listening on https", 2)
            for _ in range(4):
                try_chat(machine)
            equal(systemd.status()["CapBnd"], f"{1 << 10:016x}", "its capabilities")
            machine.tls = make_certificate(machine)     # knows the new one only
            systemd.run(restart)
            for _ in range(4):
                try_chat(machine)

def case_nginx():
    """behind nginx, as Debian sets it up, and under a path"""
    need("nginx")       # with the recipe in place of its default site's `location /`
    this = Recipe("Behind nginx")
    text = this.blocks["nginx"]
    beneath = text.replace("location /", this.span("location /chat/"), 1)
    text += beneath.replace(":8080;", this.span(":8080/"))
    with Lab() as (machine,):
        machine.copy("/etc/nginx", "etc/nginx")
        site = "etc/nginx/sites-available/default"
        theirs = re.compile(r"^\tlocation / \{.*?^\t\}\n", re.M | re.S)
        machine.write(site, theirs.sub(lambda _: text, machine.read(site)))
        machine.run("mkdir /var/log/nginx /var/lib/nginx")
        machine.talk("./chat -a 127.0.0.1")
        nginx = machine.serve("nginx -g 'daemon off; error_log stderr info;'")
        nginx.last_signal = signal.SIGTERM      # on which its workers end, too
        nginx.says("start worker ")
        machine.port = 80
        for path in ("/", "/chat/"):
            try_chat(machine, path)
            equal(machine.get(f"{path}send?message=x").strip(), b"message sent", "the answer")
        machine.get("/chat", 301)

def case_caddy():
    """behind Caddy, with https (localhost for the name, so Caddy signs itself)"""
    need("caddy")
    with Lab() as (machine,):
        site = "\n".join(Recipe("Behind Caddy").spans).replace("chat.example.org", "localhost")
        machine.write("srv/Caddyfile", "{\n\tskip_install_trust\n\tdebug\n}\n" + site + "\n")
        machine.talk("./chat -a 127.0.0.1")
        machine.serve("caddy run").says("added certificate to cache", 20)
        authority = machine.path("root/.local/share/caddy/pki/authorities/local/root.crt")
        machine.tls = ssl.create_default_context(cafile=authority)
        machine.port = 443
        try_chat(machine)

# --- running --------------------------------------------------------------------------------------

def case_all():
    """each recipe of the README is tried here"""
    tried = re.findall(r'Recipe\("([^"]+)"\)', Path(__file__).read_text())
    equal(set(recipes()), set(tried), "the recipes")

def need(what):
    """A program, or a file by its path."""
    if not shutil.which(what, os.F_OK):
        raise Skip(f"{what} is not installed")

if __name__ == "__main__":
    cases = (case_service_network, case_tls, case_restart, case_service, case_container, case_nginx,
             case_caddy, case_nats, case_two, case_secret, case_all)
    harness.main("recipes", cases, missing=lambda: "needs root, to make machines" if os.geteuid()
                 else harness.no_network())
