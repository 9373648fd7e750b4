/** Append a chunk by hand: a small panel that stays open beside the thread. */

import { appendChunks } from "../resume-stream.js";
import { find, show } from "./dom.js";
import { addressOf } from "./list.js";
import { lookNow } from "./poll.js";
import { service } from "./service.js";

const panel = find("publish", HTMLDialogElement);
const form = find("publish-form", HTMLFormElement);
const threadField = find("publish-thread", HTMLInputElement);
const messageField = find("publish-message", HTMLInputElement);
const eventField = find("publish-event", HTMLInputElement);
const contentField = find("publish-content", HTMLTextAreaElement);
const ends = find("publish-ends", HTMLInputElement);
const result = find("publish-result");

/** Suggests a thread and message for the next chunk. @type {() => {threadId: string, messageId: string}} */
let suggest = () => ({ threadId: "hello", messageId: "run-1" });
/** @type {Element | null} */
let openedFrom = null;

export function openPublish() {
  const { threadId, messageId } = suggest();
  threadField.value = threadId;
  messageField.value = messageId;
  openedFrom = document.activeElement;
  show(result, "");
  if (!panel.open) panel.show();
  contentField.focus();
}

/** @returns {boolean} whether the panel was open */
export function closePublish() {
  if (!panel.open) return false;
  panel.close();
  if (openedFrom instanceof HTMLElement) openedFrom.focus();
  return true;
}

async function publish() {
  const [threadId, messageId] = [threadField.value.trim(), messageField.value.trim()];
  const content = contentField.value;
  const chunks = content === "" ? [] : [{ content, event: eventField.value.trim() || null }];
  result.classList.remove("refused");
  try {
    const { seq, status } = await appendChunks({ ...service, threadId, messageId, chunks, complete: ends.checked });
    show(result, chunks.length === 0 && status === "active" ? "The message is open." : `Committed, up to seq ${seq}.`);
    contentField.value = "";
    ends.checked = false;
    if (location.hash !== addressOf(threadId)) location.hash = addressOf(threadId);
    lookNow();
  } catch (error) {
    result.classList.add("refused");
    show(result, error instanceof Error ? error.message : String(error));
  }
  contentField.focus();
}

/** @param {typeof suggest} suggestion */
export function offerPublish(suggestion) {
  suggest = suggestion;
  for (const button of document.querySelectorAll("[data-publish]")) button.addEventListener("click", openPublish);
  find("publish-close").addEventListener("click", closePublish);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    publish();
  });
  contentField.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    form.requestSubmit();
  });
}
