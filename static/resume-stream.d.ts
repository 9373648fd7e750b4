/**
 * The client of resume-stream, for browsers and Node 18 or newer (`connect`: 22). Times are milliseconds;
 * timestamps are milliseconds since 1970.
 */

export type Status = "active" | "completed" | "aborted";

/** A chunk of a message. The first one after `knownContent` may be the rest of a chunk. */
export interface ChunkItem {
  type: "chunk";
  content: string;
  /** The event name that the producer gave it, or null. */
  event: string | null;
  messageId: string;
  seq: number;
  /** Your place after this chunk. Keep it, and give it as `after` to continue. */
  cursor: string;
  /** The time of its commit. */
  timestamp: number;
}

/** The end of a message. If you read one message, it is the last item; in a thread, others may follow. */
export interface CompleteItem {
  type: "complete";
  messageId: string;
  status: "completed" | "aborted";
  /** Why it was aborted, like "producer_timeout" or the reason of a stop button. */
  reason: string | null;
  seq: number;
  cursor: string;
}

/** Forget the text that you have: it is not the service's. All of it follows from the start. */
export interface ResetItem {
  type: "reset";
}

/** The thread was cleared or has expired. Always the last item. */
export interface GoneItem {
  type: "gone";
}

/** Nothing came for `idleTimeout` ms, and the message is still active. Always the last item. */
export interface TimeoutItem {
  type: "timeout";
}

export type StreamItem = ChunkItem | CompleteItem | ResetItem | GoneItem | TimeoutItem;

export interface ServiceOptions {
  /** The address of the service, like "https://chunks.example.org". Default: the origin of the page. */
  baseUrl?: string | URL;
  /** A token, or a function that returns one. The function is called for every connection. */
  token?: string | null | (() => string | null | undefined | Promise<string | null | undefined>);
  /** Used in place of the global `fetch`. */
  fetch?: typeof globalThis.fetch;
}

/** The connection is open, or it was lost and is opened again after `delay` ms. */
export type ConnectionEvent =
  | { connected: true }
  | { connected: false; attempt: number; delay: number; error: ResumeStreamError | undefined };

export interface ReadOptions {
  threadId: string;
  /** The message to read. Without it: the whole thread, until none of its messages is active. */
  messageId?: string;
  /** The text of this message that you have. The rest follows, or a `reset` and then all of it. */
  knownContent?: string;
  /** The cursor of the last item that you have. */
  after?: string | number;
  /** For a message: if it does not exist yet, wait for it, in place of a 404. */
  wait?: boolean;
  /** For a thread: wait for it if it does not exist yet, and for its next messages. Never ends by itself. */
  follow?: boolean;
  /** End with a `timeout` item after this many ms without news. Default: wait for the end of the message. */
  idleTimeout?: number;
  /** Ends the iteration at once: `next()` rejects with `signal.reason`, as `fetch` does. */
  signal?: AbortSignal;
}

/**
 * Read a message or a thread over server-sent events.
 *
 * Every chunk comes once and in order, across lost connections, restarts of the service, and sleep of the machine.
 * The client reconnects with backoff and jitter, without a limit. The iteration ends after the end of the message (or
 * of the thread's last active message), and its last item says how. It yields nothing if `after` is the end already.
 *
 * It throws a ResumeStreamError if a retry cannot help: for a 4xx other than 408, 425, and 429. It throws
 * `signal.reason` after an abort, and a TypeError for bad options, at once. A missing thread or message is a 404 if
 * you had nothing of it. If you had something, the last item is `gone`; with `follow` it is a `reset`, and the
 * iteration goes on.
 *
 * Each `for await` over the result reads on its own. Leaving the loop closes the connection.
 */
export function resumeStream(
  options: ServiceOptions & ReadOptions & { onConnection?: (event: ConnectionEvent) => void },
): AsyncIterable<StreamItem>;

export interface Appended {
  threadId: string;
  messageId: string;
  seq: number;
  /** The `index` of the message's next chunk. */
  chunkCount: number;
  status: Status;
}

export interface ChunkInput {
  content: string;
  event?: string | null;
}

export interface AppendOptions {
  threadId: string;
  messageId: string;
  chunks: ChunkInput[];
  /** The number of the first chunk in its message, from 0. It makes the append safe to retry. */
  index?: number;
  /** Complete the message after these chunks. */
  complete?: boolean;
}

/** Append chunks. Resolves once they are committed. With `index` it retries until they are stored or refused. */
export function appendChunks(
  options: ServiceOptions & AppendOptions & { signal?: AbortSignal; onConnection?: (event: ConnectionEvent) => void },
): Promise<Appended>;

/** What a source yields: a text, or a chunk with an event name. */
export type Piece = string | ChunkInput;

export type Source = AsyncIterable<Piece> | Iterable<Piece> | ReadableStream<Piece>;

export interface StoreOptions {
  threadId: string;
  messageId: string;
  /**
   * The answer as it is generated: an iterable or async iterable of pieces (an array, a generator), a stream of
   * pieces, or a function that returns one of these. The function is called once the message is open. Its signal is
   * aborted if storing ends before the source. Pass it to whatever the source waits for (a `fetch`, a model): an
   * async generator cannot return in the middle of an `await`.
   */
  source: Source | ((signal: AbortSignal) => Source);
  /** The source is not pulled while this many chunks are not acknowledged. From 1; default 1000. */
  maxPending?: number;
  /** The same in bytes of text (UTF-8). From 1; default 262,144. One chunk may exceed it. */
  maxPendingBytes?: number;
  /**
   * While the source is silent, send a sign of life after this many ms, so that the service's `producer_timeout`
   * (5 min) does not abort the message. From 0 (never) to 86,400,000 (a day); default 60,000.
   */
  keepAlive?: number;
  /** Ends storing at once: the source returns, the message is aborted, and `store` rejects with `signal.reason`. */
  signal?: AbortSignal;
}

