// @ts-check
/// <reference path="./resume-stream.d.ts" />
/**
 * The browser client of resume-stream: one ES module, no dependency, no build.
 *
 *     import { resumeStream } from "/static/resume-stream.js";
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
/** @typedef {import("./resume-stream.js").ServiceOptions} ServiceOptions */
/** @typedef {import("./resume-stream.js").ReadOptions} ReadOptions */
/** @typedef {import("./resume-stream.js").ConnectionEvent} ConnectionEvent */
/** @typedef {Record<string, any> & {type: string}} Frame  what the service sends, over SSE or WebSocket */

const MAX_DELAY = 30_000; // ms, the longest wait before a reconnect
const STALL_TIMEOUT = 45_000; // ms without a byte, three heartbeats, after which a connection counts as dead
const QUIET = 20_000; // ms without a byte after which a tab that wakes up does not trust its connection
const MAX_QUEUE = 1000; // items that wait for a slow consumer of a WebSocket before its subscription pauses
const SIGNALS = new Set(["complete", "timeout", "reset", "gone", "error"]);

// -------------------------------------------------------------------------------------------------
// Errors
// -------------------------------------------------------------------------------------------------

/** What the service refused (`status` is HTTP's), or a connection that failed (`status` is 0). */
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

/** The service at `baseUrl`, and how to talk to it. */
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
    this.renewable = typeof token === "function";
    this.token = token;
    this.fetchWith = fetch;
  }

  /** @returns {Promise<string>} the token, or "" */
  async currentToken() {
    const token = (typeof this.token === "function" ? await this.token() : this.token) ?? "";
    check(typeof token === "string" && /^[\x21-\x7e]*$/.test(token), "token has characters that no token has.");
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
    const { fetchWith } = this; // `fetch` must not be called as a method
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
   * @returns {Promise<any>} the JSON of the answer; undefined for 204
   */
  async call(method, url, options) {
    const response = await this.fetch(method, url, options);
    if (!response.ok) throw await problemOf(response);
    if (response.status === 204) return undefined;
    try {
      return await response.json();
    } catch (error) {
      options?.signal?.throwIfAborted();
      throw connectionLost(error, "The connection was lost in the middle of the answer.");
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

/** @param {any} value  what stands for a 404 */
function unlessMissing(value) {
  return (/** @type {unknown} */ error) => {
    if (error instanceof ResumeStreamError && error.status === 404) return value;
    throw error;
  };
}

// -------------------------------------------------------------------------------------------------
// Waiting
// -------------------------------------------------------------------------------------------------

/** Exponential backoff with full jitter, from the delay that the service asks for. */
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

  /** Begin from the shortest delay again. */
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
 * @param {boolean} wakeable  whether the network or the tab coming back ends it
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
 * Call back when the network is there again, and when a tab is looked at again (a laptop was opened).
 *
 * @param {(networkChanged: boolean) => void} callback
 * @returns {() => void} stops it
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
function checkReading({ threadId, messageId, knownContent, after, follow, idleTimeout, signal }) {
  checkId(threadId, "threadId");
  if (messageId !== undefined) checkId(messageId, "messageId");
  check(knownContent === undefined || typeof knownContent === "string", "knownContent has to be a string.");
  check(knownContent === undefined || messageId !== undefined, "knownContent is the text of one message: give messageId.");
  check(knownContent === undefined || after === undefined, "Give knownContent or after, not both.");
  check(after === undefined || /^(\d+-)?\d+$/.test(String(after)), `after=${after} is not a cursor that an item gave.`);
  check(!follow || messageId === undefined, "follow waits for the next message of a thread: leave messageId out.");
  check(idleTimeout === undefined || idleTimeout >= 0, "idleTimeout is a number of milliseconds, from 0.");
  check(signal === undefined || signal instanceof AbortSignal, "signal has to be an AbortSignal.");
}

/** Where a reader is, and the one place that decides what it is given: nothing twice, nothing late. */
class Place {
  /** @type {string | null} */ cursor = null;
  /** @type {string | undefined} */ generation = undefined;
  seq = 0;

  /** @param {ReadOptions} options */
  constructor({ threadId, messageId, knownContent, after, follow = false, idleTimeout }) {
    this.threadId = threadId;
    this.messageId = messageId;
    this.follow = follow;
    this.idleTimeout = idleTimeout;
    this.known = knownContent;
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

  /** What to ask the service for, by the names it uses. */
  query() {
    return {
      after: this.cursor ?? undefined,
      known_content: this.cursor === null ? this.known : undefined,
      follow: this.follow || undefined,
      idle_timeout: this.idleTimeout === undefined ? undefined : `${Math.round(this.idleTimeout)}ms`,
    };
  }

  /**
   * The items that a frame stands for: mostly one, none for what the reader has already.
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
        return []; // a newer service may have more to say
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

  /** @param {ResumeStreamError} [error]  @returns {StreamItem[]} */
  missing(error) {
    const detail = `There is no message '${this.messageId}' in a thread '${this.threadId}'.`;
    if (!this.hasPast) throw error ?? new ResumeStreamError({ status: 404, title: "Not found", detail });
    this.ended = true;
    return [{ type: "gone" }];
  }
}

/**
 * An async iterable whose iterators stop at once on `return()` and on `signal`, waiting or not.
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
            if (!result.done) outer?.throwIfAborted(); // nothing comes after an abort
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
  let refused = false; // the last answer was a 401
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
      else if (error.status === 401 && service.renewable && !refused) refused = true;
      else if (!error.retryable) throw error;
    }
    if (place.ended) return;
    // After the end of a message a thread's stream is over, mostly: ask at once, and be told by a 204.
    if (last === "complete" && !error) continue;
    await backoff.wait(signal, error);
  }
}

/**
 * One connection. Ends when it does; sets `place.ended` where nothing more will ever come.
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
    const decoder = new TextDecoder(); // keeps the start of a split character, drops a byte order mark
    const parser = new EventParser();
    for (;;) {
      const { done, value } = await reader.read().catch((error) => {
        throw connectionLost(error, "The connection was lost.");
      });
      if (done) return; // what is left in the parser was cut off, and comes again
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
    const detail = `${response.url} answered with ${type || "no content type"}, not with ${accept}; check baseUrl.`;
    throw new ResumeStreamError({ status: response.status, title: "Not a stream", detail }, { retryable: false });
  }
  return response;
}

/** Server-sent events out of text that comes in pieces (HTML, 9.2.6). */
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
// Reading and writing over a WebSocket
// -------------------------------------------------------------------------------------------------

/** @type {typeof import("./resume-stream.js").connect} */
export function connect(options = {}) {
  return new Socket(options);
}

/**
 * One reader on the socket.
 * @typedef {object} Subscription
 * @property {Place} place
 * @property {number} id  on this connection; 0 while there is none
 * @property {boolean} heard  whether anything came since it was subscribed
 * @property {number} silent  how often in a row it was over on this connection without a word
 * @property {StreamItem[]} queue  for the consumer
 * @property {"none" | "again" | "paused"} next  what is to be done once the queue is empty
 * @property {ResumeStreamError} [problem]  why it has to subscribe again
 * @property {unknown} [error]  for the consumer, after the queue
 * @property {() => void} wake
 */

/**
 * A call that waits for its answer.
 * @typedef {object} Call
 * @property {number} id
 * @property {Record<string, unknown>} frame
 * @property {boolean} sent
 * @property {boolean} repeatable
 * @property {(value: any) => void} resolve
 * @property {(error: unknown) => void} reject
 */

/** Many threads over one connection, which is made again as often as need be. */
class Socket {
  #service;
  #backoff;
  #lastId = 0;
  /** @type {Set<Subscription>} */ #subscriptions = new Set();
  /** @type {Map<number, Call>} */ #calls = new Map();
  /** @type {WebSocket | null} */ #socket = null;
  #closing = new AbortController();
  #running = false;
  #refused = false; // the last token was

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
      next: "none",
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
        if (subscription.next !== "none") {
          const { problem } = subscription;
          subscription.next = "none";
          subscription.problem = undefined;
          if (problem) await backoff.wait(signal, problem);
          this.#subscribe(subscription);
        }
        await new Promise((resolve) => {
          subscription.wake = () => resolve(undefined);
          const { queue, error, next, place } = subscription;
          if (queue.length > 0 || error !== undefined || next !== "none" || place.ended || signal.aborted) resolve(undefined);
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
    subscription.id = 0; // what still comes for it is not listened to
  }

  /** Whether a refused token is worth another connection, with a new token. */
  #mayRenew() {
    const may = this.#service.renewable && !this.#refused;
    this.#refused = true;
    return may;
  }

  /** Keep a connection while there is use for one. */
  async #run() {
    if (this.#running) return;
    this.#running = true;
    try {
      while (this.#subscriptions.size + this.#calls.size > 0) {
        const opened = await this.#connection();
        if (this.#closing.signal.aborted) return;
        let error = connectionLost(undefined, opened ? "The connection was lost." : undefined);
        if (!opened) {
          // A browser does not say why a WebSocket was refused, so ask in a way that is answered.
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

  /** One connection, until it closes. @returns {Promise<boolean>} whether it was open */
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
        if (subscription.next === "none" && !subscription.place.ended) this.#subscribe(subscription);
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
      const detail = "The connection was lost, so it is not known whether the chunks are stored; with index it can be retried.";
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
      if (subscription.silent > 1) place.ended = true; // asked twice, and there is nothing more
      else subscription.next = "again";
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
        subscription.next = "paused";
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
