// Serve resumable-stream over HTTP, with server-sent events: node resumable_stream.mjs FOLDER_OF_NODE_MODULES
// PUT makes a stream, POST adds a chunk, and GET resumes it. REDIS_URL is its Redis.
import { createServer } from "node:http";
import { createRequire } from "node:module";

const require = createRequire(`${process.argv[2]}/package.json`);
const { createResumableStreamContext } = require("resumable-stream");
const context = createResumableStreamContext({ waitUntil: null });
const sources = new Map();

async function textOf(request) {
  let text = "";
  for await (const piece of request.setEncoding("utf8")) text += piece;
  return text;
}

async function make(name) {
  const begin = (controller) => sources.set(name, controller);
  const stream = await context.createNewResumableStream(name, () => new ReadableStream({ start: begin }));
  await stream.cancel(); // nobody reads here; the stream continues for readers that resume
}

async function follow(name, response) {
  response.writeHead(200, { "Content-Type": "text/event-stream", "Cache-Control": "no-cache" });
  response.flushHeaders();
  const reader = (await context.resumeExistingStream(name)).getReader();
  response.on("close", () => reader.cancel());
  for (let next = await reader.read(); !next.done; next = await reader.read()) response.write(next.value);
  response.end();
}

const server = createServer(async (request, response) => {
  const name = request.url.slice(1);
  if (request.method === "GET") return follow(name, response);
  const text = await textOf(request);
  if (request.method === "PUT") await make(name);
  else sources.get(name).enqueue(`data: ${text}\n\n`);
  response.writeHead(201, { "Content-Length": 2 }).end("{}");
});
server.keepAliveTimeout = 600_000;
server.listen(0, "127.0.0.1", () => console.log(`http://127.0.0.1:${server.address().port}`));
process.on("SIGTERM", () => process.exit(0));
