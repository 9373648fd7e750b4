/** What the events of other people's streams say in words, as far as they are of a dialect that is known here. */

/**
 * `words` go on with the text, a `note` stands beside it. An event that says neither is there all the same.
 *
 * @typedef {{words?: string, note?: string}} Said
 */

export const RELAYED = "relayed:"; // begins the event of a relayed message's first chunk

/** @type {Record<string, string>} */
const NAMES = {
  "openai-chat": "Chat Completions",
  "openai-responses": "Responses",
  "anthropic-messages": "Messages",
  langgraph: "LangGraph",
  "ai-sdk": "AI SDK",
  "ag-ui": "AG-UI",
  sse: "server-sent events",
};

/** @type {Record<string, (data: any) => Said>} */
const KINDS = {
  "response.output_text.delta": ({ delta }) => ({ words: delta }),
  "response.refusal.delta": ({ delta }) => ({ words: delta }),
  "response.output_item.added": ({ item }) => (item?.name ? { note: `calls ${item.name}` } : {}),
  "response.failed": ({ response }) => ({ note: response?.error?.message }),
  content_block_start: ({ content_block: block }) => (block?.name ? { note: `calls ${block.name}` } : { words: block?.text }),
  content_block_delta: ({ delta }) => ({ words: delta?.text }),
  "text-delta": ({ delta }) => ({ words: delta }),
  "tool-input-available": ({ toolName }) => ({ note: `calls ${toolName}` }),
  TEXT_MESSAGE_CONTENT: ({ delta }) => ({ words: delta }),
  TEXT_MESSAGE_CHUNK: ({ delta }) => ({ words: delta }),
  TOOL_CALL_START: ({ toolCallName }) => ({ note: `calls ${toolCallName}` }),
  RUN_ERROR: ({ message }) => ({ note: message }),
  error: ({ error, errorText, message }) => ({ note: errorText ?? error?.message ?? message ?? error }),
};

/** Whence a message comes, for people. @param {string} mark  the event of its first chunk */
export function originOf(mark) {
  const [, upstream, dialect] = mark.split(":");
  return { dialect, label: `${upstream} · ${NAMES[dialect] ?? dialect}` };
}

/** What one stream says, event by event. */
export class Words {
  #partial = ""; // of LangGraph's message, which comes whole each time, and longer

  /** @param {string | null} [dialect]  none: what is of no dialect that is known here stays as it is */
  constructor(dialect = null) {
    this.dialect = dialect;
  }

  /**
   * What an event says; undefined, if nothing is known of it.
   *
   * @param {string | null} event  its name
   * @param {string} content  its data
   * @returns {Said | undefined}
   */
  of(event, content) {
    if (this.dialect === "sse") return { words: `${content}\n` };
    if (content === "[DONE]") return {};
    let data;
    try {
      data = JSON.parse(content);
    } catch {
      return undefined;
    }
    const said = this.#saidBy(event, data);
    return said ?? (this.dialect === null ? undefined : {});
  }

  /** @param {string | null} event  @param {any} data  @returns {Said | undefined} */
  #saidBy(event, data) {
    if (Array.isArray(data)) return event?.startsWith("messages") ? this.#ofLangGraph(event, data[0]) : undefined;
    if (typeof data !== "object" || data === null) return undefined;
    if (Array.isArray(data.choices)) return ofChat(data.choices);
    const kind = typeof data.type === "string" ? data.type : data.error ? "error" : (event ?? "");
    return Object.hasOwn(KINDS, kind) ? KINDS[kind](data) : undefined;
  }

  /** @param {string} event  @param {any} message  @returns {Said} */
  #ofLangGraph(event, message) {
    const { content = "" } = message ?? {};
    const text = typeof content === "string" ? content : content.map((/** @type {any} */ part) => part.text ?? "").join("");
    if (event === "messages") return { words: text };
    const words = text.startsWith(this.#partial) ? text.slice(this.#partial.length) : text;
    this.#partial = event === "messages/complete" ? "" : text;
    return { words };
  }
}

/** @param {any[]} choices  @returns {Said} */
function ofChat(choices) {
  const calls = choices.flatMap(({ delta }) => delta?.tool_calls ?? []).map((call) => call.function?.name);
  const names = calls.filter(Boolean);
  if (names.length > 0) return { note: `calls ${names.join(", ")}` };
  return { words: choices.map(({ delta, text }) => delta?.content ?? text ?? "").join("") };
}
