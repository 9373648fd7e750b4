/** The open thread: its header, its two views, and its scroll position. */

import { clearThread, getThreadStatus } from "../resume-stream.js";
import { ago, counted, find, lasting, memory, show, showFacts, sized } from "./dom.js";
import { EventsView } from "./events.js";
import { lookNow, watch } from "./poll.js";
import { isLive, report, service, showStatus } from "./service.js";
import { MessageView } from "./text.js";

/** @typedef {import("../resume-stream.js").ThreadStatus} ThreadStatus */
/** @typedef {import("./text.js").Kept} Kept */
/** @typedef {"text" | "events"} View */

const PAGE = 20; // messages
const MAX_SAVED = 1_500_000; // characters of text that the tab keeps across a reload
const NEAR = 40; // px from the end that still count as the end

const pane = find("thread");

/** Return the element that scrolls: the document on a narrow screen, the thread on a wide one. */
const scroller = () => (getComputedStyle(pane).overflowY === "auto" ? pane : document.documentElement);

const toEnd = ({ scrollHeight, scrollTop, clientHeight } = scroller()) => scrollHeight - scrollTop - clientHeight;

/** The open thread. */
export class ThreadView {
  /** @type {Map<string, MessageView>} */ messages = new Map();
  isDirty = false; // true if there is text that is not saved
  isFollowing = true;
  /** @type {ThreadStatus | null} */ status = null;
  /** @type {EventsView | null} */ #events = null;
  /** @type {Set<MessageView>} */ #drawn = new Set();
  #isClosed = false;
  #from = 0; // the first message on the screen
  #to = Infinity; // the first one after them; Infinity includes new messages
  #top = 0; // the last known scroll position

  /** @param {string} threadId  @param {View} view */
  constructor(threadId, view) {
    this.threadId = threadId;
    this.view = view;
    const kept = memory.get("kept");
    /** @type {Record<string, Kept>} */
    this.kept = kept?.threadId === threadId ? kept.messages : {};
    find("messages").replaceChildren();
    find("thread-facts").replaceChildren();
    pane.hidden = false;
    find("thread-status").hidden = find("clear").hidden = true;
    for (const id of ["gone", "earlier", "later", "to-end"]) find(id).hidden = true;
    document.body.classList.add("reading");
    show(find("thread-name"), threadId);
    document.title = `${threadId} · resume-stream`;
    this.#showView();
    // Show what this tab kept right away, even if the service does not answer.
    for (const messageId of Object.keys(this.kept)) find("messages").append(this.#open(messageId).element);
    this.showWaiting();
    this.isFollowing = false; // until the status is known
    scroller().scrollTop = 0;
  }

  close() {
    this.save();
    this.#stop();
    pane.hidden = true;
    document.body.classList.remove("reading");
    document.title = "resume-stream";
  }

  #stop() {
    this.#isClosed = true;
    for (const message of this.messages.values()) message.pause();
    this.#events?.close();
  }

  // The state of the thread

  /** @param {ThreadStatus | {exists: false}} status  @returns {boolean} whether anything has changed */
  update(status) {
    if (!status.exists) {
      const isNews = find("gone").hidden === true;
      this.showGone();
      return isNews;
    }
    const before = this.status;
    if (before && before.createdAt !== status.createdAt) {
      memory.set("kept", null); // the thread was created again
      this.#stop();
      thread = new ThreadView(this.threadId, this.view);
      return thread.update(status);
    }
    this.status = status;
    if (!before) this.#begin(status);
    else if (before.status !== "active" && status.status === "active" && toEnd() < NEAR) this.isFollowing = true;
    find("gone").hidden = true;
    find("clear").hidden = false;
    this.showWaiting();
    this.#showFacts(status);
    this.#showMessages(status);
    this.#events?.grow(status.cursor);
    if (this.view === "events" && !this.#events) this.#openEvents();
    this.stick(() => {});
    return !before || before.cursor !== status.cursor || before.readers !== status.readers;
  }

  /** Show the end of an active thread, and the beginning of another. @param {ThreadStatus} status */
  #begin({ status, messages }) {
    this.isFollowing = status === "active";
    if (messages.length <= PAGE) return;
    if (this.isFollowing) this.#from = messages.length - PAGE;
    else this.#to = PAGE;
  }

