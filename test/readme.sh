#!/bin/sh
# Is README.md true to the program in $CHAT? Its usage text is that of -h, the
# options it suggests exist, and so do the files, the make targets and the
# places in main.c that it names.
cd "$(dirname "$0")/.." || exit 1
CHAT=${CHAT:-./chat}
case $CHAT in /*) ;; *) CHAT=$PWD/$CHAT ;; esac
failed=0
dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' INT TERM

# result NAME WRONG: a line for the case, which failed if WRONG is not empty.
result() {
    if [ -z "$2" ]; then
        echo "ok - readme: $1"
    else
        echo "FAILED - readme: $1:" $2
        failed=1
    fi
}

# The code in README.md, a piece a line: lines of fenced and indented blocks
# (joined where they end in a backslash), and the spans between backticks.
awk '
    function piece(text) {
        if (sub(/\\$/, "", text)) { joined = joined text; return }
        print joined text
        joined = ""
    }
    /^```/      { fenced = !fenced; next }
    fenced      { piece($0); next }
    /^    /     { piece($0); next }
    { n = split($0, part, "`"); for (i = 2; i <= n; i += 2) print part[i] }
' README.md >"$dir/code"

# What follows a command up to its end: a command line may hold several, each
# ends at one of ; & | # or ).
commands() {
    sed -e 's/^#//' -e 's/ #.*//' "$dir/code" | tr ';&|)' '\n\n\n\n'
}

# ---- The usage text ----------------------------------------------------------
awk '/^```/ { inside = 0 } /^Usage: chat/ { inside = 1 } inside' \
    README.md >"$dir/usage"
if ! "$CHAT" -h >"$dir/help" 2>"$dir/error"; then
    result "$CHAT -h" "status is not 0; $(cat "$dir/error")"
fi
if ! cmp -s "$dir/usage" "$dir/help"; then
    wrong=$(diff "$dir/usage" "$dir/help" | head -n 6)
    result 'the usage text is that of -h' "$wrong"
else
    result 'the usage text is that of -h' ''
fi

# ---- Options -----------------------------------------------------------------
# In a command: the words with a dash behind the program's name, or within
# ARGS. A span that begins with a dash speaks of the program, too.
sed -n 's/^  *\(-.\), \(--[a-z-]*\) .*/\1 \2/p; s/^  *\(--[a-z-]*\) .*/\1/p' \
    "$dir/help" | tr ' ' '\n' >"$dir/known"
commands | tr "'\"=," '    ' | awk '
    {
        ours = $1 ~ /^-/
        for (i = 1; i <= NF; i++) {
            if (ours && $i ~ /^-/) print $i
            if ($i ~ /^(.*\/)?(mini-ws-)?chat$/ || $i == "ARGS") ours = 1
        }
    }' | sort -u >"$dir/options"
wrong=$(grep -vxF -f "$dir/known" "$dir/options")
[ -s "$dir/known" ] && [ -s "$dir/options" ] || wrong='none found'
result 'its options are in -h' "${wrong:+not there: }$wrong"

# ---- Files -------------------------------------------------------------------
# Targets of links, and words of code that look like a file of the source
# (what begins with a slash is on the reader's machine, or an address).
{
    sed -n 's/.*](\([^)#:]*\)).*/\1/p' README.md
    tr " \"'=" '\n\n\n\n' <"$dir/code" |
        grep -E '^(test/|\.ci/|[A-Za-z0-9_.-]+\.(c|h|html|js|json|py|sh)$)'
} | sort -u >"$dir/files"
wrong=$(while read -r file; do
    [ -e "$file" ] || echo "$file"
done <"$dir/files")
[ -s "$dir/files" ] || wrong='none found'
result 'the files it names exist' "${wrong:+not there: }$wrong"

# ---- make --------------------------------------------------------------------
commands | sed "s/[A-Z]*='[^']*'//g" | awk '
    {
        for (i = 1; i < NF && $i != "make"; i++)
            ;
        for (i++; i <= NF; i++) if ($i !~ /^-|=/) print $i
    }' | sort -u >"$dir/targets"
wrong=$(while read -r target; do
    grep -q "^$target:" Makefile || echo "$target"
done <"$dir/targets")
[ -s "$dir/targets" ] || wrong='none found'
result 'the make targets it names exist' "${wrong:+not there: }$wrong"

# ---- Links into main.c ---------------------------------------------------------
awk -f test/links.awk main.c README.md >"$dir/readme"
wrong=$(diff README.md "$dir/readme" | grep '^<' | head -n 3)
[ -z "$wrong" ] || wrong="'make links' mends: $wrong"
grep -q 'main.c#L0)' "$dir/readme" && wrong=$(grep -o '\[[^]]*\](main.c#L0)' \
    "$dir/readme")
grep -q 'main.c#L' README.md || wrong='none found'
result 'its links into main.c lead where they say' "$wrong"

exit $failed
