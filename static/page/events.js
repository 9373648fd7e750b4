/** The Events view: every entry of a thread's sequence, a page at a time, and live at the end. */

import { ResumeStreamError } from "../resume-stream.js";
import { clock, copyButton, counted, find, make, show } from "./dom.js";
import { ask, curlOf, report, socket, urlOf } from "./service.js";

/**
 * A chunk, or the end of a message.
 *
 * @typedef {{seq: number, cursor: string, messageId: string}} Placed
 * @typedef {{timestamp?: number, content?: string, event?: string | null}} OfChunk
 * @typedef {{status?: string, reason?: string | null}} OfEnd
 * @typedef {Placed & OfChunk & OfEnd} Entry
 */

const PAGE = 200; // entries
const MAX_SHOWN = 2000; // entries on the screen while the view follows the end

const list = find("events", HTMLOListElement);
const earlier = find("events-earlier", HTMLButtonElement);
const later = find("events-later", HTMLButtonElement);

/** Shows the entries `first` to `last` of the thread's sequence. */
export class EventsView {
  first = 1;
  last = 0;
  #end = 0; // the sequence number of the thread's last known entry
  #generation = "";
  #controller = new AbortController();
  #isLoading = false;
  #isLive = false;
  #lastMessage = ""; // the message of the previous row
  /** @type {Entry[]} */ #waiting = [];

