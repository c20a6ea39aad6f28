#!/bin/sh
# Clients that nobody here wrote talk to the program in $CHAT: curl (here),
# Node's ws (clients.js) and Python's websockets (clients.py).
cd "$(dirname "$0")/.." || exit 1
CHAT=${CHAT:-./chat}
case $CHAT in /*) ;; *) CHAT=$PWD/$CHAT ;; esac
export CHAT
failed=0

# Each runs by itself; where a client is missing, its cases are skipped.
if ! command -v node >/dev/null || [ ! -d test/node_modules/ws ]; then
    echo "skipped: ws: needs node and its package ws ('npm ci' in test/)"
else
    node test/clients.js || failed=1
fi
if ! /usr/bin/python3 -c 'import websockets' 2>/dev/null; then
    echo "skipped: websockets: python3-websockets is not installed"
else
    test/clients.py || failed=1
fi
if ! command -v curl >/dev/null || ! command -v python3 >/dev/null; then
    echo "skipped: curl: needs curl, and python3 to parse what it gets"
    exit $failed
fi

# From here on: curl.
dir=$(mktemp -d) || exit 1
server=
trap 'kill $server 2>/dev/null; rm -rf "$dir"' EXIT
trap 'exit 1' INT TERM

# start OPTION...: starts a server, sets $server and $url.
start() {
    : >"$dir/stderr"
    "$CHAT" -p 0 -b none "$@" >"$dir/log" 2>"$dir/stderr" &
    server=$!
    tries=0
    until url=$(sed -n 's/^chat: listening on \(.*\)\/, bus none$/\1/p' \
        "$dir/stderr") && [ -n "$url" ]; do
        tries=$((tries + 1))
        if [ $tries -gt 200 ] || ! kill -0 $server 2>/dev/null; then
            echo "FAILED - curl: start $*: $(cat "$dir/stderr")"
            exit 1
        fi
        sleep 0.05
    done
}

# stop NAME: a clean end, and nothing on stderr but that it listens.
stop() {
    kill -TERM $server
    wait $server
    is "$1: exit status" 0 $?
    is "$1: nothing else on stderr" "chat: listening on $url/, bus none" \
        "$(cat "$dir/stderr")"
    server=
}

# get ARGUMENT...: curl; its body is in $dir/body, its headers in $dir/head.
# Prints the status code.
get() {
    : >"$dir/body"
    curl -q -sS -g --noproxy '*' --max-time 20 -o "$dir/body" -D "$dir/head" \
        -w '%{http_code}' "$@" 2>"$dir/curl"
}

# head NAME: a header's value, from the last answer.
head() {
    tr -d '\r' <"$dir/head" | sed -n "s/^$1: //Ip"
}

# is NAME EXPECTED GOT
is() {
    if [ "$2" = "$3" ]; then
        echo "ok - curl: $1"
    else
        printf %s "FAILED - curl: $1: expected '$2', got '$3'" | tr '\n' ' '
        echo
        failed=1
    fi
}

# holds NAME COMMAND...: the command must succeed.
holds() {
    name=$1
    shift
    if "$@" >/dev/null 2>"$dir/why"; then
        is "$name" 0 0
    else
        is "$name" 0 "status $? of $*: $(cat "$dir/why")"
    fi
}

# messages [QUERY]: the answer of /messages as lines of Python literals; a
# string with a line break so stays on its line.
messages() {
    get "$url/messages$1" >"$dir/status"
    python3 -c 'import json, sys
for m in json.load(open(sys.argv[1], encoding="utf-8")): print(ascii(m))' \
        "$dir/body"
}

start
url=$(echo "$url" | sed s/localhost/127.0.0.1/)

is 'page: status' 200 "$(get "$url/")"
holds 'page: is index.html' cmp "$dir/body" index.html
is 'page: Content-Type' 'text/html; charset=utf-8' "$(head Content-Type)"
is 'page: Content-Length' "$(wc -c <index.html)" "$(head Content-Length)"
is 'page: X-Content-Type-Options' nosniff "$(head X-Content-Type-Options)"
holds 'page: Content-Security-Policy' grep -qi \
    '^Content-Security-Policy: .*default-src' "$dir/head"
tr -d '\r' <"$dir/head" | grep -v '^Date:' >"$dir/head.get"
is 'page: HEAD' 200 "$(get -I "$url/")"
tr -d '\r' <"$dir/head" | grep -v '^Date:' >"$dir/head.head"
holds 'page: HEAD has the headers of GET' cmp "$dir/head.get" "$dir/head.head"
is 'page: with a query' 200 "$(get "$url/?channel=earth&history=50")"

is 'send: GET' '200 message sent' \
    "$(get "$url/send?message=hello") $(cat "$dir/body")"
is 'send: no newline after the answer' 12 "$(wc -c <"$dir/body")"
is 'send: GET, encoded by curl' 200 "$(get -G "$url/send" \
    --data-urlencode 'message=grüße & 100% + <b>"q"\ = ☃ 😀')"
is 'send: + is a space' 200 "$(get "$url/send?message=a+b%2Bc")"
is 'send: an empty message is one' 200 "$(get "$url/send?message=")"
printf 'two\nlines "quoted"\tand\001more\\ \177' >"$dir/post"
is 'send: POST' '200 message sent' \
    "$(get --data-binary "@$dir/post" "$url/send") $(cat "$dir/body")"
is 'send: POST keeps what looks encoded' 200 \
    "$(get -d 'message=a+b%20c' "$url/send")"
is 'send: no message' '400 ?message not provided' \
    "$(get "$url/send") $(cat "$dir/body")"
is 'send: no message, but another name' 400 "$(get "$url/send?messages=x")"
is 'send: GET, not UTF-8' 400 "$(get "$url/send?message=%ff%fe")"
printf 'bad \300\257' >"$dir/bad"
is 'send: POST, not UTF-8' 400 "$(get --data-binary "@$dir/bad" "$url/send")"

messages >"$dir/got"
cat >"$dir/want" <<'END'
'hello'
'gr\xfc\xdfe & 100% + <b>"q"\\ = \u2603 \U0001f600'
'a b+c'
''
'two\nlines "quoted"\tand\x01more\\ \x7f'
'message=a+b%20c'
END
is 'messages: status' 200 "$(cat "$dir/status")"
is 'messages: Content-Type' application/json "$(head Content-Type)"
is 'messages: Content-Length' "$(wc -c <"$dir/body")" "$(head Content-Length)"
holds 'messages: all that was sent, in order' diff "$dir/want" "$dir/got"
is 'messages: HEAD' 200 "$(get -I "$url/messages")"

is 'channel: send' 200 "$(get "$url/send?channel=m%C3%A9t%C3%A9o&message=rain")"
is 'channel: send by POST' 200 \
    "$(get -d snow "$url/send?x=1&channel=m%c3%a9t%c3%a9o")"
is 'channel: its messages' "'rain' 'snow'" \
    "$(messages '?channel=m%C3%A9t%C3%A9o' | paste -sd ' ')"
is 'channel: the default one has none of them' 0 \
    "$(messages | grep -cE 'rain|snow')"
is 'channel: an unknown one is empty' '200 []' \
    "$(get "$url/messages?channel=nowhere") $(cat "$dir/body")"
long=$(printf '%064d' 0)
is 'channel: 64 bytes' 200 "$(get "$url/send?channel=$long&message=x")"
is 'channel: 65 bytes' 400 "$(get "$url/send?channel=0$long&message=x")"
is 'channel: not UTF-8' 400 "$(get "$url/send?channel=%ff&message=x")"

curl -q -sS --noproxy '*' --max-time 20 -o "$dir/body" \
    "$url/send?channel=row&message=[1-500]" 2>"$dir/curl"
is 'row: 500 requests on one connection, in order' \
    "$(seq 500 | sed "s/.*/'&'/" | cksum)" "$(messages '?channel=row' | cksum)"
