// @ts-check
/** The page: what is in the buffer, and what is happening to it. It is the client module's first user. */

import { ResumeStreamError, abortMessage, appendChunks, clearThread, connect } from "./resume-stream.js";
import { getThreadStatus, listThreads } from "./resume-stream.js";

const POLL_INTERVAL = 1000; // ms
const PLOT_SPAN = 60_000; // ms
const PAGE_OF_MESSAGES = 20;
const MAX_SAVED = 1_500_000; // characters of the open thread's text that a reload finds again
const DEMO_PACE = 110; // ms from word to word

const DEMO = `You are reading an answer while it is being written. This page plays the agent: a few times a second it \
appends some words to a message, and each append is acknowledged only once it is committed to a SQLite file.

The same page is a reader, too. It holds a cursor, the place in the sequence up to which it has read. Nothing is \
kept for it on the other side, so it may leave whenever it likes.

Try it. Reload this page now: the text you see comes back from this tab's own memory, the service compares it with \
what it holds, and sends what is missing. The small bar marks the place where the two met.

Then stop the service, and start it again. The appends wait, numbered, and are sent once more; what was stored \
already is recognized and skipped. No word is lost, and none comes twice.

If you are curious, open the file with the sqlite3 shell while this goes on: select * from transcript. And when you \
have seen enough, press Stop. The agent learns of it with its very next word.

That is all there is to it. An answer belongs to the one who asked, not to the connection it happened to travel on.`;

const find = (/** @type {string} */ id) => /** @type {any} */ (document.getElementById(id));

/**
 * @param {string} tag
 * @param {string} [className]
 * @param {string} [text]
 */
function make(tag, className = "", text = "") {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text) element.textContent = text;
  return element;
}

/** @param {Element} element  @param {string} text */
function show(element, text) {
  if (element.textContent !== text) element.textContent = text; // selections and screen readers notice writes
}

/** What this tab remembers over a reload. */
const memory = {
  /** @param {string} name */
  get(name) {
    try {
      return JSON.parse(sessionStorage.getItem(`resume-stream.${name}`) ?? "null");
    } catch {
      return null;
    }
  },
  /** @param {string} name  @param {any} value */
  set(name, value) {
    try {
      if (value === null) sessionStorage.removeItem(`resume-stream.${name}`);
      else sessionStorage.setItem(`resume-stream.${name}`, JSON.stringify(value));
    } catch {
      // Full, or not allowed: a reload then reads from the start.
    }
  },
};

// -------------------------------------------------------------------------------------------------
// The service
// -------------------------------------------------------------------------------------------------

/** @type {string} */
let token = memory.get("token") ?? "";
const service = { baseUrl: new URL(".", document.baseURI), token: () => token };
let socket = connect(service);
let isAsking = false;

/** @param {boolean} isUp  @param {string} text */
function showService(isUp, text) {
  find("service").className = `service ${isUp ? "up" : "down"}`;
  show(find("service-state"), text);
}

/** @param {string} text  "" to hide it */
function showNotice(text) {
  show(find("notice"), text);
  find("notice").hidden = text === "";
}

/** @param {unknown} error */
function report(error) {
  if (error instanceof ResumeStreamError && error.status === 401) askForToken(error.message);
  else if (error instanceof ResumeStreamError && error.status === 0) showService(false, "Not reachable, trying again");
  else if (error instanceof Error && error.name !== "AbortError") showNotice(error.message);
}

/** @param {string} why */
function askForToken(why) {
  showService(false, "Waiting for a token");
  if (isAsking) return;
  isAsking = true;
  if (token) show(find("token-why"), why);
  find("token").value = "";
  find("token-dialog").showModal();
}

find("token-dialog").addEventListener("close", () => {
  isAsking = false;
  const typed = find("token").value.trim();
  if (find("token-dialog").returnValue !== "use" || !typed) return;
  token = typed;
  memory.set("token", token);
  socket.close();
  socket = connect(service);
  showNotice("");
  thread?.close();
  thread = null;
  openFromAddress();
  poll();
});
find("token-button").addEventListener("click", () => askForToken("Another token replaces the one of this tab."));

