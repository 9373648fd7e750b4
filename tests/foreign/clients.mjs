/**
 * Other people's clients, unchanged, in Node.
 *
 * Standard input has a call in each line of JSON: `{call, client, ...given}`. Standard output has what a client
 * receives, `{call, said}`, and how it ends, `{call, ended}` or `{call, failed}`. With `take`, a client leaves after
 * so many things.
 */
import { createInterface } from "node:readline";

const out = (line) => process.stdout.write(`${JSON.stringify(line)}\n`);
const told = ({ name, message, status, code, cause }) => ({ name, message, status, code, cause: cause && told(cause) });

async function each(stream, say, take = Infinity) {
  for await (const event of stream) {
    say(event);
    if (--take <= 0) break;
  }
}

async function openai({ url, retries = 0 }) {
  const { OpenAI } = await import("openai");
  return new OpenAI({ baseURL: `${url}/v1`, apiKey: "key", maxRetries: retries });
}

async function langgraph({ url, retries = 4 }) {
  const { Client } = await import("@langchain/langgraph-sdk");
  return new Client({ apiUrl: url, apiKey: null, callerOptions: { maxRetries: retries } });
}

const part = ({ event, data }) => ({ event, data });

async function chatTransport({ url }) {
  const { DefaultChatTransport } = await import("ai");
  return new DefaultChatTransport({ api: `${url}/api/chat` });
}

async function shown(stream, say, take) {
  const { readUIMessageStream } = await import("ai");
  const messages = readUIMessageStream({ stream, terminateOnError: true });
  await each(messages, (message) => say(message.parts.map(({ text }) => text ?? "").join("")), take);
}

const clients = {
  async "openai chat"(given, say) {
    const body = { model: "m", stream: true, messages: [{ role: "user", content: "Hi" }] };
    const stream = await (await openai(given)).chat.completions.create(body, { headers: given.headers });
    await each(stream, (chunk) => say(chunk.choices[0].delta.content ?? ""), given.take);
  },

  async "openai responses"(given, say) {
    const body = { model: "m", stream: true, input: "Hi" };
    await each(await (await openai(given)).responses.create(body, { headers: given.headers }), say, given.take);
  },

  async "openai retrieve"(given, say) {
    await each(await (await openai(given)).responses.retrieve(given.id, { stream: true, ...given.query }), say);
  },

  async "openai response"(given) {
    return (await openai(given)).responses.retrieve(given.id);
  },

  async "openai helper"(given, say) {
    const stream = (await openai(given)).responses.stream({ response_id: given.id, ...given.query });
    await each(stream, say);
    return stream.finalResponse();
  },

  async "openai cancel"(given) {
    return (await openai(given)).responses.cancel(given.id);
  },

  async "langgraph"(given, say) {
    const asked = { input: {}, streamMode: ["values"] };
    const stream = (await langgraph(given)).runs.stream(given.thread, "agent", asked);
    await each(stream, (event) => say(part(event)), given.take);
  },

  async "langgraph join"(given, say) {
    const stream = (await langgraph(given)).runs.joinStream(given.thread, given.run, { lastEventId: given.after });
    await each(stream, (event) => say(part(event)), given.take);
  },

  async "langgraph cancel"(given) {
    await (await langgraph(given)).runs.cancel(given.thread, given.run);
  },

  async "tanstack"(given, say) {
    const { ChatClient, fetchServerSentEvents } = await import("@tanstack/ai-client");
    const options = { headers: given.headers, reconnect: { maxAttempts: 1000, delayMs: 20 } };
    const text = (messages) => messages.findLast(({ role }) => role === "assistant")?.parts[0]?.content ?? "";
    let last = "";
    let failure;
    const chat = new ChatClient({
      threadId: given.thread,
      connection: fetchServerSentEvents(`${given.url}/agent`, options),
      onError: (error) => { failure = error; },
      onMessagesChange: (messages) => {
        if (text(messages) !== last) say(last = text(messages));
        if (last && given.take === last.length) chat.stop();
      },
    });
    await chat.sendMessage("Hi");
    if (failure) throw failure;
  },

  async "tanstack joined"(given, say) {
    const { fetchServerSentEvents } = await import("@tanstack/ai-client");
    const connection = fetchServerSentEvents(`${given.url}/agent`);
    await each(connection.joinRun(given.run), ({ delta }) => say(delta ?? ""));
  },

  async "ai sdk"(given, say) {
    const controller = new AbortController();
    const messages = [{ id: "u1", role: "user", parts: [{ type: "text", text: "Hi" }] }];
    const asked = { trigger: "submit-message", chatId: given.chat, messages, abortSignal: controller.signal };
    await shown(await (await chatTransport(given)).sendMessages(asked), say, given.take);
    controller.abort();
  },

  async "ai sdk resumed"(given, say) {
    const stream = await (await chatTransport(given)).reconnectToStream({ chatId: given.chat });
    if (stream === null) return "nothing is active";
    await shown(stream, say);
  },
};

for await (const line of createInterface({ input: process.stdin })) {
  const { call, client, ...given } = JSON.parse(line);
  clients[client](given, (said) => out({ call, said })).then(
    (ended = null) => out({ call, ended }),
    (error) => out({ call, failed: told(error) }),
  );
}