curl -q -sS --noproxy '*' --max-time 20 -Z --parallel-max 20 \
    -o "$dir/body" "$url/send?channel=par&message=[1-500]" 2>"$dir/curl"
is 'parallel: 500 requests, 20 at a time, each once' \
    "$(seq 500 | sed "s/.*/'&'/" | sort | cksum)" \
    "$(messages '?channel=par' | sort | cksum)"

# The second number of connections is 0 where the first was used again.
connects() {
    curl -q -sS -g --noproxy '*' --max-time 20 -o "$dir/body" \
        -w '%{http_code}:%{num_connects} ' "$@" 2>"$dir/curl"
}
is 'keep-alive: a connection serves two requests' '200:1 200:0 ' \
    "$(connects "$url/" -o "$dir/body" "$url/messages")"
is 'keep-alive: also after a 404' '404:1 200:0 ' \
    "$(connects "$url/nothing" -o "$dir/body" "$url/")"
is 'keep-alive: also after a POST' '200:1 200:0 ' \
    "$(connects -d x "$url/send" -o "$dir/body" "$url/send")"
is 'keep-alive: also after HEAD' '200:1 200:0 ' \
    "$(connects -I "$url/" -o "$dir/body" "$url/send?message=x")"
is 'keep-alive: Connection: close is heeded' '200:1 200:1 ' \
    "$(connects -H 'Connection: close' "$url/" -o "$dir/body" "$url/")"
