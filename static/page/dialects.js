/**
 * Relayed messages: their upstream, and their text. Their events are in the upstream's own dialect, usually JSON.
 * For each dialect a function turns an event into text, or into a remark on something else, like a tool call. It
 * ignores the other events; the Events view shows all of them.
 */

/**
 * Text if `event` is null, else a remark of that kind. `begins` puts a break before the content, if the previous
 * content was of the same kind. Without content, the break comes before the next content.
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

// Text and remarks

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

/** Return a remark if the answer stopped before its end. @param {unknown} reason */
const stopped = (reason) => (ORDINARY.has(String(reason)) ? undefined : adds(reason, "stopped early"));

// The dialects

/** @type {Dialect} */
function chat({ choices }) {
  const choice = choices?.find((/** @type {any} */ { index = 0 }) => index === 0); // the first of several answers
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

/** LangGraph sends the same messages in several stream modes, in pieces or whole, and repeatedly. @type {Dialect} */
function langGraph(data, kind, memory) {
  const [mode] = kind.split("|"); // the subgraph follows
  switch (mode) {
    case "messages": // a message or a piece of one, and its metadata
      return data[0].type.endsWith("Chunk") ? ofPiece(data[0], memory) : ofMessages(data[0], memory);
    case "messages/partial":
      return ofMessages(data, memory, false);
    case "messages/complete":
      return ofMessages(data, memory);
    case "values":
      return ofMessages(data.messages?.slice(-1), memory); // the others are from earlier turns
    case "updates":
      return Object.values(data).flatMap((update) => ofMessages(update?.messages, memory));
    default:
      return [];
  }
}

/** @param {any} message  its next piece  @param {Memory} memory */
function ofPiece({ type, id = "", content, tool_call_chunks = [] }, memory) {
  if (!type.startsWith("AI")) return [];
  for (const call of tool_call_chunks) if (call.id) memory.calls.push(call.id);
  const calling = tool_call_chunks.map((/** @type {any} */ { name, args }) =>
    name ? calls(name, args ?? "") : adds(args, CALL),
  );
  return [saysMore(id, textOf(content), memory), ...calling];
}

/** @param {any} messages  one or several, with all text so far  @param {Memory} memory  @param {boolean} areWhole */
function ofMessages(messages, memory, areWhole = true) {
  return [messages ?? []].flat().flatMap(({ type, id = "", content, tool_calls = [] }) => {
    if (!/^ai/i.test(type)) return [];
    const [text, had] = [textOf(content), memory.texts[id] ?? ""];
    const isSaid = text === had || text === memory.texts[memory.id ?? ""]; // perhaps under another id
    if (!isSaid && !text.startsWith(had)) memory.id = undefined; // the text was replaced: show all of it again
    const more = isSaid ? undefined : saysMore(id, text.startsWith(had) ? text.slice(had.length) : text, memory);
    if (!isSaid) memory.texts[id] = text;
    const fresh = tool_calls.filter((/** @type {any} */ call) => areWhole && !memory.calls.includes(call.id));
    memory.calls.push(...fresh.map((/** @type {any} */ call) => call.id));
    return [more, ...fresh.map((/** @type {any} */ { name, args }) => calls(name, args))];
  });
}

/** @param {string} id  of the message  @param {string} more  text  @param {Memory} memory */
function saysMore(id, more, memory) {
  if (more === "") return undefined;
  const isNext = memory.id === id;
  memory.id = id;
  memory.texts[id] = (memory.texts[id] ?? "") + more;
  return isNext ? adds(more) : begins(null, more);
}

/** @param {any} content  a text, or parts that may have text */
const textOf = (content) => [content].flat().map((part) => (typeof part === "string" ? part : (part?.text ?? ""))).join("");

/** @type {Record<string, {name: string, read?: Dialect}>} */
const DIALECTS = {
  "openai-chat": { name: "Chat Completions", read: chat },
  "openai-responses": { name: "Responses", read: responses },
  "anthropic-messages": { name: "Messages", read: anthropic },
  langgraph: { name: "LangGraph", read: langGraph },
  "ai-sdk": { name: "AI SDK", read: aiSdk },
  "ag-ui": { name: "AG-UI", read: agUi },
  sse: { name: "SSE" }, // an unknown dialect
};

// A message

/** What a tab keeps of a message. @typedef {{mark: string, cursor: string, memory: Memory}} KeptRelayed */

/** True for the first chunk of a relayed message. @param {Chunk} chunk */
export const isMark = ({ event }) => event !== null && MARK.test(event);

/** The reading of a relayed message. */
export class Relayed {
  cursor = ""; // of the last event: the text alone does not tell the place among the events
  /** @type {Memory} */ memory = { texts: {}, calls: [] };
  #dialect;

  /** @param {string} mark  the event of its first chunk */
  constructor(mark) {
    this.mark = mark;
    const [, upstream, dialect] = MARK.exec(mark) ?? [];
    this.#dialect = Object.hasOwn(DIALECTS, dialect) ? DIALECTS[dialect] : { name: dialect };
    /** The upstream and the dialect, for people. */
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

  /** Return the pieces that the next event adds. @param {Chunk} chunk  @returns {Chunk[]} */
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
      return [begins(event ?? "data", content)]; // not JSON, or of an unexpected shape: shown as it is
    }
  }
}
