/** The React hook of resume-stream. It needs React 18 or newer. */

import type { ConnectionEvent, ServiceOptions } from "./resume-stream.js";

export interface MessageState {
  /** The text of the message so far. */
  text: string;
  /**
   * - `idle`: there is no `threadId` or `messageId` yet.
   * - `waiting`: no chunk has come yet.
   * - `active`: the message is being written.
   * - `completed`, `aborted`: the message has ended; `reason` may say why.
   * - `gone`: the thread was cleared or has expired; `text` is what came before.
   * - `failed`: the message cannot be read; `error` says why. A lost connection is no failure: the hook reconnects.
   */
  status: "idle" | "waiting" | "active" | "completed" | "aborted" | "gone" | "failed";
  /** Why it was aborted, like "producer_timeout" or the `stopReason`; null otherwise. */
  reason: string | null;
  /** Why the message cannot be read, or why `stop` was refused; usually a ResumeStreamError. Null otherwise. */
  error: unknown;
}

export interface UseResumeStreamOptions extends ServiceOptions {
  /** Nothing is read while it is null, undefined or empty. */
  threadId: string | null | undefined;
  /** One message of the thread. Nothing is read while it is null, undefined or empty. */
  messageId: string | null | undefined;
  /** Wait for a message that does not exist yet, in place of failing with a 404. Default: false. */
  wait?: boolean;
  /** The reason that `stop` gives, up to 1,000 characters. The producer and all readers see it. Default: none. */
  stopReason?: string;
  /** Called when the connection opens, and when it is lost and will be opened again. */
  onConnection?: (event: ConnectionEvent) => void;
}

/**
 * Read a message, and render it as it is written. StrictMode's second mount does no harm.
 *
 * A new `baseUrl`, `threadId`, or `messageId` starts over with an empty text. All other options are used as they are
 * at the moment: `token` and `fetch` may be new functions at every render.
 */
export function useResumeStream(options: UseResumeStreamOptions): MessageState & {
  /**
   * The stop button: abort the message for its producer and all readers. You can pass it as an `onClick`. It never
   * rejects: if the service refuses, `error` says why. It is no error if the message was completed meanwhile.
   */
  stop: () => Promise<void>;
};
