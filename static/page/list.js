/** The threads: a page of them at a time, the last words of those in sight, and finding one by its id. */

import { ResumeStreamError, getThreadStatus, listThreads } from "../resume-stream.js";
import { Relayed, isMark } from "./dialects.js";
import { ago, counted, find, make, show, showFacts, sized } from "./dom.js";
import { lookNow, watch } from "./poll.js";
import { ask, report, service, showStatus, urlOf } from "./service.js";

/** @typedef {import("../resume-stream.js").ThreadSummary} Summary */
/** @typedef {{threads: Summary[], cursor: string | null}} Page */

const PAGE = 50; // threads
const MOST_ACTIVE = 200; // threads that are looked at each time, wherever in the list they stand
const ENOUGH_FOUND = 50; // threads, after which a search asks before it goes on
const LAST_WORDS = 1000; // bytes of text, about, that the last words are taken from
const LAST_EVENTS = 20_000; // and of a relayed message's events, of which few have words
const MOST_ENTRIES = 60; // chunks and ends that they are looked for in
const LONG_WORD = 15; // characters
const AT_A_TIME = 6; // requests for last words
const CHARACTER = 8.3; // px, on the wide side
const WORDS_INTERVAL = 2000; // ms, the soonest that a row's last words are asked for again

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
  wordsOf = 0; // the `updatedAt` that the last words are of
  askedAt = 0;
  /** @type {{messageId: string, mark: string}} of the newest message; "" where it is not relayed */
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
    const start = chunkCount - Math.min(2 + Math.ceil((bytes * chunkCount) / (size || 1)), MOST_ENTRIES);
    // Each message that has ended took one more place in the sequence. Where many are active that is beyond the end.
    return entriesAfter(threadId, start + messageCount).catch((error) => {
      if (error instanceof ResumeStreamError && error.status === 410) return entriesAfter(threadId, start);
      throw error;
    });
  }

  /** Find out whose the newest message is: its first chunk says so.
   * @param {Entry[]} chunks  the last of the thread
   * @returns {Promise<boolean>} whether it is a relayed one that was not known
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
 * @param {number} after  a place in its sequence; before its start is the start
 * @returns {Promise<{chunks: Entry[], ends: {reason: string | null}[]}>}
 */
const entriesAfter = (threadId, after) =>
  ask(urlOf(["threads", threadId, "chunks"], { after: Math.max(after, 0), limit: 500 }));

/** The end of a text, on one line, cut between words. @param {string} text  @param {number} length  characters */
function lastOf(text, length) {
  const line = text.slice(-4000).replace(/\s+/g, " ").trim();
  if (line.length <= length) return line;
  const end = [...line].slice(-Math.max(length, 24)).join("");
  const space = end.indexOf(" ");
  return `…${space < 0 || space > LONG_WORD ? end : end.slice(space)}`;
}

/** @type {Map<string, Row>} */
const rows = new Map();
/** @type {Row[]} the same, the newest first */
let order = [];
/** @type {Map<Row, string>} the cursors of the places after some of them */
const places = new Map();
/** @type {WeakMap<Element, Row>} */
const rowOf = new WeakMap();
/** @type {string | null | undefined} the cursor of their end; null where they are all there are */
let reach;
let current = "";
let looked = 0;

// The last words of what is in sight

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
    // A thread that is cleared while it is looked at is seen to be gone by the next look.
    if (!(error instanceof ResumeStreamError) || error.status !== 404) report(error);
  }
  isFilling = false;
}

// What the rows are

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
/** @param {Summary} summary  whether it is what is searched for, or filtered by */
function isWanted({ threadId, status }) {
  const isFound = threadId.toLowerCase().includes(search.value.trim().toLowerCase());
  return isFound && (filter.value === "" || filter.value === status);
}

const wantedStatus = () => /** @type {import("../resume-stream.js").Status | undefined} */ (filter.value || undefined);

/** @param {Summary} summary  @returns {Row} which has its place in the order yet to get, if it is new */
function rowFor(summary) {
  const row = rows.get(summary.threadId) ?? new Row(summary);
  rows.set(summary.threadId, row);
  row.update(summary);
  return row;
}

