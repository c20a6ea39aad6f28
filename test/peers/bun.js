// The chat on Bun's own WebSockets and its publish().
// SPDX-License-Identifier: MIT
const server = Bun.serve({
    port: 0,
    hostname: "127.0.0.1",
    fetch(request, server) {
        if (!server.upgrade(request)) return new Response("a chat");
    },
    websocket: {
        perMessageDeflate: false,
        maxPayloadLength: 65536,
        idleTimeout: 60, // seconds
        sendPings: true,
        publishToSelf: true, // the sender too
        open(socket) { socket.subscribe("chat"); },
        message(socket, message) { socket.publish("chat", message); },
    },
});
console.log(`http://localhost:${server.port}/`);
