# `make run` builds the chat and starts it; `make help` lists the rest.
CFLAGS ?= -O2
PREFIX ?= /usr/local
STD    = -std=gnu11
WARN   = -Wall -Wextra -Wpedantic -Wshadow
HARDEN = -U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=3 -fstack-protector-strong \
         -fPIE -pie -Wl,-z,relro,-z,now
SANITIZE = -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined \
           -fno-sanitize-recover=all
CHAT    = ./chat
BUILD   = build
TESTS   = $(addprefix $(BUILD)/,unit server chat-short chat-large \
          $(if $(wildcard /usr/include/openssl/ssl.h),chat-tls))
SECONDS = 60
COMPILE = @mkdir -p $(@D); $(CC) $(STD) $(WARN) $(CFLAGS) $(HARDEN)

$(CHAT): main.c index.html ## the program; TLS=1 adds https and wss (OpenSSL 3)
	$(COMPILE) $(if $(TLS),-DTLS) main.c -o $@ $(LDFLAGS) $(if $(TLS),-lssl -lcrypto)
$(BUILD)/chat-short: main.c index.html
	$(COMPILE) -DSECOND=200 -DUNFINISHED_MAX=4194304 -DCHANNELS_MAX=8 \
	    -DHISTORY=65536 -DMESSAGE_MAX=16000 main.c -o $@
$(BUILD)/chat-large: main.c index.html
	$(COMPILE) -DMESSAGE_MAX=16777216 -DHISTORY=67108864 -DUNFINISHED_MAX=1073741824 main.c -o $@
$(BUILD)/chat-tls: main.c index.html
	$(COMPILE) -DTLS main.c -o $@ -lssl -lcrypto
$(BUILD)/fuzz: test/fuzz.c main.c index.html
	$(COMPILE) $(SANITIZE) -fsanitize=fuzzer $< -o $@
$(BUILD)/%: test/%.c main.c index.html $(wildcard test/*.h)
	$(COMPILE) $< -o $@ $(LDFLAGS)

run: $(CHAT) ## builds and starts it: make run ARGS='-p 8000'
	$(CHAT) $(ARGS)
test: $(CHAT) $(TESTS) ## all tests; PARTS='unit bus' only these
	@CHAT=$(CHAT) BUILD=$(BUILD) test/run $(PARTS)
sanitize: ## the tests under ASan and UBSan
	@ASAN_OPTIONS=detect_leaks=0:quarantine_size_mb=1 $(MAKE) test HARDEN= PARTS="$(or $(PARTS),unit server bus nats tls clients)" \
	    CHAT=build/asan/chat BUILD=build/asan CFLAGS="$(SANITIZE)"
valgrind: ## some of the tests under valgrind
	@$(MAKE) --no-print-directory CFLAGS='-O1 -g' HARDEN= \
	    BUILD=build/valgrind CHAT=build/valgrind/chat \
	    $(addprefix build/valgrind/,chat unit server chat-short)
	@test/valgrind.sh
coverage: ## the lines of main.c that no test runs
	@rm -rf build/coverage
	@$(MAKE) --no-print-directory test PARTS="unit server nats bus" HARDEN= \
	    CFLAGS="-O0 --coverage" CHAT=build/coverage/chat BUILD=build/coverage
	@gcov -t build/coverage/*.gcda 2>/dev/null | test/coverage.awk
fuzz: ## all parsers and conversations with libFuzzer, for SECONDS=60
	@$(MAKE) --no-print-directory CC=clang HARDEN= build/fuzz
	@mkdir -p build/corpus
	build/fuzz -max_total_time=$(SECONDS) -verbosity=0 \
	    -artifact_prefix=build/ build/corpus test/corpus
bench: $(CHAT) $(BUILD)/bench ## its speed, beside the floor and other servers
	@CHAT=$(CHAT) $(BUILD)/bench $(ARGS)
peers: ## installs the servers that it is measured beside
	@mkdir -p build/peers && cp test/peers/package.json build/peers
	cd build/peers && npm install --no-audit --no-fund
lines: ## the lines of code of main.c, by chapter
	@test/lines.awk README.md main.c
static: ## one file that needs no libc (musl)
	musl-gcc -static $(STD) $(WARN) $(CFLAGS) main.c -o chat $(LDFLAGS)
install: $(CHAT) ## into PREFIX=/usr/local
	install -D -m 755 chat $(DESTDIR)$(PREFIX)/bin/chat
clean: ## removes all that was built
	rm -rf chat build
help: ## this list
	@awk -F ': .*## ' '/^[$$a-z].*: .*## / { sub(/^\$$.*/, "", $$1); \
	    printf "make %-9s %s\n", $$1, $$2 }' Makefile
.PHONY: run test sanitize valgrind coverage fuzz bench peers lines static \
        install clean help $(if $(TLS),$(CHAT))