// -------------------------------------------------------------------------------------------------
// Words for numbers
// -------------------------------------------------------------------------------------------------

/** @param {number} count  @param {string} noun */
const counted = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;

/** @param {number} bytes */
function sized(bytes) {
  const power = Math.min(Math.floor(Math.log10(Math.max(bytes, 1)) / 3), 3);
  const scaled = bytes / 1000 ** power;
  return `${scaled >= 100 || power === 0 ? Math.round(scaled) : scaled.toFixed(1)} ${["B", "kB", "MB", "GB"][power]}`;
}

/** @param {number} ms */
function lasting(ms) {
  const seconds = Math.max(Math.round(ms / 1000), 0);
  if (seconds < 90) return `${seconds} s`;
  if (seconds < 90 * 60) return `${Math.round(seconds / 60)} min`;
  if (seconds < 36 * 3600) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86400)} d`;
}

/** @param {Element} facts  @param {string[]} parts */
function showFacts(facts, parts) {
  while (facts.childElementCount > parts.length) facts.lastElementChild?.remove();
  while (facts.childElementCount < parts.length) facts.append(make("span"));
  parts.forEach((part, index) => show(facts.children[index], part));
}

/** @param {import("./resume-stream.js").ThreadSummary} thread */
function factsOf({ size, messageCount, readers, createdAt, updatedAt }) {
  const now = Date.now();
  return [
    sized(size),
    ...(messageCount === undefined ? [] : [counted(messageCount, "message")]),
    ...(readers === undefined ? [] : [counted(readers, "reader")]),
    `${lasting(now - createdAt)} old`,
    now - updatedAt < 1500 ? "last activity just now" : `last activity ${lasting(now - updatedAt)} ago`,
  ];
}

// -------------------------------------------------------------------------------------------------
// The list
// -------------------------------------------------------------------------------------------------

/** @type {Map<string, {item: HTMLElement, link: HTMLElement, status: HTMLElement, facts: HTMLElement}>} */
const rows = new Map();
let limit = 100;

/** @param {string} threadId */
function addressOf(threadId) {
  return `#/${encodeURIComponent(threadId)}`;
}

/** @param {string} threadId */
function rowOf(threadId) {
  const known = rows.get(threadId);
  if (known) return known;
  const [item, link] = [make("li"), make("a")];
  const [status, facts] = [make("span", "status"), make("span", "facts")];
  link.setAttribute("href", addressOf(threadId));
  link.append(make("span", "name", threadId), status, facts);
  item.append(link);
  const row = { item, link, status, facts };
  rows.set(threadId, row);
  return row;
}

/** @param {import("./resume-stream.js").ThreadSummary[]} threads */
function showThreads(threads) {
  const list = find("threads");
  threads.forEach((summary, index) => {
    const { item, link, status, facts } = rowOf(summary.threadId);
    status.className = `status ${summary.status}`;
    show(status, summary.status);
    showFacts(facts, factsOf(summary));
    if (summary.threadId === thread?.threadId) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
    if (list.children[index] !== item) list.insertBefore(item, list.children[index] ?? null);
  });
  const listed = new Set(threads.map(({ threadId }) => threadId));
  for (const [threadId, { item }] of rows) {
    if (listed.has(threadId)) continue;
    item.remove();
    rows.delete(threadId);
  }
  list.hidden = threads.length === 0;
  find("empty").hidden = threads.length > 0 || find("filter").value !== "";
}

// -------------------------------------------------------------------------------------------------
// The plots
// -------------------------------------------------------------------------------------------------

/** @type {{time: number, chunks: number | null, readers: number}[]} */
const samples = [];
/** @type {{time: number, total: number} | null} */
let counter = null;
let metricsAllowed = true;

/** @param {string} text  Prometheus's format  @param {string} name  @returns {number | null} */
function metric(text, name) {
  const values = [...text.matchAll(new RegExp(`^${name}(?:\\{[^}]*\\})? (\\S+)`, "gm"))];
  return values.length === 0 ? null : values.reduce((sum, [, value]) => sum + Number(value), 0);
}

