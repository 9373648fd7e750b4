/**
 * The client of resume-stream, for browsers and Node 18 or newer (`connect`: 22). Times are milliseconds;
 * timestamps are milliseconds since 1970.
 */

export type Status = "active" | "completed" | "aborted";

/** A piece of a message. The first one after `knownContent` may be the rest of a chunk. */
export interface ChunkItem {
  type: "chunk";
  content: string;
  /** The name that the producer gave it, or null. */
  event: string | null;
  messageId: string;
  seq: number;
  /** Everything up to here has been read: keep it, and give it as `after`. */
  cursor: string;
  /** When it was committed. */
  timestamp: number;
}

/** The end of a message. With `messageId` it is the last item; in a whole thread others may follow. */
export interface CompleteItem {
  type: "complete";
  messageId: string;
  status: "completed" | "aborted";
  /** Why it was aborted, like "producer_timeout" or what the stop button said. */
  reason: string | null;
  seq: number;
  cursor: string;
}

/** Forget all text that you have: it is not what the service holds. Everything follows from the start. */
export interface ResetItem {
  type: "reset";
}

/** The thread was cleared or expired, and nothing will follow. Always the last item. */
export interface GoneItem {
  type: "gone";
}

/** Nothing new for the `idleTimeout` that was asked for; the message is still active. Always the last item. */
export interface TimeoutItem {
  type: "timeout";
}

export type StreamItem = ChunkItem | CompleteItem | ResetItem | GoneItem | TimeoutItem;

export interface ServiceOptions {
  /** Where the service is: "https://chunks.example.org". Default: the origin of the page. */
  baseUrl?: string | URL;
  /** A token, or a function that gives one; the function is called again for every connection. */
  token?: string | null | (() => string | null | undefined | Promise<string | null | undefined>);
  /** In place of the global `fetch`. */
  fetch?: typeof globalThis.fetch;
}

/** The connection came up, or went down and will be tried again after `delay` ms. */
export type ConnectionEvent =
  | { connected: true }
  | { connected: false; attempt: number; delay: number; error: ResumeStreamError | undefined };

export interface ReadOptions {
  threadId: string;
  /** One message. Without it: all of the thread, until none of its messages is active. */
  messageId?: string;
  /** The text that you have of this message. What you do not have follows, or a `reset` first. */
  knownContent?: string;
  /** The cursor of the last item that you have. */
  after?: string | number;
  /**
   * Of a message: wait for it if it is not made yet, in place of a 404. Without the service's help it is
   * asked for every 2 s at the least. Once there is anything of it, it ends as it does without `wait`.
   */
  wait?: boolean;
  /** Of a thread: wait for it if it is not made yet, and stay for the next message. Never ends by itself. */
  follow?: boolean;
  /** End with a `timeout` item after so many ms with nothing new. Default: wait for the end of the message. */
  idleTimeout?: number;
  /** Ends the iteration at once: its `next()` rejects with `signal.reason`, as `fetch` does. */
  signal?: AbortSignal;
}

/**
 * Read a message, or a thread, over server-sent events.
 *
 * Every chunk comes once and in order, across lost connections, restarts of the service, and sleep: it
 * reconnects by itself, with backoff and jitter, for as long as it takes. The iteration ends by itself
 * after the end of the message (or of the thread's last active message); its last item says how. It has no
 * item at all where `after` is the end already.
 *
 * It throws a ResumeStreamError for what a retry cannot mend (a 4xx other than 408, 425 and 429, and a
 * missing thread or message of which you had nothing yet: 404), and `signal.reason` after an abort. For a
 * missing thread of which you had something the last item is `gone`; with `follow` that is a `reset`. Bad
 * options are a TypeError, thrown at once.
 *
 * Each `for await` over what it returns is a reading of its own; leaving the loop closes the connection.
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
  /** This message's number, from 0, of the first of the chunks: makes the append safe to retry. */
  index?: number;
  /** End the message with its last chunk. */
  complete?: boolean;
}

/** With `index` it is retried until it is stored or refused. Resolves once the chunks are committed. */
export function appendChunks(
  options: ServiceOptions & AppendOptions & { signal?: AbortSignal; onConnection?: (event: ConnectionEvent) => void },
): Promise<Appended>;

/** What `store` takes from its source: a text, or a chunk with the name of its event. */
export type Piece = string | ChunkInput;

export type Source = AsyncIterable<Piece> | Iterable<Piece> | ReadableStream<Piece>;

