/**
 * Relayed messages: whose they are, and what their events say to a person. The events are of the upstream's
 * own dialect, mostly JSON; here each dialect is a function from an event to the words it adds, or a remark on
 * what else happened. How an answer ended the service says. What is not said here is among the events.
 */

/**
 * Words, where `event` is null; else a remark, and what it is on. Where it begins anew, it stands apart from what
 * was said before, though that was of its kind; without content it is what comes next that does.
 *
 * @typedef {{content: string, event: string | null, begins?: boolean}} Said
 * @typedef {{content: string, event: string | null}} Chunk
 * @typedef {{last?: string | null, isApart?: boolean, texts: Record<string, string>, calls: string[], id?: string}} Memory
 * @typedef {(data: any, kind: string, memory: Memory) => (Said | undefined)[]} Dialect
 */

const MARK = /^relayed:([^:]*):(.*)$/s; // the event of a relayed message's first chunk
const CALL = "tool call";
const REASONING = "reasoning";
const ORDINARY = new Set(["stop", "tool_calls", "function_call", "end_turn", "stop_sequence", "tool_use", "pause_turn"]);

// What can be said

/** @param {unknown} content  @param {string | null} [event]  @returns {Said | undefined} */
function adds(content, event = null) {
  return typeof content === "string" && content !== "" ? { content, event } : undefined;
}

/** @param {string | null} event  @param {string} [content]  @returns {Said} */
const begins = (event, content = "") => ({ content, event, begins: true });

/** @param {unknown} name  @param {unknown} [input]  its text, or its value  @returns {Said} */
function calls(name, input) {
  const text = typeof input === "string" ? input : (JSON.stringify(input) ?? "");
  return begins(CALL, `${name ?? "?"} ${text}`);
}

/** Why it stopped, where that is not the end of what there was to say. @param {unknown} reason */
const stopped = (reason) => (ORDINARY.has(String(reason)) ? undefined : adds(reason, "stopped early"));

// The dialects

/** @type {Dialect} */
function chat({ choices }) {
  const choice = choices?.find((/** @type {any} */ { index = 0 }) => index === 0); // of several answers the first
  if (!choice) return [];
  const { delta = {}, text, finish_reason } = choice;
  return [
    adds(delta.reasoning_content ?? delta.reasoning, REASONING),
    adds(delta.content ?? text),
    adds(delta.refusal, "refusal"),
    ...(delta.tool_calls ?? []).map((/** @type {any} */ { function: called = {} }) =>
      called.name ? calls(called.name, called.arguments ?? "") : adds(called.arguments, CALL),
    ),
    stopped(finish_reason),
  ];
}

/** @type {Dialect} */
function responses({ delta, part, item, response }, kind) {
  switch (kind) {
    case "response.content_part.added":
      return part.type === "output_text" ? [begins(null)] : [];
    case "response.output_text.delta":
      return [adds(delta)];
    case "response.refusal.delta":
      return [adds(delta, "refusal")];
    case "response.reasoning_summary_part.added":
      return [begins(REASONING)];
    case "response.reasoning_summary_text.delta":
    case "response.reasoning_text.delta":
      return [adds(delta, REASONING)];
    case "response.output_item.done":
      return item.type.endsWith("_call") ? [calls(item.name ?? item.type, item.arguments ?? item.action ?? "")] : [];
    case "response.incomplete":
      return [stopped(response.incomplete_details?.reason)];
    default:
      return [];
  }
}

/** @type {Dialect} */
function anthropic({ delta, content_block }, kind) {
  switch (kind) {
    case "content_block_start":
      if (content_block.type === "text") return [begins(null, content_block.text)];
      if (content_block.type === "thinking") return [begins(REASONING, content_block.thinking)];
      return content_block.type.endsWith("tool_use") ? [calls(content_block.name, "")] : [];
    case "content_block_delta":
      return [adds(delta.text), adds(delta.thinking, REASONING), adds(delta.partial_json, CALL)];
    case "message_delta":
      return [stopped(delta.stop_reason)];
    default:
      return [];
  }
}

/** @type {Dialect} */
function aiSdk({ delta, toolName, input, errorText }, kind) {
  switch (kind) {
    case "text-start":
      return [begins(null)];
    case "text-delta":
      return [adds(delta)];
    case "reasoning-start":
      return [begins(REASONING)];
    case "reasoning-delta":
      return [adds(delta, REASONING)];
    case "tool-input-available":
      return [calls(toolName, input)];
    case "tool-input-error":
    case "tool-output-error":
      return [begins("tool error", errorText)];
    default:
      return [];
  }
}

/** @type {Dialect} */
function agUi({ delta, toolCallName }, kind) {
  switch (kind) {
    case "TEXT_MESSAGE_START":
      return [begins(null)];
    case "TEXT_MESSAGE_CONTENT":
    case "TEXT_MESSAGE_CHUNK":
      return [adds(delta)];
    case "THINKING_TEXT_MESSAGE_CONTENT":
    case "REASONING_MESSAGE_CONTENT":
      return [adds(delta, REASONING)];
    case "TOOL_CALL_START":
      return [calls(toolCallName, "")];
    case "TOOL_CALL_ARGS":
      return [adds(delta, CALL)];
    case "TOOL_CALL_CHUNK":
      return [toolCallName ? calls(toolCallName, delta ?? "") : adds(delta, CALL)];
    default:
      return [];
  }
}

