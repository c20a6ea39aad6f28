// The mini-ws-chat for Deno: sockets, a BroadcastChannel, a page.
// SPDX-License-Identifier: MIT
const sockets = new Set();
const bus = new BroadcastChannel("");
const page = `<!doctype html><input><pre></pre><script>
const socket = new WebSocket(location.href.replace("http", "ws"));
const [input] = document.getElementsByTagName("input");
input.onchange = () => { socket.send(input.value); input.value = ""; };
socket.onmessage = (e) =>
    document.querySelector("pre").prepend(e.data + "\\n");
</script>`;

const broadcast = (text) => sockets.forEach((socket) =>
    socket.readyState === WebSocket.OPEN && socket.send(text));
bus.onmessage = (e) => broadcast(e.data);

Deno.serve({
    port: 0, hostname: "127.0.0.1",
    onListen: ({ port }) => console.log(`http://localhost:${port}/`),
}, (request) => {
    if (request.headers.get("upgrade") !== "websocket")
        return new Response(page, { headers: { "content-type": "text/html" } });
    const { socket, response } =
        Deno.upgradeWebSocket(request, { idleTimeout: 60 });
    socket.onopen = () => sockets.add(socket);
    socket.onclose = () => sockets.delete(socket);
    socket.onmessage = (e) => { broadcast(e.data); bus.postMessage(e.data); };
    return response;
});