is 'HTTP/1.0: closes' '200:1 200:1 ' \
    "$(connects -0 "$url/" -o "$dir/body" "$url/messages")"
is 'HTTP/1.0: page' 200 "$(get -0 "$url/")"
holds 'HTTP/1.0: the whole page' cmp "$dir/body" index.html

is 'errors: 404' '404 not found' "$(get "$url/none") $(cat "$dir/body")"
is 'errors: nosniff there too' nosniff "$(head X-Content-Type-Options)"
is 'errors: DELETE /' 405 "$(get -X DELETE "$url/")"
is 'errors: Allow' 'GET, HEAD' "$(head Allow)"
is 'errors: PUT /send' 405 "$(get -X PUT -d x "$url/send")"
is 'errors: Allow for /send' 'GET, HEAD, POST' "$(head Allow)"
is 'errors: Transfer-Encoding' '501 close' "$(get -d x \
    -H 'Transfer-Encoding: chunked' "$url/send") $(head Connection)"
is 'errors: a header of 9 KiB' 431 \
    "$(get -H "X-Long: $(printf '%09216d' 0)" "$url/")"
is 'errors: a path of 9 KiB' 414 "$(get "$url/$(printf '%09216d' 0)")"
is 'errors: no /metrics unless asked for' 404 "$(get "$url/metrics")"
is 'errors: a WebSocket version of old' '426 13' "$(get \
    -H 'Connection: Upgrade' -H 'Upgrade: websocket' \
    -H 'Sec-WebSocket-Version: 8' \
    -H 'Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==' \
    "$url/") $(head Sec-WebSocket-Version)"
is 'origin: a foreign one may not send' 403 \
    "$(get -H 'Origin: http://evil.example' "$url/send?message=x")"
is 'origin: the own one may' 200 \
    "$(get -H "Origin: $url" "$url/send?message=x")"

# curl waits a second for the 100 before it sends the body unasked.
python3 -c 'print("é" * 32768, end="")' >"$dir/64k"
is 'Expect: a body of 64 KiB' 200 "$(get -v -H 'Expect: 100-continue' \
    --data-binary "@$dir/64k" "$url/send?channel=large")"
holds 'Expect: 100 comes first' grep -q '^< HTTP/1.1 100 Continue' "$dir/curl"
is 'Expect: the message is whole' \
    "$(python3 -c 'print(ascii("é" * 32768))' | cksum)" \
    "$(messages '?channel=large' | cksum)"
