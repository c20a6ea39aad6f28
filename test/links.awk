# Writes README.md with its links into main.c brought up to date:
#
#     awk -f test/links.awk main.c README.md
#
# In [name](main.c#L1) the number becomes the line on which that function or
# struct begins, or its chapter, if the name is "chapter N". A name that
# main.c does not have gets the number 0, and the tests complain.

FILENAME == "main.c" {
    if ($0 ~ /^\/\* ---- [0-9]+\. /) {
        n = $3 + 0
        line["chapter " n] = FNR
    } else if ($0 ~ /^struct [a-z0-9_]+ \{/) {
        line["struct " $2] = FNR
    } else if ($0 ~ /^[a-z].*[ *][a-z0-9_]+\(/ && $0 !~ /;$/) {
        name = $0
        sub(/\(.*/, "", name)
        sub(/.*[ *]/, "", name)
        if (!(name in line)) line[name] = FNR
    }
    next
}

{
    rest = $0
    done = ""
    while (match(rest, /\[[^][]*\]\(main\.c#L[0-9]+\)/)) {
        link = substr(rest, RSTART, RLENGTH)
        name = substr(link, 2, index(link, "]") - 2)
        gsub(/`/, "", name)
        sub(/#L[0-9]+/, "#L" line[name] + 0, link)
        done = done substr(rest, 1, RSTART - 1) link
        rest = substr(rest, RSTART + RLENGTH)
    }
    print done rest
}
