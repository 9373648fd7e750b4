/** The page looks at the service again and again: soon while things happen, slower when they do not, never unseen. */

import { MAX_WAIT, answered, isAsking, report } from "./service.js";

const [SOON, SLOW] = [1000, 5000]; // ms

/** @typedef {(signal: AbortSignal) => Promise<boolean>} Look  whether anything has changed since the last one */

/** @type {Look[]} */
const looks = [];

/** @param {Look} look */
export const watch = (look) => looks.push(look);

let polls = 0;

/** Look now, and then again and again. */
export async function lookNow() {
  const own = ++polls;
  let interval = SOON;
  await null; // who asks several times at once gets one look
  while (own === polls) {
    const started = Date.now();
    if (!document.hidden && !isAsking()) interval = (await look(own)) ? SOON : Math.min(interval * 1.5, SLOW);
    if (own !== polls) return;
    await new Promise((resolve) => setTimeout(resolve, Math.max(interval - (Date.now() - started), 100)));
  }
}

/** @param {number} own */
async function look(own) {
  try {
    const signal = AbortSignal.timeout(MAX_WAIT);
    const changes = await Promise.all(looks.map((one) => one(signal)));
    answered();
    return changes.includes(true);
  } catch (error) {
    if (own === polls) report(error); // else it may be about a token that is no longer used
    return true; // so that it is noticed at once when the service is back
  }
}

document.addEventListener("visibilitychange", () => document.hidden || lookNow());
document.addEventListener("connection", lookNow);
addEventListener("online", lookNow);
addEventListener("offline", lookNow);
