/** Plots of chunks a second and of readers, over the last minute. They are updated only while they are open. */

import { find, show } from "./dom.js";
import { watch } from "./poll.js";
import { service, token } from "./service.js";

const PLOT_SPAN = 60_000; // ms
const SVG = "http://www.w3.org/2000/svg";
const [WIDTH, HEIGHT] = [240, 52];

/** @type {{time: number, chunks: number | null, readers: number}[]} */
const samples = [];
/** @type {{time: number, total: number} | null} */
let counter = null;
let isAllowed = true;

/** @param {string} text  in Prometheus's format  @param {string} name */
function metric(text, name) {
  const values = [...text.matchAll(new RegExp(`^${name}(?:\\{[^}]*\\})? (\\S+)`, "gm"))];
  return values.reduce((sum, [, value]) => sum + Number(value), 0);
}

/** Plot while `folder` is open. @param {HTMLDetailsElement} folder */
export function plotWhileOpen(folder) {
  watch(async (signal) => {
    if (!folder.open || !isAllowed) return false;
    const headers = token ? { Authorization: `Bearer ${token}` } : undefined;
    const response = await fetch(new URL("metrics", service.baseUrl), { headers, signal, cache: "no-store" });
    if (response.ok) takeSample(await response.text());
    isAllowed = response.ok; // a token without access to the metrics: do not ask again
    find("plots").hidden = !isAllowed;
    find("no-plots").hidden = isAllowed;
    return response.ok; // counts as a change, so that a sample is taken each second
  });
  document.addEventListener("token", () => (isAllowed = true));
}

/** @param {string} metrics */
function takeSample(metrics) {
  const [time, total] = [Date.now(), metric(metrics, "resume_stream_chunks_in_total")];
  const isNext = counter && time - counter.time < PLOT_SPAN / 6; // closed meanwhile: there is no rate
  const chunks = isNext && counter ? (Math.max(total - counter.total, 0) * 1000) / (time - counter.time) : null;
  counter = { time, total };
  samples.push({ time, chunks, readers: metric(metrics, "resume_stream_readers") });
  while (samples[1]?.time < time - PLOT_SPAN) samples.shift();
  plot("chunks", samples.map(({ time, chunks }) => [time, chunks]), 10, false);
  plot("readers", samples.map(({ time, readers }) => [time, readers]), 2, true);
}

/** Round up to 1, 2, or 5 times a power of ten. @param {number} value */
function roundUp(value) {
  const unit = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * unit).find((step) => step >= value) ?? value;
}

/** @param {SVGSVGElement} svg  @returns {Element[]}  the paths of the area and the line */
function brushes(svg) {
  if (!svg.firstChild) {
    svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
    svg.setAttribute("preserveAspectRatio", "none");
    for (const [tag, className] of [["line", "plot-top"], ["path", "plot-area"], ["path", "plot-line"]]) {
      const element = document.createElementNS(SVG, tag);
      element.setAttribute("class", className);
      svg.append(element);
    }
    const ends = Object.entries({ x1: 0, x2: WIDTH, y1: 2, y2: 2 });
    for (const [key, value] of ends) svg.children[0].setAttribute(key, String(value));
  }
  return [svg.children[1], svg.children[2]];
}

/**
 * @param {"chunks" | "readers"} name
 * @param {[number, number | null][]} points  time and value
 * @param {number} least  the lowest value for the top of the plot
 * @param {boolean} isStepped
 */
function plot(name, points, least, isStepped) {
  const [area, line] = brushes(find(`${name}-plot`, SVGSVGElement));
  const known = /** @type {[number, number][]} */ (points.filter(([, value]) => value !== null));
  if (known.length === 0) return;
  const top = roundUp(Math.max(least, ...known.map(([, value]) => value)));
  const [end, now] = known[known.length - 1];
  const xy = known.map(([time, value]) => [
    WIDTH * (1 - (end - time) / PLOT_SPAN),
    HEIGHT - ((HEIGHT - 2) * value) / top,
  ]);
  const joints = xy.map(([x, y], index) => {
    const [across, down] = [x.toFixed(1), y.toFixed(1)];
    return isStepped && index > 0 ? `H${across}V${down}` : `L${across},${down}`;
  });
  const path = `M${joints.join("").slice(1)}`;
  area.setAttribute("d", `${path}V${HEIGHT}H${xy[0][0].toFixed(1)}Z`);
  line.setAttribute("d", path);
  show(find(`${name}-now`), isStepped ? now.toLocaleString("en") : now.toFixed(now < 10 && now > 0 ? 1 : 0));
  show(find(`${name}-top`), `top: ${top.toLocaleString("en")}`);
}