/** Chunks ever taken in, and readers: from the metrics, or counted from the list where they are not for us.
 * @param {import("./resume-stream.js").ThreadSummary[]} threads
 */
async function measure(threads) {
  const counted = {
    total: threads.reduce((sum, { chunkCount }) => sum + chunkCount, 0),
    readers: threads.reduce((sum, { readers }) => sum + (readers ?? 0), 0),
  };
  if (!metricsAllowed) return counted;
  const headers = token ? { Authorization: `Bearer ${token}` } : undefined;
  const response = await fetch(new URL("metrics", service.baseUrl), { headers, cache: "no-store" }).catch(() => null);
  if (response?.ok) {
    const text = await response.text().catch(() => "");
    const total = metric(text, "resume_stream_chunks_in_total");
    return { total: total ?? counted.total, readers: metric(text, "resume_stream_readers") ?? counted.readers };
  }
  metricsAllowed = response === null; // a token for one thread may not read them: do not ask again
  return counted;
}

/** @param {{total: number, readers: number}} measured */
function takeSample({ total, readers }) {
  const time = Date.now();
  const chunks = counter && (Math.max(total - counter.total, 0) * 1000) / (time - counter.time);
  counter = { time, total };
  samples.push({ time, chunks, readers });
  while (samples[1]?.time < time - PLOT_SPAN) samples.shift();
  plot("chunks", samples.map(({ time, chunks }) => [time, chunks]), 10, false);
  plot("readers", samples.map(({ time, readers }) => [time, readers]), 2, true);
}

const SVG = "http://www.w3.org/2000/svg";
const [WIDTH, HEIGHT] = [240, 52];

/** @param {number} value  the least round number that is not below it */
function roundUp(value) {
  const unit = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * unit).find((step) => step >= value) ?? value;
}

/**
 * @param {"chunks" | "readers"} name
 * @param {[number, number | null][]} points  time and value
 * @param {number} least  the least that the top of the plot stands for
 * @param {boolean} isStepped
 */
function plot(name, points, least, isStepped) {
  const svg = find(`${name}-plot`);
  if (!svg.firstChild) {
    svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
    svg.setAttribute("preserveAspectRatio", "none");
    for (const [tag, className] of [["line", "plot-top"], ["path", "plot-area"], ["path", "plot-line"]]) {
      svg.append(document.createElementNS(SVG, tag));
      svg.lastChild.setAttribute("class", className);
    }
    for (const [key, value] of Object.entries({ x1: 0, x2: WIDTH, y1: 2, y2: 2 })) svg.firstChild.setAttribute(key, value);
  }
  const known = /** @type {[number, number][]} */ (points.filter(([, value]) => value !== null));
  if (known.length === 0) return;
  const top = roundUp(Math.max(least, ...known.map(([, value]) => value)));
  const end = known[known.length - 1][0];
  const xy = known.map(([time, value]) => [
    WIDTH * (1 - (end - time) / PLOT_SPAN),
    HEIGHT - ((HEIGHT - 2) * value) / top,
  ]);
  const joints = xy.map(([x, y], index) => (isStepped && index > 0 ? `H${x.toFixed(1)}V${y.toFixed(1)}` : `L${x.toFixed(1)},${y.toFixed(1)}`));
  const line = `M${joints.join("").slice(1)}`;
  svg.children[1].setAttribute("d", `${line}V${HEIGHT}H${xy[0][0].toFixed(1)}Z`);
  svg.children[2].setAttribute("d", line);
  const now = known[known.length - 1][1];
  show(find(`${name}-now`), isStepped ? now.toLocaleString("en") : now.toFixed(now < 10 && now > 0 ? 1 : 0));
  show(find(`${name}-top`), `top: ${top.toLocaleString("en")}`);
}

// -------------------------------------------------------------------------------------------------
// One thread
// -------------------------------------------------------------------------------------------------

