# `make run` builds the chat and starts it, `make test` tests it.

CFLAGS ?= -O2
PREFIX ?= /usr/local

STD    = -std=gnu11
WARN   = -Wall -Wextra -Wpedantic -Wshadow
HARDEN = -U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=3 -fstack-protector-strong \
         -fPIE -pie -Wl,-z,relro,-z,now

# What the tests run, and where their own programs are built.
CHAT  = ./chat
BUILD = build
TLS_TEST = $(if $(wildcard /usr/include/openssl/ssl.h),$(BUILD)/chat-tls)
TESTS = $(patsubst test/%.c,$(BUILD)/%,$(wildcard test/unit.c test/server.c \
          test/load.c test/faults.c))

# "make TLS=1" adds https and wss (needs OpenSSL 3; Debian: libssl-dev).
ifdef TLS
override CFLAGS += -DTLS
LDLIBS += -lssl -lcrypto
.PHONY: $(CHAT)
endif

# The sanitizer build also shrinks the program's limits, so that the paths
# on which buffers grow and messages are split run all the time.
SANITIZE = -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined \
           -fno-sanitize-recover=all
SHRUNK   = -DREAD_SIZE=512 -DSLICE=2 -DNO_SANDBOX

# The targets of test/fuzz.c, and how long each runs.
FUZZ    = request query path talk datagram
SECONDS = 60

all: $(CHAT)

# The page is built into the program, so the program depends on it.
$(CHAT): main.c index.html
	@mkdir -p $(@D)
	$(CC) $(STD) $(WARN) $(CFLAGS) $(HARDEN) main.c -o $@ $(LDFLAGS) $(LDLIBS)

# For test/tls.py. The shared read buffer must hold a record of TLS.
$(BUILD)/chat-tls: main.c index.html
	@mkdir -p $(@D)
	$(CC) $(STD) $(WARN) $(filter-out -DREAD_SIZE=%,$(CFLAGS)) -DTLS $(HARDEN) \
	    main.c -o $@ $(LDFLAGS) -lssl -lcrypto

$(BUILD)/%: test/%.c main.c index.html $(wildcard test/*.h)
	@mkdir -p $(@D)
	$(CC) $(STD) $(WARN) $(CFLAGS) $(HARDEN) $< -o $@ $(LDFLAGS) $(LDLIBS)

$(BUILD)/bench: LDLIBS += -lm # its plot is logarithmic

run: $(CHAT)
	$(CHAT) $(ARGS)

test: $(CHAT) $(TESTS) $(TLS_TEST)
	@CHAT=$(CHAT) BUILD=$(BUILD) test/run $(PARTS)

sanitize:
	@$(MAKE) --no-print-directory test CHAT=build/sanitize/chat \
	    BUILD=build/sanitize CFLAGS="$(SANITIZE) $(SHRUNK)" HARDEN=

# Warnings are errors. -O1, because at -O2 gcc's analyzer takes what an unrolled
# loop has set for unset; and leaks are left to clang's (and to valgrind), as
# gcc's loses sight of a buffer when the size beside it is set. cppcheck need
# not tell which fields are unused: some are read by the kernel alone.
analyze:
	gcc $(STD) $(WARN) $(TLS:%=-DTLS) -Werror -O1 -fanalyzer \
	    -Wno-analyzer-malloc-leak -c main.c -o /dev/null
	clang-tidy --quiet main.c -- $(STD) $(TLS:%=-DTLS)
	cppcheck --quiet --enable=warning,style,performance,portability \
	    --suppress=unusedStructMember --std=c11 --error-exitcode=1 main.c

valgrind:
	@$(MAKE) --no-print-directory build/valgrind/chat build/valgrind/unit \
	    build/valgrind/server CHAT=build/valgrind/chat BUILD=build/valgrind \
	    CFLAGS="-O1 -g -DNO_SANDBOX -include test/openat2.h" HARDEN=
	@test/valgrind.sh

# The lines of main.c that no test of these parts runs, and the share of
# the others.
coverage:
	@rm -rf build/coverage
	@$(MAKE) --no-print-directory test PARTS="unit server faults nats" HARDEN= \
	    CHAT=build/coverage/chat BUILD=build/coverage \
	    CFLAGS="-O0 --coverage -DNO_SANDBOX"
	@gcov -t build/coverage/*.gcda 2>/dev/null | test/coverage.awk

# Deliveries a second beside the least that any server has to do, then
# datagrams a message and latency on the bus beside the simulated ones, then
# the two kinds of bus side by side.
bench: $(CHAT) $(BUILD)/bench
	@CHAT=$(CHAT) $(BUILD)/bench $(ARGS)
	@CHAT=$(CHAT) test/bus.py --bench
	@CHAT=$(CHAT) test/nats.py --bench

# All of it, for a machine that has nothing else to do, and into README.md.
bench-all: $(CHAT) $(BUILD)/bench
	@CHAT=$(CHAT) $(BUILD)/bench -n 8 -t 8 -o $(BUILD)/bench.md \
	    -p test/bench.svg $(ARGS) all
	@sed -i -e '/^<!-- bench/,/^<!-- end/{//!d}' \
	    -e '/^<!-- bench/r $(BUILD)/bench.md' README.md

# The servers that the chat is measured beside, into build/peers.
peers:
	@mkdir -p build/peers
	cp test/peers/package.json build/peers
	cd build/peers && npm install --no-audit --no-fund

# What a target finds stays in build/. "make -j2 fuzz" runs two at a time.
fuzz: $(FUZZ:%=fuzz-%)

fuzz-%: build/fuzz-%
	@mkdir -p build/corpus/$*
	$< -max_total_time=$(SECONDS) -verbosity=0 \
	    -artifact_prefix=build/$*- build/corpus/$* $(wildcard test/corpus/$*)

build/fuzz-%: test/fuzz.c main.c index.html
	@mkdir -p $(@D)
	clang $(STD) $(WARN) $(SANITIZE) -fsanitize=fuzzer -D FUZZ=$* $< -o $@

static: main.c index.html
	@command -v musl-gcc >/dev/null || { \
	    echo "make static: needs musl-gcc (Debian: musl-tools)" >&2; exit 1; }
	musl-gcc -static $(STD) $(WARN) $(CFLAGS) main.c -o chat $(LDFLAGS)

# After a change of main.c: the lines that README.md links to.
links:
	@mkdir -p build
	awk -f test/links.awk main.c README.md > build/README.md
	cp build/README.md README.md

install: $(CHAT)
	install -D -m 755 chat $(DESTDIR)$(PREFIX)/bin/chat

clean:
	rm -rf chat build

.PRECIOUS: build/fuzz-%
.PHONY: all run test sanitize analyze valgrind coverage bench bench-all \
        peers fuzz static install links clean
