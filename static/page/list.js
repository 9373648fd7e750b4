/** The list of threads: pages, the last words of the visible threads, and the search by id. */

import { ResumeStreamError, getThreadStatus, listThreads } from "../resume-stream.js";
import { Relayed, isMark } from "./dialects.js";
import { ago, counted, find, make, show, showFacts, sized } from "./dom.js";
import { lookNow, watch } from "./poll.js";
import { ask, report, service, showStatus, urlOf } from "./service.js";

/** @typedef {import("../resume-stream.js").ThreadSummary} Summary */
/** @typedef {{threads: Summary[], cursor: string | null}} Page */

const PAGE = 50; // threads
const MAX_ACTIVE = 200; // active threads in each poll, wherever they are in the list
const MAX_FOUND = 50; // threads after which a search pauses
const LAST_WORDS = 1000; // bytes of text, about, to take the last words from
const LAST_EVENTS = 20_000; // bytes of a relayed message, whose events have little text
const MAX_ENTRIES = 60; // chunks and ends to take the last words from
const LONG_WORD = 15; // characters
const AT_A_TIME = 6; // requests for last words
const CHARACTER = 8.3; // px of a wide character
const WORDS_INTERVAL = 2000; // ms, the shortest time between two requests for a row's last words

const list = find("threads", HTMLUListElement);
const filter = find("filter", HTMLSelectElement);
const search = find("search", HTMLInputElement);

/** @param {string} threadId */
export const addressOf = (threadId) => `#/${encodeURIComponent(threadId)}`;

/** A thread in the list. */
class Row {
  item = make("li");
  link = make("a");
  status = make("span", "status");
  words = make("span", "words");
  #words = make("span");
  facts = make("span", "facts");
  isSeen = false;
  wordsOf = 0; // the thread's `updatedAt` when the last words were fetched
  askedAt = 0;
  /** @type {{messageId: string, mark: string}} of the newest message; mark is "" if it is not relayed */
  #source = { messageId: "", mark: "" };

