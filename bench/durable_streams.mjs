// Serve Durable Streams from files: node durable_streams.mjs FOLDER_OF_NODE_MODULES DATA
import { createRequire } from "node:module";

const [cache, dataDir] = process.argv.slice(2);
const require = createRequire(`${cache}/package.json`);
const { DurableStreamTestServer } = require("@durable-streams/server");
const server = new DurableStreamTestServer({ port: 0, host: "127.0.0.1", dataDir, compression: false });
console.log(await server.start());
process.on("SIGTERM", () => process.exit(0));