printf x >>"$dir/64k"
is 'Expect: a body too large is not even sent' 413 "$(get -v \
    -H 'Expect: 100-continue' --data-binary "@$dir/64k" "$url/send")"
holds 'Expect: no 100 then' sh -c "! grep -q ' 100 Continue' '$dir/curl'"
is 'a body too large: 413' 413 \
    "$(get -H Expect: --data-binary "@$dir/64k" "$url/send")"
truncate -s 8M "$dir/8m"
is 'a body much too large: 413' 413 \
    "$(get -H Expect: --data-binary "@$dir/8m" "$url/send")"
if grep -q '^0\{31\}1 ' /proc/net/if_inet6 2>/dev/null; then
    is 'IPv6' 200 "$(get "$(echo "$url" | sed 's/127.0.0.1/[::1]/')/")"
fi
url=$(echo "$url" | sed s/127.0.0.1/localhost/)
is 'by name' 200 "$(get "$url/")"
stop 'first server'
date='[0-9]{2}/[A-Z][a-z]{2}/[0-9]{4}:[0-9:]{8} [+-][0-9]{4}'
holds 'log: a request' grep -qE \
    "^127\.0\.0\.1 - - \[$date\] \"GET / HTTP/1\.1\" 200 [0-9]+$" "$dir/log"
holds 'log: a POST' grep -q '"POST /send HTTP/1\.1" 200 12$' "$dir/log"
is 'log: no line of another shape' 0 \
    "$(grep -cvE '^[0-9a-f.:]+ - - \[[^]]+\] "[^"]*" [0-9]{3} ([0-9]+|-)$' \
        "$dir/log")"

# Files. What lies outside, or is hidden, must stay there.
www=$dir/www
mkdir -p "$www/sub" "$www/a b&<c>%41"
echo secret >"$dir/outside"
echo secret >"$www/.hidden"
ln -s ../outside "$www/link"
ln -s "$dir" "$www/out"
echo '<h1>home</h1>' >"$www/sub/index.html"
for name in page.html style.css code.js plain.txt image.png draw.svg \
    'a b&<c>%41/q"?#é +.txt'; do
    echo "this is $name" >"$www/$name"
done
: >"$www/empty.txt"
python3 -c 'import random, sys
sys.stdout.buffer.write(random.Random(1).randbytes(30000000))' >"$www/big.bin"
touch -d '2020-02-02 02:02:02 UTC' "$www/plain.txt"
start -d "$www" -q --metrics

is 'files: 30 MB' 200 "$(get "$url/big.bin")"
holds 'files: 30 MB are the same' cmp "$dir/body" "$www/big.bin"
is 'files: slowly' 200 "$(get --limit-rate 15M "$url/big.bin")"
holds 'files: slowly, the same' cmp "$dir/body" "$www/big.bin"
is 'files: an empty one' '200 0' \
    "$(get "$url/empty.txt") $(head Content-Length)"
is 'files: nosniff' nosniff "$(head X-Content-Type-Options)"
is 'files: HEAD' '200 30000000' \
    "$(get -I "$url/big.bin") $(head Content-Length)"
is 'files: two on one connection' '200:1 200:0 ' \
    "$(connects "$url/big.bin" -o "$dir/body" "$url/plain.txt")"
for type in page.html=text/html style.css=text/css code.js=text/javascript \
    plain.txt=text/plain image.png=image/png draw.svg=image/svg+xml; do
    get "$url/${type%=*}" >/dev/null
    is "files: type of ${type%=*}" "${type#*=}" \
        "$(head Content-Type | sed 's/;.*//')"
done
is 'files: index.html of a folder' '200 <h1>home</h1>' \
    "$(get -L "$url/sub/") $(cat "$dir/body")"
is 'files: a folder without its slash' '200 <h1>home</h1>' \
    "$(get -L "$url/sub") $(cat "$dir/body")"
is 'files: none' '404 not found' "$(get "$url/none") $(cat "$dir/body")"
is 'files: not a folder' 404 "$(get "$url/plain.txt/x")"

is 'date: Last-Modified' 'Sun, 02 Feb 2020 02:02:02 GMT' \
    "$(get "$url/plain.txt" >/dev/null; head Last-Modified)"
is 'date: not modified since' '304 0' \
    "$(get -z 'Sun, 02 Feb 2020 02:02:02 GMT' "$url/plain.txt") $(wc -c \
        <"$dir/body")"
is 'date: nor since a later date' 304 \
    "$(get -z 'Mon, 03 Feb 2020 02:02:02 GMT' "$url/plain.txt")"
is 'date: modified since' 200 \
    "$(get -z 'Sun, 02 Feb 2020 02:02:01 GMT' "$url/plain.txt")"
is 'date: nonsense is ignored' 200 \
    "$(get -H 'If-Modified-Since: yesterday' "$url/plain.txt")"
is 'date: the connection lives after a 304' '304:1 304:0 ' \
    "$(connects -z 'Sun, 02 Feb 2020 02:02:02 GMT' "$url/plain.txt" \
        -o "$dir/body" "$url/plain.txt")"

for path in ../outside %2e%2e/outside sub/../../outside sub/..%2f../outside \
    ..%2foutside /etc/hostname %2fetc/hostname link out/outside .hidden \
    %2ehidden sub/../.hidden plain.txt%00.html ..; do
    code=$(get --path-as-is "$url/$path")
    case $code in
    400 | 403 | 404) code=refused ;;
    esac
    grep -q secret "$dir/body" && code="$code, with what is secret"
    is "escape: /$path" refused "$code"
