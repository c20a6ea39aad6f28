#!/bin/sh
# Runs tests under valgrind ("make valgrind" builds the programs for it).
#
# No error, whatever a process does; and a server that was told to end has
# given back all memory and closed all descriptors. What a start that fails
# leaves to exit() does not count. It is told by its open descriptors of
# server_configure(); if these were many, they would be of others, too.
cd "$(dirname "$0")/.." || exit 1

dir=$PWD/build/valgrind
logs=$dir/logs
rm -rf "$logs" "$dir/under"
mkdir -p "$logs" "$dir/under"

# under PROGRAM OPTION...: makes a command that runs it under valgrind. An
# error makes the exit status 99, so that the test at hand fails.
under() {
    program=$1
    shift
    cat >"$dir/under/$program" <<END
#!/bin/sh
exec valgrind -q --error-exitcode=99 --leak-check=full $* \
    $dir/$program "\$@"
END
    chmod +x "$dir/under/$program"
}
under unit
under chat --show-leak-kinds=all --track-fds=yes "--log-file=$logs/%p"
ln -s "$dir/server" "$dir/under/server"

export CHAT="$dir/under/chat" BUILD="$dir/under" PATIENCE=30 DEADLINE=500
test/run unit server clients
status=$?

# The bus, but for the cases that are about load, and so too much for valgrind.
printed=$(mktemp)
trap 'rm -f "$printed"' EXIT
test/bus.py loss reorder peers big history clocks kill secret loopback \
    freeze cut flood >"$printed" || status=1
grep -v '^ok - ' "$printed"
echo "bus: $(grep -c '^ok - ' "$printed") ok"

ended=0 failed=0
for log in "$logs"/*; do
    grep -q 'FILE DESCRIPTORS' "$log" || continue # it was killed
    if grep -q 'server_configure' "$log"; then
        failed=$((failed + 1))
    elif grep -q 'main\.c:' "$log"; then
        cat "$log"
        status=1
    else
        ended=$((ended + 1))
    fi
done
echo "$ended processes ended with nothing left, $failed could not start"
[ "$ended" -gt $((failed * 3)) ] && exit $status