  /** @param {Summary} summary */
  constructor(summary) {
    this.summary = summary;
    this.link.href = addressOf(summary.threadId);
    this.words.dir = "auto";
    this.words.append(this.#words);
    const name = make("span", "name", summary.threadId);
    name.title = summary.threadId;
    this.link.append(name, this.status, this.words, this.facts);
    this.item.append(this.link);
    rowOf.set(this.item, this);
    sight.observe(this.item);
  }

  /** @param {Summary} summary */
  update(summary) {
    if (this.summary.createdAt !== summary.createdAt) {
      [this.wordsOf, this.askedAt] = [0, 0];
      this.#source = { messageId: "", mark: "" };
    }
    this.summary = summary;
    this.render();
  }

  render() {
    const { status, size, messageCount, readers, createdAt, updatedAt } = this.summary;
    showStatus(this.status, status);
    showFacts(this.facts, [
      ago(updatedAt),
      counted(messageCount, "message"),
      sized(size),
      ...(readers > 0 ? [counted(readers, "reader")] : []),
      ...(this.#source.mark ? [new Relayed(this.#source.mark).label] : []),
    ]);
    const [made, touched] = [createdAt, updatedAt].map((time) => new Date(time).toLocaleString());
    this.facts.title = `Made ${made}, last activity ${touched}`;
  }

  get wantsWords() {
    return this.isSeen && this.wordsOf !== this.summary.updatedAt && Date.now() - this.askedAt > WORDS_INTERVAL;
  }

  async fetchWords() {
    const { updatedAt } = this.summary;
    this.askedAt = Date.now();
    let { chunks, ends } = await this.#lastEntries();
    if (await this.#findSource(chunks)) ({ chunks, ends } = await this.#lastEntries());
    this.wordsOf = updatedAt;
    const { messageId, mark } = this.#source;
    const relayed = mark ? new Relayed(mark) : null;
    const own = chunks.filter((chunk) => chunk.messageId === messageId && !isMark(chunk));
    const said = relayed ? own.flatMap((chunk) => relayed.read(chunk)) : own;
    const text = said.filter(({ event }) => event === null).map(({ content }) => content).join("");
    const reason = this.summary.status === "aborted" && ends.at(-1)?.reason;
    const last = said.at(-1);
    this.words.classList.toggle("reason", Boolean(reason));
    const words = lastOf(text, this.link.clientWidth / CHARACTER);
    show(this.#words, reason || words || (last ? `${last.event}: ${last.content.slice(0, 80)}` : ""));
    this.render();
  }

  #lastEntries() {
    const { threadId, chunkCount, messageCount, size } = this.summary;
    const bytes = this.#source.mark ? LAST_EVENTS : LAST_WORDS;
    const start = chunkCount - Math.min(2 + Math.ceil((bytes * chunkCount) / (size || 1)), MAX_ENTRIES);
    // The end of a message also takes a place in the sequence. If many messages are active, this is beyond the end.
    return entriesAfter(threadId, start + messageCount).catch((error) => {
      if (error instanceof ResumeStreamError && error.status === 410) return entriesAfter(threadId, start);
      throw error;
    });
  }

  /**
   * Find out whether the newest message is relayed. Its first chunk has the mark.
   *
   * @param {Entry[]} chunks  the last of the thread
   * @returns {Promise<boolean>} whether it is a relayed message that was not known before
   */
  async #findSource(chunks) {
    const messageId = chunks.at(-1)?.messageId ?? "";
    if (messageId === "" || messageId === this.#source.messageId) return false;
    const first = chunks.find((chunk) => chunk.messageId === messageId);
    const isFirst = chunks[0]?.seq === 1 || (first && isMark(first));
    const mark = isFirst ? first : await firstOf(this.summary.threadId, messageId);
    this.#source = { messageId, mark: mark && isMark(mark) ? String(mark.event) : "" };
    return this.#source.mark !== "";
  }
}

/** @typedef {{seq: number, messageId: string, content: string, event: string | null}} Entry  a chunk */

/** @param {string} threadId  @param {string} messageId  @returns {Promise<Entry | undefined>} */
const firstOf = async (threadId, messageId) =>
  (await ask(urlOf(["threads", threadId, "chunks"], { message_id: messageId, limit: 1 }))).chunks[0];

/**
 * @param {string} threadId
 * @param {number} after  a sequence number, or less than 0 for the start
 * @returns {Promise<{chunks: Entry[], ends: {reason: string | null}[]}>}
 */
const entriesAfter = (threadId, after) =>
  ask(urlOf(["threads", threadId, "chunks"], { after: Math.max(after, 0), limit: 500 }));

/** Return the end of a text on one line, cut between words. @param {string} text  @param {number} length  characters */
function lastOf(text, length) {
  const line = text.slice(-4000).replace(/\s+/g, " ").trim();
  if (line.length <= length) return line;
  const end = [...line].slice(-Math.max(length, 24)).join("");
  const space = end.indexOf(" ");
  return `…${space < 0 || space > LONG_WORD ? end : end.slice(space)}`;
}

/** @type {Map<string, Row>} */
const rows = new Map();
/** @type {Row[]} the same rows, the newest first */
let order = [];
/** @type {Map<Row, string>} for some rows, the cursor of the page after it */
const places = new Map();
/** @type {WeakMap<Element, Row>} */
const rowOf = new WeakMap();
/** @type {string | null | undefined} the cursor of the page after the last row; null if there is none */
let reach;
let current = "";
let looked = 0;

// The last words of visible rows

const sight = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    const row = rowOf.get(target);
    if (row) row.isSeen = isIntersecting;
  }
  fillWords();
});
let isFilling = false;

async function fillWords() {
  if (isFilling || document.hidden) return;
  isFilling = true;
  try {
    for (;;) {
      const wanting = order.filter((row) => row.wantsWords).slice(0, AT_A_TIME);
      if (wanting.length === 0) break;
      await Promise.all(wanting.map((row) => row.fetchWords()));
    }
  } catch (error) {
    // The thread was cleared meanwhile. The next poll removes its row.
    if (!(error instanceof ResumeStreamError) || error.status !== 404) report(error);
  }
  isFilling = false;
}

// The rows

/** @param {Iterable<Row>} unwanted */
function drop(unwanted) {
  const dropped = new Set(unwanted);
  for (const row of dropped) {
    sight.unobserve(row.item);
    row.item.remove();
    rows.delete(row.summary.threadId);
    places.delete(row);
  }
  order = order.filter((row) => !dropped.has(row));
}

const isSearching = () => search.value.trim() !== "";
/** True if a thread matches the search and the filter. @param {Summary} summary */
function isWanted({ threadId, status }) {
  const isFound = threadId.toLowerCase().includes(search.value.trim().toLowerCase());
  return isFound && (filter.value === "" || filter.value === status);
}

const wantedStatus = () => /** @type {import("../resume-stream.js").Status | undefined} */ (filter.value || undefined);

/** Update or create a row. The caller puts a new one into `order`. @param {Summary} summary  @returns {Row} */
function rowFor(summary) {
  const row = rows.get(summary.threadId) ?? new Row(summary);
  rows.set(summary.threadId, row);
  row.update(summary);
  return row;
}

