/** The Text view of a message, live. */

import { abortMessage } from "../resume-stream.js";
import { Relayed, isMark } from "./dialects.js";
import { announce, copyButton, find, make, makeButton, preferences, show } from "./dom.js";
import { curlOf, report, service, showStatus, socket, urlOf } from "./service.js";

/** @typedef {import("./thread.js").ThreadView} ThreadView */
/** @typedef {{content: string, event: string | null}} Piece */
/** @typedef {import("./dialects.js").KeptRelayed} KeptRelayed */
/** @typedef {{pieces: Piece[], cursor: string, relayed?: KeptRelayed}} Kept  across a reload */

/** Reads a message and shows it. */
export class MessageView {
  text = ""; // of a relayed message only the text, without remarks
  cursor = "";
  state = ""; // the status that is shown; "" before the first one
  /** @type {Piece[]} */ #waiting = [];
  #isResumed = false;
  #isAfterRemark = false;
  /** @type {Relayed | null} */ #relayed = null;
  /** @type {AbortController | null} */ #reading = null;

  element = make("article", "message");
  #source = make("span", "source");
  #status = make("span", "status");
  #body = make("div", "text");
  #reason = make("p", "reason");
  #carried = make("p", "carried");

  /** @param {ThreadView} thread  @param {string} messageId  @param {Kept} [kept] */
  constructor(thread, messageId, kept) {
    this.thread = thread;
    this.messageId = messageId;
    this.stop = makeButton("Stop", `Stop ${messageId}`, () => this.#abort());
    this.stop.className = "small danger";
    this.stop.hidden = true;
    this.#source.hidden = this.#status.hidden = this.#reason.hidden = this.#carried.hidden = true;
    this.#body.dir = "auto";
    this.copies = [
      copyButton("Text", `text of ${messageId}`, () => this.text, report),
      copyButton("Cursor", `cursor of ${messageId}`, () => this.cursor, report),
      copyButton("curl", `curl that resumes ${messageId} here`, () => this.#curl(), report),
    ];
    const copies = make("span", "copies", "Copy");
    copies.append(...this.copies);
    const header = make("header");
    header.append(make("h3", "", messageId), this.#source, this.#status, this.stop, copies);
    this.element.append(header, this.#body, this.#reason, this.#carried);
    this.#moveTo(kept?.cursor ?? "");
    if (!kept) return;
    if (kept.relayed) this.#showSource(Relayed.from(kept.relayed));
    kept.pieces.forEach((piece) => this.#add(piece));
    this.flush();
    this.#isResumed = true;
  }

  #curl() {
    const path = ["threads", this.thread.threadId, "messages", this.messageId, "stream"];
    return curlOf(urlOf(path, { after: this.cursor }), "-sN");
  }

  /** @param {string} cursor */
  #moveTo(cursor) {
    this.cursor = cursor;
    for (const button of this.copies.slice(1)) button.disabled = cursor === "";
  }

  /** @returns {Kept} */
  get kept() {
    this.flush();
    const pieces = [...this.#body.childNodes].map((node) => ({
      content: node.textContent ?? "",
      event: (node instanceof HTMLElement && node.dataset.event) || null,
    }));
    return { pieces: pieces.filter(({ content }) => content !== ""), cursor: this.cursor, relayed: this.#relayed?.kept };
  }

  async read() {
    if (this.#reading || (this.state !== "active" && this.state !== "")) return;
    const { threadId } = this.thread;
    const { messageId } = this;
    const from = this.#relayed ? { after: this.#relayed.cursor } : { knownContent: this.text };
    this.#reading = new AbortController();
    const { signal } = this.#reading;
    try {
      for await (const item of socket.resumeStream({ threadId, messageId, ...from, signal })) {
        if (item.type === "chunk") this.#take(item);
        else if (item.type === "reset") this.#clear();
        else if (item.type === "complete") this.#end(item);
        else if (item.type === "gone") this.thread.showGone();
        if ("cursor" in item) this.#moveTo(item.cursor);
      }
    } catch (error) {
      if (!signal.aborted) report(error);
    }
  }

  /** Stop reading. `read` continues from the text. */
  pause() {
    this.#reading?.abort();
    this.#reading = null;
  }

  /** @param {Piece & {cursor: string}} chunk */
  #take(chunk) {
    if (isMark(chunk)) this.#showSource(new Relayed(String(chunk.event)));
    else if (this.#relayed) this.#relayed.read(chunk).forEach((piece) => this.#add(piece));
    else this.#add(chunk);
    if (this.#relayed) this.#relayed.cursor = chunk.cursor;
  }

  /** @param {Relayed | null} relayed */
  #showSource(relayed) {
    this.#relayed = relayed;
    this.#source.hidden = relayed === null;
    show(this.#source, relayed?.label ?? "");
  }

  /** @param {Piece} piece */
  #add({ content, event }) {
    const isRemark = this.#relayed !== null && event !== null;
    if (!isRemark) this.text += this.#isAfterRemark && this.text ? `\n\n${content}` : content;
    this.#isAfterRemark = isRemark;
    if (this.#waiting.length === 0) this.thread.draw(this);
    this.#waiting.push({ content, event });
    this.thread.isDirty = true;
  }

  /** Write the pieces that came since the last flush. */
  flush() {
    if (this.#isResumed && this.#waiting.length > 0) {
      const seam = make("span", "seam");
      seam.title = `Carried on here at ${new Date().toLocaleTimeString()}`;
      this.#body.append(seam);
      this.#isResumed = false;
      this.#carried.hidden = false;
      show(this.#carried, "Carried on from the text that this tab kept over the reload.");
    }
    for (const { content, event } of this.#waiting.splice(0)) {
      const last = /** @type {any} */ (this.#body.lastChild);
      if (event !== null) {
        if (last?.dataset?.event === event) last.append(content);
        else {
          const block = make("span", "event", content);
          block.dataset.event = event;
          this.#body.append(block);
        }
      } else if (last instanceof Text) last.appendData(content);
      else this.#body.append(content);
    }
  }

  #clear() {
    this.text = "";
    this.#isAfterRemark = false;
    this.#showSource(null);
    this.#moveTo("");
    this.#waiting = [];
    this.#isResumed = false;
    this.#carried.hidden = true;
    this.#body.replaceChildren();
  }

  /** @param {{status: string, reason: string | null}} end */
  #end({ status, reason }) {
    this.flush();
    if (this.state === "active") announce(`${this.messageId} ${reason ? `${status}: ${reason}` : status}`);
    this.#reason.hidden = reason === null;
    show(this.#reason, reason ?? "");
    this.showState(status);
  }

  /** @param {string} state */
  showState(state) {
    this.state = state;
    this.#status.hidden = false;
    showStatus(this.#status, state);
    this.stop.hidden = state !== "active";
    this.#body.setAttribute("aria-busy", String(state === "active"));
  }

  /** The thread is gone: show the message as it was, without controls. */
  still() {
    this.stop.hidden = true;
    this.#status.hidden = this.state === "active";
    this.#body.setAttribute("aria-busy", "false");
  }

  async #abort() {
    this.stop.disabled = true;
    const { threadId } = this.thread;
    const reason = "stopped on the page";
    await abortMessage({ ...service, threadId, messageId: this.messageId, reason }).catch(report);
    this.stop.disabled = false;
  }
}

// Monospaced text, for all threads

const mono = find("mono", HTMLButtonElement);

/** @param {boolean} isMono */
function setMono(isMono) {
  mono.setAttribute("aria-pressed", String(isMono));
  find("messages").classList.toggle("mono", isMono);
}

setMono(preferences.get("mono") === true);
mono.addEventListener("click", () => {
  const isMono = mono.getAttribute("aria-pressed") !== "true";
  setMono(isMono);
  preferences.set("mono", isMono);
});