done

# The links of each listing lead to the files that it names.
cat >"$dir/links.py" <<'END'
import html.parser, sys, urllib.parse
class Links(html.parser.HTMLParser):
    def handle_starttag(self, tag, attributes):
        if tag == "a":
            print(urllib.parse.urljoin(sys.argv[1], dict(attributes)["href"]))
    def handle_data(self, text):
        print(text.strip().rstrip("/"), file=sys.stderr)
Links().feed(open(sys.argv[2], encoding="utf-8").read())
END
# listing URL: the listing's links in $dir/links, what it shows in $dir/shown.
listing() {
    get "$1"
    python3 "$dir/links.py" "$1" "$dir/body" >"$dir/links" 2>"$dir/shown"
}
is 'listing: status' 200 "$(listing "$url/")"
is 'listing: Content-Type' 'text/html; charset=utf-8' "$(head Content-Type)"
for name in page.html plain.txt empty.txt big.bin sub 'a b&<c>%41'; do
    holds "listing: shows $name" grep -qxF "$name" "$dir/shown"
done
is 'listing: hides dotfiles' 0 "$(grep -c hidden "$dir/links")"
is 'listing: HEAD' 200 "$(get -I "$url/")"
folder=$(grep '%25' "$dir/links")
is 'listing: of a folder with an odd name' 200 "$(listing "$folder")"
is 'listing: leads to a file with an odd name' \
    '200 this is a b&<c>%41/q"?#é +.txt' \
    "$(get "$(grep '\.txt$' "$dir/links")") $(cat "$dir/body")"

get -d one "$url/send" >/dev/null
get -d two "$url/send" >/dev/null
is 'files: /messages is served beside them' "'one' 'two'" \
    "$(messages | paste -sd ' ')"
is 'metrics: status' 200 "$(get "$url/metrics")"
is 'metrics: messages received' 2 \
    "$(sed -n 's/^chat_messages_received_total //p' "$dir/body")"
is 'metrics: clients' 0 "$(sed -n 's/^chat_clients //p' "$dir/body")"
is 'metrics: each line of Prometheus'\'' shape' 0 "$(grep -cvE \
    '^# (HELP|TYPE) chat_[a-z_]+ |^chat_[a-z_]+ [0-9]+$' "$dir/body")"
stop 'second server'
is 'log: none with -q' 0 "$(wc -c <"$dir/log")"
exit $failed