/** A message on the screen, and the reading of it. */
class MessageView {
  /** @param {ThreadView} thread  @param {string} messageId  @param {string} saved  text from before a reload */
  constructor(thread, messageId, saved) {
    this.thread = thread;
    this.messageId = messageId;
    this.text = "";
    this.seams = 0;
    this.isResumed = saved !== "";
    /** @type {{content: string, event: string | null}[]} */
    this.waiting = [];

    this.element = make("article", "message");
    const header = make("header");
    const name = make("h3", "", messageId);
    this.status = make("span", "status");
    this.stop = make("button", "", "Stop");
    this.stop.setAttribute("type", "button");
    this.stop.setAttribute("aria-label", `Stop ${messageId}`);
    this.stop.hidden = true;
    this.stop.addEventListener("click", () => this.abort());
    header.append(name, this.status, this.stop);
    this.body = make("div", "text");
    this.carried = make("p", "carried");
    this.carried.hidden = true;
    this.element.append(header, this.body, this.carried);
    if (saved) {
      this.add({ content: saved, event: null });
      this.flush();
    }
  }

  async read() {
    const { threadId, signal } = this.thread;
    const { messageId, text } = this;
    try {
      for await (const item of socket.resumeStream({ threadId, messageId, knownContent: text, signal })) {
        if (item.type === "chunk") this.add(item);
        else if (item.type === "reset") this.clear();
        else if (item.type === "complete") this.showStatus(item.status, item.reason, true);
        else if (item.type === "gone") this.thread.showGone();
      }
    } catch (error) {
      if (!signal.aborted) report(error);
    }
  }

  /** @param {{content: string, event: string | null}} chunk */
  add({ content, event }) {
    this.text += content;
    if (this.waiting.length === 0) this.thread.draw(this);
    this.waiting.push({ content, event });
    this.thread.isDirty = true;
  }

  /** Write what came since the last frame of the screen. */
  flush() {
    if (this.isResumed && this.body.firstChild && this.waiting.length > 0) {
      const seam = make("span", "seam");
      seam.title = `Carried on here at ${new Date().toLocaleTimeString()}`;
      this.body.append(seam);
      this.isResumed = false;
      this.carried.hidden = false;
      show(this.carried, "Carried on from the text that this tab kept over the reload.");
    }
    for (const { content, event } of this.waiting.splice(0)) {
      const last = /** @type {any} */ (this.body.lastChild);
      if (event !== null) {
        if (last?.dataset?.event === event) last.append(content);
        else {
          const marked = make("span", "event", content);
          marked.dataset.event = event;
          this.body.append(marked);
        }
      } else if (last instanceof Text) last.appendData(content);
      else this.body.append(content);
    }
  }

  clear() {
    this.text = "";
    this.waiting = [];
    this.isResumed = false;
    this.carried.hidden = true;
    this.body.replaceChildren();
  }

  /** @param {string} status  @param {string | null} reason  @param {boolean} isNews */
  showStatus(status, reason, isNews = false) {
    const words = reason ? `${status}: ${reason}` : status;
    if (isNews && this.status.textContent === "active") show(find("announce"), `${this.messageId} ${words}`);
    this.status.className = `status ${status}`;
    show(this.status, words);
    this.stop.hidden = status !== "active";
    this.body.setAttribute("aria-busy", String(status === "active"));
  }

  async abort() {
    this.stop.setAttribute("disabled", "");
    const { threadId } = this.thread;
    const reason = "stopped on the page";
    await abortMessage({ ...service, threadId, messageId: this.messageId, reason }).catch(report);
    this.stop.removeAttribute("disabled");
  }
}

/** The open thread. */
class ThreadView {
  /** @param {string} threadId */
  constructor(threadId) {
    this.threadId = threadId;
    this.controller = new AbortController();
    this.signal = this.controller.signal;
    /** @type {Map<string, MessageView>} */
    this.messages = new Map();
    /** @type {Set<MessageView>} */
    this.drawn = new Set();
    this.shown = PAGE_OF_MESSAGES;
    this.isDirty = false;
    /** @type {number | undefined} */
    this.createdAt = undefined;
    const saved = memory.get("texts");
    /** @type {Record<string, string>} */
    this.saved = saved?.threadId === threadId ? saved.texts : {};
    find("messages").replaceChildren();
    find("thread-facts").replaceChildren();
    find("thread").hidden = find("clear").hidden = false;
    find("gone").hidden = find("earlier").hidden = true;
    find("main").classList.add("reading");
    show(find("thread-name"), threadId);
    document.title = `${threadId} · resume-stream`;
    // What this tab kept is there at once, even while the service is not.
    for (const messageId of Object.keys(this.saved)) this.open(messageId, null);
  }

