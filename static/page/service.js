/** The service: requests, the state of the connection, the socket, and the token. */

import { ResumeStreamError, connect } from "../resume-stream.js";
import { ago, find, memory, show } from "./dom.js";

const MAX_SILENCE = 12_000; // ms without an answer after which the page no longer says "connected"
export const MAX_WAIT = 20_000; // ms for the answer to a poll

/** @type {string} */
export let token = memory.get("token") ?? "";
export const service = { baseUrl: new URL(".", document.baseURI), token: () => token };

/**
 * @param {string[]} path  below /api, not yet encoded
 * @param {Record<string, string | number | undefined>} [query]
 */
export function urlOf(path, query = {}) {
  const url = new URL(["api", ...path.map(encodeURIComponent)].join("/"), service.baseUrl);
  for (const [name, value] of Object.entries(query)) if (value !== undefined) url.searchParams.set(name, String(value));
  return url;
}

/** @param {URL} url  @param {AbortSignal} [signal]  @returns {Promise<any>}  the JSON of the answer */
export async function ask(url, signal) {
  const headers = token ? { Authorization: `Bearer ${token}` } : undefined;
  const response = await fetch(url, { headers, signal, cache: "no-store" }).catch((error) => {
    signal?.throwIfAborted();
    throw new ResumeStreamError({ status: 0, detail: "The service cannot be reached." }, { cause: error });
  });
  if (!response.ok) {
    const problem = await response.json().catch(() => ({ title: response.statusText }));
    throw new ResumeStreamError({ ...problem, status: response.status });
  }
  return response.json();
}

/** Return a curl command for a URL. It reads the token from $TOKEN. @param {URL} url  @param {string[]} flags */
export function curlOf(url, ...flags) {
  const header = token ? [`-H "Authorization: Bearer $TOKEN"`] : [];
  return ["curl", ...flags, ...header, `'${url.href.replaceAll("'", "%27")}'`].join(" ");
}

// The state of the connection

/** @type {"connecting" | "answering" | "unreachable" | "token"} */
let standing = "connecting";
let isStreaming = true; // false while the socket is lost
let answeredAt = 0;

const WORDS = {
  connecting: "Connecting…",
  answering: "Connected",
  unreachable: "Not reachable, trying again",
  token: "Waiting for a token",
};

/** True if the page shows the current state of the service. */
export const isLive = () => standing === "answering" && isStreaming && Date.now() - answeredAt < MAX_SILENCE;

function showStanding() {
  const isSilent = standing === "answering" && Date.now() - answeredAt >= MAX_SILENCE;
  let words = isSilent ? "No answer" : WORDS[standing];
  if (standing === "answering" && !isSilent && !isStreaming) words = "No live text, trying again";
  find("service").className = `service ${isLive() ? "up" : standing === "connecting" ? "" : "down"}`;
  show(find("service-state"), words);
  show(find("service-age"), answeredAt === 0 ? "" : `as of ${ago(answeredAt, "now")}`);
  document.body.classList.toggle("stale", !isLive());
  for (const status of document.querySelectorAll(".status.active")) showStatus(status, "active");
  document.dispatchEvent(new Event("standing"));
}

/**
 * Show a status as a dot and a word. Without a connection, an active thread or message "was active".
 *
 * @param {Element} element  @param {string} status
 */
export function showStatus(element, status) {
  element.className = `status ${status}`;
  show(element, status === "active" && !isLive() ? "was active" : status);
}

export function answered() {
  standing = "answering";
  answeredAt = Date.now();
  find("token-button").hidden = token === "";
  showStanding();
}

/** @param {string} text  "" to hide it */
export function showNotice(text) {
  show(find("notice-text"), text);
  find("notice").hidden = text === "";
}

/** @param {unknown} error */
export function report(error) {
  const isRefusal = error instanceof ResumeStreamError;
  if (isRefusal && error.status === 401) askForToken(error.message);
  else if ((isRefusal && error.status === 0) || (error instanceof Error && error.name === "TimeoutError")) {
    standing = "unreachable";
    showStanding();
  } else if (error instanceof Error && error.name !== "AbortError") showNotice(error.message);
}

// The socket

function makeSocket() {
  return connect({
    ...service,
    onConnection: ({ connected }) => {
      const isNews = isStreaming !== connected;
      isStreaming = connected;
      showStanding();
      if (isNews) document.dispatchEvent(new Event("connection"));
    },
  });
}

export let socket = makeSocket();

// The token

const dialog = find("token-dialog", HTMLDialogElement);
const field = find("token", HTMLInputElement);

export const isAsking = () => dialog.open;

/** @param {string} why */
function askForToken(why) {
  standing = "token";
  showStanding();
  if (dialog.open) return;
  if (token) show(find("token-why"), why);
  field.value = "";
  dialog.showModal();
}

dialog.addEventListener("close", () => {
  const typed = field.value.trim();
  if (dialog.returnValue !== "use" || !typed) return;
  token = typed;
  memory.set("token", token);
  socket.close();
  socket = makeSocket();
  isStreaming = true;
  showNotice("");
  document.dispatchEvent(new Event("token"));
});
find("token-button").addEventListener("click", () => askForToken("Another token replaces the one of this tab."));
find("notice-close").addEventListener("click", () => showNotice(""));
setInterval(showStanding, 1000);