/** Every stream mode tells of the same messages, in pieces or whole, and again and again. @type {Dialect} */
function langGraph(data, kind, memory) {
  const [mode] = kind.split("|"); // after it is the subgraph
  switch (mode) {
    case "messages": // one, or a piece of one, and what is known of it
      return data[0].type.endsWith("Chunk") ? ofPiece(data[0], memory) : ofMessages(data[0], memory);
    case "messages/partial":
      return ofMessages(data, memory, false);
    case "messages/complete":
      return ofMessages(data, memory);
    case "values":
      return ofMessages(data.messages?.slice(-1), memory); // before it are those of the turns before
    case "updates":
      return Object.values(data).flatMap((update) => ofMessages(update?.messages, memory));
    default:
      return [];
  }
}

/** @param {any} message  the next piece of it  @param {Memory} memory */
function ofPiece({ type, id = "", content, tool_call_chunks = [] }, memory) {
  if (!type.startsWith("AI")) return [];
  for (const call of tool_call_chunks) if (call.id) memory.calls.push(call.id);
  const calling = tool_call_chunks.map((/** @type {any} */ { name, args }) =>
    name ? calls(name, args ?? "") : adds(args, CALL),
  );
  return [saysMore(id, textOf(content), memory), ...calling];
}

/** @param {any} messages  each as it is by now, or one  @param {Memory} memory  @param {boolean} areWhole */
function ofMessages(messages, memory, areWhole = true) {
  return [messages ?? []].flat().flatMap(({ type, id = "", content, tool_calls = [] }) => {
    if (!/^ai/i.test(type)) return [];
    const [text, had] = [textOf(content), memory.texts[id] ?? ""];
    const isSaid = text === had || text === memory.texts[memory.id ?? ""]; // perhaps under another id
    if (!isSaid && !text.startsWith(had)) memory.id = undefined; // it was said otherwise: all of it again
    const more = isSaid ? undefined : saysMore(id, text.startsWith(had) ? text.slice(had.length) : text, memory);
    if (!isSaid) memory.texts[id] = text;
    const fresh = tool_calls.filter((/** @type {any} */ call) => areWhole && !memory.calls.includes(call.id));
    memory.calls.push(...fresh.map((/** @type {any} */ call) => call.id));
    return [more, ...fresh.map((/** @type {any} */ { name, args }) => calls(name, args))];
  });
}

/** @param {string} id  of the message that says it  @param {string} more  @param {Memory} memory */
function saysMore(id, more, memory) {
  if (more === "") return undefined;
  const isNext = memory.id === id;
  memory.id = id;
  memory.texts[id] = (memory.texts[id] ?? "") + more;
  return isNext ? adds(more) : begins(null, more);
}

/** @param {any} content  text, or parts of which some have text */
const textOf = (content) => [content].flat().map((part) => (typeof part === "string" ? part : (part?.text ?? ""))).join("");

/** @type {Record<string, {name: string, read?: Dialect}>} */
const DIALECTS = {
  "openai-chat": { name: "Chat Completions", read: chat },
  "openai-responses": { name: "Responses", read: responses },
  "anthropic-messages": { name: "Messages", read: anthropic },
  langgraph: { name: "LangGraph", read: langGraph },
  "ai-sdk": { name: "AI SDK", read: aiSdk },
  "ag-ui": { name: "AG-UI", read: agUi },
  sse: { name: "SSE" }, // of which nothing is known
};

// A message

/** What a tab keeps of it. @typedef {{mark: string, cursor: string, memory: Memory}} KeptRelayed */

/** Whether it is the first chunk of a relayed message. @param {Chunk} chunk */
export const isMark = ({ event }) => event !== null && MARK.test(event);

/** A relayed message, as far as it was read. */
export class Relayed {
  cursor = ""; // of the last event; what is said does not say where in the events that is
  /** @type {Memory} */ memory = { texts: {}, calls: [] };
  #dialect;

  /** @param {string} mark  the event of its first chunk */
  constructor(mark) {
    this.mark = mark;
    const [, upstream, dialect] = MARK.exec(mark) ?? [];
    this.#dialect = Object.hasOwn(DIALECTS, dialect) ? DIALECTS[dialect] : { name: dialect };
    /** Whose it is, for people. */
    this.label = `${upstream} · ${this.#dialect.name}`;
  }

  /** @param {KeptRelayed} kept */
  static from({ mark, cursor, memory }) {
    return Object.assign(new Relayed(mark), { cursor, memory });
  }

  /** @returns {KeptRelayed} */
  get kept() {
    const { mark, cursor, memory } = this;
    return { mark, cursor, memory };
  }

  /** What the next event adds. @param {Chunk} chunk  @returns {Chunk[]} */
  read(chunk) {
    const { memory } = this;
    const pieces = [];
    for (const { content, event, begins = false } of this.#said(chunk)) {
      memory.isApart ||= begins;
      if (content === "") continue;
      const isBreak = memory.isApart && memory.last === event;
      pieces.push({ content: `${isBreak ? (event === null ? "\n\n" : "\n") : ""}${content}`, event });
      [memory.last, memory.isApart] = [event, false];
    }
    return pieces;
  }

  /** @param {Chunk} chunk  @returns {Said[]} */
  #said({ event, content }) {
    const { read } = this.#dialect;
    if (!read) return [{ content: `${content}\n`, event: null }];
    if (content === "[DONE]") return [];
    try {
      const data = JSON.parse(content) ?? {};
      const kind = event === null || event === "message" ? String(data.type ?? "") : event;
      return read(data, kind, this.memory).filter((said) => said !== undefined);
    } catch {
      return [begins(event ?? "data", content)]; // no JSON, or of another shape: shown as it is
    }
  }
}
