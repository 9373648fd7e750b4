// @ts-check
/**
 * The React hook of resume-stream: a message as it is written.
 *
 *     import { useResumeStream } from "resume-stream/react";
 *
 *     function Answer({ threadId, messageId }) {
 *       const { text, status, stop } = useResumeStream({ threadId, messageId, wait: true });
 *       return <p>{text} {status === "active" && <button onClick={stop}>Stop</button>}</p>;
 *     }
 *
 * The types, and what each option does, are in use-resume-stream.d.ts.
 */

import { useCallback, useEffect, useRef, useState } from "react";
import { ResumeStreamError, abortMessage, resumeStream } from "./resume-stream.js";

/** @typedef {import("./use-resume-stream.js").MessageState} MessageState */
/** @typedef {import("./resume-stream.js").StreamItem} StreamItem */

/** @type {MessageState} */
const NOTHING = { text: "", status: "idle", reason: null, error: null };
/** @type {MessageState} */
const WAITING = { ...NOTHING, status: "waiting" };

/** @type {typeof import("./use-resume-stream.js").useResumeStream} */
export function useResumeStream(options) {
  const { threadId, messageId } = options;
  const baseUrl = options.baseUrl === undefined ? undefined : String(options.baseUrl);
  const message = threadId && messageId ? JSON.stringify([baseUrl, threadId, messageId]) : null;
  const [read, setRead] = useState({ message, state: WAITING });

  // Options like token and fetch may be new objects at every render. They must not start the reading again.
  const latest = useRef(options);
  useEffect(() => {
    latest.current = options;
  });
  const service = useCallback(() => {
    const token = async () => {
      const { token } = latest.current;
      return typeof token === "function" ? token() : token;
    };
    return { baseUrl, token, fetch: latest.current.fetch };
  }, [baseUrl]);

  useEffect(() => {
    if (!message || !threadId || !messageId) return undefined;
    const controller = new AbortController();
    const { signal } = controller;
    const { wait, onConnection } = latest.current;
    /** @param {(state: MessageState) => MessageState} change */
    const update = (change) => setRead((read) => ({ message, state: change(read.state) }));
    update(() => WAITING);
    const reading = async () => {
      const items = resumeStream({ ...service(), threadId, messageId, wait, onConnection, signal });
      for await (const item of items) update((state) => withItem(state, item));
      update((state) => (isOpen(state) ? { ...state, status: "gone" } : state));
    };
    reading().catch((error) => {
      if (!signal.aborted) update((state) => ({ ...state, status: "failed", error }));
    });
    return () => controller.abort();
  }, [message, service]);

  const stop = useCallback(async () => {
    if (!message || !threadId || !messageId) return;
    const reason = latest.current.stopReason;
    try {
      await abortMessage({ ...service(), threadId, messageId, reason });
    } catch (error) {
      if (error instanceof ResumeStreamError && error.status === 409) return; // it was completed meanwhile
      setRead((read) => (read.message === message ? { message, state: { ...read.state, error } } : read));
    }
  }, [message, service]);

  const state = message === null ? NOTHING : read.message === message ? read.state : WAITING;
  return { ...state, stop };
}

/** @param {MessageState} state */
function isOpen({ status }) {
  return status === "waiting" || status === "active";
}

/** @param {MessageState} state  @param {StreamItem} item  @returns {MessageState} */
function withItem(state, item) {
  switch (item.type) {
    case "chunk":
      return { ...state, status: "active", text: state.text + item.content };
    case "reset":
      return WAITING;
    case "complete":
      return { ...state, status: item.status, reason: item.reason, error: null };
    case "gone":
      return { ...state, status: "gone" };
    default:
      return state;
  }
}