  close() {
    this.save();
    this.controller.abort();
    find("thread").hidden = true;
    find("main").classList.remove("reading");
    document.title = "resume-stream";
  }

  /** @param {string} messageId  @param {Element | null} before */
  open(messageId, before) {
    const view = new MessageView(this, messageId, this.saved[messageId] ?? "");
    this.messages.set(messageId, view);
    find("messages").insertBefore(view.element, before);
    view.read();
    return view;
  }

  /** @param {import("./resume-stream.js").ThreadStatus | {exists: false}} status */
  update(status) {
    if (!status.exists) {
      this.showGone();
      return;
    }
    if (this.createdAt !== undefined && this.createdAt !== status.createdAt) {
      memory.set("texts", null); // another thread has the name now
      this.controller.abort();
      thread = new ThreadView(this.threadId);
      thread.update(status);
      return;
    }
    this.createdAt = status.createdAt;
    find("gone").hidden = true;
    find("clear").hidden = false;
    showFacts(find("thread-facts"), factsOf({ ...status, messageCount: status.messages.length }));
    const earlier = status.messages.length - this.shown;
    find("earlier").hidden = earlier <= 0;
    show(find("earlier"), `Show ${Math.min(earlier, PAGE_OF_MESSAGES)} earlier of ${earlier}`);
    /** @type {Element | null} */
    let before = null;
    for (const { messageId, status: state } of status.messages.slice(-this.shown).reverse()) {
      /** @type {MessageView} */
      const view = this.messages.get(messageId) ?? this.open(messageId, before);
      before = view.element;
      // An end is shown when the stream brings it, after the last of the text.
      if (state === "active" && view.status.textContent === "") view.showStatus(state, null);
    }
  }

  /** @param {MessageView} view */
  draw(view) {
    if (this.drawn.size === 0) setTimeout(() => this.flush(), 30); // a frame would never come in a hidden tab
    this.drawn.add(view);
  }

  flush() {
    const pane = find("thread");
    const scroller = pane.scrollHeight > pane.clientHeight + 1 ? pane : document.scrollingElement;
    const isAtEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 60;
    for (const view of this.drawn) view.flush();
    this.drawn.clear();
    if (isAtEnd && !this.signal.aborted) scroller.scrollTop = scroller.scrollHeight;
  }

  /** Keep the text over a reload. */
  save() {
    if (!this.isDirty) return;
    this.isDirty = false;
    /** @type {Record<string, string>} */
    const texts = {};
    let room = MAX_SAVED;
    for (const { messageId, text } of [...this.messages.values()].reverse()) {
      room -= text.length;
      if (room >= 0 && text !== "") texts[messageId] = text;
    }
    memory.set("texts", { threadId: this.threadId, texts });
  }

  showGone() {
    find("gone").hidden = false;
    find("clear").hidden = true;
    for (const { stop, body } of this.messages.values()) {
      stop.hidden = true;
      body.setAttribute("aria-busy", "false");
    }
    memory.set("texts", null);
    this.isDirty = false;
  }
}

/** @type {ThreadView | null} */
let thread = null;