/**
 * Store a message from its source, each piece as a chunk, and complete the message when the source ends. Resolves
 * with the answer to the last append, once everything is committed.
 *
 * No chunk is lost or stored twice, across lost connections and restarts of the service. Chunks that are not
 * acknowledged are kept and sent again, numbered, with backoff and without a limit (after network errors, 5xx, 408,
 * 425, and 429). Pieces that arrive during one append go into the next.
 *
 * Storing stops early in these cases. The source then returns (and the signal of a function is aborted).
 *
 * - The source throws: the pieces before that are stored, the message is aborted with the error's `name` as the
 *   reason, and the error is thrown again. If the abort is refused, an AggregateError holds both errors.
 * - Somebody else aborts or completes the message: a 409, with `problem.messageStatus` and `problem.reason`. It is
 *   noticed within a second, even while the source is silent.
 * - The message had ended before, or holds other chunks than the source's, from another producer: a 409. The message
 *   stays as it is. If it holds the source's own chunks, as after a restart of the producer, storing goes on after
 *   them.
 * - The service refuses a request for good (401, unless `token` is a function with a better one; 403, 404, 413, 415,
 *   422): the message is aborted if possible.
 *
 * The token needs the scope `write`. With `read` as well, the client follows the message while the source is silent.
 * Without it, the client sends empty appends twice a second.
 */
export function store(
  options: ServiceOptions & StoreOptions & { onConnection?: (event: ConnectionEvent) => void },
): Promise<Appended>;

export interface ThreadSummary {
  threadId: string;
  status: Status;
  chunkCount: number;
  messageCount: number;
  /** Bytes of text. */
  size: number;
  readers: number;
  createdAt: number;
  updatedAt: number;
}

export interface MessageStatus {
  messageId: string;
  status: Status;
  reason: string | null;
  chunkCount: number;
  firstSeq: number | null;
  lastSeq: number | null;
  createdAt: number;
  updatedAt: number;
}

export interface ThreadStatus extends ThreadSummary {
  exists: true;
  cursor: string;
  messages: MessageStatus[];
}

type Thread = ServiceOptions & { threadId: string; signal?: AbortSignal };

/** Resolves with `{exists: false}` if there is no such thread. */
export function getThreadStatus(options: Thread): Promise<ThreadStatus | { exists: false }>;

/** The text so far. Reading after its `cursor` continues exactly there. */
export function getAccumulatedContent(
  options: Thread & { messageId?: string },
): Promise<{ content: string; cursor: string; status: Status }>;

/** A page of threads, the newest first. Its `cursor` gets the next page; null means that this is the last one. */
export function listThreads(
  options?: ServiceOptions & { status?: Status; limit?: number; cursor?: string; signal?: AbortSignal },
): Promise<{ threads: ThreadSummary[]; cursor: string | null }>;

/** The stop button. A second call has the same answer. Rejects with status 409 if the message is completed. */
export function abortMessage(options: Thread & { messageId: string; reason?: string }): Promise<Appended>;

/** Delete a thread and erase its text. Resolves with false if there was no such thread. */
export function clearThread(options: Thread): Promise<boolean>;

/** Many threads over one WebSocket. (A browser opens only six HTTP/1.1 connections to a host.) */
export interface ResumeStreamSocket {
  /** Like the function `resumeStream`. */
  resumeStream(options: ReadOptions): AsyncIterable<StreamItem>;
  /** After a lost connection it is sent again if it has an `index`; otherwise it rejects. */
  append(options: AppendOptions): Promise<Appended>;
  abort(options: { threadId: string; messageId: string; reason?: string }): Promise<Appended>;
  /** End all readers and calls with an AbortError. */
  close(): void;
}

/**
 * Connect when the first reader or call needs it, and reconnect from the last cursors after a loss. A refused token
 * (401) ends all readers and calls, unless `token` is a function with a better one.
 */
export function connect(
  options?: ServiceOptions & { onConnection?: (event: ConnectionEvent) => void },
): ResumeStreamSocket;

/** A refusal by the service (`status` is the HTTP status), or a failed connection (`status` is 0). */
export class ResumeStreamError extends Error {
  constructor(
    problem: { status?: number; title?: string; detail?: string; [member: string]: any },
    more?: { retryAfter?: number; retryable?: boolean; cause?: unknown },
  );
  status: number;
  title: string;
  /** The problem document (RFC 9457) with its extension members, like `expectedIndex`. */
  problem: { status?: number; title?: string; detail?: string; [member: string]: any };
  /** The ms that the service asks to wait. */
  retryAfter: number;
  /** True if the same request may succeed later. */
  retryable: boolean;
}

/** Parses server-sent events from text that arrives in pieces (HTML, 9.2.6). */
export class EventParser {
  /** The reconnection time that the stream asks for, in ms. */
  retry: number | undefined;
  push(text: string): { event: string; data: string; id: string }[];
}