/**
 * Replace the rows from `start` up to the end of a page by that page.
 *
 * @param {Page} page
 * @param {number} start  an index in `order`
 */
function take({ threads, cursor }, start) {
  const page = threads.map(rowFor);
  const isIn = new Set(page);
  const end = order.findLastIndex((row) => isIn.has(row)) + 1;
  const rest = cursor === null ? [] : order.slice(Math.max(end, start)).filter((row) => !isIn.has(row));
  const next = [...order.slice(0, start).filter((row) => !isIn.has(row)), ...page, ...rest];
  const isKept = new Set(next);
  drop(order.filter((row) => !isKept.has(row)));
  order = next;
  if (cursor !== null && page.length > 0) places.set(page[page.length - 1], cursor);
  if (rest.length === 0) reach = cursor;
}

/** Take the newest threads. If none of them has a row, drop all rows: there may be a gap. @param {Page} page */
function takeNewest(page) {
  if (isSearching()) {
    const fresh = page.threads.filter((summary) => isWanted(summary) && !rows.has(summary.threadId)).map(rowFor);
    order = [...fresh, ...order];
    return;
  }
  if (!page.threads.some(({ threadId }) => rows.has(threadId))) drop(order);
  take(page, 0);
}

/**
 * Update the rows of active threads, and of those that are no longer active, wherever they are in the list.
 *
 * @param {Page} page  @param {AbortSignal} signal
 */
async function takeActive({ threads, cursor }, signal) {
  const active = new Set(threads.map(({ threadId }) => threadId));
  const ceased = order.filter(({ summary: { threadId, status } }) => status === "active" && !active.has(threadId));
  // If there are more active threads than the page has, a row that is not in the page may still be active.
  const summaries = cursor === null ? await Promise.all(ceased.map((row) => summaryOf(row, signal))) : [];
  const changed = summaries.filter((summary) => summary !== null);
  for (const summary of [...threads, ...changed]) if (rows.has(summary.threadId)) rowFor(summary);
  const isGone = new Set(ceased.filter((_, index) => summaries[index] === null));
  drop(order.filter((row) => isGone.has(row) || !isWanted(row.summary)));
}

/** @param {Row} row  @param {AbortSignal} signal  @returns {Promise<Summary | null>} */
async function summaryOf({ summary: { threadId } }, signal) {
  const status = await getThreadStatus({ ...service, threadId, signal });
  return status.exists ? status : null;
}

/** True if a visible row or one of the newest has changed since the last call. */
function hasNews() {
  const near = order.filter((row, index) => row.isSeen || index < PAGE);
  const now = JSON.stringify(near.map(({ summary }) => summary));
  const isNews = now !== seen;
  seen = now;
  return isNews;
}
let seen = "";

/** Return the index and cursor of the page with the last visible row; null for the first page. */
function pageInSight() {
  for (let index = order.findLastIndex((row) => row.isSeen) - 1; index >= 0; index -= 1) {
    const cursor = places.get(order[index]);
    if (cursor !== undefined) return { start: index + 1, cursor };
  }
  return null;
}

/** @param {AbortSignal} signal */
async function look(signal) {
  if (find("overview").offsetParent === null) return false; // a narrow screen shows a thread in its place
  const own = ++looked;
  const status = wantedStatus();
  const place = isSearching() ? null : pageInSight();
  const [head, active, inSight] = await Promise.all([
    listThreads({ ...service, signal, limit: PAGE, status }),
    listThreads({ ...service, signal, limit: MAX_ACTIVE, status: "active" }),
    place && listThreads({ ...service, signal, limit: 2 * PAGE, status, cursor: place.cursor }),
  ]);
  if (own !== looked) return true; // a newer poll has begun, perhaps with another filter
  if (place && inSight && places.get(order[place.start - 1]) === place.cursor) take(inSight, place.start);
  takeNewest(head);
  await takeActive(active, signal);
  render();
  return hasNews();
}

// Rendering

function render() {
  let place = list.firstElementChild;
  for (const row of order) {
    if (row.isSeen) row.render();
    if (row.item === place) place = place.nextElementSibling;
    else list.insertBefore(row.item, place);
  }
  const isEmpty = order.length === 0;
  list.hidden = isEmpty;
  find("more").hidden = isSearching() || !reach;
  find("none").hidden = !isEmpty || filter.value === "" || isSearching();
  if (isEmpty && reach === null && filter.value === "" && !isSearching()) document.body.classList.add("first-run");
  else if (!isEmpty) document.body.classList.remove("first-run");
  document.body.classList.toggle("known", document.body.classList.contains("known") || reach !== undefined);
  document.dispatchEvent(new Event("listed"));
  fillWords();
}

