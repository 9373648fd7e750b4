/** Helpers for all parts of the page: elements, storage, words for numbers, the clipboard. */

/**
 * Return an element of index.html.
 *
 * @template {Element} [T=HTMLElement]
 * @param {string} id
 * @param {abstract new () => T} [kind]  HTMLElement unless said otherwise
 * @returns {T}
 */
export function find(id, kind = /** @type {any} */ (HTMLElement)) {
  const element = document.getElementById(id);
  if (!(element instanceof kind)) throw new TypeError(`index.html has no ${kind.name} with the id ${id}.`);
  return element;
}

/**
 * @template {keyof HTMLElementTagNameMap} K
 * @param {K} tag
 * @param {string} [className]
 * @param {string} [text]
 */
export function make(tag, className = "", text = "") {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text) element.textContent = text;
  return element;
}

/** @param {string} label  @param {string} name  for screen readers  @param {() => void} press */
export function makeButton(label, name, press) {
  const button = make("button", "", label);
  button.type = "button";
  button.setAttribute("aria-label", name);
  button.addEventListener("click", press);
  return button;
}

/** @param {Element} element  @param {string} text */
export function show(element, text) {
  if (element.textContent !== text) element.textContent = text; // a write would end a selection, and be read out
}

/** Make screen readers read a text out. @param {string} text */
export const announce = (text) => show(find("announce"), text);

/** Values as JSON in a storage, if the browser allows it. @param {() => Storage} storage */
const memoryIn = (storage) => ({
  /** @param {string} name */
  get(name) {
    try {
      return JSON.parse(storage().getItem(`resume-stream.${name}`) ?? "null");
    } catch {
      return null; // not allowed, or not written by this page
    }
  },
  /** @param {string} name  @param {any} value  null to forget it */
  set(name, value) {
    try {
      if (value === null) storage().removeItem(`resume-stream.${name}`);
      else storage().setItem(`resume-stream.${name}`, JSON.stringify(value));
    } catch {
      // The storage is full or not allowed: a reload begins from the start.
    }
  },
});

/** What this tab remembers across a reload. */
export const memory = memoryIn(() => sessionStorage);
/** What this browser remembers. */
export const preferences = memoryIn(() => localStorage);

// Words for numbers

/** @param {number} count  @param {string} noun */
export const counted = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;

/** @param {number} bytes */
export function sized(bytes) {
  const power = Math.min(Math.floor(Math.log10(Math.max(bytes, 1)) / 3), 3);
  const scaled = bytes / 1000 ** power;
  return `${scaled >= 100 || power === 0 ? Math.round(scaled) : scaled.toFixed(1)} ${["B", "kB", "MB", "GB"][power]}`;
}

/** @param {number} ms */
export function lasting(ms) {
  const seconds = Math.max(Math.round(ms / 1000), 0);
  if (seconds < 90) return `${seconds} s`;
  if (seconds < 90 * 60) return `${Math.round(seconds / 60)} min`;
  if (seconds < 36 * 3600) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86400)} d`;
}

/** @param {number} time  ms since 1970  @param {string} now  the words for less than 1.5 s */
export function ago(time, now = "just now") {
  const age = Date.now() - time;
  return age < 1500 ? now : `${lasting(age)} ago`;
}

/** @param {number} time  ms since 1970  @returns {string}  local time, like 14:03:07.042 */
export function clock(time) {
  const date = new Date(time);
  const two = (/** @type {number} */ part) => String(part).padStart(2, "0");
  const ms = String(date.getMilliseconds()).padStart(3, "0");
  return `${two(date.getHours())}:${two(date.getMinutes())}:${two(date.getSeconds())}.${ms}`;
}

/** @param {Element} facts  @param {string[]} parts */
export function showFacts(facts, parts) {
  while (facts.childElementCount > parts.length) facts.lastElementChild?.remove();
  while (facts.childElementCount < parts.length) facts.append(make("span"));
  parts.forEach((part, index) => show(facts.children[index], part));
}

// The clipboard

/** @param {string} text */
async function copy(text) {
  if (navigator.clipboard) {
    await navigator.clipboard.writeText(text);
    return;
  }
  // A page that came over plain HTTP from another machine has no clipboard API. Only the old command works.
  const field = make("textarea", "hidden");
  field.value = text;
  const focused = document.activeElement;
  document.body.append(field);
  field.select();
  const isCopied = document.execCommand("copy");
  field.remove();
  if (focused instanceof HTMLElement) focused.focus();
  if (!isCopied) throw new Error("This browser does not let the page copy; select the text and copy it by hand.");
}

/**
 * @param {string} label
 * @param {string} name  what is copied, like "cursor of run-1"
 * @param {() => string} text
 * @param {(error: unknown) => void} report
 */
export function copyButton(label, name, text, report) {
  const button = makeButton(label, `Copy ${name}`, async () => {
    try {
      await copy(text());
    } catch (error) {
      report(error);
      return;
    }
    announce(`Copied ${name}`);
    show(button, "Copied");
    button.classList.add("copied");
    setTimeout(() => {
      show(button, label);
      button.classList.remove("copied");
    }, 1500);
  });
  button.className = "small";
  return button;
}
