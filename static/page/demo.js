/** The demo: the page plays the agent. */

import { ResumeStreamError, appendChunks } from "../resume-stream.js";
import { find, memory, show } from "./dom.js";
import { report, service } from "./service.js";

const PACE = 110; // ms from word to word

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

const WORDS = DEMO.split(/(?<=\s)/).map((content) => ({ content }));
const button = find("play", HTMLButtonElement);

/**
 * Append the words from `index` on. The index makes sure that neither a restart nor a reload repeats a word.
 *
 * @param {{threadId: string, messageId: string, index: number}} demo
 * @param {(threadId: string) => void} open
 */
async function play(demo, open) {
  button.disabled = true;
  show(button, "Playing…");
  let { index } = demo;
  let last = Date.now();
  try {
    if (index === 0) {
      await appendChunks({ ...service, ...demo, chunks: [] }); // creates the thread
      open(demo.threadId);
    }
    while (index < WORDS.length) {
      await new Promise((resolve) => setTimeout(resolve, PACE));
      // Timers of a hidden tab are slow, so several words may be due.
      const due = Math.min(Math.max(Math.round((Date.now() - last) / PACE), 1), 12);
      last = Date.now();
      const chunks = WORDS.slice(index, index + due);
      const complete = index + due >= WORDS.length;
      await appendChunks({ ...service, ...demo, chunks, index, complete });
      index += chunks.length;
      memory.set("demo", { ...demo, index });
    }
  } catch (error) {
    // A 409 means that somebody pressed Stop or Clear.
    if (!(error instanceof ResumeStreamError) || error.status !== 409) report(error);
  }
  memory.set("demo", null);
  button.disabled = false;
  show(button, "Play a demo answer");
}

/** @param {(threadId: string) => void} open  called once the demo's thread exists */
export function offerDemo(open) {
  button.addEventListener("click", () => {
    const demo = { threadId: `demo-${Date.now().toString(36)}`, messageId: "answer-1", index: 0 };
    memory.set("demo", demo);
    play(demo, open);
  });
  const unfinished = memory.get("demo");
  if (unfinished) play(unfinished, open);
}