/** Mark the thread that is open. @param {string} threadId  "" for none */
export function markCurrent(threadId) {
  rows.get(current)?.link.removeAttribute("aria-current");
  current = threadId;
  rows.get(current)?.link.setAttribute("aria-current", "true");
}
document.addEventListener("listed", () => markCurrent(current));

/** @param {string} threadId */
export function focusRow(threadId) {
  const link = rows.get(threadId)?.link ?? list.querySelector("a");
  link?.focus();
}

/** Move the focus down or up. @param {1 | -1} step */
export function moveFocus(step) {
  const links = [...list.querySelectorAll("a")];
  const at = links.indexOf(/** @type {any} */ (document.activeElement));
  if (at < 0) focusRow(current);
  else if (at + step < 0) search.focus();
  else links[Math.min(at + step, links.length - 1)].focus();
}

find("more").addEventListener("click", async () => {
  const [button, from, status] = [find("more", HTMLButtonElement), reach, wantedStatus()];
  if (!from) return;
  button.disabled = true;
  try {
    const page = await listThreads({ ...service, limit: 2 * PAGE, cursor: from, status });
    if (reach === from && wantedStatus() === status) take(page, order.length);
    render();
  } catch (error) {
    report(error);
  }
  button.disabled = false;
});

function beginAnew() {
  drop(order);
  reach = undefined;
  lookNow();
}

filter.addEventListener("change", () => {
  beginAnew();
  if (search.value.trim()) searchAll();
});

// Finding by id

const isId = (/** @type {string} */ typed) => typed !== "" && !/[/\p{Cc}]/u.test(typed);
let searching = new AbortController();
let debounce = 0;

/** @param {string} text  "" to hide it */
function showFound(text) {
  show(find("found"), text);
  find("found").hidden = text === "";
}

/** Add the threads that match the search. @param {Summary[]} threads */
function addFound(threads) {
  const found = threads.filter(isWanted);
  const known = new Set(order);
  order.push(...found.map(rowFor).filter((row) => !known.has(row)));
}

/** Ask for the thread with exactly the typed id, and then go through all threads for ids that contain it. */
async function searchAll(from = "") {
  searching.abort();
  searching = new AbortController();
  const { signal } = searching;
  const typed = search.value.trim();
  find("further").hidden = true;
  find("await").hidden = true;
  drop(order.filter((row) => !isWanted(row.summary)));
  try {
    const exact = isId(typed) && (await getThreadStatus({ ...service, threadId: typed, signal }));
    if (exact && exact.exists && isWanted(exact)) addFound([exact]);
    find("await").hidden = !exact || exact.exists;
    find("await-link", HTMLAnchorElement).href = addressOf(typed);
    show(find("await-link"), `Open “${typed}” and wait for it`);
    /** @type {string | null} */
    let cursor = from;
    let count = 0;
    const enough = order.length + MAX_FOUND;
    while (cursor !== null && order.length < enough) {
      const place = { limit: 1000, status: wantedStatus(), cursor: cursor || undefined };
      const page = await listThreads({ ...service, signal, ...place });
      count += page.threads.length;
      addFound(page.threads);
      cursor = page.cursor;
      const rest = cursor === null ? "" : `, ${count.toLocaleString("en")} looked through…`;
      showFound(`${counted(order.length, "thread")} found${rest}`);
      render();
    }
    if (cursor !== null) {
      const next = cursor;
      find("further").hidden = false;
      find("further").onclick = () => searchAll(next);
    }
  } catch (error) {
    if (!signal.aborted) report(error);
  }
}

search.addEventListener("input", () => {
  searching.abort();
  clearTimeout(debounce);
  if (search.value.trim()) debounce = setTimeout(searchAll, 150);
  else leaveSearch();
});

function leaveSearch() {
  searching.abort();
  clearTimeout(debounce);
  showFound("");
  find("further").hidden = find("await").hidden = true;
  beginAnew();
}

/** @returns {boolean} whether there was a search to leave */
export function clearSearch() {
  if (search.value === "") return false;
  search.value = "";
  leaveSearch();
  return true;
}

/** Open the thread with exactly the typed id, or the newest one whose id contains it. */
async function openTyped() {
  const typed = search.value.trim();
  if (!isId(typed)) return;
  try {
    const exact = await getThreadStatus({ ...service, threadId: typed });
    const found = exact.exists ? exact : order.find(({ summary }) => isWanted(summary))?.summary;
    if (found && search.value.trim() === typed) location.hash = addressOf(found.threadId);
  } catch (error) {
    report(error);
  }
}

search.addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault();
  openTyped();
});

export function listen() {
  watch(look);
  document.addEventListener("token", beginAnew);
}