/**
 * Take in a page of the list: it is all there is from `start` on up to its own end.
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

/** Take in the newest threads. Where they do not meet the ones that are known, these begin anew. @param {Page} page */
function takeHead(page) {
  if (isSearching()) {
    const fresh = page.threads.filter((summary) => isWanted(summary) && !rows.has(summary.threadId)).map(rowFor);
    order = [...fresh, ...order];
    return;
  }
  if (!page.threads.some(({ threadId }) => rows.has(threadId))) drop(order);
  take(page, 0);
}

/** What is active, and what of the rows has ceased to be, wherever they stand.
 * @param {Page} page  @param {AbortSignal} signal
 */
async function takeActive({ threads, cursor }, signal) {
  const active = new Set(threads.map(({ threadId }) => threadId));
  const ceased = order.filter(({ summary: { threadId, status } }) => status === "active" && !active.has(threadId));
  // Where there are more than were asked for, a row that is not among them may be active all the same.
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

/** Whether what can be seen, or the newest, is different from the last time. */
function hasNews() {
  const near = order.filter((row, index) => row.isSeen || index < PAGE);
  const now = JSON.stringify(near.map(({ summary }) => summary));
  const isNews = now !== seen;
  seen = now;
  return isNews;
}
let seen = "";

/** Where the page begins that the last row in sight is on: an index, and its cursor; null for the newest. */
function placeInSight() {
  for (let index = order.findLastIndex((row) => row.isSeen) - 1; index >= 0; index -= 1) {
    const cursor = places.get(order[index]);
    if (cursor !== undefined) return { start: index + 1, cursor };
  }
  return null;
}

/** @param {AbortSignal} signal */
async function look(signal) {
  if (find("overview").offsetParent === null) return false; // a phone shows a thread in its place
  const own = ++looked;
  const status = wantedStatus();
  const place = isSearching() ? null : placeInSight();
  const [head, active, inSight] = await Promise.all([
    listThreads({ ...service, signal, limit: PAGE, status }),
    listThreads({ ...service, signal, limit: MOST_ACTIVE, status: "active" }),
    place && listThreads({ ...service, signal, limit: 2 * PAGE, status, cursor: place.cursor }),
  ]);
  if (own !== looked) return true; // another was begun, with another filter perhaps
  if (place && inSight && places.get(order[place.start - 1]) === place.cursor) take(inSight, place.start);
  takeHead(head);
  await takeActive(active, signal);
  render();
  return hasNews();
}

// What is shown

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

/** Down or up from the row that has the focus. @param {1 | -1} step */
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
  if (search.value.trim()) goThrough();
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

/** Keep those that are searched for. @param {Summary[]} threads */
function keep(threads) {
  const found = threads.filter(isWanted);
  const known = new Set(order);
  order.push(...found.map(rowFor).filter((row) => !known.has(row)));
}

/** Go through all threads for those whose id has what is typed; the exact one is asked for at once. */
async function goThrough(from = "") {
  searching.abort();
  searching = new AbortController();
  const { signal } = searching;
  const typed = search.value.trim();
  find("further").hidden = true;
  find("await").hidden = true;
  drop(order.filter((row) => !isWanted(row.summary)));
  try {
    const exact = isId(typed) && (await getThreadStatus({ ...service, threadId: typed, signal }));
    if (exact && exact.exists && isWanted(exact)) keep([exact]);
    find("await").hidden = !exact || exact.exists;
    find("await-link", HTMLAnchorElement).href = addressOf(typed);
    show(find("await-link"), `Open “${typed}” and wait for it`);
    /** @type {string | null} */
    let cursor = from;
    let count = 0;
    const enough = order.length + ENOUGH_FOUND;
    while (cursor !== null && order.length < enough) {
      const place = { limit: 1000, status: wantedStatus(), cursor: cursor || undefined };
      const page = await listThreads({ ...service, signal, ...place });
      count += page.threads.length;
      keep(page.threads);
      cursor = page.cursor;
      const rest = cursor === null ? "" : `, ${count.toLocaleString("en")} looked through…`;
      showFound(`${counted(order.length, "thread")} found${rest}`);
      render();
    }
    if (cursor !== null) {
      const next = cursor;
      find("further").hidden = false;
      find("further").onclick = () => goThrough(next);
    }
  } catch (error) {
    if (!signal.aborted) report(error);
  }
}

search.addEventListener("input", () => {
  searching.abort();
  clearTimeout(debounce);
  if (search.value.trim()) debounce = setTimeout(goThrough, 150);
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

/** Open what was typed: the thread of exactly this id, or else the newest that has it in its id. */
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
