// @ts-check
/// <reference path="./resume-stream.d.ts" />
/**
 * The client of resume-stream, for browsers and Node: one ES module, no dependency, no build.
 *
 *     import { resumeStream, store } from "/static/resume-stream.js";
 *
 *     await store({ threadId: "t1", messageId: "run-1", source: tokens }); // an agent's tokens, as they arrive
 *
 *     let text = sessionStorage.getItem("text") ?? "";
 *     for await (const item of resumeStream({ threadId: "t1", messageId: "run-1", knownContent: text })) {
 *       if (item.type === "reset") text = "";
 *       else if (item.type === "chunk") text += item.content;
 *       else console.log("ended:", item.type, item.status); // complete or gone
 *     }
 *
 * The types, and what each option does, are in resume-stream.d.ts.
 */

/** @typedef {import("./resume-stream.js").StreamItem} StreamItem */
/** @typedef {import("./resume-stream.js").Appended} Appended */
/** @typedef {import("./resume-stream.js").ChunkInput} ChunkInput */
/** @typedef {import("./resume-stream.js").StoreOptions} StoreOptions */
/** @typedef {import("./resume-stream.js").ServiceOptions} ServiceOptions */
/** @typedef {import("./resume-stream.js").ReadOptions} ReadOptions */
/** @typedef {import("./resume-stream.js").ConnectionEvent} ConnectionEvent */
/** @typedef {Record<string, any> & {type: string}} Frame  one event of the service, over SSE or WebSocket */

const MAX_DELAY = 30_000; // ms, the longest wait before a reconnect
const STALL_TIMEOUT = 45_000; // ms without a byte (three heartbeats) after which a connection counts as dead
const QUIET = 20_000; // ms without a byte after which a tab that wakes up replaces its connection
const MAX_QUEUE = 1000; // items that may wait for a slow consumer before its WebSocket subscription pauses
const MAX_BATCH = 1024 ** 2; // bytes of text in one append: even the longest JSON for it is below the service's max_body
const WATCH_AFTER = 300; // ms without a chunk from the source, after which the producer watches its message
const DAY = 86_400_000; // ms, the longest idle timeout that the service accepts
const ABORT_TIMEOUT = 5000; // ms for an attempt to abort a message that cannot be stored further
const UTF8 = new TextEncoder();
const SIGNALS = new Set(["complete", "timeout", "reset", "gone", "error"]);

// -------------------------------------------------------------------------------------------------
// Errors
// -------------------------------------------------------------------------------------------------

/** A refusal by the service (`status` is the HTTP status), or a failed connection (`status` is 0). */
export class ResumeStreamError extends Error {
  /**
   * @param {{status?: number, title?: string, detail?: string, [member: string]: any}} problem  RFC 9457
   * @param {{retryAfter?: number, retryable?: boolean, cause?: unknown}} [more]  retryAfter in ms
   */
  constructor(problem, { retryAfter = 0, retryable, cause } = {}) {
    super(problem.detail || problem.title || `The service answered ${problem.status}.`, { cause });
    this.name = "ResumeStreamError";
    this.status = problem.status ?? 0;
    this.title = problem.title ?? "";
    this.problem = problem;
    this.retryAfter = retryAfter;
    this.retryable = retryable ?? (this.status >= 500 || [408, 425, 429].includes(this.status));
  }
}

/** @param {unknown} cause  @param {string} [detail] */
function connectionLost(cause, detail = "The service cannot be reached.") {
  return new ResumeStreamError({ status: 0, title: "Connection lost", detail }, { retryable: true, cause });
}

/** @param {Response} response */
async function problemOf(response) {
  const body = await response.json().catch(() => null);
  const problem = body !== null && typeof body === "object" && !Array.isArray(body) ? body : {};
  const after = response.headers.get("Retry-After") ?? "";
  const wait = /^\d+$/.test(after) ? Number(after) * 1000 : Date.parse(after) - Date.now();
  return new ResumeStreamError(
    { title: response.statusText, ...problem, status: response.status },
    { retryAfter: Math.max(wait, 0) || 0 },
  );
}

/** @param {boolean} condition  @param {string} message */
function check(condition, message) {
  if (!condition) throw new TypeError(message);
}

/** @param {unknown} name  @param {string} what */
function checkId(name, what) {
  check(typeof name === "string" && name !== "", `${what} has to be a string that is not empty.`);
}

// -------------------------------------------------------------------------------------------------
// Requests
// -------------------------------------------------------------------------------------------------

