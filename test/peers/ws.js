// The chat on Node's `ws`: what one client sends, all of them get.
// SPDX-License-Identifier: MIT
const { WebSocketServer } = require(
    `${process.cwd()}/build/peers/node_modules/ws`);

const server = new WebSocketServer({
    port: 0, host: "127.0.0.1", perMessageDeflate: false,
    maxPayload: 65536, clientTracking: true,
}, () => console.log(`http://localhost:${server.address().port}/`));

server.on("connection", (socket) => {
    socket.alive = true;
    socket.on("pong", () => { socket.alive = true; });
    socket.on("error", () => {});
    socket.on("message", (data, binary) => {
        for (const client of server.clients) client.send(data, { binary });
    });
});

// As its manual has it: a ping, and who did not answer the last one goes.
setInterval(() => {
    for (const client of server.clients) {
        if (!client.alive) client.terminate();
        client.alive = false;
        client.ping();
    }
}, 30000);
