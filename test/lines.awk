#!/usr/bin/awk -f
# The lines of code of main.c, without blank lines and comments: a chapter a
# line, then the chat itself, the whole, and its functions. Fails above the
# number that README.md publishes. Alone: test/lines.awk README.md main.c
function finish() {
    if (lines) printf "%-50s %5d\n", title ? title : "Includes", lines
    all += lines
    if (title ~ /^([35689]|14|18|19)\. /) chat += lines
    lines = 0
}
FILENAME ~ /\.md$/ {
    if (match($0, /[0-9],[0-9]+ lines of code/)) most = $0
    next
}
/^\/\* ---- [0-9]+\. / {
    finish()
    title = $0
    gsub(/^\/\* ---- | *-*( \*\/)?$/, "", title)
}
{
    code = ""
    rest = $0
    while (rest != "") { # without strings and comments
        if (comment) {
            at = index(rest, "*/")
            rest = at ? substr(rest, at + 2) : ""
            comment = !at
        } else if (match(rest, /"(\\.|[^"\\])*"|\/\*|\/\/.*/)) {
            comment = substr(rest, RSTART, 2) == "/*"
            code = code substr(rest, 1, RSTART - 1)
            if (substr(rest, RSTART, 1) == "\"") code = code "\"\""
            rest = substr(rest, RSTART + RLENGTH)
        } else {
            code = code rest
            rest = ""
        }
    }
    if (code !~ /[^ \t]/) next
    lines++
    inside++
    if (code ~ /^[a-zA-Z_].*\(/ && code !~ /;$/ && !body) inside = 1
    if (code ~ /\) \{$/ && inside < 4 && !body) {
        body = 1
        functions++
    }
    if (body && code == "}") {
        if (inside > longest) longest = inside
        body = 0
    }
}
END {
    finish()
    printf "%-50s %5d\n", "The chat itself: 3, 5, 6, 8, 9, 14, 18, 19", chat
    printf "%-50s %5d\n", "All", all
    printf "%d functions, the longest of %d lines\n", functions, longest
    match(most, /[0-9],[0-9]+ lines/)
    most = substr(most, RSTART, 1) substr(most, RSTART + 2, 3)
    if (all > most) print "README.md says " most
    exit most && all > most
}