export interface StoreOptions {
  threadId: string;
  messageId: string;
  /**
   * The answer as it comes: anything that `for await` takes and that gives texts (an array, a generator), a
   * stream of texts, or a function that returns one of these. The function is called once the message is open.
   * Its signal is aborted when storing ends before the source does, so that what the source waits for (a
   * `fetch`, a model) is let go: an async generator cannot return by itself in the middle of an `await`.
   */
  source: Source | ((signal: AbortSignal) => Source);
  /** The source is not pulled while so many chunks are not acknowledged. From 1; default 1000. */
  maxPending?: number;
  /** Nor while so many bytes of text (UTF-8) are not. From 1; default 262,144. One chunk may exceed it. */
  maxPendingBytes?: number;
  /**
   * A quiet source is vouched for after so many ms, so that the service's `producer_timeout` (5 min) does not
   * abort its message. From 0 (never) to 86,400,000 (a day); default 60,000.
   */
  keepAlive?: number;
  /** Ends it at once: the source returns, the message is aborted, and `store` rejects with `signal.reason`. */
  signal?: AbortSignal;
}

/**
 * Store a message from its source, each piece as a chunk, and complete it when the source is done. Resolves
 * with the answer to the last append, once all of it is committed.
 *
 * No chunk is lost or stored twice, across lost connections and restarts of the service: what is not
 * acknowledged is kept and sent again, numbered, with backoff, for as long as it takes (network errors, 5xx,
 * 408, 425, 429). While one append is under way, the pieces that come go into the next.
 *
 * What stops it stops the source (its iterator's `return()` is called, and the function's signal aborted):
 *
 * - The source throws: what it gave before is stored, the message is aborted with the error's `name` as
 *   reason, and the error is thrown again (in an AggregateError, before the reason, if that was refused).
 * - The message is aborted or completed by someone else (409, with `problem.messageStatus` and
 *   `problem.reason`), noticed within a second even while the source is quiet.
 * - It had ended before (409), or holds other chunks than the source gives, as another producer writes to it
 *   (409); neither harms what is there. Where it holds the same chunks, as after a restart of the producer,
 *   storing goes on after them.
 * - The service refuses it for good (401, unless `token` is a function with a better one; 403, 404, 413, 415,
 *   422): the message is aborted, if it can be.
 *
 * Its token needs the scope `write`. With `read` too, it follows the message while the source is quiet; without,
 * it asks with empty appends, twice a second.
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

/** `{exists: false}` where there is no such thread. */
export function getThreadStatus(options: Thread): Promise<ThreadStatus | { exists: false }>;

/** The text so far; reading on from its `cursor` gives exactly what comes after it. */
export function getAccumulatedContent(
  options: Thread & { messageId?: string },
): Promise<{ content: string; cursor: string; status: Status }>;

/** Threads, the newest first. Give its `cursor` to get the next page; null: there is none. */
export function listThreads(
  options?: ServiceOptions & { status?: Status; limit?: number; cursor?: string; signal?: AbortSignal },
): Promise<{ threads: ThreadSummary[]; cursor: string | null }>;

/** The stop button. Again: the same answer. Rejects with status 409 where the message is completed. */
export function abortMessage(options: Thread & { messageId: string; reason?: string }): Promise<Appended>;

/** Forget a thread, and erase its text. Whether there was one. */
export function clearThread(options: Thread): Promise<boolean>;

/** Many threads over one WebSocket (browsers allow six connections a host to HTTP/1.1). */
export interface ResumeStreamSocket {
  /** As the function of this name. */
  resumeStream(options: ReadOptions): AsyncIterable<StreamItem>;
  /** With `index` it is sent again after a lost connection; without, it then rejects. */
  append(options: AppendOptions): Promise<Appended>;
  abort(options: { threadId: string; messageId: string; reason?: string }): Promise<Appended>;
  /** End everything on it with an AbortError. */
  close(): void;
}

/**
 * Connects when there is something to do, and again, from the last cursors, when the connection is lost.
 * A token that is refused (401) ends everything on it; `connect` again with another.
 */
export function connect(
  options?: ServiceOptions & { onConnection?: (event: ConnectionEvent) => void },
): ResumeStreamSocket;

/** What the service refused (`status` is HTTP's), or a connection that failed (`status` is 0). */
export class ResumeStreamError extends Error {
  constructor(
    problem: { status?: number; title?: string; detail?: string; [member: string]: any },
    more?: { retryAfter?: number; retryable?: boolean; cause?: unknown },
  );
  status: number;
  title: string;
  /** The problem document (RFC 9457), with its extension members, like `expectedIndex`. */
  problem: { status?: number; title?: string; detail?: string; [member: string]: any };
  /** How long the service asks to wait, in ms. */
  retryAfter: number;
  /** Whether the same request may succeed later. */
  retryable: boolean;
}

/** Server-sent events out of text that comes in pieces (HTML, 9.2.6). */
export class EventParser {
  /** The reconnection time that the service asks for, in ms. */
  retry: number | undefined;
  push(text: string): { event: string; data: string; id: string }[];
}