  /** @param {ThreadStatus} status */
  #showFacts({ status, size, messages, readers, createdAt, updatedAt }) {
    find("thread-status").hidden = false;
    showStatus(find("thread-status"), status);
    showFacts(find("thread-facts"), [
      counted(messages.length, "message"),
      sized(size),
      ...(readers === undefined ? [] : [counted(readers, "reader")]),
      `${lasting(Date.now() - createdAt)} old`,
      `last activity ${ago(updatedAt)}`,
    ]);
  }

  /** @param {ThreadStatus} status */
  #showMessages({ messages }) {
    const [from, to] = [this.#from, Math.min(this.#to, messages.length)];
    const shown = messages.slice(from, to);
    const ids = new Set(shown.map(({ messageId }) => messageId));
    for (const [messageId, message] of this.messages) {
      if (ids.has(messageId)) continue;
      message.pause();
      message.element.remove();
      this.messages.delete(messageId);
    }
    const list = find("messages");
    let place = list.firstElementChild;
    for (const { messageId, status } of shown) {
      const message = this.messages.get(messageId) ?? this.#open(messageId);
      if (message.element === place) place = place.nextElementSibling;
      else list.insertBefore(message.element, place);
      // The end of a message shows when the stream brings it, after the last chunk.
      if (status === "active" && message.state === "") message.showState(status);
    }
    this.#showButton("earlier", from);
    this.#showButton("later", messages.length - to);
  }

  /** @param {"earlier" | "later"} which  @param {number} count  messages that are not on the screen */
  #showButton(which, count) {
    const next = counted(Math.min(count, PAGE), `${which} message`);
    find(which).hidden = count <= 0;
    show(find(which), count > PAGE ? `Show ${next} of ${count.toLocaleString("en")}` : `Show ${next}`);
  }

  /** @param {string} messageId */
  #open(messageId) {
    const message = new MessageView(this, messageId, this.kept[messageId]);
    this.messages.set(messageId, message);
    if (this.view === "text") message.read();
    return message;
  }

  showEarlier() {
    this.#from = Math.max(this.#from - PAGE, 0);
    this.keepInPlace(find("messages").firstElementChild, () => this.status && this.#showMessages(this.status));
  }

  /**
   * Write above an element, and scroll so that the element stays in its place.
   *
   * @param {Element | null} anchor  @param {() => void} write
   */
  keepInPlace(anchor, write) {
    const top = anchor?.getBoundingClientRect().top ?? 0;
    write();
    scroller().scrollTop += (anchor?.getBoundingClientRect().top ?? 0) - top;
  }

  showLater() {
    const count = this.status?.messages.length ?? 0;
    this.#to = this.#to + PAGE >= count ? Infinity : this.#to + PAGE;
    if (this.status) this.#showMessages(this.status);
  }

  showGone() {
    find("gone").hidden = false;
    find("clear").hidden = find("thread-status").hidden = find("to-end").hidden = true;
    this.showWaiting();
    for (const message of this.messages.values()) message.still();
    memory.set("kept", null);
    this.isDirty = false;
  }

  /** Say why there is nothing to read yet. */
  showWaiting() {
    const isEmpty = !this.status && this.messages.size === 0 && find("gone").hidden;
    find("waiting").hidden = !isEmpty;
    const why = "This tab has no copy of this thread. It shows the thread as soon as the service answers.";
    show(find("waiting"), isLive() ? "Reading…" : why);
  }

  // The two views

  /** @param {View} view */
  choose(view) {
    if (view === this.view) return;
    this.view = view;
    this.#showView();
    if (view === "events") {
      for (const message of this.messages.values()) message.pause();
      if (this.status) this.#openEvents();
    } else {
      this.#events?.close();
      this.#events = null;
      for (const message of this.messages.values()) message.read();
    }
    this.isFollowing = this.status?.status === "active";
    this.stick(() => {
      if (!this.isFollowing) scroller().scrollTop = 0;
    });
  }

  #openEvents() {
    const { status } = this;
    if (!status) return;
    this.#events = new EventsView(this, status.cursor, status.status === "active");
  }

  #showView() {
    for (const name of ["text", "events"]) {
      const isChosen = name === this.view;
      find(`${name}-tab`).setAttribute("aria-selected", String(isChosen));
      find(`${name}-tab`).tabIndex = isChosen ? 0 : -1;
      find(`${name}-panel`).hidden = !isChosen;
    }
    find("mono").hidden = this.view !== "text";
  }

  // Drawing and scrolling

  /** @param {MessageView} message */
  draw(message) {
    if (this.#drawn.size === 0) setTimeout(() => this.#flush(), 30); // a hidden tab has no animation frames
    this.#drawn.add(message);
  }

  #flush() {
    const drawn = [...this.#drawn];
    this.#drawn.clear();
    this.stick(() => drawn.forEach((message) => message.flush()));
    this.showWaiting();
  }

  /** Write, and then scroll to the end again if the view follows it. @param {() => void} write */
  stick(write) {
    // A scroll event comes one frame after the scroll. Look now, so as not to undo a scroll of the user.
    if (!this.#isClosed) this.scrolled();
    write();
    if (this.#isClosed) return;
    if (this.isFollowing) {
      const page = scroller();
      page.scrollTop = page.scrollHeight;
      this.#top = page.scrollTop;
    }
    this.#showToEnd();
  }

  scrolled() {
    const { scrollTop } = scroller();
    const isActive = this.status?.status === "active";
    if (scrollTop < this.#top - 1 && toEnd() >= NEAR) this.isFollowing = false;
    else if (toEnd() < NEAR && isActive && this.#to === Infinity) this.isFollowing = true;
    this.#top = scrollTop;
    this.#showToEnd();
  }

  #showToEnd() {
    find("to-end").hidden = this.isFollowing || this.status?.status !== "active" || !find("gone").hidden;
  }

  goToEnd() {
    const count = this.status?.messages.length ?? 0;
    if (this.#to !== Infinity) [this.#from, this.#to] = [Math.max(count - PAGE, 0), Infinity];
    if (this.status) this.#showMessages(this.status);
    this.isFollowing = true;
    this.stick(() => {});
  }

  // Across a reload

  save() {
    if (!this.isDirty) return;
    this.isDirty = false;
    /** @type {[string, Kept][]} */
    const kept = [];
    let room = MAX_SAVED;
    for (const message of [...this.messages.values()].reverse()) {
      room -= message.text.length;
      if (room >= 0 && message.text !== "") kept.unshift([message.messageId, message.kept]);
    }
    memory.set("kept", { threadId: this.threadId, messages: Object.fromEntries(kept) });
  }
}

/** @type {ThreadView | null} */
export let thread = null;

/** @param {string} threadId  "" for none  @param {View} view */
export function openThread(threadId, view) {
  thread?.close();
  thread = threadId ? new ThreadView(threadId, view) : null;
}

/** Suggest a thread and message for the next chunk. */
export function nextPlace() {
  const messages = thread?.status?.messages ?? [];
  const active = messages.findLast(({ status }) => status === "active");
  return { threadId: thread?.threadId ?? "hello", messageId: active?.messageId ?? `run-${messages.length + 1}` };
}

/** @param {View} view */
function chooseView(view) {
  if (!thread) return;
  thread.choose(view);
  const address = `#/${encodeURIComponent(thread.threadId)}${view === "events" ? "?events" : ""}`;
  history.replaceState(history.state, "", address);
}

function listenToTabs() {
  for (const view of /** @type {View[]} */ (["text", "events"])) {
    const [tab, other] = [find(`${view}-tab`), find(`${view === "text" ? "events" : "text"}-tab`)];
    tab.addEventListener("click", () => chooseView(view));
    tab.addEventListener("keydown", ({ key }) => {
      if (key !== "ArrowLeft" && key !== "ArrowRight") return;
      other.focus();
      other.click();
    });
  }
}

function listenToClear() {
  const dialog = find("clear-dialog", HTMLDialogElement);
  find("clear").addEventListener("click", () => {
    show(find("clear-name"), thread?.threadId ?? "");
    dialog.returnValue = "";
    dialog.showModal();
  });
  dialog.addEventListener("close", async () => {
    if (dialog.returnValue !== "clear" || !thread) return;
    const { threadId } = thread;
    try {
      await clearThread({ ...service, threadId });
      memory.set("kept", null);
      if (thread?.threadId === threadId) location.hash = "#";
    } catch (error) {
      report(error);
    }
  });
}

export function listen() {
  watch(async (signal) => {
    const reading = thread;
    if (!reading) return false;
    reading.save();
    const status = await getThreadStatus({ ...service, threadId: reading.threadId, signal });
    return reading === thread && reading.update(status);
  });
  listenToTabs();
  listenToClear();
  find("earlier").addEventListener("click", () => thread?.showEarlier());
  find("later").addEventListener("click", () => thread?.showLater());
  find("to-end").addEventListener("click", () => {
    thread?.goToEnd();
    lookNow();
  });
  pane.addEventListener("scroll", () => thread?.scrolled());
  document.addEventListener("scroll", () => thread?.scrolled());
  document.addEventListener("standing", () => thread?.showWaiting());
  addEventListener("pagehide", () => thread?.save());
}