/** The service at `baseUrl`, with the token and the `fetch` for it. */
class Service {
  /** @param {ServiceOptions} options */
  constructor({ baseUrl = globalThis.location?.origin, token, fetch = globalThis.fetch }) {
    check(baseUrl !== undefined, "baseUrl is missing; outside of a page there is no default for it.");
    check(
      token === undefined || token === null || ["string", "function"].includes(typeof token),
      "token has to be a string, or a function that returns one (or a promise of one).",
    );
    this.base = new URL(String(baseUrl).replace(/\/*$/, "/"), globalThis.document?.baseURI);
    check(/^https?:$/.test(this.base.protocol), `baseUrl has to be http or https, not ${this.base.protocol}`);
    this.canRenewToken = typeof token === "function";
    this.token = token;
    this.fetchWith = fetch;
  }

  /** @returns {Promise<string>} the token, or "" if there is none */
  async currentToken() {
    const token = (typeof this.token === "function" ? await this.token() : this.token) ?? "";
    check(typeof token === "string" && /^[\x21-\x7e]*$/.test(token), "token has a character that no token can have.");
    return token;
  }

  /** @param {(string | [string, string])[]} path  @param {Record<string, any>} [query] */
  url(path, query = {}) {
    const url = new URL(["api", ...path.map((part) => encodeURIComponent(String(part)))].join("/"), this.base);
    for (const [name, value] of Object.entries(query)) {
      if (value !== undefined && value !== null) url.searchParams.set(name, String(value));
    }
    return url;
  }

  /**
   * @param {string} method
   * @param {URL} url
   * @param {{body?: any, accept?: string, signal?: AbortSignal}} [options]
   * @returns {Promise<Response>}
   */
  async fetch(method, url, { body, accept = "application/json", signal } = {}) {
    /** @type {Record<string, string>} */
    const headers = { Accept: accept };
    if (body !== undefined) headers["Content-Type"] = "application/json";
    const token = await this.currentToken();
    if (token) headers.Authorization = `Bearer ${token}`;
    signal?.throwIfAborted();
    const sent = body === undefined ? undefined : JSON.stringify(body);
    const { fetchWith } = this; // browsers refuse `fetch` as a method of another object
    try {
      return await fetchWith(url, { method, headers, body: sent, signal, cache: "no-store" });
    } catch (error) {
      signal?.throwIfAborted();
      throw connectionLost(error);
    }
  }

  /**
   * @param {string} method
   * @param {URL} url
   * @param {{body?: any, signal?: AbortSignal}} [options]
   * @returns {Promise<any>} the JSON of the answer; undefined for a 204
   */
  async call(method, url, options) {
    return (await this.ask(method, url, options)).body;
  }

  /**
   * @param {string} method
   * @param {URL} url
   * @param {{body?: any, signal?: AbortSignal}} [options]
   * @returns {Promise<{status: number, body: any}>}
   */
  async ask(method, url, options) {
    const response = await this.fetch(method, url, options);
    const { status } = response;
    if (!response.ok) throw await problemOf(response);
    if (status === 204) return { status, body: undefined };
    try {
      return { status, body: await response.json() };
    } catch (error) {
      options?.signal?.throwIfAborted();
      throw connectionLost(error, "The connection was lost during the answer.");
    }
  }
}

/** @type {typeof import("./resume-stream.js").getThreadStatus} */
export async function getThreadStatus({ threadId, signal, ...service }) {
  checkId(threadId, "threadId");
  const to = new Service(service);
  return to.call("GET", to.url(["threads", threadId]), { signal }).catch(unlessMissing({ exists: false }));
}

/** @type {typeof import("./resume-stream.js").getAccumulatedContent} */
export async function getAccumulatedContent({ threadId, messageId, signal, ...service }) {
  checkId(threadId, "threadId");
  const to = new Service(service);
  return to.call("GET", to.url(["threads", threadId, "content"], { message_id: messageId }), { signal });
}

/** @type {typeof import("./resume-stream.js").listThreads} */
export async function listThreads({ status, limit, cursor, signal, ...service } = {}) {
  const to = new Service(service);
  return to.call("GET", to.url(["threads"], { status, limit, cursor }), { signal });
}

/** @type {typeof import("./resume-stream.js").abortMessage} */
export async function abortMessage({ threadId, messageId, reason, signal, ...service }) {
  checkId(threadId, "threadId");
  checkId(messageId, "messageId");
  const to = new Service(service);
  const url = to.url(["threads", threadId, "messages", messageId, "abort"]);
  return to.call("POST", url, { body: { reason: reason ?? null }, signal });
}

/** @type {typeof import("./resume-stream.js").clearThread} */
export async function clearThread({ threadId, signal, ...service }) {
  checkId(threadId, "threadId");
  const to = new Service(service);
  const cleared = to.call("DELETE", to.url(["threads", threadId]), { signal }).then(() => true);
  return cleared.catch(unlessMissing(false));
}

/** @type {typeof import("./resume-stream.js").appendChunks} */
export async function appendChunks({ threadId, messageId, chunks, index, complete, signal, onConnection, ...service }) {
  checkId(threadId, "threadId");
  checkId(messageId, "messageId");
  checkChunks(chunks);
  const to = new Service(service);
  const url = to.url(["threads", threadId, "messages", messageId, "chunks"], { index, complete });
  const backoff = new Backoff(onConnection);
  for (;;) {
    try {
      const appended = await to.call("POST", url, { body: chunks, signal });
      backoff.connected();
      return appended;
    } catch (error) {
      if (index === undefined || !(error instanceof ResumeStreamError) || !error.retryable) throw error;
      await backoff.wait(signal, error);
    }
  }
}

/** @param {any} chunks */
function checkChunks(chunks) {
  const isChunk = (/** @type {any} */ chunk) => typeof chunk?.content === "string";
  check(Array.isArray(chunks) && chunks.every(isChunk), 'chunks has to be an array of {content: "text", event?}.');
}

/** Make a handler for rejections that turns a 404 into `value`. @param {any} value */
function unlessMissing(value) {
  return (/** @type {unknown} */ error) => {
    if (error instanceof ResumeStreamError && error.status === 404) return value;
    throw error;
  };
}

// -------------------------------------------------------------------------------------------------
// Waiting
// -------------------------------------------------------------------------------------------------

/** Exponential backoff with full jitter, on top of the delay that the service asks for. */
class Backoff {
  /** @param {((event: ConnectionEvent) => void) | undefined} onConnection */
  constructor(onConnection) {
    this.base = 1000;
    this.attempt = 0;
    this.lost = false;
    this.onConnection = onConnection;
  }

  connected() {
    this.lost = false;
    this.onConnection?.({ connected: true });
  }

  /** Begin with the shortest delay again. */
  reset() {
    this.attempt = 0;
  }

  /** @param {AbortSignal | undefined} signal  @param {ResumeStreamError} [error] */
  async wait(signal, error) {
    const least = error?.retryAfter ?? 0;
    const delay = least + Math.random() * Math.min(MAX_DELAY, this.base * 2 ** this.attempt++);
    this.lost = true;
    this.onConnection?.({ connected: false, attempt: this.attempt, delay, error });
    await sleep(delay, signal, least === 0);
  }
}

/**
 * @param {number} delay
 * @param {AbortSignal | undefined} signal
 * @param {boolean} wakeable  whether it ends early when the network or the tab comes back
 * @returns {Promise<void>}
 */
function sleep(delay, signal, wakeable) {
  return new Promise((resolve, reject) => {
    const end = () => {
      clearTimeout(timer);
      unwatch();
      signal?.removeEventListener("abort", end);
      if (signal?.aborted) reject(signal.reason);
      else resolve();
    };
    const timer = setTimeout(end, delay);
    const unwatch = wakeable ? onWake(end) : () => {};
    signal?.addEventListener("abort", end);
    if (signal?.aborted) end();
  });
}

/**
 * Call back when the network comes back, and when the tab becomes visible again (like a reopened laptop).
 *
 * @param {(networkChanged: boolean) => void} callback
 * @returns {() => void} removes the listeners
 */
function onWake(callback) {
  const { document } = globalThis;
  const online = () => callback(true);
  const visible = () => document.visibilityState === "visible" && callback(false);
  globalThis.addEventListener?.("online", online);
  document?.addEventListener("visibilitychange", visible);
  return () => {
    globalThis.removeEventListener?.("online", online);
    document?.removeEventListener("visibilitychange", visible);
  };
}

// -------------------------------------------------------------------------------------------------
// Reading
// -------------------------------------------------------------------------------------------------

/** @param {ReadOptions} options */
function checkReading({ threadId, messageId, knownContent, after, follow, wait, idleTimeout, signal }) {
  checkId(threadId, "threadId");
  if (messageId !== undefined) checkId(messageId, "messageId");
  check(knownContent === undefined || typeof knownContent === "string", "knownContent has to be a string.");
  check(knownContent === undefined || messageId !== undefined, "knownContent is the text of one message: give messageId.");
  check(knownContent === undefined || after === undefined, "Give knownContent or after, not both.");
  check(after === undefined || /^(\d+-)?\d+$/.test(String(after)), `after=${after} is not the cursor of an item.`);
  check(!follow || messageId === undefined, "follow waits for the next message of a thread: leave messageId out.");
  check(!wait || messageId !== undefined, "wait is for one message: give messageId, or use follow for a thread.");
  check(idleTimeout === undefined || idleTimeout >= 0, "idleTimeout is a number of milliseconds, from 0.");
  check(signal === undefined || signal instanceof AbortSignal, "signal has to be an AbortSignal.");
}

/** A reader's place in a thread or message. It decides which items the reader gets: each once, and in order. */
class Place {
  /** @type {string | null} */ cursor = null;
  /** @type {string | undefined} */ generation = undefined;
  seq = 0;

  /** @param {ReadOptions} options */
  constructor({ threadId, messageId, knownContent, after, follow = false, wait = false, idleTimeout }) {
    this.threadId = threadId;
    this.messageId = messageId;
    this.follow = follow;
    this.idleTimeout = idleTimeout;
    this.wait = wait;
    this.known = wait ? knownContent || undefined : knownContent; // only a request without text can wait
    this.move(after === undefined ? null : String(after));
    this.hasPast = after !== undefined || Boolean(knownContent);
    this.ended = false;
  }

  /** @param {string | null} cursor  `<generation>-<seq>`, a bare seq, or null for the start */
  move(cursor) {
    const parts = (cursor ?? "0").split("-");
    this.cursor = cursor;
    this.seq = Number(parts.at(-1));
    this.generation = parts.length > 1 ? parts[0] : undefined;
  }

  /** The query for the rest, with the service's own names. */
  query() {
    return {
      after: this.cursor ?? undefined,
      known_content: this.cursor === null ? this.known : undefined,
      follow: this.follow || (this.wait && !this.hasPast) || undefined,
      idle_timeout: this.idleTimeout === undefined ? undefined : `${Math.round(this.idleTimeout)}ms`,
    };
  }

  /**
   * Return the items for a frame: usually one, none if the reader has it already. Throw what an error frame reports.
   *
   * @param {Frame} frame
   * @returns {StreamItem[]}
   */
  take(frame) {
    switch (frame.type) {
      case "chunk":
      case "complete":
        return frame.exists === false ? this.missing() : this.entry(frame);
      case "reset":
        return [this.reset()];
      case "gone":
        if (this.follow) return [this.reset()];
        this.ended = true;
        return [{ type: "gone" }];
      case "timeout":
        if (this.idleTimeout === undefined) return [];
        this.ended = true;
        return [{ type: "timeout" }];
      case "error":
        if (frame.status === 404) return this.missing(new ResumeStreamError(frame));
        throw new ResumeStreamError(frame, { retryAfter: (Number(frame.retryAfter) || 0) * 1000 });
      default:
        return []; // only a newer service sends others
    }
  }

  /** @param {Frame} frame  @returns {StreamItem[]} */
  entry({ type, cursor, content, timestamp, messageId, seq, event, status, reason }) {
    const generation = String(cursor).split("-")[0];
    /** @type {StreamItem[]} */
    const items = [];
    if (this.generation !== undefined && this.generation !== generation) items.push(this.reset());
    else if (seq <= this.seq) return items;
    this.move(cursor);
    this.hasPast = true;
    if (type === "chunk") {
      items.push({ type, content, timestamp, messageId, seq, cursor, event: event ?? null });
    } else {
      items.push({ type: "complete", messageId, status, reason, seq, cursor });
      this.ended = this.messageId !== undefined;
    }
    return items;
  }

  /** @returns {StreamItem} */
  reset() {
    this.move(null);
    this.known = undefined;
    this.hasPast = true;
    return { type: "reset" };
  }

  /**
   * End with a `gone`, or throw a 404 if the reader never had anything.
   *
   * @param {ResumeStreamError} [error]
   * @returns {StreamItem[]}
   */
  missing(error) {
    const detail = `There is no message '${this.messageId}' in a thread '${this.threadId}'.`;
    if (!this.hasPast) throw error ?? new ResumeStreamError({ status: 404, title: "Not found", detail, exists: false });
    this.ended = true;
    return [{ type: "gone" }];
  }
}

/**
 * Make an async iterable whose iterators stop at once on `return()` and on `signal`, even while they wait.
 *
 * @param {AbortSignal | undefined} outer
 * @param {(signal: AbortSignal) => AsyncGenerator<StreamItem, void>} begin
 */
function iterable(outer, begin) {
  return {
    [Symbol.asyncIterator]() {
      const controller = new AbortController();
      const { signal } = controller;
      const abort = () => controller.abort(outer?.reason);
      if (outer?.aborted) abort();
      else outer?.addEventListener("abort", abort);
      const over = () => outer?.removeEventListener("abort", abort);
      const generator = begin(signal);
      /** @type {AsyncIterableIterator<StreamItem>} */
      const iterator = {
        async next() {
          try {
            const result = await generator.next();
            if (!result.done) outer?.throwIfAborted(); // no item comes after an abort
            if (result.done) over();
            return result;
          } catch (error) {
            over();
            throw error;
          }
        },
        async return() {
          over();
          controller.abort();
          await generator.return().catch(() => {});
          return { done: true, value: undefined };
        },
        [Symbol.asyncIterator]: () => iterator,
      };
      return iterator;
    },
  };
}

// -------------------------------------------------------------------------------------------------
// Reading over fetch
// -------------------------------------------------------------------------------------------------

/** @type {typeof import("./resume-stream.js").resumeStream} */
export function resumeStream(options) {
  checkReading(options);
  const service = new Service(options);
  return iterable(options.signal, (signal) => readOverFetch(service, options, signal));
}

/**
 * @param {Service} service
 * @param {ReadOptions & {onConnection?: (event: ConnectionEvent) => void}} options
 * @param {AbortSignal} signal
 * @returns {AsyncGenerator<StreamItem, void>}
 */
async function* readOverFetch(service, options, signal) {
  const place = new Place(options);
  const backoff = new Backoff(options.onConnection);
  let refused = false; // true if the last answer was a 401
  while (!place.ended) {
    let error, last;
    try {
      for await (const frame of sseFrames(service, place, backoff, signal)) {
        refused = false;
        last = frame.type;
        for (const item of place.take(frame)) {
          backoff.reset();
          yield item;
        }
        if (place.ended) return;
      }
    } catch (caught) {
      signal.throwIfAborted();
      if (!(caught instanceof ResumeStreamError)) throw caught;
      error = caught;
      if (error.status === 404) yield* place.missing(error);
      else if (error.status === 401 && service.canRenewToken && !refused) refused = true;
      else if (!error.retryable) throw error;
    }
    if (place.ended) return;
    // A thread's stream closes after the end of its last active message. Ask again at once: a 204 confirms that.
    if (last === "complete" && !error) continue;
    await backoff.wait(signal, error);
  }
}

/**
 * Yield the frames of one connection until it ends. Set `place.ended` if nothing more will ever come.
 *
 * @param {Service} service
 * @param {Place} place
 * @param {Backoff} backoff
 * @param {AbortSignal} outer
 * @returns {AsyncGenerator<Frame, void>}
 */
async function* sseFrames(service, place, backoff, outer) {
  const connection = new AbortController();
  const { signal } = connection;
  const abort = () => connection.abort(connectionLost(undefined, "The connection went quiet."));
  outer.throwIfAborted();
  outer.addEventListener("abort", abort);
  let lastByte = Date.now();
  const isQuiet = (/** @type {number} */ ms) => Date.now() - lastByte > ms;
  const watchdog = setInterval(() => isQuiet(STALL_TIMEOUT) && abort(), STALL_TIMEOUT / 9);
  const unwatch = onWake((networkChanged) => (networkChanged || isQuiet(QUIET)) && abort());
  try {
    const response = await openStream(service, place, signal);
    backoff.connected();
    if (response.status === 204 || response.body === null) {
      place.ended = true;
      return;
    }
    const reader = response.body.getReader();
    const decoder = new TextDecoder(); // it keeps the start of a split character, and drops a byte order mark
    const parser = new EventParser();
    for (;;) {
      const { done, value } = await reader.read().catch((error) => {
        throw connectionLost(error, "The connection was lost.");
      });
      if (done) return; // a frame that was cut off comes again
      lastByte = Date.now();
      for (const { event, data, id } of parser.push(decoder.decode(value, { stream: true }))) {
        const isSignal = SIGNALS.has(event);
        const members = JSON.parse(data);
        yield { ...members, type: isSignal ? event : "chunk", event: event === "message" ? null : event, cursor: id };
      }
      if (parser.retry !== undefined) backoff.base = parser.retry;
    }
  } finally {
    clearInterval(watchdog);
    unwatch();
    outer.removeEventListener("abort", abort);
    abort();
  }
}

/** @param {Service} service  @param {Place} place  @param {AbortSignal} signal */
async function openStream(service, place, signal) {
  const accept = "text/event-stream";
  const { known_content, ...query } = place.query();
  const { threadId: thread_id, messageId: message_id } = place;
  let response;
  if (known_content !== undefined) {
    const body = { thread_id, message_id, known_content, idle_timeout: query.idle_timeout };
    response = await service.fetch("POST", service.url(["resume-stream"]), { body, accept, signal });
  } else {
    const message = message_id === undefined ? [] : ["messages", message_id];
    const url = service.url(["threads", thread_id, ...message, "stream"], query);
    response = await service.fetch("GET", url, { accept, signal });
  }
  if (!response.ok) throw await problemOf(response);
  const type = response.headers.get("Content-Type") ?? "";
  if (response.status !== 204 && !type.startsWith(accept)) {
    const detail = `${response.url} answered with ${type || "no content type"} in place of ${accept}; check baseUrl.`;
    throw new ResumeStreamError({ status: response.status, title: "Not a stream", detail }, { retryable: false });
  }
  return response;
}

/** Parses server-sent events from text that arrives in pieces (HTML, 9.2.6). */
export class EventParser {
  /** @type {number | undefined} */ retry = undefined;
  #line = "";
  #endedInCr = false;
  #id = "";
  #event = "";
  /** @type {string[]} */ #data = [];

  /** @param {string} text  @returns {{event: string, data: string, id: string}[]} */
  push(text) {
    const events = [];
    let start = this.#endedInCr && text[0] === "\n" ? 1 : 0;
    if (text !== "") this.#endedInCr = text.endsWith("\r");
    const ends = /\r\n|\r|\n/g;
    ends.lastIndex = start;
    for (let end = ends.exec(text); end !== null; end = ends.exec(text)) {
      const line = this.#line + text.slice(start, end.index);
      this.#line = "";
      start = ends.lastIndex;
      if (line !== "") this.#field(line);
      else {
        if (this.#data.length > 0) {
          events.push({ event: this.#event || "message", data: this.#data.join("\n"), id: this.#id });
        }
        this.#event = "";
        this.#data = [];
      }
    }
    this.#line += text.slice(start);
    return events;
  }

  /** @param {string} line */
  #field(line) {
    const [, name, value] = /** @type {RegExpExecArray} */ (/^([^:]*)(?:: ?)?([^]*)$/.exec(line));
    if (name === "data") this.#data.push(value);
    else if (name === "event") this.#event = value;
    else if (name === "id" && !value.includes("\0")) this.#id = value;
    else if (name === "retry" && /^[0-9]+$/.test(value)) this.retry = Number(value);
  }
}

// -------------------------------------------------------------------------------------------------
// Storing
// -------------------------------------------------------------------------------------------------

/** @type {typeof import("./resume-stream.js").store} */
export async function store(options) {
  const { threadId, messageId, signal, maxPending, maxPendingBytes, keepAlive = 0 } = options;
  checkId(threadId, "threadId");
  checkId(messageId, "messageId");
  check(signal === undefined || signal instanceof AbortSignal, "signal has to be an AbortSignal.");
  for (const [name, value] of Object.entries({ maxPending, maxPendingBytes })) {
    check(value === undefined || value >= 1, `${name} has to be 1 or more.`);
  }
  check(keepAlive >= 0 && keepAlive <= DAY, "keepAlive is a number of milliseconds, from 0 to a day.");
  return new Producer(options).run();
}

/**
 * @param {any} source
 * @returns {AsyncIterator<string | ChunkInput>}
 */
function iteratorOf(source) {
  if (typeof source?.getReader === "function") return iteratorOfStream(source);
  const begin = typeof source === "object" ? (source?.[Symbol.asyncIterator] ?? source?.[Symbol.iterator]) : undefined;
  check(typeof begin === "function", "source has to be an iterable of texts, like [text], or a function that returns one.");
  return begin.call(source);
}

/**
 * A stream's own iterator does not return while `next()` waits, and older Safari has none.
 *
 * @param {ReadableStream<string | ChunkInput>} stream
 * @returns {AsyncIterator<string | ChunkInput>}
 */
function iteratorOfStream(stream) {
  const reader = stream.getReader();
  return {
    next: async () => /** @type {IteratorResult<string | ChunkInput>} */ (await reader.read()),
    return: async () => reader.cancel().then(() => ({ done: true, value: undefined })),
  };
}

/** True if the message has ended, belongs to another producer, or is gone. @param {unknown} error */
function isOver(error) {
  return error instanceof ResumeStreamError && [404, 409].includes(error.status);
}

/** Return the reason of an abort: readers learn the kind of the error, and no more. @param {any} error */
function reasonOf(error) {
  return String(error?.title || error?.name || "Error").slice(0, 200);
}

/**
 * Stores one message from one source.
 *
 * It has two loops: `pull` takes chunks from the source while there is room, and `send` appends them. Chunks stay
 * in `waiting` until they are acknowledged, so every retry begins at `acknowledged`.
 */
class Producer {
  /** @type {{chunk: ChunkInput, size: number}[]} */ waiting = [];
  bytes = 0; // of text in `waiting`
  acknowledged = 0; // chunks, and so the index of the first one in `waiting`
  seq = 0; // of the last answer
  /** @type {"open" | "drained" | "failed"} */ state = "open"; // of the source
  /** @type {unknown} */ failure = undefined; // what the source threw
  isOurs = false; // true once it is known that nobody else has written to the message
  mayWatch = true; // false once the token turns out to be for writing only
  refused = false; // true if the last answer was a 401
  stopping = new AbortController();
  /** @type {(() => void)[]} */ wakers = [];

  /** @param {StoreOptions & ServiceOptions & {onConnection?: (event: ConnectionEvent) => void}} options */
  constructor(options) {
    const { threadId, messageId, source, signal, maxPending = 1000, maxPendingBytes = 256 * 1024 } = options;
    this.service = new Service(options);
    this.message = { threadId, messageId };
    this.source = source;
    this.iterator = typeof source === "function" ? undefined : iteratorOf(source);
    this.signal = signal;
    this.maxPending = maxPending;
    this.maxPendingBytes = maxPendingBytes;
    this.keepAlive = options.keepAlive ?? 60_000;
    this.backoff = new Backoff(options.onConnection);
    this.backoff.lost = true; // until the first answer
  }

  /** @returns {Promise<Appended>} */
  async run() {
    const wake = () => this.wake();
    this.signal?.addEventListener("abort", wake);
    try {
      this.signal?.throwIfAborted();
      await this.open();
      this.pull();
      return await this.send();
    } catch (error) {
      const isAborted = this.signal?.aborted ?? false;
      const reason = isAborted ? this.signal?.reason : error; // the source may have thrown its own error for the signal
      const failed = this.state === "failed" && !isAborted;
      this.stop(reason);
      throw await this.giveUp(reason, failed);
    } finally {
      this.signal?.removeEventListener("abort", wake);
    }
  }

  // The source

  /** Pull until the source ends. Never rejects: `send` throws what the source threw. */
  async pull() {
    try {
      if (typeof this.source === "function") this.iterator = iteratorOf(this.source(this.stopping.signal));
      while (await this.pullOne());
      this.state = "drained";
    } catch (error) {
      this.failure = error;
      this.state = "failed";
    }
    this.wake();
  }

  /** @returns {Promise<boolean>} whether there may be more */
  async pullOne() {
    while (this.isFull && !this.isStopped) await this.change();
    if (this.iterator === undefined || this.isStopped) return false;
    let result;
    try {
      result = await this.iterator.next();
    } catch (error) {
      this.iterator = undefined; // an iterator that threw has ended, as in `for await`
      throw error;
    }
    if (result.done) this.iterator = undefined;
    else if (!this.isStopped) this.take(await result.value);
    return !result.done;
  }

  /** @param {any} piece */
  take(piece) {
    const chunk = typeof piece === "string" ? { content: piece } : piece;
    check(typeof chunk?.content === "string", 'A source has to give texts, or {content: "text", event?}.');
    const size = UTF8.encode(chunk.content).length;
    this.waiting.push({ chunk, size });
    this.bytes += size;
    this.wake();
  }

  get isFull() {
    return this.waiting.length >= this.maxPending || this.bytes >= this.maxPendingBytes;
  }

  get isStopped() {
    return this.stopping.signal.aborted;
  }

  /**
   * Make the source return at once, even while it waits.
   *
   * @param {unknown} reason
   */
  stop(reason) {
    this.stopping.abort(reason);
    this.wake();
    // As in `for await`, an error from `return()` does not replace the error that is the reason.
    const leave = async () => this.iterator?.return?.();
    leave().catch(() => {});
  }

  /** Wait until one of the loops has changed something. @returns {Promise<void>} */
  change() {
    return new Promise((resolve) => this.wakers.push(resolve));
  }

  wake() {
    for (const waker of this.wakers.splice(0)) waker();
  }

  // The service

  async open() {
    const { status, body } = await this.ask("PUT", this.url());
    if (body.status !== "active") {
      const detail = `The message '${this.message.messageId}' has ended (${body.status}); store into a new one.`;
      const { status: messageStatus, chunkCount } = body;
      throw new ResumeStreamError({ status: 409, title: "Conflict", detail, messageStatus, chunkCount });
    }
    this.isOurs = status === 201 || body.chunkCount === 0;
    this.seq = body.seq;
  }

  /** @returns {Promise<Appended>} */
  async send() {
    for (;;) {
      this.signal?.throwIfAborted();
      if (this.waiting.length === 0 && this.state === "open") await this.idle();
      if (this.waiting.length === 0 && this.state === "failed") throw this.failure;
      const batch = this.batch();
      const complete = this.state === "drained" && batch.length === this.waiting.length;
      const appended = await this.append(batch, complete);
      if (complete) return appended;
    }
  }

  /** Return the chunks for one append: all that wait, up to MAX_BATCH. None make a sign of life. */
  batch() {
    let bytes = 0;
    const end = this.waiting.findIndex(({ size }, place) => (bytes += size) > MAX_BATCH && place > 0);
    return this.waiting.slice(0, end < 0 ? undefined : end);
  }

  /** @param {{chunk: ChunkInput, size: number}[]} batch  @param {boolean} complete  @returns {Promise<Appended>} */
  async append(batch, complete) {
    const chunks = batch.map(({ chunk: { content, event } }) => ({ content, event: event ?? undefined }));
    const url = this.url("chunks", { index: this.acknowledged, complete: complete || undefined });
    const { status, body } = await this.ask("POST", url, chunks);
    this.isOurs ||= status === 201 && batch.length > 0;
    this.seq = body.seq;
    this.acknowledged += batch.length;
    this.waiting.splice(0, batch.length);
    for (const { size } of batch) this.bytes -= size;
    this.wake();
    return body;
  }

  /** Wait for the source. Return early if it is time to ask whether the message is still active. */
  async idle() {
    const pause = new AbortController();
    const { signal } = pause;
    this.change().then(() => pause.abort());
    try {
      await sleep(this.mayWatch ? WATCH_AFTER : 2 * WATCH_AFTER, signal, false);
      if (this.mayWatch) await this.watch(signal);
    } catch (error) {
      if (!signal.aborted) throw error;
    }
  }

  /**
   * Follow the message until it may have ended, the connection is lost, or `keepAlive` ms have passed. The append
   * after that learns which, and is a sign of life.
   *
   * @param {AbortSignal} signal
   */
  async watch(signal) {
    const place = new Place({ ...this.message, after: this.seq, idleTimeout: this.keepAlive });
    try {
      for await (const { type } of sseFrames(this.service, place, new Backoff(undefined), signal)) {
        if (type !== "chunk") return;
      }
    } catch (error) {
      if (!(error instanceof ResumeStreamError)) throw error;
      this.mayWatch = error.status !== 403; // without `read`, the empty appends tell of an end
    }
  }

  /**
   * Send a request until it is answered.
   *
   * @param {string} method
   * @param {URL} url
   * @param {unknown} [body]
   * @returns {Promise<{status: number, body: any}>}
   */
  async ask(method, url, body) {
    for (;;) {
      try {
        const answer = await this.askOnce(method, url, body, STALL_TIMEOUT, this.signal);
        this.refused = false;
        this.backoff.reset();
        if (this.backoff.lost) this.backoff.connected();
        return answer;
      } catch (error) {
        this.signal?.throwIfAborted();
        if (!(error instanceof ResumeStreamError)) throw error;
        if (error.status === 401 && this.service.canRenewToken && !this.refused) this.refused = true;
        else if (!error.retryable) throw this.explained(error);
        else await this.backoff.wait(this.signal, error);
      }
    }
  }

  /**
   * @param {string} method
   * @param {URL} url
   * @param {unknown} body
   * @param {number} timeout  ms
   * @param {AbortSignal} [outer]
   */
  async askOnce(method, url, body, timeout, outer) {
    const request = new AbortController();
    const abort = () => request.abort(outer?.reason);
    const timer = setTimeout(() => request.abort(connectionLost(undefined, "The service did not answer.")), timeout);
    outer?.addEventListener("abort", abort);
    if (outer?.aborted) abort();
    try {
      return await this.service.ask(method, url, { body, signal: request.signal });
    } finally {
      clearTimeout(timer);
      outer?.removeEventListener("abort", abort);
    }
  }

  /** @param {ResumeStreamError} error */
  explained(error) {
    const { expectedIndex } = error.problem;
    if (error.status !== 409 || !(expectedIndex < this.acknowledged)) return error;
    const detail = "The message was cleared, or has expired, while it was being stored; begin a new one.";
    return new ResumeStreamError({ ...error.problem, detail });
  }

  /**
   * Abort the message, if it is this producer's and still active. Return the error to throw.
   *
   * @param {unknown} error  why storing stops
   * @param {boolean} failed  whether the source failed
   * @returns {Promise<unknown>}
   */
  async giveUp(error, failed) {
    const ownFailure = failed && error === this.failure;
    const errors = failed && !ownFailure ? [this.failure, error] : [error];
    if (this.isOurs && (ownFailure || !isOver(error))) {
      const body = { reason: reasonOf(errors[0]) };
      try {
        if (ownFailure) await this.ask("POST", this.url("abort"), body);
        else await this.askOnce("POST", this.url("abort"), body, ABORT_TIMEOUT);
      } catch (refusal) {
        // In other cases the caller has an error already, and the service's producer_timeout aborts the message.
        if (ownFailure && !isOver(refusal)) errors.push(refusal);
      }
    }
    if (errors.length === 1) return error;
    return new AggregateError(errors, errors.map(String).join("; and then: "));
  }

  /** @param {"chunks" | "abort"} [call]  @param {Record<string, any>} [query] */
  url(call, query) {
    const { threadId, messageId } = this.message;
    return this.service.url(["threads", threadId, "messages", messageId, ...(call ? [call] : [])], query);
  }
}

// -------------------------------------------------------------------------------------------------
// Reading and writing over a WebSocket
// -------------------------------------------------------------------------------------------------

/** @type {typeof import("./resume-stream.js").connect} */
export function connect(options = {}) {
  return new Socket(options);
}

/**
 * A reader on the socket.
 * @typedef {object} Subscription
 * @property {Place} place
 * @property {number} id  of the subscription on this connection; 0 if there is none
 * @property {boolean} heard  whether a frame came since it subscribed
 * @property {number} silent  how many subscriptions in a row ended without a frame on this connection
 * @property {StreamItem[]} queue  of items for the consumer
 * @property {boolean} resubscribes  whether to subscribe again once the queue is empty
 * @property {ResumeStreamError} [problem]  why it subscribes again, after a delay
 * @property {unknown} [error]  to throw once the queue is empty
 * @property {() => void} wake
 */

/**
 * An append or abort that waits for its answer.
 * @typedef {object} Call
 * @property {number} id
 * @property {Record<string, unknown>} frame
 * @property {boolean} sent
 * @property {boolean} repeatable
 * @property {(value: any) => void} resolve
 * @property {(error: unknown) => void} reject
 */

/** Reads and writes many threads over one WebSocket, and reconnects. */
class Socket {
  #service;
  #backoff;
  #lastId = 0;
  /** @type {Set<Subscription>} */ #subscriptions = new Set();
  /** @type {Map<number, Call>} */ #calls = new Map();
  /** @type {WebSocket | null} */ #socket = null;
  #closing = new AbortController();
  #running = false;
  #refused = false; // true if the service refused the last token

  /** @param {ServiceOptions & {onConnection?: (event: ConnectionEvent) => void}} options */
  constructor(options) {
    this.#service = new Service(options);
    this.#backoff = new Backoff(options.onConnection);
  }

  /** @param {ReadOptions} options */
  resumeStream(options) {
    checkReading(options);
    return iterable(options.signal, (signal) => this.#read(options, signal));
  }

  /** @param {{threadId: string, messageId: string, chunks: any[], index?: number, complete?: boolean}} options */
  async append({ threadId, messageId, chunks, index, complete }) {
    checkId(threadId, "threadId");
    checkId(messageId, "messageId");
    checkChunks(chunks);
    const frame = { type: "append", thread_id: threadId, message_id: messageId, chunks, index, complete };
    return this.#call(frame, index !== undefined);
  }

  /** @param {{threadId: string, messageId: string, reason?: string}} options */
  async abort({ threadId, messageId, reason }) {
    checkId(threadId, "threadId");
    checkId(messageId, "messageId");
    return this.#call({ type: "abort", thread_id: threadId, message_id: messageId, reason }, true);
  }

  close() {
    this.#fail(new DOMException("The socket was closed.", "AbortError"));
  }

  /** @param {Record<string, unknown>} frame  @param {boolean} repeatable  @returns {Promise<Appended>} */
  #call(frame, repeatable) {
    this.#closing.signal.throwIfAborted();
    return new Promise((resolve, reject) => {
      const id = ++this.#lastId;
      const call = { id, frame: { ...frame, id }, sent: false, repeatable, resolve, reject };
      this.#calls.set(id, call);
      this.#send(call);
      this.#run();
    });
  }

  /** @param {Call} call */
  #send(call) {
    if (this.#socket?.readyState !== WebSocket.OPEN) return;
    call.sent = true;
    this.#socket.send(JSON.stringify(call.frame));
  }

  /** @param {ReadOptions} options  @param {AbortSignal} signal  @returns {AsyncGenerator<StreamItem, void>} */
  async *#read(options, signal) {
    this.#closing.signal.throwIfAborted();
    signal.throwIfAborted();
    const backoff = new Backoff(undefined);
    /** @type {Subscription} */
    const subscription = {
      place: new Place(options),
      id: 0,
      heard: false,
      silent: 0,
      queue: [],
      resubscribes: false,
      wake: () => {},
    };
    const wake = () => subscription.wake();
    signal.addEventListener("abort", wake);
    this.#subscriptions.add(subscription);
    this.#subscribe(subscription);
    this.#run();
    try {
      for (;;) {
        while (subscription.queue.length > 0) {
          backoff.reset();
          yield* subscription.queue.splice(0);
        }
        signal.throwIfAborted();
        if (subscription.error !== undefined) throw subscription.error;
        if (subscription.place.ended) return;
        if (subscription.resubscribes) {
          const { problem } = subscription;
          subscription.resubscribes = false;
          subscription.problem = undefined;
          if (problem) await backoff.wait(signal, problem);
          this.#subscribe(subscription);
        }
        await new Promise((resolve) => {
          subscription.wake = () => resolve(undefined);
          const { queue, error, resubscribes, place } = subscription;
          if (queue.length > 0 || error !== undefined || resubscribes || place.ended || signal.aborted) resolve(undefined);
        });
      }
    } finally {
      signal.removeEventListener("abort", wake);
      this.#subscriptions.delete(subscription);
      this.#unsubscribe(subscription);
    }
  }

  /** @param {Subscription} subscription */
  #subscribe(subscription) {
    if (this.#socket?.readyState !== WebSocket.OPEN || subscription.id !== 0) return;
    const { place } = subscription;
    subscription.id = ++this.#lastId;
    subscription.heard = false;
    const { threadId: thread_id, messageId: message_id } = place;
    this.#socket.send(JSON.stringify({ type: "subscribe", id: subscription.id, thread_id, message_id, ...place.query() }));
  }

  /** @param {Subscription} subscription */
  #unsubscribe(subscription) {
    if (this.#socket?.readyState === WebSocket.OPEN && subscription.id !== 0) {
      this.#socket.send(JSON.stringify({ type: "unsubscribe", id: subscription.id }));
    }
    subscription.id = 0; // frames that still arrive for it are ignored
  }

  /** True once after each refused token, if a function can give a new one. */
  #mayRenew() {
    const may = this.#service.canRenewToken && !this.#refused;
    this.#refused = true;
    return may;
  }

  /** Keep a connection while a subscription or call needs one. */
  async #run() {
    if (this.#running) return;
    this.#running = true;
    try {
      while (this.#subscriptions.size + this.#calls.size > 0) {
        const opened = await this.#connection();
        if (this.#closing.signal.aborted) return;
        let error = connectionLost(undefined, opened ? "The connection was lost." : undefined);
        if (!opened) {
          // A browser does not say why a WebSocket was refused. A plain request does.
          const answer = await this.#service.fetch("GET", this.#service.url(["threads"], { limit: 1 })).catch(() => null);
          if (answer?.status === 401) {
            error = await problemOf(answer);
            if (!this.#mayRenew()) throw error;
          }
        }
        if (this.#subscriptions.size + this.#calls.size > 0) await this.#backoff.wait(this.#closing.signal, error);
      }
    } catch (error) {
      this.#fail(error);
    } finally {
      this.#running = false;
    }
  }

  /** Connect, and wait until the connection closes. @returns {Promise<boolean>} whether it was open */
  async #connection() {
    const url = this.#service.url(["ws"]);
    url.protocol = url.protocol.replace("http", "ws");
    const token = await this.#service.currentToken();
    if (token) url.searchParams.set("access_token", token);
    this.#closing.signal.throwIfAborted();
    const socket = (this.#socket = new WebSocket(url));
    let opened = false;
    let lastFrame = Date.now();
    /** @type {() => void} */
    let closed = () => {};
    const isClosed = new Promise((resolve) => (closed = () => resolve(undefined)));
    const unwatch = onWake((networkChanged) => {
      if (networkChanged || Date.now() - lastFrame > QUIET) closed();
    });
    socket.onopen = () => {
      opened = true;
      this.#backoff.connected();
      for (const subscription of this.#subscriptions) {
        if (!subscription.resubscribes && !subscription.place.ended) this.#subscribe(subscription);
      }
      for (const call of this.#calls.values()) this.#send(call);
    };
    socket.onmessage = ({ data }) => {
      lastFrame = Date.now();
      this.#backoff.reset();
      this.#receive(JSON.parse(data));
    };
    socket.onclose = closed;
    this.#closing.signal.addEventListener("abort", closed);
    await isClosed;
    unwatch();
    this.#closing.signal.removeEventListener("abort", closed);
    socket.onopen = socket.onmessage = socket.onclose = null;
    socket.close();
    this.#socket = null;
    for (const subscription of this.#subscriptions) {
      subscription.id = 0;
      subscription.silent = 0;
    }
    for (const call of this.#calls.values()) {
      if (!call.sent || call.repeatable) continue;
      this.#calls.delete(call.id);
      const detail = "The connection was lost, so the chunks may or may not be stored; give index to make a retry safe.";
      call.reject(connectionLost(undefined, detail));
    }
    return opened;
  }

  /** @param {Frame} frame */
  #receive(frame) {
    const call = this.#calls.get(frame.id);
    if (call) {
      this.#calls.delete(call.id);
      const { type, id, ...answer } = frame;
      if (type === "error") call.reject(new ResumeStreamError(answer));
      else call.resolve(answer);
      return;
    }
    for (const subscription of this.#subscriptions) {
      if (subscription.id !== 0 && subscription.id === frame.id) this.#hear(subscription, frame);
    }
  }

  /** @param {Subscription} subscription  @param {Frame} frame */
  #hear(subscription, frame) {
    const { place, queue } = subscription;
    if (frame.type === "unsubscribed") {
      subscription.id = 0;
      subscription.silent = subscription.heard ? 0 : subscription.silent + 1;
      if (subscription.silent > 1) place.ended = true; // the service had nothing for two subscriptions
      else subscription.resubscribes = true;
    } else {
      subscription.heard = true;
      try {
        queue.push(...place.take(frame));
        this.#refused = false;
      } catch (error) {
        const problem = error instanceof ResumeStreamError ? error : undefined;
        if (problem?.status === 401 && this.#mayRenew()) this.#socket?.close();
        else if (problem?.retryable) subscription.problem = problem;
        else subscription.error = error;
      }
      if (queue.length > MAX_QUEUE && !place.ended) {
        this.#unsubscribe(subscription);
        subscription.resubscribes = true;
      }
    }
    subscription.wake();
  }

  /** @param {unknown} error */
  #fail(error) {
    for (const subscription of this.#subscriptions) {
      subscription.error ??= error;
      subscription.wake();
    }
    for (const call of this.#calls.values()) call.reject(error);
    this.#calls.clear();
    if (!this.#closing.signal.aborted) this.#closing.abort(error);
  }
}