function openFromAddress() {
  let threadId = "";
  try {
    threadId = decodeURIComponent(location.hash.replace(/^#\/?/, ""));
  } catch {
    showNotice("This address names no thread.");
  }
  if (threadId === (thread?.threadId ?? "")) return;
  const left = thread?.threadId;
  thread?.close();
  thread = threadId ? new ThreadView(threadId) : null;
  showNotice("");
  // On a narrow screen one took the place of the other, and the focus goes along.
  if (!thread) rows.get(left ?? "")?.link.focus();
  else if (getComputedStyle(find("overview")).display === "none") find("thread-name").focus();
  poll();
}

addEventListener("hashchange", openFromAddress);
addEventListener("pagehide", () => thread?.save());
find("earlier").addEventListener("click", () => {
  if (thread) thread.shown += PAGE_OF_MESSAGES;
  poll();
});
find("more").addEventListener("click", () => {
  limit = Math.min(limit + 100, 1000);
  poll();
});
find("filter").addEventListener("change", () => poll());

find("clear").addEventListener("click", () => {
  show(find("clear-name"), thread?.threadId ?? "");
  find("clear-dialog").returnValue = "";
  find("clear-dialog").showModal();
});
find("clear-dialog").addEventListener("close", async () => {
  if (find("clear-dialog").returnValue !== "clear" || !thread) return;
  const { threadId } = thread;
  try {
    await clearThread({ ...service, threadId });
    memory.set("texts", null);
    if (thread?.threadId === threadId) location.hash = "#";
  } catch (error) {
    report(error);
  }
});

// -------------------------------------------------------------------------------------------------
// The demo
// -------------------------------------------------------------------------------------------------

const WORDS = DEMO.split(/(?<=\s)/).map((content) => ({ content }));

/** Append the words from `index` on; numbered, so that neither a restart nor a reload repeats any.
 * @param {{threadId: string, messageId: string, index: number}} demo
 */
async function play(demo) {
  find("play").disabled = true;
  show(find("play"), "Playing…");
  let { index } = demo;
  let last = Date.now();
  try {
    if (index === 0) {
      await appendChunks({ ...service, ...demo, chunks: [] }).catch(() => {}); // opens it, and is tried again below
      location.hash = addressOf(demo.threadId);
    }
    while (index < WORDS.length) {
      await new Promise((resolve) => setTimeout(resolve, DEMO_PACE));
      // Timers of a hidden tab are slow, and then a few words go together.
      const due = Math.min(Math.max(Math.round((Date.now() - last) / DEMO_PACE), 1), 12);
      last = Date.now();
      const chunks = WORDS.slice(index, index + due);
      const complete = index + due >= WORDS.length;
      await appendChunks({ ...service, ...demo, chunks, index, complete });
      index += chunks.length;
      memory.set("demo", { ...demo, index });
    }
  } catch (error) {
    // 409: somebody pressed Stop, or Clear. That is the service's way of telling an agent.
    if (!(error instanceof ResumeStreamError) || error.status !== 409) report(error);
  }
  memory.set("demo", null);
  find("play").disabled = false;
  show(find("play"), "Play a demo answer");
}

find("play").addEventListener("click", () => {
  const demo = { threadId: `demo-${Date.now().toString(36)}`, messageId: "answer-1", index: 0 };
  memory.set("demo", demo);
  play(demo);
});

// -------------------------------------------------------------------------------------------------
// Once a second
// -------------------------------------------------------------------------------------------------

let polls = 0;

/** Look at everything now, and then once a second. */
async function poll() {
  const own = ++polls;
  while (own === polls) {
    const started = Date.now();
    if (!document.hidden && !isAsking) await look();
    if (own !== polls) return;
    thread?.save();
    await new Promise((resolve) => setTimeout(resolve, Math.max(POLL_INTERVAL - (Date.now() - started), 100)));
  }
}

async function look() {
  try {
    const reading = thread;
    const [page, status] = await Promise.all([
      listThreads({ ...service, limit, status: find("filter").value || undefined }),
      reading && getThreadStatus({ ...service, threadId: reading.threadId }),
    ]);
    showThreads(page.threads);
    find("more").hidden = page.cursor === null || limit >= 1000;
    if (status && reading === thread) reading?.update(status);
    takeSample(await measure(page.threads));
    showService(true, "Connected");
    find("token-button").hidden = token === "";
  } catch (error) {
    report(error);
  }
}

document.addEventListener("visibilitychange", () => document.hidden || poll());
show(
  find("example"),
  `curl ${new URL("api/threads/hello/messages/run-1/chunks", service.baseUrl)} \\
  -H 'Content-Type: text/plain' -d 'Hello, reader.'`,
);
openFromAddress();
poll();
const unfinished = memory.get("demo");
if (unfinished) play(unfinished);
