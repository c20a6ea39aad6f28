#!/bin/sh
# Is README.md true to the program in $CHAT and to the source? Its usage text
# is that of -h; the options that it suggests exist, and so do the files, the
# make targets and the functions of main.c that it names; the lines of its map
# are those of `make lines`, and it is short. Alone: CHAT=./chat test/readme.sh
cd "$(dirname "$0")/.." || exit 1
CHAT=${CHAT:-./chat}
failed=0
dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT

# result NAME: a line for the case, which failed if $dir/wrong says something.
result() {
    if [ -s "$dir/wrong" ]; then
        echo "FAILED - readme: $1:" $(head -n 8 "$dir/wrong")
        failed=1
    else
        echo "ok - readme: $1"
    fi
}

# absent NAME: fails if $dir/named has what $dir/known has not. (Nothing named
# at all would be a fault of this script.)
absent() {
    sort -u "$dir/named" | grep -vxF -f "$dir/known" >"$dir/wrong"
    [ -s "$dir/named" ] || echo 'none found' >"$dir/wrong"
    result "$1"
}

# The code, a piece a line: lines of fenced and indented blocks, and what
# stands between backticks, also across the end of a line.
awk '
    /^```/          { fenced = !fenced; next }
    fenced || /^    / { print; next }
    { text = text " " $0 }
    END { n = split(text, part, "`"); for (i = 2; i <= n; i += 2) print part[i] }
' README.md >"$dir/code"

# ---- The usage text ----------------------------------------------------------
awk '/^```/ { inside = 0 } /^Usage: chat/ { inside = 1 } inside' \
    README.md >"$dir/usage"
"$CHAT" -h >"$dir/help" 2>&1 || echo "status $?" >>"$dir/help"
diff "$dir/usage" "$dir/help" >"$dir/wrong"
result 'the usage text is that of -h'

# ---- Options: the words with a dash behind the program's name; and a piece that
# begins with a dash speaks of the program, too (or of the compiler).
grep -oE '^ +(-[a-zA-Z], )?--[a-z-]+' "$dir/help" | tr -d ' ' |
    tr ',' '\n' >"$dir/known"
tr "';&|)(" '\n' <"$dir/code" | tr '"=,' ' ' | awk '
    {
        ours = $1 ~ /^-[^DO]/
        for (i = 1; i <= NF; i++) {
            if (ours && $i ~ /^-/) print $i
            if ($i ~ /^(.*\/)?chat$/) ours = 1
        }
    }' >"$dir/named"
absent 'its options are in -h'

# ---- Files, make targets, functions and structs --------------------------------
find . -path ./.git -prune -o -print | sed 's|^\./||' >"$dir/known"
{
    grep -oE '\]\([^)#:]+\)' README.md | tr -d ']()'
    tr " \"'=" '\n' <"$dir/code" |
        grep -E '^(test/|[A-Za-z0-9_-]+\.(c|h|html|py|sh)$)'
} >"$dir/named"
absent 'the files it names exist'

sed -n 's/^\([a-z-]*\):.*/\1/p' Makefile >"$dir/known"
grep -oE '^make [a-z][a-z-]*( |$)' "$dir/code" | sed 's/make //; s/ //' >"$dir/named"
absent 'the make targets it names exist'

sed -n 's/^struct \([a-z]*\) {.*/struct \1/p; s/^#ifndef /-D/p
        s/^[a-z].*[ *]\([a-z0-9_]*\)(.*/\1/p' main.c >"$dir/known"
one='\<(client|websocket|server|channel|bus|peer|request)_[a-z_]+'
grep -oE "$one|\<struct [a-z]+|-D[A-Z_]+" "$dir/code" >"$dir/named"
absent 'the functions, structs and limits it names are in main.c'

# ---- Numbers -------------------------------------------------------------------
# Of `make lines`, a chapter a line: its number, and the last number there.
make -s lines | sed -n 's/^[^0-9]*\([0-9]*\)\. .*[^0-9]\([0-9][0-9]*\)[^0-9]*$/\1 \2/p' \
    >"$dir/counted"
sed -n 's/^| \([0-9]*\)\. [^|]*| \([0-9]*\) |.*/\1 \2/p' README.md >"$dir/map"
diff "$dir/map" "$dir/counted" >"$dir/wrong"
[ -s "$dir/map" ] || echo 'none found' >"$dir/wrong"
result 'the lines of its map are those of make lines'

awk 'END { if (NR > 250) print NR, "lines" }' README.md >"$dir/wrong"
result 'it has at most 250 lines'
exit $failed
