#!/usr/bin/awk -f
# Reads what `gcov -t` says of the programs that are or include main.c. Prints
# each of its lines that none of them ran, and the share of those that one did.
# Fails below 97 %: what only an odd machine brings about need not run.
{ split($0, field, ":"); number = field[2] + 0 }
number == 0 && field[3] == "Source" { ours = field[4] ~ /(^|\/)main\.c$/ }
!ours || number == 0 || field[1] ~ /-$/ { next } # no code there
{
    text[number] = substr($0, index($0, ":") + 1)
    if (field[1] !~ /[#=]$/) ran[number] = 1
    if (number > last) last = number
}
END {
    for (i = 1; i <= last; i++) {
        if (!(i in text)) continue
        all++
        if (i in ran) count++
        else print "not covered:" text[i]
    }
    share = all ? 100 * count / all : 0
    printf "%d of %d lines of main.c run: %.1f %%\n", count, all, share
    exit share < 97
}
