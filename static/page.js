/** The page: it shows the threads of the service, live. It uses the JavaScript client. */

import { offerDemo } from "./page/demo.js";
import { copyButton, find, preferences, show } from "./page/dom.js";
import * as list from "./page/list.js";
import { plotWhileOpen } from "./page/plots.js";
import { lookNow } from "./page/poll.js";
import { closePublish, offerPublish, openPublish } from "./page/publish.js";
import { curlOf, report, showNotice, urlOf } from "./page/service.js";
import * as threads from "./page/thread.js";

// The address: #/thread or #/thread?events

function openFromAddress() {
  const [, id, events] = /^#?\/?([^?]*)(\?events)?/.exec(location.hash) ?? [];
  let threadId = "";
  let problem = "";
  try {
    threadId = decodeURIComponent(id ?? "");
  } catch {
    problem = "This address names no thread.";
  }
  showNotice(problem);
  const left = threads.thread?.threadId ?? "";
  const view = events ? "events" : "text";
  if (threadId === left) {
    threads.thread?.choose(view);
    return;
  }
  if (!left) listTop = document.documentElement.scrollTop;
  threads.openThread(threadId, view);
  list.markCurrent(threadId);
  if (!threadId) {
    document.documentElement.scrollTop = listTop;
    list.focusRow(left);
  } else if (isNarrow() || document.activeElement?.matches("#search, #threads a:focus-visible")) {
    find("thread-name").focus({ preventScroll: true }); // so that the arrow keys scroll the thread
  }
  lookNow();
}

let listTop = 0; // the list's scroll position, for the way back on a narrow screen
const isNarrow = () => getComputedStyle(find("overview")).display === "none";

// The keyboard

const isTyping = () => document.activeElement?.matches("input:not([type=checkbox]), textarea, select") ?? false;

/** True if the arrow keys move in the list: it has the focus, or nothing has and no thread is open. */
function isInList() {
  const focused = document.activeElement;
  return focused?.matches("#search, #threads a") || (focused === document.body && !threads.thread);
}

/** @param {KeyboardEvent} event */
function press(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog:modal")) return;
  const { key } = event;
  if (key === "Escape") escape();
  else if (key === "ArrowDown" && isInList()) list.moveFocus(1);
  else if (key === "ArrowUp" && isInList()) list.moveFocus(-1);
  else if (key === "/" && !isTyping()) findThread();
  else if (key === "p" && !isTyping()) openPublish();
  else return;
  event.preventDefault();
}

function escape() {
  if (closePublish() || list.clearSearch()) return;
  if (threads.thread) location.hash = "#";
  else if (document.activeElement instanceof HTMLElement) document.activeElement.blur();
}

/** Focus the search. It does not wait for `hashchange`, so that no key after it is lost. */
function findThread() {
  if (isNarrow()) {
    history.pushState(null, "", "#");
    openFromAddress();
  }
  const search = find("search", HTMLInputElement);
  search.focus();
  search.select();
}

// Activity and demo

const folder = find("activity", HTMLDetailsElement);

/** Open it while there are no threads, unless the user chose otherwise. */
function fold() {
  const chosen = preferences.get("activity");
  if (document.body.classList.contains("known")) folder.open = chosen ?? document.body.classList.contains("first-run");
}

find("activity-summary").addEventListener("click", () => preferences.set("activity", !folder.open));
folder.addEventListener("toggle", () => lookNow());
document.addEventListener("listed", fold);

// Examples

function showExamples() {
  const hello = ["threads", "hello"];
  const append = curlOf(urlOf([...hello, "messages", "run-1", "chunks"]));
  show(find("example-append"), `${append} \\\n  -H 'Content-Type: text/plain' -d 'Hello, reader.'`);
  show(find("example-follow"), curlOf(urlOf([...hello, "stream"], { follow: "true" }), "-sN"));
  show(find("example-resume"), curlOf(urlOf([...hello, "stream"], { after: 1 }), "-sN"));
}

for (const what of ["append", "follow", "resume"]) {
  const example = find(`example-${what}`);
  example.after(copyButton("Copy", `the line to ${what}`, () => example.textContent ?? "", report));
}

showExamples();
list.listen();
threads.listen();
plotWhileOpen(folder);
offerPublish(threads.nextPlace);
addEventListener("hashchange", openFromAddress);
addEventListener("keydown", press);
document.addEventListener("token", () => {
  showExamples();
  threads.openThread("", "text");
  openFromAddress();
  lookNow();
});
openFromAddress();
lookNow();
offerDemo((threadId) => (location.hash = list.addressOf(threadId)));
