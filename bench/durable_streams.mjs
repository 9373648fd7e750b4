// Serve Durable Streams from files, or from memory: node durable_streams.mjs FOLDER_OF_NODE_MODULES [DATA]
import { createRequire } from "node:module";

const [cache, dataDir] = process.argv.slice(2);
const require = createRequire(`${cache}/package.json`);
const { DurableStreamTestServer } = require("@durable-streams/server");
const server = new DurableStreamTestServer({ port: 0, host: "127.0.0.1", dataDir, compression: false });
const url = await server.start();
server.server.keepAliveTimeout = 600_000; // by default Node drops a connection after 5 s of its own delay
console.log(url);
process.on("SIGTERM", () => process.exit(0));