  /**
   * @param {import("./thread.js").ThreadView} thread
   * @param {string} cursor  of the thread's end
   * @param {boolean} fromEnd  begin with the last page, not with the first
   */
  constructor(thread, cursor, fromEnd) {
    this.thread = thread;
    this.threadId = thread.threadId;
    [this.#generation] = cursor.split("-");
    this.#end = Number(cursor.split("-")[1]);
    this.last = fromEnd ? Math.max(this.#end - PAGE, 0) : 0;
    this.first = this.last + 1;
    list.replaceChildren();
    earlier.onclick = () => this.#loadEarlier();
    later.onclick = () => this.#loadLater();
    this.#loadLater();
  }

  close() {
    this.#controller.abort();
    list.replaceChildren();
    earlier.hidden = later.hidden = true;
  }

  /** The thread has grown. @param {string} cursor  of its end */
  grow(cursor) {
    this.#end = Math.max(this.#end, Number(cursor.split("-")[1]));
    this.#showButtons();
  }

  /** @param {number} after  @param {number} limit  @returns {Promise<Entry[]>} */
  async #fetch(after, limit) {
    const place = after === 0 ? undefined : `${this.#generation}-${after}`;
    const url = urlOf(["threads", this.threadId, "chunks"], { after: place, limit });
    const { chunks, ends } = await ask(url, this.#controller.signal);
    /** @type {Entry[]} */
    const entries = [...chunks, ...ends].sort((one, other) => one.seq - other.seq);
    return entries.map((entry) => ({ ...entry, cursor: `${this.#generation}-${entry.seq}` }));
  }

  /** @param {() => Promise<void>} load */
  async #loading(load) {
    if (this.#isLoading) return;
    this.#isLoading = true;
    try {
      await load();
    } catch (error) {
      // The thread was cleared meanwhile. The thread's view reports that.
      const isGone = error instanceof ResumeStreamError && [404, 410].includes(error.status);
      if (!isGone && !this.#controller.signal.aborted) report(error);
    }
    this.#isLoading = false;
    this.#showButtons();
  }

  #loadLater() {
    return this.#loading(async () => {
      const entries = await this.#fetch(this.last, PAGE);
      this.thread.stick(() => list.append(...entries.map((entry) => this.#row(entry))));
      this.last = entries.at(-1)?.seq ?? this.last;
      this.#end = Math.max(this.#end, this.last);
      if (this.last === this.#end && !this.#isLive) this.#follow();
    });
  }

  #loadEarlier() {
    return this.#loading(async () => {
      const after = Math.max(this.first - 1 - PAGE, 0);
      const entries = await this.#fetch(after, this.first - 1 - after);
      const lastMessage = this.#lastMessage;
      this.#lastMessage = "";
      this.thread.keepInPlace(list.firstElementChild, () => {
        list.prepend(...entries.map((entry) => this.#row(entry)));
        this.first = after + 1;
        this.#showButtons();
      });
      this.#lastMessage = lastMessage;
    });
  }

  async #follow() {
    this.#isLive = true;
    const { signal } = this.#controller;
    const after = `${this.#generation}-${this.last}`;
    try {
      const items = socket.resumeStream({ threadId: this.threadId, after, follow: true, signal });
      for await (const item of items) {
        if (item.type === "chunk" || item.type === "complete") this.#add(item);
        else if (item.type === "reset") return; // the thread's view starts over
      }
    } catch (error) {
      if (!signal.aborted) report(error);
    }
  }

  /** @param {Entry} entry */
  #add(entry) {
    if (this.#waiting.length === 0) setTimeout(() => this.#flush(), 30); // a hidden tab has no animation frames
    this.#waiting.push(entry);
  }

  #flush() {
    if (this.#controller.signal.aborted) return;
    const entries = this.#waiting.splice(0);
    this.thread.stick(() => list.append(...entries.map((entry) => this.#row(entry))));
    this.last = this.#end = entries[entries.length - 1].seq;
    if (this.thread.isFollowing && !this.#isLoading) while (list.childElementCount > MAX_SHOWN) list.firstElementChild?.remove();
    this.first = this.last - list.childElementCount + 1;
    this.#showButtons();
  }

  #showButtons() {
    earlier.hidden = this.first <= 1;
    show(earlier, `Show ${counted(Math.min(this.first - 1, PAGE), "earlier event")}`);
    const more = this.#isLive ? 0 : this.#end - this.last;
    later.hidden = more <= 0 || this.last === 0;
    show(later, `Show ${counted(Math.min(more, PAGE), "later event")} of ${more.toLocaleString("en")}`);
  }

  /** @param {Entry} entry */
  #row({ seq, cursor, messageId, timestamp, content, event, status, reason }) {
    const row = make("li");
    const time = make("time", "", timestamp === undefined ? "" : clock(timestamp));
    if (timestamp !== undefined) time.dateTime = new Date(timestamp).toISOString();
    const what = make("span", "what");
    what.append(make("span", "of", messageId));
    if (status || event) what.append(make("span", `kind ${status ?? ""}`, status ?? event ?? ""));
    const place = urlOf(["threads", this.threadId, "stream"], { after: cursor });
    const actions = make("span", "copies");
    actions.append(
      copyButton(cursor, `cursor ${cursor}`, () => cursor, report),
      copyButton("curl", `curl that resumes after ${seq}`, () => curlOf(place, "-sN"), report),
    );
    row.classList.toggle("same", messageId === this.#lastMessage);
    this.#lastMessage = messageId;
    const text = contentOf(content ?? reason ?? "", event ?? null);
    row.append(make("span", "seq", String(seq)), time, what, text, actions);
    return row;
  }
}

/**
 * Return text as it is, and a chunk with an event name, which is often JSON, as an indented block.
 *
 * @param {string} content  @param {string | null} event
 */
function contentOf(content, event) {
  if (event === null) {
    const isBlank = content !== "" && content.trim() === "";
    const text = make("span", isBlank ? "content blank" : "content", isBlank ? JSON.stringify(content) : content);
    text.dir = "auto";
    return text;
  }
  return make("pre", "content block", indented(content));
}

/** @param {string} content */
function indented(content) {
  try {
    const value = JSON.parse(content);
    return typeof value === "object" ? JSON.stringify(value, null, 2) : content;
  } catch {
    return content; // not JSON, or only a piece of it
  }
}
