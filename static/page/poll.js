/** Polls the service: each second while things change, slower while they do not, and never in a hidden tab. */

import { MAX_WAIT, answered, isAsking, report } from "./service.js";

const [SHORTEST, LONGEST] = [1000, 5000]; // ms between polls

/** @typedef {(signal: AbortSignal) => Promise<boolean>} Look  whether anything has changed since the last one */

/** @type {Look[]} */
const looks = [];

/** @param {Look} look */
export const watch = (look) => looks.push(look);

let polls = 0;

/** Poll now, and then again and again. */
export async function lookNow() {
  const own = ++polls;
  let interval = SHORTEST;
  await null; // several calls at once make one poll
  while (own === polls) {
    const started = Date.now();
    if (!document.hidden && !isAsking()) interval = (await look(own)) ? SHORTEST : Math.min(interval * 1.5, LONGEST);
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
    if (own === polls) report(error); // an outdated poll may fail because of an old token
    return true; // keeps the interval short, so that the return of the service is noticed soon
  }
}

document.addEventListener("visibilitychange", () => document.hidden || lookNow());
document.addEventListener("connection", lookNow);
addEventListener("online", lookNow);
addEventListener("offline", lookNow);
