#!/bin/bash
# Proves, with the programs that `make valgrind` builds: no error of memory,
# no memory that is lost, no descriptor that stays open, in the unit test, the
# cheaper parts of the server's and some cases of the bus. What server_open
# has taken the kernel frees at the end, so that does not count.
#
#     make valgrind
cd "$(dirname "$0")/.." || exit 1
export CI='' BUILD=$PWD/build/valgrind PATIENCE=40
export CHAT=$BUILD/under/chat logs=$BUILD/logs
rm -rf "$logs" "$BUILD/under"
mkdir -p "$logs" "$BUILD/under"
cat >"$BUILD/under/start" <<END
{
   of the start
   Memcheck:Leak
   ...
   fun:server_open
}
END

# under PROGRAM OPTION...: makes a command that runs it under valgrind.
under() {
    cat >"$BUILD/under/$1" <<END
#!/bin/sh
exec valgrind -q --error-exitcode=99 --leak-check=full --track-fds=yes \
    --suppressions=$BUILD/under/start ${*:2} $BUILD/$1 "\$@"
END
    chmod +x "$BUILD/under/$1"
}
under chat "--log-file=$logs/%p"
under chat-short "--log-file=$logs/%p"
under unit "--log-file=$logs/unit-%p" --leak-check=no # it does not clear up

lines=$(mktemp)
trap 'rm -f "$lines"' EXIT
"$BUILD/under/unit" >>"$lines" ||
    echo 'FAILED - unit: a test, or an error of memory' >>"$lines"
# (Not the files: valgrind 3.19 does not know openat2.)
env BUILD="$BUILD/under" "$BUILD/server" http websocket >>"$lines"
test/bus.py secret kill >>"$lines" || echo 'FAILED - bus.py' >>"$lines"
for log in "$logs"/*; do # what was killed has left no list of descriptors
    awk '/== $/ { block = "" } { block = block "\n" $0 }
         /server_run|Invalid|uninit|lost in/ { bad = 1; print block }
         END { exit bad }' "$log" ||
        echo "FAILED - $log: an error, or a leak" >>"$lines"
done
grep -vE '^(ok - |# )' "$lines"
ended=$(grep -l 'FILE DESCRIPTORS' "$logs"/* | wc -l)
echo "$ended processes have ended by themselves"
passed=$(grep -c '^ok - ' "$lines") failed=$(grep -c '^FAILED - ' "$lines")
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ] && [ "$passed" -gt 500 ] && [ "$ended" -gt 20 ]
