/** The React hook of resume-stream. It needs React 18 or newer. */

import type { ConnectionEvent, ServiceOptions } from "./resume-stream.js";

export interface MessageState {
  /** All of the message's chunks so far, one after the other. */
  text: string;
  /**
   * - `idle`: there is no `threadId` or `messageId` yet.
   * - `waiting`: nothing of it has come yet.
   * - `active`: it is being written.
   * - `completed`, `aborted`: how it ended; `reason` may say why.
   * - `gone`: its thread was cleared or has expired; `text` is what had come.
   * - `failed`: it cannot be read; `error` says why. A lost connection is not that: it is made again.
   */
  status: "idle" | "waiting" | "active" | "completed" | "aborted" | "gone" | "failed";
  /** Why it was aborted, like "producer_timeout" or the `stopReason`; null otherwise. */
  reason: string | null;
  /** Why it cannot be read, or why `stop` was refused; mostly a ResumeStreamError. Null otherwise. */
  error: unknown;
}

export interface UseResumeStreamOptions extends ServiceOptions {
  /** Nothing is read while it is null, undefined or empty. */
  threadId: string | null | undefined;
  /** One message of the thread. Nothing is read while it is null, undefined or empty. */
  messageId: string | null | undefined;
  /** Wait for a message that is not made yet, in place of failing with a 404. Default: false. */
  wait?: boolean;
  /** What `stop` gives as the reason, up to 1,000 characters; the producer and all readers see it. Default: none. */
  stopReason?: string;
  /** The connection came up, or went down and will be tried again. */
  onConnection?: (event: ConnectionEvent) => void;
}

/**
 * Read a message, and render it as it comes. StrictMode's second mount does no harm.
 *
 * Another `baseUrl`, `threadId` or `messageId` begins another reading, from nothing. Everything else is taken
 * as it is when it is needed: `token` and `fetch` may be new functions at every render.
 */
export function useResumeStream(options: UseResumeStreamOptions): MessageState & {
  /**
   * The stop button: abort the message, for all who read it and for its producer. Good as an `onClick`. Never
   * rejects: where it is refused, `error` says so; a message that was completed meanwhile is no error.
   */
  stop: () => Promise<void>;
};
